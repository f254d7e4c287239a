"""Finds invalid outputs of an env."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

# The networks compute in float32, where larger numbers are infinite.
LIMIT = float(np.finfo(np.float32).max)
# If a sum of squares is below this, all terms are valid. Otherwise, they are checked one by one.
SQUARED_LIMIT = LIMIT**2
FLOATS = (float, np.float64, np.float32)
FLAGS = (bool, np.bool_)
STEP_API = (
    "step() must return the five values of Gymnasium's API, (observation, reward, terminated, truncated, info); the old API "
    "had four, with done in place of terminated and truncated"
)
RESET_API = "reset() must return the two values of Gymnasium's API, (observation, info); the old API had only the observation"


class InvalidTransition(ValueError):
    """
    An env returned an invalid observation, reward or end of an episode. That step was not stored, counted or learned from.

    The next ``learn`` resets the env even with ``reset_num_timesteps=False``, because the state of the env is unknown.

    :param fault: What is wrong, and what to do about it
    :param env_index: Index of the parallel env, from 0
    :param step: The agent's ``num_timesteps`` before the step; ``None`` outside of ``learn``
    """

    def __init__(self, fault: str, env_index: int, step: int | None = None) -> None:
        # Pass all three, so that the exception can be pickled.
        super().__init__(fault, env_index, step)
        self.fault, self.env_index, self.step = fault, env_index, step

    def __str__(self) -> str:
        when = "" if self.step is None else f", after {self.step} steps"
        return f"env {self.env_index}{when}: {self.fault}"


def observation_fault(obs: Any, shape: Any, dtype: Any) -> str:
    """
    Check an observation. Values that SB3 casts without loss are valid: lists, other precisions, whole numbers.

    :param obs: the observation that the env returned
    :param shape: shape of the observation space
    :param dtype: dtype of the observation space
    :return: what is wrong; empty if nothing is
    """
    if type(obs) is np.ndarray and obs.shape == shape and obs.dtype.kind == dtype.kind == "f":
        # A single call that allocates no array and does not warn about overflows. A comparison with NaN is False.
        if float(np.vdot(obs, obs)) < SQUARED_LIMIT:
            return ""
    try:
        array = np.asarray(obs)
    except (TypeError, ValueError):
        return f"is not an array: {obs!r:.80}"
    if array.dtype.kind not in "biuf":
        return f"has dtype {array.dtype} and not {dtype}: {obs!r:.80}"
    if array.shape != shape:
        return f"has shape {array.shape} and not {shape}, the shape of the observation space"
    with np.errstate(all="ignore"):
        wrong = ~np.isfinite(array.astype(np.float32))
        if wrong.any():
            return f"is not finite in float32 in {_named(wrong, array)}. Clip it, or end the episode before this happens"
        wrong = array.astype(dtype) != array if dtype.kind in "iu" else wrong
    if wrong.any():
        return f"has dtype {array.dtype} and cannot be cast to {dtype} in {_named(wrong, array)}. Declare a space of floats"
    return ""


def fault_in_space(obs: Any, space: Any, batch: tuple[int, ...] = ()) -> str:
    """
    Check an observation of a Box, or of a Dict of Boxes. Other spaces, which a wrapper may remove, are not checked.

    :param obs: the observation that the env returned
    :param space: the observation space
    :param batch: sizes in front of the shape of one observation
    :return: what is wrong; empty if nothing is
    """
    if isinstance(space, spaces.Box):
        return observation_fault(obs, (*batch, *space.shape), space.dtype)
    if not isinstance(space, spaces.Dict):
        return ""
    if not isinstance(obs, Mapping) or not space.spaces.keys() <= obs.keys():
        return f"must be a dict with the keys {list(space)}, but is {obs!r:.80}"
    for key, part in space.items():
        if fault := fault_in_space(obs[key], part, batch):
            return f"at {key!r} {fault}"
    return ""


def copied(obs: Any) -> Any:
    """:return: a copy of an observation, or of a dict of these"""
    return {key: np.array(part) for key, part in obs.items()} if isinstance(obs, Mapping) else np.array(obs)


def _named(wrong: np.ndarray, array: np.ndarray) -> str:
    """:return: the wrong entries, at most six, for example ``2 of 11 dimensions: [0] = nan, [4] = inf``"""
    places = np.argwhere(wrong).tolist()
    shown = ", ".join(f"{place} = {array[tuple(place)]}" for place in places[:6])
    return f"{len(places)} of {array.size} dimensions: {shown}" + (", ..." if len(places) > 6 else "")


def reward_fault(reward: Any) -> str:
    """
    Check a reward.

    :param reward: the reward that the env returned
    :return: what is wrong; empty if nothing is
    """
    if type(reward) in FLOATS and -LIMIT <= reward <= LIMIT:
        return ""
    try:
        value = None if isinstance(reward, str) or np.ndim(reward) else float(reward)
    except (TypeError, ValueError):
        value = None
    except OverflowError:
        value = float("inf")
    if value is None:
        return f"must be a scalar, but is {reward!r:.80}. Return float(reward)"
    if not -LIMIT <= value <= LIMIT:
        return f"is not finite in float32: {value}. Clip it, or end the episode before this happens"
    return ""


def flag_fault(flag: Any) -> str:
    """
    Check ``terminated`` or ``truncated``. Numbers that equal 0 or 1 are valid.

    :param flag: the value that the env returned
    :return: what is wrong; empty if nothing is
    """
    if type(flag) in FLAGS:
        return ""
    try:
        fine = not isinstance(flag, str) and np.ndim(flag) == 0 and float(flag) in (0.0, 1.0)
    except (TypeError, ValueError):
        fine = False
    return "" if fine else f"must be true or false, but is {flag!r:.80}. Return a bool"


def fault_of_api(error: Exception, api: str) -> str:
    """
    Find out whether an exception was raised by a wrapper because the env did not follow Gymnasium's API.

    :param error: exception raised by an env with its wrappers
    :param api: message about what the env must return
    :return: what is wrong; empty if the env itself raised the exception
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    if not raised_in.startswith(("gymnasium.", "stable_baselines3.")):
        return ""
    if "values to unpack" in str(error):
        return api
    # `terminated or truncated` raises this for an array or a tensor.
    if api == STEP_API and ("truth value" in str(error) or "Boolean value" in str(error)):
        return f"terminated and truncated must be true or false ({error}). Return a bool for each"
    # SB3's Monitor converts only the reward to a number.
    if api == STEP_API and raised_in.endswith(".monitor") and not isinstance(error, RuntimeError):
        return f"the reward must be a scalar ({error}). Return float(reward)"
    return ""


def refuse(index: int, what: str, fault: str) -> None:
    """
    :param index: index of the env
    :param what: the output that was checked
    :param fault: what is wrong with it; empty if nothing is
    :raises InvalidTransition: something is wrong
    """
    if fault:
        raise InvalidTransition(f"{what} {fault}", index)


def check_envs(space: Any, obs: Any, rewards: Any = None, dones: Any = (), infos: Any = ()) -> None:
    """
    Check the outputs of a VecEnv.

    :param space: observation space of one env
    :param obs: observation of each env
    :param rewards: reward of each env; ``None`` after a reset
    :param dones: whether an episode has ended, for each env
    :param infos: infos of each env, with ``terminal_observation`` where an episode has ended
    :raises InvalidTransition: an output is invalid
    """
    for i, of_one in enumerate(obs):
        ended = False
        if rewards is not None:
            refuse(i, "terminated or truncated", flag_fault(dones[i]))
            refuse(i, "the reward", reward_fault(rewards[i]))
            ended = bool(dones[i])
        last = infos[i].get("terminal_observation") if ended else None
        if last is not None:
            refuse(i, "the last observation", fault_in_space(last, space))
        what = "the observation of reset()" if ended or rewards is None else "the observation"
        refuse(i, what, fault_in_space(of_one, space))
