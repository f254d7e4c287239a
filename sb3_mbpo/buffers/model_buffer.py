"""Where imagined transitions wait."""

from collections import deque
from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples


def next_capacity(capacity: int, needed: int, expected: int | None, max_rows: int | None) -> int:
    """
    Rows to make room for: half as many again as now, so that growing stays cheap on the whole, but no more than will come.

    :param capacity: rows there is room for now
    :param needed: rows there must be room for, at most ``max_rows``
    :param expected: rows at the end of the present refill, at most; ``None``: unknown
    :param max_rows: most rows kept; ``None``: no bound
    """
    bounds = [bound for bound in (capacity * 3 // 2, expected, max_rows) if bound is not None]
    return max(needed, min(bounds))


class ModelBuffer:
    """
    The imagined transitions of the last ``retained_rollouts`` refills, on the training device.

    Rows are packed side by side in one tensor that grows with its content and is used as a ring: the oldest refill leaves as a
    whole when a new one begins; within ``max_rows`` the oldest rows leave as new ones come.

    :param obs_dim: size of a flat observation
    :param action_dim: size of a flat action
    :param retained_rollouts: refills kept
    :param max_rows: most rows kept; ``None``: as many as the retained refills bring
    :param device: where the rows live
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
        #: Rows at the end of the present refill, at most; ``None``: unknown.
        self.expected: int | None = None
        #: Number of rows of each retained refill, oldest first.
        self.refills: deque[int] = deque(maxlen=retained_rollouts)
        #: How many refills were begun and not dropped.
        self.begun = 0
        # Where the rows of before the present refill stand, and how many; None once it has overwritten some of them.
        self._earlier: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return sum(self.refills)

    def begin_refill(self, n_rows: int | None = None) -> None:
        """
        Open a new refill; the oldest leaves if ``retained_rollouts`` are there already.

        :param n_rows: most rows that it will bring, if that is known: no room is made for more
        """
        self.begun, self._earlier = self.begun + 1, (self.start, list(self.refills))
        if len(self.refills) == self.refills.maxlen:
            self._forget(self.refills[0])
            self.refills.popleft()
        self.expected = None if n_rows is None else len(self) + n_rows
        self.refills.append(0)

    def drop_refill(self) -> None:
        """
        Discard the refill that was begun last. As long as nothing was added to it, all is as before; after that, what was
        evicted for it is not restored.
        """
        self.begun -= 1
        if self._earlier is not None:
            self.start, refills = self._earlier
            self._earlier = None
            self.refills.clear()
            self.refills.extend(refills)
        elif self.refills:
            # Of several that are dropped, the first may have made room for the last.
            self.refills.pop()

    def add(self, transitions: ReplayBufferSamples) -> None:
        """
        Put transitions into the refill that was begun last.

        :param transitions: raw, flat, on this buffer's device; rewards and dones ``(N, 1)``
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
        # The ring's two ends one after the other: gathered by index they would be there a third time meanwhile.
        first = self.rows[self.start : self.start + len(self)]
        rows[: len(first)] = first
        rows[len(first) : len(self)] = self.rows[: len(self) - len(first)]
        self.rows, self.start = rows, 0

    def _places(self, ages: th.Tensor) -> th.Tensor:
        """Where the rows with these ages (0 is the oldest) stand in the ring."""
        return (self.start + ages) % max(len(self.rows), 1)

    def contents(self) -> tuple[th.Tensor, list[int]]:
        """:return: packed rows, oldest first, and how many of them each refill has"""
        return self.rows[self._places(th.arange(len(self), device=self.rows.device))], list(self.refills)

    def restore(self, rows: th.Tensor, refills: list[int]) -> None:
        """
        Hold what another buffer held, as far as this one's limits go.

        :param rows: packed, oldest first
        :param refills: how many of them each refill has
        """
        self.refills.clear()
        for refill in rows.to(self.rows.device).split(refills) if refills else ():
            self.begin_refill()
            self._append(refill)

    def sample(self, n_rows: int, generator: th.Generator) -> th.Tensor:
        """
        :param n_rows: drawn uniformly with replacement
        :param generator: source of the draw, on this buffer's device
        :return: packed rows ``(n_rows, sum(widths))``, raw, float32
        """
        ages = th.randint(len(self), (n_rows,), generator=generator, device=self.rows.device)
        return self.rows.index_select(0, self._places(ages))

    def evenly_spaced(self, n_rows: int) -> th.Tensor:
        """:return: at most ``n_rows`` packed rows at even distances in age, the newest among them; nothing is drawn"""
        n_rows = min(n_rows, len(self))
        # Integers: float32 tells only the first 16 million apart.
        ages = (th.arange(1, n_rows + 1, device=self.rows.device) * len(self)) // max(n_rows, 1) - 1
        return self.rows.index_select(0, self._places(ages))

    def relabel(
        self, terminates: Callable[..., th.Tensor], reward: Callable[..., th.Tensor] | None, block: int = 10_000
    ) -> int:
        """
        Let rows end where an episode ends by another rule now.

        :param terminates: ``(obs, actions, next_obs)`` -> bool ``(B,)``
        :param reward: ``(obs, actions, next_obs, terminated)`` -> ``(B,)``; what it changes with ``terminated`` is added to
            the rewards of these rows; ``None``: nothing
        :param block: rows that are looked at together
        :return: number of rows that have changed
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
        """:return: those of all rows ``(N, 1)``, oldest first"""
        return self.rows[:, -1:].index_select(0, self._places(th.arange(len(self), device=self.rows.device)))
