"""
Saves and restores the state of envs: of known classes, and of envs that have ``get_state`` and ``set_state``.

``_STATE`` lists, for each known class, the attributes that change while an env runs. Nothing else is read or written, so an
argument of a constructor never comes from a checkpoint. An env or wrapper that is not listed needs ``get_state()`` and
``set_state(state)``, otherwise it cannot be restored.
"""

import random
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_mbpo.saving.serialization import NUMPY, CannotEncodeError, Tensors, decode, encode, set_generator_state
from sb3_mbpo.validation.env_outputs import CHECKED

_CONTROL, _MUJOCO = "gymnasium.envs.classic_control", "gymnasium.envs.mujoco"
_COMMON, _STATEFUL = "gymnasium.wrappers.common", "gymnasium.wrappers.stateful"
_VEC, _ZOO = "stable_baselines3.common.vec_env", "rl_zoo3.wrappers"
#: Attributes that change while an env runs, by class. Subclasses may have more state, so they are not known.
_STATE: dict[str, tuple[str, ...]] = {
    f"{_CONTROL}.pendulum.PendulumEnv": ("state", "last_u"),
    f"{_CONTROL}.continuous_mountain_car.Continuous_MountainCarEnv": ("state",),
    f"{_CONTROL}.mountain_car.MountainCarEnv": ("state",),
    f"{_CONTROL}.acrobot.AcrobotEnv": ("state",),
    f"{_CONTROL}.cartpole.CartPoleEnv": ("state", "steps_beyond_terminated"),
    **{f"{_MUJOCO}.reacher_{version}.ReacherEnv": ("goal",) for version in ("v4", "v5")},
    **{f"{_MUJOCO}.pusher_{version}.PusherEnv": ("goal_pos", "cylinder_pos") for version in ("v4", "v5")},
    f"{_COMMON}.TimeLimit": ("_elapsed_steps",),
    f"{_COMMON}.Autoreset": ("autoreset",),
    f"{_COMMON}.OrderEnforcing": ("_has_reset",),
    # It checks the first steps of each process.
    f"{_COMMON}.PassiveEnvChecker": (),
    f"{_COMMON}.RecordEpisodeStatistics": (
        *("episode_count", "episode_returns", "episode_lengths", "time_queue", "return_queue", "length_queue"),
    ),
    f"{_STATEFUL}_action.StickyAction": ("last_action", "is_sticky_actions", "num_repeats", "repeats_taken"),
    f"{_STATEFUL}_action.RepeatAction": (),
    f"{_STATEFUL}_observation.DelayObservation": ("observation_queue",),
    f"{_STATEFUL}_observation.TimeAwareObservation": ("timesteps",),
    f"{_STATEFUL}_observation.FrameStackObservation": ("obs_queue",),
    f"{_STATEFUL}_observation.NormalizeObservation": ("obs_rms",),
    f"{_STATEFUL}_observation.MaxAndSkipObservation": (),
    f"{_STATEFUL}_reward.NormalizeReward": ("return_rms", "discounted_reward"),
    # Collected frames are not saved.
    "gymnasium.wrappers.rendering.RenderCollection": (),
    "gymnasium.wrappers.rendering.HumanRendering": (),
    "gymnasium.wrappers.rendering.RecordVideo": ("step_id", "episode_id"),
    "stable_baselines3.common.monitor.Monitor": (
        *("rewards", "needs_reset", "episode_returns", "episode_lengths", "total_steps", "current_reset_info"),
    ),
    f"{_VEC}.vec_normalize.VecNormalize": ("obs_rms", "ret_rms", "returns", "old_obs", "old_reward"),
    f"{_VEC}.vec_frame_stack.VecFrameStack": ("stacked_obs",),
    f"{_VEC}.vec_monitor.VecMonitor": ("episode_count", "episode_returns", "episode_lengths"),
    f"{_VEC}.vec_check_nan.VecCheckNan": ("_user_warned",),
    f"{_VEC}.vec_extract_dict_obs.VecExtractDictObs": (),
    f"{_VEC}.vec_transpose.VecTransposeImage": (),
    f"{_VEC}.vec_video_recorder.VecVideoRecorder": ("step_id",),
    "rl_zoo3.gym_patches.PatchedTimeLimit": ("_elapsed_steps",),
    f"{_ZOO}.TruncatedOnSuccessWrapper": ("current_successes",),
    # Its noise is that of NumPy's global generator.
    f"{_ZOO}.ActionNoiseWrapper": (),
    f"{_ZOO}.ActionSmoothingWrapper": ("smoothed_action",),
    f"{_ZOO}.DelayedRewardWrapper": ("current_step", "accumulated_reward"),
    f"{_ZOO}.HistoryWrapper": ("obs_history", "action_history"),
    f"{_ZOO}.FrameSkip": (),
    f"{_ZOO}.MaskVelocityWrapper": (),
    "sb3_contrib.common.wrappers.time_feature.TimeFeatureWrapper": ("_current_step",),
}
# Functions of one action, observation or reward. Functions that users pass to them are assumed to have no state.
_STATELESS = tuple(f"gymnasium.wrappers.transform_{what}." for what in ("action", "observation", "reward"))
# Classes of objects in these attributes, and what changes in them.
_PARTS = {
    "gymnasium.wrappers.utils.RunningMeanStd": ("mean", "var", "count"),
    "stable_baselines3.common.running_mean_std.RunningMeanStd": ("mean", "var", "count"),
    f"{_VEC}.stacked_observations.StackedObservations": ("stacked_obs", "sub_stacked_observations"),
}
# Suffix of the name of an attribute that is a space, for its generator.
_OF_SPACE = "._np_random"
_NEXT_RESET = ("_seeds", "_options")
# Quantities that MuJoCo derives from its state. Envs read some of them before the next step computes them again.
_DERIVED: tuple[str, ...] = (
    "xpos",
    "xquat",
    "xmat",
    "xipos",
    "ximat",
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "subtree_com",
)
_DERIVED += ("cinert", "cvel", "cacc", "cfrc_int", "cfrc_ext", "qfrc_actuator", "qfrc_constraint", "sensordata", "qacc")


class CannotRestoreError(Exception):
    """The state of an env cannot be saved or restored. The message names the env or wrapper and the reason."""


def take_envs(env: VecEnv, tensors: Tensors, name: str) -> Any:
    """
    Save the state of a vectorised env with all its wrappers.

    Gymnasium's MuJoCo and classic-control envs and the wrappers of Gymnasium, SB3 and the RL Zoo are known. Any other env or
    wrapper must have ``get_state()``, which returns plain values, and ``set_state(state)``. ``np_random`` is saved of all
    envs. An env in another process must be wrapped in :class:`RestorableEnv`.

    :param env: the vectorised env
    :param tensors: see :func:`.serialization.encode`
    :param name: prefix of the names of the tensors
    :return: JSON
    :raises CannotRestoreError: an env or wrapper is unknown and has no ``get_state``, or its state is not plain
    """
    wrappers, inner = _vec_layers(env)
    state: dict[str, Any] = {"wrappers": [_take(layer, tensors, f"{name}.wrappers.{i}") for i, layer in enumerate(wrappers)]}
    # Arguments of the next reset.
    state["following"] = _packed(inner, {key: getattr(inner, key, None) for key in _NEXT_RESET}, tensors, f"{name}.following")
    if isinstance(inner, DummyVecEnv) and type(inner) in (DummyVecEnv, CHECKED[DummyVecEnv]):
        return state | {"envs": [take_env(one, tensors, f"{name}.env{i}") for i, one in enumerate(inner.envs)]}
    if type(inner) not in (SubprocVecEnv, CHECKED[SubprocVecEnv]):
        return state | {"vectorised": _take(inner, tensors, f"{name}.vectorised")}
    try:
        if not all(inner.env_is_wrapped(RestorableEnv)) or any(inner.env_is_wrapped(_WrappedOnce())):  # type: ignore[arg-type]
            raise CannotRestoreError(
                "SubprocVecEnv keeps its envs in other processes; as the outermost wrapper of each, "
                "sb3_mbpo.RestorableEnv makes their state accessible"
            )
        answers = inner.env_method("get_state")
    except (EOFError, OSError) as error:
        raise CannotRestoreError("their processes have ended") from error
    for lost in (answer["lost"] for answer in answers if "lost" in answer):
        raise CannotRestoreError(lost)
    return state | {"states": [_packed(inner, one, tensors, f"{name}.env{i}") for i, one in enumerate(answers)]}


def put_envs(env: VecEnv, state: Any, tensors: Tensors) -> None:
    """
    Restore an env that was made in the same way and was reset.

    :param env: the vectorised env
    :param state: the result of :func:`take_envs`
    :param tensors: the tensors of :func:`take_envs`
    :raises ValueError: the env has other wrappers, or another number of them
    :raises CannotRestoreError: a ``set_state`` raised
    """
    wrappers, inner = _vec_layers(env)
    for layer, layer_state in _pairs(wrappers, state["wrappers"], "wrappers around the vectorised env"):
        _put(layer, layer_state, tensors)
    if "vectorised" in state:
        _put(inner, state["vectorised"], tensors)
    elif "envs" in state:
        for one, env_state in _pairs(
            inner.envs if isinstance(inner, DummyVecEnv) else [], state["envs"], "envs in this process"
        ):
            put_env(one, env_state, tensors)
    else:
        for i, env_state in _pairs(range(inner.num_envs), state["states"], "envs"):
            if (problem := inner.env_method("set_state", decode(env_state, tensors), indices=i)[0]) is not None:
                raise CannotRestoreError(problem)
    following = decode(state["following"], tensors)
    vars(inner).update({key: following[key] for key in _NEXT_RESET})


def take_statistics(env: VecEnv, tensors: Tensors, name: str) -> list[Any]:
    """
    Save the state of the wrappers of a vectorised env, as far as it is known.

    :param env: the vectorised env
    :param tensors: see :func:`.serialization.encode`
    :param name: prefix of the names of the tensors
    :return: JSON for each wrapper, outermost first; ``None`` for unknown ones. For a subclass of ``VecNormalize`` without
        ``get_state``, its statistics
    """
    found: list[Any] = []
    for i, layer in enumerate(_vec_layers(env)[0]):
        state = None
        for take in (_take, _take_normalize) if isinstance(layer, VecNormalize) else (_take,):
            try:
                state = state or take(layer, tensors, f"{name}.{i}")
            except CannotRestoreError:
                continue
        found.append(state)
    return found


def put_statistics(env: VecEnv, state: list[Any], tensors: Tensors) -> list[str]:
    """
    Restore the wrappers of a vectorised env.

    :param env: the vectorised env
    :param state: the result of :func:`take_statistics`
    :param tensors: the tensors of :func:`take_statistics`
    :return: the reason for each wrapper whose ``set_state`` raised; the others are restored
    """
    problems = []
    for layer, layer_state in _pairs(_vec_layers(env)[0], state, "wrappers around the vectorised env"):
        try:
            if layer_state is not None:
                _put(layer, layer_state, tensors)
        except CannotRestoreError as error:
            problems.append(str(error))
    return problems


def take_env(env: gym.Env, tensors: Tensors, name: str) -> list[Any]:
    """
    :param env: an env with its wrappers
    :param tensors: see :func:`.serialization.encode`
    :param name: prefix of the names of the tensors
    :return: the state of each wrapper, outermost first, and of the env itself
    :raises CannotRestoreError: see :func:`take_envs`
    """
    return [_take(layer, tensors, f"{name}.{i}") for i, layer in enumerate(_layers(env))]


def put_env(env: gym.Env, state: list[Any], tensors: Tensors) -> None:
    """
    :param env: an env with its wrappers
    :param state: the result of :func:`take_env`
    :param tensors: the tensors of :func:`take_env`
    :raises ValueError: see :func:`put_envs`
    :raises CannotRestoreError: see :func:`put_envs`
    """
    for layer, layer_state in _pairs(list(_layers(env)), state, "wrappers"):
        _put(layer, layer_state, tensors)


class RestorableEnv(gym.Wrapper):
    """
    Makes the state of an env in another process (``SubprocVecEnv``) accessible. It must be the outermost wrapper.

    :param env: The env
    """

    def get_state(self) -> dict[str, Any]:
        """:return: the state of the env inside, as plain values; or ``lost``, the reason why it cannot be saved"""
        tensors: Tensors = {}
        try:
            state = take_env(self.env, tensors, "env")
        except CannotRestoreError as error:
            # An exception would end the worker process.
            return {"lost": str(error)}
        # In its own process, only this env draws from the global generators.
        generators = {"python": random.getstate(), "numpy": NUMPY.get_state()}
        return {"state": state, "tensors": {key: tensor.clone() for key, tensor in tensors.items()}, "global": generators}

    def set_state(self, state: dict[str, Any]) -> str | None:
        """
        :param state: the result of ``get_state``
        :return: why it does not fit this env; ``None``: it was restored
        """
        try:
            put_env(self.env, state["state"], state["tensors"])
        except Exception as error:
            return str(error)
        random.setstate(state["global"]["python"])
        set_generator_state(NUMPY, state["global"]["numpy"])
        return None


class _WrappedOnce:
    """``env_is_wrapped(_WrappedOnce())`` returns whether the outermost wrapper is not a :class:`RestorableEnv`."""

    asked = False

    def __instancecheck__(self, wrapper: Any) -> bool:
        first, self.asked = not self.asked, True
        return first and type(wrapper) is not RestorableEnv


def _vec_layers(env: VecEnv) -> tuple[list[VecEnvWrapper], VecEnv]:
    wrappers = []
    while isinstance(env, VecEnvWrapper):
        wrappers.append(env)
        env = env.venv
    return wrappers, env


def _layers(env: Any) -> Iterator[Any]:
    while isinstance(env, gym.Wrapper):
        yield env
        if isinstance(env, RestorableEnv):
            # Its state includes everything inside.
            return
        env = env.env
    yield env


def _pairs(ours: Any, theirs: Any, what: str) -> Iterator[tuple[Any, Any]]:
    if len(ours) != len(theirs):
        raise ValueError(f"the checkpoint has {len(theirs)} {what}, and this env has {len(ours)}: make it as for that run")
    return zip(ours, theirs, strict=True)


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _packed(owner: Any, value: Any, tensors: Tensors, name: str) -> Any:
    try:
        return encode(value, tensors, name)
    except (CannotEncodeError, RecursionError) as error:
        raise CannotRestoreError(f"the state of {type(owner).__name__} contains what cannot be saved: {error}") from error


def _keys(layer: Any) -> tuple[str, ...]:
    """:return: known attributes that change in an env or wrapper; for a subclass of VecNormalize, its statistics"""
    return _STATE.get(_kind(layer), _STATE[f"{_VEC}.vec_normalize.VecNormalize"] if isinstance(layer, VecNormalize) else ())


def _take_normalize(layer: VecEnvWrapper, tensors: Tensors, name: str) -> dict[str, Any]:
    """:return: the statistics of a subclass of VecNormalize, without its other state"""
    values = {key: _read(getattr(layer, key)) for key in _keys(layer) if hasattr(layer, key)}
    return {"class": type(layer).__name__, "state": _packed(layer, values, tensors, f"{name}.statistics"), "generators": {}}


def _take(layer: Any, tensors: Tensors, name: str) -> dict[str, Any]:
    """:return: the state of one env or wrapper"""
    kind = _kind(layer)
    simulation = getattr(layer, "data", None) if kind.startswith(f"{_MUJOCO}.") else None
    result: dict[str, Any] = {"class": type(layer).__name__}
    if kind in _STATE or kind.startswith(_STATELESS) or _is_mujoco(simulation):
        values = {key: _read(getattr(layer, key)) for key in _STATE.get(kind, ()) if hasattr(layer, key)}
        result["state"] = _packed(layer, values, tensors, f"{name}.state")
        if _is_mujoco(simulation):
            result["mujoco"] = _packed(layer, _take_mujoco(layer), tensors, f"{name}.mujoco")
    elif all(callable(getattr(type(layer), method, None)) for method in ("get_state", "set_state")):
        try:
            own = layer.get_state()
        except Exception as error:
            raise CannotRestoreError(f"{type(layer).__name__}.get_state() raised {type(error).__name__}: {error}") from error
        if isinstance(layer, RestorableEnv) and "lost" in own:
            raise CannotRestoreError(own["lost"])
        result["own"] = _packed(layer, own, tensors, f"{name}.own")
    else:
        known = "is not among those whose state is known; give it get_state() and set_state(state)"
        raise CannotRestoreError(f"{type(layer).__name__} {known}")
    # The `get_state` of most envs forgets their generator, and those of their spaces.
    generators = {key: one for key, one in vars(layer).items() if isinstance(one, np.random.Generator)}
    spaces = {key: one for key, one in vars(layer).items() if isinstance(one, gym.Space) and one._np_random is not None}
    generators |= {f"{key}{_OF_SPACE}": space.np_random for key, space in spaces.items()}
    states = {key: one.bit_generator.state for key, one in generators.items()}
    result["generators"] = _packed(layer, states, tensors, f"{name}.generators")
    return result


def _put(layer: Any, state: dict[str, Any], tensors: Tensors) -> None:
    """Restore one env or wrapper from the result of ``_take``."""
    if type(layer).__name__ != state["class"]:
        raise ValueError(f"the checkpoint has a {state['class']} where this env has a {type(layer).__name__}")
    if "own" in state:
        try:
            problem = layer.set_state(decode(state["own"], tensors))
        except Exception as error:
            raise CannotRestoreError(f"{type(layer).__name__}.set_state() raised {type(error).__name__}: {error}") from error
        if isinstance(layer, RestorableEnv) and problem is not None:
            raise CannotRestoreError(problem)
    else:
        values = decode(state["state"], tensors)
        for key in _keys(layer):
            # The env may have been made with arguments under which it has no such attribute.
            if key in values and hasattr(layer, key):
                _write(layer, key, values[key])
        if "mujoco" in state:
            _put_mujoco(layer, decode(state["mujoco"], tensors))
    for key, generator_state in decode(state["generators"], tensors).items():
        # In place, because helpers of the env may share it. Gymnasium's property creates it on first use.
        if key.endswith(_OF_SPACE):
            space = vars(layer).get(key.removesuffix(_OF_SPACE))
            generator = space.np_random if isinstance(space, gym.Space) else None
        else:
            generator = layer.np_random if key == "_np_random" else getattr(layer, key, None)
        if isinstance(generator, np.random.Generator):
            set_generator_state(generator, generator_state)


def _has_parts(value: Any) -> bool:
    """:return: whether it is a dict of objects in ``_PARTS``: statistics or stacks of Dict observations"""
    return isinstance(value, dict) and any(_kind(item) in _PARTS for item in value.values())


def _read(value: Any) -> Any:
    if _has_parts(value):
        return {key: _read(item) for key, item in value.items()}
    parts = _PARTS.get(_kind(value))
    return value if parts is None else {part: _read(getattr(value, part)) for part in parts if hasattr(value, part)}


def _write(owner: Any, key: str, value: Any) -> None:
    present = getattr(owner, key, None)
    if isinstance(present, dict) and _has_parts(present):
        for name in present.keys() & value.keys():
            _write_parts(present[name], value[name])
    elif _kind(present) in _PARTS:
        _write_parts(present, value)
    else:
        setattr(owner, key, value)


def _write_parts(thing: Any, values: dict[str, Any]) -> None:
    for part in _PARTS[_kind(thing)]:
        if part in values:
            _write(thing, part, values[part])


def _is_mujoco(data: Any) -> bool:
    return type(data).__name__ == "MjData" and type(data).__module__.startswith("mujoco")


def _take_mujoco(env: Any) -> dict[str, np.ndarray]:
    """:return: what MuJoCo integrates and the quantities derived from it, without the model, which is made with the env"""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return {"integration": state} | {key: np.array(getattr(env.data, key)) for key in _DERIVED}


def _put_mujoco(env: Any, values: dict[str, np.ndarray]) -> None:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    sizes = {"integration": (mujoco.mj_stateSize(env.model, kind),)}
    sizes |= {key: getattr(env.data, key).shape for key in _DERIVED}
    for key, shape in sizes.items():
        if values[key].shape != shape:
            raise ValueError(f"the checkpoint's MuJoCo model has {key} of shape {values[key].shape}, this env's has {shape}")
    mujoco.mj_setState(env.model, env.data, values["integration"], kind)
    for key in _DERIVED:
        getattr(env.data, key)[...] = values[key]
