"""What a diagnosis says, in words, figures and a table, on one page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from sb3_mbpo.compare.html import counted, definitions, number, page, picture
from sb3_mbpo.diagnostics import report_figures as figures
from sb3_mbpo.diagnostics.diagnosis import Diagnosis
from sb3_mbpo.diagnostics.metrics import root_mean_square
from sb3_mbpo.theory import optimal_rollout_length

STYLE = """
img { width: auto; max-width: 100%; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem; flex: 1 1 9rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: #555; font-size: .87rem; }
.says { max-width: 46rem; padding-left: 1.2rem; }
.says li { margin: .3rem 0; }
th:first-child, td:first-child { min-width: 5rem; }
"""
# Rows of the table, at most; the worst predicted are in it.
MOST_ROWS = 40
LIMITS = """<p class="note">Predictions are means of 19 samples of the dynamics, each step from that sample's own last one,
with the actions of the real episode. Errors are in standard deviations of each dimension over these episodes; dimensions that
never move are left out. Predictions are not clipped to the range of <code>prediction_clip_margin</code>. The states are
those of the present policy: nothing is said of others. Neighbouring steps of an episode are alike, so that there are fewer
independent ones than steps.</p>"""
LIMITS_OF_K = """<p class="note"><i>&epsilon;<sub>m</sub>&prime;</i> is a proxy. The total variation between a deterministic
simulator and any continuous model is 1, so both are blurred by Gaussian noise as large as each dimension's typical change
within one step; this convention scales k*. <i>&epsilon;<sub>&pi;</sub></i> is the mean over the visited states of the total
variation between the policies' Gaussians, where the theorem has the maximum. And Theorem 4.3 is rounded up generously. So k*
tells in which direction to go, not how far.</p>"""


@dataclass(frozen=True)
class Findings:
    """What the page is about."""

    diagnosis: Diagnosis
    #: ``(samples, episodes)``
    imagined_returns: np.ndarray
    rollout_length: int
    gamma: float
    #: eps_pi against each earlier policy; empty: none was given, or the policy is deterministic.
    shifts: Sequence[float]
    #: An animated WebP, or the end of the sentence why there is none.
    video: bytes | str

    @property
    def shift(self) -> float | None:
        return float(np.mean(self.shifts)) if self.shifts else None

    @property
    def optimal(self) -> int | None:
        """k*, if it can be told."""
        if self.shift is None or self.gamma >= 1:
            return None
        return optimal_rollout_length(model_error=self.diagnosis.model_error(), policy_shift=self.shift, gamma=self.gamma)

    @property
    def reach(self) -> int:
        """The most steps that anything can be judged after, at most the horizon: episodes may be shorter."""
        judged = np.isfinite(self.diagnosis.distances()[0]).any(axis=1)
        return int(np.flatnonzero(judged).max(initial=0)) + 1

    @property
    def useful(self) -> int | None:
        """The first step at which the median error is above half a standard deviation; ``None``: there is none."""
        beyond = np.flatnonzero(np.nanmedian(self.diagnosis.distances()[0][: self.reach], axis=1) > 0.5)
        return int(beyond[0]) + 1 if len(beyond) else None


def share(value: float) -> str:
    """:return: a share in percent, one digit where it matters"""
    return "\N{EN DASH}" if not np.isfinite(value) else f"{100 * value:.1f} %" if value > 0.9 else f"{100 * value:.0f} %"


def of_prediction(found: Findings) -> Iterator[str]:
    one, far = (found.diagnosis.numbers(k) for k in (1, found.reach))
    explained = one["r2_no_change"]
    if explained > 0:
        yield f"One step ahead, the dynamics explains {share(explained)} of what changes."
    else:
        yield "One step ahead, the dynamics predicts <b>worse than that nothing changes</b>: it should not be imagined with."
    if (k := found.useful) is not None:
        yield f"Its error (median) passes half a standard deviation after {counted(k, 'step')}."
    else:
        yield f"Its error (median) stays below half a standard deviation for all {found.reach} steps looked at."
    if one["reward_r2_mean"] > 0:
        yield f"Of the reward's variance one step ahead it explains {share(one['reward_r2_mean'])}."
    elif np.isfinite(one["reward_r2_mean"]):
        ends = any(episode.terminated for episode in found.diagnosis.episodes)
        cause = "; rewards that come with a termination count here too, and may be unlike all others" if ends else ""
        yield f"It predicts the reward one step ahead worse than a constant would{cause}."
    for k, numbers in {1: one, found.reach: far}.items():
        held = numbers["coverage_90"]
        if np.isfinite(held):
            word = "overconfident" if held < 0.84 else "too cautious" if held > 0.96 else "about right"
            yield f"After {counted(k, 'step')}, its 90 % intervals hold {share(held)} of what happened: {word}."
    if found.diagnosis.dropped:
        yield f"<b>{share(found.diagnosis.dropped)} of its predictions are not finite</b>, and are left out of all this."


def of_trust(found: Findings) -> Iterator[str]:
    rank = found.diagnosis.disagreement_rank()
    if np.isfinite(rank):
        word = "well" if rank > 0.5 else "somewhat" if rank > 0.2 else "hardly"
        yield f"The members' disagreement tells {word} where it is wrong (rank correlation {number(rank)})."
    precision, recall = found.diagnosis.termination()
    if np.isfinite(recall):
        invented = f", and {share(1 - precision)} of those it sees are none" if np.isfinite(precision) else ""
        yield f"It sees {share(recall)} of the terminations one step ahead{invented}."
    real = np.mean([episode.rewards.sum() for episode in found.diagnosis.episodes])
    if np.isfinite(found.imagined_returns).any():
        believed = number(np.nanmean(found.imagined_returns))
        yield f"It believes its policy gets {believed} an episode; really it got {number(real)}."
    error, k = found.diagnosis.model_error(), found.rollout_length
    if found.optimal is not None:
        yield (
            f"With &epsilon;<sub>m</sub>&prime; = {number(error)} and &epsilon;<sub>&pi;</sub> = {number(found.shift or 0)}, "
            f"Theorem 4.3 asks for rollouts of k* = {found.optimal:,}; in use: {k}."
        )
    elif found.gamma < 1:
        # k* >= k where gamma^(k - 1) eps_pi > eps_m'.
        needed = error / found.gamma ** (k - 1)
        pays = (
            f"once the policy has shifted by more than {number(needed)}; --earlier measures it"
            if needed < 1
            else "at no shift"
        )
        yield f"By Theorem 4.3, the rollouts in use, of {k}, pay {pays}."


def tiles(found: Findings) -> str:
    one = found.diagnosis.numbers(1)
    shown = {
        "R\N{SUPERSCRIPT TWO} of one step, against no change": number(one["r2_no_change"]),
        "steps until its error passes half a standard deviation": str(found.useful or f"over {found.reach}"),
        "of what happened is in the 90 % interval": share(one["coverage_90"]),
        "rank correlation of disagreement and error": number(found.diagnosis.disagreement_rank()),
        "k*, against the rollout length in use, "
        + str(found.rollout_length): "\N{EN DASH}" if found.optimal is None else f"{found.optimal:,}",
    }
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for what, value in shown.items())
        + "</div>"
    )


def table(found: Findings) -> str:
    """Each column's error, R^2 and coverage after one step and after as many as can be judged."""
    of = found.diagnosis
    horizons = list(dict.fromkeys((1, found.reach)))
    cells: dict[str, np.ndarray] = {"standard deviation": of.spread}
    for k in horizons:
        ahead = counted(k, "step")
        against_mean, against_no_change = of.r_squared(k)
        cells[f"error, {ahead}"] = root_mean_square(of.errors(k))
        cells[f"R\N{SUPERSCRIPT TWO}, mean, {ahead}"] = against_mean
        cells[f"R\N{SUPERSCRIPT TWO}, no change, {ahead}"] = np.concatenate([[np.nan], against_no_change])
        cells[f"in 90 %, {ahead}"] = of.coverage(k, 0.9)
    columns = np.arange(len(of.spread))
    left_out = ""
    if len(columns) > MOST_ROWS:
        badness = np.nan_to_num(root_mean_square(of.errors(1)) / of.spread, nan=-1.0)
        columns = np.sort(badness.argsort()[::-1][:MOST_ROWS])
        left_out = f'<p class="note">The {MOST_ROWS} worst predicted of {len(of.spread)}.</p>'
    head = "".join(f"<th>{title}</th>" for title in ("", *cells))
    rows = ""
    for column in map(int, columns):
        numbers = "".join(f"<td>{number(values[column])}</td>" for values in cells.values())
        rows += f"<tr><td>{figures.name(column)}</td>{numbers}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{left_out}'


def figure_sections(found: Findings) -> Iterator[str]:
    of, png = found.diagnosis, figures.png
    yield "<h2>How errors compound</h2>"
    caption = "Median over start states, and bands of 50 and 90 % of them, of the open-loop prediction with the real actions."
    yield picture(png(figures.fan(of, found.rollout_length)), "png", "error against steps ahead", caption)
    yield "<h2>Predicted and real</h2>"
    caption = "From the start of the first episode, with its actions: median, 50 and 90 % of the samples. "
    caption += "Of many dimensions, the twelve worst predicted."
    yield picture(png(figures.trajectories(of)), "png", "trajectories, predicted and real", caption)
    yield "<h2>A real episode and the imagined one</h2>"
    if isinstance(found.video, bytes):
        caption = "The same start, the same actions. The imagined one is a single sample, each step from its own last one."
        yield picture(found.video, "webp", "two episodes side by side", caption)
    else:
        yield f'<p class="note">No video: {escape(found.video)}.</p>'
    yield "<h2>Does it know what it does not know?</h2>"
    caption = "How often central intervals hold what happened. Thick: mean over the dimensions of the observation. "
    caption += "Thin: each of them, and the reward. Below the diagonal: overconfident."
    yield picture(png(figures.calibration(of, found.reach)), "png", "observed against nominal coverage", caption)
    yield "<h2>Where it is wrong</h2>"
    caption = "Error of one step, in standard deviations, over the two dimensions along which it differs most."
    yield picture(png(figures.where(of)), "png", "error over the state space", caption)
    yield "<h2>Imagined and real returns</h2>"
    caption = "Whole episodes of the present policy from the same first states, 19 imagined from each; without discount."
    real = [float(episode.rewards.sum()) for episode in of.episodes]
    yield picture(png(figures.returns(real, found.imagined_returns)), "png", "returns, imagined and real", caption)
    yield "<h2>How long should rollouts be?</h2>"
    if found.gamma < 1:
        caption = f"k* for &epsilon;<sub>m</sub>&prime; = {number(of.model_error())} and &gamma; = {found.gamma:g}."
        chart = figures.lengths(of.model_error(), found.gamma, found.rollout_length, found.shifts)
        yield picture(png(chart), "png", "optimal rollout length against policy shift", caption)
        yield LIMITS_OF_K
    else:
        yield '<p class="note">Without discount the theorem has no finite bound.</p>'


def write_page(path: Path, found: Findings, about: Mapping[str, str]) -> None:
    """
    :param path: the HTML file
    :param about: where it comes from, names and texts; ``"env"`` is one
    """
    if found.diagnosis.dropped == 1:
        parts = ['<p class="failed">No prediction of this dynamics is finite: there is nothing to show.</p>']
    else:
        says = "".join(f"<li>{one}</li>" for one in (*of_prediction(found), *of_trust(found)))
        parts = [
            tiles(found),
            f'<ul class="says">{says}</ul>',
            *figure_sections(found),
            "<h2>Each dimension</h2>",
            table(found),
            LIMITS,
        ]
    parts += ["<h2>Where this comes from</h2>", definitions((name, escape(text)) for name, text in about.items())]
    path.write_text(page(f"How far may this model be believed? {about['env']}", parts, STYLE), encoding="utf-8")
