"""
The learning studies behind docs/benchmarks: several runs of benchmarks/train.py, collected into one CSV.

    python benchmarks/learning.py                       # everything, two runs at a time
    python benchmarks/learning.py --only pendulum       # one study
    python benchmarks/learning.py --collect             # only write the CSV from what is there

Each run is one process with one thread. A finished run, in logs/ or in the CSV, is not repeated; one that was cut starts
again. A run that is not finished is collected as far as it went, with finished = 0; what the CSV has of runs that are not in
logs/ stays as it is.
"""

import argparse
import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train import COLUMNS as OF_A_RUN

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs" / "learning"
RESULTS = ROOT / "docs" / "benchmarks" / "learning.csv"
# Older rows lack the later ones.
COLUMNS = ["study", "arm", *OF_A_RUN, "finished"]

PENDULUM = "--env Pendulum-v1 --steps 2500"
POLE = "--env InvertedPendulum-v5 --steps 2750"
HAZARD = "--env HiddenHazard-v0 --steps 2000 --set gradient_steps=10 --set real_ratio=0.05"
FEW = "--set learning_starts=1000 --set gradient_steps=5 --set real_ratio=0.05 --set model_train_freq=500"
HOPPER = f"--env Hopper-v5 --steps 5000 {FEW}"
NO_PAST = "--env NoPast-v0 --steps 1200 --set learning_starts=200 --set gamma=0.9 --set gradient_steps=20"
PAPER = "--env Hopper-v5 --steps 20000 --eval-freq 1000"
RAW = "--set dynamics_kwargs.normalize_targets=false"
NEXT = "--set dynamics_kwargs.target_mode=next"
BOUND = "--set dynamics_kwargs.max_updates"
# 100,000 imagined transitions a refill, as ever; an episode has 200 steps.
WHOLE = "--set rollout_batch_size=500 --set rollout_schedule=200"
# Hard to model, and nothing ends an episode of 1,000 steps.
CHEETAH = "--env HalfCheetah-v5 --steps 5000 --eval-freq 500 --set learning_starts=1000 --set gradient_steps=10"
CHEETAH = f"{CHEETAH} --set real_ratio=0.05"

# study -> arm -> (arguments of train.py, seeds)
STUDIES: dict[str, dict[str, tuple[str, int]]] = {
    "pendulum": {
        "MBPO": (PENDULUM, 3),
        "SAC": (f"{PENDULUM} --steps 5000 --algo sac --set gradient_steps=1", 3),
    },
    "inverted_pendulum": {
        "MBPO": (POLE, 3),
        "SAC": (f"{POLE} --steps 5000 --algo sac --set gradient_steps=1", 3),
    },
    "hazard": {
        "learned": (f"{HAZARD} --set termination_fn=learned", 3),
        "known": (f"{HAZARD} --set termination_fn=hazard.terminated", 3),
        "never": (f"{HAZARD} --set termination_fn=never", 1),
        "SAC": (f"{HAZARD} --algo sac --set gradient_steps=1", 3),
    },
    "no_past": {
        "MBPO": (NO_PAST, 3),
        "MBPO, all imagined rows": (f"{NO_PAST} --set min_explained_variance=null", 3),
        "SAC, 20 updates a step": (f"{NO_PAST} --algo sac", 3),
    },
    "hopper": {
        "learned": (f"{HOPPER} --set termination_fn=learned", 3),
        "known": (HOPPER, 3),
        "SAC": (f"{HOPPER} --algo sac --set gradient_steps=1", 3),
    },
    "targets_pendulum": {
        "delta, raw": (f"{PENDULUM} {RAW}", 2),
        "next, normalised": (f"{PENDULUM} {NEXT}", 2),
        "next, raw": (f"{PENDULUM} {NEXT} {RAW}", 1),
    },
    "targets_inverted_pendulum": {
        "delta, raw": (f"{POLE} {RAW}", 2),
        "next, normalised": (f"{POLE} {NEXT}", 2),
        "next, raw": (f"{POLE} {NEXT} {RAW}", 1),
    },
    "bound_pendulum": {
        "no bound": (f"{PENDULUM} {BOUND}=null", 2),
        "250 updates": (f"{PENDULUM} {BOUND}=250", 2),
    },
    "bound_inverted_pendulum": {
        "no bound": (f"{POLE} {BOUND}=null", 2),
        "250 updates": (f"{POLE} {BOUND}=250", 2),
    },
    "rollouts_pendulum": {
        "200 steps from starts of episodes": (f"{PENDULUM} {WHOLE} --episode-starts", 3),
        "200 steps from visited states": (f"{PENDULUM} {WHOLE}", 3),
    },
    "rollouts_half_cheetah": {
        "1 step from visited states": (f"{CHEETAH} --set rollout_schedule=1", 3),
        "1000 steps from starts of episodes": (
            f"{CHEETAH} --set rollout_batch_size=100 --set rollout_schedule=1000 --episode-starts",
            3,
        ),
    },
    "hopper_paper": {
        "MBPO": (PAPER, 1),
        "SAC": (f"{PAPER} --algo sac --set gradient_steps=1", 1),
    },
}


def folder_of(study: str, arm: str, seed: int) -> Path:
    return LOGS / study / f"{arm.replace(', ', '_')}_{seed}"


Row = dict[str, str]


def collected() -> dict[tuple[str, str, int], list[Row]]:
    """What the CSV has, by run."""
    runs: dict[tuple[str, str, int], list[Row]] = {}
    if RESULTS.exists():
        with RESULTS.open() as file:
            for row in csv.DictReader(file):
                runs.setdefault((row["study"], row["arm"], int(row["seed"])), []).append(row)
    return runs


def is_finished(study: str, arm: str, seed: int) -> bool:
    rows = collected().get((study, arm, seed), [])
    return (folder_of(study, arm, seed) / "agent.zip").exists() or any(row["finished"] == "1" for row in rows)


def run(study: str, arm: str, seed: int) -> None:
    if is_finished(study, arm, seed):
        return
    arguments, _ = STUDIES[study][arm]
    folder = folder_of(study, arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), *arguments.split()]
    command += ["--seed", str(seed), "--threads", "1", "--quiet", "--folder", str(folder)]
    with (folder / "output.txt").open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    print(f"{study}, {arm}, seed {seed}: {'done' if code == 0 else f'failed, see {folder}/output.txt'}", flush=True)


def collect() -> None:
    runs = collected()
    for study, arms in STUDIES.items():
        for arm, (_, seeds) in arms.items():
            for seed in range(seeds):
                path = folder_of(study, arm, seed) / "evaluations.csv"
                if not path.exists():
                    continue
                origin = {"study": study, "arm": arm, "finished": str(int((path.parent / "agent.zip").exists()))}
                with path.open() as file:
                    rows = [{**origin, **row} for row in csv.DictReader(file)]
                collected_before = runs.get((study, arm, seed), [])
                # Of a run that another machine has brought as far, or further, that one stays.
                if len(rows) > len(collected_before) or origin["finished"] == "1":
                    runs[study, arm, seed] = rows
    known = {(study, arm): i for i, (study, arm) in enumerate((study, arm) for study in STUDIES for arm in STUDIES[study])}
    order = sorted(runs, key=lambda run: (known.get(run[:2], len(known)), run[2]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for run in order for row in runs[run])
    print(f"{len(runs)} runs -> {RESULTS.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="start nothing")
    args = parser.parse_args()
    if not args.collect:
        # Seeds outermost: a cut study has the same seeds of every arm.
        arms = [(study, arm, seeds) for study in args.only for arm, (_, seeds) in STUDIES[study].items()]
        jobs = [(study, arm, seed) for seed in range(3) for study, arm, seeds in arms if seed < seeds]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: run(*job), jobs))
    collect()


if __name__ == "__main__":
    main()
