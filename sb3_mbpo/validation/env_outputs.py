"""
VecEnvs that check what envs return, before it is stored, counted or used for learning.

The class of an agent's ``DummyVecEnv`` or ``SubprocVecEnv`` becomes a subclass of ours when the agent first collects from it.
It checks the answer of each env, before ``VecNormalize`` adds it to its statistics. The arrays of all other VecEnvs and
wrappers are checked by :class:`CheckedArrays`, which is passed to ``collect_rollouts`` in place of the env.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecNormalize,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs

from sb3_mbpo.validation.faults import (
    RESET_API,
    STEP_API,
    InvalidTransition,
    check_envs,
    copied,
    fault_in_space,
    fault_of_api,
    flag_fault,
    refuse,
    reward_fault,
)


class CheckedDummyVecEnv(DummyVecEnv):
    """
    A ``DummyVecEnv`` that checks what each env returns, and copies the last observation of an episode before the reset.

    ``DummyVecEnv`` itself broadcasts an observation that is too small, casts every reward and flag, and keeps a reference to
    the last observation, which some envs overwrite in their reset. So its loops are repeated here with the checks in them.
    """

    def step_wait(self) -> VecEnvStepReturn:
        space, infos = self.observation_space, self.buf_infos
        for i, env in enumerate(self.envs):
            obs, reward, terminated, truncated, infos[i] = self._values(i, STEP_API, env.step, self.actions[i])
            refuse(i, "terminated", flag_fault(terminated))
            refuse(i, "truncated", flag_fault(truncated))
            self.buf_dones[i] = ended = bool(terminated or truncated)
            refuse(i, "the last observation" if ended else "the observation", fault_in_space(obs, space))
            refuse(i, "the reward", reward_fault(reward))
            self.buf_rews[i] = reward
            infos[i]["TimeLimit.truncated"] = truncated and not terminated
            if ended:
                infos[i]["terminal_observation"] = copied(obs)
                self._reset_one(i)
            else:
                self._save_obs(i, obs)
        return self._obs_from_buf(), np.copy(self.buf_rews), np.copy(self.buf_dones), deepcopy(infos)

    def reset(self) -> VecEnvObs:
        for i, (seed, options) in enumerate(zip(self._seeds, self._options, strict=True)):
            self._reset_one(i, seed=seed, **({"options": options} if options else {}))
        self._reset_seeds()
        self._reset_options()
        return self._obs_from_buf()

    def _reset_one(self, i: int, **kwargs: Any) -> None:
        obs, self.reset_infos[i] = self._values(i, RESET_API, self.envs[i].reset, **kwargs)
        refuse(i, "the observation of reset()", fault_in_space(obs, self.observation_space))
        self._save_obs(i, obs)

    def _values(self, i: int, api: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """:return: the values of ``step`` or ``reset`` of env ``i``"""
        try:
            values = function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            if fault := fault_of_api(error, api):
                raise InvalidTransition(fault, i) from error
            raise
        if not isinstance(values, tuple | list) or len(values) != (5 if api is STEP_API else 2):
            raise InvalidTransition(api, i)
        return values


class CheckedSubprocVecEnv(SubprocVecEnv):
    """A ``SubprocVecEnv`` that checks what each env returns. It cannot copy last observations, which the workers send."""

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos, self.reset_infos = zip(*self._answers(), strict=True)  # type: ignore[assignment]
        check_envs(self.observation_space, obs, rewards, dones, infos)
        return _stack_obs(obs, self.observation_space), np.stack(rewards), np.stack(dones), infos  # type: ignore[return-value]

    def reset(self) -> VecEnvObs:
        for remote, *data in zip(self.remotes, self._seeds, self._options, strict=True):
            remote.send(("reset", data))
        obs, self.reset_infos = zip(*self._answers(), strict=True)  # type: ignore[assignment]
        self._reset_seeds()
        self._reset_options()
        check_envs(self.observation_space, obs)
        return _stack_obs(obs, self.observation_space)

    def _answers(self) -> Iterator[Any]:
        """:return: the answer of each env. All are received before one is checked: the next call must find none of them"""
        for i, remote in enumerate(self.remotes):
            try:
                yield remote.recv()
            except (EOFError, ConnectionError) as error:
                raise type(error)(f"env {i}: its process has ended; see its own error message above") from error
        self.waiting = False


class CheckedArrays(VecEnvWrapper):
    """
    Checks the arrays that VecEnvs and wrappers return that are not SB3's own, and copies their observations.

    ``VecNormalize`` has received them by then, so its statistics are put back if something is wrong.

    :param env: the agent's env, with all wrappers
    """

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Copied or pickled as None: it belongs to one env, and an agent creates a new one when needed.
        return type(None), ()

    def reset(self) -> VecEnvObs:
        with self.checking() as check:
            return check(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        with self.checking() as check:
            obs, rewards, dones, infos = self.venv.step_wait()
            return check(obs, rewards, dones, infos), rewards, dones, infos

    @contextmanager
    def checking(self) -> Iterator[Callable[..., Any]]:
        """
        Put the statistics of ``VecNormalize`` back on any error.

        :return: a function that checks what ``reset`` or ``step_wait`` of the env returned, and returns a copy of the
            observations, because SB3 keeps a reference, and the env may write the next ones to the same array
        """
        normalizer = unwrap_vec_normalize(self.venv)
        parts: list[Any] = []
        if normalizer is not None:
            rms = getattr(normalizer, "obs_rms", {})
            parts = [normalizer, normalizer.ret_rms, *(rms.values() if isinstance(rms, dict) else [rms])]
        # All of them replace their arrays and never change one.
        before = [vars(part).copy() for part in parts]
        try:
            yield partial(self._check, normalizer)
        except BaseException:
            for part, then in zip(parts, before, strict=True):
                vars(part).update(then)
            raise

    def _check(self, normalizer: VecNormalize | None, obs: Any, *rest: Any) -> VecEnvObs:
        # VecNormalize clips infinite numbers and spreads NaN over all envs, so its inputs are checked first.
        if normalizer is not None and isinstance(normalizer.venv.observation_space, CHECKED_SPACES):
            raw: Any = (normalizer.old_reward, rest[1], [{}] * self.num_envs) if rest else ()
            self._check_arrays(normalizer.venv.observation_space, normalizer.old_obs, *raw)
        self._check_arrays(self.observation_space, obs, *rest)
        return copied(obs)

    def _check_arrays(self, space: spaces.Space, *arrays: Any) -> None:
        for name, array in zip(("observations", "rewards", "dones"), arrays, strict=False):
            parts = list(array.values()) if isinstance(array, Mapping) else [array]
            if any(np.shape(part)[:1] != (self.num_envs,) for part in parts):
                raise InvalidTransition(f"the {name} must be one for each of {self.num_envs} envs, but are {array!r:.80}", 0)
        obs, *rest = arrays
        if isinstance(obs, Mapping):
            obs = [{key: part[i] for key, part in obs.items()} for i in range(self.num_envs)]
        check_envs(space, obs, *rest)


# Spaces of observations that are checked. A wrapper may make one of these out of another.
CHECKED_SPACES = (spaces.Box, spaces.Dict)
# The classes of SB3 that get one of ours.
CHECKED: dict[type, type] = {DummyVecEnv: CheckedDummyVecEnv, SubprocVecEnv: CheckedSubprocVecEnv}


def add_checks(env: VecEnv) -> bool:
    """
    Let the innermost VecEnv check from now on what its envs return, if it is SB3's own: it becomes one of the classes above.

    :param env: any VecEnv
    :return: whether this checks all outputs, as all wrappers are SB3's own as well; otherwise, ``env`` must be stepped through
        :class:`CheckedArrays`
    """
    layers = [env]
    while isinstance(layers[-1], VecEnvWrapper):
        layers.append(layers[-1].venv)
    base = layers.pop()
    if isinstance(base.observation_space, CHECKED_SPACES):
        base.__class__ = CHECKED.get(type(base), type(base))
    own = all(type(wrapper).__module__.startswith("stable_baselines3.common.vec_env.") for wrapper in layers)
    return own and type(base) in CHECKED.values()
