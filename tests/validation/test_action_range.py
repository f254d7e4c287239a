"""Actions of which most of the range does nothing."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TransformAction
from stable_baselines3.common.env_util import make_vec_env
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.validation.action_range import rows_for_action_range, unused_range, unused_range_warning

SETTINGS = {**FAST, "learning_starts": 210, "gradient_steps": 1, "model_train_freq": 20}


class Wide(gym.ActionWrapper):
    """Has ``times`` as wide bounds as the env, and cuts actions off at the env's."""

    def __init__(self, env, times):
        super().__init__(env)
        self.low, self.high = env.action_space.low, env.action_space.high
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        self.action_space = gym.spaces.Box(middle - times * half, middle + times * half)

    def action(self, action):
        return np.clip(action, self.low, self.high)


def random_transitions(env, n, seed=0):
    env.action_space.seed(seed)
    low, high = env.action_space.low, env.action_space.high
    rows = []
    obs, _ = env.reset(seed=seed)
    for _ in range(n):
        action = env.action_space.sample()
        next_obs, _, terminated, truncated, _ = env.step(action)
        rows.append((obs, 2 * (action - low) / (high - low) - 1, next_obs))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return [np.array(part, dtype=np.float32) for part in zip(*rows, strict=True)]


TASKS = ["Pendulum-v1", "MountainCarContinuous-v0", "InvertedPendulum-v5", "Hopper-v5", "HalfCheetah-v5", "Pusher-v5"]


@pytest.mark.parametrize("task", TASKS)
def test_bounds_of_gymnasium_are_used(task):
    assert unused_range(*random_transitions(gym.make(task), 400)) == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("times", "fraction"), [(4, 0.25), (10, 0.1)])
def test_wide_bounds_are_found_in_all_dimensions(task, times, fraction):
    env = Wide(gym.make(task), times)
    found = unused_range(*random_transitions(env, 1000))
    assert [i for i, _ in found] == list(range(env.action_space.shape[0]))
    assert all(fraction / 2 <= share <= 2 * fraction for _, share in found) and found[0][1] == fraction


def test_one_of_two_actions():
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(1000, 2)), rng.uniform(-1, 1, (1000, 2))
    change = np.column_stack([actions[:, 0], np.clip(actions[:, 1], -0.1, 0.1)])
    assert unused_range(obs, actions, obs + change + 0.1 * rng.normal(size=obs.shape)) == [(1, 0.1)]


@pytest.mark.parametrize(
    "effect",
    [
        lambda a: np.sin(np.pi * a),
        lambda a: np.cos(np.pi * a),
        lambda a: np.tanh(2 * a),
        lambda a: a**3,
        lambda a: np.where(np.abs(a) > 0.5, a, 0),
        lambda a: 0 * a,
    ],
    ids=["sin", "cos", "tanh", "cube", "dead zone", "no effect"],
)
def test_actions_that_do_something_everywhere_or_nowhere(effect):
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(1000, 2)), rng.uniform(-1, 1, (1000, 1))
    assert unused_range(obs, actions, obs + effect(actions) + 0.1 * rng.normal(size=obs.shape)) == []


def test_constant_observations_and_constant_actions():
    obs, actions = np.ones((300, 2)), np.ones((300, 1))
    assert unused_range(obs, actions, obs) == []


def test_one_warning_with_a_remedy_that_works():
    wide = gym.make("Pendulum-v1")
    wide = TransformAction(wide, lambda action: action, gym.spaces.Box(-20, 20, (1,)))
    with pytest.warns(UserWarning, match="action 0 beyond about -2 to 2 .bounds -20 to 20") as caught:
        MBPO("MlpPolicy", wide, **SETTINGS).learn(270)
    assert len([one for one in caught if "action_space" in str(one.message)]) == 1
    narrow = TransformAction(wide, lambda action: action, gym.spaces.Box(-2, 2, (1,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MBPO("MlpPolicy", narrow, **SETTINGS).learn(270)


def test_waits_until_there_are_enough_transitions():
    wide = make_vec_env(lambda: Wide(gym.make("Pendulum-v1"), 10), 2)
    agent = MBPO("MlpPolicy", wide, **SETTINGS | {"learning_starts": 50})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(rows_for_action_range(3, 1) - 10)
    with pytest.warns(UserWarning, match="action_space: most of the range does nothing"):
        agent.learn(40, reset_num_timesteps=False)


def test_fits_far_apart():
    """The first fit has 150 transitions, the second one 300."""
    wide = Wide(gym.make("Pendulum-v1", max_episode_steps=150), 10)
    settings = SETTINGS | {"learning_starts": 100, "train_freq": (1, "episode")}
    with pytest.warns(UserWarning, match="action_space: most of the range does nothing"):
        MBPO("MlpPolicy", wide, **settings).learn(310)


def test_an_env_that_uses_the_sign():
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(1000, 1)), rng.uniform(-1, 1, (1000, 1))
    found = unused_range(obs, actions, obs + np.sign(actions))
    warning = unused_range_warning(found, gym.spaces.Box(-1, 1, (1,)))
    assert warning is not None and warning.endswith("Ignore this if the env uses only the sign of the action")
    assert unused_range_warning([], gym.spaces.Box(-1, 1, (1,))) is None
