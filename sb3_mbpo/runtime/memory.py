"""Estimates the memory that an agent will need."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from sb3_mbpo.buffers.replay_buffer import ROWS
from sb3_mbpo.buffers.rollout_blocks import ROLLOUT_BLOCK
from sb3_mbpo.rollout_schedule import LinearRolloutSchedule, make_schedule
from sb3_mbpo.validation.argument_table import LONGEST_AUTO

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


def _first_and_last_length(agent: Any) -> tuple[int, int]:
    """:return: k of the first model rollout, and the largest k; of a function, only the first is known"""
    if agent.rollout_schedule == "auto":
        return 1, LONGEST_AUTO
    schedule = make_schedule(agent.rollout_schedule)
    first = int(schedule(max(agent.learning_starts, 0) + 1))
    return first, schedule.max_length if isinstance(schedule, LinearRolloutSchedule) else first


def estimate(agent: Any) -> MemoryEstimate:
    """
    Estimate the memory of an agent.

    While the model buffer grows, the old one and its copy both exist. The last growth is by one model rollout, or, if k grows
    slowly, by one step of every branch. But a buffer never grows by much more than a half.

    :param agent: a ModelBased algorithm with all its parts, just created or loaded
    :return: the estimate
    """
    buffer, parts = agent.replay_buffer, (agent.policy, agent.dynamics, agent.learned_reward, agent.learned_termination)
    first, last = _first_and_last_length(agent)
    # With real_ratio=1, there are no model rollouts.
    n_branches, retained = agent.rollout_batch_size * (agent.real_ratio < 1), agent.retained_rollouts
    widths = buffer.model_buffer.widths
    rows, most = n_branches * retained, agent.model_buffer_size or sys.maxsize
    first_size, size = (min(rows * k, most) * sum(widths) * NUMBER for k in (first, last))
    # Where model_buffer_size limits it, the old one may hold anything from two thirds on.
    share = 0.85 if rows * last > most else max(1 - 1 / (retained * (last if last > first else 1)), 0.75)
    old = int(size * share)
    block = min(n_branches, ROLLOUT_BLOCK.get(agent.device.type, n_branches))
    # Transitions exist per step, concatenated and packed, two of the three at a time; and their indices.
    of_a_block = block * last * (2 * sum(widths) * NUMBER + 2 * INDEX)
    return MemoryEstimate(
        real_buffer=sum(getattr(buffer, name).nbytes for name in ROWS),
        first_model_buffer=first_size,
        model_buffer=size,
        # A CPU hands out memory as it is written, a GPU all of it.
        growing=old + (old if agent.device.type == "cpu" else size),
        rollouts=of_a_block + n_branches * widths[0] * NUMBER,
        networks=sum(COPIES_OF_A_WEIGHT * weight.nbytes for part in parts for weight in part.parameters()),
        lengths=(first, last),
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


def too_large(agent: Any) -> Iterator[str]:
    """
    Warn if the replay buffers do not fit into memory. They allocate it as they fill, so a run may fail after hours.

    :param agent: a ModelBased algorithm, just created or loaded
    :return: warnings
    """
    needed = estimate(agent)
    real, imagined = {"buffer_size": needed.real_buffer}, {"rollout_batch_size": needed.model_buffer}
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
