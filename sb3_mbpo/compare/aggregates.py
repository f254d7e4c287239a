"""Statistics over the runs of one algorithm on one env: interquartile means, intervals, time to reach a return."""

import numpy as np
import pandas as pd
from rliable import library
from scipy.stats import trim_mean

# Number of bootstrap samples, as in rliable's own learning curves.
REPETITIONS = 2_000


def score_table(rows: pd.DataFrame, column: str = "return") -> pd.DataFrame:
    """
    :param rows: results of one algorithm on one env, a row per episode
    :param column: the column to average
    :return: means over the episodes, with a row per seed and a column per step that all seeds have
    """
    return rows.pivot_table(index="seed", columns="step", values=column, aggfunc="mean").dropna(axis="columns")


def iqm(scores: np.ndarray) -> np.ndarray:
    """
    Interquartile mean: the mean without the lowest and the highest quarter, which are rounded down to whole runs.

    :param scores: ``(runs, points)``
    :return: ``(points,)``
    """
    return trim_mean(scores, 0.25, axis=0)


def interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    95 % percentile interval of the interquartile mean, from rliable's stratified bootstrap over runs.

    :param scores: ``(runs, points)``
    :return: lower and upper end, ``(points,)`` each; NaN for a single run
    """
    if len(scores) < 2:
        return (np.full(scores.shape[1], np.nan),) * 2
    # rliable uses NumPy's global generator.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        # (runs, tasks, points), with one task
        _, ends = library.get_interval_estimates({"": scores[:, None]}, lambda drawn: iqm(drawn[:, 0]), reps=REPETITIONS)
    finally:
        np.random.set_state(state)
    return ends[""][0], ends[""][1]


def against_minutes(rows: pd.DataFrame, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns against wall-clock time, interpolated linearly between evaluations.

    :param rows: results of one algorithm on one env
    :param points: number of points
    :return: minutes from 0 to the end of the fastest run ``(points,)``, and returns ``(runs, points)``
    """
    returns, minutes = score_table(rows).to_numpy(), score_table(rows, "seconds").to_numpy() / 60
    grid = np.linspace(minutes[:, 0].max(), minutes[:, -1].min(), points)
    return grid, np.array([np.interp(grid, *run) for run in zip(minutes, returns, strict=True)])


def first_reached(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """
    :param rows: results of one algorithm on one env
    :param threshold: a return
    :return: ``step`` and ``seconds`` of the first evaluation whose mean reaches it, a row per seed; infinite if there is none
    """
    evaluations = rows.groupby(["seed", "step"])[["return", "seconds"]].mean().reset_index("step")
    reached = evaluations[evaluations["return"] >= threshold].groupby("seed")[["step", "seconds"]].first()
    return reached.reindex(rows["seed"].unique(), fill_value=np.inf)
