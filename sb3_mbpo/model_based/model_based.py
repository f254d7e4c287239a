"""``ModelBased``: adds dynamics, model buffer and model rollouts to an SB3 algorithm, behind SB3's own interface."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_mbpo.arguments.arguments import (
    check_keywords,
    check_names,
    joined_signature,
    read_arguments,
    read_first,
)
from sb3_mbpo.arguments.moving_statistics import moving_statistics
from sb3_mbpo.arguments.user_functions import dry_run, dry_run_filter
from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer, balanced_ratio
from sb3_mbpo.codec import Codec
from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.model_based.beside_acting import BackgroundCallback
from sb3_mbpo.model_based.pretraining import Pretraining
from sb3_mbpo.model_based.resuming import Resuming
from sb3_mbpo.model_based.rollout_callback import RolloutCallback
from sb3_mbpo.rewards.learned import LearnedReward
from sb3_mbpo.rollout_schedule import rollout_length
from sb3_mbpo.runtime.denormals import flush_denormals
from sb3_mbpo.runtime.memory import estimate, too_large
from sb3_mbpo.runtime.threads import one_thread_by_default
from sb3_mbpo.saving.export import Exporting
from sb3_mbpo.terminations.known import NeverTerminates, known_termination
from sb3_mbpo.terminations.learned import LearnedTermination
from sb3_mbpo.trust.filters import Rule
from sb3_mbpo.validation.argument_table import LEARN_ARGUMENTS
from sb3_mbpo.validation.misuse import check_before_learning, updates_are_few
from sb3_mbpo.validation.rules import read_all, shown, whole
from sb3_mbpo.validation.unsupported import check_policy

SelfModelBased = TypeVar("SelfModelBased", bound="ModelBased")


class ModelBased(Pretraining, Resuming, Exporting):
    """
    Mixin for SB3's off-policy algorithms: the algorithm also learns from imagined transitions (Janner et al., 2019).

    It accepts every argument of the algorithm, with the same name, meaning and default, except that ``gradient_steps``
    defaults to 20. The arguments below are keyword-only:

    :param updates_per_transition: Number of updates per env transition, whatever ``train_freq`` and the number of envs are; it
        replaces ``gradient_steps``. It may be a fraction: .5 is one update after every second transition. ``None``:
        ``gradient_steps``, which counts per ``train_freq``
    :param warmup_actions: Actions before ``learning_starts``. ``None``: drawn uniformly from the action space, as in SB3. A
        number of at most 1: the same, but only from this part of the range, around its middle. Or a function (or its dotted
        name) from raw observations ``(n_envs, *obs_shape)`` to actions in the env's scale, or a policy or agent of SB3, whose
        ``predict`` is called with these. ``action_noise`` is added
    :param real_ratio: Fraction of real rows in a batch. 1: equal to the plain algorithm, bit for bit. 0: imagined rows only.
        ``"auto"``: each real row is drawn as often as with one update per transition: 0.05 for 20 updates per transition (as
        in the paper), 0.2 for 5, see :func:`.replay_buffer.balanced_ratio`; replaced by that number at construction
    :param model_train_freq: Number of env transitions between two fits of the dynamics
    :param rollout_batch_size: Number of real start states of each model rollout
    :param rollout_schedule: The rollout length k. A whole number; or a mapping with ``min_length``, ``max_length``, ``start``
        and ``end`` (env transitions), for linear growth; or a callable from env transitions to k; or ``"auto"``: the number of
        steps, at most 15, over which the dynamics predicts the newest real steps well, see
        :func:`.auto_rollout_length.reliable_length`
    :param retained_rollouts: Number of most recent model rollouts (one per fit) kept in the model buffer
    :param model_buffer_size: Maximum number of imagined transitions; ``None``: no limit beyond ``retained_rollouts``
    :param termination_fn: When imagined episodes end. ``None``: by the env's own rule if it is known, otherwise by a learned
        rule. ``"learned"``, ``"never"``, or a function (or its dotted name) ``(obs, actions, next_obs) -> bool (B,)``. Its
        inputs are float32 tensors on the agent's device in the env's shapes: raw observations, and actions in the env's scale.
        If observations are dicts, it gets dicts of tensors
    :param reward_fn: Reward of imagined transitions. ``None``: learned as a function of the transition and of whether it ends
        the episode, unless a custom ``dynamics_class`` provides rewards. ``"joint"``: predicted by the dynamics together with
        the next observation, as in the paper. Or a function (or its dotted name) with the inputs of ``termination_fn`` that
        returns float ``(B,)``
    :param prediction_clip_margin: Imagined rewards and observations are clipped to the range of the real data, extended on
        both sides by this many times the range. ``None``: not clipped. Rewards of a ``reward_fn`` are never clipped
    :param min_explained_variance: Fraction of the variance of rewards, and of next observations, that the dynamics must
        explain on the steps since its last fit to be fully used. Below it, batches have fewer imagined rows, and none at half
        of it. ``None``: always fully used, as in the paper
    :param rollout_filter: Filters imagined transitions by the disagreement of the ensemble members: which transitions are kept
        and which branches end early. ``None``: keep every transition and end no branch early, as in the paper. Or
        ``"macura"``, ``"infoprop"``, ``"m2ac"``, or a rule (or its dotted name), see ``trust/filters.py``
    :param dynamics_window: For an env that changes slowly: only this many newest real transitions are used to fit dynamics,
        termination and clip bounds, to check ``reward_fn``, and as start states. Imagined transitions of earlier fits leave,
        too. Real rows of a batch still come from the whole buffer. ``None``: use all. See also :meth:`forget_transitions`
    :param dynamics_class: Subclass of ``DynamicsModel`` (or its dotted name)
    :param dynamics_kwargs: Keyword arguments of ``dynamics_class``

    In ``learn``, a :class:`.RolloutCallback` fits the dynamics and makes model rollouts. To do so at other times, set
    ``rollout_callback_class`` in a subclass, or call :meth:`fit_dynamics` and :meth:`generate_rollouts`.
    """

    #: Defaults that differ from those of the SB3 algorithm.
    DEFAULTS: ClassVar[dict[str, Any]] = {"gradient_steps": 20}
    #: Decides during ``learn`` when to fit the dynamics and when to make model rollouts. A subclass may replace it.
    rollout_callback_class: ClassVar[type[RolloutCallback]] = RolloutCallback

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *args: Any,
        updates_per_transition: float | None = None,
        warmup_actions: float | str | Callable[..., Any] | None = None,
        real_ratio: float | str = "auto",
        model_train_freq: int = 250,
        rollout_batch_size: int = 100_000,
        rollout_schedule: int | str | dict[str, int] | Callable[[int], int] = 1,
        retained_rollouts: int = 4,
        model_buffer_size: int | None = None,
        termination_fn: str | Callable[..., th.Tensor] | None = None,
        reward_fn: str | Callable[..., th.Tensor] | None = None,
        prediction_clip_margin: float | None = 1.0,
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
        uses_default_gradient_steps = "gradient_steps" not in given and updates_per_transition is None
        ours = inspect.signature(ModelBased.__init__).parameters
        defaults = self.DEFAULTS if updates_per_transition is None else {**self.DEFAULTS, "gradient_steps": -1}
        kwargs |= {name: value for name, value in defaults.items() if name not in ours and name not in given}
        bound = signature.bind_partial(policy, env, *args, **kwargs)
        if warning := read_first(policy, env, bound.arguments, takes_dict="MultiInputPolicy" in self.policy_aliases):
            warnings.warn(warning, stacklevel=3)

        self.updates_per_transition = updates_per_transition
        self.warmup_actions = warmup_actions
        # "auto" is replaced by a number in _setup_model.
        self.real_ratio: Any = real_ratio
        self.model_train_freq = model_train_freq
        self.rollout_batch_size = rollout_batch_size
        self.rollout_schedule = rollout_schedule
        self.retained_rollouts = retained_rollouts
        self.model_buffer_size = model_buffer_size
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        self.prediction_clip_margin = prediction_clip_margin
        self.min_explained_variance = min_explained_variance
        self.rollout_filter = rollout_filter
        self.dynamics_window = dynamics_window
        self.dynamics_class = dynamics_class
        self.dynamics_kwargs = dynamics_kwargs
        #: Termination of imagined episodes: a function, or "learned". Determined at construction, then saved with the agent.
        self.termination: Any = None
        self._printed_threads = ""
        self.begin_state()
        super().__init__(*bound.args, **bound.kwargs)
        # ``load`` reads gradient_steps from the file.
        if uses_default_gradient_steps and bound.arguments.get("_init_setup_model", True):
            if (warning := updates_are_few(self)) is not None:
                warnings.warn(warning, stacklevel=3)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # help() and editors show this signature.
        cls.__signature__ = joined_signature(cls, ModelBased, **cls.DEFAULTS)  # type: ignore[attr-defined]

    def _setup_model(self) -> None:
        read_arguments(self)
        check_policy(self.policy_class, self.observation_space)
        self.codec = Codec(self.observation_space, self.action_space)
        if self.updates_per_transition is not None and self.gradient_steps != -1:
            raise ValueError(
                f"updates_per_transition={self.updates_per_transition} replaces gradient_steps={self.gradient_steps}: pass "
                "one of the two"
            )
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
            (self.codec.obs_dim,), self.action_space.shape, seed=self.seed, device=self.device
        )
        self.learned_reward = LearnedReward(
            self.dynamics.obs_dim, self.dynamics.action_dim, seed=self.seed, device=self.device
        )
        # Without a termination_fn, it was read from the env. A loaded agent uses the saved one.
        if self.termination is None or self.termination_fn is not None:
            self.termination = self._find_termination()
        self._warn_of_moving_statistics(7)
        self._warned_of = []
        if callable(self.reward_fn):
            dry_run(self.reward_fn, "reward_fn", self.codec, self.device, returns="float")
        if self.rollout_filter is not None:
            dry_run_filter(self.make_rollout_filter, self.rollout_filter, self.dynamics)
        if self.verbose >= 1:
            print(estimate(self))
        for warning in too_large(self):
            warnings.warn(warning, stacklevel=6)

    def _balanced_ratio(self) -> float:
        """:return: the number that replaces ``real_ratio="auto"``"""
        updates = self.updates_ratio
        # The number of transitions of an episode is unknown, so the smallest ratio is used.
        return balanced_ratio(inf if updates is None else updates)

    def _make_dynamics(self) -> DynamicsModel:
        make: Any = self.dynamics_class
        is_class = isinstance(make, type) and issubclass(make, DynamicsModel) and not inspect.isabstract(make)
        if not is_class and (isinstance(make, type) or not callable(make)):
            raise ValueError(f"dynamics_class={shown(make)} must be a subclass of sb3_mbpo.DynamicsModel")
        kwargs = check_keywords(self.dynamics_kwargs or {}, make, "dynamics_kwargs")
        try:
            dynamics = make(self.codec.obs_dim, self.codec.action_dim, seed=self.seed, device=self.device, **kwargs)
        except TypeError as error:
            raise ValueError(f"dynamics_class={shown(make)} cannot be called as a DynamicsModel is: {error}") from error
        if not isinstance(dynamics, DynamicsModel):
            raise ValueError(f"dynamics_class={shown(make)} made a {type(dynamics).__name__}, no DynamicsModel")
        return dynamics

    def _warn_of_moving_statistics(self, stacklevel: int) -> None:
        warning = None if self.env is None else moving_statistics(self.env)
        if warning is not None:
            warnings.warn(warning, stacklevel=stacklevel)

    def _find_termination(self) -> Any:
        """:return: ``"learned"``, or the function that ``termination_fn`` means in this env"""
        if self.termination_fn is None and self.env is not None:
            known, reason = known_termination(self.env)
            if self.verbose >= 1:
                print(reason)
            return "learned" if known is None else known
        if not callable(self.termination_fn):
            return NeverTerminates() if self.termination_fn == "never" else "learned"
        dry_run(self.termination_fn, "termination_fn", self.codec, self.device)
        return self.termination_fn

    @property
    def waits_for_transitions(self) -> bool:
        """
        Whether updates are paused: after :meth:`forget_transitions` until there are enough transitions for a fit, and while
        another process makes them.
        """
        if self.learns_in_background:
            return True
        if not self.forgot_transitions or self.dynamics_fitted_at is not None:
            return False
        buffer = self.replay_buffer
        needed = min(self.rows_before_fit, buffer.buffer_size * buffer.n_envs)
        return buffer.size() * buffer.n_envs < needed

    def forget_transitions(self, keep: int = 0) -> None:
        """
        Remove old real transitions and all imagined ones. Call this when the env has changed.

        Networks, optimizers, counters and the rollout schedule are kept, and the agent keeps acting with its policy. Updates
        are paused until there are 200 real transitions (or ``learning_starts``, if that is less). Then the dynamics is fitted
        to these, a model rollout is made, and training continues as before. Measurements of the dynamics (k of "auto", the
        imagined fraction, the state of a ``rollout_filter``) are reset.

        It may be called in a callback, or between two calls of ``learn``. Pass ``reset_num_timesteps=False`` to the second
        call; otherwise SB3 acts at random for ``learning_starts`` steps again.

        :param keep: number of newest real transitions to keep, because they are from the changed env
        :raises ValueError: ``keep`` is not a whole number of at least 0
        """
        whole(0).check("forget_transitions: keep", keep)
        self.tell_learner("forget", keep)
        self.replay_buffer.forget(keep)
        self.forgot_transitions = True
        self.dynamics_fitted_at, self.auto_rollout_length, self.imagined_fraction, self.filter_state = None, 1, 1.0, []
        self.forward_errors, self.explained_at_fit, self.prediction_bounds, self.unused_fits = [], [], [], 0
        self._warned_of = [what for what in self._warned_of if what not in ("reward_fn", "termination")]

    def train(self, *args: Any, **kwargs: Any) -> None:
        """Do gradient updates, see SB3. Does nothing while :attr:`waits_for_transitions`."""
        if not self.waits_for_transitions:
            super().train(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not isinstance(callback, BaseCallback):
            callback = CallbackList(callback) if isinstance(callback, list) else ConvertCallback(callback)
        rollouts: Any = BackgroundCallback() if self.learns_in_background else self.rollout_callback_class()
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
        background: bool = False,
    ) -> SelfModelBased:
        """
        Train the agent, see SB3.

        :param total_timesteps: number of env transitions
        :param callback: see SB3
        :param log_interval: number of episodes between two log outputs
        :param tb_log_name: name of the run in TensorBoard; ``None``: the name of the class
        :param reset_num_timesteps: whether ``num_timesteps`` starts at 0; ``lifetime_timesteps`` is never reset
        :param progress_bar: whether to show a progress bar, which also shows the progress of fits and model rollouts
        :param background: whether a second process learns while this one steps the env, for robots that must not wait. It
            makes as many updates per transition as it would here, without a rhythm of its own; ``train_freq`` has no effect.
            A script needs ``if __name__ == "__main__":``. See the guide on real robots
        :return: the agent
        :raises ValueError: an argument is out of range
        :raises RuntimeError: the second process has failed; the agent keeps its transitions
        """
        given = {name: value for name, value in locals().items() if name in LEARN_ARGUMENTS}
        given = read_all(given, LEARN_ARGUMENTS, "learn: ")
        given["tb_log_name"] = tb_log_name or type(self).__name__
        if given["background"]:
            self._check_background()
        self.learns_in_background = bool(given.pop("background"))
        try:
            with self.computing():
                return super().learn(**given)
        finally:
            self.stop_learner()
            self.learns_in_background = False

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Denormals and threads as the agent computes with them. With ``real_ratio=1``, both are left as they are."""
        with ExitStack() as stack:
            # Both change how numbers are rounded. With real_ratio=1, the agent must equal the plain algorithm bit for bit.
            if self.real_ratio < 1:
                stack.enter_context(flush_denormals())
                self._set_threads(stack)
            yield

    def _set_threads(self, stack: ExitStack) -> None:
        """On a CPU, set the number of threads until the stack is closed. It is printed when it changes."""
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
            # Must also run if the env's reset raises.
            self._earlier_timesteps += before - self.num_timesteps
        self.replay_buffer.real_ratio = self.real_ratio
        if self.real_ratio < 1 and self.dynamics_fitted_at is not None and self.replay_buffer.size() == 0:
            warnings.warn(
                f"After {self.lifetime_timesteps} steps, the agent continues with an empty replay buffer, and its dynamics "
                "will forget the old transitions. Save them with save_replay_buffer, and load them with load_replay_buffer",
                stacklevel=3,
            )
        return result

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the env, see SB3. The termination of imagined episodes is kept and compared with the new env's transitions.

        :param env: the new env
        :param force_reset: see SB3
        """
        super().set_env(env, force_reset)
        assert self.env is not None
        self._warned_of = [what for what in self._warned_of if what not in ("reward_fn", "termination")]
        self._warn_of_moving_statistics(3)
        if self.termination_fn is None and not isinstance(self.termination, str):
            known, reason = known_termination(self.env)
            if known != self.termination:
                warnings.warn(
                    f"set_env: imagined episodes still end by {self.termination}, the rule of the first env; for this env: "
                    f"{reason}. Create a new agent, or pass termination_fn",
                    stacklevel=2,
                )

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the agent, see SB3. Also seeds the dynamics, the learned reward and termination, and the model buffer's draws.

        :param seed: the seed; ``None``: nothing is seeded
        """
        super().set_random_seed(seed)
        names = ("dynamics", "learned_reward", "learned_termination", "replay_buffer")
        for part in (getattr(self, name, None) for name in names):
            if part is not None and seed is not None:
                part.seed(seed)
