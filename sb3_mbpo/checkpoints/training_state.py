"""Everything that decides how a run goes on: agent, buffers, random generators, envs, callbacks; taken out and put back."""

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

from sb3_mbpo.buffers.replay_buffer import ROWS, check_finite
from sb3_mbpo.checkpoints.callback_state import may_put, put_callbacks, take_callback
from sb3_mbpo.checkpoints.env_state import CannotRestoreError, put_envs, put_statistics, take_envs, take_statistics
from sb3_mbpo.checkpoints.packing import CannotPackError, Tensors, pack, unpack
from sb3_mbpo.saving.checked_tensors import check_weights

# Attributes of an agent that belong to the process and not to the run.
_OF_THE_PROCESS = {"start_time", "verbose", "n_envs", "device", "tensorboard_log", "_custom_logger", "_plain_agents"}
# An argument that SB3 keeps under another name.
_OF_THE_PROCESS |= {"_stats_window_size"}
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
    :param callbacks: of that ``learn``, see :func:`.callback_state.all_callbacks`
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
    :raises ValueError: the agent, its env or its buffer were made differently; or numbers are not finite
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
    """What could not be restored, of envs and of callbacks."""
    lines = []
    if reason is not None:
        lines.append(f"The run goes on at the start of an episode, because its envs could not be restored: {reason}")
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
        "variables": pack({name: reach(agent, name) for name in variables}, tensors, "variables"),
        "attributes": pack(dict(plain_attributes(agent)), tensors, "agent"),
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
            reach(agent, name).data.copy_(variables[name])
    without = _not_of_the_run(agent)
    for name, value in unpack(state["attributes"], tensors).items():
        present = vars(agent).get(name)
        # A checkpoint may be foreign: what is not taken is not put back.
        if name not in without and may_put(agent, name) and _is_plain(present) and _is_plain(value):
            setattr(agent, name, deque(value, present.maxlen) if isinstance(present, deque) else value)
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
    values = {name: value for name, value in plain_attributes(agent) if not name.startswith("_warned")}
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
    """:return: names of what the agent learns of the env: networks that are saved and are no part of its policy"""
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
    """Attributes that are never saved nor put back: arguments of the constructor, and what belongs to the process."""
    return set(inspect.signature(type(agent)).parameters) | _OF_THE_PROCESS


def plain_attributes(agent: Any) -> Iterator[tuple[str, Any]]:
    """Counters, last observations, statistics of episodes: whatever is plain and not an argument of the constructor."""
    without = _not_of_the_run(agent)
    for name, value in vars(agent).items():
        if name not in without and _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    """Whether a value can be saved among the attributes. Generators and tensors have places of their own."""
    if isinstance(value, _GENERATORS):
        return False
    try:
        # Tensors are parts of networks, or variables.
        return '"$tensor"' not in json.dumps(pack(value, {}))
    except CannotPackError:
        return False


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
        vars(noise).update({name: state["own"][name] for name in _noise_state(noise)["own"] if name in state["own"]})
        for one, its_state in zip(getattr(noise, "noises", []), state["several"], strict=True):
            _put_noise(one, its_state)


def _buffer_contents(buffer: Any) -> dict[str, Any]:
    """What is filled of the real and of the imagined transitions."""
    rows, refills = buffer.model_buffer.contents()
    filled = {name: getattr(buffer, name)[: buffer.size()] for name in ROWS}
    return {"rows": filled, "pos": buffer.pos, "full": buffer.full, "imagined": rows, "refills": refills}


def _fill_buffer(buffer: Any, contents: dict[str, Any]) -> None:
    for name in ROWS:
        rows, filled = getattr(buffer, name), contents["rows"][name]
        if rows.shape[1:] != filled.shape[1:] or len(filled) > len(rows) or (contents["full"] and len(filled) < len(rows)):
            raise ValueError(
                f"the checkpoint's replay buffer has {name} of shape {filled.shape}, the agent's has room for {rows.shape}: "
                "make the agent with the same buffer_size and as many envs"
            )
        rows[: len(filled)] = filled
    check_finite(contents["rows"], contents["imagined"])
    buffer.pos, buffer.full = contents["pos"], contents["full"]
    buffer.model_buffer.restore(contents["imagined"], contents["refills"])
