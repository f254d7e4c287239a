"""
The learning curves of docs/benchmarks/evidence: the list of runs, and what is made of them.

    python benchmarks/evidence.py make --only sac --workers 2
    python benchmarks/evidence.py make --only dhmbpo --envs Hopper-v5 --seeds 1 2
    python benchmarks/evidence.py collect
    python benchmarks/evidence.py draw

make trains what is not finished yet, the first seed of every task first; each run is one process with one thread, as in
sb3_mbpo compare. collect writes curves.csv and manifest.csv. A run that is not finished is collected as far as it went, with
finished = 0 in the manifest; runs in these files that are not in the logs stay. draw makes the figures, prints the table and
puts it into docs/benchmarks/index.md, and its first two tasks into README.md.
"""

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import pages

from sb3_mbpo.compare.run import ARGUMENTS, EVALUATIONS, FINISHED, PROVENANCE, Run, record

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs" / "evidence"
DOCS = ROOT / "docs" / "benchmarks" / "evidence"

# The observations of the paper: the body's alone, 27 dimensions of Ant-v5 and 45 of Humanoid-v5.
BODY_ONLY = {
    "Ant-v5": ["include_cfrc_ext_in_observation:False"],
    "Humanoid-v5": [f"include_{name}_in_observation:False" for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")],
}
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
# Tasks of the figure and the table in README.md.
README_TASKS = TASKS[:2]
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
    "dhmbpo": Study("DHMBPO", "dhmbpo", {}, 50_000, 3),
    "mbpo_hopper": Study("MBPO", "mbpo", {}, 30_000, 2, TASKS[:1]),
    "mbpo_half_cheetah": Study("MBPO", "mbpo", {}, 15_000, 1, TASKS[1:2]),
    "sac": Study("SAC", "sac", {}, 50_000, 3, conf_file=DEFAULTS),
    "sac_300k": Study("SAC, long", "sac", {}, 300_000, 1, eval_freq=5_000, conf_file=DEFAULTS),
    "sac_20": Study("SAC, 20 updates", "sac", {"gradient_steps": 20}, 20_000, 1, TASKS[:2], conf_file=DEFAULTS),
    "tqc": Study("TQC", "tqc", {}, 20_000, 1, TASKS[:2], conf_file=DEFAULTS),
    "crossq": Study("CrossQ", "crossq", {}, 20_000, 1, TASKS[:2], conf_file=DEFAULTS),
}
EPISODES = 5


def runs(only: Sequence[str] = tuple(STUDIES), envs: Sequence[str] = TASKS, seeds: Sequence[int] | None = None) -> list[Run]:
    """
    :param only: studies
    :param envs: tasks
    :param seeds: which ones; ``None``: all
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
        if seed < STUDIES[key].seeds and env in envs and (seeds is None or seed in seeds)
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
    from sb3_mbpo.compare import cli as compare
    from sb3_mbpo.compare.progress import RunProgress
    from sb3_mbpo.compare.workers import LocalWorkers

    wanted = list(wanted)
    missing = [run for run in wanted if not run.is_finished(logs / run.folder)]
    logs.mkdir(parents=True, exist_ok=True)
    with RunProgress(len(wanted), len(wanted) - len(missing), logs) as progress:
        failures = compare.make(missing, LocalWorkers(logs, workers), progress)
    if failures:
        raise SystemExit("\n".join(f"{run}: {failure}" for run, failure in failures.items()))


Row = dict[str, str]
# exp_name, env_name, seed
Key = tuple[str, str, int]
# As in the published results of other projects; avg_return is the mean over the episodes of an evaluation.
CURVES = ("exp_name", "env_name", "seed", "metric", "env_step", "value")
MEANS = {"return": "avg_return", "length": "avg_length"}
SO_FAR = ("seconds", "evaluation_seconds", "cpu_seconds", "evaluation_cpu_seconds")
MANIFEST = (
    *("exp_name", "env_name", "seed", "finished", "steps", "steps_wanted", *SO_FAR, "commit", "algo", "conf_file", "settings"),
    *("env_kwargs", "eval_freq", "eval_episodes", "threads", "versions", "hardware", "ended"),
)


def read(path: Path) -> list[Row]:
    """:return: the rows of a CSV, which need not be there"""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def key_of(row: Row) -> Key:
    return row["exp_name"], row["env_name"], int(row["seed"])


def long_rows(key: Key, evaluations: Iterable[Row]) -> list[Row]:
    """
    :param key: of the run
    :param evaluations: a row per episode, as sb3_mbpo compare writes them; the last one may be cut
    :return: a row per evaluation and metric, in the columns ``CURVES``
    """
    steps: dict[int, list[Row]] = defaultdict(list)
    for row in evaluations:
        # A process that was killed leaves half a line.
        if all(row.get(name) for name in ("step", *MEANS, *SO_FAR)):
            steps[int(row["step"])].append(row)
    name, env, seed = key
    found: list[Row] = []
    for step, episodes in sorted(steps.items()):
        values = {metric: fmean(float(row[column]) for row in episodes) for column, metric in MEANS.items()}
        values |= {column: float(episodes[-1][column]) for column in SO_FAR}
        found += [
            dict(zip(CURVES, (name, env, str(seed), metric, str(step), f"{value:.6g}"), strict=True))
            for metric, value in values.items()
        ]
    return found


def describe(key: Key, run: Run, folder: Path, curve: Sequence[Row]) -> Row:
    """
    :param key: of the run
    :param run: what was asked for
    :param folder: of the run
    :param curve: its long rows, at least one evaluation
    :return: its row of the manifest
    """
    finished = (folder / FINISHED).exists()
    about = record(folder) if finished else json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    last = {row["metric"]: row["value"] for row in curve}
    values: dict[str, Any] = {
        **dict(zip(("exp_name", "env_name", "seed"), key, strict=True)),
        "finished": int(finished),
        "steps": max(int(row["env_step"]) for row in curve),
        "steps_wanted": run.steps,
        **{name: last[name] for name in SO_FAR},
        "commit": about["commit"],
        # Of a run that was cut, the settings are those of conf_file and these.
        "settings": json.dumps(about.get("settings", run.settings)),
        "env_kwargs": " ".join(run.env_kwargs),
        **{name: getattr(run, name) for name in ("algo", "conf_file", "eval_freq", "eval_episodes", "threads")},
        **{name: json.dumps(about[name]) for name in ("versions", "hardware")},
        "ended": about.get("finished", ""),
    }
    return {name: "" if values[name] is None else str(values[name]) for name in MANIFEST}


def further(new: Row, old: Row | None) -> bool:
    """Whether a run, by its row of the manifest, is to replace the same one that was collected before."""
    return old is None or (new["finished"], int(new["steps"])) >= (old["finished"], int(old["steps"]))


def collect(wanted: Iterable[Run], logs: Path, docs: Path) -> None:
    """
    Write curves.csv and manifest.csv.

    :param wanted: runs; those that are not in the logs, and others, stay as they were collected before
    :param logs: folder of all runs
    :param docs: where the files are
    """
    manifest = {key_of(row): row for row in read(docs / "manifest.csv")}
    curves: dict[Key, list[Row]] = defaultdict(list)
    for row in read(docs / "curves.csv"):
        curves[key_of(row)].append(row)
    for run in wanted:
        folder = logs / run.folder
        if not (folder / ARGUMENTS).exists() or Run.read(folder) != run:
            continue
        key = (STUDIES[run.label].name, run.env, run.seed)
        curve = long_rows(key, read(folder / EVALUATIONS))
        if curve and further(new := describe(key, run, folder, curve), manifest.get(key)):
            manifest[key], curves[key] = new, curve
    names = [study.name for study in STUDIES.values()]
    keys = sorted(manifest, key=lambda key: (names.index(key[0]), TASKS.index(key[1]), key[2]))
    docs.mkdir(parents=True, exist_ok=True)
    write(docs / "manifest.csv", MANIFEST, [manifest[key] for key in keys])
    write(docs / "curves.csv", CURVES, [row for key in keys for row in curves[key]])
    print(f"{len(keys)} runs, {sum(row['finished'] == '1' for row in manifest.values())} of them finished -> {docs}")


def write(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# step -> value
Curve = dict[int, float]


def seeds_of(rows: Iterable[Row], metric: str) -> dict[tuple[str, str], dict[int, Curve]]:
    """
    :param rows: of curves.csv
    :param metric: one of its metrics
    :return: by experiment and task: a curve for each seed
    """
    found: dict[tuple[str, str], dict[int, Curve]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["metric"] == metric:
            name, env, seed = key_of(row)
            found[name, env][seed][int(row["env_step"])] = float(row["value"])
    return found


def mean(curves: Iterable[Curve]) -> Curve:
    """:return: at the steps that all of them have"""
    curves = list(curves)
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {step: fmean(curve[step] for curve in curves) for step in sorted(common)}


# In published_curves.csv: method -> how the figure calls it
PUBLISHED = {"DHMBPO, UTD 1": "DHMBPO, published", "mbpo": "MBPO, published", "sac": "SAC, published"}
SOURCE = (
    "Dashed: github.com/4kubo/erl_lib (arXiv 2512.15439),\nolder versions of the tasks, wall-clock minutes of their machines"
)
COLOURS = {"DHMBPO": "tab:red", "MBPO": "tab:green", "SAC": "tab:blue", "SAC, long": "tab:cyan"}
# What the figure shows of steps and minutes.
SHOWN, MINUTES = 50_000, 75
AT = (10_000, 20_000, 30_000, 50_000)
# Returns that a run is to reach.
THRESHOLDS = {env: 5_000 if env == "HalfCheetah-v5" else 3_000 for env in TASKS}
# The seconds of shorter runs are those of random steps.
COST_FROM = 5_000
# Short: nine columns are to fit on a page.
HEADS = ("seeds", *(f"{step // 1_000}k" for step in AT), "steps to threshold", "CPU min", "CPU s per 1k")


class Published(NamedTuple):
    """
    :param seeds: how many
    :param returns: their mean
    :param minutes: wall-clock
    """

    seeds: int
    returns: Curve
    minutes: Curve


def published(rows: Iterable[Row]) -> dict[tuple[str, str], Published]:
    """
    :param rows: of published_curves.csv
    :return: by method, as the figure calls it, and our version of the task
    """
    found: dict[tuple[str, str], Published] = {}
    for row in rows:
        key = (PUBLISHED[row["method"]], f"{row['task']}-v5")
        curve = found.setdefault(key, Published(int(row["seeds"]), {}, {}))
        curve.returns[int(row["env_step"])] = float(row["mean_return"])
        curve.minutes[int(row["env_step"])] = float(row["minutes"])
    return found


def table(
    rows: Sequence[Row],
    manifest: Iterable[Row],
    theirs: Mapping[tuple[str, str], Published],
    tasks: Sequence[str] = TASKS,
) -> str:
    """
    :param rows: of curves.csv
    :param manifest: of manifest.csv
    :param theirs: published curves
    :param tasks: a block of rows for each
    :return: Markdown: mean returns over the seeds that came so far, steps and CPU minutes to the task's threshold, with the
        number of these seeds where it is not that of all; beside the published ones
    """
    about = {key_of(row): row for row in manifest}
    lines = ["| | " + " | ".join(HEADS) + " |", "|---" * (1 + len(HEADS)) + "|"]
    ours, seconds = seeds_of(rows, "avg_return"), seeds_of(rows, "cpu_seconds")
    for env in tasks:
        lines.append(f"| **{env.removesuffix('-v5')}** |" + " |" * (1 + len(AT)) + f" *{THRESHOLDS[env]:,}* | | |")
        for (name, task), seeds in ours.items():
            if task == env:
                runs = [about[name, task, seed] for seed in seeds]
                minutes = [{step: value / 60 for step, value in seconds[name, task][seed].items()} for seed in seeds]
                curves = list(seeds.values())
                cells = [count(runs), *at_steps(curves), *to_threshold(curves, minutes, THRESHOLDS[env]), cost(runs)]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        for (name, task), curve in theirs.items():
            if task == env:
                cells = [str(curve.seeds), *at_steps([curve.returns])]
                cells += [to_threshold([curve.returns], [curve.minutes], THRESHOLDS[env])[0], "", ""]
                lines.append(f"| {name.replace(', published', '†')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def count(runs: Sequence[Row]) -> str:
    """:return: the number of runs, with a star if some are not finished"""
    return str(len(runs)) + r"\*" * any(run["finished"] != "1" for run in runs)


def cost(runs: Sequence[Row]) -> str:
    """:return: CPU seconds for 1,000 steps, without evaluations"""
    costs = [1000 * float(run["cpu_seconds"]) / int(run["steps"]) for run in runs if int(run["steps"]) >= COST_FROM]
    return f"{fmean(costs):.0f}" if costs else ""


def at_steps(curves: Sequence[Curve], steps: Sequence[int] = AT) -> list[str]:
    """:return: for each of the steps the mean of the curves that came so far, and of how many if not of all"""
    cells = []
    for step in steps:
        values = [curve[step] for curve in curves if step in curve]
        cells.append(f"{fmean(values):,.0f}" if values else "")
        cells[-1] += f" ({len(values)})" if 0 < len(values) < len(curves) else ""
    return cells


def to_threshold(curves: Sequence[Curve], minutes: Sequence[Curve], threshold: float) -> tuple[str, str]:
    """
    :param curves: returns, a curve for each seed
    :param minutes: of the same seeds
    :param threshold: return
    :return: steps and minutes until the first evaluation that reaches it: medians over the seeds that do; if none does, beyond
        what the longest run has
    """
    first = [next((step for step, value in sorted(curve.items()) if value >= threshold), None) for curve in curves]
    reached = [(step, of[step]) for step, of in zip(first, minutes, strict=True) if step is not None]
    if not reached:
        return f"> {max(map(max, curves)):,}", f"> {max(max(of.values()) for of in minutes):.0f}"
    some = f" ({len(reached)})" if len(reached) < len(curves) else ""
    return f"{median(step for step, _ in reached):,.0f}{some}", f"{median(value for _, value in reached):.0f}{some}"


def draw(docs: Path, page: Path | None = None, readme: Path | None = None) -> None:
    """
    Draw the figures, and print the table.

    :param docs: where the CSV files are, and the figures go
    :param page: the table goes there, too
    :param readme: the rows of ``README_TASKS`` go there, too
    """
    rows = read(docs / "curves.csv")
    theirs = published(read(docs / "published_curves.csv"))
    manifest = {key_of(row): row for row in read(docs / "manifest.csv")}
    cut = {key for key, row in manifest.items() if row["finished"] != "1"}
    draw_curves(rows, cut, theirs, docs / "curves.png")
    draw_curves(rows, cut, theirs, docs / "readme.png", README_TASKS)
    text = table(rows, manifest.values(), theirs)
    print(text)
    if page is not None:
        pages.put_table(page, "evidence", text)
    if readme is not None:
        pages.put_table(readme, "evidence", table(rows, manifest.values(), theirs, README_TASKS))


def draw_curves(
    rows: Sequence[Row],
    cut: set[Key],
    theirs: Mapping[tuple[str, str], Published],
    path: Path,
    tasks: Sequence[str] = TASKS,
) -> None:
    """
    Return against env steps and CPU minutes: a thin line for each seed, a thick one for their mean as far as all came.

    :param rows: of curves.csv
    :param cut: runs that are not finished; a circle marks their ends
    :param theirs: published curves, dashed
    :param path: of the figure
    :param tasks: a row of the figure for each
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours, seconds = seeds_of(rows, "avg_return"), seeds_of(rows, "cpu_seconds")
    size = (9, 1.6 + 2.0 * len(tasks))
    figure, panels = plt.subplots(len(tasks), 2, figsize=size, layout="constrained", sharex="col", sharey="row")
    labels: dict[str, Any] = {}
    for pair, env in zip(panels, tasks, strict=True):
        for name, colour in COLOURS.items():
            seeds, spent = ours.get((name, env), {}), seconds.get((name, env), {})
            thick = mean(seeds.values())
            for axes, x in zip(pair, (_itself, lambda curve: [value / 60 for value in curve.values()]), strict=True):
                for seed, curve in seeds.items():
                    at, values = x(spent[seed]), list(curve.values())
                    axes.plot(at, values, color=colour, alpha=0.35, linewidth=1)
                    if (name, env, seed) in cut:
                        (end,) = axes.plot(at[-1:], values[-1:], "o", color=colour, markerfacecolor="w")
                        labels["not finished"] = end
                if thick:
                    (labels[name],) = axes.plot(x(mean(spent.values())), list(thick.values()), color=colour, linewidth=2)
            if known := theirs.get((f"{name}, published", env)):
                for axes, at in zip(pair, (_itself(known.returns), list(known.minutes.values())), strict=True):
                    (line,) = axes.plot(at, list(known.returns.values()), "--", color=colour, linewidth=1.3)
                labels[f"{name}, published"] = line
        curves = [curve for (_, task), seeds in ours.items() if task == env for curve in seeds.values()]
        curves += [known.returns for (_, task), known in theirs.items() if task == env]
        # Later values are not to flatten what is shown.
        if in_view := [value for curve in curves for step, value in curve.items() if step <= SHOWN]:
            pair[0].set_ylim(min(0, *in_view), 1.05 * max(in_view))
        pair[0].set(title=env, ylabel="return", xlim=(0, SHOWN))
        counts = ", ".join(f"{name} {len(ours[name, env])}" for name in COLOURS if (name, env) in ours)
        pair[1].set(title=f"seeds: {counts or 'none'}", xlim=(0, MINUTES))
        for axes in pair:
            axes.grid(alpha=0.25)
    panels[-1][0].set_xlabel("env steps, thousands")
    panels[-1][0].set_xticks(range(0, SHOWN + 1, 10_000), [str(step // 1_000) for step in range(0, SHOWN + 1, 10_000)])
    panels[-1][1].set_xlabel("minutes: CPU time of one core (dashed: see above)")
    order = sorted(labels, key=lambda name: (name == "not finished", name.endswith("published")))
    handles = [labels[name] for name in order]
    figure.legend(handles, order, frameon=False, loc="outside upper center", ncols=3, title=SOURCE)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _itself(curve: Curve) -> list[float]:
    """:return: the steps of a curve"""
    return list(curve)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "collect", "draw"))
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="studies (default: all)")
    parser.add_argument("--envs", nargs="+", choices=TASKS, default=list(TASKS), help="tasks (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds (default: all)")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args(arguments)
    args.logs = args.logs.resolve()
    # Settings files are named from here.
    os.chdir(ROOT)
    if args.command == "make":
        make(runs(args.only, args.envs, args.seeds), args.logs, args.workers)
    elif args.command == "collect":
        collect(runs(args.only, args.envs, args.seeds), args.logs, DOCS)
    else:
        draw(DOCS, pages.PAGE, pages.README)


if __name__ == "__main__":
    main(sys.argv[1:])
