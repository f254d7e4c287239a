"""Names of the dimensions of an observation, where the env has them."""

from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim
from gymnasium.wrappers import FlattenObservation
from stable_baselines3.common.vec_env import VecEnv

# Entries of a joint's position and velocity in qpos and qvel, by MuJoCo's type of the joint: free, ball, slide, hinge.
AXES = (" x", " y", " z")
ROTATION = (" w", *AXES)
JOINTS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*AXES, *(f" rotation{axis}" for axis in ROTATION)), (*AXES, *(f" rotation{axis}" for axis in AXES))),
    (ROTATION, AXES),
    (("",), ("",)),
    (("",), ("",)),
]


def observation_names(env: VecEnv) -> list[str]:
    """
    Names of the entries of a flat observation: those of the env's attribute ``observation_names``, the keys of a flattened
    ``Dict``, or MuJoCo's joints. Names of another number than the entries are ignored.

    :param env: a VecEnv
    :return: as many names as the flat observation has entries; ``"obs 0"``, ``"obs 1"``, ... if there are none
    """
    size = flatdim(env.observation_space)
    # The envs of a SubprocVecEnv are in other processes.
    first = next(iter(getattr(env.unwrapped, "envs", [])), None)
    for names in [] if first is None else (_given(first), _of_dict(first), _of_joints(first.unwrapped)):
        if len(names) == size:
            return names
    return [f"obs {i}" for i in range(size)]


def _given(env: gym.Env) -> list[str]:
    try:
        return [str(name) for name in env.get_wrapper_attr("observation_names")]
    except (AttributeError, TypeError):
        # There are none, or what has this name is not a list.
        return []


def _of_dict(env: gym.Env) -> list[str]:
    """:return: keys of the env's ``Dict``, or of one that was flattened, numbered if they have several entries"""
    space = env.observation_space
    while isinstance(env, gym.Wrapper) and not isinstance(space, spaces.Dict):
        env, wrapper = env.env, env
        space = env.observation_space if isinstance(wrapper, FlattenObservation) else space
    if not isinstance(space, spaces.Dict):
        return []
    sizes = {key: flatdim(part) for key, part in space.spaces.items()}
    return [key if n == 1 else f"{key} {i}" for key, n in sizes.items() for i in range(n)]


def _of_joints(env: Any) -> list[str]:
    """:return: names of the observation of one of Gymnasium's MuJoCo tasks that says what it consists of (v5)"""
    parts = getattr(env, "observation_structure", None)
    if not isinstance(parts, dict) or not hasattr(env, "model"):
        return []
    joints = [(env.model.joint(i).name, *JOINTS[env.model.jnt_type[i]]) for i in range(env.model.njnt)]
    known = {
        "qpos": [joint + entry for joint, entries, _ in joints for entry in entries][parts.get("skipped_qpos", 0) :],
        "qvel": [f"{joint}{entry} velocity" for joint, _, entries in joints for entry in entries],
    }
    sizes = {part: n for part, n in parts.items() if part != "skipped_qpos"}
    return [name for part, n in sizes.items() for name in known.get(part) or [f"{part} {i}" for i in range(n)]]
