"""Branched rollouts: imagined trajectories of k steps from real states, and the schedules of k."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.filters import RolloutFilter
from sb3_mbpo.validation.registry import described
from sb3_mbpo.validation.rules import is_number, shown, whole
from sb3_mbpo.validation.table import ARGUMENTS, MOST_STEPS

RolloutSchedule = Callable[[int], int]


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


@described("rollout_schedule")
@dataclass(frozen=True)
class LinearRolloutSchedule:
    """
    The paper's schedule: k grows linearly from ``min_length`` at ``start`` to ``max_length`` at ``end``, rounded down.

    :param min_length: k until ``start``
    :param max_length: k from ``end`` on
    :param start: number of env transitions, random ones included, at which k starts to grow
    :param end: number of env transitions at which k reaches ``max_length``
    """

    min_length: int
    max_length: int
    start: int
    end: int

    def __post_init__(self) -> None:
        for name in ("min_length", "max_length", "start", "end"):
            length = name.endswith("length")
            whole(1 if length else 0, MOST_STEPS if length else None).check(f"rollout_schedule: {name}", getattr(self, name))
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(
                f"rollout_schedule: min_length={self.min_length} and max_length={self.max_length} must satisfy "
                "1 <= min_length <= max_length (imagined rollouts have at least one step and never shrink)"
            )
        if not 0 <= self.start <= self.end:
            raise ValueError(f"rollout_schedule: start={self.start} and end={self.end} must satisfy 0 <= start <= end")

    def __call__(self, num_timesteps: int) -> int:
        """
        k = floor(k0 + clip((t - t0) / (t1 - t0), 0, 1) (k1 - k0))

        :param num_timesteps: t, the agent's total env transitions
        :return: k
        """
        if num_timesteps >= self.end:
            return self.max_length
        grown = max(num_timesteps - self.start, 0) * (self.max_length - self.min_length)
        # In integers: a float quotient just below a whole number would be rounded down.
        return self.min_length + grown // max(self.end - self.start, 1)


def make_schedule(spec: int | str | dict[str, int] | RolloutSchedule) -> RolloutSchedule:
    """
    Make a schedule from the argument ``rollout_schedule``.

    :param spec: a fixed length, the keywords of ``LinearRolloutSchedule``, or any callable from env transitions to a length
    :return: callable from env transitions to k
    :raises ValueError: ``spec`` is none of these, or a length is below 1
    """
    ARGUMENTS["rollout_schedule"].check("rollout_schedule", spec)
    keys = ["min_length", "max_length", "start", "end"]
    if isinstance(spec, str):
        raise ValueError(f"rollout_schedule={shown(spec)} is no schedule: the length follows from the dynamics")
    if isinstance(spec, Mapping):
        if set(spec) != set(keys):
            raise ValueError(f"rollout_schedule={shown(spec)} must have exactly the keys {', '.join(keys)}")
        return LinearRolloutSchedule(**spec)
    return spec if callable(spec) else LinearRolloutSchedule(spec, spec, 0, 0)  # type: ignore[arg-type]


def rollout_length(spec: int | str | dict[str, int] | RolloutSchedule, num_timesteps: int) -> int:
    """
    The rollout length k after ``num_timesteps`` env transitions.

    :param spec: see ``make_schedule``
    :param num_timesteps: the agent's total env transitions
    :return: k
    :raises ValueError: the schedule is invalid, or returns something other than a whole number of at least 1
    """
    schedule = make_schedule(spec)
    expected = f"not a whole number >= 1 and at most {MOST_STEPS:,}"
    try:
        length = schedule(num_timesteps)
    except Exception as error:
        raise ValueError(
            f"rollout_schedule={shown(spec)} raises {type(error).__name__}: {error} at step {num_timesteps}, {expected}"
        ) from error
    if not is_number(length, 1, MOST_STEPS) or int(length) != length:
        raise ValueError(f"rollout_schedule={shown(spec)} returns {shown(length)} at step {num_timesteps}, {expected}")
    return int(length)
