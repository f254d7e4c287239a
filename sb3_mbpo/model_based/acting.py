"""The first actions of an agent, and steps of the env that are not stored."""

from typing import Any

import numpy as np
from stable_baselines3.common.noise import ActionNoise

from sb3_mbpo.model_based.counting import Counting
from sb3_mbpo.restarting_env import LOST_STEP
from sb3_mbpo.validation.faults import copied
from sb3_mbpo.validation.rules import is_number, shown


class Acting(Counting):
    """The part of :class:`ModelBased` that chooses the actions before ``learning_starts``, and drops lost steps."""

    warmup_actions: Any

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        warms_up = self.num_timesteps < learning_starts and not (self.use_sde and self.use_sde_at_warmup)
        if self.warmup_actions is None or not warms_up:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        scaled = self.policy.scale_action(self._warm_up(n_envs))
        if action_noise is not None:
            scaled = np.clip(scaled + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled), scaled

    def _warm_up(self, n_envs: int) -> np.ndarray:
        """
        :return: actions in the env's scale, ``(n_envs, *action_shape)``
        :raises ValueError: those of the user do not fit the action space
        """
        low, high = self.action_space.low, self.action_space.high
        if is_number(self.warmup_actions):
            drawn = np.array([self.action_space.sample() for _ in range(n_envs)])
            middle = low + (high - low) / 2
            return (middle + self.warmup_actions * (drawn - middle)).astype(drawn.dtype)
        obs = self._last_obs if self._vec_normalize_env is None else self._vec_normalize_env.get_original_obs()
        # It may write into what it is given.
        obs, acts = copied(obs), self.warmup_actions
        actions = np.asarray(acts.predict(obs)[0] if hasattr(acts, "predict") else acts(obs))
        shape = (n_envs, *self.action_space.shape)
        if actions.shape != shape or actions.dtype.kind not in "fiu" or not np.isfinite(actions).all():
            raise ValueError(
                f"warmup_actions={shown(acts)} returned {shown(actions)}, and must return finite actions of shape {shape} "
                f"for {n_envs} observations"
            )
        return np.clip(actions, low, high).astype(self.action_space.dtype)

    def _store_transition(
        self, replay_buffer: Any, buffer_action: np.ndarray, new_obs: Any, reward: Any, dones: Any, infos: list[dict[str, Any]]
    ) -> None:
        if not any(LOST_STEP in info for info in infos):
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
            return
        replay_buffer.cut()
        self._last_obs = new_obs
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()
