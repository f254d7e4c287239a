"""
Values as JSON and tensors, and back: the one format of checkpoints, buffer files and agents that are loaded safely.

What JSON does not have is an object with a single key that begins with ``$``. Nothing is imported by its name and nothing is
unpickled: :func:`decode` makes only what this module and ``validation/class_registry.py`` list.
"""

import base64
import math
import random
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from sb3_mbpo.validation.class_registry import DESCRIBED, NAMED

Tensors = dict[str, th.Tensor]

_TAGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered_dict", Counter: "$counter"}
_TAGS |= {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
# The possible default_factory of a defaultdict.
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, bool, str, list, tuple, dict, set)}
_GENERATORS: dict[str, type] = {kind.__name__: kind for kind in (random.Random, np.random.RandomState, th.Generator)}
_BIT_GENERATORS = {kind.__name__: kind for kind in vars(np.random).values() if isinstance(kind, type)}
_BIT_GENERATORS = {name: _BIT_GENERATORS[name] for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")}
_DTYPES = {np.dtype(order + name).str for name in "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split() for order in "<>"}
#: NumPy's global generator.
NUMPY = np.random.mtrand._rand
# Levels of a value. Each takes at most four levels of JSON.
_DEEPEST = 30
# JSON itself holds whole numbers below this; larger ones, up to the limit in bits, are text.
_LARGEST, _MOST_BITS = 2**63, 512


class CannotEncodeError(TypeError):
    """A value that cannot be encoded; the message names it."""


def is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    """
    Like ``isinstance``, with two differences: a bool does not count as an int, and NumPy scalars count as Python numbers.

    :param value: any value
    :param kinds: the accepted classes
    :return: whether the value is of one of them
    """
    value = value.item() if isinstance(value, np.generic) else value
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def encode(value: Any, tensors: Tensors | None = None, name: str = "", objects: bool = False) -> Any:
    """
    Encode a value as strict JSON (no NaN, no infinity) and tensors.

    Plain values are ``None``, bool, int, float, str, bytes; NumPy's numbers and arrays of numbers; tensors; generators of
    PyTorch, NumPy and Python; and lists, tuples, sets, deques and dictionaries of these, also ordered, counting and with a
    default. Subclasses such as named tuples and enums are not plain: they would come back as something else.

    :param value: a plain value
    :param tensors: gets the arrays and tensors, detached and on the CPU, under names that the result refers to; those on the
        CPU share their memory. ``None``: arrays are written into the JSON, and tensors are not plain
    :param name: name of the value, for the names of the tensors and for the error
    :param objects: also encode objects of classes in the register, and those classes, and replace whatever cannot be encoded
        by a note, for which :func:`decode` raises an error that asks the caller for it
    :return: JSON
    :raises CannotEncodeError: the value is not plain (without ``objects``)
    """
    return _Encoder(tensors, objects).encode(value, name, 0)


def decode(encoded: Any, tensors: Tensors | None = None, where: str = "a value", objects: bool = False) -> Any:
    """
    The inverse of :func:`encode`.

    :param encoded: the result of :func:`encode`, read from JSON; anyone may have written it
    :param tensors: the tensors of :func:`encode`; each is used at most once
    :param where: name of the value, and maybe ``: key``, for the errors
    :param objects: see :func:`encode`; without it, objects and classes are refused
    :return: an equal value of the same types. Arrays and tensors are copies. Tensors are on the device they were on if it is
        available, otherwise on the CPU
    :raises ValueError: :func:`encode` does not return such a thing, or the caller has to pass the value
    """
    return _Decoder(dict(tensors or {}), objects).decode(encoded, where)


def cut_out(tensors: Tensors) -> Tensors:
    """:return: the tensors; those that are a part of a larger memory are copied, because a file would contain all of it"""
    parts = (one.untyped_storage().nbytes() != one.numel() * one.element_size() for one in tensors.values())
    return {name: one.clone() if is_part else one for (name, one), is_part in zip(tensors.items(), parts, strict=True)}


def generator_state(generator: Any) -> Any:
    """
    :param generator: of PyTorch, NumPy or Python
    :return: its state, plain
    """
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    """
    Set the state in place, because several parts may share a generator.

    :param generator: of PyTorch, NumPy or Python
    :param state: see :func:`generator_state`
    :raises ValueError: the state is none of such a generator
    """
    if isinstance(generator, np.random.Generator | np.random.RandomState):
        # NumPy does not check these places, and reads memory that is not its own.
        parts = {"pos": state[2]} if isinstance(state, tuple | list) else {**state, **dict(state["state"])}
        if not (0 <= parts.get("pos", 0) <= 624 and 0 <= parts.get("buffer_pos", 0) <= 4):
            raise ValueError("the state of a random generator is damaged")
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


class _Encoder:
    """See :func:`encode`."""

    def __init__(self, tensors: Tensors | None, objects: bool) -> None:
        self.tensors, self.objects = tensors, objects

    def encode(self, value: Any, name: str, depth: int) -> Any:
        try:
            if depth > _DEEPEST:
                raise CannotEncodeError(f"{name} has too many levels")
            return self._plain(value, name, depth)
        except CannotEncodeError:
            if not self.objects:
                raise
            return {"$yours": "a value of too many levels"} if depth > _DEEPEST else self._object(value, name, depth)

    def _plain(self, value: Any, name: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int and value.bit_length() <= _MOST_BITS:
            return value if -_LARGEST < value < _LARGEST else {"$int": str(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, np.generic) and value.dtype.str in _DTYPES:
            return {"$scalar": [value.dtype.str, self.encode(value.item(), name, depth + 1)]}
        if kind is np.ndarray and value.dtype.str in _DTYPES:
            return {"$array": self._array(value, name)}
        if isinstance(value, th.Tensor) and self.tensors is not None:
            return {"$tensor": [self._stored(value.detach().cpu().contiguous(), name), str(value.device)]}
        if kind in (dict, OrderedDict, Counter, defaultdict):
            return self._dict(value, name, depth)
        if kind in (list, tuple, set, frozenset, deque):
            items = [self.encode(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value)]
            if kind is deque:
                return {"$deque": [items, value.maxlen]}
            return items if kind is list else {_TAGS[kind]: items}
        if isinstance(value, np.random.Generator | random.Random | np.random.RandomState | th.Generator):
            which = type(value.bit_generator if isinstance(value, np.random.Generator) else value).__name__
            if which in _BIT_GENERATORS or which in _GENERATORS:
                return {"$generator": [which, self.encode(generator_state(value), name, depth + 1)]}
        raise CannotEncodeError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}")

    def _array(self, array: np.ndarray, name: str) -> dict[str, Any]:
        content = {"dtype": array.dtype.str, "shape": list(array.shape)}
        array = np.ascontiguousarray(array)
        if self.tensors is None:
            return {**content, "base64": base64.b64encode(array.tobytes()).decode()}
        # PyTorch does not have the other byte order.
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return {**content, "tensor": self._stored(th.from_numpy(native), name)}

    def _stored(self, tensor: th.Tensor, name: str) -> str:
        assert self.tensors is not None
        # Keys may contain dots, so that two names can be equal.
        while name in self.tensors:
            name += "'"
        self.tensors[name] = tensor
        return name

    def _dict(self, value: Any, name: str, depth: int) -> Any:
        items = [[key, self.encode(item, f"{name}.{key}", depth + 1)] for key, item in value.items()]
        if type(value) is dict and all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        pairs = [[self.encode(key, f"{name}[key]", depth + 1), item] for key, item in items]
        if type(value) is not defaultdict:
            return {_TAGS[type(value)]: pairs}
        factory = value.default_factory
        if factory is not None and factory not in _FACTORIES.values():
            raise CannotEncodeError(f"{name} is a defaultdict with a default_factory other than {', '.join(_FACTORIES)}")
        return {"$defaultdict": [factory and factory.__name__, pairs]}

    def _object(self, value: Any, name: str, depth: int) -> Any:
        """:return: what a file may name; a note for anything else"""
        if isinstance(value, type):
            for known, cls in NAMED.items():
                if cls is value:
                    return {"$class": known}
        if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
            return {"$dtype": np.dtype(value).str}
        if type(value) in DESCRIBED:
            described = DESCRIBED[type(value)]
            values = {argument: getattr(value, field.attribute) for argument, field in described.fields.items()}
            if "dtype" in values:
                values["dtype"] = np.dtype(values["dtype"])
            fields = {argument: self.encode(item, f"{name}.{argument}", depth + 1) for argument, item in values.items()}
            return {"$object": [described.name, fields]}
        qualified = getattr(value, "__qualname__", None)
        if isinstance(qualified, str):
            return {"$yours": f"{getattr(value, '__module__', None)}.{qualified}"}
        return {"$yours": f"an object of {type(value).__module__}.{type(value).__qualname__}"}


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or text not in _DTYPES:
        raise ValueError(f"{str(text)[:50]!r} is not a dtype that a file may name")
    return np.dtype(text)


class _Decoder:
    """See :func:`decode`. The methods in the tables below get the content of a tag. They may raise any error."""

    def __init__(self, tensors: Tensors, objects: bool) -> None:
        self.tensors, self.objects = tensors, objects

    def decode(self, encoded: Any, where: str) -> Any:
        if encoded is None or type(encoded) in (bool, int, float, str):
            if type(encoded) in (int, float) and not abs(encoded) < (_LARGEST if type(encoded) is int else math.inf):
                raise ValueError(f"{where}={encoded} is out of range")
            return encoded
        if isinstance(encoded, list):
            return [self.decode(item, where) for item in encoded]
        if not isinstance(encoded, dict):
            raise ValueError(f"{where}: {type(encoded).__name__} is nothing that JSON knows")
        tags = [key for key in encoded if key.startswith("$")]
        if not tags:
            return {key: self.decode(item, where if ": " in where else f"{where}: {key}") for key, item in encoded.items()}
        tag = tags[0]
        read = _READ.get(tag) or (_READ_OBJECT.get(tag) if self.objects else None)
        if len(encoded) > 1 or read is None:
            raise ValueError(f"{where} is of an unknown kind: {', '.join(encoded)[:200]}")
        try:
            return read(self, encoded[tag], where)
        except ValueError as error:
            # An error from inside names the value already.
            text = str(error)
            raise ValueError(text if text.startswith(where.partition(":")[0]) else f"{where}: {text}") from None
        except Exception as error:
            raise ValueError(f"{where}: {tag} is damaged ({type(error).__name__})") from None

    def _pairs(self, content: Any, where: str) -> list[tuple[Any, Any]]:
        return [(self.decode(key, where), self.decode(item, where)) for key, item in content]

    def _items(self, content: Any, where: str) -> list[Any]:
        if not isinstance(content, list):
            raise ValueError(f"{where}: the content of a sequence must be a list")
        return [self.decode(item, where) for item in content]

    def _int(self, content: Any, where: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,160}", content):
            raise ValueError(f"{where}: {content[:50]!r} is not a number")
        return int(content)

    def _float(self, content: Any, where: str) -> float:
        if content not in ("inf", "-inf", "nan"):
            raise ValueError(f"{where}: {str(content)[:50]!r} is not a number")
        return float(content)

    def _bytes(self, content: Any, where: str) -> bytes:
        return base64.b64decode(content, validate=True)

    def _scalar(self, content: Any, where: str) -> Any:
        dtype, value = content
        value = self.decode(value, where)
        if type(value) not in (bool, int, float):
            raise ValueError(f"{where}: {str(value)[:50]!r} is not a number")
        return _dtype(dtype).type(value)

    def _stored(self, name: Any, where: str) -> th.Tensor:
        tensor = self.tensors.pop(name, None) if isinstance(name, str) else None
        if not isinstance(tensor, th.Tensor):
            raise ValueError(f"{where}: there is no tensor {str(name)[:50]!r}, or it is used twice")
        # A tensor that repeats itself is larger than its file.
        plain = tensor.layout == th.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or not tensor.is_contiguous() or tensor.requires_grad:
            raise ValueError(f"{where}: {name[:50]!r} must be a plain tensor")
        return tensor

    def _tensor(self, content: Any, where: str) -> th.Tensor:
        name, device = content
        is_gpu = isinstance(device, str) and re.fullmatch(r"cuda(:[0-9]{1,4})?", device) and th.cuda.is_available()
        there = bool(is_gpu) and (th.device(device).index or 0) < th.cuda.device_count()
        return self._stored(name, where).clone().to(device if there else "cpu")

    def _array(self, content: Any, where: str) -> np.ndarray:
        if set(content) not in ({"dtype", "shape", "tensor"}, {"dtype", "shape", "base64"}):
            raise ValueError(f"{where}: an array must have dtype, shape, and tensor or base64")
        dtype, shape = _dtype(content["dtype"]), content["shape"]
        if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise ValueError(f"{where}: the shape of an array must be a list of sizes")
        if "tensor" in content:
            array = self._stored(content["tensor"], where).numpy()
            if array.dtype != dtype.newbyteorder("="):
                raise ValueError(f"{where}: an array of {dtype} has a tensor of {array.dtype}")
        else:
            array = np.frombuffer(base64.b64decode(content["base64"], validate=True), dtype)
        if array.size != math.prod(shape):
            raise ValueError(f"{where}: an array of shape {shape} does not have {array.size} numbers")
        return array.astype(dtype).reshape(shape)

    def _defaultdict(self, content: Any, where: str) -> Any:
        factory, pairs = content
        return defaultdict(None if factory is None else _FACTORIES[factory], self._pairs(pairs, where))

    def _deque(self, content: Any, where: str) -> Any:
        items, maxlen = content
        return deque(self._items(items, where), maxlen=maxlen)

    def _generator(self, content: Any, where: str) -> Any:
        which, state = content
        state = self.decode(state, where)
        if which in _BIT_GENERATORS:
            generator: Any = np.random.Generator(_BIT_GENERATORS[which]())
        else:
            generator = _GENERATORS[which]()
        set_generator_state(generator, state)
        return generator

    def _class(self, content: Any, where: str) -> type:
        if not isinstance(content, str) or content not in NAMED:
            raise ValueError(f"{where}: {str(content)[:200]!r} is not among the classes that a file may name")
        return NAMED[content]

    def _object(self, content: Any, where: str) -> Any:
        name, fields = content
        described = next((one for one in DESCRIBED.values() if one.name == name), None)
        if described is None:
            raise ValueError(f"{where}: {str(name)[:200]!r} is not among the objects that a file may hold")
        if not isinstance(fields, dict) or set(fields) != set(described.fields):
            raise ValueError(f"{where}: the arguments of {name} must be {', '.join(described.fields)}")
        values = {argument: self.decode(item, where) for argument, item in fields.items()}
        for argument, field in described.fields.items():
            value = values[argument]
            items = value if field.item_type is not object else ()
            if not is_a(value, field.types) or not all(isinstance(item, field.item_type) for item in items):
                raise ValueError(f"{where}: {argument} of {name} is of a wrong type")
        return described.make(**values)

    def _yours(self, content: Any, where: str) -> Any:
        argument = where.partition(":")[0]
        raise ValueError(f"{where} was {str(content)[:200]}, which no file can hold safely; pass your own: {argument}=...")


_READ: dict[str, Callable[[_Decoder, Any, str], Any]] = {
    **{"$int": _Decoder._int, "$float": _Decoder._float, "$bytes": _Decoder._bytes, "$scalar": _Decoder._scalar},
    **{"$array": _Decoder._array, "$tensor": _Decoder._tensor, "$generator": _Decoder._generator},
    **{"$deque": _Decoder._deque, "$defaultdict": _Decoder._defaultdict},
    "$dict": lambda decoder, content, where: dict(decoder._pairs(content, where)),
    "$ordered_dict": lambda decoder, content, where: OrderedDict(decoder._pairs(content, where)),
    "$counter": lambda decoder, content, where: Counter(dict(decoder._pairs(content, where))),
    "$tuple": lambda decoder, content, where: tuple(decoder._items(content, where)),
    "$set": lambda decoder, content, where: set(decoder._items(content, where)),
    "$frozenset": lambda decoder, content, where: frozenset(decoder._items(content, where)),
}
_READ_OBJECT: dict[str, Callable[[_Decoder, Any, str], Any]] = {
    **{"$class": _Decoder._class, "$object": _Decoder._object, "$yours": _Decoder._yours},
    "$dtype": lambda decoder, content, where: _dtype(content),
}
