"""
The learning curves of docs/benchmarks/evidence: the list of runs, and what is made of them.

    python benchmarks/evidence.py make --only sac --workers 2
    python benchmarks/evidence.py collect
    python benchmarks/evidence.py draw

make trains what is not finished yet, the first seed of every task first; each run is one process with one thread, as in
sb3_mbpo compare. collect writes curves.csv and manifest.csv; runs that are not finished are collected as far as they went.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sb3_mbpo.comparison_run import Run

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs" / "evidence"

# The observations of the paper: the body's alone, 27 dimensions of Ant-v5 and 45 of Humanoid-v5.
BODY_ONLY = {
    "Ant-v5": ["include_cfrc_ext_in_observation:False"],
    "Humanoid-v5": [f"include_{name}_in_observation:False" for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")],
}
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
# From the root of the checkout, so that the manifest names no other folder.
DEFAULTS = "benchmarks/evidence_sac.yml"


class Study(NamedTuple):
    """
    Runs that differ by task and seed only.

    :param name: how curves.csv and the figures call it
    :param algo: as the Zoo calls it
    :param settings: override those of ``conf_file``
    :param steps: env steps
    :param seeds: of each task, from 0
    :param envs: tasks
    :param eval_freq: env steps between evaluations
    :param conf_file: settings; ``None``: those that come with the package
    """

    name: str
    algo: str
    settings: dict[str, Any]
    steps: int
    seeds: int
    envs: tuple[str, ...] = TASKS
    eval_freq: int = 1_000
    conf_file: str | None = None


STUDIES = {
    "sac": Study("SAC", "sac", {}, 50_000, 3, conf_file=DEFAULTS),
    "sac_300k": Study("SAC, long", "sac", {}, 300_000, 1, eval_freq=5_000, conf_file=DEFAULTS),
    "sac_20": Study("SAC, 20 updates", "sac", {"gradient_steps": 20}, 20_000, 1, TASKS[:2], conf_file=DEFAULTS),
    "tqc": Study("TQC", "tqc", {}, 20_000, 1, TASKS[:2], conf_file=DEFAULTS),
    "crossq": Study("CrossQ", "crossq", {}, 20_000, 1, TASKS[:2], conf_file=DEFAULTS),
}
EPISODES = 5


def runs(only: Sequence[str] = tuple(STUDIES)) -> list[Run]:
    """
    :param only: studies
    :return: their runs; a list that is cut has the same seeds of every task
    """
    # The label is the study, so that no two runs share a folder.
    return [
        Run(
            *(env, key, STUDIES[key].algo, STUDIES[key].settings, seed, STUDIES[key].steps, STUDIES[key].eval_freq, EPISODES),
            device="cpu",
            conf_file=STUDIES[key].conf_file,
            env_kwargs=BODY_ONLY.get(env, []),
            command=f"python benchmarks/evidence.py make --only {key}",
        )
        for seed in range(max(STUDIES[key].seeds for key in only))
        for key in only
        for env in STUDIES[key].envs
        if seed < STUDIES[key].seeds
    ]


def make(wanted: Iterable[Run], logs: Path, workers: int) -> None:
    """
    Train what is not finished yet.

    :param wanted: runs
    :param logs: folder of all runs
    :param workers: runs at a time
    :raises SystemExit: a run failed
    """
    # Late: they need rl_zoo3, which collecting and drawing do not.
    from sb3_mbpo import compare
    from sb3_mbpo.progress import RunProgress
    from sb3_mbpo.workers import LocalWorkers

    wanted = list(wanted)
    missing = [run for run in wanted if not run.is_finished(logs / run.folder)]
    logs.mkdir(parents=True, exist_ok=True)
    with RunProgress(len(wanted), len(wanted) - len(missing), logs) as progress:
        failures = compare.make(missing, LocalWorkers(logs, workers), progress)
    if failures:
        raise SystemExit("\n".join(f"{run}: {failure}" for run, failure in failures.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "collect", "draw"))
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="studies (default: all)")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args(arguments)
    args.logs = args.logs.resolve()
    # Settings files are named from here.
    os.chdir(ROOT)
    if args.command == "make":
        make(runs(args.only), args.logs, args.workers)


if __name__ == "__main__":
    main(sys.argv[1:])
