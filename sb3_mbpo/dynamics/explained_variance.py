"""Which share of the variance of rewards and observations a dynamics explains."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# Rewards that vary by less than this part of their magnitude are as good as constant: there a constant does no harm.
SMALL = 0.1
# Beside its magnitude a spread this small is rounding of float32, and the dimension constant.
ROUNDING = 1e-6
# Weight of earlier fits in the smoothed errors: one bad stretch of steps must not close the gate of a good dynamics.
SMOOTHING = 0.5


class Explained(NamedTuple):
    """
    Which share of the variance a dynamics explains: 1 is all of it, 0 no more than a constant does.

    :param reward: of the rewards
    :param obs: mean over the dimensions of the next observation
    :param shares: of the reward and each dimension of the next observation, ``(1 + obs_dim,)``, between -1 and 1; NaN where
        nothing varies
    """

    reward: float
    obs: float
    shares: th.Tensor

    @property
    def worst_dimensions(self) -> list[int]:
        """Dimensions of the observation that are explained least, the worst first; at most three."""
        shares = self.shares[1:].nan_to_num(nan=2.0)
        return [i for i in shares.argsort(stable=True).tolist()[:3] if shares[i] < 0.5]


def squared_errors(prediction: th.Tensor, transitions: ReplayBufferSamples) -> th.Tensor:
    """
    Mean squared error of a prediction.

    :param prediction: of reward and next observation ``(B, 1 + obs_dim)``
    :param transitions: what came instead, raw and flat
    :return: ``(1 + obs_dim,)``, float64. Rewards of transitions that terminate are left out: there is one in an episode, often
        unlike all others, and no dynamics can know the first of them. NaN where no row is left
    """
    goes_on = transitions.dones.flatten() < 0.5
    of_rewards = (prediction[:, :1].double() - transitions.rewards.double())[goes_on] ** 2
    of_obs = (prediction[:, 1:].double() - transitions.next_observations.double()) ** 2
    # What is not a number is as wrong as can be; NaN is kept for no rows at all.
    return th.cat([part.nan_to_num(nan=th.inf).mean(dim=0) for part in (of_rewards, of_obs)])


def constant_errors(transitions: ReplayBufferSamples) -> th.Tensor:
    """
    Mean squared error of the best constant: the mean of the reward, of the next observation or of its change.

    :param transitions: raw and flat
    :return: ``(1 + obs_dim,)``, float64, of a next observation the lesser of both; 0 where nothing varies beyond rounding, or
        a reward hardly does. Rewards of transitions that terminate are left out
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

    :param errors: ``(1 + obs_dim,)``
    :param of_constant: ``(1 + obs_dim,)``; dimensions where it is 0 are not judged
    :param n: rows that the errors were measured on: they count by a standard error more, for few rows may be lucky
    :return: reward and observation at least 0, and 1 where nothing varies. A dimension that is predicted worse than by a
        constant counts down to -1, and so does a prediction that is not a number
    """
    shares = (1 - errors * (1 + math.sqrt(2 / n)) / of_constant).nan_to_num(nan=-1.0, neginf=-1.0).clamp(min=-1)
    shares = th.where(of_constant > 0, shares, th.nan)
    # The mean is cut at 0, not its parts: good luck in one dimension makes up for bad luck in another. That of nothing is NaN.
    reward, obs = (max(part.nanmean().nan_to_num(nan=1.0).item(), 0.0) for part in (shares[:1], shares[1:]))
    return Explained(reward, obs, shares)


def smoothed(before: Sequence[float], errors: th.Tensor, of_constant: th.Tensor) -> list[float]:
    """
    Exponential mean over the fits of the errors on the steps that came after each.

    :param before: what this returned the last time; empty at first
    :param errors: ``(1 + obs_dim,)``, see :func:`squared_errors`; a NaN leaves the earlier value
    :param of_constant: ``(1 + obs_dim,)``; an error counts up to twice as much, so that one bad stretch is soon forgotten
    :return: ``1 + obs_dim`` finite numbers
    """
    most = 2 * of_constant
    bounded = th.minimum(errors, most).tolist()
    if not before:
        return [0.0 if math.isnan(new) else new for new in bounded]
    # The earlier ones as well: the unit may have become another.
    earlier = th.minimum(th.tensor(before, dtype=most.dtype, device=most.device), most).tolist()
    mixed = zip(earlier, bounded, strict=True)
    return [old if math.isnan(new) else SMOOTHING * old + (1 - SMOOTHING) * new for old, new in mixed]
