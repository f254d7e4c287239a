"""The programs of the documentation run: each page's in order, with small networks and few steps."""

import functools
import re
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from tiny import FAST

import sb3_mbpo
from sb3_mbpo.model_based.model_based import ModelBased

DOCS = Path(__file__).parent.parent / "docs"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Tests of their own: tests/model_based/test_robots_guide.py, tests/saving/test_exporting.py.
ELSEWHERE = {"robots", "deploy"}
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "benchmarks" not in page.parts and page.stem not in ELSEWHERE]
PAGES = [page for page in PAGES if PYTHON.search(page.read_text(encoding="utf-8"))]
# Programs that cannot run here: what they contain, and why.
SKIPPED = {"minari.load_dataset": "a download", '"downloaded"': "somebody's file"}
NEEDED = ("mujoco", "tensorboard", "matplotlib", "rich", "tqdm", "sb3_contrib")
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason='needs ".[extra,contrib]"')


class ToGoal(gym.Env):
    """A point that is moved towards a goal."""

    observation_space = gym.spaces.Dict(
        {name: gym.spaces.Box(-9, 9, (2,), dtype=np.float32) for name in ("observation", "achieved_goal", "desired_goal")}
    )
    action_space = gym.spaces.Box(-1, 1, (2,), dtype=np.float32)

    def _observe(self) -> dict[str, np.ndarray]:
        at, goal = self.at.astype(np.float32), self.goal.astype(np.float32)
        return {"observation": at, "achieved_goal": at, "desired_goal": goal}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.goal, self.steps = np.zeros(2), self.np_random.uniform(-1, 1, 2), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at, self.steps = np.clip(self.at + 0.1 * action, -9, 9), self.steps + 1
        return self._observe(), -float(np.linalg.norm(self.at - self.goal)), False, self.steps == 20, {}


class Tracker:
    """In place of wandb and mlflow, which are not installed: records what it is given."""

    def __init__(self) -> None:
        self.numbers: list[tuple[dict[str, float], int]] = []
        self.arguments: list[dict[str, Any]] = []

    def init(self, **arguments: Any) -> Any:
        self.arguments.append(arguments)
        return SimpleNamespace(id="1", finish=lambda: None)

    def start_run(self) -> Any:
        return nullcontext()

    def log_params(self, arguments: dict[str, Any]) -> None:
        self.arguments.append(arguments)

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.numbers.append((numbers, step))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, at most 60 steps, a fit after 20 steps; the programs are not changed."""
    init, learn = ModelBased.__init__, ModelBased.learn

    # inspect.signature, which DHMBPO asks, sees the original.
    @functools.wraps(init)
    def small_init(self: Any, policy: Any, env: Any, *args: Any, **kwargs: Any) -> None:
        quick = {"policy_kwargs": FAST["policy_kwargs"], "dynamics_kwargs": FAST["dynamics_kwargs"], "seed": 0}
        given = "dynamics_class" in kwargs
        kwargs = {name: value for name, value in quick.items() if not (given and name == "dynamics_kwargs")} | kwargs
        kwargs |= {"learning_starts": 20, "batch_size": 16, "rollout_batch_size": 30, "buffer_size": 1_000}
        if "updates_per_transition" not in kwargs:
            kwargs["gradient_steps"] = 1
        init(self, policy, env, *args, **kwargs)

    def small_learn(self: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        return learn(self, min(total_timesteps, 60), *args, **kwargs)

    monkeypatch.setattr(ModelBased, "__init__", small_init)
    monkeypatch.setattr(ModelBased, "learn", small_learn)


def names_for(page: str) -> dict[str, Any]:
    """:return: what the page's reader has already: an env, an agent"""
    names: dict[str, Any] = {"th": th}
    if page == "diagnosis":
        names["agent"] = sb3_mbpo.MBPO("MlpPolicy", "Pendulum-v1").learn(60)
    if page in ("reliability", "terminations"):
        names |= {"env": gym.make("Pendulum-v1"), "MBPO": sb3_mbpo.MBPO}
    if page == "your_env":
        names |= {"goal_env": gym.wrappers.TimeLimit(ToGoal(), 20), "MBPO": sb3_mbpo.MBPO}
    return names


@pytest.mark.expensive
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem if page.stem != "index" else page.parent.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_programs_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MuJoCo ends the process where it finds no display for the second time. A report then says why it has no video.
    monkeypatch.setenv("MUJOCO_GL", "off")
    trackers = {"wandb": Tracker(), "mlflow": Tracker()}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)  # type: ignore[arg-type]
    names = names_for(page.stem)
    for program in PYTHON.findall(page.read_text(encoding="utf-8")):
        if not any(phrase in program for phrase in SKIPPED):
            exec(compile(program, str(page), "exec"), names)
    if page.stem == "tracking":
        # No episode ends in 60 steps, so nothing was written yet.
        names["agent"].logger.dump(60)
        assert trackers["wandb"].arguments[0]["sync_tensorboard"]
        logged = {name for numbers, _ in trackers["mlflow"].numbers for name in numbers}
        assert "dynamics/explained_obs" in logged and all(step > 0 for _, step in trackers["mlflow"].numbers)


def test_programs_use_public_names() -> None:
    """What a page imports from the package exists, also on pages whose programs do not run here."""
    for page in PAGES:
        for program in PYTHON.findall(page.read_text(encoding="utf-8")):
            for names in re.findall(r"^from sb3_mbpo import (.*)$", program, re.MULTILINE):
                assert all(hasattr(sb3_mbpo, name.strip()) for name in names.split(",")), (page, names)


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_files_that_are_linked_exist(page: Path) -> None:
    """As on the web page of a repository, where nothing is built."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target
