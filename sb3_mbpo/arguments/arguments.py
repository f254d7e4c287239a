"""Reads the arguments of the constructors: strings from YAML become numbers and objects, and all values are checked."""

import inspect
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.noise import VectorizedActionNoise

from sb3_mbpo.arguments.user_functions import check_device, check_noise, check_schedule
from sb3_mbpo.validation.argument_table import ARGUMENTS, POLICY_ARGUMENTS
from sb3_mbpo.validation.rules import MAPPING, did_you_mean, numbers_in, read_all, shown
from sb3_mbpo.validation.unsupported import check_env, check_spaces

# SB3 stores this argument under another name.
KEPT_AS = {"stats_window_size": "_stats_window_size"}
# SB3's constructor uses these immediately.
_FIRST = ("verbose", "use_sde", "policy_kwargs", "replay_buffer_kwargs")


def check_keywords(kwargs: Mapping[str, Any], function: Any, name: str) -> dict[str, Any]:
    """
    Check the keyword arguments of ``function`` and convert numbers from strings.

    :param kwargs: keyword arguments that the user passed
    :param function: the ``dynamics_class``, or a function that creates a dynamics
    :param name: name of the argument with ``kwargs``, for the error
    :return: converted keyword arguments
    :raises ValueError: ``function`` does not take a key, or a value is text where its default is a number
    """
    MAPPING.check(name, kwargs)
    parameters = inspect.signature(function).parameters
    known = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in ("seed", "device")]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in kwargs:
        if not isinstance(key, str) or (key not in known and not takes_any):
            made_of = function.__name__ if isinstance(function, type) else shown(function)
            raise ValueError(
                f"{name} has no key {key!r}; dynamics_class={made_of} takes {', '.join(known) or 'none'}"
                f"{did_you_mean(key, known)}"
            )
    # Strings stay strings if the default is not a number. Numbers in lists may be strings.
    read = {key: value if isinstance(value, str) else numbers_in(value) for key, value in kwargs.items()}
    return read_all(read, {}, f"{name}: ", {key: parameters[key].default for key in kwargs if key in parameters})


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


def read_first(policy: Any, env: Any, passed: dict[str, Any], takes_dict: bool) -> str | None:
    """
    Read and check, in place, the arguments that SB3's constructor uses immediately.

    :param policy: the first argument of the constructor
    :param env: the second argument of the constructor; only ``load`` passes ``None``
    :param passed: all arguments by name
    :param takes_dict: whether the algorithm has a policy for Dict observations
    :return: a warning, or ``None``
    :raises ValueError: an argument is invalid
    """
    if env is None and passed.get("_init_setup_model", True):
        raise ValueError("env=None must be an env, or the name of one; only load does not need one")
    if not (isinstance(policy, str) or callable(policy)):
        raise ValueError(f"policy={shown(policy)} must be a policy class, or the name of one, such as 'MlpPolicy'")
    # SB3 modifies the dictionaries. Reading them makes copies.
    passed.update(read_all({name: passed[name] for name in _FIRST if name in passed}, ARGUMENTS))
    warning = check_device(passed.get("device", "auto"))
    if env is not None:
        if not isinstance(env, str):
            check_env(env)
        # Check the spaces before SB3, whose assertions do not say what to do instead.
        passed["env"] = env = maybe_make_env(env, passed.get("verbose", 0))
        check_spaces(env.observation_space, env.action_space, takes_dict)
    return warning


def read_arguments(agent: Any) -> None:
    """
    Read and check, in place, the arguments that an agent stores as attributes.

    :param agent: a ModelBased algorithm, new or being loaded, before its parts are built
    :raises ValueError: an argument cannot be read or is out of range
    """
    parameters = inspect.signature(type(agent)).parameters
    # Arguments that are passed on in ``**kwargs`` are not in the signature, but are checked, too.
    attributes = {name: KEPT_AS.get(name, name) for name in [*parameters, *ARGUMENTS] if name != "policy"}
    values = {name: getattr(agent, attribute) for name, attribute in attributes.items() if hasattr(agent, attribute)}
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    for name, value in read_all(values, ARGUMENTS, defaults=defaults).items():
        setattr(agent, attributes[name], value)
    agent.policy_kwargs = read_all(agent.policy_kwargs or {}, POLICY_ARGUMENTS, "policy_kwargs: ")
    if callable(agent.learning_rate):
        check_schedule(agent.learning_rate)
    if agent.action_noise is not None:
        # An agent may be loaded with another number of envs.
        if isinstance(agent.action_noise, VectorizedActionNoise) and agent.action_noise.n_envs != agent.n_envs:
            agent.action_noise = VectorizedActionNoise(agent.action_noise.base_noise, agent.n_envs)
        check_noise(agent.action_noise, agent.n_envs, agent.action_space.shape)
