"""
Draw docs/benchmarks/*.png and print the values and the table of speed in docs/benchmarks/notes, from the CSV files.

    python benchmarks/figures.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
TITLES = {
    "inverted_pendulum": "InvertedPendulum-v5",
    "pendulum": "Pendulum-v1",
    "hazard": "HiddenHazard-v0",
    "no_past": "NoPast-v0: nothing to learn for a model",
    "hopper": "Hopper-v5, 5 updates a step",
    "hopper_paper": "Hopper-v5, settings of the paper",
    "targets_pendulum": "Pendulum-v1, other targets",
    "targets_inverted_pendulum": "InvertedPendulum-v5, other targets",
    "rollouts_pendulum": "Pendulum-v1, 100,000 imagined transitions a refill",
    "rollouts_half_cheetah": "HalfCheetah-v5, 100,000 imagined transitions a refill",
    "bound_pendulum": "Pendulum-v1, other bounds on a fit",
    "bound_inverted_pendulum": "InvertedPendulum-v5, other bounds on a fit",
}
# Studies of one setting: prefix -> what the default, as it was then, is called beside the others
DEFAULTS = {"targets_": "delta, normalised (default)", "bound_": "1,000 updates", "rollouts_": "1 step from visited states"}
# study -> arm -> seed -> step -> returns of the episodes
Runs = dict[str, dict[str, dict[int, dict[int, list[float]]]]]


def read() -> Runs:
    runs: Runs = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    with (DOCS / "learning.csv").open() as file:
        for row in csv.DictReader(file):
            runs[row["study"]][row["arm"]][int(row["seed"])][int(row["step"])].append(float(row["return"]))
    return runs


def draw(study: str, arms: dict[str, dict[int, dict[int, list[float]]]]) -> None:
    """Each seed a thin line of means over the evaluated episodes, their mean a thick one as far as all seeds go."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, (arm, seeds) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], arms.items(), strict=False):
        curves = [{step: float(np.mean(returns)) for step, returns in steps.items()} for steps in seeds.values()]
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.35, linewidth=1)
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [np.mean([curve[step] for curve in curves]) for step in common]
        axes.plot(common, mean, color=colour, linewidth=2.2, label=f"{arm} ({len(curves)} seed{'s' * (len(curves) > 1)})")
    axes.set(title=TITLES[study], xlabel="real environment steps", ylabel="return of deterministic episodes")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(DOCS / f"{study}.png", dpi=120)
    plt.close(figure)


def speed_table() -> None:
    """Least, median and greatest ratio of each row of speed.csv."""
    measured: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with (DOCS / "speed.csv").open() as file:
        for row in csv.DictReader(file):
            measured[row["row"], row["measure"], row["target"], row["threads"], row["date"]].append(row)
    print("\n| row | measure | threads | rounds | ours | theirs | ratio | wanted |\n|---|---|---|---|---|---|---|---|")
    for (name, measure, target, threads, _), rows in measured.items():
        ours, theirs, ratios = ([float(row[key]) for row in rows] for key in ("ours", "theirs", "ratio"))
        spread = " - ".join(f"{value:.3g}" for value in (min(ratios), float(np.median(ratios)), max(ratios)))
        sides = f"{np.median(ours):.4g} | {np.median(theirs):.4g}"
        print(f"| `{name}` | {measure} | {threads} | {len(rows)} | {sides} | {spread} | {target} |")


def main() -> None:
    speed_table()
    runs = read()
    for study, arms in runs.items():
        for prefix, name in DEFAULTS.items():
            default = runs.get(study.removeprefix(prefix))
            if study.startswith(prefix) and default is not None:
                arms = {name: default["MBPO"], **arms}
        draw(study, arms)
        print(f"\n{TITLES[study]}")
        for arm, seeds in arms.items():
            for seed, steps in seeds.items():
                shown = [step for step in steps if step % 500 == 0]
                print(f"  {arm}, seed {seed}: " + " · ".join(f"{step:,}: {np.mean(steps[step]):.0f}" for step in shown))


if __name__ == "__main__":
    main()
