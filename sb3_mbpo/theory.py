r"""
How far a model may be believed: the bounds of Janner et al., 2019 (arXiv 1906.08253), as functions.

All of them compare discounted returns, :math:`\eta = E \sum_t \gamma^t r_t`, from the same distribution of first states:
:math:`\eta[\pi]` of the policy in the true MDP, :math:`\hat\eta[\pi]` in the model, and :math:`\eta_k`, what k-branched
rollouts predict: steps of the data's policy :math:`\pi_D` in the true MDP, then the last k of :math:`\pi` in the model.

``k``
    steps in the model
``model_error``
    :math:`\epsilon_m`, the total variation (half the L1 distance) between true and predicted outcomes of a state and action,
    in the mean over what the policy named in the theorem meets at a time t of the true MDP, at the worst t. The maximum over
    all states and actions is never less, so it may be passed instead.
``policy_shift``
    :math:`\epsilon_\pi = \max_s D_{TV}(\pi(\cdot|s), \pi_D(\cdot|s))`
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
    r"""
    The simulation lemma. Total variation between the discounted visits of states, :math:`\sum_t \gamma^t d_t`, of one policy
    in the true MDP and in the model:

    .. math:: \tfrac12 \Big\| \sum_t \gamma^t (d_t - \hat d_t) \Big\|_1 \le \frac{\gamma \epsilon_m}{(1-\gamma)^2}

    :param model_error: of next states, under that policy
    :param gamma: discount factor
    """
    _check(model_error=model_error, gamma=gamma)
    return gamma * model_error / (1 - gamma) ** 2


def return_gap(*, model_error: float, policy_shift: float = 0, gamma: float, r_max: float) -> float:
    r"""
    Theorem 4.1, full rollouts. If true MDP and model share the rewards r(s, a),

    .. math::
        |\eta[\pi] - \hat\eta[\pi]| \le
        \frac{2 r_{max} \gamma (\epsilon_m + 2 \epsilon_\pi)}{(1-\gamma)^2} + \frac{4 r_{max} \epsilon_\pi}{1-\gamma}

    Without policy shift this is :math:`2 r_{max}` times :func:`visitation_gap`. Rewards that depend on the next state, or that
    the model predicts, need :math:`2 r_{max} \epsilon_m / (1-\gamma)` more.

    :param model_error: under the data's policy
    :param policy_shift: 0: the policy is the data's
    :param gamma: discount factor
    :param r_max: largest size of a reward
    """
    _check(model_error=model_error, policy_shift=policy_shift, gamma=gamma, r_max=r_max)
    ahead = gamma * (model_error + 2 * policy_shift) / (1 - gamma) ** 2
    return 2 * r_max * (ahead + 2 * policy_shift / (1 - gamma))


def branched_return_gap(*, k: int, model_error: float, policy_shift: float, gamma: float, r_max: float) -> float:
    r"""
    Theorem 4.2, branched rollouts, with the model's error where the data are:

    .. math::
        |\eta[\pi] - \eta_k| \le 2 r_{max} \Big[ \frac{\gamma^{k+1} \epsilon_\pi}{(1-\gamma)^2}
        + \frac{(\gamma^k + 2) \epsilon_\pi}{1-\gamma} + \frac{k (\epsilon_m + 2 \epsilon_\pi)}{1-\gamma} \Big]

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
    r"""
    Theorem 4.3, branched rollouts, with the model's error where the current policy goes:

    .. math::
        |\eta[\pi] - \eta_k| \le 2 r_{max} \Big[ \frac{\gamma^{k+1} \epsilon_\pi}{(1-\gamma)^2}
        + \frac{\gamma^k \epsilon_\pi}{1-\gamma} + \frac{k \epsilon_m}{1-\gamma} \Big]

    The first two terms together are :math:`\gamma^k \epsilon_\pi / (1-\gamma)^2`.

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
    r"""
    Theorem 4.3 as it is often quoted, with the model's error in the second term as well:

    .. math::
        2 r_{max} \Big[ \frac{\gamma^{k+1} \epsilon_\pi}{(1-\gamma)^2}
        + \frac{\gamma^k \epsilon_m}{1-\gamma} + \frac{k \epsilon_m}{1-\gamma} \Big]

    **No bound** where :math:`\epsilon_m < \epsilon_\pi`: docs/theory has an MDP of one state. Where the model errs no less
    than the policy has moved, it is one, and looser than Theorem 4.3.

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
    r"""
    What the proof of Theorem 4.3 gives before it is rounded up; shown in docs/theory, where an MDP of two states attains it to
    first order:

    .. math::
        |\eta[\pi] - \eta_k| \le
        2 r_{max} \frac{\gamma^k \epsilon_\pi + (1 - \gamma^k) \epsilon_m}{(1-\gamma)^2}

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
    r"""
    k*: the rollout length for which :func:`branched_return_gap_on_policy` is least.

    One step more changes that bound by :math:`2 r_{max} (\epsilon_m - \gamma^k \epsilon_\pi) / (1-\gamma)`, so k* is the
    smallest k for which :math:`\gamma^k \epsilon_\pi \le \epsilon_m`. With k continuous it would be

    .. math:: k^* = \ln \frac{\epsilon_m (1-\gamma)}{\epsilon_\pi \ln(1/\gamma)} \Big/ \ln \gamma
        \approx \frac{\ln(\epsilon_\pi / \epsilon_m)}{1 - \gamma}

    0 where the model errs no less than the policy has moved, also if neither does: by this bound nothing is gained from it.

    :param model_error: under the current policy
    :param policy_shift: between the policy and the data's
    :param gamma: discount factor
    :param longest: what is returned at most, and for a model without error, whose k* is infinite
    """
    _check(model_error=model_error, policy_shift=policy_shift, gamma=gamma, longest=longest)
    return bisect_left(range(longest), True, key=lambda k: gamma**k * policy_shift <= model_error)
