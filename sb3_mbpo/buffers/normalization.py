"""Normalizes tensors with the statistics of a VecNormalize, as it normalizes arrays."""

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.codec import Observation


def to_device_async(array: np.ndarray, device: th.device) -> th.Tensor:
    """
    Copy a small array to a device as float32, without waiting for the copy.

    For a GPU, the memory is pinned first. PyTorch keeps pinned memory, so do not use this for large arrays.

    :param array: the array, any shape
    :param device: the device
    :return: float32 tensor of the same shape
    """
    tensor = th.as_tensor(array, dtype=th.float32, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def normalize_obs(obs: Observation, env: VecNormalize | None) -> Observation:
    """
    ``VecNormalize.normalize_obs`` for tensors, with its current statistics.

    :param obs: raw observations ``(..., *obs_shape)``, or a dict of these, of which ``env.norm_obs_keys`` are normalized
    :param env: the ``VecNormalize`` env; ``None``: nothing is normalized
    :return: same shape, float32
    """
    if env is None or not env.norm_obs:
        return obs
    if isinstance(env.obs_rms, dict):
        return obs | {key: _normalized(obs[key], rms, env) for key, rms in env.obs_rms.items()}
    return _normalized(obs, env.obs_rms, env)


def _normalized(obs: th.Tensor, rms: RunningMeanStd, env: VecNormalize) -> th.Tensor:
    mean, std = (to_device_async(part, obs.device) for part in (rms.mean, np.sqrt(rms.var + env.epsilon)))
    return ((obs - mean) / std).clamp(-env.clip_obs, env.clip_obs)


def normalize_rewards(rewards: th.Tensor, env: VecNormalize | None) -> th.Tensor:
    """
    ``VecNormalize.normalize_reward`` for tensors, with its current statistics.

    :param rewards: raw rewards, any shape
    :param env: the ``VecNormalize`` env; ``None``: nothing is normalized
    :return: same shape, float32
    """
    if env is None or not env.norm_reward:
        return rewards
    std = float(np.sqrt(env.ret_rms.var + env.epsilon))
    return (rewards / std).clamp(-env.clip_reward, env.clip_reward)
