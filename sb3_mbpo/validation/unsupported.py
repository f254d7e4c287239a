"""Checks for envs and spaces that MBPO does not support."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.preprocessing import is_image_space

from sb3_mbpo.validation.misuse import check_wrappers
from sb3_mbpo.validation.rules import shown


def check_env(env: Any) -> None:
    """
    Check that ``env`` is a supported env.

    :param env: an env or a VecEnv
    :raises ValueError: ``env`` is not an env, or its wrappers are in an order that does not work
    """
    if isinstance(env, type) or not (hasattr(env, "observation_space") and hasattr(env, "action_space")):
        raise ValueError(f"env={shown(env)} must be an env, a VecEnv, or the name of a registered one, such as 'Pendulum-v1'")
    if isinstance(env, VectorEnv):
        raise ValueError(
            f"env={shown(env)} is a vectorized env of Gymnasium, not of Stable-Baselines3. Create one with "
            "stable_baselines3.common.env_util.make_vec_env(name_or_function, n_envs)"
        )
    check_wrappers(env)


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space, takes_dict: bool = True) -> None:
    """
    Check that the spaces are supported.

    :param observation_space: the env's observation space
    :param action_space: the env's action space
    :param takes_dict: whether the algorithm has a policy for Dict observations
    :raises ValueError: MBPO does not support a space
    """
    if (remedy := _observation_remedy(observation_space, takes_dict)) is not None:
        raise ValueError(f"env: the observation space {observation_space} is not supported; {remedy}")
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"env: the action space {action_space} is not supported; MBPO needs a Box of continuous actions. "
            "For discrete actions use DQN or PPO"
        )
    if not np.all(np.isfinite(action_space.low) & np.isfinite(action_space.high)):
        raise ValueError(
            f"env: the action space {action_space} is unbounded; MBPO scales actions to [-1, 1]. If "
            "gymnasium.wrappers.ClipAction removed the bounds, remove this wrapper: MBPO never exceeds bounds. Otherwise, set "
            f"some: gymnasium.wrappers.TransformAction(env, lambda action: action, gymnasium.spaces.Box(-1, 1, "
            f"{action_space.shape}))"
        )
    if not np.all(action_space.low < action_space.high):
        raise ValueError(
            f"env: the action space {action_space} has dimensions with low = high, which cannot be scaled to [-1, 1]. "
            "Remove them with gymnasium.wrappers.TransformAction"
        )


def _observation_remedy(space: spaces.Space, takes_dict: bool) -> str | None:
    """:return: why an observation space is not supported, and what to do; ``None`` if it is supported"""
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    images = [key for key, part in parts.items() if is_image_space(part)]
    vectors = [key for key, part in parts.items() if isinstance(part, spaces.Box) and key not in images]
    if images:
        remedy = "MBPO's dynamics predicts vectors, not images. Use SAC or another model-free algorithm"
        return remedy + (f", or gymnasium.wrappers.FilterObservation(env, {vectors})" if vectors else "")
    if not space.is_np_flattenable:
        return (
            "it has no fixed size, but MBPO's dynamics predicts vectors. Make a Box of it with "
            "gymnasium.wrappers.TransformObservation(env, function, box)"
        )
    if len(vectors) < len(parts):
        kinds = "a Box or a Dict of Boxes" if takes_dict else "a Box"
        return f"MBPO needs {kinds}. Flatten it with gymnasium.wrappers.FlattenObservation(env)"
    if isinstance(space, spaces.Dict) and not takes_dict:
        return (
            "this algorithm has no policy for Dict observations. Flatten them with "
            "gymnasium.wrappers.FlattenObservation(env), and pass policy='MlpPolicy'"
        )
    return None
