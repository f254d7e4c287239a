"""The page of a diagnosis, with text, figures and a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sb3_mbpo.compare.html import NONE, counted, definitions, number, page, picture, table
from sb3_mbpo.diagnostics import report_figures as figures
from sb3_mbpo.diagnostics.diagnosis import Diagnosis
from sb3_mbpo.diagnostics.metrics import root_mean_square
from sb3_mbpo.theory import optimal_rollout_length

STYLE = """
img { width: auto; max-width: 100%; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid light-dark(#ddd, #444); border-radius: 6px; padding: .6rem 1rem; }
.tile { flex: 1 1 9rem; box-sizing: border-box; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: light-dark(#555, #aaa); font-size: .87rem; }
.says { max-width: 46rem; padding-left: 1.2rem; }
.says li { margin: .3rem 0; }
th:first-child, td:first-child { min-width: 5rem; }
"""
# Maximum number of rows of the table, which then shows the worst predicted dimensions.
MOST_ROWS = 40
SQUARED = "\N{SUPERSCRIPT TWO}"
# The keys of the log.
EXPLAINED = ("<code>dynamics/explained_reward</code>", "<code>dynamics/explained_obs</code>")
LIMITS = """<p class="note">The two <code>explained</code> numbers are those of the log. They are measured before each fit on
the training steps since the fit before (at the first fit, on held-out ones), and compare the dynamics with the best constant
prediction. Everything else is measured on new episodes with sampled actions. Predictions are means of 19 sampled
trajectories of the dynamics, with the actions of the real episode. Errors are in standard deviations of each dimension over
these episodes; constant dimensions are left out. Predictions are not clipped to the range of
<code>prediction_clip_margin</code>. The states are those of the current policy, and the errors may be different for other
states. Successive steps of an episode are similar, so there are fewer independent steps than steps.</p>"""
LIMITS_OF_K = """<i>&epsilon;<sub>m</sub>&prime;</i> is a proxy. The total variation between a deterministic
simulator and any continuous model is 1, so Gaussian noise as large as each dimension's typical change in one step is added to
both; k* depends on this convention. <i>&epsilon;<sub>&pi;</sub></i> is the mean over the visited states of the total variation
between the policies' Gaussians, while the theorem uses the maximum. Theorem 4.3 itself is a loose bound. So k* shows whether
to increase or decrease k, but not by how much."""


@dataclass(frozen=True)
class Findings:
    """The content of the page."""

    diagnosis: Diagnosis
    #: Of sampled actions, from the first states of the episodes, ``(samples, episodes)``.
    imagined_returns: np.ndarray
    #: Real returns of deterministic actions.
    deterministic_returns: Sequence[float]
    #: Whether deterministic actions come from an average of the actor's weights.
    averaged_actor: bool
    #: ``dynamics/explained_reward`` and ``dynamics/explained_obs`` of the last fit.
    explained: Sequence[float]
    #: What ends imagined episodes: ``"learned"``, ``"known"``, or ``"given"`` by the user.
    termination: str
    #: k; of an algorithm with training rollouts, their number of steps.
    rollout_length: int
    #: Whether Theorem 4.3 is about this algorithm: it learns from imagined rewards on rollouts of k steps.
    theorem: bool
    gamma: float
    #: eps_pi from each earlier policy; empty if none was given, or if the policy is deterministic.
    shifts: Sequence[float]
    #: An animated WebP, or the reason why there is none, as the end of a sentence.
    video: bytes | str

    @property
    def sampled_returns(self) -> list[float]:
        """Real returns of sampled actions."""
        return [float(episode.rewards.sum()) for episode in self.diagnosis.episodes]

    @property
    def shift(self) -> float | None:
        return float(np.mean(self.shifts)) if self.shifts else None

    @property
    def optimal(self) -> int | None:
        """k*; ``None`` if it cannot be determined."""
        if not self.theorem or self.shift is None or self.gamma >= 1:
            return None
        return optimal_rollout_length(model_error=self.diagnosis.model_error(), policy_shift=self.shift, gamma=self.gamma)

    @property
    def reach(self) -> int:
        """The largest number of steps with a prediction to evaluate: the horizon, or less if episodes are shorter."""
        judged = np.isfinite(self.diagnosis.distances()[0]).any(axis=1)
        return int(np.flatnonzero(judged).max(initial=0)) + 1

    @property
    def useful(self) -> int | None:
        """The first step at which the median error exceeds half a standard deviation; ``None`` if there is none."""
        beyond = np.flatnonzero(np.nanmedian(self.diagnosis.distances()[0][: self.reach], axis=1) > 0.5)
        return int(beyond[0]) + 1 if len(beyond) else None


def logged(value: float) -> str:
    """:return: a number as SB3's logger prints it"""
    return f"{value:.3g}" if np.isfinite(value) else NONE


def share(value: float) -> str:
    """:return: a fraction in percent, with one decimal above 90 %"""
    return NONE if not np.isfinite(value) else f"{100 * value:.1f} %" if value > 0.9 else f"{100 * value:.0f} %"


def of_prediction(found: Findings) -> Iterator[str]:
    one, far = (found.diagnosis.numbers(k) for k in (1, found.reach))
    if np.isfinite(found.explained[1]):
        reward, obs = map(logged, found.explained)
        yield (
            f"During training, {EXPLAINED[1]} was {obs} at the last fit, and {EXPLAINED[0]} was {reward}. These are fractions "
            "of variance, as in the log."
        )
    if one["r2_no_change"] > 0:
        against = number(one["r2_no_change"])
        yield f"One step ahead on the new episodes, the R{SQUARED} of the dynamics compared with no change is {against}."
    else:
        yield "One step ahead on the new episodes, the dynamics is <b>worse than predicting no change</b>."
    if (k := found.useful) is not None:
        yield f"Its median error exceeds half a standard deviation after {counted(k, 'step')}."
    else:
        yield f"Its median error stays below half a standard deviation for all {found.reach} steps."
    if one["reward_r2_mean"] > 0:
        yield f"The R{SQUARED} of the reward one step ahead is {number(one['reward_r2_mean'])}."
    elif np.isfinite(one["reward_r2_mean"]):
        ends = any(episode.terminated for episode in found.diagnosis.episodes)
        cause = "; this includes rewards of terminal transitions, which may differ from all others" if ends else ""
        yield f"It predicts the reward one step ahead worse than a constant would{cause}."
    for k, numbers in {1: one, found.reach: far}.items():
        held = numbers["coverage_90"]
        if np.isfinite(held):
            word = "overconfident" if held < 0.84 else "too cautious" if held > 0.96 else "about right"
            yield f"After {counted(k, 'step')}, its 90 % intervals contain {share(held)} of the real values: {word}."
    if found.diagnosis.dropped:
        yield f"<b>{share(found.diagnosis.dropped)} of its predictions are not finite</b>, and are left out of this report."


def of_trust(found: Findings) -> Iterator[str]:
    rank = found.diagnosis.disagreement_rank()
    if np.isfinite(rank):
        word = "clearly" if rank > 0.5 else "somewhat" if rank > 0.2 else "hardly"
        yield f"The members' disagreement {word} predicts its errors (rank correlation {number(rank)})."
    precision, recall = found.diagnosis.termination()
    if found.termination == "known":
        yield "Imagined episodes end by the env's own rule, which is known."
    elif found.termination == "given":
        yield "Imagined episodes end by the given <code>termination_fn</code>."
    elif np.isfinite(recall):
        invented = f", and {share(1 - precision)} of its predicted ends are wrong" if np.isfinite(precision) else ""
        yield f"The learned termination predicts {share(recall)} of the ends one step ahead{invented}."
    error, k = found.diagnosis.model_error(), found.rollout_length
    if found.optimal is not None:
        yield (
            f"With &epsilon;<sub>m</sub>&prime; = {number(error)} and &epsilon;<sub>&pi;</sub> = {number(found.shift or 0)}, "
            f"the optimal rollout length of Theorem 4.3 is k* = {found.optimal:,}; the current one is {k}."
        )
    elif found.theorem and found.gamma < 1:
        # k* >= k if gamma^(k - 1) eps_pi > eps_m'.
        needed = error / found.gamma ** (k - 1)
        useful = f"if the policy shift is larger than {number(needed)}; earlier checkpoints are needed to measure it"
        yield f"By Theorem 4.3, the current rollout length of {k} is useful {useful if needed < 1 else 'for no policy shift'}."


def mean(values: Sequence[float]) -> str:
    return number(float(np.mean(values)))


def of_returns(found: Findings) -> Iterator[str]:
    source = "; deterministic actions come from an average of the actor's weights (<code>actor_tau</code>)"
    yield (
        f"The mean return of deterministic actions is {mean(found.deterministic_returns)}, as <code>evaluate_policy</code> "
        f"shows it, and that of sampled actions {mean(found.sampled_returns)}, as in model rollouts"
        f"{source if found.averaged_actor else ''}."
    )
    if np.isfinite(found.imagined_returns).any():
        imagined = number(np.nanmean(found.imagined_returns))
        yield f"Imagined episodes with sampled actions from the same first states have a mean return of {imagined}."


def tiles(found: Findings) -> str:
    # A narrow tile breaks the line after the slash.
    of_reward, of_obs = (key.replace("/", "/<wbr>", 1) for key in EXPLAINED)
    shown = {
        "return of deterministic actions, as in evaluate_policy": mean(found.deterministic_returns),
        "return of sampled actions, as in model rollouts": mean(found.sampled_returns),
        f"{of_obs}, as logged at the last fit": logged(found.explained[1]),
        f"{of_reward}, as logged at the last fit": logged(found.explained[0]),
        "steps until the error exceeds half a standard deviation": str(found.useful or f"over {found.reach}"),
        "of the real values are in the 90 % interval": share(found.diagnosis.numbers(1)["coverage_90"]),
    }
    if found.optimal is not None:
        shown[f"k*, compared with the current rollout length, {found.rollout_length}"] = f"{found.optimal:,}"
    each = "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for what, value in shown.items())
    return f'<div class="tiles">{each}</div>'


def table_of_dimensions(found: Findings) -> str:
    """:return: table of each column's error, R^2 and coverage, after one step and after ``reach`` steps"""
    of = found.diagnosis
    values = {"standard deviation": of.spread}
    for k in dict.fromkeys((1, found.reach)):
        ahead = counted(k, "step")
        against_mean, against_no_change = of.r_squared(k)
        values[f"error, {ahead}"] = root_mean_square(of.errors(k))
        values[f"R{SQUARED}, mean, {ahead}"] = against_mean
        values[f"R{SQUARED}, no change, {ahead}"] = np.concatenate([[np.nan], against_no_change])
        values[f"in 90 %, {ahead}"] = of.coverage(k, 0.9)
    badness = np.nan_to_num(root_mean_square(of.errors(1)) / of.spread, nan=-1.0)
    columns = np.sort(badness.argsort()[::-1][:MOST_ROWS])
    rows = [[of.names[column], *(number(of_all[column]) for of_all in values.values())] for column in columns]
    left_out = f'<p class="note">The {MOST_ROWS} worst predicted of {len(badness)} columns.</p>'
    return table(["", *values], rows) + (left_out if len(badness) > MOST_ROWS else "")


def sections(found: Findings) -> Iterator[tuple[str, Figure | None, str]]:
    """:return: title, figure and caption of each section; without a figure, the caption is the section's content"""
    of = found.diagnosis
    yield (
        "How errors compound",
        figures.fan(of, found.rollout_length),
        "Error of the open-loop prediction with the real actions: median over start states, and bands of 50 and 90 %.",
    )
    yield (
        "Predicted and real",
        figures.trajectories(of),
        "From the start of the first episode, with its actions: median of the samples, and bands of 50 and 90 %. If there are "
        "many dimensions, the twelve worst predicted are shown.",
    )
    title = "A real episode and the imagined one"
    if isinstance(found.video, bytes):
        caption = "Both have the same start state and the same actions. The imagined one is a single sampled trajectory."
        yield title, None, picture(found.video, "two episodes side by side", caption, "webp")
    else:
        yield title, None, f'<p class="note">No video: {escape(found.video)}.</p>'
    yield (
        "Are its uncertainties correct?",
        figures.calibration(of, found.reach),
        "How often central intervals contain the real value. Thick: mean over the dimensions of the observation. Thin: each "
        "of them, and the reward. Below the diagonal, the dynamics is overconfident.",
    )
    yield (
        "Where are the errors?",
        figures.where(of),
        "One-step error, in standard deviations, over the two dimensions along which it differs most.",
    )
    yield (
        "Imagined and real returns",
        figures.returns(found.sampled_returns, found.imagined_returns, found.deterministic_returns),
        "Undiscounted returns of the current policy. With sampled actions, 19 imagined episodes start from the first state of "
        "each real one. The episodes with deterministic actions are further real ones.",
    )
    title = "How long should rollouts be?"
    if found.theorem and found.gamma < 1:
        yield (
            title,
            figures.lengths(of.model_error(), found.gamma, found.rollout_length, found.shifts),
            f"k* for &epsilon;<sub>m</sub>&prime; = {number(of.model_error())} and &gamma; = {found.gamma:g}. {LIMITS_OF_K}",
        )
    elif found.theorem:
        yield title, None, '<p class="note">For gamma = 1, the theorem has no finite bound.</p>'


def write_page(path: Path, found: Findings, about: Mapping[str, str]) -> None:
    """
    Write the page.

    :param path: the HTML file to write
    :param found: the findings
    :param about: names and texts about the origin of the findings; ``"env"`` is required
    """
    if found.diagnosis.dropped == 1:
        parts = ['<p class="failed">No prediction of this dynamics is finite, so there is nothing to show.</p>']
    else:
        says = "".join(f"<li>{one}</li>" for one in (*of_returns(found), *of_prediction(found), *of_trust(found)))
        parts = [tiles(found), f'<ul class="says">{says}</ul>']
        for title, figure, text in sections(found):
            parts += [f"<h2>{title}</h2>", text if figure is None else picture(figures.png(figure), title, text)]
        parts += ["<h2>Each dimension</h2>", table_of_dimensions(found), LIMITS]
    parts += ["<h2>About this report</h2>", definitions((name, escape(text)) for name, text in about.items())]
    path.write_text(page(f"How accurate is this model? {about['env']}", parts, STYLE), encoding="utf-8")
