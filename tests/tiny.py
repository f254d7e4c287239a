"""Agents that learn in seconds, what they have learned compared, and a dynamics that has nothing to learn."""

from typing import Any

import torch as th

from sb3_mbpo import DynamicsModel

FAST: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "batch_size": 16,
    "learning_starts": 20,
    "rollout_batch_size": 30,
    "gradient_steps": 2,
    "dynamics_kwargs": {"net_arch": [8], "max_updates": 3},
    # What is learned here in a few updates explains nothing yet.
    "min_explained_variance": None,
    "seed": 0,
}


def equal_agents(first, second) -> bool:
    a, b = first.get_parameters(), second.get_parameters()
    networks = all(th.equal(a["policy"][key], b["policy"][key]) for key in b["policy"])
    moments = [[s["exp_avg"] for s in p["critic.optimizer"]["state"].values()] for p in (a, b)]
    same_moments = all(th.equal(x, y) for x, y in zip(*moments, strict=True))
    return networks and same_moments and th.equal(first.log_ent_coef, second.log_ent_coef)


class TruePendulum(DynamicsModel):
    """Pendulum-v1 itself, from its source: g = 10, m = l = 1, dt = 0.05."""

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        angle, speed, torque = th.atan2(obs[:, 1], obs[:, 0]), obs[:, 2], 2 * actions[:, 0]
        rewards = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
        speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
        angle = angle + speed * 0.05
        return th.stack([angle.cos(), angle.sin(), speed], dim=1), rewards
