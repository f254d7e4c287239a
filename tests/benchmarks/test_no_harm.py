"""benchmarks/no_harm.py: what its arms share, what it reads, and how it judges. The runs themselves take hours."""

import dataclasses
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pages
import pandas as pd
import pytest


@pytest.fixture
def study(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Late, as its recorder is that of a module that imports the Zoo.
    import no_harm

    monkeypatch.setattr(no_harm, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(no_harm, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    return no_harm


def finish(study: Any, run: tuple[str, str, int], returns: dict[int, list[float]]) -> None:
    """The files of a finished run: ``returns`` of the episodes, by step."""
    from sb3_mbpo.compare.evaluation import COLUMNS

    folder = study.folder_of(run)
    folder.mkdir(parents=True)
    rows = [
        {**dict.fromkeys(COLUMNS, 1), "step": step, "episode": i, "return": value, "length": 7, "cpu_seconds": step / 10}
        for step, values in returns.items()
        for i, value in enumerate(values)
    ]
    pd.DataFrame(rows)[list(COLUMNS)].to_csv(folder / "evaluations.csv", index=False)
    made = {"description": study.description(run), "cpu_seconds": 60.0, "commit": "0123456789"}
    (folder / "run.json").write_text(json.dumps(made))


def test_arms_differ_in_the_model_only(study: Any) -> None:
    from stable_baselines3 import SAC

    known = set(inspect.signature(SAC).parameters)
    for name, task in study.TASKS.items():
        of_sac, *others = (study.settings_of(task, arm) for arm in study.arms_of(name) if arm != "dhmbpo")
        assert set(of_sac) <= known and of_sac["learning_starts"] < task.steps
        # MBPO's default is 20: were it not given, the arms would not have the same number of updates.
        assert of_sac["gradient_steps"] == task.updates * of_sac.get("train_freq", 1)
        for ours in others:
            assert {key: value for key, value in ours.items() if key in known} == of_sac
        # Never that of a table.
        assert study.settings_of(task, "mbpo")["termination_fn"] == "learned"
        assert set(study.settings_of(task, "dhmbpo")) <= {"learning_starts", "gamma", "ent_coef", "termination_fn"}
    assert study.arms_of("Hopper-v5") == ["sac", "mbpo", "true", "dhmbpo"]


def test_evaluations_begin_after_the_random_steps_and_end_with_the_last(study: Any) -> None:
    task = study.Task("Pendulum-v1", 1_100, random_steps=500, eval_freq=250)
    assert study.evaluation_steps(task) == [750, 1_000, 1_100]
    assert task.total_updates == 3_000
    assert study.evaluation_steps(dataclasses.replace(task, steps=1_000)) == [750, 1_000]


def test_a_row_has_the_fit_before_it(study: Any) -> None:
    rows = pd.DataFrame({"step": [250, 500, 750]})
    fits = pd.DataFrame([(251, "q_max", 1.0), (251, "train_loss", 9.0), (500, "q_max", 2.0), (500, "updates", 64)])
    fits.columns = pd.Index(["step", "name", "value"])
    found = study.with_last_fit(rows, fits)
    # An evaluation at step 500 is before the fit at 500, and none is before the first.
    assert found["q_max"].fillna(-1).tolist() == [-1, 1, 2] and found["updates"].fillna(-1).tolist() == [-1, -1, 64]
    assert found["fit_step"].fillna(-1).tolist() == [-1, 251, 500] and set(study.LOGGED) <= set(found.columns)
    assert study.with_last_fit(rows, None)["q_max"].isna().all()


def test_finished_runs_are_collected_and_not_made_again(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Pendulum-v1"
    steps = study.evaluation_steps(study.TASKS[name])
    for arm, level in (("sac", 1.0), ("mbpo", 3.0)):
        finish(study, (name, arm, 0), {step: [level, level + 2] for step in steps})
    assert study.is_finished((name, "sac", 0)) and not study.is_finished((name, "sac", 1))
    rows = study.collect()
    assert rows["return"].tolist() == [2.0] * len(steps) + [4.0] * len(steps) and set(rows["length"]) == {7}
    assert set(rows["return_std"]) == {1.0} and set(rows["commit"]) == {"0123456"}
    assert rows["arm"].unique().tolist() == ["sac", "mbpo"] and list(rows.columns) == study.COLUMNS
    rows.to_csv(study.RESULTS / "evaluations.csv", index=False)
    # What only the CSV has stays; of settings that have changed since, the run is to be made again.
    monkeypatch.setattr(study, "LOGS", study.LOGS / "none")
    assert study.in_csv((name, "mbpo", 0)) and not study.in_csv((name, "mbpo", 1))
    again = study.collect()
    pd.testing.assert_frame_equal(again, rows, check_dtype=False)
    monkeypatch.setattr(study, "LOGS", study.LOGS.parent)
    monkeypatch.setitem(study.TASKS, name, dataclasses.replace(study.TASKS[name], updates=6))
    assert not study.is_finished((name, "sac", 0))


def test_description_survives_its_file(study: Any) -> None:
    for name in study.TASKS:
        for arm in study.arms_of(name):
            described = study.description((name, arm, 0))
            assert described == json.loads(json.dumps(described)) and "0x" not in str(described)


def test_a_run_of_another_task_is_not_finished(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("ForbiddenDisc-v0", "sac", 0)
    finish(study, run, {2_500: [1.0]})
    assert study.is_finished(run)
    monkeypatch.setattr(study.ends.ForbiddenDisc, "RADIUS", 0.123)
    assert not study.is_finished(run)


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "alike"),
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], "BEHIND"),
        ([10.0, 11.0, 12.0], [1.0, 2.0, 3.0], "ahead"),
        # The larger spread counts, whichever arm has it.
        ([0.0, 0.0, 0.0], [-4.0, 2.0, 8.0], "alike"),
        ([-4.0, 2.0, 8.0], [0.0, 0.0, 0.0], "alike"),
        # One seed has no spread to compare with.
        ([1.0], [4.0, 5.0, 6.0], "one seed"),
    ],
)
def test_verdict(study: Any, mine: list[float], other: list[float], expected: str) -> None:
    assert study.verdict(*study.compare(np.array(mine), np.array(other))) == expected


def made_up(study: Any) -> pd.DataFrame:
    rows = pd.DataFrame(
        [
            ("Pendulum-v1", arm, seed, step, -1000.0 + level * step + 10 * seed)
            for arm, level in (("sac", 0.1), ("mbpo", 0.4))
            for seed in (0, 1, 2)
            for step in (1_000, 2_000)
        ],
        columns=["task", "arm", "seed", "step", "return"],
    )
    return rows.assign(cpu_seconds=60.0).reindex(columns=study.COLUMNS)


def test_scores_and_table(study: Any) -> None:
    rows = made_up(study)
    # By hand: -900 and -800, -600 and -200; ten more for each seed.
    expected = {"area": [-850, -840, -830, -400, -390, -380], "final": [-800, -790, -780, -200, -190, -180]}
    found = study.scores(rows.sample(frac=1, random_state=0)).sort_values(["arm", "seed"], ascending=[False, True])
    assert {name: found[name].tolist() for name in expected} == expected
    assert study.scores(rows)["arm"].tolist() == ["sac"] * 3 + ["mbpo"] * 3
    sac, mbpo = study.table(rows).splitlines()[2:]
    assert sac == "| Pendulum-v1 | SAC | 3 | -840 ± 10.0 |  | -790 ± 10.0 |  |  |  | 1.0 |"
    assert mbpo.startswith("| Pendulum-v1 | MBPO | 3 | -390 ± 10.0 | +450, ahead | -190 ± 10.0 | +600, ahead |")


def test_the_tables_of_the_pages_are_those_of_the_csv(study: Any) -> None:
    rows = pd.read_csv(Path(pages.BENCHMARKS, "no_harm", study.EVALUATIONS), dtype={"commit": str})
    hint = "run: python benchmarks/no_harm.py --collect"
    assert pages.table_in(pages.PAGE, "no_harm") == study.areas(rows), hint
    assert pages.table_in(pages.BENCHMARKS / "notes" / "beside_sac.md", "no_harm") == study.table(rows), hint


def test_areas(study: Any) -> None:
    rows = made_up(study)
    head, _, row = study.areas(rows[(rows["arm"] == "sac") | (rows["seed"] == 1)]).splitlines()
    assert head == "| task | updates a step | SAC | MBPO |"
    assert row == "| Pendulum-v1 | 5 | -840 ± 10.0 (3) | -390 (1) |"


def test_figure(study: Any, tmp_path: Path) -> None:
    study.draw(made_up(study), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_options(study: Any) -> None:
    args = study.parse("--tasks Hopper-v5 --arms sac --seeds 3 4 --workers 1".split())
    assert (args.tasks, args.arms, args.seeds, args.workers) == (["Hopper-v5"], ["sac"], [3, 4], 1)
    # 25,000 updates.
    assert study.estimated_minutes([("Hopper-v5", "sac", 0)]) == pytest.approx(25_000 * 0.0145 / 60)
