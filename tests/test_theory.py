"""The bounds against numbers worked out by hand, in fractions; k* against brute force."""

import inspect
import math
from collections.abc import Callable
from fractions import Fraction as F
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mbpo import theory

# gamma = 1/2: 1 / (1 - gamma) = 2, 1 / (1 - gamma)^2 = 4. gamma = 9/10: 10 and 100.
HALF, NINE = F(1, 2), F(9, 10)

TABLE: list[tuple[Callable[..., Any], dict[str, Any], Any]] = [
    (theory.visitation_gap, {"model_error": F(1, 8), "gamma": HALF}, F(1, 4)),
    (theory.visitation_gap, {"model_error": F(1, 100), "gamma": NINE}, F(9, 10)),
    (theory.visitation_gap, {"model_error": 1, "gamma": 0}, 0),
    # Twice the visits' gap, at rewards of size 1 and of size 3.
    (theory.return_gap, {"model_error": F(1, 8), "gamma": HALF, "r_max": 1}, F(1, 2)),
    (theory.return_gap, {"model_error": F(1, 8), "gamma": HALF, "r_max": 3}, F(3, 2)),
    # 2 (1/2) 4 (1/8 + 2/16) + 4 (1/16) 2
    (theory.return_gap, {"model_error": F(1, 8), "policy_shift": F(1, 16), "gamma": HALF, "r_max": 1}, F(3, 2)),
    # 2 [(1/2)^(k+1) (1/16) 4 + ((1/2)^k + 2) (1/16) 2 + k (1/8 + 2/16) 2]
    (theory.branched_return_gap, {"k": 0}, 2 * (F(1, 8) + F(3, 8))),
    (theory.branched_return_gap, {"k": 1}, 2 * (F(1, 16) + F(5, 16) + F(1, 2))),
    (theory.branched_return_gap, {"k": 3}, 2 * (F(1, 64) + F(17, 64) + F(3, 2))),
    # 2 [(1/2)^(k+1) (1/16) 4 + (1/2)^k (1/16) 2 + k (1/8) 2]
    (theory.branched_return_gap_on_policy, {"k": 0}, 2 * (F(1, 8) + F(1, 8))),
    (theory.branched_return_gap_on_policy, {"k": 1}, 2 * (F(1, 16) + F(1, 16) + F(1, 4))),
    (theory.branched_return_gap_on_policy, {"k": 3}, 2 * (F(1, 64) + F(1, 64) + F(3, 4))),
    # 2 [(1/2)^(k+1) (1/16) 4 + (1/2)^k (1/8) 2 + k (1/8) 2]
    (theory.quoted_branched_return_gap, {"k": 0}, 2 * (F(1, 8) + F(1, 4))),
    (theory.quoted_branched_return_gap, {"k": 1}, 2 * (F(1, 16) + F(1, 8) + F(1, 4))),
    (theory.quoted_branched_return_gap, {"k": 3}, 2 * (F(1, 64) + F(1, 32) + F(3, 4))),
    # 2 [(1/2)^k (1/16) + (1 - (1/2)^k) (1/8)] 4
    (theory.sharp_branched_return_gap, {"k": 0}, F(1, 2)),
    (theory.sharp_branched_return_gap, {"k": 1}, F(3, 4)),
    (theory.sharp_branched_return_gap, {"k": 3}, F(15, 16)),
]
BRANCHED = {"model_error": F(1, 8), "policy_shift": F(1, 16), "gamma": HALF, "r_max": 1}


@pytest.mark.parametrize(("bound", "arguments", "expected"), TABLE)
def test_by_hand(bound: Callable[..., Any], arguments: dict[str, Any], expected: Any) -> None:
    if "k" in arguments:
        arguments = BRANCHED | arguments
    assert bound(**arguments) == expected
    # NumPy's numbers are numbers.
    rounded = {name: np.float64(value) if name != "k" else np.int64(value) for name, value in arguments.items()}
    assert bound(**rounded) == pytest.approx(float(expected), rel=1e-12)


FRACTIONS = st.fractions(0, 1, max_denominator=50)
DISCOUNTS = st.fractions(0, F(49, 50), max_denominator=50)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(k=st.integers(0, 30), model_error=FRACTIONS, policy_shift=FRACTIONS, gamma=DISCOUNTS)
def test_how_the_bounds_lie(k: int, model_error: Any, policy_shift: Any, gamma: Any) -> None:
    """What the docstrings say about one bound beside another, without any rounding."""
    errors = {"model_error": model_error, "policy_shift": policy_shift}
    known = {**errors, "gamma": gamma, "r_max": 1}
    on_policy = theory.branched_return_gap_on_policy(k=k, **known)
    sharp = theory.sharp_branched_return_gap(k=k, **known)
    assert sharp <= on_policy <= theory.branched_return_gap(k=k, **known) <= theory.branched_return_gap(k=k + 1, **known)
    quoted = theory.quoted_branched_return_gap(k=k, **known)
    # Where gamma^k is 0, so is the term in which they differ.
    assert (quoted >= on_policy) == (model_error >= policy_shift or gamma**k == 0)
    ends = [2 * error / (1 - gamma) ** 2 for error in (policy_shift, model_error)]
    assert min(ends) <= sharp <= max(ends)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(model_error=FRACTIONS, policy_shift=FRACTIONS, gamma=DISCOUNTS, longest=st.integers(0, 60))
def test_optimal_length_is_the_argmin(model_error: Any, policy_shift: Any, gamma: Any, longest: int) -> None:
    errors = {"model_error": model_error, "policy_shift": policy_shift, "gamma": gamma}
    bounds = [theory.branched_return_gap_on_policy(k=k, r_max=1, **errors) for k in range(longest + 1)]
    assert theory.optimal_rollout_length(**errors, longest=longest) == bounds.index(min(bounds))


@pytest.mark.parametrize(
    ("model_error", "policy_shift", "gamma", "expected"),
    [
        # 0.9^15 = 0.206, 0.9^16 = 0.185; one fifth is between
        (0.01, 0.05, 0.9, 16),
        (0.25, 0.5, 0.5, 1),
        # Equal errors, and none at all: nothing to gain
        (0.3, 0.3, 0.99, 0),
        (0.0, 0.0, 0.99, 0),
        (0.3, 0.0, 0.99, 0),
        # One step ends all that the policy's shift can do.
        (0.1, 0.5, 0.0, 1),
        # A perfect model
        (0.0, 0.5, 0.99, 10_000),
        (0.0, 0.5, 0.5, 10_000),
        (0.0, 0.5, 0.0, 1),
    ],
)
def test_optimal_length(model_error: float, policy_shift: float, gamma: float, expected: int) -> None:
    assert theory.optimal_rollout_length(model_error=model_error, policy_shift=policy_shift, gamma=gamma) == expected


def test_optimal_length_near_no_discount() -> None:
    """The argmin is between that of a continuous k and one more: a convex function's is."""
    for gamma in (0.99, 0.9999, 1 - 1e-8):
        continuous = math.log(0.01 * (1 - gamma) / (0.02 * -math.log(gamma))) / math.log(gamma)
        k = theory.optimal_rollout_length(model_error=0.01, policy_shift=0.02, gamma=gamma, longest=10**9)
        assert abs(k - continuous) <= 1
        assert k == pytest.approx(math.log(2) / (1 - gamma), rel=0.01)
    nearly_one = math.nextafter(1, 0)
    assert theory.optimal_rollout_length(model_error=0.01, policy_shift=0.02, gamma=nearly_one) == 10_000
    assert math.isfinite(theory.return_gap(model_error=1, policy_shift=1, gamma=nearly_one, r_max=1))


VALID = {"k": 3, "longest": 3, "model_error": 0.1, "policy_shift": 0.2, "gamma": 0.9, "r_max": 2.0}
FUNCTIONS = [function for name, function in vars(theory).items() if inspect.isfunction(function) and not name.startswith("_")]
INVALID = [
    *(("k", value) for value in (-1, 1.0, 0.5, True, None, "2", 10**9 + 1, float("nan"))),
    *(("longest", value) for value in (-1, 1.5, True)),
    *(("model_error", value) for value in (-0.1, 1.1, float("nan"), "0.1", None, False, 1j)),
    *(("policy_shift", value) for value in (-1e-9, 2, float("inf"))),
    *(("gamma", value) for value in (1, 1.0, -0.1, float("nan"), "auto", [0.9])),
    *(("r_max", value) for value in (-1, float("inf"), float("nan"), None)),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("name", "value"), INVALID)
def test_refusals_name_argument_value_and_range(function: Callable[..., Any], name: str, value: Any) -> None:
    taken = inspect.signature(function).parameters
    arguments = {key: VALID[key] for key in taken}
    assert math.isfinite(function(**arguments))
    if name in taken:
        with pytest.raises(ValueError) as error:
            function(**arguments | {name: value})
        assert str(error.value).startswith(f"{name}={value!r} must be a ")
