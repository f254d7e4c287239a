"""
How should the dynamics be asked? Error per dimension of raw or standardised targets, change or next state, plain or
geometric mean as hold-out error.

    python benchmarks/targets.py

Ensembles with the default settings see random transitions of a task, 500 at first, then 1,000 and 2,000 (each fit goes on from
the one before, as in training). Their elites' mean prediction is compared with 5,000 fresh transitions. The error of a
dimension is the root mean square, divided by the standard deviation of its change (of the reward: by its own): 1 is what
predicting the mean gives. One process, one thread, some ten minutes.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo import ProbabilisticEnsemble

TASKS = ["Pendulum-v1", "InvertedPendulum-v5", "Hopper-v5"]
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "targets.csv"


def random_transitions(task: str, n: int, seed: int) -> ReplayBufferSamples:
    env: Any = gym.make(task)
    env.action_space.seed(seed)
    rows = []
    obs, _ = env.reset(seed=seed)
    for _ in range(n):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        scaled = 2 * (action - env.action_space.low) / (env.action_space.high - env.action_space.low) - 1
        rows.append((obs, scaled, next_obs, [float(terminated)], [float(reward)]))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return ReplayBufferSamples(*(th.tensor(np.array(part), dtype=th.float32) for part in zip(*rows, strict=True)))


class PlainMean(ProbabilisticEnsemble):
    """Standardised targets with the original's hold-out error, the plain mean over dimensions."""

    @th.no_grad()
    def _holdout_error(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        mean, _ = self._distribution(x.expand(len(self.holdout_errors), -1, -1))
        return ((mean - y) ** 2).mean(dim=(1, 2))


VARIANTS: dict[str, tuple[type[ProbabilisticEnsemble], dict[str, Any]]] = {
    "change, raw": (ProbabilisticEnsemble, {"normalize_targets": False}),
    "change, standardised, plain mean": (PlainMean, {}),
    "change, standardised (default)": (ProbabilisticEnsemble, {}),
    "next state, raw": (ProbabilisticEnsemble, {"target_mode": "next", "normalize_targets": False}),
    "next state, standardised": (ProbabilisticEnsemble, {"target_mode": "next"}),
}


@th.no_grad()
def errors(ensemble: ProbabilisticEnsemble, data: ReplayBufferSamples) -> th.Tensor:
    """Relative error of reward and each dimension, ``(1 + obs_dim,)``."""
    mean, _ = ensemble.predict(data.observations, data.actions)
    truth = th.cat([data.rewards, data.next_observations], dim=1)
    scale = th.cat([data.rewards, data.next_observations - data.observations], dim=1).std(dim=0)
    return (mean[ensemble.elites].mean(dim=0) - truth).square().mean(dim=0).sqrt() / scale.clamp(min=1e-8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    th.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("task targets seed transitions epochs cpu_seconds dimension error".split())
        for task in TASKS:
            fresh = random_transitions(task, 5000, seed=1000)
            for seed in range(args.seeds):
                data = random_transitions(task, 2000, seed)
                for variant, (kind, kwargs) in VARIANTS.items():
                    ensemble = kind(data.observations.shape[1], data.actions.shape[1], seed=seed, **kwargs)
                    for n in (500, 1000, 2000):
                        started = time.process_time()
                        epochs = ensemble.fit(ReplayBufferSamples(*(part[:n] for part in data[:5])))["epochs"]
                        seconds = round(time.process_time() - started, 1)
                        measured = errors(ensemble, fresh).tolist()
                        for i, error in enumerate(measured):
                            dimension = "reward" if i == 0 else f"obs[{i - 1}]"
                            writer.writerow([task, variant, seed, n, epochs, seconds, dimension, f"{error:.4f}"])
                    file.flush()
                    print(task, variant, seed, epochs, *(f"{error:.3f}" for error in measured), flush=True)


if __name__ == "__main__":
    main()
