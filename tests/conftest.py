"""Shared by all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

# Small networks, and several test processes side by side: more threads only get in each other's way.
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo writes its warnings, such as that of HalfCheetah's XML file, to a file in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def random_steps() -> Callable[..., Any]:
    return collect


def collect(name: str, n: int, seed: int, **options: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """Transitions of a random policy: obs, actions, next_obs, terminated."""
    env: Any = gym.make(name, **options)
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    for _ in range(n):
        action = env.action_space.sample()
        next_obs, _, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, next_obs, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    env.close()
    obs_, actions, next_obs_, terminated_ = (th.as_tensor(np.asarray(column)) for column in zip(*rows, strict=True))
    return obs_.float(), actions.float(), next_obs_.float(), terminated_
