"""A user's reward function, compared with the rewards that the env really paid."""

import math
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# Rewards compared, at most, at even distances: more would tell no more.
MOST_REWARDS = 10_000
# Fewest of them that say anything.
FEWEST_REWARDS = 8
# A systematic error warns from this share of the squared scale of the rewards on: a tenth of their standard deviation.
# Rounding of float32 is far below, and so is what small noise in the observation does to a right function.
TOLERATED = 0.01
# Rewards that vary by less than this part of their magnitude are judged in units of that part: a constant has no spread.
SMALL = 0.1
# Rows for each coefficient of the regression that looks for a systematic error.
ROWS_A_COEFFICIENT = 5
# Standard errors that its gain must be away from 0.
SIGNIFICANT = 3.0


class RewardAudit(NamedTuple):
    """
    How far a reward function is from real rewards.

    :param disagreement: E|r - f|^2 as a share of the variance of the real rewards r (of a hundredth of E r^2, if that is
        more): 0 is equal, 1 no better than a constant. The noise of stochastic rewards counts, too
    :param warning: where the error is systematic, what is wrong; else ``None``
    """

    disagreement: float
    warning: str | None


def judged_rows(transitions: ReplayBufferSamples) -> th.Tensor:
    """
    Choose the transitions that a reward function is compared on: evenly spaced, without those that terminated.

    A function of (obs, action, next_obs) is not told whether the episode ended, and cannot know a bonus or penalty for that.

    :param transitions: real ones, raw and flat
    :return: indices, at most ``MOST_REWARDS``
    """
    going_on = (transitions.dones.flatten() < 0.5).nonzero().flatten()
    n = min(len(going_on), MOST_REWARDS)
    return going_on[th.arange(n, device=going_on.device) * len(going_on) // max(n, 1)]


def audit_rewards(predicted: th.Tensor, transitions: ReplayBufferSamples) -> RewardAudit:
    """
    Compare the values of a reward function with the real rewards.

    Real rewards may be noisy, and a right function then gives their mean. So the warning is not about the size of the errors
    but about what can be predicted of them: a regression on the function's own value and, with enough rows, on the
    transition and its squares, fitted to one half of the rows, explains the errors of the other half, and the other way round.
    It finds a wrong sign, a scale, a constant, and a term that was left out.

    :param predicted: what ``reward_fn`` says of these transitions ``(N,)``
    :param transitions: real ones that did not terminate, raw and flat
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
    """:return: of each row, by how much the squared error falls when a regression fitted to the other half is taken off it"""
    own = _standardized(predicted.unsqueeze(1))
    features = th.cat([own.new_ones(len(own), 1), own], dim=1)
    inputs = _standardized(inputs)
    if 2 * inputs.shape[1] + 2 <= len(errors) // (2 * ROWS_A_COEFFICIENT):
        features = th.cat([features, inputs, inputs**2 - 1], dim=1)
    gains = th.zeros_like(errors)
    # Drawn, with a generator of its own: every other row could be a half of another kind.
    halves = th.randperm(len(errors), generator=th.Generator().manual_seed(0)).chunk(2)
    for fitted, judged in (halves, halves[::-1]):
        # A little ridge: inputs may be linear functions of each other.
        ridge = 1e-3 * len(fitted) ** 0.5 * th.eye(features.shape[1], dtype=features.dtype)
        weights = th.linalg.solve(features[fitted].T @ features[fitted] + ridge, features[fitted].T @ errors[fitted])
        gains[judged] = errors[judged] ** 2 - (errors[judged] - features[judged] @ weights) ** 2
    return gains


def _standardized(values: th.Tensor) -> th.Tensor:
    """Zero mean and unit variance in each column, cut at 5; 0 where nothing varies beyond float32's rounding."""
    mean, std = values.mean(dim=0), values.std(dim=0)
    constant = std <= 1e-6 * values.abs().amax(dim=0)
    return ((values - mean) / std.masked_fill(constant, 1.0)).masked_fill(constant, 0.0).clamp(-5, 5)


_REMEDY = "Correct it, or leave reward_fn out: the reward is then learned."


def _words(predicted: th.Tensor, rewards: th.Tensor) -> str:
    """The warning: how far apart they are, and what it looks like."""
    errors, variance = rewards - predicted, rewards.var(correction=0).item()
    explained = max(1 - errors.square().mean().item() / variance, 0) if variance > 0 else math.nan
    kind = _kind(predicted, rewards)
    share = f"it explains {explained:.2f} of the variance of the rewards (1 is all of it), " if variance > 0 else ""
    return (
        f"reward_fn disagrees with the environment on {len(rewards)} real transitions: {share}the largest difference is "
        f"{errors.abs().max().item():.3g}. Real rewards are in [{rewards.min():.3g}, {rewards.max():.3g}], those of "
        f"reward_fn in [{predicted.min():.3g}, {predicted.max():.3g}]{kind}. Transitions that terminated are not compared: "
        f"reward_fn is not told that they do. {_REMEDY}"
    )


def _kind(predicted: th.Tensor, rewards: th.Tensor) -> str:
    """What a line through (predicted, real) says: a turned sign, a constant, a factor."""
    centered, variance = predicted - predicted.mean(), predicted.var(correction=0)
    slope = (centered * rewards).mean() / variance if variance > 0 else th.zeros_like(variance)
    offset = (rewards - predicted).mean().item()
    fits = slope**2 * variance > 0.9 * rewards.var(correction=0)
    if slope < 0 and fits:
        turned = abs(slope + 1) < 0.1
        return "; the sign seems to be turned" if turned else f"; the real ones are about {slope:.3g} times as large"
    if abs(slope - 1) > 0.02 and fits:
        return f"; the real ones go up by about {slope:.3g} where it goes up by 1"
    if abs(offset) > 3 * (rewards - predicted).std().item():
        return f"; the real ones are larger by {offset:.3g}" if offset > 0 else f"; the real ones are smaller by {-offset:.3g}"
    return ""
