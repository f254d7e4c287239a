"""The Zoo's experiment with comparable evaluations: at given steps, with a row per episode and the training time so far."""

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_mbpo.saving.whole_files import written_whole
from sb3_mbpo.zoo.experiment import Experiment

# Phases of a run. Time outside of the other phases counts for env and policy. Evaluation is not part of training.
PHASES = ("env_and_policy", "updates", "fits", "rollouts", "evaluation")
COLUMNS = (
    *("env", "algorithm", "seed", "step", "episode", "return", "length", "seconds"),
    *(f"{phase}_seconds" for phase in PHASES),
    "cpu_seconds",
    *(f"{phase}_cpu_seconds" for phase in PHASES),
)
# Logged only if a model rollout was made after the fit.
OF_ROLLOUTS = ("rollout_length", "branch_length", "filtered", "dropped", "clipped", "rollout_seconds", "rollout_cpu_seconds")
# File with the values logged under dynamics/ at each fit, a row per value.
FITS = "fits.csv"
# Evaluation episodes start in other states than training episodes, and in the same ones for every algorithm.
EVALUATION_SEED = 1_000_000


class EvaluationRecorder(BaseCallback):
    """
    Evaluates the agent at given steps and writes one row per episode. Measures the wall-clock and CPU time of each phase.

    CPU time includes all threads of this process, but not other processes, such as those of SubprocVecEnv. For a GPU, only the
    time that the CPU spends on it is included. The callback does not use the agent's random generators, so training is the
    same without it.

    :param path: The CSV file to write; an existing file is continued if the run is resumed
    :param origin: First columns of every row: env, algorithm, seed
    :param steps: Env steps of the evaluations, in ascending order; with several envs, a run is evaluated right after it has
        passed a step
    :param episodes: Number of episodes per evaluation
    """

    eval_env: VecEnv

    def __init__(self, path: Path, origin: dict[str, Any], steps: Sequence[int], episodes: int) -> None:
        super().__init__()
        self.path, self.origin, self.due, self.episodes = path, origin, list(steps), episodes
        self.deterministic = True
        #: Seconds and CPU seconds of each phase so far.
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cpu_seconds = dict.fromkeys(PHASES, 0.0)
        #: Settings that the Zoo read from its files and from the command.
        self.settings: dict[str, Any] = {}
        self._mark, self._cpu_mark = 0.0, 0.0
        self._fitted_at: int | None = None
        if not path.exists():
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)

    def on_resume(self) -> None:
        """After a checkpoint was restored, remove the rows of later evaluations and fits, which will be repeated."""
        self._start_lap()
        fits = self.path.with_name(FITS)
        if fits.exists():
            _replace(fits, [row for row in _rows(fits) if len(row) == 3 and int(row[0]) <= self.num_timesteps])
        header, *rows = _rows(self.path)
        step, episode = COLUMNS.index("step"), COLUMNS.index("episode")
        kept: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            # Keep the first of several rows, because each process evaluates at step 0. The last row may be incomplete.
            if len(row) == len(COLUMNS) and int(row[step]) not in self.due:
                kept.setdefault((row[step], row[episode]), row)
        _replace(self.path, [header, *kept.values()])

    def _start_lap(self) -> None:
        # Both clocks belong to the process, so after a resume, the marks of the earlier process are not valid.
        self._mark, self._cpu_mark = time.perf_counter(), time.process_time()

    def _end_lap(self, phase: str) -> None:
        """Add the time since the last call to a phase."""
        before, cpu_before = self._mark, self._cpu_mark
        self._start_lap()
        self.seconds[phase] += self._mark - before
        self.cpu_seconds[phase] += self._cpu_mark - cpu_before

    def _on_training_start(self) -> None:
        self._start_lap()
        self._evaluate_if_due()

    def _on_rollout_start(self) -> None:
        # SB3 trains between two rollouts.
        self._end_lap("updates")

    def _on_step(self) -> bool:
        if self.due and self.num_timesteps >= self.due[0]:
            self._end_lap("env_and_policy")
            self._evaluate_if_due()
        return True

    def _on_rollout_end(self) -> None:
        # MBPO's own callback runs before those of users, and its times stay in the logger until the next dump.
        model: Any = self.model
        fitted_at = getattr(model, "dynamics_fitted_at", None)
        if fitted_at != self._fitted_at:
            self._fitted_at = fitted_at
            # Without a model rollout, the logger may still contain the values of an earlier one.
            if not model.replay_buffer.model_buffer.refills[-1]:
                for name in OF_ROLLOUTS:
                    self.logger.name_to_value.pop(f"dynamics/{name}", None)
            for phase, key in (("fits", "dynamics/fit"), ("rollouts", "dynamics/rollout")):
                seconds, cpu_seconds = (self.logger.name_to_value.get(f"{key}_{of}", 0.0) for of in ("seconds", "cpu_seconds"))
                self.seconds[phase] += seconds
                self.cpu_seconds[phase] += cpu_seconds
                self._mark += seconds
                self._cpu_mark += cpu_seconds
            with self.path.with_name(FITS).open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    [self.num_timesteps, key.removeprefix("dynamics/"), f"{value:.6g}"]
                    for key, value in self.logger.name_to_value.items()
                    if "dynamics/" in key and isinstance(value, int | float)
                )
        self._end_lap("env_and_policy")

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


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _replace(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    with written_whole(path, "csv") as file:
        file.write(text.getvalue().encode())


class ComparisonExperiment(Experiment):
    """
    The Zoo's experiment, evaluated by a recorder.

    :param recorder: The recorder, which gets the evaluation env and the settings. The other arguments are those of the Zoo
    """

    def __init__(self, *args: Any, recorder: EvaluationRecorder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = recorder

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        hyperparams, saved = super().read_hyperparameters()
        # The number of steps is set by the comparison, not by the file.
        self.recorder.settings = {key: value for key, value in saved.items() if key != "n_timesteps"}
        return hyperparams, saved

    def create_callbacks(self) -> None:
        super().create_callbacks()
        self.recorder.eval_env = self.create_envs(1, eval_env=True)
        self.recorder.eval_env.seed(EVALUATION_SEED + self.seed)
        self.recorder.deterministic = self.deterministic_eval
        # The recorder must be first: other callbacks may dump the logger, with the values of a fit, at the end of a rollout.
        self.callbacks.insert(0, self.recorder)
