"""Validates env outputs during ``collect_rollouts`` and ``reset``; collection itself is unchanged SB3."""

import warnings
from contextlib import nullcontext
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.model_based.acting import Acting
from sb3_mbpo.validation.env_outputs import CheckedArrays, CheckedDummyVecEnv, add_checks
from sb3_mbpo.validation.faults import InvalidTransition
from sb3_mbpo.validation.misuse import missing_statistics
from sb3_mbpo.validation.unsupported import check_env


class Collecting(Acting):
    """The part of :class:`ModelBased` that steps and resets the env."""

    # Not saved, see _excluded_save_params: checks an env whose VecEnv or wrappers are not SB3's own.
    _arrays: CheckedArrays | None = None
    # ``num_timesteps`` before the last step of the env; ``None`` once its transitions are stored.
    _stepped_at: int | None = None

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
        return [*super()._excluded_save_params(), "_arrays", "_stepped_at"]

    def _checked(self, env: VecEnv) -> VecEnv:
        """:return: an env with the same outputs, checked; usually ``env`` itself"""
        if add_checks(env):
            return env
        if self._arrays is None or self._arrays.venv is not env:
            self._arrays = CheckedArrays(env)
        return self._arrays

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
        env, resets = self._checked(self.env), reset_num_timesteps or self._last_obs is None
        self._note_copies(env)
        try:
            with env.checking() if resets and isinstance(env, CheckedArrays) else nullcontext() as check:
                if resets:
                    # If the reset fails, the next `learn` resets the env again.
                    self._last_obs = None
                result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
                if check is not None:
                    self._last_obs = check(self._last_obs)
            return result
        except InvalidTransition as error:
            error.step, self._last_obs = self.num_timesteps, None
            raise

    def collect_rollouts(self, env: VecEnv, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect real transitions, see SB3. Every output of the env is checked before it is stored.

        :param env: the training env
        :return: see SB3
        :raises InvalidTransition: the env returned an invalid observation, reward or end of an episode
        :raises ValueError: learning has diverged, see :meth:`check_parameters`
        """
        checked, self._stepped_at = self._checked(env), None
        self._note_copies(checked)
        try:
            return super().collect_rollouts(checked, *args, **kwargs)
        except BaseException as error:
            if self._stepped_at is not None:
                # Raised by an env or a callback after the envs have moved on from _last_obs: the next transition would be
                # false. Without it, SB3 resets the envs.
                self._last_obs = None
            if isinstance(error, InvalidTransition):
                error.step = self.num_timesteps
            if isinstance(error, ValueError):
                # PyTorch's distributions and some envs raise it for NaN. Check whether the parameters are the cause.
                self.check_parameters()
            raise

    def _store_transition(self, *args: Any, **kwargs: Any) -> None:
        super()._store_transition(*args, **kwargs)
        self._stepped_at = None

    def _note_copies(self, checked: VecEnv) -> None:
        """Note in the replay buffer whether the last observations of episodes are copied, so that they are never lost."""
        is_copying = not isinstance(checked, CheckedArrays) and isinstance(checked.unwrapped, CheckedDummyVecEnv)
        self.replay_buffer.copies_ends = is_copying

    def _sample_action(self, *args: Any, **kwargs: Any) -> Any:
        actions = super()._sample_action(*args, **kwargs)
        # SB3 steps the env right after this, and counts the step right after that.
        self._stepped_at = self.num_timesteps
        return actions
