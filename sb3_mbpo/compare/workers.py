"""Who makes the runs of a comparison: processes of this machine, or of a Ray cluster."""

import logging
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sb3_mbpo.compare.run import FINISHED, OUTPUT, Run, put

# Seconds between two looks at what has finished, and for a process to end when asked to.
PATIENCE = 0.5
# A cluster's machine may vanish under a run more than once.
RETRIES = 5
# Lines of a failed run's output that are shown.
TAIL = 15


class WorkerKilled(RuntimeError):
    """A run's process was killed from outside: no fault of the run, and worth another try."""


def start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
    """
    :param folder: gets everything that the run leaves; what was there goes
    :return: the run's process, which ends with this one
    """
    run.begin(folder)
    # Runs share the cores with each other, so their threads must not compute while they wait.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"}
    threads = {f"{library}_NUM_THREADS": str(run.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    # Unbuffered: output can be watched, and what went wrong comes last.
    command = [sys.executable, "-u", "-m", "sb3_mbpo.compare.run", str(folder)]
    with (folder / OUTPUT).open("wb") as output:
        # A session of its own: Ctrl-C is for the driver, and the Zoo would take it for a wish to save what there is.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=waiting | os.environ | threads,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> int:
    """:return: the exit code of a process that has ended or is to end now"""
    assert process.stdin is not None
    process.stdin.close()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def outcome(folder: Path, code: int) -> str | None:
    """
    :param folder: of a run whose process has ended
    :param code: its exit code
    :return: ``None`` for a finished run; else what went wrong, with the end of what it printed
    """
    if (folder / FINISHED).exists():
        return None
    output = folder / OUTPUT
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if output.exists() else []
    return "\n".join([f"exit code {code}, see {output}", *(f"    {line}" for line in lines)])


class LocalWorkers:
    """
    Runs as processes of this machine.

    :param root: folder of the comparison
    :param count: most runs at a time
    """

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count = root, count
        self.processes: list[tuple[Run, subprocess.Popen[bytes]]] = []

    @property
    def active(self) -> list[Run]:
        return [run for run, _ in self.processes]

    def has_room(self) -> bool:
        return len(self.processes) < self.count

    def start(self, run: Run) -> None:
        self.processes.append((run, start(run, self.root / run.folder)))

    def collect(self) -> list[tuple[Run, str | None]]:
        """
        Wait a moment.

        :return: the runs that have ended since, each with what went wrong, if anything did
        """
        try:
            self.processes[0][1].wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        ended = [(run, process) for run, process in self.processes if process.poll() is not None]
        self.processes = [item for item in self.processes if item not in ended]
        return [(run, outcome(self.root / run.folder, end(process))) for run, process in ended]

    def stop(self) -> None:
        """End the runs that are under way."""
        for _, process in self.processes:
            process.kill()
        for _, process in self.processes:
            end(process)
        self.processes = []


def run_elsewhere(run: Run) -> tuple[int, dict[str, bytes]]:
    """
    A task of Ray: one run, in a folder that nobody else needs to see.

    :return: exit code, and the files that the run left, by their path
    :raises WorkerKilled: its process was killed
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        process = start(run, folder)
        process.wait()
        code = end(process)
        if code < 0:
            raise WorkerKilled(f"{run}: killed by signal {-code}")
        files = (path for path in folder.rglob("*") if path.is_file())
        return code, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class RayWorkers:
    """
    Runs as tasks of a Ray cluster, one CPU for each thread. Their files come back through Ray: no folder need be shared.

    :param root: folder of the comparison
    :param address: ``auto``: the cluster of this machine; ``local``: a new one here; or ``host:port``
    :param count: most runs at a time, and CPUs of a ``local`` cluster; ``None``: as many as there are CPUs
    :raises SystemExit: no Ray, or no cluster
    """

    def __init__(self, root: Path, address: str, count: int | None) -> None:
        if find_spec("ray") is None:
            raise SystemExit('--ray-address needs Ray: in the checkout of sb3_mbpo, pip install ".[ray]"')
        import ray

        self.ray: Any = ray
        self.root, self.count = root, count
        self.tasks: dict[Any, Run] = {}
        local: dict[str, Any] = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        except ConnectionError as error:
            raise SystemExit(f"there is no Ray cluster at {address}: {error}") from None

    @property
    def active(self) -> list[Run]:
        return list(self.tasks.values())

    def has_room(self) -> bool:
        return self.count is None or len(self.tasks) < self.count

    def start(self, run: Run) -> None:
        options = {"num_cpus": run.threads, "num_gpus": int(run.device.startswith("cuda"))}
        task = self.ray.remote(**options, max_retries=RETRIES, retry_exceptions=[WorkerKilled])(run_elsewhere)
        self.tasks[task.remote(run)] = run

    def collect(self) -> list[tuple[Run, str | None]]:
        """As that of LocalWorkers."""
        ended, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=PATIENCE)
        runs = [self.tasks.pop(task) for task in ended]
        return [(run, self._outcome(run, task)) for run, task in zip(runs, ended, strict=True)]

    def _outcome(self, run: Run, task: Any) -> str | None:
        folder = self.root / run.folder
        try:
            code, files = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            return f"Ray gave up on it: {error}"
        run.begin(folder)
        # What marks the run as finished comes last.
        for name in sorted(files, key=lambda name: name == FINISHED):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            put(folder / name, files[name])
        return outcome(folder, code)

    def stop(self) -> None:
        """End the runs that are under way, and leave the cluster."""
        for task in self.tasks:
            self.ray.cancel(task, force=True)
        self.ray.shutdown()
