"""The command ``sb3_mbpo``: commands of the RL Zoo (zoo/cli.py), ``compare`` and ``report``."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

# Commands of this package, and their modules.
OURS = {"compare": "sb3_mbpo.compare.cli", "report": "sb3_mbpo.diagnostics.report"}
HELP = """compare trains several algorithms with several seeds and reports: sb3_mbpo compare --help
report shows the accuracy of an agent's dynamics: sb3_mbpo report --help
--version prints the version of sb3_mbpo"""


def needed(module: str) -> Any:
    """
    Import a module that needs an extra. Commands that do not need it do not import it.

    :param module: name of the module
    :return: the module
    :raises SystemExit: a package is missing; the message names the extra
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise SystemExit(str(error)) from None


def zoo_help() -> str:
    """:return: help on the Zoo's commands, or how to install them"""
    try:
        from sb3_mbpo.zoo import cli as zoo
    except ImportError as error:
        return str(error)
    return (zoo.__doc__ or "").strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a command.

    :param arguments: the command and its options; ``None``: the command-line arguments of the process
    :raises SystemExit: there is no such command, or it failed
    """
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "--version":
        print(f"sb3_mbpo {Path(__file__).with_name('version.txt').read_text(encoding='utf-8').strip()}")
    elif command in ("-h", "--help"):
        print(f"{zoo_help()}\n\n{HELP}")
    elif command in OURS:
        needed(OURS[command]).main(options)
    else:
        zoo = needed("sb3_mbpo.zoo.cli")
        if command not in zoo.COMMANDS:
            known = ", ".join((*zoo.COMMANDS, *OURS))
            raise SystemExit(f"sb3_mbpo: there is no command {command!r}; commands are {known}")
        zoo.main([command, *options])


if __name__ == "__main__":
    main()
