"""Compares the critics' values with the largest possible return."""

import math
from typing import Any

import torch as th

# A warning is issued if a reward is larger than this, or if all are smaller than its inverse.
ODD_SCALE = 1e4
# Minimum number of rewards to conclude that all are small: at first, larger ones may not have occurred yet.
MANY_REWARDS = 1000


def return_bounds(least: float, most: float, gamma: float, entropy_bonus: float = 0.0) -> tuple[float, float] | None:
    """
    Bounds of Q(s, a) if each reward is in [least, most]:

        Q(s, a) = r_0 + sum over t >= 1 of gamma^t (r_t + alpha H_t)

        largest = most + gamma / (1 - gamma) max(most + alpha H_max, 0)
        smallest = least + gamma / (1 - gamma) min(least, 0)

    SAC's value of a state is the mean of Q minus alpha log pi. So each step except the first also contributes alpha times the
    entropy H_t of its action (the action of Q is given; Haarnoja et al., 2018, equations 2 and 3). An episode may end at any
    step, after which all rewards are 0; hence the max and the min. The entropy has no lower bound, so ``smallest`` ignores it:
    it is not a bound of Q, and only used for the range of returns.

    :param least: smallest reward
    :param most: largest reward
    :param gamma: discount factor
    :param entropy_bonus: alpha H_max, see :func:`entropy_bonus`; 0 for an algorithm without entropy
    :return: smallest and largest return; ``None`` for gamma = 1, where there is no bound
    """
    if gamma >= 1:
        return None
    ahead = gamma / (1 - gamma)
    return least + ahead * min(least, 0.0), most + ahead * max(most + entropy_bonus, 0.0)


def entropy_bonus(agent: Any) -> float:
    """
    alpha H_max: the maximum that entropy adds to a step's reward.

    SB3's squashed actions are in [-1, 1]^d, where the uniform density has the largest entropy: H_max = d log 2. If alpha is
    learned, the larger of its current and its initial value is used, because Q-values learned with a larger alpha persist.

    :param agent: any off-policy algorithm of SB3 or sb3_contrib
    :return: alpha H_max; 0 for an algorithm without an entropy coefficient
    """
    most = math.prod(agent.action_space.shape) * math.log(2)
    learned = getattr(agent, "log_ent_coef", None)
    if learned is not None:
        # "auto" starts at 1, "auto_0.1" at 0.1.
        _, _, initial = str(agent.ent_coef).partition("_")
        return most * max(learned.detach().exp().item(), float(initial or 1))
    fixed = getattr(agent, "ent_coef_tensor", None)
    return 0.0 if fixed is None else most * float(fixed)


@th.no_grad()
def q_values(critic: Any, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    :param critic: an SB3 critic: it returns one ``(B, 1)`` for each network, or ``(B, networks, quantiles)`` for TQC
    :param obs: observations as the policy gets them, ``(B, *obs_shape)``
    :param actions: actions in [-1, 1] ``(B, action_dim)``
    :return: Q-values ``(B, networks)``; quantiles are averaged, because the bound is for the mean return
    """
    training = critic.training
    # The statistics of batch normalization must not change.
    critic.set_training_mode(False)
    try:
        values = critic(obs, actions)
    finally:
        critic.set_training_mode(training)
    return th.cat(values, dim=1) if isinstance(values, tuple) else values.flatten(2).mean(dim=2)


def breach(largest_q: float, bounds: tuple[float, float] | None, input_size: float = 1.0) -> str | None:
    """
    Check whether Q-values are too large.

    The largest return is exceeded by a tolerance, which has two parts. The first one is the range of returns, because networks
    are inexact and imagined rewards may exceed real ones by their range (``prediction_clip_margin``). The second one is the
    norm of the critics' inputs, at least 1, because new networks predict values of that size for any rewards. If all rewards
    are equal, so that the range of returns is 0, the critics need about 10,000 updates to forget their initial values, because
    a target contains gamma times the value of the initial network.

    :param largest_q: the largest of some Q-values
    :param bounds: result of :func:`return_bounds`
    :param input_size: largest norm of the observations and actions of these Q-values
    :return: a warning; ``None`` if the Q-values are not too large
    """
    if bounds is None or largest_q <= bounds[1] + (bounds[1] - bounds[0]) + max(1.0, input_size):
        return None
    return (
        f"The critic expects a return of {largest_q:.3g}, but the rewards seen so far allow {bounds[1]:.3g} at most "
        "(dynamics/q_max, dynamics/q_bound): it learns from its own errors. Reduce gradient_steps or learning_rate, increase "
        "real_ratio if that is an argument, or shorten rollout_schedule"
    )


def odd_scale(least: float, most: float, n: int) -> str | None:
    """
    Check whether the scale of rewards is far from 1, the scale of new critics, SAC's entropy and the default learning rates.

    :param least: smallest reward that the critic learns from
    :param most: largest reward
    :param n: number of rewards
    :return: a warning; ``None`` if the scale is fine, or if there are too few rewards
    """
    largest = max(abs(least), abs(most))
    small = 0 < largest < 1 / ODD_SCALE and n >= MANY_REWARDS
    if not small and largest <= ODD_SCALE:
        return None
    return (
        f"The largest reward so far is {largest:.3g} in absolute value. New critics, the learning rate and the entropy suit "
        f"rewards around 1, and are too {'large' if small else 'small'} for these. Scale the rewards in the env, for example "
        "with gymnasium.wrappers.TransformReward"
    )
