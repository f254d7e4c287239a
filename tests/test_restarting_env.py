"""An env that raises is made anew, and nothing that did not happen is stored."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO, RestartingEnv, ResumeCallback


class Robot(gym.Env):
    """Counts its steps, and dies when told; each made one begins at a number of its own."""

    observation_space = gym.spaces.Box(-1e4, 1e4, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, dies, log):
        self.dies, self.log, self.closed, self.number = dies, log, False, len(log["made"])
        log["made"].append(self)
        if "make" in dies.get(self.number, ()):
            raise ConnectionError("no route to the robot")

    def reset(self, *, seed=None, options=None):
        if "reset" in self.dies.get(self.number, ()):
            self.dies[self.number] = ()
            raise ConnectionError("no answer")
        self.at = 1000 * self.number + 100 * len(self.log["resets"])
        self.log["resets"].append(self.at)
        return np.float32([self.at]), {}

    def step(self, action):
        assert not self.closed
        self.log["steps"] += 1
        if self.log["steps"] in self.dies.get("steps", ()):
            raise ConnectionError("the cable")
        self.at += 1
        return np.float32([self.at]), 1.0, False, self.at % 10 == 0, {}

    def close(self):
        self.closed = True


def restarting(steps=(), max_restarts=3, **dies):
    log = {"made": [], "resets": [], "steps": 0}
    told = {"steps": steps, **{int(number[1:]): what for number, what in dies.items()}}
    return RestartingEnv(lambda: Robot(told, log), max_restarts), log


def stored(agent):
    return agent.replay_buffer.newest(1000)


@pytest.mark.parametrize("normalize", [False, True])
def test_no_wrong_transition_is_stored(normalize):
    env, log = restarting([15, 16, 33])
    venv = DummyVecEnv([lambda: env])
    agent = MBPO("MlpPolicy", VecNormalize(venv) if normalize else venv, **FAST)
    with pytest.warns(
        UserWarning, match=r"ConnectionError: the cable. It is made anew, restart \d of 3; this step is not"
    ) as told:
        agent.learn(50)
    assert len(told) == 3 and len(log["made"]) == 4 and [one.closed for one in log["made"]] == [True] * 3 + [False]
    rows = stored(agent)
    assert agent.num_timesteps == 50 and len(rows.rewards) == 47 == agent.replay_buffer.size()
    obs, ended = rows.observations.flatten(), rows.dones.flatten() > 0.5
    assert (rows.next_observations.flatten() - obs == 1).all() and (rows.rewards == 1).all()
    # Each step follows the one before, or begins an episode after one that has ended.
    follows = obs[1:] - obs[:-1] == 1
    assert (follows | ended[:-1]).all()
    # Cut as by a time limit, never terminated.
    assert agent.replay_buffer.real_transitions().dones.sum() == 0


def test_among_several_envs_the_whole_step_is_left_out():
    env, _ = restarting([15])
    calm, _ = restarting()
    agent = MBPO("MlpPolicy", DummyVecEnv([lambda: calm, lambda: env]), **FAST)
    with pytest.warns(UserWarning, match="restart 1 of 3"):
        agent.learn(60)
    rows = stored(agent)
    assert len(rows.rewards) == 29 and bool((rows.next_observations - rows.observations == 1).all())
    obs, ended = rows.observations[..., 0], rows.dones[..., 0] > 0.5
    assert ((obs[1:] - obs[:-1] == 1) | ended[:-1]).all() and ended[13].all()


@pytest.mark.filterwarnings("ignore:The env raised")
def test_after_the_last_restart_the_error_is_raised():
    env, log = restarting([5, 6, 7], max_restarts=2)
    agent = MBPO("MlpPolicy", env, **FAST)
    with pytest.raises(ConnectionError, match="the cable"):
        agent.learn(50)
    assert len(log["made"]) == 3 and agent.replay_buffer.size() == 4
    # As after any error of an env, learn goes on with a reset.
    agent.learn(10, reset_num_timesteps=False)
    assert (stored(agent).next_observations - stored(agent).observations == 1).all()


@pytest.mark.filterwarnings("ignore:The env raised")
def test_one_that_dies_in_reset_and_one_that_cannot_be_made():
    env, log = restarting([3], n1=["make"], n2=["reset"])
    agent = MBPO("MlpPolicy", env, **FAST).learn(10)
    assert len(log["made"]) == 4 and env.restarts == 3 and agent.replay_buffer.size() == 9
    env, log = restarting([3], n1=["make"], n2=["make"], max_restarts=2)
    with pytest.raises(ConnectionError, match="no route"):
        MBPO("MlpPolicy", env, **FAST).learn(10)


def test_refused():
    with pytest.raises(ValueError, match=r"make=.* must be a function"):
        RestartingEnv(gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="max_restarts=-1 must be a whole number"):
        RestartingEnv(lambda: gym.make("Pendulum-v1"), max_restarts=-1)


def test_transparent_where_nothing_dies(tmp_path):
    """Also for a resume: an env that can be restored still can."""

    def run(total, folder, wrap):
        env = wrap(lambda: gym.make("Pendulum-v1", max_episode_steps=30))
        return MBPO("MlpPolicy", env, **FAST).learn(total, ResumeCallback(tmp_path / folder))

    whole = run(50, "whole", lambda make: make())
    run(27, "cut", RestartingEnv)
    cut = run(50, "cut", RestartingEnv)
    assert (stored(whole).observations == stored(cut).observations).all() and type(cut.termination) is type(whole.termination)
