"""
Saves and restores the state of callbacks.

The state is what they have counted. It does not include where they write, or what they were constructed from.
"""

import functools
import inspect
import io
import logging
import re
import types
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.checkpoints.env_state import CannotRestoreError, put_envs, take_envs
from sb3_mbpo.saving.serialization import CannotEncodeError, Tensors, decode, encode

# Attributes of a callback that SB3 sets in each `learn`, also from arguments, or that contain the paths of files.
_SET_ANEW = {"model", "parent", "locals", "globals", "logger", "training_env", "progress_bar", "pbar"}
_SET_ANEW |= {"log_path", "best_model_save_path", "save_path", "_total_max_episodes"}
# Types of attributes that are not state: parts of the callback, and what it writes to.
_NO_STATE: tuple[type, ...] = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type)
_NO_STATE += (functools.partial, Logger, logging.Logger, KVWriter, io.IOBase, PurePath, BaseCallback, BaseAlgorithm)
_NO_STATE += (th.nn.Module, gym.Space, th.device, th.dtype, np.dtype)
# Names and texts that contain a path. The command decides where a run writes files, never a checkpoint.
_NAME_OF_A_PLACE = r"(?i)(path|dir|directory|folder|file|filename|url)s?$"
_PLACE = r"[/\\]|^~|^\.\.?$"


def all_callbacks(callback: BaseCallback) -> list[BaseCallback]:
    """
    :param callback: a callback
    :return: this callback and all callbacks in it, also in lists, tuples and values of dictionaries, in a fixed order
    """
    found = [callback]
    for one in found:
        # Until SB3 sets `locals` in a `learn`, it contains the callbacks of an earlier one.
        for value in (value for name, value in vars(one).items() if name not in _SET_ANEW):
            found += [item for item in _callbacks_in(value) if item not in found]
    return found


def _callbacks_in(value: Any) -> Iterator[BaseCallback]:
    if isinstance(value, BaseCallback):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _callbacks_in(item)


def _arguments(callback: BaseCallback) -> set[str]:
    """:return: names of the constructor's arguments, also of those that it passes to its parents"""
    constructors = [kind.__init__ for kind in type(callback).__mro__ if "__init__" in vars(kind)]  # type: ignore[misc]
    return {name for one in constructors for name in inspect.signature(one).parameters}


def _left_out(callback: BaseCallback) -> set[str]:
    """:return: names of attributes that are neither saved nor restored"""
    return _SET_ANEW | _arguments(callback) | set(getattr(callback, "not_saved", ()))


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """:return: all texts in a value, each with the key or the attribute that it belongs to"""
    if isinstance(value, str | bytes):
        yield name, value if isinstance(value, str) else value.decode(errors="replace")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, key if isinstance(key, str) else name)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            yield from _texts(item, name)


def _says_a_place(name: str, value: Any) -> bool:
    """:return: whether an attribute contains the path of a file"""
    return any(re.search(_NAME_OF_A_PLACE, key) or re.search(_PLACE, text) for key, text in _texts(value, name))


def may_put(owner: Any, name: str) -> bool:
    """
    Whether a file may set an attribute. It may never replace a method, a function or an object.

    :param owner: an agent or a callback
    :param name: name of the attribute, from the file
    :return: whether it may be set
    """
    if name in vars(owner):
        try:
            encode(vars(owner)[name], {})
        except (CannotEncodeError, RecursionError):
            return False
        return True
    of_class = inspect.getattr_static(type(owner), name, None)
    return not (name.startswith("__") or callable(of_class) or hasattr(of_class, "__get__"))


def take_callback(callback: BaseCallback, tensors: Tensors, name: str) -> dict[str, Any]:
    """
    Save the plain attributes of a callback and the state of its own envs.

    Arguments of its constructor, paths of files, and attributes listed in its ``not_saved`` are left out.

    :param callback: one of ``all_callbacks``
    :param tensors: see :func:`.serialization.encode`
    :param name: prefix of the names of the tensors
    :return: JSON. ``"lost"`` contains the attributes that could not be saved, and why
    """
    state: dict[str, Any] = {}
    envs: dict[str, Any] = {}
    lost: dict[str, str] = {}
    without = _left_out(callback)
    for key, value in vars(callback).items():
        try:
            if isinstance(value, VecEnv) and key not in _SET_ANEW:
                envs[key] = take_envs(value, tensors, f"{name}.{key}")
            elif key in without:
                continue
            elif not _says_a_place(key, value):
                state[key] = encode(value, tensors, f"{name}.{key}")
            elif not isinstance(value, str | bytes):
                # Besides a path, it may contain counters.
                lost[key] = f"{type(value).__name__} that contains the path of a file"
        except CannotRestoreError as error:
            lost[key] = str(error)
        except (CannotEncodeError, RecursionError):
            if not isinstance(value, _NO_STATE) and next(_callbacks_in(value), None) is None:
                lost[key] = type(value).__name__
    return {"class": type(callback).__name__, "state": state, "envs": envs, "lost": lost}


def put_callbacks(callbacks: list[BaseCallback], states: list[dict[str, Any]], tensors: Tensors) -> dict[str, str]:
    """
    Restore callbacks. The first, second, ... callback of a class gets the state of the first, second, ... of the run.

    A callback that the run did not have keeps its initial state.

    :param callbacks: see ``all_callbacks``
    :param states: the results of ``take_callback``
    :param tensors: the tensors of ``take_callback``
    :return: what could not be restored, such as ``"MyCallback.seen"``, and why
    """
    seen: Counter[str] = Counter()
    lost: dict[str, str] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        mine = [state for state in states if state["class"] == kind]
        if seen[kind] < len(mine):
            problems = _put_callback(callback, mine[seen[kind]], tensors)
            lost |= {f"{kind}.{key}": reason for key, reason in problems.items()}
        seen[kind] += 1
    return lost


def _put_callback(callback: BaseCallback, state: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """:return: see :func:`put_callbacks`. A checkpoint may be foreign, so only what is ever saved is restored"""
    lost = dict(state["lost"])
    without = _left_out(callback)
    for key, packed in state["state"].items():
        if key in without or not may_put(callback, key):
            continue
        value = decode(packed, tensors)
        if not any(_says_a_place(key, one) for one in (value, vars(callback).get(key))):
            setattr(callback, key, value)
    for key, env_state in state["envs"].items():
        try:
            env = vars(callback).get(key)
            if isinstance(env, VecEnv) and key not in _SET_ANEW:
                put_envs(env, env_state, tensors)
        except CannotRestoreError as error:
            lost[key] = str(error)
    return lost


def tell_callbacks(callbacks: list[BaseCallback]) -> None:
    """:param callbacks: their ``on_resume()`` is called if they have it, after everything else was restored"""
    for callback in callbacks:
        if hasattr(callback, "on_resume"):
            callback.on_resume()
