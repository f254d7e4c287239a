"""The notebooks: their programs run with few steps, and the notebooks are those of their programs."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
PROGRAMS = sorted(FOLDER.glob("*.py"))
NEEDED = ("matplotlib", "pandas")


@pytest.mark.expensive
# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
@pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason='needs ".[extra]"')
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_it_runs(program: Path, tmp_path: Path) -> None:
    """A new process, as a reader starts it."""
    # A fit after the random steps, and a few updates.
    steps = "210" if program.stem == "trust_the_model" else "120"
    environment = os.environ | {"NOTEBOOK_STEPS": steps, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def cells_of(program: str) -> list[str]:
    """:return: the cells of a program in jupytext's percent format, without the marks of comments"""
    cells = []
    for kind, text in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", program, re.DOTALL | re.MULTILINE):
        lines = [re.sub(r"^# ?", "", line) for line in text.splitlines()] if kind else text.splitlines()
        cells.append("\n".join(lines).strip())
    return cells


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_the_notebook_is_that_of_its_program(program: Path) -> None:
    """`make notebooks` makes them anew."""
    text = program.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert "site-packages" not in text, "a warning with a path of this machine"
    notebook = json.loads(text)
    cells = ["".join(cell["source"]).strip() for cell in notebook["cells"]]
    assert cells == cells_of(program.read_text(encoding="utf-8"))
    errors = [output for cell in notebook["cells"] for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert not errors


def test_every_notebook_says_how_to_run_it_elsewhere() -> None:
    assert len(PROGRAMS) == 4
    for program in PROGRAMS:
        text = program.read_text(encoding="utf-8")
        assert "colab-badge" in text and "There is no released package" in text
        assert 'int(os.environ.get("NOTEBOOK_STEPS", ' in text
