"""What MBPO does between collecting and training: fit the dynamics when due, set k, refill the model buffer."""

import time
import warnings
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.refill import ROLLOUT_BLOCK, refill
from sb3_mbpo.rollouts import branched_rollout, rollout_length


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

    def _on_rollout_end(self) -> None:
        if self._due():
            self._fit()
            self._refill()
            self.model.dynamics_fitted_at = self.model.lifetime_timesteps
            self._say("")
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
        # As many as a new agent has at its first fit: one that was loaded without its buffer must not forget what it learned
        # for the sake of a handful.
        needed = max(agent.dynamics.min_transitions, min(agent.learning_starts, buffer.buffer_size * buffer.n_envs))
        if buffer.size() * buffer.n_envs < needed:
            return False
        if agent.dynamics_fitted_at is None or not buffer.model_buffer.refills:
            return True
        frequency = agent.model_train_freq
        return agent.lifetime_timesteps // frequency > agent.dynamics_fitted_at // frequency

    def _fit(self) -> None:
        """Fit dynamics and, where it is learned, termination, on all real transitions."""
        started = time.perf_counter()
        agent = self.model
        transitions = agent.replay_buffer.real_transitions()
        metrics = agent.dynamics.fit(transitions, progress=self._say)
        metrics |= agent.fit_termination(transitions)
        for name, value in metrics.items():
            self.logger.record(f"dynamics/{name}", value, exclude="tensorboard" if isinstance(value, str) else None)
        self.logger.record("dynamics/fit_seconds", time.perf_counter() - started)

    def _refill(self) -> None:
        """Imagine ``rollout_batch_size`` branches of the scheduled length from real states, with the current policy."""
        started = time.perf_counter()
        agent = self.model
        length = rollout_length(agent.rollout_schedule, agent.lifetime_timesteps)
        model_buffer = agent.replay_buffer.model_buffer
        model_buffer.begin_refill(agent.rollout_batch_size * length)
        dynamics = agent.imagined_dynamics
        start_obs = agent.replay_buffer.start_states(agent.rollout_batch_size)
        block = self.lowered_block or ROLLOUT_BLOCK.get(agent.device.type, 100_000)
        with agent.imagining() as policy:

            def imagine(start_obs: th.Tensor) -> ReplayBufferSamples:
                return branched_rollout(dynamics, policy, agent.terminates, start_obs, length)

            fitted = refill(model_buffer, imagine, start_obs, block, self._say)
        if fitted < block:
            if self.lowered_block is None:
                warnings.warn(
                    f"Memory ran out in a rollout of {min(block, len(start_obs))} start states; from now on {fitted} are "
                    "imagined at once. Lower rollout_batch_size or model_buffer_size to leave more room",
                    stacklevel=2,
                )
            self.lowered_block = fitted
        self.logger.record("dynamics/rollout_length", length)
        self.logger.record("dynamics/rollout_seconds", time.perf_counter() - started)

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
        """Show a few words beside the progress bar; none to clear."""
        if self.progress_bar is not None:
            self.progress_bar.pbar.set_description(what)
