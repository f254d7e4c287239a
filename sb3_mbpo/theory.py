"""
The return bounds of Janner et al., 2019 (arXiv 1906.08253), as functions.

All bounds compare discounted returns, eta = E sum over t of gamma^t r_t, with the same distribution of first states: eta[pi]
is the return of the policy in the true MDP, eta_hat[pi] that in the model, and eta_k that of k-branched rollouts, which follow
the data's policy pi_D in the true MDP and then pi in the model for the last k steps.

``k``
    number of steps in the model
``model_error``
    eps_m, the total variation (half the L1 distance) between true and predicted outcomes of a state and action: the mean over
    the states and actions of a policy at time t of the true MDP, for the worst t. Each theorem names the policy. The maximum
    over all states and actions is never smaller, so it may be passed instead.
``policy_shift``
    eps_pi = max over s of TV(pi(.|s), pi_D(.|s))
``gamma``
    the discount factor, below 1
``r_max``
    the maximum absolute reward

Arguments and results are plain numbers. With fractions, the result is exact. A ``ValueError`` is raised for an argument out of
range. docs/theory tests each bound, and shows which additional conditions two of them need.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

# Larger than any horizon, and exact as a float.
MOST_STEPS = 10**9

# Argument -> type, condition, end of the error message
_VALID: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "k": (Integral, lambda value: 0 <= value <= MOST_STEPS, f"a whole number from 0 to {MOST_STEPS:,}"),
    "model_error": (Real, lambda value: 0 <= value <= 1, "a number from 0 to 1, a total variation: half the L1 distance"),
    "gamma": (Real, lambda value: 0 <= value < 1, "a number from 0 to below 1: without discount no bound is finite"),
    "r_max": (Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0, the maximum absolute reward"),
}
_VALID |= {"longest": _VALID["k"], "policy_shift": _VALID["model_error"]}


def _check(**arguments: Any) -> None:
    for name, value in arguments.items():
        kind, holds, expected = _VALID[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise ValueError(f"{name}={value!r} must be {expected}")


def visitation_gap(*, model_error: float, gamma: float) -> float:
    """
    The simulation lemma: a bound of the total variation between the discounted state visitations, sum over t of gamma^t d_t,
    of one policy in the true MDP and in the model::

        1/2 || sum over t of gamma^t (d_t - d_hat_t) ||_1  <=  gamma eps_m / (1 - gamma)^2

    :param model_error: error of next states, under that policy
    :param gamma: discount factor
    :return: the bound
    """
    _check(model_error=model_error, gamma=gamma)
    return gamma * model_error / (1 - gamma) ** 2


def return_gap(*, model_error: float, policy_shift: float = 0, gamma: float, r_max: float) -> float:
    """
    Theorem 4.1, full rollouts. If the true MDP and the model have the same rewards r(s, a)::

        |eta[pi] - eta_hat[pi]|  <=  2 r_max gamma (eps_m + 2 eps_pi) / (1 - gamma)^2  +  4 r_max eps_pi / (1 - gamma)

    Without policy shift, this is 2 r_max times :func:`visitation_gap`. If rewards depend on the next state, or are predicted
    by the model, 2 r_max eps_m / (1 - gamma) must be added.

    :param model_error: error under the data's policy
    :param policy_shift: shift between the policy and the data's policy
    :param gamma: discount factor
    :param r_max: maximum absolute reward
    :return: the bound
    """
    _check(model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    ahead = gamma * (model_error + 2 * policy_shift) / (1 - gamma) ** 2
    return 2 * r_max * (ahead + 2 * policy_shift / (1 - gamma))


def branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    Theorem 4.2, branched rollouts, with the model error under the data's policy::

        |eta[pi] - eta_k|  <=  2 r_max [  gamma^(k+1) eps_pi / (1 - gamma)^2
                                        + (gamma^k + 2) eps_pi / (1 - gamma)
                                        + k (eps_m + 2 eps_pi) / (1 - gamma) ]

    The bound never decreases with k, so it does not justify using a model.

    :param k: number of steps in the model
    :param model_error: error under the data's policy
    :param policy_shift: shift between the policy and the data's policy
    :param gamma: discount factor
    :param r_max: maximum absolute reward
    :return: the bound
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2 + (gamma**k + 2) * policy_shift / (1 - gamma)
    return 2 * r_max * (before + k * (model_error + 2 * policy_shift) / (1 - gamma))


def branched_return_gap_on_policy(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    Theorem 4.3, branched rollouts, with the model error under the current policy::

        |eta[pi] - eta_k|  <=  2 r_max [  gamma^(k+1) eps_pi / (1 - gamma)^2
                                        + gamma^k eps_pi / (1 - gamma)
                                        + k eps_m / (1 - gamma) ]

    The sum of the first two terms is gamma^k eps_pi / (1 - gamma)^2.

    :param k: number of steps in the model
    :param model_error: error under the current policy
    :param policy_shift: shift between the policy and the data's policy
    :param gamma: discount factor
    :param r_max: maximum absolute reward
    :return: the bound
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2 + gamma**k * policy_shift / (1 - gamma)
    return 2 * r_max * (before + k * model_error / (1 - gamma))


def quoted_branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    Theorem 4.3 as it is often quoted, with the model error in the second term as well::

        2 r_max [  gamma^(k+1) eps_pi / (1 - gamma)^2
                 + gamma^k eps_m / (1 - gamma)
                 + k eps_m / (1 - gamma) ]

    This is **not a bound** if eps_m < eps_pi: docs/theory has a counterexample with one state. If eps_m >= eps_pi, it is a
    bound, and looser than Theorem 4.3.

    :param k: number of steps in the model
    :param model_error: error under the current policy
    :param policy_shift: shift between the policy and the data's policy
    :param gamma: discount factor
    :param r_max: maximum absolute reward
    :return: the quoted value
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2 + gamma**k * model_error / (1 - gamma)
    return 2 * r_max * (before + k * model_error / (1 - gamma))


def sharp_branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    The bound in the proof of Theorem 4.3 before it is simplified. It is derived in docs/theory, where an MDP with two states
    attains it to first order::

        |eta[pi] - eta_k|  <=  2 r_max [gamma^k eps_pi + (1 - gamma^k) eps_m] / (1 - gamma)^2

    k counts imagined transitions, including their rewards. The bound interpolates between k = 0, the return of the data, and
    full rollouts. So its minimum is at one of these ends, depending on which error is smaller. An optimum in between only
    results from the simplification.

    :param k: number of steps in the model
    :param model_error: error under the current policy
    :param policy_shift: shift between the policy and the data's policy
    :param gamma: discount factor
    :param r_max: maximum absolute reward
    :return: the bound
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    return 2 * r_max * (gamma**k * policy_shift + (1 - gamma**k) * model_error) / (1 - gamma) ** 2


def optimal_rollout_length(*, model_error: float, policy_shift: float, gamma: float, longest: int = 10_000) -> int:
    """
    k*: the rollout length that minimizes :func:`branched_return_gap_on_policy`.

    One more step changes that bound by 2 r_max (eps_m - gamma^k eps_pi) / (1 - gamma), so k* is the smallest k with
    gamma^k eps_pi <= eps_m. For continuous k, it would be::

        k* = ln( eps_m (1 - gamma) / (eps_pi ln(1 / gamma)) ) / ln(gamma)  ~  ln(eps_pi / eps_m) / (1 - gamma)

    k* is 0 if eps_m >= eps_pi, also if both are 0: then the model does not improve the bound.

    :param model_error: error under the current policy
    :param policy_shift: shift between the policy and the data's policy
    :param gamma: discount factor
    :param longest: maximum return value, also returned for a model without error, whose k* is infinite
    :return: k*
    """
    _check(model_error=model_error, policy_shift=policy_shift, gamma=gamma, longest=longest)
    if model_error == 0 < policy_shift and gamma > 0:
        # In floating point, gamma^k would become 0 for large k.
        return longest
    return bisect_left(range(longest), True, key=lambda k: gamma**k * policy_shift <= model_error)
