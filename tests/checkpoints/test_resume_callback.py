import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO, MBTD3, ResumeCallback, resume
from sb3_mbpo.checkpoints import checkpoint
from sb3_mbpo.checkpoints.checkpoint import listed
from sb3_mbpo.checkpoints.training_state import take_training
from sb3_mbpo.dhmbpo import DHMBPO


class Interrupt(BaseCallback):
    """What a signal does, at a given moment."""

    def __init__(self, resume, step, moment="step"):
        super().__init__()
        self.resume, self.step, self.moment = resume, step, moment

    def _at(self, moment):
        if moment == self.moment and self.num_timesteps >= self.step and self.resume.interrupted is None:
            self.resume.interrupts.received = signal.SIGTERM

    def _on_step(self):
        self._at("step")
        return True

    def _on_rollout_end(self):
        self._at("rollout end")


class Record(Logger):
    """Keeps what is logged, but for times."""

    def __init__(self, lines):
        super().__init__(None, [])
        self.lines = lines

    def dump(self, step=0):
        values = {key: value for key, value in self.name_to_value.items() if "time" not in key and "seconds" not in key}
        self.lines.append((step, values))
        super().dump(step)


def run(folder, cut=None, moment="step", kind=MBPO, env_id="Hopper-v5", n_envs=1, normalize=False, total=100, **settings):
    """Learn, be cut once; the state in the end and what was logged."""
    env, eval_env = make_vec_env(env_id, n_envs, seed=1), make_vec_env(env_id, 1, seed=5)
    if normalize:
        env, eval_env = VecNormalize(env), VecNormalize(eval_env, training=False)
    settings = {"model_train_freq": 20, "learning_starts": 30, "rollout_schedule": 2, "gradient_steps": 2, **settings}
    agent = kind("MlpPolicy", env, **{**FAST, **settings})
    lines: list = []
    agent.set_logger(Record(lines))
    resume = ResumeCallback(folder, every=10**9)
    callbacks = [EvalCallback(eval_env, eval_freq=25 // n_envs, n_eval_episodes=1, verbose=0), resume]
    agent.learn(total, callbacks + ([] if cut is None else [Interrupt(resume, cut, moment)]), log_interval=1)
    tensors: dict = {}
    state = take_training(agent, callbacks[:1], tensors)
    state = json.loads(json.dumps(state))
    del state["elapsed"]
    # Records in the middle of a dump, and the wall-clock in them.
    state["log"] = None
    for episode in state["attributes"]["ep_info_buffer"]["$deque"][0]:
        del episode["t"]
    return agent, state, tensors, lines


def assert_same(ours, theirs):
    (agent, state, tensors, _), (other, other_state, other_tensors, _) = ours, theirs
    assert agent.num_timesteps == other.num_timesteps
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not th.equal(tensors[name], other_tensors[name])] == []
    assert state == other_state


@pytest.mark.parametrize(
    ("n_envs", "normalize"),
    [(1, False), (3, True), *(pytest.param(*both, marks=pytest.mark.expensive) for both in ((1, True), (3, False)))],
)
def test_to_the_last_bit(tmp_path, n_envs, normalize):
    """
    Cut in the warm-up, in the midst of episodes, right before a fit, in a fit and right after one: each cut is a new process'
    worth of new objects, and in the end everything is as in the run that was never cut, and so is the log.
    """
    settings = {"n_envs": n_envs, "normalize": normalize}
    whole = run(tmp_path / "whole", **settings)
    lines, steps = [], []
    for cut, moment in [(12, "step"), (39 if n_envs == 1 else 57, "step"), (60, "step"), (60, "rollout end"), (83, "step")]:
        agent, *_, new = run(tmp_path / "cut", cut, moment, **settings)
        lines += new
        steps.append(agent.num_timesteps)
    # Each piece ended where it was cut.
    assert steps == ([12, 39, 60, 60, 83] if n_envs == 1 else [12, 57, 60, 60, 84])
    pieces = run(tmp_path / "cut", **settings)
    assert_same(whole, pieces)
    assert lines + pieces[-1] == whole[-1] and len(whole[-1]) >= 3


def falling(left):
    return 1e-3 * left


def pays(obs, actions, next_obs):
    return next_obs[:, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_sde": True, "sde_sample_freq": 3, "train_freq": 7},
        {"train_freq": (1, "episode"), "gradient_steps": -1},
        {"updates_per_transition": 0.3, "gradient_steps": -1, "train_freq": 7, "warmup_actions": 0.3},
        {"real_ratio": 1.0, "use_sde": True},
        {"fast_update": False, "termination_fn": "learned", "ent_coef": 0.1, "learning_rate": falling},
        {"kind": MBTD3, "env_id": "Pendulum-v1", "action_noise": "OU", "rollout_filter": "m2ac", "rollout_schedule": 3},
        {"learning_starts": 0, "buffer_size": 50, "model_buffer_size": 40, "rollout_filter": "macura", "rollout_schedule": 3},
        # As many steps from fit to fit as it takes to measure k.
        {
            **{"rollout_schedule": "auto", "model_train_freq": 25},
            **{"min_explained_variance": 0.1, "dynamics_kwargs": {"net_arch": [16, 16]}},
        },
        {"rollout_filter": "infoprop", "rollout_schedule": 3, "reward_fn": pays},
        pytest.param({"kind": DHMBPO, "rollout_schedule": 3, "distribution_freq": 7}, marks=pytest.mark.expensive),
        # What the dynamics was fitted to is partly overwritten when the run is cut.
        {"kind": DHMBPO, "rollout_schedule": 3, "distribution_freq": 7, "buffer_size": 50, "rollout_filter": "macura"},
    ],
    ids="sde episodes per_transition model_off slow td3 small auto infoprop dhmbpo dhmbpo_small".split(),
)
@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
@pytest.mark.expensive
def test_all_kinds_of_agents(tmp_path, settings):
    def finished(folder, cut=None):
        noise = settings.get("action_noise")
        made = {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))} if noise else {}
        return run(folder, cut, total=75, **{**settings, **made})

    whole = finished(tmp_path / "whole")
    cut, *_ = finished(tmp_path / "cut", 52)
    assert 52 <= cut.num_timesteps < 75
    assert_same(whole, finished(tmp_path / "cut"))


@pytest.mark.parametrize("phase", ["fit", "refill", "train", "train, half imagined", "train of DHMBPO"])
@pytest.mark.expensive
def test_long_work_is_broken_off_and_repeated(tmp_path, phase, monkeypatch):
    """A signal in the midst of a fit, a refill or a long train(): saved at once, and nothing is different in the end."""
    settings: dict = {"train_freq": 10, "gradient_steps": 120, "rollout_batch_size": 60, "total": 80}
    if phase == "fit":
        # More gradient steps than from one look at the hold-out rows to the next.
        settings["dynamics_kwargs"] = {"net_arch": [8], "max_updates": 120}
    if phase == "train of DHMBPO":
        settings |= {"kind": DHMBPO, "distribution_freq": 1, "gradient_steps": 8, "rollout_batch_size": 8}
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.ROLLOUT_BLOCK", {"cpu": 20})
    if phase == "train, half imagined":
        monkeypatch.setattr("sb3_mbpo.model_based.model_learning.imagined_fraction", lambda *given: 0.5)
    whole = run(tmp_path / "whole", **settings)
    resume_of = {}
    begin = ResumeCallback.begin

    def spy(self, callback):
        resume_of["it"] = self
        begin(self, callback)

    monkeypatch.setattr(ResumeCallback, "begin", spy)
    calls = {"n": 0}

    def interrupting(function, at):
        def wrapped(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                resume_of["it"].interrupts.received = signal.SIGTERM
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if phase == "fit":
            from sb3_mbpo import ProbabilisticEnsemble

            patch.setattr(ProbabilisticEnsemble, "_train_steps", interrupting(ProbabilisticEnsemble._train_steps, 2))
        elif phase == "refill":
            from sb3_mbpo.model_based import model_learning

            patch.setattr(model_learning, "branched_rollout", interrupting(model_learning.branched_rollout, 5))
        elif phase == "train of DHMBPO":
            patch.setattr("sb3_mbpo.checkpoints.resume_callback._LONG_TRAIN", 2)
            patch.setattr(DHMBPO, "_update", interrupting(DHMBPO._update, 3))
        else:
            from sb3_mbpo import MixedReplayBuffer

            patch.setattr(MixedReplayBuffer, "_check", interrupting(MixedReplayBuffer._check, 3))
        agent, *_ = run(tmp_path / "cut", **settings)
    assert calls["n"] >= 2 and agent.num_timesteps in (40, 60)
    assert_same(whole, run(tmp_path / "cut", **settings))


@pytest.mark.parametrize("moment", ["step", "rollout end"])
def test_a_signal_at_the_very_end(tmp_path, moment):
    """Nothing is left to do, or one fit and one update; the same command then changes nothing, or does these."""
    whole = run(tmp_path / "whole", total=60)
    cut = run(tmp_path / "cut", 60, moment, total=60)
    assert cut[0].num_timesteps == 60 and next(listed(tmp_path / "cut")).step == 60
    assert_same(whole, run(tmp_path / "cut", total=60))


def test_without_any_seed(tmp_path):
    """Cut in the warm-up and resumed twice, a run whose agent, envs and spaces have no seed goes on alike."""

    def learn(folder, cut=None):
        callback = ResumeCallback(folder)
        agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "seed": None})
        return agent.learn(60, [callback] + ([] if cut is None else [Interrupt(callback, cut)]))

    assert learn(tmp_path / "a", 12).num_timesteps == 12
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = learn(tmp_path / "a"), learn(tmp_path / "b")
    assert np.array_equal(first.replay_buffer.actions[:60], second.replay_buffer.actions[:60])
    assert all(th.equal(a, b) for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True))


def test_a_finished_run_is_not_run_again(tmp_path):
    def learn(total):
        agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
        return agent.learn(total, ResumeCallback(tmp_path))

    first, again = learn(40), learn(40)
    assert again.num_timesteps == 40 and again._n_updates == first._n_updates == 40
    assert all(th.equal(a, b) for a, b in zip(first.policy.parameters(), again.policy.parameters(), strict=True))
    # A longer one goes on, to its own end.
    assert learn(50).num_timesteps == 50 and [one.step for one in listed(tmp_path)] == [50, 40]


def test_checkpoints_come_as_often_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_mbpo.checkpoints.resume_callback._PATIENCE", 0)
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(45, ResumeCallback(tmp_path, every=10, keep=100))
    assert [one.step for one in listed(tmp_path)] == [45, 40, 30, 20, 10]


def test_saving_takes_little_of_the_time(tmp_path, monkeypatch):
    """By a clock that goes a second in each step, and 0.3 s in a save: all of them stay within 2 % of the time."""
    clock = {"now": 0.0}

    class Tick(BaseCallback):
        def _on_step(self):
            clock["now"] += 1
            return True

    def write(*args):
        clock["now"] += 0.3
        return checkpoint_write(*args)

    checkpoint_write = checkpoint.write
    monkeypatch.setattr("sb3_mbpo.checkpoints.resume_callback.checkpoint.write", write)
    monkeypatch.setattr("sb3_mbpo.checkpoints.resume_callback.time.perf_counter", lambda: clock["now"])
    agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "gradient_steps": 0})
    agent.learn(100, [ResumeCallback(tmp_path, every=1, keep=100), Tick()])
    # The first does not know what it costs, the last waits for nothing; the others come at 30, 45, 60, 75 and 90 s.
    assert [one.step for one in listed(tmp_path)] == [100, 89, 74, 60, 45, 30, 1]


def test_the_best_is_kept(tmp_path, monkeypatch):
    class Scores(EvalCallback):
        def _on_step(self):
            self.evaluations_timesteps = [self.num_timesteps]
            self.last_mean_reward = -abs(self.num_timesteps - 20)
            return True

    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    monkeypatch.setattr("sb3_mbpo.checkpoints.resume_callback._PATIENCE", 0)
    agent.learn(60, [Scores(make_vec_env("Pendulum-v1", 1)), ResumeCallback(tmp_path, every=10, keep=2)])
    assert [(one.step, one.score) for one in listed(tmp_path)] == [(60, -40), (50, -30), (20, 0)]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals(tmp_path, name):
    """A real signal: learn() returns, with a checkpoint of that step, and the handlers are what they were."""

    class Kill(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 33:
                os.kill(os.getpid(), getattr(signal, name))
            return True

    before = signal.getsignal(getattr(signal, name))
    callback = ResumeCallback(tmp_path)
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(1000, [callback, Kill()])
    assert agent.num_timesteps == 33 and callback.interrupted == name
    assert [one.step for one in listed(tmp_path)] == [33]
    assert signal.getsignal(getattr(signal, name)) is before


def test_an_env_that_cannot_be_restored(tmp_path):
    pytest.importorskip("Box2D")

    def learn(total, cut=None):
        callback = ResumeCallback(tmp_path)
        agent = MBPO("MlpPolicy", "LunarLanderContinuous-v3", **FAST)
        return agent.learn(total, [callback] + ([] if cut is None else [Interrupt(callback, cut)]))

    learn(60, 35)
    with pytest.warns(UserWarning, match=r"start of an episode.*LunarLander is not among") as warned:
        agent = learn(60)
    assert len(warned) == 1 and agent.num_timesteps == 60 and agent.replay_buffer.size() == 60


class Fickle(gym.Wrapper):
    """Nobody knows what it holds; among it is the last observation of a reset."""

    def reset(self, **kwargs):
        self.first, info = self.env.reset(**kwargs)
        return self.first, info


def test_statistics_outlive_an_env_that_cannot_be_restored(tmp_path):
    """Those of VecNormalize go on, and the observation that the run goes on from is the new episode's, normalised by them."""

    def learn(total, cut=None):
        env = VecNormalize(make_vec_env("Pendulum-v1", 1, wrapper_class=Fickle))
        callback = ResumeCallback(tmp_path)
        agent = MBPO("MlpPolicy", env, **FAST)
        return agent.learn(total, [callback] + ([] if cut is None else [Interrupt(callback, cut)]))

    before = learn(60, 35).env
    with pytest.warns(UserWarning, match=r"start of an episode.*Fickle is not among"):
        agent = learn(36)
    # One more of a reset, one of a step.
    assert agent.env.obs_rms.count == pytest.approx(before.obs_rms.count + 2)
    assert agent.env.ret_rms.count == pytest.approx(before.ret_rms.count + 1)
    first = agent.env.get_attr("first")[0]
    assert np.array_equal(agent.replay_buffer.observations[35, 0], first)
    assert not np.array_equal(agent.replay_buffer.observations[35], agent.replay_buffer.next_observations[34])


GROUP = """
import os, signal, sys, time, warnings
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_mbpo import MBPO, RestorableEnv, ResumeCallback

class Kill(BaseCallback):
    def _at(self, moment):
        if self.num_timesteps == 40 and moment == sys.argv[2]:
            os.killpg(0, getattr(signal, sys.argv[3]))
            time.sleep(float(sys.argv[4]))

    def _on_step(self):
        self._at("step")
        return True

    def _on_rollout_end(self):
        self._at("rollout end")

if __name__ == "__main__":
    warnings.simplefilter("always")
    # Ignored where the tests were started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv, wrapper_class=RestorableEnv)
    callback = ResumeCallback(sys.argv[1])
    agent = MBPO("MlpPolicy", env, train_freq=5, **FAST).learn(60, [callback, Kill()])
    print("ended", agent.num_timesteps, callback.interrupted)
"""


@pytest.mark.expensive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pause", [0, 1], ids=["at_once", "later"])
@pytest.mark.parametrize("moment", ["step", "rollout end"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group(tmp_path, name, moment, pause):
    """It ends the processes of a SubprocVecEnv, too: in the midst of a rollout or after it, before or after we get to know."""
    script = tmp_path / "script.py"
    script.write_text(GROUP.replace("**FAST", ", ".join(f"{key}={value!r}" for key, value in FAST.items())))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    saved = []
    for options in ([moment, name, str(pause)], ["never", name, "0"]):
        result = subprocess.run([*command, *options], start_new_session=True, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        saved.append((result.stdout.splitlines()[-1], "start of an episode" in result.stderr))
    assert saved[0] == (f"ended 40 {name}", False)
    # Where the processes were still there when their state was asked for, nothing is lost.
    assert saved[1] in ([("ended 60 None", True), ("ended 60 None", False)] if pause == 0 else [("ended 60 None", True)])


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused, and the first goes on."""

    class Second(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 25:
                child = os.fork()
                if child == 0:
                    try:
                        MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(5, ResumeCallback(tmp_path))
                    except ValueError as error:
                        os._exit(3 if f"folder={tmp_path} " in str(error) and f"process {os.getppid()} " in str(error) else 4)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
            return True

    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40, [ResumeCallback(tmp_path), Second()])
    assert agent.num_timesteps == 40 and [one.step for one in listed(tmp_path)] == [40]


def test_stock_callbacks_go_on(tmp_path):
    """What they have counted so far counts on."""

    def learn(cut=None):
        callback = ResumeCallback(tmp_path / "run")
        episodes = StopTrainingOnMaxEpisodes(1)
        files = CheckpointCallback(30, str(tmp_path / "files"))
        stock = [episodes, EveryNTimesteps(50, CheckpointCallback(1, str(tmp_path / "nested"))), files]
        MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "gradient_steps": 0}).learn(
            1000, [callback, *stock] + ([] if cut is None else [Interrupt(callback, cut)])
        )
        return episodes.n_episodes

    learn(40), learn(110)
    assert learn() == 1
    steps = {
        folder: sorted(int(p.stem.split("_")[2]) for p in (tmp_path / folder).iterdir()) for folder in ("files", "nested")
    }
    assert steps == {"files": [30, 60, 90, 120, 150, 180], "nested": [50, 100, 150, 200]}


def test_resume_from_the_folder(tmp_path):
    """Without the agent's arguments: they are in the checkpoint, but for what no file can hold."""

    def learn(folder, cut=None):
        callback = ResumeCallback(tmp_path / folder)
        agent = MBPO("MlpPolicy", make_vec_env("Hopper-v5", 1, seed=1), learning_rate=falling, **FAST)
        return agent.learn(60, [callback] + ([] if cut is None else [Interrupt(callback, cut)]), log_interval=7)

    whole = learn("whole")
    learn("cut", 42)
    with pytest.raises(ValueError, match=r"resume: .*00001-step-42.*learning_rate"):
        resume(tmp_path / "cut", make_vec_env("Hopper-v5", 1, seed=1))
    lines = []
    agent = resume(
        tmp_path / "cut", make_vec_env("Hopper-v5", 1, seed=9), lambda *_: lines.append(1) or True, learning_rate=falling
    )
    assert agent.num_timesteps == 60 and len(lines) == 18
    assert all(th.equal(a, b) for a, b in zip(whole.policy.parameters(), agent.policy.parameters(), strict=True))
    # By the env's name; the run is at its end.
    assert resume(tmp_path / "cut", "Hopper-v5", learning_rate=falling).num_timesteps == 60
    with pytest.raises(ValueError, match="no checkpoints in"):
        resume(tmp_path / "nowhere", "Hopper-v5")


def test_other_arguments_are_warned_of(tmp_path):
    """The run goes on with them; a seed was for its beginning."""
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(25, ResumeCallback(tmp_path))
    other = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "batch_size": 8, "seed": 1})
    with pytest.warns(UserWarning, match="values of batch_size, seed; it continues with those of now, but its random"):
        other.learn(25, ResumeCallback(tmp_path))
    assert other.num_timesteps == 25 and other.batch_size == 8


def test_another_class_or_buffer(tmp_path):
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(25, ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match="of MBPO, not of MBTD3"):
        MBTD3("MlpPolicy", "Pendulum-v1", **FAST).learn(25, ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match="same buffer_size and as many envs"):
        MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), **FAST).learn(25, ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match="same buffer_size"):
        MBPO("MlpPolicy", "Pendulum-v1", buffer_size=20, **FAST).learn(25, ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match="agents of sb3_mbpo, not with SAC"):
        SAC("MlpPolicy", "Pendulum-v1").learn(5, ResumeCallback(tmp_path))


@pytest.mark.parametrize(("argument", "value"), [("every", 0), ("every", 1.5), ("keep", 0), ("keep", True)])
def test_arguments(tmp_path, argument, value):
    with pytest.raises(ValueError, match=rf"ResumeCallback: {argument}={value}"):
        ResumeCallback(tmp_path, **{argument: value})


# Settings under which it is long, and what tells that it has begun.
LONG = {
    "fit": ({}, lambda agent: agent.num_timesteps == 1),
    "refill": (
        {"dynamics_kwargs": {"max_updates": 1}, "rollout_batch_size": 100_000, "rollout_schedule": 25},
        lambda agent: "dynamics/fit_seconds" in agent.logger.name_to_value,
    ),
    "train": (
        {"dynamics_kwargs": {"max_updates": 1}, "rollout_batch_size": 100, "gradient_steps": 10**6},
        lambda agent: agent.dynamics_fitted_at == 1,
    ),
}


# Its buffer is filled by hand.
@pytest.mark.filterwarnings("ignore:No episode has ended")
@pytest.mark.expensive
@pytest.mark.parametrize("phase", LONG)
def test_a_signal_is_obeyed_within_ten_seconds(tmp_path, phase):
    """With 100,000 real and 400,000 imagined transitions, and in the midst of a fit on them, of a refill, of a train()."""
    settings, has_begun = LONG[phase]
    # Of transitions made up without a past, a fit explains nothing.
    settings = {**settings, "min_explained_variance": None}
    agent = MBPO("MlpPolicy", "Hopper-v5", learning_starts=0, termination_fn="never", seed=0, **settings)
    agent.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    shape = {"observations": 11, "actions": 3, "next_observations": 11}
    rows = {name: rng.normal(size=(100_000, 1, size)).astype(np.float32) for name, size in shape.items()}
    rows["actions"] = np.tanh(rows["actions"])
    rows |= {name: np.zeros((100_000, 1), dtype=np.float32) for name in ("dones", "rewards", "timeouts")}
    agent.replay_buffer.insert(rows)
    for _ in range(4):
        agent.replay_buffer.model_buffer.begin_refill()
        agent.replay_buffer.model_buffer._append(th.randn(100_000, 27))
    callback = ResumeCallback(tmp_path)
    sent = []

    def send():
        while not has_begun(agent):
            time.sleep(0.1)
        time.sleep(2)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    agent.learn(1000, callback)
    assert time.perf_counter() - sent[0] < 10
    # Broken off in the first step's work.
    assert agent.num_timesteps == 1 and agent._n_updates == 0 and (agent.dynamics_fitted_at == 1) == (phase == "train")
    size = sum(path.stat().st_size for path in next(listed(tmp_path)).path.iterdir())
    assert size < 1.2 * (agent.replay_buffer.size() * 250 + 400_000 * 27 * 4 + 30e6)


@pytest.mark.expensive
@pytest.mark.timeout(900)
def test_submitit(tmp_path):
    """The guide's example for Slurm, on submitit's local executor: saved and queued again by the signal, then finished."""
    submitit, cloudpickle = pytest.importorskip("submitit"), pytest.importorskip("cloudpickle")
    path = Path(__file__).parents[2] / "docs" / "guide" / "slurm.py"
    spec = importlib.util.spec_from_file_location("slurm_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # The job's process cannot import it.
    sys.modules["slurm_example"] = example
    cloudpickle.register_pickle_by_value(example)
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=30)
    job = executor.submit(example.Training(), str(tmp_path / "run"), "Pendulum-v1", 40_000, gradient_steps=0)
    while not list(listed(tmp_path / "run")):
        assert job.state == "RUNNING"
        time.sleep(0.05)
    # As Slurm does: the signal goes to the job itself, and not to submitit's local stand-in for Slurm.
    controller = job._process.pid
    (child,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(child), signal.SIGUSR2)
    assert job.result() == 40_000
    output = job.paths.stdout.read_text() + job.paths.stderr.read_text()
    assert "Requeued job" in output and "Resumed at step" in output
