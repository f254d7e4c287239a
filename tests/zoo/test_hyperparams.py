"""The settings that come with the package: every entry names what exists, and every entry trains."""

import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

import sb3_mbpo
from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.rollout_schedule import rollout_length

ROOT = Path(__file__).parents[2]
FILES = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "hyperparams").glob("*.yml"))}
ENTRIES = [(file, env_id) for file, entries in FILES.items() for env_id in entries]
CLASSES = {
    "mbpo": "MBPO",
    "mbpo_full_obs": "MBPO",
    "mbtd3": "MBTD3",
    "mbtqc": "MBTQC",
    "mbcrossq": "MBCrossQ",
    "dhmbpo": "DHMBPO",
}
# Read by the Zoo, not by the algorithm.
OF_THE_ZOO = {"n_timesteps", "env_kwargs", "env_wrapper", "noise_type", "noise_std"}
# Length of the observation, where it is the point.
DIMENSIONS = {"Ant-v4": 27, "Ant-v5": 27, "Humanoid-v4": 376, "Humanoid-v5": 45}
FULL = {"Ant-v5": 105, "Humanoid-v5": 348}
# One of each kind; all of them are a minute of work.
QUICK = [("mbpo", "dm_control/cartpole-swingup-v0"), ("mbpo_full_obs", "Humanoid-v5"), ("mbtd3", "InvertedPendulum-v5")]


@pytest.mark.parametrize(("file", "env_id"), ENTRIES)
def test_entry_is_understood(file: str, env_id: str) -> None:
    entry = dict(FILES[file][env_id])
    algorithm = getattr(sb3_mbpo, CLASSES[file])
    assert set(entry) - OF_THE_ZOO <= set(inspect.signature(algorithm).parameters)
    assert 0 < entry.get("learning_starts", 0) < int(entry["n_timesteps"])
    if file == "dhmbpo":
        # Its defaults are for all tasks.
        assert set(entry) <= {"policy", "learning_starts", *OF_THE_ZOO}
        return
    assert 5 <= entry["gradient_steps"] / entry.get("train_freq", 1) <= 40
    lengths = [rollout_length(entry.get("rollout_schedule", 1), step) for step in range(0, 400_000, 5000)]
    assert 1 == lengths[0] <= lengths[-1] <= 25
    # What the schedule fills, in rows of two observations, an action, a reward and an end, stays below 6 GB.
    width = (FULL if file == "mbpo_full_obs" else DIMENSIONS).get(env_id, 24)
    rows = entry.get("model_buffer_size", 100_000 * max(lengths) * entry.get("retained_rollouts", 4))
    assert 4 * rows * (2 * width + 19) < 6e9


def test_every_task_of_the_paper_is_there() -> None:
    tasks = ["InvertedPendulum", "InvertedDoublePendulum", "Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid"]
    assert {f"{task}-{version}" for task in tasks for version in ("v4", "v5")} <= set(FILES["mbpo"])
    assert set(FILES["mbpo_full_obs"]) == {"Ant-v5", "Humanoid-v5"}
    for name in ("mbpo", "dhmbpo", "mbtd3", "mbtqc", "mbcrossq"):
        assert {"default", "Pendulum-v1", *(f"{task}-v5" for task in tasks)} <= set(FILES[name])


@pytest.mark.parametrize(("file", "env_id"), [entry for entry in ENTRIES if FILES[entry[0]][entry[1]].get("use_sde")])
def test_noise_that_depends_on_the_state_lasts(file: str, env_id: str) -> None:
    """SB3 draws it anew in each rollout, and with train_freq=1 a rollout is one step."""
    assert FILES[file][env_id]["train_freq"] >= 8


@pytest.mark.parametrize("file", FILES)
def test_every_entry_says_where_it_comes_from(file: str) -> None:
    """In a comment of its own, or by the entry whose settings it takes."""
    text = (ROOT / "hyperparams" / f"{file}.yml").read_text(encoding="utf-8")
    found = re.findall(r"^(#.*\n)?([^#\s].*?):(?: .*)?\n(.*)", text, re.MULTILINE)
    assert {name for _, name, _ in found} == set(FILES[file])
    assert [name for comment, name, first_line in found if not comment and "<<: *" not in first_line] == []


# jannerm/mbpo, examples/config: n_train_repeat, target_entropy, model_train_freq, refills in the model pool (its epochs of 250
# steps hold one, those of 1,000 four, of Humanoid five epochs with one each), n_initial_exploration_steps, hidden_dim.
PAPER = {
    ("mbpo", "InvertedDoublePendulum"): (20, -0.5, 250, 1, 500, 200),
    ("mbpo", "Hopper"): (20, -1, 250, 4, 5000, 200),
    ("mbpo", "Walker2d"): (20, -3, 250, 4, 5000, 200),
    ("mbpo", "HalfCheetah"): (40, -3, 250, 4, 5000, 200),
    ("mbpo", "Ant"): (20, -4, 250, 4, 5000, 200),
    ("mbpo", "Humanoid"): (20, -2, 1000, 5, 5000, 400),
    ("mbpo_full_obs", "Ant"): (20, -4, 250, 4, 5000, 200),
    ("mbpo_full_obs", "Humanoid"): (20, -2, 1000, 5, 5000, 400),
    # Four refills where the paper has one: as the committed runs had it.
    ("mbpo", "InvertedPendulum"): (10, -0.05, 250, 4, 500, 200),
}


@pytest.mark.parametrize(("file", "task"), PAPER)
def test_values_of_the_paper(file: str, task: str) -> None:
    defaults = {name: item.default for name, item in inspect.signature(sb3_mbpo.MBPO).parameters.items()}
    for env_id in {f"{task}-v4", f"{task}-v5"} & set(FILES[file]):
        entry = {**defaults, **FILES[file][env_id]}
        dynamics = ProbabilisticEnsemble(3, 1, **(entry["dynamics_kwargs"] or {}))
        *values, width = PAPER[file, task]
        names = ("gradient_steps", "target_entropy", "model_train_freq", "retained_rollouts", "learning_starts")
        assert [entry[name] for name in names] == values
        *hidden, _ = (weight.shape[2] for name, weight in dynamics.mlp.named_parameters() if name.endswith("weight"))
        assert hidden == [width] * 4


# jannerm/mbpo: epochs of 1,000 steps after 5,000 random ones; k is first 2 at epoch 30 (Hopper), 24 (Ant), 32 (Humanoid).
@pytest.mark.parametrize(
    ("file", "env_id", "epoch"),
    [("mbpo", "Hopper-v5", 30), ("mbpo", "Ant-v5", 24), ("mbpo", "Humanoid-v5", 32)],
)
def test_schedule_counts_the_random_steps(file: str, env_id: str, epoch: int) -> None:
    schedule = FILES[file][env_id]["rollout_schedule"]
    lengths = [rollout_length(schedule, 5000 + 1000 * epoch + step) for step in (-1000, 0)]
    assert lengths == [1, 2]


def made(env_id: str, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> gym.Env:
    """The env of an entry, or the reason why there is none here."""
    if env_id == "HiddenHazard-v0":
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        importlib.import_module("hazard")
    if env_id.startswith("dm_control/"):
        if find_spec("dm_control") is None:
            pytest.skip("needs dm_control")
        # No window is needed, and none is to be had in a test.
        monkeypatch.setenv("MUJOCO_GL", "disable")
        importlib.import_module("shimmy")
    try:
        env = gym.make("Pendulum-v1" if env_id == "default" else env_id, **entry.get("env_kwargs", {}))
    except gym.error.DependencyNotInstalled as error:
        pytest.skip(str(error))
    if "env_wrapper" in entry:
        module, _, name = entry["env_wrapper"].rpartition(".")
        env = getattr(importlib.import_module(module), name)(env)
    return env


@pytest.mark.parametrize(
    ("file", "env_id"),
    [pytest.param(*entry, marks=() if entry in QUICK else pytest.mark.expensive) for entry in ENTRIES],
)
@pytest.mark.filterwarnings("ignore:.*is out of date", "ignore:builtin type [Ss]wig")
def test_entry_trains(file: str, env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = FILES[file][env_id]
    env = made(env_id, entry, monkeypatch)
    assert env.observation_space.shape is not None
    (dimension,) = env.observation_space.shape
    assert dimension == (FULL if file == "mbpo_full_obs" else DIMENSIONS).get(env_id, dimension)
    settings = {key: value for key, value in entry.items() if key not in OF_THE_ZOO}
    settings["dynamics_kwargs"] = {"net_arch": [8], "max_updates": 2}
    settings["min_explained_variance"] = None
    settings["policy_kwargs"] = {**settings.get("policy_kwargs", {}), "net_arch": [8]}
    tiny = {"learning_starts": 20, "gradient_steps": 2, "batch_size": 32, "rollout_batch_size": 20, "model_train_freq": 10}
    tiny["train_freq"] = 1
    agent = getattr(sb3_mbpo, CLASSES[file])(env=env, seed=0, **{**settings, **tiny, "buffer_size": 100}).learn(35)
    # Fits after steps 21 and 30.
    assert agent._n_updates == 30 and agent.dynamics_fitted_at == 30
    if file == "dhmbpo":
        # And distribution rollouts before updates 1 and 21.
        assert agent.expands_values and len(agent.replay_buffer.model_buffer.refills) == 4
        return
    assert len(agent.replay_buffer.model_buffer) == min(2, agent.retained_rollouts) * 20
