"""Runs that may be cut anywhere: checkpoints at the points where nothing is under way, and the way back into them."""

import math
import os
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
from sb3_mbpo.checkpoints.packing import Tensors
from sb3_mbpo.checkpoints.training_state import put_agent, put_training, take_agent, take_training
from sb3_mbpo.saving.description import AGENTS, build, describe
from sb3_mbpo.validation.faults import InvalidTransition

# All saves so far, and one more like the last, take at most 1/50 of the time: 2 %. The last of a run waits for nothing.
_PATIENCE = 50
# Updates in one call of train() from which on it can be broken off.
_LONG_TRAIN = 100
# What `resume` takes from the run.
_SETTINGS = ("every", "keep", "signals", "verbose")
# What is raised where a checkpoint's state is put into something else.
_NO_FIT = (ValueError, RuntimeError, LookupError, TypeError, AttributeError)
_STOPPED = "a callback ended the run in the middle of a step"


class ResumeCallback(BaseCallback):
    """
    Saves everything now and then; the same command, run again, goes on where it was cut::

        MBPO("MlpPolicy", "Hopper-v5").learn(125_000, callback=ResumeCallback("runs/hopper"))

    On a CPU the run goes on to the last bit as if it had not been cut, where its envs can be restored (see
    :func:`.env_state.take_envs`), else at the start of an episode, with a warning.

    A signal ends the run: it is saved as soon as nothing is under way, at most some seconds later, and ``learn`` returns. A
    fit, a rollout or a long ``train()`` is broken off and repeated later. A second signal ends the process at once.

    A run that a callback has ended is saved as well. Run again, it goes on from there, unless that callback ends it at once.

    :param folder: of this run
    :param every: env steps from one checkpoint to the next; more where saving would take more than 2 % of the time
    :param keep: newest checkpoints that are kept; and, with an ``EvalCallback`` in the same ``learn``, the best one
    :param signals: which signals end the run; none off the main thread
    :param verbose: 1: a line for each checkpoint; that a run is resumed is printed at the agent's ``verbose=1``, too
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
        # Made by `resume` from the checkpoint itself.
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
            raise ValueError("one ResumeCallback is enough for a learn: here are two")
        self.model.resume_callback = self

    def begin(self, callback: BaseCallback) -> None:
        """
        Called by the agent when ``learn`` begins.

        :param callback: all callbacks of this ``learn``
        """
        self._lock = FolderLock(self.folder)
        self._all = callback
        # Not itself: what it holds is of this process.
        self._others = [one for one in all_callbacks(callback) if one is not self]
        self._found = checkpoint.newest(self.folder)
        for problem in () if self._found is None else self._found[2].passed_over:
            warnings.warn(problem, stacklevel=2)
        # What is left to do of the rollout under way, see `rollout`; then what train() is set back to.
        self._left: dict[str, Any] | None = None
        self._before_train: tuple[dict[str, Any], Tensors] | None = None
        # What the agent had learned when the run began; and where the run was, if a callback had ended it.
        self._origin: list[int] | None = None
        self._stopped_at: int | None = None
        self._saved_at, self._began, self._seconds, self._spent = self.model.num_timesteps, time.perf_counter(), 0.0, 0.0
        self._is_consistent = False
        self.model.replay_buffer.check = self.check_train
        self.interrupts.listen()

    def end(self) -> None:
        """Called by the agent when ``learn`` ends, however it does."""
        self.interrupts.close()
        if self._lock is not None:
            self._lock.close()
        self.model.resume_callback = None
        # A callback may have thrown it away to make room.
        if self.model.replay_buffer is not None:
            self.model.replay_buffer.check = None

    def rollout(self, collect: Callable[[], RolloutReturn]) -> RolloutReturn:
        """
        Called by the agent in place of SB3's ``collect_rollouts``: before it nothing is under way.

        :param collect: SB3's
        :return: its result; that of the run that was cut, if it was cut after that; one that ends ``learn`` after a signal
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
                result = RolloutReturn(left["steps"], 0, continue_training=True)
        except Interrupted:
            steps = self.locals["num_collected_steps"] * self.model.n_envs if left is None else left["steps"]
            self.save({"steps": steps, "rollout_end": True})
            return self._end()
        except (EOFError, OSError):
            # A signal to all of a group ends the processes of a SubprocVecEnv, too, and may reach them before this one.
            time.sleep(0.5)
            if self.interrupts.received is None:
                raise
            self.save(lost="their processes have ended")
            return self._end()
        except InvalidTransition:
            # Nothing of that step was stored or counted, but the envs have moved on.
            self.save(lost="they were in the middle of a step that failed")
            raise
        if not result.continue_training and self.model.num_timesteps - self.model.n_envs != self._stopped_at:
            # Not where it was ended before: each try would leave the run a step further.
            self.save(lost=_STOPPED, stopped=True)
        self._left = {"steps": result.episode_timesteps, "rollout_end": False}
        self._before_train = self._agent() if self._is_long(result) else None
        self._is_consistent = result.continue_training
        return result

    def _end(self) -> RolloutReturn:
        """All is saved: ``learn`` ends."""
        self._is_consistent = False
        return RolloutReturn(0, 0, continue_training=False)

    def check(self) -> None:
        """
        Called by long pieces of work that can be repeated.

        :raises Interrupted: a signal came
        """
        self.interrupts.check()

    def check_train(self) -> None:
        """The same, from inside ``train()``, where that was found to be long."""
        if self._before_train is not None:
            self.interrupts.check()

    @property
    def can_undo_train(self) -> bool:
        """Whether the present ``train()`` may be broken off."""
        return self._before_train is not None

    def undo_train(self) -> None:
        """Called by the agent when ``train()`` was broken off: set back what it had begun, save, end."""
        assert self._before_train is not None
        put_agent(self.model, *self._before_train)
        self.save(self._left)
        self._is_consistent = False
        self._all.on_training_end()

    def _on_training_end(self) -> None:
        # Not after a callback ended the run in the middle of a step.
        if self._is_consistent:
            self.save()

    def save(
        self, left: dict[str, Any] | None = None, lost: str | None = None, stopped: bool = False
    ) -> checkpoint.Checkpoint:
        """
        :param left: what of a rollout is still to be done
        :param lost: see :func:`.training_state.take_training`
        :param stopped: a callback has ended the run
        :return: the new checkpoint
        :raises ValueError: learning has diverged; the checkpoints of before are the ones to go back to
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
        """Into the state of a checkpoint; what was left to do there."""
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
        # A longer `learn` than that of the run goes on to its own end.
        self.model._total_timesteps = target
        self._found, self._saved_at = None, self.model.num_timesteps
        if max(self.verbose, self.model.verbose) >= 1:
            print(f"Resumed at step {self.model.num_timesteps:,} from {found.path}")
        return state["left"]

    def _life(self) -> list[int]:
        """How much the agent has learned: env steps and updates."""
        return [self.model.lifetime_timesteps, self.model._n_updates]

    def _is_over(self) -> bool:
        """Whether a callback of SB3 has ended the run, and would do so again, if only some steps later."""
        return self._stopped_at == self.model.num_timesteps and any(map(_has_ended, self._others))

    def _learn_arguments(self) -> dict[str, Any]:
        """Those of the present ``learn`` that say how it goes on."""
        given = {name: self.locals.get(name) for name in ("log_interval", "tb_log_name")}
        return {"total_timesteps": self.model._total_timesteps, "background": self.model.learns_in_background, **given}

    def _compare(self, then: dict[str, Any]) -> None:
        """Warn of what was different when the checkpoint was written."""
        different = self._different(then)
        random = ", but its random numbers go on" if "seed" in different else ""
        if different:
            what = f"The run was begun with other values of {', '.join(different)}; it goes on with those of now{random}"
            warnings.warn(what, stacklevel=2)

    def _different(self, then: dict[str, Any]) -> list[str]:
        """Names of arguments and versions that are not those of a checkpoint."""
        now = describe(self.model)
        # Action noise remembers numbers, which are put back.
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
    Go on with a run from its folder alone: make its agent, and let it learn to the run's own end.

    :param folder: of a ``ResumeCallback``, which goes on saving there with the run's own settings
    :param env: made as that of the run was, or its name
    :param callback: the run's other callbacks, made as they were; a ``ResumeCallback`` for the same folder, if it is to have
        other settings
    :param device: see SB3
    :param agent_class: of the agent, if it is a subclass of yours; a checkpoint imports nothing
    :param arguments: of the agent's constructor: those that no file can hold (functions, and classes of yours), and
        ``tensorboard_log``
    :return: the agent
    :raises ValueError: there is no checkpoint, or none that is sound, or an argument that has to be passed is missing
    """
    folder = _read_folder("resume", folder)
    found = checkpoint.newest(folder)
    if found is None:
        raise ValueError(f"resume: there are no checkpoints in {folder}")
    state, _, place = found
    if agent_class is None and state["class"] not in AGENTS:
        raise ValueError(
            f"resume: {place.path}: its agent is of class {state['class']!r}, and known are {', '.join(AGENTS)}: pass "
            f"agent_class={state['class']}"
        )
    try:
        agent = build(state["agent"], env, cls=agent_class, device=device, **arguments)
    except ValueError as error:
        raise ValueError(f"resume: {place.path}: {error}") from error
    # As new: all that it has counted comes with the rest.
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
    return agent.learn(callback=others, **state["learn"])


def _read_folder(what: str, folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ValueError(f"{what}: folder={folder!r} must be a path such as 'runs/hopper'; '.' is the present folder")
    return Path(folder)


def _has_ended(callback: BaseCallback) -> bool:
    """Whether a callback of SB3 that ends runs has what it waits for."""
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
    """Whether there is a checkpoint for a ``learn`` with this callback, or list of callbacks, to go on from."""
    given = callback if isinstance(callback, list) else [callback]
    everything = [one for item in given if isinstance(item, BaseCallback) for one in all_callbacks(item)]
    return any(next(checkpoint.listed(one.folder), None) is not None for one in everything if isinstance(one, ResumeCallback))
