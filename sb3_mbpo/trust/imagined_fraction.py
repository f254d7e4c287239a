"""The fraction of imagined rows that is used, depending on the explained variance of the dynamics."""

import math


def imagined_fraction(reward: float, obs: float, enough: float | None) -> float:
    """
    The fraction of imagined rows that is used: 2 explained / enough - 1, clipped to [0, 1].

    :param reward: explained fraction of the variance of rewards
    :param obs: explained fraction of the variance of next observations; the smaller of both counts
    :param enough: explained fraction from which all imagined rows are used; none are used up to half of it, because a little
        may be explained by chance. ``None``: always use all
    :return: fraction from 0 to 1
    """
    if enough is None:
        return 1.0
    # NaN counts as nothing explained.
    least = -math.inf if math.isnan(reward) or math.isnan(obs) else min(reward, obs)
    return min(1.0, max(0.0, 2 * least / enough - 1))
