"""
The learning curves of docs/benchmarks/evidence: the list of runs, and what is made of them.

    python benchmarks/evidence.py make --only sac --workers 2
    python benchmarks/evidence.py make --only dhmbpo --envs Hopper-v5 --seeds 1 2
    python benchmarks/evidence.py collect
    python benchmarks/evidence.py draw

make trains what is not finished yet, the first seed of every task first; each run is one process with one thread, as in
sb3_mbpo compare. collect writes curves.csv and manifest.csv. A run that is not finished is collected as far as it went, with
finished = 0 in the manifest; runs in these files that are not in the logs stay. draw makes the figure and prints the table.
"""

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

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
SOURCE = "Dashed: results of github.com/4kubo/erl_lib\n(arXiv 2512.15439), on older versions of the tasks"
COLOURS = {"SAC": "tab:blue", "DHMBPO": "tab:red", "MBPO": "tab:green"}
SHOWN = 50_000
AT = (10_000, 20_000, 30_000, 50_000)
# Evaluations that say how steady a run is at its end.
LAST = 5


def published(rows: Iterable[Row]) -> dict[tuple[str, str], Curve]:
    """
    :param rows: of published_curves.csv
    :return: by method, as the figure calls it, and our version of the task
    """
    found: dict[tuple[str, str], Curve] = defaultdict(dict)
    for row in rows:
        found[PUBLISHED[row["method"]], f"{row['task']}-v5"][int(row["env_step"])] = float(row["mean_return"])
    return found


def table(rows: Sequence[Row], manifest: Iterable[Row], theirs: Mapping[tuple[str, str], Curve]) -> str:
    """
    :param rows: of curves.csv
    :param manifest: of manifest.csv
    :param theirs: published curves
    :return: Markdown: mean returns over the seeds that came so far, their number where it is not that of all, the mean and the
        worst of each seed's last five evaluations, and CPU seconds for 1,000 steps; beside the published ones
    """
    about = {key_of(row): row for row in manifest}
    heads = ["seeds (finished)", *(f"at {step:,}" for step in AT), "last five: mean", "worst"]
    heads += ["CPU s per 1,000 steps", "of evaluation"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    ours = seeds_of(rows, "avg_return")
    for env in TASKS:
        lines.append(f"| **{env}** |" + " |" * len(heads))
        for (name, task), seeds in ours.items():
            if task == env:
                runs = [about[name, task, seed] for seed in seeds]
                cells = [f"{len(runs)} ({sum(run['finished'] == '1' for run in runs)})", *at_steps(list(seeds.values()))]
                ends = [list(curve.values())[-LAST:] for curve in seeds.values()]
                cells += [f"{fmean(map(fmean, ends)):,.0f}", f"{min(map(min, ends)):,.0f}"]
                cells += [f"{fmean(1000 * float(run[key]) / float(run['steps']) for run in runs):.0f}" for key in SO_FAR[2:]]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        for (name, task), curve in theirs.items():
            if task == env:
                lines.append(f"| {name} | | " + " | ".join(at_steps([curve])) + " |" * 5)
    return "\n".join(lines)


def at_steps(curves: Sequence[Curve], steps: Sequence[int] = AT) -> list[str]:
    """:return: for each of the steps the mean of the curves that came so far, and of how many if not of all"""
    cells = []
    for step in steps:
        values = [curve[step] for curve in curves if step in curve]
        cells.append(f"{fmean(values):,.0f}" if values else "")
        cells[-1] += f" (of {len(values)})" if 0 < len(values) < len(curves) else ""
    return cells


def draw(docs: Path) -> None:
    """
    Return against env steps: each seed a thin line, their mean a thick one as far as all came, published curves dashed.

    :param docs: where the CSV files are, and the figure goes
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, manifest = read(docs / "curves.csv"), read(docs / "manifest.csv")
    theirs = published(read(docs / "published_curves.csv"))
    ours = seeds_of(rows, "avg_return")
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    labels: dict[str, Any] = {}
    for axes, env in zip(panels.flat, TASKS, strict=False):
        for (name, task), seeds in ours.items():
            if task != env or name not in COLOURS:
                continue
            for curve in seeds.values():
                (line,) = axes.plot(list(curve), list(curve.values()), color=COLOURS[name], alpha=0.35, linewidth=1)
            curve = mean(seeds.values())
            if curve:
                (line,) = axes.plot(list(curve), list(curve.values()), color=COLOURS[name], linewidth=2.2)
            labels[name] = line
        for (name, task), curve in theirs.items():
            if task == env:
                shown = {step: value for step, value in curve.items() if step <= SHOWN}
                colour = COLOURS[name.partition(",")[0]]
                (labels[name],) = axes.plot(list(shown), list(shown.values()), "--", color=colour, linewidth=1.4)
        counts = ", ".join(f"{name} {len(ours[name, env])}" for name in COLOURS if (name, env) in ours) or "none"
        axes.set(title=f"{env} (seeds: {counts})", xlabel="env steps", ylabel="return", xlim=(0, SHOWN))
        axes.grid(alpha=0.25)
    last = panels.flat[-1]
    last.axis("off")
    last.legend(labels.values(), labels.keys(), frameon=False, loc="center", title=SOURCE)
    figure.savefig(docs / "curves.png", dpi=110)
    plt.close(figure)
    print(table(rows, manifest, theirs))


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
        draw(DOCS)


if __name__ == "__main__":
    main(sys.argv[1:])
