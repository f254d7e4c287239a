"""The state of callbacks, taken out and put back: what they have counted, and the envs they own."""

import functools
import inspect
import io
import logging
import types
from collections import Counter
from collections.abc import Iterator
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
from sb3_mbpo.checkpoints.packing import CannotPackError, Tensors, pack, unpack

# Attributes that SB3 sets anew, from arguments too, or that say where files go.
_SET_ANEW = {"model", "parent", "locals", "globals", "logger", "training_env", "progress_bar", "pbar"}
_SET_ANEW |= {"log_path", "best_model_save_path", "save_path", "_total_max_episodes"}
# What a callback is made of, and what it writes to.
_NO_STATE: tuple[type, ...] = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type)
_NO_STATE += (functools.partial, Logger, logging.Logger, KVWriter, io.IOBase, PurePath, BaseCallback, BaseAlgorithm)
_NO_STATE += (th.nn.Module, gym.Space, th.device, th.dtype, np.dtype)


def all_callbacks(callback: BaseCallback) -> list[BaseCallback]:
    """:return: a callback and all those inside it, also in lists, tuples and values of dictionaries, in a fixed order"""
    found = [callback]
    for one in found:
        for value in vars(one).values():
            found += [item for item in _callbacks_in(value) if item not in found]
    return found


def _callbacks_in(value: Any) -> Iterator[BaseCallback]:
    if isinstance(value, BaseCallback):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _callbacks_in(item)


def _arguments(callback: BaseCallback) -> set[str]:
    """Names of the constructor's arguments, also of those that it passes on."""
    constructors = [kind.__init__ for kind in type(callback).__mro__ if "__init__" in vars(kind)]  # type: ignore[misc]
    return {name for one in constructors for name in inspect.signature(one).parameters}


def take_callback(callback: BaseCallback, tensors: Tensors, name: str) -> dict[str, Any]:
    """
    What is plain of a callback, but arguments of its constructor; and the state of its envs, if it has any of its own.

    :param callback: one of ``all_callbacks``
    :param tensors: see :func:`.packing.pack`
    :param name: what the tensors' names begin with
    :return: JSON; under ``"lost"``, by name, what could not be saved
    """
    state: dict[str, Any] = {}
    envs: dict[str, Any] = {}
    lost: dict[str, str] = {}
    arguments = _arguments(callback)
    for key, value in vars(callback).items():
        try:
            if key in _SET_ANEW:
                continue
            if isinstance(value, VecEnv):
                envs[key] = take_envs(value, tensors, f"{name}.{key}")
            elif key not in arguments:
                state[key] = pack(value, tensors, f"{name}.{key}")
        except CannotRestoreError as error:
            lost[key] = str(error)
        except (CannotPackError, RecursionError):
            if not isinstance(value, _NO_STATE) and next(_callbacks_in(value), None) is None:
                lost[key] = type(value).__name__
    return {"class": type(callback).__name__, "state": state, "envs": envs, "lost": lost}


def put_callbacks(callbacks: list[BaseCallback], states: list[dict[str, Any]], tensors: Tensors) -> dict[str, str]:
    """
    Each gets the state of its class's first, second, ... in the run; one that the run did not have starts anew.

    :param callbacks: see ``all_callbacks``
    :param states: from ``take_callback``, of all
    :param tensors: what it filled
    :return: what could not be restored, such as ``"MyCallback.seen"``, and why
    """
    seen: Counter[str] = Counter()
    lost: dict[str, str] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        mine = [state for state in states if state["class"] == kind]
        if seen[kind] < len(mine):
            state = mine[seen[kind]]
            lost |= {f"{kind}.{key}": reason for key, reason in state["lost"].items()}
            without = _SET_ANEW | _arguments(callback)
            for key, value in state["state"].items():
                if key not in without and not callable(getattr(callback, key, None)):
                    setattr(callback, key, unpack(value, tensors))
            for key, env_state in state["envs"].items():
                try:
                    if isinstance(env := getattr(callback, key, None), VecEnv):
                        put_envs(env, env_state, tensors)
                except CannotRestoreError as error:
                    lost[f"{kind}.{key}"] = str(error)
        seen[kind] += 1
    return lost


def tell_callbacks(callbacks: list[BaseCallback]) -> None:
    """Last of all, call ``on_resume()`` of those that have it."""
    for callback in callbacks:
        if hasattr(callback, "on_resume"):
            callback.on_resume()


def described_callbacks(callbacks: list[BaseCallback]) -> list[Any]:
    """:return: JSON: the classes of callbacks, and those arguments of their constructors that are numbers or text"""
    described = []
    for callback in callbacks:
        values = {key: getattr(callback, key, None) for key in sorted(_arguments(callback))}
        plain = {key: repr(value) for key, value in values.items() if isinstance(value, bool | int | float | str)}
        described.append([type(callback).__name__, plain])
    return described
