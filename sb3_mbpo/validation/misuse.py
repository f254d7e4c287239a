"""Checks for combinations of envs, wrappers, callbacks and arguments that run without an error but prevent learning."""

from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecFrameStack, VecNormalize

from sb3_mbpo.validation.rules import shown


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


def updates_are_few(agent: Any) -> str | None:
    """
    Warning for the default of ``gradient_steps`` where it does not count per transition.

    :param agent: a ModelBased algorithm whose ``gradient_steps`` was not passed
    :return: the warning; ``None``: one rollout is one transition
    """
    updates, steps, n_envs = agent.gradient_steps, agent.train_freq.frequency, agent.n_envs
    if agent.train_freq.unit is TrainFrequencyUnit.EPISODE:
        few = f"{updates} updates per {'episode' if steps == 1 else f'{steps} episodes'}"
    elif steps * n_envs == 1:
        return None
    else:
        few = f"{updates / (steps * n_envs):.3g} updates per transition"
    of_envs = f" and {n_envs} envs" if n_envs > 1 else ""
    return (
        f"gradient_steps is left at its default of {updates}, which counts per train_freq and not per transition: with "
        f"train_freq={(steps, agent.train_freq.unit.value)}{of_envs}, there are {few}. Pass updates_per_transition={updates} "
        f"for {updates} per transition, or gradient_steps={updates} to silence this warning"
    )


def check_before_learning(agent: Any) -> Iterable[str]:
    """
    Check the settings of an agent before ``learn``.

    :param agent: a ModelBased algorithm with an env
    :return: warnings of settings that work but are probably not intended
    :raises ValueError: the agent can predict but not learn with its settings
    """
    n_envs = agent.env.num_envs
    if agent.train_freq.unit is TrainFrequencyUnit.EPISODE and n_envs > 1:
        raise ValueError(
            f"train_freq={shown(agent.train_freq)} counts episodes, which works only with one env, but there are {n_envs}. "
            'Count steps instead: train_freq=(1, "step")'
        )
    if agent.gradient_steps == 0:
        return
    room = max(agent.buffer_size // n_envs, 1) * n_envs
    needed = agent.dynamics.min_transitions
    imagines = agent.real_ratio < 1 and room >= needed
    real = int(agent.batch_size * agent.real_ratio) if imagines else agent.batch_size
    if real > room:
        yield f"batch_size={agent.batch_size} needs {real} real transitions; with {room}, some are repeated. Raise buffer_size"
    if agent.real_ratio < 1 and not imagines:
        yield (
            f"buffer_size={agent.buffer_size} allows {room} transitions, but the dynamics needs {needed}: nothing will be "
            "imagined. Raise buffer_size, or pass real_ratio=1 to learn without a model"
        )
