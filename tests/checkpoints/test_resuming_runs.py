"""What a run's folder is given to, and what is taken from it: settings, agents that do not fit, runs that a callback ended."""

import errno
import itertools
import os
import signal
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import configure_logger
from tiny import FAST

from sb3_mbpo import MBPO, ResumeCallback, resume
from sb3_mbpo.checkpoints import checkpoint
from sb3_mbpo.checkpoints.checkpoint import listed, read

QUICK = {**FAST, "gradient_steps": 1, "model_train_freq": 100}


class Ends(BaseCallback):
    """Ends ``learn`` at a step, and again whenever it is asked later."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def _on_step(self):
        return self.num_timesteps < self.step


def made(**settings):
    return MBPO("MlpPolicy", "Pendulum-v1", **{**QUICK, **settings})


def steps(folder):
    return [one.step for one in listed(folder)]


def test_a_run_keeps_its_settings(tmp_path, monkeypatch):
    """A run that is resumed with its folder alone uses the settings that it was started with."""
    monkeypatch.setattr("sb3_mbpo.checkpoints.resume_callback._PATIENCE", 0)
    made().learn(30, ResumeCallback(tmp_path, every=5, keep=10, signals=["SIGUSR2"], verbose=1))
    assert steps(tmp_path) == [30, 25, 20, 15, 10, 5]
    seen = []

    class Look(BaseCallback):
        def _on_step(self):
            seen.append(self.model.resume_callback)
            return True

    # A longer run: the settings are those of the checkpoint.
    state, tensors = read(next(listed(tmp_path)).path)
    state["learn"]["total_timesteps"] = 40
    checkpoint.write(tmp_path, state, tensors, 30)
    resume(tmp_path, "Pendulum-v1", Look())
    assert steps(tmp_path) == [40, 35, 30, 30, 25, 20, 15, 10, 5]
    assert (seen[0].every, seen[0].keep, seen[0].signals, seen[0].verbose) == (5, 10, ["SIGUSR2"], 1)


def test_other_settings_are_passed_as_a_callback(tmp_path):
    made().learn(5, ResumeCallback(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"resume: the ResumeCallback .* is for .*other, and must be for .*run"):
        resume(tmp_path / "run", "Pendulum-v1", [ResumeCallback(tmp_path / "other")])
    callback = ResumeCallback(tmp_path / "run", keep=1)
    assert resume(tmp_path / "run", "Pendulum-v1", [callback]).num_timesteps == 5


def test_a_foreign_checkpoint_writes_no_logs_elsewhere(tmp_path):
    """``tb_log_name`` of a run is a folder inside ``tensorboard_log``; other arguments of ``learn`` are not read."""
    logs = str(tmp_path / "logs")
    made(tensorboard_log=logs).learn(3, ResumeCallback(tmp_path / "run"), tb_log_name="group/x")
    state, tensors = read(next(listed(tmp_path / "run")).path)
    state["learn"] |= {"total_timesteps": 4, "reset_num_timesteps": True, "callback": None}
    checkpoint.write(tmp_path / "run", state, tensors, 3)
    assert resume(tmp_path / "run", "Pendulum-v1", tensorboard_log=logs).num_timesteps == 4
    assert [str(path.relative_to(logs)) for path in sorted((tmp_path / "logs").rglob("*/"))] == ["group", "group/x_1"]
    for name in ("../x", "a/../../x", "/x", "..", "C:x", "a\\..\\x", "a\0", 3, ["x"]):
        state["learn"]["tb_log_name"] = name
        written = checkpoint.write(tmp_path / "run", state, tensors, 3)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"{written.path.name}: tb_log_name=.* is not the name of a folder inside tensor"):
            resume(tmp_path / "run", "Pendulum-v1", tensorboard_log=logs)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_foreign_checkpoint_without_its_parts(tmp_path):
    """Each part is needed, by the callback as by ``resume``, which take turns here, and an error names what is missing."""
    made().learn(3, ResumeCallback(tmp_path))
    state, tensors = read(next(listed(tmp_path)).path)
    parts = [(state, name) for name in ("class", "stopped", "origin", "life", "left", "settings", "agent", "learn", "state")]
    parts += [(state[part], name) for part in ("settings", "learn") for name in state[part]] + [(state["agent"], "arguments")]
    ways = itertools.cycle([lambda: resume(tmp_path, "Pendulum-v1"), lambda: made().learn(5, ResumeCallback(tmp_path))])
    for owner, name in parts:
        kept = owner.pop(name)
        for wrong in ({}, {name: "x" if not isinstance(kept, str) else 3}):
            if name in ("class", "stopped", "origin", "life", "left", "settings", "agent", "learn", "state") or not wrong:
                owner.update(wrong)
                checkpoint.write(tmp_path, state, tensors, 3)
                with pytest.raises(ValueError, match=rf"this is not a checkpoint of a run: .*{name}"):
                    next(ways)()
        owner[name] = kept


def test_a_callback_that_was_in_an_earlier_run(tmp_path):
    """SB3 leaves the callbacks of that run in its ``locals``."""
    callback = Ends(1000)
    made().learn(6, [callback, ResumeCallback(tmp_path / "first")])
    made().learn(5, [callback, ResumeCallback(tmp_path / "second")])
    assert steps(tmp_path / "second") == [5]
    state, tensors = read(next(listed(tmp_path / "second")).path)
    state["learn"]["total_timesteps"] = 8
    checkpoint.write(tmp_path / "second", state, tensors, 5)
    assert resume(tmp_path / "second", "Pendulum-v1", callback).num_timesteps == 8
    assert steps(tmp_path / "second") == [8, 5, 5] and steps(tmp_path / "first") == [6]


class ThrowsAway(BaseCallback):
    def _on_step(self):
        return True

    def _on_training_end(self):
        self.model.replay_buffer = None


def test_a_callback_that_throws_the_buffer_away(tmp_path):
    """When all is saved, to make room."""
    agent = made().learn(5, [ResumeCallback(tmp_path), ThrowsAway()])
    assert agent.replay_buffer is None and agent.resume_callback is None and steps(tmp_path) == [5]


@pytest.mark.parametrize("stop", [lambda: StopTrainingOnMaxEpisodes(1), lambda: Ends(200)], ids=["stock", "own"])
def test_a_run_that_a_callback_has_ended(tmp_path, stop):
    """It is saved where it ended; run again it stays there, however often."""
    agents = [made().learn(1000, [stop(), ResumeCallback(tmp_path)]) for _ in range(1)]
    assert steps(tmp_path) == [200]
    for _ in range(2):
        agent = made()
        if isinstance(stop(), Ends):
            with pytest.warns(UserWarning, match="start of an episode, .*a callback ended the run"):
                agent.learn(1000, [stop(), ResumeCallback(tmp_path)])
        else:
            agent.learn(1000, [stop(), ResumeCallback(tmp_path)])
            assert agent.num_timesteps == 200
        assert steps(tmp_path) == [200] and agent._n_updates == agents[0]._n_updates
        assert agent.replay_buffer.size() == agents[0].replay_buffer.size() == 199
        a, b = agent.policy.parameters(), agents[0].policy.parameters()
        assert all(th.equal(one, other) for one, other in zip(a, b, strict=True))


def test_a_run_that_was_ended_and_is_to_go_on(tmp_path):
    """With a callback that ends it later."""
    made().learn(1000, [StopTrainingOnMaxEpisodes(1), ResumeCallback(tmp_path)])
    with pytest.warns(UserWarning, match="start of an episode, .*a callback ended the run"):
        agent = made().learn(1000, [StopTrainingOnMaxEpisodes(2), ResumeCallback(tmp_path)])
    assert agent.num_timesteps == 400 and steps(tmp_path) == [400, 200]


def test_a_run_that_has_reached_its_reward(tmp_path):
    """It is over, though its callback would look again only at the next evaluation."""

    def learn():
        evaluation = EvalCallback(
            make_vec_env("Pendulum-v1", 1), StopTrainingOnRewardThreshold(-1e9), eval_freq=30, n_eval_episodes=1, verbose=0
        )
        return made().learn(1000, [evaluation, ResumeCallback(tmp_path)])

    assert [learn().num_timesteps for _ in range(3)] == [30, 30, 30] and steps(tmp_path) == [30]


class Silent(gym.Env):
    """Its state cannot be asked for."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def get_state(self):
        raise RuntimeError("no contact")

    def set_state(self, state):
        raise AssertionError

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 0.0, False, self.steps == 20, {}


def test_an_env_whose_state_cannot_be_asked_for(tmp_path):
    """The run is saved all the same, and goes on at an episode's start."""

    def learn(total):
        return MBPO("MlpPolicy", make_vec_env(Silent, 1), **QUICK).learn(total, ResumeCallback(tmp_path))

    learn(30)
    with pytest.warns(UserWarning, match=r"start of an episode.*Silent\.get_state\(\) raised RuntimeError: no contact"):
        assert learn(50).num_timesteps == 50


def test_other_arguments_of_the_env(tmp_path):
    """They are those of now: a repaired env does not get its fault back."""

    def learn(total, g):
        env = make_vec_env("Pendulum-v1", 1, env_kwargs={"g": g})
        return MBPO("MlpPolicy", env, **QUICK).learn(total, ResumeCallback(tmp_path))

    learn(25, 9.0)
    assert learn(30, 8.0).env.get_attr("g") == [8.0]


def test_two_agents_in_two_threads(tmp_path):
    """The second is refused, and the first goes on."""
    errors = []

    class Second(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 25:

                def learn():
                    try:
                        made().learn(5, ResumeCallback(tmp_path))
                    except ValueError as error:
                        errors.append(str(error))

                thread = threading.Thread(target=learn)
                thread.start(), thread.join()
            return True

    made().learn(40, [ResumeCallback(tmp_path), Second()])
    assert len(errors) == 1 and "is used by another run" in errors[0] and steps(tmp_path) == [40]


def test_a_trained_agent_is_not_overwritten(tmp_path):
    """By the run of another one; one that is the run's own, or begins as that did, goes on with it."""
    made().learn(30, ResumeCallback(tmp_path / "run"))
    trained = made().learn(40)
    before = [parameter.clone() for parameter in trained.policy.parameters()]
    for reset in (True, False):
        with pytest.raises(ValueError, match=r"run holds the run of another agent: .*for 0 steps.*this one for 40,"):
            trained.learn(50, ResumeCallback(tmp_path / "run"), reset_num_timesteps=reset)
    assert all(th.equal(a, b) for a, b in zip(before, trained.policy.parameters(), strict=True))
    # A run that began with that agent goes on with an equal one; and with the very agent that was saved.
    trained.save(tmp_path / "agent")
    trained.learn(20, ResumeCallback(tmp_path / "second"))
    assert trained.learn(25, ResumeCallback(tmp_path / "second")).num_timesteps == 25
    again = MBPO.load(tmp_path / "agent", env=make_vec_env("Pendulum-v1", 1))
    with pytest.warns(UserWarning, match="empty replay buffer"):
        assert again.learn(27, ResumeCallback(tmp_path / "second")).num_timesteps == 27
    assert resume(tmp_path / "second", "Pendulum-v1").num_timesteps == 27


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"policy_kwargs": {"net_arch": [9]}}, "policy_kwargs"),
        ({"dynamics_kwargs": {"net_arch": [8], "max_updates": 3, "n_members": 6}}, "dynamics_kwargs"),
    ],
)
def test_an_agent_that_does_not_fit(tmp_path, settings, name):
    """The error names the checkpoint, the argument and what to do."""
    made().learn(5, ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match=rf"00001-step-5 does not fit the agent: .*with the {name} of the run, call sb3_mbpo"):
        made(**settings).learn(10, ResumeCallback(tmp_path))


def test_a_folder_without_space(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"folder=.*run cannot be used for checkpoints.*choose another folder"):
        made().learn(5, ResumeCallback(tmp_path / "run"))


@pytest.mark.parametrize("folder", ["", None, 3])
def test_no_folder(folder):
    """Nothing is written into the working directory by mistake."""
    with pytest.raises(ValueError, match=rf"ResumeCallback: folder={folder!r} must be a path"):
        ResumeCallback(folder)
    with pytest.raises(ValueError, match=rf"resume: folder={folder!r} must be a path"):
        resume(folder, "Pendulum-v1")


class Mine(MBPO):
    """With an argument of its own, a count, and a generator."""

    def __init__(self, *args, bonus=1.0, **kwargs):
        self.bonus, self.counts = bonus, 0
        super().__init__(*args, **kwargs)
        self.stream = np.random.default_rng(self.seed)

    def train(self, *args, **kwargs):
        self.counts += 1
        self.drawn = float(self.stream.normal())
        super().train(*args, **kwargs)


def test_a_subclass_from_elsewhere(tmp_path):
    """It is resumed by its folder if it is passed; its arguments are those of the run, and what it has counted goes on."""

    def learn(folder, total):
        agent = Mine("MlpPolicy", make_vec_env("Pendulum-v1", 1, seed=1), bonus=3.0, gamma=0.9, **QUICK)
        return agent.learn(total, ResumeCallback(tmp_path / folder))

    whole = learn("whole", 40)
    learn("cut", 30)
    with pytest.raises(ValueError, match=r"resume: .*00001-step-30: its agent is of class 'Mine'.*pass agent_class=Mine$"):
        resume(tmp_path / "cut", "Pendulum-v1")
    agent = resume(tmp_path / "cut", make_vec_env("Pendulum-v1", 1), agent_class=Mine)
    assert agent.num_timesteps == 30 and (agent.bonus, agent.gamma) == (3.0, 0.9)
    agent = learn("cut", 40)
    assert agent.counts == whole.counts and agent.drawn == whole.drawn
    assert all(th.equal(a, b) for a, b in zip(whole.policy.parameters(), agent.policy.parameters(), strict=True))


@pytest.mark.parametrize("imagined", [0, 1000])
def test_a_signal_is_asked_for_before_each_batch(tmp_path, imagined):
    """However many batches are drawn at once."""
    agent = made(learning_starts=0, gradient_steps=3000)
    agent.learn(20, callback=lambda local, _: setattr(local["self"], "gradient_steps", 0) or True)
    agent.gradient_steps = 3000
    if imagined:
        agent.replay_buffer.model_buffer.begin_refill()
        agent.replay_buffer.model_buffer._append(th.randn(imagined, 9))
    asked = []

    def check():
        asked.append(time.perf_counter())
        if len(asked) == 5:
            raise KeyboardInterrupt

    agent.replay_buffer.check = check
    agent.set_logger(configure_logger(0))
    batches = agent.replay_buffer.batches(3000, 16)
    got = 0
    with pytest.raises(KeyboardInterrupt):
        for _ in batches:
            got += 1
    assert got == 4


def test_a_signal_in_a_long_train_of_small_updates(tmp_path, monkeypatch):
    """It is broken off after the update under way."""
    callback = ResumeCallback(tmp_path)
    agent = made(gradient_steps=5000, train_freq=50, learning_starts=20)
    updates = []
    from sb3_mbpo import MixedReplayBuffer

    check = MixedReplayBuffer._check

    def interrupting(self):
        updates.append(1)
        if len(updates) == 20:
            callback.interrupts.received = signal.SIGTERM
        check(self)

    monkeypatch.setattr(MixedReplayBuffer, "_check", interrupting)
    agent.learn(200, callback)
    assert agent.num_timesteps == 50 and len(updates) == 20 and steps(tmp_path) == [50]
