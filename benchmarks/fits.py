"""
How well does a fit of the dynamics predict the next 250 real steps, and what does it cost?

    python benchmarks/fits.py collect                  # transitions of SAC on each task, into logs/fits
    python benchmarks/fits.py run                      # every arm on every data set; what the CSV has is not made again
    python benchmarks/fits.py run --arms default --sets reacher
    python benchmarks/fits.py print                    # tables of what there is
    python benchmarks/fits.py bounds                   # bounds on the inputs, at prediction time: fits_input_bounds.csv

A data set is the stream of transitions of one SAC agent, random ones first. An ensemble is fitted to the first rows of it,
again and again as the stream grows, and after each fit it predicts the 250 transitions that come next. A row of
docs/benchmarks/fits.csv is a fit. Arms differ from ``default`` by their ``dynamics_kwargs``. The arm ``before`` needs the
package of commit efd253d: PYTHONPATH=<its checkout>. ``scratch`` is a new network in each fit, trained three times as long.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo import ProbabilisticEnsemble

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "logs" / "fits"
CSV = ROOT / "docs" / "benchmarks" / "fits.csv"
# Transitions after a fit that it is judged by.
NEXT = 250
# Standard deviations at which inputs are cut.
BOUNDS = (10.0, 6.0, 5.0, 4.0, 3.0, 2.0)
BODY = {"include_cfrc_ext_in_observation": False}
HUMAN = {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}

ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "before": {},
    "scratch": {"max_updates": 3000, "patience": 750},
    "bootstrap, beta=0": {"bootstrap": True, "beta": 0.0},
    "target_mode=delta": {"target_mode": "delta"},
    "layer_norm": {"layer_norm": True},
    "batch_size=256": {"batch_size": 256, "max_updates": 350},
    "patience=100": {"patience": 100},
    "3 layers": {"net_arch": [200, 200, 200]},
}
SMALL, LARGE = [500, 750, 1000, 1250, 1500], [1000, 1250, 2000, 4000]
# data set -> task, its arguments, random steps, updates a step, observations kept, rows at which a fit is made
SETS: dict[str, tuple[str, dict[str, Any], int, int, int | None, list[int]]] = {
    "pendulum": ("Pendulum-v1", {}, 500, 5, None, SMALL[:3]),
    "reacher": ("Reacher-v5", {}, 500, 5, None, SMALL[:3]),
    "goal": ("PointGoal", {}, 500, 5, None, SMALL[:3]),
    "idp": ("InvertedDoublePendulum-v5", {}, 500, 5, None, SMALL[:3]),
    "hopper": ("Hopper-v5", {}, 1000, 5, None, [1000, 1250]),
    "hopper 6000": ("Hopper-v5", {}, 1000, 5, None, [1000, 3000, 6000]),
    "halfcheetah": ("HalfCheetah-v5", {}, 1000, 3, None, [1000, 1250, 3000]),
    "ant 27": ("Ant-v5", {}, 1000, 3, 27, [1000, 1250, 4000]),
    "ant 105": ("Ant-v5", {}, 1000, 3, None, [1000, 1250, 4000]),
    "humanoid 45": ("Humanoid-v5", HUMAN, 1000, 3, None, [1000, 1250, 4000]),
}
FILES = {"hopper 6000": "hopper", "ant 27": "ant", "ant 105": "ant", "humanoid 45": "humanoid"}


class PointGoal(gym.Env):
    """A damped point on a plane that is to reach a goal, which is part of the observation and changes with the episode."""

    observation_space = spaces.Box(-10, 10, (6,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        self.velocity, self.steps = np.zeros(2), 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.position, self.velocity, self.goal]).astype(np.float32)

    def step(self, action):
        self.velocity = 0.9 * self.velocity + 0.1 * np.asarray(action, dtype=float)
        self.position = self.position + 0.1 * self.velocity
        self.steps += 1
        return self._observe(), -float(np.linalg.norm(self.position - self.goal)), False, self.steps >= 100, {}


def collect(name: str) -> None:
    """Let SAC learn on a task and keep its transitions."""
    path = DATA / f"{FILES.get(name, name)}.npz"
    if path.exists():
        return
    task, kwargs, random_steps, updates, _, _ = SETS[name]
    # The longest stream that is asked of this file.
    n = NEXT + max(max(rows) for other, (*_, rows) in SETS.items() if FILES.get(other, other) == FILES.get(name, name))
    env = PointGoal() if task == "PointGoal" else gym.make(task, **kwargs)
    agent = SAC("MlpPolicy", env, learning_starts=random_steps, gradient_steps=updates, seed=0, buffer_size=n)
    agent.learn(n)
    buffer = agent.replay_buffer
    assert buffer is not None
    parts = {"obs": buffer.observations, "act": buffer.actions, "next": buffer.next_observations, "rewards": buffer.rewards}
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {key: rows[:n].reshape(n, -1) for key, rows in parts.items()}
    np.savez(path, obs=flat["obs"], act=flat["act"], next=flat["next"], rewards=flat["rewards"])


def stream(name: str) -> ReplayBufferSamples:
    """:return: the transitions of a data set, in order of time"""
    kept = SETS[name][4]
    with np.load(DATA / f"{FILES.get(name, name)}.npz") as file:
        obs, actions, next_obs = (th.as_tensor(file[key], dtype=th.float32).flatten(1) for key in ("obs", "act", "next"))
        rewards = th.as_tensor(file["rewards"], dtype=th.float32).reshape(-1, 1)
    return ReplayBufferSamples(obs[:, :kept], actions, next_obs[:, :kept], th.zeros_like(rewards), rewards)


def part(data: ReplayBufferSamples, start: int, end: int) -> ReplayBufferSamples:
    return ReplayBufferSamples(*(rows[start:end] for rows in data[:5]))


@th.no_grad()
def judge(ensemble: ProbabilisticEnsemble, data: ReplayBufferSamples, n: int) -> dict[str, float]:
    """
    :param n: rows that the ensemble was fitted to
    :return: of the next rows: geometric mean over the dimensions of the squared error, in variances of all rows so far; mean
        share of the variance of the observations that is explained, of all and of the first 27; the same of the reward
    """
    new, known = part(data, n, n + NEXT), part(data, 0, n + NEXT)
    predicted = ensemble.predict(new.observations, new.actions)[0][ensemble.elites].mean(dim=0)
    truth, values = (th.cat([rows.rewards, rows.next_observations], dim=1) for rows in (new, known))
    changes = th.cat([known.rewards, known.next_observations - known.observations], dim=1)
    variance = th.minimum(values.var(dim=0), changes.var(dim=0))
    varies = variance.sqrt() > 1e-6 * values.abs().amax(dim=0)
    ratio = ((predicted - truth) ** 2).mean(dim=0) / variance
    shares = (1 - ratio).clamp(min=-1)
    return {
        "next_error": ratio[varies].clamp(1e-6, 2).log().mean().exp().item(),
        "explained_obs": shares[1:][varies[1:]].mean().item(),
        "explained_body": shares[1:28][varies[1:28]].mean().item(),
        "explained_reward": shares[0].item(),
    }


def fits(name: str, arm: str, seed: int) -> list[dict[str, Any]]:
    """Fit as the stream grows. :return: a row for each fit"""
    data, rows = stream(name), []

    def new() -> ProbabilisticEnsemble:
        return ProbabilisticEnsemble(data.observations.shape[1], data.actions.shape[1], seed=seed, **ARMS[arm])

    ensemble = new()
    for n in SETS[name][5]:
        ensemble = new() if arm == "scratch" else ensemble
        started = time.process_time()
        metrics = ensemble.fit(part(data, 0, n))
        cost = {"updates": metrics["updates"], "cpu_seconds": time.process_time() - started}
        rows.append({"set": name, "arm": arm, "seed": seed, "rows": n, **cost, **judge(ensemble, data, n)})
        print(rows[-1], flush=True)
    return rows


def bounds(names: list[str]) -> None:
    """
    Predict with inputs cut at several numbers of standard deviations; the ensemble was fitted with the widest.

    The rows that chose the default are these, so they do not say how good it is elsewhere.
    """
    rows = []
    for name in names:
        data = stream(name)
        ensemble = ProbabilisticEnsemble(data.observations.shape[1], data.actions.shape[1], seed=0)
        for n in SETS[name][5][:2]:
            ensemble.input_standardizer.limit = BOUNDS[0]
            ensemble.fit(part(data, 0, n))
            for bound in BOUNDS:
                ensemble.input_standardizer.limit = bound
                rows.append({"set": name, "seed": 0, "rows": n, "bound": bound, **judge(ensemble, data, n)})
                print(rows[-1], flush=True)
    pd.DataFrame(rows).round(5).to_csv(CSV.with_name("fits_input_bounds.csv"), index=False)


def known() -> pd.DataFrame:
    return pd.read_csv(CSV) if CSV.exists() else pd.DataFrame(columns=["set", "arm", "seed"])


def run(names: list[str], arms: list[str], seeds: list[int]) -> None:
    """Make what the CSV has not, and write it as it comes."""
    for seed in seeds:
        for arm in arms:
            for name in names:
                there = known()
                if ((there["set"] == name) & (there["arm"] == arm) & (there["seed"] == seed)).any():
                    continue
                rows = pd.DataFrame(fits(name, arm, seed))
                # Read anew: other processes write as well.
                pd.concat([known(), rows]).round(5).to_csv(CSV, index=False)


def show() -> None:
    """Print a table for the last fit of each data set, means over seeds, and one for the CPU seconds of a fit."""
    table = known()
    last = table[table["rows"] == table.groupby("set")["rows"].transform("max")]
    order = [arm for arm in ARMS if arm in set(table["arm"])]
    for rows, column in ((last, "next_error"), (table, "next_error"), (table, "cpu_seconds"), (last, "explained_body")):
        which = "last fit" if rows is last else "mean over the fits"
        print(f"\n{column}, {which}")
        print(rows.pivot_table(column, "set", "arm").reindex(columns=order).reindex(list(SETS)).round(4).to_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "run", "print", "bounds"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm != "before"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    th.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    if args.what == "collect":
        for name in args.sets:
            collect(name)
    elif args.what == "run":
        run(args.sets, args.arms, args.seeds)
    elif args.what == "bounds":
        bounds(args.sets)
    else:
        show()


if __name__ == "__main__":
    main()
