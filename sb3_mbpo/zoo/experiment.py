"""The RL Zoo's experiment and hyperparameter search for the algorithms of this package. Imports rl_zoo3, see cli.py."""

import argparse
import inspect
import math
import runpy
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
import rl_zoo3.exp_manager
import yaml
from rl_zoo3.callbacks import ParallelTrainCallback
from rl_zoo3.utils import StoreDict
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.checkpoints.resume_callback import ResumeCallback
from sb3_mbpo.dhmbpo import DHMBPO
from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.validation.rules import did_you_mean, numbers_in
from sb3_mbpo.variants import MBTD3, MBTQC, MBCrossQ

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "mbpo": MBPO,
    "dhmbpo": DHMBPO,
    "mbtd3": MBTD3,
    "mbtqc": MBTQC,
    "mbcrossq": MBCrossQ,
}

# Number of evaluations in a run that is shorter than the Zoo's interval of 25,000 steps, and in a trial. The Zoo makes one per
# 100,000 steps in a trial, which is too few for small budgets to choose the best agent or to prune.
FEWEST_EVALUATIONS = 10
# Converts the Dict observations of the DeepMind control suite to a vector.
FLATTEN = "gymnasium.wrappers.FlattenObservation"
# Exit code of a run that was ended by a signal and can be resumed: EX_TEMPFAIL of sysexits.h.
INTERRUPTED = 75


def hyperparams_folder() -> Path:
    """Settings per task: inside the package if it is installed, otherwise next to it, as in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def settings_file(config: str | None, algo: str) -> str | None:
    """
    :param config: value of ``--conf-file``; a name without folder may be a file of this package
    :param algo: name of an algorithm
    :return: the settings file; ``None``: the Zoo's own file for this algorithm
    """
    if config is None:
        return str(hyperparams_folder() / f"{algo}.yml") if algo in ALGORITHMS else None
    if Path(config).suffix in (".yml", ".yaml") and Path(config).name == config and not Path(config).exists():
        ours = hyperparams_folder() / config
        return str(ours) if ours.is_file() else config
    return config


def read_settings(file: str) -> Any:
    """:return: settings by env, from a YAML file, or from a Python file or module with a dictionary ``hyperparams``"""
    if file.endswith((".yml", ".yaml")):
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return runpy.run_path(file)["hyperparams"] if file.endswith(".py") else import_module(file).hyperparams


def sample(algorithm: type, trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample settings for ``-optimize``: those of model-based learning, and those of the algorithm that depend on them most.

    :param algorithm: a ModelBased class; the other arguments are those of the Zoo's samplers
    :return: keyword arguments of the algorithm
    """
    params = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 7, 9),
        "model_train_freq": trial.suggest_categorical("model_train_freq", [125, 250, 500, 1000]),
    }
    known = inspect.signature(algorithm).parameters
    if "training_horizon" in known:
        params["gradient_steps"] = trial.suggest_int("gradient_steps", 1, 4)
        params["training_horizon"] = trial.suggest_int("training_horizon", 1, 8)
        params["real_roots"] = trial.suggest_float("real_roots", 0.0, 1.0)
    else:
        params["gradient_steps"] = trial.suggest_int("gradient_steps", 5, 40, step=5)
        params["real_ratio"] = trial.suggest_float("real_ratio", 0.02, 0.5, log=True)
        params["rollout_schedule"] = trial.suggest_int("rollout_schedule", 1, 15, log=True)
        params["retained_rollouts"] = trial.suggest_int("retained_rollouts", 1, 8)
    if "tau" in known:
        params["tau"] = trial.suggest_float("tau", 0.001, 0.08, log=True)
    if "target_entropy" in known:
        # SAC's default is -n_actions; the paper's values are closer to zero.
        params["target_entropy"] = trial.suggest_float("target_entropy", -float(n_actions), -0.05 * n_actions)
    return convert(params)


def convert(params: dict[str, Any]) -> dict[str, Any]:
    """:return: keyword arguments of the algorithm, from the parameters of a trial as stored in the study"""
    rest = {key: value for key, value in params.items() if key not in ("one_minus_gamma", "batch_size_pow")}
    return {**rest, "gamma": 1 - params["one_minus_gamma"], "batch_size": 2 ** params["batch_size_pow"]}


def as_mapping(value: Any) -> Any:
    """:return: a dictionary if ``value`` is a string such as ``dict(a=1)``, otherwise ``value``"""
    if isinstance(value, str) and value.startswith("dict("):
        return eval(value, dict(vars(rl_zoo3.exp_manager)))
    return value


def flattened(wrappers: Any) -> Any:
    """
    :param wrappers: ``env_wrapper`` of the settings: ``None``, a wrapper or a list of them, each a dotted name or a mapping
        from it to its arguments
    :return: the wrappers with ``FLATTEN``
    """
    if "FlattenObservation" in str(wrappers):
        return wrappers
    return [*(wrappers if isinstance(wrappers, list) else [wrappers] if wrappers else []), FLATTEN]


class BareWords(StoreDict):
    """The Zoo's ``key:value`` pairs, with Python expressions as values. Here, an undefined name is a string."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, [self._quoted(value) for value in values], option_string)

    @staticmethod
    def _quoted(pair: str) -> str:
        key, _, text = pair.partition(":")
        if all(word.isidentifier() for word in text.split(".")):
            try:
                eval(text, dict(vars(rl_zoo3.utils)))
            except (NameError, AttributeError):
                return f"{key}:{text!r}"
        return pair


class Experiment(rl_zoo3.exp_manager.ExperimentManager):
    """
    The Zoo's experiment, adapted to the algorithms of this package. For other algorithms, it is the Zoo's.

    :param checkpoints: Folder of checkpoints; ``None``: no checkpoints. The other arguments are those of the Zoo
    """

    def __init__(
        self, args: argparse.Namespace, algo: str, env_id: str, *rest: Any, checkpoints: Path | None = None, **kwargs: Any
    ) -> None:
        self.checkpoints = checkpoints
        self.made_envs: list[VecEnv] = []
        self.new_folders: list[Path] = []
        self.ours = algo in ALGORITHMS
        kwargs["config"] = settings_file(kwargs.get("config"), algo)
        if self.ours and kwargs.get("n_evaluations") is None:
            kwargs["n_evaluations"] = FEWEST_EVALUATIONS
        super().__init__(args, algo, env_id, *rest, **kwargs)

    def setup_experiment(self) -> Any:
        try:
            return super().setup_experiment()
        except BaseException:
            # A refused run leaves nothing.
            self._leave_nothing()
            raise

    def create_envs(self, *args: Any, **kwargs: Any) -> VecEnv:
        self.made_envs.append(super().create_envs(*args, **kwargs))
        return self.made_envs[-1]

    def create_log_folder(self) -> None:
        folder = Path(self.save_path)
        self.new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        super().create_log_folder()

    def _leave_nothing(self) -> None:
        """After an error: close the envs, which have open files, and remove the folders of this run."""
        for env in self.made_envs:
            with suppress(EOFError, ConnectionError):
                env.close()
        for folder in self.new_folders:
            if folder == Path(self.save_path):
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.storage and self.study_name and self.trial_id == 0:
            # The Zoo treats trial 0 as no trial.
            best = self.load_trial(self.storage, self.study_name, self.trial_id)
            self.custom_hyperparams = {**best, **(self.custom_hyperparams or {})}
        self._merge_dynamics_kwargs()
        hyperparams, saved = super().read_hyperparameters()
        if self.env_name.gym_id.startswith("dm_control/") and hyperparams.get("policy") == "MlpPolicy":
            for settings in (hyperparams, saved):
                settings["env_wrapper"] = flattened(settings.get("env_wrapper"))
        if self.ours:
            hyperparams, saved = (OrderedDict(self._as_meant(settings)) for settings in (hyperparams, saved))
        return hyperparams, saved

    @staticmethod
    def _as_meant(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Convert strings: YAML reads 1e-3 and None as such, and the Zoo needs numbers for learning_rate and n_timesteps."""
        for key, value in settings.items():
            value = None if value == "None" else value
            if key in ("dynamics_kwargs", "rollout_schedule"):
                value = as_mapping(value)
            yield key, numbers_in(value)

    def _merge_dynamics_kwargs(self) -> None:
        """``-params dynamics_kwargs:...`` replaces only the given keys of the ``dynamics_kwargs`` in the settings file."""
        given = as_mapping((self.custom_hyperparams or {}).get("dynamics_kwargs"))
        if not self.ours or not isinstance(given, dict):
            return
        file = read_settings(self.config)
        settings = file.get(self.env_name.gym_id, file.get("default")) if isinstance(file, dict) else None
        of_file = as_mapping((settings or {}).get("dynamics_kwargs"))
        if isinstance(of_file, dict):
            self.custom_hyperparams = {**(self.custom_hyperparams or {}), "dynamics_kwargs": {**of_file, **given}}

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        processed = super()._preprocess_hyperparams(hyperparams)
        if self._eval_env_kwargs_args is None:
            # The Zoo passes env_kwargs from a settings file only to the training env,
            self.eval_env_kwargs = self.env_kwargs
        # and reads them from here when it records or publishes.
        self.args.env_kwargs = self.env_kwargs or None
        if self.ours:
            self._check(processed[0], processed[2])
        return processed

    def _check(self, settings: dict[str, Any], callbacks: Sequence[Any]) -> None:
        known = [*inspect.signature(ALGORITHMS[self.algo]).parameters, "noise_type", "noise_std"]
        for key in settings:
            if key not in known:
                # Otherwise, this would be a bare TypeError, or with -i an unused attribute.
                raise ValueError(f"{self.algo} has no setting {key!r}{did_you_mean(key, known)}")
        if any(isinstance(callback, ParallelTrainCallback) for callback in callbacks):
            raise ValueError(f"ParallelTrainCallback trains a copy of the agent, which fails with {self.algo}; remove it")

    def create_callbacks(self) -> None:
        if self.ours and self.eval_freq > self.n_timesteps and not self.optimize_hyperparameters:
            self.eval_freq = max(self.n_timesteps // FEWEST_EVALUATIONS, 1)
            print(f"Evaluating every {self.eval_freq} steps: --eval-freq is longer than the run")
        super().create_callbacks()

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: Any) -> BaseAlgorithm:
        if self.ours:
            # Learned weights only fit the dynamics they were learned with, as for policy_kwargs.
            for key in {"dynamics_class", "dynamics_kwargs"} - set(self.custom_hyperparams or {}):
                hyperparams.pop(key, None)
        return super()._load_pretrained_agent(hyperparams, env)

    def objective(self, trial: optuna.Trial) -> float:
        reward = super().objective(trial)
        if self.ours and not math.isfinite(reward):
            # A failed trial would be ignored by the search, but a pruned one is not.
            raise optuna.exceptions.TrialPruned()
        return reward

    def learn(self, model: Any) -> None:
        if not self.ours:
            super().learn(model)
            return
        log_interval = {} if self.log_interval == -1 else {"log_interval": max(self.log_interval, 0) or None}
        # The Zoo would start with random actions again. An agent that has its replay buffer does not need them; without it, it
        # does, because a few transitions would spoil its critic.
        goes_on = self.continue_training and model.replay_buffer.size() > 0
        every = min(max(int(self.n_timesteps) // FEWEST_EVALUATIONS, 1), 5_000)
        resume = None if self.checkpoints is None else ResumeCallback(self.checkpoints, every, verbose=self.verbose)
        callbacks = self.callbacks if resume is None else [*self.callbacks, resume]
        before = model.num_timesteps
        try:
            model.learn(self.n_timesteps, callback=callbacks, reset_num_timesteps=not goes_on, **log_interval)
        except KeyboardInterrupt:
            if resume is not None:
                # This is the second interrupt: stop immediately.
                raise
            # The Zoo saves the agent.
            for callback in self.callbacks:
                if isinstance(callback, ProgressBarCallback):
                    callback.on_training_end()
        except Exception:
            if model.num_timesteps == before:
                self._leave_nothing()
            raise
        finally:
            # A signal to the process group may have ended the envs' processes.
            with suppress(EOFError, ConnectionError):
                model.env.close()
        if resume is not None and resume.interrupted is not None:
            print(f"{resume.interrupted}: saved in {self.checkpoints}; the same command resumes the run")
            raise SystemExit(INTERRUPTED)
