"""Checks whether the fast SAC update supports an agent."""

from itertools import chain
from typing import Any

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

_KNOWN_MODULES = (SACPolicy, Actor, ContinuousCritic, FlattenExtractor, nn.Flatten, nn.Sequential, nn.Linear, nn.ReLU)
_NAMES = {kind: frozenset(dir(kind)) for kind in (*_KNOWN_MODULES, SquashedDiagGaussianDistribution, th.optim.Adam)}
# Attributes that are not empty if there are hooks; ``_global_...`` are the hooks of all modules.
_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def why_not_fast(agent: SAC, *callers: type) -> str | None:
    """
    Check whether the fast update can replace this agent's ``SAC.train``.

    Methods replaced on a class of SB3 or torch, and hooks on all optimizers, are not detected.

    :param agent: the agent in its current state
    :param callers: the class whose ``train`` calls this, and would otherwise call ``super().train``; then classes whose
        ``train`` may come next and calls ``super().train``
    :return: why not, as a short phrase for the log; ``None`` if it can
    """
    train = getattr(getattr(super(callers[0], agent) if callers else agent, "train", None), "__func__", None)
    for caller in callers[1:]:
        if train is vars(caller)["train"]:
            train = getattr(getattr(super(caller, agent), "train", None), "__func__", None)
    if train is not SAC.train:
        return "train() is overridden"
    return _unknown_network(agent) or _unknown_optimizer(agent) or _unknown_critics(agent)


def _is_changed(part: Any) -> bool:
    """:return: whether the instance overrides attributes of its class: a method was replaced, or the module was compiled"""
    return not _NAMES[type(part)].isdisjoint(vars(part))


def _unknown_network(agent: SAC) -> str | None:
    """:return: how the networks differ from SB3's ``MlpPolicy`` with ReLU, or ``None``"""
    actor: Any = agent.actor
    critics: tuple[Any, ...] = (agent.critic, agent.critic_target)
    # Compiled or not, SB3 trains the actor and the critics as they are.
    policy = getattr(agent.policy, "_orig_mod", agent.policy)
    modules = [policy, *chain(*(net.modules() for net in (actor, *critics)))]
    if agent.use_sde or getattr(actor, "use_sde", False):
        return "gSDE"
    for module in modules:
        if type(module) not in _KNOWN_MODULES:
            return f"a {type(module).__name__} in the policy"
    if type(actor.action_dist) is not SquashedDiagGaussianDistribution:
        return "custom action distribution"
    if any(map(_is_changed, [*modules, actor.action_dist])):
        return "compiled modules or replaced methods"
    # Looking up a missing attribute of a module is slow, so each kind is checked only for its own hooks.
    tensors = [*chain(*(module._parameters.values() for module in modules)), agent.log_ent_coef]
    of_modules = [getattr(module, hooks) for module in modules for hooks in _MODULE_HOOKS]
    of_tensors = [getattr(tensor, hooks) for tensor in tensors if tensor is not None for hooks in _TENSOR_HOOKS]
    of_all = [getattr(nn.modules.module, f"_global{hooks}") for hooks in _MODULE_HOOKS]
    if any([*of_modules, *of_tensors, *of_all]):
        return "hooks"
    heads = [[*actor.latent_pi, head] for head in (actor.mu, actor.log_std)]
    for layers in chain(heads, *(critic.q_networks for critic in critics)):
        kinds = [type(layer) for layer in layers]
        if len(kinds) < 3 or kinds != [nn.Linear, nn.ReLU] * (len(kinds) // 2) + [nn.Linear]:
            return "layers other than Linear and ReLU in turn"
    return None


def _unknown_optimizer(agent: SAC) -> str | None:
    """:return: how the optimizers differ from plain Adam over all float32 parameters of a network, or ``None``"""
    actor, critic = agent.actor, agent.critic
    layers: list[list[Any]] = [[*actor.latent_pi, actor.mu, actor.log_std], [*chain(*critic.q_networks)]]  # type: ignore
    parameters = [[p for layer in part if isinstance(layer, nn.Linear) for p in (layer.weight, layer.bias)] for part in layers]
    owned: list[tuple[Any, list[Any]]] = [*zip((actor.optimizer, critic.optimizer), parameters, strict=True)]
    if agent.ent_coef_optimizer is not None:
        owned.append((agent.ent_coef_optimizer, [agent.log_ent_coef]))
    for optimizer, expected in owned:
        if type(optimizer) is not th.optim.Adam:
            return f"the optimizer is {type(optimizer).__name__}"
        group = optimizer.param_groups[0]
        if len(optimizer.param_groups) > 1 or [id(p) for p in group["params"]] != [id(p) for p in expected]:
            return "parameters shared, missing, additional or in several groups"
        extras = [group[option] for option in ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")]
        if any([*extras, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, _is_changed(optimizer)]):
            return "options of Adam other than lr, betas and eps, hooks on it or methods replaced"
        device, kinds = parameters[0][0].device, {(p.dtype, p.device, p.requires_grad) for p in expected}
        if device.type not in ("cpu", "cuda") or kinds != {(th.float32, device, True)}:
            return "parameters frozen, or not float32 on the CPU or on one GPU"
    return None


def _unknown_critics(agent: SAC) -> str | None:
    """:return: how the critics differ from critics of equal shape with separate targets of the same shape, or ``None``"""
    networks: Any = (agent.critic, agent.critic_target)
    critic, target = ([*network.parameters()] for network in networks)
    kinds = [[(p.shape, p.dtype, p.device) for p in parameters] for parameters in (critic, target)]
    if kinds[0] != kinds[1] or {p.data_ptr() for p in critic} & {p.data_ptr() for p in target}:
        return "a target critic unlike the critic, or sharing its parameters"
    if len({tuple(p.shape for p in q_network.parameters()) for q_network in networks[0].q_networks}) > 1:
        return "critics of unequal shape"
    return None
