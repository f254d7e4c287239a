"""What can be wrong with what an env returns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# The networks compute in float32: what is beyond it is infinite to them.
LIMIT = float(np.finfo(np.float32).max)
# Below this, a sum of squares vouches for each of its terms; above it, the terms are looked at one by one.
SQUARED_LIMIT = LIMIT**2
FLOATS = (float, np.float64, np.float32)
FLAGS = (bool, np.bool_)
STEP_API = (
    "step() must return the five values of Gymnasium's API, (observation, reward, terminated, truncated, info); the old API "
    "had four, with done in place of terminated and truncated"
)
RESET_API = "reset() must return the two values of Gymnasium's API, (observation, info); the old API had the observation alone"


class InvalidTransition(ValueError):
    """
    An env returned what cannot be learned from. Nothing of that step was stored, counted or learned; the agent is as it was.

    The next ``learn`` resets the env, whatever its ``reset_num_timesteps``: where an env stands that did this is unknown.

    :param fault: what is wrong, and what to do about it
    :param env_index: which of the parallel envs, from 0
    :param step: the agent's ``num_timesteps`` before it
    """

    def __init__(self, fault: str, env_index: int, step: int) -> None:
        # All three, so that it survives pickling.
        super().__init__(fault, env_index, step)
        self.fault, self.env_index, self.step = fault, env_index, step

    def __str__(self) -> str:
        return f"env {self.env_index}, after {self.step} steps: {self.fault}"


def observation_fault(obs: Any, shape: Any, dtype: Any) -> str:
    """
    What is wrong with an observation. What SB3 casts without loss is fine: lists, other precisions, whole numbers.

    :param obs: as the env returned it
    :param shape: of the observation space
    :param dtype: of the observation space
    :return: empty if nothing is
    """
    if type(obs) is np.ndarray and obs.shape == shape and obs.dtype.kind == dtype.kind == "f":
        # One call that makes no array, and does not warn of an overflow. NaN compares false.
        if float(np.vdot(obs, obs)) < SQUARED_LIMIT:
            return ""
    try:
        array = np.asarray(obs)
    except (TypeError, ValueError):
        return f"is no array: {obs!r:.80}"
    if array.dtype.kind not in "biuf":
        return f"has dtype {array.dtype} and not {dtype}: {obs!r:.80}"
    if array.shape != shape:
        return f"has shape {array.shape} and not {shape}, that of the observation space"
    with np.errstate(all="ignore"):
        wrong = ~np.isfinite(array.astype(np.float32))
        if wrong.any():
            return f"is not finite in float32 in {named(wrong, array)}. Bound it, or end the episode before it comes to this"
        wrong = array.astype(dtype) != array if dtype.kind in "iu" else wrong
    if wrong.any():
        return f"has dtype {array.dtype} and does not go into {dtype} in {named(wrong, array)}. Declare a space of floats"
    return ""


def named(wrong: np.ndarray, array: np.ndarray) -> str:
    """
    :param wrong: bool, which entries of ``array`` are meant
    :return: ``2 of 11 dimensions: [0] = nan, [4] = inf``; the first six
    """
    places = np.argwhere(wrong).tolist()
    shown = ", ".join(f"{place} = {array[tuple(place)]}" for place in places[:6])
    return f"{len(places)} of {array.size} dimensions: {shown}" + (", ..." if len(places) > 6 else "")


def reward_fault(reward: Any) -> str:
    """
    What is wrong with a reward.

    :param reward: as the env returned it
    :return: empty if nothing is
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
        return f"is not finite in float32: {value}. Bound it, or end the episode before it comes to this"
    return ""


def flag_fault(flag: Any) -> str:
    """
    What is wrong with ``terminated`` or ``truncated``. Numbers that equal 0 or 1 are fine.

    :param flag: as the env returned it
    :return: empty if nothing is
    """
    if type(flag) in FLAGS:
        return ""
    try:
        fine = not isinstance(flag, str) and np.ndim(flag) == 0 and float(flag) in (0.0, 1.0)
    except (TypeError, ValueError):
        fine = False
    return "" if fine else f"must be true or false, but is {flag!r:.80}. Return a bool"


def fault_of_arrays(
    n_envs: int, space: Any, obs: Any, rewards: Any = None, dones: Any = (), infos: Sequence[dict[str, Any]] = ()
) -> tuple[str, int] | None:
    """
    What is wrong with what a vectorised env returned.

    :param n_envs: how many envs it has
    :param space: of one env's observations
    :param obs: ``(n_envs, *obs_shape)``
    :param rewards: ``(n_envs,)``; ``None`` after a reset
    :param dones: ``(n_envs,)``; none after a reset
    :param infos: with ``terminal_observation`` where an episode ended
    :return: the first fault, and which env's it is (0 where that cannot be told); ``None`` if nothing is
    """
    if rewards is not None and (np.shape(dones) != (n_envs,) or any(map(flag_fault, np.asarray(dones).tolist()))):
        return f"dones must be true or false for each of {n_envs} envs, but are {dones!r:.80}", 0
    ended = np.flatnonzero(dones).tolist()
    for i in ended:
        last = infos[i].get("terminal_observation")
        if last is not None and (fault := observation_fault(last, space.shape, space.dtype)):
            return f"the last observation {fault}", i
    fault = observation_fault(obs, (n_envs, *space.shape), space.dtype)
    if fault:
        for i in range(n_envs) if np.ndim(obs) and len(obs) == n_envs else ():
            if of_one := observation_fault(obs[i], space.shape, space.dtype):
                of_reset = " of reset()" if rewards is None or i in ended else ""
                return f"the observation{of_reset} {of_one}", i
        return f"the array of observations {fault}", 0
    if rewards is not None and observation_fault(rewards, (n_envs,), np.dtype(np.float32)):
        for i in range(n_envs) if np.ndim(rewards) and len(rewards) == n_envs else ():
            if of_one := reward_fault(rewards[i]):
                return f"the reward {of_one}", i
        return f"the rewards must be one scalar for each of {n_envs} envs, but are {rewards!r:.80}", 0
    return None


def fault_of_api(error: Exception, api: str) -> str:
    """
    Whether an exception tells of an env that returned something else than a wrapper around it takes apart.

    :param error: raised by an env with its wrappers
    :param api: what the env had to return
    :return: what is wrong; empty if the env itself raised
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    if not raised_in.startswith(("gymnasium.", "stable_baselines3.")):
        return ""
    if "values to unpack" in str(error):
        return api
    # What `terminated or truncated` raises for an array, or a tensor.
    if api == STEP_API and ("truth value" in str(error) or "Boolean value" in str(error)):
        return f"terminated and truncated must be true or false ({error}). Return a bool for each"
    # The only number that SB3's Monitor makes of what it gets is a float of the reward.
    if api == STEP_API and raised_in.endswith(".monitor") and not isinstance(error, RuntimeError):
        return f"the reward must be a scalar ({error}). Return float(reward)"
    return ""
