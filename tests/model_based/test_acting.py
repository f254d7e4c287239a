"""Actions before learning_starts that are the user's."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO


class Lopsided(gym.Env):
    """Actions from 0 to 10 and from -2 to 2; remembers those it got, and the observations before them."""

    observation_space = gym.spaces.Box(-100, 100, (2,), np.float32)
    action_space = gym.spaces.Box(np.array([0, -2], np.float32), np.array([10, 2], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = np.float32([50, 20])
        return self.obs, {}

    def step(self, action):
        SEEN.append((self.obs.copy(), np.array(action)))
        self.obs = self.obs + np.float32([1, -1])
        return self.obs, 0.0, False, len(SEEN) % 5 == 0, {}


SEEN: list = []


@pytest.fixture(autouse=True)
def fresh():
    SEEN.clear()


def agent(env=None, **kwargs):
    return MBPO("MlpPolicy", env or Lopsided(), **{**FAST, "learning_starts": 15, **kwargs})


def pushes(obs):
    assert obs.shape[1:] == (2,)
    obs *= -1  # what it is given is its own
    return np.stack([-obs[:, 0] / 10, np.full(len(obs), 0.5)], axis=1)


def test_scaled():
    agent(warmup_actions=0.2).learn(16)
    actions = np.array([action for _, action in SEEN[:15]])
    away = np.abs(actions - [5, 0]) / [5, 2]
    assert away.max() <= 0.2 + 1e-6 and (away.max(axis=0) > 0.12).all() and (np.diff(np.sign(actions[:, 1])) != 0).any()


def test_in_full_they_are_those_of_sb3():
    first = agent(warmup_actions=1.0).learn(15).replay_buffer.actions[:15]
    np.testing.assert_allclose(first, agent().learn(15).replay_buffer.actions[:15], atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize], ids=["raw", "normalised"])
@pytest.mark.parametrize("acts", [pushes, "a policy", "an agent"], ids=str)
def test_a_function_or_a_policy_acts_on_raw_observations(acts, wrap):
    other = SAC("MlpPolicy", Lopsided(), policy_kwargs={"net_arch": [8]}, seed=1)
    # Its standard deviation is next to nothing.
    other.actor.log_std.weight.data.zero_(), other.actor.log_std.bias.data.fill_(-20)
    given = {"a policy": other.policy, "an agent": other}.get(acts, acts)
    agent(wrap(make_vec_env(Lopsided, 2)), warmup_actions=given).learn(16)
    for obs, action in SEEN[:14]:
        expected = pushes(obs[None].copy())[0] if given is pushes else other.predict(obs, deterministic=True)[0]
        np.testing.assert_allclose(action, expected, atol=1e-4)


def test_then_the_agent_acts_itself_and_noise_is_added():
    agent(warmup_actions=lambda obs: np.tile([5.0, 0.0], (len(obs), 1))).learn(20)
    off = [np.abs(action - [5, 0]).max() for _, action in SEEN]
    assert max(off[:15]) == 0 and min(off[15:]) > 0
    SEEN.clear()
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.01))
    agent(warmup_actions=lambda obs: np.tile([5.0, 0.0], (len(obs), 1)), action_noise=noise).learn(15)
    assert 0 < max(np.abs(action - [5, 0]).max() for _, action in SEEN) < 0.5


def test_beyond_the_bounds_they_are_clipped():
    agent(warmup_actions=lambda obs: np.tile([-3.0, 7.0], (len(obs), 1))).learn(3)
    assert all((action == [0, 2]).all() for _, action in SEEN)


@pytest.mark.parametrize(
    "returned", [np.zeros(2), np.full((1, 2), np.nan), np.zeros((1, 3)), None, np.array([["a", "b"]])], ids=repr
)
def test_what_does_not_fit_never_reaches_the_env(returned):
    with pytest.raises(ValueError, match=r"warmup_actions=.* must return finite actions of shape \(1, 2\)"):
        agent(warmup_actions=lambda obs: returned).learn(3)
    assert SEEN == []


def test_saved_and_loaded(tmp_path):
    agent(warmup_actions=pushes).save(tmp_path / "agent")
    assert MBPO.load(tmp_path / "agent").warmup_actions is pushes
    with pytest.raises(ValueError, match="pass your own: warmup_actions"):
        MBPO.load(tmp_path / "agent", safe=True)
    assert MBPO.load(tmp_path / "agent", safe=True, warmup_actions=0.5).warmup_actions == 0.5
