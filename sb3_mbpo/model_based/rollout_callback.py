"""When the dynamics is fitted and model rollouts are made: between collecting and training."""

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback

from sb3_mbpo.checkpoints.training_state import undone_on_error
from sb3_mbpo.model_based.model_learning import ModelLearning

# The learned termination is compared with new real terminations this many times between two fits of the dynamics.
LOOKS_AT_ENDS = 10


class RolloutCallback(BaseCallback):
    """
    Decides when the agent fits its dynamics and makes model rollouts. ``learn`` adds it automatically.

    The agent does the work in :meth:`.ModelLearning.fit_dynamics` and :meth:`.ModelLearning.generate_rollouts`. The callback
    has no state of its own, so a run can be stopped and resumed anywhere. To customize it, override :meth:`due` or
    :meth:`update_model`, and set the class attribute ``rollout_callback_class`` in a subclass of the agent's class.
    """

    # Any class that mixes in ModelBased.
    model: ModelLearning

    def __init__(self) -> None:
        super().__init__()
        #: Also shows the progress of fits and model rollouts, if there is one.
        self.progress_bar: ProgressBarCallback | None = None

    def _on_step(self) -> bool:
        return True

    def on_resume(self) -> None:
        """A run that was stopped in ``train()`` resumes there, so ``_on_rollout_end`` is not called before it."""
        self._mix()

    def _on_rollout_end(self) -> None:
        if self.due():
            try:
                self.update_model()
            finally:
                self._show("")
        elif n_steps := self._steps_with_new_ends():
            self._log(self.model.refit_termination(n_steps))
        self._mix()
        self._record_state()

    def due(self) -> bool:
        """
        :return: whether the dynamics must be fitted now: right before the first update, then at every multiple of
            ``model_train_freq``. An agent loaded without its imagined transitions starts with a fit, too
        """
        agent = self.model
        # SB3 trains only past learning_starts, and never without gradient steps.
        if agent.real_ratio == 1 or agent.gradient_steps == 0 or agent.num_timesteps <= agent.learning_starts:
            return False
        buffer = agent.replay_buffer
        if buffer.size() * buffer.n_envs < agent.rows_before_fit:
            return False
        frequency, fitted_at = agent.model_train_freq, agent.dynamics_fitted_at
        if fitted_at is not None and buffer.model_buffer.refills:
            if agent.lifetime_timesteps // frequency <= fitted_at // frequency:
                return False
        # Checked last, because it reads all rows. Ends whose last observation was lost do not count.
        return len(buffer.real_transitions(agent.dynamics_window).rewards) >= agent.dynamics.min_transitions

    def update_model(self) -> None:
        """Fit the dynamics, and make a model rollout unless ``imagined_fraction`` is 0. After an error, both are undone."""
        agent = self.model
        with undone_on_error(agent):
            self._log(agent.fit_dynamics(progress=self._say))
            if agent.dynamics.usable and agent.imagined_fraction > 0:
                self._log(agent.generate_rollouts(progress=self._say))
            else:
                # Record an empty model rollout. Without one, a fit would be due again at the next step.
                agent.replay_buffer.model_buffer.begin_refill()
            transitions = agent.replay_buffer.real_transitions(agent.dynamics_window)
            self._log(agent.judge_values(transitions))
        # Last, because they cannot be undone.
        agent.relabel()
        agent.adapt_networks(transitions)

    def _steps_with_new_ends(self) -> int:
        """:return: number of newest steps of each env to compare the learned termination with; 0: no comparison is due"""
        agent = self.model
        if agent.termination != "learned" or not len(agent.replay_buffer.model_buffer):
            return 0
        every = max(agent.model_train_freq // LOOKS_AT_ENDS, agent.n_envs)
        now, new = agent.lifetime_timesteps, self.locals.get("num_collected_steps", 0) * agent.n_envs
        return 0 if now // every == (now - new) // every else max(new, every) // agent.n_envs

    def _mix(self) -> None:
        self.model.replay_buffer.real_ratio = self.model.real_share_of_batches

    def _log(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self.logger.record(f"dynamics/{name}", value, exclude="tensorboard" if isinstance(value, str) else None)

    def _record_state(self) -> None:
        agent = self.model
        buffer = agent.replay_buffer
        self._log(
            {
                "real_buffer_size": buffer.size() * buffer.n_envs,
                "model_buffer_size": len(buffer.model_buffer),
                "real_share": buffer.real_rows(agent.batch_size) / agent.batch_size,
            }
        )
        trained_for = agent.lifetime_timesteps - agent.learning_starts
        if trained_for > 0:
            self._log({"updates_per_transition": (agent._n_updates - agent.pretraining_updates) / trained_for})

    def _say(self, what: str) -> None:
        """
        Show the progress of a fit or a model rollout.

        :raises Interrupted: the run was asked to stop
        """
        if self.model.resume_callback is not None:
            self.model.resume_callback.check()
        self._show(what)

    def _show(self, what: str) -> None:
        """Show a short text beside the progress bar; an empty one clears it."""
        if self.progress_bar is not None:
            self.progress_bar.pbar.set_description(what)
