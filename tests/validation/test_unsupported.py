from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mbpo.validation import unsupported

BOX = spaces.Box(-1, 1, (3,), np.float32)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Dict({"a": BOX}), BOX, "Dict.*FlattenObservation"),
        (spaces.Discrete(3), BOX, "observation space Discrete"),
        (spaces.MultiBinary(3), BOX, "observation space MultiBinary"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), BOX, "not an image"),
        (BOX, spaces.Discrete(2), "action space Discrete.*use DQN or PPO"),
        (BOX, spaces.MultiDiscrete([2, 3]), "action space MultiDiscrete"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "unbounded.*finite low and high"),
        (BOX, spaces.Box(np.zeros(2, np.float32), np.array([1, np.inf], np.float32)), "unbounded"),
        (BOX, spaces.Box(np.zeros(2, np.float32), np.array([1, 0], np.float32)), "low = high.*TransformAction"),
    ],
)
def test_refused_spaces(observation_space, action_space, message):
    with pytest.raises(ValueError, match=f"env: (?s:.*){message}"):
        unsupported.check_spaces(observation_space, action_space)


def test_accepted_spaces():
    unsupported.check_spaces(spaces.Box(-np.inf, np.inf, (2, 3), np.float64), spaces.Box(-2, 5, (2, 2)))
    unsupported.check_spaces(spaces.Box(0, 9, (4,), np.int64), BOX)


def options(**changed):
    usual = {"replay_buffer_class": None, "n_steps": 1, "optimize_memory_usage": False, "replay_buffer_kwargs": {}}
    return SimpleNamespace(**{**usual, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"replay_buffer_class": ReplayBuffer},
        {"n_steps": np.int64(1)},
        {"replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ],
)
def test_replay_options(changed):
    unsupported.check_replay(options(**changed), (ReplayBuffer,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"replay_buffer_class": dict}, "replay_buffer_class=<class 'dict'> is not supported.*Leave it at None"),
        ({"replay_buffer_class": np.array([1, 2])}, r"replay_buffer_class=array\(\[1, 2\]\) is not supported"),
        ({"n_steps": 3}, "n_steps=3 is not supported.*Leave it at 1"),
        ({"n_steps": None}, "n_steps=None is not supported"),
        ({"n_steps": True}, "n_steps=True is not supported"),
        ({"optimize_memory_usage": True}, "optimize_memory_usage=True is not supported.*Leave it at False"),
        ({"optimize_memory_usage": "no"}, "optimize_memory_usage='no' is not supported"),
        ({"replay_buffer_kwargs": [1]}, r"replay_buffer_kwargs=\[1\] must be a mapping"),
        ({"replay_buffer_kwargs": {"n_steps": 3}}, "replay_buffer_kwargs has no key 'n_steps'; it takes handle_timeout"),
        (
            {"replay_buffer_kwargs": {"handle_timeout_termination": "no"}},
            "replay_buffer_kwargs: handle_timeout_termination='no' must be true or false",
        ),
    ],
)
def test_refused_replay_options(changed, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        unsupported.check_replay(options(**changed), (ReplayBuffer,))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vectorised_envs_of_gymnasium_are_refused(mode):
    """They reset in ways of their own, and SB3 does not take them either."""
    env = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
    with pytest.raises(ValueError, match=r"vectorized env of Gymnasium, .*make_vec_env"):
        unsupported.check_env(env)
