"""
One run of MBPO with other arguments, beside those of no_harm.py: why is it behind?

    python benchmarks/side_runs.py "known ends" 0 --set termination_fn=null
    python benchmarks/side_runs.py "true system, half real" 1 --task MountainCarContinuous-v0 --arm true --set real_ratio=0.5
    python benchmarks/side_runs.py "true system, half random" 1 --task Pendulum-v1 --arm true --random 0.5

A row of docs/benchmarks/side_runs.csv is an evaluation: the mean return of five deterministic episodes. What is not given is
as in no_harm.py: task, random steps, updates, evaluations. The arm ``before`` is the package of commit efd253d:
PYTHONPATH=<its checkout>. Until commit 4a6e766, real_ratio was 0.05. These are single runs, to look for a cause and not to
compare arms.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import gymnasium as gym
import no_harm
import pandas as pd
import torch as th
import yaml
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbpo import MBPO
from sb3_mbpo.compare.evaluation import EVALUATION_SEED, EvaluationRecorder
from sb3_mbpo.runtime.provenance import provenance

CSV = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "side_runs.csv"


class SomeRandomActions(MBPO):
    """
    MBPO whose imagined actions are partly uniform.

    :param share: of the imagined transitions, from 0 to 1
    """

    share = 0.0

    def _imagined_actions(self, obs: th.Tensor) -> th.Tensor:
        actions = super()._imagined_actions(obs)
        return th.where(th.rand(len(actions), 1) < self.share, 2 * th.rand_like(actions) - 1, actions)


def returns_of(evaluations: Path) -> list[tuple[int, float]]:
    """
    :param evaluations: what an ``EvaluationRecorder`` wrote
    :return: step and mean return of each evaluation
    """
    means = pd.read_csv(evaluations).groupby("step")["return"].mean().round(1)
    return [(int(step), float(mean)) for step, mean in means.items()]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the run, in the CSV")
    parser.add_argument("seed", type=int)
    parser.add_argument("--task", default="InvertedDoublePendulum-v5", choices=no_harm.TASKS)
    parser.add_argument("--arm", default="mbpo", choices=["mbpo", "true"])
    parser.add_argument("--random", type=float, default=0.0, metavar="SHARE", help="imagined actions that are uniform")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of MBPO, read as YAML")
    args = parser.parse_args()
    th.set_num_threads(1)
    task = no_harm.TASKS[args.task]
    others = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in args.set)}
    SomeRandomActions.share = args.random
    algorithm = SomeRandomActions if args.random else MBPO
    agent = algorithm(
        "MlpPolicy", gym.make(task.env), seed=args.seed, device="cpu", **{**no_harm.settings_of(task, args.arm), **others}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluations.csv"
        which = {"task": task.env, "arm": args.arm, "seed": args.seed}
        recorder = EvaluationRecorder(path, which, no_harm.evaluation_steps(task), no_harm.EPISODES)
        recorder.eval_env = DummyVecEnv([lambda: Monitor(gym.make(task.env))])
        recorder.eval_env.seed(EVALUATION_SEED + args.seed)
        agent.learn(task.steps, recorder)
        returns = returns_of(path)
    with CSV.open("a", newline="") as file:
        commit = provenance()["commit"] or ""
        # With the mark of files that were changed.
        commit = commit[:7] + "+" * commit.endswith("+")
        csv.writer(file).writerows([task.env, args.name, args.seed, *row, commit] for row in returns)


if __name__ == "__main__":
    main()
