"""
How far a model may be believed: the bounds of Janner et al., 2019 (arXiv 1906.08253), as functions.

All compare discounted returns, eta = E sum over t of gamma^t r_t, from the same distribution of first states: eta[pi] of the
policy in the true MDP, eta_hat[pi] in the model, and eta_k, what k-branched rollouts predict: steps of the data's policy pi_D
in the true MDP, then the last k of pi in the model.

``k``
    steps in the model
``model_error``
    eps_m, the total variation (half the L1 distance) between true and predicted outcomes of a state and action, in the mean
    over what the policy named with the theorem meets at a time t of the true MDP, at the worst t. The maximum over all states
    and actions is never less, so it may be passed instead.
``policy_shift``
    eps_pi = max over s of TV(pi(.|s), pi_D(.|s))
``gamma``
    the discount factor, below 1
``r_max``
    no reward is larger in size

Plain numbers go in, and one comes out; with fractions the result is exact. An argument out of range is a ``ValueError``.
docs/theory puts each bound to the test, and shows what two of them need beyond what they are printed with.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

# Beyond any horizon, and as a float still exact.
MOST_STEPS = 10**9

# Argument -> its kind, what holds of it, what it must be
_VALID: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "k": (Integral, lambda value: 0 <= value <= MOST_STEPS, f"a whole number from 0 to {MOST_STEPS:,}"),
    "model_error": (Real, lambda value: 0 <= value <= 1, "a number from 0 to 1, a total variation: half the L1 distance"),
    "gamma": (Real, lambda value: 0 <= value < 1, "a number from 0 to below 1: without discount no bound is finite"),
    "r_max": (Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0, the largest size of a reward"),
}
_VALID |= {"longest": _VALID["k"], "policy_shift": _VALID["model_error"]}


def _check(**arguments: Any) -> None:
    for name, value in arguments.items():
        kind, holds, expected = _VALID[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise ValueError(f"{name}={value!r} must be {expected}")


def visitation_gap(*, model_error: float, gamma: float) -> float:
    """
    The simulation lemma. Total variation between the discounted visits of states, sum over t of gamma^t d_t, of one policy
    in the true MDP and in the model::

        1/2 || sum over t of gamma^t (d_t - d_hat_t) ||_1  <=  gamma eps_m / (1 - gamma)^2

    :param model_error: of next states, under that policy
    :param gamma: discount factor
    """
    _check(model_error=model_error, gamma=gamma)
    return gamma * model_error / (1 - gamma) ** 2


def return_gap(*, model_error: float, policy_shift: float = 0, gamma: float, r_max: float) -> float:
    """
    Theorem 4.1, full rollouts. If true MDP and model share the rewards r(s, a)::

        |eta[pi] - eta_hat[pi]|  <=  2 r_max gamma (eps_m + 2 eps_pi) / (1 - gamma)^2  +  4 r_max eps_pi / (1 - gamma)

    Without policy shift this is 2 r_max times :func:`visitation_gap`. Rewards that depend on the next state, or that the model
    predicts, need 2 r_max eps_m / (1 - gamma) more.

    :param model_error: under the data's policy
    :param policy_shift: 0: the policy is the data's
    :param gamma: discount factor
    :param r_max: largest size of a reward
    """
    _check(model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    ahead = gamma * (model_error + 2 * policy_shift) / (1 - gamma) ** 2
    return 2 * r_max * (ahead + 2 * policy_shift / (1 - gamma))


def branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    Theorem 4.2, branched rollouts, with the model's error where the data are::

        |eta[pi] - eta_k|  <=  2 r_max [  gamma^(k+1) eps_pi / (1 - gamma)^2
                                        + (gamma^k + 2) eps_pi / (1 - gamma)
                                        + k (eps_m + 2 eps_pi) / (1 - gamma) ]

    It never falls with k: by this bound no model is worth using.

    :param k: steps in the model
    :param model_error: under the data's policy
    :param policy_shift: between the policy and the data's
    :param gamma: discount factor
    :param r_max: largest size of a reward
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2 + (gamma**k + 2) * policy_shift / (1 - gamma)
    return 2 * r_max * (before + k * (model_error + 2 * policy_shift) / (1 - gamma))


def branched_return_gap_on_policy(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    Theorem 4.3, branched rollouts, with the model's error where the current policy goes::

        |eta[pi] - eta_k|  <=  2 r_max [  gamma^(k+1) eps_pi / (1 - gamma)^2
                                        + gamma^k eps_pi / (1 - gamma)
                                        + k eps_m / (1 - gamma) ]

    The first two terms together are gamma^k eps_pi / (1 - gamma)^2.

    :param k: steps in the model
    :param model_error: under the current policy
    :param policy_shift: between the policy and the data's
    :param gamma: discount factor
    :param r_max: largest size of a reward
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2 + gamma**k * policy_shift / (1 - gamma)
    return 2 * r_max * (before + k * model_error / (1 - gamma))


def quoted_branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    Theorem 4.3 as it is often quoted, with the model's error in the second term as well::

        2 r_max [  gamma^(k+1) eps_pi / (1 - gamma)^2
                 + gamma^k eps_m / (1 - gamma)
                 + k eps_m / (1 - gamma) ]

    **No bound** where eps_m < eps_pi: docs/theory has an MDP of one state. Where the model errs no less than the policy has
    moved, it is one, and looser than Theorem 4.3.

    :param k: steps in the model
    :param model_error: under the current policy
    :param policy_shift: between the policy and the data's
    :param gamma: discount factor
    :param r_max: largest size of a reward
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    before = gamma ** (k + 1) * policy_shift / (1 - gamma) ** 2 + gamma**k * model_error / (1 - gamma)
    return 2 * r_max * (before + k * model_error / (1 - gamma))


def sharp_branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    """
    What the proof of Theorem 4.3 gives before it is rounded up; shown in docs/theory, where an MDP of two states attains it to
    first order::

        |eta[pi] - eta_k|  <=  2 r_max [gamma^k eps_pi + (1 - gamma^k) eps_m] / (1 - gamma)^2

    k counts imagined transitions, rewards included. From k = 0, the data's own return, it goes evenly to full rollouts, so it
    is least at one of these ends, whichever error is smaller: an optimum between them comes of the rounding.

    :param k: steps in the model
    :param model_error: under the current policy
    :param policy_shift: between the policy and the data's
    :param gamma: discount factor
    :param r_max: largest size of a reward
    """
    _check(k=k, model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    return 2 * r_max * (gamma**k * policy_shift + (1 - gamma**k) * model_error) / (1 - gamma) ** 2


def optimal_rollout_length(*, model_error: float, policy_shift: float, gamma: float, longest: int = 10_000) -> int:
    """
    k*: the rollout length for which :func:`branched_return_gap_on_policy` is least.

    One step more changes that bound by 2 r_max (eps_m - gamma^k eps_pi) / (1 - gamma), so k* is the smallest k for which
    gamma^k eps_pi <= eps_m. With k continuous it would be::

        k* = ln( eps_m (1 - gamma) / (eps_pi ln(1 / gamma)) ) / ln(gamma)  ~  ln(eps_pi / eps_m) / (1 - gamma)

    0 where the model errs no less than the policy has moved, also if both are 0: by this bound nothing is gained from it.

    :param model_error: under the current policy
    :param policy_shift: between the policy and the data's
    :param gamma: discount factor
    :param longest: what is returned at most, and for a model without error, whose k* is infinite
    """
    _check(model_error=model_error, policy_shift=policy_shift, gamma=gamma, longest=longest)
    if model_error == 0 < policy_shift and gamma > 0:
        # Whose power is 0 in floating point, sooner or later.
        return longest
    return bisect_left(range(longest), True, key=lambda k: gamma**k * policy_shift <= model_error)
