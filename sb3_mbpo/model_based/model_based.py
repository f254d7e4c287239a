"""The conductor: builds the parts of model-based learning around an SB3 algorithm, and keeps SB3's contract."""

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TrainFrequencyUnit

from sb3_mbpo.arguments.arguments import (
    check_keywords,
    check_names,
    joined_signature,
    read_arguments,
    read_first,
    read_learn,
    resolve,
)
from sb3_mbpo.arguments.moving_statistics import moving_statistics
from sb3_mbpo.arguments.user_functions import dry_run, dry_run_filter
from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer, balanced_ratio
from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.model_based.model_learning import ModelLearning
from sb3_mbpo.model_based.resuming import Resuming
from sb3_mbpo.model_based.rollout_callback import RolloutCallback
from sb3_mbpo.rewards.learned import LearnedReward
from sb3_mbpo.rollouts import rollout_length
from sb3_mbpo.runtime.denormals import flush_denormals
from sb3_mbpo.runtime.memory import estimate, too_large
from sb3_mbpo.runtime.threads import one_thread_by_default
from sb3_mbpo.saving.export import Exporting
from sb3_mbpo.terminations.known import NeverTerminates, known_termination
from sb3_mbpo.terminations.learned import LearnedTermination
from sb3_mbpo.trust.filters import Rule
from sb3_mbpo.validation.rules import check_before_learning, whole

SelfModelBased = TypeVar("SelfModelBased", bound="ModelBased")


class ModelBased(ModelLearning, Resuming, Exporting):
    """
    Mixed in before an SB3 off-policy algorithm, lets it learn from imagined transitions as well (Janner et al., 2019).

    Takes every argument of that algorithm, by the same name and with the same meaning and default, except that
    ``gradient_steps`` is 20; and, by keyword only:

    :param real_ratio: share of real rows in a batch; 1: the plain algorithm, bit for bit; 0: imagined rows only; ``"auto"``:
        as many as let each real row be drawn as often as with one update a transition: 0.05 for 20 updates (the paper), 0.2
        for 5, see :func:`.replay_buffer.balanced_ratio`. Replaced by that number at construction
    :param model_train_freq: env transitions from one fit of the dynamics to the next
    :param rollout_batch_size: real states that imagined rollouts start from after each fit
    :param rollout_schedule: the rollout length k: a number; or ``min_length``, ``max_length``, ``start`` and ``end`` (env
        transitions) of a linear growth; or ``"auto"``: as far as the dynamics predicts the newest real steps, at most 15, see
        :func:`.explained_variance.reliable_length`; or a callable from env transitions to k
    :param retained_rollouts: imagined are the transitions of so many last fits
    :param model_buffer_size: most imagined transitions kept; ``None``: what schedule and retention imply
    :param termination_fn: when imagined episodes end: ``None``: as in this env where that is known, else learned;
        ``"learned"``; ``"never"``; or a function ``(obs, actions, next_obs) -> bool (B,)`` of float32 tensors on the agent's
        device, observations raw, actions in the env's scale, both in the env's shapes (or its dotted name)
    :param reward_fn: what imagined transitions are paid: ``None``: learned as a function of the transition and of whether it
        ends the episode, unless a ``dynamics_class`` of yours has its own; ``"joint"``: predicted by the dynamics together
        with the next observation (the paper); or a function of the same inputs as ``termination_fn``, ``-> float (B,)`` (or
        its dotted name)
    :param imagined_margin: imagined rewards and observations stay within the range of the real ones, and so many ranges on
        either side; ``None``: unbounded. A reward of a ``reward_fn`` is not bounded
    :param min_explained_variance: share of the variance of rewards, and of next observations, that the dynamics must explain
        of the steps since its last fit for batches to have all their imagined rows; with less they have fewer, and with half
        of it none. ``None``: all of them always (the paper)
    :param rollout_filter: which imagined transitions are learned from and which branches end early, by how far the members of
        the dynamics disagree: ``None``: all and none (the paper); ``"macura"``, ``"infoprop"``, ``"m2ac"``; or a rule, see
        ``trust/filters.py`` (or its dotted name)
    :param dynamics_window: number of newest real transitions that the dynamics, the termination and the bounds of imagined
        values are fitted to, that ``reward_fn`` is compared with, and that rollouts start from, for a world that changes
        slowly; ``None``: all. Imagined transitions of fits before that leave, too; real rows of a batch still come from the
        whole buffer. See also :meth:`forget_transitions`
    :param dynamics_class: a ``DynamicsModel`` (or its dotted name)
    :param dynamics_kwargs: its keyword arguments

    A :class:`.RolloutCallback` fits the dynamics and makes model rollouts in ``learn``. To do so at other times, set
    ``rollout_callback_class`` in a subclass, or call :meth:`fit_dynamics` and :meth:`generate_rollouts`.
    """

    #: Defaults that differ from those of the algorithm that this is mixed into.
    DEFAULTS: ClassVar[dict[str, Any]] = {"gradient_steps": 20}
    #: Decides in ``learn`` when to fit the dynamics and when to make model rollouts. A subclass may replace it.
    rollout_callback_class: ClassVar[type[RolloutCallback]] = RolloutCallback

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *args: Any,
        real_ratio: float | str = "auto",
        model_train_freq: int = 250,
        rollout_batch_size: int = 100_000,
        rollout_schedule: int | str | dict[str, int] | Callable[[int], int] = 1,
        retained_rollouts: int = 4,
        model_buffer_size: int | None = None,
        termination_fn: str | Callable[..., th.Tensor] | None = None,
        reward_fn: str | Callable[..., th.Tensor] | None = None,
        imagined_margin: float | None = 1.0,
        min_explained_variance: float | None = 0.1,
        rollout_filter: str | Rule | None = None,
        dynamics_window: int | None = None,
        dynamics_class: str | type[DynamicsModel] = ProbabilisticEnsemble,
        dynamics_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        signature = inspect.signature(super().__init__)
        check_names(kwargs, signature, type(self))
        given = signature.bind_partial(policy, env, *args, **kwargs).arguments
        as_ever = "gradient_steps" not in given
        ours = inspect.signature(ModelBased.__init__).parameters
        kwargs |= {name: value for name, value in self.DEFAULTS.items() if name not in ours and name not in given}
        bound = signature.bind_partial(policy, env, *args, **kwargs)
        passed = bound.arguments
        for warning in read_first(policy, env, passed, as_ever):
            warnings.warn(warning, stacklevel=3)

        # A number from _setup_model on.
        self.real_ratio: Any = real_ratio
        self.model_train_freq = model_train_freq
        self.rollout_batch_size = rollout_batch_size
        self.rollout_schedule = rollout_schedule
        self.retained_rollouts = retained_rollouts
        self.model_buffer_size = model_buffer_size
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        self.imagined_margin = imagined_margin
        self.min_explained_variance = min_explained_variance
        self.rollout_filter = rollout_filter
        self.dynamics_window = dynamics_window
        self.dynamics_class = dynamics_class
        self.dynamics_kwargs = dynamics_kwargs
        self._begin_life()
        super().__init__(*bound.args, **bound.kwargs)

    def _begin_life(self) -> None:
        """What a new agent has measured and counted: nothing."""
        #: What ends imagined episodes: a function, or "learned". Found at construction, saved, never looked up again.
        self.termination: Any = None
        #: ``lifetime_timesteps`` at the last fit.
        self.dynamics_fitted_at: int | None = None
        #: k under ``rollout_schedule="auto"``, measured before each fit but the first.
        self.trusted_length = 1
        #: Of the imagined rows that ``real_ratio`` leaves room for, the part that the dynamics has earned, see the gate.
        self.imagined_share = 1.0
        #: Squared errors on the steps after each fit, smoothed over the fits: of the reward and each dimension.
        self.forward_errors: list[float] = []
        #: Least and largest of real rewards and observations at the last fit, with their margin; kept by DHMBPO alone.
        self.prediction_bounds: list[float] = []
        #: Fits in a row after which nothing was imagined because too little was explained.
        self.unused_fits = 0
        #: What the rule of ``rollout_filter`` remembers of the refills so far.
        self.filter_memory: list[float] = []
        #: Whether :meth:`forget_transitions` was called: the first fit after it needs fewer rows, and updates wait for it.
        self.forgot_transitions = False
        self._earlier_timesteps = 0
        self._printed_threads = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What help() and editors show.
        cls.__signature__ = joined_signature(cls, ModelBased, **cls.DEFAULTS)  # type: ignore[attr-defined]

    def _setup_model(self) -> None:
        read_arguments(self, (ReplayBuffer, MixedReplayBuffer))
        if self.real_ratio == "auto":
            self.real_ratio = self._balanced_ratio()
        if self.rollout_schedule != "auto":
            rollout_length(self.rollout_schedule, 0)
        self.replay_buffer_class = MixedReplayBuffer
        # A zip may hold a buffer (``include``), and a plain one if a model-free agent saved it.
        self.replay_buffer = self._make_replay_buffer() if self.replay_buffer is None else self.replay_buffer
        super()._setup_model()
        self.dynamics = self._make_dynamics()
        if self.dynamics_window is not None:
            whole(self.dynamics.min_transitions).check(
                "dynamics_window", self.dynamics_window, ", the fewest the dynamics needs"
            )
        self.learned_termination = LearnedTermination(
            self.observation_space.shape, self.action_space.shape, seed=self.seed, device=self.device
        )
        self.learned_reward = LearnedReward(
            self.dynamics.obs_dim, self.dynamics.action_dim, seed=self.seed, device=self.device
        )
        # Without a termination_fn it came from the env; a loaded agent has it saved and does not look again.
        if self.termination is None or self.termination_fn is not None:
            self.termination = self._find_termination()
        self._warn_of_moving_statistics(7)
        self._warned_of_termination = False
        #: What was warned of, and is not again.
        self._warned_of: list[str] = []
        if self.reward_fn is not None and not (isinstance(self.reward_fn, str) and self.reward_fn == "joint"):
            reward_fn = resolve(self.reward_fn, "reward_fn")
            dry_run(reward_fn, "reward_fn", self.observation_space, self.action_space, self.device, returns="float")
        if self.rollout_filter is not None:
            dry_run_filter(self.filtering, self.rollout_filter, self.dynamics)
        if self.verbose >= 1:
            print(estimate(self))
        for warning in too_large(self):
            warnings.warn(warning, stacklevel=6)

    def _balanced_ratio(self) -> float:
        """What ``real_ratio="auto"`` stands for."""
        self._convert_train_freq()
        frequency: Any = self.train_freq
        if self.gradient_steps < 0:
            # As many updates as transitions.
            return balanced_ratio(1)
        # How many transitions an episode has is not known: as few as possible are real.
        known = frequency.unit is TrainFrequencyUnit.STEP
        return balanced_ratio(self.gradient_steps / (frequency.frequency * self.n_envs) if known else inf)

    def _make_dynamics(self) -> DynamicsModel:
        make = resolve(self.dynamics_class, "dynamics_class")
        is_class = isinstance(make, type) and issubclass(make, DynamicsModel) and not inspect.isabstract(make)
        if not is_class and (isinstance(make, type) or not callable(make)):
            raise ValueError(f"dynamics_class={self.dynamics_class!r} must be a subclass of sb3_mbpo.DynamicsModel")
        obs_dim, action_dim = (int(np.prod(space.shape)) for space in (self.observation_space, self.action_space))
        kwargs = check_keywords(self.dynamics_kwargs or {}, make, "dynamics_kwargs")
        try:
            dynamics = make(obs_dim, action_dim, seed=self.seed, device=self.device, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"dynamics_class={self.dynamics_class!r} cannot be called as a DynamicsModel is: {error}"
            ) from error
        if not isinstance(dynamics, DynamicsModel):
            raise ValueError(f"dynamics_class={self.dynamics_class!r} made a {type(dynamics).__name__}, no DynamicsModel")
        return dynamics

    def _warn_of_moving_statistics(self, stacklevel: int) -> None:
        warning = None if self.env is None else moving_statistics(self.env)
        if warning is not None:
            warnings.warn(warning, stacklevel=stacklevel)

    def _find_termination(self) -> Any:
        """What ``termination_fn`` stands for in this env."""
        if self.termination_fn is None and self.env is not None:
            known, reason = known_termination(self.env)
            if self.verbose >= 1:
                print(reason)
            return "learned" if known is None else known
        if self.termination_fn is None or (isinstance(self.termination_fn, str) and self.termination_fn == "learned"):
            return "learned"
        if isinstance(self.termination_fn, str) and self.termination_fn == "never":
            return NeverTerminates()
        termination = resolve(self.termination_fn, "termination_fn")
        dry_run(termination, "termination_fn", self.observation_space, self.action_space, self.device)
        return termination

    @property
    def waits_for_transitions(self) -> bool:
        """Whether updates wait, after :meth:`forget_transitions`, until there are transitions for a fit."""
        if not self.forgot_transitions or self.dynamics_fitted_at is not None:
            return False
        buffer = self.replay_buffer
        needed = min(self.rows_before_fit, buffer.buffer_size * buffer.n_envs)
        return buffer.size() * buffer.n_envs < needed

    def forget_transitions(self, keep: int = 0) -> None:
        """
        Call this when the world has changed: real transitions of before leave, and all imagined ones.

        Networks, optimizers, counters and the schedule of k stay. The agent goes on acting with its policy. It makes no
        updates until there are 200 real transitions (or ``learning_starts``, if that is less); then the dynamics is
        fitted to these, new transitions are imagined, and everything goes on as before. What has been measured of the
        dynamics (k of "auto", the imagined share, the memory of a ``rollout_filter``) starts anew.

        May be called between two calls of ``learn`` (with ``reset_num_timesteps=False`` in the second, or SB3 acts at random
        for ``learning_starts`` steps again), or in a callback.

        :param keep: number of newest real transitions that already are of the changed world, and stay
        :raises ValueError: ``keep`` is no whole number of at least 0
        """
        whole(0).check("forget_transitions: keep", keep)
        self.replay_buffer.forget(keep)
        self.forgot_transitions = True
        self.dynamics_fitted_at, self.trusted_length, self.imagined_share, self.filter_memory = None, 1, 1.0, []
        self.forward_errors, self.prediction_bounds, self.unused_fits = [], [], 0
        self._warned_of_termination = False
        self._warned_of = [what for what in self._warned_of if what != "reward_fn"]

    def train(self, *args: Any, **kwargs: Any) -> None:
        """See SB3; waits after :meth:`forget_transitions`."""
        if not self.waits_for_transitions:
            super().train(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not isinstance(callback, BaseCallback):
            callback = CallbackList(callback) if isinstance(callback, list) else ConvertCallback(callback)
        rollouts = self.rollout_callback_class()
        everything = super()._init_callback(CallbackList([rollouts, callback]), progress_bar)
        if progress_bar:
            assert isinstance(everything, CallbackList) and isinstance(everything.callbacks[-1], ProgressBarCallback)
            rollouts.progress_bar = everything.callbacks[-1]
        return everything

    def learn(
        self: SelfModelBased,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfModelBased:
        """
        See SB3; ``tb_log_name`` is the name of the class unless given.

        :raises ValueError: an argument out of range
        """
        total_timesteps = read_learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        tb_log_name = tb_log_name or type(self).__name__
        with ExitStack() as stack:
            # Both change how numbers are rounded. With the model off, the agent is the plain algorithm to the last bit.
            if self.real_ratio < 1:
                stack.enter_context(flush_denormals())
                self._set_threads(stack)
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _set_threads(self, stack: ExitStack) -> None:
        """On a CPU, choose the number of threads until the stack is closed, and print it where it is new."""
        if self.device.type != "cpu":
            return
        line = stack.enter_context(one_thread_by_default())
        if self.verbose >= 1 and line != self._printed_threads:
            print(line)
        self._printed_threads = line

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_printed_threads"]

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.env is not None:
            for warning in check_before_learning(self):
                warnings.warn(warning, stacklevel=6)
        before = self.num_timesteps
        try:
            result = super()._setup_learn(total_timesteps, *args, **kwargs)
        finally:
            # Also where the env's reset raises.
            self._earlier_timesteps += before - self.num_timesteps
        self.replay_buffer.real_ratio = self.real_ratio
        if self.real_ratio < 1 and self.dynamics_fitted_at is not None and self.replay_buffer.size() == 0:
            warnings.warn(
                f"After {self.lifetime_timesteps} steps, the agent goes on with an empty replay buffer, and its dynamics will "
                "forget the old transitions. Keep them with save_replay_buffer, and call load_replay_buffer",
                stacklevel=3,
            )
        return result

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See SB3. What ends imagined episodes stays as it is, and is held against the new env's transitions."""
        super().set_env(env, force_reset)
        assert self.env is not None
        self._warned_of_termination = False
        self._warned_of = [what for what in self._warned_of if what != "reward_fn"]
        self._warn_of_moving_statistics(3)
        if self.termination_fn is None and not isinstance(self.termination, str):
            known, reason = known_termination(self.env)
            if known != self.termination:
                warnings.warn(
                    f"set_env: imagined episodes still end by {self.termination}, found in the first env; for this one: "
                    f"{reason}. Make a new agent, or pass termination_fn",
                    stacklevel=2,
                )

    def set_random_seed(self, seed: int | None = None) -> None:
        """See SB3; seeds the dynamics, the learned reward and termination and the draws among imagined rows as well."""
        super().set_random_seed(seed)
        names = ("dynamics", "learned_reward", "learned_termination", "replay_buffer")
        for part in (getattr(self, name, None) for name in names):
            if part is not None and seed is not None:
                part.seed(seed)
