"""
Two ways to choose k, side by side: the k* of Theorem 4.3, and how far the dynamics predicts the newest real steps ("auto").

    python benchmarks/lengths.py [ENV ...]    # default: Pendulum-v1 InvertedPendulum-v5 Hopper-v5

One agent per task learns with rollout_schedule="auto"; every 250 steps ModelErrorCallback plays two fresh episodes. Rows go
to docs/benchmarks/trust/lengths.csv, in place of the task's old ones.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch as th
from stable_baselines3.common.logger import configure
from train import settings_for

from sb3_mbpo import MBPO, ModelErrorCallback

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "trust" / "lengths.csv"
STEPS = {"Pendulum-v1": 2_000, "InvertedPendulum-v5": 2_750, "Hopper-v5": 3_000}
# Fewer random steps and updates than in the settings, for an hour is long.
OVERRIDES = {"Hopper-v5": ["learning_starts=1000", "gradient_steps=5"]}
COLUMNS = ("rollout_length", "optimal_rollout_length", "model_error_tv", "policy_shift_tv", "error_1", "error_5", "error_15")


def diagnosed(env: str) -> pd.DataFrame:
    settings = settings_for(env, [*OVERRIDES.get(env, []), "rollout_schedule=auto"])
    del settings["n_timesteps"]
    agent = MBPO(env=env, seed=0, **settings)
    with tempfile.TemporaryDirectory() as folder:
        agent.set_logger(configure(folder, ["csv"]))
        agent.learn(STEPS[env], callback=ModelErrorCallback(every=250, n_episodes=2, horizons=(1, 5, 15)))
        agent.logger.close()
        rows = pd.read_csv(Path(folder) / "progress.csv").dropna(subset="model_error/model_error_tv")
    named = {f"model_error/{name}": name for name in COLUMNS} | {"time/total_timesteps": "step"}
    return rows.rename(columns=named).assign(env=env).round(4).reindex(columns=["env", "step", *COLUMNS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*", default=list(STEPS), metavar="ENV", help=", ".join(STEPS))
    th.set_num_threads(1)
    for env in parser.parse_args().envs:
        rows = diagnosed(env)
        print(rows.to_string(index=False), flush=True)
        if RESULTS.exists():
            kept = pd.read_csv(RESULTS)
            rows = pd.concat([kept[kept["env"] != env], rows])
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()
