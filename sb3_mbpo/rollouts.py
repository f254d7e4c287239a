"""Branched rollouts: imagined trajectories of k steps from real states."""

from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.filters import RolloutFilter


@th.no_grad()
def branched_rollout(
    dynamics: DynamicsModel,
    policy: Callable[[th.Tensor], th.Tensor],
    termination: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
    start_obs: th.Tensor,
    length: int,
    rollout_filter: RolloutFilter | None = None,
) -> ReplayBufferSamples:
    """
    Follow the policy in the dynamics for ``length`` steps from every start state.

    A terminal transition is kept and ends its branch. A transition with a non-finite number is dropped and ends its branch.
    With a filter, transitions come from ``DynamicsModel.predict``, and the filter decides which transitions are kept and which
    branches continue.

    :param dynamics: the dynamics, see ``DynamicsModel.sample``
    :param policy: maps raw observations ``(B, obs_dim)`` to actions in [-1, 1] ``(B, action_dim)``
    :param termination: maps ``(obs, actions, next_obs)``, with the same conventions, to bool ``(B,)``
    :param start_obs: start states ``(N, obs_dim)``, float32
    :param length: the rollout length k, at least 1
    :param rollout_filter: applies a rule of ``trust/filters.py``; ``None``: transitions come from ``DynamicsModel.sample``,
        and all are kept
    :return: the transitions ordered by step, at most ``N * length`` rows; rewards and dones are ``(rows, 1)``
    """
    obs, state = start_obs, None
    steps: list[tuple[th.Tensor, ...]] = []
    for step in range(length):
        actions, filtered = policy(obs), None
        if rollout_filter is None:
            next_obs, rewards = dynamics.sample(obs, actions)
        else:
            filtered = rollout_filter(obs, actions, step, length, state)
            next_obs, rewards = dynamics.postprocess(obs, actions, filtered.prediction[:, 1:], filtered.prediction[:, 0])
            rewards = rewards if filtered.penalty is None else rewards - filtered.penalty
        going = next_obs.isfinite().all(dim=1) & rewards.isfinite()
        if filtered is not None:
            going &= filtered.keep | filtered.proceed
            filtered = filtered.of(going)
        if not going.all():
            obs, actions, next_obs, rewards = (part[going] for part in (obs, actions, next_obs, rewards))
        if len(obs) == 0:
            break
        dones = termination(obs, actions, next_obs)
        rows: tuple[th.Tensor, ...] = (obs, actions, next_obs, dones.float().unsqueeze(1), rewards.unsqueeze(1))
        going = ~dones
        if filtered is not None:
            rows = tuple(part[filtered.keep] for part in rows)
            going &= filtered.proceed
            state = filtered.of(going).state
        steps.append(rows)
        obs = next_obs[going]
        if len(obs) == 0:
            break
    if not steps:
        steps.append((obs, actions, next_obs, rewards.new_zeros(0, 1), rewards.new_zeros(0, 1)))
    return ReplayBufferSamples(*(th.cat(parts) for parts in zip(*steps, strict=True)))
