"""Valid values of arguments. Errors name the argument, its value, the valid values, and what to do instead."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFrequencyUnit

# Maximum of counts: larger values are almost certainly typos, and would fill the memory or never end.
MOST = 10**9
# Maximum k of ``rollout_schedule="auto"``: the final k of the paper's schedule for Hopper.
LONGEST_AUTO = 15
# Maximum of numbers: the square of a larger one overflows float32, and Adam computes squares of gradients.
LARGEST = 1e15


def shown(value: Any) -> str:
    """
    :param value: any value
    :return: ``repr(value)``, or a function's dotted name, truncated if it is long
    """
    is_function = callable(value) and hasattr(value, "__qualname__") and not isinstance(value, type)
    try:
        text = f"{value.__module__}.{value.__qualname__}" if is_function else repr(value)
    except Exception as error:  # an int of 5000 digits, or a user's class
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= 300 else f"{text[:300]}..."


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """
    :param name: an unknown name
    :param known: the valid names
    :return: end of the error message with the most similar name; empty if no name is similar
    """
    guess = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {guess[0]!r}?" if guess else ""


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """
    :param value: any value
    :param low: minimum
    :param high: maximum
    :return: whether it is an integer in [low, high]; a bool or a float such as 1.0 is not
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(low <= value <= high)


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """
    :param value: any value
    :param low: minimum
    :param high: maximum
    :return: whether it is a number in [low, high]; a bool or NaN is not
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and bool(low <= value <= high)


def is_flag(value: Any) -> bool:
    """
    :param value: any value
    :return: whether it is a bool, 0 or 1; a string is not, because Python would treat "false" as true
    """
    return isinstance(value, bool | np.bool_) or is_whole(value, 0, 1)


@dataclass(frozen=True)
class ArgumentCheck:
    """
    A condition on the value of an argument.

    :param holds: returns whether a value is valid; must not raise for any value
    :param expected: end of the message "must be ..."
    """

    holds: Callable[[Any], bool]
    expected: str

    def check(self, name: str, value: Any, remedy: str = "") -> None:
        """
        :param name: name of the argument, for the error
        :param value: value of the argument
        :param remedy: appended to the error
        :raises ValueError: the value is not valid
        """
        if not self.holds(value):
            raise ValueError(f"{name}={shown(value)} must be {self.expected}{remedy}")


def whole(low: int, high: int | None = None) -> ArgumentCheck:
    """
    :param low: minimum
    :param high: maximum; ``None``: no maximum
    :return: check for a whole number in this range
    """
    most = "" if high is None else f" and at most {high:,}"
    return ArgumentCheck(
        lambda value: is_whole(value, low, math.inf if high is None else high), f"a whole number of at least {low}{most}"
    )


def number(low: float, high: float, meaning: str = "") -> ArgumentCheck:
    """
    :param low: minimum
    :param high: maximum
    :param meaning: end of the message "must be ..."; empty: the range
    :return: check for a number in this range
    """
    return ArgumentCheck(lambda value: is_number(value, low, high), meaning or f"a number from {low:g} to {high:g}")


def optional(rule: ArgumentCheck) -> ArgumentCheck:
    """
    :param rule: a check
    :return: check that also accepts ``None``
    """
    return ArgumentCheck(lambda value: value is None or rule.holds(value), f"None or {rule.expected}")


def unless(text: str, rule: ArgumentCheck) -> ArgumentCheck:
    """
    :param text: a string
    :param rule: a check
    :return: check that also accepts the string
    """
    return ArgumentCheck(
        lambda value: (isinstance(value, str) and value == text) or rule.holds(value), f"{text!r} or {rule.expected}"
    )


FLAG = ArgumentCheck(is_flag, "true or false")
POSITIVE = ArgumentCheck(lambda value: is_number(value, 0, LARGEST) and value > 0, f"a number above 0 and at most {LARGEST:g}")
# Adam's steps are about as large as the learning rate, and useful weights are far below 1000.
RATE = number(0, 1e3, "a number from 0 to 1000, such as 3e-4")
RATIO = number(0, 1, "a number between 0 (all imagined) and 1 (plain model-free learning)")
MAPPING = ArgumentCheck(lambda value: isinstance(value, Mapping), "a mapping of keyword arguments")
CALLABLE = ArgumentCheck(callable, "a class, or its dotted name")
# Larger layers are almost certainly typos, and their weights would not fit into memory.
LAYERS = ArgumentCheck(
    lambda value: isinstance(value, list | tuple) and all(is_whole(size, 1, 100_000) for size in value),
    "a list of layer sizes, whole numbers from 1 to 100,000",
)
_COEFFICIENT = number(0, LARGEST)
_CLIP = f"{_COEFFICIENT.expected}, or infinite"


def _is_coefficient(value: Any) -> bool:
    if isinstance(value, str):
        head, _, start = value.partition("_")
        try:
            return value == "auto" or (head == "auto" and POSITIVE.holds(float(start)))
        except ValueError:
            return False
    return _COEFFICIENT.holds(value)


def _is_train_freq(value: Any) -> bool:
    if not isinstance(value, tuple):
        return is_whole(value, 1, MOST)
    units = [*TrainFrequencyUnit, *(unit.value for unit in TrainFrequencyUnit)]
    return len(value) == 2 and is_whole(value[0], 1, MOST) and any(value[1] is unit or value[1] == unit for unit in units)


def _is_noise(value: Any) -> bool:
    return value is None or (callable(value) and callable(getattr(value, "reset", None)) and not isinstance(value, type))


# The arguments of SB3's algorithms and of ModelBased. Arguments that must be called to be checked are not here.
RULES: dict[str, ArgumentCheck] = {
    "buffer_size": whole(1, MOST),
    "learning_starts": whole(0),
    "batch_size": whole(1, MOST),
    # 0 keeps the target networks unchanged, which SB3's own tests use.
    "tau": number(0, 1, "a number between 0 and 1, the soft update coefficient"),
    "gamma": number(0, 1, "a number between 0 and 1, the discount factor"),
    "train_freq": ArgumentCheck(
        _is_train_freq, f'a whole number of at least 1 and at most {MOST:,}, alone or in a pair with "step" or "episode"'
    ),
    "gradient_steps": ArgumentCheck(
        lambda value: is_whole(value, -1, MOST),
        f"a whole number of at least 0 and at most {MOST:,}, or -1 for one per env transition",
    ),
    "action_noise": ArgumentCheck(_is_noise, "None or an ActionNoise of Stable-Baselines3"),
    **{name: whole(1) for name in ("target_update_interval", "policy_delay")},
    "top_quantiles_to_drop_per_net": whole(0),
    "target_policy_noise": number(0, LARGEST),
    "target_noise_clip": ArgumentCheck(lambda value: is_number(value, 0, LARGEST) or is_number(value, math.inf), _CLIP),
    "ent_coef": ArgumentCheck(
        _is_coefficient, f'"auto", "auto_" and a positive initial value ("auto_0.1"), or {_COEFFICIENT.expected}'
    ),
    "target_entropy": unless("auto", number(-LARGEST, LARGEST)),
    **{name: FLAG for name in ("use_sde", "use_sde_at_warmup")},
    "sde_sample_freq": ArgumentCheck(
        lambda value: is_whole(value, 1) or is_whole(value, -1, -1),
        "a whole number of at least 1, or -1 for new noise only at the start of each rollout",
    ),
    "stats_window_size": whole(1, MOST),
    "tensorboard_log": ArgumentCheck(lambda value: value is None or isinstance(value, str | os.PathLike), "None or a folder"),
    "seed": optional(whole(0, 2**32 - 1)),
    "verbose": ArgumentCheck(lambda value: is_whole(value, 0) or isinstance(value, bool), "0, 1 or 2"),
    "replay_buffer_kwargs": MAPPING,
    "updates_per_transition": optional(POSITIVE),
    "real_ratio": unless("auto", RATIO),
    "model_train_freq": whole(1),
    **{name: whole(1, MOST) for name in ("rollout_batch_size", "retained_rollouts")},
    "model_buffer_size": optional(whole(1, sys.maxsize)),
    "prediction_clip_margin": optional(number(0, LARGEST, "a number of at least 0, in ranges of the real data")),
    "min_explained_variance": optional(number(1e-6, 1)),
    "dynamics_window": optional(whole(1, MOST)),
    "dynamics_kwargs": optional(MAPPING),
}
# Arguments of SB3's policies. Not every policy takes all of them.
_POLICY_RULES: dict[str, ArgumentCheck] = {
    "net_arch": ArgumentCheck(
        lambda value: (
            value is None
            or (isinstance(value, list) and LAYERS.holds(value))
            or (isinstance(value, dict) and value.keys() == {"pi", "qf"} and all(map(LAYERS.holds, value.values())))
        ),
        f'{LAYERS.expected}, or a mapping of such lists with the keys "pi" and "qf"',
    ),
    "n_critics": whole(1, 1000),
    "n_quantiles": whole(1, 100_000),
    "log_std_init": number(-20, 20),
    "clip_mean": number(0, LARGEST),
    **{name: CALLABLE for name in ("activation_fn", "optimizer_class", "features_extractor_class")},
    **{name: optional(MAPPING) for name in ("optimizer_kwargs", "features_extractor_kwargs")},
    **{name: FLAG for name in ("use_sde", "use_expln", "normalize_images", "share_features_extractor")},
}
_DECAY = number(0, LARGEST)
ENSEMBLE_RULES: dict[str, ArgumentCheck] = {
    "n_members": whole(1, 1000),
    "n_elites": whole(1),
    "net_arch": ArgumentCheck(lambda value: LAYERS.holds(value) and len(value) > 0, LAYERS.expected),
    "learning_rate": ArgumentCheck(
        lambda value: RATE.holds(value) and value > 0, "a number above 0 and at most 1000, such as 1e-3"
    ),
    "weight_decays": ArgumentCheck(
        lambda value: value is None or (isinstance(value, list | tuple) and all(map(_DECAY.holds, value))),
        "None or numbers >= 0, one per layer",
    ),
    "batch_size": whole(1, MOST),
    "holdout_ratio": ArgumentCheck(
        lambda value: is_number(value, 0, 1) and 0 < value < 1, "a number between 0 and 1, both excluded"
    ),
    "max_holdout": whole(1),
    "patience": whole(0),
    "min_improvement": ArgumentCheck(lambda value: is_number(value, 0, 1) and value < 1, "a number of at least 0 and below 1"),
    # The first fit takes 1.5 times as many, which must be finite as a float.
    "max_updates": optional(whole(1, MOST)),
    "target_mode": ArgumentCheck(
        lambda value: isinstance(value, str) and value in ("auto", "delta", "next"), "'auto', 'delta' or 'next'"
    ),
    "normalize_targets": FLAG,
    "layer_norm": FLAG,
    "bootstrap": FLAG,
    "beta": number(0, 1),
}
_LEARN_RULES: dict[str, ArgumentCheck] = {
    "total_timesteps": whole(0),
    "log_interval": optional(whole(1)),
    "tb_log_name": optional(ArgumentCheck(lambda value: isinstance(value, str), "a text")),
    "reset_num_timesteps": FLAG,
    "progress_bar": FLAG,
    "background": FLAG,
    "callback": ArgumentCheck(
        lambda value: (
            value is None
            or isinstance(value, BaseCallback)
            or (isinstance(value, list) and all(isinstance(item, BaseCallback) for item in value))
            # SB3 would call a callback class at every step without an error.
            or (callable(value) and not isinstance(value, type))
        ),
        "None, a BaseCallback, a list of them, or a function of (locals, globals)",
    ),
}


def check_policy_kwargs(kwargs: Mapping[str, Any], known: Iterable[str] | None) -> None:
    """
    Check ``policy_kwargs``.

    :param kwargs: keyword arguments of the policy
    :param known: names that the policy takes; ``None``: any
    :raises ValueError: a key is unknown, or a value is invalid
    """
    known = None if known is None else list(known)
    for key, value in kwargs.items():
        if known is not None and key not in known:
            raise ValueError(f"policy_kwargs has no key {key!r}; it takes {', '.join(known)}{did_you_mean(key, known)}")
        if key in _POLICY_RULES:
            _POLICY_RULES[key].check(f"policy_kwargs: {key}", value)


def check_ensemble(given: Mapping[str, Any]) -> None:
    """
    Check the arguments of :class:`.ProbabilisticEnsemble`.

    :param given: values of all arguments in ``ENSEMBLE_RULES``
    :raises ValueError: a value is invalid
    """
    for name, rule in ENSEMBLE_RULES.items():
        rule.check(f"dynamics_kwargs: {name}", given[name])
    n_members, n_layers, decays = given["n_members"], len(given["net_arch"]) + 1, given["weight_decays"]
    whole(1, n_members).check("dynamics_kwargs: n_elites", given["n_elites"], ", which is n_members")
    if decays is not None and len(decays) != n_layers:
        raise ValueError(f"dynamics_kwargs: weight_decays={decays!r} must be {n_layers} numbers, one per layer, or None")


def check_learn(**arguments: Any) -> None:
    """
    Check the arguments of ``learn``.

    :param arguments: arguments by name
    :raises ValueError: SB3 does not accept a value, or would misinterpret it
    """
    for name, value in arguments.items():
        _LEARN_RULES[name].check(f"learn: {name}", value)


def updates_are_few(gradient_steps: int, train_freq: Any, n_envs: int) -> str | None:
    """
    Warning for the default of ``gradient_steps`` where it does not count per transition.

    :param gradient_steps: the default
    :param train_freq: a valid value, see SB3
    :param n_envs: number of envs
    :return: the warning; ``None``: one rollout is one transition
    """
    steps, unit = train_freq if isinstance(train_freq, tuple) else (train_freq, TrainFrequencyUnit.STEP)
    if TrainFrequencyUnit(unit) is TrainFrequencyUnit.EPISODE:
        few = f"{gradient_steps} updates per {'episode' if steps == 1 else f'{steps} episodes'}"
    elif steps * n_envs == 1:
        return None
    else:
        few = f"{gradient_steps / (steps * n_envs):.3g} updates per transition"
    of_envs = f" and {n_envs} envs" if n_envs > 1 else ""
    return (
        f"gradient_steps is left at its default of {gradient_steps}, which counts per train_freq and not per transition: "
        f"with train_freq={shown(train_freq)}{of_envs}, there are {few}. Pass updates_per_transition={gradient_steps} for "
        f"{gradient_steps} per transition, or gradient_steps={gradient_steps} to silence this warning"
    )


def check_before_learning(agent: Any) -> Iterable[str]:
    """
    Check the settings of an agent before ``learn``.

    :param agent: a ModelBased algorithm with an env
    :return: warnings of settings that work but are probably not intended
    :raises ValueError: the agent can predict but not learn with its settings
    """
    n_envs = agent.env.num_envs
    if agent.train_freq.unit is TrainFrequencyUnit.EPISODE and n_envs > 1:
        raise ValueError(
            f"train_freq={shown(agent.train_freq)} counts episodes, which works only with one env, but there are {n_envs}. "
            'Count steps instead: train_freq=(1, "step")'
        )
    if agent.gradient_steps == 0:
        return
    room = max(agent.buffer_size // n_envs, 1) * n_envs
    needed = agent.dynamics.min_transitions
    imagines = agent.real_ratio < 1 and room >= needed
    real = int(agent.batch_size * agent.real_ratio) if imagines else agent.batch_size
    if real > room:
        yield f"batch_size={agent.batch_size} needs {real} real transitions; with {room}, some are repeated. Raise buffer_size"
    if agent.real_ratio < 1 and not imagines:
        yield (
            f"buffer_size={agent.buffer_size} allows {room} transitions, but the dynamics needs {needed}: nothing will be "
            "imagined. Raise buffer_size, or pass real_ratio=1 to learn without a model"
        )
