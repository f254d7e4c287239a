"""Wrappers that normalize with statistics that move: the same transition gets another reward or observation later."""

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_mbpo.terminations.known import Asks

# By the name of its class: Gymnasium has its own, SB3 another, and many copies of either are about.
_STATISTICS = "RunningMeanStd"


def _moves(wrapper: Any) -> bool:
    """
    :param wrapper: of an env or a VecEnv
    :return: whether it keeps running statistics, and goes on updating them (Gymnasium's wrappers can be told not to)
    """
    own = vars(wrapper)
    has = any(kind.__name__ == _STATISTICS for value in own.values() for kind in type(value).__mro__)
    return has and bool(own.get("_update_running_mean", True))


class _IsNamed:
    """``_moves``, of wrappers whose class has a certain name. It is sent to the workers of a SubprocVecEnv."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, wrapper: gym.Wrapper) -> bool:
        return _moves(wrapper) and type(wrapper).__name__ == self.name


def _in_envs(env: VecEnv) -> str | None:
    """:return: the name of such a wrapper in one of the envs"""
    if not any(Asks(_moves).of(env, index) for index in range(env.num_envs)):
        return None
    for name in ("NormalizeReward", "NormalizeObservation"):
        if any(Asks(_IsNamed(name)).of(env, index) for index in range(env.num_envs)):
            return name
    return f"a wrapper with {_STATISTICS}"


def moving_statistics(env: VecEnv) -> str | None:
    """
    Look for wrappers whose normalization changes with every step.

    What they return is stored in the replay buffer as it was at that time, so rewards and observations of earlier and of later
    transitions are in different units, and no dynamics fits both. SB3's ``VecNormalize`` does no harm: the buffer holds raw
    values.

    :param env: any VecEnv; the envs inside are asked where they live if they are in a DummyVecEnv or a SubprocVecEnv
    :return: a warning, if there is one
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
        "observations over time, and the dynamics cannot fit them. Take it off, and normalize with "
        "stable_baselines3.common.vec_env.VecNormalize instead: with it, the replay buffer and the dynamics get raw values"
    )
