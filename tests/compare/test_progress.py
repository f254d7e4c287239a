"""What is shown of many runs."""

import dataclasses
import io
from importlib.util import find_spec
from pathlib import Path

import pytest

# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
if find_spec("rich") is None:
    pytest.skip("needs rich", allow_module_level=True)

from rich.console import Console

from sb3_mbpo.compare import progress
from sb3_mbpo.compare.progress import RunProgress, latest
from sb3_mbpo.compare.run import Run

RUNS = [Run("E-v0", "sac", "sac", {}, seed, steps=50, eval_freq=20, eval_episodes=2) for seed in range(3)]
HEAD = "step,episode,return\n"


def evaluated(root: Path, run: Run, text: str) -> None:
    (root / run.folder).mkdir(parents=True)
    (root / run.folder / "evaluations.csv").write_text(HEAD + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "0,0,-5\n0,1,-7\n20,0,1\n20,1,2\n", (20, 1.5)),
        (HEAD + "0,0,-5\n0,1,-7\n", (0, -6)),
        (HEAD, None),
        ("", None),
        # Being written.
        (HEAD + "0,0,-5\n0,", None),
    ],
)
def test_latest(tmp_path: Path, text: str, expected: tuple[int, float] | None) -> None:
    assert latest(tmp_path / "none.csv") is None
    (tmp_path / "e.csv").write_text(text)
    assert latest(tmp_path / "e.csv") == expected


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    evaluated(tmp_path, RUNS[1], "20,0,1234.56\n")
    with RunProgress(3, 1, tmp_path, console) as shown:
        shown.show(RUNS[1:])
        shown.ended(RUNS[1], None)
        shown.ended(RUNS[2], "exit code 1, see a_long_file_name_that_does_not_fit\n    Traceback")
    assert console.file.getvalue() == (  # type: ignore[attr-defined]
        "1 of 3 runs were finished before\n"
        "[2/3] E-v0, sac, seed 1: done, return 1,234.6 at step 20\n"
        "[3/3] E-v0, sac, seed 2: failed: exit code 1, see a_long_file_name_that_does_not_fit\n"
    )


def test_bars_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0)
    console = Console(file=io.StringIO(), width=150, force_terminal=True, force_interactive=True, color_system=None)
    evaluated(tmp_path, RUNS[0], "20,0,1234.56\n")
    with RunProgress(3, 0, tmp_path, console) as shown:
        shown.show(RUNS[:2])
        shown.refresh()
        tasks = {task.description: task for task in shown.tasks}
        assert tasks["E-v0, sac, seed 0"].completed == 20 and tasks["E-v0, sac, seed 1"].completed == 0
        shown.ended(RUNS[0], None)
        assert shown.tasks[0].completed == 1
        shown.show([dataclasses.replace(RUNS[1])])
        assert {task.description for task in shown.tasks} == {"all runs", "E-v0, sac, seed 1"}
        shown.refresh()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 20, return 1,234.6" in text and "0 done, 2 active, 1 waiting, 0 failed" in text
    assert "1 done, 1 active, 1 waiting, 0 failed" in text
