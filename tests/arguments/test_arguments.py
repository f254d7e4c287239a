import collections
import inspect

import numpy as np
import pytest

from sb3_mbpo import MBPO
from sb3_mbpo.arguments import arguments


def test_resolve():
    assert arguments.resolve("collections.OrderedDict", "x") is collections.OrderedDict
    assert arguments.resolve(dict, "x") is dict and arguments.resolve(3, "x") == 3


@pytest.mark.parametrize("name", ["OrderedDict", "collections.NoSuchThing", "no_such_package.thing", ""])
def test_resolve_nothing(name):
    with pytest.raises(ValueError, match=r"dynamics_class='.*' must be an object or its dotted name"):
        arguments.resolve(name, "dynamics_class")


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        (np.int64(7), 1, 7),
        (np.float32(1e6), 1, 10**6),
        (np.float32(0.5), 0.1, 0.5),
        ("1e-3", 0.5, 1e-3),
        ("1e6", 1, 10**6),
        (1e6, 1, 10**6),
        ("7", 1, 7),
        (3, 0.5, 3),
        ([1], 1, [1]),
        (None, 1, None),
    ],
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
    with pytest.raises(ValueError, match=r"kwargs has no key 'rat'; dynamics_class=.*\.make takes rate, count, name"):
        arguments.check_keywords({"rat": 1}, make, "kwargs")
    with pytest.raises(ValueError, match="no key 'seed'"):
        arguments.check_keywords({"seed": 1}, make, "kwargs")
    with pytest.raises(ValueError, match=r"did you mean 'rate'\?"):
        arguments.check_keywords({"rat": 1}, make, "kwargs")
    for nothing in ([1], 0, "rate"):
        with pytest.raises(ValueError, match=r"kwargs=.* must be a mapping"):
            arguments.check_keywords(nothing, make, "kwargs")
    with pytest.raises(ValueError, match="kwargs has no key 3"):
        arguments.check_keywords({3: 1}, lambda **kwargs: None, "kwargs")
    assert arguments.check_keywords({"anything": 1}, lambda **kwargs: None, "kwargs") == {"anything": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e-3", 1e-3),
        ("1e6", 10**6),
        ("text", "text"),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (["8", {"a": "2"}], [8, {"a": 2}]),
        (("1", "step"), (1, "step")),
        (None, None),
    ],
)
def test_numbers_in(value, expected):
    result = arguments.numbers_in(value)
    assert result == expected and type(result) is type(expected)


def test_unknown_keywords():
    signature = inspect.signature(lambda policy, env, gamma=0.99: None)
    arguments.check_names({"gamma": 1}, signature, dict)
    with pytest.raises(TypeError, match=r"MBPO\(\) got an unexpected keyword argument 'gama'; did you mean 'gamma'\?"):
        arguments.check_names({"gama": 1}, signature, MBPO)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'xyz'$"):
        arguments.check_names({"xyz": 1}, signature, MBPO)
    arguments.check_names({"gama": 1}, inspect.signature(lambda **kwargs: None), MBPO)


@pytest.mark.parametrize("steps", [5, 5.0, "5", np.int32(5), np.float32(5)])
def test_forms_of_total_timesteps(steps):
    result = arguments.read_learn(steps, None, 4, None, True, False, False)
    assert result == 5 and type(result) is int
