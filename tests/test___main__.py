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
def test_help_names_all_commands(main: Any, zoo: ModuleType, capsys: Any, options: list[str]) -> None:
    main(options)
    output = capsys.readouterr().out
    assert all(word in output for word in ("--version", "sb3_mbpo compare --help", "sb3_mbpo report --help"))
    assert all(command in output for command in zoo.COMMANDS)


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


def run_without(package: str, *commands: str) -> list[str]:
    """The output of each command where a package is missing, in one process; the first line tells how it ended."""
    code = f"""
import contextlib, io, sys
sys.modules[{package!r}] = None
from sb3_mbpo.__main__ import main
for command in {commands!r}:
    ended, output = None, io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            main(command.split())
        except SystemExit as error:
            ended = error.code
    print(ended, output.getvalue(), sep="\\n", end="\\0")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.split("\0")[:-1]


def install(what: str, package: str, extra: str) -> str:
    return f'{what} needs {package}: in the checkout of sb3_mbpo, pip install ".[{extra}]"'


def test_without_the_zoo() -> None:
    commands = ("train --help", "compare --help", "--version", "report --help", "--help")
    train, compare, version, report, usage = run_without("rl_zoo3", *commands)
    assert train.strip() == install("this command", "rl_zoo3", "zoo")
    assert compare.strip() == install("sb3_mbpo compare", "rl_zoo3", "compare")
    assert version == f"None\nsb3_mbpo {sb3_mbpo.__version__}\n"
    assert report.startswith("0\nusage: sb3_mbpo report")
    assert 'pip install ".[zoo]"' in usage and "sb3_mbpo report --help" in usage


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("matplotlib", "report", "plots"),
        *(pytest.param(name, "compare", "compare", marks=pytest.mark.expensive) for name in ("rliable", "rich")),
    ],
)
def test_missing_package_says_how_to_get_it(package: str, command: str, extra: str) -> None:
    assert run_without(package, command)[0].strip() == install(f"sb3_mbpo {command}", package, extra)


def test_the_rest_is_the_zoos(main: Any, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(zoo, "main", called.append)
    main(["train", "--algo", "mbpo"])
    assert called == [["train", "--algo", "mbpo"]]
