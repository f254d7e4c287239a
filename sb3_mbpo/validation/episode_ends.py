"""What the ends of real episodes show: last observations that were lost, and time limits reported as terminations."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# A VecNormalize changes a last observation by rounding: relative to the values and to their spread.
ROUNDING = 1e-5
# Shortest time limit that is looked for, and the fewest episodes that must have ended there: if all did, and in general.
SHORTEST_LIMIT, FEWEST_ALL, FEWEST = 5, 3, 5

# Steps of each env after which one that never ended an episode is taken for one without a time limit.
ENDLESS = 10_000


class Steps(NamedTuple):
    """
    Real transitions in order of time, as in a ring: behind the last row comes the first.

    :param obs: ``(T, n_envs, obs_dim)``
    :param next_obs: ``(T, n_envs, obs_dim)``
    :param dones: ends of any kind, bool ``(T, n_envs)``
    :param limits: those by a time limit, bool ``(T, n_envs)``
    :param newest: row of the newest step; that after it is the oldest
    """

    obs: np.ndarray
    next_obs: np.ndarray
    dones: np.ndarray
    limits: np.ndarray
    newest: int


def lost_ends(steps: Steps, copied: bool = False) -> np.ndarray:
    """
    Ends of episodes that were stored with the first observation of the next episode in place of their own last one.

    This happens if a VecEnv gives no ``terminal_observation``, or if an env writes each observation to the same array and the
    VecEnv keeps a reference to it. Both spoil every end, or every end of one kind (termination, time limit). So the ends of a
    kind are lost if most of them are followed by what they are said to have led to, and lead elsewhere than they started.

    :param steps: at least one
    :param copied: last observations are known to have been copied. Then episodes that all end where all of them begin are
        taken for true; otherwise they cannot be told from lost ones
    :return: bool ``(T, n_envs)``
    """
    lost = np.zeros(steps.dones.shape, dtype=bool)
    for kind in (steps.limits, ~steps.limits):
        rows, envs = np.nonzero(steps.dones & kind)
        # What follows the newest step is not stored yet.
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
    """:return: which rows are the same up to rounding, bool ``(N,)``"""
    return (np.abs(first - second) <= ROUNDING * (np.abs(first) + np.abs(second) + spread)).all(axis=-1)


def lost_ends_warning(lost: np.ndarray, dones: np.ndarray) -> str:
    """
    :param lost: see :func:`lost_ends`
    :param dones: see :class:`Steps`
    """
    return (
        f"{int(lost.sum())} of {int(dones.sum())} episodes were stored with the first observation of the next one in place of "
        "their own last one. These transitions are left out of the fits of dynamics, reward and termination. Either the "
        "env writes its observations to one array: return a copy from step(), obs.copy(); or its VecEnv gives no "
        "infos[i]['terminal_observation']: put a copy of the last observation there before the reset"
    )


def reported_limit(steps: Steps, from_start: bool) -> str | None:
    """
    Whether terminations are a time limit of the env: many at one length that no episode exceeds, hardly any just below it, and
    no dimension of the observation that tells them from steps in the midst of an episode.

    :param steps: at least one, the last row the newest
    :param from_start: whether the first step is the first of an episode
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
        "time limit that the env reports as terminated. The agent then takes what comes after it to be worth 0. Report it as "
        f"truncated, as gymnasium.wrappers.TimeLimit(env, {longest}) does (in a VecEnv of your own: "
        "infos[i]['TimeLimit.truncated'] = True), or put the time that is left into the observation"
    )


def endless(dones: np.ndarray) -> str | None:
    """
    :param dones: ends of any kind of all real steps, ``(T, n_envs)``
    :return: a warning where no episode has ended for so long that the env seems to have no time limit, or ``None``
    """
    if len(dones) < ENDLESS or dones.any():
        return None
    return (
        f"No episode has ended in {len(dones):,} steps: it seems that the env has no time limit. It is never reset then, the "
        "agent learns of the states near its present one alone, and SB3 logs no returns. Give it a limit: "
        "gymnasium.wrappers.TimeLimit(env, max_episode_steps=1000). A plant that is meant to run on needs none"
    )


def _episodes(steps: Steps, from_start: bool) -> Iterator[tuple[int, int, int]]:
    """:return: of each episode, also those that were cut or go on, its length, last row and env"""
    breaks = steps.dones.copy()
    # A reset in between, at the start of another `learn`, leaves no other trace.
    breaks[:-1] |= (steps.next_obs[:-1] != steps.obs[1:]).any(axis=2)
    breaks[-1] = True
    for env in range(breaks.shape[1]):
        rows = np.flatnonzero(breaks[:, env])
        lengths = np.diff(rows, prepend=-1)
        start = 0 if from_start else 1
        yield from zip(lengths[start:].tolist(), rows[start:].tolist(), [env] * (len(rows) - start), strict=True)


def _shown(ends: np.ndarray, others: np.ndarray) -> bool:
    """:return: whether within the range of ``ends``, in some dimension, there are no more of the ``others`` than of them"""
    inside = (others >= ends.min(axis=0)) & (others <= ends.max(axis=0))
    return bool((inside.sum(axis=0) <= len(ends)).any())
