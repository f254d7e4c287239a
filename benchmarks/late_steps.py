"""
Late steps of 1,000 at 20 Hz, for three ways of training: every step, between episodes, beside acting.

    python benchmarks/late_steps.py --out docs/benchmarks/late_steps.csv

Pendulum-v1 with a clock: after an observation, the next action must arrive within 1/20 s. A later one counts as late, and the
clock goes on from there. The first step of an episode has no deadline, because a robot stands still after its reset. Steps
are counted from the end of the warm-up on. About 15 minutes for two algorithms. Run it on a machine with nothing else to do;
the load average at the start is in the CSV. Rows that are in the CSV are not measured again.
"""

import argparse
import csv
import os
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.runtime.threads import available_cores

WARM_UP, STEPS = 200, 1_000
ALGORITHMS: dict[str, tuple[Any, float]] = {"MBPO": (MBPO, 20), "DHMBPO": (DHMBPO, 1)}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every step": ({}, {}),
    "between episodes": ({"train_freq": (1, "episode")}, {}),
    "beside acting": ({}, {"background": True}),
}
COLUMNS = ["algorithm", "way", "hz", "updates_per_transition", "steps", "late", "missed_ticks", "longest_ms", "median_ms"]
COLUMNS += ["p99_ms", "updates", "updates_in_time", "seconds", "cores", "load"]


class Clock(gym.Wrapper):
    """
    Steps at a fixed rate.

    :param env: the env
    :param hz: steps per second
    """

    def __init__(self, env: gym.Env, hz: float) -> None:
        super().__init__(env)
        self.period = 1 / hz
        #: Seconds from each observation to the action, of all steps but the first of an episode.
        self.waits: list[float] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        answer = self.env.reset(**kwargs)
        self._seen_at, self._is_first = time.perf_counter(), True
        return answer

    def step(self, action: Any) -> Any:
        now = time.perf_counter()
        if not self._is_first:
            self.waits.append(now - self._seen_at)
        time.sleep(max(0.0, self._seen_at + self.period - now))
        answer = self.env.step(action)
        # From tick to tick; after a late step, from there.
        tick = self._seen_at + self.period
        self._seen_at = tick if now < tick else time.perf_counter()
        self._is_first = False
        return answer


def measured(algorithm: str, way: str, hz: float, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    """:return: a row of the CSV"""
    cls, updates = ALGORITHMS[algorithm]
    arguments, of_learn = WAYS[way]
    clock = Clock(gym.make("Pendulum-v1"), hz)
    every: dict[str, Any] = {"updates_per_transition": updates, "learning_starts": WARM_UP, "seed": 0}
    agent = cls("MlpPolicy", clock, **{**every, **arguments, **settings})
    load, started = os.getloadavg()[0], time.perf_counter()
    made = 0

    def look(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        nonlocal made
        made = agent._n_updates
        return True

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The learner is behind")
        # The first step of each episode is not counted.
        agent.learn(agent.learning_starts + steps + steps // 200 + 1, callback=look, log_interval=1_000, **of_learn)
    waits = np.array(clock.waits[-steps:])
    return {
        **{"algorithm": algorithm, "way": way, "hz": hz, "updates_per_transition": agent.updates_per_transition},
        "steps": len(waits),
        "late": int((waits > clock.period).sum()),
        "missed_ticks": int((waits // clock.period).sum()),
        "longest_ms": 1000 * waits.max(),
        "median_ms": 1000 * np.median(waits),
        "p99_ms": 1000 * np.quantile(waits, 0.99),
        "updates": agent._n_updates,
        "updates_in_time": made,
        "seconds": time.perf_counter() - started,
        **{"cores": available_cores(), "load": load},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hz", type=float, default=20)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    if not args.out.exists():
        with args.out.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
    for algorithm in args.algorithms:
        for way in args.ways:
            with args.out.open(encoding="utf-8") as file:
                there = [(row["algorithm"], row["way"], float(row["hz"])) for row in csv.DictReader(file)]
            if (algorithm, way, args.hz) not in there:
                row = measured(algorithm, way, args.hz, args.steps)
                print(row)
                with args.out.open("a", newline="") as file:
                    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                    csv.DictWriter(file, COLUMNS).writerow(rounded)


if __name__ == "__main__":
    main()
