"""Finds wrappers that normalize with changing statistics: they change the reward or observation of equal transitions."""

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_mbpo.terminations.known import Asks

# Found by the name of the class: Gymnasium and SB3 have their own, and there are many copies.
_STATISTICS = "RunningMeanStd"


def _moves(wrapper: Any) -> bool:
    """
    :param wrapper: wrapper of an env or a VecEnv
    :return: whether it has running statistics and updates them (Gymnasium's wrappers can disable updates)
    """
    own = vars(wrapper)
    has = any(kind.__name__ == _STATISTICS for value in own.values() for kind in type(value).__mro__)
    return has and bool(own.get("_update_running_mean", True))


class _IsNamed:
    """``_moves`` for wrappers whose class has a given name. Picklable, for the workers of a SubprocVecEnv."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, wrapper: gym.Wrapper) -> bool:
        return _moves(wrapper) and type(wrapper).__name__ == self.name


def _in_envs(env: VecEnv) -> str | None:
    """:return: name of a wrapper with changing statistics in one of the envs, or ``None``"""
    if not any(Asks(_moves).of(env, index) for index in range(env.num_envs)):
        return None
    for name in ("NormalizeReward", "NormalizeObservation"):
        if any(Asks(_IsNamed(name)).of(env, index) for index in range(env.num_envs)):
            return name
    return f"a wrapper with {_STATISTICS}"


def moving_statistics(env: VecEnv) -> str | None:
    """
    Find wrappers whose normalization changes with every step.

    The replay buffer stores their normalized outputs. So rewards and observations of earlier and later transitions are in
    different units, and the dynamics cannot fit both. SB3's ``VecNormalize`` is not a problem, because the buffer stores raw
    values.

    :param env: any VecEnv; the envs inside are checked if it is a DummyVecEnv or a SubprocVecEnv
    :return: a warning, or ``None``
    """
    name = None
    while isinstance(env, VecEnvWrapper):
        if not isinstance(env, VecNormalize) and _moves(env):
            name = name or type(env).__name__
        env = env.venv
    if name is None and isinstance(env, DummyVecEnv | SubprocVecEnv):
        name = _in_envs(env)
    if name is None:
        return None
    return (
        f"env: {name} normalizes with statistics that change with every step: equal transitions get different rewards or "
        "observations over time, and the dynamics cannot fit them. Remove it, and normalize with "
        "stable_baselines3.common.vec_env.VecNormalize instead, with which replay buffer and dynamics get raw values"
    )
