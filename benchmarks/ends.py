"""
Four small tasks whose episodes end for a reason, with the true system in closed form.

====================  =========================================================================================
ForbiddenDisc-v0      a point mass on its way to the origin; a disc between them ends the episode and costs 20
GoalDisc-v0           a point mass; arriving in a disc ends the episode and pays 100
ObservedGoal-v0       the same, but the disc lies elsewhere in every episode and the observation says where
Fall-v0               a body on an elastic leg; tilting too far or sinking too low ends the episode
====================  =========================================================================================

Each class has static methods on batches of float32 tensors, so that a test can use the true system in place of a learned one:

    next_obs = ForbiddenDisc.move(obs, actions)                     # (B, obs_dim)
    ended = ForbiddenDisc.ended(obs, actions, next_obs)             # bool (B,), a termination_fn
    rewards = ForbiddenDisc.reward(obs, actions, next_obs)          # (B,), a reward_fn, what the end pays included
    next_obs, rewards, ended = ForbiddenDisc.transition(obs, actions)

Actions are in [-1, 1] in all of them, so the env's scale and the agent's are the same. ``TrueForbiddenDisc`` and so on are a
``dynamics_class`` each.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_mbpo import DynamicsModel


class Task(gym.Env):
    """An environment that steps by its own ``transition``, one row at a time."""

    obs_dim: int
    observation_space: gym.spaces.Box
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    @staticmethod
    def move(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """:return: next observations ``(B, obs_dim)``"""
        raise NotImplementedError

    @staticmethod
    def ended(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """:return: whether each transition terminates, bool ``(B,)``"""
        raise NotImplementedError

    @staticmethod
    def reward(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """:return: ``(B,)``, with what an end pays"""
        raise NotImplementedError

    def start(self) -> np.ndarray:
        """:return: the first observation of an episode ``(obs_dim,)``, drawn from ``self.np_random``"""
        raise NotImplementedError

    @classmethod
    def transition(cls, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        The true system.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``, in [-1, 1]
        :return: next observations ``(B, obs_dim)``, rewards ``(B,)``, terminated, bool ``(B,)``
        """
        next_obs = cls.move(obs, actions)
        return next_obs, cls.reward(obs, actions, next_obs), cls.ended(obs, actions, next_obs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.obs = self.start().astype(np.float32)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        row = th.as_tensor(self.obs)[None], th.as_tensor(action, dtype=th.float32)[None]
        next_obs, reward, ended = self.transition(*row)
        self.obs = next_obs[0].numpy()
        return self.obs, float(reward), bool(ended), False, {}


def _box(size: int) -> gym.spaces.Box:
    return gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _push(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """A point mass with friction: linear in position (2), velocity (2) and force (2)."""
    velocity = 0.9 * obs[:, 2:4] + 0.2 * actions
    return th.cat([obs[:, :2] + 0.1 * velocity, velocity, obs[:, 4:]], dim=1)


class ForbiddenDisc(Task):
    """
    A point mass starts at the left and is paid minus its distance from the origin; a disc lies in its way.

    Observation: position (2), velocity (2). Action: force (2). An episode has 50 steps; in the disc it ends, with -20 more.
    """

    CENTER, RADIUS, PENALTY = (-0.7, 0.0), 0.4, -20.0
    obs_dim = 4
    observation_space = _box(4)

    @staticmethod
    def move(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return _push(obs, actions)

    @staticmethod
    def ended(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return (next_obs[:, :2] - next_obs.new_tensor(ForbiddenDisc.CENTER)).norm(dim=1) < ForbiddenDisc.RADIUS

    @staticmethod
    def reward(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        penalty = ForbiddenDisc.PENALTY * ForbiddenDisc.ended(obs, actions, next_obs).float()
        return penalty - next_obs[:, :2].norm(dim=1)

    def start(self) -> np.ndarray:
        return np.concatenate([self.np_random.uniform([-1.6, -0.4], [-1.2, 0.4]), np.zeros(2)])


class GoalDisc(Task):
    """
    A point mass that starts anywhere in a square; arriving in a disc ends the episode and pays 100.

    Observation: position (2), velocity (2). Action: force (2). Reward: minus the distance from the disc's center, 100 more on
    arrival. An episode has at most 50 steps.
    """

    CENTER, RADIUS, BONUS = (0.8, 0.8), 0.25, 100.0
    obs_dim = 4
    observation_space = _box(4)

    @staticmethod
    def move(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return _push(obs, actions)

    @staticmethod
    def ended(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return (next_obs[:, :2] - next_obs.new_tensor(GoalDisc.CENTER)).norm(dim=1) < GoalDisc.RADIUS

    @staticmethod
    def reward(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        distance = (next_obs[:, :2] - next_obs.new_tensor(GoalDisc.CENTER)).norm(dim=1)
        return GoalDisc.BONUS * (distance < GoalDisc.RADIUS).float() - distance

    def start(self) -> np.ndarray:
        while True:
            position = self.np_random.uniform(-1, 1, 2)
            if np.linalg.norm(position - self.CENTER) > 2 * self.RADIUS:
                return np.concatenate([position, np.zeros(2)])


class ObservedGoal(Task):
    """
    ``GoalDisc`` with a center that is drawn anew in every episode.

    Observation: position (2), velocity (2), center (2). Action: force (2).
    """

    RADIUS, BONUS = 0.25, 100.0
    obs_dim = 6
    observation_space = _box(6)

    @staticmethod
    def move(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return _push(obs, actions)

    @staticmethod
    def ended(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return (next_obs[:, :2] - next_obs[:, 4:]).norm(dim=1) < ObservedGoal.RADIUS

    @staticmethod
    def reward(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        distance = (next_obs[:, :2] - next_obs[:, 4:]).norm(dim=1)
        return ObservedGoal.BONUS * (distance < ObservedGoal.RADIUS).float() - distance

    def start(self) -> np.ndarray:
        while True:
            position, center = self.np_random.uniform(-1, 1, (2, 2))
            if np.linalg.norm(position - center) > 2 * self.RADIUS:
                return np.concatenate([position, np.zeros(2), center])


class Fall(Task):
    """
    A body on an elastic leg, paid 1 in each step in which it stands, less for force; it tips over if left alone.

    Observation: height, tilt, and their velocities. Action: push of the leg, torque. It has fallen below a height of 0.6 or
    beyond a tilt of 0.5, to either side. An episode has at most 200 steps.
    """

    LEAST_HEIGHT, MOST_TILT = 0.6, 0.5
    obs_dim = 4
    observation_space = _box(4)

    @staticmethod
    def move(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        height, tilt, rise, spin = obs.unbind(dim=1)
        rise = rise + 0.05 * (8 * (tilt.cos() - height) - rise + 4 * actions[:, 0])
        spin = spin + 0.05 * (6 * tilt.sin() / height.clamp(min=0.3) - 0.5 * spin + 6 * actions[:, 1])
        return th.stack([height + 0.05 * rise, tilt + 0.05 * spin, rise, spin], dim=1)

    @staticmethod
    def ended(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return (next_obs[:, 0] < Fall.LEAST_HEIGHT) | (next_obs[:, 1].abs() > Fall.MOST_TILT)

    @staticmethod
    def reward(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return (~Fall.ended(obs, actions, next_obs)).float() - 0.1 * actions.square().sum(dim=1)

    def start(self) -> np.ndarray:
        return np.array([1.0, 0.0, 0.0, 0.0]) + self.np_random.uniform(-0.05, 0.05, 4)


class TrueSystem(DynamicsModel):
    """The true system of a task in place of a learned one; there is nothing to fit."""

    task: type[Task]

    def fit(self, transitions, progress=None):  # type: ignore[no-untyped-def]
        return {}

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``."""
        return self.task.transition(obs, actions)[:2]


class TrueForbiddenDisc(TrueSystem):
    """See :class:`ForbiddenDisc`."""

    task = ForbiddenDisc


class TrueGoalDisc(TrueSystem):
    """See :class:`GoalDisc`."""

    task = GoalDisc


class TrueObservedGoal(TrueSystem):
    """See :class:`ObservedGoal`."""

    task = ObservedGoal


class TrueFall(TrueSystem):
    """See :class:`Fall`."""

    task = Fall


#: id -> (env, its true system, steps of an episode)
TASKS: dict[str, tuple[type[Task], type[TrueSystem], int]] = {
    "ForbiddenDisc-v0": (ForbiddenDisc, TrueForbiddenDisc, 50),
    "GoalDisc-v0": (GoalDisc, TrueGoalDisc, 50),
    "ObservedGoal-v0": (ObservedGoal, TrueObservedGoal, 50),
    "Fall-v0": (Fall, TrueFall, 200),
}
for _id, (_task, _, _steps) in TASKS.items():
    gym.register(_id, entry_point=lambda task=_task, **kwargs: task(**kwargs), max_episode_steps=_steps)
