"""The model buffer: it stores imagined transitions."""

from collections import deque
from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples


def next_capacity(capacity: int, needed: int, expected: int | None, max_rows: int | None) -> int:
    """
    The capacity to grow to: 1.5 times the current one, so that copying stays cheap overall, but not more than needed.

    :param capacity: current capacity, in rows
    :param needed: number of rows that must fit, at most ``max_rows``
    :param expected: maximum number of rows at the end of the current model rollout; ``None``: unknown
    :param max_rows: maximum number of rows kept; ``None``: no limit
    :return: new capacity, in rows
    """
    bounds = [bound for bound in (capacity * 3 // 2, expected, max_rows) if bound is not None]
    return max(needed, min(bounds))


class ModelBuffer:
    """
    Imagined transitions of the last ``retained_rollouts`` model rollouts, on the training device.

    Rows are stored in one tensor that grows with its content and is used as a ring. A refill is the content of one model
    rollout. When a new one begins, the oldest one leaves completely. With ``max_rows``, the oldest rows leave as new ones are
    added.

    :param obs_dim: Size of a flat observation
    :param action_dim: Size of a flat action
    :param retained_rollouts: Number of model rollouts kept
    :param max_rows: Maximum number of rows kept; ``None``: all rows of the retained model rollouts
    :param device: Device of the rows
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        retained_rollouts: int = 4,
        max_rows: int | None = None,
        device: th.device | str = "cpu",
    ) -> None:
        # The order of the fields of ReplayBufferSamples.
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1]
        self.max_rows = max_rows
        self.rows = th.empty((0, sum(self.widths)), device=device)
        self.start = 0
        #: Maximum number of rows at the end of the current model rollout; ``None``: unknown.
        self.expected: int | None = None
        #: Number of rows of each retained model rollout, oldest first.
        self.refills: deque[int] = deque(maxlen=retained_rollouts)
        #: Number of model rollouts that were begun and not dropped.
        self.begun = 0
        # Start and sizes of the rows before the current model rollout; None once some of them may be overwritten.
        self._earlier: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return sum(self.refills)

    def begin_refill(self, n_rows: int | None = None) -> None:
        """
        Begin a new model rollout. The oldest one leaves if there are ``retained_rollouts`` already.

        :param n_rows: maximum number of its rows, which limits the capacity; ``None``: unknown
        """
        self.begun, self._earlier = self.begun + 1, (self.start, list(self.refills))
        if len(self.refills) == self.refills.maxlen:
            self._forget(self.refills[0])
            self.refills.popleft()
        self.expected = None if n_rows is None else len(self) + n_rows
        self.refills.append(0)

    def drop_refill(self) -> None:
        """
        Discard the current, unfinished model rollout. Evicted rows are not restored, unless nothing was added to it yet.
        """
        self.begun -= 1
        if self._earlier is not None:
            self.start, refills = self._earlier
            self._earlier = None
            self.refills.clear()
            self.refills.extend(refills)
        elif self.refills:
            # If several are dropped in a row, the list may be empty already.
            self.refills.pop()

    def add(self, transitions: ReplayBufferSamples) -> None:
        """
        Add transitions to the current model rollout.

        :param transitions: raw and flat, on this buffer's device; rewards and dones are ``(N, 1)``
        """
        self._append(th.cat(list(transitions[:5]), dim=1).to(self.rows.dtype))

    def _append(self, new: th.Tensor) -> None:
        self._earlier = None
        if self.max_rows is not None:
            new = new[-self.max_rows :]
            self._forget(len(self) + len(new) - self.max_rows)
        if len(self) + len(new) > len(self.rows):
            self._grow(len(self) + len(new))
        end = self.start + len(self)
        self.rows[th.arange(end, end + len(new), device=new.device) % max(len(self.rows), 1)] = new
        self.refills[-1] += len(new)

    def _forget(self, n_rows: int) -> None:
        """Drop the oldest ``n_rows``."""
        for i, size in enumerate(self.refills):
            dropped = min(max(n_rows, 0), size)
            self.refills[i] -= dropped
            self.start += dropped
            n_rows -= dropped
        self.start %= max(len(self.rows), 1)

    def _grow(self, n_rows: int) -> None:
        """Make room for ``n_rows``."""
        rows = self.rows.new_empty((next_capacity(len(self.rows), n_rows, self.expected, self.max_rows), sum(self.widths)))
        # Copy the two ends of the ring one after the other: gathering them by index would need a third copy in memory.
        first = self.rows[self.start : self.start + len(self)]
        rows[: len(first)] = first
        rows[len(first) : len(self)] = self.rows[: len(self) - len(first)]
        self.rows, self.start = rows, 0

    def _places(self, ages: th.Tensor) -> th.Tensor:
        """:return: indices in the ring of the rows with these ages (0 is the oldest)"""
        return (self.start + ages) % max(len(self.rows), 1)

    def contents(self) -> tuple[th.Tensor, list[int]]:
        """:return: packed rows, oldest first, and the number of rows of each model rollout"""
        return self.rows[self._places(th.arange(len(self), device=self.rows.device))], list(self.refills)

    def restore(self, rows: th.Tensor, refills: list[int]) -> None:
        """
        Replace the content by that of another buffer, within the limits of this one.

        :param rows: packed rows, oldest first
        :param refills: number of rows of each model rollout
        """
        self.refills.clear()
        for refill in rows.to(self.rows.device).split(refills) if refills else ():
            self.begin_refill()
            self._append(refill)

    def sample(self, n_rows: int, generator: th.Generator) -> th.Tensor:
        """
        Draw rows uniformly with replacement.

        :param n_rows: number of rows
        :param generator: random generator on this buffer's device
        :return: packed rows ``(n_rows, sum(widths))``, raw, float32
        """
        ages = th.randint(len(self), (n_rows,), generator=generator, device=self.rows.device)
        return self.rows.index_select(0, self._places(ages))

    def evenly_spaced(self, n_rows: int) -> th.Tensor:
        """
        :param n_rows: maximum number of rows
        :return: packed rows, evenly spaced by age, including the newest; no random numbers are drawn
        """
        n_rows = min(n_rows, len(self))
        # Integers, because float32 is exact only up to 16 million.
        ages = (th.arange(1, n_rows + 1, device=self.rows.device) * len(self)) // max(n_rows, 1) - 1
        return self.rows.index_select(0, self._places(ages))

    def relabel(
        self, terminates: Callable[..., th.Tensor], reward: Callable[..., th.Tensor] | None, block: int = 10_000
    ) -> int:
        """
        Set the dones of all rows by a new termination rule.

        :param terminates: maps ``(obs, actions, next_obs)`` to bool ``(B,)``
        :param reward: maps ``(obs, actions, next_obs, terminated)`` to ``(B,)``; for rows whose done changes, the difference
            between both values of ``terminated`` is added to the reward; ``None``: rewards are not changed
        :param block: number of rows processed at once
        :return: number of changed rows
        """
        changed = 0
        for ages in th.arange(len(self), device=self.rows.device).split(block):
            places = self._places(ages)
            transition = self.rows[places].split(self.widths, dim=1)[:3]
            other = terminates(*transition) != (self.rows[places, -2] > 0.5)
            rows = self.rows[places[other]]
            transition, ended = rows.split(self.widths, dim=1)[:3], rows[:, -2] < 0.5
            rows[:, -2] = ended.float()
            if reward is not None and len(rows):
                rows[:, -1] += reward(*transition, ended) - reward(*transition, ~ended)
            self.rows[places[other]] = rows
            changed += len(rows)
        return changed

    def rewards(self) -> th.Tensor:
        """:return: rewards of all rows ``(N, 1)``, oldest first"""
        return self.rows[:, -1:].index_select(0, self._places(th.arange(len(self), device=self.rows.device)))
