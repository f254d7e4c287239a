"""benchmarks/evidence.py: which runs it asks for, and what it makes of those that ended and those that were cut."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import ablations
import evidence
import gymnasium as gym
import pages
import pytest
import yaml

from sb3_mbpo.compare.run import Run

HEADER = "env,algorithm,seed,step,episode,return,length,seconds,evaluation_seconds,cpu_seconds,evaluation_cpu_seconds"
RUN = evidence.runs(["sac"])[0]
KEY = ("SAC", "Hopper-v5", 0)
PROVENANCE = {"commit": "1a2b", "versions": {"torch": "1"}, "hardware": {"cores": 2}}


def leave(run: Run, logs: Path, steps: int, finished: bool = False, gain: float = 1.0) -> None:
    """The files of a run that came to ``steps``; its mean return at a step is ``gain`` times the step."""
    folder = logs / run.folder
    run.begin(folder)
    lines = [
        f"{run.env},{run.label},{run.seed},{step},{i},{gain * step + i},{10 + i},{step / 10},1,{step / 20},0.5"
        for step in range(0, steps + 1, run.eval_freq)
        for i in (-1, 0, 1)
    ]
    (folder / "evaluations.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    if finished:
        about = {**PROVENANCE, "settings": {"learning_starts": 1000}, "finished": "2030-01-01"}
        (folder / "run.json").write_text(json.dumps(about))


def test_the_first_seed_of_every_task_comes_first() -> None:
    runs = evidence.runs(["sac"])
    assert [(run.env, run.seed) for run in runs] == [(env, seed) for seed in range(3) for env in evidence.TASKS]
    assert {(run.steps, run.eval_freq, run.eval_episodes, run.threads) for run in runs} == {(50_000, 1_000, 5, 1)}


def test_some_tasks_and_seeds() -> None:
    runs = evidence.runs(["sac"], envs=["Ant-v5", "Hopper-v5"], seeds=[2, 1])
    assert [(run.env, run.seed) for run in runs] == [("Hopper-v5", 1), ("Ant-v5", 1), ("Hopper-v5", 2), ("Ant-v5", 2)]


def test_no_two_runs_share_a_folder() -> None:
    folders = [run.folder for run in evidence.runs()]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("env", "size"), [("Ant-v5", 27), ("Humanoid-v5", 45), ("Hopper-v5", 11)])
def test_observations_are_those_of_the_body(env: str, size: int) -> None:
    run = next(run for run in evidence.runs(["sac"]) if run.env == env)
    pairs = (pair.split(":") for pair in run.env_kwargs)
    made = gym.make(env, **{name: {"False": False}[value] for name, value in pairs})
    assert made.observation_space.shape == (size,)
    made.close()


def test_baselines_have_default_settings_but_for_the_random_steps() -> None:
    content = yaml.safe_load((evidence.ROOT / evidence.DEFAULTS).read_text())
    assert content == {"default": {"n_timesteps": 50_000, "policy": "MlpPolicy", "learning_starts": 1_000}}


def test_a_row_per_evaluation_and_metric(tmp_path: Path) -> None:
    leave(RUN, tmp_path, 1_000)
    path = tmp_path / RUN.folder / "evaluations.csv"
    # Killed while it wrote the next evaluation.
    path.write_text(path.read_text() + "Hopper-v5,sac,0,2000,0,7")
    rows = evidence.long_rows(KEY, evidence.read(path))
    assert {tuple(row) for row in rows} == {evidence.CURVES}
    found = {(row["metric"], row["env_step"]): float(row["value"]) for row in rows}
    assert {step for _, step in found} == {"0", "1000"} and len(found) == 12
    assert found["avg_return", "1000"] == 1_000 and found["avg_length", "1000"] == 10
    assert found["seconds", "1000"] == 100 and found["cpu_seconds", "1000"] == 50
    assert found["evaluation_seconds", "0"] == 1 and found["evaluation_cpu_seconds", "0"] == 0.5


def collected(docs: Path) -> dict[tuple[str, str, int], tuple[str, str, str]]:
    manifest = evidence.read(docs / "manifest.csv")
    return {evidence.key_of(row): (row["finished"], row["steps"], row["commit"]) for row in manifest}


def test_collects_what_was_cut_and_marks_it(tmp_path: Path) -> None:
    second = evidence.runs(["sac"])[1]
    leave(RUN, tmp_path / "logs", 50_000, finished=True)
    leave(second, tmp_path / "logs", 3_000)
    evidence.collect(evidence.runs(), tmp_path / "logs", tmp_path)
    assert collected(tmp_path) == {KEY: ("1", "50000", "1a2b"), ("SAC", "HalfCheetah-v5", 0): ("0", "3000", "1a2b")}
    finished, cut = evidence.read(tmp_path / "manifest.csv")
    assert json.loads(finished["settings"]) == {"learning_starts": 1000} and finished["steps_wanted"] == "50000"
    assert finished["cpu_seconds"] == "2500" and json.loads(finished["versions"]) == {"torch": "1"}
    assert cut["conf_file"] == "benchmarks/evidence_sac.yml" and cut["ended"] == ""
    assert len(evidence.read(tmp_path / "curves.csv")) == 6 * (51 + 4)


def test_a_run_with_no_evaluation_yet_is_left_out(tmp_path: Path) -> None:
    RUN.begin(tmp_path / "logs" / RUN.folder)
    evidence.collect([RUN], tmp_path / "logs", tmp_path)
    assert collected(tmp_path) == {}


def test_what_went_further_stays(tmp_path: Path) -> None:
    others = tmp_path / "elsewhere"
    leave(RUN, others, 4_000)
    evidence.collect([RUN], others, tmp_path)
    # Not in these logs at all, or not as far.
    evidence.collect([RUN], tmp_path / "logs", tmp_path)
    leave(RUN, tmp_path / "logs", 2_000, gain=2)
    evidence.collect([RUN], tmp_path / "logs", tmp_path)
    assert collected(tmp_path) == {KEY: ("0", "4000", "1a2b")}
    leave(RUN, tmp_path / "logs", 5_000, gain=3)
    evidence.collect([RUN], tmp_path / "logs", tmp_path)
    assert collected(tmp_path) == {KEY: ("0", "5000", "1a2b")}
    # No row of the other is left.
    curve = evidence.seeds_of(evidence.read(tmp_path / "curves.csv"), "avg_return")["SAC", "Hopper-v5"][0]
    assert curve == {step: 3 * step for step in range(0, 5_001, 1_000)}
    assert evidence.further({"finished": "1", "steps": "50"}, {"finished": "0", "steps": "60"})
    assert not evidence.further({"finished": "0", "steps": "60"}, {"finished": "1", "steps": "50"})


def test_a_run_with_other_arguments_is_not_collected(tmp_path: Path) -> None:
    leave(dataclasses.replace(RUN, eval_episodes=1), tmp_path / "logs", 1_000)
    evidence.collect([RUN], tmp_path / "logs", tmp_path)
    assert collected(tmp_path) == {}


def test_mean_is_taken_where_all_seeds_are() -> None:
    assert evidence.mean([{0: 1.0, 10: 2.0, 20: 3.0}, {10: 4.0, 0: 3.0}]) == {0: 2.0, 10: 3.0}
    assert evidence.mean([]) == {}


def test_table_says_how_far_runs_came(tmp_path: Path) -> None:
    first, second, third = (run for run in evidence.runs(["sac"]) if run.env == "Hopper-v5")
    leave(first, tmp_path / "logs", 50_000, finished=True)
    leave(second, tmp_path / "logs", 50_000, finished=True, gain=2)
    leave(third, tmp_path / "logs", 20_000, gain=0.1)
    evidence.collect(evidence.runs(), tmp_path / "logs", tmp_path)
    theirs = evidence.published(
        [{"method": "sac", "task": "Hopper", "env_step": "20000", "mean_return": "700", "minutes": "2", "seeds": "8"}],
    )
    text = evidence.table(evidence.read(tmp_path / "curves.csv"), evidence.read(tmp_path / "manifest.csv"), theirs)
    lines = text.splitlines()
    start = lines.index("| **Hopper** | | | | | | *3,000* | | |")
    at = "10,333 | 20,667 | 45,000 (2) | 75,000 (2)"
    # 3,000 after 3,000 and 2,000 steps, and not within 20,000; 0.05 CPU seconds a step.
    assert lines[start + 1] == rf"| SAC | 3\* | {at} | 2,500 (2) | 2 (2) | 50 |"
    assert lines[start + 2] == "| SAC† | 8 |  | 700 |  |  | > 20,000 |  |  |"


def test_a_threshold_that_no_run_reaches(tmp_path: Path) -> None:
    curves, minutes = [{0: 1.0, 1_000: 2.0}, {0: 1.0, 1_000: 5.0, 2_000: 4.0}], [{0: 0.0, 1_000: 1.0}, {0: 0.0, 2_000: 3.0}]
    assert evidence.to_threshold(curves, minutes, 6.0) == ("> 2,000", "> 3")


def test_the_tables_of_the_page_are_those_of_the_csv() -> None:
    names = ("curves", "manifest", "published_curves")
    rows, manifest, theirs = (evidence.read(evidence.DOCS / f"{name}.csv") for name in names)
    expected = evidence.table(rows, manifest, evidence.published(theirs))
    assert pages.table_in(pages.PAGE, "evidence") == expected, "run: python benchmarks/evidence.py draw"
    expected = evidence.table(rows, manifest, evidence.published(theirs), evidence.README_TASKS)
    assert pages.table_in(pages.README, "evidence") == expected, "run: python benchmarks/evidence.py draw"
    if ablations.CSV.exists():
        expected = ablations.table(evidence.read(ablations.CSV))
        assert pages.table_in(pages.PAGE, "ablations") == expected, "run: python benchmarks/ablations.py collect"


def test_a_table_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- begin one -->\n\nold\n\n<!-- end one -->\n\nb\n\n<!-- begin two -->\n\nc\n\n<!-- end two -->\n")
    before = page.read_text()
    pages.put_table(page, "one", "new \\1\nrow")
    assert page.read_text() == before.replace("old", "new \\1\nrow")
    assert pages.table_in(page, "one") == "new \\1\nrow"
    with pytest.raises(ValueError, match="0 places for the table 'three'"):
        pages.put_table(page, "three", "new")


# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_draws_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    for path in (page, readme):
        path.write_text("<!-- begin evidence -->\n\nold\n\n<!-- end evidence -->\n")
    leave(RUN, tmp_path / "logs", 2_000)
    evidence.collect([RUN], tmp_path / "logs", tmp_path)
    evidence.draw(tmp_path, page, readme)
    assert (tmp_path / "curves.png").stat().st_size > (tmp_path / "readme.png").stat().st_size > 10_000
    assert "**Hopper**" in pages.table_in(readme, "evidence") and "**Ant**" not in pages.table_in(readme, "evidence")
    assert pages.table_in(page, "evidence") == capsys.readouterr().out.strip().partition("\n")[2]


def test_published_curves_name_source_and_license() -> None:
    rows = evidence.read(evidence.DOCS / "published_curves.csv")
    assert {(row["source"], row["license"]) for row in rows} == {("github.com/4kubo/erl_lib", "MIT")}
    curves = evidence.published(rows)
    assert {task for _, task in curves} == set(evidence.TASKS)
    hopper = curves["DHMBPO, published", "Hopper-v5"]
    assert (hopper.seeds, hopper.returns[50_000], hopper.minutes[50_000]) == (8, 3470, 25)


# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs rl_zoo3")
@pytest.mark.usefixtures("zoo")
def test_finished_runs_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_mbpo.compare import cli as compare

    made: list[Run] = []

    def make(runs: list[Run], *rest: object) -> dict[str, str]:
        made.extend(runs)
        return {"a run": "broke"}

    monkeypatch.setattr(compare, "make", make)
    first, second = evidence.runs(["sac"])[:2]
    leave(first, tmp_path, 50_000, finished=True)
    (tmp_path / first.folder / "run.json").write_text(json.dumps({"run": dataclasses.asdict(first)}))
    with pytest.raises(SystemExit, match="a run: broke"):
        evidence.make([first, second], tmp_path, 1)
    assert made == [second]
