"""Dry runs: what can only be judged by trying it is tried at construction, and not hours later."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.filters import FILTERS, FilterResult, RolloutStep
from sb3_mbpo.validation.rules import RATE, shown


def check_learning_rate(value: Any) -> None:
    """
    :param value: a number, or a schedule, which is called at both ends of a run
    :raises ValueError: a rate out of range
    """
    if not callable(value):
        RATE.check("learning_rate", value, ", or a function of the remaining progress")
        return
    for progress in (1.0, 0.0):
        when = f"at progress_remaining={progress:g}, where it must give {RATE.expected}"
        try:
            rate = float(value(progress))
        except Exception as error:
            raise ValueError(f"learning_rate={shown(value)} raised {type(error).__name__}: {error} {when}") from error
        if not RATE.holds(rate):
            raise ValueError(f"learning_rate={shown(value)} gives {rate!r} {when}")


def check_device(value: Any) -> str | None:
    """
    :param value: what SB3 may be told to work on
    :return: a warning, if SB3 will take another device without a word
    :raises ValueError: a device that is none, or that does not work here
    """
    if isinstance(value, str) and value == "auto":
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | th.device):
            raise TypeError(f"{type(value).__name__} is no device")
        device = th.device(value)
        if device.type == "cuda" and not th.cuda.is_available():
            return f"device={value!r}: PyTorch finds no GPU here, the agent works on the CPU. Pass device='cpu' or 'auto'"
        th.zeros(1, device=device).item()
    except Exception as error:  # of whatever kind: each backend has its own
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'device={shown(value)} must be "auto", "cpu", "cuda", or "cuda:0" for the first GPU, ... ({reason})'
        ) from error
    return None


def check_noise(noise: Any, n_envs: int, action_shape: tuple[int, ...]) -> None:
    """
    Draw once from a copy of an ``action_noise``; nobody's random numbers are used up.

    :raises ValueError: what comes is not what can be added to actions ``(n_envs, *action_shape)``
    """
    state = np.random.get_state()
    try:
        sample = np.asarray(copy.deepcopy(noise)(), dtype=np.float64)
    except Exception as error:
        raise ValueError(
            f"action_noise={shown(noise)} raised {type(error).__name__}: {error}; it must give noise of shape {action_shape}"
        ) from error
    finally:
        np.random.set_state(state)
    try:
        np.broadcast_to(sample, (n_envs, *action_shape))
    except ValueError:
        fits = False
    else:
        fits = bool(np.isfinite(sample).all())
    if not fits:
        raise ValueError(f"action_noise={shown(noise)} gives {sample}; it must give finite noise of shape {action_shape}")


def _made_up(space: spaces.Box, n: int, generator: th.Generator, device: th.device | str) -> th.Tensor:
    """:return: ``(n, *space.shape)``: uniform where the bounds are near, else standard normal, inside the bounds"""
    low, high = (th.as_tensor(bound, dtype=th.float64) for bound in (space.low, space.high))
    wide = (high - low > 1e6) | ~(high - low).isfinite()
    uniform = low.nan_to_num() + (high - low).nan_to_num() * th.rand(n, *space.shape, dtype=th.float64, generator=generator)
    normal = th.randn(n, *space.shape, dtype=th.float64, generator=generator)
    return th.where(wide, normal, uniform).clamp(low, high).to(device, th.float32)


def dry_run(
    fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
    name: str,
    observation_space: spaces.Box,
    action_space: spaces.Box,
    device: th.device | str,
    returns: Literal["bool", "float"] = "bool",
) -> None:
    """
    Call a user's ``termination_fn`` or ``reward_fn`` on made-up transitions and check what comes back.

    :param name: the argument of MBPO, for the message
    :param device: where the transitions are
    :param returns: the dtype that is asked for; a float may be of any precision and must be finite
    :raises ValueError: if the function raises, writes into what it is given, or returns anything but a tensor ``(B,)`` of
        that dtype on that device
    """
    generator = th.Generator().manual_seed(0)
    # A lone row as well: the last branch of a rollout is one, and ``squeeze()`` takes its dimension away.
    for n in (13, 1):
        obs, next_obs = (_made_up(observation_space, n, generator, device) for _ in range(2))
        transition = obs, _made_up(action_space, n, generator, device), next_obs
        _dry_run_on(transition, fn, name, observation_space, returns)


def _dry_run_on(
    transition: tuple[th.Tensor, th.Tensor, th.Tensor],
    fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor],
    name: str,
    observation_space: spaces.Box,
    returns: str,
) -> None:
    n, device = len(transition[0]), transition[0].device
    who = f"{name}={shown(fn)}"
    expected = f"from (obs, actions, next_obs) it must return a {returns} tensor of shape (B,), here ({n},), on {device}"
    before = [part.clone() for part in transition]
    try:
        with th.no_grad():
            result = fn(*transition)
    except Exception as error:
        raise ValueError(f"{who} raised {type(error).__name__}: {error} in a dry run; {expected}") from error
    if not all(map(th.equal, before, transition)):
        raise ValueError(f"{who} writes into what it is given, which is learned from afterwards; {expected}")
    if not isinstance(result, th.Tensor):
        raise ValueError(f"{who} returned {type(result).__name__}; {expected}")
    fits = result.dtype == th.bool if returns == "bool" else result.dtype.is_floating_point
    if not fits or result.shape != (n,) or result.device != device:
        raise ValueError(f"{who} returned {result.dtype} of shape {tuple(result.shape)} on {result.device}; {expected}")
    # Made-up observations of an unbounded space may be none that a function is made for.
    bounded = bool(np.isfinite(observation_space.low).all() and np.isfinite(observation_space.high).all())
    if bounded and not result.isfinite().all():
        raise ValueError(f"{who} returned non-finite values for observations and actions inside the spaces; {expected}")


@th.no_grad()
def dry_run_filter(begin: Callable[[ReplayBufferSamples], Any], value: Any, dynamics: DynamicsModel) -> None:
    """
    Let a ``rollout_filter`` judge two steps from made-up observations, by what the dynamics predicts before its first fit.

    :param begin: real transitions -> a :class:`.filters.RolloutFilter`
    :param value: what the user has passed, for the message
    :param dynamics: nobody's random numbers are used up
    :raises ValueError: the dynamics does not predict as two members or more, the rule raises, or returns what does not fit
    """
    who = f"rollout_filter={shown(value)}"
    if not dynamics.offers_predict:
        kind = type(dynamics).__name__
        raise ValueError(f"{who} goes by what members predict, and {kind} has no method predict. Give it one, or pass None")
    before, generator = dynamics.generator.get_state(), th.Generator().manual_seed(0)
    obs_dim, device = dynamics.obs_dim, dynamics.generator.device
    try:
        # A lone row as well, as above.
        for n in (13, 1):
            sizes = (obs_dim, dynamics.action_dim, obs_dim, 1, 1)
            made_up = ReplayBufferSamples(*(th.randn(n, size, generator=generator).clamp(-1, 1).to(device) for size in sizes))
            rollout_filter, state = begin(made_up), None
            for step in range(2):
                mean, var = rollout_filter.predict(*made_up[:2])
                if len(mean) < 2 or any(part.shape[1:] != (n, 1 + obs_dim) for part in (mean, var)):
                    raise ValueError(f"predict gives {tuple(mean.shape)}, not (2 members or more, {n}, {1 + obs_dim})")
                filtered = rollout_filter.rule(
                    mean, var, RolloutStep(step, 2, rollout_filter.limits, state, dynamics.generator)
                )
                _check_filtered(filtered, n, 1 + obs_dim)
                state = filtered.state
    except Exception as error:
        raise ValueError(
            f"{who} must be None, {', '.join(map(repr, FILTERS))}, or a rule (mean, var, rollout_step) -> FilterResult, see "
            f"sb3_mbpo.trust.filters; a dry run said {type(error).__name__}: {error}"
        ) from error
    finally:
        dynamics.generator.set_state(before)


def _check_filtered(filtered: Any, n: int, width: int) -> None:
    if not isinstance(filtered, FilterResult):
        raise ValueError(f"it returned {type(filtered).__name__}")
    if filtered.prediction.shape != (n, width):
        raise ValueError(f"its prediction has shape {tuple(filtered.prediction.shape)}, not {(n, width)}")
    if not filtered.prediction.dtype.is_floating_point:
        raise ValueError(f"its prediction is no floating point number, but {filtered.prediction.dtype}")
    for name in ("keep", "proceed"):
        mask = getattr(filtered, name)
        if mask.dtype != th.bool or mask.shape != (n,):
            raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, not bool of shape {(n,)}")
    if filtered.penalty is not None and filtered.penalty.shape != (n,):
        raise ValueError(f"its penalty has shape {tuple(filtered.penalty.shape)}, not {(n,)}")
    if filtered.state is not None and len(filtered.state) != n:
        raise ValueError(f"its state has {len(filtered.state)} rows, not {n}")
