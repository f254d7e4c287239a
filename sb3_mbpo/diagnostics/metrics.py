"""Metrics of model errors and policy shifts, as functions of arrays."""

import math

import numpy as np

# Number of samples of a prediction. 19 samples have 20 intervals between and beyond them: the 10 in the middle are an interval
# of exactly 50 %, and the 18 in the middle one of 90 %.
N_SAMPLES = 19
# A dimension whose range is below this fraction of its magnitude counts as constant: it is rounding.
ROUNDING = 1e-6

erf = np.vectorize(math.erf, otypes=[float])


def root_mean_square(errors: np.ndarray) -> np.ndarray:
    """
    sqrt(mean over rows of e^2)

    :param errors: ``(B, dims)``, in the env's units; NaN is ignored
    :return: ``(dims,)``, in the same units; NaN if all errors are NaN
    """
    counts = np.isfinite(errors).sum(axis=0)
    return np.sqrt(np.nansum(errors**2, axis=0) / np.where(counts > 0, counts, np.nan))


def scale_of(values: np.ndarray) -> np.ndarray:
    """
    :param values: ``(B, dims)``: deviations from the mean, or changes per step
    :return: root mean square of each dimension ``(dims,)``; NaN if it is constant, so that it is ignored
    """
    size = root_mean_square(values)
    return np.where(size > 0, size, np.nan)


def deviations(values: np.ndarray) -> np.ndarray:
    """
    :param values: ``(B, dims)``
    :return: deviations from the mean ``(B, dims)``, exactly zero for a dimension that is constant up to rounding
    """
    apart = values - values.mean(axis=0)
    return np.where(np.ptp(values, axis=0) <= ROUNDING * np.abs(values).max(axis=0), 0.0, apart)


def distance(errors: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """
    sqrt(mean over dimensions of (e / scale)^2)

    :param errors: ``(..., dims)``
    :param scale: ``(dims,)``; dimensions where it is NaN are ignored
    :return: ``(...)``; 1 if the errors are as large as the scale; NaN if an error is NaN
    """
    known = np.isfinite(scale)
    return np.sqrt(((errors[..., known] / scale[known]) ** 2).sum(axis=-1) / max(known.sum(), 1))


def r_squared(errors: np.ndarray, baseline_errors: np.ndarray) -> np.ndarray:
    """
    R^2 = 1 - sum over rows of e^2 / sum over rows of e_baseline^2

    :param errors: errors of the predictions ``(B, dims)``; NaN is ignored
    :param baseline_errors: errors of the baseline (the mean, or no change) ``(B, dims)``
    :return: ``(dims,)``: 1 is perfect, 0 as good as the baseline; NaN if the baseline has no error
    """
    theirs = np.where(np.isfinite(errors), baseline_errors, 0.0)
    total = (theirs**2).sum(axis=0)
    return 1 - np.nansum(errors**2, axis=0) / np.where(total > 0, total, np.nan)


def coverage(samples: np.ndarray, actual: np.ndarray, nominal: float) -> np.ndarray:
    """
    How often the central interval of a prediction contains the real value.

    If the real value has the same distribution as P samples, it is between their i-th smallest and i-th largest with a
    probability of exactly (P + 1 - 2i) / (P + 1). This holds for any distribution, including mixtures.

    :param samples: ``(P, B, dims)``, without NaN
    :param actual: real values ``(B, dims)``
    :param nominal: probability of the interval, such that i is a whole number
    :return: fraction of rows inside the interval ``(dims,)``; NaN if all samples are equal, as for deterministic predictions
    """
    i = round((1 - nominal) / 2 * (len(samples) + 1))
    ordered = np.sort(samples, axis=0)
    inside = (ordered[i - 1] <= actual) & (actual <= ordered[-i])
    spreads = (ordered[0] != ordered[-1]).any(axis=0)
    return np.where(spreads, inside.mean(axis=0), np.nan)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """
    Spearman's rho: the correlation of the ranks, where equal numbers get the mean of their ranks.

    :param x: ``(B,)``
    :param y: ``(B,)``
    :return: from -1 to 1; NaN if all values of ``x`` or of ``y`` are equal
    """

    def centered_ranks(z: np.ndarray) -> np.ndarray:
        _, places, counts = np.unique(z, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + len(z)) / 2)[places]

    a, b = centered_ranks(x), centered_ranks(y)
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else math.nan


def precision_and_recall(predicted: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """
    hits / predicted, and hits / actual

    :param predicted: bool ``(B,)``
    :param actual: bool ``(B,)``
    :return: precision and recall; NaN for a denominator of 0
    """
    hits, n_predicted, n_actual = (predicted & actual).sum(), predicted.sum(), actual.sum()
    return float(hits / n_predicted) if n_predicted else math.nan, float(hits / n_actual) if n_actual else math.nan


def blurred_total_variation(errors: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """
    D_TV( N(x, S), N(y, S) ) = erf( d / (2 sqrt 2) ), with S = diag(scale^2), d^2 = sum over dimensions of ((x - y) / scale)^2

    The total variation between a predicted and a real outcome, after Gaussian noise is added to both. Without noise, it is 1
    between a deterministic simulator and any continuous model.

    :param errors: x - y, ``(..., dims)``
    :param scale: standard deviation of the noise, ``(dims,)``; dimensions where it is NaN are ignored
    :return: ``(...)``, from 0 to 1
    """
    n_known = np.isfinite(scale).sum()
    return erf(distance(errors, scale) * math.sqrt(n_known / 8))


def gaussian_total_variation(
    mean: np.ndarray, std: np.ndarray, other_mean: np.ndarray, other_std: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """
    D_TV(p, q) = E over x ~ p of max(0, 1 - q(x) / p(x)), for diagonal Gaussians p and q, by Monte Carlo.

    It does not change under an invertible map of x, such as the tanh of a squashed policy.

    :param mean: mean of p, like the following ``(B, dims)``
    :param std: standard deviation of p
    :param other_mean: mean of q
    :param other_std: standard deviation of q
    :param noise: standard normal draws ``(M, dims)``; the standard error of the estimate is at most 1 / (2 sqrt M)
    :return: ``(B,)``, from 0 to 1
    """
    x = mean + std * noise[:, None]
    of_p, of_q = -0.5 * noise[:, None] ** 2 - np.log(std), -0.5 * ((x - other_mean) / other_std) ** 2 - np.log(other_std)
    return np.maximum(0.0, -np.expm1(np.minimum((of_q - of_p).sum(axis=-1), 0.0))).mean(axis=0)
