"""
What the gate, k of "auto" and the filters do where the observation does not tell everything.

Pendulum-v1 as it is; with a mass that is drawn for each episode and not observed; and with rewards that are paid as a sum
every tenth step, by a counter that is not observed. An agent learns for some steps under rollout_schedule="auto". Then
branches of at most ten steps start from real states under each rollout filter.

    python benchmarks/hidden.py --out docs/benchmarks/hidden.csv

It writes a row for each world and seed, after the last fit: what was explained, the share of real rows in a batch, k, and
for each filter the transitions stored per branch (10 at most). Some seconds of CPU time a row.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th

from sb3_mbpo import MBPO
from sb3_mbpo.trust.filters import FILTERS

STEPS, BRANCHES, LENGTH = 1_260, 1_000, 10
FILTER_NAMES = ("macura", "infoprop", "m2ac")


class HiddenMass(gym.Wrapper):
    """The pendulum's mass is drawn for each episode, from 0.5 to 2 times the usual one."""

    def reset(self, **kwargs: Any) -> Any:
        result = super().reset(**kwargs)
        env: Any = self.unwrapped
        env.m = 2 ** env.np_random.uniform(-1, 1)
        return result


class PaidEveryTenth(gym.Wrapper):
    """The reward is 0, and every tenth step the sum of ten."""

    def reset(self, **kwargs: Any) -> Any:
        self.steps, self.owed = 0, 0.0
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps, self.owed = self.steps + 1, self.owed + float(reward)
        paid = self.owed if self.steps % 10 == 0 else 0.0
        self.owed -= paid
        return obs, paid, terminated, truncated, info


WORLDS: dict[str, Any] = {
    "Pendulum-v1": lambda env: env,
    "mass by the episode": HiddenMass,
    "paid every tenth step": PaidEveryTenth,
}


def branch_length(agent: MBPO, name: str) -> float:
    """:return: transitions that a filter stores per branch of at most ``LENGTH`` steps"""
    agent.rollout_filter = name
    transitions = agent.replay_buffer.real_transitions()
    rollout_filter = agent.make_rollout_filter(transitions)
    assert rollout_filter is not None and name in FILTERS
    obs, state, stored = agent.replay_buffer.start_states(BRANCHES), None, 0
    with agent.imagining() as policy, th.no_grad():
        for step in range(LENGTH):
            filtered = rollout_filter(obs, policy(obs), step, LENGTH, state)
            stored += int(filtered.keep.sum())
            obs, state = filtered.prediction[:, 1:][filtered.proceed], filtered.of(filtered.proceed).state
            if len(obs) == 0:
                break
    return stored / BRANCHES


def measure(world: str, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"learning_starts": 500, "gradient_steps": 1, "real_ratio": 0.05, "rollout_batch_size": 5_000}
    settings["dynamics_kwargs"] = {"net_arch": [64, 64, 64, 64]}
    agent = MBPO("MlpPolicy", WORLDS[world](gym.make("Pendulum-v1")), rollout_schedule="auto", **settings, seed=seed)
    agent.learn(STEPS, log_interval=1_000_000)
    log = agent.logger.name_to_value
    names = ("explained_obs", "explained_reward", "real_share", "rollout_length")
    row = {"world": world, "seed": seed, **{name: log.get(f"dynamics/{name}", float("nan")) for name in names}}
    return {**row, **{name: branch_length(agent, name) for name in FILTER_NAMES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        for world in WORLDS:
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in measure(world, seed).items()})
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
