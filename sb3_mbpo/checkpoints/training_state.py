"""Everything that decides how a run goes on: agent, buffers, random generators, envs, callbacks; taken out and put back."""

import copy
import inspect
import json
import random
import re
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.buffers.replay_buffer import ROWS, check_finite
from sb3_mbpo.checkpoints.env_state import CannotRestoreError, put_envs, put_wrappers, take_envs, take_wrappers
from sb3_mbpo.checkpoints.packing import CannotPackError, Tensors, pack, unpack
from sb3_mbpo.saving.checked_tensors import check_weights

# Attributes of an agent that belong to the process and not to the run.
_OF_THE_PROCESS = {"start_time", "verbose", "n_envs", "device", "tensorboard_log"}
# Attributes of a callback that SB3 sets anew, or that say where its files go.
_SET_ANEW = {"model", "parent", "locals", "globals", "logger", "training_env", "progress_bar", "pbar"}
_SET_ANEW |= {"log_path", "best_model_save_path", "save_path"}
# Names and texts that say where a file is. Where a run writes is said by its command, never by a checkpoint.
_NAME_OF_A_PLACE = r"(?i)(path|dir|directory|folder|file|filename|url)s?$"
_PLACE = r"[/\\]|^~|^\.\.?$"


def take_training(agent: Any, callbacks: list[BaseCallback], tensors: Tensors, envs: bool = True) -> dict[str, Any]:
    """
    The whole state of a run, between two updates.

    :param agent: a ModelBased algorithm in ``learn``
    :param callbacks: of that ``learn``, see ``all_callbacks``
    :param tensors: see :func:`.packing.pack`; they share memory with the agent
    :param envs: with the envs' state; without, the run will go on at an episode's start
    :return: JSON; under ``"envs_lost"`` the reason why envs are not in it, if they are not
    """
    state = {
        **take_agent(agent, tensors),
        "replay_buffer": pack(_buffer_contents(agent.replay_buffer), tensors, "replay_buffer"),
        "callbacks": [_take_callback(one, tensors, f"callbacks.{i}") for i, one in enumerate(callbacks)],
        "wrappers": None,
        "envs": None,
        "envs_lost": None if envs else "they were in the middle of a step that failed",
    }
    try:
        # By themselves: the statistics of VecNormalize are not lost with the envs.
        state["wrappers"] = take_wrappers(agent.env, tensors, "wrappers")
        if envs:
            state["envs"] = take_envs(agent.env, tensors, "envs")
    except CannotRestoreError as error:
        state["envs_lost"] = str(error)
    return state


def put_training(agent: Any, callbacks: list[BaseCallback], state: dict[str, Any], tensors: Tensors) -> None:
    """
    Go on as the run would have that ``take_training`` saw.

    :param agent: made with the same arguments, in ``learn``, before anything was collected
    :param callbacks: of that ``learn``, made as those of the run were
    :param state: from ``take_training``
    :param tensors: what it filled
    :raises ValueError: the agent, its env or its buffer were made differently; or numbers are not finite
    """
    _fill_buffer(agent.replay_buffer, unpack(state["replay_buffer"], tensors))
    _put_callbacks(callbacks, state["callbacks"], tensors)
    if state["envs"] is not None:
        put_envs(agent.env, state["envs"], tensors)
        put_agent(agent, state, tensors)
        check_weights(agent)
        _tell_callbacks(callbacks)
        return
    warnings.warn(
        f"The run goes on at the start of an episode, for its envs could not be saved: {state['envs_lost']}", stacklevel=2
    )
    if state["wrappers"] is not None:
        put_wrappers(agent.env, state["wrappers"], tensors)
    obs = agent.env.reset()
    put_agent(agent, state, tensors)
    check_weights(agent)
    agent._last_obs = obs
    agent._last_episode_starts = np.ones((agent.n_envs,), dtype=bool)
    if agent._vec_normalize_env is not None:
        agent._last_original_obs = agent._vec_normalize_env.get_original_obs()
    _tell_callbacks(callbacks)


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
    variables = unpack(state["variables"], tensors)
    for name in agent._get_torch_save_params()[1]:
        if variables.get(name) is not None:
            _reach(agent, name).data.copy_(variables[name])
    for name, value in unpack(state["attributes"], tensors).items():
        # A checkpoint may be foreign: what is not taken is not put back.
        if _is_counter(agent, name) and _may_put(agent, name) and _is_plain(vars(agent).get(name)):
            setattr(agent, name, value)
    agent.start_time = time.time_ns() - state["elapsed"]
    log = unpack(state["log"], tensors)
    for name in _recorded(agent):
        getattr(agent.logger, name).clear()
        getattr(agent.logger, name).update(log[name])
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


def _attributes(agent: Any) -> Iterator[tuple[str, Any]]:
    """Counters, last observations, statistics of episodes: whatever is plain and not an argument of the constructor."""
    for name, value in vars(agent).items():
        if _is_counter(agent, name) and _is_plain(value):
            yield name, value


def _is_counter(agent: Any, name: str) -> bool:
    """Whether an attribute of this name belongs to the run: the command says what the arguments are."""
    arguments = set(inspect.signature(type(agent)).parameters) - {"action_noise"}
    return name not in arguments and name not in _OF_THE_PROCESS


def _is_plain(value: Any) -> bool:
    """Whether a value can be saved and is no tensor: those are parts of networks, or variables, and have their own place."""
    try:
        return '"$tensor"' not in json.dumps(pack(value, {}))
    except CannotPackError:
        return False


def _may_put(owner: Any, name: str) -> bool:
    """
    Whether an attribute may be set from a file: never in the place of a method, a function or an object.

    :param owner: an agent or a callback
    :param name: that the file gives
    """
    if name in vars(owner):
        try:
            pack(vars(owner)[name], {})
        except CannotPackError:
            return False
        return True
    of_class = inspect.getattr_static(type(owner), name, None)
    return not (name.startswith("__") or callable(of_class) or hasattr(of_class, "__get__"))


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
    """Generators of the agent's parts."""
    for name in (*_learned(agent), "replay_buffer"):
        for key, value in vars(getattr(agent, name)).items():
            if isinstance(value, th.Generator):
                yield f"{name}.{key}", value


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
        "parts": {name: generator.get_state() for name, generator in _generators(agent)},
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
        generator.set_state(states["parts"][name])
    for name, space in _spaces(agent):
        if name in states["spaces"]:
            space.np_random.bit_generator.state = states["spaces"][name]
    _put_noise(agent.action_noise, states["noise"])


def _noise_state(noise: Any) -> Any:
    """The numbers that action noise remembers (Ornstein-Uhlenbeck), also one per env."""
    if noise is None:
        return None
    several = [_noise_state(one) for one in getattr(noise, "noises", [])]
    own = {name: value for name, value in vars(noise).items() if isinstance(value, np.ndarray | int | float | None)}
    return {"own": own, "several": several}


def _put_noise(noise: Any, state: Any) -> None:
    if noise is not None and state is not None:
        vars(noise).update({name: state["own"][name] for name in _noise_state(noise)["own"] if name in state["own"]})
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
    check_finite(contents["rows"], contents["imagined"])
    buffer.pos, buffer.full = contents["pos"], contents["full"]
    buffer.model_buffer.restore(contents["imagined"], contents["refills"])


def all_callbacks(callback: BaseCallback) -> list[BaseCallback]:
    """A callback and all those inside it, in a fixed order."""
    found = [callback]
    for one in found:
        for value in vars(one).values():
            inside = value if isinstance(value, list) else [value]
            found += [item for item in inside if isinstance(item, BaseCallback) and item not in found]
    return found


def _take_callback(callback: BaseCallback, tensors: Tensors, name: str) -> dict[str, Any]:
    """What is plain of a callback, and the state of its env, if it has one of its own."""
    state, envs = {}, {}
    for key, value in vars(callback).items():
        try:
            if isinstance(value, VecEnv):
                envs[key] = take_envs(value, tensors, f"{name}.{key}")
            elif _is_of_the_run(callback, key, value):
                state[key] = pack(value, tensors, f"{name}.{key}")
        except (CannotPackError, CannotRestoreError):
            continue
    return {"class": type(callback).__name__, "state": state, "envs": envs}


def _is_of_the_run(callback: BaseCallback, name: str, value: Any) -> bool:
    """
    Whether an attribute of a callback is saved, and put back: not what SB3 sets anew, no argument, and nothing that says
    where a file is.

    :param callback: as it is now
    :param name: of the attribute
    :param value: that it has now, or gets
    """
    if name in _SET_ANEW or name in _arguments(type(callback)):
        return False
    return not any(re.search(_NAME_OF_A_PLACE, key) or re.search(_PLACE, text) for key, text in _texts(value, name))


def _arguments(kind: type) -> set[str]:
    """As with the agent, arguments are those of the command; also those that a constructor passes on as ``**kwargs``."""
    found: set[str] = set()
    for one in kind.__mro__:
        if "__init__" in vars(one):
            parameters = inspect.signature(vars(one)["__init__"]).parameters
            found |= set(parameters)
            if not any(item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD) for item in parameters.values()):
                break
    return found


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """All texts in a value, with the name that is nearest to each."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, key if isinstance(key, str) else name)
    elif isinstance(value, list | tuple | deque):
        for item in value:
            yield from _texts(item, name)


def _tell_callbacks(callbacks: list[BaseCallback]) -> None:
    """Last of all, those that have a method ``on_resume()`` are told."""
    for callback in callbacks:
        if hasattr(callback, "on_resume"):
            callback.on_resume()


def _put_callbacks(callbacks: list[BaseCallback], states: list[dict[str, Any]], tensors: Tensors) -> None:
    """
    Each gets the state of its class's first, second, ... in the run; one that the run did not have starts anew.
    """
    seen: Counter[str] = Counter()
    for callback in callbacks:
        kind = type(callback).__name__
        mine = [state for state in states if state["class"] == kind]
        if seen[kind] < len(mine):
            state = mine[seen[kind]]
            for key, packed in state["state"].items():
                value, now = unpack(packed, tensors), vars(callback).get(key)
                if all(_is_of_the_run(callback, key, one) for one in (value, now)) and _may_put(callback, key):
                    setattr(callback, key, value)
            for key, envs in state["envs"].items():
                if isinstance(vars(callback).get(key), VecEnv):
                    put_envs(vars(callback)[key], envs, tensors)
        seen[kind] += 1
