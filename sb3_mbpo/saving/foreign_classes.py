"""The classes of PyTorch, Stable-Baselines3 and Gymnasium that a file may name, and how their objects are described in it."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn, optim

from sb3_mbpo.validation.class_registry import NAMED, Field, describe_as

_ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
    *("ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus", "Softsign", "Tanh", "Tanhshrink"),
)
_OPTIMIZERS = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_NUMBER: tuple[type, ...] = (int, float)
_ARRAY: tuple[type, ...] = (np.ndarray,)


def _uhlenbeck(now: np.ndarray, **arguments: Any) -> OrnsteinUhlenbeckActionNoise:
    noise = OrnsteinUhlenbeckActionNoise(**arguments)
    noise.noise_prev = now
    return noise


def _vectorized(base_noise: ActionNoise, noises: list[ActionNoise]) -> VectorizedActionNoise:
    vectorized = VectorizedActionNoise(base_noise, 1)
    vectorized.n_envs = len(noises)
    # SB3's setter would reset them.
    vectorized._noises = noises
    return vectorized


def _box(low: np.ndarray, high: np.ndarray, dtype: np.dtype) -> spaces.Box:
    if low.dtype != dtype or high.dtype != dtype or low.shape != high.shape:
        raise ValueError(f"low and high must be arrays of {dtype} and of one shape")
    if np.isnan(low).any() or np.isnan(high).any() or (low > high).any():
        raise ValueError("low must be at most high everywhere")
    return spaces.Box(low, high, dtype=dtype.type)


def _fields(*names: str, types: tuple[type, ...] = _NUMBER) -> dict[str, Field]:
    return {name: Field(name, types) for name in names}


NAMED.update({f"torch.nn.{name}": getattr(nn, name) for name in _ACTIVATIONS})
NAMED.update({f"torch.optim.{name}": getattr(optim, name) for name in _OPTIMIZERS})
NAMED.update(
    {f"stable_baselines3.{kind.__name__}": kind for kind in (RMSpropTFLike, FlattenExtractor, NatureCNN, CombinedExtractor)}
)
describe_as(spaces.Box, "Box", _box, **_fields("low", "high", types=_ARRAY), dtype=Field("dtype", (np.dtype,)))
describe_as(ConstantSchedule, "ConstantSchedule", ConstantSchedule, **_fields("val"))
describe_as(LinearSchedule, "LinearSchedule", LinearSchedule, **_fields("start", "end", "end_fraction"))
describe_as(
    FloatSchedule, "FloatSchedule", FloatSchedule, **_fields("value_schedule", types=(ConstantSchedule, LinearSchedule))
)
describe_as(
    NormalActionNoise,
    "NormalActionNoise",
    NormalActionNoise,
    mean=Field("_mu", (*_ARRAY, *_NUMBER)),
    sigma=Field("_sigma", (*_ARRAY, *_NUMBER)),
    dtype=Field("_dtype", (np.dtype,)),
)
describe_as(
    OrnsteinUhlenbeckActionNoise,
    "OrnsteinUhlenbeckActionNoise",
    _uhlenbeck,
    mean=Field("_mu", _ARRAY),
    sigma=Field("_sigma", (*_ARRAY, *_NUMBER)),
    dtype=Field("_dtype", (np.dtype,)),
    initial_noise=Field("initial_noise", (*_ARRAY, type(None))),
    now=Field("noise_prev", _ARRAY),
    theta=Field("_theta", _NUMBER),
    dt=Field("_dt", _NUMBER),
)
describe_as(
    VectorizedActionNoise,
    "VectorizedActionNoise",
    _vectorized,
    base_noise=Field("base_noise", (ActionNoise,)),
    noises=Field("noises", (list,), ActionNoise),
)
