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

from sb3_mbpo.arguments.arguments import resolve
from sb3_mbpo.runtime.provenance import versions
from sb3_mbpo.saving import foreign_classes  # noqa: F401  registers the classes of PyTorch and SB3
from sb3_mbpo.saving.agent_state import decode_state, encode_state
from sb3_mbpo.saving.serialization import decode, encode, is_a
from sb3_mbpo.validation.registry import AGENTS, OF_ARGUMENT, WORDS
from sb3_mbpo.validation.rules import shown
from sb3_mbpo.validation.unsupported import check_spaces

FORMAT = 2
_KEYS = {"format", "versions", "class", "policy", "arguments", "observation_space", "action_space", "n_envs", "termination"}
_KEYS |= {"state"}
# Passed by the caller, or described under a key of its own.
_NO_ARGUMENTS = {"policy", "env", "device", "_init_setup_model"}
_NUMBER: tuple[type, ...] = (int, float)
_NOTHING: tuple[type, ...] = (type(None),)
# Types that an argument may have in a file, beside those in the register; of the others, the type of the default.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prediction_clip_margin", "min_explained_variance"), (*_NUMBER, *_NOTHING)),
    **dict.fromkeys(("ent_coef", "target_entropy"), (*_NUMBER, str)),
    **dict.fromkeys(("replay_buffer_kwargs", "policy_kwargs", "dynamics_kwargs"), (*_NOTHING, dict)),
    **dict.fromkeys(("seed", "model_buffer_size", "dynamics_window"), (*_NOTHING, int)),
    **dict.fromkeys(("termination_fn", "reward_fn", "rollout_filter", "tensorboard_log"), (*_NOTHING, str)),
    "learning_rate": (*_NUMBER, ConstantSchedule, LinearSchedule, FloatSchedule),
    "train_freq": (int, tuple),
    "action_noise": (*_NOTHING, ActionNoise),
    "replay_buffer_class": _NOTHING,
    "real_ratio": _NUMBER,
    **dict.fromkeys(("updates_per_transition", "warmup_actions"), (*_NUMBER, *_NOTHING)),
    "rollout_schedule": (int, dict, str),
    "dynamics_class": (type,),
    "fast_update": (*_NOTHING, bool),
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
    if isinstance(value, str) and name == "dynamics_class":
        value = resolve(value, name)
    if isinstance(value, str) and value not in WORDS.get(name, (value,)):
        # A dotted name. Only the caller may decide to import it.
        return {"$yours": value}
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
    state = decode_state(description["state"])
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


def _class(name: Any, cls: type | None) -> Any:
    if cls is not None:
        if name != cls.__name__:
            raise ValueError(f"it holds an agent of class {shown(name)}, not {cls.__name__}; use that class's own load")
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
            arguments[name] = decode(encoded[name], where=name, objects=True)
            _check_argument(name, arguments[name], parameters[name].default)
    return arguments


def _check_argument(name: str, value: Any, default: Any) -> None:
    kinds = _TYPES.get(name, ())
    if not kinds and default is not None:
        kinds = _NUMBER if is_a(default, _NUMBER) else (type(default),)
    if kinds and not is_a(value, (*kinds, *OF_ARGUMENT.get(name, ()))):
        raise ValueError(f"{name}={shown(value)} is of a type that it cannot have in a file")
    if isinstance(value, str) and value not in WORDS.get(name, (value,)):
        raise ValueError(f"{name}={shown(value)} is no name that a file may hold")
    if name == "policy_kwargs":
        for key, item in (value or {}).items():
            if key in ("activation_fn", "optimizer_class", "features_extractor_class") and not isinstance(item, type):
                raise ValueError(f"policy_kwargs: {key}={shown(item)} is no class that a file may name")
    if name == "replay_buffer_kwargs":
        for key, item in (value or {}).items():
            if key != "handle_timeout_termination" or not isinstance(item, bool):
                raise ValueError(f"replay_buffer_kwargs: {shown(key)} is nothing that a file may hold")


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
