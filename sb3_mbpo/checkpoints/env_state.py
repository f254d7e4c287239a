"""The state of environments, taken out and put back: where the simulation stands, counters of wrappers, random generators."""

import enum
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

from sb3_mbpo.checkpoints.packing import CannotPackError, Tensors, pack, unpack

# What time it was, where a log goes, and SB3's way to look attributes up in a wrapped VecEnv.
_IGNORED = {"results_writer", "t_start", "episode_times", "class_attributes"}
# How an env looks. A number or an array under such a name may be something else, and is taken.
_DRAWING = {"mujoco_renderer", "screen", "clock", "surf", "window", "viewer", "metadata", "renderer"}
_NEXT_RESET = ("_seeds", "_options")
# What does not change while an env runs.
_STATIC: tuple[type, ...] = (EnvSpec, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_STATIC += (types.ModuleType, logging.Logger, Logger, np.dtype, th.dtype, th.device)


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
    wrappers, inner = take_wrappers(env, tensors, f"{name}.wrappers"), _layers(env)[1]
    try:
        # What the next reset is to be called with.
        following = pack({key: getattr(inner, key) for key in _NEXT_RESET}, tensors, f"{name}.following")
        state = {"wrappers": wrappers, "following": following}
        if isinstance(inner, DummyVecEnv):
            return state | {"envs": [take_env(one, tensors, f"{name}.env{i}") for i, one in enumerate(inner.envs)]}
        if not all(inner.env_is_wrapped(RestorableEnv)):
            raise CannotRestoreError(
                f"{type(inner).__name__} keeps its envs in other processes; as the outermost wrapper of each, "
                "sb3_mbpo.RestorableEnv makes their state accessible"
            )
        answers = inner.env_method("get_state")
        for lost in (answer["lost"] for answer in answers if "lost" in answer):
            raise CannotRestoreError(lost)
        return state | {"states": [pack(one, tensors, f"{name}.env{i}") for i, one in enumerate(answers)]}
    except (EOFError, OSError) as error:
        raise CannotRestoreError("their processes have ended") from error
    except (CannotPackError, AttributeError, NotImplementedError, RecursionError) as error:
        raise CannotRestoreError(f"{type(inner).__name__}: {error}") from error


def put_envs(env: VecEnv, state: Any, tensors: Tensors) -> None:
    """
    Put back what ``take_envs`` took, into an env that was made in the same way and was reset.

    :raises ValueError: the env is made differently
    """
    put_wrappers(env, state["wrappers"], tensors)
    inner = _layers(env)[1]
    vars(inner).update(unpack(state["following"], tensors))
    if "envs" in state:
        envs = inner.envs if isinstance(inner, DummyVecEnv) else []
        for one, env_state in _pairs(envs, state["envs"], "envs in this process"):
            put_env(one, env_state, tensors)
    else:
        for i, env_state in _pairs(range(inner.num_envs), state["states"], "envs"):
            inner.env_method("set_state", unpack(env_state, tensors), indices=i)


def take_wrappers(env: VecEnv, tensors: Tensors, name: str) -> list[Any]:
    """
    The state of the wrappers around a vectorised env, ``VecNormalize``'s statistics among it, outermost first.

    :raises CannotRestoreError: names what cannot be taken
    """
    return [
        {"class": type(layer).__name__, "attributes": _take_attributes(layer, tensors, f"{name}.{i}", ("venv",))}
        for i, layer in enumerate(_layers(env)[0])
    ]


def put_wrappers(env: VecEnv, state: list[Any], tensors: Tensors) -> None:
    """Put back what ``take_wrappers`` took."""
    for layer, layer_state in _pairs(_layers(env)[0], state, "wrappers around the vectorised env"):
        _check_class(layer, layer_state)
        _put_attributes(layer, layer_state["attributes"], tensors)


def take_env(env: gym.Env, tensors: Tensors, name: str) -> list[Any]:
    """:return: the state of each wrapper, outermost first, and last of the env itself"""
    return [_take_layer(layer, tensors, f"{name}.{i}") for i, layer in enumerate(_gym_layers(env))]


def put_env(env: gym.Env, state: list[Any], tensors: Tensors) -> None:
    """Put back what ``take_env`` took."""
    for layer, layer_state in _pairs(list(_gym_layers(env)), state, "wrappers"):
        _check_class(layer, layer_state)
        if "own" in layer_state:
            layer.set_state(unpack(layer_state["own"], tensors))
        _put_attributes(layer, layer_state["attributes"], tensors)


class RestorableEnv(gym.Wrapper):
    """The outermost wrapper of an env that runs in another process (``SubprocVecEnv``): makes its state accessible."""

    def get_state(self) -> dict[str, Any]:
        """:return: plain values: what :func:`take_env` takes of the env inside; or ``lost``, the reason why it cannot"""
        tensors: Tensors = {}
        try:
            state = take_env(self.env, tensors, "env")
        except (CannotRestoreError, CannotPackError, RecursionError) as error:
            # An exception would end the process.
            return {"lost": str(error)}
        return {"state": state, "tensors": {name: tensor.clone() for name, tensor in tensors.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
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


def _check_class(layer: Any, state: dict[str, Any]) -> None:
    if type(layer).__name__ != state["class"]:
        raise ValueError(f"the checkpoint has a {state['class']} where this env has a {type(layer).__name__}")


def _take_layer(layer: Any, tensors: Tensors, name: str) -> dict[str, Any]:
    kind = type(layer).__name__
    if not all(callable(getattr(type(layer), method, None)) for method in ("get_state", "set_state")):
        return {"class": kind, "attributes": _take_attributes(layer, tensors, name, ("env",))}
    # Most forget their generator.
    own = {key: value for key, value in vars(layer).items() if isinstance(value, np.random.Generator)}
    generators = {key: pack(value, tensors, f"{name}.{key}") for key, value in own.items()}
    state = layer.get_state()
    if isinstance(layer, RestorableEnv) and "lost" in state:
        raise CannotRestoreError(state["lost"])
    return {"class": kind, "own": pack(state, tensors, f"{name}.own"), "attributes": generators}


def _take_attributes(thing: Any, tensors: Tensors, name: str, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    result = {}
    for key, value in vars(thing).items():
        if key in skipped or key in _IGNORED or isinstance(value, _STATIC) or inspect.isroutine(value):
            continue
        try:
            result[key] = _take_value(value, tensors, f"{name}.{key}")
        except CannotPackError as error:
            if key not in _DRAWING:
                raise CannotRestoreError(f"{type(thing).__name__}.{key}: {error}") from error
    return result


def _take_value(value: Any, tensors: Tensors, name: str) -> Any:
    if isinstance(value, gym.Space):
        # Its bounds do not change; its generator does, where somebody draws from it.
        return {"$space": None if value._np_random is None else pack(value._np_random, tensors, name)}
    try:
        return pack(value, tensors, name)
    except CannotPackError:
        if _is_mujoco(value, "MjModel"):
            return {"$model": pack(_floats(value, ()), tensors, name)}
        if _is_mujoco(value, "MjData"):
            return {"$data": pack(_floats(value, _OF_A_STEP), tensors, name)}
        plain = hasattr(value, "__dict__") and not isinstance(value, BaseCallback | VecEnv | gym.Env | enum.Enum)
        # A class in C may hide what it holds.
        if not plain or type(value).__module__.split(".")[0] in ("Box2D", "pybullet", "mujoco") or _is_foreign(value):
            raise
        return {"$object": _take_attributes(value, tensors, name)}


def _is_foreign(value: Any) -> bool:
    """Whether a value's class, or one it derives from, is written in C."""
    return any(not kind.__flags__ & (1 << 9) for kind in type(value).__mro__ if kind is not object)


def _is_mujoco(value: Any, name: str) -> bool:
    return type(value).__name__ == name and type(value).__module__.startswith("mujoco")


# Of constraints and islands: in memory that each step hands out anew.
_OF_A_STEP = ("efc_", "i", "map_", "contact", "solver", "timer", "warning", "dof_island", "tree_island")


def _floats(mujoco: Any, without: tuple[str, ...]) -> dict[str, Any]:
    """
    The arrays of floats, and for ``MjData`` all others and the time, whose size does not depend on contacts.

    The state that MuJoCo integrates would do for its next step, but not for what observations and rewards read before it:
    positions of bodies and contact forces lag behind. A model changes where an env draws masses or frictions anew.
    """
    found: dict[str, Any] = {}
    for key in dir(mujoco):
        if key.startswith(("_", *without)):
            continue
        value = getattr(mujoco, key, None)
        if isinstance(value, np.ndarray) and (without or value.dtype.kind == "f"):
            found[key] = np.array(value)
        elif isinstance(value, float) and without:
            found[key] = value
    return found


def _put_attributes(thing: Any, state: dict[str, Any], tensors: Tensors) -> None:
    for key, packed in state.items():
        kind = next(iter(packed), None) if isinstance(packed, dict) and len(packed) == 1 else None
        if kind == "$object":
            if getattr(thing, key, None) is None:
                raise ValueError(f"the checkpoint has {type(thing).__name__}.{key}, and this env has none")
            _put_attributes(getattr(thing, key), packed["$object"], tensors)
        elif kind in ("$data", "$model"):
            _put_mujoco(getattr(thing, key), unpack(packed[kind], tensors))
        elif kind == "$space":
            if packed[kind] is not None:
                getattr(thing, key).np_random.bit_generator.state = unpack(packed[kind], tensors).bit_generator.state
        else:
            setattr(thing, key, unpack(packed, tensors))


def _put_mujoco(mujoco: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        present = getattr(mujoco, key)
        if not isinstance(value, np.ndarray):
            setattr(mujoco, key, value)
        elif present.shape != value.shape:
            raise ValueError(f"the checkpoint's MuJoCo model has {key} of shape {value.shape}, this env's has {present.shape}")
        elif not np.array_equal(present, value):
            present[...] = value
