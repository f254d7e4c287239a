"""The command ``sb3_mbpo``."""

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
    with pytest.raises(SystemExit, match="no command 'compile'; commands are train, .*, compare"):
        main(["compile"])


def test_compare(main: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and output.startswith("usage: sb3_mbpo compare") and "--ray-address" in output


def test_the_rest_is_the_zoos(main: Any, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(zoo, "main", called.append)
    main(["train", "--algo", "mbpo"])
    assert called == [["train", "--algo", "mbpo"]]
