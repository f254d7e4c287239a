"""
What the checks of an env's outputs cost: ``python benchmarks/env_outputs.py`` steps Hopper-v5 with and without them, step by
step in turns, and compares the difference with a step of the env, one of SAC without learning, and one of MBPO.
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
from sb3_mbpo.validation.env_outputs import add_checks

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "env_outputs.csv"
COLUMNS = ["env", "of_the_times", "step_us", "checked_step_us", "acting_step_us", "mbpo_step_us", "steps"]


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

    envs = [DummyVecEnv([lambda: Monitor(gym.make(args.env))]) for _ in range(2)]
    add_checks(envs[1])
    for env in envs:
        env.seed(0)
        env.action_space.seed(0)
        env.reset()
    times: list[list[float]] = [[], []]
    for _ in range(args.steps):
        for env, seconds in zip(envs, times, strict=True):
            actions = np.array([env.action_space.sample()])
            started = time.perf_counter()
            env.step(actions)
            seconds.append(time.perf_counter() - started)

    # The env is stepped, the policy is asked, the transition is stored: the least that a step can be.
    acting = seconds_a_step(SAC("MlpPolicy", args.env, learning_starts=0, gradient_steps=0, seed=0), args.steps // 4)
    model = MBPO("MlpPolicy", args.env, learning_starts=500, seed=0)
    # Fitting and imagining are left out: they would only make the share less.
    model.learn(501)
    model.model_train_freq = 10**9
    learning = seconds_a_step(model, 50)

    rows = []
    for name, quarter in (("lower quartile", 0), ("median", 1)):
        plain, checked = (statistics.quantiles(seconds, n=4)[quarter] for seconds in times)
        added = checked - plain
        print(
            f"{name}: env step {1e6 * plain:.1f} us, checked {1e6 * checked:.1f} us: {1e6 * added:.1f} us more, "
            f"{100 * added / plain:.1f} % of the env step, {100 * added / acting:.2f} % of one of SAC without updates "
            f"({1e6 * acting:.0f} us), {100 * added / learning:.3f} % of a step of MBPO ({1e3 * learning:.0f} ms)"
        )
        rows.append([args.env, name, *(f"{1e6 * t:.2f}" for t in (plain, checked, acting, learning)), args.steps])
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
