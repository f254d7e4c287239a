"""Envs, wrappers and callbacks put together in ways that run without an error and spoil what is learned."""

from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecFrameStack, VecNormalize


def check_wrappers(env: Any) -> None:
    """
    :param env: an env or a VecEnv
    :raises ValueError: ``VecFrameStack`` over ``VecNormalize``, or two ``VecNormalize`` that both change their statistics
    """
    outer: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            if any(isinstance(wrapper, VecFrameStack) for wrapper in outer):
                raise ValueError(
                    "env: VecFrameStack over VecNormalize does not work with a replay buffer: it stores raw observations, and "
                    "those of the VecNormalize are not stacked. Swap the two: VecNormalize(VecFrameStack(env, n_stack))"
                )
            if env.training and any(isinstance(wrapper, VecNormalize) for wrapper in outer):
                raise ValueError(
                    "env: here is a VecNormalize over another one, whose statistics change as well: the replay buffer would "
                    "store observations and rewards in units that change. Leave one out; VecNormalize.load(path, env) wraps "
                    "an env that has none"
                )
        outer.append(env)
        env = env.venv


def missing_statistics(agent: Any) -> str | None:
    """
    :param agent: a ModelBased algorithm that was loaded, or was given an env
    :return: a warning, if it learned with ``VecNormalize`` and its env has none
    """
    if agent.env is None or not agent.normalized_observations:
        return None
    statistics = agent.get_vec_normalize_env()
    if statistics is not None and statistics.norm_obs:
        return None
    return (
        "env: the agent learned from observations normalized by VecNormalize, and this env does not normalize them: its "
        "actions will make no sense. Wrap the env in the statistics that were saved: VecNormalize.load(path, env)"
    )


def _places(env: Any) -> set[int]:
    """:return: the identities of the VecEnv inside all wrappers and, where they are in this process, of its envs"""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return {id(env), *(id(one.unwrapped) for one in (env.envs if isinstance(env, DummyVecEnv) else ()))}


def check_evaluation(env: Any, callbacks: Iterable[BaseCallback]) -> None:
    """
    :param env: the VecEnv that an agent learns in
    :param callbacks: all callbacks of a ``learn``
    :raises ValueError: one evaluates in that env. It resets it in the midst of an episode, and the agent would store a
        transition from before to after the evaluation
    """
    for callback in callbacks:
        if isinstance(callback, EvalCallback) and _places(env) & _places(callback.eval_env):
            raise ValueError(
                f"callback: {type(callback).__name__} evaluates in the env that the agent learns in, and resets it in the "
                "midst of an episode. Make a second env, as the first was made, and pass it as eval_env"
            )
