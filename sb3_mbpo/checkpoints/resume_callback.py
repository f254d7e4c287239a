"""Saves a run from time to time, and resumes it: ``ResumeCallback`` and ``resume``."""

import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    ConvertCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn

from sb3_mbpo.checkpoints import checkpoint
from sb3_mbpo.checkpoints.callback_state import all_callbacks, tell_callbacks
from sb3_mbpo.checkpoints.interrupts import Interrupted, Interrupts
from sb3_mbpo.checkpoints.lock import FolderLock
from sb3_mbpo.checkpoints.training_state import put_agent, put_training, take_agent, take_training
from sb3_mbpo.saving.description import build, describe
from sb3_mbpo.saving.serialization import Tensors
from sb3_mbpo.validation.class_registry import AGENTS
from sb3_mbpo.validation.faults import InvalidTransition

# All saves so far, and one more like the last, take at most 1/50 of the time (2 %). The last save of a run is never delayed.
_PATIENCE = 50
# Minimum number of updates in one call of train() for it to be interruptible.
_LONG_TRAIN = 100
# Settings that `resume` takes from the run.
_SETTINGS = ("every", "keep", "signals", "verbose")
# Arguments of `learn` that `resume` takes from the run.
_OF_LEARN = ("total_timesteps", "log_interval", "tb_log_name", "background")
# Errors of a checkpoint that does not fit the agent.
_NO_FIT = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError)
_STOPPED = "a callback ended the run in the middle of a step"


class ResumeCallback(BaseCallback):
    """
    Saves the run from time to time. Run the same command again, and it continues where it was interrupted::

        MBPO("MlpPolicy", "Hopper-v5").learn(125_000, callback=ResumeCallback("runs/hopper"))

    On a CPU, a resumed run equals an uninterrupted one bit for bit if its envs can be restored, see
    :func:`.env_state.take_envs`. Otherwise it continues at the start of an episode, with a warning.

    A signal ends the run. It is saved at the next point between two rollouts, usually within seconds, and ``learn`` returns. A
    fit, a model rollout or a long ``train()`` is aborted and repeated later. A second signal ends the process at once.

    A run that a callback ends is saved, too. Run again, it continues from there, unless that callback ends it at once.

    :param folder: Folder of this run
    :param every: Number of env transitions between two checkpoints; more if saving would take more than 2 % of the time
    :param keep: Number of newest checkpoints that are kept. With an ``EvalCallback`` in the same ``learn``, the best one is
        kept, too
    :param signals: Names of the signals that end the run. Outside of the main thread, signals are not handled
    :param verbose: 1: print a line for each checkpoint, and when a run is resumed (that also with the agent's ``verbose=1``)
    """

    def __init__(
        self,
        folder: str | Path,
        every: int = 5_000,
        keep: int = 3,
        signals: Iterable[str] = ("SIGTERM", "SIGINT", "SIGUSR1"),
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value in (("every", every), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ResumeCallback: {name}={value!r} must be a whole number of at least 1")
        self.folder, self.every, self.keep = _read_folder("ResumeCallback", folder), every, keep
        self.signals = [signals] if isinstance(signals, str) else list(signals)
        self.interrupts = Interrupts(self.signals)
        self._lock: FolderLock | None = None
        # Whether `resume` made the agent from the checkpoint.
        self._is_run_of_agent = False
        self.model: Any

    @property
    def interrupted(self) -> str | None:
        """The signal that ended the last ``learn``, by name."""
        return None if self.interrupts.received is None else self.interrupts.received.name

    def _init_callback(self) -> None:
        if not hasattr(self.model, "resume_callback"):
            raise ValueError(f"ResumeCallback works with agents of sb3_mbpo, not with {type(self.model).__name__}")
        if self.model.resume_callback is not None:
            raise ValueError("learn needs only one ResumeCallback, but got two")
        self.model.resume_callback = self

    def begin(self, callback: BaseCallback) -> None:
        """
        Called by the agent when ``learn`` begins.

        :param callback: all callbacks of this ``learn``
        """
        self._lock = FolderLock(self.folder)
        self._all = callback
        # Not this callback, because its attributes belong to this process.
        self._others = [one for one in all_callbacks(callback) if one is not self]
        self._found = checkpoint.newest(self.folder)
        for problem in () if self._found is None else self._found[2].passed_over:
            warnings.warn(problem, stacklevel=2)
        # The rest of the current rollout, see `rollout`; then the state that train() is undone to.
        self._left: dict[str, Any] | None = None
        self._before_train: tuple[dict[str, Any], Tensors] | None = None
        # How much the agent had learned when the run began; then the step at which a callback ended the run.
        self._origin: list[int] | None = None
        self._stopped_at: int | None = None
        self._saved_at, self._began, self._seconds, self._spent = self.model.num_timesteps, time.perf_counter(), 0.0, 0.0
        self._is_consistent = False
        self.model.replay_buffer.check = self.check_train
        self.interrupts.listen()

    def end(self) -> None:
        """Called by the agent when ``learn`` ends, also after an error."""
        self.interrupts.close()
        if self._lock is not None:
            self._lock.close()
        self.model.resume_callback = None
        # A callback may have set it to None to free memory.
        if self.model.replay_buffer is not None:
            self.model.replay_buffer.check = None

    def rollout(self, collect: Callable[[], RolloutReturn]) -> RolloutReturn:
        """
        Called by the agent instead of SB3's ``collect_rollouts``. Runs are saved and resumed before it.

        :param collect: SB3's method
        :return: its result. If the run was interrupted after it, the result of then. After a signal, one that ends ``learn``
        """
        left = None
        if self._origin is None:
            self._origin = self._life()
        if self._found is not None:
            left = self._go_on(*self._found)
        if left is None:
            if self.model.num_timesteps >= self.model._total_timesteps or self._is_over():
                return RolloutReturn(0, 0, continue_training=False)
            if self.interrupts.received is not None or self._is_due():
                self.save()
            if self.interrupts.received is not None:
                return self._end()
        try:
            if left is None:
                result = collect()
            else:
                if left["rollout_end"]:
                    self._all.on_rollout_end()
                self.model.owe_updates(left["steps"])
                result = RolloutReturn(left["steps"], 0, continue_training=True)
        except Interrupted:
            steps = self.locals["num_collected_steps"] * self.model.n_envs if left is None else left["steps"]
            self.save({"steps": steps, "rollout_end": True})
            return self._end()
        except (EOFError, OSError):
            # A signal to the process group also ends the processes of a SubprocVecEnv, and may reach them first.
            time.sleep(0.5)
            if self.interrupts.received is None:
                raise
            self.save(lost="their processes have ended")
            return self._end()
        except InvalidTransition:
            # The step was neither stored nor counted, but the envs have made it.
            self.save(lost="they were in the middle of a step that failed")
            raise
        if not result.continue_training and self.model.num_timesteps - self.model.n_envs != self._stopped_at:
            # Not if it was ended here before: each attempt would leave the run one step further.
            self.save(lost=_STOPPED, stopped=True)
        self._left = {"steps": result.episode_timesteps, "rollout_end": False}
        self._before_train = self._agent() if self._is_long(result) else None
        self._is_consistent = result.continue_training
        return result

    def _end(self) -> RolloutReturn:
        """:return: a result that ends ``learn``, after the run was saved"""
        self._is_consistent = False
        return RolloutReturn(0, 0, continue_training=False)

    def check(self) -> None:
        """
        Called during a fit and a model rollout, which can be repeated.

        :raises Interrupted: a signal has arrived
        """
        self.interrupts.check()

    def check_train(self) -> None:
        """Like :meth:`check`, during ``train()``. Does nothing if ``train()`` is short."""
        if self._before_train is not None:
            self.interrupts.check()

    @property
    def can_undo_train(self) -> bool:
        """Whether the current ``train()`` may be aborted."""
        return self._before_train is not None

    def undo_train(self) -> None:
        """Called by the agent when ``train()`` was aborted: undo it, save, and end the training."""
        assert self._before_train is not None
        put_agent(self.model, *self._before_train)
        self.save(self._left)
        self._is_consistent = False
        self._all.on_training_end()

    def _on_training_end(self) -> None:
        # Not if a callback ended the run in the middle of a step.
        if self._is_consistent:
            self.save()

    def save(
        self, left: dict[str, Any] | None = None, lost: str | None = None, stopped: bool = False
    ) -> checkpoint.Checkpoint:
        """
        Save a checkpoint.

        :param left: the rest of the current rollout; ``None``: there is none
        :param lost: see :func:`.training_state.take_training`
        :param stopped: whether a callback has ended the run
        :return: the new checkpoint
        :raises ValueError: learning has diverged. Go back to an earlier checkpoint
        """
        if self.interrupts.received is None and lost is None:
            self.model.catch_up()
        else:
            self.model.stop_learner()
        self.model.check_parameters()
        started = time.perf_counter()
        tensors: Tensors = {}
        state = take_training(self.model, self._others, tensors, lost)
        state |= {
            "left": left,
            "stopped": stopped,
            "origin": self._origin,
            "life": self._life(),
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "class": type(self.model).__name__,
            "agent": describe(self.model),
            "learn": self._learn_arguments(),
        }
        scores = [float(one.last_mean_reward) for one in self._others if isinstance(one, EvalCallback)]
        score = next(filter(math.isfinite, scores), None)
        saved = checkpoint.write(self.folder, state, tensors, self.model.num_timesteps, score)
        checkpoint.prune(self.folder, self.keep)
        self._saved_at, self._seconds = self.model.num_timesteps, time.perf_counter() - started
        self._spent += self._seconds
        if self.verbose >= 1:
            print(f"Checkpoint {saved.path} ({self._seconds:.1f} s)")
        return saved

    def _go_on(self, state: dict[str, Any], tensors: Tensors, found: checkpoint.Checkpoint) -> dict[str, Any] | None:
        """
        Restore the state of a checkpoint.

        :return: the rest of the rollout that was under way; ``None``: there was none
        """
        _check_state(state, found.path)
        if state["class"] != type(self.model).__name__:
            raise ValueError(
                f"{found.path} is a checkpoint of {state['class']}, not of {type(self.model).__name__}: make such an agent, "
                "or choose another folder"
            )
        if not self._is_run_of_agent and self._origin not in (state["origin"], state["life"]):
            raise ValueError(
                f"{self.folder} holds the run of another agent: that one had learned for {state['origin'][0]:,} steps when "
                f"the run began, and this one for {self._life()[0]:,}, which would be lost. Make the agent as it was made "
                "for that run, or choose another folder"
            )
        target = self.model._total_timesteps
        try:
            lost = put_training(self.model, self._others, state, tensors)
        except _NO_FIT as error:
            different = self._different(state["agent"])
            how = f"with the {', '.join(different)} of the run" if different else "and its env as those of the run"
            # Which takes the arguments from the checkpoint.
            or_else = "or" if self._is_run_of_agent else "call sb3_mbpo.resume, or"
            raise ValueError(
                f"{found.path} does not fit the agent: {' '.join(str(error).split())[:500]}. Make the agent {how}, {or_else} "
                "choose another folder"
            ) from error
        tell_callbacks(self._others)
        self._origin = state["origin"]
        self._stopped_at = self.model.num_timesteps if state["stopped"] else None
        if lost and not self._is_over():
            warnings.warn(lost, stacklevel=2)
        self._compare(state["agent"])
        # A `learn` that is longer than that of the run continues to its own end.
        self.model._total_timesteps = target
        self._found, self._saved_at = None, self.model.num_timesteps
        if max(self.verbose, self.model.verbose) >= 1:
            print(f"Resumed at step {self.model.num_timesteps:,} from {found.path}")
        return state["left"]

    def _life(self) -> list[int]:
        """:return: how much the agent has learned: env transitions and updates"""
        return [self.model.lifetime_timesteps, self.model._n_updates]

    def _is_over(self) -> bool:
        """:return: whether a callback of SB3 has ended the run, and would end it again, maybe some steps later"""
        return self._stopped_at == self.model.num_timesteps and any(map(_has_ended, self._others))

    def _learn_arguments(self) -> dict[str, Any]:
        """:return: the arguments of the present ``learn`` that :func:`resume` needs"""
        given = {name: self.locals.get(name) for name in ("log_interval", "tb_log_name")}
        return {"total_timesteps": self.model._total_timesteps, "background": self.model.learns_in_background, **given}

    def _compare(self, then: dict[str, Any]) -> None:
        """Warn of arguments and versions that differ from those of the checkpoint."""
        different = self._different(then)
        random = ", but its random numbers continue" if "seed" in different else ""
        if different:
            what = f"The run was started with other values of {', '.join(different)}; it continues with those of now{random}"
            warnings.warn(what, stacklevel=2)

    def _different(self, then: dict[str, Any]) -> list[str]:
        """:return: names of arguments and versions that differ from those of a checkpoint"""
        now = describe(self.model)
        # Action noise contains numbers that change and are restored.
        names = [(part, name) for part in ("arguments", "versions") for name in now[part] if name != "action_noise"]
        return [name for part, name in names if now[part][name] != then[part].get(name)]

    def _is_due(self) -> bool:
        if self.model.num_timesteps // self.every <= self._saved_at // self.every or not self.model.may_pause:
            return False
        return time.perf_counter() - self._began >= _PATIENCE * (self._spent + self._seconds)

    def _is_long(self, rollout: RolloutReturn) -> bool:
        updates = self.model.updates_after(rollout.episode_timesteps)
        return bool(self.interrupts.signals) and updates >= _LONG_TRAIN

    def _agent(self) -> tuple[dict[str, Any], Tensors]:
        tensors: Tensors = {}
        state = take_agent(self.model, tensors)
        return state, {name: tensor.clone() for name, tensor in tensors.items()}

    def _on_step(self) -> bool:
        return True


def resume(
    folder: str | Path,
    env: GymEnv | str,
    callback: MaybeCallback = None,
    device: th.device | str = "auto",
    agent_class: type | None = None,
    **arguments: Any,
) -> Any:
    """
    Continue a run from its folder: make its agent, and call ``learn`` until the end of the run.

    :param folder: folder of a ``ResumeCallback``. Checkpoints are saved there with the settings of the run
    :param env: an env made like that of the run, or its name
    :param callback: the other callbacks of the run, made as before. To change the settings, also a ``ResumeCallback`` for the
        same folder
    :param device: see SB3
    :param agent_class: class of the agent if it is a subclass of yours. A checkpoint imports nothing
    :param arguments: arguments of the agent's constructor that no file can hold (functions, and classes of yours), and
        ``tensorboard_log``
    :return: the agent
    :raises ValueError: there is no checkpoint, none is intact, or an argument that has to be passed is missing
    """
    folder = _read_folder("resume", folder)
    found = checkpoint.newest(folder)
    if found is None:
        raise ValueError(f"resume: there are no checkpoints in {folder}")
    state, _, place = found
    _check_state(state, place.path)
    learn = {name: state["learn"][name] for name in _OF_LEARN}
    if agent_class is None and state["class"] not in AGENTS:
        raise ValueError(
            f"resume: {place.path}: its agent is of class {state['class']!r}, which is not among {', '.join(AGENTS)}: pass "
            f"agent_class={state['class']}"
        )
    try:
        agent = build(state["agent"], env, cls=agent_class, device=device, **arguments)
    except ValueError as error:
        raise ValueError(f"resume: {place.path}: {error}") from error
    # Like a new agent: the counters are restored with everything else.
    agent.num_timesteps, agent._earlier_timesteps, agent.dynamics_fitted_at = 0, 0, None
    others = callback if isinstance(callback, list) else [] if callback is None else [callback]
    others = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in others]
    ours = [one for given in others for one in all_callbacks(given) if isinstance(one, ResumeCallback)]
    if not ours:
        ours = [ResumeCallback(folder, **{name: state["settings"][name] for name in _SETTINGS})]
        others += ours
    if any(one.folder.resolve() != folder.resolve() for one in ours):
        raise ValueError(f"resume: the ResumeCallback among the callbacks is for {ours[0].folder}, and must be for {folder}")
    ours[0]._is_run_of_agent = True
    return agent.learn(callback=others, **learn)


def _read_folder(what: str, folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ValueError(f"{what}: folder={folder!r} must be a path such as 'runs/hopper'; '.' is the current folder")
    return Path(folder)


def _check_state(state: Any, place: Path) -> None:
    """
    Check the parts of a checkpoint, which may be foreign, that this file reads.

    :raises ValueError: a part is missing or of a wrong type, or the folder for logs is outside of ``tensorboard_log``
    """
    kinds: dict[str, Any] = {"class": str, "stopped": bool, "origin": list, "life": list, "left": (dict, type(None))}
    kinds |= dict.fromkeys(("settings", "agent", "learn", "state", "attributes"), dict)
    state = state if isinstance(state, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name, ...), kind)]
    if not wrong:
        left = {"steps": int, "rollout_end": bool}
        wrong += [name for name in ("origin", "life") if [type(number) for number in state[name]] != [int, int]]
        if state["left"] is not None and {name: type(value) for name, value in state["left"].items()} != left:
            wrong.append("left")
        wrong += [name for name in _SETTINGS if name not in state["settings"]]
        wrong += [name for name in _OF_LEARN if name not in state["learn"]]
        wrong += [name for name in ("arguments", "versions") if not isinstance(state["agent"].get(name), dict)]
    if wrong:
        raise ValueError(f"{place}: this is not a checkpoint of a run: {', '.join(wrong)} are missing, or of a wrong type")
    name = state["learn"]["tb_log_name"]
    inside = name is None or (isinstance(name, str) and re.fullmatch(r"[^\\:\0]*", name) and not name.startswith("/"))
    if not inside or (name is not None and ".." in name.split("/")):
        raise ValueError(
            f"{place}: tb_log_name={name!r} is not the name of a folder inside tensorboard_log. Make the agent "
            "yourself, and pass a ResumeCallback for this folder to its learn"
        )


def _has_ended(callback: BaseCallback) -> bool:
    """:return: whether the condition of one of SB3's callbacks that end a run is met"""
    if isinstance(callback, StopTrainingOnMaxEpisodes):
        return callback.n_episodes >= callback._total_max_episodes
    if not isinstance(callback.parent, EvalCallback):
        return False
    if isinstance(callback, StopTrainingOnRewardThreshold):
        return bool(callback.parent.best_mean_reward >= callback.reward_threshold)
    if isinstance(callback, StopTrainingOnNoModelImprovement):
        return callback.no_improvement_evals > callback.max_no_improvement_evals
    return False


def will_resume(callback: Any) -> bool:
    """
    :param callback: the ``callback`` of ``learn``
    :return: whether it contains a ``ResumeCallback`` with a checkpoint to continue from
    """
    given = callback if isinstance(callback, list) else [callback]
    everything = [one for item in given if isinstance(item, BaseCallback) for one in all_callbacks(item)]
    return any(next(checkpoint.listed(one.folder), None) is not None for one in everything if isinstance(one, ResumeCallback))
