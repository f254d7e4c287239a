"""The fast SAC update on the CPU: the same as SB3's ``SAC.train``, with explicit gradients instead of autograd."""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor
from torch import nn


@th.no_grad()
def train(agent: SAC, batches: Iterable[ReplayBufferSamples]) -> None:
    """
    ``SAC.train`` on given batches, equal up to rounding: same noise from the same generator, same equations, same log entries.

    The parameters and optimizer states of SB3's objects are changed in place; no other state is kept. Supports the agents
    that ``eligibility.why_not_fast`` accepts, but does not check them.

    :param agent: the agent to train
    :param batches: one batch per update, all of the same size
    """
    agent.policy.set_training_mode(True)
    optimizers: list[Any] = [agent.actor.optimizer, agent.critic.optimizer]
    optimizers += [] if agent.ent_coef_optimizer is None else [agent.ent_coef_optimizer]
    agent._update_learning_rate(optimizers)
    sources, targets = ([p.detach() for p in net.parameters()] for net in (agent.critic, agent.critic_target))
    # Clear stale gradients left by an earlier SB3 update.
    for optimizer in optimizers:
        optimizer.zero_grad()
    update, history = None, []
    for step, batch in enumerate(batches):
        update = update or _Update(agent, len(batch.rewards))
        history.append(update(batch))
        if step % agent.target_update_interval == 0:
            th._foreach_lerp_(targets, sources, agent.tau)

    agent._n_updates += len(history)
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    means = np.mean(th.stack([th.cat(scalars) for scalars in history]).tolist(), axis=0)
    for key, mean in zip(("ent_coef", "actor_loss", "critic_loss", "ent_coef_loss"), means, strict=False):
        agent.logger.record(f"train/{key}", mean)


def _linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    return [module for module in modules if isinstance(module, nn.Linear)]


def _adam_step(optimizer: Any, grads: list[th.Tensor]) -> None:
    """One step of an SB3 optimizer, on its own state, with gradients that were not computed by autograd."""
    group = optimizer.param_groups[0]
    states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
    # The first step creates the state. The fused operation is private in torch, and needs float32 counters.
    if hasattr(th, "_fused_adam_") and all(state and state["step"].dtype == th.float32 for state in states):
        averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        th._foreach_add_(steps, th.ones(()), alpha=1)  # a number would be converted to a tensor for each counter
        beta1, beta2 = group["betas"]
        options: Any = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": 0.0}
        th._fused_adam_(group["params"], grads, averages, squares, [], steps, amsgrad=False, maximize=False, **options)
        return
    for parameter, grad in zip(group["params"], grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    optimizer.zero_grad()


class _Hidden:
    """Layers ``h_l = relu(W_l h_{l-1} + b_l)`` on SB3's weights, for ``rows`` inputs; the first ``learnt`` are in the loss."""

    def __init__(self, linears: list[nn.Linear], rows: int, learnt: int) -> None:
        self.weights = [linear.weight.detach() for linear in linears]
        self.biases = [linear.bias.detach() for linear in linears]
        self.transposed = [weight.t() for weight in self.weights]
        self.outputs = [weight.new_empty(rows, len(weight)) for weight in self.weights]
        self.learnt = [output[:learnt] for output in self.outputs]
        self.deltas, self.picked = ([th.empty_like(output) for output in self.learnt] for _ in range(2))
        self.grads = [th.empty_like(p) for pair in zip(self.weights, self.biases, strict=True) for p in pair]
        self.first_grad = self.weights[0].new_empty(self.transposed[0].shape)

    def forward(self, x: th.Tensor) -> th.Tensor:
        for weight, bias, output in zip(self.transposed, self.biases, self.outputs, strict=True):
            x = th.addmm(bias, x, weight, out=output).relu_()
        return x

    def backward(self, x: th.Tensor) -> None:
        """Compute ``grads`` from ``deltas[-1]``, the gradient of the last output."""
        for i in reversed(range(len(self.weights))):
            delta = _through_relu(self.deltas[i], self.learnt[i])
            th.sum(delta, 0, out=self.grads[2 * i + 1])
            if i > 0:
                th.mm(delta.t(), self.learnt[i - 1], out=self.grads[2 * i])
                th.mm(delta, self.weights[i], out=self.deltas[i - 1])
        # With few inputs, this product is three times as fast as its transpose.
        self.grads[0].copy_(th.mm(x.t(), delta, out=self.first_grad).t())


def _through_relu(delta: th.Tensor, output: th.Tensor) -> th.Tensor:
    """``delta * 1[output > 0]``, in place."""
    return th.ops.aten.threshold_backward.grad_input(delta, output, 0, grad_input=delta)


class _Critic:
    """One Q-network, for batches of ``rows``."""

    def __init__(self, network: Iterable[nn.Module], rows: int) -> None:
        *linears, head = _linears(network)
        self.hidden, self.weight, self.bias = _Hidden(linears, rows, rows), head.weight.detach(), head.bias.detach()
        self.grads = [*self.hidden.grads, th.empty_like(self.weight), th.empty_like(self.bias)]

    def forward(self, x: th.Tensor, q: th.Tensor) -> None:
        """``q (B,) = Q(x (B, obs_dim + action_dim))``."""
        th.addmv(self.bias, self.hidden.forward(x), self.weight[0], out=q)

    def backward(self, x: th.Tensor, delta: th.Tensor) -> None:
        """Compute ``grads`` from ``delta (B,)``, the gradient of ``Q(x)``."""
        th.mm(delta.unsqueeze(0), self.hidden.outputs[-1], out=self.grads[-2])
        th.sum(delta, 0, keepdim=True, out=self.grads[-1])
        th.mm(delta.unsqueeze(1), self.weight, out=self.hidden.deltas[-1])
        self.hidden.backward(x)

    def action_gradient(self, chosen: th.Tensor, obs_dim: int) -> th.Tensor:
        """:return: ``dQ/da (action_dim, n)`` for the rows ``chosen (n,)`` of the last forward pass"""
        net, n = self.hidden, len(chosen)
        delta = net.deltas[-1][:n].copy_(self.weight.expand(n, -1))
        for i in reversed(range(len(net.weights))):
            _through_relu(delta, th.index_select(net.outputs[i], 0, chosen, out=net.picked[i][:n]))
            if i > 0:
                delta = th.mm(delta, net.weights[i], out=net.deltas[i - 1][:n])
        return th.mm(net.weights[0][:, obs_dim:].t().contiguous(), delta.t())


class _Actor:
    """The squashed Gaussian policy, for ``rows`` states and ``rows`` next states. Actions are ``(action_dim, N)``."""

    def __init__(self, actor: Actor, rows: int) -> None:
        self.hidden, self.heads = _Hidden(_linears(actor.latent_pi), 2 * rows, rows), _linears([actor.mu, actor.log_std])  # type: ignore
        self.epsilon = actor.action_dist.epsilon  # type: ignore[union-attr]
        self.weight_grads, self.bias_grads = self._stacked("weight"), self._stacked("bias")
        self.grads = [*self.hidden.grads, *chain(*zip(self.weight_grads.chunk(2), self.bias_grads.chunk(2), strict=True))]

    def _stacked(self, name: str) -> th.Tensor:
        return th.cat([getattr(head, name) for head in self.heads])

    def forward(self, obs: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """:return: ``a = tanh(mean + std * noise)`` and ``log pi(a | s)``, ``(N,)``"""
        self.weight, bias = self._stacked("weight"), self._stacked("bias").unsqueeze(1)
        mean, self.raw_log_std = th.addmm(bias, self.weight, self.hidden.forward(obs).t()).chunk(2)
        self.log_std = self.raw_log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        self.spread = self.log_std.exp() * noise
        self.actions = (mean + self.spread).tanh_()
        self.slope = 1 - self.actions**2
        terms = noise.square().div_(2).add_(self.log_std).add_((self.slope + self.epsilon).log_())
        return self.actions, terms.sum(0).add_(len(noise) * 0.5 * math.log(2 * math.pi)).neg_()

    def backward(self, obs: th.Tensor, dq: th.Tensor, alpha: th.Tensor) -> None:
        """Compute ``grads`` of ``mean(alpha log pi - Q)`` over the first columns, those of ``obs``, from ``dq = dQ/da``."""
        n = len(obs)
        actions, slope, alpha = self.actions[:, :n], self.slope[:, :n], alpha / n
        by_mean = slope * (2 * alpha * actions / (slope + self.epsilon) - dq / n)
        by_log_std = by_mean * self.spread[:, :n] - alpha
        by_log_std.masked_fill_(self.raw_log_std[:, :n] != self.log_std[:, :n], 0)
        delta = th.cat([by_mean, by_log_std])
        th.mm(delta, self.hidden.learnt[-1], out=self.weight_grads)
        th.sum(delta, 1, out=self.bias_grads)
        th.mm(delta.t(), self.weight, out=self.hidden.deltas[-1])
        self.hidden.backward(obs)


class _Update:
    """One gradient step of SAC on an agent's networks and optimizers, for batches of ``rows``, without the target update."""

    def __init__(self, agent: SAC, rows: int) -> None:
        self.agent, self.actor = agent, _Actor(agent.actor, rows)
        self.critics = [_Critic(network, rows) for network in agent.critic.q_networks]  # type: ignore
        self.targets = [_Critic(network, rows) for network in agent.critic_target.q_networks]  # type: ignore
        shared = self.critics[0].hidden  # never needed at the same time; with fewer buffers, more of them fit the cache
        for critic, target in zip(self.critics, self.targets, strict=True):
            critic.hidden.deltas, critic.hidden.picked, target.hidden.outputs = shared.deltas, shared.picked, shared.deltas
        new, action_dim = self.critics[0].weight.new_empty, len(self.actor.weight_grads) // 2
        # Critic inputs: (s, pi(s)), (s', pi(s')), (s, a).
        self.inputs = new(3, rows, self.critics[0].hidden.weights[0].shape[1])
        self.obs, self.actions = self.inputs.split([self.inputs.shape[2] - action_dim, action_dim], dim=2)
        self.q, self.dq, self.noise = new(len(self.critics), rows), new(action_dim, rows), new(2, rows, action_dim)

    def __call__(self, data: ReplayBufferSamples) -> list[th.Tensor]:
        """
        Learn from a batch.

        :return: entropy coefficient, losses of actor and critics, and the loss of the entropy coefficient if it is learned
        """
        space, normalize = self.agent.observation_space, self.agent.policy.normalize_images
        for part, raw in zip(self.obs, (data.observations, data.next_observations), strict=False):
            part.copy_(preprocess_obs(raw, space, normalize).flatten(1))  # type: ignore[union-attr]
        self.obs[2].copy_(self.obs[0])
        self.actions[2].copy_(data.actions)
        for noise in self.noise:  # drawn one after the other, as in SB3
            noise.normal_()
        actions, log_probs = self.actor.forward(self.obs[:2].flatten(0, 1), self.noise.flatten(0, 1).t())
        self.actions[:2].copy_(actions.t().unflatten(0, (2, -1)))
        log_prob, next_log_prob = log_probs.chunk(2)
        alpha, *ent_coef_loss = self._ent_coef_step(log_prob)
        critic_loss = self._critic_step(data, alpha * next_log_prob)
        return [alpha, self._actor_step(alpha, log_prob), critic_loss, *ent_coef_loss]

    def _ent_coef_step(self, log_prob: th.Tensor) -> list[th.Tensor]:
        """``J(alpha) = -log alpha mean(log pi + target entropy)``. Returns alpha before the step and, if learned, the loss."""
        agent: Any = self.agent
        if agent.ent_coef_optimizer is None:
            return [agent.ent_coef_tensor.to(log_prob.dtype).view(1)]
        grad = -(log_prob.mean(0, keepdim=True) + agent.target_entropy)
        alpha, loss = agent.log_ent_coef.exp(), agent.log_ent_coef * grad
        _adam_step(agent.ent_coef_optimizer, [grad])
        return [alpha, loss]

    def _critic_step(self, data: ReplayBufferSamples, penalty: th.Tensor) -> th.Tensor:
        """``J(Q) = 1/2 sum_i mean (Q_i(s, a) - r - (1 - done) gamma (min_j Q'_j(s', a') - penalty))^2``."""
        for target, q in zip(self.targets, self.q, strict=True):
            target.forward(self.inputs[1], q)
        discounts = self.agent.gamma if data.discounts is None else data.discounts
        returns = (data.rewards + (1 - data.dones) * discounts * (self.q.amin(0) - penalty).unsqueeze(1)).squeeze(1)
        for critic, q in zip(self.critics, self.q, strict=True):
            critic.forward(self.inputs[2], q)
            critic.backward(self.inputs[2], q.sub_(returns) / len(returns))
        _adam_step(self.agent.critic.optimizer, [grad for critic in self.critics for grad in critic.grads])
        return self.q.square().sum().view(1) / (2 * len(returns))

    def _actor_step(self, alpha: th.Tensor, log_prob: th.Tensor) -> th.Tensor:
        """``J(pi) = mean(alpha log pi(a | s) - min_i Q_i(s, a))``: the gradient of each row comes from its smallest critic."""
        for critic, q in zip(self.critics, self.q, strict=True):
            critic.forward(self.inputs[0], q)
        values, least = self.q.min(0)
        for i, critic in enumerate(self.critics):
            chosen = (least == i).nonzero().squeeze(1)
            self.dq.index_copy_(1, chosen, critic.action_gradient(chosen, self.obs.shape[2]))
        self.actor.backward(self.obs[0], self.dq, alpha)
        _adam_step(self.agent.actor.optimizer, self.actor.grads)
        return (alpha * log_prob - values).mean(0, keepdim=True)
