"""
How well the reward of the next 250 real steps is predicted, given the predicted next observation: jointly with the
observation, as in the paper, and as a function of the transition.

    python benchmarks/learned_rewards.py                # writes docs/benchmarks/learned_rewards.csv

The dynamics is fitted on the first rows, and the reward after it; "first" is the first fit, "second" comes 250 rows later,
from the weights of the first. Play is random with actions that are held for some steps, or that of ``streams.py``.
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
from streams import stream

from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.rewards.learned import LearnedReward

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "learned_rewards.csv"
ENVS = ("Pendulum-v1", "Reacher-v5", "MountainCarContinuous-v0", "Hopper-v5", "HalfCheetah-v5")
ROWS, NEXT = 1250, 250


def held_play(env_id: str, n: int, seed: int) -> ReplayBufferSamples:
    """:return: ``n`` transitions of random actions that are held for 1 to 20 steps; actions in [-1, 1]"""
    env, generator = gym.make(env_id), np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    obs, _ = env.reset(seed=seed)
    rows, action, left = [], np.zeros(low.shape), 0
    for _ in range(n):
        if not left:
            action, left = generator.uniform(-1, 1, low.shape), int(generator.integers(1, 21))
        left -= 1
        next_obs, reward, ended, cut, _ = env.step((low + (action + 1) / 2 * (high - low)).astype(np.float32))
        rows.append((obs, action, next_obs, [ended], [reward]))
        obs = env.reset()[0] if ended or cut else next_obs
    return ReplayBufferSamples(
        *(th.as_tensor(np.array(part, dtype=np.float32)) for part in zip(*rows, strict=True))  # type: ignore[arg-type]
    )


def part_of(rows: ReplayBufferSamples, start: int, stop: int) -> ReplayBufferSamples:
    return ReplayBufferSamples(*(part[start:stop] for part in rows[:5]))


def measure(env_id: str, seed: int, max_updates: int) -> list[dict[str, float | str]]:
    """:return: a row for each fit, each kind of reward, and rewards of transitions that go on and that end"""
    data = (stream if env_id in TASKS else held_play)(env_id, ROWS + 2 * NEXT, seed)
    obs_dim, action_dim = data.observations.shape[1], data.actions.shape[1]
    dynamics = ProbabilisticEnsemble(obs_dim, action_dim, seed=seed, max_updates=max_updates)
    reward = LearnedReward(obs_dim, action_dim, seed=seed, device="cpu")
    rows: list[dict[str, float | str]] = []
    for fit, n in (("first", ROWS), ("second", ROWS + NEXT)):
        seen, ahead = part_of(data, 0, n), part_of(data, n, n + NEXT)
        started = time.process_time()
        dynamics.fit(seen)
        between = time.process_time()
        reward.fit(seen, dynamics)
        cpu = {"joint": between - started, "transition": time.process_time() - between}
        ended = ahead.dones[:, 0] > 0.5
        with th.no_grad():
            joint = dynamics.predict(*ahead[:2])[0][dynamics.elites].mean(dim=0)[:, 0]
            next_obs = dynamics.sample(*ahead[:2])[0]
            said = {"joint": joint, "transition": reward(*ahead[:2], next_obs, ended)}
        for kind, predicted in said.items():
            for of, which in (("going on", ~ended), ("ending", ended)):
                truth = ahead.rewards[which, 0]
                if len(truth):
                    error = (predicted[which] - truth).square().mean().item()
                    spread = seen.rewards[(seen.dones[:, 0] > 0.5) == (of == "ending"), 0].var(correction=0).item()
                    row: dict[str, float | str] = {"env": env_id, "seed": seed, "fit": fit, "reward": kind, "of": of}
                    row |= {"n": len(truth), "mse": f"{error:.4g}", "variance": f"{spread:.4g}"}
                    rows.append(row | {"cpu_seconds": round(cpu[kind], 2)})
    return rows


def write(env_id: str, rows: list[dict[str, float | str]]) -> None:
    """Put the rows of an env in the place of those that the CSV has."""
    others: list[dict[str, float | str]] = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            others = [dict(row) for row in csv.DictReader(file) if row["env"] != env_id]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(others + rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=[*ENVS, *TASKS])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max-updates", type=int, default=300, help="of a fit of the dynamics")
    parser.add_argument("--print", action="store_true", help="write no CSV")
    args = parser.parse_args()
    th.set_num_threads(1)
    for env_id in args.env:
        rows = [row for seed in range(args.seeds) for row in measure(env_id, seed, args.max_updates)]
        for row in rows:
            print(*row.values(), flush=True)
        if not args.print:
            write(env_id, rows)


if __name__ == "__main__":
    main()
