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

from sb3_mbpo.zoo.experiment import Experiment

# Where the time goes. What the others leave is the env's and the policy's; evaluation is no part of training.
PHASES = ("env_and_policy", "updates", "fits", "rollouts", "evaluation")
COLUMNS = (
    *("env", "algorithm", "seed", "step", "episode", "return", "length", "seconds"),
    *(f"{phase}_seconds" for phase in PHASES),
    "cpu_seconds",
    *(f"{phase}_cpu_seconds" for phase in PHASES),
)
# Logged after a fit only if something was imagined.
OF_ROLLOUTS = ("rollout_length", "branch_length", "filtered", "dropped", "clipped", "rollout_seconds", "rollout_cpu_seconds")
# Beside the evaluations: what was logged under dynamics/ at each fit, a row for each number.
FITS = "fits.csv"
# Evaluation episodes start elsewhere than the training ones, and in the same states for every algorithm.
EVALUATION_SEED = 1_000_000


class EvaluationRecorder(BaseCallback):
    """
    Evaluates at given steps and writes one row per episode; also keeps the time of each phase, by the clock and of the CPU.

    CPU seconds are those of all threads of this process. Other processes, as those of SubprocVecEnv, are not counted, and of
    a GPU only the time that the CPU spends on it.

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
        #: CPU seconds of each phase so far.
        self.cpu_seconds = dict.fromkeys(PHASES, 0.0)
        #: What the Zoo read from its files and from the command.
        self.settings: dict[str, Any] = {}
        self._mark, self._cpu_mark = 0.0, 0.0
        self._fitted_at: int | None = None
        if not path.exists():
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)

    def on_resume(self) -> None:
        """After the state of a checkpoint was put back: what was evaluated and fitted after it comes again."""
        self._start_lap()
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

    def _start_lap(self) -> None:
        # Both clocks are the process's own: after a resume the marks of the earlier process mean nothing.
        self._mark, self._cpu_mark = time.perf_counter(), time.process_time()

    def _end_lap(self, phase: str) -> None:
        """Add the time since the last call to that of a phase."""
        before, cpu_before = self._mark, self._cpu_mark
        self._start_lap()
        self.seconds[phase] += self._mark - before
        self.cpu_seconds[phase] += self._cpu_mark - cpu_before

    def _on_training_start(self) -> None:
        self._start_lap()
        self._evaluate_if_due()

    def _on_rollout_start(self) -> None:
        # SB3 trains between one rollout and the next.
        self._end_lap("updates")

    def _on_step(self) -> bool:
        if self.due and self.num_timesteps >= self.due[0]:
            self._end_lap("env_and_policy")
            self._evaluate_if_due()
        return True

    def _on_rollout_end(self) -> None:
        # MBPO's own callback comes before those of the user, and leaves its times in the log until the next one is written.
        model: Any = self.model
        fitted_at = getattr(model, "dynamics_fitted_at", None)
        if fitted_at != self._fitted_at:
            self._fitted_at = fitted_at
            # Where nothing was imagined, the log may still hold the numbers of an earlier rollout.
            if not model.replay_buffer.model_buffer.refills[-1]:
                for name in OF_ROLLOUTS:
                    self.logger.name_to_value.pop(f"dynamics/{name}", None)
            for phase, key in (("fits", "dynamics/fit"), ("rollouts", "dynamics/rollout")):
                seconds, cpu_seconds = (self.logger.name_to_value.get(f"{key}_{of}", 0.0) for of in ("seconds", "cpu_seconds"))
                self.seconds[phase] += seconds
                self.cpu_seconds[phase] += cpu_seconds
                self._mark += seconds
                self._cpu_mark += cpu_seconds
            self._record_fit()
        self._end_lap("env_and_policy")

    def _record_fit(self) -> None:
        values = {
            key.removeprefix("dynamics/"): value for key, value in self.logger.name_to_value.items() if "dynamics/" in key
        }
        with self.path.with_name(FITS).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [self.num_timesteps, key, f"{value:.6g}"] for key, value in values.items() if isinstance(value, int | float)
            )

    def _on_training_end(self) -> None:
        self._end_lap("updates")

    def _evaluate_if_due(self) -> None:
        while self.due and self.num_timesteps >= self.due[0]:
            trained = [sum(of[phase] for phase in PHASES[:-1]) for of in (self.seconds, self.cpu_seconds)]
            sync_envs_normalization(self.training_env, self.eval_env)
            returns, lengths = evaluate_policy(
                self.model, self.eval_env, self.episodes, deterministic=self.deterministic, return_episode_rewards=True
            )
            self._end_lap("evaluation")
            assert isinstance(returns, list) and isinstance(lengths, list)
            both = ((trained[0], *self.seconds.values()), (trained[1], *self.cpu_seconds.values()))
            times = [round(value, 3) for values in both for value in values]
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
