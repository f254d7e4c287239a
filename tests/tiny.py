"""Agents that learn in seconds, and what they have learned compared."""

from typing import Any

import torch as th

FAST: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "batch_size": 16,
    "learning_starts": 20,
    "rollout_batch_size": 30,
    "gradient_steps": 2,
    "dynamics_kwargs": {"net_arch": [8], "max_updates": 3},
    "seed": 0,
}


def equal_agents(first, second) -> bool:
    a, b = first.get_parameters(), second.get_parameters()
    networks = all(th.equal(a["policy"][key], b["policy"][key]) for key in b["policy"])
    moments = [[s["exp_avg"] for s in p["critic.optimizer"]["state"].values()] for p in (a, b)]
    same_moments = all(th.equal(x, y) for x, y in zip(*moments, strict=True))
    return networks and same_moments and th.equal(first.log_ent_coef, second.log_ent_coef)
