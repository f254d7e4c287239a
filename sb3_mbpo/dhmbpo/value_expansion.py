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
    Soft value of the first state, or of the first state and action, of imagined trajectories (Kubo et al., 2025, eq. 6).

    sum_{h<H} gamma^h m_h (r_h - alpha log pi_h) + gamma^H m_H (Q_H - alpha log pi_H). Without the term alpha log pi_0, it is
    the value of the first state and action.

    :param rewards: r_h, ``(H, B)``
    :param log_probs: log pi_h, ``(H + 1, B)``
    :param alive: m_h, 1 until the episode has ended, then 0, ``(H + 1, B)``; the first row is 1
    :param last_values: Q_H, ``(B,)``
    :param gamma: discount factor
    :param ent_coef: alpha
    :param root_entropy: whether to include the entropy of the first action
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
    Replace the reward of the last step of an episode by Q of the last state and action.

    The reward of an end hardly depends on the action, so a trajectory that ends would have almost no gradient. Q also knows
    what other actions lead to. If the step always ends the episode, Q equals the reward. If it ends the episode with
    probability p only, the sum is too high by p (1 - p) (value of going on - reward), because trajectories that go on are not
    changed.

    :param rewards: ``(H, B)``
    :param alive: 1 until the episode has ended, then 0, ``(H + 1, B)``
    :param values: Q of the last state before the end and of its action, ``(B,)``
    :return: ``(H, B)``
    """
    return th.where(alive[:-1] > alive[1:], values, rewards)


def value_bounds(
    soft_rewards: th.Tensor, alive: th.Tensor, quantiles: tuple[float, float], gamma: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    Lowest and highest plausible value: a low and a high quantile of the soft rewards, divided by 1 - gamma.

    The mean of the soft rewards is also within the bounds; rare rewards may bring it beyond a quantile. So is zero, the value
    after the end of an episode.

    :param soft_rewards: r - alpha log pi, ``(H, B)``
    :param alive: 1 where the reward was received, otherwise 0, ``(H, B)``; at least one must be 1
    :param quantiles: two numbers from 0 to 1, the lower one first
    :param gamma: discount factor
    :return: lower and upper bound, scalar tensors
    """
    received = soft_rewards[alive > 0.5]
    low, high, mean = (value / (1 - gamma) for value in (*map(received.quantile, quantiles), received.mean()))
    return th.minimum(low, mean).clamp(max=0), th.maximum(high, mean).clamp(min=0)
