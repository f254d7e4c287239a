"""Fraction of the variance of rewards and observations that a dynamics explains."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# Rewards whose standard deviation is below this fraction of their magnitude count as constant.
SMALL = 0.1
# A dimension whose standard deviation is below this fraction of its magnitude counts as constant: it is float32 rounding.
ROUNDING = 1e-6
# Weight of earlier fits in the smoothed errors, so that a few bad steps do not stop the use of a good dynamics.
SMOOTHING = 0.5


class Explained(NamedTuple):
    """
    Fraction of the variance that a dynamics explains: 1 is all of it, 0 as much as a constant.

    :param reward: explained fraction of the rewards' variance
    :param obs: mean of the explained fractions over the dimensions of the next observation
    :param shares: explained fractions of the reward and of each dimension of the next observation, ``(1 + obs_dim,)``, from -1
        to 1; NaN if a dimension does not vary
    """

    reward: float
    obs: float
    shares: th.Tensor

    @property
    def worst_dimensions(self) -> list[int]:
        """Up to three dimensions of the observation that are explained least, the worst first."""
        shares = self.shares[1:].nan_to_num(nan=2.0)
        return [i for i in shares.argsort(stable=True).tolist()[:3] if shares[i] < 0.5]


def squared_errors(prediction: th.Tensor, transitions: ReplayBufferSamples) -> th.Tensor:
    """
    Mean squared error of a prediction.

    Rewards of terminal transitions are left out: there is only one per episode, it often differs from all others, and no
    dynamics can predict the first one.

    :param prediction: predicted reward and next observation ``(B, 1 + obs_dim)``
    :param transitions: the real transitions, raw and flat
    :return: ``(1 + obs_dim,)``, float64; NaN if no row is left
    """
    goes_on = transitions.dones.flatten() < 0.5
    of_rewards = (prediction[:, :1].double() - transitions.rewards.double())[goes_on] ** 2
    of_obs = (prediction[:, 1:].double() - transitions.next_observations.double()) ** 2
    # A NaN prediction counts as an infinite error. A mean over no rows is NaN.
    return th.cat([part.nan_to_num(nan=th.inf).mean(dim=0) for part in (of_rewards, of_obs)])


def constant_errors(transitions: ReplayBufferSamples) -> th.Tensor:
    """
    Mean squared error of the best constant prediction: the mean of the reward, of the next observation or of its change.

    Rewards of terminal transitions are left out.

    :param transitions: the real transitions, raw and flat
    :return: ``(1 + obs_dim,)``, float64; for observations, the smaller of both errors; 0 if a dimension varies only by
        rounding, or if the reward hardly varies
    """
    goes_on = transitions.dones.flatten() < 0.5
    rewards = transitions.rewards.double()[goes_on]
    obs, next_obs = transitions.observations.double(), transitions.next_observations.double()
    of_obs = th.minimum(next_obs.var(dim=0, correction=0), (next_obs - obs).var(dim=0, correction=0))
    of_obs = th.where(of_obs.sqrt() > ROUNDING * next_obs.abs().amax(dim=0), of_obs, 0.0)
    if not len(rewards):
        return th.cat([of_obs.new_zeros(1), of_obs])
    of_rewards = rewards.var(dim=0, correction=0)
    return th.cat([th.where(of_rewards > SMALL**2 * (rewards**2).mean(), of_rewards, 0.0), of_obs])


def explained(errors: th.Tensor, of_constant: th.Tensor, n: int) -> Explained:
    """
    1 - E|y - prediction|^2 / E|y - constant|^2, see :func:`squared_errors` and :func:`constant_errors`.

    :param errors: mean squared errors ``(1 + obs_dim,)``
    :param of_constant: errors of a constant ``(1 + obs_dim,)``; dimensions where it is 0 are ignored
    :param n: number of rows of the errors; the errors are increased by one standard error, because few rows may be lucky
    :return: ``reward`` and ``obs`` are at least 0, and 1 if nothing varies. A dimension that is predicted worse than by a
        constant counts as negative, at least -1; NaN counts as -1
    """
    shares = (1 - errors * (1 + math.sqrt(2 / n)) / of_constant).nan_to_num(nan=-1.0, neginf=-1.0).clamp(min=-1)
    shares = th.where(of_constant > 0, shares, th.nan)
    # Clip the mean at 0, not its parts, so that errors by chance cancel out between dimensions. The mean of nothing is NaN.
    reward, obs = (max(part.nanmean().nan_to_num(nan=1.0).item(), 0.0) for part in (shares[:1], shares[1:]))
    return Explained(reward, obs, shares)


def smoothed(before: Sequence[float], errors: th.Tensor, of_constant: th.Tensor) -> list[float]:
    """
    Exponential moving average over the fits of the errors on the steps after each fit.

    :param before: previous return value; empty at first
    :param errors: ``(1 + obs_dim,)``, see :func:`squared_errors`; NaN keeps the previous value
    :param of_constant: ``(1 + obs_dim,)``; errors are clipped to twice this, so that a few bad steps are soon forgotten
    :return: ``1 + obs_dim`` finite numbers
    """
    most = 2 * of_constant
    bounded = th.minimum(errors, most).tolist()
    if not before:
        return [0.0 if math.isnan(new) else new for new in bounded]
    # Clip the earlier ones as well: the errors of a constant may have changed.
    earlier = th.minimum(th.tensor(before, dtype=most.dtype, device=most.device), most).tolist()
    mixed = zip(earlier, bounded, strict=True)
    return [old if math.isnan(new) else SMOOTHING * old + (1 - SMOOTHING) * new for old, new in mixed]
