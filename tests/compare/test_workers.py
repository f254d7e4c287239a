"""Processes that make runs; Ray itself is in test_compare.py."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sb3_mbpo.compare import workers
from sb3_mbpo.compare.run import Run
from sb3_mbpo.compare.workers import LocalWorkers, RayWorkers, WorkerKilled, run_elsewhere

RUN = Run("E-v0", "sac", "sac", {}, seed=0, steps=50, eval_freq=20, eval_episodes=2)
Does = Callable[[str], None]


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Does:
    """Sets what the process of a run does instead of training; its folder is ``f``."""

    def set_code(code: str) -> None:
        def start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
            run.begin(folder)
            lines = f"import os, sys, time\nfrom pathlib import Path\nf = Path({str(folder)!r})\nseed = {run.seed}\n{code}"
            with (folder / "output.txt").open("wb") as output:
                return subprocess.Popen(
                    [sys.executable, "-u", "-c", lines], stdin=subprocess.PIPE, stdout=output, stderr=output
                )

        monkeypatch.setattr(workers, "start", start)

    return set_code


def all_of(pool: LocalWorkers, runs: list[Run]) -> dict[int, str | None]:
    """seed -> outcome"""
    outcomes, most = {}, 0
    waiting = list(runs)
    while waiting or pool.active:
        while waiting and pool.has_room():
            pool.start(waiting.pop(0))
        most = max(most, len(pool.active))
        outcomes.update({run.seed: outcome for run, outcome in pool.collect()})
    assert pool.count is not None and most == min(pool.count, len(runs))
    return outcomes


def seeds(n: int) -> list[Run]:
    return [dataclasses.replace(RUN, seed=seed) for seed in range(n)]


def test_failures_stop_nobody(does: Does, tmp_path: Path) -> None:
    does("print('line', seed)\nif seed == 1: sys.exit('no such thing')\n(f / 'run.json').write_text('{}')")
    outcomes = all_of(LocalWorkers(tmp_path, 2), seeds(4))
    assert [outcomes[seed] for seed in (0, 2, 3)] == [None] * 3
    output = tmp_path / "E-v0" / "sac" / "seed_1" / "output.txt"
    assert outcomes[1] == f"exit code 1, see {output}\n    line 1\n    no such thing"


def test_only_the_end_of_the_output_is_shown(does: Does, tmp_path: Path) -> None:
    does("for i in range(100): print(i)\nsys.exit(3)")
    outcome = all_of(LocalWorkers(tmp_path, 1), seeds(1))[0]
    assert outcome is not None
    assert outcome.startswith("exit code 3") and outcome.splitlines()[1:] == [f"    {i}" for i in range(85, 100)]


def test_run_without_its_mark_has_failed(does: Does, tmp_path: Path) -> None:
    does("pass")
    assert (all_of(LocalWorkers(tmp_path, 1), seeds(1))[0] or "").startswith("exit code 0")


def test_stop_ends_what_is_under_way(does: Does, tmp_path: Path) -> None:
    does("(f / 'pid').write_text(str(os.getpid()))\ntime.sleep(99)")
    pool = LocalWorkers(tmp_path, 2)
    for run in seeds(2):
        pool.start(run)
    files = [tmp_path / run.folder / "pid" for run in pool.active.values()]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    assert pool.collect() == []
    pool.stop()
    assert pool.active == {}
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_process_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str | None) -> None:
    """It has its threads, which leave the cores to other runs while they wait, and it is out of the reach of Ctrl-C."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    script = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'], os.getsid(0) == os.getpid())"
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{script}")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    workers.start(dataclasses.replace(RUN, threads=3), tmp_path / "run").communicate()
    assert (tmp_path / "run" / "output.txt").read_text().split() == ["3", policy or "PASSIVE", "True"]


def test_run_elsewhere_returns_its_files(does: Does) -> None:
    does("(f / 'a').mkdir()\n(f / 'a' / 'b.bin').write_bytes(bytes([0, 255]))\n(f / 'run.json').write_text('{}')\nprint(f)")
    code, files = run_elsewhere(RUN)
    assert code == 0 and set(files) == {"a/b.bin", "run.json", "arguments.json", "output.txt"}
    assert files["a/b.bin"] == b"\x00\xff"
    assert not Path(files["output.txt"].decode().strip()).exists()


def test_killed_process_is_no_failed_run(does: Does) -> None:
    does("os.kill(os.getpid(), 9)")
    with pytest.raises(WorkerKilled, match="seed 0: killed by signal 9"):
        run_elsewhere(RUN)
    does("print(7)\nsys.exit(1)")
    assert run_elsewhere(RUN)[0] == 1


def test_missing_ray_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r'--ray-address needs ray: .* pip install "\.\[ray\]"'):
        RayWorkers(tmp_path, "auto", None)
