"""Values as JSON and back, so that nothing but what stands in this file can come out of one: no names are imported."""

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from stable_baselines3.common.utils import LinearSchedule as LearningRateSchedule
from torch import nn, optim

from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.rollouts import LinearRolloutSchedule
from sb3_mbpo.terminations.known import HealthyRange, LeavesHealthyRange, NeverTerminates, TipFalls
from sb3_mbpo.trust.filters import M2AC, Infoprop, Macura

_ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
    *("ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus", "Softsign", "Tanh", "Tanhshrink"),
)
_OPTIMIZERS = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

#: The classes that a file may name.
CLASSES: dict[str, type] = {
    **{f"torch.nn.{name}": getattr(nn, name) for name in _ACTIVATIONS},
    **{f"torch.optim.{name}": getattr(optim, name) for name in _OPTIMIZERS},
    **{f"stable_baselines3.{kind.__name__}": kind for kind in (RMSpropTFLike, FlattenExtractor, NatureCNN, CombinedExtractor)},
    "sb3_mbpo.ProbabilisticEnsemble": ProbabilisticEnsemble,
}
_NAMES = {kind: name for name, kind in CLASSES.items()}

_DTYPES = {np.dtype(name).name for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")}
_DEEPEST = 30


class _Kind(NamedTuple):
    """How objects of a class are described: by the arguments that make an equal one."""

    make: Callable[..., Any]
    #: argument: (attribute that holds it, what it may be)
    arguments: dict[str, tuple[str, tuple[type, ...]]]


def _uhlenbeck(now: np.ndarray, **arguments: Any) -> OrnsteinUhlenbeckActionNoise:
    noise = OrnsteinUhlenbeckActionNoise(**arguments)
    noise.noise_prev = now
    return noise


def _vectorized(base_noise: ActionNoise, noises: list[ActionNoise]) -> VectorizedActionNoise:
    vectorized = VectorizedActionNoise(base_noise, 1)
    vectorized.n_envs = len(noises)
    # Not through SB3's setter, which would reset them.
    vectorized._noises = noises
    return vectorized


_NUMBER, _NOTHING = (int, float), type(None)
_Arguments = dict[str, tuple[str, tuple[type, ...]]]
_OF_NORMAL: _Arguments = {
    "mean": ("_mu", (np.ndarray, *_NUMBER)),
    "sigma": ("_sigma", (np.ndarray, *_NUMBER)),
    "dtype": ("_dtype", (np.dtype,)),
}
_OF_UHLENBECK: _Arguments = {
    **_OF_NORMAL,
    "mean": ("_mu", (np.ndarray,)),
    **{name: (f"_{name}", _NUMBER) for name in ("theta", "dt")},
    "initial_noise": ("initial_noise", (np.ndarray, _NOTHING)),
    "now": ("noise_prev", (np.ndarray,)),
}
_OF_VECTORIZED: _Arguments = {"base_noise": ("base_noise", (ActionNoise,)), "noises": ("noises", (list,))}

_KINDS: dict[type, _Kind] = {
    kind: _Kind(make, {name: entry if isinstance(entry[0], str) else (name, entry) for name, entry in arguments.items()})
    for kind, make, arguments in (
        (ConstantSchedule, ConstantSchedule, {"val": _NUMBER}),
        (LearningRateSchedule, LearningRateSchedule, dict.fromkeys(("start", "end", "end_fraction"), _NUMBER)),
        (FloatSchedule, FloatSchedule, {"value_schedule": (ConstantSchedule, LearningRateSchedule)}),
        (LinearRolloutSchedule, LinearRolloutSchedule, dict.fromkeys(("min_length", "max_length", "start", "end"), (int,))),
        (Macura, Macura, {"xi": _NUMBER, "zeta": _NUMBER, "window": (int,)}),
        (Infoprop, Infoprop, {"step_quantile": _NUMBER, "budget_quantile": _NUMBER, "horizon": (int,)}),
        (M2AC, M2AC, {"alpha": _NUMBER}),
        (NeverTerminates, NeverTerminates, {}),
        (TipFalls, TipFalls, dict.fromkeys(("height", "link"), _NUMBER)),
        (LeavesHealthyRange, LeavesHealthyRange, {"ranges": (tuple,), "closed": (bool,), "finite": (bool,)}),
        (HealthyRange, HealthyRange, {"first": (int,), "stop": (int, _NOTHING), "low": _NUMBER, "high": _NUMBER}),
        (NormalActionNoise, NormalActionNoise, _OF_NORMAL),
        (OrnsteinUhlenbeckActionNoise, _uhlenbeck, _OF_UHLENBECK),
        (VectorizedActionNoise, _vectorized, _OF_VECTORIZED),
    )
}
_KIND_NAMES = {f"{kind.__module__}.{kind.__name__}": kind for kind in _KINDS}
# What a list or tuple of theirs holds.
_ITEMS: dict[tuple[type, str], type] = {
    (LeavesHealthyRange, "ranges"): HealthyRange,
    (VectorizedActionNoise, "noises"): ActionNoise,
}


def is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    """:return: ``isinstance``, but ``True`` is no number"""
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def encode(value: Any, depth: int = 0) -> Any:
    """
    A value as strict JSON knows it: no NaN, no infinity; what is more than JSON goes under a key that starts with a colon.

    What cannot be described (functions, classes and objects that are not in the tables above) becomes
    ``{":yours:": what it was}``, which :func:`decode` refuses: whoever loads the file has to bring it along.

    :param value: anything
    :return: of dicts with keys of text, lists, text, numbers, booleans and ``None``
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, str) or (type(value) is int and abs(value) < 2**63):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {":float:": repr(value)}
    if depth > _DEEPEST:
        return {":yours:": "a value of too many levels"}
    if type(value) is list:
        return [encode(item, depth + 1) for item in value]
    if type(value) is tuple:
        return {":tuple:": [encode(item, depth + 1) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith(":") for key in value):
        return {key: encode(item, depth + 1) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.name in _DTYPES:
        return _encode_array(value)
    if isinstance(value, type) and value in _NAMES:
        return {":class:": _NAMES[value]}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {":dtype:": np.dtype(value).name}
    if type(value) in _KINDS:
        kind = type(value)
        arguments = {name: getattr(value, attribute) for name, (attribute, _) in _KINDS[kind].arguments.items()}
        if "dtype" in arguments:
            arguments["dtype"] = np.dtype(arguments["dtype"])
        encoded = {name: encode(item, depth + 1) for name, item in arguments.items()}
        return {":object:": f"{kind.__module__}.{kind.__name__}", "arguments": encoded}
    return {":yours:": _what(value)}


def _what(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return f"{getattr(value, '__module__', None)}.{name}"
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"


def _encode_array(array: np.ndarray) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    content = {"dtype": array.dtype.name, "shape": list(array.shape), "base64": base64.b64encode(little).decode("ascii")}
    return {":array:": content}


def decode(value: Any, where: str) -> Any:
    """
    The inverse of :func:`encode`.

    :param value: what JSON brought, from anyone
    :param where: the argument it stands for, and maybe ``: key``, for the errors
    :raises ValueError: what no :func:`encode` writes, or what the caller has to bring along
    """
    if value is None or type(value) in (bool, int, float, str):
        if type(value) in (int, float) and not abs(value) < (2**63 if type(value) is int else math.inf):
            raise ValueError(f"{where}={value} is out of range")
        return value
    if isinstance(value, list):
        return [decode(item, where) for item in value]
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__} is nothing that JSON knows")
    tags = [key for key in value if key.startswith(":")]
    if not tags:
        return {key: decode(item, where if ": " in where else f"{where}: {key}") for key, item in value.items()}
    if len(tags) > 1 or tags[0] not in _READERS or (len(value) > 1 and set(value) != {":object:", "arguments"}):
        raise ValueError(f"{where} has unknown or extra keys {sorted(value)[:5]}")
    return _READERS[tags[0]](value[tags[0]], where) if len(value) == 1 else _decode_object(value, where)


def _decode_object(value: dict[str, Any], where: str) -> Any:
    name, arguments = value[":object:"], value["arguments"]
    kind = _KIND_NAMES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{where}: {name!r} is not among the objects that a file may hold")
    make, expected = _KINDS[kind]
    if not isinstance(arguments, dict) or set(arguments) != set(expected):
        raise ValueError(f"{where}: the arguments of {name} must be {', '.join(expected)}")
    made = {}
    for key, (_, kinds) in expected.items():
        made[key] = item = decode(arguments[key], where)
        inside = _ITEMS.get((kind, key))
        if not is_a(item, kinds) or (inside is not None and not all(isinstance(part, inside) for part in item)):
            raise ValueError(f"{where}: {key} of {name} is of a wrong type")
    return make(**made)


def _decode_yours(what: Any, where: str) -> Any:
    argument = where.partition(":")[0]
    raise ValueError(f"{where} was {str(what)[:200]}, which no file can hold safely; pass your own: {argument}=...")


def _decode_class(name: Any, where: str) -> type:
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{where}: {str(name)[:200]!r} is not among the classes that a file may name")
    return CLASSES[name]


def _decode_float(text: Any, where: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise ValueError(f"{where}: {str(text)[:50]!r} is no number")
    return float(text)


def _decode_tuple(items: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(items, list):
        raise ValueError(f"{where}: the content of a tuple must be a list")
    return tuple(decode(item, where) for item in items)


def _decode_dtype(name: Any, where: str) -> np.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{where}: {str(name)[:50]!r} is no dtype that a file may name")
    return np.dtype(name)


def _decode_array(content: Any, where: str) -> np.ndarray:
    if not isinstance(content, dict) or set(content) != {"dtype", "shape", "base64"}:
        raise ValueError(f"{where}: an array must have dtype, shape and base64")
    dtype, shape, text = _decode_dtype(content["dtype"], where), content["shape"], content["base64"]
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"{where}: the shape of an array must be a list of sizes")
    try:
        data = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where}: the content of an array must be base64") from None
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where}: an array of shape {shape} and {dtype} does not have {len(data)} bytes")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


_READERS: dict[str, Callable[[Any, str], Any]] = {
    ":yours:": _decode_yours,
    ":class:": _decode_class,
    ":float:": _decode_float,
    ":tuple:": _decode_tuple,
    ":dtype:": _decode_dtype,
    ":array:": _decode_array,
    ":object:": lambda name, where: _decode_object({":object:": name, "arguments": None}, where),
}


def encode_box(box: spaces.Box) -> dict[str, Any]:
    """:return: the bounds of a space, bit for bit, and its dtype, for JSON"""
    return {"dtype": box.dtype.name, "low": _encode_array(box.low), "high": _encode_array(box.high)}


def decode_box(value: Any, where: str) -> spaces.Box:
    """
    The inverse of :func:`encode_box`.

    :param value: what JSON brought, from anyone
    :param where: which space, for the errors
    :raises ValueError: what no :func:`encode_box` writes
    """
    if not isinstance(value, dict) or set(value) != {"dtype", "low", "high"}:
        raise ValueError(f"{where} must have dtype, low and high")
    dtype = _decode_dtype(value["dtype"], where)
    low, high = (decode(value[name], where) for name in ("low", "high"))
    if not all(isinstance(bound, np.ndarray) and bound.dtype == dtype for bound in (low, high)) or low.shape != high.shape:
        raise ValueError(f"{where}: low and high must be arrays of {dtype} and of one shape")
    if np.isnan(low).any() or np.isnan(high).any() or (low > high).any():
        raise ValueError(f"{where}: low must be at most high everywhere")
    return spaces.Box(low, high, dtype=dtype.type)


def encode_space(space: spaces.Space) -> Any:
    """:return: a Box, see :func:`encode_box`, or a Dict of Boxes as a list of keys and Boxes, which keeps their order"""
    if isinstance(space, spaces.Dict):
        return [[key, encode_space(part)] for key, part in space.items()]
    assert isinstance(space, spaces.Box)
    return encode_box(space)


def decode_space(value: Any, where: str) -> spaces.Box | spaces.Dict:
    """
    The inverse of :func:`encode_space`.

    :param value: what JSON brought, from anyone
    :param where: which space, for the errors
    :raises ValueError: what no :func:`encode_space` writes
    """
    if not isinstance(value, list):
        return decode_box(value, where)
    if not all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in value):
        raise ValueError(f"{where} must be a list of names and spaces")
    if len({name for name, _ in value}) < len(value):
        raise ValueError(f"{where} must not have two entries of one name")
    return spaces.Dict([(name, decode_box(part, f"{where}: {name[:50]}")) for name, part in value])
