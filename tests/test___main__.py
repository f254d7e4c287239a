"""The command ``sb3_mbpo``."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

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
    assert "train, enjoy" in output and "sb3_mbpo compare --help" in output


def test_unknown_command(main: Any) -> None:
    with pytest.raises(SystemExit, match=r"no command 'compile'; commands are train, .*, compare"):
        main(["compile"])


def test_compare(main: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and output.startswith("usage: sb3_mbpo compare") and "--ray-address" in output


@pytest.mark.parametrize("package", ["rliable", "matplotlib", "rich", "rl_zoo3"])
def test_missing_package_says_how_to_get_it(main: Any, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sb3_mbpo", package)]:
        # Its own modules are imported anew, the package cannot be.
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    extra = "zoo" if package == "rl_zoo3" else "compare"
    for module in ("__main__", "compare"):
        with pytest.raises((ImportError, SystemExit), match=rf"pip install sb3_mbpo\[{extra}\]"):
            importlib.import_module(f"sb3_mbpo.{module}").main(["compare", "--help"])


def test_the_rest_is_the_zoos(main: Any, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(zoo, "main", called.append)
    main(["train", "--algo", "mbpo"])
    assert called == [["train", "--algo", "mbpo"]]
