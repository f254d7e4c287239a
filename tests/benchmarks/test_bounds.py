"""The bounds of sb3_mbpo.theory on finite MDPs: those that hold, and by hand those that do not hold as they are printed."""

from fractions import Fraction as F
from typing import Any

import numpy as np
import pytest
from bounds import CHECKS, Space, gaps_and_bounds, judged
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tabular import Pairs, leaky, total_variation

from sb3_mbpo import theory

STATES = ACTIONS = 2
# As printed; each has its counterexample below.
FAIL = [("r(s, a, s')", name) for name in ("return_gap without policy_shift", "return_gap", "quoted_branched_return_gap")]
HOLD = [(rewards, name) for rewards, checks in CHECKS.items() for name in checks if (rewards, name) not in FAIL]


def distributions(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Of small whole weights: zeros, ones and ties are as likely as anything."""
    weights = arrays(int, (1, *shape), elements=st.integers(0, 3))
    return weights.map(lambda drawn: (drawn + (drawn.sum(-1, keepdims=True) == 0)).astype(float)).map(
        lambda drawn: drawn / drawn.sum(-1, keepdims=True)
    )


@st.composite
def pairs(draw: st.DrawFn, rewards: str = "r(s, a, s')") -> Pairs:
    sizes = (STATES, ACTIONS, STATES)
    true, other = draw(distributions(*sizes)), draw(distributions(*sizes))
    policy, other_policy = draw(distributions(*sizes[:2])), draw(distributions(*sizes[:2]))
    shares = st.sampled_from([0.01, 0.1, 0.5, 1.0])
    seen = arrays(int, (1, STATES, ACTIONS, STATES if rewards == "r(s, a, s')" else 1), elements=st.integers(-1, 1))
    return Pairs(
        start=draw(distributions(STATES)),
        true=true,
        model=true + draw(shares) * (other - true),
        rewards=draw(seen).astype(float),
        policy=policy,
        data_policy=policy + draw(shares) * (other_policy - policy),
        gamma=draw(st.sampled_from([0.1, 0.5, 0.9])),
    )


@pytest.mark.parametrize(("rewards", "name"), HOLD)
def test_no_gap_is_beyond_its_bound(rewards: str, name: str) -> None:
    """With the model's error in the mean, and so with the largest too: it is never less, and every bound grows with it."""

    @settings(derandomize=True, max_examples=60, deadline=None, database=None)
    @given(case=pairs(rewards), k=st.integers(0, 6))
    def holds(case: Pairs, k: int) -> None:
        gap, bound = gaps_and_bounds(CHECKS[rewards][name], case, k, "mean")
        assert not judged(gap, bound)[1].any(), (gap, bound)
        assert bound[0] <= gaps_and_bounds(CHECKS[rewards][name], case, k, "largest")[1][0] + 1e-12

    holds()


def by_definition(case: Pairs, k: int, steps: int = 60) -> float:
    """The branched return, a transition at a time, in loops."""
    total = 0.0
    for t in range(steps):
        imagined = min(t + 1, k)
        state, reward = case.start[0], 0.0
        for number in range(t + 1):
            real = number < t + 1 - imagined
            dynamics = (case.true if real else case.model)[0]
            policy = (case.data_policy if real else case.policy)[0]
            after, reward = np.zeros(STATES), 0.0
            for s in range(STATES):
                for a in range(ACTIONS):
                    for to in range(STATES):
                        weight = state[s] * policy[s, a] * dynamics[s, a, to]
                        after[to] += weight
                        reward += weight * case.rewards[0, s, a, to]
            state = after
        total += case.gamma**t * reward
    return total


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_returns_are_those_of_the_definition(k: int) -> None:
    space = Space(STATES, ACTIONS, "r(s, a, s')", scale=2.0, gamma=0.5)
    case = space.pairs(space.draw(1, np.random.default_rng(k)))
    assert case.branched_value(k)[0] == pytest.approx(by_definition(case, k), rel=1e-10)
    assert case.value(case.true, case.data_policy)[0] == pytest.approx(by_definition(case, 0), rel=1e-10)
    # Long enough branches are full rollouts.
    assert case.value(case.model, case.policy)[0] == pytest.approx(by_definition(case, 60), rel=1e-10)
    assert case.branched_value(60)[0] == pytest.approx(by_definition(case, 60), rel=1e-10)


def test_errors_and_visits() -> None:
    """Two states that take turns, until the model stays; the worst error is at every second step."""
    true, model = np.zeros((1, 2, 1, 2)), np.zeros((1, 2, 1, 2))
    true[0, :, 0] = np.array([[0, 1], [1, 0]])
    model[0, :, 0] = np.array([[0, 1], [0.25, 0.75]])
    only = np.ones((1, 2, 1))
    case = Pairs(np.array([[1.0, 0.0]]), true, model, np.zeros((1, 2, 1, 1)), only, only, 0.5)
    assert case.largest_error() == case.mean_error(only) == 0.75
    assert case.policy_shift() == 0
    # 1 + 1/4 + ..., and half of it
    assert case.visits(case.chain(true, only)[0]) == pytest.approx(np.array([[4 / 3, 2 / 3]]))
    # From an even start every step meets both.
    even = Pairs(np.array([[0.5, 0.5]]), true, model, case.rewards, only, only, 0.5)
    assert even.mean_error(only) == 0.375
    assert total_variation(np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])) == 0.5


def leaky_gap(fall: Any, gamma: Any, k: int = 0) -> Any:
    """
    Exact difference between the returns of :func:`tabular.leaky` without a fall and with one, of probability ``fall``, in each
    transition, but for the last k.

    Kept up: v = 1 / (1 - gamma). Else v = (1 - fall) (1 + gamma v) - fall / (1 - gamma). The last k push all back by k steps.
    """
    value = ((1 - fall) - fall / (1 - gamma)) / (1 - gamma * (1 - fall))
    assert value == (1 - fall) * (1 + gamma * value) - fall / (1 - gamma)
    return gamma**k * (1 / (1 - gamma) - value)


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize(("gamma", "shift", "gap", "quoted"), [
    (F(1, 2), F(1, 2), F(8, 3), F(2)),
    (F(9, 10), F(1, 100), F(200, 109), F(9, 5)),
])  # fmt: skip
def test_the_quoted_form_fails_for_a_perfect_model(gamma: Any, shift: Any, gap: Any, quoted: Any, k: int) -> None:
    assert leaky_gap(shift, gamma, k) == gamma**k * gap
    known: dict[str, Any] = {"k": k, "model_error": F(0), "policy_shift": shift, "gamma": gamma, "r_max": 1}
    assert theory.quoted_branched_return_gap(**known) == gamma**k * quoted < gamma**k * gap
    assert gamma**k * gap <= theory.sharp_branched_return_gap(**known) == theory.branched_return_gap_on_policy(**known)
    assert leaky(0.0, float(shift), float(gamma)).branched_return_gap(k)[0] == pytest.approx(float(gamma**k * gap))


def test_the_quoted_form_fails_in_one_state() -> None:
    """The policy always earns 1, the data's policy -1: with a perfect model, at k = 0, where all is the data's."""
    gamma = F(1, 4)
    gap = (1 - -1) / (1 - gamma)
    known: dict[str, Any] = {"k": 0, "model_error": F(0), "policy_shift": F(1), "gamma": gamma, "r_max": 1}
    assert gap == F(8, 3) > theory.quoted_branched_return_gap(**known) == F(8, 9)
    assert theory.branched_return_gap_on_policy(**known) == F(32, 9)
    stay = np.ones((1, 1, 2, 1))
    case = Pairs(
        np.ones((1, 1)), stay, stay, np.array([[[[1.0], [-1.0]]]]), np.array([[[1.0, 0]]]), np.array([[[0, 1.0]]]), 0.25
    )
    assert case.branched_return_gap(0)[0] == pytest.approx(float(gap))


@pytest.mark.parametrize(("gamma", "error", "gap", "printed", "mended"), [
    (F(1, 2), F(1, 2), F(8, 3), F(2), F(4)),
    (F(9, 10), F(1, 100), F(200, 109), F(9, 5), F(2)),
])  # fmt: skip
def test_full_rollouts_fail_where_rewards_depend_on_the_next_state(
    gamma: Any, error: Any, gap: Any, printed: Any, mended: Any
) -> None:
    assert leaky_gap(error, gamma) == gap
    assert theory.return_gap(model_error=error, gamma=gamma, r_max=1) == printed < gap
    assert gap <= printed + 2 * error / (1 - gamma) == mended
    assert leaky(float(error), 0.0, float(gamma)).return_gap()[0] == pytest.approx(float(gap))


@pytest.mark.parametrize("k", [0, 1, 10])
def test_the_sharp_bound_is_attained_to_first_order(k: int) -> None:
    ratios = []
    for error in (1e-3, 1e-5):
        bound = theory.sharp_branched_return_gap(k=k, model_error=error, policy_shift=error / 2, gamma=0.9, r_max=1)
        ratios.append(leaky(error, error / 2, 0.9).branched_return_gap(k)[0] / bound)
    assert ratios[0] < ratios[1] <= 1
    assert ratios[1] == pytest.approx(1, abs=1e-4)
