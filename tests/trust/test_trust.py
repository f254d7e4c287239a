import math

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics import explained_variance
from sb3_mbpo.dynamics.explained_variance import constant_errors, smoothed, squared_errors
from sb3_mbpo.trust.auto_rollout_length import reliable_length
from sb3_mbpo.trust.imagined_fraction import imagined_fraction


def transitions(obs, next_obs, rewards, terminated=()):
    obs, next_obs, rewards = (th.as_tensor(np.array(part), dtype=th.float32) for part in (obs, next_obs, rewards))
    dones = th.isin(th.arange(len(obs)), th.tensor(terminated)).float().unsqueeze(1)
    return ReplayBufferSamples(obs, th.zeros(len(obs), 1), next_obs, dones, rewards.reshape(-1, 1))


def prediction(next_obs, rewards):
    return th.as_tensor(np.column_stack([rewards, next_obs]), dtype=th.float32)


def explained(guess, data):
    """:return: of the reward and of the observation"""
    return explained_variance.explained(squared_errors(guess, data), constant_errors(data), 10**12)[:2]


# ---------------------------------------------------------------------- explained


def test_table():
    """By hand: rewards 0, 2 vary by 1; next observations 1, 3 by 1, their changes 1, 1 by 0."""
    data = transitions([[0.0], [2.0]], [[1.0], [4.0]], [0.0, 2.0])
    # Changes are 1 and 2, of variance 1/4; the next observations 1 and 4 vary by 9/4.
    assert explained(prediction([[1.0], [4.0]], [0.0, 2.0]), data) == (1, 1)
    assert explained(prediction([[1.25], [4.25]], [0.5, 2.5]), data) == pytest.approx((0.75, 0.75))
    assert explained(prediction([[1.5], [3.5]], [1.0, 1.0]), data) == (0, 0)
    assert explained(prediction([[100.0], [-100.0]], [50.0, -50.0]), data) == (0, 0)


def test_against_numpy():
    rng = np.random.default_rng(0)
    obs, noise = rng.normal(size=(500, 3)), rng.normal(size=(500, 3))
    next_obs = obs * [1.0, 0.0, 0.5] + noise * [0.1, 1.0, 0.5]
    rewards = rng.normal(size=500)
    guess, guessed_rewards = obs * [1.0, 0.0, 0.5] + 0.01, 0.5 * rewards
    shares = []
    for d in range(3):
        constant = min(np.var(next_obs[:, d]), np.var(next_obs[:, d] - obs[:, d]))
        shares.append(max(-1.0, 1 - np.mean((guess[:, d] - next_obs[:, d]) ** 2) / constant))
    reward, observation = explained(prediction(guess, guessed_rewards), transitions(obs, next_obs, rewards))
    assert reward == pytest.approx(1 - np.mean((rewards / 2) ** 2) / np.var(rewards), rel=1e-5)
    assert observation == pytest.approx(np.mean(shares), rel=1e-4)
    # Independent of the past: the mean is as good.
    assert shares[1] < 0.01


def test_luck_does_not_add_up():
    """Of 17 dimensions and 60 rows that nothing is known of, half are predicted better than by a constant; not their mean."""
    rng = np.random.default_rng(0)
    truth, rewards = rng.normal(size=(60, 17)), rng.normal(size=60)
    guesses = [0.1 * rng.normal(size=(60, 17)) + truth * rng.normal(scale=0.05, size=17) for _ in range(20)]
    data = transitions(rng.normal(size=(60, 17)), truth, rewards)
    lucky = [(np.var(truth, axis=0) > np.mean((guess - truth) ** 2, axis=0)).mean() for guess in guesses]
    assert 0.3 < np.mean(lucky) < 0.7
    assert max(explained(prediction(guess, rewards), data)[1] for guess in guesses) < 0.05


def test_one_hopeless_dimension_counts_as_one_perfect_one():
    data = transitions(np.zeros((100, 3)), next_obs := np.random.default_rng(0).normal(size=(100, 3)), np.zeros(100))
    assert explained(prediction(next_obs + np.array([0.0, 0.0, 1e9]), np.zeros(100)), data)[1] == pytest.approx(1 / 3)


def test_shares_of_dimensions_and_the_worst_of_them():
    """By hand: errors of 0, 1/4, 2 and 5 where a constant errs by 1; a fifth dimension stands still."""
    result = explained_variance.explained(th.tensor([0.5, 0.0, 0.25, 2.0, 5.0, 3.0]), th.tensor([1.0, 1, 1, 1, 1, 0]), 10**12)
    assert result.shares[:5].tolist() == pytest.approx([0.5, 1, 0.75, -1, -1], abs=1e-5) and result.shares[5].isnan()
    assert (result.reward, result.obs) == pytest.approx((0.5, 0), abs=1e-5)
    # Of 50 rows, a fifth more is counted.
    few = explained_variance.explained(th.tensor([0.5, 0.0]), th.tensor([1.0, 1.0]), 50)
    assert few[:2] == pytest.approx((0.4, 1))
    assert result.worst_dimensions == [2, 3]


# ---------------------------------------------------------------------- smoothed


def test_errors_are_an_exponential_mean():
    constant = th.tensor([1.0, 1.0])
    errors = smoothed([], th.tensor([0.4, 0.8]), constant)
    assert errors == pytest.approx([0.4, 0.8])
    assert smoothed(errors, th.tensor([0.0, 0.4]), constant) == pytest.approx([0.2, 0.6])


def test_one_bad_stretch_is_soon_forgotten_and_does_not_close_the_gate():
    """However bad: a dynamics that was perfect and will be keeps half of what it explains."""
    constant = th.tensor([1.0])
    errors = smoothed([0.0], th.tensor([math.inf]), constant)
    assert errors == [1.0]
    errors = smoothed(errors, th.tensor([0.0]), constant)
    assert errors == [0.5]


def test_errors_of_another_unit_are_forgotten():
    """Large rewards that have left the data: what they were wrong by counts no more than a constant would twice."""
    assert smoothed([1e9], th.tensor([0.0]), th.tensor([1.0])) == [1.0]


def test_what_was_not_measured_leaves_what_was():
    nan, constant = th.tensor([math.nan]), th.tensor([1.0])
    assert smoothed([0.25], nan, constant) == [0.25] and smoothed([], nan, constant) == [0.0]


def test_what_does_not_vary_is_left_out():
    rng = np.random.default_rng(0)
    obs = np.column_stack([rng.normal(size=50), np.full(50, 1e6)])
    next_obs = obs + [[1.0, 0.0]] * rng.normal(size=(50, 1))
    wrong = prediction(next_obs + np.array([0.0, 5.0]), np.full(50, 0.9))
    assert explained(wrong, transitions(obs, next_obs, np.ones(50))) == (1, 1)
    standing = transitions(obs[:, 1:], obs[:, 1:], np.ones(50))
    assert explained(prediction(obs[:, 1:], np.ones(50)), standing) == (1, 1)


@pytest.mark.parametrize(("rare", "share"), [(1, 1), (3, 0)])
def test_a_reward_that_hardly_varies_is_left_out(rare, share):
    """1 but in ``rare`` of 200 steps, predicted to be 1 always: a constant says as much, and errs by a tenth or not."""
    obs = np.random.default_rng(0).normal(size=(200, 1))
    rewards = np.ones(200)
    rewards[:rare] = 0
    assert explained(prediction(obs, np.ones(200)), transitions(obs, obs + 1, rewards))[0] == share


def test_rewards_of_terminations_are_left_out():
    obs = np.random.default_rng(0).normal(size=(50, 1))
    rewards = np.where(np.arange(50) % 5 == 0, -100.0, obs[:, 0])
    guess = prediction(obs, obs[:, 0])
    assert explained(guess, transitions(obs, obs + 1, rewards))[0] == 0
    assert explained(guess, transitions(obs, obs + 1, rewards, np.arange(0, 50, 5)))[0] == 1
    # Observations stay in, and where every transition terminates no reward is left to judge.
    data, ended = (transitions(obs, obs + obs**2, rewards, which) for which in ([], np.arange(50)))
    assert explained(guess, ended) == (1, explained(guess, data)[1])


def test_nothing_is_explained_by_what_is_not_finite():
    data = transitions([[0.0], [1.0]], [[1.0], [4.0]], [0.0, 2.0])
    assert explained(prediction([[math.nan], [4.0]], [math.inf, 2.0]), data) == (0, 0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_units_do_not_matter(scale):
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(100, 2))
    next_obs = obs + 0.1 * rng.normal(size=(100, 2))
    guess = prediction(scale * (next_obs + 0.05), np.zeros(100))
    reward, observation = explained(guess, transitions(scale * obs, scale * next_obs, scale * obs[:, 0]))
    assert reward == pytest.approx(0, abs=0.02) and observation == pytest.approx(0.75, abs=0.03)


# ---------------------------------------------------------------------- imagined_fraction


@pytest.mark.parametrize(
    ("obs", "reward", "share"),
    [(1, 1, 1), (0.1, 0.9, 1), (0.075, 1, 0.5), (1, 0.06, 0.2), (0.05, 1, 0), (0, 1, 0), (1, 0, 0), (0.07, 0.08, 0.4)],
)
def test_share(obs, reward, share):
    assert imagined_fraction(reward, obs, 0.1) == pytest.approx(share)
    assert imagined_fraction(reward, obs, None) == 1


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (1.0, math.nan), (-math.inf, 1.0)])
def test_what_is_not_finite_earns_nothing(numbers):
    assert imagined_fraction(*numbers, 0.1) == 0


# ---------------------------------------------------------------------- reliable_length


def of_steps(*errors, dims=1):
    return [th.full((dims,), error) for error in errors]


def with_variance(*variances):
    """Observations that have it."""
    return (2 * th.tensor([[-0.5], [0.0], [0.5]])) * th.tensor(variances).sqrt()


@pytest.mark.parametrize(
    ("errors", "length"),
    [((0.5,), 1), ((0.0, 0.0, 0.0), 3), ((0.001, 0.009, 0.02, 0.001), 2), ((0.5, 0.001), 1), ((0.001, math.nan), 1)],
)
def test_length(errors, length):
    assert reliable_length(of_steps(*errors), with_variance(1.0)) == length


def test_errors_are_measured_by_the_variance_of_each_dimension():
    errors = [th.tensor([0.005, 5000.0]), th.tensor([0.009, 9000.0]), th.tensor([0.02, 9000.0])]
    assert reliable_length(errors, with_variance(1.0, 1e6)) == 2
    assert reliable_length(errors, with_variance(1e-3, 1e6)) == 1


def test_a_dimension_that_stands_still_says_nothing_of_the_length():
    assert reliable_length([th.tensor([0.001, 1.0])] * 4, with_variance(1.0, 0.0)) == 4
    assert reliable_length([th.tensor([1.0])] * 4, with_variance(0.0)) == 1


def test_nor_does_one_that_only_rounding_moves():
    angle = th.linspace(0, 50, 1000)
    norm = angle.cos() ** 2 + angle.sin() ** 2
    assert norm.var() > 0
    errors = [th.tensor([1e-4, 1e-12])] * 4
    assert reliable_length(errors, th.stack([angle.cos(), norm], dim=1)) == 4
