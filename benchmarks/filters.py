"""
What the rules of sb3_mbpo/trust/filters.py keep, against the true simulator: how long branches get, and how wrong they are.

An agent learns without a model for some steps; its dynamics is fitted to what it has seen; branches of at most ten steps start
from real states, under its policy. Each is followed in the simulator with the same actions from the same state. Errors are
root mean squares over the dimensions of the observation. k-step: where the branch is against where the simulator is, in
standard deviations of the observations; one-step: against the simulator set to where the branch was, in those of the change.

    python benchmarks/filters.py --out docs/benchmarks/filters.csv

It prints a table: transitions a branch, and the k-step error as a share of that of a fixed length with as many transitions.
"""

import argparse
import csv
import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_mbpo import MBPO
from sb3_mbpo.trust.disagreement import draw
from sb3_mbpo.trust.filters import M2AC, FilterResult, Infoprop, Macura, RolloutFilter, RolloutStep

STEPS, BRANCHES = 10, 1000
SIZES = {"Pendulum-v1": (500, 2_000), "Hopper-v5": (2_000, 10_000)}


def keep_all(mean: th.Tensor, var: th.Tensor, rollout_step: RolloutStep) -> FilterResult:
    everything = th.ones(mean.shape[1], dtype=th.bool)
    return FilterResult(draw(mean, var, rollout_step.generator)[0], everything, everything)


RULES: dict[str, Any] = {
    "none": keep_all,
    **{f"macura zeta={zeta}": Macura(zeta=zeta) for zeta in (50, 75, 90, 95, 99)},
    **{f"macura xi={xi} zeta=95": Macura(xi=xi, zeta=95) for xi in (0.3, 3, 30)},
    "infoprop": Infoprop(),
    "infoprop horizon=10": Infoprop(horizon=10),
    "m2ac": M2AC(),
}


class Simulator:
    """The true next observation from any observation: its hidden rest is what it is at a start."""

    def __init__(self, name: str) -> None:
        self.name, self.env = name, gym.make(name).unwrapped
        self.env.reset(seed=0)

    def __call__(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.stack([self._step(row, action) for row, action in zip(obs.astype(np.float64), actions, strict=True)])

    def _step(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        env: Any = self.env
        if self.name == "Pendulum-v1":
            env.state = np.array([math.atan2(obs[1], obs[0]), obs[2]])
        else:
            env.set_state(np.concatenate([[0.0], obs[:5]]), obs[5:])
        low, high = env.action_space.low, env.action_space.high
        return env.step((low + 0.5 * (action + 1) * (high - low)).astype(np.float32))[0]


def rms(difference: th.Tensor, std: th.Tensor) -> th.Tensor:
    return (difference / std).square().mean(dim=1).sqrt()


def follow(agent: MBPO, rule: Any, simulator: Simulator, seed: int) -> Iterator[tuple[int, bool, float, float]]:
    """:return: of each transition that a branch reached: its step, whether it is stored, its one-step and k-step error"""
    transitions = agent.replay_buffer.real_transitions()
    agent.dynamics.seed(seed)
    th.manual_seed(seed)
    rollout_filter = RolloutFilter(rule, agent.dynamics, transitions, [])
    rows = th.randint(len(transitions.rewards), (BRANCHES,), generator=th.Generator().manual_seed(seed))
    obs, state = transitions.observations[rows], None
    true_obs, obs_std = obs, transitions.observations.std(dim=0)
    for step in range(STEPS):
        with agent.imagining() as policy, th.no_grad():
            actions = policy(obs)
            filtered = rollout_filter(obs, actions, step, STEPS, state)
        next_obs = filtered.prediction[:, 1:]
        true_next = th.as_tensor(simulator(true_obs.numpy(), actions.numpy()), dtype=th.float32)
        from_here = th.as_tensor(simulator(obs.numpy(), actions.numpy()), dtype=th.float32)
        errors = rms(next_obs - from_here, rollout_filter.std[1:]), rms(next_obs - true_next, obs_std)
        for stored, *error in zip(filtered.keep.tolist(), *(error.tolist() for error in errors), strict=True):
            yield step, stored, *error
        going = filtered.proceed & ~agent.terminates(obs, actions, next_obs)
        obs, true_obs, state = next_obs[going], true_next[going], filtered.of(going).state
        if len(obs) == 0:
            break


def summary(found: list[tuple[int, bool, float, float]]) -> dict[str, float]:
    _, stored, one, many = (np.array(column) for column in zip(*found, strict=True))
    kept = stored.astype(bool)

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values)) if len(values) else math.nan

    return {
        "branch_length": kept.sum() / BRANCHES,
        "filtered": 1 - kept.mean(),
        "one_step": mean(one[kept]),
        "one_step_left_out": mean(one[~kept]),
        "k_step": mean(many[kept]),
        "k_step_p99": float(np.quantile(many[kept], 0.99)) if kept.any() else math.nan,
    }


def measure(name: str, n_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    agent = MBPO("MlpPolicy", name, learning_starts=min(1000, n_steps // 2), real_ratio=1, gradient_steps=1, seed=seed)
    agent.learn(n_steps)
    th.manual_seed(seed)
    agent.dynamics.fit(agent.replay_buffer.real_transitions())
    simulator = Simulator(name)
    for rule_name, rule in RULES.items():
        found = list(follow(agent, rule, simulator, seed))
        yield {"env": name, "steps": n_steps, "seed": seed, "rule": rule_name, **summary(found)}
        if rule_name == "none":
            # A fixed length, for comparison at an equal number of transitions.
            for k in range(1, STEPS):
                yield {
                    "env": name,
                    "steps": n_steps,
                    "seed": seed,
                    "rule": f"k={k}",
                    **summary([f for f in found if f[0] < k]),
                }


def table(path: str) -> None:
    """Print, for each env and size, the means over seeds: branch length, and the k-step error beside that of a fixed k."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for rule in RULES:
        cells = [rule]
        for name, n_steps in ((name, n_steps) for name, sizes in SIZES.items() for n_steps in sizes):
            found = []
            for seed in sorted({row["seed"] for row in rows}):
                here = [r for r in rows if (r["env"], r["steps"], r["seed"]) == (name, str(n_steps), seed)]
                numbers = {r["rule"]: (float(r["branch_length"]), float(r["k_step"])) for r in here}
                if rule in numbers:
                    lengths, errors = zip(*sorted(numbers[key] for key in numbers if key[:2] in ("k=", "no")), strict=True)
                    length, error = numbers[rule]
                    found.append((length, error / np.interp(length, lengths, errors)))
            cells.append("{:.1f}, {:.2f}".format(*np.mean(found, axis=0)))
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        writer = None
        for seed in arguments.seeds:
            for name, sizes in SIZES.items():
                for n_steps in sizes:
                    for row in measure(name, n_steps, seed):
                        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
                        writer = writer or csv.DictWriter(file, row)
                        if file.tell() == 0:
                            writer.writeheader()
                        writer.writerow(row)
                        file.flush()
    table(arguments.out)


if __name__ == "__main__":
    main()
