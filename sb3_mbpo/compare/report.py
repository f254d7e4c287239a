"""What a comparison says: a table against a baseline, as Markdown and within a page of HTML that needs no other file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sb3_mbpo.compare.aggregates import first_reached, interval, iqm, score_table
from sb3_mbpo.compare.html import NONE, counted, definitions, number, page, picture

PHASES = {
    "env_and_policy_seconds": "env and policy, s",
    "updates_seconds": "updates, s",
    "fits_seconds": "model fits, s",
    "rollouts_seconds": "imagined rollouts, s",
    "evaluation_seconds": "evaluation, s",
}
TIMES = "\N{MULTIPLICATION SIGN}"
CAPTION = """Lines: interquartile mean over seeds of the mean return of an evaluation's episodes; bands: its 95 % interval
(rliable, stratified bootstrap over seeds), which one seed does not have. Fewer than three seeds are also drawn one by one.
Against wall-clock, returns are interpolated between evaluations on a common grid that ends where the fastest seed ends.
Dotted: the threshold of the table."""
NOTE = f"""Final return: interquartile mean of the last evaluation, with its 95 % interval. To the threshold: median over all
seeds of the first evaluation with such a mean; {NONE}: half of the seeds or more did not get there. Times are those of
training, means over seeds; evaluation comes on top."""


@dataclass
class Summary:
    """One algorithm on one env. Times are those of training; a return never reached takes infinitely long."""

    algorithm: str
    seeds: int
    #: Interquartile mean of the last evaluation, and its 95 % interval; NaN with one seed.
    final: float
    low: float
    high: float
    #: Seeds that reached the threshold; median over all seeds of env steps and minutes until then.
    reached: int
    steps: float
    minutes: float
    #: Means over seeds.
    total_minutes: float
    phases: dict[str, float]


def final_return(rows: pd.DataFrame) -> tuple[float, float, float]:
    """
    :param rows: results of one algorithm on one env
    :return: interquartile mean of the last evaluation, lower and upper end of its 95 % interval
    """
    # All points, though one is wanted: the same draws as in the figure.
    scores = score_table(rows).to_numpy()
    low, high = interval(scores)
    return float(iqm(scores)[-1]), float(low[-1]), float(high[-1])


def summarise(rows: pd.DataFrame, threshold: float) -> list[Summary]:
    """
    :param rows: results of one env
    :param threshold: a return
    """
    summaries = []
    for label in rows["algorithm"].unique():
        mine = rows[rows["algorithm"] == label]
        times = first_reached(mine, threshold)
        last = mine[mine["step"] == mine["step"].max()].groupby("seed").first()
        summaries.append(
            Summary(
                label,
                len(last),
                *final_return(mine),
                reached=int(np.isfinite(times["step"]).sum()),
                steps=float(times["step"].median()),
                minutes=float(times["seconds"].median()) / 60,
                total_minutes=float(last["seconds"].mean()) / 60,
                phases={name: float(last[column].mean()) for column, name in PHASES.items()},
            )
        )
    return summaries


def against(baseline: float, value: float) -> str:
    """:return: how many times less ``value`` is than ``baseline``"""
    if not (np.isfinite(baseline) and np.isfinite(value) and baseline > 0 and value > 0):
        return ""
    ratio = baseline / value
    return f"{ratio:.1f}{TIMES} less" if ratio >= 1 else f"{1 / ratio:.1f}{TIMES} more"


def table(summaries: list[Summary], baseline: str | None, threshold: float) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """
    :param baseline: the algorithm that the others are held against
    :return: head, and rows of cells; each cell has a second, smaller line, which may be empty
    """
    head = ["algorithm", "final return", f"steps to {number(threshold)}", "minutes to it", "minutes in all"]
    head += PHASES.values()
    base = next((summary for summary in summaries if summary.algorithm == baseline), None)
    rows = []
    for one in summaries:
        apart = base is not None and one is not base
        reached = f"{one.reached} of {one.seeds} seeds"
        steps = against(base.steps, one.steps) if base and apart else ""
        cells = [
            (one.algorithm, counted(one.seeds, "seed") + (", baseline" if one is base else "")),
            (number(one.final), "" if np.isnan(one.low) else f"{number(one.low)} to {number(one.high)}"),
            (number(one.steps), f"{reached}; {steps}" if steps else reached),
            (number(one.minutes), against(base.minutes, one.minutes) if base and apart else ""),
            (number(one.total_minutes), against(base.total_minutes, one.total_minutes) if base and apart else ""),
            *((number(seconds), "") for seconds in one.phases.values()),
        ]
        rows.append(cells)
    return head, rows


def markdown(summaries: list[Summary], baseline: str | None, threshold: float) -> str:
    head, rows = table(summaries, baseline, threshold)
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[f"{big} ({small})" if small else big for big, small in cells] for cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_table(summaries: list[Summary], baseline: str | None, threshold: float) -> str:
    head, rows = table(summaries, baseline, threshold)
    titles = "".join(f"<th>{escape(title).replace(', ', ',&nbsp;')}</th>" for title in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(big)}<small>{escape(small)}</small></td>" for big, small in cells) + "</tr>\n"
        for cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def default_thresholds(rows: pd.DataFrame, baseline: str | None) -> dict[str, float]:
    """
    :param rows: all results
    :return: by env, the final return of the baseline; without one, the lowest of all
    """
    found = {}
    for env, mine in rows.groupby("env", sort=False):
        finals = {label: float(iqm(score_table(one).to_numpy())[-1]) for label, one in mine.groupby("algorithm")}
        found[str(env)] = finals.get(baseline, min(finals.values()))
    return found


def value_text(value: Any) -> str:
    """:return: a value, or several where runs differ"""
    return " or ".join(map(str, value)) if isinstance(value, list) else str(value)


def origin(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The manifest's essentials: names, and HTML."""
    arguments, versions, hardware = manifest["arguments"], manifest["versions"], manifest["hardware"]
    said = {
        "command": f"<code>{escape(str(manifest['command']))}</code>",
        "finished": manifest["created"],
        "each run": f"{counted(arguments['steps'], 'env step')}, {counted(arguments['eval_episodes'], 'episode')} every "
        f"{counted(arguments['eval_freq'], 'step')}, {counted(arguments['threads'], 'PyTorch thread')}, "
        f"{'up to ' + counted(arguments['workers'], 'run') if arguments['workers'] else 'as many as fit'} at a time",
        "versions": escape(", ".join(f"{name} {value_text(version)}" for name, version in versions.items())),
        "hardware": escape(", ".join(f"{name}: {value_text(value)}" for name, value in hardware.items() if value)),
        "commit": escape(value_text(manifest["commit"] or "not from a git checkout")),
    }
    yield from said.items()
    for env, algorithms in manifest["settings"].items():
        settings = "\n".join(f"{label}: {values}" for label, values in algorithms.items())
        yield f"settings, {escape(env)}", f"<pre>{escape(settings)}</pre>"


def write_report(
    path: Path,
    rows: pd.DataFrame,
    manifest: Mapping[str, Any],
    pictures: Mapping[str, Path],
    thresholds: Mapping[str, float],
) -> None:
    """
    :param path: the HTML file
    :param rows: all results
    :param manifest: where they come from; of its arguments ``baseline`` is read as well
    :param pictures: PNGs, by env
    :param thresholds: returns, by env
    """
    baseline = manifest["arguments"]["baseline"]
    parts = []
    if manifest["failed"]:
        failed = "".join(f"<li>{escape(run)}</li>" for run in manifest["failed"])
        parts.append(f'<div class="failed"><p>Not in these numbers, because they failed:</p><ul>{failed}</ul></div>')
    for env, file in pictures.items():
        summaries = summarise(rows[rows["env"] == env], thresholds[env])
        chosen = manifest["arguments"]["threshold"] is not None
        source = "as asked" if chosen else f"the final return of {baseline or 'the algorithm with the lowest'}"
        parts += [
            f"<h2>{escape(env)}</h2>",
            picture(file.read_bytes(), "png", f"learning curves on {env}", CAPTION),
            html_table(summaries, baseline, thresholds[env]),
            f'<p class="note">Threshold: {number(thresholds[env])}, {escape(source)}. {NOTE}</p>',
        ]
    parts += ["<h2>Where this comes from</h2>", definitions(origin(manifest))]
    title = f"{counted(len(manifest['arguments']['algo']), 'algorithm')} on {', '.join(pictures)}"
    path.write_text(page(title, parts), encoding="utf-8")
