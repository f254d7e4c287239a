"""What an agent is beside its tensors, as JSON can say it; and an agent made from that, without trusting who wrote it."""

import inspect
from typing import Any

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, check_for_correct_spaces
from stable_baselines3.common.utils import LinearSchedule as LearningRateSchedule

from sb3_mbpo.arguments.arguments import resolve
from sb3_mbpo.rollouts import LONGEST_AUTO, LinearRolloutSchedule
from sb3_mbpo.runtime.provenance import versions
from sb3_mbpo.saving.plain_values import decode, decode_box, decode_space, encode, encode_box, encode_space, is_a
from sb3_mbpo.terminations.known import KNOWN_TERMINATIONS
from sb3_mbpo.trust.filters import FILTERS
from sb3_mbpo.validation.rules import shown
from sb3_mbpo.validation.unsupported import check_spaces

FORMAT = 1
#: Our algorithms by their names; a file may name no other. ``register`` fills it.
AGENTS: dict[str, type] = {}
#: What counts the agent's life, and is restored.
COUNTERS = (
    *("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_earlier_timesteps", "dynamics_fitted_at"),
    *(
        "_episode_num",
        "_n_updates",
        "_current_progress_remaining",
        "auto_rollout_length",
        "imagined_fraction",
        "filter_state",
    ),
    *("forward_errors", "prediction_bounds", "unused_fits", "forgot_transitions", "normalized_observations"),
)

_KEYS = {"format", "versions", "class", "policy", "arguments", "observation_space", "action_space", "n_envs", "termination"}
_KEYS |= {"counters"}
# Given by the caller, or by the description under a key of its own.
_NO_ARGUMENTS = {"policy", "env", "device", "_init_setup_model"}
# Text that these arguments may be in a file; any other would be a function's name, to be imported.
_WORDS: dict[str, tuple[str, ...]] = {
    "termination_fn": ("learned", "never"),
    "reward_fn": ("joint",),
    "rollout_schedule": ("auto",),
    "rollout_filter": tuple(FILTERS),
}
_NOTHING = type(None)
# What a description may say of an argument; of the others, what their default is. Text that `resolve` would import is none.
_TYPES: dict[str, tuple[type, ...]] = {
    "prediction_clip_margin": (int, float, type(None)),
    "min_explained_variance": (int, float, type(None)),
    "learning_rate": (int, float, ConstantSchedule, LearningRateSchedule, FloatSchedule),
    "train_freq": (int, tuple),
    "action_noise": (_NOTHING, ActionNoise),
    "replay_buffer_class": (_NOTHING,),
    "replay_buffer_kwargs": (_NOTHING, dict),
    "policy_kwargs": (_NOTHING, dict),
    "dynamics_kwargs": (_NOTHING, dict),
    "tensorboard_log": (_NOTHING, str),
    "seed": (_NOTHING, int),
    "ent_coef": (int, float, str),
    "target_entropy": (int, float, str),
    "real_ratio": (int, float),
    "rollout_schedule": (int, dict, LinearRolloutSchedule, str),
    "model_buffer_size": (_NOTHING, int),
    "dynamics_window": (_NOTHING, int),
    "termination_fn": (_NOTHING, str, *KNOWN_TERMINATIONS),
    "reward_fn": (_NOTHING, str),
    "rollout_filter": (_NOTHING, str, *FILTERS.values()),
    "dynamics_class": (type,),
    "fast_update": (_NOTHING, bool),
}


def register(cls: type) -> None:
    """:param cls: an algorithm; one of this package's own can be named in a file from now on"""
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        AGENTS[cls.__name__] = cls


def describe(agent: Any) -> dict[str, Any]:
    """
    All that makes an equal agent, apart from its tensors, its env and its replay buffer.

    :param agent: a ModelBased algorithm
    :return: for strict JSON. What JSON cannot say, such as functions, is marked, and :func:`build` asks for it
    """
    aliases = [name for name, policy in agent.policy_aliases.items() if policy is agent.policy_class]
    return {
        "format": FORMAT,
        "versions": versions(),
        "class": type(agent).__name__,
        "policy": aliases[0] if aliases else encode(agent.policy_class),
        "arguments": {name: _argument(agent, name) for name in _argument_names(type(agent))},
        "observation_space": encode_space(agent.observation_space),
        "action_space": encode_box(agent.action_space),
        "n_envs": int(agent.n_envs),
        "termination": encode(agent.termination),
        "counters": {name: encode(getattr(agent, name)) for name in COUNTERS},
    }


def _argument_names(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in _NO_ARGUMENTS]


def _argument(agent: Any, name: str) -> Any:
    """What the constructor would have to be told now, encoded."""
    # One is kept under another name by SB3; and what is not kept at all cannot be described.
    value = getattr(agent, {"stats_window_size": "_stats_window_size"}.get(name, name), object())
    if name == "replay_buffer_class":
        return None
    if isinstance(value, TrainFreq):
        value = (value.frequency, value.unit.value)
    if isinstance(value, str) and name == "dynamics_class":
        value = resolve(value, name)
    if isinstance(value, str) and value not in _WORDS.get(name, (value,)):
        # A dotted name: to import it is the caller's decision.
        return {":yours:": value}
    return encode(value)


def build(
    description: dict[str, Any],
    env: Any = None,
    *,
    cls: type | None = None,
    device: th.device | str = "auto",
    **overrides: Any,
) -> Any:
    """
    The agent that was described, its networks freshly drawn. Nothing is imported or called by a name in the description.

    Not taken from it: ``tensorboard_log``, a place for files that its author would choose.

    :param description: from :func:`describe`, by way of JSON; it may be anyone's
    :param env: of the same spaces, or the name of one; ``None``: an agent that can predict, and gets its env by ``set_env``
    :param cls: the algorithm; ``None``: the one of this package that the description names
    :param device: see SB3
    :param overrides: arguments of the constructor that differ, or that a description cannot hold; ``policy`` among them
    :raises ValueError: not such a description, an argument that has to be passed, or another env's spaces
    """
    _check_description(description)
    kind = _class(description["class"], cls)
    observation_space = decode_space(description["observation_space"], "observation_space")
    action_space = decode_box(description["action_space"], "action_space")
    check_spaces(observation_space, action_space)
    policy = overrides.pop("policy", None) or _policy(description["policy"], kind)
    arguments = _arguments(description["arguments"], kind, overrides)
    counters = {name: _counter(description["counters"], name) for name in COUNTERS}
    termination = _termination(description["termination"])
    if env is not None:
        env = kind._wrap_env(maybe_make_env(env, arguments["verbose"]), int(arguments["verbose"]))
        check_for_correct_spaces(env, observation_space, action_space)
    try:
        agent = kind(policy, env, device=device, _init_setup_model=False, **arguments)
        agent.observation_space, agent.action_space = observation_space, action_space
        agent.n_envs = description["n_envs"] if env is None else env.num_envs
        _fit_noise(agent)
        agent.termination = termination
        agent._setup_model()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the described agent cannot be built: {type(error).__name__}: {error}") from error
    vars(agent).update(counters)
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
    for name in ("arguments", "counters", "versions"):
        if not isinstance(description[name], dict):
            raise ValueError(f"{name} of the description must be a JSON object")
    if set(description["counters"]) != set(COUNTERS):
        raise ValueError(f"counters of the description must be {', '.join(COUNTERS)}")
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
            "before one of them can be named)"
        )
    return AGENTS[name]


def _policy(value: Any, cls: Any) -> str:
    if isinstance(value, dict):
        decode(value, "policy")
    if not isinstance(value, str) or value not in cls.policy_aliases:
        raise ValueError(f"policy={shown(value)} must be one of {', '.join(cls.policy_aliases)}")
    return value


def _arguments(encoded: dict[str, Any], cls: type, overrides: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    known = _argument_names(cls)
    for name in [*encoded, *overrides]:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no argument {shown(name)}; was it saved by a later version?")
    # An argument that came after the description was written has its default.
    arguments = {name: overrides.get(name, parameters[name].default) for name in known}
    for name in encoded:
        value = encoded[name]
        if name not in overrides and name != "tensorboard_log":
            arguments[name] = decode(value, name)
            _check_argument(name, arguments[name], parameters[name].default)
    return arguments


def _check_argument(name: str, value: Any, default: Any) -> None:
    kinds = _TYPES.get(name)
    if kinds is None and default is not None:
        number = isinstance(default, int | float) and not isinstance(default, bool)
        kinds = (int, float) if number else (type(default),)
    if kinds is not None and not is_a(value, kinds):
        raise ValueError(f"{name}={shown(value)} is of a type that it cannot have in a file")
    if isinstance(value, str) and value not in _WORDS.get(name, (value,)):
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
    """What was found for the first env; what a function of the caller's stands for is found anew."""
    if isinstance(encoded, dict) and ":yours:" in encoded:
        return None
    termination = decode(encoded, "termination")
    if termination != "learned" and not isinstance(termination, KNOWN_TERMINATIONS):
        raise ValueError(f"termination={shown(termination)} is none that a file may hold")
    return termination


def _counter(encoded: dict[str, Any], name: str) -> Any:
    value = decode(encoded[name], name)
    if name == "_current_progress_remaining":
        fine = is_a(value, (int, float))
    elif name == "imagined_fraction":
        fine = is_a(value, (int, float)) and 0 <= value <= 1
    elif name in ("forgot_transitions", "normalized_observations"):
        fine = isinstance(value, bool)
    elif name == "auto_rollout_length":
        fine = is_a(value, (int,)) and 1 <= value <= LONGEST_AUTO
    elif name in ("filter_state", "forward_errors", "prediction_bounds"):
        fine = isinstance(value, list) and all(is_a(item, (int, float)) and abs(item) < float("inf") for item in value)
    else:
        fine = (is_a(value, (int,)) and value >= 0) or (value is None and name == "dynamics_fitted_at")
    if not fine:
        raise ValueError(f"counters: {name}={shown(value)} is no count")
    return value


def _fit_noise(agent: Any) -> None:
    """Noise made for another number of envs goes back to one stream; SB3 multiplies it again when learning begins."""
    noise = agent.action_noise
    if isinstance(noise, VectorizedActionNoise) and noise.n_envs != agent.n_envs:
        agent.action_noise = noise.base_noise
