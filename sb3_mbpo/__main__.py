"""The command ``sb3_mbpo``: those of the RL Zoo (zoo.py), ``compare`` and ``report``."""

import sys
from collections.abc import Sequence

try:
    from sb3_mbpo import zoo
except ImportError as error:
    raise SystemExit(str(error)) from None

OURS = """compare trains several algorithms with several seeds and reports: sb3_mbpo compare --help
report shows how far an agent's dynamics may be believed: sb3_mbpo report --help"""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: the command and its options; ``None``: those of the process
    """
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("compare", "report"):
        # Late: they need packages that the Zoo's commands do without.
        try:
            if command == "compare":
                from sb3_mbpo.compare import main as run
            else:
                from sb3_mbpo.diagnostics import main as run
        except ImportError as error:
            raise SystemExit(str(error)) from None
        run(options if command == "compare" else [command, *options])
    elif command in ("-h", "--help"):
        print(f"{(zoo.__doc__ or '').strip()}\n\n{OURS}")
    elif command not in zoo.COMMANDS:
        known = ", ".join((*zoo.COMMANDS, "compare", "report"))
        raise SystemExit(f"sb3_mbpo: there is no command {command!r}; commands are {known}")
    else:
        zoo.main([command, *options])


if __name__ == "__main__":
    main()
