"""
What the parts of DHMBPO are worth: one difference from the packaged settings at a time.

    python benchmarks/ablations.py make --arms default critics_5 --envs Hopper-v5 --workers 2
    python benchmarks/ablations.py collect

make trains what is not finished yet; each run is one process with one thread, as in sb3_mbpo compare. collect writes
docs/benchmarks/ablations.csv, a row per evaluation of five deterministic episodes, prints the table and puts it into
docs/benchmarks/index.md. Runs that are not in the logs stay in the CSV as they are. CPU seconds are without those of the
evaluations.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import evidence
import pages

from sb3_mbpo.compare.run import ARGUMENTS, EVALUATIONS, PROVENANCE, Run

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs" / "ablations"
CSV = ROOT / "docs" / "benchmarks" / "ablations.csv"
TASKS = ("Hopper-v5", "HalfCheetah-v5")
STEPS, EVERY, EPISODES = 15_000, 1_000, 5

# Text is an expression of Python, as in the Zoo's settings.
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "horizon_1": {"training_horizon": 1},
    "horizon_3": {"training_horizon": 3},
    "no_distribution_rollouts": {"real_roots": 1.0},
    "published_networks": {"policy_kwargs": "dict(n_critics=5, net_arch=[256, 256, 256])"},
    "three_layers": {"policy_kwargs": "dict(net_arch=[256, 256, 256])"},
    "critics_5": {"policy_kwargs": "dict(n_critics=5)"},
    "widest_value_bounds": {"value_quantiles": [0.0, 1.0]},
    "no_layer_norm": {"policy_kwargs": "dict(layer_norm=False)"},
    "relu": {"policy_kwargs": "dict(activation_fn=nn.ReLU)"},
    "updates_2": {"gradient_steps": 2},
    "batch_256": {"batch_size": 256},
    "gamma_0.99": {"gamma": 0.99},
    "fit_half": {"dynamics_kwargs": "dict(max_updates=500)"},
    "fit_double": {"dynamics_kwargs": "dict(max_updates=2000)"},
    "fit_patience_100": {"dynamics_kwargs": "dict(patience=100)"},
    "fit_every_500": {"model_train_freq": 500},
    "fit_every_500_batch_128": {"model_train_freq": 500, "dynamics_kwargs": "dict(batch_size=128, patience=150)"},
}
COLUMNS = ("arm", "env", "seed", "step", "return", "length", "cpu_seconds", "commit")
AT = (5_000, 10_000, 15_000)
# Evaluations that say how steady a run is at its end.
LAST = 5

Row = dict[str, str]


def runs(arms: Sequence[str], envs: Sequence[str], seeds: Sequence[int], steps: int = STEPS) -> list[Run]:
    """:return: the runs of these arms, tasks and seeds, the first seed of each first"""
    return [
        Run(
            *(env, arm, "dhmbpo", ARMS[arm], seed, steps, EVERY, EPISODES),
            device="cpu",
            command="python benchmarks/ablations.py make",
        )
        for seed in seeds
        for arm in arms
        for env in envs
    ]


def rows_of(run: Run, folder: Path) -> list[Row]:
    """:return: a row per evaluation of a run, in the columns ``COLUMNS``"""
    commit = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["commit"] or ""
    found: dict[int, Row] = {}
    for row in evidence.long_rows((run.label, run.env, run.seed), evidence.read(folder / EVALUATIONS)):
        step = int(row["env_step"])
        about = {"arm": run.label, "env": run.env, "seed": str(run.seed), "step": str(step), "commit": commit[:7]}
        found.setdefault(step, about)[row["metric"]] = row["value"]
    for one in found.values():
        one |= {"return": one["avg_return"], "length": one["avg_length"], "cpu_seconds": f"{float(one['cpu_seconds']):.0f}"}
    return [{name: one[name] for name in COLUMNS} for one in found.values()]


def collect(wanted: Sequence[Run], logs: Path, path: Path) -> list[Row]:
    """:return: the rows of the CSV, which is written: those of these runs, and of others as they were"""
    kept: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in evidence.read(path):
        kept[row["arm"], row["env"], row["seed"]].append(row)
    for run in wanted:
        folder = logs / run.folder
        if (folder / ARGUMENTS).exists() and (folder / PROVENANCE).exists():
            rows = rows_of(run, folder)
            key = (run.label, run.env, str(run.seed))
            if len(rows) >= len(kept.get(key, [])):
                kept[key] = rows
    order = sorted(kept, key=lambda key: (TASKS.index(key[1]), list(ARMS).index(key[0]), int(key[2])))
    rows = [row for key in order for row in kept[key]]
    evidence.write(path, COLUMNS, rows)
    return rows


def table(rows: Sequence[Row]) -> str:
    """:return: Markdown: by arm the mean return over the seeds; of each seed's last five evaluations the mean and the worst"""
    curves: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        curves[row["env"], row["arm"]][row["seed"]].append(row)
    heads = ["seeds", *(f"at {step:,}" for step in AT), "last five: mean", "worst", "CPU s per 1,000 steps"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for (env, arm), seeds in curves.items():
        by_step = [{int(row["step"]): float(row["return"]) for row in curve} for curve in seeds.values()]
        cells = [str(len(seeds)), *evidence.at_steps(by_step, AT)]
        ends = [list(curve.values())[-LAST:] for curve in by_step]
        cells += [f"{fmean(map(fmean, ends)):,.0f}", f"{min(map(min, ends)):,.0f}"]
        cells.append(f"{fmean(1000 * float(c[-1]['cpu_seconds']) / int(c[-1]['step']) for c in seeds.values()):.0f}")
        lines.append(f"| {env}, {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "collect"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--envs", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--logs", type=Path, default=LOGS)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args(arguments)
    args.logs = args.logs.resolve()
    # Settings files are named from here.
    os.chdir(ROOT)
    wanted = runs(args.arms, args.envs, args.seeds, args.steps)
    if args.command == "make":
        evidence.make(wanted, args.logs, args.workers)
    else:
        text = table(collect(wanted, args.logs, CSV))
        print(text)
        pages.put_table(pages.PAGE, "ablations", text)


if __name__ == "__main__":
    main(sys.argv[1:])
