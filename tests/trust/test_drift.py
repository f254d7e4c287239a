import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.trust.auto_rollout_length import drift


class Biased(DynamicsModel):
    """next_obs = 2 obs + action + bias."""

    def __init__(self, bias=0.0):
        super().__init__(1, 1)
        self.bias = bias

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        return 2 * obs + actions + self.bias, obs[:, 0]


def trajectory(n_steps, n_envs, seed=0, ends=()):
    """Real steps of next_obs = 2 obs + action, brought back to small numbers by a reset after the steps in ``ends``."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(-2, 3, (n_steps, n_envs, 1)).astype(float)
    obs, next_obs, dones = np.zeros_like(actions), np.zeros_like(actions), np.zeros_like(actions)
    now = rng.integers(-2, 3, (n_envs, 1)).astype(float)
    for t in range(n_steps):
        obs[t], next_obs[t] = now, 2 * now + actions[t]
        dones[t] = t in ends
        now = rng.integers(-2, 3, (n_envs, 1)).astype(float) if t in ends else next_obs[t]
    parts = (obs, actions, next_obs, dones, obs)
    return ReplayBufferSamples(*(th.as_tensor(part, dtype=th.float32) for part in parts))


def by_hand(steps, bias, length, untold=None):
    """Every start followed on its own, in plain Python."""
    n_steps, n_envs = steps.dones.shape[:2]
    errors = [[] for _ in range(length)]
    for env in range(n_envs):
        for start in range(n_steps):
            now = steps.observations[start, env, 0].item()
            for h in range(min(length, n_steps - start)):
                if untold is not None and untold[start + h, env]:
                    break
                now = 2 * now + steps.actions[start + h, env, 0].item() + bias
                errors[h].append((now - steps.next_observations[start + h, env, 0].item()) ** 2)
                if steps.dones[start + h, env, 0]:
                    break
    return [np.mean(squares) for squares in errors if squares]


def test_nothing_is_measured_at_ends_that_were_lost():
    """Their next observation is another episode's first one."""
    steps = trajectory(10, 2, ends=(2, 6, 9))
    untold = steps.dones[..., 0] > 0.5
    untold[6, 1] = False
    steps.next_observations[untold] = 1e6
    errors = drift(Biased(0.5), steps, 6, untold=untold)
    np.testing.assert_allclose([error.item() for error in errors], by_hand(steps, 0.5, 6, untold))
    assert max(errors).item() < 1e6


@pytest.mark.parametrize("ends", [(), (3,), (0, 1, 4, 9)])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_as_every_start_followed_by_itself(n_envs, ends):
    steps = trajectory(10, n_envs, ends=ends)
    errors = drift(Biased(0.5), steps, 6)
    np.testing.assert_allclose([error.item() for error in errors], by_hand(steps, 0.5, 6))
    assert all(error.shape == (1,) for error in errors)


def test_the_truth_has_no_error():
    errors = drift(Biased(), trajectory(8, 2, ends=(2,)), 5)
    assert len(errors) == 5 and all((error == 0).all() for error in errors)


def test_no_longer_than_the_longest_episode():
    assert len(drift(Biased(), trajectory(9, 1, ends=(2, 5, 8)), 20)) == 3
    assert len(drift(Biased(), trajectory(1, 1), 20)) == 1


def test_what_too_few_starts_have_room_for_is_not_measured():
    assert len(drift(Biased(), trajectory(30, 1), 20, fewest=20)) == 11
    assert len(drift(Biased(), trajectory(10, 2), 20, fewest=20)) == 1
    assert drift(Biased(), trajectory(19, 1), 20, fewest=20) == []


def test_rows_that_do_not_follow_each_other_are_not_joined():
    """As in datasets put together, whose seams no done marks."""
    first, second = trajectory(4, 1, seed=1), trajectory(4, 1, seed=2)
    joined = ReplayBufferSamples(*(th.cat(parts) for parts in zip(first[:5], second[:5], strict=True)))
    assert (first.next_observations[-1] != second.observations[0]).all()
    errors = drift(Biased(), joined, 8)
    assert len(errors) == 4 and all((error == 0).all() for error in errors)
