"""Termination rules of known tasks, read from the env, and the comparison of a user's own rule with the real ends."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import gymnasium as gym
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_mbpo.validation.class_registry import described
from sb3_mbpo.validation.env_outputs import CHECKED

# (obs, actions, next_obs) -> bool (B,): in the env's form, see Codec.decode; float32, on the agent's device.
TerminationFn: TypeAlias = Callable[[Any, th.Tensor, Any], th.Tensor]


@described("termination_fn")
@dataclass(frozen=True)
class NeverTerminates:
    """Episodes end only by time limits. As in the env, a non-finite observation does not end an episode either."""

    def __call__(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return th.zeros(len(next_obs), dtype=th.bool, device=next_obs.device)


@described()
class HealthyRange(NamedTuple):
    """Entries ``first:stop`` of an observation, and their healthy range from ``low`` to ``high``."""

    first: int
    stop: int | None
    low: float
    high: float


@described("termination_fn")
@dataclass(frozen=True)
class LeavesHealthyRange:
    """
    Terminates when an entry of ``next_obs`` leaves its range: Hopper, Walker2d, Ant, Humanoid, InvertedPendulum.

    Non-finite entries end an episode if they do so in the env: any entry with ``finite``, and always an entry of a range. A
    NaN velocity of Walker2d or Humanoid does not, because their rules check only the position. Some of the env's rules are not
    visible in the observation: Hopper ends when a velocity leaves +-100, but its observations clip velocities to +-10. The env
    compares in float64, so the result may differ for a value within float32 rounding of a bound.

    :param ranges: the checked entries and their healthy ranges
    :param closed: whether the bounds themselves are healthy
    :param finite: whether all of ``next_obs`` must be finite (Ant's own rule checks only positions and velocities)
    """

    ranges: tuple[HealthyRange, ...]
    closed: bool = False
    finite: bool = False

    def __call__(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        healthy = _finite(next_obs) if self.finite else next_obs.new_ones(len(next_obs), dtype=th.bool)
        for first, stop, low, high in self.ranges:
            # Compare both bounds with the signed value: the original code took `abs` of a comparison, so large negative values
            # did not terminate.
            x = next_obs[:, first:stop]
            healthy &= ((low <= x) & (x <= high) if self.closed else (low < x) & (x < high)).all(dim=1)
        return ~healthy


@described("termination_fn")
@dataclass(frozen=True)
class TipFalls:
    """
    InvertedDoublePendulum: terminates when the tip of the second pole is at ``height`` meters or below.

    ``next_obs`` starts with (cart, sin 1, sin 2, cos 1, cos 2). atan2 also works for imagined sines and cosines off the unit
    circle. As in the env, a NaN angle does not terminate. The env uses the position of the tip after the last stage of the
    Runge-Kutta step, which is not observed and differs by up to a centimeter from that of the observed angles.

    :param height: minimum height of the tip in meters
    :param link: length of each pole in meters, as in Gymnasium's XML file
    """

    height: float = 1.0
    link: float = 0.6

    def __call__(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        first, second = th.atan2(next_obs[:, 1:3], next_obs[:, 3:5]).unbind(dim=1)
        return self.link * (first.cos() + (first + second).cos()) <= self.height


KNOWN_TERMINATIONS = (NeverTerminates, LeavesHealthyRange, TipFalls)


def _finite(obs: th.Tensor) -> th.Tensor:
    return obs.isfinite().flatten(1).all(dim=1)


_Read: TypeAlias = Callable[[str], Any]  # the value of a named attribute of the env


def _healthy(hidden: int, *entries: tuple[str, int, int | None], closed: bool = False, read: _Read) -> TerminationFn:
    """
    :param hidden: number of leading positions hidden by ``exclude_current_positions_from_observation``
    :param entries: (attribute with the range, first, stop), counted without the hidden positions
    :param closed: see :class:`LeavesHealthyRange`
    :param read: returns an attribute of the env by name
    :return: the termination rule
    """
    if not read("_terminate_when_unhealthy"):
        return NeverTerminates()
    start = 0 if read("_exclude_current_positions_from_observation") else hidden
    ranges = (HealthyRange(start + i, j and start + j, *map(float, read(name))) for name, i, j in entries)
    return LeavesHealthyRange(tuple(ranges), closed=closed, finite=closed)


def _inverted_pendulum(read: _Read) -> TerminationFn:
    return LeavesHealthyRange((HealthyRange(1, 2, -0.2, 0.2),), closed=True, finite=True)


def _inverted_double_pendulum(read: _Read) -> TerminationFn | None:
    # The only rule that depends on lengths in the XML file; the others use coordinates that are the same for every file.
    shipped = os.path.join(os.path.dirname(gym.__file__), "envs", "mujoco", "assets", "inverted_double_pendulum.xml")
    return TipFalls() if os.path.realpath(read("fullpath")) == os.path.realpath(shipped) else None


def _never(read: _Read) -> TerminationFn:
    return NeverTerminates()


_Z, _ANGLE, _STATE = ("_healthy_z_range", 0, 1), ("_healthy_angle_range", 1, 2), ("_healthy_state_range", 1, None)
_MUJOCO: dict[str, tuple[str, Callable[..., TerminationFn | None]]] = {
    "hopper": ("Hopper", partial(_healthy, 1, _Z, _ANGLE, _STATE)),
    "walker2d": ("Walker2d", partial(_healthy, 1, _Z, _ANGLE)),
    "ant": ("Ant", partial(_healthy, 2, _Z, closed=True)),
    "humanoid": ("Humanoid", partial(_healthy, 2, _Z)),
    "inverted_pendulum": ("InvertedPendulum", _inverted_pendulum),
    "inverted_double_pendulum": ("InvertedDoublePendulum", _inverted_double_pendulum),
    **{task.lower(): (task, _never) for task in ("Swimmer", "Reacher", "Pusher", "HumanoidStandup")},
    "half_cheetah": ("HalfCheetah", _never),
}
# Each of these modules defines one env class, so the module identifies the task.
_TASKS = {f"gymnasium.envs.mujoco.{k}_{v}": (f"{task}-{v}", rule) for k, (task, rule) in _MUJOCO.items() for v in ("v4", "v5")}
_TASKS["gymnasium.envs.classic_control.pendulum"] = ("Pendulum-v1", _never)

# Wrappers that change neither the observation nor when an episode terminates. (MBPO stores raw observations.)
_PLAIN_VEC_WRAPPERS = {"VecNormalize", "VecMonitor", "VecCheckNan", "VecVideoRecorder"}
_PLAIN_WRAPPERS = {"TimeLimit", "OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo"}
_PLAIN_WRAPPERS |= {"HumanRendering", "RenderCollection", "ClipAction", "RescaleAction", "TransformAction"}
_PLAIN_WRAPPERS |= {"ClipReward", "NormalizeReward", "TransformReward"}
# The RL Zoo replaces Gymnasium's time limit with its own, which only reports the truncation differently.
_PLAIN_ELSEWHERE = {
    ("stable_baselines3.common.monitor", "Monitor"),
    ("rl_zoo3.gym_patches", "PatchedTimeLimit"),
    ("sb3_mbpo.checkpoints.env_state", "RestorableEnv"),
    ("sb3_mbpo.restarting_env", "RestartingEnv"),
}


class Asks:
    """
    Evaluates a predicate on every wrapper of an env, in the process of the env, by ``VecEnv.env_is_wrapped``.

    A worker of SubprocVecEnv dies if an answer cannot be pickled, for example a class defined in a function. Here,
    ``isinstance(wrapper, self)`` is evaluated in the worker, and only a bool is sent back.

    :param question: the predicate; it must be picklable
    """

    def __init__(self, question: Callable[[gym.Wrapper], bool]) -> None:
        self.question = question

    def __instancecheck__(self, wrapper: Any) -> bool:
        return self.question(wrapper)

    def of(self, env: VecEnv, index: int) -> bool:
        """
        :param env: a VecEnv
        :param index: index of one of its envs
        :return: whether the predicate is true for any wrapper of this env
        """
        return env.env_is_wrapped(cast(type[gym.Wrapper], self), indices=index)[0]


def _is_patched(thing: Any) -> bool:
    """:return: whether a method or a property was replaced on this instance"""
    of_class = [getattr(type(thing), name, None) for name in vars(thing)]
    return any(callable(value) or isinstance(value, property) for value in of_class)


def _is_strange(wrapper: gym.Wrapper) -> bool:
    module, name = type(wrapper).__module__, type(wrapper).__name__
    plain = module.startswith("gymnasium.wrappers.") and name in _PLAIN_WRAPPERS
    plain |= (module, name) in _PLAIN_ELSEWHERE
    return not plain or _is_patched(wrapper)


def _is_wrapper(wrapper: gym.Wrapper) -> bool:
    return True


def _prints_oddly(wrapper: gym.Wrapper) -> bool:
    inner = wrapper.env
    return type(wrapper).__str__ is not gym.Wrapper.__str__ or (
        not isinstance(inner, gym.Wrapper) and type(inner).__str__ is not gym.Env.__str__
    )


def _obeys(module: str, env: gym.Env) -> bool:
    """:return: whether the innermost env is an instance of the class in ``module``, with an unchanged termination rule"""
    env = env.unwrapped
    task = next((kind for kind in type(env).__mro__ if kind.__module__ == module), None)
    methods = ("step", "_get_obs", "is_healthy", "terminated", "state_vector")
    same = task is not None and all(getattr(type(env), name, None) is getattr(task, name, None) for name in methods)
    return same and not _is_patched(env)


def _task_of(env: VecEnv, index: int) -> str | None:
    """:return: the module of the known task of an env; ``None`` if it has none"""

    def obeys(module: str) -> bool:
        # ``env_is_wrapped`` does not check an env without any wrapper, and an env in another process is not accessible.
        here = isinstance(env, DummyVecEnv) and _obeys(module, env.envs[index])
        return here or Asks(partial(_obeys, module)).of(env, index)

    return next(filter(obeys, _TASKS), None)


def _known_in_one(env: VecEnv, index: int) -> tuple[TerminationFn | None, str]:
    strange = Asks(_is_strange).of(env, index)
    module = None if strange else _task_of(env, index)
    if module is not None:
        task, rule = _TASKS[module]
        known = rule(read=lambda name: env.get_attr(name, indices=index)[0])
        return known, f"termination: known, {task}, {known}" if known else f"termination: learned, {task} of another xml_file"
    # A user's `__str__` that raises would end a worker, so only Gymnasium's own is called.
    chain = "the environment" if Asks(_prints_oddly).of(env, index) else env.env_method("__str__", indices=index)[0]
    if strange:
        return None, f"termination: learned, a wrapper of {chain} may change what is observed or where episodes end"
    bare = not isinstance(env, DummyVecEnv) and not Asks(_is_wrapper).of(env, index)
    if bare and env.get_attr("__module__", indices=index)[0] in _TASKS:
        return None, f"termination: learned, {chain} in another process cannot be checked without a wrapper, such as Monitor"
    return None, f"termination: learned, no rule for {chain}, or a method of it was replaced"


def known_termination(env: VecEnv) -> tuple[TerminationFn | None, str]:
    """
    The termination rule of a known task, with the parameters of this env.

    The known tasks are Gymnasium's MuJoCo tasks, v4 and v5, and Pendulum-v1. The rule is unknown if a wrapper may change the
    observation or the end of an episode, if a subclass changes the rule, or if the envs of a VecEnv differ.

    :param env: any VecEnv
    :return: the function, or None if the rule is unknown, and a text for the log
    """
    while isinstance(env, VecEnvWrapper):
        kind = type(env)
        if kind.__name__ not in _PLAIN_VEC_WRAPPERS or not kind.__module__.startswith("stable_baselines3.common.vec_env."):
            return None, f"termination: learned, the wrapper {kind.__name__} may change what is observed"
        if _is_patched(env):
            return None, f"termination: learned, a method of this {kind.__name__} was replaced"
        env = env.venv
    if type(env) not in (*CHECKED, *CHECKED.values()):
        return None, f"termination: learned, {type(env).__name__} is neither DummyVecEnv nor SubprocVecEnv"
    if _is_patched(env):
        return None, f"termination: learned, a method of this {type(env).__name__} was replaced"
    found = [_known_in_one(env, index) for index in range(env.num_envs)]
    if any(known != found[0][0] for known, _ in found):
        return None, f"termination: learned, the {env.num_envs} environments do not share one rule"
    return found[0]


def disagreement(predicted: th.Tensor, terminated: th.Tensor) -> str | None:
    """
    Compare a termination function with the real ends.

    :param predicted: output of ``termination_fn`` for real transitions, bool ``(N,)``
    :param terminated: real terminations ``(N,)``, without time limits
    :return: a warning if more than 1 % of the transitions differ, or if at least 3 and more than 10 % of the real terminations
        are missed. Terminations are so rare that a function that never terminates could differ in less than 1 %
    """
    real = terminated.to(predicted.device) > 0.5
    missed, invented = int((real & ~predicted).sum()), int((~real & predicted).sum())
    if missed + invented <= 0.01 * len(real) and (missed < 3 or missed <= 0.1 * int(real.sum())):
        return None
    return (
        f"termination_fn disagrees with the environment on {missed + invented} of {len(real)} real transitions: it misses "
        f'{missed} of {int(real.sum())} terminations and invents {invented}. Correct it, or pass termination_fn="learned".'
    )
