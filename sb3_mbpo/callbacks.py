"""What MBPO does between collecting and training: fit the dynamics when due, set k, refill the model buffer."""

import time
import warnings
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers import normalize_obs, normalize_rewards
from sb3_mbpo.drift import drift
from sb3_mbpo.plausible import Plausible
from sb3_mbpo.refill import ROLLOUT_BLOCK, refill
from sb3_mbpo.rollouts import LONGEST_AUTO, branched_rollout
from sb3_mbpo.training_state import undone_on_error
from sb3_mbpo.trust import Explained, constant_errors, explained, imagined_share, reliable_length, smoothed, squared_errors
from sb3_mbpo.value_bound import breach, entropy_bonus, odd_scale, q_values, return_bounds

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
# Between two fits of the dynamics it is looked so often whether the learned termination has missed a real one.
LOOKS_AT_ENDS = 10


class RolloutCallback(BaseCallback):
    """
    Fits, and refills the model buffer, when that is due; MBPO installs it by itself.

    It works on the agent and holds no state of its own, so a run may be cut and continued anywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Shows how far a fit or a rollout is, if there is one.
        self.progress_bar: ProgressBarCallback | None = None
        #: Start states imagined at once, if memory had no room for as many as usual.
        self.lowered_block: int | None = None
        # The agent: any class that mixes in ModelBased. SB3's own annotation knows only BaseAlgorithm.
        self.model: Any

    def _on_step(self) -> bool:
        return True

    def on_resume(self) -> None:
        """A run that was left in ``train()`` goes on there, with no end of a rollout before it."""
        self._mix()

    def _on_rollout_end(self) -> None:
        if self._due():
            try:
                with undone_on_error(self.model):
                    transitions = self._fit()
                    if self.model.dynamics.usable and self.model.imagined_share > 0:
                        self._refill(transitions)
                    else:
                        # An empty one: the next attempt comes with the next fit, not with the next step.
                        self.model.replay_buffer.model_buffer.begin_refill()
                    self._judge_values(transitions)
                    self.model.dynamics_fitted_at = self.model.lifetime_timesteps
                # Last, for nothing takes them back.
                self._relabel()
                self.model.adapt_networks(transitions)
            finally:
                self._show("")
        else:
            self._learn_missed_ends()
        self._mix()
        self._record_state()

    def _due(self) -> bool:
        """
        The first time right before the first update, then whenever a multiple of ``model_train_freq`` was passed.

        An agent loaded without its imagined data starts with a fit as well.
        """
        agent = self.model
        # SB3 trains only past learning_starts, and never without gradient steps.
        if agent.real_ratio == 1 or agent.gradient_steps == 0 or agent.num_timesteps <= agent.learning_starts:
            return False
        buffer = agent.replay_buffer
        if buffer.size() * buffer.n_envs < agent.rows_before_fit:
            return False
        frequency, fitted_at = agent.model_train_freq, agent.dynamics_fitted_at
        first = fitted_at is None or not buffer.model_buffer.refills
        if not first and agent.lifetime_timesteps // frequency <= fitted_at // frequency:
            return False
        # Asked last, for it looks at all rows: ends whose last observation was lost are no transitions to learn from.
        return len(buffer.real_transitions(agent.dynamics_window).rewards) >= agent.dynamics.min_transitions

    def _learn_missed_ends(self) -> None:
        """
        Fit the learned termination again where it has missed a real one since the last look.

        A policy finds states that the model does not know to end, and learns to go there: until the next fit of the dynamics,
        that may be a thousand updates.
        """
        agent = self.model
        buffer, every = agent.replay_buffer, max(agent.model_train_freq // LOOKS_AT_ENDS, agent.n_envs)
        now, new = agent.lifetime_timesteps, self.locals.get("num_collected_steps", 0) * agent.n_envs
        if agent.termination != "learned" or not len(buffer.model_buffer) or now // every == (now - new) // every:
            return
        steps = max(new, every) // agent.n_envs
        if not buffer.newest(steps).dones.any():
            return
        transitions = buffer.real_transitions(steps * agent.n_envs)
        ended = transitions.dones.squeeze(1) > 0.5
        if agent.terminates(*(part[ended] for part in transitions[:3])).all():
            return
        with undone_on_error(agent):
            metrics = agent.fit_termination(buffer.real_transitions(agent.dynamics_window))
        metrics["relabeled"] = self._relabel()
        for name, value in metrics.items():
            self.logger.record(f"dynamics/{name}", value, exclude="tensorboard" if isinstance(value, str) else None)

    @th.no_grad()
    def _relabel(self) -> int:
        """
        Let imagined transitions end where the learned termination says so now, with the reward that this makes.

        :return: how many have changed
        """
        agent = self.model
        if agent.termination != "learned":
            return 0
        reward = agent.predict_reward if agent.learns_reward else None
        return agent.replay_buffer.model_buffer.relabel(agent.terminates, reward)

    def _measure_length(self, obs: th.Tensor) -> None:
        """
        Set k by how the dynamics predicts the newest real steps, which it has not seen before the fit that comes now.

        :param obs: all real observations
        """
        agent = self.model
        if agent.dynamics_fitted_at is None or not agent.dynamics.usable:
            return
        unseen = (agent.lifetime_timesteps - agent.dynamics_fitted_at) // agent.n_envs
        # Two steps in a row need a second real step after each start. The first two fits may be nearer to each other.
        if max(agent.model_train_freq, unseen * agent.n_envs) < FEWEST_STARTS + agent.n_envs:
            enough = FEWEST_STARTS + (LONGEST_AUTO - 1) * agent.n_envs
            what = f'rollout_schedule="auto" has too few steps in a row to measure k, with n_envs={agent.n_envs} and'
            remedy = f"k stays {agent.trusted_length}. Raise it, to {enough} for up to {LONGEST_AUTO} steps"
            self._warn_once("auto", f"{what} model_train_freq={agent.model_train_freq}: {remedy}")
        steps = agent.replay_buffer.newest(n := min(unseen, MOST_STARTS))
        errors = drift(agent.dynamics, steps, LONGEST_AUTO, FEWEST_STARTS, agent.replay_buffer.newest_lost_ends(n))
        if errors:
            agent.trusted_length = reliable_length(errors, obs)

    def _fit(self) -> ReplayBufferSamples:
        """Measure k and what is explained, fit the dynamics and what is learned beside it, and return all real transitions."""
        started, cpu_started = time.perf_counter(), time.process_time()
        agent = self.model
        transitions = agent.replay_buffer.real_transitions(agent.dynamics_window)
        for of, warning in agent.odd_ends():
            self._warn_once(of, warning)
        if agent.rollout_schedule == "auto":
            self._measure_length(transitions.observations)
        of_steps = self._explained_since_fit(transitions)
        metrics = agent.dynamics.fit(agent.without_unused_rewards(transitions), progress=self._say)
        metrics |= agent.fit_reward(transitions, self._say)
        metrics |= agent.fit_termination(transitions) | agent.audit_reward(transitions)
        self._set_gate(of_steps, metrics)
        for name, value in metrics.items():
            self.logger.record(f"dynamics/{name}", value, exclude="tensorboard" if isinstance(value, str) else None)
        self.logger.record("dynamics/fit_seconds", time.perf_counter() - started)
        self.logger.record("dynamics/fit_cpu_seconds", time.process_time() - cpu_started)
        return transitions

    def _explained_since_fit(self, transitions: ReplayBufferSamples) -> Explained | None:
        """
        What the dynamics explains of the real steps since its last fit, before it learns from them; smoothed over the fits.

        :param transitions: all real transitions: their variance is the unit, unless that of the new ones is larger
        :return: ``None`` before the second fit, and for too few steps
        """
        agent = self.model
        if agent.dynamics_fitted_at is None or not agent.dynamics.usable:
            return None
        unseen = (agent.lifetime_timesteps - agent.dynamics_fitted_at) // agent.n_envs
        steps = agent.replay_buffer.real_transitions(min(unseen, MOST_STARTS) * agent.n_envs)
        if len(steps.rewards) < FEWEST_JUDGED:
            return None
        of_constant = th.maximum(constant_errors(transitions), constant_errors(steps))
        errors = squared_errors(agent.predict_mean(steps), steps)
        agent.forward_errors = smoothed(agent.forward_errors, errors, of_constant)
        smooth = th.tensor(agent.forward_errors, dtype=th.float64, device=of_constant.device)
        return explained(smooth, of_constant, len(steps.rewards))

    def _set_gate(self, of_steps: Explained | None, metrics: dict[str, Any]) -> None:
        """
        Decide which share of the imagined rows the dynamics has earned, log what it explains, and warn where it stays unused.

        :param of_steps: see :meth:`_explained_since_fit`; ``None``: the fit's own hold-out rows count, if it says so
        :param metrics: of the fit; gets what is logged
        """
        agent = self.model
        names = ("explained_reward", "explained_obs")
        of_holdout: dict[str, Any] = {name: metrics.pop(name) for name in names if name in metrics}
        metrics |= {f"holdout_{name}": value for name, value in of_holdout.items()}
        if of_steps is None:
            reward, obs = (float(of_holdout.get(f"explained_{name}", 1.0)) for name in ("reward", "obs"))
        else:
            reward, obs = of_steps.reward, of_steps.obs
        metrics |= {"explained_reward": reward, "explained_obs": obs}
        judged_reward = reward if agent.known_reward is None else 1.0
        agent.imagined_share = imagined_share(judged_reward, obs, agent.min_explained_variance)
        to_blame = "reward" if judged_reward < obs else "observation"
        if to_blame == "observation" and of_steps is not None:
            to_blame += f", dimensions {of_steps.worst_dimensions}"
        metrics["gate"] = "open" if agent.imagined_share == 1 else to_blame
        agent.unused_fits = 0 if agent.imagined_share > 0 else agent.unused_fits + 1
        if agent.unused_fits >= UNUSED_FITS:
            self._warn_once(
                "unused",
                f"The dynamics was not used after {agent.unused_fits} fits in a row: all batches are real. It explains "
                f"{obs:.2f} of the variance of the observations and {reward:.2f} of that of the rewards "
                f"(min_explained_variance={agent.min_explained_variance}); the {to_blame} is predicted worst. Pass "
                "reward_fn if the reward is known, add to the observation what the next one depends on, or raise "
                "dynamics_kwargs: max_updates. min_explained_variance=None uses the dynamics whatever it explains",
            )

    def _refill(self, transitions: ReplayBufferSamples | None = None) -> None:
        """
        Imagine ``rollout_batch_size`` branches of the scheduled length from real states, with the current policy.

        :param transitions: all real transitions, if they are at hand: their range bounds what is imagined
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        agent = self.model
        length = agent.rollout_length
        model_buffer = agent.replay_buffer.model_buffer
        model_buffer.begin_refill(agent.rollout_batch_size * length)
        if transitions is None:
            transitions = agent.replay_buffer.real_transitions(agent.dynamics_window)
        plausible = Plausible(transitions, agent.imagined_margin)
        dynamics, filtering = plausible.within(agent.imagined_dynamics), agent.filtering(transitions)
        start_obs = agent.replay_buffer.start_states(agent.rollout_batch_size, agent.dynamics_window)
        stored: list[int] = []
        lost: list[int] = []
        block = self.lowered_block or ROLLOUT_BLOCK.get(agent.device.type, 100_000)
        with agent.imagining() as policy:

            def let_through() -> int:
                return plausible.rows - (0 if filtering is None else filtering.left_out)

            def imagine(start_obs: th.Tensor) -> ReplayBufferSamples:
                before = let_through()
                imagined = branched_rollout(dynamics, policy, agent.terminates, start_obs, length, filtering)
                # Every predicted row comes back, unless a rule left it out or it is not finite.
                stored.append(len(imagined.rewards))
                lost.append(let_through() - before - stored[-1])
                return imagined

            fitted = refill(model_buffer, imagine, start_obs, block, self._say)
        self._lower_block(min(block, len(start_obs)), fitted)
        if filtering is not None:
            agent.filter_memory = filtering.memory
            self.logger.record("dynamics/filtered", filtering.left_out / max(plausible.rows, 1))
        self.logger.record("dynamics/rollout_length", length)
        self.logger.record("dynamics/branch_length", sum(stored) / len(start_obs))
        self.logger.record("dynamics/dropped", dropped := sum(lost))
        self.logger.record("dynamics/clipped", plausible.clipped)
        self.logger.record("dynamics/rollout_seconds", time.perf_counter() - started)
        self.logger.record("dynamics/rollout_cpu_seconds", time.process_time() - cpu_started)
        if dropped:
            what = f"{dropped:,} of {plausible.rows:,} imagined transitions were not finite and were left out"
            rest = "" if model_buffer.refills[-1] else "; nothing new is imagined until the next fit"
            self._warn_once("dropped", f"{what} (dynamics/dropped){rest}. Look at the dynamics, at reward_fn if there is one")

    def _lower_block(self, block: int, fitted: int) -> None:
        """Remember that memory had room for ``fitted`` start states at once, fewer than the ``block`` that was tried."""
        if fitted >= block:
            return
        if self.lowered_block is None:
            warnings.warn(
                f"Memory ran out in a rollout of {block} start states; from now on {fitted} are imagined at once. Lower "
                "rollout_batch_size or model_buffer_size to leave more room",
                stacklevel=2,
            )
        self.lowered_block = fitted

    def _judge_values(self, transitions: ReplayBufferSamples) -> None:
        """
        Log the critics' values of some real and imagined rows, always at the same places: nothing is drawn.

        :param transitions: all real transitions
        """
        agent = self.model
        buffer, env = agent.replay_buffer.model_buffer, agent._vec_normalize_env
        n_real = len(transitions.rewards)
        places = th.arange(min(n_real, VALUED_ROWS), device=agent.device) * n_real // min(n_real, VALUED_ROWS)
        imagined = buffer.spread(VALUED_ROWS)
        real = th.cat([transitions.observations[places], transitions.actions[places]], dim=1)
        obs, actions = th.cat([real, imagined[:, : real.shape[1]]]).split(buffer.widths[:2], dim=1)
        obs = normalize_obs(obs.reshape(-1, *agent.observation_space.shape), env)
        values = q_values(agent.critic, obs, actions)
        # Imagined rewards are the model's own word; those of a known function count as seen.
        rewards = transitions.rewards if agent.known_reward is None else th.cat([transitions.rewards, buffer.rewards()])
        least, most = normalize_rewards(th.stack(rewards.aminmax()), env).tolist()
        bounds = return_bounds(least, most, agent.gamma, entropy_bonus(agent))
        self.logger.record("dynamics/q_mean", values.mean().item())
        self.logger.record("dynamics/q_max", values.max().item())
        if bounds is not None:
            self.logger.record("dynamics/q_bound", bounds[1])
        size = th.cat([obs.flatten(1), actions], dim=1).norm(dim=1).max().item()
        for of, warning in (
            ("values", breach(values.max().item(), bounds, size)),
            ("rewards", odd_scale(least, most, n_real)),
        ):
            if warning is not None:
                self._warn_once(of, warning)

    def _warn_once(self, of: str, warning: str) -> None:
        if of not in self.model._warned_of:
            self.model._warned_of.append(of)
            warnings.warn(warning, stacklevel=2)

    def _mix(self) -> None:
        """The gate: as much of a batch is imagined as the dynamics has earned, at most what ``real_ratio`` leaves."""
        agent = self.model
        agent.replay_buffer.real_ratio = agent.real_ratio + (1 - agent.real_ratio) * (1 - agent.imagined_share)

    def _record_state(self) -> None:
        agent = self.model
        buffer = agent.replay_buffer
        self.logger.record("dynamics/real_buffer_size", buffer.size() * buffer.n_envs)
        self.logger.record("dynamics/model_buffer_size", len(buffer.model_buffer))
        self.logger.record("dynamics/real_share", buffer.real_rows(agent.batch_size) / agent.batch_size)
        trained_for = agent.lifetime_timesteps - agent.learning_starts
        if trained_for > 0:
            self.logger.record("dynamics/updates_per_transition", agent._n_updates / trained_for)

    def _say(self, what: str) -> None:
        """
        Say how far a long piece of work is.

        :raises Interrupted: it is to be broken off
        """
        if self.model.resumable is not None:
            self.model.resumable.check()
        self._show(what)

    def _show(self, what: str) -> None:
        """Show a few words beside the progress bar; none to clear."""
        if self.progress_bar is not None:
            self.progress_bar.pbar.set_description(what)
