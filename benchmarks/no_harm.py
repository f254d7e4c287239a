"""
Does the model do harm? MBPO beside SAC at the same number of updates, on eight tasks that nobody tuned it for.

    python benchmarks/no_harm.py                                # everything; finished runs are not made again
    python benchmarks/no_harm.py --tasks Reacher-v5 --arms mbpo # a part of it
    python benchmarks/no_harm.py --collect                      # start nothing: collect, draw and print what there is
    python benchmarks/no_harm.py --estimate                     # print the CPU minutes of what is not finished

Arms: ``sac`` is Stable-Baselines3's SAC; ``mbpo`` learns transitions, rewards and terminations; ``true`` is MBPO with the true
system in place of the learned one, where that has a closed form. All arms of a task have the same random steps, number of
updates and evaluation episodes; only ``dhmbpo``, which learns the same, makes its one update a step, and has no gSDE. Each run
is a process with one thread and has a folder in logs/no_harm; delete that, or pass --again, to make it again. Results are in
docs/benchmarks/no_harm: evaluations.csv has a row for each evaluation, no_harm.png the learning curves. The tables in index.md
and notes/beside_sac.md in docs/benchmarks are renewed. Runs that only the CSV has, made on another machine, stay there and are
not made again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ends
import gymnasium as gym
import matplotlib
import no_past  # noqa: F401  (registers NoPast-v0)
import numpy as np
import pages
import pandas as pd
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from true_systems import TRUE_SYSTEMS

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.buffers.replay_buffer import balanced_ratio
from sb3_mbpo.compare.evaluation import EVALUATION_SEED, FITS, EvaluationRecorder
from sb3_mbpo.compare.run import EVALUATIONS, OUTPUT, put
from sb3_mbpo.runtime.provenance import provenance

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs" / "no_harm"
RESULTS = ROOT / "docs" / "benchmarks" / "no_harm"
FINISHED = "run.json"
EPISODES = 5
ARMS = {"sac": "SAC", "mbpo": "MBPO", "true": "MBPO, true system", "dhmbpo": "DHMBPO, 1 update a step"}
ALGORITHMS = {"sac": SAC, "mbpo": MBPO, "true": MBPO, "dhmbpo": DHMBPO}
KEY = ["task", "arm", "seed"]
# Of the last fit before an evaluation.
LOGGED = [
    *("q_mean", "q_max", "q_bound", "epochs", "updates", "explained_obs", "explained_reward", "holdout_error", "real_share"),
    *("termination_recall", "termination_precision", "rollout_length"),
]
TIMES = ["cpu_seconds", "updates_cpu_seconds", "fits_cpu_seconds", "rollouts_cpu_seconds"]
COLUMNS = [*KEY, "step", "return", "return_std", "length", *TIMES, *LOGGED, "fit_step", "commit"]


@dataclass(frozen=True)
class Task:
    """
    :param env: its id
    :param steps: env steps of a run, the random ones included
    :param random_steps: before the first update
    :param updates: gradient steps for each env step after that
    :param eval_freq: env steps from one evaluation to the next
    :param settings: other arguments of both algorithms
    """

    env: str
    steps: int
    random_steps: int = 500
    updates: int = 5
    eval_freq: int = 250
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def gradient_steps(self) -> int:
        return self.updates * self.settings.get("train_freq", 1)

    @property
    def total_updates(self) -> int:
        return (self.steps - self.random_steps) * self.updates


TASKS = {
    task.env: task
    for task in (
        Task("Pendulum-v1", 2_000),
        Task("Reacher-v5", 2_500),
        Task("InvertedDoublePendulum-v5", 2_500),
        # Exploration, discount and ent_coef of hyperparams/mbpo.yml. A draw of the noise lasts 32 steps, as in the RL Zoo:
        # with another one in every step neither algorithm finds the flag.
        Task(
            "MountainCarContinuous-v0",
            2_500,
            settings={
                **{"gamma": 0.9999, "ent_coef": 0.1, "use_sde": True, "train_freq": 32},
                "policy_kwargs": {"log_std_init": -3.67},
            },
        ),
        Task("Hopper-v5", 6_000, random_steps=1_000, eval_freq=500),
        Task("ObservedGoal-v0", 2_500),
        Task("ForbiddenDisc-v0", 2_500),
        Task("NoPast-v0", 700, random_steps=200, updates=20, eval_freq=100, settings={"gamma": 0.9}),
    )
}
# 100,000 start states, as in the paper, are for 20 updates a step; for 5, the model buffer holds as many imagined
# transitions for each update with a quarter of them.
OURS = {"rollout_batch_size": 25_000}
# CPU of a run with one thread, for an estimate: milliseconds an update, seconds a fit with its rollouts.
UPDATE_MS = {"sac": 14.5, "mbpo": 9.0, "true": 9.0, "dhmbpo": 65.0}
FIT_SECONDS = {"sac": 0.0, "mbpo": 6.0, "true": 0.5, "dhmbpo": 3.0}

Run = tuple[str, str, int]


def arms_of(task: str) -> list[str]:
    """The true system is not known everywhere."""
    return [arm for arm in ARMS if arm != "true" or task in TRUE_SYSTEMS]


def settings_of(task: Task, arm: str) -> dict[str, Any]:
    """
    :return: arguments of the algorithm, but for env and seed
    """
    both = {"learning_starts": task.random_steps, "gradient_steps": task.gradient_steps, **task.settings}
    if arm == "dhmbpo":
        kept = {name: value for name, value in both.items() if name in ("learning_starts", "gamma", "ent_coef")}
        return {**kept, "termination_fn": "learned"}
    if arm == "sac":
        return both
    ours = {**both, **OURS, "real_ratio": balanced_ratio(task.updates)}
    if arm == "mbpo":
        return {**ours, "termination_fn": "learned"}
    system, termination = TRUE_SYSTEMS[task.env]
    return {**ours, "dynamics_class": system, "termination_fn": termination}


def evaluation_steps(task: Task) -> list[int]:
    """From the first one after the random steps on: until then, all arms act alike."""
    return [*range(task.random_steps + task.eval_freq, task.steps, task.eval_freq), task.steps]


def description(run: Run) -> dict[str, Any]:
    """What decides about a run, to be compared with that of a finished one."""
    task = TASKS[run[0]]
    settings = {key: getattr(value, "__qualname__", value) for key, value in settings_of(task, run[1]).items()}
    described = {"run": run, "task": asdict(task), "settings": settings}
    if task.env in ends.TASKS:
        # Another radius or reward is another task.
        described["constants"] = {key: value for key, value in vars(ends.TASKS[task.env][0]).items() if key.isupper()}
    # As it is read back.
    read_back: dict[str, Any] = json.loads(json.dumps(described))
    return read_back


def folder_of(run: Run) -> Path:
    task, arm, seed = run
    return LOGS / task / f"{arm}_{seed}"


def is_finished(run: Run) -> bool:
    """Whether logs/ has it, with the settings of now."""
    marker = folder_of(run) / FINISHED
    return marker.exists() and json.loads(marker.read_text())["description"] == description(run)


def train(run: Run, folder: Path) -> None:
    """Make one run, in this process."""
    name, arm, seed = run
    task = TASKS[name]
    th.set_num_threads(1)
    # Now: SB3 writes into policy_kwargs.
    described = description(run)
    recorder = EvaluationRecorder(
        folder / EVALUATIONS, {"task": name, "arm": arm, "seed": seed}, evaluation_steps(task), EPISODES
    )
    recorder.eval_env = DummyVecEnv([lambda: Monitor(gym.make(task.env))])
    recorder.eval_env.seed(EVALUATION_SEED + seed)
    agent = ALGORITHMS[arm]("MlpPolicy", gym.make(task.env), seed=seed, device="cpu", **settings_of(task, arm))
    agent.learn(task.steps, callback=recorder)
    made = {"description": described, "cpu_seconds": sum(recorder.cpu_seconds.values()), **provenance()}
    put(folder / FINISHED, json.dumps(made, indent=1).encode())


def make(run: Run) -> None:
    """Make one run, in a process of its own."""
    folder = folder_of(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--run", run[0], run[1], str(run[2])]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    with (folder / OUTPUT).open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | threads).returncode
    name = f"{run[0]}, {ARMS[run[1]]}, seed {run[2]}"
    if code:
        print(f"{name}: failed, see {folder / OUTPUT}", flush=True)
        return
    rows = read(run)
    minutes = json.loads((folder / FINISHED).read_text())["cpu_seconds"] / 60
    print(f"{name}: {rows['return'].iloc[-1]:.1f} in the end, {minutes:.1f} CPU minutes", flush=True)


def read(run: Run) -> pd.DataFrame:
    """:return: a row for each evaluation of a run that is finished in logs/, with ``COLUMNS``"""
    folder = folder_of(run)
    episodes = pd.read_csv(folder / EVALUATIONS)
    by_step = episodes.groupby("step")
    rows = by_step[["return", "length", *TIMES]].mean()
    rows["return_std"] = by_step["return"].std(ddof=0)
    fits = pd.read_csv(folder / FITS, names=["step", "name", "value"]) if (folder / FITS).exists() else None
    rows = with_last_fit(rows.reset_index(), fits)
    made = json.loads((folder / FINISHED).read_text())
    return rows.assign(**dict(zip(KEY, run, strict=True)), commit=(made["commit"] or "")[:7])[COLUMNS]


def with_last_fit(rows: pd.DataFrame, fits: pd.DataFrame | None) -> pd.DataFrame:
    """
    :param rows: with ``step``, ascending
    :param fits: ``step``, ``name`` and ``value`` of what was logged at each fit; ``None``: there was none
    :return: the rows with ``LOGGED`` of the last fit before each, and its step
    """
    if fits is None:
        return rows.assign(**dict.fromkeys([*LOGGED, "fit_step"], np.nan))
    wide = fits.pivot_table("value", "step", "name").reindex(columns=LOGGED).reset_index()
    # An evaluation comes before the fit of the same step.
    return pd.merge_asof(rows, wide.assign(fit_step=wide["step"]), on="step", allow_exact_matches=False)


def known() -> pd.DataFrame:
    """:return: what the CSV has"""
    path = RESULTS / EVALUATIONS
    return pd.read_csv(path, dtype={"commit": str}) if path.exists() else pd.DataFrame(columns=COLUMNS)


def in_csv(run: Run) -> bool:
    """Whether the CSV has it, up to the last step of the task of now."""
    rows = known()
    mine = rows[(rows[KEY] == list(run)).all(axis=1)] if len(rows) else rows
    return list(mine["step"]) == evaluation_steps(TASKS[run[0]])


def collect() -> pd.DataFrame:
    """
    :return: the evaluations of all runs that are finished, in logs/ or else in the CSV
    """
    old = {key: rows for key, rows in known().groupby(KEY)}
    runs = [(task, arm, seed) for task in TASKS for arm in arms_of(task) for seed in seeds_of(task, arm, old)]
    parts = [read(run) if is_finished(run) else old[run] for run in runs]
    if not parts:
        raise SystemExit("no run is finished yet, in logs/no_harm or in docs/benchmarks/no_harm")
    with warnings.catch_warnings():
        # Of pandas, about columns without a number, as those of fits are for SAC.
        warnings.simplefilter("ignore", FutureWarning)
        rows = pd.concat(parts, ignore_index=True)
    return rows.round({name: 4 for name in ("return", "return_std", *TIMES)}).round(5)


def seeds_of(task: str, arm: str, old: dict[Any, pd.DataFrame]) -> list[int]:
    """The seeds of which there are results."""
    here = {int(path.name.rpartition("_")[2]) for path in (LOGS / task).glob(f"{arm}_*") if path.is_dir()}
    finished = {seed for seed in here if is_finished((task, arm, seed))}
    # Those of pandas are no numbers for JSON.
    return sorted(finished | {int(seed) for name, other, seed in old if (name, other) == (task, arm)})


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """
    :param rows: evaluations, with ``KEY``, ``step`` and ``return``
    :return: of each run its ``area``, the mean return over the evaluations, and its ``final`` return
    """
    by_run = rows.sort_values("step").groupby(KEY)["return"]
    found = pd.DataFrame({"area": by_run.mean(), "final": by_run.last()}).reset_index()
    # In the order of the rows.
    return rows[KEY].drop_duplicates().merge(found, on=KEY)


def compare(mine: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """
    :param mine: a score for each seed
    :param other: the same of another arm
    :return: the difference of the means, and the seeds' spread: the larger one of the standard deviations, NaN with one seed
    """
    spread = np.nan if min(len(mine), len(other)) < 2 else max(float(np.std(values, ddof=1)) for values in (mine, other))
    return float(np.mean(mine) - np.mean(other)), spread


def verdict(difference: float, spread: float) -> str:
    """In words, where differences within the spread count as none."""
    if np.isnan(spread):
        return "one seed"
    if abs(difference) <= spread:
        return "alike"
    return "ahead" if difference > 0 else "BEHIND"


def as_text(value: float) -> str:
    """With a decimal where the size asks for it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def with_deviation(values: np.ndarray) -> str:
    """Mean and standard deviation over the seeds."""
    return as_text(values.mean()) + (f" ± {as_text(np.std(values, ddof=1))}" if len(values) > 1 else "")


def table(rows: pd.DataFrame) -> str:
    """:return: in Markdown, an arm of a task a row: area and final return, mean and standard deviation over the seeds"""
    heads = ["seeds", "area", "beside SAC", "final return", "beside SAC", "explained obs, reward", "real share", "CPU min"]
    lines = ["| task | arm | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    of_runs = scores(rows)
    for (task, arm), mine in of_runs.groupby(["task", "arm"], sort=False):
        sac = of_runs[(of_runs["task"] == task) & (of_runs["arm"] == "sac")]
        cells = [str(len(mine))]
        for score in ("area", "final"):
            values = mine[score].to_numpy()
            cells.append(with_deviation(values))
            if arm == "sac" or not len(sac):
                cells.append("")
                continue
            difference, spread = compare(values, sac[score].to_numpy())
            sign = "+" if difference > 0 else ""
            cells.append(f"{sign}{as_text(difference)}, {verdict(difference, spread)}")
        fits = rows[(rows["task"] == task) & (rows["arm"] == arm)]
        explained = [fits[f"explained_{of}"].mean() for of in ("obs", "reward")]
        cells.append("" if np.isnan(explained).all() else ", ".join(f"{share:.2f}" for share in explained))
        cells.append("" if arm == "sac" else f"{fits['real_share'].mean():.2f}")
        cells.append(f"{fits.groupby('seed')['cpu_seconds'].max().mean() / 60:.1f}")
        lines.append(f"| {task} | {ARMS[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def areas(rows: pd.DataFrame) -> str:
    """:return: in Markdown, a row a task: area of each arm, mean and standard deviation over the seeds, and their number"""
    of_runs = scores(rows)
    arms = [arm for arm in ARMS if arm in set(of_runs["arm"])]
    lines = ["| task | updates a step | " + " | ".join(ARMS[arm] for arm in arms) + " |", "|---" * (2 + len(arms)) + "|"]
    for task, mine in of_runs.groupby("task", sort=False):
        by_arm = {arm: of["area"].to_numpy() for arm, of in mine.groupby("arm")}
        cells = [f"{with_deviation(by_arm[arm])} ({len(by_arm[arm])})" if arm in by_arm else "" for arm in arms]
        lines.append(f"| {task} | {TASKS[task].updates} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Learning curves, a panel a task: means over seeds, the seeds thin; below them area and final return of each arm."""
    import matplotlib.pyplot as plt

    colors = {"sac": "#555555", "mbpo": "#0072b2", "true": "#d55e00", "dhmbpo": "#009e73"}
    tasks = list(rows["task"].unique())
    columns = min(len(tasks), 4)
    n_rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(n_rows, columns, figsize=(4.1 * columns, 4.0 * n_rows), layout="constrained", squeeze=False)
    of_runs = scores(rows)
    for axes, task in zip(panels.flat, tasks, strict=False):
        lines = []
        for arm, label in ARMS.items():
            mine = rows[(rows["task"] == task) & (rows["arm"] == arm)].pivot_table("return", "step", "seed")
            if mine.empty:
                continue
            axes.plot(mine.index, mine, color=colors[arm], linewidth=0.7, alpha=0.45)
            axes.plot(mine.index, mine.mean(axis=1), color=colors[arm], linewidth=2, label=label)
            both = of_runs[(of_runs["task"] == task) & (of_runs["arm"] == arm)]
            lines.append(f"{label}: {', '.join(with_deviation(both[of].to_numpy()) for of in ('area', 'final'))}")
        axes.set_title(f"{task}, {TASKS[task].updates} updates a step", fontsize=10)
        axes.set_xlabel("\n".join(["env steps", *lines]), fontsize=8)
        axes.grid(alpha=0.25)
    for axes in list(panels.flat)[len(tasks) :]:
        axes.axis("off")
    for axes in panels[:, 0]:
        axes.set_ylabel("return of an evaluation episode", fontsize=9)
    # The panel with the most arms.
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels.flat), key=lambda both: len(both[1]))
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    note = "below each panel: area (mean return over the evaluations) and final return, ± deviation of the seeds"
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def estimated_minutes(runs: Sequence[Run]) -> float:
    """CPU minutes of some runs, without evaluations."""
    seconds = 0.0
    for name, arm, _ in runs:
        task = TASKS[name]
        fits = 1 + (task.steps - task.random_steps) / (500 if arm == "dhmbpo" else 250)
        updates = task.total_updates // (task.updates if arm == "dhmbpo" else 1)
        seconds += updates * UPDATE_MS[arm] / 1000 + fits * FIT_SECONDS[arm]
    return seconds / 60


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--again", action="store_true", help="make finished runs again, too")
    parser.add_argument("--collect", action="store_true", help="start nothing")
    parser.add_argument("--estimate", action="store_true", help="start nothing, print what it would cost")
    parser.add_argument("--run", nargs=3, metavar=("TASK", "ARM", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.run:
        run = (args.run[0], args.run[1], int(args.run[2]))
        train(run, folder_of(run))
        return
    # Seeds outermost: a study that is cut has the same seeds of everything.
    runs = [(task, arm, seed) for seed in args.seeds for task in args.tasks for arm in arms_of(task) if arm in args.arms]
    waiting = [run for run in runs if args.again or not (is_finished(run) or in_csv(run))]
    if args.estimate:
        print(f"{len(waiting)} of {len(runs)} runs are to be made, about {estimated_minutes(waiting):.0f} CPU minutes")
        return
    if not args.collect:
        print(f"{len(waiting)} of {len(runs)} runs, about {estimated_minutes(waiting):.0f} CPU minutes", flush=True)
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(make, waiting))
    rows = collect()
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows.to_csv(RESULTS / EVALUATIONS, index=False)
    draw(rows, RESULTS / "no_harm.png")
    print(table(rows))
    pages.put_table(pages.PAGE, "no_harm", areas(rows))
    pages.put_table(pages.BENCHMARKS / "notes" / "beside_sac.md", "no_harm", table(rows))


if __name__ == "__main__":
    main()
