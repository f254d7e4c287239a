"""NoPast-v0: every observation is drawn anew, whatever was done before, so that there is no dynamics to learn."""

from typing import Any

import gymnasium as gym
import numpy as np


class NoPast(gym.Env):
    """
    Three numbers are drawn, uniform in [-1, 1]; two others are to be guessed from them.

    Observation: the numbers x. Action: guesses a, in [-1, 1]^2. Reward: 1 - |a_0 - sin(pi x_0)| - |a_1 - x_1 x_2|.
    """

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._draw(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        first, second, third = self.numbers.astype(float)
        reward = 1 - abs(action[0] - np.sin(np.pi * first)) - abs(action[1] - second * third)
        return self._draw(), float(reward), False, False, {}

    def _draw(self) -> np.ndarray:
        self.numbers = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.numbers


gym.register("NoPast-v0", entry_point=lambda **kwargs: NoPast(**kwargs), max_episode_steps=50)
