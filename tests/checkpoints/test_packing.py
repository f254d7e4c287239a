import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mbpo.checkpoints.packing import CannotPackError, pack, unpack


def round_trip(value):
    tensors = {}
    packed = json.loads(json.dumps(pack(value, tensors, "value"), allow_nan=False))
    return unpack(packed, tensors)


def same(a, b) -> bool:
    """Equal, of equal types, all the way down; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b)) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b or (a != a and b != b)


PLAIN: st.SearchStrategy = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(np.float32, st.floats(width=32)),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.builds(deque, st.lists(inner, max_size=3), st.integers(3, 5) | st.none())
    ),
    max_leaves=10,
)


@given(PLAIN)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_plain_values(value):
    assert same(round_trip(value), value)


@pytest.mark.parametrize("dtype", "?,i1,u1,<i2,>i4,<i8,<u2,<u4,<u8,<f2,<f4,>f8".split(","))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays(dtype, shape):
    array = np.full(shape, np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1, dtype=dtype)
    assert same(round_trip(array), array)
    assert same(round_trip({"part": [array, array.T]})["part"], [array, array.T])


def test_tensors():
    value = {0: th.arange(3), "b": [th.tensor(float("nan")), th.ones(2, requires_grad=True)]}
    back = round_trip(value)
    assert th.equal(back[0], value[0]) and back["b"][0].isnan() and not back["b"][1].requires_grad
    back[0][0] = 7
    assert value[0][0] == 0


def test_paths_that_read_the_same():
    value = {"a.b": th.zeros(1), "a": {"b": th.ones(1)}}
    back = round_trip(value)
    assert back["a.b"] == 0 and back["a"]["b"] == 1


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM])
def test_numpy_generators_go_on(bits):
    generator = np.random.Generator(bits(3))
    generator.normal(size=7)
    copy = round_trip(generator)
    assert np.array_equal(copy.normal(size=5), generator.normal(size=5))


def test_other_generators_go_on():
    old, new, plain = np.random.RandomState(3), th.Generator().manual_seed(3), random.Random(3)
    old.normal(), th.rand(5, generator=new), plain.gauss(0, 1)
    copy = round_trip(plain)
    assert [copy.gauss(0, 1), copy.random()] == [plain.gauss(0, 1), plain.random()]
    assert round_trip(old).normal() == old.normal()
    assert th.equal(th.rand(5, generator=round_trip(new)), th.rand(5, generator=new))


def test_containers_of_other_types():
    """Each comes back as what it was, and goes on as that."""
    counted = defaultdict(list, {"a": [1]})
    value = {"set": {1, "a", (2, 3)}, "frozen": frozenset({1}), "bytes": b"\x00\xff", "counter": Counter("aab")}
    value |= {"default": counted, "ordered": OrderedDict(b=1, a=2), "no default": defaultdict(None, {1: 2})}
    back = round_trip(value)
    assert back == value and [type(item) for item in back.values()] == [type(item) for item in value.values()]
    back["default"]["b"].append(2)
    back["counter"].update("b")
    assert back["default"] == {"a": [1], "b": [2]} and back["counter"]["b"] == 2


class Point(NamedTuple):
    x: int


class Mode(IntEnum):
    FAST = 1


class Masked(np.ndarray):
    pass


NOT_PLAIN = {
    **{"object": object(), "text": np.array(["text"]), "function": lambda: None},
    # As their parent, they would come back as something else.
    **{"namedtuple": [Point(1)], "enum": {"a": Mode.FAST}, "key": {Mode.FAST: 1}, "array": np.zeros(1).view(Masked)},
    **{"factory": defaultdict(lambda: 7), "set": {Mode.FAST}, "another factory": defaultdict(object)},
}


@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain(value):
    with pytest.raises(CannotPackError, match="value"):
        pack(value, {}, "value")


@pytest.mark.parametrize("packed", [{"$pickle": "x"}, {"$tensor": ["a", "cpu"], "$float": "1"}])
def test_unknown_kinds_are_refused(packed):
    with pytest.raises(ValueError, match="unknown kind"):
        unpack(packed, {"a": th.zeros(1)})
