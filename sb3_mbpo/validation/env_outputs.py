"""Checks the outputs of the env before they are stored, counted or used for learning."""

from collections.abc import Callable
from functools import partial
from math import hypot
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    unwrap_vec_normalize,
)

from sb3_mbpo.validation.faults import (
    FLAGS,
    FLOATS,
    LIMIT,
    RESET_API,
    STEP_API,
    InvalidTransition,
    copied,
    fault_in_space,
    fault_of_api,
    fault_of_arrays,
    flag_fault,
    reward_fault,
)

# VecEnvs and wrappers that only pass on what their envs return.
TRANSPARENT = (DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize)
# Types that may hold the values of step() and reset().
SEVERAL = (tuple, list)
# Up to this many dimensions, checking Python floats is faster than NumPy.
SHORT = 32


class _Env:
    """Replaces one env of a ``DummyVecEnv`` during a call, and checks its outputs."""

    def __init__(self, boundary: "Boundary", base: DummyVecEnv, index: int) -> None:
        self.boundary, self.index, self.is_last = boundary, index, index == base.num_envs - 1
        space: Any = base.observation_space
        self.space, self.shape = space, space.shape
        # For few numbers, it is fastest to check the norm of observation and reward together: if it is finite, all are.
        is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
        self.is_short = is_vector and space.shape[0] <= SHORT and space.dtype.kind == "f"

    def __getattr__(self, name: str) -> Any:
        if name in ("boundary", "index"):
            # Not set yet while a copy is being made.
            raise AttributeError(name)
        return getattr(self.boundary.inner[self.index], name)

    def step(self, action: np.ndarray) -> Any:
        boundary = self.boundary
        try:
            answer = boundary.inner[self.index].step(action)
        except (TypeError, ValueError, RuntimeError) as error:
            if fault := fault_of_api(error, STEP_API):
                raise boundary.refusal(fault, self.index) from error
            raise
        if self.is_short and type(answer) is tuple and len(answer) == 5:
            obs, reward, terminated, truncated, _ = answer
            goes_on = type(terminated) in FLAGS and type(truncated) in FLAGS and not (terminated or truncated)
            if goes_on and type(obs) is np.ndarray and obs.shape == self.shape and obs.dtype.kind == "f":
                if type(reward) in FLOATS and hypot(*obs.tolist(), reward) <= LIMIT:
                    if self.is_last:
                        boundary.finished()
                    return answer
        if not isinstance(answer, SEVERAL) or len(answer) != 5:
            raise boundary.refusal(STEP_API, self.index)
        for what, flag in zip(("terminated", "truncated"), answer[2:4], strict=True):
            if fault := flag_fault(flag):
                raise boundary.refusal(f"{what} {fault}", self.index)
        ended = bool(answer[2] or answer[3])
        if fault := fault_in_space(answer[0], self.space):
            raise boundary.refusal(f"the {'last ' * ended}observation {fault}", self.index)
        if fault := reward_fault(answer[1]):
            raise boundary.refusal(f"the reward {fault}", self.index)
        if ended:
            # DummyVecEnv keeps a reference and resets the env, which may write its next observation to the same array.
            return (copied(answer[0]), *answer[1:])
        if self.is_last:
            boundary.finished()
        return answer

    def reset(self, **kwargs: Any) -> Any:
        try:
            answer = self.boundary.inner[self.index].reset(**kwargs)
        except (TypeError, ValueError) as error:
            if fault := fault_of_api(error, RESET_API):
                raise self.boundary.refusal(fault, self.index) from error
            raise
        if not isinstance(answer, SEVERAL) or len(answer) != 2:
            raise self.boundary.refusal(RESET_API, self.index)
        if fault := fault_in_space(answer[0], self.space):
            raise self.boundary.refusal(f"the observation of reset() {fault}", self.index)
        if self.is_last:
            self.boundary.finished()
        return answer


class _Remote:
    """Replaces the connection to one env of a ``SubprocVecEnv`` during a call, and checks its outputs."""

    def __init__(self, boundary: "Boundary", base: SubprocVecEnv, index: int) -> None:
        self.boundary, self.base, self.index = boundary, base, index
        space: Any = base.observation_space
        self.space = space

    def __getattr__(self, name: str) -> Any:
        if name in ("boundary", "index"):
            # Not set yet while a copy is being made.
            raise AttributeError(name)
        return getattr(self.boundary.inner[self.index], name)

    def recv(self) -> Any:
        boundary = self.boundary
        try:
            answer = boundary.inner[self.index].recv()
        except (EOFError, ConnectionError) as error:
            raise type(error)(
                f"env {self.index}, after {boundary.at} steps: its process has ended; see its own error message above"
            ) from error
        fault = self._fault(answer)
        if fault and boundary.pending is None:
            boundary.pending = boundary.refusal(fault, self.index)
        # Raise only after every env has answered. Otherwise, an unread answer would be taken for that of the next call.
        if self.index < self.base.num_envs - 1:
            return answer
        if boundary.pending is not None:
            self.base.waiting = False
            pending, boundary.pending = boundary.pending, None
            boundary.release()
            raise pending
        boundary.finished()
        return answer

    def _fault(self, answer: Any) -> str:
        """
        :param answer: of ``step``: observation, reward, done, info, reset's info; of ``reset``: observation, reset's info
        :return: what is wrong; empty if nothing is
        """
        parts = [("observation of reset()", answer[0])]
        if len(answer) == 5:
            obs, reward, done, info, _ = answer
            parts = [("last observation", info["terminal_observation"]), *parts] if done else [("observation", obs)]
            if fault := reward_fault(reward):
                return f"the reward {fault}"
            # The worker sends (terminated or truncated), which is the first one that is true, otherwise the last one.
            if fault := flag_fault(done) or flag_fault(info["TimeLimit.truncated"]):
                return f"terminated or truncated {fault}"
        faults = ((what, fault_in_space(obs, self.space)) for what, obs in parts)
        return next((f"the {what} {fault}" for what, fault in faults if fault), "")


class _Inner:
    """Replaces the VecEnv that a ``VecNormalize`` wraps during a call, and checks its outputs."""

    def __init__(self, boundary: "Boundary", venv: VecEnv) -> None:
        self.boundary, self.venv = boundary, venv

    def __getattr__(self, name: str) -> Any:
        if name == "venv":
            raise AttributeError(name)
        return getattr(self.venv, name)

    def step_wait(self) -> Any:
        answer = self.venv.step_wait()
        self.boundary.look_at_arrays(self.venv, *answer)
        return answer

    def reset(self) -> Any:
        obs = self.venv.reset()
        self.boundary.look_at_arrays(self.venv, obs)
        return obs


STAND_INS: dict[type, tuple[str, Callable[..., Any]]] = {DummyVecEnv: ("envs", _Env), SubprocVecEnv: ("remotes", _Remote)}


class Boundary:
    """
    Checks the outputs of an env during one ``step`` or ``reset``. Afterwards, the env is unchanged.

    Outputs must be checked before ``VecNormalize`` adds them to its statistics, and before ``DummyVecEnv`` broadcasts an
    observation that is too small to its whole row. So the envs inside are replaced during the call by objects that check
    their outputs. If there are VecEnvs or wrappers that are not SB3's own, the arrays that they return are checked instead.

    :param env: The agent's env, with all wrappers
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        #: The agent's ``num_timesteps`` before the checked call.
        self.at = 0
        #: Whether steps are checked.
        self.in_use = False
        #: Whether a call has started and not finished, so that the state of the envs is unknown.
        self.in_doubt = False
        #: The error to raise once every env has answered.
        self.pending: InvalidTransition | None = None
        #: The replaced envs, or the connections to them. Empty: nothing is replaced.
        self.inner: Any = ()
        # If arrays are checked: the method that is replaced on the env, and its entry in the env's own dictionary.
        self._taken: str | None = None
        self._before: Any = None
        self._attributes = vars(env)
        layers: list[Any] = [env]
        while isinstance(layers[-1], VecEnvWrapper):
            layers.append(layers[-1].venv)
        base = layers[-1]
        # What is replaced during a call: an attribute of the innermost VecEnv, and its replacement.
        self._of_base, self._place, self._stand_ins = vars(base), "", []
        if type(base) in STAND_INS and isinstance(base.observation_space, spaces.Box | spaces.Dict):
            self._place, stand_in = STAND_INS[type(base)]
            self._stand_ins = [stand_in(self, base, i) for i in range(base.num_envs)]
        # The statistics of a VecNormalize and the replay buffer get the outputs of the VecEnv that it wraps.
        normalizer = unwrap_vec_normalize(env)
        cut = len(layers) if normalizer is None else layers.index(normalizer)
        self._looks_on_top = any(type(layer) not in TRANSPARENT for layer in layers[:cut])
        looks_inside = normalizer is not None and any(type(layer) not in TRANSPARENT for layer in layers[cut:])
        self._looked_into = normalizer if looks_inside else None
        self._looks_at_arrays = self._looks_on_top or looks_inside
        #: Whether the last observation of every episode is copied before the env is reset.
        self.copies_ends = type(base) is DummyVecEnv and bool(self._stand_ins) and not self._looks_at_arrays

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Copied or pickled as None: it belongs to one env, and an agent creates a new one when needed.
        return type(None), ()

    def watch(self, call: str, at: int) -> None:
        """
        Check the env's next ``step`` or ``reset``, which must be called right after this.

        :param call: ``"step"`` or ``"reset"``
        :param at: the agent's ``num_timesteps``, for the error
        """
        self.at, self.in_doubt = at, True
        if self._stand_ins and not self.inner:
            of_base, place = self._of_base, self._place
            self.inner = of_base[place]
            of_base[place] = self._stand_ins
        if self._looks_at_arrays:
            self._taken, self._before = call, self._attributes.get(call)
            self._attributes[call] = partial(self._ask, call)

    def release(self) -> None:
        """Restore the env as it was before ``watch``."""
        if self.inner:
            self._of_base[self._place] = self.inner
            self.inner = ()
        self._give_back()

    def finished(self) -> None:
        """Called after the last env has answered. If all wrappers are SB3's own, the call is complete."""
        if not self._looks_at_arrays:
            self._of_base[self._place] = self.inner
            self.inner, self.in_doubt = (), False

    def _give_back(self) -> None:
        if self._taken is not None:
            del self._attributes[self._taken]
            if self._before is not None:
                self._attributes[self._taken] = self._before
            self._taken = None

    def _ask(self, call: str, *arguments: Any) -> Any:
        self._give_back()
        normalizer = self._looked_into
        try:
            if normalizer is None:
                answer = getattr(self.env, call)(*arguments)
            else:
                answer = self._ask_inside(normalizer, getattr(self.env, call), *arguments)
        finally:
            self.release()
        if self._looks_on_top:
            self.look_at_arrays(self.env, *((answer,) if call == "reset" else answer))
            # SB3 keeps a reference, and the env may write the next observations to the same array.
            answer = copied(answer) if call == "reset" else (copied(answer[0]), *answer[1:])
        self.in_doubt = False
        return answer

    def _ask_inside(self, normalizer: VecNormalize, call: Callable[..., Any], *arguments: Any) -> Any:
        venv = normalizer.venv
        normalizer.venv = _Inner(self, venv)  # type: ignore[assignment]
        try:
            return call(*arguments)
        finally:
            normalizer.venv = venv

    def refusal(self, fault: str, index: int) -> InvalidTransition:
        """
        :param fault: what is wrong
        :param index: index of the env
        :return: the error to raise
        """
        return InvalidTransition(fault, index, self.at)

    def look_at_arrays(self, venv: VecEnv, *answer: Any) -> None:
        """
        Check the arrays that a VecEnv returns.

        :param venv: the VecEnv
        :param answer: outputs of its ``step_wait`` or ``reset``
        :raises InvalidTransition: an output is invalid
        """
        if found := fault_of_arrays(venv.num_envs, venv.observation_space, *answer):
            raise self.refusal(*found)
