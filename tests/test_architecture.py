"""The plan of the house as a test: who imports whom, how long things are, what a plain import drags in."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sb3_mbpo"
FILES = sorted((ROOT / PACKAGE).glob("*.py"))
MODULES = [file.stem for file in FILES]

# What only some commands need.
HEAVY = ("rl_zoo3", "sb3_contrib", "matplotlib", "pandas", "rliable", "ray")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# Who may import whom of ours. A new arrow is a decision: change the picture in docs/architecture.md along with this table.
MAY_IMPORT: dict[str, set[str]] = {
    "ensemble": set(),
    "model_buffer": set(),
    "buffers": {"episode_ends", "model_buffer"},
    "episode_ends": set(),
    "prefill": set(),
    "safe_files": set(),
    "checked_tensors": set(),
    "safe_loading": {"checked_tensors", "description", "safe_files"},
    "buffer_files": {"buffers", "safe_files"},
    "saving": {
        "buffer_files",
        "buffers",
        "checks",
        "description",
        "dry_runs",
        "misuse",
        "model_buffer",
        "prefill",
        "safe_loading",
        "unsupported",
    },
    "faults": set(),
    "boundary": {"faults"},
    "collecting": {"boundary", "checks", "misuse", "saving", "unsupported"},
    "misuse": set(),
    "exporting": {"checks", "collecting"},
    "checks": set(),
    "dry_runs": {"checks", "dynamics", "filters"},
    "unsupported": {"checks", "misuse"},
    "sac_update": set(),
    "uncovered": set(),
    "side_stream": set(),
    "stacks": {"side_stream"},
    "sac_memory": {"stacks"},
    "cuda_update": {"sac_memory", "side_stream", "stacks"},
    "arguments": {"checks", "dry_runs", "unsupported"},
    "terminations": {"env_state"},
    "learned_termination": {"ensemble"},
    "learned_reward": {"dynamics", "ensemble", "holdout", "input_gradient", "trust"},
    "dynamics": set(),
    "trust": set(),
    "drift": {"dynamics"},
    "denormals": set(),
    "threads": set(),
    "likelihood_gradient": {"ensemble"},
    "input_gradient": {"ensemble", "likelihood_gradient"},
    "holdout": set(),
    "fit_schedule": set(),
    "divergence": {"ensemble"},
    "probabilistic_ensemble": {
        "checks",
        "divergence",
        "dynamics",
        "ensemble",
        "fit_schedule",
        "holdout",
        "input_gradient",
        "likelihood_gradient",
        "trust",
    },
    "disagreement": set(),
    "filters": {"checks", "disagreement", "dynamics", "ensemble"},
    "plausible": {"dynamics", "learned_reward"},
    "value_bound": set(),
    "rollouts": {"checks", "dynamics", "filters"},
    "plain_values": {"filters", "probabilistic_ensemble", "rollouts", "terminations"},
    "description": {"arguments", "checks", "filters", "plain_values", "provenance", "rollouts", "terminations", "unsupported"},
    "packing": set(),
    "interrupts": set(),
    "lock": set(),
    "checkpoint": {"provenance"},
    "env_state": {"packing"},
    "training_state": {"buffers", "env_state", "packing"},
    "resuming": {"collecting", "interrupts", "misuse", "resume_callback", "training_state"},
    "resume_callback": {"checkpoint", "description", "faults", "interrupts", "lock", "packing", "training_state"},
    "callbacks": {"model_learning", "training_state"},
    "refill": {"model_buffer"},
    "reward_audit": set(),
    "moving_statistics": {"terminations"},
    "memory": {"buffers", "model_buffer", "refill", "rollouts"},
    "imagining": {"arguments", "buffers", "collecting", "dynamics", "filters", "learned_reward", "terminations"},
    "model_learning": {
        "buffers",
        "checks",
        "drift",
        "dynamics",
        "episode_ends",
        "imagining",
        "plausible",
        "refill",
        "reward_audit",
        "rollouts",
        "terminations",
        "training_state",
        "trust",
        "value_bound",
    },
    "model_based": {
        "arguments",
        "buffers",
        "callbacks",
        "checks",
        "denormals",
        "dry_runs",
        "dynamics",
        "exporting",
        "filters",
        "learned_reward",
        "learned_termination",
        "memory",
        "model_learning",
        "moving_statistics",
        "probabilistic_ensemble",
        "resuming",
        "rollouts",
        "terminations",
        "threads",
    },
    "mbpo": {"buffers", "cuda_update", "model_based", "sac_memory", "sac_update", "uncovered"},
    "variants": {"checks", "model_based"},
    # A folder.
    "dhmbpo": {"buffers", "checks", "dhmbpo", "dynamics", "filters", "interrupts", "model_based", "plausible", "rollouts"},
    "theory": set(),
    "model_error": set(),
    "open_loop": {"dynamics"},
    "policy_shift": {"buffers", "model_error"},
    "diagnosis": {"model_error", "open_loop"},
    "model_error_callback": {"checks", "diagnosis", "model_error", "open_loop", "policy_shift", "rollouts", "theory"},
    "diagnosis_figures": {"diagnosis", "model_error", "page", "theory"},
    "diagnosis_video": set(),
    "diagnosis_page": {"diagnosis", "diagnosis_figures", "model_error", "page", "theory"},
    "diagnostics": {
        "checks",
        "diagnosis",
        "dhmbpo",
        "diagnosis_page",
        "diagnosis_video",
        "mbpo",
        "model_error",
        "open_loop",
        "page",
        "policy_shift",
        "provenance",
        "safe_files",
        "safe_loading",
        "variants",
    },
    "zoo_experiment": {"arguments", "dhmbpo", "mbpo", "resume_callback", "variants"},
    "zoo": {"threads", "zoo_experiment"},
    "provenance": set(),
    "specs": {"arguments"},
    "comparison_experiment": {"zoo_experiment"},
    "comparison_run": {"comparison_experiment", "provenance", "zoo"},
    "workers": {"comparison_run"},
    "progress": {"comparison_run"},
    "aggregates": set(),
    "page": set(),
    "plots": {"aggregates", "comparison_run", "page"},
    "report": {"aggregates", "page"},
    "compare": {
        *("comparison_experiment", "comparison_run", "plots", "progress", "provenance", "report", "specs", "workers", "zoo"),
        "zoo_experiment",
    },
    "__main__": {"compare", "diagnostics", "zoo"},
}
# The front door shows everything.
MAY_IMPORT["__init__"] = set(MAY_IMPORT)


def imported_modules(source: str) -> Iterator[str]:
    """
    Our modules that a module's source imports, wherever the import stands: at the top, in a function, for type checking.
    The package itself counts as ``__init__``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The package is flat: one dot means the package, more would leave it.
            base = ".".join(part for part in (PACKAGE if node.level else "", node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            name = target.value if isinstance(target, ast.Constant) and isinstance(target.value, str) else ""
            names = [PACKAGE + name if name.startswith(".") else name]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE:
                module = rest.partition(".")[0]
                # `from sb3_mbpo import MBPO` goes through the front door.
                yield module if module in MAY_IMPORT or module in MODULES else "__init__"


def forbidden_arrows(module: str, source: str) -> list[str]:
    return [f"{module} -> {other}" for other in imported_modules(source) if other not in MAY_IMPORT[module]]


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


@pytest.mark.parametrize("file", FILES, ids=MODULES)
def test_imports_follow_the_table(file: Path) -> None:
    assert file.stem in MAY_IMPORT, f"{file.name} is new: give it a row in MAY_IMPORT"
    assert forbidden_arrows(file.stem, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=MODULES)
def test_files_and_functions_are_short(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= MAX_FILE_LINES
    assert long_functions(source) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_every_module_has_its_test_file(module: str) -> None:
    assert (ROOT / "tests" / f"test_{module}.py").is_file()


def test_only_an_algorithm_of_several_files_has_a_folder() -> None:
    assert [folder.name for folder in (ROOT / PACKAGE).iterdir() if folder.is_dir() and any(folder.glob("*.py"))] == ["dhmbpo"]


@pytest.mark.parametrize("file", sorted((ROOT / PACKAGE / "dhmbpo").glob("*.py")), ids=lambda file: file.stem)
def test_files_of_dhmbpo(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES and long_functions(source) == []
    assert forbidden_arrows("dhmbpo", source) == []


def test_plain_import_stays_light() -> None:
    code = f"import {PACKAGE}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "source",
    [
        "from sb3_mbpo.mbpo import MBPO",
        "from sb3_mbpo import MBPO",
        "from sb3_mbpo import mbpo",
        "import sb3_mbpo.mbpo as m",
        "from .mbpo import MBPO",
        "from . import mbpo",
        "def late():\n    from sb3_mbpo.mbpo import MBPO",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sb3_mbpo.mbpo import MBPO",
        "import importlib\nimportlib.import_module('sb3_mbpo.mbpo')",
        "from importlib import import_module\nimport_module('.mbpo', 'sb3_mbpo')",
    ],
)
def test_checker_sees_a_forbidden_import(source: str) -> None:
    assert len(forbidden_arrows("rollouts", source)) == 1


def test_checker_accepts_allowed_and_foreign_imports() -> None:
    source = "import torch\nfrom stable_baselines3 import SAC\nfrom sb3_mbpo.dynamics import X\nfrom . import dynamics"
    assert forbidden_arrows("rollouts", source) == []


def test_checker_sees_a_long_function() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 61) == ["f: 61 lines"]
    assert long_functions('def f():\n    """\n' + "    words\n" * 60 + '    """\n' + "    x = 1\n" * 60) == []


def test_table_has_no_cycles() -> None:
    open_rows = {module: set(others) for module, others in MAY_IMPORT.items()}
    while open_rows:
        done = [module for module, others in open_rows.items() if not (others - {module}) & set(open_rows)]
        assert done, f"a cycle among {sorted(open_rows)}"
        for module in done:
            del open_rows[module]


NAMED_TEST = r"`(test_\w+\.py)(?:::(test_\w+))?`|`(test_\w+)`"


# The tests that sb3_tests.md names are SB3's.
GUIDE = [page for page in sorted((ROOT / "docs" / "guide").glob("*.md")) if page.stem != "sb3_tests"]


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_tests_that_the_guide_names_exist(page: Path) -> None:
    """``test_file.py``, ``test_file.py::test_name``, and after these ``test_name`` of the same file."""
    file = ""
    for named, one, another in re.findall(NAMED_TEST, page.read_text(encoding="utf-8").replace("tests/", "")):
        file, name = named or file, one or another
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} has no {name}"
