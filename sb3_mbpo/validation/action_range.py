"""Check whether most of the range of an action has no effect."""

import numpy as np
from gymnasium import spaces

# Fractions of the range, around its middle, beyond which an action may have no more effect.
FRACTIONS = (0.5, 0.25, 0.1, 0.05, 0.025)
# Fraction from which on there is no warning.
WIDE_ENOUGH = 0.5
# A fraction must explain this many times the variance that the whole range explains, and the rest of the range at most this
# share of it.
BETTER, LEFT = 1.1, 0.05
# Test statistic (F, one degree of freedom) from which on an action has an effect for certain.
CERTAIN = 50.0
# Rows for each coefficient of the regression, least number of rows, and number of newest rows that are enough.
ROWS_EACH, FEWEST_ROWS, MOST_ROWS = 10, 200, 2000


def rows_for_action_range(obs_dim: int, action_dim: int) -> int:
    """
    :param obs_dim: dimensions of the observation
    :param action_dim: dimensions of the action
    :return: number of transitions that :func:`unused_range` needs
    """
    return max(FEWEST_ROWS, ROWS_EACH * (2 + obs_dim + action_dim))


def unused_range(obs: np.ndarray, actions: np.ndarray, next_obs: np.ndarray) -> list[tuple[int, float]]:
    """
    Find actions that the env clips to a small part of their bounds.

    The change of the observation is predicted linearly from observation and action. If it is predicted clearly better from an
    action that is clipped to a small part of its range, the env seems to clip it as well.

    :param obs: observations ``(N, obs_dim)``, N as :func:`rows_for_action_range` says
    :param actions: actions scaled to [-1, 1], ``(N, action_dim)``
    :param next_obs: next observations ``(N, obs_dim)``
    :return: dimension and used fraction of the range, for each action of which most of the range has no effect
    """
    obs, actions, next_obs = (np.asarray(part, dtype=np.float64) for part in (obs, actions, next_obs))
    known, change = _standardized(obs), _standardized(next_obs - obs)
    found = []
    for i, action in enumerate(actions.T):
        others = np.column_stack([np.ones(len(obs)), known, np.delete(actions, i, axis=1)])
        basis, _ = np.linalg.qr(others)
        change_left = change - basis @ (basis.T @ change)
        explained = {c: _explained(change_left, basis, np.clip(action / c, -1, 1)) for c in (1.0, *FRACTIONS)}
        best = max(explained, key=lambda c: explained[c].sum())
        left = (change_left**2).mean(axis=0) - explained[best]
        effect = len(obs) * (explained[best] / np.maximum(left, 1e-12)).max(initial=0)
        if best >= WIDE_ENOUGH or effect < CERTAIN or explained[best].sum() < BETTER * explained[1.0].sum():
            continue
        clipped = np.clip(action / best, -1, 1)
        both = _explained(change_left, basis, clipped, action - best * clipped)
        if both.sum() - explained[best].sum() < LEFT * explained[best].sum():
            found.append((i, best))
    return found


def unused_range_warning(found: list[tuple[int, float]], space: spaces.Box) -> str | None:
    """
    Describe what :func:`unused_range` has found.

    :param found: see :func:`unused_range`
    :param space: the action space
    :return: a warning that names bounds to use instead, or ``None``
    """
    if not found:
        return None
    low, high = (bound.flatten().astype(np.float64) for bound in (space.low, space.high))
    parts = []
    for i, fraction in found:
        middle, half = (high[i] + low[i]) / 2, (high[i] - low[i]) / 2
        used = f"{middle - fraction * half:.3g} to {middle + fraction * half:.3g}"
        parts.append(f"action {i} beyond about {used} (bounds {low[i]:.3g} to {high[i]:.3g})")
    sign = " Ignore this if the env uses only the sign of the action" if found[0][1] == FRACTIONS[-1] else ""
    return (
        f"action_space: most of the range does nothing: it seems that the env cuts off {'; '.join(parts[:3])}"
        f"{f'; and {len(parts) - 3} more' if len(parts) > 3 else ''}. Then most random actions are extreme ones, and learning "
        "is slow. Give the env the bounds that it uses: gymnasium.wrappers.TransformAction(env, lambda action: action, "
        f"gymnasium.spaces.Box(low, high)).{sign}"
    )


def _standardized(x: np.ndarray) -> np.ndarray:
    """:return: the columns that vary, with mean 0 and variance 1"""
    std = x.std(axis=0)
    varies = std > 1e-6 * np.maximum(np.abs(x).max(axis=0), 1e-6)
    return (x[:, varies] - x[:, varies].mean(axis=0)) / std[varies]


def _explained(change: np.ndarray, basis: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """
    :param change: what is to be predicted, without what the other inputs predict, ``(N, n)``
    :param basis: orthonormal basis of the other inputs, ``(N, m)``
    :param inputs: inputs, ``(N,)`` each
    :return: variance that the inputs explain in addition, ``(n,)``
    """
    new = np.column_stack(inputs)
    scale = np.sqrt((new**2).mean(axis=0)).clip(1e-12)
    new = new - basis @ (basis.T @ new)
    # An input that the others determine explains nothing.
    new = new[:, np.sqrt((new**2).mean(axis=0)) > 1e-6 * scale]
    axes, _ = np.linalg.qr(new)
    return ((axes.T @ change) ** 2).sum(axis=0) / len(change)
