"""Aggregates against numbers worked out by hand or by brute force."""

import itertools
from importlib.util import find_spec

import numpy as np
import pytest

# Optional packages. Where the lock promises them, test_package.py fails for a missing one.
if find_spec("rliable") is None or find_spec("pandas") is None:
    pytest.skip("needs sb3_mbpo[compare]", allow_module_level=True)

import pandas as pd

from sb3_mbpo.compare import aggregates
from sb3_mbpo.compare.aggregates import against_minutes, first_reached, interval, iqm, score_table


def results(runs: dict[int, list[tuple[int, float, list[float]]]]) -> pd.DataFrame:
    """seed -> (step, seconds, returns of the episodes)"""
    return pd.DataFrame(
        [
            {"env": "E", "algorithm": "a", "seed": seed, "step": step, "episode": i, "return": value, "seconds": seconds}
            for seed, evaluations in runs.items()
            for step, seconds, returns in evaluations
            for i, value in enumerate(returns)
        ]
    )


ROWS = results({0: [(0, 0, [1, 3]), (10, 60, [4, 4]), (20, 120, [8, 10])], 1: [(0, 0, [0]), (10, 120, [6]), (20, 240, [3])]})


def test_scores_are_means_over_episodes() -> None:
    table = score_table(ROWS)
    assert table.to_numpy().tolist() == [[2, 4, 9], [0, 6, 3]] and list(table.columns) == [0, 10, 20]
    # A step that a seed lacks is no step of all.
    assert list(score_table(ROWS[(ROWS["seed"] == 0) | (ROWS["step"] != 10)]).columns) == [0, 20]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([7], 7), ([1, 3], 2), ([1, 2, 9], 4), ([1, 2, 4, 99], 3), ([-99, 1, 2, 3, 99], 2), ([0, 0, 1, 2, 3, 4, 9, 9], 2.5)],
)
def test_iqm_is_the_mean_of_the_middle_half(scores: list[float], expected: float) -> None:
    from rliable import metrics

    column = np.array(scores, dtype=float)[:, None]
    assert iqm(column) == pytest.approx(expected)
    assert iqm(np.hstack([column, column + 1])) == pytest.approx([expected, expected + 1])
    assert metrics.aggregate_iqm(column) == pytest.approx(expected)


def test_interval_is_that_of_all_resamples() -> None:
    scores = np.array([[1.0], [2.0], [4.0], [8.0], [9.0]])
    # Every draw of five among five, instead of some at random.
    everything = iqm(scores[np.array(list(itertools.product(range(5), repeat=5))).T, 0])
    low, high = interval(scores)
    assert low[0] == pytest.approx(np.quantile(everything, 0.025), abs=0.35)
    assert high[0] == pytest.approx(np.quantile(everything, 0.975), abs=0.35)
    assert low[0] < iqm(scores)[0] < high[0]


def test_interval_leaves_numpys_generator_alone_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "REPETITIONS", 50)
    scores = np.random.default_rng(0).normal(size=(4, 3))
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    first = interval(scores)
    assert np.random.random() == expected
    np.random.seed(6)
    assert np.array_equal(first, interval(scores))


def test_one_run_has_no_interval() -> None:
    low, high = interval(np.array([[1.0, 2.0]]))
    assert low.shape == (2,) and np.isnan(low).all() and np.isnan(high).all()


def test_minutes_are_common_to_all_runs() -> None:
    minutes, returns = against_minutes(ROWS, points=5)
    # The first seed takes 2 minutes, the second 4.
    assert minutes.tolist() == [0, 0.5, 1, 1.5, 2]
    assert returns.tolist() == [[2, 3, 4, 6.5, 9], [0, 1.5, 3, 4.5, 6]]


def test_first_reached() -> None:
    found = first_reached(ROWS, 5)
    assert found["step"].tolist() == [20, 10] and found["seconds"].tolist() == [120, 120]
    # A mean that equals it reaches it; what is lost later was reached all the same.
    assert first_reached(ROWS, 6)["step"].tolist() == [20, 10]
    assert first_reached(ROWS, 6.5)["step"].tolist() == [20, np.inf]
    assert first_reached(ROWS, -1)["step"].tolist() == [0, 0]
    assert first_reached(ROWS, 99)["seconds"].tolist() == [np.inf, np.inf]
