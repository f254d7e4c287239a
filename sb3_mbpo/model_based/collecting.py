"""Validates env outputs during ``collect_rollouts`` and ``reset``; collection itself is unchanged SB3."""

import warnings
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.model_based.acting import Acting
from sb3_mbpo.validation.env_outputs import Boundary
from sb3_mbpo.validation.misuse import missing_statistics
from sb3_mbpo.validation.unsupported import check_env


class Collecting(Acting):
    """The part of :class:`ModelBased` that steps and resets the env."""

    # Not saved, see _excluded_save_params.
    _boundary: Boundary | None = None

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the env, see SB3.

        :param env: the new env
        :param force_reset: see SB3
        :raises ValueError: the env is not supported, see :func:`.unsupported.check_env`
        """
        check_env(env)
        super().set_env(env, force_reset)
        if (warning := missing_statistics(self)) is not None:
            warnings.warn(warning, stacklevel=3)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_boundary"]

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        assert self.env is not None
        if self.replay_buffer is None:
            raise ValueError(
                "learn: the agent's replay_buffer is None: there is no place for transitions. Load one with "
                "load_replay_buffer(path), or set a ReplayBuffer"
            )
        self._share_env()
        # Wrappers may have been added or removed since the last call.
        self._boundary = Boundary(self.env)
        if reset_num_timesteps or self._last_obs is None:
            self._boundary.watch("reset", 0 if reset_num_timesteps else self.num_timesteps)
        try:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        finally:
            self._leave(self._boundary)

    def collect_rollouts(self, env: VecEnv, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect real transitions, see SB3. Every output of the env is checked before it is stored.

        :param env: the training env
        :return: see SB3
        :raises InvalidTransition: the env returned an invalid observation, reward or end of an episode
        :raises ValueError: learning has diverged, see :meth:`check_parameters`
        """
        if self._boundary is None or self._boundary.env is not env:
            self._boundary = Boundary(env)
        self.replay_buffer.copies_ends = self._boundary.copies_ends
        self._boundary.in_use = True
        try:
            return super().collect_rollouts(env, *args, **kwargs)
        except ValueError:
            # PyTorch's distributions and some envs raise ValueError for NaN. Check whether the parameters are the cause.
            self.check_parameters()
            raise
        finally:
            self._leave(self._boundary)

    def _sample_action(self, *args: Any, **kwargs: Any) -> Any:
        # SB3 calls this right before it steps the env. No user code runs in between, so users never see the watched env.
        actions = super()._sample_action(*args, **kwargs)
        if self._boundary is not None and self._boundary.in_use:
            self._boundary.watch("step", self.num_timesteps)
        return actions

    def _leave(self, boundary: Boundary) -> None:
        boundary.release()
        boundary.in_use = False
        if boundary.in_doubt:
            boundary.in_doubt = False
            # The envs have moved on from _last_obs, so the next transition would be false. Without it, SB3 resets the envs.
            self._last_obs = None
