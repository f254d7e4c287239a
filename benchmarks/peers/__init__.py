"""
Other implementations of the same work, each in an environment of its own and driven as a process of its own.

A peer reads a command and its whole numbers from a line of standard input and answers with a line of JSON: what it
measured, by name. Between commands it sleeps, so its rounds can alternate with ours.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / ".peers"


def make_environment(name: str) -> Path:
    """The virtual environment of ``requirements-NAME.txt``, made if it is not there; returns its Python."""
    folder, requirements = ENVIRONMENTS / name, HERE / f"requirements-{name}.txt"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making the environment of {name} (some minutes, once)", flush=True)
        torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "--no-deps", "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    return python


class Peer:
    """The other end of :func:`serve`: ``NAME_worker.py``, with this process's threads and cores."""

    def __init__(self, name: str) -> None:
        python = make_environment(name)
        self.log = ENVIRONMENTS / f"{name}.log"
        with self.log.open("w") as log:
            command = [str(python), "-m", f"peers.{name}_worker"]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(command, cwd=HERE.parent, text=True, **pipes)
        self.versions: str = self.ask("versions")["versions"]

    def ask(self, command: str, *numbers: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(command, *numbers, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker failed: {self.log.read_text().strip().splitlines()[-1:]}; see {self.log}")
        return json.loads(answer)


def serve(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers commands until standard input ends; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command, *numbers = line.split()
        print(json.dumps(commands[command](*map(int, numbers))), file=answers, flush=True)


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def period(function: Callable[[Callable[[str], None]], Any]) -> float:
    """The mean time from one phase to the next in ``function(say)``: a phase ends when its name was said for the last time."""
    ends: dict[str, float] = {}
    function(lambda phase: ends.update({phase: time.perf_counter()}))
    times = [*ends.values()]
    return (times[-1] - times[0]) / (len(times) - 1)


class Stopwatch:
    """Seconds spent in some methods, and their calls, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def timing(self, phases: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """
        Measure while the context lasts.

        :param phases: the methods of each phase, as (class or module, name)
        """
        with ExitStack() as stack:
            for phase, methods in phases.items():
                self.seconds[phase], self.calls[phase] = 0.0, 0
                for owner, name in methods:
                    stack.enter_context(mock.patch.object(owner, name, self._timed(phase, getattr(owner, name))))
            yield

    def _timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - started
                self.calls[phase] += 1

        return timed
