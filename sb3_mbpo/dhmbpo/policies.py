"""SAC's policy with what double-horizon learning needs: standardized observations, smooth layers, values within bounds."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

# Standardized observations are clipped to this range.
FARTHEST = 10.0
# Used for dimensions that are constant in the data.
CONSTANT_STD = 1.0
# A relative spread below this is float32 rounding, so the dimension counts as constant.
ROUNDING = 1e-6
# If a standard deviation changes by more than this factor, the weights of that dimension are not rescaled.
LARGEST_RESCALING = 10.0


class StandardizeExtractor(BaseFeaturesExtractor):
    """
    Flattens observations and standardizes them: mean 0 and standard deviation 1 in the real data.

    :param observation_space: a Box
    """

    obs_mean: th.Tensor
    obs_std: th.Tensor

    def __init__(self, observation_space: spaces.Space) -> None:
        size = spaces.utils.flatdim(observation_space)
        super().__init__(observation_space, size)
        self.register_buffer("obs_mean", th.zeros(size))
        self.register_buffer("obs_std", th.ones(size))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """:return: ``(B, obs_dim)``"""
        return ((observations.flatten(1) - self.obs_mean) / self.obs_std).clamp(-FARTHEST, FARTHEST)

    @th.no_grad()
    def set_statistics(self, mean: th.Tensor, std: th.Tensor, first_layers: list[nn.Linear], optimizer: Any) -> None:
        """
        Change the statistics, and rescale the next layers so that their outputs stay the same.

        :param mean: ``(obs_dim,)``
        :param std: ``(obs_dim,)``
        :param first_layers: layers whose first ``obs_dim`` inputs are the features; empty for untrained networks
        :param optimizer: Adam of these layers, whose moments are rescaled too; ``None``: no optimizer
        """
        scale, shift = std / self.obs_std, (mean - self.obs_mean) / self.obs_std
        alike = (scale < LARGEST_RESCALING) & (scale > 1 / LARGEST_RESCALING)
        scale, shift = th.where(alike, scale, 1.0), th.where(alike, shift, 0.0)
        for layer in first_layers:
            weight = layer.weight[:, : len(scale)]
            layer.bias.add_(weight @ shift)
            weight.mul_(scale)
            moments = {} if optimizer is None else optimizer.state.get(layer.weight, {})
            for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                if name in moments:
                    moments[name][:, : len(scale)].div_(scale**power)
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)


def value_network(in_size: int, net_arch: list[int], activation_fn: type[nn.Module], layer_norm: bool) -> nn.Sequential:
    """
    Build a network with one output. Its last layer is initialized to zero.

    :param in_size: number of inputs
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :param layer_norm: apply layer normalization to the input of each layer except the first, without learned scale and shift
    """
    modules: list[nn.Module] = []
    for size in net_arch:
        modules += [nn.Linear(in_size, size), activation_fn()]
        modules += [nn.LayerNorm(size, elementwise_affine=False)] if layer_norm else []
        in_size = size
    head = nn.Linear(in_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*modules, head)


class BoundedCritic(ContinuousCritic):
    """
    SB3's critic, with outputs scaled to the bounds of the values: Q = center + width * net.

    The last layers are initialized to zero, so all values start at the center. See :meth:`move_bounds`.

    :param layer_norm: see :func:`value_network`
    :param kwargs: see ``ContinuousCritic``
    """

    value_low: th.Tensor
    value_high: th.Tensor
    reward_low: th.Tensor
    reward_high: th.Tensor
    bounds_known: th.Tensor

    def __init__(self, *, layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        size = kwargs["features_dim"] + spaces.utils.flatdim(kwargs["action_space"])
        self.q_networks = [
            value_network(size, kwargs["net_arch"], kwargs["activation_fn"], layer_norm) for _ in range(self.n_critics)
        ]
        for i, network in enumerate(self.q_networks):
            setattr(self, f"qf{i}", network)
        self.register_buffer("value_low", th.tensor(-1.0))
        self.register_buffer("value_high", th.tensor(1.0))
        # Lowest and highest real reward. A rare one, such as a bonus at the end, lies outside the quantiles.
        self.register_buffer("reward_low", th.zeros(()))
        self.register_buffer("reward_high", th.zeros(()))
        # 1 after the first call of move_bounds.
        self.register_buffer("bounds_known", th.zeros(()))

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """:return: Q-values of every network, ``(B, 1)`` each"""
        return self.values_of(range(self.n_critics), obs, actions)

    def values_of(self, networks: Any, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param networks: indices of the networks
        :param obs: normalized by VecNormalize, if there is one
        :param actions: ``(B, action_dim)``
        :return: Q-values of each of these networks, ``(B, 1)``
        """
        center, width = self.center_and_width()
        inputs = th.cat([self.extract_features(obs, self.features_extractor), actions], dim=1)
        return tuple(center + width * self.q_networks[int(i)](inputs) for i in networks)

    def q1_forward(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """:return: values of the first network ``(B, 1)``"""
        return self.values_of([0], obs, actions)[0]

    @th.no_grad()
    def move_bounds(self, low: th.Tensor, high: th.Tensor, rate: float) -> None:
        """
        Move the bounds towards new ones, or set them in the first call. They always contain all real rewards.

        Values shift slightly when the bounds move slowly. If the bounds jump, the last layers are rescaled so that the values
        of a trained critic stay the same.

        :param low: new lower bound, a scalar tensor
        :param high: new upper bound, a scalar tensor
        :param rate: interpolation factor, from 0 to 1
        """
        first = not bool(self.bounds_known)
        center, width = self.center_and_width()
        lerped = (low, high) if first else (self.value_low.lerp(low, rate), self.value_high.lerp(high, rate))
        new_low = th.minimum(lerped[0], self.reward_low)
        # The bounds may not coincide, even if all rewards are equal.
        new_high = th.maximum(lerped[1], th.maximum(self.reward_high, new_low + 1.0))
        jumps = first or bool((new_low != lerped[0]) | (new_high != lerped[1]))
        self.value_low.copy_(new_low)
        self.value_high.copy_(new_high)
        self.bounds_known.fill_(1.0)
        if not jumps:
            return
        new_center, new_width = self.center_and_width()
        for network in self.q_networks:
            head: Any = network[-1]  # type: ignore[index]
            if head.weight.any():
                head.weight.mul_(width / new_width)
                head.bias.copy_((center + width * head.bias - new_center) / new_width)

    def center_and_width(self) -> tuple[th.Tensor, th.Tensor]:
        """:return: the middle of the bounds, and half their distance"""
        return (self.value_high + self.value_low) / 2, (self.value_high - self.value_low) / 2


class DHMBPOPolicy(SACPolicy):
    """
    SAC's policy with SiLU, standardized observations, critics with layer normalization, and values within bounds.

    Arguments are those of ``SACPolicy``, with other defaults, and

    :param layer_norm: apply layer normalization to the input of each layer of a critic except the first
    :param average_actor: keep an average of the actor's weights and use it for deterministic actions. DHMBPO sets it. If you
        train this policy with another algorithm, call :meth:`average` after each update
    """

    critic: BoundedCritic
    critic_target: BoundedCritic
    average_actor: Actor | None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        use_sde: bool = False,
        log_std_init: float = -3,
        use_expln: bool = False,
        clip_mean: float = 2.0,
        features_extractor_class: type[BaseFeaturesExtractor] = StandardizeExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        layer_norm: bool = True,
        average_actor: bool = False,
    ) -> None:
        if share_features_extractor:
            # SB3 would disable gradients in the critic's extractor, and dQ/ds would be zero.
            raise ValueError("policy_kwargs: share_features_extractor must be False: gradients pass through the critic's")
        self.layer_norm = layer_norm
        if optimizer_class is th.optim.Adam and {"fused", "foreach", "differentiable"}.isdisjoint(optimizer_kwargs or {}):
            # One operation for all parameters instead of one for each.
            optimizer_kwargs = {"fused": True, **(optimizer_kwargs or {})}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            use_sde,
            log_std_init,
            use_expln,
            clip_mean,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
            share_features_extractor,
        )
        self.average_actor = None
        if average_actor:
            self.begin_average()

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> BoundedCritic:
        """See SB3."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return BoundedCritic(layer_norm=self.layer_norm, **kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        averages = {"layer_norm": self.layer_norm, "average_actor": self.average_actor is not None}
        return {**super()._get_constructor_parameters(), **averages}

    def begin_average(self) -> None:
        """Start the average at the actor's current weights."""
        # Unlike a new actor, a copy draws no random numbers, so training is the same with and without an average.
        average = copy.deepcopy(self.actor).requires_grad_(False)
        del average.optimizer
        average.set_training_mode(False)
        self.average_actor = average

    @th.no_grad()
    def average(self, rate: float) -> None:
        """
        Move the average towards the actor: average += rate * (actor - average). Does nothing if there is no average.

        Buffers, such as the statistics of batch normalization, are copied from the actor.

        :param rate: from 0 to 1
        """
        if self.average_actor is not None:
            for mine, new in zip(self.average_actor.buffers(), self.actor.buffers(), strict=True):
                mine.copy_(new)
            averages = [parameter.data for parameter in self.average_actor.parameters()]
            th._foreach_lerp_(averages, [parameter.data for parameter in self.actor.parameters()], rate)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See PyTorch, and :meth:`fitting`."""
        return super().load_state_dict(self.fitting(state_dict), *args, **kwargs)

    def fitting(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        :param state_dict: of a policy with or without an average, such as one of SAC's
        :return: the same without the average, if this policy has none; or with the actor as average, if it is missing
        """
        state = OrderedDict(state_dict)
        if hasattr(state_dict, "_metadata"):
            state._metadata = state_dict._metadata  # type: ignore[attr-defined]
        averages = [name for name in state if str(name).startswith("average_actor.")]
        if self.average_actor is None:
            for name in averages:
                del state[name]
        elif not averages:
            actor = {name: value for name, value in state.items() if str(name).startswith("actor.")}
            copied = {name: value.clone() if isinstance(value, th.Tensor) else value for name, value in actor.items()}
            state.update({f"average_{name}": value for name, value in copied.items()})
        return state

    @property
    def deterministic_actor(self) -> Actor:
        """The average of the actor, or the actor itself if there is no average. Used for deterministic actions."""
        return self.actor if self.average_actor is None else self.average_actor

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.deterministic_actor(observation, True) if deterministic else self.actor(observation, False)

    @th.no_grad()
    def adapt(self, obs: th.Tensor, rewards: th.Tensor, trained: bool) -> None:
        """
        Set the statistics of the features extractors and the range of the rewards from real data.

        :param obs: flat observations ``(N, obs_dim)``, N at least 1, normalized by VecNormalize, if there is one
        :param rewards: rewards of any shape, normalized by VecNormalize, if there is one
        :param trained: whether the networks are trained, so that their outputs must stay the same
        """
        for critic in (self.critic, self.critic_target):
            low, high = rewards.aminmax()
            critic.reward_low.copy_(low)
            critic.reward_high.copy_(high)
        mean, std = obs.double().mean(dim=0), obs.double().std(dim=0, correction=0)
        std = th.where(std <= ROUNDING * mean.abs().clamp(min=ROUNDING), CONSTANT_STD, std)
        averages = [] if self.average_actor is None else [self.average_actor]
        for network in (self.actor, self.critic, self.critic_target, *averages):
            extractor = network.features_extractor
            if isinstance(extractor, StandardizeExtractor):
                # Statistics other than the initial ones mean that the networks were loaded.
                loaded = bool(extractor.obs_mean.any()) or bool((extractor.obs_std != 1).any())
                layers = self._first_layers(network) if trained or loaded else []
                optimizer = getattr(network, "optimizer", None)
                extractor.set_statistics(mean.float(), std.float(), layers, optimizer)

    def _first_layers(self, network: Any) -> list[nn.Linear]:
        """:return: layers whose input are the features; an actor without hidden layers has two"""
        bodies = network.q_networks if isinstance(network, BoundedCritic) else [network.latent_pi, network.mu, network.log_std]
        linear = [[module for module in body.modules() if isinstance(module, nn.Linear)] for body in bodies]
        if isinstance(network, BoundedCritic):
            return [layers[0] for layers in linear]
        return [linear[0][0]] if linear[0] else [linear[1][0], linear[2][0]]


MlpPolicy = DHMBPOPolicy
