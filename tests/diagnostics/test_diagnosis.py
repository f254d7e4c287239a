"""A diagnosis against the true simulator, known errors and hand-made episodes."""

import dataclasses
import math

import numpy as np
import pytest
import torch as th
from tiny import FAST, TruePendulum

from sb3_mbpo import MBPO
from sb3_mbpo.diagnostics.diagnosis import Diagnosis, diagnose
from sb3_mbpo.diagnostics.open_loop import Episode, own_env, segments


class Biased(TruePendulum):
    """The speed is always predicted 0.5 too high, with noise of standard deviation 0.2 on top."""

    def sample(self, obs, actions):
        obs, rewards = super().sample(obs, actions)
        noise = th.randn(len(obs), generator=self.generator)
        return obs + th.stack([0 * noise, 0 * noise, 0.5 + 0.2 * noise], dim=1), rewards


class Broken(TruePendulum):
    """Every prediction from the right half of the circle is NaN."""

    def sample(self, obs, actions):
        next_obs, rewards = super().sample(obs, actions)
        return th.where(obs[:, :1] > 0, th.nan, next_obs), rewards


def look(dynamics_class, horizon=10, **kwargs) -> Diagnosis:
    agent = MBPO("MlpPolicy", "Pendulum-v1", dynamics_class=dynamics_class, **{**FAST, "dynamics_kwargs": {}, **kwargs})
    env = own_env(agent)
    env.seed(0)
    return diagnose(agent, env, 2, horizon, 1000)


def test_the_true_simulator_makes_no_errors():
    found = look(TruePendulum)
    for k in (1, 3, 10):
        numbers = found.numbers(k)
        assert numbers["error"] < 1e-4 and numbers["reward_error"] < 1e-3
        assert numbers["r2_mean"] > 1 - 1e-6 and numbers["r2_no_change"] > 1 - 1e-6 and numbers["reward_r2_mean"] > 1 - 1e-6
        # It draws nothing, so there is no interval.
        assert math.isnan(numbers["coverage_50"]) and math.isnan(numbers["coverage_90"])
    assert found.model_error() < 1e-5
    assert found.dropped == 0 and found.disagreement is None and math.isnan(found.disagreement_rank())
    assert all(map(math.isnan, found.termination()))


def test_a_known_bias():
    found = look(Biased)
    errors = found.errors(1)
    assert errors[:, 3].mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(errors[:, :3], 0, atol=1e-3)
    speeds = np.concatenate([episode.obs[1:, 2] for episode in found.episodes])
    before = np.concatenate([episode.obs[:-1, 2] for episode in found.episodes])
    of_one = 0.25 + 0.04 / 19  # the mean of 19 samples has a little noise left
    against_mean, against_no_change = found.r_squared(1)
    assert against_mean[3] == pytest.approx(1 - of_one / speeds.var(), rel=0.02)
    assert against_no_change[2] == pytest.approx(1 - of_one / ((speeds - before) ** 2).mean(), abs=0.05)
    # 2.5 standard deviations off: hardly ever inside, and never said of the columns without noise.
    assert found.coverage(1, 0.9)[3] < 0.3
    assert np.isnan(found.coverage(1, 0.9)[:3]).all()
    assert found.numbers(1)["error"] == pytest.approx(math.sqrt(of_one / speeds.var() / 3), rel=0.02)
    assert found.numbers(10)["error"] > 3 * found.numbers(1)["error"]


def test_model_error_is_the_mean_over_samples_of_the_blurred_total_variation():
    found = look(Biased)
    change = np.sqrt(np.mean(np.concatenate([np.diff(episode.obs, axis=0) for episode in found.episodes]) ** 2, axis=0))
    np.testing.assert_allclose(found.change[1:], change)
    total = [
        math.erf(abs(x) / found.change[3] / math.sqrt(8)) for x in (0.5 + 0.2 * np.random.default_rng(0).normal(size=4000))
    ]
    assert found.model_error() == pytest.approx(np.mean(total), rel=0.02)


def test_predictions_that_are_not_finite_are_left_out_and_counted():
    found = look(Broken)
    right = (found.steps.starts[:, 0] > 0).mean()
    assert 0 < right < 1 and found.dropped == pytest.approx(right)
    assert found.numbers(1)["error"] < 1e-4
    nothing = dataclasses.replace(found, step_samples=np.full_like(found.step_samples, np.nan))
    assert nothing.dropped == 1 and nothing.model_error() == 1 and math.isnan(nothing.numbers(1)["error"])
    assert math.isnan(nothing.disagreement_rank())


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_the_reward_of_a_function_is_judged():
    found = look(Biased, reward_fn=lambda obs, actions, next_obs: -obs[:, 2])
    real = np.concatenate([episode.rewards for episode in found.episodes])
    speed = np.concatenate([episode.obs[:-1, 2] for episode in found.episodes])
    assert found.numbers(1)["reward_error"] == pytest.approx(np.sqrt(np.mean((-speed - real) ** 2)), rel=1e-5)


@pytest.mark.parametrize("termination_fn", [None, "learned"])
def test_ensemble_and_terminations(termination_fn):
    agent = MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn=termination_fn, **FAST).learn(60)
    env = own_env(agent)
    env.seed(0)
    found = diagnose(agent, env, 3, 30, 1000)
    # Longer than the episodes: the last steps have nothing to be held against.
    assert math.isnan(found.numbers(30)["error"]) and math.isfinite(found.numbers(2)["error"])
    assert found.disagreement is not None and -1 <= found.disagreement_rank() <= 1
    assert 0 <= found.coverage(1, 0.5)[1] <= found.coverage(1, 0.9)[1] <= 1


def test_a_constant_reward_counts_for_nothing():
    found = look(TruePendulum, horizon=2)
    outcomes = found.steps.outcomes.copy()
    outcomes[..., 0] = 1.0
    found = dataclasses.replace(found, steps=found.steps._replace(outcomes=outcomes))
    assert found.model_error() < 1e-5 and math.isnan(found.numbers(1)["reward_r2_mean"])
    assert found.numbers(1)["reward_error"] > 0.1


def test_termination_counts():
    """Two episodes, the first terminated; of three samples two see its end, and one sees an end where there is none."""
    obs = np.arange(5.0)[:, None]
    episodes = [Episode(obs[:3], np.zeros((2, 1)), np.ones(2), True), Episode(obs[:4], np.zeros((3, 1)), np.ones(3), False)]
    ends = np.zeros((3, 5), dtype=bool)
    ends[:2, 1] = ends[2, 4] = True
    steps = segments(episodes, 1)
    samples = np.zeros((3, *steps.outcomes.shape))
    found = Diagnosis(episodes, steps, samples, steps, samples, ends, None, ["reward", "x"])
    assert found.termination() == (pytest.approx(2 / 3), pytest.approx(2 / 3))
