"""
How steady is the policy, and would an average of its weights be steadier?

    python benchmarks/steady.py --env Hopper-v5 --seed 1 --steps 30000
    python benchmarks/steady.py --draw

Trains DHMBPO with the packaged settings. Every 1,000 steps, five deterministic episodes of the policy as it is, and five of
each average of its weights: after every step, average += rate * (weights - average). The run is what it would be without the
averages. A row of docs/benchmarks/steady.csv is an evaluation. One process with one thread; about 90 CPU seconds for 1,000
steps of Hopper-v5.
"""

import argparse
import copy
import csv
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import DHMBPO
from sb3_mbpo.runtime.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "docs" / "benchmarks" / "steady.csv"
COLUMNS = ["env", "seed", "rate", "step", "return", "worst", "length", "cpu_seconds", "commit"]
EVERY, EPISODES = 1_000, 5
# Env steps from which falls are counted in the table.
FALLS_FROM = 11_000
# 1: the policy as it is.
RATES = (1.0, 0.01, 0.002, 0.0005)


class Averages(BaseCallback):
    """
    Evaluates the policy and averages of its weights.

    :param env: id of the task
    :param seed: of the run
    :param path: CSV that rows are added to
    :param options: of the env
    """

    def __init__(self, env: str, seed: int, path: Path, options: dict[str, Any]) -> None:
        super().__init__()
        self.about: dict[str, Any] = {"env": env, "seed": seed, "commit": (provenance()["commit"] or "")[:7]}
        self.path = path
        self.eval_env = Monitor(gym.make(env, **options))
        self.spent = 0.0

    def _on_training_start(self) -> None:
        self.averages: dict[float, Any] = {rate: copy.deepcopy(self.model.policy) for rate in RATES}

    @th.no_grad()
    def _on_step(self) -> bool:
        started = time.process_time()
        own: Any = self.model.policy
        weights = [parameter.data for parameter in own.actor.parameters()]
        for rate, policy in self.averages.items():
            self._adapt(policy, own)
            th._foreach_lerp_([parameter.data for parameter in policy.actor.parameters()], weights, rate)
        if self.num_timesteps % EVERY == 0:
            self._evaluate()
        self.spent += time.process_time() - started
        return True

    def _adapt(self, average: Any, own: Any) -> None:
        """A fit has changed the statistics of the observations, and first layers with them: do the same to an average."""
        mine, new = average.actor.features_extractor, own.actor.features_extractor
        if th.equal(mine.obs_mean, new.obs_mean) and th.equal(mine.obs_std, new.obs_std):
            return
        # At the first fit nothing is learned yet.
        layers = average._first_layers(average.actor) if mine.obs_mean.any() else []
        mine.set_statistics(new.obs_mean, new.obs_std, layers, None)

    def _evaluate(self) -> None:
        cpu_seconds = time.process_time() - self.spent
        rows = []
        for rate, policy in self.averages.items():
            self.eval_env.reset(seed=10_000 + self.about["seed"])
            with th.random.fork_rng():
                returns, lengths = evaluate_policy(policy, self.eval_env, EPISODES, return_episode_rewards=True)
            assert isinstance(returns, list) and isinstance(lengths, list)
            scores = {"return": sum(returns) / EPISODES, "worst": min(returns), "length": sum(lengths) / EPISODES}
            scores |= {"cpu_seconds": cpu_seconds}
            row = {**self.about, "rate": rate, "step": self.num_timesteps}
            rows.append({**row, **{name: round(value, 1) for name, value in scores.items()}})
        print(self.num_timesteps, {row["rate"]: row["return"] for row in rows}, f"{cpu_seconds:.0f} s", flush=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


def falls(rows: list[dict[str, str]]) -> int:
    """:return: from ``FALLS_FROM`` on, evaluations that are less than half of the one before"""
    count = 0
    for seed in {row["seed"] for row in rows}:
        curve = [float(row["return"]) for row in rows if row["seed"] == seed and int(row["step"]) >= FALLS_FROM]
        count += sum(after < before / 2 for before, after in pairwise(curve))
    return count


def table(rows: list[dict[str, str]]) -> str:
    """:return: Markdown: of each rate, the mean and the worst return over the seeds and evaluations in parts of the run"""
    parts = [(2_000, 10_000), (11_000, 20_000), (21_000, 30_000)]
    heads = [f"{first:,} to {last:,}: {what}" for first, last in parts for what in ("mean", "worst")]
    heads.append(f"falls from {FALLS_FROM:,} on")
    lines = ["| rate of the average | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for rate in RATES:
        cells = []
        for first, last in parts:
            found = [float(r["return"]) for r in rows if float(r["rate"]) == rate and first <= int(r["step"]) <= last]
            cells += [f"{sum(found) / len(found):,.0f}", f"{min(found):,.0f}"] if found else ["", ""]
        cells.append(str(falls([r for r in rows if float(r["rate"]) == rate])))
        name = "1: the actor itself" if rate == 1 else f"{rate:g}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, picture: Path) -> None:
    """
    A panel for each seed: the actor itself and the slowest average.

    :param path: the CSV
    :param picture: PNG that is written
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = sorted({(row["env"], row["seed"]) for row in rows})
    figure, panels = plt.subplots(
        1, len(runs), figsize=(4.5 * len(runs), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (env, seed) in zip(panels.flat, runs, strict=True):
        for rate, colour, label in ((1.0, "0.6", "actor"), (min(RATES), "tab:red", f"average, rate {min(RATES):g}")):
            curve = [row for row in rows if (row["env"], row["seed"], float(row["rate"])) == (env, seed, rate)]
            steps, returns = [int(row["step"]) for row in curve], [float(row["return"]) for row in curve]
            axes.plot(steps, returns, color=colour, label=label, linewidth=1.8)
        axes.set(title=f"{env}, seed {seed}", xlabel="env steps")
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("return, five deterministic episodes")
    panels[0, 0].legend(frameon=False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--draw", action="store_true", help="train nothing: draw the CSV, and print a table of it")
    args = parser.parse_args()
    if args.draw:
        draw(args.out, args.out.with_suffix(".png"))
        return
    th.set_num_threads(1)
    settings = yaml.safe_load((ROOT / "hyperparams" / "dhmbpo.yml").read_text())
    own = dict(settings.get(args.env, settings["default"]))
    options = own.pop("env_kwargs", {})
    del own["n_timesteps"]
    # The averages are computed here, many at a time.
    own |= {"seed": args.seed, "device": "cpu", "actor_tau": 1.0}
    agent = DHMBPO(own.pop("policy"), gym.make(args.env, **options), **own)
    agent.learn(args.steps, callback=Averages(args.env, args.seed, args.out, options))


if __name__ == "__main__":
    main()
