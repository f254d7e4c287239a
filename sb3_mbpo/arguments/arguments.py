"""What users may pass: strings from YAML become numbers and objects, and everything is put to the rules."""

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

# SB3 keeps this one under another name.
KEPT_AS = {"stats_window_size": "_stats_window_size"}


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

    :param value: anything; what is neither a string, a float nor a scalar of NumPy comes back as it is
    :param name: the argument, for the error
    :param default: its default, whose type says what is meant
    :raises ValueError: a string that is no number, or a count with a fraction
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
    The same, with every string or scalar of NumPy that is a number turned into one, also inside lists, tuples and mappings.

    :param value: anything that YAML can say
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
    """A whole number for a float that is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_keywords(kwargs: Mapping[str, Any], function: Any, name: str) -> dict[str, Any]:
    """
    Keyword arguments for ``function``, with numbers read from strings.

    :param kwargs: what the user passed
    :param function: what ``dynamics_class`` stands for
    :param name: the argument that holds ``kwargs``, for the error
    :raises ValueError: a key that ``function`` does not take
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
            raise ValueError(f"{name} has no key {key!r}: keys are names")
        if key in parameters and isinstance(parameters[key].default, bool):
            rules.FLAG.check(f"{name}: {key}", value)
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
    mixed = [p for kind in reversed(mro[: position + 1]) for p in inspect.signature(kind.__init__).parameters.values()]
    every = [*(p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD), *(p for p in mixed if p.kind is p.KEYWORD_ONLY)]
    return inspect.Signature([p.replace(default=defaults.get(p.name, p.default)) for p in {p.name: p for p in every}.values()])


def check_names(kwargs: Mapping[str, Any], signature: inspect.Signature, cls: type) -> None:
    """
    :param kwargs: what is to be passed on
    :param signature: of what it is passed on to
    :param cls: what the user is making
    :raises TypeError: a keyword that is no argument
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
    :param total_timesteps: of ``learn``, a whole number or a float that is one
    :param rest: the other arguments of ``learn``, in its order
    :return: ``total_timesteps``, read
    :raises ValueError: one that is out of range
    """
    total_timesteps = _as_count(numbers_in(total_timesteps))
    names = ("callback", "log_interval", "tb_log_name", "reset_num_timesteps", "progress_bar")
    rules.check_learn(total_timesteps=total_timesteps, **dict(zip(names, rest, strict=True)))
    return total_timesteps


def read_first(policy: Any, env: Any, passed: dict[str, Any], default_steps: bool) -> list[str]:
    """
    What SB3's constructor uses at once, read and checked in place, before it can stumble over it.

    :param policy: the first argument of the constructor
    :param env: the second; ``None`` is for ``load`` alone
    :param passed: all of them, by name
    :param default_steps: whether ``gradient_steps`` was left at its default
    :return: warnings
    :raises ValueError: one that is out of range
    """
    if env is None and passed.get("_init_setup_model", True):
        raise ValueError("env=None must be an env, or the name of one; only load does without")
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
            # SB3 writes into these dictionaries; the caller's stay as they are.
            passed[name] = dict(passed[name])
    warning = check_device(passed.get("device", "auto"))
    found = [] if warning is None else [warning]
    if env is not None:
        # Before SB3 looks at the spaces: its assertions do not say what to do instead.
        passed["env"] = env = maybe_make_env(env, passed.get("verbose", 0))
        check_spaces(env.observation_space, env.action_space)
        n_envs = getattr(env, "num_envs", 1)
        # ``load`` gets its gradient_steps from the file.
        if default_steps and n_envs > 1 and passed.get("_init_setup_model", True):
            found.append(rules.updates_are_few(passed["gradient_steps"], n_envs))
    return found


def read_arguments(agent: Any, replay_buffer_classes: tuple[type, ...]) -> None:
    """
    Turn the arguments that an agent keeps under their names into what they mean, in place, and check them.

    :param agent: a ModelBased algorithm, before its parts are built; also one that is being loaded
    :param replay_buffer_classes: what ``replay_buffer_class`` may be
    :raises ValueError: an argument that cannot be read or is out of range
    """
    parameters = inspect.signature(type(agent)).parameters
    empty = inspect.Parameter.empty
    # A base that takes what it passes on as ``**kwargs`` has no defaults to show, and its arguments have rules all the same.
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
        # An agent may be loaded for another number of envs.
        if isinstance(agent.action_noise, VectorizedActionNoise) and agent.action_noise.n_envs != agent.n_envs:
            agent.action_noise = VectorizedActionNoise(agent.action_noise.base_noise, agent.n_envs)
        check_noise(agent.action_noise, agent.n_envs, agent.action_space.shape)


def _read(name: str, value: Any, default: Any) -> Any:
    """What an argument means. What means nothing comes back as it is where there is a rule for it, which says more."""
    if name == "rollout_schedule" and isinstance(numbers_in(value), str) and "." not in value:
        # "auto", or a word for nothing: `make_schedule` says what there is.
        return value
    if name in ("learning_rate", "rollout_schedule", "replay_buffer_class"):
        value = resolve(numbers_in(value), name)
    if name == "rollout_schedule":
        if isinstance(value, Mapping):
            return {key: as_number(item, f"rollout_schedule: {key}", 1) for key, item in value.items()}
        return _as_count(value)
    if name in ("policy_kwargs", "ent_coef", "target_entropy", "real_ratio"):
        return numbers_in(value)
    if name == "train_freq":
        # SB3 refuses text here, even where it is a number; a list is YAML's tuple.
        value = tuple(numbers_in(value)) if isinstance(value, list) else value
        if type(value) is tuple:
            return tuple(item if isinstance(item, str) else _as_count(numbers_in(item)) for item in value)
        return value if isinstance(value, str) else _as_count(numbers_in(value))
    if isinstance(default, bool) or not (
        name in ("seed", "model_buffer_size", "dynamics_window") or isinstance(default, int | float)
    ):
        return value
    if name not in rules.RULES:
        return as_number(value, name, default)
    value = numbers_in(value)
    return value if isinstance(default, float) else _as_count(value)


def _taken_by(policy_class: Any) -> list[str] | None:
    """The keyword arguments of a policy, beside those that the agent itself passes; ``None``: any."""
    try:
        parameters = list(inspect.signature(policy_class).parameters.values())
    except (TypeError, ValueError):  # of a class that is written in C
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters[3:]]
