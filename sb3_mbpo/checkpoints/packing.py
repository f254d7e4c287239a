"""Plain values as JSON and named tensors, and back: what a checkpoint consists of."""

import math
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

Tensors = dict[str, th.Tensor]


class CannotPackError(TypeError):
    """A value that is not plain."""


def pack(value: Any, tensors: Tensors, name: str = "") -> Any:
    """
    A value as JSON can hold it. What JSON has no word for becomes an object with one key that begins with ``$``.

    :param value: None, bool, int, float, str; numpy's numbers and arrays of numbers; torch's tensors; generators of torch,
        numpy and Python; and lists, tuples, deques and dictionaries of these
    :param tensors: arrays and tensors are put in here, detached and on the CPU, under names that the result refers to; what
        lived on the CPU before shares its memory
    :param name: where the value stands, for those names and for the error
    :raises CannotPackError: anything else
    """
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"$scalar": [str(value.dtype), pack(value.item(), tensors)]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, th.Tensor):
        return {"$tensor": [_put(value.detach().cpu(), tensors, name), str(value.device)]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # torch knows no uint32, nor the other byte order.
        wide = np.asarray(value, dtype=np.int64 if value.dtype.kind == "u" and value.dtype.itemsize > 1 else None)
        tensor = th.from_numpy(np.ascontiguousarray(wide.astype(wide.dtype.newbyteorder("="), copy=False)))
        return {"$array": [_put(tensor, tensors, name), value.dtype.str, list(value.shape)]}
    if isinstance(value, Mapping):
        items = [[key, pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [[pack(key, tensors, f"{name}[key]"), item] for key, item in items]}
    if isinstance(value, list | tuple | deque):
        items = [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        if isinstance(value, deque):
            return {"$deque": [items, value.maxlen]}
        return items if isinstance(value, list) else {"$tuple": items}
    return _pack_generator(value, tensors, name)


def _put(tensor: th.Tensor, tensors: Tensors, name: str) -> str:
    # Keys may have dots of their own, so that two paths can read the same.
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def _pack_generator(value: Any, tensors: Tensors, name: str) -> Any:
    if isinstance(value, np.random.Generator):
        return {"$numpy_generator": pack(value.bit_generator.state, tensors, name)}
    if isinstance(value, random.Random):
        return {"$python_generator": pack(value.getstate(), tensors, name)}
    if isinstance(value, np.random.RandomState):
        return {"$random_state": pack(value.get_state(), tensors, name)}
    if isinstance(value, th.Generator):
        return {"$torch_generator": [pack(value.get_state(), tensors, name), str(value.device)]}
    raise CannotPackError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}")


def unpack(packed: Any, tensors: Tensors) -> Any:
    """
    :param packed: what ``pack`` returned, also after a round trip through JSON
    :param tensors: what it filled
    :return: an equal value of the same types; tensors and arrays are copies; tensors are on the device they were on where
        there is one, else on the CPU
    :raises ValueError: this is nothing that ``pack`` returns
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if not any(key.startswith("$") for key in packed):
        return {key: unpack(item, tensors) for key, item in packed.items()}
    (kind, content), *more = packed.items()
    if more or kind not in _UNPACK:
        raise ValueError(f"a packed value of unknown kind: {', '.join(packed)}")
    return _UNPACK[kind](content, tensors)


def _array(content: Any, tensors: Tensors) -> np.ndarray:
    name, dtype, shape = content
    return tensors[name].numpy().astype(np.dtype(dtype)).reshape(shape)


def _tensor(content: Any, tensors: Tensors) -> th.Tensor:
    name, device = content
    there = th.device(device).type == "cpu" or th.cuda.is_available()
    return tensors[name].clone().to(device if there else "cpu")


def _numpy_generator(content: Any, tensors: Tensors) -> np.random.Generator:
    state = unpack(content, tensors)
    kinds = {"PCG64": np.random.PCG64, "PCG64DXSM": np.random.PCG64DXSM, "MT19937": np.random.MT19937}
    kinds |= {"Philox": np.random.Philox, "SFC64": np.random.SFC64}
    if state["bit_generator"] not in kinds:
        raise ValueError(f"unknown bit generator {state['bit_generator']!r}")
    bits = kinds[state["bit_generator"]]()
    bits.state = state
    return np.random.Generator(bits)  # type: ignore[arg-type]


def _random_state(content: Any, tensors: Tensors) -> np.random.RandomState:
    result = np.random.RandomState()
    result.set_state(unpack(content, tensors))
    return result


def _python_generator(content: Any, tensors: Tensors) -> random.Random:
    result = random.Random()
    result.setstate(unpack(content, tensors))
    return result


def _torch_generator(content: Any, tensors: Tensors) -> th.Generator:
    state, device = content
    result = th.Generator(device)
    result.set_state(unpack(state, tensors))
    return result


_UNPACK = {
    "$scalar": lambda content, tensors: np.dtype(content[0]).type(unpack(content[1], tensors)),
    "$float": lambda content, tensors: float(content),
    "$tensor": _tensor,
    "$array": _array,
    "$dict": lambda content, tensors: {unpack(key, tensors): unpack(item, tensors) for key, item in content},
    "$deque": lambda content, tensors: deque(unpack(content[0], tensors), maxlen=content[1]),
    "$tuple": lambda content, tensors: tuple(unpack(content, tensors)),
    "$numpy_generator": _numpy_generator,
    "$random_state": _random_state,
    "$python_generator": _python_generator,
    "$torch_generator": _torch_generator,
}
