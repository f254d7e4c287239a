"""Checks for combinations of envs, wrappers and callbacks that run without an error but prevent learning."""

from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecFrameStack, VecNormalize


def check_wrappers(env: Any) -> None:
    """
    Check the order of VecEnv wrappers.

    :param env: an env or a VecEnv
    :raises ValueError: ``VecFrameStack`` wraps ``VecNormalize``, or two ``VecNormalize`` both update their statistics
    """
    outer: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            if any(isinstance(wrapper, VecFrameStack) for wrapper in outer):
                raise ValueError(
                    "env: VecFrameStack over VecNormalize does not work with a replay buffer: it stores raw observations, and "
                    "the raw observations of the VecNormalize are not stacked. Swap the two: "
                    "VecNormalize(VecFrameStack(env, n_stack))"
                )
            if env.training and any(isinstance(wrapper, VecNormalize) for wrapper in outer):
                raise ValueError(
                    "env: a VecNormalize wraps another one whose statistics are updated as well: the replay buffer would "
                    "store observations and rewards in changing units. Remove one of them; VecNormalize.load(path, env) "
                    "must get an env without VecNormalize"
                )
        outer.append(env)
        env = env.venv


def missing_statistics(agent: Any) -> str | None:
    """
    Check whether an agent that learned with ``VecNormalize`` has an env with ``VecNormalize``.

    :param agent: a ModelBased algorithm that was loaded or was given an env
    :return: a warning, or ``None``
    """
    if agent.env is None or not agent.normalized_observations:
        return None
    statistics = agent.get_vec_normalize_env()
    if statistics is not None and statistics.norm_obs:
        return None
    return (
        "env: the agent learned from observations normalized by VecNormalize, but this env does not normalize them: its "
        "actions will make no sense. Wrap the env with the saved statistics: VecNormalize.load(path, env)"
    )


def _places(env: Any) -> set[int]:
    """:return: ids of the innermost VecEnv and, if they are in this process, of its envs"""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return {id(env), *(id(one.unwrapped) for one in (env.envs if isinstance(env, DummyVecEnv) else ()))}


def check_evaluation(env: Any, callbacks: Iterable[BaseCallback]) -> None:
    """
    Check that evaluation callbacks do not use the training env.

    :param env: the training env
    :param callbacks: all callbacks of ``learn``
    :raises ValueError: a callback evaluates in the training env. It resets the env in the middle of an episode, and the agent
        would store a transition from before the evaluation to after it
    """
    for callback in callbacks:
        if isinstance(callback, EvalCallback) and _places(env) & _places(callback.eval_env):
            raise ValueError(
                f"callback: {type(callback).__name__} evaluates in the training env, and resets it in the middle of an "
                "episode. Create a second env in the same way, and pass it as eval_env"
            )
