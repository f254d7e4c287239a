"""SBX's SAC, for benchmarks/speed.py."""

from functools import cache
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from sbx import SAC
from stable_baselines3.common.logger import Logger

from peers import seconds, serve

REAL = 10_000


class HopperSized(gym.Env):
    """No more than the spaces of Hopper-v5."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)


@cache
def agent() -> SAC:
    model = SAC("MlpPolicy", HopperSized(), seed=0)
    model.set_logger(Logger(None, []))
    rng = np.random.default_rng(0)
    for obs, next_obs, action, reward in zip(*(rng.standard_normal((REAL, n)) for n in (11, 11, 3, 1)), strict=True):
        model.replay_buffer.add(obs, next_obs, np.tanh(action), reward, np.zeros(1), [{}])
    return model


def updates(n: int) -> dict[str, Any]:
    return {"seconds": seconds(agent().train, n, 256)}


if __name__ == "__main__":
    serve({"updates": updates, "versions": lambda: {"versions": f"sbx-rl {version('sbx-rl')}, jax {version('jax')}"}})
