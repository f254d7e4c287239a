"""The fast SAC update: what Stable-Baselines3's ``SAC.train`` computes, with derivatives written out instead of autograd."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor, SACPolicy
from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_post_accumulate_grad_hooks")


def why_not_fast(agent: SAC, caller: type | None = None) -> str | None:
    """
    Why :func:`train` cannot stand in for this agent's ``SAC.train``; ``None`` where it can.

    :param agent: the agent as it is now
    :param caller: the class whose ``train`` asks, and would else call ``super().train``; ``None``: the agent's ``train`` itself
    :return: a short phrase for a log line
    """
    policy, train_method = agent.policy, getattr(super(caller, agent) if caller else agent, "train", None)
    if getattr(train_method, "__func__", None) is not SAC.train:
        return "train() is overridden"
    if type(policy) is not SACPolicy:
        return f"the policy is a {type(policy).__name__}, not SB3's MlpPolicy"
    if policy.share_features_extractor:
        return "actor and critics share a features extractor"
    if agent.use_sde or getattr(policy.actor, "use_sde", False):
        return "gSDE"
    return _odd_network(agent) or _odd_tensor(agent) or _odd_optimizer(agent)


def _odd_network(agent: SAC) -> str | None:
    """What in the networks is not as SB3's own ``MlpPolicy`` builds them with ReLU."""
    policy = agent.policy
    if (agent.actor, agent.critic, agent.critic_target) != (policy.actor, policy.critic, policy.critic_target):
        return "the agent's networks are not its policy's"
    if [type(net) for net in (agent.actor, agent.critic, agent.critic_target)] != [Actor, ContinuousCritic, ContinuousCritic]:
        return "custom actor or critic class"
    if any(type(net.features_extractor) is not FlattenExtractor for net in (agent.actor, agent.critic, agent.critic_target)):
        return "custom features extractor"
    if type(agent.actor.action_dist) is not SquashedDiagGaussianDistribution:
        return "custom action distribution"
    if any(module._compiled_call_impl is not None for module in policy.modules()):
        return "compiled modules"
    if any(getattr(part, hooks, None) for part in chain(policy.modules(), policy.parameters()) for hooks in _HOOKS):
        return "hooks on modules or parameters"
    bodies = [[*agent.actor.latent_pi], *([*net][:-1] for net in _q_networks(agent))]
    heads = [agent.actor.mu, agent.actor.log_std, *(list(net)[-1] for net in _q_networks(agent))]
    for body in bodies:
        if not body or [type(module) for module in body] != [nn.Linear, nn.ReLU] * (len(body) // 2):
            return "hidden layers other than Linear and ReLU"
    if any(type(head) is not nn.Linear for head in heads):
        return "output layers other than Linear"
    if len(agent.critic.q_networks) != len(agent.critic_target.q_networks):
        return "critics and target critics differ"
    return None


def _odd_tensor(agent: SAC) -> str | None:
    """What about the parameters is not as SB3 makes them."""
    for net in (agent.actor, agent.critic, agent.critic_target):
        if [id(p) for p in net.parameters()] != [id(p) for p in _parameters(agent, net)]:
            return "parameters that are shared, missing or additional"
    parameters = [*agent.policy.parameters()] if agent.log_ent_coef is None else [*agent.policy.parameters(), agent.log_ent_coef]
    if any(p.device.type != "cpu" for p in parameters):
        return "not on the CPU"
    if any(p.dtype != th.float32 for p in parameters):
        return "parameters that are not float32"
    trained = chain(agent.actor.parameters(), agent.critic.parameters())
    return None if all(p.requires_grad for p in trained) else "frozen parameters"


def _odd_optimizer(agent: SAC) -> str | None:
    """What about the optimizers is not plain Adam over all the parameters of one network."""
    owners: list[tuple[Any, list[th.Tensor]]] = [(net.optimizer, [*net.parameters()]) for net in (agent.actor, agent.critic)]
    if agent.ent_coef_optimizer is not None:
        assert agent.log_ent_coef is not None
        owners.append((agent.ent_coef_optimizer, [agent.log_ent_coef]))
    for optimizer, parameters in owners:
        if type(optimizer) is not th.optim.Adam:
            return f"the optimizer {type(optimizer).__name__}"
        group = optimizer.param_groups[0]
        if len(optimizer.param_groups) > 1 or [id(p) for p in group["params"]] != [id(p) for p in parameters]:
            return "optimizer parameter groups"
        if group["weight_decay"] or any(group[flag] for flag in ("amsgrad", "maximize", "capturable", "differentiable")):
            return "options of Adam other than lr, betas and eps"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "hooks on an optimizer"
    return None


def _q_networks(agent: SAC) -> Iterator[Any]:
    return chain(agent.critic.q_networks, agent.critic_target.q_networks)


def _linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    return [module for module in modules if isinstance(module, nn.Linear)]


def _parameters(agent: SAC, net: nn.Module) -> list[nn.Parameter]:
    """The parameters that :func:`train` knows of, in SB3's order."""
    if net is agent.actor:
        linears = [*_linears(agent.actor.latent_pi), *_linears([agent.actor.mu, agent.actor.log_std])]
    else:
        linears = _linears(chain.from_iterable(net.q_networks))  # type: ignore[arg-type]
    return [parameter for linear in linears for parameter in (linear.weight, linear.bias)]


@th.no_grad()
def train(agent: SAC, gradient_steps: int, batch_size: int) -> None:
    """
    ``SAC.train``, to rounding: same batches and noise from the same random streams, same equations, same log entries.

    SB3's objects stay the only truth: parameters and moments of its optimizers are changed in place, nothing outlives the call.
    Covers what :func:`why_not_fast` lets pass; does not ask it.

    :param agent: the agent whose networks are trained
    :param gradient_steps: number of updates
    :param batch_size: transitions per update
    """
    agent.policy.set_training_mode(True)
    optimizers = [agent.actor.optimizer, agent.critic.optimizer]
    if agent.ent_coef_optimizer is not None:
        optimizers.append(agent.ent_coef_optimizer)
    agent._update_learning_rate(optimizers)

    sources, targets = [*agent.critic.parameters()], [*agent.critic_target.parameters()]
    update, history = _Update(agent, batch_size), []
    for step in range(gradient_steps):
        data = agent.replay_buffer.sample(batch_size, env=agent._vec_normalize_env)  # type: ignore[union-attr]
        history.append(update(data))
        if step % agent.target_update_interval == 0:
            th._foreach_lerp_(targets, sources, agent.tau)

    agent._n_updates += gradient_steps
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    for key, values in zip(("ent_coef", "actor_loss", "critic_loss", "ent_coef_loss"), zip(*history, strict=True), strict=False):
        agent.logger.record(f"train/{key}", np.mean(th.stack([value.squeeze() for value in values]).tolist()))


class _Adam:
    """
    An optimizer of SB3's, stepped on gradients that autograd never saw.

    :param optimizer: plain Adam with one parameter group
    :param grads: one for each of its parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, grads: list[th.Tensor]) -> None:
        self.optimizer, self.grads = optimizer, grads
        self.params = optimizer.param_groups[0]["params"]
        self._bind()

    def _bind(self) -> None:
        """Take the optimizer's own state tensors, once it has made them."""
        states = [self.optimizer.state.get(p, {}) for p in self.params]
        self.steps = [state["step"] for state in states if state]
        # The fused operation is private, and takes float32 counters only.
        self.fused = hasattr(th, "_fused_adam_") and all(s and s["step"].dtype == th.float32 for s in states)
        if self.fused:
            moments = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
            self.tensors = ([p.detach() for p in self.params], self.grads, *moments, [], self.steps)

    def step(self) -> None:
        if self.fused:
            group = self.optimizer.param_groups[0]
            beta1, beta2 = group["betas"]
            options = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
            th._foreach_add_(self.steps, 1)
            th._fused_adam_(*self.tensors, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], **options)
            return
        for parameter, grad in zip(self.params, self.grads, strict=True):
            parameter.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._bind()


class _Hidden:
    """
    The hidden layers of a network, ``h_l = relu(W_l h_{l-1} + b_l)``, on SB3's own weights.

    :param linears: the layers
    :param rows: most rows at a time
    :param deltas: room for the gradients of the ``h_l``, each ``(>= rows, width)``; given: shared with other networks
    """

    def __init__(self, linears: list[nn.Linear], rows: int, deltas: list[th.Tensor] | None = None) -> None:
        self.weights = [linear.weight.detach() for linear in linears]
        self.biases = [linear.bias.detach() for linear in linears]
        self.transposed = [weight.t() for weight in self.weights]
        self.outputs = [weight.new_empty(rows, len(weight)) for weight in self.weights]
        self.deltas = deltas or [th.empty_like(output) for output in self.outputs]
        self.grads = [th.empty_like(p) for pair in zip(self.weights, self.biases, strict=True) for p in pair]
        self.first_grad = th.empty_like(self.transposed[0], memory_format=th.contiguous_format)

    def forward(self, x: th.Tensor) -> th.Tensor:
        for weight, bias, output in zip(self.transposed, self.biases, self.outputs, strict=True):
            x = th.addmm(bias, x, weight, out=output).relu_()
        return x

    def backward(self, x: th.Tensor) -> None:
        """From ``deltas[-1]``, the loss by the last output, to ``grads``; rows beyond those of ``x`` had no part in the loss."""
        rows = len(x)
        for i in reversed(range(len(self.weights))):
            output, delta = self.outputs[i][:rows], self.deltas[i][:rows]
            th.ops.aten.threshold_backward.grad_input(delta, output, 0, grad_input=delta)
            th.sum(delta, 0, out=self.grads[2 * i + 1])
            if i > 0:
                th.mm(delta.t(), self.outputs[i - 1][:rows], out=self.grads[2 * i])
                th.mm(delta, self.weights[i], out=self.deltas[i - 1][:rows])
        # Few inputs: this way round, and then turned, is three times as fast.
        self.grads[0].copy_(th.mm(x.t(), self.deltas[0][:rows], out=self.first_grad).t())


class _Critic:
    """
    One Q-network, of the same shape as its target.

    :param network: hidden layers, then one output
    :param rows: batch size
    :param hidden: the hidden layers whose ``deltas`` can be shared
    """

    def __init__(self, network: Iterable[nn.Module], rows: int, hidden: "_Hidden | None" = None) -> None:
        *linears, head = _linears(network)
        self.hidden = _Hidden(linears, rows, hidden.deltas if hidden else None)
        self.weight, self.bias = head.weight.detach(), head.bias.detach()
        self.grads = [*self.hidden.grads, th.empty_like(self.weight), th.empty_like(self.bias)]

    def forward(self, x: th.Tensor, out: th.Tensor) -> None:
        """``Q(x)``: ``(B, obs_dim + action_dim) -> (B,)``."""
        th.addmv(self.bias, self.hidden.forward(x), self.weight[0], out=out)

    def backward(self, x: th.Tensor, delta: th.Tensor) -> None:
        """From ``delta (B,)``, the loss by ``Q(x)``, to ``grads``."""
        th.mm(delta.unsqueeze(0), self.hidden.outputs[-1], out=self.grads[-2])
        th.sum(delta, 0, keepdim=True, out=self.grads[-1])
        th.mm(delta.unsqueeze(1), self.weight, out=self.hidden.deltas[-1])
        self.hidden.backward(x)

    def action_gradient(self, chosen: th.Tensor, obs_dim: int) -> th.Tensor:
        """``dQ/da (action_dim, n)`` in the rows ``chosen (n,)`` of the last forward pass."""
        net, n = self.hidden, len(chosen)
        delta = net.deltas[-1][:n].copy_(self.weight)
        for i in reversed(range(len(net.weights))):
            output = net.outputs[i].index_select(0, chosen)
            th.ops.aten.threshold_backward.grad_input(delta, output, 0, grad_input=delta)
            if i > 0:
                delta = th.mm(delta, net.weights[i], out=net.deltas[i - 1][:n])
        return th.mm(net.weights[0][:, obs_dim:].t().contiguous(), delta.t())


class _Actor:
    """
    The squashed Gaussian policy; columns are transitions: mean, standard deviation and actions are ``(action_dim, N)``.

    :param actor: SB3's
    :param rows: most observations at a time
    """

    def __init__(self, actor: Actor, rows: int) -> None:
        self.hidden = _Hidden(_linears(actor.latent_pi), rows)
        self.heads = _linears([actor.mu, actor.log_std])
        self.epsilon = actor.action_dist.epsilon  # type: ignore[union-attr]
        weight, bias = self._stacked_heads()
        n = len(weight) // 2
        self.weight_grad, self.bias_grad = th.empty_like(weight), th.empty_like(bias)
        self.grads = [*self.hidden.grads, self.weight_grad[:n], self.bias_grad[:n], self.weight_grad[n:], self.bias_grad[n:]]

    def _stacked_heads(self) -> tuple[th.Tensor, th.Tensor]:
        return th.cat([head.weight for head in self.heads]), th.cat([head.bias for head in self.heads])

    def forward(self, obs: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """``a = tanh(mean + std * noise)`` and ``log pi(a | s) (N,)``."""
        self.weight, bias = self._stacked_heads()
        mean, self.raw = th.addmm(bias.unsqueeze(1), self.weight, self.hidden.forward(obs).t()).chunk(2)
        self.log_std = self.raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
        self.spread = self.log_std.exp() * noise
        self.actions = (mean + self.spread).tanh_()
        self.slope = 1 - self.actions**2
        densities = noise.square().div_(2).add_(self.log_std).add_(th.log(self.slope + self.epsilon))
        return self.actions, densities.sum(0).add_(len(noise) * 0.5 * math.log(2 * math.pi)).neg_()

    def backward(self, obs: th.Tensor, dq: th.Tensor, alpha: th.Tensor) -> None:
        """From ``dq = dQ/da`` to ``grads`` of ``mean(alpha * log pi - Q)`` over the first ``n`` columns, those of ``obs``."""
        n = len(obs)
        actions, slope, alpha = self.actions[:, :n], self.slope[:, :n], alpha / n
        by_mean = slope * (2 * alpha * actions / (slope + self.epsilon) - dq / n)
        by_log_std = by_mean * self.spread[:, :n] - alpha
        by_log_std.masked_fill_(self.raw[:, :n] != self.log_std[:, :n], 0)
        delta = th.cat([by_mean, by_log_std])
        th.mm(delta, self.hidden.outputs[-1][:n], out=self.weight_grad)
        th.sum(delta, 1, out=self.bias_grad)
        th.mm(delta.t(), self.weight, out=self.hidden.deltas[-1][:n])
        self.hidden.backward(obs)


class _Update:
    """
    One gradient step of SAC on SB3's networks and optimizers, but for the move of the targets.

    :param agent: whose they are
    :param rows: batch size
    """

    def __init__(self, agent: SAC, rows: int) -> None:
        self.agent, self.rows, n = agent, rows, len(agent.critic.q_networks)
        self.actor = _Actor(agent.actor, 2 * rows)
        self.critics = [_Critic(network, rows) for network in agent.critic.q_networks]
        self.targets = [_Critic(network, rows) for network in agent.critic_target.q_networks]
        self.actor_adam = _Adam(agent.actor.optimizer, self.actor.grads)
        self.critic_adam = _Adam(agent.critic.optimizer, [grad for critic in self.critics for grad in critic.grads])
        action_dim, self.obs_dim = agent.actor.mu.out_features, agent.actor.latent_pi[0].in_features
        new = agent.actor.mu.weight.new_empty
        self.q, self.dq, self.noise = new(n, rows), new(action_dim, rows), new(2, rows, action_dim)
        # Critic inputs: (s, pi(s)), (s', pi(s')), (s, a).
        self.inputs = new(3, rows, self.obs_dim + action_dim)
        if agent.ent_coef_optimizer is not None:
            self.ent_coef_grad = new(1)
            self.ent_coef_adam = _Adam(agent.ent_coef_optimizer, [self.ent_coef_grad])

    def __call__(self, data: ReplayBufferSamples) -> tuple[th.Tensor, ...]:
        """Critics, actor and entropy coefficient learn from a batch; returns that coefficient, the losses, and its own loss."""
        space, normalize = self.agent.observation_space, self.agent.policy.normalize_images
        for part, raw in ((self.inputs[0], data.observations), (self.inputs[1], data.next_observations)):
            part[:, : self.obs_dim].copy_(preprocess_obs(raw, space, normalize).flatten(1))  # type: ignore[union-attr]
        self.inputs[2, :, : self.obs_dim].copy_(self.inputs[0, :, : self.obs_dim])
        self.inputs[2, :, self.obs_dim :].copy_(data.actions)
        # Two draws, for SB3 makes two.
        for part in self.noise:
            part.normal_()

        both = self.inputs[:2].flatten(0, 1)
        actions, log_probs = self.actor.forward(both[:, : self.obs_dim], self.noise.flatten(0, 1).t())
        both[:, self.obs_dim :].copy_(actions.t())
        log_prob, next_log_prob = log_probs.chunk(2)
        alpha, *ent_coef_loss = self._ent_coef_step(log_prob)
        critic_loss = self._critic_step(data, alpha * next_log_prob)
        return alpha, self._actor_step(alpha, log_prob), critic_loss, *ent_coef_loss

    def _ent_coef_step(self, log_prob: th.Tensor) -> list[th.Tensor]:
        """``J(log alpha) = -log alpha * mean(log pi + target entropy)``; returns alpha as it was, and the loss."""
        agent = self.agent
        if agent.ent_coef_optimizer is None:
            return [agent.ent_coef_tensor.to(log_prob.dtype)]
        assert agent.log_ent_coef is not None
        alpha = agent.log_ent_coef.exp()
        self.ent_coef_grad.copy_(log_prob.mean().add_(agent.target_entropy).neg_())
        loss = agent.log_ent_coef * self.ent_coef_grad
        self.ent_coef_adam.step()
        return [alpha, loss]

    def _critic_step(self, data: ReplayBufferSamples, penalty: th.Tensor) -> th.Tensor:
        """``J(Q) = 1/2 sum_i mean (Q_i(s, a) - r - (1 - done) gamma (min_j Q'_j(s', a') - penalty))^2``."""
        for target, q in zip(self.targets, self.q, strict=True):
            target.forward(self.inputs[1], q)
        discounts = self.agent.gamma if data.discounts is None else data.discounts
        next_values = (self.q.amin(0) - penalty).unsqueeze(1)
        returns = (data.rewards + (1 - data.dones) * discounts * next_values).squeeze(1)
        for critic, q in zip(self.critics, self.q, strict=True):
            critic.forward(self.inputs[2], q)
            critic.backward(self.inputs[2], q.sub_(returns) / self.rows)
        loss = self.q.square().sum() / (2 * self.rows)
        self.critic_adam.step()
        return loss

    def _actor_step(self, alpha: th.Tensor, log_prob: th.Tensor) -> th.Tensor:
        """``J(pi) = mean(alpha log pi(a | s) - min_i Q_i(s, a))``; only the critic with the least value passes a gradient."""
        for critic, q in zip(self.critics, self.q, strict=True):
            critic.forward(self.inputs[0], q)
        values, least = self.q.min(0)
        loss = (alpha * log_prob - values).mean()
        for i, critic in enumerate(self.critics):
            chosen = (least == i).nonzero().squeeze(1)
            self.dq.index_copy_(1, chosen, critic.action_gradient(chosen, self.obs_dim))
        self.actor.backward(self.inputs[0, :, : self.obs_dim], self.dq, alpha)
        self.actor_adam.step()
        return loss
