"""Training rollouts: short imagined trajectories with gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_mbpo.dynamics.base import DynamicsModel


class TrainingRollout(NamedTuple):
    """
    B imagined trajectories of H steps. The first dimension is time.

    :param obs: raw observations ``(H + 1, B, obs_dim)``
    :param actions: in [-1, 1], ``(H + 1, B, action_dim)``
    :param log_probs: log-probabilities of these actions, ``(H + 1, B)``
    :param rewards: ``(H, B)``
    :param alive: 1 until the episode has ended, then 0, ``(H + 1, B)``; without gradient
    :param valid: whether all predictions of the trajectory were finite, bool ``(B,)``
    """

    obs: th.Tensor
    actions: th.Tensor
    log_probs: th.Tensor
    rewards: th.Tensor
    alive: th.Tensor
    valid: th.Tensor

    def of(self, rows: th.Tensor) -> "TrainingRollout":
        """:return: the trajectories with ``rows``, bool ``(B,)``, set"""
        return TrainingRollout(*[*(part[:, rows] for part in self[:5]), self.valid[rows]])

    def last(self) -> tuple[th.Tensor, th.Tensor]:
        """:return: each trajectory's last state before its end ``(B, obs_dim)``, and the action there ``(B, action_dim)``"""
        at = self.alive.sum(dim=0).long() - 1
        rows = th.arange(len(at), device=at.device)
        return self.obs[at, rows], self.actions[at, rows]


Reward = Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def training_rollout(
    dynamics: DynamicsModel,
    policy: Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]],
    termination: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
    start_obs: th.Tensor,
    horizon: int,
    reward: Reward | None = None,
) -> TrainingRollout:
    """
    Roll out the policy in the dynamics, and keep the graph of actions, states and rewards.

    After its end, or after a prediction that is not finite, a trajectory stays in its last state, with ``alive`` 0 and without
    gradients. The latter is not a termination, and the value there is unknown: drop such trajectories, see ``valid``.

    :param dynamics: differentiable, see ``DynamicsModel.sample``
    :param policy: maps raw observations ``(B, obs_dim)`` to reparameterized actions in [-1, 1] and their log-probabilities
        ``(B,)``
    :param termination: maps ``(obs, actions, next_obs)`` to bool ``(B,)``; called without gradients
    :param start_obs: ``(B, obs_dim)``
    :param horizon: H, at least 1
    :param reward: maps ``(obs, actions, next_obs, ended)`` to ``(N,)``; called once with all steps. ``None``: the rewards of
        the dynamics
    """
    obs, alive = [start_obs], [th.ones_like(start_obs[:, 0])]
    first_actions, first_log_probs = policy(start_obs)
    actions, log_probs = [first_actions], [first_log_probs]
    rewards, ends, counted = [], [], []
    valid = th.ones(len(start_obs), dtype=th.bool, device=start_obs.device)
    for _ in range(horizon):
        now, action, going = obs[-1], actions[-1], alive[-1] > 0.5
        inputs = now.view_as(now), action.view_as(action)
        next_obs, own_reward = dynamics.sample(*inputs)
        finite = next_obs.detach().isfinite().all(dim=1)
        if reward is None:
            finite = finite & own_reward.detach().isfinite()
        counts = going & finite
        valid &= finite | ~going
        kept = _kept(inputs, counts, next_obs, now)
        with th.no_grad():
            ended = termination(now.detach(), action.detach(), kept.detach())
        rewards.append(own_reward)
        ends.append(ended)
        counted.append(counts)
        alive.append((counts & ~ended).to(start_obs.dtype))
        obs.append(kept)
        next_actions, next_log_probs = policy(kept)
        actions.append(next_actions)
        log_probs.append(next_log_probs)
    received, counts = th.stack(rewards), th.stack(counted)
    if reward is not None:
        steps = th.cat(obs[:-1]), th.cat(actions[:-1]), th.cat(obs[1:])
        flat = reward(*steps, th.cat(ends))
        finite = flat.detach().isfinite()
        _gradient_only_of(steps, finite & counts.flatten())
        received = flat.unflatten(0, (horizon, -1))
        valid &= (finite.unflatten(0, (horizon, -1)) | ~counts).all(dim=0)
    received = th.where(counts & received.detach().isfinite(), received, 0.0)
    states = (th.stack(parts) for parts in (obs, actions, log_probs))
    return TrainingRollout(*[*states, received, th.stack(alive), valid])


def _kept(inputs: tuple[th.Tensor, ...], counts: th.Tensor, next_obs: th.Tensor, now: th.Tensor) -> th.Tensor:
    """:return: the next observations where ``counts``, otherwise the current ones"""
    if counts.all():
        return next_obs
    _gradient_only_of(inputs, counts)
    return th.where(counts.unsqueeze(1), next_obs, now.detach())


def _gradient_only_of(inputs: tuple[th.Tensor, ...], rows: th.Tensor) -> None:
    """
    Set the gradients of the other rows to zero. They may be NaN, even if the predictions are not used.

    :param inputs: inputs of a prediction, each ``(N, size)``
    :param rows: rows that keep their gradients, bool ``(N,)``
    """
    if not rows.all():
        for tensor in inputs:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradient.masked_fill(~rows.unsqueeze(1), 0.0))
