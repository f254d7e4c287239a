"""
What checkpoints cost: ``python benchmarks/checkpoint_cost.py`` learns InvertedPendulum-v5 with default settings, once with the
default callback and once with one that is to save after every step, and holds the time of all saves against that of the run.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import torch as th

from sb3_mbpo import MBPO, ResumeCallback
from sb3_mbpo.checkpoints.checkpoint import Checkpoint, listed

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "checkpoint_cost.csv"
COLUMNS = ["env", "steps", "every", "saves", "saving_seconds", "seconds", "last_megabytes"]


class Timed(ResumeCallback):
    """Notes what each save takes, in seconds."""

    def __init__(self, folder: str, every: int) -> None:
        super().__init__(folder, every)
        self.saves: list[float] = []

    def save(self, *args: Any, **kwargs: Any) -> Checkpoint:
        started = time.perf_counter()
        saved = super().save(*args, **kwargs)
        self.saves.append(time.perf_counter() - started)
        return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="InvertedPendulum-v5")
    parser.add_argument("--steps", type=int, default=1_500)
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = []
    for every in (5_000, 1):
        with tempfile.TemporaryDirectory() as folder:
            callback = Timed(folder, every)
            started = time.perf_counter()
            MBPO("MlpPolicy", args.env, seed=0).learn(args.steps, callback)
            seconds, saving = time.perf_counter() - started, sum(callback.saves)
            size = sum(path.stat().st_size for path in next(listed(Path(folder))).path.iterdir())
        print(
            f"every={every}: {len(callback.saves)} saves, {saving:.2f} of {seconds:.1f} s, {100 * saving / seconds:.2f} %; "
            f"the last one has {size / 1e6:.1f} MB"
        )
        rows.append([args.env, args.steps, every, len(callback.saves), f"{saving:.3f}", f"{seconds:.2f}", f"{size / 1e6:.2f}"])
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
