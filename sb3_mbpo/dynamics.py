"""What stands in for the environment in imagination: the contract that every dynamics model keeps."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

Progress = Callable[[str], None]
# Draws whose mean stands for the expected outcome of a model that offers none.
MEAN_DRAWS = 5


class DynamicsModel(nn.Module, ABC):
    """
    What stands in for the environment inside branched rollouts.

    Observations are raw (never normalised) and flat, actions scaled to [-1, 1] and flat, as in SB3's replay buffer; float32.
    A subclass may offer ``predict(obs, actions) -> (mean, var)``, each ``(members, B, 1 + obs_dim)`` with the reward first,
    for filters and diagnosis, and ``elites``, the indices of the members that filters go by. If it has an ``optimizer``, that
    is saved with the agent.

    :param obs_dim: size of a flat observation
    :param action_dim: size of a flat action
    :param seed: seed of ``self.generator``, the only source of randomness a model may use; ``None``: one from the system
    :param device: where the tensors live
    """

    #: Fewest transitions that ``fit`` accepts; MBPO waits for them.
    min_transitions = 1
    #: Whether there was a fit to imagine with; MBPO waits for one, on real transitions alone.
    usable = True
    #: Whether the rewards of ``sample`` are used if ``reward_fn`` is None; else MBPO learns the reward of a transition itself.
    own_reward = True

    def __init__(self, obs_dim: int, action_dim: int, *, seed: int | None = None, device: th.device | str = "cpu") -> None:
        super().__init__()
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.generator = th.Generator(device)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """:param seed: start of the model's own random stream; ``None``: one from the system"""
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    @abstractmethod
    def fit(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """
        Learn from real transitions.

        :param transitions: all real transitions: observations ``(N, obs_dim)``, actions ``(N, action_dim)``,
            rewards and dones ``(N, 1)``, dones without time limits
        :param progress: called now and then with a few words on how far the fit is
        :return: what to log, under ``dynamics/``
        """

    @abstractmethod
    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw next observations and rewards, differentiable in both arguments where the model is.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: next observations ``(B, obs_dim)`` and rewards ``(B,)``
        """

    @th.no_grad()
    def predict_mean(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        The expected outcome, for measuring errors; here the mean of ``MEAN_DRAWS`` draws.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: reward and next observation ``(B, 1 + obs_dim)``
        """
        draws = [self.sample(obs, actions) for _ in range(MEAN_DRAWS)]
        return th.stack([th.cat([rewards.unsqueeze(1), next_obs], dim=1) for next_obs, rewards in draws]).mean(dim=0)

    def finish(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        What is made of a draw from ``predict``: a model around another does to it what it does to that one's ``sample``.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :param next_obs: ``(B, obs_dim)``
        :param rewards: ``(B,)``
        :return: next observations and rewards
        """
        return next_obs, rewards


class KnownReward(DynamicsModel):
    """
    Another dynamics model whose rewards come from a function instead.

    :param dynamics: predicts the next observation
    :param reward_fn: ``(obs, actions, next_obs) -> (B,)``, on flat observations and actions in [-1, 1]
    """

    def __init__(self, dynamics: DynamicsModel, reward_fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]) -> None:
        nn.Module.__init__(self)
        self.obs_dim, self.action_dim = dynamics.obs_dim, dynamics.action_dim
        self.generator = dynamics.generator
        self.min_transitions = dynamics.min_transitions
        self.dynamics = dynamics
        self.reward_fn = reward_fn

    def fit(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """See ``DynamicsModel.fit``."""
        return self.dynamics.fit(transitions, progress)

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``; the rewards are those of ``reward_fn``."""
        next_obs, _ = self.dynamics.sample(obs, actions)
        return next_obs, self.reward_fn(obs, actions, next_obs)

    def finish(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.finish``; the rewards are those of ``reward_fn``."""
        next_obs, _ = self.dynamics.finish(obs, actions, next_obs, rewards)
        return next_obs, self.reward_fn(obs, actions, next_obs)
