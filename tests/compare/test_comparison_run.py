"""One run: its folder, what makes it finished, and its process."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sb3_mbpo.compare import run as comparison_run
from sb3_mbpo.compare.run import Run, as_file_name, put, record

TINY = {
    **{"learning_starts": 20, "batch_size": 16, "gradient_steps": 1, "rollout_batch_size": 20, "model_train_freq": 20},
    **{"dynamics_kwargs": {"net_arch": [8], "max_updates": 2}, "policy_kwargs": "dict(net_arch=[8])", "tau": 0.01},
}
RUN = Run("Pendulum-v1", "mbpo:tau=0.01", "mbpo", TINY, seed=1, steps=30, eval_freq=20, eval_episodes=2)


def finish(run: Run, folder: Path) -> None:
    run.begin(folder)
    put(folder / "run.json", json.dumps({"run": dataclasses.asdict(run)}).encode())


def test_names_of_folders() -> None:
    assert RUN.folder == Path("Pendulum-v1", "mbpo_tau=0.01", "seed_1")
    assert as_file_name("dm_control/cheetah-run-v0") == "dm_control_cheetah-run-v0"
    long = [as_file_name("sac:" + "x" * 300 + end) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name) < 100 for name in long)


@pytest.mark.parametrize(
    ("steps", "expected"), [(50, [0, 20, 40, 50]), (40, [0, 20, 40]), (20, [0, 20]), (5, [0, 5]), (1, [0, 1])]
)
def test_evaluations_come_first_and_last(steps: int, expected: list[int]) -> None:
    assert dataclasses.replace(RUN, steps=steps).evaluation_steps == expected


def test_options_of_the_zoo() -> None:
    run = Run(
        *("E-v0", "sac:a=b", "sac", {"a": "b", "c": 1e-3, "d": [1, None]}, 2, 100, 10, 1),
        threads=3,
        device="cpu",
        conf_file="mine.yml",
        env_kwargs=["x:1"],
        gym_packages=["p", "q"],
    )
    expected = "--algo sac --env E-v0 --seed 2 -n 100 --eval-freq -1 -f F --num-threads 3 --device cpu --conf-file mine.yml"
    tail = ["-params", "a:'b'", "c:0.001", "d:[1, None]", "--env-kwargs", "x:1", "--gym-packages", "p", "q"]
    assert run.zoo_options(Path("F")) == expected.split() + tail
    bare = Run("E-v0", "sac", "sac", {}, 0, 100, 10, 1).zoo_options(Path("F"))
    assert not {"-params", "--conf-file", "--env-kwargs", "--gym-packages"} & set(bare)


def test_begin_keeps_nothing_of_an_unfinished_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    RUN.begin(folder)
    assert Run.read(folder) == RUN
    (folder / "evaluations.csv").write_text("half")
    RUN.begin(folder)
    assert [file.name for file in folder.iterdir()] == ["arguments.json"]


def test_begin_spares_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="choose another --folder"):
        RUN.begin(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_finished_is_what_was_asked_and_marked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not RUN.is_finished(folder)
    RUN.begin(folder)
    (folder / "evaluations.csv").write_text("everything")
    assert not RUN.is_finished(folder)
    finish(RUN, folder)
    assert RUN.is_finished(folder) and dataclasses.replace(RUN, command="another").is_finished(folder)


@pytest.mark.parametrize(
    "change",
    [{"steps": 60}, {"eval_freq": 10}, {"eval_episodes": 1}, {"settings": {}}, {"threads": 2}, {"gym_packages": ["a"]}],
)
def test_finished_with_other_arguments_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    finish(RUN, tmp_path / "run")
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"finished run with {name}=.*choose another --folder") as caught:
        dataclasses.replace(RUN, **change).is_finished(tmp_path / "run")
    assert f"{name}={getattr(RUN, name)!r}, not {value!r}:" in str(caught.value)


def test_put_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("cut here"))
    with pytest.raises(pytest.fail.Exception):
        put(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_process_ends_with_its_parent() -> None:
    # The file alone, because importing the package takes seconds.
    code = f"import runpy, time; runpy.run_path({comparison_run.__file__!r})['end_with_parent'](); print(1, flush=True)"
    command = [sys.executable, "-c", code + "; time.sleep(99)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(20) == 1


def test_cut_run_is_not_finished(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RUN.begin(tmp_path / "run")
    monkeypatch.setattr(comparison_run, "end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "run")])
    # As the Zoo does on an interrupt: it returns as if all were done.
    monkeypatch.setattr(zoo, "main", lambda *args, **kwargs: None)
    monkeypatch.setattr("sb3_mbpo.runtime.provenance.commit", lambda folder: "1a2b")
    with pytest.raises(SystemExit, match="ended before step 0"):
        comparison_run.main()
    assert not (tmp_path / "run" / "run.json").exists()
    # Of what it left, one can still tell where it comes from.
    left = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert left["commit"] == "1a2b" and left["versions"]["torch"]


def test_begin_keeps_checkpoints_of_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RUN.begin(folder)
    (folder / "checkpoints").mkdir()
    dataclasses.replace(RUN, command="another").begin(folder)
    assert (folder / "checkpoints").exists()
    dataclasses.replace(RUN, steps=31).begin(folder)
    assert not (folder / "checkpoints").exists()


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sb3_mbpo.compare.run", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs rl_zoo3")
def test_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RUN.begin(folder)
    with start(folder) as process:
        output = process.stdout.read() if process.stdout else b""
    assert process.returncode == 0, output.decode()
    assert RUN.is_finished(folder)
    found = record(folder)
    assert found["settings"]["tau"] == 0.01 and found["run"]["seed"] == 1
    assert found["versions"]["torch"] and found["hardware"]["cores"]
    for of in ("seconds", "cpu_seconds"):
        assert 0 < found[of]["updates"] < found[of]["total"]
    with (folder / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), int(row["episode"])) for row in rows] == [(s, i) for s in (0, 20, 30) for i in (0, 1)]
    assert {row["algorithm"] for row in rows} == {"mbpo:tau=0.01"}
    # The first fit comes right before the first update.
    with (folder / "fits.csv").open(newline="") as file:
        fits = {(step, name): float(value) for step, name, value in csv.reader(file)}
    assert {step for step, _ in fits} == {"21"} and fits["21", "updates"] == 3 and ("21", "explained_obs") in fits
    # Where the Zoo's other commands find it.
    assert (folder / "mbpo" / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()


@pytest.mark.expensive
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs rl_zoo3")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed after a checkpoint, and after evaluations beyond it: the evaluations in the end are those of a run in one go."""
    run = dataclasses.replace(RUN, steps=600, eval_freq=60)

    def kept(folder: Path) -> list[list[str]]:
        """Evaluations and fits without times."""
        with (folder / "evaluations.csv").open(newline="") as episodes, (folder / "fits.csv").open(newline="") as fits:
            return [row[:7] for row in csv.reader(episodes)] + [row for row in csv.reader(fits) if "seconds" not in row[1]]

    for name in ("whole", "cut"):
        run.begin(tmp_path / name)
        process = start(tmp_path / name)
        if name == "cut":
            while not list((tmp_path / name).glob("checkpoints/*-step-*")) and process.poll() is None:
                time.sleep(0.05)
            time.sleep(0.5)
            process.kill()
            process.communicate()
            assert not run.is_finished(tmp_path / name)
            run.begin(tmp_path / name)
            process = start(tmp_path / name)
        # Its standard input stays open until it has ended.
        with process:
            assert process.stdout is not None
            process.stdout.read()
        assert process.returncode == 0 and run.is_finished(tmp_path / name)
        assert not (tmp_path / name / "checkpoints").exists()
        # Of all processes: what the last evaluation says, and the update after it.
        with (tmp_path / name / "evaluations.csv").open(newline="") as file:
            *_, last = csv.DictReader(file)
        seconds = record(tmp_path / name)["seconds"]
        until_then = float(last["seconds"]) + float(last["evaluation_seconds"])
        assert until_then - 0.01 < seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
        cpu_until_then = float(last["cpu_seconds"]) + float(last["evaluation_cpu_seconds"])
        assert cpu_until_then - 0.01 < record(tmp_path / name)["cpu_seconds"]["total"]
        # What the process spent before it began, on imports, is not in it; nor may a resumed one take anything off.
        assert all(0 <= seconds for seconds in record(tmp_path / name)["cpu_seconds"].values())
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    assert sum(len(row) == 7 for row in kept(tmp_path / "whole")) == 23
