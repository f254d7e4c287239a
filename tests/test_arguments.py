import collections

import numpy as np
import pytest
from gymnasium import spaces

from sb3_mbpo import arguments


def test_resolve():
    assert arguments.resolve("collections.OrderedDict", "x") is collections.OrderedDict
    assert arguments.resolve(dict, "x") is dict and arguments.resolve(3, "x") == 3


@pytest.mark.parametrize("name", ["OrderedDict", "collections.NoSuchThing", "no_such_package.thing", ""])
def test_resolve_nothing(name):
    with pytest.raises(ValueError, match=r"dynamics_class='.*' must be an object or its dotted name"):
        arguments.resolve(name, "dynamics_class")


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [("1e-3", 0.5, 1e-3), ("1e6", 1, 10**6), (1e6, 1, 10**6), ("7", 1, 7), (3, 0.5, 3), ([1], 1, [1]), (None, 1, None)],
)
def test_as_number(value, default, expected):
    result = arguments.as_number(value, "x", default)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(("value", "default"), [("many", 1), ("auto", 0.5), ("1.5", 1), (2.5, 1), ("nan", 1), ("inf", 1)])
def test_no_number(value, default):
    with pytest.raises(ValueError, match=r"batch_size=.* must be a"):
        arguments.as_number(value, "batch_size", default)


def test_keywords():
    def make(a, *, rate: float = 0.1, count: int = 2, name="x", seed=None):
        pass

    assert arguments.check_keywords({"rate": "1e-2", "count": "3", "name": "1"}, make, "kwargs") == {
        "rate": 0.01,
        "count": 3,
        "name": "1",
    }
    with pytest.raises(ValueError, match="kwargs has no key 'rat'; make takes rate, count, name"):
        arguments.check_keywords({"rat": 1}, make, "kwargs")
    with pytest.raises(ValueError, match="no key 'seed'"):
        arguments.check_keywords({"seed": 1}, make, "kwargs")
    with pytest.raises(ValueError, match="must be a mapping"):
        arguments.check_keywords([1], make, "kwargs")
    assert arguments.check_keywords({"anything": 1}, lambda **kwargs: None, "kwargs") == {"anything": 1}


BOX = spaces.Box(-1, 1, (3,), np.float32)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Dict({"a": BOX}), BOX, "Dict.*FlattenObservation"),
        (spaces.Discrete(3), BOX, "observation space Discrete"),
        (spaces.MultiBinary(3), BOX, "observation space MultiBinary"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), BOX, "no image"),
        (BOX, spaces.Discrete(2), "action space Discrete.*use DQN or PPO"),
        (BOX, spaces.MultiDiscrete([2, 3]), "action space MultiDiscrete"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "unbounded.*finite low and high"),
        (BOX, spaces.Box(np.zeros(2, np.float32), np.array([1, np.inf], np.float32)), "unbounded"),
        (BOX, spaces.Box(np.zeros(2, np.float32), np.array([1, 0], np.float32)), "low = high.*TransformAction"),
    ],
)
def test_refused_spaces(observation_space, action_space, message):
    with pytest.raises(ValueError, match=f"env: (?s:.*){message}"):
        arguments.check_spaces(observation_space, action_space)


def test_accepted_spaces():
    arguments.check_spaces(spaces.Box(-np.inf, np.inf, (2, 3), np.float64), spaces.Box(-2, 5, (2, 2)))
    arguments.check_spaces(spaces.Box(0, 9, (4,), np.int64), BOX)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "three", None])
def test_counts(value):
    with pytest.raises(ValueError, match=r"retained_rollouts=.* whole number of at least 1"):
        arguments.check_counts(retained_rollouts=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "half", None, True])
def test_ratios(value):
    with pytest.raises(ValueError, match=r"real_ratio=.* between 0"):
        arguments.check_ratio("real_ratio", value)


def test_legal_counts_and_ratios():
    arguments.check_counts(a=1, b=np.int64(5))
    for value in (0, 1, 0.05, np.float32(0.5)):
        arguments.check_ratio("real_ratio", value)
