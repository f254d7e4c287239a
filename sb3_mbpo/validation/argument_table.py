"""
The tables of arguments: a row has the name, the valid values, and how they are read (``validation/rules.py``).

Constructors read their arguments with ``read_arguments`` (``arguments/arguments.py``), which applies these rows. Conditions on
several arguments are checked where the parts are made.
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFrequencyUnit

from sb3_mbpo.validation.rules import (
    FLAG,
    LARGEST,
    MAPPING,
    MOST,
    NONE,
    POSITIVE,
    RATE,
    ArgumentCheck,
    count_in,
    imported,
    is_flag,
    is_number,
    is_whole,
    number,
    numbers_in,
    one_of,
    resolve,
    whole,
)

#: Valid values of ``replay_buffer_class``. The agent's own buffer adds itself.
REPLAY_BUFFERS: list[type | None] = [None, ReplayBuffer, DictReplayBuffer]
# Maximum k of ``rollout_schedule="auto"``: the final k of the paper's schedule for Hopper.
LONGEST_AUTO = 15
# Maximum k. Larger values are longer than any time limit and almost certainly typos.
MOST_STEPS = 10_000
_COEFFICIENT = number(0, LARGEST)
# Larger layers are almost certainly typos, and their weights would not fit into memory.
_LAYERS = ArgumentCheck(
    lambda value: isinstance(value, list | tuple) and all(is_whole(size, 1, 100_000) for size in value),
    "a list of layer sizes, whole numbers from 1 to 100,000",
)


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


def _is_warmup(value: Any) -> bool:
    acts = hasattr(value, "predict") or (callable(value) and not isinstance(value, type))
    return value is None or acts or (is_number(value, 0, 1) and value > 0)


def _warmup(value: Any) -> Any:
    value = resolve(numbers_in(value))
    # Its policy acts alike and, unlike an agent with an env, can always be saved.
    return value.policy if isinstance(value, BaseAlgorithm) else value


def _schedule(value: Any) -> Any:
    return {key: count_in(item) for key, item in value.items()} if isinstance(value, Mapping) else count_in(value)


#: Arguments of our algorithms, and those of SB3's for which it does not raise a clear error itself.
ARGUMENTS: dict[str, ArgumentCheck] = {
    # ModelBased
    "updates_per_transition": NONE | POSITIVE,
    "warmup_actions": ArgumentCheck(
        _is_warmup,
        "None, a number above 0 and at most 1 (part of the range of the actions), a function from raw observations (n_envs, "
        "*obs_shape) to actions, or its dotted name, or a policy with predict()",
        _warmup,
        words=(),
    ),
    "real_ratio": one_of("auto") | number(0, 1, "a number between 0 (all imagined) and 1 (plain model-free learning)"),
    "model_train_freq": whole(1),
    **{name: whole(1, MOST) for name in ("rollout_batch_size", "retained_rollouts")},
    # Its keys and what a function returns are checked by `rollout_length`.
    "rollout_schedule": imported(
        f"a length, a whole number of at least 1 and at most {MOST_STEPS:,}; 'auto'; a mapping with min_length, max_length, "
        "start, end; or a callable from env transitions to a length",
        "auto",
        holds=lambda value: is_whole(value, 1, MOST_STEPS) or isinstance(value, Mapping) or callable(value),
        convert=_schedule,
    ),
    "model_buffer_size": NONE | whole(1, sys.maxsize),
    "termination_fn": NONE
    | imported("'learned', 'never', a function (obs, actions, next_obs) -> bool (B,)", "learned", "never"),
    "reward_fn": NONE | imported("'joint', a function (obs, actions, next_obs) -> float (B,)", "joint"),
    "prediction_clip_margin": NONE | number(0, LARGEST, "a number of at least 0, in ranges of the real data"),
    "min_explained_variance": NONE | number(1e-6, 1),
    "rollout_filter": NONE
    | imported(
        "'macura', 'infoprop', 'm2ac', or a rule (mean, var, rollout_step) -> FilterResult, see sb3_mbpo.trust.filters",
        *("macura", "infoprop", "m2ac"),
    ),
    "dynamics_window": NONE | whole(1, MOST),
    "dynamics_class": imported("a subclass of sb3_mbpo.DynamicsModel"),
    # `check_keywords` converts its values, which depends on the parameters of dynamics_class.
    "dynamics_kwargs": NONE | replace(MAPPING, convert=lambda value: value),
    # MBPO
    "fast_update": one_of(None, True, False),
    # DHMBPO
    "training_horizon": whole(1, 1000),
    "distribution_freq": whole(1),
    "value_quantiles": ArgumentCheck(
        lambda value: (
            isinstance(value, tuple) and len(value) == 2 and all(is_number(q, 0, 1) for q in value) and value[0] < value[1]
        ),
        "two numbers from 0 to 1, the lower one first",
        # A list is the tuple of YAML, and of JSON.
        lambda value: tuple(numbers_in(value)) if isinstance(value, list) else numbers_in(value),
    ),
    **{name: number(0, 1) for name in ("real_roots", "actor_tau")},
    # SB3
    "learning_rate": imported(
        f"{RATE.expected}, or a function of the remaining progress", holds=lambda value: callable(value) or RATE.holds(value)
    ),
    **{name: whole(1, MOST) for name in ("buffer_size", "batch_size", "stats_window_size")},
    "learning_starts": whole(0),
    # 0 keeps the target networks unchanged, which SB3's own tests use.
    "tau": number(0, 1, "a number between 0 and 1, the soft update coefficient"),
    "gamma": number(0, 1, "a number between 0 and 1, the discount factor"),
    "train_freq": ArgumentCheck(
        _is_train_freq,
        f'a whole number of at least 1 and at most {MOST:,}, alone or in a pair with "step" or "episode"',
        lambda value: tuple(map(count_in, value)) if type(value) in (list, tuple) else count_in(value),
    ),
    "gradient_steps": one_of(-1, expected="-1 for one per env transition") | whole(0, MOST),
    **{name: whole(1) for name in ("target_update_interval", "policy_delay")},
    "top_quantiles_to_drop_per_net": whole(0),
    "target_policy_noise": _COEFFICIENT,
    "target_noise_clip": one_of(math.inf) | _COEFFICIENT,
    "ent_coef": ArgumentCheck(
        _is_coefficient,
        f'"auto", "auto_" and a positive initial value ("auto_0.1"), or {_COEFFICIENT.expected}',
        numbers_in,
    ),
    "target_entropy": one_of("auto") | number(-LARGEST, LARGEST),
    **{name: FLAG for name in ("use_sde", "use_sde_at_warmup")},
    "sde_sample_freq": one_of(-1, expected="-1 for new noise only at the start of each rollout") | whole(1),
    "tensorboard_log": NONE | ArgumentCheck(lambda value: isinstance(value, str | os.PathLike), "a folder"),
    "seed": NONE | whole(0, 2**32 - 1),
    "verbose": ArgumentCheck(lambda value: is_whole(value, 0) or isinstance(value, bool), "0, 1 or 2", count_in),
    "policy_kwargs": NONE | MAPPING,
    "replay_buffer_class": ArgumentCheck(
        lambda value: any(value is kind for kind in REPLAY_BUFFERS),
        "None: MBPO mixes real and imagined transitions in its own buffer (no HER, no n-step, no custom classes)",
        resolve,
        words=(),
    ),
    "replay_buffer_kwargs": NONE
    | ArgumentCheck(
        lambda value: (
            isinstance(value, Mapping) and value.keys() <= {"handle_timeout_termination"} and all(map(is_flag, value.values()))
        ),
        "a mapping with no other key than handle_timeout_termination, which is true or false",
        numbers_in,
    ),
    "n_steps": ArgumentCheck(lambda value: is_whole(value, 1, 1), "1: imagined transitions are single steps", count_in),
    "optimize_memory_usage": ArgumentCheck(
        lambda value: is_flag(value) and not value,
        "False: it loses the last observation of an episode, which the dynamics needs. To save memory, reduce buffer_size",
    ),
}
#: Arguments of SB3's policies. Not every policy takes all of them.
POLICY_ARGUMENTS: dict[str, ArgumentCheck] = {
    "net_arch": ArgumentCheck(
        lambda value: (
            value is None
            or (isinstance(value, list) and _LAYERS.holds(value))
            or (isinstance(value, dict) and value.keys() == {"pi", "qf"} and all(map(_LAYERS.holds, value.values())))
        ),
        f'{_LAYERS.expected}, or a mapping of such lists with the keys "pi" and "qf"',
    ),
    "n_critics": whole(1, 1000),
    "n_quantiles": whole(1, 100_000),
    "log_std_init": number(-20, 20),
    "clip_mean": _COEFFICIENT,
    **{name: imported("a class") for name in ("activation_fn", "optimizer_class", "features_extractor_class")},
    **{name: NONE | MAPPING for name in ("optimizer_kwargs", "features_extractor_kwargs")},
    **{name: FLAG for name in ("use_sde", "use_expln", "normalize_images", "share_features_extractor")},
}
#: Arguments of ``ProbabilisticEnsemble``.
ENSEMBLE_ARGUMENTS: dict[str, ArgumentCheck] = {
    "n_members": whole(1, 1000),
    "n_elites": whole(1),
    "net_arch": ArgumentCheck(lambda value: _LAYERS.holds(value) and len(value) > 0, _LAYERS.expected),
    "learning_rate": ArgumentCheck(
        lambda value: RATE.holds(value) and value > 0, "a number above 0 and at most 1000, such as 1e-3"
    ),
    "weight_decays": NONE
    | ArgumentCheck(
        lambda value: isinstance(value, list | tuple) and all(map(_COEFFICIENT.holds, value)), "numbers >= 0, one per layer"
    ),
    "batch_size": whole(1, MOST),
    "holdout_ratio": ArgumentCheck(
        lambda value: is_number(value, 0, 1) and 0 < value < 1, "a number between 0 and 1, both excluded"
    ),
    "max_holdout": whole(1),
    "patience": whole(0),
    "min_improvement": ArgumentCheck(lambda value: is_number(value, 0, 1) and value < 1, "a number of at least 0 and below 1"),
    # The first fit takes 1.5 times as many, which must be finite as a float.
    "max_updates": NONE | whole(1, MOST),
    "target_mode": one_of("auto", "delta", "next"),
    **{name: FLAG for name in ("normalize_targets", "layer_norm", "bootstrap")},
    "beta": number(0, 1),
}
#: Arguments of ``learn``.
LEARN_ARGUMENTS: dict[str, ArgumentCheck] = {
    "total_timesteps": whole(0),
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
    "log_interval": NONE | whole(1),
    "tb_log_name": NONE | ArgumentCheck(lambda value: isinstance(value, str), "a text"),
    **{name: FLAG for name in ("reset_num_timesteps", "progress_bar", "background")},
}


def check_ensemble(given: Mapping[str, Any]) -> None:
    """
    Check the arguments of :class:`.ProbabilisticEnsemble`.

    :param given: values of all arguments in ``ENSEMBLE_ARGUMENTS``, and others
    :raises ValueError: a value is invalid
    """
    for name, rule in ENSEMBLE_ARGUMENTS.items():
        rule.check(f"dynamics_kwargs: {name}", given[name])
    n_members, n_layers, decays = given["n_members"], len(given["net_arch"]) + 1, given["weight_decays"]
    whole(1, n_members).check("dynamics_kwargs: n_elites", given["n_elites"], ", which is n_members")
    if decays is not None and len(decays) != n_layers:
        raise ValueError(f"dynamics_kwargs: weight_decays={decays!r} must be {n_layers} numbers, one per layer, or None")
