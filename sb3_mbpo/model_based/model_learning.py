"""How a model-based agent fits the dynamics, measures its accuracy, and makes model rollouts with it."""

import time
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.normalization import normalize_rewards
from sb3_mbpo.buffers.rollout_blocks import ROLLOUT_BLOCK, refill
from sb3_mbpo.checkpoints.training_state import undone_on_error
from sb3_mbpo.dynamics.base import Progress
from sb3_mbpo.dynamics.explained_variance import Explained, constant_errors, explained, smoothed, squared_errors
from sb3_mbpo.model_based.imagining import Imagining
from sb3_mbpo.rewards.audit import audit_rewards, judged_rows
from sb3_mbpo.rollout_schedule import MOST_STEPS, rollout_length
from sb3_mbpo.rollouts import branched_rollout
from sb3_mbpo.terminations.known import KNOWN_TERMINATIONS, disagreement
from sb3_mbpo.trust.auto_rollout_length import drift, reliable_length
from sb3_mbpo.trust.imagined_fraction import imagined_fraction
from sb3_mbpo.trust.prediction_bounds import PredictionBounds
from sb3_mbpo.trust.value_bound import breach, entropy_bonus, odd_scale, q_values, return_bounds
from sb3_mbpo.validation.action_range import MOST_ROWS, rows_for_action_range, unused_range, unused_range_warning
from sb3_mbpo.validation.argument_table import LONGEST_AUTO
from sb3_mbpo.validation.episode_ends import endless, lost_ends_warning
from sb3_mbpo.validation.rules import whole

# Real transitions that an agent needs after `forget_transitions` to fit and train again, docs/benchmarks/changed_world.csv.
ROWS_AFTER_FORGETTING = 200
# Number of real and of imagined rows whose Q-values are checked after a fit.
VALUED_ROWS = 500
# Minimum number of start states for the error of a rollout length to count.
FEWEST_STARTS = 20
# Maximum number of newest real steps per env to measure k and the gate on. Without fits, there may be millions.
MOST_STARTS = 5_000
# Minimum number of steps since the last fit to set the gate by them.
FEWEST_JUDGED = 20
# A warning is issued if the gate stays closed for this many successive fits.
UNUSED_FITS = 3


class ModelLearning(Imagining):
    """
    The part of :class:`ModelBased` that learns the dynamics and makes model rollouts.

    :class:`.RolloutCallback` calls :meth:`fit_dynamics` and :meth:`generate_rollouts` when they are due. They may also be
    called by hand, on any agent with real transitions, and overridden in a subclass.
    """

    real_ratio: Any
    rollout_batch_size: int
    rollout_schedule: Any
    prediction_clip_margin: float | None
    min_explained_variance: float | None
    termination_fn: Any
    resume_callback: Any
    critic: Any

    #: Whether the algorithm learns from the rewards of imagined transitions.
    imagined_rewards_count: ClassVar[bool] = True
    #: Whether the dynamics is used if ``imagined_fraction`` is between 0 and 1.
    uses_partial_trust: ClassVar[bool] = True

    # Number of start states per block, if memory ran out with the default.
    _rollout_block: int | None = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout_block"]

    @property
    def rollout_length(self) -> int:
        """
        The current rollout length k.

        :raises ValueError: the schedule is invalid, or returns something other than a whole number of at least 1
        """
        if self.rollout_schedule == "auto":
            return self.auto_rollout_length
        return rollout_length(self.rollout_schedule, self.lifetime_timesteps)

    @property
    def rows_before_fit(self) -> int:
        """
        Minimum number of real transitions for a fit.

        This is the number that a new agent has at its first fit: an agent loaded without its buffer must not unlearn its
        dynamics on a few transitions. After :meth:`.ModelBased.forget_transitions`, fewer are enough, because the dynamics was
        learned in another env.
        """
        usual = min(self.learning_starts, ROWS_AFTER_FORGETTING) if self.forgot_transitions else self.learning_starts
        return max(self.dynamics.min_transitions, min(usual, self.replay_buffer.buffer_size * self.replay_buffer.n_envs))

    def fit_dynamics(self, progress: Progress | None = None) -> dict[str, Any]:
        """
        Fit the dynamics, the reward and the termination to the real transitions, and set how much the dynamics is used.

        First, the predictions of the last fit are compared with the real steps since then. This sets the fraction of imagined
        rows in a batch (see ``min_explained_variance``) and, with ``rollout_schedule="auto"``, the rollout length k. In the
        first fit, held-out rows set that fraction. To make model rollouts, call :meth:`generate_rollouts`.

        If an error or Ctrl-C ends the call, the agent is restored to its state before it. The metrics are returned and not
        logged: ``agent.logger`` exists only after the first ``learn``. In ``learn``, the next fit is due at the next multiple
        of ``model_train_freq``.

        ``learn`` continues with :meth:`generate_rollouts`, :meth:`judge_values`, :meth:`relabel` and :meth:`adapt_networks`,
        see :meth:`.RolloutCallback.update_model`. An override should call this method, or set ``dynamics_fitted_at`` itself.

        :param progress: called from time to time with a short text about the progress; it may raise to abort the fit
        :return: the metrics that :class:`.RolloutCallback` logs under ``dynamics/``: those of the dynamics, the learned reward
            and the termination; ``explained_reward`` and ``explained_obs``, fractions of variance; ``gate``, "open" or what is
            predicted worst; ``fit_seconds`` and ``fit_cpu_seconds``
        :raises ValueError: there are fewer real transitions than ``dynamics.min_transitions``
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        transitions = self._transitions_for("fit_dynamics", self.dynamics.min_transitions)
        with undone_on_error(self):
            for of, warning in self.odd_ends():
                self._warn_once(of, warning)
            self.check_action_range(transitions)
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
        Make a model rollout: follow the policy in the dynamics from real states, and store the transitions in the model
        buffer.

        The oldest model rollout leaves the model buffer if it holds ``retained_rollouts`` already. The rollout is made even if
        ``imagined_fraction`` is 0.

        If an error or Ctrl-C ends the call, the agent is restored to its state before it, except that evicted imagined
        transitions are not restored. The metrics are returned and not logged, as in :meth:`fit_dynamics`. If memory runs out,
        a warning is issued, and fewer branches are imagined at once from then on.

        :param n: number of start states, drawn from the real ones; ``None``: ``rollout_batch_size``
        :param length: maximum number of steps of each branch; ``None``: ``rollout_length``, the current k
        :param progress: called after each block of branches with a short text; it may raise to abort the rollout
        :return: the metrics that :class:`.RolloutCallback` logs under ``dynamics/``: ``rollout_length``, k; ``branch_length``,
            transitions stored per start state; ``dropped``, number of transitions that were not finite; ``clipped`` and, with
            a ``rollout_filter``, ``filtered``, fractions of the transitions; ``rollout_seconds`` and ``rollout_cpu_seconds``
        :raises ValueError: ``n`` or ``length`` is not a whole number in its range; the dynamics has had no successful fit; or
            there are no real transitions
        :raises MemoryError: there is not enough memory for a single branch
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
        """The fraction of real rows in a batch: ``real_ratio``, or more if ``imagined_fraction`` is below 1."""
        return float(self.real_ratio + (1 - self.real_ratio) * (1 - self.imagined_fraction))

    def _transitions_for(self, caller: str, fewest: int) -> ReplayBufferSamples:
        """
        :param caller: name of the calling method, for the error
        :param fewest: minimum number of transitions
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
                "add them with prefill or load_replay_buffer"
            )
        return transitions

    def fit_reward(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """
        Learn the reward as a function of the transition, unless it is known or predicted by the dynamics.

        :param transitions: all real transitions that the dynamics learns from; the dynamics must have been fitted
        :param progress: called from time to time with a short text
        :return: metrics to log under ``dynamics/``
        """
        if not self.learns_reward or not self.dynamics.usable:
            return {}
        return self.learned_reward.fit(transitions, self.dynamics, progress)

    def adapt_networks(self, transitions: ReplayBufferSamples) -> None:
        """
        Called after each fit of the dynamics, to adapt policy and critics to the data. Does nothing by default.

        :param transitions: all real transitions that the dynamics learns from
        """

    def odd_ends(self) -> Iterator[tuple[str, str]]:
        """
        Check the ends of the real episodes.

        :return: names and texts of the warnings to issue
        """
        buffer = self.replay_buffer
        lost = buffer.lost_ends()
        if lost.any():
            yield "ends", lost_ends_warning(lost, buffer.dones[: buffer.size()] > 0.5)
        # A VecEnv that loses last observations may not report time limits either.
        elif (warning := buffer.reported_limit()) is not None:
            yield "limit", warning
        if (warning := endless(buffer.dones[: buffer.size()])) is not None:
            yield "endless", warning

    def check_action_range(self, transitions: ReplayBufferSamples) -> None:
        """
        Warn, in the first fit with enough transitions, if most of the range of an action has no effect.

        :param transitions: all real transitions that the dynamics learns from
        """
        obs, actions, next_obs = transitions[:3]
        needed = rows_for_action_range(obs.shape[1], actions.shape[1])
        of_last_fit = 0 if (at := self.dynamics_fitted_at) is None else len(obs) - (self.lifetime_timesteps - at)
        if not of_last_fit < needed <= len(obs):
            return
        found = unused_range(*(part[-MOST_ROWS:].cpu().numpy() for part in (obs, actions, next_obs)))
        if (warning := unused_range_warning(found, self.action_space)) is not None:
            self._warn_once("action_range", warning)

    def fit_termination(self, transitions: ReplayBufferSamples) -> dict[str, float | str]:
        """
        Fit the learned termination, or compare the known function with the real terminations.

        :param transitions: all real transitions that the dynamics learns from
        :return: metrics to log under ``dynamics/``
        """
        terminated = transitions.dones.squeeze(1) > 0.5
        if isinstance(self.termination, str):
            actions = self.codec.decode_actions(transitions.actions)
            parts = transitions.observations, actions, transitions.next_observations
            metrics = self.learned_termination.fit(*parts, terminated)
            return {**metrics, "termination": "learned"}
        predicted = self.terminates(*transitions[:3])
        warning = disagreement(predicted, terminated)
        # If the env reports a time limit as a termination, the function is not wrong.
        if warning is not None and not {"limit", "termination"} & set(self._warned_of):
            self._warned_of.append("termination")
            warnings.warn(warning, stacklevel=2)
        wrong = (predicted != terminated).float().mean().item()
        known = self.termination_fn is None and isinstance(self.termination, KNOWN_TERMINATIONS)
        return {"termination_disagreement": wrong, "termination": "known" if known else "given"}

    def audit_reward(self, transitions: ReplayBufferSamples) -> dict[str, float | str]:
        """
        Compare ``reward_fn``, if there is one, with the real rewards. Warns once if it is systematically wrong.

        :param transitions: all real transitions that the dynamics learns from
        :return: metrics to log under ``dynamics/``, see :class:`.audit.RewardAudit`
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
        Fit the learned termination again if it misses an end among the newest real steps, and relabel imagined transitions.

        The policy learns to reach states that end in the env but not in the model. Waiting for the next fit of the dynamics
        could mean a thousand such updates.

        :param n_steps: number of newest steps of each env to check
        :return: metrics to log under ``dynamics/``; empty if no end was missed
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
        # Last, because it cannot be undone.
        return {**metrics, "relabeled": self.relabel()}

    @th.no_grad()
    def relabel(self) -> int:
        """
        Set the dones of imagined transitions by the current learned termination, and adapt their rewards.

        :return: number of changed transitions
        """
        if self.termination != "learned" or not self.imagined_rewards_count:
            return 0
        reward: Any = self.predict_reward if self.learns_reward else None
        return self.replay_buffer.model_buffer.relabel(self.terminates, reward)

    def judge_values(self, transitions: ReplayBufferSamples) -> dict[str, float]:
        """
        Compare the critics' values of some real and imagined rows with the largest possible return. Warns once if they are
        larger. The rows are evenly spaced: no random numbers are drawn.

        :param transitions: all real transitions
        :return: metrics to log under ``dynamics/``: ``q_mean``, ``q_max`` and, if gamma is below 1, ``q_bound``
        """
        buffer = self.replay_buffer.model_buffer
        n_real = len(transitions.rewards)
        places = th.arange(min(n_real, VALUED_ROWS), device=self.device) * n_real // min(n_real, VALUED_ROWS)
        imagined = buffer.evenly_spaced(VALUED_ROWS)
        real = th.cat([transitions.observations[places], transitions.actions[places]], dim=1)
        obs, actions = th.cat([real, imagined[:, : real.shape[1]]]).split(buffer.widths[:2], dim=1)
        policy_obs = self._as_policy_sees(obs)
        values = q_values(self.critic, policy_obs, actions)
        # Learned imagined rewards may be wrong, so only those of a known function count.
        both = self.known_reward is not None and self.imagined_rewards_count
        rewards = th.cat([transitions.rewards, buffer.rewards()]) if both else transitions.rewards
        least, most = normalize_rewards(th.stack(rewards.aminmax()), self._vec_normalize_env).tolist()
        bounds = return_bounds(least, most, self.gamma, entropy_bonus(self))
        size = th.cat([self.codec.flatten(policy_obs), actions], dim=1).norm(dim=1).max().item()
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
        Set k by the accuracy of the dynamics on the newest real steps, which no fit has used yet.

        :param obs: all real observations ``(N, obs_dim)``
        """
        if self.dynamics_fitted_at is None or not self.dynamics.usable:
            return
        unseen = (self.lifetime_timesteps - self.dynamics_fitted_at) // self.n_envs
        # A second predicted step needs a second real step after each start. The first two fits may be closer together.
        if max(self.model_train_freq, unseen * self.n_envs) < FEWEST_STARTS + self.n_envs:
            enough = FEWEST_STARTS + (LONGEST_AUTO - 1) * self.n_envs
            what = f'rollout_schedule="auto" has too few successive steps to measure k, with n_envs={self.n_envs} and'
            remedy = f"k stays {self.auto_rollout_length}. Raise it, to {enough} for up to {LONGEST_AUTO} steps"
            self._warn_once("auto", f"{what} model_train_freq={self.model_train_freq}: {remedy}")
        steps = self.replay_buffer.newest(n := min(unseen, MOST_STARTS))
        errors = drift(self.dynamics, steps, LONGEST_AUTO, FEWEST_STARTS, self.replay_buffer.newest_lost_ends(n))
        if errors:
            self.auto_rollout_length = reliable_length(errors, obs)

    def _explained_since_fit(self, transitions: ReplayBufferSamples) -> Explained | None:
        """
        Variance explained by the dynamics on the real steps since its last fit, before it learns from them; smoothed over the
        fits.

        :param transitions: all real transitions; errors are divided by their variance, or by that of the new steps if larger
        :return: explained variance; ``None`` before the second fit, and if there are too few steps
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
        Set ``imagined_fraction``, and warn if the dynamics stays unused.

        :param of_steps: see :meth:`_explained_since_fit`; ``None``: the explained variance of held-out rows is used, if the
            fit returned it
        :param metrics: metrics of the fit; those of the gate are added
        """
        names = ("explained_reward", "explained_obs")
        of_holdout: dict[str, Any] = {name: metrics.pop(name) for name in names if name in metrics}
        metrics |= {f"holdout_{name}": value for name, value in of_holdout.items()}
        if of_steps is None:
            reward, obs = (float(of_holdout.get(f"explained_{name}", 1.0)) for name in ("reward", "obs"))
        else:
            reward, obs = of_steps.reward, of_steps.obs
        self.explained_at_fit = [reward, obs]
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
                "reward_fn if the reward is known, add to the observation what the next one depends on, or increase "
                "dynamics_kwargs: max_updates. With min_explained_variance=None, the dynamics is always used",
            )

    def _roll_out(self, transitions: ReplayBufferSamples, n: int, length: int, progress: Progress | None) -> dict[str, float]:
        """
        The work of :meth:`generate_rollouts`.

        :param transitions: all real transitions; predictions are clipped to their range
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
                # Every predicted row is returned, unless a rule rejected it or it is not finite.
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
            self._warn_once("dropped", f"{what} (dynamics/dropped){rest}. Check the dynamics, and reward_fn if there is one")
        return metrics

    def _lower_block(self, block: int, fitted: int) -> None:
        """Use blocks of ``fitted`` start states from now on, if memory ran out with ``block``."""
        if fitted >= block:
            return
        if self._rollout_block is None:
            warnings.warn(
                f"Memory ran out in a model rollout of {block} start states; from now on {fitted} are imagined at once. "
                "Reduce rollout_batch_size or model_buffer_size to use less memory",
                stacklevel=2,
            )
        self._rollout_block = fitted

    def _warn_once(self, of: str, warning: str) -> None:
        if of not in self._warned_of:
            self._warned_of.append(of)
            warnings.warn(warning, stacklevel=2)
