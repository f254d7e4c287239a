"""Checks the ends of real episodes: lost last observations, and time limits reported as terminations."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# VecNormalize changes a last observation by rounding. Tolerance relative to the values and to their standard deviation.
ROUNDING = 1e-5
# Minimum time limit to detect, and minimum number of episodes that ended there: if all did, and otherwise.
SHORTEST_LIMIT, FEWEST_ALL, FEWEST = 5, 3, 5

# An env without the end of an episode for this many steps is assumed to have no time limit.
ENDLESS = 10_000


class Steps(NamedTuple):
    """
    Real transitions ordered by time, as in a ring: the first row follows the last one.

    :param obs: ``(T, n_envs, obs_dim)``
    :param next_obs: ``(T, n_envs, obs_dim)``
    :param dones: ends of any kind, bool ``(T, n_envs)``
    :param limits: ends by a time limit, bool ``(T, n_envs)``
    :param newest: row of the newest step; the next row is the oldest
    """

    obs: np.ndarray
    next_obs: np.ndarray
    dones: np.ndarray
    limits: np.ndarray
    newest: int


def lost_ends(steps: Steps, copied: bool = False) -> np.ndarray:
    """
    Find ends of episodes that were stored with the first observation of the next episode instead of their last observation.

    This happens if a VecEnv does not provide ``terminal_observation``, or if an env writes each observation to the same array
    and the VecEnv keeps a reference to it. Both affect every end, or every end of one kind (termination, time limit). So the
    ends of a kind count as lost if for most of them ``next_obs`` equals the first observation of the next episode, and
    differs from ``obs``.

    :param steps: at least one step
    :param copied: whether last observations are known to be copied. If so, episodes that all end where they all start are
        accepted; otherwise, they cannot be distinguished from lost ends
    :return: bool ``(T, n_envs)``
    """
    lost = np.zeros(steps.dones.shape, dtype=bool)
    for kind in (steps.limits, ~steps.limits):
        rows, envs = np.nonzero(steps.dones & kind)
        # The step after the newest one is not stored yet.
        followed = rows != steps.newest
        at = rows[followed], envs[followed]
        before, last = (part[at].astype(np.float64) for part in (steps.obs, steps.next_obs))
        first = steps.obs[(at[0] + 1) % len(steps.obs), at[1]].astype(np.float64)
        spread = steps.obs[:: 1 + len(steps.obs) // 1000].std(axis=(0, 1), dtype=np.float64)
        same = _close(last, first, spread) & ~_close(last, before, spread)
        if 2 * same.sum() <= len(same):
            continue
        if copied and _close(first[same], first[same][:1], spread).all():
            continue
        found = np.ones(len(rows), dtype=bool)
        found[followed] = same
        lost[rows[found], envs[found]] = True
    return lost


def _close(first: np.ndarray, second: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """:return: which rows are equal up to rounding, bool ``(N,)``"""
    return (np.abs(first - second) <= ROUNDING * (np.abs(first) + np.abs(second) + spread)).all(axis=-1)


def lost_ends_warning(lost: np.ndarray, dones: np.ndarray) -> str:
    """
    :param lost: see :func:`lost_ends`
    :param dones: see :class:`Steps`
    :return: the warning
    """
    return (
        f"{int(lost.sum())} of {int(dones.sum())} episodes were stored with the first observation of the next one in place of "
        "their own last one. These transitions are left out of the fits of dynamics, reward and termination. Either the "
        "env writes all observations to the same array: return a copy from step(), obs.copy(); or its VecEnv does not set "
        "infos[i]['terminal_observation']: set it to a copy of the last observation before the reset"
    )


def reported_limit(steps: Steps, from_start: bool) -> str | None:
    """
    Check whether terminations are a time limit of the env: many episodes end at the same length, no episode is longer, hardly
    any ends just before, and no dimension of the observation distinguishes these ends from other steps.

    :param steps: at least one step; the last row is the newest
    :param from_start: whether the first step is the first one of an episode
    :return: a warning, or ``None``
    """
    episodes = list(_episodes(steps, from_start))
    ended = [(length, row, env) for length, row, env in episodes if steps.dones[row, env] and not steps.limits[row, env]]
    lengths = np.array([length for length, *_ in ended])
    longest = max((length for length, *_ in episodes), default=0)
    at_longest = lengths == longest
    n, below = int(at_longest.sum()), int(((lengths < longest) & (lengths >= 0.9 * longest - 1)).sum())
    if longest < SHORTEST_LIMIT or n < (FEWEST_ALL if n == len(ended) else FEWEST) or n <= 4 * below:
        return None
    rows, envs = (np.array(part)[at_longest] for part in list(zip(*ended, strict=True))[1:])
    if _shown(steps.next_obs[rows, envs], steps.next_obs[~steps.dones]):
        return None
    return (
        f"{n} of {len(ended)} terminated episodes ended after exactly {longest} steps, and none was longer: this looks like a "
        "time limit that the env reports as terminated. The agent then learns that the value after it is 0. Report it as "
        f"truncated, as gymnasium.wrappers.TimeLimit(env, {longest}) does (in your own VecEnv: "
        "infos[i]['TimeLimit.truncated'] = True), or add the remaining time to the observation"
    )


def endless(dones: np.ndarray) -> str | None:
    """
    Check whether the env seems to have no time limit.

    :param dones: ends of any kind of all real steps, ``(T, n_envs)``
    :return: a warning if no episode has ended for a long time, or ``None``
    """
    if len(dones) < ENDLESS or dones.any():
        return None
    return (
        f"No episode has ended in {len(dones):,} steps: it seems that the env has no time limit. Then it is never reset, the "
        "agent learns only about states near the current one, and SB3 logs no returns. Add a time limit: "
        "gymnasium.wrappers.TimeLimit(env, max_episode_steps=1000). Ignore this for an env that is meant to run forever"
    )


def _episodes(steps: Steps, from_start: bool) -> Iterator[tuple[int, int, int]]:
    """:return: length, last row and env of each episode, including unfinished and truncated ones"""
    breaks = steps.dones.copy()
    # A reset at the start of another `learn` is visible only here.
    breaks[:-1] |= (steps.next_obs[:-1] != steps.obs[1:]).any(axis=2)
    breaks[-1] = True
    for env in range(breaks.shape[1]):
        rows = np.flatnonzero(breaks[:, env])
        lengths = np.diff(rows, prepend=-1)
        start = 0 if from_start else 1
        yield from zip(lengths[start:].tolist(), rows[start:].tolist(), [env] * (len(rows) - start), strict=True)


def _shown(ends: np.ndarray, others: np.ndarray) -> bool:
    """:return: whether in some dimension at most as many ``others`` as ``ends`` are in the range of ``ends``"""
    inside = (others >= ends.min(axis=0)) & (others <= ends.max(axis=0))
    return bool((inside.sum(axis=0) <= len(ends)).any())
