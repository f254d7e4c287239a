"""The plan of the house as a test: which folder imports which, how long things are, what a plain import loads."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from architecture import FILES, ORDER, PACKAGE, ROOT, arrows, imported_modules, module_of, room_of

# What only some commands need.
HEAVY = ("rl_zoo3", "sb3_contrib", "matplotlib", "pandas", "rliable", "ray")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def long_functions(source: str, limit: int = MAX_FUNCTION_LINES) -> list[str]:
    """Functions whose body is too long; signature (one argument per line) and docstring are not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            if lines > limit:
                found.append(f"{node.name}: {lines} lines")
    return found


@pytest.mark.parametrize("room", sorted(arrows()))
def test_a_folder_imports_only_what_is_below_it(room: str) -> None:
    """A new folder gets its place in ORDER. An arrow that runs up is a decision: it moves code, not a folder."""
    level = {name: i for i, row in enumerate(ORDER) for name in row}
    assert room in level, f"{room} is new: give it a place in ORDER, and a row in docs/architecture.md"
    assert [other for other in sorted(arrows()[room]) if level[other] >= level[room]] == []


def test_every_folder_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [room_of(module_of(file)) for file in FILES]
    assert [room for room in rooms if f"`{room}/`" not in text and f"`{room}.py`" not in text and room != "__init__"] == []


def test_files_do_not_import_in_circles() -> None:
    graph = {}
    for file in FILES:
        module = module_of(file)
        graph[module] = {*imported_modules(file.read_text(encoding="utf-8"), module)} - {module}
    # The front door shows everything.
    del graph["__init__"]
    list(graphlib.TopologicalSorter({module: others - {"__init__"} for module, others in graph.items()}).static_order())


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_functions_are_short(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    assert long_functions(source) == []


def test_plain_import_stays_light() -> None:
    code = f"import {PACKAGE}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "own", "module"),
    [
        ("from sb3_mbpo.mbpo import MBPO", "rollouts", "mbpo"),
        ("from sb3_mbpo import MBPO", "rollouts", "__init__"),
        ("from sb3_mbpo import mbpo", "rollouts", "mbpo"),
        ("import sb3_mbpo.mbpo as m", "rollouts", "mbpo"),
        ("from sb3_mbpo.dynamics import layers", "rollouts", "dynamics.layers"),
        ("from sb3_mbpo.dynamics.layers import EnsembleMLP", "rollouts", "dynamics.layers"),
        ("from .mbpo import MBPO", "rollouts", "mbpo"),
        ("from . import mbpo", "rollouts", "mbpo"),
        ("from .layers import EnsembleMLP", "dynamics.base", "dynamics.layers"),
        ("from ..mbpo import MBPO", "dynamics.base", "mbpo"),
        ("def late():\n    from sb3_mbpo.mbpo import MBPO", "rollouts", "mbpo"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sb3_mbpo.mbpo import MBPO", "rollouts", "mbpo"),
        ("import importlib\nimportlib.import_module('sb3_mbpo.mbpo')", "rollouts", "mbpo"),
        ("from importlib import import_module\nimport_module('.mbpo', 'sb3_mbpo')", "rollouts", "mbpo"),
    ],
)
def test_imports_are_found(source: str, own: str, module: str) -> None:
    assert list(imported_modules(source, own)) == [module]


def test_foreign_imports_are_none_of_ours() -> None:
    assert list(imported_modules("import torch\nfrom stable_baselines3 import SAC")) == []


def test_checker_sees_a_long_function() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 61) == ["f: 61 lines"]
    assert long_functions('def f():\n    """\n' + "    words\n" * 60 + '    """\n' + "    x = 1\n" * 60) == []


NAMED_TEST = r"`(test_\w+\.py)(?:::(test_\w+))?`|`(test_\w+)`"


# The tests that sb3_tests.md names are SB3's.
GUIDE = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.stem != "sb3_tests"]


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_tests_that_the_guide_names_exist(page: Path) -> None:
    """``test_file.py``, ``test_file.py::test_name``, and after these ``test_name`` of the same file."""
    tests = {file.name: file for file in (ROOT / "tests").rglob("test_*.py")}
    text = re.sub(r"tests/(?:\w+/)?", "", page.read_text(encoding="utf-8"))
    file = ""
    for named, one, another in re.findall(NAMED_TEST, text):
        file, name = named or file, one or another
        source = tests[file].read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} has no {name}"
