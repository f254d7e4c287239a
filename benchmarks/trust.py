"""
How long should imagined branches be, and which filter helps? Arms of one study, each run like one of ``sb3_mbpo compare``.

    python benchmarks/trust.py pendulum              # every arm and seed; finished runs are not made again, others go on
    python benchmarks/trust.py pendulum --collect    # only collect what there is, and draw

Runs are in logs/trust/STUDY. What they have measured goes to docs/benchmarks/trust: STUDY.csv has the mean return of each
evaluation, its episodes' mean length and the seconds so far, STUDY_fits.csv what was logged at each fit, STUDY.png shows both.
Runs that are not finished are there as far as they went, with finished = 0. Runs that are in the CSV only, made on another
machine, stay there, and finished ones are not made again.
"""

import argparse
import csv
import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sb3_mbpo.compare import cli as compare
from sb3_mbpo.compare.evaluation import FITS
from sb3_mbpo.compare.plots import look
from sb3_mbpo.compare.progress import RunProgress
from sb3_mbpo.compare.run import EVALUATIONS, FINISHED, as_file_name
from sb3_mbpo.compare.workers import LocalWorkers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "trust"
MEASURED = ["return", "length", "seconds", "fits_seconds", "rollouts_seconds"]
MEASURED += ["cpu_seconds", "fits_cpu_seconds", "rollouts_cpu_seconds"]
LOGGED = (
    *("rollout_length", "branch_length", "filtered", "explained_obs", "explained_reward", "holdout_error", "real_share"),
    *("q_mean", "q_max", "q_bound", "epochs", "updates"),
)

# Rows of its evaluations, and of its fits
Run = tuple[pd.DataFrame, pd.DataFrame]

# As many imagined transitions as with k = 1.
LONG = "rollout_schedule=10,rollout_batch_size=10000"
SMALL_ARMS = {
    "k = 1 (the paper's)": "mbpo",
    "auto": "mbpo:rollout_schedule=auto",
    "k = 10": f"mbpo:{LONG}",
    "macura": f"mbpo:{LONG},rollout_filter=macura",
    "infoprop": f"mbpo:{LONG},rollout_filter=infoprop",
    "m2ac": f"mbpo:{LONG},rollout_filter=m2ac",
}
PAPER = "k = 1 (the paper's until 25,000)"
HOPPER_ARMS = {
    PAPER: "mbpo",
    "1 to 15, from 5,000 to 20,000": "mbpo:rollout_schedule=dict(min_length=1,max_length=15,start=5000,end=20000)",
    **{arm: spec for arm, spec in SMALL_ARMS.items() if spec != "mbpo"},
}
# The paper's setting and the one that needs no number.
FINAL_ARMS = {arm: HOPPER_ARMS[arm] for arm in (PAPER, "auto")}
# A return that a run shall reach
ENOUGH = {"Pendulum-v1": -200, "InvertedPendulum-v5": 950, "Hopper-v5": 1_000}
# study -> env, steps, steps between evaluations, seeds, arms
STUDIES = {
    "pendulum": ("Pendulum-v1", 2_500, 250, 3, SMALL_ARMS),
    "inverted_pendulum": ("InvertedPendulum-v5", 3_000, 250, 3, SMALL_ARMS),
    "hopper": ("Hopper-v5", 10_000, 1_000, 1, HOPPER_ARMS),
    "hopper_20000": ("Hopper-v5", 20_000, 1_000, 3, FINAL_ARMS),
    # Where there is one: other rounding, so another sample.
    "hopper_gpu": ("Hopper-v5", 10_000, 1_000, 1, HOPPER_ARMS),
    "hopper_20000_gpu": ("Hopper-v5", 20_000, 1_000, 3, FINAL_ARMS),
}


def folder_of(study: str) -> Path:
    return ROOT / "logs" / "trust" / study


def results(study: str) -> tuple[Path, Path]:
    return RESULTS / f"{study}.csv", RESULTS / f"{study}_fits.csv"


def known(path: Path) -> pd.DataFrame:
    """:return: what a CSV of an earlier call has"""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["arm", "seed", "step", "finished"])


def make(study: str, arms: list[str], workers: int) -> None:
    """Make the runs that neither logs nor CSV has finished, the first seed of each arm first."""
    env, steps, eval_freq, seeds, specs = STUDIES[study]
    numbers = {"seeds": seeds, "steps": steps, "eval-freq": eval_freq}
    options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    args = compare.parse(["--env", env, "--algo", *(specs[arm] for arm in arms), *options])
    args.command = f"python benchmarks/trust.py {study}"
    rows, folder, arm_of = known(results(study)[0]), folder_of(study), {spec: arm for arm, spec in specs.items()}
    done = set(rows.loc[rows["finished"] == 1, ["arm", "seed"]].itertuples(index=False, name=None))
    runs = compare.grid(args)
    waiting = [r for r in runs if (arm_of[r.label], r.seed) not in done and not r.is_finished(folder / r.folder)]
    with RunProgress(len(runs), len(runs) - len(waiting), folder) as progress:
        failures = compare.make(waiting, LocalWorkers(folder, workers), progress)
    if failures:
        raise SystemExit("\n".join(f"{run}: {failure}" for run, failure in failures.items()))


def made(study: str, arm: str, seed: int) -> Run | None:
    """What logs/trust has of a run that has had a fit."""
    env, *_, arms = STUDIES[study]
    folder = folder_of(study) / as_file_name(env) / as_file_name(arms[arm]) / f"seed_{seed}"
    if not (folder / FITS).exists():
        return None
    # Runs of before CPU seconds were kept lack their columns.
    returns = pd.read_csv(folder / EVALUATIONS).reindex(columns=["step", *MEASURED]).groupby("step", as_index=False).mean()
    with (folder / FITS).open(newline="") as file:
        logged = pd.DataFrame(csv.reader(file), columns=["step", "name", "value"]).astype({"step": int, "value": float})
    fits = logged.pivot_table("value", "step", "name").reindex(columns=LOGGED).reset_index()
    finished = int((folder / FINISHED).exists())
    return returns.assign(arm=arm, seed=seed, finished=finished), fits.assign(arm=arm, seed=seed)


def reach(run: Run) -> tuple[int, int]:
    """How far a run came: whether it is finished, and its last fit."""
    return run[0]["finished"].max(), run[1]["step"].max()


def collect(study: str) -> Run:
    """
    Of all runs, in logs/trust or in the CSV; of one in both, what came further.

    :return: a row per evaluation, ``arm seed step``, ``MEASURED``, ``finished``; one per fit, ``arm seed step``, ``LOGGED``
    """
    _, _, _, seeds, arms = STUDIES[study]
    old = [{key: rows for key, rows in known(path).groupby(["arm", "seed"])} for path in results(study)]
    runs = []
    for key in ((arm, seed) for arm in arms for seed in range(seeds)):
        found = [run for run in (made(study, *key), (old[0][key], old[1][key]) if key in old[0] else None) if run is not None]
        if found:
            runs.append(max(found, key=reach))
    if not runs:
        raise SystemExit(f"no run of {study} has had a fit yet, here or in docs/benchmarks/trust")
    returns, fits = (pd.concat(part) for part in zip(*runs, strict=True))
    first = ["arm", "seed", "step"]
    # And so do older rows of the CSV.
    columns = [*first, *MEASURED, "finished"], [*first, *LOGGED]
    return returns.reindex(columns=columns[0]).round(3), fits.reindex(columns=columns[1]).round(4)


def draw(study: str, returns: pd.DataFrame, fits: pd.DataFrame) -> None:
    """Return, k or its realised mean, and what the dynamics explains, against env steps; means over seeds, each seed thin."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    fits = fits.assign(length=fits["branch_length"].fillna(fits["rollout_length"]))
    fits["unexplained"] = (1 - fits["explained_obs"]).clip(lower=1e-4)
    shown = (
        (returns, "return", "return"),
        (fits, "length", "mean length of a branch"),
        (fits, "unexplained", "unexplained share"),
    )
    for axes, (rows, column, label) in zip(panels, shown, strict=True):
        for i, arm in enumerate(STUDIES[study][4]):
            mine = rows[rows["arm"] == arm].pivot_table(column, "step", "seed")
            if len(mine):
                axes.plot(mine.index, mine, **{**look(i), "linestyle": "-"}, linewidth=0.7, alpha=0.4)
                axes.plot(mine.index, mine.mean(axis=1), label=f"{arm} ({mine.shape[1]})", **look(i), linewidth=2)
        axes.set(xlabel="env steps", ylabel=label)
        axes.grid(alpha=0.25)
    panels[2].set_yscale("log")
    panels[0].set_title(STUDIES[study][0])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(RESULTS / f"{study}.png", dpi=110)


def summarise(study: str, returns: pd.DataFrame, fits: pd.DataFrame) -> None:
    """Print a table: an arm a row, a number for each seed, and of the fits and rollouts the mean."""
    enough = ENOUGH[STUDIES[study][0]]
    fits = fits.assign(length=fits["branch_length"].fillna(fits["rollout_length"]))
    heads = [f"first above {enough} at", "mean return", "last", "branch", "unexplained", "rollouts", "fits", "minutes"]
    print("| | " + " | ".join(heads) + " |\n" + "|---" * (1 + len(heads)) + "|")
    for arm, rows in returns.groupby("arm", sort=False):
        seeds = [one for _, one in rows.groupby("seed")]
        ends, mine = [one.iloc[-1] for one in seeds], fits[fits["arm"] == arm]
        reached = [one.loc[one["return"] > enough, "step"].min() for one in seeds]
        cells = [
            ", ".join("never" if math.isnan(step) else f"{step:,.0f}" for step in reached),
            ", ".join(f"{one['return'].mean():.0f}" for one in seeds),
            ", ".join(f"{end['return']:.0f}" + ("" if end["finished"] else f" (at {end['step']:,.0f})") for end in ends),
            f"{mine['length'].mean():.1f}",
            f"{1 - mine['explained_obs'].mean():.3f}",
            *(f"{np.mean([end[key] for end in ends]):.0f} s" for key in ("rollouts_seconds", "fits_seconds")),
            ", ".join(f"{end['seconds'] / 60:.0f}" for end in ends),
        ]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--arms", nargs="+", help="some of them; default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="start nothing")
    args = parser.parse_args()
    if not args.collect:
        make(args.study, args.arms or list(STUDIES[args.study][4]), args.workers)
    RESULTS.mkdir(parents=True, exist_ok=True)
    returns, fits = collect(args.study)
    for path, rows in zip(results(args.study), (returns, fits), strict=True):
        rows.to_csv(path, index=False)
    draw(args.study, returns, fits)
    summarise(args.study, returns, fits)


if __name__ == "__main__":
    main()
