"""
What the boundary costs: ``python benchmarks/boundary.py`` steps Hopper-v5 with and without it, step by step in turns, and
holds the difference against a step of the env, one that SAC takes without learning from it, and one of MBPO.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbpo import MBPO
from sb3_mbpo.validation.env_outputs import Boundary

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "boundary.csv"
COLUMNS = ["env", "of_the_times", "step_us", "watched_step_us", "acting_step_us", "mbpo_step_us", "steps"]


def seconds_a_step(model: BaseAlgorithm, steps: int) -> float:
    """Of the processor, not of the wall: others may be at work as well."""
    started = time.process_time()
    model.learn(steps, reset_num_timesteps=False)
    return (time.process_time() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    th.set_num_threads(1)

    env = DummyVecEnv([lambda: Monitor(gym.make(args.env))])
    boundary = Boundary(env)
    env.action_space.seed(0)
    actions = np.array([env.action_space.sample()])
    env.reset()
    plain, watched = [], []
    for _ in range(args.steps):
        started = time.perf_counter()
        env.step(actions)
        between = time.perf_counter()
        boundary.watch("step", 0)
        env.step(actions)
        plain.append(between - started)
        watched.append(time.perf_counter() - between)

    # The env is stepped, the policy is asked, the transition is stored: the least that a step can be.
    acting = seconds_a_step(SAC("MlpPolicy", args.env, learning_starts=0, gradient_steps=0, seed=0), args.steps // 4)
    model = MBPO("MlpPolicy", args.env, learning_starts=500, seed=0)
    # Fitting and imagining are left out: they would only make the share less.
    model.learn(501)
    model.model_train_freq = 10**9
    learning = seconds_a_step(model, 50)

    rows = []
    for name, quarter in (("lower quartile", 0), ("median", 1)):
        of_plain, of_watched = (statistics.quantiles(times, n=4)[quarter] for times in (plain, watched))
        added = of_watched - of_plain
        print(
            f"{name}: env step {1e6 * of_plain:.1f} us, watched {1e6 * of_watched:.1f} us: {1e6 * added:.1f} us more, "
            f"{100 * added / of_plain:.1f} % of the env step, {100 * added / acting:.2f} % of one of SAC without updates "
            f"({1e6 * acting:.0f} us), {100 * added / learning:.3f} % of a step of MBPO ({1e3 * learning:.0f} ms)"
        )
        rows.append([args.env, name, *(f"{1e6 * t:.2f}" for t in (of_plain, of_watched, acting, learning)), args.steps])
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
