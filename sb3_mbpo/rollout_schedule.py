"""The argument ``rollout_schedule``: how the rollout length k follows from the env transitions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sb3_mbpo.validation.argument_table import ARGUMENTS, MOST_STEPS
from sb3_mbpo.validation.class_registry import described
from sb3_mbpo.validation.rules import is_number, shown, whole

RolloutSchedule = Callable[[int], int]


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
        raise ValueError(f"rollout_schedule={shown(spec)} is not a schedule: the length follows from the dynamics")
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
