"""The Zoo's experiment with evaluations that can be compared: at given steps, every episode, with the time so far."""

import csv
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_mbpo.zoo_experiment import Experiment

# Where the time goes. What the others leave is the env's and the policy's; evaluation is no part of training.
PHASES = ("env_and_policy", "updates", "fits", "rollouts", "evaluation")
COLUMNS = (
    *("env", "algorithm", "seed", "step", "episode", "return", "length", "seconds"),
    *(f"{phase}_seconds" for phase in PHASES),
)
# Beside the evaluations: what was logged under dynamics/ at each fit, a row for each number.
FITS = "fits.csv"
# Evaluation episodes start elsewhere than the training ones, and in the same states for every algorithm.
EVALUATION_SEED = 1_000_000


class EvaluationRecorder(BaseCallback):
    """
    Evaluates at given steps and writes one row per episode; also keeps the time of each phase.

    It draws no random numbers that the agent would draw, so training is the same without it.

    :param path: the CSV; an existing one is that of a run that was cut, and goes on once that run is resumed
    :param origin: the first columns of every row: env, algorithm, seed
    :param steps: env steps of the evaluations, ascending; a run of several envs is evaluated right after it passed a step
    :param episodes: per evaluation
    """

    eval_env: VecEnv

    def __init__(self, path: Path, origin: dict[str, Any], steps: Sequence[int], episodes: int) -> None:
        super().__init__()
        self.path, self.origin, self.due, self.episodes = path, origin, list(steps), episodes
        self.deterministic = True
        #: Seconds of each phase so far.
        self.seconds = dict.fromkeys(PHASES, 0.0)
        #: What the Zoo read from its files and from the command.
        self.settings: dict[str, Any] = {}
        self._mark = 0.0
        self._fitted_at: int | None = None
        if not path.exists():
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)

    def on_resume(self) -> None:
        """After the state of a checkpoint was put back: what was evaluated and fitted after it comes again."""
        self._mark = time.perf_counter()
        fits = self.path.with_name(FITS)
        if fits.exists():
            with fits.open(newline="", encoding="utf-8") as file:
                known = [row for row in csv.reader(file) if len(row) == 3 and int(row[0]) <= self.num_timesteps]
            _replace(fits, known)
        with self.path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        step, episode = COLUMNS.index("step"), COLUMNS.index("episode")
        kept: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            # The first of several: each process evaluates at step 0. One that was cut may be half a row.
            if len(row) == len(COLUMNS) and int(row[step]) not in self.due:
                kept.setdefault((row[step], row[episode]), row)
        _replace(self.path, [header, *kept.values()])

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def _on_training_start(self) -> None:
        self._mark = time.perf_counter()
        self._evaluate_if_due()

    def _on_rollout_start(self) -> None:
        # SB3 trains between one rollout and the next.
        self.seconds["updates"] += self._lap()

    def _on_step(self) -> bool:
        if self.due and self.num_timesteps >= self.due[0]:
            self.seconds["env_and_policy"] += self._lap()
            self._evaluate_if_due()
        return True

    def _on_rollout_end(self) -> None:
        # MBPO's own callback comes before those of the user, and leaves its times in the log until the next one is written.
        fitted_at = getattr(self.model, "dynamics_fitted_at", None)
        if fitted_at != self._fitted_at:
            self._fitted_at = fitted_at
            for phase, key in (("fits", "dynamics/fit_seconds"), ("rollouts", "dynamics/rollout_seconds")):
                self.seconds[phase] += self.logger.name_to_value[key]
                self._mark += self.logger.name_to_value[key]
            self._record_fit()
        self.seconds["env_and_policy"] += self._lap()

    def _record_fit(self) -> None:
        values = {
            key.removeprefix("dynamics/"): value for key, value in self.logger.name_to_value.items() if "dynamics/" in key
        }
        with self.path.with_name(FITS).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [self.num_timesteps, key, f"{value:.6g}"] for key, value in values.items() if isinstance(value, int | float)
            )

    def _on_training_end(self) -> None:
        self.seconds["updates"] += self._lap()

    def _evaluate_if_due(self) -> None:
        while self.due and self.num_timesteps >= self.due[0]:
            training = sum(self.seconds[phase] for phase in PHASES if phase != "evaluation")
            sync_envs_normalization(self.training_env, self.eval_env)
            returns, lengths = evaluate_policy(
                self.model, self.eval_env, self.episodes, deterministic=self.deterministic, return_episode_rewards=True
            )
            self.seconds["evaluation"] += self._lap()
            assert isinstance(returns, list) and isinstance(lengths, list)
            times = [round(value, 3) for value in (training, *self.seconds.values())]
            step = self.due.pop(0)
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    [*self.origin.values(), step, i, round(float(result), 6), int(length), *times]
                    for i, (result, length) in enumerate(zip(returns, lengths, strict=True))
                )


def _replace(path: Path, rows: list[list[str]]) -> None:
    """Another content for a CSV, whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    os.replace(part, path)


class ComparisonExperiment(Experiment):
    """
    The Zoo's experiment, evaluated by a recorder.

    :param recorder: gets the evaluation env and the settings; the other arguments are the Zoo's
    """

    def __init__(self, *args: Any, recorder: EvaluationRecorder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = recorder

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        hyperparams, saved = super().read_hyperparameters()
        # The budget is the comparison's, whatever the file says.
        self.recorder.settings = {key: value for key, value in saved.items() if key != "n_timesteps"}
        return hyperparams, saved

    def create_callbacks(self) -> None:
        super().create_callbacks()
        self.recorder.eval_env = self.create_envs(1, eval_env=True)
        self.recorder.eval_env.seed(EVALUATION_SEED + self.seed)
        self.recorder.deterministic = self.deterministic_eval
        # First: others may write the log out at the end of a rollout, and what a fit has recorded with it.
        self.callbacks.insert(0, self.recorder)
