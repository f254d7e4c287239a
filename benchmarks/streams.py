"""
Real transitions of the tasks of ``ends.py`` as an agent meets them: random play, then policies that half know what to do.

A half-trained policy is a controller whose aim and gains are drawn anew in every episode, with noise on its actions; it costs
nothing, so that learned rewards and ends can be measured over many seeds (``learned_ends.py``, ``learned_rewards.py``).
"""

from collections.abc import Callable

import torch as th
from ends import TASKS, Fall, ForbiddenDisc, GoalDisc, ObservedGoal, Task
from stable_baselines3.common.type_aliases import ReplayBufferSamples

Policy = Callable[[th.Tensor], th.Tensor]


def at_random(n: int, generator: th.Generator) -> Policy:
    """:param n: episodes side by side"""
    return lambda obs: th.rand(len(obs), 2, generator=generator) * 2 - 1


def half_trained(task: type[Task], n: int, agent: int, generator: th.Generator) -> Policy:
    """
    A policy for ``n`` episodes side by side, each of which strays a little from what the agent aims at.

    :param agent: seed of the agent, whose aim is off
    :return: ``(n, obs_dim)`` -> ``(n, 2)``
    """
    gain = 0.5 + 2.5 * th.rand(n, 1, generator=generator)
    damping, aim = 1.5 * th.rand(n, 1, generator=generator), 0.25 * th.randn(n, 2, generator=generator)
    aim = aim + 0.25 * th.randn(2, generator=th.Generator().manual_seed(agent))

    def act(obs: th.Tensor) -> th.Tensor:
        noise = 0.5 * th.randn(n, 2, generator=generator)
        if task is Fall:
            upright = th.stack([1 - obs[:, 0] + aim[:, 0] / 2, -obs[:, 1] - 0.3 * obs[:, 3]], dim=1)
            return (gain * upright + noise).clamp(-1, 1)
        target = {ForbiddenDisc: obs.new_zeros(2), GoalDisc: obs.new_tensor(GoalDisc.CENTER)}.get(task)
        if target is None:
            assert task is ObservedGoal
            target = obs[:, 4:]
        return (gain * (target + aim - obs[:, :2]) - damping * obs[:, 2:4] + noise).clamp(-1, 1)

    return act


def episodes(env_id: str, n: int, agent: int, seed: int, random: bool = False) -> list[ReplayBufferSamples]:
    """
    :param env_id: of ``ends.TASKS``
    :param n: episodes
    :param agent: its seed
    :param seed: of the episodes
    :param random: random play, or the half-trained policy of this agent
    :return: each of them, in the agent's terms
    """
    task, _, steps = TASKS[env_id]
    generator, env = th.Generator().manual_seed(seed), task()
    env.reset(seed=seed)
    obs = th.stack([th.as_tensor(env.start(), dtype=th.float32) for _ in range(n)])
    policy = at_random(n, generator) if random else half_trained(task, n, agent, generator)
    rows: list[tuple[th.Tensor, ...]] = []
    alive, lived = th.ones(n, dtype=th.bool), th.zeros(n, dtype=th.long)
    for _ in range(steps):
        actions = policy(obs)
        next_obs, rewards, ended = task.transition(obs, actions)
        rows.append((obs, actions, next_obs, ended[:, None].float(), rewards[:, None]))
        lived += alive
        alive = alive & ~ended
        obs = next_obs
    stacked = [th.stack(parts, dim=1) for parts in zip(*rows, strict=True)]
    return [ReplayBufferSamples(*(part[i, : lived[i]] for part in stacked)) for i in range(n)]


def joined(parts: list[ReplayBufferSamples]) -> ReplayBufferSamples:
    """:return: all transitions of some episodes"""
    return ReplayBufferSamples(*(th.cat(columns) for columns in zip(*(part[:5] for part in parts), strict=True)))


def stream(env_id: str, n: int, agent: int, learning_starts: int = 500) -> ReplayBufferSamples:
    """:return: the first ``n`` transitions of an agent, by its seed, that plays at random until ``learning_starts``"""
    steps = TASKS[env_id][2]
    # Episodes may be short: more of them than are needed.
    first = joined(episodes(env_id, max(4, learning_starts // 5), agent, 2 * agent, random=True))
    rest = joined(episodes(env_id, max(4, n // 5), agent, 2 * agent + 1))
    assert len(first.rewards) >= learning_starts and len(rest.rewards) >= n, f"{env_id}: too few episodes of {steps} steps"
    return ReplayBufferSamples(
        *(th.cat([a[:learning_starts], b[: n - learning_starts]]) for a, b in zip(first[:5], rest[:5], strict=True))
    )
