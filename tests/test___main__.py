"""The command ``sb3_mbpo``."""

import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

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
    assert "train, enjoy" in output and "sb3_mbpo compare --help" in output and "sb3_mbpo report --help" in output


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


@pytest.mark.parametrize(
    ("package", "extra"),
    [("rl_zoo3", "zoo"), *(pytest.param(name, "compare", marks=pytest.mark.expensive) for name in ("rliable", "rich"))],
)
def test_missing_package_says_how_to_get_it(package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from sb3_mbpo.__main__ import main; main(['compare', '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.strip().endswith(f"pip install sb3_mbpo[{extra}]")
    assert "Traceback" not in result.stderr


def test_the_rest_is_the_zoos(main: Any, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(zoo, "main", called.append)
    main(["train", "--algo", "mbpo"])
    assert called == [["train", "--algo", "mbpo"]]
