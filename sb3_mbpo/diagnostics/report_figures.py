"""The figures of a diagnosis."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_mbpo.compare.html import COLOURS, counted
from sb3_mbpo.diagnostics.diagnosis import Diagnosis
from sb3_mbpo.diagnostics.metrics import N_SAMPLES
from sb3_mbpo.theory import optimal_rollout_length

MODEL, REAL, OTHER, *_ = COLOURS
INK = "0.15"
# Maximum number of columns whose trajectories are plotted.
MOST_COLUMNS = 12
BANDS = ((5, 95, 0.15), (25, 75, 0.3))
# Maximum k* in the plot. The schedules in use are far below.
LONGEST = 200
# Smallest error in a logarithmic plot.
SMALLEST = 1e-8


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def blank(width: float, height: float, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    """:return: a figure with one panel"""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    tidy(axes, x, y)
    return figure, axes


def tidy(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bands(axes: Axes, x: np.ndarray, values: np.ndarray, label: str) -> None:
    """Plot the median and the bands of 50 and 90 % of ``values`` ``(points, samples)``, where NaN is ignored."""
    for low, high, alpha in BANDS:
        axes.fill_between(x, *np.nanpercentile(values, (low, high), axis=1), color=MODEL, alpha=alpha, linewidth=0)
    axes.plot(x, np.nanmedian(values, axis=1), color=MODEL, linewidth=2, label=label)


def fan(of: Diagnosis, rollout_length: int) -> Figure:
    """Plot the error of the observation against the number of steps, and mark the current k."""
    figure, axes = blank(9, 4.2, "steps ahead", "error, in standard deviations")
    errors, still = of.distances()
    steps = np.flatnonzero(np.isfinite(errors).any(axis=1))
    draw_bands(axes, steps + 1, np.maximum(errors[steps], SMALLEST), "the dynamics")
    axes.plot(steps + 1, np.nanmedian(still[steps], axis=1), color=REAL, linestyle="--", label="predicting no change")
    axes.axhline(1, color=INK, linestyle=":", linewidth=1, label="about the error of predicting the mean")
    axes.axvline(rollout_length, color=OTHER, linewidth=1.5, label=f"current rollout length, {rollout_length}")
    axes.set_yscale("log")
    axes.legend(frameon=False, loc="lower right")
    return figure


def trajectories(of: Diagnosis) -> Figure:
    """Plot predicted and real values from the start of the first episode; of many columns, only the worst predicted ones."""
    moving = np.flatnonzero(np.isfinite(of.spread))
    apart = np.nanmean((of.further_samples.mean(axis=0) - of.further.outcomes) ** 2, axis=(0, 1))[moving]
    shown = np.sort(moving[np.argsort(-apart / of.spread[moving] ** 2)[:MOST_COLUMNS]])
    real = of.further.outcomes[0]
    x = np.arange(1, np.isfinite(real).all(axis=1).sum() + 1)
    n_columns = 2 if len(shown) in (2, 4) else 3
    n_rows = -(-max(len(shown), 1) // n_columns)
    figure = Figure(figsize=(10, 0.6 + 2.1 * n_rows), layout="constrained")
    for axes, column in zip(figure.subplots(n_rows, n_columns, squeeze=False).flat, shown, strict=False):
        draw_bands(axes, x, of.further_samples[:, 0, : len(x), column].T, "predicted")
        axes.plot(x, real[: len(x), column], color=INK, linewidth=1.6, label="real")
        axes.set_title(of.names[column], fontsize=10, loc="left")
        tidy(axes, "")
    for axes in figure.axes[len(shown) :]:
        axes.set_visible(False)
    if len(shown):
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("steps from the start of the episode", fontsize=10)
    return figure


def calibration(of: Diagnosis, horizon: int) -> Figure:
    """Plot the observed against the nominal coverage of intervals, after one step and after ``horizon`` steps."""
    figure, axes = blank(4.8, 4.5, "nominal", "observed")
    nominal = [(N_SAMPLES + 1 - 2 * i) / (N_SAMPLES + 1) for i in range(N_SAMPLES // 2, 0, -1)]
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1, label="calibrated")
    for k, colour in ((1, MODEL), (horizon, REAL)):
        shares = np.array([of.coverage(k, one) for one in nominal])
        known = np.isfinite(shares).all(axis=0)
        axes.plot(nominal, shares[:, known], color=colour, alpha=0.25, linewidth=0.8)
        # The mean is only over the dimensions of the observation, as in the text of the page.
        known[0] = False
        if known.any():
            axes.plot(nominal, shares[:, known].mean(axis=1), "o-", color=colour, label=f"{counted(k, 'step')} ahead")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(frameon=False)
    return figure


def tenths(values: np.ndarray) -> list[np.ndarray]:
    """:return: ten bins with equally many of the values, as their places"""
    return np.array_split(values.argsort(kind="stable"), min(10, len(values)))


def most_informative_columns(of: Diagnosis) -> list[int]:
    """
    Dimensions of the observation along which the one-step error differs most, in descending order: by the variance of the
    means of its logarithm in ten bins with equally many states.
    """
    rows = of.known(1)
    error = np.log(of.one_step_distance[rows] + SMALLEST)
    between = {
        int(column): np.var([error[one].mean() for one in tenths(of.steps.starts[rows, column])])
        for column in np.flatnonzero(np.isfinite(of.spread[1:]))
    }
    return sorted(between, key=lambda column: -between[column])


def where(of: Diagnosis) -> Figure:
    """Plot the one-step error over the two dimensions along which it differs most, and along each of them."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    over, *along = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    rows = of.known(1)
    error, starts = np.maximum(of.one_step_distance[rows], SMALLEST), of.steps.starts[rows]
    columns = (most_informative_columns(of) * 2)[:2]
    # Plot the largest errors on top.
    order = error.argsort()
    x, y = (starts[order, column] for column in columns)
    points = over.scatter(x, y, c=np.log10(error[order]), cmap="viridis", s=9, linewidths=0)
    figure.colorbar(points, ax=over, label="log10 of the error")
    tidy(over, *(of.names[column + 1] for column in columns))
    for axes, column in zip(along, columns, strict=True):
        axes.plot(starts[:, column], error, ".", color=MODEL, alpha=0.25, markersize=3)
        middle = [(np.median(starts[one, column]), np.median(error[one])) for one in tenths(starts[:, column])]
        axes.plot(*zip(*middle, strict=True), "o-", color=REAL, label="median of a tenth")
        axes.set_yscale("log")
        tidy(axes, of.names[column + 1], "error of one step")
    along[0].legend(frameon=False, fontsize=8)
    return figure


def returns(real: Sequence[float], imagined: np.ndarray, deterministic: Sequence[float]) -> Figure:
    """
    Plot real and imagined returns.

    :param real: returns of the real episodes with sampled actions ``(episodes,)``
    :param imagined: imagined returns from their first states ``(samples, episodes)``; NaN is ignored
    :param deterministic: returns of the real episodes with deterministic actions
    """
    figure, axes = blank(7.5, 4, "episode", "return")
    x, others = (np.arange(1, len(one) + 1) for one in (real, deterministic))
    spots = (x + np.linspace(-0.14, 0.14, len(imagined))[:, None]).ravel()
    axes.plot(spots, imagined.ravel(), "o", color=MODEL, alpha=0.45, markersize=5, label="imagined, sampled actions")
    axes.plot(x, real, "D", color=REAL, markersize=8, label="real, sampled actions")
    axes.plot(others, deterministic, "s", color=OTHER, markersize=6, label="real, deterministic actions")
    axes.set_xticks(x)
    axes.legend(frameon=False)
    return figure


def lengths(model_error: float, gamma: float, rollout_length: int, shifts: Sequence[float]) -> Figure:
    """
    Plot k* against the policy shift, and the current rollout length.

    :param model_error: the measured proxy of eps_m'
    :param gamma: discount factor, below 1
    :param rollout_length: current k
    :param shifts: measured eps_pi, which are marked
    """
    figure, axes = blank(7.5, 4, "policy shift since the data, $\\epsilon_\\pi$", "rollout length")
    x = np.linspace(0, 1, 401)
    best = [optimal_rollout_length(model_error=model_error, policy_shift=shift, gamma=gamma, longest=LONGEST) for shift in x]
    axes.plot(x, best, color=MODEL, linewidth=2, label="k* of Theorem 4.3")
    axes.axhline(rollout_length, color=OTHER, linewidth=1.5, label=f"current rollout length, {rollout_length}")
    axes.axvline(model_error, color=INK, linestyle=":", linewidth=1, label="measured $\\epsilon_m'$")
    for i, shift in enumerate(shifts):
        axes.axvline(shift, color=REAL, linewidth=1.2, label="" if i else "$\\epsilon_\\pi$ from earlier policies")
    axes.set_yscale("symlog", linthresh=1)
    ticks = [0, 1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_yticks(ticks, labels=[*map(str, ticks[:-1]), "200+"])
    axes.set(xlim=(0, 1), ylim=(-0.1, LONGEST * 1.2))
    axes.legend(loc="lower right", framealpha=0.9)
    return figure
