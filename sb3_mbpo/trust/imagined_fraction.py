"""Which fraction of the imagined rows of a batch the dynamics has earned."""

import math


def imagined_fraction(reward: float, obs: float, enough: float | None) -> float:
    """
    Which part of the imagined rows a dynamics has earned: 2 explained / enough - 1, within 0 and 1.

    :param reward: share of the variance of rewards that is explained
    :param obs: share of that of the next observations; the lesser of both counts
    :param enough: a share of variance explained that earns all of them, and half of it none: luck explains a little as well;
        ``None``: all of them whatever is explained
    """
    if enough is None:
        return 1.0
    # NaN counts as nothing explained.
    least = -math.inf if math.isnan(reward) or math.isnan(obs) else min(reward, obs)
    return min(1.0, max(0.0, 2 * least / enough - 1))
