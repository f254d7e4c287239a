"""What the critics say against what they can say: the largest return that the rewards seen allow."""

import math
from typing import Any

import torch as th

# Rewards that are larger than this, or all smaller than its inverse, are on another scale than what they are weighed against.
ODD_SCALE = 1e4
# So many rewards must all be small: at first, larger ones may just not have been met.
MANY_REWARDS = 1000


def return_bounds(least: float, most: float, gamma: float, entropy_bonus: float = 0.0) -> tuple[float, float] | None:
    """
    Between which values every Q(s, a) lies if each reward is in [least, most]:

        Q(s, a) = r_0 + sum over t >= 1 of gamma^t (r_t + alpha H_t)

        largest = most + gamma / (1 - gamma) max(most + alpha H_max, 0)
        smallest = least + gamma / (1 - gamma) min(least, 0)

    SAC's value of a state is the mean of Q minus alpha log pi, so from the second step on each step brings alpha times the
    entropy H_t of its action as well (none at t = 0: the action of Q is given; Haarnoja et al., 2018, equations 2 and 3).
    An episode may end at any step, and then all that would come is 0: hence the max and the min. The entropy of a policy may
    be as low as one likes, but a policy that pays for it does worse than the best: the lower bound leaves it out, and says how
    far apart returns are, no more.

    :param least: smallest reward
    :param most: largest reward
    :param gamma: discount factor
    :param entropy_bonus: alpha H_max, see :func:`entropy_bonus`; 0: the algorithm knows no entropy
    :return: smallest, largest; ``None`` without discount, where there is no bound
    """
    if gamma >= 1:
        return None
    ahead = gamma / (1 - gamma)
    return least + ahead * min(least, 0.0), most + ahead * max(most + entropy_bonus, 0.0)


def entropy_bonus(agent: Any) -> float:
    """
    alpha H_max: the most that entropy adds to a step's reward.

    No density on [-1, 1]^d, where SB3's squashed actions live, has more entropy than the uniform one: H_max = d log 2.
    Where alpha is learned, it is the larger one of now and of the beginning: Q-values learned under a larger alpha outlive it.

    :param agent: any off-policy algorithm of SB3 or sb3_contrib
    :return: 0 for an algorithm without an entropy coefficient
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
    :param critic: an SB3 critic: ``(obs, actions)`` to one ``(B, 1)`` for each network, or TQC's ``(B, networks, quantiles)``
    :param obs: as the policy sees them, ``(B, *obs_shape)``
    :param actions: in [-1, 1], ``(B, action_dim)``
    :return: ``(B, networks)``; quantiles are averaged, for a return's mean is what is bounded by its critic
    """
    training = critic.training
    # The statistics of a batch normalisation must not move.
    critic.set_training_mode(False)
    try:
        values = critic(obs, actions)
    finally:
        critic.set_training_mode(training)
    return th.cat(values, dim=1) if isinstance(values, tuple) else values.flatten(2).mean(dim=2)


def breach(largest_q: float, bounds: tuple[float, float] | None, input_size: float = 1.0) -> str | None:
    """
    Whether a critic is beyond what it can be right about.

    Beyond the bound by its distance from the smallest return: networks err, and an imagined reward may be a whole range better
    than any real one (``prediction_clip_margin``). And by the size of what the critics are given, at least 1: fresh networks
    predict numbers of that order whatever the rewards are. Where these are equal, so that returns span nothing, it takes the
    critics some 10,000 updates to forget them: the value of a fresh network passes from one target to the next times gamma.

    :param largest_q: the largest of some Q-values
    :param bounds: of :func:`return_bounds`
    :param input_size: the largest norm of the observations and actions that they were computed from
    :return: a warning; ``None``: all is well
    """
    if bounds is None or largest_q <= bounds[1] + (bounds[1] - bounds[0]) + max(1.0, input_size):
        return None
    return (
        f"The critic expects a return of {largest_q:.3g}, but the rewards seen so far allow {bounds[1]:.3g} at most "
        "(dynamics/q_max, dynamics/q_bound): it learns from its own errors. Lower gradient_steps or learning_rate, raise "
        "real_ratio where that is an argument, or shorten rollout_schedule"
    )


def odd_scale(least: float, most: float, n: int) -> str | None:
    """
    Whether rewards are far from 1, the scale of a new network's values, of SAC's entropy and of the default learning rates.

    :param least: smallest reward, as the critic learns from it
    :param most: largest reward
    :param n: how many there were
    :return: a warning; ``None``: all is well, or not yet to be told
    """
    largest = max(abs(least), abs(most))
    small = 0 < largest < 1 / ODD_SCALE and n >= MANY_REWARDS
    if not small and largest <= ODD_SCALE:
        return None
    return (
        f"The largest reward so far is {largest:.3g} in size. New critics, the learning rate and the entropy suit rewards "
        f"around 1, and are too {'large' if small else 'small'} beside these. Scale them in the env, as with "
        "gymnasium.wrappers.TransformReward"
    )
