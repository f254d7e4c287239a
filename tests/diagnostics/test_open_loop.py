"""Fresh episodes, their pieces, and the same actions in a dynamics."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO, MBTD3, DynamicsModel
from sb3_mbpo.diagnostics.open_loop import (
    Episode,
    member_disagreement,
    on_policy_episodes,
    open_loop,
    own_env,
    segments,
    untouched,
)


class Walk(DynamicsModel):
    """x' = x + a, the reward is x'."""

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        return obs + actions, (obs + actions)[:, 0]


class Noisy(Walk):
    def sample(self, obs, actions):
        obs, rewards = super().sample(obs, actions)
        return obs + th.randn(obs.shape, generator=self.generator), rewards


def episode(n: int, terminated: bool = False) -> Episode:
    actions = np.linspace(-1, 1, n)[:, None]
    obs = np.concatenate([[[0.5]], 0.5 + np.cumsum(actions, axis=0)])
    return Episode(obs, actions, obs[1:, 0], terminated)


def test_episodes_are_what_the_env_says():
    """Replaying the actions gives the same observations, rewards and end; actions are scaled as the env's own."""
    agent = MBPO("MlpPolicy", "InvertedPendulum-v5", **FAST)
    env = own_env(agent)
    env.seed(3)
    found = on_policy_episodes(agent, env, 2, 50)
    real = gym.make("InvertedPendulum-v5")
    obs, _ = real.reset(seed=3)
    np.testing.assert_array_equal(found[0].obs[0], obs)
    for action, reward, after in zip(found[0].actions, found[0].rewards, found[0].obs[1:], strict=True):
        obs, expected, terminated, _, _ = real.step((3 * action).astype(np.float32))
        np.testing.assert_allclose(after, obs, atol=1e-5)
        assert reward == expected
    assert terminated and found[0].terminated
    assert len(found) == 2 and not np.array_equal(found[0].obs[0], found[1].obs[0])


def test_limits_are_no_terminations():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    whole, cut = (on_policy_episodes(agent, own_env(agent), 1, most)[0] for most in (1000, 30))
    assert (len(whole.rewards), len(cut.rewards)) == (200, 30)
    assert not whole.terminated and not cut.terminated


@pytest.mark.parametrize("make", [MBPO, MBTD3])
def test_policy_sees_normalised_observations_and_statistics_stay(make):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    agent = make("MlpPolicy", env, **{**FAST, "gradient_steps": 1}).learn(60)
    count, mean = env.obs_rms.count, env.obs_rms.mean.copy()
    seen = []
    agent.policy._predict = lambda obs, deterministic: seen.append(obs) or th.zeros(len(obs), 1)
    found = on_policy_episodes(agent, own_env(agent), 1, 5)[0]
    expected = (found.obs[:5] - mean) / np.sqrt(env.obs_rms.var + env.epsilon)
    np.testing.assert_allclose(th.cat(seen).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert env.obs_rms.count == count


def test_segments():
    pieces = segments([episode(3), episode(1)], 2)
    assert pieces.starts[:, 0].tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])
    assert pieces.actions[:, :, 0].tolist() == [[-1, 0], [0, 1], [1, 0], [-1, 0]]
    nan = np.nan
    np.testing.assert_allclose(pieces.outcomes[..., 0], [[-0.5, -0.5], [-0.5, 0.5], [0.5, nan], [-0.5, nan]])
    np.testing.assert_array_equal(pieces.outcomes[..., 0], pieces.outcomes[..., 1])


def test_segments_spread_evenly():
    pieces = segments([episode(100)], 1, most=4)
    np.testing.assert_allclose(pieces.starts, episode(100).obs[[0, 25, 50, 75]])


def test_open_loop_follows_the_models_own_observations():
    pieces = segments([episode(6), episode(4)], 5)
    samples = open_loop(Walk(1, 1), pieces, 2)
    known = np.isfinite(pieces.outcomes)
    for sample in samples:
        np.testing.assert_allclose(sample[known], pieces.outcomes[known], atol=1e-6)
    noisy = open_loop(Noisy(1, 1, seed=0), segments([episode(2000)], 3), 3)[..., 1]
    # Noise adds up, and each sample has its own.
    apart = noisy - segments([episode(2000)], 3).outcomes[..., 1]
    assert np.nanstd(apart, axis=(0, 1)) == pytest.approx(np.sqrt([1, 2, 3]), rel=0.05)
    assert abs(np.corrcoef(apart[0, :1900, 0], apart[1, :1900, 0])[0, 1]) < 0.1


def test_disagreement():
    class Members(Walk):
        def predict(self, obs, actions):
            mean = th.cat([actions, obs], dim=1).expand(3, -1, -1) * th.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
            return mean, th.ones_like(mean)

    obs, actions = np.array([[3.0], [0.0]]), np.zeros((2, 1))
    np.testing.assert_allclose(member_disagreement(Members(1, 1), obs, actions), [[np.std([3, 6, 9])], [0]], rtol=1e-6)
    assert member_disagreement(Walk(1, 1), obs, actions) is None


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}])
def test_untouched(kwargs):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST, **kwargs).learn(30)

    def draws():
        generators = (None, agent.dynamics.generator, agent.learned_reward.generator, agent.learned_termination.generator)
        own = [th.rand(1, generator=generator).item() for generator in generators]
        return [*own, np.random.random(), random.random(), agent.predict(np.ones(3), deterministic=False)[0].item()]

    with untouched(agent):
        expected = draws()
    with untouched(agent):
        draws()
        with agent.imagining():
            pass
    assert draws() == expected
    assert draws() != expected


class Gives(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}


def test_own_env():
    agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 2, env_kwargs={"g": 3.0}), **FAST)
    made = own_env(agent)
    assert made.get_attr("g") == [3.0]
    # As it was: what was left out of the copy's wrappers is not left out of the agent's.
    assert agent.env.get_attr("spec")[0].additional_wrappers[-1].name == "Monitor"
    given = gym.make("Pendulum-v1")
    for env in ("Pendulum-v1", given, lambda: given, DummyVecEnv([lambda: given])):
        assert own_env(agent, env).num_envs == 1


def test_envs_that_do_not_fit():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match=r"env does not match the agent.*Observation spaces do.*Pass one with the wrapp"):
        own_env(agent, "MountainCarContinuous-v0")
    with pytest.raises(ValueError, match=r"env must be one env without VecNormalize.*not 2 in a DummyVecEnv"):
        own_env(agent, make_vec_env("Pendulum-v1", 2))
    with pytest.raises(ValueError, match=r"env must be one env without VecNormalize.*VecNormalize. Pass an id"):
        own_env(agent, VecNormalize(make_vec_env("Pendulum-v1", 1)))
    stacked = MBPO("MlpPolicy", VecFrameStack(make_vec_env("Pendulum-v1", 1), 2), **FAST)
    with pytest.raises(ValueError, match="env does not match the agent"):
        own_env(stacked)


@pytest.mark.parametrize("give", [lambda env: env, lambda env: lambda: env, lambda env: DummyVecEnv([lambda: env])])
def test_the_agents_own_env_is_refused(give):
    """Its episodes would be broken off under the agent's hands, and transitions stored that never were."""
    env = gym.make("Pendulum-v1")
    agent = MBPO("MlpPolicy", VecNormalize(DummyVecEnv([lambda: env])), **FAST)
    with pytest.raises(ValueError, match=r"env is a training env of the agent.*Pass a new env"):
        own_env(agent, give(env))


def test_agents_env_that_cannot_be_made_once_more():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    agent.env = None
    with pytest.raises(ValueError, match=r"env=None: the agent's env cannot be made again.*Pass a function"):
        own_env(agent)
    # Any env will do for an agent without one.
    assert own_env(agent, "Pendulum-v1").num_envs == 1
    with pytest.raises(ValueError, match=r"it has no spec of Gymnasium's.*Pass a function that makes one as env"):
        own_env(MBPO("MlpPolicy", Gives(), **FAST))

    class Unrecorded(gym.Wrapper):
        pass

    with pytest.raises(ValueError, match="the arguments of Unrecorded are not recorded"):
        own_env(MBPO("MlpPolicy", Unrecorded(gym.make("Pendulum-v1")), **FAST))
