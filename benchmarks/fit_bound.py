"""
How much work may one fit do? Hold-out and on-policy error of fits that end after at most so many gradient steps.

    python benchmarks/fit_bound.py

The transitions are those of an agent that learns Hopper-v5 without a model (one update a step). As in training, an ensemble is
fitted on the first 1,000 of them, then every 250 steps on all there are, each fit going on from the one before; what it says
is compared with the next 250 transitions, which the policy of that time will bring. The error is the geometric mean over
reward and observation dimensions of root mean square error over standard deviation of the change. One process, one thread.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from targets import errors

from sb3_mbpo import MBPO, ProbabilisticEnsemble

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "fit_bound.csv"
BOUNDS: list[int | None] = [250, 500, 1000, 2000, None]


def learning_transitions(task: str, n: int, seed: int) -> ReplayBufferSamples:
    """The first ``n`` transitions of an agent that learns without a model, in their order."""
    agent = MBPO("MlpPolicy", task, real_ratio=1, gradient_steps=1, learning_starts=1000, fast_update=True, seed=seed)
    return agent.learn(n).replay_buffer.real_transitions()


def between(data: ReplayBufferSamples, first: int, last: int) -> ReplayBufferSamples:
    return ReplayBufferSamples(*(part[first:last] for part in data[:5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    th.set_num_threads(1)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("env seed max_updates transitions epochs cpu_seconds holdout_error next_error".split())
        for seed in range(args.seeds):
            data = learning_transitions(args.env, args.steps + 250, seed)
            for bound in BOUNDS:
                ensemble = ProbabilisticEnsemble(
                    data.observations.shape[1], data.actions.shape[1], seed=seed, max_updates=bound
                )
                for n in range(1000, args.steps + 1, 250):
                    started = time.process_time()
                    fit = ensemble.fit(between(data, 0, n))
                    seconds = time.process_time() - started
                    error = float(np.exp(errors(ensemble, between(data, n, n + 250)).log().mean()))
                    row = [fit["epochs"], f"{seconds:.1f}", f"{fit['holdout_error']:.5f}", f"{error:.4f}"]
                    writer.writerow([args.env, seed, bound, n, *row])
                    file.flush()
                print(args.env, seed, bound, *row, flush=True)


if __name__ == "__main__":
    main()
