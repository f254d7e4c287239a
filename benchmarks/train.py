"""
Train one agent on one environment and leave what a person wants to look at: agent, CSV, TensorBoard log, picture.

    python benchmarks/train.py --env Pendulum-v1 --seed 0
    python benchmarks/train.py --env Pendulum-v1 --algo sac --steps 5000 --set gradient_steps=1
    python benchmarks/train.py --env Hopper-v5 --steps 5000 --set learning_starts=1000 --set termination_fn=learned

Settings come from hyperparams/mbpo.yml; --set overrides one of them (a value is read as YAML, a dot reaches into a mapping).
The last line is the deterministic return of the trained agent.
"""

import argparse
import csv
import inspect
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import hazard  # noqa: F401  (registers HiddenHazard-v0)
import matplotlib
import no_past  # noqa: F401  (registers NoPast-v0)
import numpy as np
import torch as th
import yaml
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import MBPO
from sb3_mbpo.validation.rules import numbers_in, resolve

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent


def settings_for(env_id: str, overrides: list[str]) -> dict[str, Any]:
    """The YAML entry of an environment (or the default one), with ``key=value`` overrides."""
    entries = yaml.safe_load((ROOT / "hyperparams" / "mbpo.yml").read_text())
    settings = dict(entries.get(env_id, entries["default"]))
    for override in overrides:
        path, _, value = override.partition("=")
        *parents, key = path.split(".")
        target = settings
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = yaml.safe_load(value)
    return settings


def make_env(env_id: str, env_kwargs: dict[str, Any], env_wrapper: str | None) -> gym.Env:
    """
    :param env_kwargs: as in the settings
    :param env_wrapper: dotted name of one wrapper, as in the settings
    """
    if env_id.startswith("dm_control/"):
        # Registers them.
        import shimmy  # noqa: F401
    env = gym.make(env_id, **env_kwargs)
    env = env if env_wrapper is None else resolve(env_wrapper)(env)
    is_dict = isinstance(env.observation_space, gym.spaces.Dict)
    return gym.wrappers.FlattenObservation(env) if env_id.startswith("dm_control/") and is_dict else env


def start_with_episodes(agent: MBPO, env: gym.Env, seed: int) -> None:
    """
    Imagined rollouts start where episodes do, not where the agent has been.

    :param env: asked for as many first observations as there are branches; no step is taken in it
    :param seed: of these
    """
    env.reset(seed=seed)

    def start_states(n: int, newest: int | None = None) -> th.Tensor:
        return th.as_tensor(np.array([env.reset()[0] for _ in range(n)]), dtype=th.float32, device=agent.device)

    assert agent.replay_buffer is not None
    agent.replay_buffer.start_states = start_states  # type: ignore[method-assign]


# Of the last fit before an evaluation; empty for an algorithm without a model.
LOGGED = (
    "q_mean",
    "q_max",
    "q_bound",
    "epochs",
    "updates",
    "explained_obs",
    "explained_reward",
    "holdout_error",
    "real_share",
)
COLUMNS = ("seed", "step", "episode", "return", "length", "seconds", "cpu_seconds", "fit_cpu_seconds", *LOGGED)


class EvaluationCsv(BaseCallback):
    """
    After each evaluation, adds a line per episode to a CSV; the mean alone would hide an agent that falls now and then.

    Seconds are those since the start, evaluations included; CPU seconds those of all threads, and ``fit_cpu_seconds`` of all
    fits so far.

    :param path: the file
    :param seed: written into every line
    :param evaluation: what evaluates, with a ``log_path``; it comes before this one in the list of callbacks
    """

    def __init__(self, path: Path, seed: int, evaluation: EvalCallback) -> None:
        super().__init__()
        self.path, self.seed, self.evaluation = path, seed, evaluation
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.written, self.fitted_at, self.fit_cpu_seconds = 0, None, 0.0
        self.logged: dict[str, float] = {}
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)

    def _on_rollout_end(self) -> None:
        fitted_at = getattr(self.model, "dynamics_fitted_at", None)
        if fitted_at != self.fitted_at:
            self.fitted_at = fitted_at
            # MBPO's own callback comes before those of the user.
            values = {name.removeprefix("dynamics/"): value for name, value in self.logger.name_to_value.items()}
            self.logged = {name: round(values[name], 5) for name in LOGGED if name in values}
            self.fit_cpu_seconds += values.get("fit_cpu_seconds", 0.0)

    def _on_step(self) -> bool:
        if len(self.evaluation.evaluations_results) == self.written:
            return True
        self.written += 1
        times = (time.perf_counter() - self.started, time.process_time() - self.cpu_started, self.fit_cpu_seconds)
        last = [*(round(seconds, 1) for seconds in times), *(self.logged.get(name, "") for name in LOGGED)]
        episodes = zip(self.evaluation.evaluations_results[-1], self.evaluation.evaluations_length[-1], strict=True)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(
                [self.seed, self.num_timesteps, i, round(float(result), 3), int(length), *last]
                for i, (result, length) in enumerate(episodes)
            )
        return True


def draw(path: Path, title: str, steps: list[int], returns: list[list[float]]) -> None:
    """A learning curve: every evaluated episode a dot, their mean a line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for episode in np.transpose(returns):
        axes.plot(steps, episode, ".", color="tab:blue", alpha=0.35, markersize=5, markeredgewidth=0)
    axes.plot(steps, np.mean(returns, axis=1), color="tab:blue")
    axes.set(title=title, xlabel="real environment steps", ylabel="return of a deterministic episode")
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedPendulum-v5")
    parser.add_argument("--algo", choices=["mbpo", "sac"], default="mbpo")
    parser.add_argument("--steps", type=int, help="env steps; default: n_timesteps of hyperparams/mbpo.yml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--episode-starts", action="store_true", help="imagined rollouts start where episodes do")
    parser.add_argument("--eval-freq", type=int, default=250, help="env steps from one evaluation to the next")
    parser.add_argument("--eval-episodes", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="default: logs/ALGO/ENV_SEED")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch; default: OMP_NUM_THREADS, else 1")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.threads is not None or not os.environ.get("OMP_NUM_THREADS"):
        th.set_num_threads(args.threads or 1)
        # Shows MBPO that the number was chosen, also where it is PyTorch's default.
        os.environ["OMP_NUM_THREADS"] = str(args.threads or 1)

    settings = settings_for(args.env, args.overrides)
    steps = args.steps or int(settings["n_timesteps"])
    settings.pop("n_timesteps")
    env_settings = {"env_kwargs": settings.pop("env_kwargs", {}), "env_wrapper": settings.pop("env_wrapper", None)}
    algorithm = {"mbpo": MBPO, "sac": SAC}[args.algo]
    if algorithm is SAC:
        known = inspect.signature(SAC).parameters
        settings = {key: numbers_in(value) for key, value in settings.items() if key in known}
    folder = args.folder or Path("logs") / args.algo / f"{args.env}_{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)

    eval_env = Monitor(make_env(args.env, **env_settings))
    # Evaluation episodes of another seed start elsewhere than the training ones.
    eval_env.reset(seed=args.seed + 10_000)
    evaluation = EvalCallback(
        eval_env,
        n_eval_episodes=args.eval_episodes,
        eval_freq=min(args.eval_freq, steps),
        log_path=str(folder),
        best_model_save_path=str(folder),
        verbose=0,
    )
    agent = algorithm(
        env=make_env(args.env, **env_settings), seed=args.seed, tensorboard_log=str(folder / "tensorboard"), **settings
    )
    if args.episode_starts:
        assert isinstance(agent, MBPO), "--episode-starts is about imagined rollouts"
        start_with_episodes(agent, make_env(args.env, **env_settings), args.seed + 20_000)
    started = time.perf_counter()
    rows = EvaluationCsv(folder / "evaluations.csv", args.seed, evaluation)
    agent.learn(steps, callback=[evaluation, rows], progress_bar=not args.quiet)
    minutes = (time.perf_counter() - started) / 60
    agent.save(folder / "agent")

    title = f"{algorithm.__name__} on {args.env}, seed {args.seed}"
    draw(folder / "learning_curve.png", title, evaluation.evaluations_timesteps, evaluation.evaluations_results)
    returns, _ = evaluate_policy(agent, eval_env, n_eval_episodes=10, return_episode_rewards=True)
    print(f"{steps:,} steps in {minutes:.1f} minutes; agent, CSV, TensorBoard log and learning_curve.png are in {folder}/")
    assert isinstance(returns, list)
    print(f"deterministic evaluation return: {np.mean(returns):.1f} +/- {np.std(returns):.1f} over {len(returns)} episodes")


if __name__ == "__main__":
    main()
