"""
The RL Zoo with MBPO: ``python -m sb3_mbpo COMMAND ...``, also installed as the command ``sb3_mbpo``.

COMMAND is a script of the Zoo, with the Zoo's own options: train, enjoy, record_video, record_training, benchmark,
push_to_hub, load_from_hub, all_plots (or plot), plot_from_file, plot_train. This package adds one option to train:
--checkpoints FOLDER, see train --help.
Algorithms: those of the Zoo, and mbpo, dhmbpo, mbtd3, mbtqc, mbcrossq. For the latter, the settings per task are those of this
package, unless -conf is given.
"""

import argparse
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sb3_mbpo.runtime.extras import needs
from sb3_mbpo.runtime.threads import chosen

with needs("zoo", "this command"):
    import rl_zoo3.train
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS

    from sb3_mbpo.zoo.experiment import ALGORITHMS, BareWords, Experiment, convert, hyperparams_folder, sample

__all__ = ["ALGORITHMS", "hyperparams_folder", "main", "register"]

SCRIPTS = ("record_video", "record_training", "benchmark", "push_to_hub", "load_from_hub")
PLOTS = {"plot": "all_plots", "all_plots": "all_plots", "plot_from_file": "plot_from_file", "plot_train": "plot_train"}
COMMANDS = ("train", "enjoy", *SCRIPTS, *PLOTS)


def register() -> None:
    """Add the algorithms of this package to the Zoo's dictionaries, in place, because its modules share them."""
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update({name: partial(sample, algorithm) for name, algorithm in ALGORITHMS.items()})
    HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, convert))  # type: ignore[arg-type]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In this context, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def call_ours(call: Callable[..., int], command: list[str], *args: Any, **kwargs: Any) -> int:
    """``subprocess.call`` for the Zoo, which starts its own scripts, without the algorithms of this package."""
    for theirs in (["python", "enjoy.py"], ["python", "-m", "rl_zoo3.record_video"]):
        if command[: len(theirs)] == theirs:
            script = theirs[-1].removesuffix(".py").removeprefix("rl_zoo3.")
            command = [sys.executable, "-m", "sb3_mbpo", script, *command[len(theirs) :]]
    return call(command, *args, **kwargs)


def save_card(save: Callable[..., Any], path: Path, metadata: dict[str, Any]) -> Any:
    """``metadata_save`` of the hub, after correcting the model card: the original Zoo cannot load agents of this package."""
    card = path.read_text(encoding="utf-8")
    card = card.replace("python -m rl_zoo3.", "python -m sb3_mbpo ").replace(
        "pip install rl_zoo3", '# in a checkout of sb3_mbpo\npip install ".[zoo]"'
    )
    path.write_text(card, encoding="utf-8")
    return save(path, metadata)


def mend_hub() -> None:
    """Add a function to the hub's package that the Zoo 2.9 needs, and that was renamed and changed in version 3.2."""
    # Not `import ... as`: the package also has a function of that name.
    hub: Any = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *arguments: hub._generate_metadata(*arguments).to_dict()


def our_options() -> argparse.ArgumentParser:
    """:return: parser of the options of ``train`` that this package adds"""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("options of sb3_mbpo", f"for the algorithms {', '.join(ALGORITHMS)}")
    group.add_argument(
        "--checkpoints",
        type=Path,
        metavar="FOLDER",
        help="Save checkpoints in FOLDER. The same command resumes the run from there. After SIGTERM, SIGINT or SIGUSR1, the "
        "run is saved and ends with exit code 75.",
    )
    return parser


def prepare(
    command: str, options: list[str], stack: ExitStack, experiment: Callable[..., Experiment] = Experiment
) -> list[str]:
    """
    Prepare the Zoo for one command.

    :param command: the command
    :param options: options that the user passed
    :param stack: restores everything when it is closed
    :param experiment: class of the experiment, for ``train``
    :return: options for the Zoo
    :raises SystemExit: an option does not work with the command
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env", default="")
    parser.add_argument("-f", "--folder")
    parser.add_argument("--benchmark-dir", default="logs/benchmark/")
    parser.add_argument("--num-threads", type=int, default=-1)
    given, _ = parser.parse_known_args(options)
    register()
    if command == "train":
        if given.num_threads > 0:
            # The Zoo calls torch.set_num_threads, which does not show that the user has chosen the number.
            stack.enter_context(chosen(given.num_threads))
        ours, options = our_options().parse_known_args(options)
        if ours.checkpoints is not None:
            if given.algo not in ALGORITHMS:
                raise SystemExit(f"--checkpoints works with {', '.join(ALGORITHMS)}, not with {given.algo}")
            if {"-optimize", "--optimize-hyperparameters"} & set(options):
                raise SystemExit("--checkpoints is for a single run; a search with -optimize is continued with its --storage")
            experiment = partial(experiment, checkpoints=ours.checkpoints)
    if command not in PLOTS and given.env.startswith("dm_control/"):
        with needs("dm-control", given.env):
            # This import registers the envs. Not every command has the Zoo's --gym-packages.
            import dm_control  # noqa: F401
            import shimmy  # noqa: F401
    stack.enter_context(replaced(rl_zoo3.train, "ExperimentManager", experiment))
    stack.enter_context(replaced(rl_zoo3.train, "StoreDict", BareWords))
    stack.enter_context(replaced(subprocess, "call", partial(call_ours, subprocess.call)))
    if command == "benchmark" and not {"-h", "--help"} & set(options):
        Path(given.benchmark_dir).mkdir(parents=True, exist_ok=True)
    if command == "push_to_hub":
        mend_hub()
    if given.algo in ALGORITHMS:
        if command == "push_to_hub":
            import huggingface_hub.repocard as repocard

            stack.enter_context(replaced(repocard, "metadata_save", partial(save_card, repocard.metadata_save)))
        if command in ("enjoy", "record_video"):
            # Load with a minimal replay buffer, as the Zoo does for its own algorithms. Not for push_to_hub, which would
            # publish such an agent; unused buffers take no memory anyway.
            stack.callback(register)
            ALGOS[given.algo] = SimpleNamespace(load=partial(ALGORITHMS[given.algo].load, buffer_size=1))  # type: ignore[assignment]
        if command in ("enjoy", "record_video", "record_training") and given.folder is None:
            # The Zoo's default is its collection of trained agents, which has no agents of this package.
            options = [*options, "-f", "logs"]
    return options


def main(arguments: Sequence[str], experiment: Callable[..., Experiment] = Experiment) -> None:
    """
    Run one command of the Zoo.

    :param arguments: the command and its options
    :param experiment: class of the experiment, for ``train``
    :raises SystemExit: an option does not work with the command
    :raises MissingExtra: a package is missing
    """
    command, *options = arguments
    with ExitStack() as stack:
        options = prepare(command, options, stack, experiment)
        stack.enter_context(replaced(sys, "argv", [f"sb3_mbpo {command}", *options]))
        if command == "train":
            if {"-h", "--help"} & set(options):
                # Printed after the Zoo's own help, which ends the process.
                stack.callback(print, f"\n{our_options().format_help().strip()}")
            rl_zoo3.train.train()
        elif command == "enjoy":
            from rl_zoo3.enjoy import enjoy

            enjoy()
        elif command in SCRIPTS:
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")
        else:
            with needs("zoo", f"sb3_mbpo {command}"):
                from rl_zoo3 import plots
            getattr(plots, PLOTS[command])()
