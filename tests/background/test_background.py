"""learn(background=True), with its second process."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, parent_process

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import DHMBPO, MBPO, ResumeCallback
from sb3_mbpo.background.process import LearnerProcess

# On a busy machine it is: it has the lower priority.
pytestmark = pytest.mark.filterwarnings("ignore:The learner is behind")
SETTINGS = {**FAST, "gradient_steps": -1, "updates_per_transition": 2, "model_train_freq": 20}


def made(cls=MBPO, env="Pendulum-v1", **kwargs):
    return cls("MlpPolicy", env, **{**SETTINGS, **kwargs})


class At(BaseCallback):
    """Acts at some pace, and does something at a step, once the learner has made updates."""

    def __init__(self, step=10**9, what=lambda agent: None, pace=0.01):
        super().__init__()
        self.step, self.what, self.pace = step, what, pace

    def _on_step(self):
        time.sleep(self.pace)
        if self.num_timesteps == self.step:
            until = time.monotonic() + 60
            while self.model._n_updates == 0 and time.monotonic() < until:
                time.sleep(0.02)
                self.model._learner._receive(self.model)
            self.what(self.model)
        return True


@pytest.mark.parametrize(("cls", "normalize"), [(MBPO, True), (DHMBPO, False)])
def test_as_without_but_beside(cls, normalize, tmp_path):
    """As many updates, results, logs and saved agents as users expect."""
    env = make_vec_env("Pendulum-v1", 2, env_kwargs={"max_episode_steps": 25})
    agent = made(cls, VecNormalize(env) if normalize else env)
    before = agent.actor.mu.weight.clone()
    seen = []
    save = At(50, lambda agent: seen.append((agent._n_updates, agent.logger.name_to_value["train/n_updates"])))
    agent.learn(80, [save, CheckpointCallback(40, str(tmp_path), "agent")], background=True, log_interval=None)
    assert agent.num_timesteps == 80 and agent._n_updates == 2 * 60 and agent.updates_owed == 0
    assert agent.dynamics_fitted_at == 80 and len(agent.replay_buffer.model_buffer) > 0
    assert not th.equal(agent.actor.mu.weight, before) and seen[0][0] > 0
    assert active_children() == [] and not agent.learns_in_background
    loaded = cls.load(tmp_path / "agent_80_steps")
    assert loaded._n_updates > 0 and loaded.dynamics_fitted_at is not None and not loaded.learns_in_background
    # And on without a second process.
    agent.learn(10, reset_num_timesteps=False)
    assert agent._n_updates == 2 * 70


def fails_in_learner(obs, actions, next_obs):
    if parent_process() is not None:
        raise KeyError("no such sensor")
    return -(next_obs[:, 2] ** 2)


def test_an_error_in_the_learner_ends_both():
    agent = made(reward_fn=fails_in_learner)
    with pytest.raises(RuntimeError, match=r"(?s)The learner failed with KeyError\('no such sensor'\).*in fails_in_learner"):
        agent.learn(10_000, At(), background=True)
    assert active_children() == [] and agent._learner is None
    assert agent.replay_buffer.size() == agent.num_timesteps >= 20


def test_a_learner_that_is_killed():
    agent = made()
    kill = At(40, lambda agent: os.kill(agent._learner._process.pid, signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"process has ended \(exit code -9\). The agent keeps its transitions"):
        agent.learn(10_000, kill, background=True)
    assert active_children() == [] and agent.replay_buffer.size() == agent.num_timesteps >= 40
    # What it had sent is kept: the policy, and a copy of the rest from after its first fit.
    assert agent._n_updates > 0 and agent.dynamics_fitted_at is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError])
def test_an_error_here_ends_both(error):
    def fail(agent):
        raise error("now")

    agent = made()
    with pytest.raises(error, match="now"):
        agent.learn(10_000, At(40, fail), background=True)
    assert active_children() == [] and agent._n_updates > 0 and agent.dynamics_fitted_at is not None
    assert agent.replay_buffer.size() == 39 and agent._n_updates + agent.updates_owed == 2 * 19


@pytest.mark.expensive
def test_a_signal_saves_and_a_resume_goes_on(tmp_path):
    callback = ResumeCallback(tmp_path, every=10)
    agent = made().learn(60, [At(40, lambda agent: os.kill(os.getpid(), signal.SIGTERM)), callback], background=True)
    assert callback.interrupted == "SIGTERM" and agent.num_timesteps == 40 and active_children() == []
    assert agent._n_updates > 0 and agent._n_updates + agent.updates_owed == 2 * 20
    again = made().learn(60, [At(), ResumeCallback(tmp_path)], background=True)
    assert again.num_timesteps == 60 and again._n_updates == 2 * 40 and again.replay_buffer.size() == 60


@pytest.mark.expensive
def test_one_that_falls_behind_is_warned_of_and_makes_up_for_it(monkeypatch):
    monkeypatch.setattr("sb3_mbpo.background.process.BEHIND_TRANSITIONS", 50)
    agent = made(learning_starts=0, model_train_freq=10)
    with pytest.warns(UserWarning, match=r"The learner is behind: .* of 5\d transitions, are not made yet") as told:
        agent.learn(150, At(pace=0), background=True)
    assert len(told) == 1 and agent._n_updates == 2 * 150


def test_refused():
    with pytest.raises(ValueError, match="background=True needs the number of updates per transition"):
        made(updates_per_transition=None, gradient_steps=3, train_freq=(1, "episode")).learn(5, background=True)
    with pytest.raises(ValueError, match="learn: background='yes' must be true or false"):
        made().learn(5, background="yes")


@pytest.mark.expensive
def test_a_script_without_a_main_part(tmp_path):
    (tmp_path / "script.py").write_text(
        'from sb3_mbpo import MBPO\nMBPO("MlpPolicy", "Pendulum-v1").learn(5, background=True)\n'
    )
    result = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and 'a script needs if __name__ == "__main__":' in result.stderr


@pytest.mark.expensive
@pytest.mark.parametrize("algorithm", ["MBPO", "DHMBPO"])
def test_no_late_step_of_a_thousand_at_20_hz(algorithm):
    """On a machine with two cores and nothing else to do."""
    from late_steps import measured

    row = measured(algorithm, "beside acting", 20, updates_per_transition=1)
    assert row["steps"] == 1000 and row["late"] == 0, row
    assert np.isclose(row["updates"], 1005 + 1, atol=2)


@pytest.mark.expensive
def test_ctrl_c_while_it_waits_for_the_last_updates(monkeypatch):
    """What was learned comes back, and the process ends."""
    waits = LearnerProcess._wait_for

    def wait_for(self, kind, seconds=0.2):
        if kind == "final" and not waiting:
            waiting.append(kind)
            raise KeyboardInterrupt
        return waits(self, kind, seconds)

    waiting = []
    monkeypatch.setattr(LearnerProcess, "_wait_for", wait_for)
    agent = made()
    with pytest.raises(KeyboardInterrupt):
        agent.learn(60, At(50), background=True)
    assert waiting and active_children() == [] and agent._learner is None
    assert agent.dynamics_fitted_at is not None and agent._n_updates + agent.updates_owed == 2 * 40


@pytest.mark.expensive
def test_owed_updates_are_made_by_the_next_learn_that_only_waits(tmp_path):
    agent = made().learn(40)
    agent.updates_owed, before = 30, agent._n_updates
    agent.learn(0, background=True, reset_num_timesteps=False)
    assert agent.updates_owed == 0 and agent._n_updates == before + 30


@pytest.mark.expensive
def test_owed_updates_without_transitions(tmp_path):
    agent = made().learn(40)
    agent.updates_owed = 30
    agent.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="replay buffer"):
        loaded = MBPO.load(tmp_path / "agent", "Pendulum-v1")
        loaded.learn(30, background=True)
    assert loaded.updates_owed == 0


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.expensive
def test_a_checkpoint_does_not_choose_who_learns(background, tmp_path):
    made().learn(30, ResumeCallback(tmp_path), background=background)
    seen = []
    watch = At(35, lambda agent: seen.append((agent.learns_in_background, agent._learner is not None)))
    watch.pace = 0.0
    agent = made()
    agent.learn(45, [watch, ResumeCallback(tmp_path)], background=not background)
    assert seen == [(not background, not background)]


@pytest.mark.expensive
def test_the_updates_of_a_rollout_that_was_interrupted_without_background(tmp_path, monkeypatch):
    def interrupt(agent, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        agent.resume_callback.check()

    with monkeypatch.context() as patch:
        patch.setattr(MBPO, "fit_dynamics", interrupt)
        agent = made(train_freq=4).learn(60, ResumeCallback(tmp_path))
    assert agent.num_timesteps == 24 and agent._n_updates == 0
    again = made(train_freq=4).learn(60, [At(), ResumeCallback(tmp_path)], background=True)
    assert again.num_timesteps == 60 and again._n_updates == 2 * 40 and again.updates_owed == 0
