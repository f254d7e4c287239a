import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from enum import IntEnum
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from stable_baselines3.common.utils import LinearSchedule as LearningRateSchedule

from sb3_mbpo import LinearRolloutSchedule, ProbabilisticEnsemble
from sb3_mbpo.saving import foreign_classes  # noqa: F401
from sb3_mbpo.saving.serialization import CannotEncodeError, decode, encode, set_generator_state
from sb3_mbpo.terminations.known import HealthyRange, LeavesHealthyRange, NeverTerminates, TipFalls


def round_trip(value):
    tensors = {}
    packed = json.loads(json.dumps(encode(value, tensors, "value"), allow_nan=False))
    return decode(packed, tensors)


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
    with pytest.raises(CannotEncodeError, match="value"):
        encode(value, {}, "value")


# ---------------------------------------------------------------------- objects and classes


def through_json(encoded):
    return json.loads(json.dumps(encoded, allow_nan=False))


def there_and_back(value):
    return decode(through_json(encode(value, objects=True)), where="argument", objects=True)


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            False,
            0,
            -3,
            2**62,
            1e-300,
            0.1,
            "",
            "text: €",
            [],
            {},
            (),
            ("step", 1),
            [(1, [2.5])],
            {"a": {"b": (1,)}},
        ),
        *(float("inf"), float("-inf"), {"low": float("inf")}),
        *(th.nn.ReLU, th.optim.AdamW, FlattenExtractor, ProbabilisticEnsemble, np.dtype("float32")),
        *(NeverTerminates(), TipFalls(0.9), LinearRolloutSchedule(1, 5, 10, 20)),
        LeavesHealthyRange((HealthyRange(0, 1, 0.7, float("inf")), HealthyRange(2, None, -1.0, 1.0)), closed=True),
    ],
    ids=str,
)
def test_equal_again(value):
    assert there_and_back(value) == value and type(there_and_back(value)) is type(value)


def test_nan_and_numbers_of_numpy():
    assert np.isnan(there_and_back(float("nan")))
    assert type(there_and_back(np.float32(0.1))) is np.float32 and there_and_back(np.int64(3)) == 3


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint32", "int64", "float16", "float32", "float64"])
def test_arrays_bit_for_bit(dtype):
    for numbers in (np.arange(6).reshape(2, 3), np.zeros((0, 2)), np.array(1)):
        array = numbers.astype(dtype)
        again = there_and_back(array)
        assert again.dtype == array.dtype and again.shape == array.shape and again.tobytes() == array.tobytes()
    assert there_and_back(np.arange(3, dtype=">f8")).tolist() == [0, 1, 2]


def test_noise_goes_on_where_it_was():
    normal = NormalActionNoise(np.array([0.5, 1.0]), 0.2 * np.ones(2), dtype=np.float64)
    uhlenbeck = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2), theta=0.3, dt=0.1, initial_noise=np.ones(2))
    for noise in (normal, uhlenbeck, VectorizedActionNoise(uhlenbeck, 3)):
        np.random.seed(0)
        noise()
        again = there_and_back(noise)
        assert type(again) is type(noise)
        draws = []
        for one in (noise, again):
            np.random.seed(1)
            draws.append([one() for _ in range(3)])
            one.reset()
            draws[-1].append(one())
        assert np.array_equal(draws[0][:3], draws[1][:3]) and draws[0][0].dtype == draws[1][0].dtype


def test_schedules_of_the_learning_rate():
    for schedule in (
        ConstantSchedule(0.1),
        LearningRateSchedule(1e-3, 1e-4, 0.5),
        FloatSchedule(LearningRateSchedule(1, 0, 1)),
    ):
        again = there_and_back(schedule)
        assert type(again) is type(schedule) and [again(x) for x in (1, 0.6, 0)] == [schedule(x) for x in (1, 0.6, 0)]


class MyNoise(NormalActionNoise):
    pass


def a_function(x):
    return x


@pytest.mark.parametrize(
    "value",
    [
        a_function,
        lambda x: x,
        MyNoise,
        MyNoise(np.zeros(1), np.ones(1)),
        object(),
        2**600,
        {"a": a_function},
    ],
)
def test_what_the_caller_has_to_bring(value):
    """Saving goes on; loading says which argument to pass."""
    with pytest.raises(ValueError, match=r"argument(: a)? was .*pass your own: argument="):
        there_and_back(value)


def test_a_value_in_itself():
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="too many levels"):
        there_and_back(loop)


TIP = "sb3_mbpo.TipFalls"


@pytest.mark.parametrize(
    "hostile",
    [
        *(
            {"$class": name}
            for name in ("os.system", "torch.hub.load", "torch.nn.__class__", "builtins.eval", "", None, ["x"])
        ),
        *({"$object": [name, {}]} for name in ("subprocess.Popen", "sb3_mbpo.terminations.known.partial", 1, {}, None, [[]])),  # type: ignore[var-annotated]
        *({"$object": [TIP, {"height": height, "link": 0.6}]} for height in ("1", True, None, [1.0])),
        *({"$object": [TIP, fields]} for fields in ({"height": 1.0}, {"height": 1.0, "link": 1.0, "__class__": 1}, [], None)),  # type: ignore[var-annotated]
        *({"$object": content} for content in (TIP, [TIP], [TIP, {}, {}], None, 3)),
        {"$object": ["sb3_mbpo.LeavesHealthyRange", {"ranges": [], "closed": True, "finite": True}]},
        {"$object": ["sb3_mbpo.LeavesHealthyRange", {"ranges": {"$tuple": [1]}, "closed": True, "finite": True}]},
        *({"$object": ["ConstantSchedule", {"val": value}]} for value in (None, "x", {"$class": "torch.nn.ReLU"})),
        *({"$pickle": "gASVCQ=="}, {"$class": "torch.nn.ReLU", "more": 1}, {"$float": "1", "$int": "1"}, {"$": 1}),
        *({"$tuple": 3}, {"$tuple": "abc"}, {"$float": "1e999"}, {"$float": 1}, {"$dtype": "object"}, {"$dtype": "|V8"}),
        *({"$int": "9" * 200}, {"$int": 3}, {"$int": "x"}, {"$bytes": "?"}, {"$bytes": 3}, {"$scalar": ["<f4", "x"]}),
        *({"$scalar": ["|O", 1]}, {"$scalar": 3}, {"$scalar": ["|i1", 10**6]}, {"$set": [[]]}, {"$frozenset": [{"a": 1}]}),
        *({"$dict": 3}, {"$dict": [[1]]}, {"$dict": [[[], 1]]}, {"$counter": [[1, 2, 3]]}, {"$ordered_dict": {"a": 1}}),
        *({"$deque": [[], -1]}, {"$deque": [3, None]}, {"$deque": [[], "x"]}, {"$defaultdict": ["eval", []]}),
        *({"$tensor": content} for content in (3, ["a", "cpu"], [3, "cpu"], [None, None])),
        *({"$array": content} for content in (3, None, {}, {"dtype": "<f4", "shape": [1]}, ["dtype", "shape", "base64"])),
        *({"$array": {"dtype": "<f4", "shape": shape, "base64": "AAAAAA=="}} for shape in ([-1], [True], 1, [2], [1] * 40)),
        *({"$array": {"dtype": "<f4", "shape": [1], "base64": text}} for text in ("AAAA", "not base64!", 3, None)),
        {"$array": {"dtype": "<f4", "shape": [2**39, 2**39], "base64": ""}},
        *({"$array": {"dtype": dtype, "shape": [1], "base64": "AAAAAA=="}} for dtype in ("object", "|O", "<U1", None, [])),  # type: ignore[var-annotated]
        *({"$generator": content} for content in (3, ["PCG64", {}], ["os", {}], ["Random", 3], ["Generator", None])),
        {"$generator": [["PCG64"], {}]},
        *(2**64, -(2**63), float("nan"), float("inf"), b"bytes", {1, 2}),
        {"key": {"$class": "os.system"}},
        [{"$class": "os.system"}],
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_no_file_may_say(hostile):
    with pytest.raises(ValueError, match=r"^argument"):
        decode(hostile, where="argument", objects=True)


@pytest.mark.parametrize(
    "tensor",
    [
        *(th.zeros(1).expand(10**12), th.zeros(4)[::2], th.zeros(2, requires_grad=True), th.zeros(2).to_sparse()),
        *(th.zeros(2, device="meta"), "x", None),
    ],
    ids=str,
)
def test_a_tensor_that_is_not_plain(tensor):
    """It may be far larger than its file."""
    for hostile in ({"$tensor": ["a", "cpu"]}, {"$array": {"dtype": "<f4", "shape": [2], "tensor": "a"}}):
        with pytest.raises(ValueError, match=r"must be a plain tensor|no tensor 'a'"):
            decode(hostile, {"a": tensor})


def test_a_tensor_is_used_once():
    """A small file could otherwise fill the memory with copies."""
    with pytest.raises(ValueError, match="used twice"):
        decode([{"$tensor": ["a", "cpu"]}] * 2, {"a": th.zeros(2)})


@pytest.mark.parametrize("device", ["cuda:9999", "meta", "cpu:3", "nothing", None, 3])
def test_a_device_that_is_not_there(device):
    assert decode({"$tensor": ["a", device]}, {"a": th.ones(2)}).device.type == "cpu"


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox])
@pytest.mark.parametrize("place", [-5, 10**8, "x", None])
def test_a_generator_that_would_read_foreign_memory(kind, place):
    """NumPy takes such a state, and ends the process when it is drawn from."""
    encoded = through_json(encode(np.random.Generator(kind(0))))
    state = encoded["$generator"][1]
    (state["state"] if kind is np.random.MT19937 else state)["pos" if kind is np.random.MT19937 else "buffer_pos"] = place
    with pytest.raises(ValueError, match="damaged"):
        decode(encoded)


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_an_old_generator_that_would_read_foreign_memory(form):
    generator = np.random.RandomState(0)
    state = generator.get_state(legacy=form is not dict)
    if form is dict:
        state["state"]["pos"] = 10**8
    else:
        state = form([*state[:2], 10**8, *state[3:]])
    with pytest.raises(ValueError, match="damaged"):
        set_generator_state(generator, state)


def test_objects_only_where_they_are_expected():
    """A checkpoint holds plain values only."""
    for value in (th.nn.ReLU, TipFalls(0.9), spaces.Box(-1, 1, (2,)), np.dtype("float32")):
        with pytest.raises(CannotEncodeError, match="value"):
            encode(value, name="value")
        with pytest.raises(ValueError, match="unknown kind"):
            decode(encode(value, objects=True))


@pytest.mark.parametrize(
    "box",
    [
        spaces.Box(-1, 1, (3,)),
        spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        spaces.Box(np.array([-np.inf, 0.1]), np.array([1 / 3, np.inf]), dtype=np.float64),
        spaces.Box(0, 255, (4,), np.uint8),
        spaces.Box(-5, 2**40, (1,), np.int64),
        gym.make("InvertedPendulum-v5").observation_space,
        gym.make("Pendulum-v1").action_space,
    ],
    ids=str,
)
def test_spaces_bit_for_bit(box):
    again = there_and_back(box)
    assert again == box and again.dtype == box.dtype and again.low.tobytes() == box.low.tobytes()
    assert np.array_equal(again.bounded_below, box.bounded_below) and repr(again) == repr(
        spaces.Box(box.low, box.high, dtype=box.dtype)
    )


def box(low, high, dtype="<f4"):
    low, high = (encode(np.array(bound, np.float32)) for bound in (low, high))
    return {"$object": ["Box", {"low": low, "high": high, "dtype": {"$dtype": dtype}}]}


@pytest.mark.parametrize(
    "hostile", [box([np.nan, 0], [1, 1]), box([2, 0], [1, 1]), box([0], [1, 1]), box([0], [1], "<f8"), box([0], [1], "|O")]
)
def test_what_is_no_space(hostile):
    with pytest.raises(ValueError, match=r"^space"):
        decode(through_json(hostile), where="space", objects=True)


def test_a_transposed_tensor():
    """Parameters of a user's network may be one."""
    tensors: dict[str, th.Tensor] = {}
    encoded = encode(th.arange(6.0).view(3, 2).t(), tensors, "weight")
    assert th.equal(decode(encoded, tensors), th.arange(6.0).view(3, 2).t())
