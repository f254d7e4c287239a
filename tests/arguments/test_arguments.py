import collections
import inspect

import numpy as np
import pytest

from sb3_mbpo import MBPO, ProbabilisticEnsemble
from sb3_mbpo.arguments import arguments
from sb3_mbpo.validation import rules
from sb3_mbpo.validation.argument_table import LEARN_ARGUMENTS


def test_resolve():
    assert rules.resolve("collections.OrderedDict") is collections.OrderedDict
    assert rules.resolve(dict) is dict and rules.resolve(3) == 3


@pytest.mark.parametrize("name", ["OrderedDict", "collections.NoSuchThing", "no_such_package.thing", "", ".a.b", "."])
def test_resolve_nothing(name):
    with pytest.raises(ValueError, match=r"^fn='.*' must be a function, or its dotted name"):
        rules.imported("a function").read("fn", name)


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
        (0, True, 0),
        ("7", "text", "7"),
    ],
)
def test_arguments_without_a_row(value, default, expected):
    result = rules.read_all({"x": value}, {}, defaults={"x": default})["x"]
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "default"),
    [("many", 1), ("auto", 0.5), ("1.5", 1), (2.5, 1), ("nan", 1), ("inf", 1), ("false", True), (2, True), (None, True)],
)
def test_what_does_not_fit_the_default(value, default):
    with pytest.raises(ValueError, match=rf"^mine: x=.* must be .*\. The default is {default}$"):
        rules.read_all({"x": value}, {}, "mine: ", {"x": default})


class Bolder(MBPO):
    """With an argument of a user's own."""

    def __init__(self, *args, boldness: float = 0.5, **kwargs):
        self.boldness = boldness
        super().__init__(*args, **kwargs)


def test_arguments_of_a_users_algorithm():
    kwargs = {"policy": "MlpPolicy", "env": "Pendulum-v1", "buffer_size": 10}
    assert Bolder(**kwargs, boldness="1e-3").boldness == 1e-3
    with pytest.raises(ValueError, match=r"boldness=.high. must be a number\. The default is 0\.5"):
        Bolder(**kwargs, boldness="high")


class Named(ProbabilisticEnsemble):
    """A dynamics with a text that may look like a number."""

    def __init__(self, *args, name: str = "x", **kwargs):
        self.name = name
        super().__init__(*args, **kwargs)


def test_text_for_a_users_dynamics_stays_text():
    kwargs = {"name": "7", "max_updates": 100, "net_arch": [8], "weight_decays": ["1e-5", "1e-4"]}
    dynamics = MBPO("MlpPolicy", "Pendulum-v1", dynamics_class=Named, dynamics_kwargs=kwargs, buffer_size=10).dynamics
    assert (dynamics.name, dynamics.max_updates, dynamics.weight_decays) == ("7", 100, [1e-5, 1e-4])


def test_policy_kwargs_that_are_mappings():
    with pytest.raises(ValueError, match="policy_kwargs: optimizer_kwargs=3 must be None or a mapping"):
        MBPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"optimizer_kwargs": 3})


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
    assert arguments.check_keywords({"anything": ["1"]}, lambda **kwargs: None, "kwargs") == {"anything": [1]}


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
    result = rules.numbers_in(value)
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
    result = LEARN_ARGUMENTS["total_timesteps"].read("total_timesteps", steps)
    assert result == 5 and type(result) is int
