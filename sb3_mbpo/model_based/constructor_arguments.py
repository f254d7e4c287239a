"""
Names and types of the constructors' arguments, for editors and type checkers.

At run time the signatures are joined from those of the algorithms, see ``joined_signature``. Tests compare the two.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule
from typing_extensions import TypedDict

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.filters import Rule


class OffPolicyArguments(TypedDict, total=False):
    """What SB3's off-policy algorithms have in common."""

    learning_rate: float | Schedule
    buffer_size: int
    learning_starts: int
    batch_size: int
    gamma: float
    train_freq: int | tuple[int, str]
    gradient_steps: int
    action_noise: ActionNoise | None
    replay_buffer_class: type[ReplayBuffer] | None
    replay_buffer_kwargs: dict[str, Any] | None
    optimize_memory_usage: bool
    n_steps: int
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: th.device | str
    _init_setup_model: bool


class ModelBasedArguments(TypedDict, total=False):
    """See ``ModelBased``."""

    updates_per_transition: float | None
    warmup_actions: float | str | Callable[..., Any] | None
    real_ratio: float | str
    model_train_freq: int
    rollout_batch_size: int
    rollout_schedule: int | str | dict[str, int] | Callable[[int], int]
    retained_rollouts: int
    model_buffer_size: int | None
    termination_fn: str | Callable[..., th.Tensor] | None
    reward_fn: str | Callable[..., th.Tensor] | None
    prediction_clip_margin: float | None
    min_explained_variance: float | None
    rollout_filter: str | Rule | None
    dynamics_window: int | None
    dynamics_class: str | type[DynamicsModel]
    dynamics_kwargs: dict[str, Any] | None


class EntropyArguments(TypedDict, total=False):
    """Of a stochastic policy with an entropy coefficient."""

    ent_coef: str | float
    target_entropy: str | float
    use_sde: bool
    sde_sample_freq: int
    use_sde_at_warmup: bool


class SACArguments(OffPolicyArguments, EntropyArguments, ModelBasedArguments, total=False):
    """Of SAC with a model."""

    tau: float
    target_update_interval: int


class TQCArguments(SACArguments, total=False):
    """Of TQC with a model."""

    top_quantiles_to_drop_per_net: int


class CrossQArguments(OffPolicyArguments, EntropyArguments, ModelBasedArguments, total=False):
    """Of CrossQ with a model."""

    policy_delay: int


class TD3Arguments(OffPolicyArguments, ModelBasedArguments, total=False):
    """Of TD3 with a model."""

    tau: float
    policy_delay: int
    target_policy_noise: float
    target_noise_clip: float
