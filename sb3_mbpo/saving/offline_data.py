"""Reads transitions from datasets and arrays, in the form in which the replay buffer stores them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

_REQUIRED = ("observations", "actions", "rewards", "next_observations", "terminations")
_ALL = (*_REQUIRED, "truncations")

Transitions = dict[str, np.ndarray]


def read_transitions(data: Any, observation_space: spaces.Box, action_space: spaces.Box) -> Transitions:
    """
    Read a user's transitions, ordered by time.

    :param data: a Minari dataset; a ``ReplayBuffer`` of SB3 made for the same spaces; or a mapping of arrays:
        ``observations``, ``actions`` (in the env's scale), ``rewards``, ``next_observations``, ``terminations`` and, if there
        are time limits, ``truncations``, each ``(N, ...)``
    :param observation_space: observation space of the agent
    :param action_space: action space of the agent
    :return: all six arrays of such a mapping: observations and actions ``(N, *shape)``, the others ``(N,)``
    :raises ValueError: the data have another type or wrong shapes, or numbers that no transition of this env could have
    """
    if isinstance(data, ReplayBuffer):
        arrays = _of_buffer(data, action_space)
    elif hasattr(data, "iterate_episodes"):
        episodes = [_of_episode(episode) for episode in data.iterate_episodes()]
        arrays = {name: np.concatenate([episode[name] for episode in episodes] or [np.empty(0)]) for name in _ALL}
    elif isinstance(data, Mapping):
        missing, unknown = [name for name in _REQUIRED if name not in data], [name for name in data if name not in _ALL]
        if missing or unknown:
            raise ValueError(f"prefill: the arrays must be {', '.join(_ALL)}; missing: {missing}, unknown: {unknown}")
        arrays = {name: np.asarray(value) for name, value in data.items()}
        arrays.setdefault("truncations", np.zeros(len(arrays["rewards"]), bool))
    else:
        raise ValueError(f"prefill takes a Minari dataset, a ReplayBuffer or a mapping of arrays, not {type(data).__name__}")
    _check(arrays, observation_space, action_space)
    return arrays | {name: arrays[name].astype(bool) for name in ("terminations", "truncations")}


def _of_buffer(buffer: ReplayBuffer, action_space: spaces.Box) -> Transitions:
    """:return: the filled rows, oldest first, one env after the other"""
    start = buffer.pos if buffer.full else 0
    order = (start + np.arange(buffer.size())) % buffer.buffer_size

    def rows(array: np.ndarray) -> np.ndarray:
        return array[order].swapaxes(0, 1).reshape(-1, *array.shape[2:])

    if buffer.optimize_memory_usage:
        raise ValueError("prefill: a buffer with optimize_memory_usage=True lacks the last observations of its episodes")
    scaled = rows(buffer.actions).reshape(-1, *action_space.shape)
    return {
        "observations": rows(buffer.observations),
        "actions": action_space.low + 0.5 * (scaled + 1) * (action_space.high - action_space.low),
        "rewards": rows(buffer.rewards),
        "next_observations": rows(buffer.next_observations),
        "terminations": rows(buffer.dones * (1 - buffer.timeouts)) > 0.5,
        "truncations": rows(buffer.timeouts) > 0.5,
    }


def _of_episode(episode: Any) -> Transitions:
    """:return: the transitions of an episode of Minari, which has one observation more than steps"""
    if not isinstance(episode.observations, np.ndarray):
        raise ValueError("prefill: the observations of this dataset are no arrays; flatten them and pass arrays")
    return {
        "observations": episode.observations[:-1],
        "next_observations": episode.observations[1:],
        **{name: np.asarray(getattr(episode, name)) for name in ("actions", "rewards", "terminations", "truncations")},
    }


def _check(arrays: Transitions, observation_space: spaces.Box, action_space: spaces.Box) -> None:
    n = len(arrays["rewards"])
    if n == 0:
        raise ValueError("prefill: there are no transitions in it")
    shapes = {"observations": observation_space.shape, "next_observations": observation_space.shape}
    shapes |= {"actions": action_space.shape}
    for name, array in arrays.items():
        expected = (n, *shapes.get(name, ()))
        if array.shape != expected:
            raise ValueError(f"prefill: {name} has shape {array.shape}, but must have {expected} for this agent's spaces")
        _reject(~np.isfinite(array), f"{name} is not finite", arrays)
    room = 1e-5 * (action_space.high - action_space.low)
    outside = (arrays["actions"] < action_space.low - room) | (arrays["actions"] > action_space.high + room)
    _reject(outside, "actions are outside the action space (they are expected in the env's own scale)", arrays)


def _reject(bad: Any, what: str, arrays: Transitions) -> None:
    rows = bad.reshape(len(bad), -1).any(axis=1)
    if rows.any():
        raise ValueError(f"prefill: {what} in {rows.sum()} of {len(rows)} transitions, first in number {rows.argmax()}")


def rows_of_steps(arrays: Transitions, n_envs: int, scale_action: Callable[[np.ndarray], np.ndarray]) -> Transitions:
    """
    Convert transitions to SB3's storage, with one row for each step of ``n_envs`` envs. Transitions that do not fill the last
    row are left out.

    :param arrays: see :func:`read_transitions`
    :param n_envs: number of envs
    :param scale_action: maps actions from the env's scale to [-1, 1]
    :return: the storage arrays of ``ReplayBuffer`` by name, each ``(N // n_envs, n_envs, ...)``
    """
    n_rows = len(arrays["rewards"]) // n_envs

    def fold(array: np.ndarray) -> np.ndarray:
        # Each env gets successive transitions.
        return array[: n_rows * n_envs].reshape(n_envs, n_rows, *array.shape[1:]).swapaxes(0, 1)

    # As in SB3, a time limit that coincides with a termination is a termination.
    timeouts = arrays["truncations"] & ~arrays["terminations"]
    columns = {
        "observations": arrays["observations"],
        "actions": scale_action(arrays["actions"]).reshape(len(timeouts), -1),
        "next_observations": arrays["next_observations"],
        "dones": arrays["terminations"] | timeouts,
        "rewards": arrays["rewards"],
        "timeouts": timeouts,
    }
    return {name: fold(array) for name, array in columns.items()}
