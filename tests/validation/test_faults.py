import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_mbpo import InvalidTransition
from sb3_mbpo.validation.faults import (
    LIMIT,
    RESET_API,
    STEP_API,
    fault_of_api,
    flag_fault,
    observation_fault,
    reward_fault,
)

FLOAT32, FLOAT64, INT64, UINT8 = (np.dtype(name) for name in ("float32", "float64", "int64", "uint8"))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize(
    "obs",
    [
        np.array([1.0, -2.0], np.float32),
        np.array([1.0, -2.0]),
        np.array([1e30, -1e38], np.float32),
        np.array([1e30, -LIMIT]),
        np.array([1.0, -2.0], np.float16),
        np.array([6e4, -6e4], np.float16),
        np.array([1, 2], np.int32),
        np.array([True, False]),
        [1.0, -2.0],
        (1, 2),
        [np.float32(1), 2],
        th.tensor([1.0, -2.0]),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in dot")  # of float32 beyond 1e19: looked at again, more slowly
def test_observations_that_sb3_casts_are_fine(obs, dtype):
    assert observation_fault(obs, (2,), dtype) == ""


@pytest.mark.parametrize("obs", [np.array([1, 2]), np.array([1.0, 2.0]), [1, 2], np.array([1, 2], np.uint8)])
def test_whole_numbers_go_into_a_space_of_integers(obs):
    assert observation_fault(obs, (2,), INT64) == observation_fault(obs, (2,), UINT8) == ""


@pytest.mark.parametrize(
    ("obs", "expected"),
    [
        ([np.nan, 0, 1], "1 of 3 dimensions: [0] = nan"),
        ([0, np.inf, -np.inf], "2 of 3 dimensions: [1] = inf, [2] = -inf"),
        # Finite, but not to a network.
        ([0, 0, 1e39], "1 of 3 dimensions: [2] = 1e+39"),
        ([0, 0, np.nextafter(1e154, np.inf)], "[2] = "),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, list])
def test_not_finite(obs, expected, kind):
    fault = observation_fault(kind(obs), (3,), FLOAT64)
    assert "not finite" in fault and expected in fault


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_not_finite_in_any_precision_and_place(value, dtype):
    for place in range(7):
        obs = np.ones(7, dtype)
        obs[place] = value
        assert f"1 of 7 dimensions: [{place}] = {value}" in observation_fault(obs, (7,), FLOAT32)


def test_dimensions_of_a_matrix_are_named_and_many_are_cut():
    obs = np.zeros((2, 5))
    obs[1] = np.nan
    obs[0, 3:] = np.inf
    fault = observation_fault(obs, (2, 5), FLOAT32)
    assert "7 of 10 dimensions: [0, 3] = inf, [0, 4] = inf, [1, 0] = nan" in fault and "[1, 3] = nan, ..." in fault
    assert "[1, 4]" not in fault


@pytest.mark.parametrize(
    ("obs", "shape"),
    [(np.zeros(1), (1,)), (np.zeros((1, 3)), (1, 3)), (np.zeros((3, 1)), (3, 1)), (0.5, ()), ([0.0] * 4, (4,))],
)
def test_shapes_that_would_be_spread_or_cut(obs, shape):
    assert f"has shape {shape} and not (3,)" in observation_fault(obs, (3,), FLOAT32)


@pytest.mark.parametrize(
    ("obs", "dtype"),
    [
        (np.array(["1", "2"]), "<U1"),
        (np.array([1, None]), "object"),
        (np.array([1j, 2]), "complex128"),
        ({"position": 1}, "object"),
        (None, "object"),
    ],
)
def test_what_is_no_number(obs, dtype):
    assert f"has dtype {dtype} and not float32" in observation_fault(obs, (2,), FLOAT32)


def test_what_is_no_array():
    assert "is not an array: [[1, 2], [3]]" in observation_fault([[1, 2], [3]], (2,), FLOAT32)


@pytest.mark.parametrize(("obs", "dtype"), [([0.5, 1], INT64), ([-1, 1], UINT8), ([256, 1], UINT8), ([1e30, 1], INT64)])
def test_what_integers_cannot_hold(obs, dtype):
    fault = observation_fault(np.array(obs), (2,), dtype)
    assert f"cannot be cast to {dtype} in 1 of 2 dimensions: [0] = " in fault
    assert "not finite" in observation_fault(np.array([np.nan, 1]), (2,), dtype)


@pytest.mark.parametrize(
    "reward", [1.0, -3, True, np.float32(1), np.float64(1e38), np.array(2.0), np.int64(1), th.tensor(1.0)]
)
def test_rewards_that_are_scalars(reward):
    assert reward_fault(reward) == ""


@pytest.mark.parametrize(
    "reward", [np.nan, np.inf, -np.inf, 1e39, -1e300, np.float32(np.nan), np.array(np.inf), Fraction(10**400)]
)
def test_rewards_that_are_not_finite(reward):
    assert "is not finite in float32: " in reward_fault(reward)


@pytest.mark.parametrize("reward", [None, np.array([1.0]), np.zeros(2), [1.0], "1.0", 1j, {}, [[1], [2, 3]]])
def test_rewards_that_are_no_scalars(reward):
    assert "must be a scalar, but is " in reward_fault(reward) and "Return float(reward)" in reward_fault(reward)


@pytest.mark.parametrize("flag", [True, np.bool_(False), 0, 1, 0.0, np.int64(1), np.array(True), th.tensor(False)])
def test_flags(flag):
    assert flag_fault(flag) == ""


@pytest.mark.parametrize("flag", [None, np.nan, 2, -1, 0.5, "False", "", np.array([True]), [], np.zeros(3), {}, [[1], [2, 3]]])
def test_what_is_neither_true_nor_false(flag):
    assert "must be true or false, but is " in flag_fault(flag) and "Return a bool" in flag_fault(flag)


def test_error_says_where_and_survives_pickling():
    error = InvalidTransition("the reward is bad", 3, 120)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ValueError)
    for one in (error, again):
        assert (one.fault, one.env_index, one.step) == ("the reward is bad", 3, 120)
        assert str(one) == "env 3, after 120 steps: the reward is bad"
    assert str(InvalidTransition("the reward is bad", 3)) == "env 3: the reward is bad"


def raised_in(module: str, code: str) -> Exception:
    scope: dict[str, Any] = {"__name__": module}
    exec(f"def call():\n    {code}", scope)
    try:
        scope["call"]()
    except Exception as error:
        return error
    raise AssertionError("nothing raised")


def test_whose_fault_an_exception_is():
    four = "a, b, c, d, e = (1, 2, 3, 4)"
    one = "obs, info = [1]"
    none = "float(None)"
    monitor = "stable_baselines3.common.monitor"
    for module in (monitor, "gymnasium.wrappers.common", "stable_baselines3.common.vec_env.dummy_vec_env"):
        assert fault_of_api(raised_in(module, four), STEP_API) == STEP_API
        assert fault_of_api(raised_in(module, one), RESET_API) == RESET_API
    assert "reward must be a scalar" in fault_of_api(raised_in(monitor, none), STEP_API)
    for code in ("import numpy; numpy.ones(2) or 1", "import torch; torch.ones(2) or 1"):
        assert "terminated and truncated must be true or false" in fault_of_api(raised_in(monitor, code), STEP_API)
        assert fault_of_api(raised_in("my_env", code), STEP_API) == ""
    assert fault_of_api(raised_in(monitor, "raise RuntimeError('Tried to step environment that needs reset')"), STEP_API) == ""
    # The env's own.
    assert fault_of_api(raised_in("my_env", four), STEP_API) == fault_of_api(raised_in("my_env", none), STEP_API) == ""
    assert (
        fault_of_api(raised_in("gymnasium.envs.x", none), STEP_API) == fault_of_api(raised_in(monitor, none), RESET_API) == ""
    )
    assert fault_of_api(ValueError("never raised: values to unpack"), STEP_API) == ""
