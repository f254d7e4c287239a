"""The networks of a SAC agent and their optimizers' moments in one block of memory with constant addresses."""

from itertools import groupby
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC

from sb3_mbpo.fast_sac.stacks import Mirror, StaticAdam, aligned, layers_of, row_size, views_of


def optimizers_of(agent: Any) -> list[Any]:
    """:return: optimizers of critics, actor and, if it is learned, log alpha: the order of their parameters in memory"""
    optional = [] if agent.ent_coef_optimizer is None else [agent.ent_coef_optimizer]
    return [agent.critic.optimizer, agent.actor.optimizer, *optional]


def counts_of(agent: SAC) -> list[set[float]]:
    """:return: for each optimizer, the different numbers of steps of its parameters"""
    counts = []
    for optimizer in optimizers_of(agent):
        states = [optimizer.state.get(parameter) for parameter in optimizer.param_groups[0]["params"]]
        steps = [state["step"] for state in states if state]
        counts.append({*(th.stack(steps).tolist() if steps else []), *([] if all(states) else [0.0])})
    return counts


def why_not_static(agent: SAC) -> str | None:
    """
    :param agent: the agent in its current state
    :return: why :class:`SACMemory` cannot replace its optimizers, as a short phrase; ``None`` if it can
    """
    if any(len(counts) > 1 for counts in counts_of(agent)):
        return "on a GPU, unequal numbers of steps of one optimizer's parameters"
    # The values between the parameters would not stay zero.
    if not all(np.float32(optimizer.param_groups[0]["eps"]) > 0 for optimizer in optimizers_of(agent)):
        return "on a GPU, an eps of zero"
    return None


def _originals(agent: Any) -> tuple[list[th.Tensor], list[th.Tensor]]:
    """:return: SB3's tensors in the order of ``SACMemory``, and Adam's counters; missing Adam states are created"""
    parameters, averages, squares, counters = [], [], [], []
    for group, states in ((optimizer.param_groups[0], optimizer.state) for optimizer in optimizers_of(agent)):
        for parameter in group["params"]:
            state = states[parameter]
            if not state:
                state["step"] = th.zeros((), device=parameter.device if group["fused"] else "cpu")
                state["exp_avg"], state["exp_avg_sq"] = th.zeros_like(parameter), th.zeros_like(parameter)
            elif not group["fused"]:
                # SB3 loads it to the GPU, where reading it would wait for the GPU.
                state["step"] = state["step"].cpu()
            parameters.append(parameter)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            counters.append(state["step"])
    return [*agent.critic_target.parameters(), *parameters, *averages, *squares], counters


def adam_settings(agent: SAC) -> list[tuple[Any, ...]]:
    """:return: settings of each optimizer; optimizers with equal settings can do a step together"""
    groups = (optimizer.param_groups[0] for optimizer in optimizers_of(agent))
    return [(*group["betas"], group["eps"], group["lr"]) for group in groups]


class SACMemory:
    """
    Target critics, critics, actor and log alpha, then first and second moments of the last three.

    :param agent: The agent, whose shapes and Adam settings are used; no reference to it is kept
    """

    def __init__(self, agent: Any) -> None:
        groups = [optimizer.param_groups[0] for optimizer in optimizers_of(agent)]
        critics, (*hidden, head, _) = ([tuple(p.shape) for p in group["params"] if p.dim() == 2] for group in groups[:2])
        self.n_critics = len(agent.critic.q_networks)
        self.q_shapes = critics[: len(critics) // self.n_critics]
        # Mean and log_std are one layer.
        self.pi_shapes = [*hidden, (2 * head[0], head[1])]
        self._sizes = [self.n_critics * row_size(self.q_shapes), row_size(self.pi_shapes), *(aligned(1) for _ in groups[2:])]
        memory = groups[0]["params"][0].new_zeros(self._sizes[0] + 3 * sum(self._sizes))
        self._mirror = Mirror(memory, self._views)

        _, learned, *moments = self._parts(memory)
        # For each optimizer: parameters, gradients and moments.
        parts = [*zip(*(kind.split(self._sizes) for kind in (learned, th.zeros_like(learned), *moments)), strict=True)]
        (_, q_grads, *_), (pi, pi_grads, *_), *of_alpha = parts
        #: Rows of target critics, then critics; of the critics; of the actor.
        self.all_critics = memory[: 2 * self._sizes[0]].view(2 * self.n_critics, -1)
        self.targets, self.critics = self.all_critics.chunk(2)
        self.actor = pi.view(1, -1)
        self.critic_grads = layers_of(q_grads.view_as(self.critics), self.q_shapes)
        self.actor_grads = layers_of(pi_grads.view_as(self.actor), self.pi_shapes)
        #: Log alpha and its gradient ``(1,)``, if it is learned.
        self.log_alpha: th.Tensor | None = of_alpha[0][0][:1] if of_alpha else None
        self.alpha_grad: th.Tensor | None = of_alpha[0][1][:1] if of_alpha else None
        # The critics' step comes first. The others may be done together.
        settings = adam_settings(agent)
        self._together = [[0], *([*which] for _, which in groupby(range(1, len(groups)), key=settings.__getitem__))]
        self._adams = [StaticAdam(groups[which[0]], [parts[i] for i in which]) for which in self._together]

    def _parts(self, memory: th.Tensor) -> tuple[th.Tensor, ...]:
        return memory.split([self._sizes[0], *3 * [sum(self._sizes)]])

    def _views(self, memory: th.Tensor) -> list[th.Tensor]:
        targets, *learned = self._parts(memory)
        views = views_of(targets.view(self.n_critics, -1), self.q_shapes)
        for part in learned:
            critics, actor, *log_alpha = part.split(self._sizes)
            views += views_of(critics.view(self.n_critics, -1), self.q_shapes)
            views += [*views_of(actor.view(1, -1), self.pi_shapes, heads=2), *(part[:1] for part in log_alpha)]
        return views

    def read(self, agent: SAC) -> None:
        """Read parameters and optimizer states from SB3's objects."""
        # Count the steps before missing states are created and counters are moved from the GPU.
        counts = [max(of_one) for of_one in counts_of(agent)]
        self._mirror.read(_originals(agent)[0])
        for adam, which in zip(self._adams, self._together, strict=True):
            adam.learning_rate.fill_(optimizers_of(agent)[which[0]].param_groups[0]["lr"])
            adam.set_counters([counts[i] for i in which])

    def write(self, agent: SAC, n_steps: int) -> None:
        """Write parameters and optimizer states to SB3's objects, after ``n_steps``."""
        tensors, counters = _originals(agent)
        self._mirror.write(tensors)
        th._foreach_add_(counters, n_steps)

    def step_critics(self) -> None:
        """Do an Adam step with the gradients of the critics."""
        self._adams[0].step()

    def step_actor_and_alpha(self) -> None:
        """Do an Adam step with the gradients of the actor and, if it is learned, of log alpha."""
        for adam in self._adams[1:]:
            adam.step()
