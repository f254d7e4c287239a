import math

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tiny import FAST

from sb3_mbpo import MBPO, DynamicsModel
from sb3_mbpo.dynamics.base import KnownReward
from sb3_mbpo.rollouts import branched_rollout
from sb3_mbpo.trust.prediction_bounds import PredictionBounds, bounds

INF, NAN = math.inf, math.nan


def real(obs, next_obs, rewards) -> ReplayBufferSamples:
    obs, next_obs, rewards = (th.tensor(values, dtype=th.float32) for values in (obs, next_obs, rewards))
    return ReplayBufferSamples(obs, th.zeros(len(obs), 1), next_obs, th.zeros(len(obs), 1), rewards.unsqueeze(1))


# Observations in [-1, 3] and rewards in [0, 2]: with one range, [-5, 7] and [-2, 4].
DATA = real([[0.0], [-1.0]], [[3.0], [0.0]], [0.0, 2.0])


class Says(DynamicsModel):
    """Predicts what it was told to."""

    def __init__(self, next_obs, rewards):
        super().__init__(1, 1)
        self.answer = th.tensor(next_obs), th.tensor(rewards)

    def fit(self, transitions, progress=None):
        return {"rows": len(transitions.rewards)}

    def sample(self, obs, actions):
        return tuple(part.clone() for part in self.answer)


# ---------------------------------------------------------------------- the range


@pytest.mark.parametrize(
    ("values", "margin", "expected"),
    [
        ([-1.0, 3.0], 1.0, (-5, 7)),
        ([-1.0, 3.0], 0.25, (-2, 4)),
        ([-1.0, 3.0], 0, (-1, 3)),
        ([-1.0, 3.0], None, (-INF, INF)),
        # No range to speak of: a hundredth of the magnitude, or of 1 near zero.
        ([0.0, 0.0], 1.0, (-0.01, 0.01)),
        ([0.0, 0.0], 3, (-0.03, 0.03)),
        ([0.0, 0.0], 0, (0, 0)),
        ([500.0, 500.0], 1.0, (495, 505)),
        ([500.0, np.nextafter(np.float32(500), np.float32(INF))], 1.0, (495, 505)),
        # Small and large, but a range: no floor, no overflow.
        ([0.0, 1e-12], 1.0, (-1e-12, 2e-12)),
        ([-1e12, 1e12], 1.0, (-3e12, 3e12)),
        ([500.0, 500.01], 1.0, (499.99, 500.02)),
        ([-3e38, 3e38], 1.0, (-INF, INF)),
        # The data say nothing.
        ([NAN, 1.0], 1.0, (-INF, INF)),
        ([0.0, INF], 1.0, (-INF, INF)),
        ([INF, INF], 0, (-INF, INF)),
    ],
)
def test_bounds(values, margin, expected):
    column = th.tensor(np.array(values, np.float32)).unsqueeze(1)
    low, high = bounds([column], margin)
    assert low.dtype == high.dtype == th.float32 and low.shape == high.shape == (1,)
    assert (low.item(), high.item()) == pytest.approx(expected, rel=1e-5, abs=0)


def test_observations_before_and_after_count_each_dimension_for_itself():
    clipper = PredictionBounds(real([[0.0, 5.0], [1.0, 5.0]], [[0.0, 9.0], [-1.0, 7.0]], [1.0, 3.0]), 1.0)
    assert [bound.tolist() for bound in clipper.obs_bounds] == [[-3, 1], [3, 13]]
    assert [bound.tolist() for bound in clipper.reward_bounds] == [[-1], [5]]


@pytest.mark.parametrize("margin", [-1, -0.1, INF, NAN, "wide", True])
def test_refused_margins(margin):
    with pytest.raises(ValueError, match=r"prediction_clip_margin=.* must be None or a number of at least 0, "):
        MBPO("MlpPolicy", "Pendulum-v1", prediction_clip_margin=margin)


# ---------------------------------------------------------------------- what is held


def test_values_are_held_and_rows_counted():
    clipper = PredictionBounds(DATA, 1.0)
    dynamics = clipper.wrap(Says([[0.0], [8.0], [-9.0], [7.0], [0.0], [9.0]], [0.0, 0.0, 0.0, 4.0, -3.0, 5.0]))
    assert clipper.clipped == 0
    next_obs, rewards = dynamics.sample(th.zeros(6, 1), th.zeros(6, 1))
    assert next_obs.flatten().tolist() == [0, 7, -5, 7, 0, 7] and rewards.tolist() == [0, 0, 0, 4, -2, 4]
    # Four rows; the last in both, and counted once. The fourth is on the bound, not beyond.
    assert clipper.rows == 6 and clipper.clipped == pytest.approx(4 / 6)
    dynamics.sample(th.zeros(6, 1), th.zeros(6, 1))
    assert clipper.rows == 12 and clipper.clipped == pytest.approx(4 / 6)


@pytest.mark.parametrize("margin", [1.0, None])
def test_what_is_not_finite_stays_so_and_is_dropped(margin):
    clipper = PredictionBounds(DATA, margin)
    says = Says([[NAN], [INF], [-INF], [0.0], [0.0], [1.0]], [0.0, 0.0, 0.0, INF, NAN, 2.0])
    next_obs, rewards = clipper.wrap(says).sample(th.zeros(6, 1), th.zeros(6, 1))
    expected = says.sample(None, None)
    assert th.equal(next_obs.nan_to_num(nan=9), expected[0].nan_to_num(nan=9))
    assert th.equal(rewards.nan_to_num(nan=9), expected[1].nan_to_num(nan=9)) and clipper.clipped == 0
    data = branched_rollout(clipper.wrap(says), th.ones_like, lambda o, a, n: th.zeros(len(o)) > 0, th.zeros(6, 1), 1)
    assert data.next_observations.tolist() == [[1.0]] and clipper.rows - len(data.rewards) == 11


def test_without_margin_nothing_moves():
    clipper = PredictionBounds(DATA, None)
    says = Says([[1e30], [-1e30]], [1e30, -1e30])
    next_obs, rewards = clipper.wrap(says).sample(th.zeros(2, 1), th.zeros(2, 1))
    assert th.equal(next_obs, says.answer[0]) and th.equal(rewards, says.answer[1])
    assert clipper.clipped == 0 and clipper.rows == 2


def test_termination_and_branch_see_what_is_kept():
    asked = []

    class Grows(Says):
        def sample(self, obs, actions):
            asked.append(obs.flatten().tolist())
            return obs + 6, obs[:, 0]

    def at_seven(obs, actions, next_obs):
        return next_obs[:, 0] == 7

    dynamics = PredictionBounds(DATA, 1.0).wrap(Grows([[0.0]], [0.0]))
    data = branched_rollout(dynamics, th.ones_like, at_seven, th.tensor([[0.0], [-8.0]]), 3)
    # 0 -> 6 -> 12, held at 7, where it ends; -8 -> -2 -> 4 -> 10, held at 7.
    assert data.next_observations.flatten().tolist() == [6, -2, 7, 4, 7] and data.dones.flatten().tolist() == [0, 0, 1, 0, 1]
    assert asked == [[0, -8], [6, -2], [4]]


def test_a_known_reward_is_not_bounded_and_sees_what_is_kept():
    clipper = PredictionBounds(DATA, 1.0)
    known = KnownReward(Says([[99.0], [1.0]], [0.0, 0.0]), lambda obs, actions, next_obs: 100 * next_obs[:, 0])
    next_obs, rewards = clipper.wrap(known).sample(th.zeros(2, 1), th.zeros(2, 1))
    assert next_obs.flatten().tolist() == [7, 1] and rewards.tolist() == [700, 100] and clipper.clipped == 0.5


def test_the_held_model_is_the_other_in_all_else():
    says = Says([[0.0]], [0.0])
    says.min_transitions = 7
    held = PredictionBounds(DATA, 1.0).wrap(says)
    assert held.fit(DATA) == {"rows": 2} and held.generator is says.generator
    assert (held.obs_dim, held.action_dim, held.min_transitions) == (1, 1, 7)
    # The expected outcome is held as well.
    says.answer = th.tensor([[99.0]]), th.tensor([99.0])
    assert held.predict_mean(th.zeros(1, 1), th.zeros(1, 1)).tolist() == [[4, 7]]


def test_gradients_pass():
    class Doubles(Says):
        def sample(self, obs, actions):
            return 2 * obs, obs[:, 0]

    obs = th.tensor([[1.0], [50.0]], requires_grad=True)
    next_obs, _ = PredictionBounds(DATA, 1.0).wrap(Doubles([[0.0]], [0.0])).sample(obs, obs)
    next_obs.sum().backward()
    assert obs.grad.flatten().tolist() == [2, 0]


# ---------------------------------------------------------------------- in an agent


def test_the_default_leaves_a_sound_model_alone():
    """No row is clipped on a task where the model is sound, and then the agent is the unbounded one, bit for bit."""
    agents = [MBPO("MlpPolicy", "Pendulum-v1", prediction_clip_margin=margin, **FAST).learn(60) for margin in (1.0, None)]
    assert agents[0].logger.name_to_value["dynamics/clipped"] == 0
    first, second = (agent.replay_buffer.model_buffer.contents()[0] for agent in agents)
    assert th.equal(first, second)
    assert all(th.equal(a, b) for a, b in zip(*(agent.policy.parameters() for agent in agents), strict=True))


def test_an_agent_holds_what_it_imagines():
    class Explodes(DynamicsModel):
        def fit(self, transitions, progress=None):
            return {}

        def sample(self, obs, actions):
            return obs * 1e6, th.full((len(obs),), 1e6)

    settings = {**FAST, "dynamics_class": Explodes, "dynamics_kwargs": None, "prediction_clip_margin": "5e-1"}
    agent = MBPO("MlpPolicy", "Pendulum-v1", **settings).learn(25)
    assert agent.prediction_clip_margin == 0.5 and agent.logger.name_to_value["dynamics/clipped"] == 1
    real = agent.replay_buffer.real_transitions()
    # The fit was after step 21.
    seen = th.cat([real.observations[:21], real.next_observations[:21]])
    least, most = seen.amin(dim=0), seen.amax(dim=0)
    rows = agent.replay_buffer.model_buffer.contents()[0]
    assert (rows[:, 4:7] <= most + 0.5001 * (most - least)).all() and (rows[:, 4:7] >= least - 0.5001 * (most - least)).all()
    rewards = real.rewards[:21]
    top = rewards.max() + 0.5 * (rewards.max() - rewards.min())
    th.testing.assert_close(rows[:, 8], top.expand(len(rows)))


def test_the_margin_is_saved(tmp_path):
    MBPO("MlpPolicy", "Pendulum-v1", prediction_clip_margin=None, **FAST).save(tmp_path / "agent")
    assert MBPO.load(tmp_path / "agent").prediction_clip_margin is None
    assert MBPO.load(tmp_path / "agent", prediction_clip_margin=2).prediction_clip_margin == 2
