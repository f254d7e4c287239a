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
    if (remedy := _action_remedy(action_space)) is not None:
        raise ValueError(f"env: the action space {action_space} is not supported; {remedy}")


def check_policy(policy_class: Any, observation_space: spaces.Space) -> None:
    """
    Check that the policy can read the observations. SB3 itself finds Dict observations with ``"MlpPolicy"``.

    :param policy_class: class of the policy
    :param observation_space: a supported one
    :raises ValueError: the policy needs Dict observations, and there are none
    """
    kinds = getattr(policy_class, "__mro__", ())
    if not isinstance(observation_space, spaces.Dict) and any(kind.__name__ == "MultiInputPolicy" for kind in kinds):
        raise ValueError(f"policy='MultiInputPolicy' is for Dict observations, not {observation_space}. Pass 'MlpPolicy'")


def _action_remedy(space: spaces.Space) -> str | None:
    """:return: why an action space is not supported, and what to do; ``None`` if it is supported"""
    transform = "gymnasium.wrappers.TransformAction"
    if isinstance(space, spaces.Discrete):
        return "MBPO needs continuous actions. Use DQN or PPO"
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return "MBPO needs continuous actions. Use PPO"
    if not isinstance(space, spaces.Box):
        if _has_only_boxes(space):
            return (
                f"MBPO needs a Box. Flatten it with {transform}(env, lambda action, space=env.action_space: "
                "gymnasium.spaces.unflatten(space, action), gymnasium.spaces.flatten_space(env.action_space))"
            )
        return f"MBPO needs a Box of continuous actions. Make one with {transform}(env, function, box)"
    if len(space.shape) == 0:
        box = f"gymnasium.spaces.Box({space.low}, {space.high}, (1,))"
        return f"it has no dimension. Give it one with {transform}(env, lambda action: action[0], {box})"
    if 0 in space.shape:
        return "it has no entries, so there is nothing to learn"
    with np.errstate(over="ignore", invalid="ignore"):
        span = space.high.astype(np.float32) - space.low.astype(np.float32)
    if not np.isfinite(span).all():
        return (
            "it is unbounded, and MBPO scales actions to [-1, 1]. If gymnasium.wrappers.ClipAction removed the bounds, remove "
            f"this wrapper: MBPO never exceeds bounds. Otherwise, set some: {transform}(env, lambda action: action, "
            f"gymnasium.spaces.Box(-1, 1, {space.shape}))"
        )
    if not (span > 0).all():
        fixed = np.flatnonzero(~(span > 0)).tolist()
        return (
            f"its entries {fixed} have low = high, which cannot be scaled to [-1, 1]. Leave them out with {transform}(env, "
            "function, box): box has the other entries, and function inserts the constants"
        )
    return None


def _has_only_boxes(space: spaces.Space) -> bool:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return all(map(_has_only_boxes, space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces))
    return isinstance(space, spaces.Box)


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
    if any(0 in parts[key].shape for key in vectors) or not parts:  # type: ignore[operator]
        return "an observation, or an entry of it, is empty. Leave it out with gymnasium.wrappers.TransformObservation"
    if any(parts[key].shape == () for key in vectors):
        return (
            "networks need vectors, and it has numbers without a dimension. Flatten it with "
            "gymnasium.wrappers.FlattenObservation(env), and pass policy='MlpPolicy'"
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
