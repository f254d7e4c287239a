"""The SAC update on a GPU: the equations of ``sac_update`` in fixed shapes, captured once as a CUDA graph, then replayed."""

import math
import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN

from sb3_mbpo.stacks import Stack, StaticAdam, rows_for, through_relu, views_of

# What was captured for an agent, and for which settings; not an attribute, so that it is neither saved nor copied with it.
_UPDATES: "WeakKeyDictionary[SAC, tuple[Any, _Update | None]]" = WeakKeyDictionary()


@th.no_grad()
def train(agent: SAC, batches: Iterable[ReplayBufferSamples]) -> bool:
    """
    ``SAC.train`` on given batches, to rounding: same noise from the same random stream, same equations, same log entries.

    Between calls, SB3's objects are the only truth: parameters and optimizer states are read at the start and written at the
    end. What CUDA captured stays, and is captured anew when shapes or Adam's settings change. The host waits for the GPU once,
    to log. Covers what ``uncovered.why_not_fast`` lets pass; does not ask it. On a CPU the same code runs uncaptured.

    :param agent: the agent whose networks are trained
    :param batches: one for each update, all of one size
    :return: whether it was done; ``False`` where the capture failed (which warns once), and the agent is as before
    """
    agent._update_learning_rate(_optimizers(agent))
    update, n_updates = None, 0
    for batch in batches:
        if update is None:
            update = _update_for(agent, batch)
            if update is None:
                return False
            update.read(agent)
        update.put(agent, batch, agent.tau if n_updates % agent.target_update_interval == 0 else 0.0)
        update.run()
        n_updates += 1
    assert update is not None
    update.write(agent, n_updates)
    # Of no effect on what stands above, and here it takes no time: the GPU is still busy.
    agent.policy.set_training_mode(True)
    for optimizer in _optimizers(agent):
        optimizer.zero_grad()

    agent._n_updates += n_updates
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    means = np.divide(update.sums.tolist(), n_updates)
    for key, mean in zip(("ent_coef", "actor_loss", "critic_loss", "ent_coef_loss"), means, strict=False):
        agent.logger.record(f"train/{key}", mean)
    return True


def _update_for(agent: SAC, batch: ReplayBufferSamples) -> "_Update | None":
    """The update captured for this agent and batches like this one; ``None`` where that was tried in vain."""
    groups = [optimizer.param_groups[0] for optimizer in _optimizers(agent)]
    adams = [(g["betas"], g["eps"], [(p.shape, p.dtype, p.device) for p in g["params"]]) for g in groups]
    settings = (len(batch.rewards), batch.discounts is None, agent.actor.action_dist.epsilon, adams)  # type: ignore
    if agent not in _UPDATES or _UPDATES[agent][0] != settings:
        _UPDATES.pop(agent, None)
        _UPDATES[agent] = (settings, _captured(agent, batch, groups[0]["params"][0].device))
    return _UPDATES[agent][1]


def _captured(agent: SAC, batch: ReplayBufferSamples, device: Any) -> "_Update | None":
    """An update whose ``run`` replays a CUDA graph, after the pattern of https://pytorch.org/docs/stable/notes/cuda.html."""
    if device.type != "cuda":
        return _Update(agent, batch)
    generator = th.cuda.default_generators[device.index]
    random_state = generator.clone_state()
    try:
        update, graph, stream = _Update(agent, batch), th.cuda.CUDAGraph(), th.cuda.Stream(device)
        stream.wait_stream(th.cuda.current_stream(device))
        # All that the first steps change is read anew, or forked: the noise comes from the default generator.
        with th.random.fork_rng([device]), th.cuda.stream(stream):
            for _ in range(3):
                update.run()
            with th.cuda.graph(graph, stream=stream):
                update.run()
        th.cuda.current_stream(device).wait_stream(stream)
    except BaseException as error:
        # The first steps may still be at work on memory that is free from here on.
        th.cuda.synchronize(device)
        # The generator would go on believing in the capture, and refuse to draw.
        generator.graphsafe_set_state(random_state)
        if not isinstance(error, Exception):
            raise
        message = f"The SAC update could not be captured as a CUDA graph; Stable-Baselines3's own is used ({error})"
        warnings.warn(message, stacklevel=4)
        return None
    update.run = graph.replay  # type: ignore[method-assign]
    return update


def _optimizers(agent: SAC) -> list[Any]:
    optional = [] if agent.ent_coef_optimizer is None else [agent.ent_coef_optimizer]
    return [agent.actor.optimizer, agent.critic.optimizer, *optional]


def _originals(agent: Any) -> tuple[list[th.Tensor], list[list[th.Tensor]]]:
    """SB3's tensors in the order of ``_Update.views``, and each optimizer's counters; states are made and kept as by Adam."""
    tensors, counters = [], []
    for group, all_states in ((optimizer.param_groups[0], optimizer.state) for optimizer in _optimizers(agent)):
        states = [all_states[parameter] for parameter in group["params"]]
        for parameter, state in zip(group["params"], states, strict=True):
            if not state:
                state["step"] = th.zeros((), device=parameter.device if group["fused"] else "cpu")
                state["exp_avg"], state["exp_avg_sq"] = th.zeros_like(parameter), th.zeros_like(parameter)
            elif not group["fused"]:
                # SB3 loads it onto the GPU, where to read it is to wait.
                state["step"] = state["step"].cpu()
        tensors += [*group["params"], *(state[key] for key in ("exp_avg", "exp_avg_sq") for state in states)]
        counters.append([state["step"] for state in states])
    return [*tensors, *agent.critic_target.parameters()], counters


class _Actions:
    """Actions ``values (N, action_dim)`` of the squashed Gaussian, their ``log_probs (N,)``, and what derivatives need."""

    def __init__(self, heads: th.Tensor, noise: th.Tensor, epsilon: float) -> None:
        (mean, self.raw_log_std), self.epsilon = heads, epsilon
        self.log_std = self.raw_log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        self.spread = self.log_std.exp() * noise
        self.values = (mean + self.spread).tanh_()
        self.slope = 1 - self.values.square()
        terms = th.addcmul(self.log_std, noise, noise, value=0.5) + (self.slope + epsilon).log()
        self.log_probs = -(terms.sum(1) + noise.shape[1] * 0.5 * math.log(2 * math.pi))

    def backward(self, dq: th.Tensor, alpha: th.Tensor) -> th.Tensor:
        """``sum(alpha log pi) + <dq, a>`` of the first ``len(dq)`` rows, by mean and log_std: ``(2, len(dq), action_dim)``."""
        n = len(dq)
        values, slope = self.values[:n], self.slope[:n]
        by_mean = slope * (2 * alpha * values / (slope + self.epsilon) + dq)
        by_log_std = by_mean * self.spread[:n] - alpha
        by_log_std.masked_fill_(self.raw_log_std[:n] != self.log_std[:n], 0)
        return th.stack([by_mean, by_log_std])


class _Update:
    """One gradient step of SAC in static memory, for batches like the one given; keeps nothing of the agent."""

    def __init__(self, agent: Any, batch: ReplayBufferSamples) -> None:
        optimizers, n = _optimizers(agent), len(agent.critic.q_networks)
        actor, critic, *alpha = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
        # Target critics, then critics: one product for both.
        pi, q = rows_for(1, actor), rows_for(2 * n, 2 * critic)
        self.target_rows, self.critic_rows = q.chunk(2)
        log_alpha = [rows_for(1, part) for part in alpha]
        self.adams = [StaticAdam(*pair) for pair in zip(optimizers, (pi, self.critic_rows, *log_alpha), strict=True)]
        self.views = [*chain(*(part.views for part in self.adams)), *views_of(self.target_rows, critic)]
        shapes, q_shapes = ([tuple(p.shape) for p in part if p.dim() == 2] for part in (actor, critic[: len(critic) // n]))
        self.all_critics, self.fixed_critics = Stack(q, q_shapes), Stack(self.critic_rows, q_shapes)
        self.critics = Stack(self.critic_rows, q_shapes, self.adams[1].grads)
        pi_grads, end = self.adams[0].grads, sum(p.numel() for p in actor)
        start = end - sum(p.numel() for p in actor[-4:])
        self.hidden = Stack(pi, shapes[:-2], pi_grads)
        # Mean and log_std are two networks of one layer.
        self.heads = Stack(pi[0, start:end].view(2, -1), shapes[-1:], pi_grads[0, start:end].view(2, -1))
        rows, (action_dim, _), self.obs_dim = len(batch.rewards), shapes[-1], shapes[0][1]
        self.epsilon, self.noise = agent.actor.action_dist.epsilon, pi.new_zeros(2, rows, action_dim)
        self.gamma, self.rate, self.target_entropy, self.alpha = (pi.new_zeros(1) for _ in range(4))
        self.log_alpha = log_alpha[0][0, :1] if log_alpha else None
        # Side by side: (s, pi(s)), (s', pi(s')), (s, a), done, reward and, if it varies, the discount.
        width = self.obs_dim + action_dim
        self.batch = pi.new_zeros(rows, 3 * width + 2 + (batch.discounts is not None))
        self.inputs = self.batch[:, : 3 * width].unflatten(1, (3, width)).transpose(0, 1)
        self.outcomes = self.batch[:, 3 * width :].split(1, dim=1)
        self.sums = pi.new_zeros(3 + len(alpha), dtype=th.float64)

    def read(self, agent: Any) -> None:
        """Take over what SB3's objects hold."""
        tensors, counters = _originals(agent)
        th._foreach_copy_(self.views, tensors)
        for part, optimizer, counts in zip(self.adams, _optimizers(agent), counters, strict=True):
            part.learning_rate.fill_(optimizer.param_groups[0]["lr"])
            part.set_counters(th.stack(counts).tolist())
        if self.log_alpha is None:
            self.alpha.copy_(agent.ent_coef_tensor)
        else:
            self.target_entropy.fill_(agent.target_entropy)
        self.gamma.fill_(agent.gamma)
        self.sums.zero_()

    def write(self, agent: Any, n_steps: int) -> None:
        """Give SB3's objects what they hold after ``n_steps``."""
        tensors, counters = _originals(agent)
        th._foreach_copy_(tensors, self.views)
        th._foreach_add_([*chain(*counters)], n_steps)

    def put(self, agent: Any, data: ReplayBufferSamples, rate: float) -> None:
        """Lay a batch, and the share of the critics that goes into their targets, where ``run`` looks for them."""
        raw, options = (data.observations, data.next_observations), (agent.observation_space, agent.policy.normalize_images)
        obs, next_obs = (preprocess_obs(part, *options).flatten(1) for part in raw)  # type: ignore[union-attr]
        # The first two actions only keep the place of the policy's.
        inputs = [obs, data.actions, next_obs, data.actions, obs, data.actions]
        discounts = [] if data.discounts is None else [data.discounts]
        th.cat([*inputs, data.dones, data.rewards, *discounts], dim=1, out=self.batch)
        self.rate.fill_(rate)

    def run(self) -> None:
        """Learn from the batch. All of it is captured: it must neither wait for the GPU nor depend on values."""
        for noise in self.noise:  # drawn one by one, as by SB3
            noise.normal_()
        hidden = self.hidden.forward(self.inputs[:2, :, : self.obs_dim].flatten(0, 1).unsqueeze(0))
        heads = self.heads.forward(hidden[-1].relu_().expand(2, -1, -1))
        actions = _Actions(heads[-1], self.noise.flatten(0, 1), self.epsilon)
        self.inputs[:2, :, self.obs_dim :] = actions.values.unflatten(0, (2, -1))
        log_probs, next_log_probs = actions.log_probs.chunk(2)
        alpha, *alpha_loss = self._alpha_step(log_probs)
        critic_loss = self._critic_step(alpha * next_log_probs)
        values, dq = self._least_critic()
        rows = len(dq)
        delta = actions.backward(dq, alpha / rows)
        self.heads.backward([heads[0][:, :rows]], delta)
        delta = through_relu(th.bmm(delta, self.heads.layers[0][0]).sum(0, keepdim=True), hidden[-1][:, :rows])
        self.hidden.backward([output[:, :rows] for output in hidden], delta)
        self.adams[0].step()
        self.target_rows.lerp_(self.critic_rows, self.rate)
        self.sums += th.cat([alpha, (alpha * log_probs - values).mean(0, keepdim=True), critic_loss, *alpha_loss])

    def _alpha_step(self, log_probs: th.Tensor) -> list[th.Tensor]:
        """``J(alpha) = -log alpha mean(log pi + target entropy)``; returns alpha before the step and, if learned, the loss."""
        if self.log_alpha is None:
            return [self.alpha]
        grad = -(log_probs.mean(0, keepdim=True) + self.target_entropy)
        alpha, loss = self.log_alpha.exp(), self.log_alpha * grad
        self.adams[2].grads[0, :1] = grad
        self.adams[2].step()
        return [alpha, loss]

    def _critic_step(self, penalty: th.Tensor) -> th.Tensor:
        """``J(Q) = 1/2 sum_i mean (Q_i(s, a) - r - (1 - done) gamma (min_j Q'_j(s', a') - penalty))^2``."""
        n, rows = len(self.critic_rows), len(penalty)
        outputs = self.all_critics.forward(self.inputs[1:].unsqueeze(1).expand(-1, n, -1, -1).flatten(0, 1))
        dones, rewards, *discounts = self.outcomes
        next_values = outputs[-1][:n].amin(0) - penalty.unsqueeze(1)
        errors = outputs[-1][n:] - (rewards + (1 - dones) * (discounts[0] if discounts else self.gamma) * next_values)
        self.critics.backward([output[n:] for output in outputs], errors / rows)
        self.adams[1].step()
        return errors.square().sum().view(1) / (2 * rows)

    def _least_critic(self) -> tuple[th.Tensor, th.Tensor]:
        """``min_i Q_i(s, pi(s)) (B,)``, and ``-1/B`` of it by the action, ``(B, action_dim)``."""
        outputs = self.fixed_critics.forward(self.inputs[:1].expand(len(self.critic_rows), -1, -1))
        values, least = outputs[-1].min(0, keepdim=True)
        delta = th.zeros_like(outputs[-1]).scatter_(0, least, -1 / values.shape[1])
        delta = self.fixed_critics.backward(outputs, delta)
        return values.flatten(), th.bmm(delta, self.critics.layers[0][0][:, :, self.obs_dim :]).sum(0)
