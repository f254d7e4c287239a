"""Plain values as JSON and named tensors, and back: what a checkpoint consists of."""

import base64
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch as th

Tensors = dict[str, th.Tensor]

_DICTS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered_dict", Counter: "$counter", defaultdict: "$defaultdict"}
_SEQUENCES: dict[type, str] = {
    **{list: "$list", tuple: "$tuple", set: "$set"},
    **{frozenset: "$frozenset", deque: "$deque"},
}
# What an entry of a defaultdict may begin with.
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, bool, str, list, tuple, dict, set)}


class CannotPackError(TypeError):
    """A value that is not plain."""


def pack(value: Any, tensors: Tensors, name: str = "") -> Any:
    """
    A value as JSON can hold it. What JSON has no word for becomes an object with one key that begins with ``$``.

    Subclasses, such as named tuples and enums, are not plain: they would come back as something else.

    :param value: None, bool, int, float, str, bytes; numpy's numbers and arrays of numbers; torch's tensors; generators of
        torch, numpy and Python; and lists, tuples, sets, deques, and dictionaries of these, also ordered, counting and with a
        default
    :param tensors: arrays and tensors are put in here, detached and on the CPU, under names that the result refers to; what
        lived on the CPU before shares its memory
    :param name: where the value stands, for those names and for the error
    :raises CannotPackError: anything else
    """
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"$scalar": [str(value.dtype), pack(value.item(), tensors)]}
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, th.Tensor):
        return {"$tensor": [_put(value.detach().cpu(), tensors, name), str(value.device)]}
    if kind is np.ndarray and value.dtype.kind in "biuf":
        # torch knows no uint32, nor the other byte order.
        wide = np.asarray(value, dtype=np.int64 if value.dtype.kind == "u" and value.dtype.itemsize > 1 else None)
        tensor = th.from_numpy(np.ascontiguousarray(wide.astype(wide.dtype.newbyteorder("="), copy=False)))
        return {"$array": [_put(tensor, tensors, name), value.dtype.str, list(value.shape)]}
    if kind in _DICTS:
        return _pack_dict(value, tensors, name)
    if kind in _SEQUENCES:
        items = [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        if kind is deque:
            return {"$deque": [items, value.maxlen]}
        return items if kind is list else {_SEQUENCES[kind]: items}
    return _pack_generator(value, tensors, name)


def _pack_dict(value: Any, tensors: Tensors, name: str) -> Any:
    items = [[key, pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]
    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key, _ in items):
        return dict(items)
    pairs = [[pack(key, tensors, f"{name}[key]"), item] for key, item in items]
    if type(value) is not defaultdict:
        return {_DICTS[type(value)]: pairs}
    factory = value.default_factory
    if factory is not None and factory not in _FACTORIES.values():
        raise CannotPackError(f"{name} is a defaultdict with a default_factory other than {', '.join(_FACTORIES)}")
    return {"$defaultdict": [None if factory is None else factory.__name__, pairs]}


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


def _items(content: Any, tensors: Tensors) -> list[tuple[Any, Any]]:
    return [(unpack(key, tensors), unpack(item, tensors)) for key, item in content]


_UNPACK = {
    "$scalar": lambda content, tensors: np.dtype(content[0]).type(unpack(content[1], tensors)),
    "$float": lambda content, tensors: float(content),
    "$tensor": _tensor,
    "$array": _array,
    "$bytes": lambda content, tensors: base64.b64decode(content),
    "$dict": lambda content, tensors: dict(_items(content, tensors)),
    "$ordered_dict": lambda content, tensors: OrderedDict(_items(content, tensors)),
    "$counter": lambda content, tensors: Counter(dict(_items(content, tensors))),
    "$defaultdict": lambda content, tensors: defaultdict(_FACTORIES.get(content[0]), _items(content[1], tensors)),
    "$set": lambda content, tensors: set(unpack(content, tensors)),
    "$frozenset": lambda content, tensors: frozenset(unpack(content, tensors)),
    "$deque": lambda content, tensors: deque(unpack(content[0], tensors), maxlen=content[1]),
    "$tuple": lambda content, tensors: tuple(unpack(content, tensors)),
    "$numpy_generator": _numpy_generator,
    "$random_state": _random_state,
    "$python_generator": _python_generator,
    "$torch_generator": _torch_generator,
}
