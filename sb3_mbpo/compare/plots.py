"""
Figures of a comparison: return against env steps and against wall-clock time.

    python -m sb3_mbpo.compare.plots results.csv [FOLDER]

One figure per env is saved as PNG and SVG. Lines are interquartile means over seeds, bands are 95 % bootstrap intervals.
"""

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_mbpo.compare.html import COLOURS
from sb3_mbpo.compare.run import as_file_name
from sb3_mbpo.runtime.extras import needs

with needs("compare", "sb3_mbpo.compare.plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    from sb3_mbpo.compare.aggregates import against_minutes, interval, iqm, score_table

# Line styles of the first, second and third use of the colors.
STYLES = ("-", "--", ":")
# With fewer seeds, each seed is plotted as well, because an interval would hide how few they are.
FEW_SEEDS = 3


def look(i: int) -> dict[str, Any]:
    """:return: color and line style of the i-th algorithm"""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def draw_curve(axes: Axes, x, returns, style: dict[str, Any]) -> None:
    """Plot a learning curve with its interval: ``x`` is ``(points,)``, ``returns`` is ``(runs, points)``."""
    axes.plot(x, iqm(returns), linewidth=2, **style)
    if len(returns) < FEW_SEEDS:
        axes.plot(x, returns.T, linewidth=0.8, alpha=0.5, **style)
    axes.fill_between(x, *interval(returns), color=style["color"], alpha=0.18, linewidth=0)


def draw(rows: pd.DataFrame, env: str, threshold: float | None = None) -> Figure:
    """
    Plot the learning curves of all algorithms on one env, against env steps and against minutes.

    :param rows: results of one env, a row per episode
    :param threshold: a return to mark
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    by_step, by_minute = figure.subplots(1, 2, sharey=True)
    names, handles = [], []
    for i, (label, mine) in enumerate(rows.groupby("algorithm", sort=False)):
        table = score_table(mine)
        draw_curve(by_step, table.columns.to_numpy(), table.to_numpy(), look(i))
        draw_curve(by_minute, *against_minutes(mine), look(i))
        names.append(f"{textwrap.fill(str(label), 60)} ({len(table)} seed{'' if len(table) == 1 else 's'})")
        handles += by_step.plot([], [], linewidth=2, **look(i))
    for axes, label in ((by_step, "env steps"), (by_minute, "minutes of training (evaluation not counted)")):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.margins(x=0.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if threshold is not None:
            axes.axhline(threshold, color="0.35", linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    by_step.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    by_step.set_ylabel("return of an evaluation episode")
    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(env)
    return figure


def save_figures(rows: pd.DataFrame, folder: Path, thresholds: Mapping[str, float] | None = None) -> dict[str, Path]:
    """
    Save the figures of all envs, as PNG and as SVG.

    :param thresholds: returns to mark, by env
    :return: the PNG files, by env
    """
    pictures = {}
    for env in rows["env"].unique():
        figure = draw(rows[rows["env"] == env], env, (thresholds or {}).get(env))
        pictures[env] = folder / f"{as_file_name(env)}.png"
        figure.savefig(pictures[env], dpi=150)
        # Without the date, the file of an unchanged figure does not change.
        figure.savefig(pictures[env].with_suffix(".svg"), metadata={"Date": None})
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of a comparison.")
    parser.add_argument("results", type=Path, help="results.csv of the comparison")
    parser.add_argument("folder", type=Path, nargs="?", help="where they are saved (default: that of results.csv)")
    args = parser.parse_args()
    for picture in save_figures(pd.read_csv(args.results), args.folder or args.results.parent).values():
        print(picture)


if __name__ == "__main__":
    main()
