"""``learn(background=True)``: a second process learns while the agent steps its env."""

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import RolloutReturn

from sb3_mbpo.background.process import LearnerProcess
from sb3_mbpo.model_based.collecting import Collecting


class BackgroundCallback(BaseCallback):
    """Takes the place of :class:`.RolloutCallback` while another process learns: waits for its last updates."""

    model: Any

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.model.finish_learner()


class BesideActing(Collecting):
    """The part of :class:`ModelBased` that acts while another process learns."""

    #: Whether the current ``learn`` has ``background=True``.
    learns_in_background: bool = False
    # Not saved, see _excluded_save_params. It is started when the first rollout begins: a resumed run is restored by then.
    _learner: LearnerProcess | None = None
    #: Updates that the learner had not made when its last ``learn`` ended; the next one begins with them.
    updates_owed: int
    resume_callback: Any

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "learns_in_background", "_learner"]

    def _check_background(self) -> None:
        """:raises ValueError: the number of updates per transition is unknown"""
        if self.updates_ratio is None:
            raise ValueError(
                f"learn: background=True needs the number of updates per transition, and gradient_steps={self.gradient_steps} "
                "counts per episode. Pass updates_per_transition to the constructor"
            )

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """See SB3. With ``background=True``, the learner is started before the first one."""
        if self.learns_in_background and self._learner is None:
            self._start_learner()
        return super().collect_rollouts(*args, **kwargs)

    def _start_learner(self) -> None:
        if self.replay_buffer.size() == 0:
            # The agent was loaded without its transitions.
            self.updates_owed = 0
        self._learner = LearnerProcess(self)

    def owe_updates(self, transitions: int) -> None:
        """
        Let the next learner make the updates of a rollout that was begun without ``background``, and resumed with it.

        :param transitions: number of env transitions of the rollout, already counted
        """
        if self.learns_in_background and self.num_timesteps > self.learning_starts:
            self.updates_owed += self.updates_of(transitions)

    def _store_transition(self, replay_buffer: Any, *args: Any, **kwargs: Any) -> None:
        before = replay_buffer.pos
        super()._store_transition(replay_buffer, *args, **kwargs)
        if self._learner is not None:
            if replay_buffer.pos == before:
                self._learner.send_cut(self)
            else:
                self._learner.send_step(self)

    def tell_learner(self, kind: str, content: Any) -> None:
        """Send a message to the learner, if there is one, see :meth:`.LearnerProcess.send`."""
        if self._learner is not None:
            self._learner.send(kind, content)

    @property
    def may_pause(self) -> bool:
        """Whether a save may take its time: not within an episode of ``learn(background=True)``."""
        buffer = self.replay_buffer
        return not self.learns_in_background or buffer.size() == 0 or bool(np.any(buffer.dones[buffer.pos - 1]))

    def catch_up(self) -> None:
        """
        With ``background=True``, get the newest copy of all that was learned, at most some fits or 30 seconds old. Without
        it, the agent has only the newest policy; dynamics and critics are those of the last copy.
        """
        if self._learner is not None:
            self._learner.catch_up(self)

    def finish_learner(self) -> None:
        """Wait until all updates that are due are made, and end the learner. A signal that ends the run ends the wait."""
        callback = self.resume_callback

        def is_interrupted() -> bool:
            return callback is not None and callback.interrupted is not None

        if self._learner is None and self.updates_owed > 0 and not is_interrupted():
            # It was stopped for a checkpoint, or an ended run was begun again.
            self._start_learner()
        if self._learner is not None:
            learner, self._learner = self._learner, None
            learner.finish(self, is_interrupted)

    def stop_learner(self) -> None:
        """End the learner, and get what it has learned."""
        if self._learner is not None:
            learner, self._learner = self._learner, None
            learner.stop(self)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """See SB3."""
        self.catch_up()
        super().save(*args, **kwargs)
