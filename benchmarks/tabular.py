"""
Finite MDPs, each with a model, a policy and a policy that gathered the data: all that the bounds speak of, computed exactly.

Everything is done for N of them at once. Arrays have the axes N, then S states, A actions, S next states.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """
    N pairs of a true MDP and a model of it.

    :param start: distribution of the first state ``(N, S)``
    :param true: transition probabilities ``(N, S, A, S)``
    :param model: those of the model, same shape
    :param rewards: in [-1, 1]; ``(N, S, A, S)``, or ``(N, S, A, 1)`` where they do not depend on the next state
    :param policy: action probabilities ``(N, S, A)``
    :param data_policy: those of the policy that gathered the data
    :param gamma: discount factor
    """

    start: np.ndarray
    true: np.ndarray
    model: np.ndarray
    rewards: np.ndarray
    policy: np.ndarray
    data_policy: np.ndarray
    gamma: float

    def chain(self, dynamics: np.ndarray, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:return: probabilities from state to next state ``(N, S, S)``, mean reward of a state ``(N, S)``"""
        steps = np.einsum("nsa,nsat->nst", policy, dynamics)
        return steps, np.einsum("nsa,nsat,nsat->ns", policy, dynamics, np.broadcast_to(self.rewards, dynamics.shape))

    def visits(self, steps: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """sum over t of gamma^t d_t, from the linear equations that it solves, ``(N, S)``"""
        start = self.start if start is None else start
        equations = np.eye(start.shape[1]) - self.gamma * steps.transpose(0, 2, 1)
        return np.linalg.solve(equations, start[..., None])[..., 0]

    def value(self, dynamics: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """The return, ``(N,)``."""
        steps, rewards = self.chain(dynamics, policy)
        return (self.visits(steps) * rewards).sum(axis=1)

    def branched_value(self, k: int) -> np.ndarray:
        """
        The return that k-branched rollouts predict, ``(N,)``: transition t + 1 is the last of max(t + 1 - k, 0) true ones of
        the data's policy and then min(t + 1, k) ones of the policy in the model; its reward counts gamma^t.
        """
        if k == 0:
            return self.value(self.true, self.data_policy)
        steps, rewards = self.chain(self.model, self.policy)
        before, _ = self.chain(self.true, self.data_policy)
        state, total = self.start, np.zeros(len(self.start))
        for t in range(k - 1):
            total += self.gamma**t * (state * rewards).sum(axis=1)
            state = _after(state, steps)
        # From here on all branches have their full length; they begin where the data's policy is after 0, 1, 2, ... steps.
        state = self.visits(before)
        for _ in range(k - 1):
            state = _after(state, steps)
        return total + self.gamma ** (k - 1) * (state * rewards).sum(axis=1)

    def policy_shift(self) -> np.ndarray:
        """Largest total variation between the two policies, ``(N,)``."""
        return total_variation(self.policy, self.data_policy).max(axis=1)

    def largest_error(self) -> np.ndarray:
        """Largest total variation between true and model, over all states and actions, ``(N,)``."""
        return total_variation(self.true, self.model).max(axis=(1, 2))

    def mean_error(self, policy: np.ndarray) -> np.ndarray:
        """The same in the mean over what the policy meets at time t, at the worst t, ``(N,)``."""
        errors = (policy * total_variation(self.true, self.model)).sum(axis=2)
        steps, _ = self.chain(self.true, policy)
        state, worst = self.start, np.zeros(len(self.start))
        # What comes later counts for nothing: its share of a return is below 1e-10.
        for _ in range(1 + int(np.log(1e-10) / np.log(self.gamma))):
            worst = np.maximum(worst, (state * errors).sum(axis=1))
            state = _after(state, steps)
        return worst

    def visitation_gap(self) -> np.ndarray:
        true, model = (self.visits(self.chain(dynamics, self.policy)[0]) for dynamics in (self.true, self.model))
        return total_variation(true, model)

    def return_gap(self) -> np.ndarray:
        return np.abs(self.value(self.true, self.policy) - self.value(self.model, self.policy))

    def branched_return_gap(self, k: int) -> np.ndarray:
        return np.abs(self.value(self.true, self.policy) - self.branched_value(k))


def _after(state: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return np.einsum("ns,nst->nt", state, steps)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(axis=-1) / 2


def leaky(model_error: float, policy_shift: float, gamma: float) -> Pairs:
    """
    Two states. Up pays 1 as long as it is kept, the fall and all that comes after it -1. The policy's action keeps it; in the
    model that fails with probability ``model_error``. With probability ``policy_shift`` the data's policy takes the other
    action, and falls.
    """
    fall, true = [[0.0, 1.0], [0.0, 1.0]], np.zeros((1, 2, 2, 2))
    true[0, :, 1] = fall
    true[0, :, 0] = [[1, 0], [0, 1]]
    model = true.copy()
    model[0, 0, 0] = [1 - model_error, model_error]
    rewards = np.broadcast_to([1.0, -1.0], true.shape)
    policy = np.broadcast_to([1.0, 0.0], (1, 2, 2))
    data_policy = np.broadcast_to([1 - policy_shift, policy_shift], (1, 2, 2))
    return Pairs(np.array([[1.0, 0.0]]), true, model, rewards, policy, data_policy, gamma)
