"""Runs that may be cut anywhere: checkpoints at the points where nothing is under way, and the way back into them."""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, EvalCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn

from sb3_mbpo.checkpoints import checkpoint
from sb3_mbpo.checkpoints.interrupts import Interrupted, Interrupts
from sb3_mbpo.checkpoints.lock import lock
from sb3_mbpo.checkpoints.packing import Tensors
from sb3_mbpo.checkpoints.training_state import all_callbacks, put_agent, put_training, take_agent, take_training
from sb3_mbpo.saving.description import build, describe
from sb3_mbpo.validation.faults import InvalidTransition

# All saves so far, and one more like the last, take at most 1/50 of the time: 2 %. The last of a run waits for nothing.
_PATIENCE = 50
# Updates in one call of train() from which on it can be broken off.
_LONG_TRAIN = 100


class ResumeCallback(BaseCallback):
    """
    Saves everything now and then; the same command, run again, goes on where it was cut::

        MBPO("MlpPolicy", "Hopper-v5").learn(125_000, callback=ResumeCallback("runs/hopper"))

    On a CPU the run goes on to the last bit as if it had not been cut, where its envs can be restored (see
    :func:`.env_state.take_envs`), else at the start of an episode, with a warning.

    A signal ends the run: it is saved as soon as nothing is under way, at most some seconds later, and ``learn`` returns. A
    fit, a rollout or a long ``train()`` is broken off and repeated later. A second signal ends the process at once.

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
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.interrupts = Interrupts(signals)
        # Others are kept out of the folder while it is open.
        self._lock: IO[str] | None = None
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
        self._lock = lock(self.folder)
        self._all = callback
        # Not itself: what it holds is of this process.
        self._others = [one for one in all_callbacks(callback) if one is not self]
        self._found = checkpoint.newest(self.folder)
        for problem in () if self._found is None else self._found[2].passed_over:
            warnings.warn(problem, stacklevel=2)
        # What is left to do of the rollout under way, see `rollout`; then what train() is set back to.
        self._left: dict[str, Any] | None = None
        self._before_train: tuple[dict[str, Any], Tensors] | None = None
        self._saved_at, self._began, self._seconds, self._spent = self.model.num_timesteps, time.perf_counter(), 0.0, 0.0
        self._is_consistent = False
        self.model.replay_buffer.check = self.check_train
        self.interrupts.listen()

    def end(self) -> None:
        """Called by the agent when ``learn`` ends, however it does."""
        self.interrupts.close()
        if self._lock is not None:
            self._lock.close()
        self.model.resume_callback = self.model.replay_buffer.check = None

    def rollout(self, collect: Callable[[], RolloutReturn]) -> RolloutReturn:
        """
        Called by the agent in place of SB3's ``collect_rollouts``: before it nothing is under way.

        :param collect: SB3's
        :return: its result; that of the run that was cut, if it was cut after that; one that ends ``learn`` after a signal
        """
        left = None
        if self._found is not None:
            left = self._go_on(*self._found)
        if left is None:
            if self.model.num_timesteps >= self.model._total_timesteps:
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
            self.save(envs=False)
            return self._end()
        except InvalidTransition:
            # Nothing of that step was stored or counted, but the envs have moved on.
            self.save(envs=False)
            raise
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
        # Not after a callback ended the run in the midst of a rollout.
        if self._is_consistent:
            self.save()

    def save(self, left: dict[str, Any] | None = None, envs: bool = True) -> checkpoint.Checkpoint:
        """
        :param left: what of a rollout is still to be done
        :param envs: see :func:`.training_state.take_training`
        :return: the new checkpoint
        :raises ValueError: learning has diverged; the checkpoints of before are the ones to go back to
        """
        self.model.check_parameters()
        started = time.perf_counter()
        tensors: Tensors = {}
        state = take_training(self.model, self._others, tensors, envs)
        state |= {
            "left": left,
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
            raise ValueError(f"{found.path} is a checkpoint of {state['class']}, not of {type(self.model).__name__}")
        target = self.model._total_timesteps
        put_training(self.model, self._others, state, tensors)
        self._compare(state["agent"])
        # A longer `learn` than that of the run goes on to its own end.
        self.model._total_timesteps = target
        self._found, self._saved_at = None, self.model.num_timesteps
        if max(self.verbose, self.model.verbose) >= 1:
            print(f"Resumed at step {self.model.num_timesteps:,} from {found.path}")
        return state["left"]

    def _learn_arguments(self) -> dict[str, Any]:
        """Those of the present ``learn`` that say how it goes on."""
        given = {name: self.locals.get(name) for name in ("log_interval", "tb_log_name")}
        return {"total_timesteps": self.model._total_timesteps, **given}

    def _compare(self, then: dict[str, Any]) -> None:
        """Warn of what was different when the checkpoint was written."""
        now = describe(self.model)
        # Action noise remembers numbers, which are put back.
        names = [(part, name) for part in ("arguments", "versions") for name in now[part] if name != "action_noise"]
        different = [name for part, name in names if now[part][name] != then[part].get(name)]
        random = ", but its random numbers go on" if "seed" in different else ""
        if different:
            what = f"The run was begun with other values of {', '.join(different)}; it goes on with those of now{random}"
            warnings.warn(what, stacklevel=2)

    def _is_due(self) -> bool:
        if self.model.num_timesteps // self.every <= self._saved_at // self.every:
            return False
        return time.perf_counter() - self._began >= _PATIENCE * (self._spent + self._seconds)

    def _is_long(self, rollout: RolloutReturn) -> bool:
        updates = self.model.gradient_steps if self.model.gradient_steps >= 0 else rollout.episode_timesteps
        return bool(self.interrupts.signals) and updates >= _LONG_TRAIN

    def _agent(self) -> tuple[dict[str, Any], Tensors]:
        tensors: Tensors = {}
        state = take_agent(self.model, tensors)
        return state, {name: tensor.clone() for name, tensor in tensors.items()}

    def _on_step(self) -> bool:
        return True


def resume(
    folder: str | Path, env: GymEnv | str, callback: MaybeCallback = None, device: th.device | str = "auto", **arguments: Any
) -> Any:
    """
    Go on with a run from its folder alone: make its agent, and let it learn to the run's own end.

    :param folder: of a ``ResumeCallback``, which goes on saving there
    :param env: made as that of the run was, or its name
    :param callback: the run's other callbacks, made as they were
    :param device: see SB3
    :param arguments: of the agent's constructor: those that no file can hold (functions, and classes of yours), and
        ``tensorboard_log``
    :return: the agent
    :raises ValueError: there is no checkpoint, or none that is sound, or an argument that has to be passed is missing
    """
    found = checkpoint.newest(Path(folder))
    if found is None:
        raise ValueError(f"resume: there are no checkpoints in {folder}")
    state, _, place = found
    try:
        agent = build(state["agent"], env, device=device, **arguments)
    except ValueError as error:
        raise ValueError(f"resume: {place.path}: {error}") from error
    # As new: all that it has counted comes with the rest.
    agent.num_timesteps, agent._earlier_timesteps, agent.dynamics_fitted_at = 0, 0, None
    others = callback if isinstance(callback, list) else [] if callback is None else [callback]
    others = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in others]
    return agent.learn(callback=[*others, ResumeCallback(folder)], **state["learn"])


def will_resume(callback: Any) -> bool:
    """Whether there is a checkpoint for a ``learn`` with this callback, or list of callbacks, to go on from."""
    given = callback if isinstance(callback, list) else [callback]
    everything = [one for item in given if isinstance(item, BaseCallback) for one in all_callbacks(item)]
    return any(next(checkpoint.listed(one.folder), None) is not None for one in everything if isinstance(one, ResumeCallback))
