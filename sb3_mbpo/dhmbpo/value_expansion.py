"""The formulas of double-horizon learning: value expansion, and bounds of values."""

import torch as th


def expanded_values(
    rewards: th.Tensor,
    log_probs: th.Tensor,
    alive: th.Tensor,
    last_values: th.Tensor,
    gamma: float,
    ent_coef: th.Tensor | float,
    root_entropy: bool,
) -> th.Tensor:
    """
    Soft value of the first state of imagined trajectories of H steps, or of its state and action (Kubo et al., 2025, eq. 6).

    sum_{h<H} gamma^h m_h (r_h - alpha log pi_h) + gamma^H m_H (Q_H - alpha log pi_H); without ``root_entropy``, the term
    alpha log pi_0 is left out, which makes it the value of the first state and action.

    :param rewards: r_h, ``(H, B)``
    :param log_probs: log pi_h, ``(H + 1, B)``
    :param alive: m_h, 1 until the episode has ended, then 0, ``(H + 1, B)``; the first row is 1
    :param last_values: Q_H, ``(B,)``
    :param gamma: discount factor
    :param ent_coef: alpha
    :param root_entropy: whether the entropy of the first action counts
    :return: ``(B,)``
    """
    horizon = len(rewards)
    discounts = gamma ** th.arange(horizon + 1, dtype=rewards.dtype, device=rewards.device).unsqueeze(1)
    entropies = -ent_coef * log_probs
    if not root_entropy:
        entropies = th.cat([th.zeros_like(entropies[:1]), entropies[1:]])
    gains = th.cat([rewards, last_values.unsqueeze(0)]) + entropies
    return (discounts * alive * gains).sum(dim=0)


def with_values_of_ends(rewards: th.Tensor, alive: th.Tensor, values: th.Tensor) -> th.Tensor:
    """
    Rewards with the value of the state and action in place of the reward where the episode ends.

    Where the step is sure to end, both are the same number. Where it may also go on, with probability 1 - p, the sum is too
    high by p (1 - p) (value of going on - reward): branches that went on count as they are. But the reward of an end hardly
    changes with the action, so that a trajectory that ends passes no gradient back, while Q knows of the actions that would
    have gone on.

    :param rewards: ``(H, B)``
    :param alive: 1 until the episode has ended, then 0, ``(H + 1, B)``
    :param values: Q of the last state before the end and its action, ``(B,)``
    :return: ``(H, B)``
    """
    return th.where(alive[:-1] > alive[1:], values, rewards)


def value_bounds(
    soft_rewards: th.Tensor, alive: th.Tensor, quantiles: tuple[float, float], gamma: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    Lowest and highest plausible value: that of receiving a low or a high quantile of the soft rewards for ever, or their mean,
    which rare ones may bring beyond a quantile.

    Zero is always among them: it is what an episode that has ended is worth.

    :param soft_rewards: r - alpha log pi, ``(H, B)``
    :param alive: whether they were received, ``(H, B)``; at least one was
    :param quantiles: from 0 to 1, the lower one first
    :param gamma: discount factor
    :return: two scalar tensors
    """
    received = soft_rewards[alive > 0.5]
    low, high, mean = (value / (1 - gamma) for value in (*map(received.quantile, quantiles), received.mean()))
    return th.minimum(low, mean).clamp(max=0), th.maximum(high, mean).clamp(min=0)
