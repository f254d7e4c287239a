"""Reads the arguments: strings from YAML become numbers and objects, and all values are checked."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.noise import VectorizedActionNoise

from sb3_mbpo.arguments.user_functions import check_device, check_learning_rate, check_noise
from sb3_mbpo.validation import rules
from sb3_mbpo.validation.rules import did_you_mean, shown
from sb3_mbpo.validation.unsupported import check_env, check_replay, check_spaces

# SB3 stores this argument under another name.
KEPT_AS = {"stats_window_size": "_stats_window_size"}


def resolve(value: Any, name: str) -> Any:
    """
    Import the object with a dotted name. Other values are returned unchanged.

    :param value: ``"package.module.attribute"``, or an object
    :param name: name of the argument, for the error
    :return: the object
    :raises ValueError: there is no object with this name
    """
    if not isinstance(value, str):
        return value
    module, _, attribute = value.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be an object or its dotted name, package.module.name ({error})") from error


def numeric_defaults(*functions: Any) -> dict[str, int | float]:
    """
    :param functions: any functions
    :return: defaults of all parameters whose default is a number, by name
    """
    parameters = (item for function in functions for item in inspect.signature(function).parameters.items())
    return {
        name: parameter.default
        for name, parameter in parameters
        if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
    }


def as_number(value: Any, name: str, default: int | float) -> Any:
    """
    Convert a number that is given as a string (YAML reads ``1e-3`` as one), or as a float instead of a count (``1e6``).

    :param value: any value; other types than strings, floats and NumPy scalars are returned unchanged
    :param name: name of the argument, for the error
    :param default: default of the argument; if it is an int, a whole number is expected
    :return: the number
    :raises ValueError: a string is not a number, or a count is not a whole number
    """
    value = value.item() if isinstance(value, np.generic) else value
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
    Convert strings and NumPy scalars that are numbers, also inside lists, tuples and mappings.

    :param value: any value from YAML
    :return: the value with numbers converted
    """
    if isinstance(value, Mapping):
        return {key: numbers_in(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(numbers_in(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and isinstance(value, str) and number.is_integer() else number


def _as_count(value: Any) -> Any:
    """:return: an int if ``value`` is a float without a fraction, otherwise ``value``"""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_keywords(kwargs: Mapping[str, Any], function: Any, name: str) -> dict[str, Any]:
    """
    Check the keyword arguments of ``function`` and convert numbers from strings.

    :param kwargs: keyword arguments that the user passed
    :param function: the ``dynamics_class``, or a function that creates a dynamics
    :param name: name of the argument with ``kwargs``, for the error
    :return: converted keyword arguments
    :raises ValueError: ``function`` does not take a key
    """
    rules.MAPPING.check(name, kwargs)
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in ("seed", "device")]
        for key in kwargs:
            if key not in known:
                made_of = function.__name__ if isinstance(function, type) else shown(function)
                raise ValueError(
                    f"{name} has no key {key!r}; dynamics_class={made_of} takes {', '.join(known) or 'none'}"
                    f"{did_you_mean(key, known)}"
                )
    defaults = numeric_defaults(function)
    for key, value in kwargs.items():
        if not isinstance(key, str):
            raise ValueError(f"{name} has no key {key!r}: keys must be strings")
        if key in parameters and isinstance(parameters[key].default, bool):
            rules.FLAG.check(f"{name}: {key}", value)
    read = {key: as_number(value, f"{name}: {key}", defaults[key]) for key, value in kwargs.items() if key in defaults}
    # Strings stay strings if the default is not a number. Numbers in lists may be strings.
    return {key: read.get(key, value if isinstance(value, str) else numbers_in(value)) for key, value in kwargs.items()}


def joined_signature(cls: type, mixin: type, **defaults: Any) -> inspect.Signature:
    """
    The full signature of the constructor of an algorithm with a mixin.

    :param cls: a subclass of ``mixin`` and, after it, of an SB3 algorithm
    :param mixin: a class whose constructor passes on ``*args`` and ``**kwargs``
    :param defaults: new defaults by argument name
    :return: the parameters of the SB3 algorithm, then the keyword-only ones of ``mixin`` and its subclasses
    """
    mro: list[Any] = list(cls.__mro__)
    position = mro.index(mixin)
    base = next(kind for kind in mro[position + 1 :] if "__init__" in vars(kind))
    theirs = list(inspect.signature(base.__init__).parameters.values())[1:]
    mixed = [p for kind in reversed(mro[: position + 1]) for p in inspect.signature(kind.__init__).parameters.values()]
    every = [*(p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD), *(p for p in mixed if p.kind is p.KEYWORD_ONLY)]
    return inspect.Signature([p.replace(default=defaults.get(p.name, p.default)) for p in {p.name: p for p in every}.values()])


def check_names(kwargs: Mapping[str, Any], signature: inspect.Signature, cls: type) -> None:
    """
    Check the names of keyword arguments.

    :param kwargs: keyword arguments
    :param signature: signature of the function that gets them
    :param cls: the algorithm, for the error
    :raises TypeError: a keyword is not an argument
    """
    takes = signature.parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for name in kwargs:
        if name not in takes:
            guess = did_you_mean(name, inspect.signature(cls).parameters)
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}{guess}")


def read_learn(total_timesteps: Any, *rest: Any) -> Any:
    """
    Read and check the arguments of ``learn``.

    :param total_timesteps: a whole number, or a float or string of one
    :param rest: the other arguments of ``learn``, in the same order
    :return: ``total_timesteps`` as an int
    :raises ValueError: an argument is out of range
    """
    total_timesteps = _as_count(numbers_in(total_timesteps))
    names = ("callback", "log_interval", "tb_log_name", "reset_num_timesteps", "progress_bar", "background")
    rules.check_learn(total_timesteps=total_timesteps, **dict(zip(names, rest, strict=True)))
    return total_timesteps


def read_first(policy: Any, env: Any, passed: dict[str, Any], default_steps: bool, takes_dict: bool) -> list[str]:
    """
    Read and check, in place, the arguments that SB3's constructor uses immediately.

    :param policy: the first argument of the constructor
    :param env: the second argument of the constructor; only ``load`` passes ``None``
    :param passed: all arguments by name
    :param default_steps: whether ``gradient_steps`` was left at its default
    :param takes_dict: whether the algorithm has a policy for Dict observations
    :return: warnings
    :raises ValueError: an argument is invalid
    """
    if env is None and passed.get("_init_setup_model", True):
        raise ValueError("env=None must be an env, or the name of one; only load does not need one")
    if env is not None and not isinstance(env, str):
        check_env(env)
    if not (isinstance(policy, str) or callable(policy)):
        raise ValueError(f"policy={shown(policy)} must be a policy class, or the name of one, such as 'MlpPolicy'")
    if "verbose" in passed:
        passed["verbose"] = _as_count(numbers_in(passed["verbose"]))
    for name in {"verbose", "use_sde"} & passed.keys():
        rules.RULES[name].check(name, passed[name])
    for name in ("policy_kwargs", "replay_buffer_kwargs"):
        rules.optional(rules.MAPPING).check(name, passed.get(name))
        if passed.get(name) is not None:
            # SB3 modifies these dictionaries, so pass copies.
            passed[name] = dict(passed[name])
    warning = check_device(passed.get("device", "auto"))
    found = [] if warning is None else [warning]
    if env is not None:
        # Check the spaces before SB3, whose assertions do not say what to do instead.
        passed["env"] = env = maybe_make_env(env, passed.get("verbose", 0))
        check_spaces(env.observation_space, env.action_space, takes_dict)
        n_envs = getattr(env, "num_envs", 1)
        # ``load`` reads gradient_steps from the file.
        if default_steps and "gradient_steps" in passed and passed.get("_init_setup_model", True):
            train_freq = _read("train_freq", passed.get("train_freq", 1), 1)
            # An invalid one raises later.
            is_valid = rules.RULES["train_freq"].holds(train_freq)
            few = rules.updates_are_few(passed["gradient_steps"], train_freq, n_envs) if is_valid else None
            found += [] if few is None else [few]
    return found


def read_arguments(agent: Any, replay_buffer_classes: tuple[type, ...]) -> None:
    """
    Read and check, in place, the arguments that an agent stores as attributes.

    :param agent: a ModelBased algorithm, new or being loaded, before its parts are built
    :param replay_buffer_classes: allowed values of ``replay_buffer_class``
    :raises ValueError: an argument cannot be read or is out of range
    """
    parameters = inspect.signature(type(agent)).parameters
    empty = inspect.Parameter.empty
    # Arguments that are passed on in ``**kwargs`` are not in the signature, but are checked, too.
    for name in dict.fromkeys([*parameters, *rules.RULES]):
        attribute = KEPT_AS.get(name, name)
        if name == "policy" or not hasattr(agent, attribute):
            continue
        default = parameters[name].default if name in parameters else empty
        setattr(agent, attribute, _read(name, getattr(agent, attribute), default))
        if name in rules.RULES:
            remedy = "" if default is empty or default is None else f". The default is {default!r}"
            rules.RULES[name].check(name, getattr(agent, attribute), remedy)
    check_replay(agent, replay_buffer_classes)
    for name in ("activation_fn", "optimizer_class", "features_extractor_class"):
        if name in agent.policy_kwargs:
            agent.policy_kwargs[name] = resolve(agent.policy_kwargs[name], f"policy_kwargs: {name}")
    rules.check_policy_kwargs(agent.policy_kwargs, _taken_by(agent.policy_class))
    check_learning_rate(agent.learning_rate)
    if agent.action_noise is not None:
        # An agent may be loaded with another number of envs.
        if isinstance(agent.action_noise, VectorizedActionNoise) and agent.action_noise.n_envs != agent.n_envs:
            agent.action_noise = VectorizedActionNoise(agent.action_noise.base_noise, agent.n_envs)
        check_noise(agent.action_noise, agent.n_envs, agent.action_space.shape)


def _read(name: str, value: Any, default: Any) -> Any:
    """:return: the converted value; unchanged if it is invalid and has a check, whose error message is more specific"""
    if name == "rollout_schedule" and isinstance(numbers_in(value), str) and "." not in value:
        # "auto", or an invalid word, for which `make_schedule` raises.
        return value
    if name in ("learning_rate", "rollout_schedule", "replay_buffer_class"):
        value = resolve(numbers_in(value), name)
    if name == "rollout_schedule":
        if isinstance(value, Mapping):
            return {key: as_number(item, f"rollout_schedule: {key}", 1) for key, item in value.items()}
        return _as_count(value)
    if name in ("policy_kwargs", "ent_coef", "target_entropy", "real_ratio", "warmup_actions"):
        return numbers_in(value)
    if name == "train_freq":
        # SB3 does not accept strings here, even if they are numbers. YAML has lists instead of tuples.
        value = tuple(numbers_in(value)) if isinstance(value, list) else value
        if type(value) is tuple:
            return tuple(item if isinstance(item, str) else _as_count(numbers_in(item)) for item in value)
        return value if isinstance(value, str) else _as_count(numbers_in(value))
    if isinstance(default, bool) or not (
        name in ("seed", "model_buffer_size", "dynamics_window", "updates_per_transition") or isinstance(default, int | float)
    ):
        return value
    if name not in rules.RULES:
        return as_number(value, name, default)
    value = numbers_in(value)
    return value if isinstance(default, float) else _as_count(value)


def _taken_by(policy_class: Any) -> list[str] | None:
    """:return: keyword arguments of a policy, without those that the agent itself passes; ``None``: any"""
    try:
        parameters = list(inspect.signature(policy_class).parameters.values())
    except (TypeError, ValueError):  # for a class written in C
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters[3:]]
