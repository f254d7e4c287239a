"""Reads transitions from datasets and arrays, in the form in which the replay buffer stores them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mbpo.codec import Codec

_REQUIRED = ("observations", "actions", "rewards", "next_observations", "terminations")
_ALL = (*_REQUIRED, "truncations")
_OBS = ("observations", "next_observations")

Transitions = dict[str, np.ndarray]


def read_transitions(data: Any, codec: Codec) -> Transitions:
    """
    Read a user's transitions, ordered by time.

    :param data: a Minari dataset; a ``ReplayBuffer`` of SB3 made for the same spaces; or a mapping of arrays:
        ``observations``, ``actions`` (in the env's scale), ``rewards``, ``next_observations``, ``terminations`` and, if there
        are time limits, ``truncations``, each ``(N, ...)``. Dict observations are mappings of such arrays
    :param codec: of the agent's spaces
    :return: all six arrays of such a mapping: observations in the form that the replay buffer stores, actions
        ``(N, *action_shape)``, the others ``(N,)``
    :raises ValueError: the data have another type or wrong shapes, or numbers that no transition of this env could have
    """
    if isinstance(data, ReplayBuffer):
        arrays = _of_buffer(data, codec)
    elif hasattr(data, "iterate_episodes"):
        episodes = [_of_episode(episode, codec) for episode in data.iterate_episodes()]
        arrays = {name: np.concatenate([episode[name] for episode in episodes] or [np.empty(0)]) for name in _ALL}
    elif isinstance(data, Mapping):
        missing, unknown = [name for name in _REQUIRED if name not in data], [name for name in data if name not in _ALL]
        if missing or unknown:
            raise ValueError(f"prefill: the arrays must be {', '.join(_ALL)}; missing: {missing}, unknown: {unknown}")
        arrays = {name: _stored(value, codec) if name in _OBS else np.asarray(value) for name, value in data.items()}
        arrays.setdefault("truncations", np.zeros(len(arrays["rewards"]), bool))
    else:
        raise ValueError(f"prefill takes a Minari dataset, a ReplayBuffer or a mapping of arrays, not {type(data).__name__}")
    _check(arrays, codec)
    return arrays | {name: arrays[name].astype(bool) for name in ("terminations", "truncations")}


def _stored(obs: Any, codec: Codec) -> np.ndarray:
    """:return: observations in the form that the replay buffer stores"""
    if not codec.is_dict or not isinstance(obs, Mapping):
        return np.asarray(obs)
    keys = list(codec.observation_space)  # type: ignore[arg-type]
    if set(obs) != set(keys):
        raise ValueError(f"prefill: the observations have the keys {list(obs)}, but this agent's have {keys}")
    try:
        return codec.flatten({key: np.asarray(array) for key, array in obs.items()})
    except ValueError as error:
        raise ValueError(f"prefill: the observations do not fit {codec.observation_space}: {error}") from error


def _of_buffer(buffer: ReplayBuffer, codec: Codec) -> Transitions:
    """:return: the filled rows, oldest first, one env after the other"""
    start = buffer.pos if buffer.full else 0
    order = (start + np.arange(buffer.size())) % buffer.buffer_size

    def rows(array: np.ndarray) -> np.ndarray:
        return array[order].swapaxes(0, 1).reshape(len(order) * buffer.n_envs, *array.shape[2:])

    def rows_of_obs(array: Any) -> np.ndarray:
        return _stored({key: rows(part) for key, part in array.items()} if isinstance(array, dict) else rows(array), codec)

    if buffer.optimize_memory_usage:
        raise ValueError("prefill: a buffer with optimize_memory_usage=True lacks the last observations of its episodes")
    theirs = getattr(buffer, "codec", None)
    if theirs is not None and theirs.entries != codec.entries:
        raise ValueError(f"prefill: the observations have the entries {theirs.entries}, but this agent's have {codec.entries}")
    return {
        "observations": rows_of_obs(buffer.observations),
        "actions": codec.decode_actions(rows(buffer.actions)),
        "rewards": rows(buffer.rewards),
        "next_observations": rows_of_obs(buffer.next_observations),
        "terminations": rows(buffer.dones * (1 - buffer.timeouts)) > 0.5,
        "truncations": rows(buffer.timeouts) > 0.5,
    }


def _of_episode(episode: Any, codec: Codec) -> Transitions:
    """:return: the transitions of an episode of Minari, which has one observation more than steps"""
    if not isinstance(episode.observations, Mapping if codec.is_dict else np.ndarray):
        kind = "dicts" if codec.is_dict else "arrays; flatten them and pass arrays"
        raise ValueError(f"prefill: the observations of this dataset are no {kind}")
    obs = _stored(episode.observations, codec)
    return {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        **{name: np.asarray(getattr(episode, name)) for name in ("actions", "rewards", "terminations", "truncations")},
    }


def _check(arrays: Transitions, codec: Codec) -> None:
    n, action_space = len(arrays["rewards"]), codec.action_space
    if n == 0:
        raise ValueError("prefill: there are no transitions in it")
    shapes = {"actions": action_space.shape} | {name: codec.stored_space.shape for name in _OBS}
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


def rows_of_steps(arrays: Transitions, n_envs: int, codec: Codec) -> Transitions:
    """
    Convert transitions to SB3's storage, with one row for each step of ``n_envs`` envs. Transitions that do not fill the last
    row are left out.

    :param arrays: see :func:`read_transitions`
    :param n_envs: number of envs
    :param codec: of the agent's spaces
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
        "actions": codec.encode_actions(arrays["actions"]),
        "next_observations": arrays["next_observations"],
        "dones": arrays["terminations"] | timeouts,
        "rewards": arrays["rewards"],
        "timeouts": timeouts,
    }
    return {name: fold(array) for name, array in columns.items()}
