"""The fast SAC update on a GPU: the equations of ``cpu.py`` with fixed shapes, captured once as a CUDA graph and replayed."""

import math
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN

from sb3_mbpo.fast_sac.side_stream import SideStream
from sb3_mbpo.fast_sac.stacks import LEAD, Stack, lead_of
from sb3_mbpo.fast_sac.static_memory import SACMemory, adam_settings, optimizers_of

# Captured updates of agents with their settings. Not an attribute of the agent, so that it is not saved or copied.
_UPDATES: "WeakKeyDictionary[SAC, tuple[Any, _Update | None]]" = WeakKeyDictionary()


@th.no_grad()
def train(agent: SAC, batches: Iterable[ReplayBufferSamples]) -> bool:
    """
    ``SAC.train`` on given batches, equal up to rounding: same noise from the same generator, same equations, same log entries.

    Parameters and optimizer states are read from SB3's objects at the start of a call and written back at the end. The CUDA
    graph is kept, and captured again when shapes or Adam's settings change. If Adam's counters are on the CPU, the host waits
    for the GPU only once, to log. Supports the agents that ``eligibility.why_not_fast`` and ``static_memory.why_not_static``
    accept, but does not check them. On a CPU, the same code runs without a capture.

    :param agent: the agent to train
    :param batches: one batch per update, all of the same size
    :return: whether the updates were done; ``False`` if the capture failed, which warns once and leaves the agent unchanged
    """
    agent._update_learning_rate(optimizers_of(agent))
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
    update.memory.write(agent, n_updates)
    # This does not affect the update, and costs no time here because the GPU is still busy.
    agent.policy.set_training_mode(True)
    for optimizer in optimizers_of(agent):
        optimizer.zero_grad()

    agent._n_updates += n_updates
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    for key, mean in zip(("ent_coef", "actor_loss", "critic_loss", "ent_coef_loss"), update.means(n_updates), strict=False):
        agent.logger.record(f"train/{key}", mean)
    return True


def _update_for(agent: SAC, batch: ReplayBufferSamples) -> "_Update | None":
    """:return: the captured update for this agent and batches of this shape; ``None`` if the capture failed"""
    groups = [optimizer.param_groups[0] for optimizer in optimizers_of(agent)]
    adams = [(g["betas"], g["eps"], [(p.shape, p.dtype, p.device) for p in g["params"]]) for g in groups]
    epsilon, together = agent.actor.action_dist.epsilon, len({*adam_settings(agent)[1:]})  # type: ignore[union-attr]
    settings = (len(batch.rewards), batch.discounts is None, epsilon, adams, together)
    if agent not in _UPDATES or _UPDATES[agent][0] != settings:
        _UPDATES.pop(agent, None)
        _UPDATES[agent] = (settings, _captured(agent, batch, groups[0]["params"][0].device))
    return _UPDATES[agent][1]


def _captured(agent: SAC, batch: ReplayBufferSamples, device: Any) -> "_Update | None":
    """:return: update whose ``run`` replays a CUDA graph, see https://pytorch.org/docs/stable/notes/cuda.html"""
    if device.type != "cuda":
        return _Update(agent, batch)
    generator = th.cuda.default_generators[device.index]
    random_state = generator.clone_state()
    try:
        update, graph, stream = _Update(agent, batch), th.cuda.CUDAGraph(), th.cuda.Stream(device)
        stream.wait_stream(th.cuda.current_stream(device))
        # The warm-up steps change only memory that is read again, and the forked default generator.
        with th.random.fork_rng([device]), th.cuda.stream(stream):
            for _ in range(3):
                update.run()
            with th.cuda.graph(graph, stream=stream):
                try:
                    update.run()
                finally:
                    # Otherwise, an interruption would be hidden by an error about the side stream at the end of the capture.
                    update.side.join()
        th.cuda.current_stream(device).wait_stream(stream)
    except BaseException as error:
        # The warm-up steps may still use memory that is freed from here on.
        th.cuda.synchronize(device)
        # Replace the generator's state: it would still be in capture mode and refuse to draw. Earlier graphs draw from the
        # replaced state, so they must be captured again.
        generator.graphsafe_set_state(random_state)
        for other in [other for other, (_, known) in _UPDATES.items() if known is not None]:
            del _UPDATES[other]
        if not isinstance(error, Exception):
            raise
        message = f"The SAC update could not be captured as a CUDA graph; Stable-Baselines3's own is used ({error})"
        warnings.warn(message, stacklevel=5)
        return None
    update.run = graph.replay  # type: ignore[method-assign]
    return update


class _Actions:
    """Actions ``values (N, action_dim)`` of the squashed Gaussian, and the intermediate results for gradients."""

    def __init__(self, heads: th.Tensor, noise: th.Tensor) -> None:
        mean, self.raw_log_std = heads.chunk(2, dim=1)
        self.log_std = self.raw_log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        self.spread = self.log_std.exp().mul_(noise)
        self.values = (mean + self.spread).tanh_()

    def log_probs(self, noise: th.Tensor, epsilon: float, one: th.Tensor) -> th.Tensor:
        """:return: ``log pi`` of each row ``(N,)``; must be called before :meth:`backward`"""
        self.slope = th.addcmul(one, self.values, self.values, value=-1)
        self.lifted_slope = self.slope + epsilon
        terms = th.addcmul(self.log_std, noise, noise, value=0.5).add_(self.lifted_slope.log())
        return -noise.shape[1] * 0.5 * math.log(2 * math.pi) - terms.sum(1)

    def backward(self, dq: th.Tensor, scale: th.Tensor, out: th.Tensor) -> None:
        """Store in ``out`` the gradients of ``<dq, a> - sum(scale log pi)`` for mean and log_std of the first rows."""
        n = len(dq)
        by_mean, by_log_std = out.chunk(2, dim=1)
        by_action = th.addcmul(dq, self.values[:n] / self.lifted_slope[:n], scale, value=-2)
        th.mul(self.slope[:n], by_action, out=by_mean)
        th.addcmul(scale, by_mean, self.spread[:n], out=by_log_std)
        by_log_std.masked_fill_(self.raw_log_std[:n] != self.log_std[:n], 0)


class _Update:
    """One gradient step of SAC in static memory, for batches of the same shape. Does not keep a reference to the agent."""

    def __init__(self, agent: Any, batch: ReplayBufferSamples) -> None:
        self.memory = memory = SACMemory(agent)
        self.n, self.rows, new = memory.n_critics, len(batch.rewards), memory.actor.new_zeros
        (_, self.obs_dim), (heads, _) = memory.pi_shapes[0], memory.pi_shapes[-1]
        self.side = SideStream(memory.actor.device)
        self.actor = Stack(memory.actor, memory.pi_shapes, (2, self.rows), self.side)
        self.all_critics = Stack(memory.all_critics, memory.q_shapes, (2 * self.n, self.rows), self.side)
        self.critics = Stack(memory.critics, memory.q_shapes, (self.n, self.rows), self.side)
        # Concatenated, once per critic: (s, pi(s)), (s', pi(s')), (s, a); then done, reward and, if it varies, discount.
        width = LEAD + self.obs_dim + heads // 2
        self.batch = new(self.rows, 3 * self.n * width + 2 + (batch.discounts is not None))
        inputs, outcomes = self.batch.tensor_split([3 * self.n * width], dim=1)
        self.inputs, self.outcomes = inputs.unflatten(1, (3 * self.n, width)).transpose(0, 1), outcomes.split(1, dim=1)
        self.epsilon, self.lead = agent.actor.action_dist.epsilon, lead_of(self.rows, memory.actor)
        self.noise, self.by_heads = new(2, self.rows, heads // 2), new(1, self.rows, heads)
        self.one, self.gamma, self.rate, self.minus_target_entropy = (new(1) for _ in range(4))
        # Logged values: alpha and the losses of actor, critics and, if it is learned, alpha.
        self.logged = new(3 + (memory.log_alpha is not None))
        self.sums, self.last_rate = th.zeros_like(self.logged, dtype=th.float64), 0.0
        self.one.fill_(1)

    def read(self, agent: Any) -> None:
        """Read parameters, optimizer states and settings from SB3's objects."""
        self.memory.read(agent)
        if self.memory.log_alpha is None:
            self.logged[:1].copy_(agent.ent_coef_tensor)
        else:
            self.minus_target_entropy.fill_(-agent.target_entropy)
        self.gamma.fill_(agent.gamma)
        self.sums.zero_()

    def means(self, n_steps: int) -> Any:
        """:return: means of the logged values over ``n_steps``; waits for the GPU"""
        sums = np.array(self.sums.tolist())
        # This is the sum of squared errors.
        sums[2] /= 2 * self.rows
        return sums / n_steps

    def put(self, agent: Any, data: ReplayBufferSamples, rate: float) -> None:
        """Store a batch, and the rate of the target update, for the next ``run``."""
        raw, options = (data.observations, data.next_observations), (agent.observation_space, agent.policy.normalize_images)
        obs, next_obs = (preprocess_obs(part, *options).flatten(1) for part in raw)  # type: ignore[union-attr]
        # The first two actions are placeholders for the policy's.
        inputs = [part for each in (obs, next_obs, obs) for part in self.n * [self.lead, each, data.actions]]
        discounts = [] if data.discounts is None else [data.discounts]
        th.cat([*inputs, data.dones, data.rewards, *discounts], dim=1, out=self.batch)
        # Reading the tensor would wait for the GPU, and filling it each time would be one more launch.
        if rate != self.last_rate:
            self.rate.fill_(rate)
            self.last_rate = rate

    def run(self) -> None:
        """Learn from the batch. This is captured, so it must not wait for the GPU or depend on values."""
        # Inputs of the side stream need a name here. Otherwise, their memory would be reused before the join.
        for noise in self.noise:  # drawn one after the other, as in SB3
            noise.normal_()
        outputs = self.actor.forward(self.inputs[: 2 * self.n : self.n, :, : LEAD + self.obs_dim])
        noise = self.noise.flatten(0, 1)
        actions = _Actions(outputs[-1].flatten(0, 1), noise)
        # alpha is the value before this update's step.
        alpha = self.logged[:1]
        with self.side.beside():
            log_probs = actions.log_probs(noise, self.epsilon, self.one)
            self._alpha_gradient(log_probs[: self.rows])
            penalty, next_penalty = (alpha * log_probs).chunk(2)
        places = self.inputs[: 2 * self.n, :, LEAD + self.obs_dim :].unflatten(0, (2, self.n))
        places.copy_(actions.values.unflatten(0, (2, 1, self.rows)))
        errors = self._critic_step(next_penalty)
        with self.side.beside():
            th.mm(errors.view(1, -1), errors.view(-1, 1), out=self.logged[2:3].view(1, 1))
            self.memory.targets.lerp_(self.memory.critics, self.rate)
        values, dq = self._least_critic()
        with self.side.beside():
            th.mean(penalty - values, 0, keepdim=True, out=self.logged[1:2])
        actions.backward(dq, alpha * (-1 / self.rows), self.by_heads[0])
        self.actor.backward([output[:1] for output in outputs], self.by_heads, self.memory.actor_grads)
        self.memory.step_actor_and_alpha()
        self.sums += self.logged

    def _alpha_gradient(self, log_probs: th.Tensor) -> None:
        """``J(alpha) = -log alpha mean(log pi + target entropy)``, if alpha is learned."""
        log_alpha, grad = self.memory.log_alpha, self.memory.alpha_grad
        if log_alpha is not None and grad is not None:
            th.exp(log_alpha, out=self.logged[:1])
            th.sub(self.minus_target_entropy, log_probs.mean(0, keepdim=True), out=grad)
            th.mul(log_alpha, grad, out=self.logged[3:])

    def _critic_step(self, penalty: th.Tensor) -> th.Tensor:
        """:return: errors in ``J(Q) = 1/2 sum_i mean (Q_i(s, a) - r - (1 - done) gamma (min_j Q'_j(s', a') - penalty))^2``"""
        outputs = self.all_critics.forward(self.inputs[self.n :])
        self.side.join()
        dones, rewards, *discounts = self.outcomes
        gamma = discounts[0] if discounts else self.gamma
        next_values = outputs[-1][: self.n].amin(0) - penalty.unsqueeze(1)
        returns = th.addcmul(rewards, th.addcmul(gamma, gamma, dones, value=-1), next_values)
        errors = outputs[-1][self.n :] - returns
        self.critics.backward([output[self.n :] for output in outputs], errors / self.rows, self.memory.critic_grads)
        self.memory.step_critics()
        return errors

    def _least_critic(self) -> tuple[th.Tensor, th.Tensor]:
        """:return: ``min_i Q_i(s, pi(s)) (B,)``, and ``-1/B`` times its gradient in the action, ``(B, action_dim)``"""
        outputs = self.critics.forward(self.inputs[: self.n])
        values, least = outputs[-1].min(0, keepdim=True)
        delta = self.critics.backward(outputs, th.zeros_like(outputs[-1]).scatter_(0, least, -1 / self.rows))
        return values.flatten(), th.bmm(delta, self.critics.layers[0][:, :, LEAD + self.obs_dim :]).sum(0)
