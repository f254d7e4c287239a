"""Dry runs: user functions are called once at construction, so that errors are not raised hours later."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.codec import Codec
from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.filters import FILTERS, FilterResult, RolloutStep
from sb3_mbpo.validation.rules import RATE, shown


def check_schedule(value: Any) -> None:
    """
    Call a schedule of the learning rate with the progress at both ends of a run.

    :param value: the schedule
    :raises ValueError: it raises, or a learning rate is out of range
    """
    for progress in (1.0, 0.0):
        when = f"at progress_remaining={progress:g}, where it must return {RATE.expected}"
        try:
            rate = float(value(progress))
        except Exception as error:
            raise ValueError(f"learning_rate={shown(value)} raised {type(error).__name__}: {error} {when}") from error
        if not RATE.holds(rate):
            raise ValueError(f"learning_rate={shown(value)} returned {rate!r} {when}")


def check_device(value: Any) -> str | None:
    """
    Check the argument ``device``.

    :param value: the device
    :return: a warning if SB3 would silently use another device, or ``None``
    :raises ValueError: the device does not exist, or does not work here
    """
    if isinstance(value, str) and value == "auto":
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | th.device):
            raise TypeError(f"{type(value).__name__} is not a device")
        device = th.device(value)
        if device.type == "cuda" and not th.cuda.is_available():
            return f"device={value!r}: PyTorch finds no GPU here, the agent uses the CPU. Pass device='cpu' or 'auto'"
        if device.type == "mps":
            raise TypeError("MPS has no float64, which statistics of the data need; pass device='cpu'")
        th.zeros(1, dtype=th.float64, device=device).item()
    except Exception as error:  # every backend has its own kind of exception
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'device={shown(value)} must be "auto", "cpu", "cuda", or "cuda:0" for the first GPU, ... ({reason})'
        ) from error
    return None


def check_noise(noise: Any, n_envs: int, action_shape: tuple[int, ...]) -> None:
    """
    Draw once from a copy of an ``action_noise``. The states of random generators are not changed.

    :param noise: the action noise
    :param n_envs: number of envs
    :param action_shape: shape of one action
    :raises ValueError: the noise cannot be added to actions ``(n_envs, *action_shape)``
    """
    state = np.random.get_state()
    try:
        copied = copy.deepcopy(noise)
        copied.reset()
        sample = np.asarray(copied(), dtype=np.float64)
        np.broadcast_to(sample, (n_envs, *action_shape))
        if not np.isfinite(sample).all():
            raise ValueError(f"it returned {sample}")
    except Exception as error:
        raise ValueError(
            f"action_noise={shown(noise)} must be None or an ActionNoise of Stable-Baselines3 that returns finite noise of "
            f"shape {action_shape} ({type(error).__name__}: {error})"
        ) from error
    finally:
        np.random.set_state(state)


def _made_up(space: spaces.Box, n: int, generator: th.Generator, device: th.device | str) -> th.Tensor:
    """:return: samples ``(n, *space.shape)``: uniform between close bounds, otherwise standard normal, within the bounds"""
    low, high = (th.as_tensor(bound, dtype=th.float64) for bound in (space.low, space.high))
    wide = (high - low > 1e6) | ~(high - low).isfinite()
    uniform = low.nan_to_num() + (high - low).nan_to_num() * th.rand(n, *space.shape, dtype=th.float64, generator=generator)
    normal = th.randn(n, *space.shape, dtype=th.float64, generator=generator)
    return th.where(wide, normal, uniform).clamp(low, high).to(device, th.float32)


def dry_run(
    fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
    name: str,
    codec: Codec,
    device: th.device | str,
    returns: Literal["bool", "float"] = "bool",
) -> None:
    """
    Call a user's ``termination_fn`` or ``reward_fn`` with made-up transitions and check the result.

    :param fn: the function
    :param name: name of the argument, for the error
    :param codec: of the env's spaces
    :param device: device of the transitions
    :param returns: expected dtype; a float may have any precision and must be finite
    :raises ValueError: the function raises, modifies its inputs, or does not return a tensor ``(B,)`` of that dtype on that
        device
    """
    generator = th.Generator().manual_seed(0)
    # Also with a single row, as the last branch of a rollout has: ``squeeze()`` would remove its dimension.
    for n in (13, 1):
        obs, next_obs = (_made_up(codec.flat_space, n, generator, device) for _ in range(2))
        transition = obs, _made_up(codec.action_space, n, generator, device), next_obs
        _dry_run_on(transition, fn, name, codec, returns)


def _dry_run_on(
    transition: tuple[th.Tensor, th.Tensor, th.Tensor],
    fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
    name: str,
    codec: Codec,
    returns: str,
) -> None:
    """:param transition: observations are flat, actions in the env's units"""
    n, device = len(transition[0]), transition[0].device
    who = f"{name}={shown(fn)}"
    keys = (
        f", where obs and next_obs are dicts with the keys {list(codec.observation_space.spaces)},"
        if isinstance(codec.observation_space, spaces.Dict)
        else ""
    )
    expected = f"from (obs, actions, next_obs){keys} it must return a {returns} tensor of shape (B,), here ({n},), on {device}"
    before = [part.clone() for part in transition]
    obs, actions, next_obs = transition
    try:
        with th.no_grad():
            # These share memory with the flat observations.
            result = fn(codec.unflatten(obs), actions, codec.unflatten(next_obs))
    except Exception as error:
        raise ValueError(f"{who} raised {type(error).__name__}: {error} in a dry run; {expected}") from error
    if not all(map(th.equal, before, transition)):
        raise ValueError(f"{who} modifies its inputs, which are used for learning afterwards; {expected}")
    if not isinstance(result, th.Tensor):
        raise ValueError(f"{who} returned {type(result).__name__}; {expected}")
    fits = result.dtype == th.bool if returns == "bool" else result.dtype.is_floating_point
    if not fits or result.shape != (n,) or result.device != device:
        raise ValueError(f"{who} returned {result.dtype} of shape {tuple(result.shape)} on {result.device}; {expected}")
    # Made-up observations of an unbounded space may be outside the domain of the function.
    bounded = codec.flat_space.is_bounded()
    if bounded and not result.isfinite().all():
        raise ValueError(f"{who} returned non-finite values for observations and actions inside the spaces; {expected}")


@th.no_grad()
def dry_run_filter(begin: Callable[[ReplayBufferSamples], Any], value: Any, dynamics: DynamicsModel) -> None:
    """
    Apply a ``rollout_filter`` to two steps from made-up observations, with the untrained dynamics.

    :param begin: maps real transitions to a :class:`.filters.RolloutFilter`
    :param value: the argument, for the error
    :param dynamics: the dynamics; the state of its random generator is restored
    :raises ValueError: the dynamics does not predict with two or more members, or the rule raises or returns an invalid result
    """
    who = f"rollout_filter={shown(value)}"
    if not dynamics.offers_predict:
        kind = type(dynamics).__name__
        raise ValueError(f"{who} needs the predictions of members, but {kind} has no method predict. Add one, or pass None")
    before, generator = dynamics.generator.get_state(), th.Generator().manual_seed(0)
    obs_dim, device = dynamics.obs_dim, dynamics.generator.device
    try:
        # Also with a single row, as above.
        for n in (13, 1):
            sizes = (obs_dim, dynamics.action_dim, obs_dim, 1, 1)
            made_up = ReplayBufferSamples(*(th.randn(n, size, generator=generator).clamp(-1, 1).to(device) for size in sizes))
            rollout_filter, state = begin(made_up), None
            for step in range(2):
                mean, var = rollout_filter.predict(*made_up[:2])
                if len(mean) < 2 or any(part.shape[1:] != (n, 1 + obs_dim) for part in (mean, var)):
                    raise ValueError(f"predict returned {tuple(mean.shape)}, not (2 members or more, {n}, {1 + obs_dim})")
                filtered = rollout_filter.rule(
                    mean, var, RolloutStep(step, 2, rollout_filter.limits, state, dynamics.generator)
                )
                _check_filtered(filtered, n, 1 + obs_dim)
                state = filtered.state
    except Exception as error:
        raise ValueError(
            f"{who} must be None, {', '.join(map(repr, FILTERS))}, or a rule (mean, var, rollout_step) -> FilterResult, see "
            f"sb3_mbpo.trust.filters; a dry run raised {type(error).__name__}: {error}"
        ) from error
    finally:
        dynamics.generator.set_state(before)


def _check_filtered(filtered: Any, n: int, width: int) -> None:
    if not isinstance(filtered, FilterResult):
        raise ValueError(f"it returned {type(filtered).__name__}")
    if filtered.prediction.shape != (n, width):
        raise ValueError(f"its prediction has shape {tuple(filtered.prediction.shape)}, not {(n, width)}")
    if not filtered.prediction.dtype.is_floating_point:
        raise ValueError(f"its prediction is not floating point, but {filtered.prediction.dtype}")
    for name in ("keep", "proceed"):
        mask = getattr(filtered, name)
        if mask.dtype != th.bool or mask.shape != (n,):
            raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, not bool of shape {(n,)}")
    if filtered.penalty is not None and filtered.penalty.shape != (n,):
        raise ValueError(f"its penalty has shape {tuple(filtered.penalty.shape)}, not {(n,)}")
    if filtered.state is not None and len(filtered.state) != n:
        raise ValueError(f"its state has {len(filtered.state)} rows, not {n}")
