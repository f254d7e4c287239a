"""Saves and restores everything that determines how a run continues: agent, buffers, generators, envs, callbacks."""

import copy
import inspect
import json
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer
from sb3_mbpo.checkpoints.callback_state import may_put, put_callbacks, take_callback
from sb3_mbpo.checkpoints.env_state import CannotRestoreError, put_envs, put_statistics, take_envs, take_statistics
from sb3_mbpo.saving.agent_state import HINTS, decode_state, encode_state
from sb3_mbpo.saving.checked_tensors import check_weights
from sb3_mbpo.saving.serialization import (
    NUMPY,
    CannotEncodeError,
    Tensors,
    decode,
    encode,
    generator_state,
    set_generator_state,
)

# Attributes of an agent that belong to the process, not to the run.
_OF_THE_PROCESS = {"start_time", "verbose", "n_envs", "device", "tensorboard_log", "_custom_logger", "_plain_agents"}
# An argument that SB3 keeps under another name.
_OF_THE_PROCESS |= {"_stats_window_size"}
# State of SB3's action noise. For other noise, all numbers and arrays are saved.
_NOISE: dict[type, tuple[str, ...]] = {
    **{NormalActionNoise: (), VectorizedActionNoise: ()},
    **{OrnsteinUhlenbeckActionNoise: ("noise_prev",)},
}
_GENERATORS = (th.Generator, np.random.Generator, np.random.RandomState, random.Random)


def take_training(agent: Any, callbacks: list[BaseCallback], tensors: Tensors, lost: str | None = None) -> dict[str, Any]:
    """
    Save the complete state of a run, between two updates.

    :param agent: a ModelBased algorithm in ``learn``
    :param callbacks: the callbacks of that ``learn``, see :func:`.callback_state.all_callbacks`
    :param tensors: see :func:`.serialization.encode`; they share memory with the agent
    :param lost: why envs are not saved; the resumed run starts a new episode. ``None``: they are saved
    :return: JSON. ``"envs_lost"`` is the reason if envs are not in it
    """
    state = {
        **take_agent(agent, tensors),
        "replay_buffer": encode(agent.replay_buffer.contents(), tensors, "replay_buffer"),
        "callbacks": [take_callback(one, tensors, f"callbacks.{i}") for i, one in enumerate(callbacks)],
        # Saved separately, so that the statistics of VecNormalize are not lost with the envs.
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
    Restore the state of a run.

    :param agent: an agent made with the same arguments, in ``learn``, before it has collected transitions
    :param callbacks: the callbacks of that ``learn``, made like those of the run
    :param state: the result of :func:`take_training`
    :param tensors: the tensors of :func:`take_training`
    :return: what could not be restored, and why, in one or two sentences; empty: everything was restored
    :raises ValueError: the agent, its env or its buffer were made differently, or numbers are not finite
    """
    _put_buffer(agent.replay_buffer, decode(state["replay_buffer"], tensors))
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
        problems = put_statistics(agent.env, state["wrappers"], tensors)
        reason = "; ".join(dict.fromkeys([reason, *problems]))
        obs = agent.env.reset()
        put_agent(agent, state, tensors)
        agent._last_obs = obs
        agent._last_episode_starts = np.ones((agent.n_envs,), dtype=bool)
        if agent._vec_normalize_env is not None:
            agent._last_original_obs = agent._vec_normalize_env.get_original_obs()
    check_weights(agent)
    return _told(reason, lost)


def _told(reason: str | None, of_callbacks: dict[str, str]) -> str:
    """:return: the warning about envs and callbacks that could not be restored"""
    lines = []
    if reason is not None:
        lines.append(f"The run goes on at the start of an episode, because its envs could not be restored: {reason}")
    # The reason is the same for a callback's env that is like the agent's.
    names = [f"{name} ({why})" for name, why in of_callbacks.items() if why != reason]
    if names:
        lines.append(f"Of the run's callbacks, this could not be restored and begins anew: {', '.join(names)}")
    return ". ".join(lines)


def take_agent(agent: Any, tensors: Tensors) -> dict[str, Any]:
    """
    :param agent: a ModelBased algorithm
    :param tensors: see :func:`.serialization.encode`
    :return: everything that ``train()`` changes, as JSON: networks, optimizers, counters, generators and unwritten log values
    """
    _, variables = agent._get_torch_save_params()
    return {
        "parameters": encode(agent.get_parameters(), tensors, "parameters"),
        "variables": encode({name: reach(agent, name) for name in variables}, tensors, "variables"),
        "state": encode_state(agent),
        "attributes": encode(dict(plain_attributes(agent)), tensors, "agent"),
        "elapsed": time.time_ns() - agent.start_time,
        "log": encode(_pending_log(agent), tensors, "log"),
        "random": encode(_random_states(agent), tensors, "random"),
    }


def put_agent(agent: Any, state: dict[str, Any], tensors: Tensors) -> None:
    """
    :param agent: a ModelBased algorithm
    :param state: the result of :func:`take_agent`, or of :func:`take_training`
    :param tensors: its tensors
    :raises ValueError: the state does not fit the agent
    """
    agent.set_parameters(decode(state["parameters"], tensors), exact_match=True, device=agent.device)
    variables = decode(state["variables"], tensors)
    for name in agent._get_torch_save_params()[1]:
        if variables.get(name) is not None:
            reach(agent, name).data.copy_(variables[name])
    vars(agent).update(decode_state(state["state"], agent.codec.obs_dim))
    without = _not_of_the_run(agent)
    for name, value in decode(state["attributes"], tensors).items():
        present = vars(agent).get(name)
        # A checkpoint may be foreign, so only what is ever saved is restored.
        if name not in without and may_put(agent, name) and _is_plain(present) and _is_plain(value):
            setattr(agent, name, deque(value, present.maxlen) if isinstance(present, deque) else value)
    agent.start_time = time.time_ns() - state["elapsed"]
    log = decode(state["log"], tensors)
    for name in _recorded(agent):
        getattr(agent.logger, name).clear()
        getattr(agent.logger, name).update(log[name])
    # Last, because the steps above may have drawn random numbers.
    _put_random(agent, decode(state["random"], tensors))


@contextmanager
def undone_on_error(agent: Any) -> Iterator[None]:
    """
    Undo a fit of the learned parts and a model rollout if an error ends them.

    The error may come from a user's function, Ctrl-C, a lack of memory, or a signal that ends the run. Then the parameters and
    optimizers of the learned parts, the counters, the random generators and the unwritten log values are restored. The model
    buffer may be large, so it is not copied, see :meth:`.ModelBuffer.drop_refill`. Warnings are not repeated. Contexts may be
    nested.

    :param agent: a ModelBased algorithm
    """
    log = _recorded(agent)
    values = {name: value for name, value in vars(agent).items() if name in HINTS} | dict(plain_attributes(agent))
    del values["_warned_of"]
    learned = _learned(agent)
    parts = {name: reach(agent, name) for name in agent._get_torch_save_params()[0] if name.split(".")[0] in learned}
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
    """:return: names of the saved networks that are not part of the policy: the agent learns the env with them"""
    of_policy = {id(module) for module in agent.policy.modules()}
    roots = dict.fromkeys(name.split(".")[0] for name in agent._get_torch_save_params()[0])
    return [root for root in roots if isinstance(part := getattr(agent, root), th.nn.Module) and id(part) not in of_policy]


def reach(agent: Any, name: str) -> Any:
    """:return: an attribute, or one of an attribute: ``"critic.optimizer"``"""
    value = agent
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _not_of_the_run(agent: Any) -> set[str]:
    """
    :return: names of attributes that are never in ``attributes`` of a checkpoint: arguments of the constructor, those that are
        not saved with the agent or belong to the process, and those of :class:`.AgentState`, which have a place of their own
    """
    not_saved = set(agent._excluded_save_params())
    return set(inspect.signature(type(agent)).parameters) | not_saved | _OF_THE_PROCESS | set(HINTS)


def plain_attributes(agent: Any) -> Iterator[tuple[str, Any]]:
    """:return: plain attributes that are not constructor arguments, such as last observations and statistics of episodes"""
    without = _not_of_the_run(agent)
    for name, value in vars(agent).items():
        if name not in without and _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    """:return: whether a value is saved as an attribute. Generators and tensors are saved elsewhere"""
    if isinstance(value, _GENERATORS):
        return False
    try:
        # Tensors belong to networks, or are variables.
        return '"$tensor"' not in json.dumps(encode(value, {}))
    except CannotEncodeError:
        return False


def _recorded(agent: Any) -> dict[str, dict[str, Any]]:
    """:return: log values that are not yet written; empty before the first ``learn``, when there is no logger"""
    logger = getattr(agent, "_logger", None)
    names = () if logger is None else ("name_to_value", "name_to_count", "name_to_excluded")
    return {name: dict(getattr(logger, name)) for name in names}


def _pending_log(agent: Any) -> dict[str, Any]:
    """:return: log values that are not yet written and can be saved"""
    log = _recorded(agent)
    for key, value in list(log["name_to_value"].items()):
        try:
            encode(value, {}, key)
        except CannotEncodeError:
            # A figure, a video, or a table of hyperparameters.
            for part in log.values():
                part.pop(key, None)
    return log


def _generators(agent: Any) -> Iterator[tuple[str, Any]]:
    """:return: generators of the agent, of its replay buffer, and of all modules of its networks and dynamics"""
    owners = [("agent", agent), ("replay_buffer", agent.replay_buffer)]
    for name, part in vars(agent).items():
        if isinstance(part, th.nn.Module):
            owners += part.named_modules(prefix=name)
    for name, owner in owners:
        for key, value in vars(owner).items():
            if isinstance(value, _GENERATORS):
                yield f"{name}.{key}", value


def _spaces(agent: Any) -> Iterator[tuple[str, Any]]:
    # A loaded agent may have no env.
    for name, owner in (("agent", agent), *([] if agent.env is None else [("env", agent.env)])):
        for kind in ("action_space", "observation_space"):
            yield f"{name}.{kind}", getattr(owner, kind)


def _random_states(agent: Any) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": generator_state(NUMPY),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if agent.device.type == "cuda" else None,
        "parts": {name: generator_state(generator) for name, generator in _generators(agent)},
        # Only spaces that were sampled from or seeded have a generator.
        "spaces": {n: space.np_random.bit_generator.state for n, space in _spaces(agent) if space._np_random is not None},
        "noise": _noise_state(agent.action_noise),
    }


def _put_random(agent: Any, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    set_generator_state(NUMPY, states["numpy"])
    th.set_rng_state(states["torch"])
    if states["cuda"] is not None and agent.device.type == "cuda":
        th.cuda.set_rng_state_all([one.cpu() for one in states["cuda"]])
    for name, generator in _generators(agent):
        if name in states["parts"]:
            set_generator_state(generator, states["parts"][name])
    for name, space in _spaces(agent):
        if name in states["spaces"]:
            set_generator_state(space.np_random, states["spaces"][name])
    _put_noise(agent.action_noise, states["noise"])


def _noise_state(noise: Any) -> Any:
    """:return: the state of action noise such as Ornstein-Uhlenbeck, also of one per env"""
    if noise is None:
        return None
    several = [_noise_state(one) for one in getattr(noise, "noises", [])]
    names = _NOISE.get(type(noise), tuple(vars(noise)))
    own = {name: value for name in names if isinstance(value := getattr(noise, name), np.ndarray | int | float | None)}
    return {"own": own, "several": several}


def _put_noise(noise: Any, state: Any) -> None:
    if noise is not None and state is not None:
        vars(noise).update({name: state["own"][name] for name in _noise_state(noise)["own"] if name in state["own"]})
        for one, its_state in zip(getattr(noise, "noises", []), state["several"], strict=True):
            _put_noise(one, its_state)


def _put_buffer(buffer: MixedReplayBuffer, contents: dict[str, Any]) -> None:
    """Restore the replay buffer exactly, or raise."""
    filled, room = contents["rows"]["observations"].shape, buffer.observations.shape
    if filled[1:] != room[1:] or filled[0] > room[0] or (contents["full"] and filled[0] < room[0]):
        raise ValueError(
            f"the checkpoint's replay buffer has observations of shape {filled}, the agent's has room for {room}: make the "
            "agent with the same buffer_size and as many envs"
        )
    buffer.restore(contents)
