"""HiddenHazard-v0: reach a goal on the far side of a region that ends the episode and that no observation announces."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

CENTRE, RADIUS, GOAL = (0.0, 0.0), 0.35, (0.8, 0.0)


class HiddenHazard(gym.Env):
    """
    A point with momentum in the square [-1, 1]^2. It starts somewhere on the left and is paid for nearness to a goal on the
    right; a disc in between ends the episode. From most starts the straight way leads through it.

    Observation: position and velocity. Action: acceleration, in [-1, 1]^2. Reward: 1 - distance to the goal / 2.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform([-1, -0.9], [-0.6, 0.9])
        self.velocity = np.zeros(2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.velocity = 0.9 * self.velocity + 0.02 * np.clip(action, -1, 1)
        target = self.position + self.velocity
        self.position = np.clip(target, -1, 1)
        # The walls take the speed that would lead through them.
        self.velocity[self.position != target] = 0
        reward = 1 - np.linalg.norm(self.position - GOAL) / 2
        terminated = bool(np.linalg.norm(self.position - CENTRE) < RADIUS)
        return self._observation(), float(reward), terminated, False, {}

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.position, self.velocity]).astype(np.float32)


def terminated(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    """The true termination function, to compare the learned one with."""
    return (next_obs[:, :2] - next_obs.new_tensor(CENTRE)).norm(dim=1) < RADIUS


gym.register("HiddenHazard-v0", entry_point=lambda **kwargs: HiddenHazard(**kwargs), max_episode_steps=100)
