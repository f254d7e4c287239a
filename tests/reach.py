"""A goal env of vectors: a point is pushed to a goal that is drawn at each reset."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces


class Reach(gym.Env):
    """Observations are Dicts with parts of different shapes and precisions; actions have bounds other than -1 and 1."""

    def __init__(self) -> None:
        place = spaces.Box(-2, 2, (2,), np.float64)
        parts: dict[str, spaces.Space] = {
            "observation": spaces.Box(-2, 2, (2, 2)),
            "achieved_goal": place,
            "desired_goal": place,
        }
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(np.array([-0.4, -0.2], np.float32), np.array([0.4, 0.6], np.float32))

    def get_state(self):
        return {"moved": self.moved, "goal": self.goal}

    def set_state(self, state):
        self.moved, self.goal = state["moved"], state["goal"]

    def _obs(self):
        moved = self.moved.astype(np.float32)
        return {"observation": moved, "achieved_goal": self.moved[0].copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.moved, self.goal = np.zeros((2, 2)), self.np_random.uniform(-1, 1, 2)
        return self._obs(), {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -float(np.linalg.norm(achieved_goal - desired_goal))

    def step(self, action):
        speed = 0.5 * self.moved[1] + 0.5 * action
        self.moved = np.clip(np.stack([self.moved[0] + speed, speed]), -2, 2)
        obs = self._obs()
        return obs, self.compute_reward(obs["achieved_goal"], obs["desired_goal"], {}), False, False, {}


def distance(obs, actions, next_obs):
    """A ``reward_fn`` of the goal."""
    return -th.linalg.vector_norm(next_obs["achieved_goal"] - next_obs["desired_goal"], dim=1)


def reach() -> gym.Env:
    return gym.wrappers.TimeLimit(Reach(), 20)
