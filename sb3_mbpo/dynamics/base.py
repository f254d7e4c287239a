"""The interface of dynamics models: the base class, and wrappers around other models."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

Progress = Callable[[str], None]
# Number of draws whose mean replaces the expected outcome if a model does not provide it.
MEAN_DRAWS = 5


class DynamicsModel(nn.Module, ABC):
    """
    Base class of dynamics models, which replace the environment in branched rollouts.

    Observations are raw (never normalized) and flat. Actions are flat and scaled to [-1, 1], as in SB3's replay buffer. All
    tensors are float32. A subclass implements ``fit`` and ``sample``. It may implement ``predict``, which filters and
    diagnosis use, and set ``elites`` and ``optimizer``. For a model around another one, see :class:`DynamicsWrapper`.

    :param obs_dim: Size of a flat observation
    :param action_dim: Size of a flat action
    :param seed: Seed of ``self.generator``, the only source of randomness a model may use; ``None``: a random seed
    :param device: Device of the tensors
    """

    #: Minimum number of transitions that ``fit`` accepts; MBPO waits for them.
    min_transitions = 1
    #: Whether the model can be used for rollouts. Until then, MBPO trains on real transitions only.
    usable = True
    #: Whether the rewards of ``sample`` are used if ``reward_fn`` is None; otherwise MBPO learns the reward separately.
    own_reward = True
    #: Optional: indices of the members of ``predict`` that filters use, ``(n_elites,)``; without it, all. An attribute, a
    #: buffer or a property.
    elites: th.Tensor
    #: Optional: the optimizer of ``fit``, created in ``__init__``. It is saved with the agent.
    optimizer: th.optim.Optimizer

    def __init__(self, obs_dim: int, action_dim: int, *, seed: int | None = None, device: th.device | str = "cpu") -> None:
        super().__init__()
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.generator = th.Generator(device)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """:param seed: seed of the model's own random generator; ``None``: a random seed from the system"""
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
        :param progress: called from time to time with a short text about the progress
        :return: metrics to log under ``dynamics/``
        """

    @abstractmethod
    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw next observations and rewards. If the model is differentiable, gradients flow to both arguments.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: next observations ``(B, obs_dim)`` and rewards ``(B,)``
        """

    @property
    def offers_predict(self) -> bool:
        """Whether the class implements ``predict``."""
        return type(self).predict is not DynamicsModel.predict

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The predicted distribution of every member. Optional: filters and the disagreement of members need it.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: mean and variance of (reward, next observation), each ``(members, B, 1 + obs_dim)``, in the env's units
        :raises NotImplementedError: the model does not implement it, see ``offers_predict``
        """
        raise NotImplementedError(f"{type(self).__name__} has no method predict")

    @th.no_grad()
    def predict_mean(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        The expected outcome, used to measure errors. By default, the mean of ``MEAN_DRAWS`` draws.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: reward and next observation ``(B, 1 + obs_dim)``
        """
        draws = [self.sample(obs, actions) for _ in range(MEAN_DRAWS)]
        return th.stack([th.cat([rewards.unsqueeze(1), next_obs], dim=1) for next_obs, rewards in draws]).mean(dim=0)

    def postprocess(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Apply a wrapper's changes (known reward, clipping) to a prediction that was drawn from ``predict``.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :param next_obs: drawn next observations ``(B, obs_dim)``
        :param rewards: drawn rewards ``(B,)``
        :return: next observations ``(B, obs_dim)`` and rewards ``(B,)``
        """
        return next_obs, rewards


class DynamicsWrapper(DynamicsModel):
    """
    A dynamics model that forwards everything to another one.

    A subclass overrides ``adjust``, which changes the predictions of ``sample``, ``predict_mean`` and ``postprocess``. The
    output of ``predict`` is not changed. The weights are in the state dict, under ``dynamics.``.

    :param dynamics: The wrapped model
    """

    def __init__(self, dynamics: DynamicsModel) -> None:
        nn.Module.__init__(self)
        self.obs_dim, self.action_dim = dynamics.obs_dim, dynamics.action_dim
        # The same object, so that there is only one random generator.
        self.generator = dynamics.generator
        self.dynamics = dynamics

    @property
    def min_transitions(self) -> int:  # type: ignore[override]
        """See ``DynamicsModel.min_transitions``."""
        return self.dynamics.min_transitions

    @property
    def usable(self) -> bool:  # type: ignore[override]
        """See ``DynamicsModel.usable``."""
        return self.dynamics.usable

    @property
    def own_reward(self) -> bool:  # type: ignore[override]
        """See ``DynamicsModel.own_reward``. A subclass that changes rewards must set it to True."""
        return self.dynamics.own_reward

    @property
    def elites(self) -> th.Tensor:  # type: ignore[override]
        """See ``DynamicsModel.elites``."""
        return self.dynamics.elites

    @property
    def optimizer(self) -> th.optim.Optimizer:  # type: ignore[override]
        """See ``DynamicsModel.optimizer``."""
        return self.dynamics.optimizer

    @property
    def offers_predict(self) -> bool:
        """See ``DynamicsModel.offers_predict``; a ``predict`` of the subclass counts, too."""
        return type(self).predict is not DynamicsWrapper.predict or self.dynamics.offers_predict

    def seed(self, seed: int | None) -> None:
        """See ``DynamicsModel.seed``."""
        self.dynamics.seed(seed)

    def fit(self, transitions: ReplayBufferSamples, progress: Progress | None = None) -> dict[str, float | str]:
        """See ``DynamicsModel.fit``."""
        return self.dynamics.fit(transitions, progress)

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.sample``; adjusted."""
        return self.adjust(obs, actions, *self.dynamics.sample(obs, actions))

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.predict``; not adjusted."""
        return self.dynamics.predict(obs, actions)

    @th.no_grad()
    def predict_mean(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """See ``DynamicsModel.predict_mean``; adjusted."""
        mean = self.dynamics.predict_mean(obs, actions)
        next_obs, rewards = self.adjust(obs, actions, mean[:, 1:], mean[:, 0])
        return th.cat([rewards.unsqueeze(1), next_obs], dim=1)

    def postprocess(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsModel.postprocess``; adjusted."""
        return self.adjust(obs, actions, *self.dynamics.postprocess(obs, actions, next_obs, rewards))

    def adjust(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Change a prediction of the wrapped model. By default, nothing is changed.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :param next_obs: predicted next observations ``(B, obs_dim)``
        :param rewards: predicted rewards ``(B,)``
        :return: next observations ``(B, obs_dim)`` and rewards ``(B,)``
        """
        return next_obs, rewards


class KnownReward(DynamicsWrapper):
    """
    Replaces the rewards of another dynamics model by those of a function.

    :param dynamics: The wrapped model, which predicts the next observation
    :param reward_fn: Maps flat ``(obs, actions, next_obs)``, with actions in [-1, 1], to rewards ``(B,)``
    """

    own_reward = True

    def __init__(self, dynamics: DynamicsModel, reward_fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]) -> None:
        super().__init__(dynamics)
        self.reward_fn = reward_fn

    def adjust(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsWrapper.adjust``; rewards come from ``reward_fn``."""
        return next_obs, self.reward_fn(obs, actions, next_obs)
