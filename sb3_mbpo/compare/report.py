"""The report of a comparison: a table compared with a baseline, as Markdown and in a single-file HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sb3_mbpo.compare.aggregates import first_reached, interval, iqm, score_table
from sb3_mbpo.compare.html import NONE, counted, definitions, number, page, picture
from sb3_mbpo.compare.html import table as html_table

PHASES = {
    "env_and_policy_seconds": "env and policy, s",
    "updates_seconds": "updates, s",
    "fits_seconds": "model fits, s",
    "rollouts_seconds": "imagined rollouts, s",
    "evaluation_seconds": "evaluation, s",
}
TIMES = "\N{MULTIPLICATION SIGN}"
CAPTION = """Lines: interquartile mean over seeds of the mean return of an evaluation's episodes. Bands: its 95 % interval
(rliable, stratified bootstrap over seeds), if there are several seeds. Fewer than three seeds are also plotted individually.
Against wall-clock time, returns are interpolated between evaluations, up to the end of the fastest seed. Dotted line: the
threshold of the table."""
NOTE = f"""Final return: interquartile mean of the last evaluation, with its 95 % interval. To the threshold: median over all
seeds of the first evaluation whose mean reaches it; {NONE}: half of the seeds or more did not reach it. Times are means over
seeds of the training time, without evaluation."""


class Summary(NamedTuple):
    """Results of one algorithm on one env. Times are training times, infinite if the return was never reached."""

    algorithm: str
    seeds: int
    #: Interquartile mean of the last evaluation, and its 95 % interval; NaN with one seed.
    final: float
    low: float
    high: float
    #: Number of seeds that reached the threshold, and medians over all seeds of env steps and minutes to reach it.
    reached: int
    steps: float
    minutes: float
    #: Means over seeds.
    total_minutes: float
    phases: list[float]


def summarise(rows: pd.DataFrame, threshold: float) -> list[Summary]:
    """:return: a summary per algorithm, of results of one env"""
    summaries = []
    for label, mine in rows.groupby("algorithm", sort=False):
        # Use all points, so that the bootstrap draws are the same as in the figure.
        scores = score_table(mine).to_numpy()
        final, low, high = (float(line[-1]) for line in (iqm(scores), *interval(scores)))
        times = first_reached(mine, threshold)
        last = mine[mine["step"] == mine["step"].max()].groupby("seed").first()
        summaries.append(
            Summary(
                str(label),
                len(last),
                final,
                low,
                high,
                reached=int(np.isfinite(times["step"]).sum()),
                steps=float(times["step"].median()),
                minutes=float(times["seconds"].median()) / 60,
                total_minutes=float(last["seconds"].mean()) / 60,
                phases=last[list(PHASES)].mean().tolist(),
            )
        )
    return summaries


def against(baseline: float, value: float) -> str:
    """:return: ratio of ``baseline`` and ``value``, as text; empty if it is undefined"""
    if not (0 < baseline < np.inf and 0 < value < np.inf):
        return ""
    ratio = baseline / value
    return f"{ratio:.1f}{TIMES} less" if ratio >= 1 else f"{1 / ratio:.1f}{TIMES} more"


def table(
    summaries: Sequence[Summary], baseline: str | None, threshold: float
) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """:return: head, and rows of cells; each cell has a second, smaller line, which may be empty"""
    head = ["algorithm", "final return", f"steps to {number(threshold)}", "minutes to it", "minutes in all"]
    base = next((summary for summary in summaries if summary.algorithm == baseline), None)
    rows = []
    for one in summaries:
        ratios = ["", "", ""]
        if base not in (None, one):
            pairs = zip(
                (base.steps, base.minutes, base.total_minutes), (one.steps, one.minutes, one.total_minutes), strict=True
            )
            ratios = [against(theirs, ours) for theirs, ours in pairs]
        reached = f"{one.reached} of {one.seeds} seeds"
        cells = [
            (one.algorithm, counted(one.seeds, "seed") + (", baseline" if one is base else "")),
            (number(one.final), "" if np.isnan(one.low) else f"{number(one.low)} to {number(one.high)}"),
            (number(one.steps), f"{reached}; {ratios[0]}" if ratios[0] else reached),
            (number(one.minutes), ratios[1]),
            (number(one.total_minutes), ratios[2]),
        ]
        rows.append([*cells, *((number(seconds), "") for seconds in one.phases)])
    return [*head, *PHASES.values()], rows


def markdown(summaries: Sequence[Summary], baseline: str | None, threshold: float) -> str:
    """:return: the table in Markdown"""
    head, rows = table(summaries, baseline, threshold)
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[f"{big} ({small})" if small else big for big, small in cells] for cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def default_thresholds(rows: pd.DataFrame, baseline: str | None) -> dict[str, float]:
    """:return: by env, the final return of the baseline; without a baseline, the lowest final return"""
    found = {}
    for env, mine in rows.groupby("env", sort=False):
        finals = {label: float(iqm(score_table(one).to_numpy())[-1]) for label, one in mine.groupby("algorithm")}
        found[str(env)] = finals.get(baseline, min(finals.values()))
    return found


def value_text(value: Any) -> str:
    """:return: a value as text, or several values if runs differ"""
    return " or ".join(map(str, value)) if isinstance(value, list) else str(value)


def origin(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """:return: names and values of the most important entries of the manifest, HTML"""
    arguments, versions, hardware = manifest["arguments"], manifest["versions"], manifest["hardware"]
    yield "command", f"<code>{escape(str(manifest['command']))}</code>"
    yield "finished", manifest["created"]
    workers = f"up to {counted(arguments['workers'], 'run')}" if arguments["workers"] else "as many as possible"
    yield (
        "each run",
        f"{counted(arguments['steps'], 'env step')}, {counted(arguments['eval_episodes'], 'episode')} every "
        f"{counted(arguments['eval_freq'], 'step')}, {counted(arguments['threads'], 'PyTorch thread')}, {workers} at a time",
    )
    yield "versions", escape(", ".join(f"{name} {value_text(version)}" for name, version in versions.items()))
    yield "hardware", escape(", ".join(f"{name}: {value_text(value)}" for name, value in hardware.items() if value))
    yield "commit", escape(value_text(manifest["commit"] or "not from a git checkout"))
    for env, algorithms in manifest["settings"].items():
        settings = "\n".join(f"{label}: {values}" for label, values in algorithms.items())
        yield f"settings, {env}", f"<pre>{escape(settings)}</pre>"


def write_report(
    path: Path,
    rows: pd.DataFrame,
    manifest: Mapping[str, Any],
    pictures: Mapping[str, Path],
    thresholds: Mapping[str, float],
) -> None:
    """
    Write the report.

    :param path: the HTML file to write
    :param rows: all results
    :param manifest: origin of the results, see :func:`.cli.describe`
    :param pictures: PNG files by env
    :param thresholds: returns by env
    """
    arguments = manifest["arguments"]
    baseline = arguments["baseline"]
    parts = []
    if manifest["failed"]:
        failed = "".join(f"<li>{escape(run)}</li>" for run in manifest["failed"])
        parts.append(f'<div class="failed"><p>These runs failed and are not included:</p><ul>{failed}</ul></div>')
    given = arguments["threshold"] is not None
    source = "as given" if given else f"the final return of {baseline or 'the algorithm with the lowest'}"
    for env, file in pictures.items():
        summaries = summarise(rows[rows["env"] == env], thresholds[env])
        parts += [
            f"<h2>{escape(env)}</h2>",
            picture(file.read_bytes(), f"learning curves on {env}", CAPTION),
            html_table(*table(summaries, baseline, thresholds[env])),
            f'<p class="note">Threshold: {number(thresholds[env])}, {escape(source)}. {NOTE}</p>',
        ]
    parts += ["<h2>About this comparison</h2>", definitions(origin(manifest))]
    title = f"{counted(len(arguments['algo']), 'algorithm')} on {', '.join(pictures)}"
    path.write_text(page(title, parts), encoding="utf-8")
