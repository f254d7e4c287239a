"""What a model-based agent does with its model: it fits the dynamics, measures how far to trust it, and imagines with it."""

import time
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.replay_buffer import normalize_obs, normalize_rewards
from sb3_mbpo.buffers.rollout_blocks import ROLLOUT_BLOCK, refill
from sb3_mbpo.checkpoints.training_state import undone_on_error
from sb3_mbpo.dynamics.base import Progress
from sb3_mbpo.dynamics.explained_variance import Explained, constant_errors, explained, smoothed, squared_errors
from sb3_mbpo.model_based.imagining import Imagining
from sb3_mbpo.rewards.audit import audit_rewards, judged_rows
from sb3_mbpo.rollouts import LONGEST_AUTO, MOST_STEPS, branched_rollout, rollout_length
from sb3_mbpo.terminations.known import KNOWN_TERMINATIONS, disagreement
from sb3_mbpo.trust.auto_rollout_length import drift, reliable_length
from sb3_mbpo.trust.imagined_fraction import imagined_fraction
from sb3_mbpo.trust.prediction_bounds import PredictionBounds
from sb3_mbpo.trust.value_bound import breach, entropy_bonus, odd_scale, q_values, return_bounds
from sb3_mbpo.validation.episode_ends import endless, lost_ends_warning
from sb3_mbpo.validation.rules import whole

# Real transitions after `forget_transitions` from which on an agent fits and trains again, docs/benchmarks/changed_world.csv.
ROWS_AFTER_FORGETTING = 200
# Real and imagined rows, each, whose Q-values are looked at after a fit.
VALUED_ROWS = 500
# Real steps that an imagined trajectory must have begun at, for its error to count.
FEWEST_STARTS = 20
# Newest real steps of an env that k and the gate are measured on, at most: after long without fits there may be millions.
MOST_STARTS = 5_000
# Steps since the last fit that say enough of the dynamics to set the gate by them.
FEWEST_JUDGED = 20
# Fits in a row after which a closed gate is warned of.
UNUSED_FITS = 3


class ModelLearning(Imagining):
    """
    The part of :class:`ModelBased` that learns a model of the env, and makes model rollouts with it.

    :class:`.RolloutCallback` calls it when that is due. :meth:`fit_dynamics` and :meth:`generate_rollouts` may also be called
    by hand, on any agent with real transitions, and overridden in a subclass.
    """

    real_ratio: Any
    rollout_batch_size: int
    rollout_schedule: Any
    prediction_clip_margin: float | None
    min_explained_variance: float | None
    termination_fn: Any
    dynamics_fitted_at: int | None
    auto_rollout_length: int
    imagined_fraction: float
    forward_errors: list[float]
    prediction_bounds: list[float]
    unused_fits: int
    forgot_transitions: bool
    resume_callback: Any
    critic: Any
    _earlier_timesteps: int
    _warned_of: list[str]
    _warned_of_termination: bool

    #: Whether rewards of imagined transitions are learned from.
    imagined_rewards_count: ClassVar[bool] = True
    #: Whether a dynamics that has earned a part of the imagined rows is used at all.
    uses_partial_trust: ClassVar[bool] = True

    # Start states imagined at once, if memory had no room for as many as usual.
    _rollout_block: int | None = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout_block"]

    @property
    def lifetime_timesteps(self) -> int:
        """Total env transitions over all ``learn`` calls, never reset. Fits and k are scheduled on it."""
        return self._earlier_timesteps + self.num_timesteps

    @property
    def rollout_length(self) -> int:
        """
        The rollout length k of a refill now.

        :raises ValueError: the schedule is none, or says something else than a whole number of at least 1
        """
        if self.rollout_schedule == "auto":
            return self.auto_rollout_length
        return rollout_length(self.rollout_schedule, self.lifetime_timesteps)

    @property
    def rows_before_fit(self) -> int:
        """
        Fewest real transitions that the dynamics is fitted to.

        As many as a new agent has at its first fit: one that was loaded without its buffer must not forget what it learned for
        the sake of a handful. After :meth:`.ModelBased.forget_transitions`, when what it learned is of another world, fewer.
        """
        usual = min(self.learning_starts, ROWS_AFTER_FORGETTING) if self.forgot_transitions else self.learning_starts
        return max(self.dynamics.min_transitions, min(usual, self.replay_buffer.buffer_size * self.replay_buffer.n_envs))

    def fit_dynamics(self, progress: Progress | None = None) -> dict[str, Any]:
        """
        Fit the dynamics, the reward and the termination to the real transitions, and set how far the dynamics is trusted.

        First, the dynamics of the last fit is compared with the real steps since then. This sets the share of imagined rows in
        a batch (see ``min_explained_variance``) and, under ``rollout_schedule="auto"``, the rollout length k. In the first
        fit, the held-out rows set that share. Model rollouts are not made here: see :meth:`generate_rollouts`.

        An error, or Ctrl-C, leaves the agent as it was before the call. Nothing is logged: what is returned is for
        ``agent.logger``, which exists from the first ``learn`` on. The next fit in ``learn`` is due when the next multiple of
        ``model_train_freq`` has passed.

        ``learn`` goes on with :meth:`generate_rollouts`, :meth:`judge_values`, :meth:`relabel` and :meth:`adapt_networks`, see
        :meth:`.RolloutCallback.update_model`. An override should call this method, or set ``dynamics_fitted_at`` as it does.

        :param progress: called now and then with a few words on how far the fit is; it may raise, to break the fit off
        :return: what :class:`.RolloutCallback` logs under ``dynamics/``: the metrics of the dynamics and of what is learned
            beside it; ``explained_reward`` and ``explained_obs``, shares of variance; ``gate``, which is "open" or what is
            predicted worst; ``fit_seconds`` and ``fit_cpu_seconds``
        :raises ValueError: there are fewer real transitions than ``dynamics.min_transitions``
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        transitions = self._transitions_for("fit_dynamics", self.dynamics.min_transitions)
        with undone_on_error(self):
            for of, warning in self.odd_ends():
                self._warn_once(of, warning)
            if self.rollout_schedule == "auto":
                self._measure_length(transitions.observations)
            of_steps = self._explained_since_fit(transitions)
            metrics: dict[str, Any] = self.dynamics.fit(self.without_unused_rewards(transitions), progress=progress)
            metrics |= self.fit_reward(transitions, progress)
            metrics |= self.fit_termination(transitions) | self.audit_reward(transitions)
            self._set_gate(of_steps, metrics)
            self.dynamics_fitted_at = self.lifetime_timesteps
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return metrics | {"fit_seconds": seconds, "fit_cpu_seconds": cpu_seconds}

    def generate_rollouts(
        self, n: int | None = None, length: int | None = None, progress: Progress | None = None
    ) -> dict[str, float]:
        """
        Make a model rollout: follow the policy from real states in the dynamics, and put what it meets into the model buffer.

        The transitions count as one refill of the model buffer: the oldest refill leaves if ``retained_rollouts`` are there.
        They are made even where the dynamics has not earned any share of a batch.

        An error, or Ctrl-C, leaves the agent as it was before the call, except that imagined transitions which had left by
        then do not come back. Nothing is logged, as in :meth:`fit_dynamics`. Where memory runs out, a warning says so, and
        fewer branches are imagined at once from then on.

        :param n: number of start states, drawn from the real ones; ``None``: ``rollout_batch_size``
        :param length: steps of each branch, fewer where it ends; ``None``: ``rollout_length``, the scheduled k
        :param progress: called after each block of branches with a few words; it may raise, to break the rollout off
        :return: what :class:`.RolloutCallback` logs under ``dynamics/``: ``rollout_length``, k; ``branch_length``, transitions
            stored for each start state; ``dropped``, number of transitions that were not finite; ``clipped`` and, with a
            ``rollout_filter``, ``filtered``, shares of the transitions; ``rollout_seconds`` and ``rollout_cpu_seconds``
        :raises ValueError: ``n`` or ``length`` is no whole number in its range; the dynamics has had no good fit; there are no
            real transitions
        :raises MemoryError: there is no memory for a single branch
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        n = self.rollout_batch_size if n is None else n
        length = self.rollout_length if length is None else length
        whole(1).check("generate_rollouts: n", n)
        whole(1, MOST_STEPS).check("generate_rollouts: length", length)
        if self.dynamics_fitted_at is None or not self.dynamics.usable:
            raise ValueError("generate_rollouts: the dynamics has had no good fit yet. Call fit_dynamics first")
        transitions = self._transitions_for("generate_rollouts", 1)
        with undone_on_error(self):
            metrics = self._roll_out(transitions, n, length, progress)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return {"rollout_length": length, **metrics, "rollout_seconds": seconds, "rollout_cpu_seconds": cpu_seconds}

    @property
    def real_share_of_batches(self) -> float:
        """The gate: a batch has as many imagined rows as the dynamics has earned, at most what ``real_ratio`` leaves."""
        return float(self.real_ratio + (1 - self.real_ratio) * (1 - self.imagined_fraction))

    def _transitions_for(self, caller: str, fewest: int) -> ReplayBufferSamples:
        """
        :return: all real transitions that the dynamics learns from
        :raises ValueError: there are fewer than ``fewest``, or none
        """
        n, fewest = 0, max(fewest, 1)
        if self.replay_buffer.size():
            transitions = self.replay_buffer.real_transitions(self.dynamics_window)
            n = len(transitions.rewards)
        if n < fewest:
            raise ValueError(
                f"{caller}: {n} real transitions are too few, there must be at least {fewest}. Collect them with learn, or "
                "put them in with prefill or load_replay_buffer"
            )
        return transitions

    def fit_reward(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """
        Learn the reward as a function of the transition, unless it is known or predicted by the dynamics.

        :param transitions: all real transitions, as the dynamics gets them; the dynamics must have been fitted
        :param progress: called now and then with a few words
        :return: what to log, under ``dynamics/``
        """
        if not self.learns_reward or not self.dynamics.usable:
            return {}
        return self.learned_reward.fit(transitions, self.dynamics, progress)

    def adapt_networks(self, transitions: ReplayBufferSamples) -> None:
        """
        Called after each fit of the dynamics, for what policy and critics need of the data: nothing here.

        :param transitions: all real transitions, as the dynamics gets them
        """

    def odd_ends(self) -> Iterator[tuple[str, str]]:
        """:return: what the ends of real episodes give reason to warn of: its name, and the warning"""
        buffer = self.replay_buffer
        lost = buffer.lost_ends()
        if lost.any():
            yield "ends", lost_ends_warning(lost, buffer.dones[: buffer.size()] > 0.5)
        # A VecEnv that loses last observations may not tell of time limits either.
        elif (warning := buffer.reported_limit()) is not None:
            yield "limit", warning
        if (warning := endless(buffer.dones[: buffer.size()])) is not None:
            yield "endless", warning

    def fit_termination(self, transitions: ReplayBufferSamples) -> dict[str, float | str]:
        """
        Learn from the real terminations, or hold the known function against them.

        :param transitions: all real transitions, as the dynamics gets them
        :return: what to log, under ``dynamics/``
        """
        terminated = transitions.dones.squeeze(1) > 0.5
        if isinstance(self.termination, str):
            metrics = self.learned_termination.fit(*self._in_env_terms(transitions[:3]), terminated)
            return {**metrics, "termination": "learned"}
        predicted = self.terminates(*transitions[:3])
        warning = disagreement(predicted, terminated)
        # A time limit that the env reports as a termination is no fault of the function.
        if warning is not None and not self._warned_of_termination and "limit" not in self._warned_of:
            self._warned_of_termination = True
            warnings.warn(warning, stacklevel=2)
        wrong = (predicted != terminated).float().mean().item()
        known = self.termination_fn is None and isinstance(self.termination, KNOWN_TERMINATIONS)
        return {"termination_disagreement": wrong, "termination": "known" if known else "given"}

    def audit_reward(self, transitions: ReplayBufferSamples) -> dict[str, float | str]:
        """
        Compare ``reward_fn``, if there is one, with the real rewards; warn once where it is systematically wrong.

        :param transitions: real ones, as the dynamics gets them
        :return: what to log, under ``dynamics/``: see :class:`.audit.RewardAudit`
        """
        known_reward = self.known_reward
        if known_reward is None:
            return {}
        rows = judged_rows(transitions)
        judged = ReplayBufferSamples(*(part[rows] for part in transitions[:5]))
        predicted = known_reward(*judged[:3]) if len(rows) else judged.rewards
        audit = audit_rewards(predicted, judged)
        if audit.warning is not None and "reward_fn" not in self._warned_of:
            self._warned_of.append("reward_fn")
            warnings.warn(audit.warning, stacklevel=2)
        return {"reward_disagreement": audit.disagreement}

    def refit_termination(self, n_steps: int) -> dict[str, Any]:
        """
        Fit the learned termination again if it misses an end among the newest real steps, and relabel what was imagined.

        A policy finds states that the model does not know to end, and learns to go there: until the next fit of the dynamics,
        that may be a thousand updates.

        :param n_steps: newest steps of each env to look at
        :return: what to log, under ``dynamics/``; empty if no end was missed
        """
        buffer = self.replay_buffer
        if not buffer.newest(n_steps).dones.any():
            return {}
        transitions = buffer.real_transitions(n_steps * self.n_envs)
        ended = transitions.dones.squeeze(1) > 0.5
        if self.terminates(*(part[ended] for part in transitions[:3])).all():
            return {}
        with undone_on_error(self):
            metrics = self.fit_termination(buffer.real_transitions(self.dynamics_window))
        # Last, for nothing takes it back.
        return {**metrics, "relabeled": self.relabel()}

    @th.no_grad()
    def relabel(self) -> int:
        """
        Let imagined transitions end where the learned termination says so now, with the reward that this makes.

        :return: how many have changed
        """
        if self.termination != "learned" or not self.imagined_rewards_count:
            return 0
        reward: Any = self.predict_reward if self.learns_reward else None
        return self.replay_buffer.model_buffer.relabel(self.terminates, reward)

    def judge_values(self, transitions: ReplayBufferSamples) -> dict[str, float]:
        """
        Compare the critics' values of some real and imagined rows with the largest return that the rewards allow; warn once of
        larger ones. The rows are always at the same places: nothing is drawn.

        :param transitions: all real transitions
        :return: what to log, under ``dynamics/``: ``q_mean``, ``q_max`` and, with a discount, ``q_bound``
        """
        buffer, env = self.replay_buffer.model_buffer, self._vec_normalize_env
        n_real = len(transitions.rewards)
        places = th.arange(min(n_real, VALUED_ROWS), device=self.device) * n_real // min(n_real, VALUED_ROWS)
        imagined = buffer.evenly_spaced(VALUED_ROWS)
        real = th.cat([transitions.observations[places], transitions.actions[places]], dim=1)
        obs, actions = th.cat([real, imagined[:, : real.shape[1]]]).split(buffer.widths[:2], dim=1)
        obs = normalize_obs(obs.reshape(-1, *self.observation_space.shape), env)
        values = q_values(self.critic, obs, actions)
        # Imagined rewards are the model's own word; those of a known function count as seen.
        both = self.known_reward is not None and self.imagined_rewards_count
        rewards = th.cat([transitions.rewards, buffer.rewards()]) if both else transitions.rewards
        least, most = normalize_rewards(th.stack(rewards.aminmax()), env).tolist()
        bounds = return_bounds(least, most, self.gamma, entropy_bonus(self))
        size = th.cat([obs.flatten(1), actions], dim=1).norm(dim=1).max().item()
        for of, warning in (
            ("values", breach(values.max().item(), bounds, size)),
            ("rewards", odd_scale(least, most, n_real)),
        ):
            if warning is not None:
                self._warn_once(of, warning)
        metrics = {"q_mean": values.mean().item(), "q_max": values.max().item()}
        return metrics if bounds is None else metrics | {"q_bound": bounds[1]}

    def _measure_length(self, obs: th.Tensor) -> None:
        """
        Set k by how the dynamics predicts the newest real steps, which it has not seen before the fit that comes now.

        :param obs: all real observations
        """
        if self.dynamics_fitted_at is None or not self.dynamics.usable:
            return
        unseen = (self.lifetime_timesteps - self.dynamics_fitted_at) // self.n_envs
        # Two steps in a row need a second real step after each start. The first two fits may be nearer to each other.
        if max(self.model_train_freq, unseen * self.n_envs) < FEWEST_STARTS + self.n_envs:
            enough = FEWEST_STARTS + (LONGEST_AUTO - 1) * self.n_envs
            what = f'rollout_schedule="auto" has too few steps in a row to measure k, with n_envs={self.n_envs} and'
            remedy = f"k stays {self.auto_rollout_length}. Raise it, to {enough} for up to {LONGEST_AUTO} steps"
            self._warn_once("auto", f"{what} model_train_freq={self.model_train_freq}: {remedy}")
        steps = self.replay_buffer.newest(n := min(unseen, MOST_STARTS))
        errors = drift(self.dynamics, steps, LONGEST_AUTO, FEWEST_STARTS, self.replay_buffer.newest_lost_ends(n))
        if errors:
            self.auto_rollout_length = reliable_length(errors, obs)

    def _explained_since_fit(self, transitions: ReplayBufferSamples) -> Explained | None:
        """
        What the dynamics explains of the real steps since its last fit, before it learns from them; smoothed over the fits.

        :param transitions: all real transitions: their variance is the unit, unless that of the new ones is larger
        :return: ``None`` before the second fit, and for too few steps
        """
        if self.dynamics_fitted_at is None or not self.dynamics.usable:
            return None
        unseen = (self.lifetime_timesteps - self.dynamics_fitted_at) // self.n_envs
        steps = self.replay_buffer.real_transitions(min(unseen, MOST_STARTS) * self.n_envs)
        if len(steps.rewards) < FEWEST_JUDGED:
            return None
        of_constant = th.maximum(constant_errors(transitions), constant_errors(steps))
        errors = squared_errors(self.predict_mean(steps), steps)
        self.forward_errors = smoothed(self.forward_errors, errors, of_constant)
        smooth = th.tensor(self.forward_errors, dtype=th.float64, device=of_constant.device)
        return explained(smooth, of_constant, len(steps.rewards))

    def _set_gate(self, of_steps: Explained | None, metrics: dict[str, Any]) -> None:
        """
        Decide which share of the imagined rows the dynamics has earned, and warn where it stays unused.

        :param of_steps: see :meth:`_explained_since_fit`; ``None``: the fit's own hold-out rows count, if it returned them
        :param metrics: of the fit; gets what is logged of the gate
        """
        names = ("explained_reward", "explained_obs")
        of_holdout: dict[str, Any] = {name: metrics.pop(name) for name in names if name in metrics}
        metrics |= {f"holdout_{name}": value for name, value in of_holdout.items()}
        if of_steps is None:
            reward, obs = (float(of_holdout.get(f"explained_{name}", 1.0)) for name in ("reward", "obs"))
        else:
            reward, obs = of_steps.reward, of_steps.obs
        metrics |= {"explained_reward": reward, "explained_obs": obs}
        judged_reward = reward if self.known_reward is None else 1.0
        self.imagined_fraction = imagined_fraction(judged_reward, obs, self.min_explained_variance)
        to_blame = "reward" if judged_reward < obs else "observation"
        if to_blame == "observation" and of_steps is not None:
            to_blame += f", dimensions {of_steps.worst_dimensions}"
        metrics["gate"] = "open" if self.imagined_fraction == 1 else to_blame
        used = self.imagined_fraction > 0 if self.uses_partial_trust else self.imagined_fraction == 1
        self.unused_fits = 0 if used else self.unused_fits + 1
        if self.unused_fits >= UNUSED_FITS:
            self._warn_once(
                "unused",
                f"The dynamics was not used after {self.unused_fits} fits in a row: all batches are real. It explains "
                f"{obs:.2f} of the variance of the observations and {reward:.2f} of that of the rewards "
                f"(min_explained_variance={self.min_explained_variance}); the {to_blame} is predicted worst. Pass "
                "reward_fn if the reward is known, add to the observation what the next one depends on, or raise "
                "dynamics_kwargs: max_updates. min_explained_variance=None uses the dynamics whatever it explains",
            )

    def _roll_out(self, transitions: ReplayBufferSamples, n: int, length: int, progress: Progress | None) -> dict[str, float]:
        """
        The work of :meth:`generate_rollouts`.

        :param transitions: all real transitions: their range bounds what is imagined
        """
        model_buffer = self.replay_buffer.model_buffer
        model_buffer.begin_refill(n * length)
        bounds = PredictionBounds(transitions, self.prediction_clip_margin)
        dynamics, rollout_filter = bounds.wrap(self.imagined_dynamics), self.make_rollout_filter(transitions)
        start_obs = self.replay_buffer.start_states(n, self.dynamics_window)
        stored: list[int] = []
        lost: list[int] = []
        block = self._rollout_block or ROLLOUT_BLOCK.get(self.device.type, 100_000)
        with self.imagining() as policy:

            def let_through() -> int:
                return bounds.rows - (0 if rollout_filter is None else rollout_filter.left_out)

            def imagine(start_obs: th.Tensor) -> ReplayBufferSamples:
                before = let_through()
                imagined = branched_rollout(dynamics, policy, self.terminates, start_obs, length, rollout_filter)
                # Every predicted row comes back, unless a rule left it out or it is not finite.
                stored.append(len(imagined.rewards))
                lost.append(let_through() - before - stored[-1])
                return imagined

            fitted = refill(model_buffer, imagine, start_obs, block, progress or (lambda what: None))
        self._lower_block(min(block, n), fitted)
        metrics = {"branch_length": sum(stored) / n, "dropped": sum(lost), "clipped": bounds.clipped}
        if rollout_filter is not None:
            self.filter_state = rollout_filter.memory
            metrics["filtered"] = rollout_filter.left_out / max(bounds.rows, 1)
        if dropped := sum(lost):
            what = f"{dropped:,} of {bounds.rows:,} imagined transitions were not finite and were left out"
            rest = "" if model_buffer.refills[-1] else "; nothing new is imagined until the next fit"
            self._warn_once("dropped", f"{what} (dynamics/dropped){rest}. Look at the dynamics, at reward_fn if there is one")
        return metrics

    def _lower_block(self, block: int, fitted: int) -> None:
        """Remember that memory had room for ``fitted`` start states at once, fewer than the ``block`` that was tried."""
        if fitted >= block:
            return
        if self._rollout_block is None:
            warnings.warn(
                f"Memory ran out in a rollout of {block} start states; from now on {fitted} are imagined at once. Lower "
                "rollout_batch_size or model_buffer_size to leave more room",
                stacklevel=2,
            )
        self._rollout_block = fitted

    def _warn_once(self, of: str, warning: str) -> None:
        if of not in self._warned_of:
            self._warned_of.append(of)
            warnings.warn(warning, stacklevel=2)
