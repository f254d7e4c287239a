"""Shared by all tests."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from tiny import FAST

ROOT = Path(__file__).parent.parent

# Small networks, and several test processes side by side: more threads only get in each other's way.
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo writes its warnings, such as that of HalfCheetah's XML file, to a file in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def same_settings_for_all() -> Iterator[None]:
    """Plain SB3 writes into the dictionaries it is given."""
    before = copy.deepcopy(FAST)
    yield
    FAST.clear()
    FAST.update(before)


@pytest.fixture(scope="session")
def random_steps() -> Callable[..., Any]:
    return collect


@pytest.fixture(scope="module")
def zoo() -> Iterator[ModuleType]:
    """``sb3_mbpo.zoo.cli``. Importing rl_zoo3 replaces Gymnasium's time limit by its own; other tests must not see that."""
    places: list[Any] = [gym.wrappers, gym.wrappers.common]
    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            patch.setattr(place, "TimeLimit", place.TimeLimit)
        from rl_zoo3.gym_patches import PatchedTimeLimit

        import sb3_mbpo.zoo.cli

        for place in places:
            patch.setattr(place, "TimeLimit", PatchedTimeLimit)
        yield sb3_mbpo.zoo.cli


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders behind, and would pick up what an earlier one left."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sb3_mbpo", "hyperparams"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


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
