"""
How many of the ends on fresh episodes the learned termination finds, and how many of those it finds are ends.

    python benchmarks/learned_ends.py                   # writes docs/benchmarks/learned_ends.csv
    python benchmarks/learned_ends.py --env Fall-v0 --seeds 2 --print

It is fitted to the transitions up to the 5th, 10th, 20th and 50th end, and asked about 200 fresh episodes. With fewer than a
hundred ends a fit begins anew, so it does not matter which fits came before. The data is that of ``streams.py``; of Hopper-v5,
of random play.
"""

import argparse
import csv
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from ends import TASKS
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from streams import episodes, joined, stream

from sb3_mbpo.terminations.learned import LearnedTermination

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "learned_ends.csv"
ENDS, MOST_STEPS = (5, 10, 20, 50), 8000


def random_play(env_id: str, n: int, seed: int) -> ReplayBufferSamples:
    """:return: ``n`` transitions of random play; actions in the env's own scale"""
    env = gym.make(env_id)
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    for _ in range(n):
        action = env.action_space.sample()
        next_obs, reward, ended, cut, _ = env.step(action)
        rows.append((obs, action, next_obs, [ended], [reward]))
        obs = env.reset()[0] if ended or cut else next_obs
    return ReplayBufferSamples(
        *(th.as_tensor(np.array(part, dtype=np.float32)) for part in zip(*rows, strict=True))  # type: ignore[arg-type]
    )


def measure(env_id: str, seed: int) -> list[dict[str, float | str]]:
    """:return: a row for each number of ends that were seen"""
    if env_id in TASKS:
        data, fresh = stream(env_id, MOST_STEPS, seed), joined(episodes(env_id, 200, seed, 10_000 + seed))
    else:
        data, fresh = random_play(env_id, 3000, seed), random_play(env_id, 5000, 10_000 + seed)
    head = LearnedTermination(data.observations.shape[1:], data.actions.shape[1:], seed=seed, device="cpu")
    seen = data.dones[:, 0].cumsum(dim=0)
    rows: list[dict[str, float | str]] = []
    truth = fresh.dones[:, 0] > 0.5
    for ends in ENDS:
        if seen[-1] < ends:
            break
        n, started = int((seen >= ends).float().argmax()) + 1, time.process_time()
        head.fit(data.observations[:n], data.actions[:n], data.next_observations[:n], data.dones[:n, 0])
        spent, said = time.process_time() - started, head(*fresh[:3])
        hits = int((said & truth).sum())
        row: dict[str, float | str] = {
            "env": env_id,
            "seed": seed,
            "ends": ends,
            "steps": n,
            "recall": round(hits / int(truth.sum()), 3),
        }
        row |= {"precision": round(hits / max(int(said.sum()), 1), 3), "rule": int(head.rule), "cpu_seconds": round(spent, 2)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", nargs="+", default=["ForbiddenDisc-v0", "GoalDisc-v0", "Fall-v0", "ObservedGoal-v0", "Hopper-v5"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="write no CSV")
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = []
    for env_id in args.env:
        mine = [row for seed in range(args.seeds) for row in measure(env_id, seed)]
        rows += mine
        for ends in ENDS:
            group = [row for row in mine if row["ends"] == ends]
            if group:
                recall, precision = (sorted(float(row[name]) for row in group) for name in ("recall", "precision"))
                found = f"recall {np.mean(recall):.2f} {recall}, precision {np.mean(precision):.2f} {precision}"
                print(f"{env_id:18} {ends:3} ends: {found}", flush=True)
        if not args.print:
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
