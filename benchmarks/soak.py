"""
Endurance: a long run that is disturbed all the time ends as one that is not, to the last bit, and does not grow.

    python benchmarks/soak.py [--steps 50000] [--folder logs/soak]

Pendulum-v1, networks of 2 x 32, one update a step, a fit every 1,000 steps. The replay buffer holds 10,000 transitions, and so
is full when the second quarter begins: what a fit needs grows with the data until then. One process runs undisturbed. Beside
it a second run is ended at random moments, some seconds apart, by SIGTERM, SIGINT, SIGUSR1 or SIGKILL, and started again. In
the end the parameters of both, with optimizers and dynamics, must be equal. Resident memory is written down every 1,000 steps;
docs/benchmarks/soak.csv keeps it, and each end of a process.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbpo import MBPO, ResumeCallback
from sb3_mbpo.checkpoints.checkpoint import newest

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "soak.csv"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL]


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Memory(BaseCallback):
    """Notes resident memory every 1,000 steps."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        if self.num_timesteps % 1000 == 0:
            with self.path.open("a") as file:
                print(self.num_timesteps, f"{resident_megabytes():.1f}", file=file)
        return True


def learn(folder: Path, steps: int) -> None:
    """One process' worth of the run."""
    th.set_num_threads(1)
    agent = MBPO(
        "MlpPolicy",
        "Pendulum-v1",
        gradient_steps=1,
        model_train_freq=1000,
        rollout_batch_size=1000,
        learning_starts=500,
        buffer_size=10_000,
        policy_kwargs={"net_arch": [32, 32]},
        dynamics_kwargs={"net_arch": [32, 32]},
        seed=0,
    )
    callback = ResumeCallback(folder / "checkpoints", every=1000)
    agent.learn(steps, [callback, Memory(folder / "memory.txt")])
    sys.exit(75 if callback.interrupted else 0)


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", "--folder", str(folder), "--steps", str(steps)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def last_tensors(folder: Path, steps: int) -> dict[str, th.Tensor]:
    found = newest(folder / "checkpoints")
    assert found is not None and found[2].step == steps
    return found[1]


def growth(folder: Path) -> float:
    """Resident memory in the last quarter of a run over that in its second quarter, the largest of each."""
    megabytes = [float(line.split()[1]) for line in (folder / "memory.txt").read_text().splitlines()]
    quarter = len(megabytes) // 4
    return max(megabytes[-quarter:]) / max(megabytes[quarter : 2 * quarter])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=Path("logs/soak"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return learn(args.folder, args.steps)
    if args.folder.exists():
        # A finished run would not be run again.
        shutil.rmtree(args.folder)
    chance, ends, started = random.Random(0), [], time.perf_counter()
    undisturbed = start(args.folder / "undisturbed", args.steps)
    while True:
        process = start(args.folder / "disturbed", args.steps)
        try:
            code = process.wait(chance.uniform(5, 40))
        except subprocess.TimeoutExpired:
            process.send_signal(chance.choice(SIGNALS))
            code = process.wait()
        ends.append(code)
        print(f"{time.perf_counter() - started:.0f} s: a process ended with {code}", flush=True)
        if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1):
            sys.exit("failed")
        if code == 0:
            break
    assert undisturbed.wait() == 0
    ours, theirs = (last_tensors(args.folder / name, args.steps) for name in ("disturbed", "undisturbed"))
    # Of the envs the wall-clock is in the checkpoint as well, but not among the tensors.
    different = [name for name in theirs if not th.equal(ours[name], theirs[name])]
    print(f"{len(theirs)} tensors, {len(different)} differ {different[:5]}; {len(ends)} processes")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "resident_megabytes", "exit_codes"])
        for name in ("undisturbed", "disturbed"):
            lines = (args.folder / name / "memory.txt").read_text().split("\n")
            writer.writerows([name, *line.split(), ""] for line in lines if line)
        writer.writerow(["disturbed", args.steps, "", " ".join(map(str, ends))])
    grown = growth(args.folder / "undisturbed")
    print(f"resident memory of the undisturbed run, last quarter over second quarter: {grown:.3f}")
    sys.exit(1 if different or grown > 1.02 or len(set(ends)) < 3 else 0)


if __name__ == "__main__":
    main()
