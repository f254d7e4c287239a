"""
An agent has learned, and the world changes: what old transitions cost, and what forget_transitions and dynamics_window do.

Pendulum-v1, 2,000 steps with gravity 10; the agent and its buffer are saved. Then gravity is 14, and each arm goes on
from there for 500 steps. Every 100 steps ten deterministic episodes of the changed world, which start alike for all arms.

    python benchmarks/changed_world.py --out docs/benchmarks/changed_world.csv

One process with one thread: about 2 minutes of CPU time for a first agent, and 20 seconds for each arm and seed. First
agents are kept in --folder, and not trained again while they are there; rows that are in the CSV are not measured again.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import MBPO
from sb3_mbpo.model_based import model_learning

STEPS, MORE, EVERY = 2_000, 500, 100
# Updates a step after the change, of all arms.
UPDATES = 10
# Small networks, with the learning rate that they like: a first agent takes about a minute.
SETTINGS: dict[str, Any] = {
    **{"learning_starts": 200, "gradient_steps": 20, "rollout_batch_size": 20_000, "learning_rate": 1e-3},
    **{"policy_kwargs": {"net_arch": [64, 64]}, "dynamics_kwargs": {"net_arch": [64, 64, 64, 64]}},
}
WINDOWS: dict[str, dict[str, int]] = {
    f"window 250, a fit every {steps} steps": {"dynamics_window": 250, "model_train_freq": steps} for steps in (50, 250)
}
COLUMNS = ["seed", "arm", "step", "return", "explained_obs", "explained_reward", "real_share", "cpu_seconds"]


def keep(agent: MBPO) -> None:
    """The buffer stays: the agent is told nothing."""


def empty(agent: MBPO) -> None:
    """The buffer is emptied, and nothing else is done: updates go on from the first new transition."""
    agent.replay_buffer.reset()


def forget(rows: int) -> Callable[[MBPO], None]:
    def arm(agent: MBPO) -> None:
        model_learning.ROWS_AFTER_FORGETTING = rows
        agent.forget_transitions()

    return arm


ARMS: dict[str, Callable[[MBPO], None]] = {
    "kept": keep,
    "emptied": empty,
    **{f"forget, {rows} rows": forget(rows) for rows in (50, 100, 200)},
    **dict.fromkeys(WINDOWS, keep),
}


def first_agent(folder: Path, seed: int) -> None:
    """Train with gravity 10, and save."""
    agent = MBPO("MlpPolicy", gym.make("Pendulum-v1"), **SETTINGS, seed=seed)
    agent.learn(STEPS)
    agent.save_replay_buffer(folder / f"{seed}.pt")
    agent.save(folder / f"{seed}.zip")


def evaluated(agent: MBPO, gravity: float, seed: int) -> float:
    env = Monitor(gym.make("Pendulum-v1", g=gravity))
    env.reset(seed=10_000 + seed)
    with th.random.fork_rng():
        mean, _ = evaluate_policy(agent, env, n_eval_episodes=10)
    assert isinstance(mean, float)
    return mean


def measured(agent: MBPO, gravity: float, started: float, **about: Any) -> dict[str, Any]:
    """:return: a row of the CSV: ``about`` (seed, arm, step), the return, metrics of the last fit, CPU seconds"""
    log = agent.logger.name_to_value
    return {
        **about,
        "return": evaluated(agent, gravity, about["seed"]),
        **{name: log.get(f"dynamics/{name}", float("nan")) for name in COLUMNS[4:7]},
        "cpu_seconds": time.process_time() - started,
    }


def complete(out: Path, seeds: Iterable[int], arms: Iterable[str], run: Callable[[int, str], list[dict[str, Any]]]) -> None:
    """Append the rows of each seed and arm that the CSV ``out`` does not have."""
    done = set()
    if out.exists():
        with out.open(encoding="utf-8") as file:
            done = {(row["seed"], row["arm"]) for row in csv.DictReader(file)}
    else:
        with out.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
    for seed, arm in product(seeds, arms):
        if (str(seed), arm) not in done:
            rows = run(seed, arm)
            with out.open("a", newline="") as file:
                rounded = [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
                csv.DictWriter(file, COLUMNS).writerows(rounded)


def run(folder: Path, seed: int, arm: str) -> list[dict[str, Any]]:
    """:return: rows of the CSV"""
    settings: dict[str, Any] = WINDOWS.get(arm, {})
    agent = MBPO.load(folder / f"{seed}.zip", env=gym.make("Pendulum-v1", g=14.0), **settings)
    agent.load_replay_buffer(folder / f"{seed}.pt")
    agent.set_random_seed(100 + seed)
    before, started = agent.num_timesteps, time.process_time()
    rows = []
    if arm == "kept":
        for name, gravity in (("before, gravity 10", 10.0), ("before", 14.0)):
            rows.append({"seed": seed, "arm": name, "step": 0, "return": evaluated(agent, gravity, seed)})
    agent.gradient_steps = UPDATES
    ARMS[arm](agent)
    while agent.num_timesteps < before + MORE:
        agent.learn(EVERY, log_interval=1_000_000, reset_num_timesteps=False)
        rows.append(measured(agent, 14.0, started, seed=seed, arm=arm, step=agent.num_timesteps - before))
    return rows


def table(path: Path) -> None:
    """Print, for each arm, the seeds' mean return over steps 300, 400 and 500, then that at 500."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for last in (3, 1):
            of_seeds: dict[str, list[float]] = {}
            for row in rows:
                if row["arm"] == arm:
                    of_seeds.setdefault(row["seed"], []).append(float(row["return"]))
            cells.append(", ".join(f"{np.mean(returns[-last:]):.0f}" for returns in of_seeds.values()))
        print(f"| {arm} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("logs/changed_world"))
    args = parser.parse_args()
    th.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)

    def after_first(seed: int, arm: str) -> list[dict[str, Any]]:
        if not (args.folder / f"{seed}.zip").exists():
            first_agent(args.folder, seed)
        return run(args.folder, seed, arm)

    complete(args.out, args.seeds, args.arms, after_first)
    table(args.out)


if __name__ == "__main__":
    main()
