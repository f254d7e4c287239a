"""Describe an agent without its tensors as JSON, and build an agent from a description that is not trusted."""

import inspect
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule, check_for_correct_spaces

from sb3_mbpo.codec import Codec
from sb3_mbpo.runtime.provenance import versions
from sb3_mbpo.saving import foreign_classes  # noqa: F401  registers the classes of PyTorch and SB3
from sb3_mbpo.saving.agent_state import decode_state, encode_state
from sb3_mbpo.saving.serialization import decode, encode, is_a
from sb3_mbpo.validation.argument_table import ARGUMENTS
from sb3_mbpo.validation.class_registry import AGENTS, OF_ARGUMENT
from sb3_mbpo.validation.rules import is_number, numbers_in, shown
from sb3_mbpo.validation.unsupported import check_spaces

FORMAT = 2
_KEYS = {"format", "versions", "class", "policy", "arguments", "observation_space", "action_space", "n_envs", "termination"}
_KEYS |= {"state"}
# Passed by the caller, or described under a key of its own.
_NO_ARGUMENTS = {"policy", "env", "device", "_init_setup_model"}
# Classes of SB3 whose objects an argument may be in a file, and classes of ours by their names; more are in the register.
_OBJECTS: dict[str, tuple[type, ...]] = {
    "learning_rate": (ConstantSchedule, LinearSchedule, FloatSchedule),
    "action_noise": (ActionNoise,),
    "dynamics_class": (type,),
}
_PLAIN = (type(None), bool, int, float, str, tuple, list, dict)
# Larger numbers in a file would make an agent that never ends an update, or fills the memory with a batch.
_MOST_IN_FILE = {
    **dict.fromkeys(("gradient_steps", "batch_size", "dynamics_kwargs: batch_size", "dynamics_kwargs: max_updates"), 10**6),
    **{"updates_per_transition": 10**4, "rollout_batch_size": 10**7},
}


def describe(agent: Any) -> dict[str, Any]:
    """
    Describe everything from which an equal agent can be made, except its tensors, its env and its replay buffer.

    :param agent: a ModelBased algorithm
    :return: strict JSON. Functions and other values that JSON cannot hold are marked, and :func:`build` asks for them
    """
    aliases = [name for name, policy in agent.policy_aliases.items() if policy is agent.policy_class]
    return {
        "format": FORMAT,
        "versions": versions(),
        "class": type(agent).__name__,
        "policy": aliases[0] if aliases else encode(agent.policy_class, objects=True),
        "arguments": {name: _argument(agent, name) for name in _argument_names(type(agent))},
        "observation_space": _encode_space(agent.observation_space),
        "action_space": _encode_space(agent.action_space),
        "n_envs": int(agent.n_envs),
        "termination": encode(agent.termination, objects=True),
        "state": encode_state(agent),
    }


def _encode_space(space: spaces.Space) -> Any:
    """:return: a Box, or names and Boxes of a Dict in their order"""
    if isinstance(space, spaces.Dict):
        return [[name, _encode_space(part)] for name, part in space.items()]
    assert isinstance(space, spaces.Box)
    # Not as a subclass, which a file cannot name.
    return encode(spaces.Box(space.low, space.high, dtype=space.dtype.type), objects=True)  # type: ignore[arg-type]


def _decode_space(encoded: Any, where: str) -> spaces.Space:
    """
    :param encoded: the result of :func:`_encode_space`, read from JSON; anyone may have written it
    :param where: name of the space, for the errors
    :raises ValueError: it is no Box, and no Dict of Boxes
    """
    if isinstance(encoded, list):
        if not all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in encoded):
            raise ValueError(f"{where} must be a list of names and spaces")
        names = [name for name, _ in encoded]
        if len(set(names)) < len(names):
            raise ValueError(f"{where} must not have two entries of one name")
        return spaces.Dict([(name, _decode_box(part, f"{where}: {name[:50]}")) for name, part in encoded])
    return _decode_box(encoded, where)


def _decode_box(encoded: Any, where: str) -> spaces.Box:
    box = decode(encoded, where=where, objects=True)
    if not isinstance(box, spaces.Box):
        raise ValueError(f"{where}={shown(box)} must be a Box")
    return box


def _argument_names(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in _NO_ARGUMENTS]


def _argument(agent: Any, name: str) -> Any:
    """:return: the value that the constructor would need now, encoded"""
    # SB3 keeps one argument under another name. An argument that is not kept at all cannot be described.
    value = getattr(agent, {"stats_window_size": "_stats_window_size"}.get(name, name), object())
    if name == "replay_buffer_class":
        return None
    if isinstance(value, TrainFreq):
        value = (value.frequency, value.unit.value)
    return encode(value.item() if isinstance(value, np.generic) else value, objects=True)


def build(
    description: dict[str, Any],
    env: Any = None,
    *,
    cls: type | None = None,
    device: th.device | str = "auto",
    **overrides: Any,
) -> Any:
    """
    Make the described agent, with newly initialized networks. No name in the description is imported or called.

    ``tensorboard_log`` is not taken from the description: its author would choose where files are written.

    :param description: the result of :func:`describe`, read from JSON; anyone may have written it
    :param env: an env with the same spaces, or its name; ``None``: the agent can predict, and gets an env by ``set_env``
    :param cls: the algorithm; ``None``: the one of this package that the description names
    :param device: see SB3
    :param overrides: arguments of the constructor that differ, or that a description cannot hold, including ``policy``
    :return: the agent
    :raises ValueError: the description is invalid, an argument has to be passed, or the env has other spaces
    """
    _check_description(description)
    kind = _class(description["class"], cls)
    spaces_of = {name: _decode_space(description[name], name) for name in ("observation_space", "action_space")}
    check_spaces(spaces_of["observation_space"], spaces_of["action_space"])
    policy = overrides.pop("policy", None) or _policy(description["policy"], kind)
    arguments = _arguments(description["arguments"], kind, overrides)
    state = decode_state(description["state"], Codec(**spaces_of).obs_dim)
    termination = _termination(description["termination"])
    if env is not None:
        env = kind._wrap_env(maybe_make_env(env, arguments["verbose"]), int(arguments["verbose"]))
        check_for_correct_spaces(env, spaces_of["observation_space"], spaces_of["action_space"])
    try:
        agent = kind(policy, env, device=device, _init_setup_model=False, **arguments)
        vars(agent).update(**spaces_of, **state, termination=termination)
        agent.n_envs = description["n_envs"] if env is None else env.num_envs
        _fit_noise(agent)
        agent._setup_model()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the described agent cannot be built: {type(error).__name__}: {error}") from error
    return agent


def _check_description(description: Any) -> None:
    if not isinstance(description, dict):
        raise ValueError("the description of the agent must be a JSON object")
    if description.get("format") != FORMAT or isinstance(description.get("format"), bool):
        raise ValueError(f"format={shown(description.get('format'))} of the description is unknown; it must be {FORMAT}")
    if set(description) != _KEYS:
        raise ValueError(
            f"the description of the agent has unknown keys {sorted(set(description) - _KEYS)[:5]} "
            f"or lacks {sorted(_KEYS - set(description))}"
        )
    for name in ("arguments", "state", "versions"):
        if not isinstance(description[name], dict):
            raise ValueError(f"{name} of the description must be a JSON object")
    n_envs = description["n_envs"]
    if not is_a(n_envs, (int,)) or not 1 <= n_envs <= 2**20:
        raise ValueError(f"n_envs={shown(n_envs)} must be a whole number of at least 1")


def other_class(name: Any, cls: type) -> ValueError:
    """:return: the error that a file holds an agent of class ``name`` instead of ``cls``"""
    return ValueError(f"it holds an agent of class {shown(name)}, not {cls.__name__}; use that class's own load")


def _class(name: Any, cls: type | None) -> Any:
    if cls is not None:
        if name != cls.__name__:
            raise other_class(name, cls)
        return cls
    if not isinstance(name, str) or name not in AGENTS:
        raise ValueError(
            f"class {shown(name)} is not among {', '.join(AGENTS)} (this package's other algorithms have to be imported "
            "before a file can name them)"
        )
    return AGENTS[name]


def _policy(value: Any, cls: Any) -> str:
    if isinstance(value, dict):
        decode(value, where="policy", objects=True)
    if not isinstance(value, str) or value not in cls.policy_aliases:
        raise ValueError(f"policy={shown(value)} must be one of {', '.join(cls.policy_aliases)}")
    return value


def _arguments(encoded: dict[str, Any], cls: type, overrides: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    known = _argument_names(cls)
    for name in [*encoded, *overrides]:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no argument {shown(name)}; was it saved by a later version?")
    # An argument that is newer than the description has its default.
    arguments = {name: overrides.get(name, parameters[name].default) for name in known}
    for name in encoded:
        if name not in overrides and name != "tensorboard_log":
            arguments[name] = _read(name, decode(encoded[name], where=name, objects=True))
    return arguments


def _read(name: str, value: Any) -> Any:
    """
    :param name: name of an argument
    :param value: its value in the file. No text in it may be the name of a function, which would be imported
    :return: the value
    :raises ValueError: the value is invalid, or may not be in a file
    """
    rule = ARGUMENTS.get(name)
    if isinstance(value, str) and rule is not None and rule.words is not None and value not in rule.words:
        raise ValueError(f"{name}={shown(value)} is not a name that a file may hold")
    if not is_a(value, (*_PLAIN, *_OBJECTS.get(name, ()), *OF_ARGUMENT.get(name, ()))):
        raise ValueError(f"{name}={shown(value)} is of a type that it cannot have in a file")
    if name == "policy_kwargs" and isinstance(value, dict):
        for key, item in value.items():
            if key in ("activation_fn", "optimizer_class", "features_extractor_class") and not isinstance(item, type):
                raise ValueError(f"policy_kwargs: {key}={shown(item)} is not a class that a file may name")
    value = value if rule is None else rule.read(name, value)
    # Those of dynamics_kwargs may still be text.
    numbers = {f"{name}: {key}": numbers_in(item) for key, item in value.items()} if isinstance(value, dict) else {name: value}
    for key, most in _MOST_IN_FILE.items():
        if is_number(numbers.get(key), most + 1):
            raise ValueError(f"{key}={numbers[key]} is more than a file may ask for, {most:,}; pass your own: {name}=...")
    return value


def _termination(encoded: Any) -> Any:
    """:return: the termination found for the first env; ``None``: it was a function of the caller's, and is found anew"""
    if isinstance(encoded, dict) and "$yours" in encoded:
        return None
    termination = decode(encoded, where="termination", objects=True)
    if termination != "learned" and not isinstance(termination, tuple(OF_ARGUMENT["termination_fn"])):
        raise ValueError(f"termination={shown(termination)} is none that a file may hold")
    return termination


def _fit_noise(agent: Any) -> None:
    """Reduce noise made for another number of envs to one stream. SB3 multiplies it again when learning begins."""
    noise = agent.action_noise
    if isinstance(noise, VectorizedActionNoise) and noise.n_envs != agent.n_envs:
        agent.action_noise = noise.base_noise
