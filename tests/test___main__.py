"""The command ``sb3_mbpo``."""

import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

import sb3_mbpo

# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
# Not importorskip: an import at collection would change Gymnasium for all tests.
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("rl_zoo3", "rliable", "matplotlib", "pandas")), reason="needs sb3_mbpo[compare]"
)


@pytest.fixture
def main(zoo: ModuleType) -> Any:
    from sb3_mbpo.__main__ import main

    return main


@pytest.mark.parametrize("options", [[], ["-h"], ["--help"]])
def test_help_names_all_commands(main: Any, capsys: Any, options: list[str]) -> None:
    main(options)
    output = capsys.readouterr().out
    assert (
        "train, enjoy" in output
        and "--version" in output
        and "sb3_mbpo compare --help" in output
        and "sb3_mbpo report --help" in output
    )


def test_unknown_command(main: Any) -> None:
    with pytest.raises(SystemExit, match=r"no command 'compile'; commands are train, .*, compare, report"):
        main(["compile"])


def test_compare(main: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and output.startswith("usage: sb3_mbpo compare") and "--ray-address" in output


def test_report(main: Any) -> None:
    with pytest.raises(SystemExit, match=r"there is no file nothing\.zip"):
        main(["report", "nothing.zip", "--env", "Pendulum-v1"])


def test_version(main: Any, capsys: Any) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"sb3_mbpo {sb3_mbpo.__version__}\n"


def run_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, where a package is missing."""
    code = f"import sys; sys.modules[{package!r}] = None; from sb3_mbpo.__main__ import main; main({list(arguments)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("rl_zoo3", "train", "zoo"),
        *(("rl_zoo3", "compare", "compare"), ("matplotlib", "report", "plots")),
        *(pytest.param(name, "compare", "compare", marks=pytest.mark.expensive) for name in ("rliable", "rich")),
    ],
)
def test_missing_package_says_how_to_get_it(package: str, command: str, extra: str) -> None:
    result = run_without(package, command, "--help")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(f'in the checkout of sb3_mbpo, pip install ".[{extra}]"')
    assert "Traceback" not in result.stderr


def test_what_works_without_the_zoo() -> None:
    version, report, usage = (
        run_without("rl_zoo3", *options) for options in (["--version"], ["report", "--help"], ["--help"])
    )
    assert version.stdout.startswith("sb3_mbpo ")
    assert report.returncode == 0 and "usage: " in report.stdout
    assert 'pip install ".[zoo]"' in usage.stdout and "sb3_mbpo report --help" in usage.stdout


def test_the_rest_is_the_zoos(main: Any, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(zoo, "main", called.append)
    main(["train", "--algo", "mbpo"])
    assert called == [["train", "--algo", "mbpo"]]
