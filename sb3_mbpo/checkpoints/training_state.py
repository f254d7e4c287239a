"""Everything that decides how a run goes on: agent, buffers, random generators, envs, callbacks; taken out and put back."""

import copy
import functools
import inspect
import io
import json
import logging
import random
import time
import types
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.buffers.replay_buffer import ROWS
from sb3_mbpo.checkpoints.env_state import CannotRestoreError, put_envs, put_statistics, take_envs, take_statistics
from sb3_mbpo.checkpoints.packing import CannotPackError, Tensors, pack, unpack

# Attributes of an agent that belong to the process and not to the run.
_OF_THE_PROCESS = {"start_time", "verbose", "n_envs", "device", "tensorboard_log", "_custom_logger"}
# An argument that SB3 keeps under another name.
_OF_THE_PROCESS |= {"_stats_window_size"}
# Attributes of a callback that SB3 sets anew, from arguments too, or that say where files go.
_SET_ANEW = {"model", "parent", "locals", "globals", "logger", "training_env", "progress_bar", "pbar"}
_SET_ANEW |= {"log_path", "best_model_save_path", "save_path", "_total_max_episodes"}
# What a callback is made of, and what it writes to.
_NO_STATE: tuple[type, ...] = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type)
_NO_STATE += (functools.partial, Logger, logging.Logger, KVWriter, io.IOBase, PurePath, BaseCallback, BaseAlgorithm)
_NO_STATE += (th.nn.Module, gym.Space, th.device, th.dtype, np.dtype)
# What action noise of SB3 remembers; of other noise, all numbers and arrays are taken.
_NOISE: dict[type, tuple[str, ...]] = {
    **{NormalActionNoise: (), VectorizedActionNoise: ()},
    **{OrnsteinUhlenbeckActionNoise: ("noise_prev",)},
}
_GENERATORS = (th.Generator, np.random.Generator, np.random.RandomState, random.Random)


def take_training(agent: Any, callbacks: list[BaseCallback], tensors: Tensors, lost: str | None = None) -> dict[str, Any]:
    """
    The whole state of a run, between two updates.

    :param agent: a ModelBased algorithm in ``learn``
    :param callbacks: of that ``learn``, see ``all_callbacks``
    :param tensors: see :func:`.packing.pack`; they share memory with the agent
    :param lost: why the envs are left out; the run will go on at an episode's start
    :return: JSON; under ``"envs_lost"`` the reason why envs are not in it, if they are not
    """
    state = {
        **take_agent(agent, tensors),
        "replay_buffer": pack(_buffer_contents(agent.replay_buffer), tensors, "replay_buffer"),
        "callbacks": [take_callback(one, tensors, f"callbacks.{i}") for i, one in enumerate(callbacks)],
        # By themselves: the statistics of VecNormalize are not lost with the envs.
        "wrappers": take_statistics(agent.env, tensors, "wrappers"),
        "envs": None,
        "envs_lost": lost,
    }
    try:
        if lost is None:
            state["envs"] = take_envs(agent.env, tensors, "envs")
    except CannotRestoreError as error:
        state["envs_lost"] = str(error)
    return state


def put_training(agent: Any, callbacks: list[BaseCallback], state: dict[str, Any], tensors: Tensors) -> str:
    """
    Go on as the run would have that ``take_training`` saw.

    :param agent: made with the same arguments, in ``learn``, before anything was collected
    :param callbacks: of that ``learn``, made as those of the run were
    :param state: from ``take_training``
    :param tensors: what it filled
    :return: what could not be restored, and why, in one or two sentences; empty: everything was
    :raises ValueError: the agent, its env or its buffer were made differently
    """
    _fill_buffer(agent.replay_buffer, unpack(state["replay_buffer"], tensors))
    lost = put_callbacks(callbacks, state["callbacks"], tensors)
    reason = state["envs_lost"]
    if state["envs"] is not None:
        try:
            put_envs(agent.env, state["envs"], tensors)
        except CannotRestoreError as error:
            reason = str(error)
    if reason is None:
        put_agent(agent, state, tensors)
    else:
        put_statistics(agent.env, state["wrappers"], tensors)
        obs = agent.env.reset()
        put_agent(agent, state, tensors)
        agent._last_obs = obs
        agent._last_episode_starts = np.ones((agent.n_envs,), dtype=bool)
        if agent._vec_normalize_env is not None:
            agent._last_original_obs = agent._vec_normalize_env.get_original_obs()
    return _told(reason, lost)


def _told(reason: str | None, of_callbacks: dict[str, str]) -> str:
    """What could not be restored, of envs and of callbacks."""
    lines = []
    if reason is not None:
        lines.append(f"The run goes on at the start of an episode, for its envs could not be restored: {reason}")
    # A callback's env is mostly made as the agent's.
    names = [f"{name} ({why})" for name, why in of_callbacks.items() if why != reason]
    if names:
        lines.append(f"Of the run's callbacks, this could not be restored and begins anew: {', '.join(names)}")
    return ". ".join(lines)


def take_agent(agent: Any, tensors: Tensors) -> dict[str, Any]:
    """:return: networks, optimizers, counters, generators and what is not yet logged, as JSON: what ``train()`` changes"""
    _, variables = agent._get_torch_save_params()
    return {
        "parameters": pack(agent.get_parameters(), tensors, "parameters"),
        "variables": pack({name: _reach(agent, name) for name in variables}, tensors, "variables"),
        "attributes": pack(dict(_attributes(agent)), tensors, "agent"),
        "elapsed": time.time_ns() - agent.start_time,
        "log": pack(_pending_log(agent), tensors, "log"),
        "random": pack(_random_states(agent), tensors, "random"),
    }


def put_agent(agent: Any, state: dict[str, Any], tensors: Tensors) -> None:
    """Put back what ``take_agent`` took."""
    agent.set_parameters(unpack(state["parameters"], tensors), exact_match=True, device=agent.device)
    for name, value in unpack(state["variables"], tensors).items():
        if value is not None:
            _reach(agent, name).data.copy_(value)
    without = _not_of_the_run(agent)
    for name, value in unpack(state["attributes"], tensors).items():
        present = getattr(agent, name, None)
        if name not in without and not callable(present):
            setattr(agent, name, deque(value, present.maxlen) if isinstance(present, deque) else value)
    agent.start_time = time.time_ns() - state["elapsed"]
    for name, value in unpack(state["log"], tensors).items():
        getattr(agent.logger, name).clear()
        getattr(agent.logger, name).update(value)
    # Last: what was done above may have drawn random numbers.
    _put_random(agent, unpack(state["random"], tensors))


@contextmanager
def undone_on_error(agent: Any) -> Iterator[None]:
    """
    A fit of the learned parts, and the model rollout after it, happen as a whole or not at all.

    Whatever ends them early (an error in a user's function, Ctrl-C, no memory, a signal that ends the run), the agent is as it
    was before: parameters and optimizers of the learned parts, counters, random numbers, what is not yet logged. The
    model buffer is not copied, it may be large: see :meth:`.ModelBuffer.drop_refill`. What was warned of stays warned of.
    May be nested.

    :param agent: a ModelBased algorithm
    """
    log = _recorded(agent)
    values = {name: value for name, value in _attributes(agent) if not name.startswith("_warned")}
    learned = _learned(agent)
    parts = {name: _reach(agent, name) for name in agent._get_torch_save_params()[0] if name.split(".")[0] in learned}
    states = {name: part.state_dict() for name, part in parts.items()}
    values, states, random_states = copy.deepcopy((values, states, _random_states(agent)))
    begun = agent.replay_buffer.model_buffer.begun
    try:
        yield
    except BaseException:
        while agent.replay_buffer.model_buffer.begun > begun:
            agent.replay_buffer.model_buffer.drop_refill()
        vars(agent).update(values)
        for name, part in parts.items():
            part.load_state_dict(states[name])
        for name, value in log.items():
            getattr(agent.logger, name).clear()
            getattr(agent.logger, name).update(value)
        _put_random(agent, random_states)
        raise


def _learned(agent: Any) -> list[str]:
    """:return: names of what the agent learns of the env: networks that are saved and are no part of its policy"""
    of_policy = {id(module) for module in agent.policy.modules()}
    roots = dict.fromkeys(name.split(".")[0] for name in agent._get_torch_save_params()[0])
    return [root for root in roots if isinstance(part := getattr(agent, root), th.nn.Module) and id(part) not in of_policy]


def _reach(agent: Any, name: str) -> Any:
    value = agent
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _not_of_the_run(agent: Any) -> set[str]:
    """Attributes that are never saved nor put back: arguments of the constructor, and what belongs to the process."""
    return set(inspect.signature(type(agent)).parameters) | _OF_THE_PROCESS


def _attributes(agent: Any) -> Iterator[tuple[str, Any]]:
    """Counters, last observations, statistics of episodes: whatever is plain and not an argument of the constructor."""
    without = _not_of_the_run(agent)
    for name, value in vars(agent).items():
        if name in without or isinstance(value, _GENERATORS):
            continue
        try:
            packed = pack(value, {}, name)
        except CannotPackError:
            continue
        # Tensors are parts of networks, or variables: those have a place of their own.
        if '"$tensor"' not in json.dumps(packed):
            yield name, value


def _recorded(agent: Any) -> dict[str, dict[str, Any]]:
    """What was recorded and not yet written; nothing before the first ``learn``, when SB3 has no logger."""
    logger = getattr(agent, "_logger", None)
    names = () if logger is None else ("name_to_value", "name_to_count", "name_to_excluded")
    return {name: dict(getattr(logger, name)) for name in names}


def _pending_log(agent: Any) -> dict[str, Any]:
    """What was recorded and not yet written, as far as it can be saved."""
    log = _recorded(agent)
    for key, value in list(log["name_to_value"].items()):
        try:
            pack(value, {}, key)
        except CannotPackError:
            # A figure, a video, a table of hyperparameters: for the screen, and not to be computed with.
            for part in log.values():
                part.pop(key, None)
    return log


def _generators(agent: Any) -> Iterator[tuple[str, Any]]:
    """Generators of the agent, of its replay buffer, and of its networks and dynamics with all modules inside."""
    owners = [("agent", agent), ("replay_buffer", agent.replay_buffer)]
    for name, part in vars(agent).items():
        if isinstance(part, th.nn.Module):
            owners += part.named_modules(prefix=name)
    for name, owner in owners:
        for key, value in vars(owner).items():
            if isinstance(value, _GENERATORS):
                yield f"{name}.{key}", value


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _put_generator(generator: Any, state: Any) -> None:
    """In place: several parts may share it."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _spaces(agent: Any) -> Iterator[tuple[str, Any]]:
    # An agent that was loaded may have no env.
    for name, owner in (("agent", agent), *([] if agent.env is None else [("env", agent.env)])):
        for kind in ("action_space", "observation_space"):
            yield f"{name}.{kind}", getattr(owner, kind)


def _random_states(agent: Any) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if agent.device.type == "cuda" else None,
        "parts": {name: _generator_state(generator) for name, generator in _generators(agent)},
        # Of those that were sampled from, or seeded.
        "spaces": {n: space.np_random.bit_generator.state for n, space in _spaces(agent) if space._np_random is not None},
        "noise": _noise_state(agent.action_noise),
    }


def _put_random(agent: Any, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if states["cuda"] is not None and agent.device.type == "cuda":
        th.cuda.set_rng_state_all([one.cpu() for one in states["cuda"]])
    for name, generator in _generators(agent):
        if name in states["parts"]:
            _put_generator(generator, states["parts"][name])
    for name, space in _spaces(agent):
        if name in states["spaces"]:
            space.np_random.bit_generator.state = states["spaces"][name]
    _put_noise(agent.action_noise, states["noise"])


def _noise_state(noise: Any) -> Any:
    """The numbers that action noise remembers (Ornstein-Uhlenbeck), also one per env."""
    if noise is None:
        return None
    several = [_noise_state(one) for one in getattr(noise, "noises", [])]
    names = _NOISE.get(type(noise), tuple(vars(noise)))
    own = {name: value for name in names if isinstance(value := getattr(noise, name), np.ndarray | int | float | None)}
    return {"own": own, "several": several}


def _put_noise(noise: Any, state: Any) -> None:
    if noise is not None and state is not None:
        names = _NOISE.get(type(noise), tuple(vars(noise)))
        vars(noise).update({name: value for name, value in state["own"].items() if name in names})
        for one, its_state in zip(getattr(noise, "noises", []), state["several"], strict=True):
            _put_noise(one, its_state)


def _buffer_contents(buffer: Any) -> dict[str, Any]:
    """What is filled of the real and of the imagined transitions."""
    rows, refills = buffer.model_buffer.contents()
    filled = {name: getattr(buffer, name)[: buffer.size()] for name in ROWS}
    return {"rows": filled, "pos": buffer.pos, "full": buffer.full, "imagined": rows, "refills": refills}


def _fill_buffer(buffer: Any, contents: dict[str, Any]) -> None:
    for name, filled in contents["rows"].items():
        rows = getattr(buffer, name)
        if rows.shape[1:] != filled.shape[1:] or len(filled) > len(rows) or (contents["full"] and len(filled) < len(rows)):
            raise ValueError(
                f"the checkpoint's replay buffer has {name} of shape {filled.shape}, the agent's has room for {rows.shape}: "
                "make the agent with the same buffer_size and as many envs"
            )
        rows[: len(filled)] = filled
    buffer.pos, buffer.full = contents["pos"], contents["full"]
    buffer.model_buffer.restore(contents["imagined"], contents["refills"])


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
