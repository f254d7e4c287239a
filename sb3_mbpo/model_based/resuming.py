"""Hooks in ``learn`` and ``collect_rollouts`` that let a ResumeCallback save, stop and resume a run."""

import os
from functools import partial
from typing import Any, TypeVar

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn

from sb3_mbpo.checkpoints.callback_state import all_callbacks
from sb3_mbpo.checkpoints.interrupts import Interrupted
from sb3_mbpo.checkpoints.resume_callback import ResumeCallback, will_resume
from sb3_mbpo.model_based.beside_acting import BesideActing
from sb3_mbpo.validation.misuse import check_evaluation

SelfResuming = TypeVar("SelfResuming", bound="Resuming")


class Resuming(BesideActing):
    """The part of :class:`ModelBased` that calls a ``ResumeCallback``, if there is one."""

    #: The ``ResumeCallback`` of the current ``learn``, if there is one.
    resume_callback: ResumeCallback | None = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "resume_callback"]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        everything = super()._init_callback(callback, progress_bar)
        check_evaluation(self.env, all_callbacks(everything))
        if self.resume_callback is not None:
            self.resume_callback.begin(everything)
        return everything

    def learn(
        self: SelfResuming,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResuming:
        """See SB3 and :meth:`.ModelBased.learn`."""
        # A resumed run also continues its log.
        reset = reset_num_timesteps and not (self.num_timesteps == 0 and will_resume(callback))
        try:
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset, progress_bar)
        except Interrupted:
            assert self.resume_callback is not None
            self.resume_callback.undo_train()
            return self
        finally:
            if self.resume_callback is not None:
                self.resume_callback.end()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        # SB3 finds no earlier runs if the name contains a folder: a resumed run would get another log.
        group, name = os.path.split(tb_log_name)
        folder = self.tensorboard_log
        if folder is not None and group:
            self.tensorboard_log = os.path.join(folder, group)
        try:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, name, progress_bar)
        finally:
            self.tensorboard_log = folder

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """See SB3. A run is saved, resumed and stopped right before it."""
        collect = partial(super().collect_rollouts, *args, **kwargs)
        result = collect() if self.resume_callback is None else self.resume_callback.rollout(collect)
        if self.updates_per_transition is None:
            return result
        # With gradient_steps=-1, SB3 makes as many updates as this says.
        return result._replace(episode_timesteps=self.updates_after(result.episode_timesteps))

    def updates_after(self, transitions: int) -> int:
        """
        Number of updates that this process makes after a rollout.

        :param transitions: number of env transitions of the rollout, already counted
        :return: number of updates; 0 with ``background=True``
        """
        if self.learns_in_background:
            return 0
        if self.updates_per_transition is None:
            return self.gradient_steps if self.gradient_steps >= 0 else transitions
        return self.updates_of(transitions)
