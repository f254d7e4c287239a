"""Compares a user's reward function with the real rewards."""

import math
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# Maximum number of rewards compared, evenly spaced.
MOST_REWARDS = 10_000
# Minimum number of rewards for a comparison.
FEWEST_REWARDS = 8
# A warning is issued if the systematic error exceeds this fraction of the squared scale of the rewards, which is a tenth of
# their standard deviation. Float32 rounding and the effect of small observation noise on a correct function are far below.
TOLERATED = 0.01
# The scale of the rewards is at least this fraction of their magnitude, because a constant reward has no variance.
SMALL = 0.1
# Number of rows per coefficient of the regression that finds systematic errors.
ROWS_A_COEFFICIENT = 5
# Its gain must differ from 0 by this many standard errors.
SIGNIFICANT = 3.0


class RewardAudit(NamedTuple):
    """
    Error of a reward function.

    :param disagreement: E|r - f|^2 divided by the variance of the real rewards r (or by a hundredth of E r^2, if that is
        larger): 0 is exact, 1 no better than a constant. The noise of stochastic rewards is included
    :param warning: describes the error if it is systematic; otherwise ``None``
    """

    disagreement: float
    warning: str | None


def judged_rows(transitions: ReplayBufferSamples) -> th.Tensor:
    """
    Choose the transitions to compare a reward function on: evenly spaced, without terminal ones.

    A function of (obs, action, next_obs) does not know whether the episode ended, so it cannot include a bonus or penalty.

    :param transitions: real transitions, raw and flat
    :return: at most ``MOST_REWARDS`` indices
    """
    going_on = (transitions.dones.flatten() < 0.5).nonzero().flatten()
    n = min(len(going_on), MOST_REWARDS)
    return going_on[th.arange(n, device=going_on.device) * len(going_on) // max(n, 1)]


def audit_rewards(predicted: th.Tensor, transitions: ReplayBufferSamples) -> RewardAudit:
    """
    Compare the values of a reward function with the real rewards.

    Real rewards may be noisy, and a correct function then returns their mean. So the warning does not depend on the size of
    the errors, but on whether they can be predicted. A regression on the function's value and, with enough rows, on the
    transition and its squares is fitted to the errors of one half of the rows and evaluated on the other half, and vice versa.
    It finds a wrong sign, scale or offset, and a missing term.

    :param predicted: values of ``reward_fn`` on these transitions ``(N,)``
    :param transitions: real transitions that did not terminate, raw and flat
    :return: the error, with a warning if it is systematic
    """
    predicted, rewards = (part.flatten().double().cpu() for part in (predicted, transitions.rewards))
    n = len(rewards)
    if n < FEWEST_REWARDS:
        return RewardAudit(0.0, None)
    if not predicted.isfinite().all():
        bad = int((~predicted.isfinite()).sum())
        return RewardAudit(math.inf, f"reward_fn is not finite on {bad} of {n} real transitions. {_REMEDY}")
    errors, scale = rewards - predicted, max(rewards.var().item(), SMALL**2 * rewards.square().mean().item())
    if scale == 0:  # rewards that are all zero
        scale = max(predicted.square().mean().item(), 1e-300)
    disagreement = errors.square().mean().item() / scale
    inputs = th.cat([transitions.observations, transitions.actions, transitions.next_observations], dim=1).double().cpu()
    gains = _predicted_part(errors, predicted, inputs)
    standard_error = gains.std().item() / math.sqrt(n)
    systematic = gains.mean().item()
    if systematic <= TOLERATED * scale or systematic <= SIGNIFICANT * standard_error:
        return RewardAudit(disagreement, None)
    return RewardAudit(disagreement, _words(predicted, rewards))


def _predicted_part(errors: th.Tensor, predicted: th.Tensor, inputs: th.Tensor) -> th.Tensor:
    """:return: per row, the decrease of the squared error if a regression fitted to the other half is subtracted"""
    own = _standardized(predicted.unsqueeze(1))
    features = th.cat([own.new_ones(len(own), 1), own], dim=1)
    inputs = _standardized(inputs)
    if 2 * inputs.shape[1] + 2 <= len(errors) // (2 * ROWS_A_COEFFICIENT):
        features = th.cat([features, inputs, inputs**2 - 1], dim=1)
    gains = th.zeros_like(errors)
    # Random halves, with a separate generator: odd and even rows may differ systematically.
    halves = th.randperm(len(errors), generator=th.Generator().manual_seed(0)).chunk(2)
    for fitted, judged in (halves, halves[::-1]):
        # A small ridge penalty, because inputs may be linearly dependent.
        ridge = 1e-3 * len(fitted) ** 0.5 * th.eye(features.shape[1], dtype=features.dtype)
        weights = th.linalg.solve(features[fitted].T @ features[fitted] + ridge, features[fitted].T @ errors[fitted])
        gains[judged] = errors[judged] ** 2 - (errors[judged] - features[judged] @ weights) ** 2
    return gains


def _standardized(values: th.Tensor) -> th.Tensor:
    """:return: columns with zero mean and unit variance, clipped to 5; 0 for columns that vary only by float32 rounding"""
    mean, std = values.mean(dim=0), values.std(dim=0)
    constant = std <= 1e-6 * values.abs().amax(dim=0)
    return ((values - mean) / std.masked_fill(constant, 1.0)).masked_fill(constant, 0.0).clamp(-5, 5)


_REMEDY = "Correct it, or leave reward_fn out: the reward is then learned."


def _words(predicted: th.Tensor, rewards: th.Tensor) -> str:
    """:return: the warning, with the size and the kind of the error"""
    errors, variance = rewards - predicted, rewards.var(correction=0).item()
    explained = max(1 - errors.square().mean().item() / variance, 0) if variance > 0 else math.nan
    kind = _kind(predicted, rewards)
    share = f"it explains {explained:.2f} of the variance of the rewards (1 is all of it), " if variance > 0 else ""
    return (
        f"reward_fn disagrees with the environment on {len(rewards)} real transitions: {share}the largest difference is "
        f"{errors.abs().max().item():.3g}. Real rewards are in [{rewards.min():.3g}, {rewards.max():.3g}], those of "
        f"reward_fn in [{predicted.min():.3g}, {predicted.max():.3g}]{kind}. Transitions that terminated are not compared, "
        f"because reward_fn does not know that they did. {_REMEDY}"
    )


def _kind(predicted: th.Tensor, rewards: th.Tensor) -> str:
    """:return: the kind of error, from a linear fit of real to predicted rewards: a wrong sign, a factor, an offset"""
    centered, variance = predicted - predicted.mean(), predicted.var(correction=0)
    slope = (centered * rewards).mean() / variance if variance > 0 else th.zeros_like(variance)
    offset = (rewards - predicted).mean().item()
    fits = slope**2 * variance > 0.9 * rewards.var(correction=0)
    if slope < 0 and fits:
        turned = abs(slope + 1) < 0.1
        return "; the sign seems to be wrong" if turned else f"; the real ones are about {slope:.3g} times as large"
    if abs(slope - 1) > 0.02 and fits:
        return f"; the real ones increase by about {slope:.3g} if it increases by 1"
    if abs(offset) > 3 * (rewards - predicted).std().item():
        return f"; the real ones are larger by {offset:.3g}" if offset > 0 else f"; the real ones are smaller by {-offset:.3g}"
    return ""
