import json

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from stable_baselines3.common.utils import LinearSchedule as LearningRateSchedule

from sb3_mbpo import LinearRolloutSchedule, ProbabilisticEnsemble
from sb3_mbpo.saving.plain_values import decode, decode_box, encode, encode_box
from sb3_mbpo.terminations.known import HealthyRange, LeavesHealthyRange, NeverTerminates, TipFalls


def through_json(encoded):
    return json.loads(json.dumps(encoded, allow_nan=False))


def there_and_back(value):
    return decode(through_json(encode(value)), "argument")


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
    assert there_and_back(np.float32(0.1)) == float(np.float32(0.1)) and there_and_back(np.int64(3)) == 3


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
        {1: 2},
        {":x": 1},
        2**70,
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


@pytest.mark.parametrize(
    "hostile",
    [
        *({":class:": name} for name in ("os.system", "torch.hub.load", "torch.nn.__class__", "builtins.eval", "")),
        *({":class:": None}, {":class:": ["x"]}),
        *({":object:": name, "arguments": {}} for name in ("subprocess.Popen", "sb3_mbpo.terminations.known.partial")),
        *({":object:": 1, "arguments": {}}, {":object:": {}, "arguments": {}}),
        {":object:": "sb3_mbpo.terminations.known.TipFalls", "arguments": {"height": "1", "link": 0.6}},
        {":object:": "sb3_mbpo.terminations.known.TipFalls", "arguments": {"height": True, "link": 0.6}},
        {":object:": "sb3_mbpo.terminations.known.TipFalls", "arguments": {"height": 1.0}},
        {":object:": "sb3_mbpo.terminations.known.TipFalls", "arguments": {"height": 1.0, "link": 1.0, "__class__": 1}},
        {":object:": "sb3_mbpo.terminations.known.TipFalls"},
        {
            ":object:": "sb3_mbpo.terminations.known.LeavesHealthyRange",
            "arguments": {"ranges": [], "closed": True, "finite": True},
        },
        {
            ":object:": "sb3_mbpo.terminations.known.LeavesHealthyRange",
            "arguments": {"ranges": {":tuple:": [1]}, "closed": True, "finite": True},
        },
        {":object:": "stable_baselines3.common.utils.ConstantSchedule", "arguments": {"val": None}},
        *({":serialized:": "gASVCQ=="}, {":type:": "x", ":serialized:": "gASVCQ=="}, {":class:": "torch.nn.ReLU", "more": 1}),
        *({":tuple:": 3}, {":tuple:": "abc"}, {":float:": "1e999"}, {":float:": 1}, {":dtype:": "object"}, {":dtype:": "V8"}),
        *({":array:": 3}, {":array:": {"dtype": "float32", "shape": [2**39, 2**39], "base64": ""}}),
        {":array:": {"dtype": "float32", "shape": [1], "base64": "AAAA"}},
        {":array:": {"dtype": "float32", "shape": [-1], "base64": "AAAAAA=="}},
        {":array:": {"dtype": "float32", "shape": [True], "base64": "AAAAAA=="}},
        {":array:": {"dtype": "float32", "shape": 1, "base64": "AAAAAA=="}},
        {":array:": {"dtype": "float32", "shape": [1], "base64": "not base64!"}},
        {":array:": {"dtype": "float32", "shape": [1], "base64": 3}},
        {":array:": {"dtype": "object", "shape": [1], "base64": "AAAAAA=="}},
        *(2**64, float("nan"), float("inf"), b"bytes"),
        {"key": {":class:": "os.system"}},
        [{":class:": "os.system"}],
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_no_file_may_say(hostile):
    with pytest.raises(ValueError, match=r"^argument"):
        decode(hostile, "argument")


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
    again = decode_box(through_json(encode_box(box)), "space")
    assert again == box and again.dtype == box.dtype and again.low.tobytes() == box.low.tobytes()
    assert np.array_equal(again.bounded_below, box.bounded_below) and repr(again) == repr(
        spaces.Box(box.low, box.high, dtype=box.dtype)
    )


GOOD = encode_box(spaces.Box(-1, 1, (2,)))


@pytest.mark.parametrize(
    "hostile",
    [
        *(None, [], {}, {**GOOD, "more": 1}, {**GOOD, "low": 3}, {**GOOD, "dtype": "float64"}, {**GOOD, "dtype": "object"}),
        *({**GOOD, "low": encode(np.array([np.nan, 0], np.float32))}, {**GOOD, "low": encode(np.array([2, 0], np.float32))}),
        *({**GOOD, "low": encode(np.array([0], np.float32))}, {**GOOD, "high": {":class:": "torch.nn.ReLU"}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_space(hostile):
    with pytest.raises(ValueError, match=r"^space"):
        decode_box(hostile, "space")
