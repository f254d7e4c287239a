"""Checks replay buffers that come from outside."""

from collections.abc import Mapping

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape

# Number of rows that are checked together, so that no second copy of a large buffer is made.
_ROWS_AT_ONCE = 10_000


def other_n_envs(theirs: int, ours: int) -> str:
    """
    :param theirs: number of envs of a replay buffer
    :param ours: number of envs of an agent
    :return: why the agent cannot use the buffer, and how it can use its transitions
    """
    return (
        f"this replay buffer has n_envs={theirs}, but the agent's must have n_envs={ours}. To add its transitions to the "
        f"agent's, load it in an agent with n_envs={theirs}, here called other, and call agent.prefill(other.replay_buffer)"
    )


def check_fits(buffer: ReplayBuffer, n_envs: int, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param buffer: plain or mixed
    :param n_envs: of the agent, as its spaces
    :raises ValueError: the buffer was made for other envs, or without next observations
    """
    if buffer.n_envs != n_envs:
        raise ValueError(other_n_envs(buffer.n_envs, n_envs))
    expected = {"obs_shape": get_obs_shape(observation_space), "action_dim": get_action_dim(action_space)}
    for name, ours in {**expected, "optimize_memory_usage": False}.items():
        theirs = getattr(buffer, name)
        # Stored entries of a Dict have an order.
        if theirs != ours or (isinstance(ours, dict) and list(theirs) != list(ours)):
            raise ValueError(f"this replay buffer has {name}={theirs}, but the agent's must have {name}={ours}")


def check_finite(rows: Mapping[str, np.ndarray], imagined: th.Tensor) -> None:
    """
    :param rows: filled parts of SB3's storage arrays, by name: ``(N, n_envs, ...)``, in any order
    :param imagined: packed rows of a model buffer
    :raises ValueError: a number that is not finite in float32, of which all weights would become NaN; names the first
    """
    for name, array in rows.items():
        for start in range(0, len(array) if array.dtype.kind == "f" else 0, _ROWS_AT_ONCE):
            block = array[start : start + _ROWS_AT_ONCE]
            with np.errstate(over="ignore"):
                wrong = ~np.isfinite(block.astype(np.float32, copy=False))
            if wrong.any():
                step, env, *place = (int(i) for i in np.argwhere(wrong)[0])
                where = str(place) if place else ""
                raise ValueError(
                    f"the replay buffer has {name}{where}={block[step, env][tuple(place)]} (env {env}, step {start + step}). "
                    "Learning from it would make the agent's weights NaN. Load an earlier replay buffer, or pass the finite "
                    "transitions to prefill"
                )
    for start in range(0, len(imagined), _ROWS_AT_ONCE):
        if not imagined[start : start + _ROWS_AT_ONCE].isfinite().all():
            raise ValueError(
                f"imagined transitions after number {start} are not finite. Learning from them would make the agent's weights "
                "NaN. Save the buffer without imagined=True"
            )
