"""
One run of MBPO with other arguments, beside those of no_harm.py: why is it behind?

    python benchmarks/side_runs.py "known ends" 0 --set termination_fn=null

A row of docs/benchmarks/side_runs.csv is an evaluation: the mean return of five deterministic episodes. Settings are those of
no_harm.py for InvertedDoublePendulum-v5: 500 random steps, 5 updates a step, 25,000 start states, learned ends. The arm
``before`` is the package of commit efd253d: PYTHONPATH=<its checkout>. These are single runs, to look for a cause and not to
compare arms.
"""

import argparse
import csv
from pathlib import Path

import gymnasium as gym
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import MBPO
from sb3_mbpo.provenance import provenance

CSV = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "side_runs.csv"
ENV, STEPS = "InvertedDoublePendulum-v5", 2_500
SETTINGS = {"learning_starts": 500, "gradient_steps": 5, "rollout_batch_size": 25_000, "termination_fn": "learned"}


class Evaluations(BaseCallback):
    """Evaluates every 250 steps, from step 750 on."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.eval_env = Monitor(gym.make(ENV))
        self.eval_env.reset(seed=1_000_000 + seed)
        self.returns: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % 250 == 0 and self.num_timesteps > 600:
            mean, _ = evaluate_policy(self.model, self.eval_env, 5)
            assert isinstance(mean, float)
            self.returns.append((self.num_timesteps, round(mean, 1)))
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", help="its name in the CSV")
    parser.add_argument("seed", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of MBPO, read as YAML")
    args = parser.parse_args()
    th.set_num_threads(1)
    others = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in args.set)}
    evaluations = Evaluations(args.seed)
    MBPO("MlpPolicy", gym.make(ENV), seed=args.seed, device="cpu", **{**SETTINGS, **others}).learn(STEPS, evaluations)
    with CSV.open("a", newline="") as file:
        commit = (provenance()["commit"] or "")[:7]
        csv.writer(file).writerows([ENV, args.arm, args.seed, *row, commit] for row in evaluations.returns)


if __name__ == "__main__":
    main()
