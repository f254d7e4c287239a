"""
The true systems of six tasks as dynamics models, to use in place of a learned one; ends.py has those of its own tasks.

What a run with one of them reaches is what the rest of MBPO can do where the model is perfect.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import no_past  # noqa: F401  (registers NoPast-v0)
import numpy as np
import torch as th
from ends import TASKS as ENDS
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo import DynamicsModel


class TruePendulum(DynamicsModel):
    """Pendulum-v1 as in Gymnasium: observation (cos, sin, angular velocity), torque 2 a."""

    def fit(self, transitions: ReplayBufferSamples, progress: Any = None) -> dict[str, float | str]:
        """There is nothing to fit."""
        return {}

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``."""
        angle, speed, torque = th.atan2(obs[:, 1], obs[:, 0]), obs[:, 2], 2 * actions[:, 0]
        rewards = -(angle.square() + 0.1 * speed.square() + 0.001 * torque.square())
        speed = (speed + 0.05 * (15 * angle.sin() + 3 * torque)).clamp(-8, 8)
        angle = angle + 0.05 * speed
        return th.stack([angle.cos(), angle.sin(), speed], dim=1), rewards


class TrueMountainCar(DynamicsModel):
    """MountainCarContinuous-v0 as in Gymnasium: observation (position, velocity), force a, 100 at the flag."""

    FLAG = 0.45

    def fit(self, transitions: ReplayBufferSamples, progress: Any = None) -> dict[str, float | str]:
        """There is nothing to fit."""
        return {}

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``."""
        position, force = obs[:, 0], actions[:, 0]
        velocity = (obs[:, 1] + 0.0015 * force - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
        position = (position + velocity).clamp(-1.2, 0.6)
        # The wall at the left takes the speed that would lead through it.
        velocity = velocity.masked_fill((position == -1.2) & (velocity < 0), 0.0)
        next_obs = th.stack([position, velocity], dim=1)
        return next_obs, 100 * self.ended(obs, actions, next_obs).float() - 0.1 * force.square()

    @staticmethod
    def ended(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """:return: whether the flag is reached, bool ``(B,)``"""
        return (next_obs[:, 0] >= TrueMountainCar.FLAG) & (next_obs[:, 1] >= 0)


class TrueNoPast(DynamicsModel):
    """NoPast-v0: the next observation is drawn, and the reward is for the guesses."""

    def fit(self, transitions: ReplayBufferSamples, progress: Any = None) -> dict[str, float | str]:
        """There is nothing to fit."""
        return {}

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``."""
        targets = th.stack([(th.pi * obs[:, 0]).sin(), obs[:, 1] * obs[:, 2]], dim=1)
        drawn = th.rand(obs.shape, generator=self.generator, device=obs.device)
        return 2 * drawn - 1, 1 - (actions - targets).abs().sum(dim=1)


class Simulated(DynamicsModel, ABC):
    """A MuJoCo task whose observations tell the state: the env itself is put into it and stepped, row by row."""

    env_id: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.env: Any = gym.make(self.env_id).unwrapped
        self.env.reset(seed=0)

    @abstractmethod
    def state(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param obs: ``(B, obs_dim)``
        :return: ``qpos`` ``(B, nq)`` and ``qvel`` ``(B, nv)``; speeds that the observation cut at 10 stay at 10
        """

    def fit(self, transitions: ReplayBufferSamples, progress: Any = None) -> dict[str, float | str]:
        """There is nothing to fit."""
        return {}

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``."""
        low, high = self.env.action_space.low, self.env.action_space.high
        pushes = low + (actions.double().numpy() + 1) / 2 * (high - low)
        next_obs, rewards = np.empty(obs.shape), np.empty(len(obs))
        for row, (qpos, qvel) in enumerate(zip(*self.state(obs.double().numpy()), strict=True)):
            self.env.data.qacc_warmstart[:] = 0
            self.env.set_state(qpos, qvel)
            next_obs[row], rewards[row] = self.env.step(pushes[row])[:2]
        return th.as_tensor(next_obs, dtype=th.float32), th.as_tensor(rewards, dtype=th.float32)


class TrueReacher(Simulated):
    """Reacher-v5: cosines and sines of two joints, the target, two speeds, and from target to finger."""

    env_id = "Reacher-v5"

    def state(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Simulated.state``."""
        angles, targets, speeds = np.arctan2(obs[:, 2:4], obs[:, 0:2]), obs[:, 4:6], obs[:, 6:8]
        return np.hstack([angles, targets]), np.hstack([speeds, np.zeros_like(speeds)])


class TrueDoublePendulum(Simulated):
    """InvertedDoublePendulum-v5: the cart, sines and cosines of two joints, three speeds, a force."""

    env_id = "InvertedDoublePendulum-v5"

    def state(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Simulated.state``."""
        return np.hstack([obs[:, :1], np.arctan2(obs[:, 1:3], obs[:, 3:5])]), obs[:, 5:8]


class TrueHopper(Simulated):
    """Hopper-v5: all positions but the one along the track, which nothing depends on, then all speeds."""

    env_id = "Hopper-v5"

    def state(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Simulated.state``."""
        return np.hstack([np.zeros((len(obs), 1)), obs[:, :5]]), obs[:, 5:]


Termination = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]
#: env id -> (its true system, its termination_fn; None: the known one)
TRUE_SYSTEMS: dict[str, tuple[type[DynamicsModel], str | Termination | None]] = {
    "Pendulum-v1": (TruePendulum, "never"),
    "MountainCarContinuous-v0": (TrueMountainCar, TrueMountainCar.ended),
    "NoPast-v0": (TrueNoPast, "never"),
    **{system.env_id: (system, None) for system in (TrueReacher, TrueDoublePendulum, TrueHopper)},
    **{name: (system, task.ended) for name, (task, system, _) in ENDS.items()},
}
