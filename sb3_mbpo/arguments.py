"""What users may pass: strings from YAML become numbers and objects; refusals name argument, value and remedy."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space


def resolve(value: Any, name: str) -> Any:
    """
    The object behind a dotted name; anything but a string comes back as it is.

    :param value: ``"package.module.attribute"``, or an object
    :param name: the argument, for the error
    :raises ValueError: the name leads nowhere
    """
    if not isinstance(value, str):
        return value
    module, _, attribute = value.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be an object or its dotted name, package.module.name ({error})") from error


def numeric_defaults(*functions: Any) -> dict[str, int | float]:
    """The parameters of some functions whose default is a number, with that default."""
    parameters = (item for function in functions for item in inspect.signature(function).parameters.items())
    return {
        name: parameter.default
        for name, parameter in parameters
        if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
    }


def as_number(value: Any, name: str, default: int | float) -> Any:
    """
    A number that arrived as a string (YAML reads ``1e-3`` as one), or as a float where a count is meant (``1e6``).

    :param value: anything; what is neither a string nor a float comes back as it is
    :param name: the argument, for the error
    :param default: its default, whose type says what is meant
    :raises ValueError: a string that is no number, or a count with a fraction
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name}={value!r} must be a number") from None
    if isinstance(default, int) and isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{name}={value!r} must be a whole number")
        return int(value)
    return value


def numbers_in(value: Any) -> Any:
    """
    The same, with every string that is a number turned into one, also inside lists, tuples and mappings.

    :param value: anything that YAML can say
    """
    if isinstance(value, Mapping):
        return {key: numbers_in(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(numbers_in(item) for item in value)
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and isinstance(value, str) and number.is_integer() else number


def check_keywords(kwargs: Mapping[str, Any], function: Any, name: str) -> dict[str, Any]:
    """
    Keyword arguments for ``function``, with numbers read from strings.

    :param kwargs: what the user passed
    :param function: a class or function
    :param name: the argument that holds ``kwargs``, for the error
    :raises ValueError: a key that ``function`` does not take
    """
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{name}={kwargs!r} must be a mapping of keyword arguments")
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in ("seed", "device")]
        for key in kwargs:
            if key not in known:
                raise ValueError(
                    f"{name} has no key {key!r}; {getattr(function, '__name__', function)} takes {', '.join(known)}"
                )
    defaults = numeric_defaults(function)
    for key, value in kwargs.items():
        if key in parameters and isinstance(parameters[key].default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name}: {key}={value!r} must be true or false")
    read = {key: as_number(value, f"{name}: {key}", defaults[key]) for key, value in kwargs.items() if key in defaults}
    # Text stays text; numbers in lists, and where the default says nothing, may have come as text.
    return {key: read.get(key, value if isinstance(value, str) else numbers_in(value)) for key, value in kwargs.items()}


def joined_signature(cls: type, mixin: type, **defaults: Any) -> inspect.Signature:
    """
    The constructor of a class that mixes keyword arguments into another one's.

    :param cls: a subclass of ``mixin`` and, after it, of the class whose arguments it takes
    :param mixin: passes on ``*args`` and ``**kwargs``
    :param defaults: arguments whose default differs
    :return: that other class's parameters, then the keyword-only ones of ``mixin`` and of what derives from it
    """
    mro: list[Any] = list(cls.__mro__)
    position = mro.index(mixin)
    base = next(kind for kind in mro[position + 1 :] if "__init__" in vars(kind))
    theirs = list(inspect.signature(base.__init__).parameters.values())[1:]
    plain = [p.replace(default=defaults.get(p.name, p.default)) for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    mixed = [p for kind in reversed(mro[: position + 1]) for p in inspect.signature(kind.__init__).parameters.values()]
    return inspect.Signature([*plain, *{p.name: p for p in mixed if p.kind is p.KEYWORD_ONLY}.values()])


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :raises ValueError: spaces that MBPO cannot imagine in
    """
    if not isinstance(observation_space, spaces.Box) or is_image_space(observation_space):
        raise ValueError(
            f"env: the observation space {observation_space} is not supported; MBPO's dynamics needs a Box that is "
            "no image. Flatten a Dict with gymnasium.wrappers.FlattenObservation, or use SAC or another model-free algorithm"
        )
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"env: the action space {action_space} is not supported; MBPO needs a Box of continuous actions. "
            "For discrete actions use DQN or PPO"
        )
    if not np.all(np.isfinite(action_space.low) & np.isfinite(action_space.high)):
        raise ValueError(
            f"env: the action space {action_space} is unbounded; MBPO scales actions to [-1, 1]. "
            "Give it bounds with gymnasium.wrappers.RescaleAction or a Box with finite low and high"
        )
    if not np.all(action_space.low < action_space.high):
        raise ValueError(
            f"env: the action space {action_space} has dimensions with low = high, which no action in [-1, 1] stands for. "
            "Leave them out with gymnasium.wrappers.TransformAction"
        )


def check_counts(**counts: Any) -> None:
    """
    :raises ValueError: a count that is no positive whole number
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_ratio(name: str, value: Any) -> None:
    """
    :raises ValueError: no number in [0, 1]
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a number between 0 (all imagined) and 1 (plain model-free learning)")


def check_replay(replay_buffer_class: Any, allowed: tuple[type, ...], n_steps: int, optimize_memory_usage: bool) -> None:
    """
    :raises ValueError: a replay option that imagined transitions do not go with
    """
    if replay_buffer_class not in (None, *allowed):
        raise ValueError(
            f"replay_buffer_class={replay_buffer_class!r} is not supported; MBPO mixes real and imagined transitions in a "
            "buffer of its own (no HER, no n-step, no custom classes). Leave it at None"
        )
    if n_steps != 1:
        raise ValueError(f"n_steps={n_steps!r} is not supported; imagined transitions are single steps. Leave it at 1")
    if optimize_memory_usage:
        raise ValueError(
            "optimize_memory_usage=True is not supported; that buffer loses the last observation of an episode, which the "
            "dynamics learns from. Leave it at False, or lower buffer_size"
        )


def updates_are_few(gradient_steps: int, n_envs: int) -> str:
    """
    :param gradient_steps: the default, which the user has left as it is
    :param n_envs: of the user's env, several
    :return: a warning
    """
    return (
        f"gradient_steps is left at its default of {gradient_steps}, which counts per train_freq and not per transition: "
        f"{n_envs} envs get 1/{n_envs} of the updates per transition that one gets. Pass "
        f"gradient_steps={gradient_steps * n_envs} for as many, or gradient_steps={gradient_steps} to keep it so"
    )


def read_arguments(agent: Any, replay_buffer_classes: tuple[type, ...]) -> None:
    """
    Turn the arguments that an agent keeps under their names into what they mean, in place, and check those of ModelBased.

    :param agent: a ModelBased algorithm, before its parts are built; also one that is being loaded
    :param replay_buffer_classes: what ``replay_buffer_class`` may be
    :raises ValueError: an argument that cannot be read or is out of range
    """
    # SB3 keeps this one under another name.
    kept_as = {"stats_window_size": "_stats_window_size"}
    for name, default in {**numeric_defaults(type(agent)), "seed": 0}.items():
        if name == "train_freq" and isinstance(agent.train_freq, str):
            continue  # SB3 refuses any text here, and says what it wants instead.
        attribute = kept_as.get(name, name)
        if name in ("learning_rate", "rollout_schedule"):
            setattr(agent, name, resolve(numbers_in(getattr(agent, name)), name))
        elif hasattr(agent, attribute):
            setattr(agent, attribute, as_number(getattr(agent, attribute), name, default))
    if isinstance(agent.rollout_schedule, Mapping):
        steps = agent.rollout_schedule.items()
        agent.rollout_schedule = {key: as_number(value, f"rollout_schedule: {key}", 1) for key, value in steps}
    if isinstance(agent.train_freq, list):
        agent.train_freq = tuple(numbers_in(agent.train_freq))
    agent.policy_kwargs = numbers_in(agent.policy_kwargs)
    for name in ("activation_fn", "optimizer_class", "features_extractor_class"):
        if name in agent.policy_kwargs:
            agent.policy_kwargs[name] = resolve(agent.policy_kwargs[name], f"policy_kwargs: {name}")
    agent.replay_buffer_class = resolve(agent.replay_buffer_class, "replay_buffer_class")
    check_replay(agent.replay_buffer_class, replay_buffer_classes, agent.n_steps, agent.optimize_memory_usage)
    check_ratio("real_ratio", agent.real_ratio)
    check_counts(**{name: getattr(agent, name) for name in ("model_train_freq", "rollout_batch_size", "retained_rollouts")})
    if agent.model_buffer_size is not None:
        agent.model_buffer_size = as_number(agent.model_buffer_size, "model_buffer_size", 1)
        check_counts(model_buffer_size=agent.model_buffer_size)
