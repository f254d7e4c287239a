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
    A subclass implements ``fit`` and ``sample``. It may offer ``predict``, for filters and diagnosis, and set ``elites`` and
    ``optimizer``. For a model around another one, see :class:`DynamicsWrapper`.

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
    #: Optional: indices of the members of ``predict`` that filters use, ``(n_elites,)``; without it, all. An attribute, a
    #: buffer or a property.
    elites: th.Tensor
    #: Optional: the optimizer of ``fit``, made in ``__init__``. It is saved with the agent.
    optimizer: th.optim.Optimizer

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

    @property
    def offers_predict(self) -> bool:
        """Whether the class has a ``predict`` of its own."""
        return type(self).predict is not DynamicsModel.predict

    def predict(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Every member's distribution. Optional: filters and the members' disagreement need it, see ``offers_predict``.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :return: mean and variance of (reward, next observation), each ``(members, B, 1 + obs_dim)``, in the env's units
        :raises NotImplementedError: the model does not offer it
        """
        raise NotImplementedError(f"{type(self).__name__} has no method predict")

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

    def postprocess(
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


class DynamicsWrapper(DynamicsModel):
    """
    A dynamics model around another one, to which it forwards everything.

    A subclass overrides ``adjust``, and so changes the predictions of ``sample``, ``predict_mean`` and ``postprocess`` alike.
    What ``predict`` returns is the other model's, unchanged. Weights are part of the state dict, under ``dynamics.``.

    :param dynamics: the other model
    """

    def __init__(self, dynamics: DynamicsModel) -> None:
        nn.Module.__init__(self)
        self.obs_dim, self.action_dim = dynamics.obs_dim, dynamics.action_dim
        # The same object: there is one random stream.
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
        """See ``DynamicsModel.own_reward``; a subclass that changes rewards sets it to True."""
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
        """See ``DynamicsModel.offers_predict``; a ``predict`` of the subclass counts."""
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
        What this model changes in a prediction of the other one: here nothing.

        :param obs: ``(B, obs_dim)``
        :param actions: ``(B, action_dim)``
        :param next_obs: predicted, ``(B, obs_dim)``
        :param rewards: predicted, ``(B,)``
        :return: next observations and rewards
        """
        return next_obs, rewards


class KnownReward(DynamicsWrapper):
    """
    Another dynamics model whose rewards come from a function instead.

    :param dynamics: predicts the next observation
    :param reward_fn: ``(obs, actions, next_obs) -> (B,)``, on flat observations and actions in [-1, 1]
    """

    own_reward = True

    def __init__(self, dynamics: DynamicsModel, reward_fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]) -> None:
        super().__init__(dynamics)
        self.reward_fn = reward_fn

    def adjust(
        self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, rewards: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """See ``DynamicsWrapper.adjust``; the rewards are those of ``reward_fn``."""
        return next_obs, self.reward_fn(obs, actions, next_obs)
