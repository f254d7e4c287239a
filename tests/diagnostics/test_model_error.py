"""The measures against loops, integrals and tables."""

import math

import numpy as np
import pytest

from sb3_mbpo.diagnostics.metrics import (
    blurred_total_variation,
    coverage,
    deviations,
    distance,
    gaussian_total_variation,
    precision_and_recall,
    r_squared,
    rank_correlation,
    root_mean_square,
    scale_of,
)

NAN = math.nan
GRID = np.linspace(-30, 30, 60_001)


def density(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def total_variation(mean, std, other_mean, other_std):
    """Half the integral of |p - q|."""
    apart = np.abs(density(GRID, mean, std) - density(GRID, other_mean, other_std))
    return 0.5 * apart.sum() * (GRID[1] - GRID[0])


def test_root_mean_square():
    errors = np.array([[3.0, 1.0, NAN], [4.0, NAN, NAN]])
    np.testing.assert_allclose(root_mean_square(errors), [math.sqrt(12.5), 1.0, NAN])


def test_scale_leaves_constant_dimensions_out():
    values = np.array([[1.0, 1e6, 5.0], [3.0, 1e6 + 1e-3, 5.0]])
    np.testing.assert_allclose(scale_of(deviations(values)), [1.0, NAN, NAN])


def test_distance():
    errors = np.array([[3.0, 8.0, 1.0], [0.0, 0.0, 9.0], [NAN, NAN, NAN]])
    np.testing.assert_allclose(distance(errors, np.array([1.0, 2.0, NAN])), [math.sqrt((9 + 16) / 2), 0.0, NAN])
    # Nothing moves: there is nothing to be wrong about.
    np.testing.assert_allclose(distance(errors[:2], np.full(3, NAN)), [0.0, 0.0])


def test_r_squared():
    actual, predicted = np.array([1.0, 2.0, 3.0, NAN]), np.array([1.0, 2.5, 2.0, 7.0])
    errors, baseline = (predicted - actual)[:, None], (actual - 2.0)[:, None]
    np.testing.assert_allclose(r_squared(errors, baseline), 1 - 1.25 / 2)
    np.testing.assert_allclose(r_squared(np.zeros((4, 1)), baseline[[0, 1, 2, 2]]), 1.0)
    np.testing.assert_allclose(r_squared(baseline, baseline), 0.0)
    assert np.isnan(r_squared(errors, np.zeros((4, 1)))).all()


@pytest.mark.parametrize("nominal", [0.1, 0.5, 0.9])
def test_coverage_of_the_truth_is_nominal(nominal):
    """A skewed mixture, so that no interval of a Gaussian would do."""
    rng = np.random.default_rng(0)
    draws = np.where(
        rng.random((20, 20_000, 1)) < 0.3, rng.exponential(1, (20, 20_000, 1)), rng.normal(5, 0.1, (20, 20_000, 1))
    )
    assert coverage(draws[1:], draws[0], nominal)[0] == pytest.approx(nominal, abs=0.015)


def test_coverage_against_a_loop():
    rng = np.random.default_rng(1)
    samples, actual = rng.normal(0, 1, (19, 50, 2)), rng.normal(0.5, 2, (50, 2))
    for nominal, i in ((0.5, 5), (0.9, 1)):
        hits = [
            [sorted(samples[:, b, d])[i - 1] <= actual[b, d] <= sorted(samples[:, b, d])[-i] for d in range(2)]
            for b in range(50)
        ]
        np.testing.assert_allclose(coverage(samples, actual, nominal), np.mean(hits, axis=0))


def test_coverage_that_cannot_be_told():
    assert np.isnan(coverage(np.zeros((19, 4, 1)), np.zeros((4, 1)), 0.9)).all()


def test_rank_correlation():
    # Ranks 0 1 2 3 and 0 2 1 3: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert rank_correlation(np.array([1.0, 2.0, 3.0, 40.0]), np.array([-5.0, 0.1, 0.0, 9.0])) == pytest.approx(0.8)
    # With ties: ranks 0.5 0.5 2 and 0 1 2, whose correlation is 1.5 / sqrt(1.5 * 2).
    assert rank_correlation(np.array([1.0, 1.0, 2.0]), np.array([3.0, 4.0, 5.0])) == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_rank_correlation_against_all_pairs_of_distinct_numbers():
    """rho = 1 - 6 sum d^2 / (n (n^2 - 1)), the ranks counted by comparison."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=30), rng.normal(size=30)
    apart = [sum(x < x[i]) - sum(y < y[i]) for i in range(30)]
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * np.square(apart).sum() / (30 * 899))


def test_precision_and_recall():
    predicted, actual = np.array([True, True, True, False, False]), np.array([True, False, False, True, False])
    assert precision_and_recall(predicted, actual) == (pytest.approx(1 / 3), 0.5)
    nothing = np.zeros(5, dtype=bool)
    precision, recall = precision_and_recall(nothing, actual)
    assert math.isnan(precision) and recall == 0.0
    precision, recall = precision_and_recall(predicted, nothing)
    assert precision == 0.0 and math.isnan(recall)


@pytest.mark.parametrize(("apart", "scale"), [(0.0, 1.0), (0.3, 1.0), (2.0, 0.5), (5.0, 3.0)])
def test_blurred_total_variation_against_an_integral(apart, scale):
    measured = blurred_total_variation(np.array([[apart, 9.0]]), np.array([scale, NAN]))
    np.testing.assert_allclose(measured, total_variation(0, scale, apart, scale), atol=1e-4)


def test_blurred_total_variation_of_several_dimensions():
    """A rotation of the noise changes nothing, so only the length of the scaled error counts."""
    measured = blurred_total_variation(np.array([[3.0, 8.0]]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(measured, total_variation(0, 1, 5, 1), atol=1e-4)


@pytest.mark.parametrize("other", [(0.0, 1.0), (0.5, 1.0), (0.0, 3.0), (2.0, 0.2), (9.0, 1.0)])
def test_gaussian_total_variation_against_an_integral(other):
    noise = np.random.default_rng(0).standard_normal((40_000, 1))
    mean, std, other_mean, other_std = (np.full((1, 1), value) for value in (0.0, 1.0, *other))
    measured = gaussian_total_variation(mean, std, other_mean, other_std, noise)
    np.testing.assert_allclose(measured, total_variation(0, 1, *other), atol=3 * 0.5 / math.sqrt(40_000))


def test_gaussian_total_variation_of_several_dimensions():
    """Of the same spread in all: as of one dimension, along the line between the means."""
    noise = np.random.default_rng(0).standard_normal((40_000, 2))
    measured = gaussian_total_variation(
        np.zeros((2, 2)), np.ones((2, 2)), np.array([[0.6, 0.8], [0, 0]]), np.ones((2, 2)), noise
    )
    np.testing.assert_allclose(measured, [total_variation(0, 1, 1, 1), 0.0], atol=0.01)
