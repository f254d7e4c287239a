"""Estimates the memory that an agent will need."""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch as th

from sb3_mbpo.buffers.model_buffer import next_capacity
from sb3_mbpo.buffers.replay_buffer import ROWS
from sb3_mbpo.buffers.rollout_blocks import ROLLOUT_BLOCK
from sb3_mbpo.rollouts import LinearRolloutSchedule, make_schedule
from sb3_mbpo.validation.rules import LONGEST_AUTO

# Bytes of a float32 and of an index.
NUMBER, INDEX = 4, 8
# Memory limit of a container: a number of bytes, or "max".
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Each weight has a gradient and two Adam moments.
COPIES_OF_A_WEIGHT = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Maximum memory in bytes, if no imagined episode ends before its k steps.

    :param real_buffer: SB3's arrays, when full
    :param first_model_buffer: the model buffer before k starts to grow
    :param model_buffer: the model buffer at the end of the schedule of k
    :param growing: the old and the new model buffer while it is copied to its largest size
    :param rollouts: additional memory of a model rollout, at the end of the schedule
    :param networks: weights, gradients and optimizers
    :param lengths: first and last k
    """

    real_buffer: int
    first_model_buffer: int
    model_buffer: int
    growing: int
    rollouts: int
    networks: int
    lengths: tuple[int, int]

    @property
    def peak(self) -> int:
        """Maximum total memory at any time."""
        return self.real_buffer + max(self.model_buffer, self.growing) + self.rollouts + self.networks

    def __str__(self) -> str:
        first, last = self.lengths
        model_buffer = in_words(self.model_buffer)
        if last > first:
            model_buffer = f"{in_words(self.first_model_buffer)} (k = {first}) to {model_buffer} (k = {last})"
        if self.growing > self.model_buffer:
            model_buffer += f", {in_words(self.growing)} while it grows"
        return (
            f"memory: at most {in_words(self.peak)}: real buffer {in_words(self.real_buffer)}; model buffer {model_buffer}; "
            f"model rollouts {in_words(self.rollouts)}; networks and optimizers {in_words(self.networks)}"
        )


def in_words(n_bytes: float) -> str:
    """
    :param n_bytes: number of bytes
    :return: text such as ``1.2 GB``, with units of 1000
    """
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


def lengths_of(schedule: Any, first_refill: int, model_train_freq: int, retained_rollouts: int) -> Iterator[int]:
    """
    k of the model rollouts that matter for memory: if k is constant, the model buffer is full after ``retained_rollouts``.

    :param schedule: ``rollout_schedule``; for a function, only its value at ``first_refill`` is used
    :param first_refill: number of env transitions at the first model rollout
    :param model_train_freq: number of env transitions between two model rollouts
    :param retained_rollouts: number of model rollouts kept
    :return: an iterator over k
    """
    if schedule == "auto":
        # The minimum until the buffer is full, then the maximum.
        turn = first_refill + retained_rollouts * model_train_freq
        schedule = LinearRolloutSchedule(1, LONGEST_AUTO, turn, turn)
    schedule = make_schedule(schedule)
    end = schedule.end if isinstance(schedule, LinearRolloutSchedule) else first_refill
    times = [first_refill, *range((first_refill // model_train_freq + 1) * model_train_freq, end, model_train_freq)]
    times += [max(times[-1], end) + i * model_train_freq for i in range(retained_rollouts + 1)]
    known = isinstance(schedule, LinearRolloutSchedule)
    for k, run in groupby(int(schedule(time if known else first_refill)) for time in times):
        for _, _ in zip(run, range(retained_rollouts + 1), strict=False):
            yield k


def model_buffer_rows(
    lengths: Iterable[int], n_branches: int, block: int, retained_rollouts: int, max_rows: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """
    Simulate the growth of the model buffer.

    :param lengths: k of each model rollout
    :param n_branches: ``rollout_batch_size``
    :param block: number of branches added at once
    :param retained_rollouts: number of model rollouts kept
    :param max_rows: ``model_buffer_size``
    :return: for each model rollout: number of rows at its end; capacity in rows; rows in use during the last growth: the old
        capacity plus the copied rows (CPU), and the old plus the new capacity (a GPU allocates all of it)
    """
    refills: deque[int] = deque(maxlen=retained_rollouts)
    capacity, bound = 0, max_rows or sys.maxsize
    for k in lengths:
        if len(refills) == retained_rollouts:
            refills.popleft()
        held, copied, allocated = min(sum(refills), bound), 0, 0
        expected = held + n_branches * k
        for start in range(0, n_branches, block) if min(expected, bound) > capacity else ():
            new = min(block, n_branches - start) * k
            if min(held + new, bound) > capacity:
                larger = next_capacity(capacity, min(held + new, bound), expected, max_rows)
                copied, allocated, capacity = capacity + min(held, bound - min(new, bound)), capacity + larger, larger
            held = min(held + new, bound)
        refills.append(n_branches * k)
        yield min(sum(refills), bound), capacity, copied, allocated


def estimate(agent: Any) -> MemoryEstimate:
    """
    Estimate the memory of an agent.

    :param agent: a ModelBased algorithm with all its parts, just created or loaded
    :return: the estimate
    """
    buffer = agent.replay_buffer
    on_cpu = agent.device.type == "cpu"
    # With real_ratio=1, there are no model rollouts.
    n_branches, retained = agent.rollout_batch_size * (agent.real_ratio < 1), agent.retained_rollouts
    block = min(n_branches, ROLLOUT_BLOCK.get(agent.device.type, n_branches))
    lengths = list(lengths_of(agent.rollout_schedule, max(agent.learning_starts, 0) + 1, agent.model_train_freq, retained))
    course = list(model_buffer_rows(lengths, n_branches, block, retained, agent.model_buffer_size))
    width = sum(buffer.model_buffer.widths)
    # Transitions exist per step, concatenated and packed, two of the three at a time; and their indices.
    of_a_block = block * max(lengths) * (2 * width * NUMBER + 2 * INDEX)
    weights = (
        p
        for part in (agent.policy, agent.dynamics, agent.learned_reward, agent.learned_termination)
        for p in part.parameters()
    )
    return MemoryEstimate(
        real_buffer=sum(getattr(buffer, name).nbytes for name in ROWS),
        first_model_buffer=course[min(retained, lengths.count(lengths[0])) - 1][0] * width * NUMBER,
        model_buffer=course[-1][1] * width * NUMBER,
        growing=max(copied if on_cpu else allocated for _, _, copied, allocated in course) * width * NUMBER,
        rollouts=of_a_block + n_branches * buffer.model_buffer.widths[0] * NUMBER,
        networks=sum(COPIES_OF_A_WEIGHT * weight.nbytes for weight in weights),
        lengths=(lengths[0], max(lengths)),
    )


def machine_memory() -> int | None:
    """:return: memory of this machine, or the limit of its container, in bytes; ``None`` if it is unknown"""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(total, int(CONTAINER_LIMIT.read_text()))
    except (ValueError, OSError):
        return total


def most_imagined(agent: Any) -> int:
    """
    :param agent: see :func:`too_large`
    :return: size of the full model buffer at the end of the schedule of k, in bytes
    """
    schedule = agent.rollout_schedule
    schedule = LinearRolloutSchedule(LONGEST_AUTO, LONGEST_AUTO, 0, 0) if schedule == "auto" else make_schedule(schedule)
    # For a function, only its first value is known.
    longest = schedule.max_length if isinstance(schedule, LinearRolloutSchedule) else int(schedule(0))
    rows = agent.rollout_batch_size * agent.retained_rollouts * longest
    return min(rows, agent.model_buffer_size or sys.maxsize) * sum(agent.replay_buffer.model_buffer.widths) * NUMBER


def too_large(agent: Any) -> Iterator[str]:
    """
    Warn if the replay buffers do not fit into memory. They allocate it as they fill, so a run may fail after hours.

    :param agent: a ModelBased algorithm, just created or loaded
    :return: warnings
    """
    real = {"buffer_size": sum(getattr(agent.replay_buffer, name).nbytes for name in ROWS)}
    # With real_ratio=1, there are no model rollouts.
    imagined = {"rollout_batch_size": most_imagined(agent)} if agent.real_ratio < 1 else {}
    places = [("this machine", machine_memory(), real if agent.device.type == "cuda" else real | imagined)]
    if agent.device.type == "cuda":
        places.append((str(agent.device), th.cuda.get_device_properties(agent.device).total_memory, imagined))
    for place, total, parts in places:
        if total is not None and sum(parts.values()) > total:
            name = max(parts, key=parts.__getitem__)
            yield (
                f"{name}={getattr(agent, name)}: full replay buffers take {in_words(sum(parts.values()))}, but {place} has "
                f"{in_words(total)}. The system will end a run that fills them. Lower {name}"
            )
