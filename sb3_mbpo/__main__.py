"""The command ``sb3_mbpo``: those of the RL Zoo (zoo.py), and ``compare``."""

import sys
from collections.abc import Sequence

try:
    from sb3_mbpo import zoo
except ImportError as error:
    raise SystemExit(str(error)) from None

COMPARE = "compare trains several algorithms with several seeds and reports: sb3_mbpo compare --help"


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: the command and its options; ``None``: those of the process
    """
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "compare":
        # Late: it needs packages that the Zoo's commands do without.
        try:
            from sb3_mbpo import compare
        except ImportError as error:
            raise SystemExit(str(error)) from None
        compare.main(options)
    elif command in ("-h", "--help"):
        print(f"{(zoo.__doc__ or '').strip()}\n\n{COMPARE}")
    elif command not in zoo.COMMANDS:
        raise SystemExit(f"sb3_mbpo: there is no command {command!r}; commands are {', '.join((*zoo.COMMANDS, 'compare'))}")
    else:
        zoo.main([command, *options])


if __name__ == "__main__":
    main()
