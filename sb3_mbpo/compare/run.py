"""
One run of a comparison: its arguments, its folder, and its process (``python -m sb3_mbpo.compare.run FOLDER``).

The process first writes ``arguments.json``, ``output.txt`` and ``provenance.json`` to the folder, then ``evaluations.csv`` and
the Zoo's own files. ``run.json`` is written last and marks the run as finished.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

ARGUMENTS, OUTPUT, EVALUATIONS, FINISHED = "arguments.json", "output.txt", "evaluations.csv", "run.json"
# Versions, hardware and commit at the start of the process. The checkout may change during the run.
PROVENANCE = "provenance.json"
# Folder of checkpoints of unfinished runs of this package's algorithms.
CHECKPOINTS = "checkpoints"


def as_file_name(text: str) -> str:
    """:return: a valid file name: special characters are replaced, and long names are shortened"""
    name = re.sub(r"[^\w.=,+-]+", "_", text)
    return name if len(name) <= 80 else f"{name[:70]}_{hashlib.sha1(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Run:
    """
    Arguments of a run. A finished run with equal arguments is not repeated.

    :param env: environment id
    :param label: the algorithm as written by the user, with settings
    :param algo: name of the algorithm in the Zoo
    :param settings: settings that override those of the settings file
    :param seed: seed of the agent and its env
    :param steps: number of env steps
    :param eval_freq: number of env steps between two evaluations; there is also one before the first step and one at the end
    :param eval_episodes: number of episodes per evaluation
    :param threads: number of PyTorch threads; this and the following as in the Zoo
    :param conf_file: settings file; ``None``: the packaged one
    :param command: command that the user called; ignored when runs are compared
    """

    env: str
    label: str
    algo: str
    settings: dict[str, Any]
    seed: int
    steps: int
    eval_freq: int
    eval_episodes: int
    threads: int = 1
    device: str = "auto"
    conf_file: str | None = None
    env_kwargs: list[str] = field(default_factory=list)
    gym_packages: list[str] = field(default_factory=list)
    command: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.env}, {self.label}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the run, relative to the folder of the comparison."""
        return Path(as_file_name(self.env)) / as_file_name(self.label) / f"seed_{self.seed}"

    @property
    def evaluation_steps(self) -> list[int]:
        return [*range(0, self.steps, self.eval_freq), self.steps]

    def zoo_options(self, folder: Path) -> list[str]:
        """:return: options of the Zoo's ``train``, whose files go to ``folder``"""
        options = ["--algo", self.algo, "--env", self.env, "--seed", str(self.seed), "-n", str(self.steps)]
        # Disable the Zoo's evaluations. The recorder evaluates at the same steps for all algorithms.
        options += ["--eval-freq", "-1", "-f", str(folder), "--num-threads", str(self.threads), "--device", self.device]
        if self.conf_file is not None:
            options += ["--conf-file", self.conf_file]
        if self.settings:
            options += ["-params", *(f"{key}:{value!r}" for key, value in self.settings.items())]
        if self.env_kwargs:
            options += ["--env-kwargs", *self.env_kwargs]
        if self.gym_packages:
            options += ["--gym-packages", *self.gym_packages]
        return options

    @staticmethod
    def read(folder: Path) -> "Run":
        return Run(**json.loads((folder / ARGUMENTS).read_text(encoding="utf-8")))

    def begin(self, folder: Path) -> None:
        """
        Create the run's folder and write its arguments. The files of an unfinished run are removed, unless it has the same
        arguments and checkpoints to resume from.

        :raises FileExistsError: the folder contains other files
        """
        if folder.exists():
            if any(folder.iterdir()) and not (folder / ARGUMENTS).exists():
                raise FileExistsError(f"{folder} contains files that are not of a comparison: choose another --folder")
            if (folder / CHECKPOINTS).exists() and Run.read(folder) == self:
                return
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / ARGUMENTS).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def is_finished(self, folder: Path) -> bool:
        """
        :return: whether the run in this folder is finished
        :raises ValueError: the folder contains a finished run with other arguments
        """
        if not (folder / FINISHED).exists():
            return False
        done = record(folder)["run"]
        different = [
            f"{name}={done.get(name)!r}, not {mine!r}"
            for name, mine in asdict(self).items()
            if name != "command" and done.get(name) != mine
        ]
        if different:
            raise ValueError(
                f"{folder} contains a finished run with {'; '.join(different)}: choose another --folder, or remove that one"
            )
        return True


def record(folder: Path) -> dict[str, Any]:
    """:return: ``run.json`` of a finished run"""
    return json.loads((folder / FINISHED).read_text(encoding="utf-8"))


def put(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def end_with_parent() -> None:
    """Exit when the parent process has ended for any reason, which closes the standard input."""

    def wait() -> None:
        # Not sys.stdin: a thread waiting in it would prevent a normal exit.
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    end_with_parent()
    folder = Path(sys.argv[1])
    run = Run.read(folder)
    # Imported here, because the driver does not need them, and importing the Zoo takes seconds.
    from sb3_mbpo.compare.evaluation import ComparisonExperiment, EvaluationRecorder
    from sb3_mbpo.runtime.provenance import provenance
    from sb3_mbpo.zoo.cli import ALGORITHMS
    from sb3_mbpo.zoo.cli import main as zoo

    made_by = provenance()
    put(folder / PROVENANCE, json.dumps(made_by, indent=1).encode())
    origin = {"env": run.env, "algorithm": run.label, "seed": run.seed}
    recorder = EvaluationRecorder(folder / EVALUATIONS, origin, run.evaluation_steps, run.eval_episodes)
    options = ["train", *run.zoo_options(folder)]
    if run.algo in ALGORITHMS:
        options += ["--checkpoints", str(folder / CHECKPOINTS)]
    zoo(options, experiment=partial(ComparisonExperiment, recorder=recorder))
    if recorder.due:
        # After an interrupt, the Zoo saves and ends normally.
        raise SystemExit(f"the run ended before step {recorder.due[0]:,}")
    result = {
        "run": asdict(run),
        "settings": recorder.settings,
        "seconds": {**recorder.seconds, "total": sum(recorder.seconds.values())},
        "cpu_seconds": {**recorder.cpu_seconds, "total": sum(recorder.cpu_seconds.values())},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **made_by,
    }
    put(folder / FINISHED, json.dumps(result, indent=1, default=str).encode())
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


if __name__ == "__main__":
    main()
