"""The state of environments, taken out and put back: where the simulation stands, counters of wrappers, random generators."""

import inspect
import logging
import types
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_mbpo.packing import CannotPackError, Tensors, pack, unpack

# Attributes that say how an env looks, where its log goes, or what time it was: nothing that it computes with.
_IGNORED = {
    "results_writer",
    "t_start",
    "episode_times",
    "metadata",
    "mujoco_renderer",
    "render_mode",
    "screen",
    "clock",
    "surf",
    "window",
    "viewer",
}
# SB3's way to look attributes up in a wrapped VecEnv.
_IGNORED |= {"class_attributes"}
_NEXT_RESET = ("_seeds", "_options")
# What does not change while an env runs.
_STATIC: tuple[type, ...] = (
    gym.Space,
    EnvSpec,
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
)
_STATIC += (logging.Logger, Logger, np.dtype, th.dtype, th.device)


class CannotRestoreError(Exception):
    """An env that holds something which cannot be taken out; says what."""


def take_envs(env: VecEnv, tensors: Tensors, name: str) -> Any:
    """
    The state of a vectorised env with all its wrappers.

    MuJoCo's data, numbers, arrays, generators and plain Python objects are found by themselves, in every wrapper. An env with
    ``get_state()``, which returns plain values, and ``set_state(state)`` is asked instead. One in another process has to be
    wrapped in :class:`RestorableEnv`.

    :param env: see SB3
    :param tensors: see :func:`.packing.pack`
    :param name: what the tensors' names begin with
    :return: JSON
    :raises CannotRestoreError: names what cannot be taken
    """
    wrappers, inner = _layers(env)
    state = {"wrappers": [_take_attributes(layer, tensors, f"{name}.{i}", ("venv",)) for i, layer in enumerate(wrappers)]}
    # What the next reset is to be called with.
    state["inner"] = pack({key: getattr(inner, key) for key in _NEXT_RESET}, tensors, f"{name}.inner")
    if isinstance(inner, DummyVecEnv):
        return state | {"envs": [take_env(one, tensors, f"{name}.env{i}") for i, one in enumerate(inner.envs)]}
    if not all(inner.env_is_wrapped(RestorableEnv)):
        raise CannotRestoreError(
            f"{type(inner).__name__} keeps its envs in other processes; as the outermost wrapper of each, "
            "sb3_mbpo.RestorableEnv makes their state accessible"
        )
    return state | {"states": [pack(one, tensors, f"{name}.env{i}") for i, one in enumerate(inner.env_method("get_state"))]}


def put_envs(env: VecEnv, state: Any, tensors: Tensors) -> None:
    """
    Put back what ``take_envs`` took, into an env that was made in the same way and was reset.

    :raises ValueError: the env is made differently
    """
    wrappers, inner = _layers(env)
    for layer, layer_state in _pairs(wrappers, state["wrappers"], "wrappers"):
        _put_attributes(layer, layer_state, tensors)
    vars(inner).update({key: unpack(state["inner"], tensors)[key] for key in _NEXT_RESET})
    if "envs" in state:
        envs = inner.envs if isinstance(inner, DummyVecEnv) else []
        for one, env_state in _pairs(envs, state["envs"], "envs in this process"):
            put_env(one, env_state, tensors)
    else:
        for i, env_state in _pairs(range(inner.num_envs), state["states"], "envs"):
            inner.env_method("set_state", unpack(env_state, tensors), indices=i)


def take_env(env: gym.Env, tensors: Tensors, name: str) -> list[Any]:
    """:return: the state of each wrapper, outermost first, and last of the env itself"""
    return [_take_layer(layer, tensors, f"{name}.{i}") for i, layer in enumerate(_gym_layers(env))]


def put_env(env: gym.Env, state: list[Any], tensors: Tensors) -> None:
    """Put back what ``take_env`` took."""
    for layer, layer_state in _pairs(list(_gym_layers(env)), state, "wrappers"):
        if "own" in layer_state:
            layer.set_state(unpack(layer_state["own"], tensors))
            _put_attributes(layer, layer_state["random"], tensors)
        else:
            _put_attributes(layer, layer_state, tensors)


class RestorableEnv(gym.Wrapper):
    """The outermost wrapper of an env that runs in another process (``SubprocVecEnv``): makes its state accessible."""

    def get_state(self) -> Any:
        """:return: plain values: what :func:`take_env` takes of the env inside, and its tensors"""
        tensors: Tensors = {}
        state = take_env(self.env, tensors, "env")
        return {"state": state, "tensors": {name: tensor.clone() for name, tensor in tensors.items()}}

    def set_state(self, state: Any) -> None:
        """:param state: from ``get_state``"""
        put_env(self.env, state["state"], state["tensors"])


def _layers(env: VecEnv) -> tuple[list[VecEnvWrapper], VecEnv]:
    wrappers = []
    while isinstance(env, VecEnvWrapper):
        wrappers.append(env)
        env = env.venv
    return wrappers, env


def _gym_layers(env: Any) -> Iterator[Any]:
    while isinstance(env, gym.Wrapper):
        yield env
        if isinstance(env, RestorableEnv):
            # It speaks for everything inside.
            return
        env = env.env
    yield env


def _pairs(ours: Any, theirs: Any, what: str) -> Iterator[tuple[Any, Any]]:
    if len(ours) != len(theirs):
        raise ValueError(f"the checkpoint has {len(theirs)} {what}, and this env has {len(ours)}: make it as it was made then")
    return zip(ours, theirs, strict=True)


def _take_layer(layer: Any, tensors: Tensors, name: str) -> dict[str, Any]:
    if all(callable(getattr(type(layer), method, None)) for method in ("get_state", "set_state")):
        # Most forget their generator.
        random = {key: value for key, value in vars(layer).items() if isinstance(value, np.random.Generator)}
        own = pack(layer.get_state(), tensors, f"{name}.own")
        return {"own": own, "random": {key: pack(value, tensors, f"{name}.{key}") for key, value in random.items()}}
    return _take_attributes(layer, tensors, name, ("env",))


def _take_attributes(thing: Any, tensors: Tensors, name: str, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    result = {}
    for key, value in vars(thing).items():
        if key in skipped or key in _IGNORED or isinstance(value, _STATIC) or inspect.isroutine(value):
            continue
        try:
            result[key] = _take_value(value, tensors, f"{name}.{key}")
        except CannotPackError as error:
            raise CannotRestoreError(f"{type(thing).__name__}.{key}: {error}") from error
    return result


def _take_value(value: Any, tensors: Tensors, name: str) -> Any:
    try:
        return pack(value, tensors, name)
    except CannotPackError:
        if _is_mujoco(value, "MjModel"):
            return {"$static": "MjModel"}
        if _is_mujoco(value, "MjData"):
            return {"$mujoco": pack(_mujoco_arrays(value), tensors, name)}
        plain = hasattr(value, "__dict__") and not isinstance(value, BaseCallback | VecEnv | gym.Env)
        # A class in C may hide what it holds.
        if not plain or type(value).__module__.split(".")[0] in ("Box2D", "pybullet", "mujoco") or _is_foreign(value):
            raise
        return {"$object": _take_attributes(value, tensors, name)}


def _is_foreign(value: Any) -> bool:
    """Whether a value's class, or one it derives from, is written in C."""
    return any(not kind.__flags__ & (1 << 9) for kind in type(value).__mro__ if kind is not object)


def _is_mujoco(value: Any, name: str) -> bool:
    return type(value).__name__ == name and type(value).__module__.startswith("mujoco")


def _mujoco_arrays(data: Any) -> dict[str, Any]:
    """
    Every array of an ``MjData`` whose size does not depend on contacts, and its time.

    The state that MuJoCo integrates would do for its next step, but not for what observations and rewards read before it:
    positions of bodies and contact forces lag behind.
    """
    arrays = {}
    for key in dir(data):
        # Those of constraints and of islands live in memory that each step hands out anew.
        if key.startswith(("_", "efc_", "i", "map_")) or "island" in key or key in ("contact", "solver", "timer", "warning"):
            continue
        value = getattr(data, key, None)
        if isinstance(value, float | np.ndarray):
            arrays[key] = np.array(value) if isinstance(value, np.ndarray) else value
    return arrays


def _put_attributes(thing: Any, state: dict[str, Any], tensors: Tensors) -> None:
    for key, packed in state.items():
        kind = next(iter(packed), None) if isinstance(packed, dict) and len(packed) == 1 else None
        if kind == "$object":
            _put_attributes(getattr(thing, key), packed["$object"], tensors)
        elif kind == "$mujoco":
            _put_mujoco(getattr(thing, key), unpack(packed["$mujoco"], tensors))
        elif kind != "$static":
            setattr(thing, key, unpack(packed, tensors))


def _put_mujoco(data: Any, arrays: dict[str, Any]) -> None:
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray):
            setattr(data, key, value)
        elif getattr(data, key).shape == value.shape:
            getattr(data, key)[...] = value
