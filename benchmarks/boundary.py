"""
What the boundary costs: ``python benchmarks/boundary.py`` steps Hopper-v5 with and without it, in turns.

Time is the processor's own, the least of many rounds, so that other work on the machine matters little.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbpo.boundary import Boundary


def seconds(step: Callable[[], object], n: int) -> float:
    """Processor time of one call."""
    started = time.process_time()
    for _ in range(n):
        step()
    return (time.process_time() - started) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300, help="per round")
    args = parser.parse_args()

    vec_env = DummyVecEnv([lambda: Monitor(gym.make(args.env))])
    boundary = Boundary(vec_env)
    vec_env.action_space.seed(0)
    actions = np.array([vec_env.action_space.sample()])
    vec_env.reset()

    class Still:
        """Answers at once, so that what remains is the boundary's part."""

        def __init__(self, answer: object) -> None:
            self.answer = answer

        def step(self, action: np.ndarray) -> object:
            return self.answer

    still = DummyVecEnv([lambda: gym.make(args.env)])
    still.reset()
    answer = still.envs[0].step(actions[0])
    still.envs[0] = Still(answer)  # type: ignore[call-overload]
    beside = Boundary(still)

    def watched(env: DummyVecEnv, door: Boundary) -> None:
        door.watch("step", 0)
        env.step(actions)

    calls: dict[str, Callable[[], object]] = {
        "env step": lambda: vec_env.step(actions),
        "env step, watched": lambda: watched(vec_env, boundary),
        "empty step": lambda: still.step(actions),
        "empty step, watched": lambda: watched(still, beside),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, args.steps))
    for name, values in times.items():
        print(f"{name:22s} least {1e6 * min(values):8.2f} us   median {1e6 * statistics.median(values):8.2f} us")
    for name, pick in (("least", min), ("median", statistics.median)):
        added = pick(times["empty step, watched"]) - pick(times["empty step"])
        print(f"the boundary adds ({name}) {1e6 * added:.2f} us, {100 * added / pick(times['env step']):.2f} % of an env step")


if __name__ == "__main__":
    main()
