"""How much memory an agent is going to take, said before it takes it."""

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
from sb3_mbpo.rollouts import LONGEST_AUTO, LinearRolloutSchedule, make_schedule

# Bytes of a float32 and of an index.
NUMBER, INDEX = 4, 8
# Of a container: bytes that it may have, or "max".
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
# A weight, its gradient and Adam's two moments.
COPIES_OF_A_WEIGHT = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes, at most: as if no imagined episode ended before its k steps.

    :param real_buffer: SB3's arrays, when full
    :param first_model_buffer: the imagined transitions before k begins to grow
    :param model_buffer: the same at the end of the schedule of k
    :param growing: the same as it moves to its last, largest place, the old one included
    :param rollouts: what a refill needs besides, at the end of the schedule
    :param networks: weights, gradients and optimizers
    :param lengths: the first and the last k
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
        """All of it at the worst moment."""
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
            f"refills {in_words(self.rollouts)}; networks and optimizers {in_words(self.networks)}"
        )


def in_words(n_bytes: float) -> str:
    """:return: ``1.2 GB``; units of 1000"""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


def lengths_of(schedule: Any, first_refill: int, model_train_freq: int, retained_rollouts: int) -> Iterator[int]:
    """
    k of the refills that matter for memory: where it stays, the model buffer is full after ``retained_rollouts``.

    :param schedule: ``rollout_schedule``; of a function nothing is known but its value at ``first_refill``
    :param first_refill: env transitions at the first refill
    :param model_train_freq: env transitions from one refill to the next
    :param retained_rollouts: refills kept
    """
    if schedule == "auto":
        # At the least until the buffer is full, then at the most.
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
    The model buffer's growth, followed without its content.

    :param lengths: k of each refill
    :param n_branches: ``rollout_batch_size``
    :param block: branches added at once
    :param retained_rollouts: refills kept
    :param max_rows: ``model_buffer_size``
    :return: of each refill: rows held in its end; rows there is room for; rows in use as it last grew: the old place and what
        was copied from it, and the same with the whole of the new place, which a GPU hands out at once
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
    :param agent: a ModelBased algorithm with all its parts, just built or loaded
    """
    buffer = agent.replay_buffer
    on_cpu = agent.device.type == "cpu"
    # Nothing is imagined with the model off.
    n_branches, retained = agent.rollout_batch_size * (agent.real_ratio < 1), agent.retained_rollouts
    block = min(n_branches, ROLLOUT_BLOCK.get(agent.device.type, n_branches))
    lengths = list(lengths_of(agent.rollout_schedule, max(agent.learning_starts, 0) + 1, agent.model_train_freq, retained))
    course = list(model_buffer_rows(lengths, n_branches, block, retained, agent.model_buffer_size))
    width = sum(buffer.model_buffer.widths)
    # In steps, joined, packed: two of the three at a time; and where to put them.
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
    """:return: bytes of this machine, or of the container that the process is in; ``None``: the system does not say"""
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
    :return: bytes of the full model buffer, at the end of the schedule of k
    """
    schedule = agent.rollout_schedule
    schedule = LinearRolloutSchedule(LONGEST_AUTO, LONGEST_AUTO, 0, 0) if schedule == "auto" else make_schedule(schedule)
    # Of a function nothing is known but its first value.
    longest = schedule.max_length if isinstance(schedule, LinearRolloutSchedule) else int(schedule(0))
    rows = agent.rollout_batch_size * agent.retained_rollouts * longest
    return min(rows, agent.model_buffer_size or sys.maxsize) * sum(agent.replay_buffer.model_buffer.widths) * NUMBER


def too_large(agent: Any) -> Iterator[str]:
    """
    Warn of replay buffers that do not fit. Memory is taken as they fill, so a run may die after hours.

    :param agent: a ModelBased algorithm, just built or loaded
    :return: warnings
    """
    real = {"buffer_size": sum(getattr(agent.replay_buffer, name).nbytes for name in ROWS)}
    # Nothing is imagined with the model off.
    imagined = {"rollout_batch_size": most_imagined(agent)} if agent.real_ratio < 1 else {}
    places = [("this machine", machine_memory(), real if agent.device.type == "cuda" else real | imagined)]
    if agent.device.type == "cuda":
        places.append((str(agent.device), th.cuda.get_device_properties(agent.device).total_memory, imagined))
    for place, total, parts in places:
        if total is not None and sum(parts.values()) > total:
            name = max(parts, key=parts.__getitem__)
            yield (
                f"{name}={getattr(agent, name)}: full replay buffers take {in_words(sum(parts.values()))}, and {place} has "
                f"{in_words(total)}. A run that fills them will be ended by the system. Lower {name}"
            )
