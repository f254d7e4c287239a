"""Workers that make the runs of a comparison: processes of this machine, or tasks of a Ray cluster."""

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sb3_mbpo.compare.run import FINISHED, OUTPUT, Run, put
from sb3_mbpo.runtime.extras import needs

# Seconds between two checks for finished runs, and seconds to wait for a process to end.
PATIENCE = 0.5
# Maximum number of retries if a machine of a cluster is lost.
RETRIES = 5
# Number of lines of a failed run's output that are shown.
TAIL = 15


class WorkerKilled(RuntimeError):
    """The process of a run was killed from outside, so the run may be tried again."""


def start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
    """:return: the new process of a run, which ends with this process; previous content of its folder is removed"""
    run.begin(folder)
    # Runs share the cores, so their threads must not be busy while they wait.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"}
    threads = {f"{library}_NUM_THREADS": str(run.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    # Unbuffered, so that the output can be watched and errors come last.
    command = [sys.executable, "-u", "-m", "sb3_mbpo.compare.run", str(folder)]
    with (folder / OUTPUT).open("wb") as output:
        # In its own session, so that Ctrl-C only reaches the driver. The Zoo would save and end normally.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=waiting | os.environ | threads,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> int:
    """:return: exit code of a process, which is ended if it is still running"""
    assert process.stdin is not None
    process.stdin.close()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def outcome(folder: Path, code: int) -> str | None:
    """:return: error message with the end of a run's output, after its process has ended; ``None`` for a finished run"""
    if (folder / FINISHED).exists():
        return None
    output = folder / OUTPUT
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if output.exists() else []
    return "\n".join([f"exit code {code}, see {output}", *(f"    {line}" for line in lines)])


class LocalWorkers:
    """
    Makes runs as processes of this machine.

    :param root: Folder of the comparison
    :param count: Maximum number of parallel runs; ``None``: no maximum
    """

    def __init__(self, root: Path, count: int | None) -> None:
        self.root, self.count = root, count
        #: Active runs, by their process or task.
        self.active: dict[Any, Run] = {}

    def has_room(self) -> bool:
        return self.count is None or len(self.active) < self.count

    def start(self, run: Run) -> None:
        self.active[start(run, self.root / run.folder)] = run

    def collect(self) -> list[tuple[Run, str | None]]:
        """
        Wait for a short time.

        :return: runs that have ended since the last call, each with an error message or ``None``
        """
        time.sleep(PATIENCE)
        ended = [(process, run) for process, run in self.active.items() if process.poll() is not None]
        for process, _ in ended:
            del self.active[process]
        return [(run, outcome(self.root / run.folder, end(process))) for process, run in ended]

    def stop(self) -> None:
        """Kill the active runs."""
        for process in self.active:
            process.kill()
            end(process)
        self.active = {}


def run_elsewhere(run: Run) -> tuple[int, dict[str, bytes]]:
    """
    A task of Ray: make a run in a temporary folder.

    :return: exit code, and contents of the run's files by path
    :raises WorkerKilled: the process was killed
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


class RayWorkers(LocalWorkers):
    """
    Makes runs as tasks of a Ray cluster, with one CPU per thread. Ray returns their files, so no shared folder is needed.

    :param root: Folder of the comparison
    :param address: ``auto``: the cluster of this machine; ``local``: a new cluster on this machine; or ``host:port``
    :param count: Maximum number of parallel runs, and number of CPUs of a ``local`` cluster; ``None``: number of CPUs
    :raises MissingExtra: Ray is not installed
    :raises ConnectionError: there is no cluster
    """

    def __init__(self, root: Path, address: str, count: int | None) -> None:
        super().__init__(root, count)
        with needs("ray", "--ray-address"):
            import ray

        self.ray: Any = ray
        local: dict[str, Any] = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)

    def start(self, run: Run) -> None:
        options = {"num_cpus": run.threads, "num_gpus": int(run.device.startswith("cuda"))}
        task = self.ray.remote(**options, max_retries=RETRIES, retry_exceptions=[WorkerKilled])(run_elsewhere)
        self.active[task.remote(run)] = run

    def collect(self) -> list[tuple[Run, str | None]]:
        ended, _ = self.ray.wait(list(self.active), num_returns=1, timeout=PATIENCE)
        return [(run := self.active.pop(task), self._outcome(run, task)) for task in ended]

    def _outcome(self, run: Run, task: Any) -> str | None:
        folder = self.root / run.folder
        try:
            code, files = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            return f"Ray gave up on it: {error}"
        run.begin(folder)
        # The file that marks the run as finished must be last.
        for name in sorted(files, key=lambda name: name == FINISHED):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            put(folder / name, files[name])
        return outcome(folder, code)

    def stop(self) -> None:
        """Cancel the active runs, and disconnect from the cluster."""
        for task in self.active:
            self.ray.cancel(task, force=True)
        self.ray.shutdown()
