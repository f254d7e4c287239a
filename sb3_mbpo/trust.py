"""How far the dynamics may be believed: what share of a batch may be imagined, and how long a branch may be."""

import math
from collections.abc import Mapping, Sequence

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# Rewards that vary by less than this part of their magnitude are as good as constant: there a constant does no harm.
SMALL = 0.1
# New rows are judged by themselves if there are so many, and this part of the held-out ones: among more, they say little, and
# little is remembered.
FEWEST_UNSEEN, LEAST_UNSEEN = 8, 0.01
# Mean squared error after k steps that is small beside the variance of the observations.
NEGLIGIBLE = 0.01
# Beside its magnitude a spread this small is rounding of float32, and the dimension constant.
ROUNDING = 1e-6


def imagined_share(metrics: Mapping[str, float | str], enough: float | None, known_reward: bool) -> float:
    """
    Which part of the imagined rows a dynamics has earned: 2 explained / enough - 1, within 0 and 1.

    :param metrics: of a fit; the lesser of ``explained_obs`` and ``explained_reward`` counts, see :func:`explained`
    :param enough: a share of variance explained that earns all of them, and half of it none: luck explains a little as well;
        ``None``: all of them whatever is explained
    :param known_reward: rewards do not come from the dynamics
    :return: 1 also for a dynamics that does not say
    """
    if enough is None:
        return 1.0
    names = ["explained_obs"] if known_reward else ["explained_obs", "explained_reward"]
    shares = [float(metrics.get(name, enough)) for name in names]
    # Less than any: what is no number explains nothing.
    least = -math.inf if any(math.isnan(share) for share in shares) else min(shares)
    return min(1.0, max(0.0, 2 * least / enough - 1))


def reliable_length(errors: Sequence[th.Tensor], obs: th.Tensor) -> int:
    """
    k: the most steps over which every prediction errs by little, its mean squared error over the dimensions that vary, each at
    most 1, below ``NEGLIGIBLE`` of their variance.

    :param errors: mean squared errors after 1, 2, ... steps, each ``(obs_dim,)``, see :func:`.drift.drift`
    :param obs: the real observations ``(B, obs_dim)``
    :return: at least 1; 1 where nothing varies
    """
    variance = obs.var(dim=0)
    varies = variance.sqrt() > ROUNDING * obs.abs().amax(dim=0)
    length = 0
    for error in errors:
        # A comparison with nan says no.
        if not (error / variance)[varies].clamp(max=1).mean() <= NEGLIGIBLE:
            break
        length += 1
    return max(length, 1)


def explained(prediction: th.Tensor, transitions: ReplayBufferSamples, unseen: th.Tensor) -> tuple[float, float]:
    """
    Which share of the variance a prediction explains, against a constant: 1 - E|y - prediction|^2 / E|y - constant|^2.

    For an observation the constant is the mean of the next one, or of its change, whichever errs less. Left out are dimensions
    that do not vary, a reward that hardly does, and rewards that come with a termination, one in an episode and often unlike
    all others. A dimension that is predicted worse than by the constant counts down to -1.

    :param prediction: of reward and next observation ``(B, 1 + obs_dim)``, by a dynamics whose fit has held them out
    :param transitions: what came instead, raw and flat
    :param unseen: which of them no earlier fit was given ``(B,)``. If not too few, they are judged by themselves too, and of
        both shares the lesser counts: a warm-started dynamics remembers of the others what it cannot know
    :return: for the reward, and the mean over the dimensions of the observation, at least 0; 1 where nothing varies
    """
    goes_on = transitions.dones.flatten() < 0.5
    rewards, obs, next_obs = (part.double() for part in (transitions.rewards, *transitions[:3:2]))
    prediction = prediction.double()
    by_constant = _apart([next_obs, next_obs - obs])
    varies = by_constant.mean(dim=0).sqrt() > ROUNDING * next_obs.abs().amax(dim=0)
    observation = _shares(prediction[:, 1:] - next_obs, by_constant, unseen)[varies]

    rewards, errors = rewards[goes_on], (prediction[:, :1] - rewards)[goes_on]
    by_constant = _apart([rewards])
    reward = _shares(errors, by_constant, unseen[goes_on])[by_constant.mean(dim=0) > SMALL**2 * (rewards**2).mean()]
    # The mean is cut at 0, not its parts: good luck in one dimension makes up for bad luck in another. That of nothing is nan.
    mean_reward, mean_observation = (share.mean().nan_to_num(nan=1.0).item() for share in (reward, observation))
    return max(mean_reward, 0.0), max(mean_observation, 0.0)


def _apart(kinds: Sequence[th.Tensor]) -> th.Tensor:
    """:return: squared distances from the mean ``(B, dim)``, of each dimension those of the kind that varies least"""
    squares = th.stack([(values - values.mean(dim=0)) ** 2 for values in kinds])
    return squares.gather(0, squares.mean(dim=1, keepdim=True).argmin(dim=0, keepdim=True).expand(1, *squares.shape[1:]))[0]


def _shares(errors: th.Tensor, by_constant: th.Tensor, unseen: th.Tensor) -> th.Tensor:
    """:return: what is explained of each dimension, at least -1, and -1 for what is no number"""
    squares, of_constant = errors**2, by_constant.mean(dim=0)
    shares = 1 - squares.mean(dim=0) / of_constant
    if (n := int(unseen.sum())) >= max(FEWEST_UNSEEN, LEAST_UNSEEN * len(unseen)):
        # A standard error more, since so few may be lucky; in units of all rows, unless these lie further apart.
        unexplained = squares[unseen].mean(dim=0) * (1 + math.sqrt(2 / n))
        shares = th.minimum(shares, 1 - unexplained / th.maximum(of_constant, by_constant[unseen].mean(dim=0)))
    return shares.nan_to_num(nan=-1.0).clamp(min=-1)
