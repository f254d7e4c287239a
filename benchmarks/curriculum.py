"""
A curriculum: gravity rises from 6 to 14 while the agent learns. What a window and forget_transitions do then.

    python benchmarks/curriculum.py --out docs/benchmarks/curriculum.csv

Pendulum-v1 with the small networks of changed_world.py, 10 updates a step. Gravity rises by 2 every 400 steps, at the end of
an episode. The arm "no curriculum" has gravity 14 from the start. Every 400 steps ten deterministic episodes with gravity 14,
which start alike for all arms. One process with one thread, two minutes for each arm and seed; rows that are in the CSV are
not measured again.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from changed_world import SETTINGS, UPDATES, complete, measured
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbpo import MBPO

STEPS, LESSON, FIRST, LAST, RISE = 2_800, 400, 6.0, 14.0, 2.0
ARMS: dict[str, dict[str, Any]] = {
    "no curriculum": {},
    "all transitions": {},
    "window": {"dynamics_window": 1_000},
    "forget": {},
}


class Lessons(BaseCallback):
    """Raises gravity, and optionally forgets where a lesson begins."""

    def __init__(self, forget: bool) -> None:
        super().__init__()
        self.forget = forget

    def _on_step(self) -> bool:
        env = self.training_env.envs[0].unwrapped  # type: ignore[attr-defined]
        gravity = min(FIRST + RISE * (self.num_timesteps // LESSON), LAST)
        if self.locals["dones"][0] and env.g != gravity:
            env.g = gravity
            if self.forget:
                self.model.forget_transitions(keep=1)  # type: ignore[attr-defined]
        return True


def run(seed: int, arm: str) -> list[dict[str, Any]]:
    """:return: rows of the CSV"""
    env = gym.make("Pendulum-v1", g=LAST if arm == "no curriculum" else FIRST)
    agent = MBPO("MlpPolicy", env, **SETTINGS | {"gradient_steps": UPDATES, "model_train_freq": 100} | ARMS[arm], seed=seed)
    callback = None if arm == "no curriculum" else Lessons(forget=arm == "forget")
    started, rows = time.process_time(), []
    while agent.num_timesteps < STEPS:
        agent.learn(LESSON, callback, log_interval=1_000_000, reset_num_timesteps=False)
        rows.append(measured(agent, LAST, started, seed=seed, arm=arm, step=agent.num_timesteps))
    return rows


def table(path: Path) -> None:
    """Print the mean return over the seeds at each step, then the last of each seed."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        steps = sorted({int(row["step"]) for row in of_arm})
        means = [np.mean([float(row["return"]) for row in of_arm if int(row["step"]) == step]) for step in steps]
        last = [f"{float(row['return']):.0f}" for row in of_arm if int(row["step"]) == steps[-1]]
        print(f"| {arm} | {' | '.join(f'{mean:.0f}' for mean in means)} | {', '.join(last)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args()
    th.set_num_threads(1)
    complete(args.out, args.seeds, args.arms, run)
    table(args.out)


if __name__ == "__main__":
    main()
