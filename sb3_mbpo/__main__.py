"""The command ``sb3_mbpo``: commands of the RL Zoo (zoo/cli.py), ``compare`` and ``report``."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from sb3_mbpo.runtime.extras import MissingExtra

# Commands of this package, and their modules.
OURS = {"compare": "sb3_mbpo.compare.cli", "report": "sb3_mbpo.diagnostics.report"}
ZOO = "sb3_mbpo.zoo.cli"
HELP = """compare trains several algorithms with several seeds and reports: sb3_mbpo compare --help
report shows the accuracy of an agent's dynamics: sb3_mbpo report --help
--version prints the version of sb3_mbpo"""


def zoo_help() -> str:
    """:return: help on the Zoo's commands, or how to install them"""
    try:
        return (import_module(ZOO).__doc__ or "").strip()
    except MissingExtra as error:
        return str(error)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a command. A module is only imported for its own commands, because it may need an extra.

    :param arguments: the command and its options; ``None``: the command-line arguments of the process
    :raises SystemExit: there is no such command, it failed, or a package is missing
    """
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "--version":
        print(f"sb3_mbpo {Path(__file__).with_name('version.txt').read_text(encoding='utf-8').strip()}")
        return
    if command in ("-h", "--help"):
        print(f"{zoo_help()}\n\n{HELP}")
        return
    try:
        if command in OURS:
            import_module(OURS[command]).main(options)
            return
        zoo = import_module(ZOO)
        if command not in zoo.COMMANDS:
            known = ", ".join((*zoo.COMMANDS, *OURS))
            raise SystemExit(f"sb3_mbpo: there is no command {command!r}; commands are {known}")
        zoo.main([command, *options])
    except MissingExtra as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
