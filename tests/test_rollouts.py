import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_mbpo.dynamics.base import DynamicsModel
from sb3_mbpo.rollout_schedule import LinearRolloutSchedule, make_schedule, rollout_length
from sb3_mbpo.rollouts import branched_rollout


class Counter(DynamicsModel):
    """next_obs = obs + action, reward = obs; a branch can be told by its fraction."""

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        return obs + actions, obs[:, 0]


class TruePendulum(DynamicsModel):
    """InvertedPendulum-v5 itself: its observation is its whole state."""

    def __init__(self):
        super().__init__(4, 1)
        self.env = gym.make("InvertedPendulum-v5").unwrapped
        self.env.reset(seed=0)

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        results = []
        for state, action in zip(obs.double().numpy(), actions.numpy(), strict=True):
            self.env.set_state(state[:2], state[2:])
            next_obs, reward, *_ = self.env.step(3 * action)
            results.append([*next_obs, reward])
        result = th.tensor(np.array(results), dtype=th.float32)
        return result[:, :4], result[:, 4]


def ones(obs):
    return th.ones_like(obs)


def never(obs, actions, next_obs):
    return th.zeros(len(obs), dtype=th.bool)


def test_every_branch_takes_every_step():
    start = th.tensor([[0.0], [0.25], [0.5]])
    data = branched_rollout(Counter(1, 1), ones, never, start, length=4)
    expected = [step + fraction for step in range(4) for fraction in (0, 0.25, 0.5)]
    assert data.observations.flatten().tolist() == expected
    assert data.next_observations.flatten().tolist() == [x + 1 for x in expected]
    assert data.rewards.flatten().tolist() == expected and (data.dones == 0).all()
    assert data.rewards.shape == data.dones.shape == (12, 1) and (data.actions == 1).all()


def test_finished_branches_are_stored_then_dropped():
    def at_two(obs, actions, next_obs):
        return (next_obs[:, 0] >= 2) & (next_obs[:, 0] < 2.3)

    data = branched_rollout(Counter(1, 1), ones, at_two, th.tensor([[0.0], [0.5], [1.25]]), length=3)
    # Branch 0.0 ends with 1 -> 2, branch 1.25 with its first step, branch 0.5 never.
    rows = list(zip(data.observations.flatten().tolist(), data.dones.flatten().tolist(), strict=True))
    assert rows == [(0.0, 0), (0.5, 0), (1.25, 1), (1.0, 1), (1.5, 0), (2.5, 0)]


def test_stops_when_all_are_finished():
    steps = []

    def always(obs, actions, next_obs):
        steps.append(len(obs))
        return th.ones(len(obs), dtype=th.bool)

    assert len(branched_rollout(Counter(1, 1), ones, always, th.zeros(5, 1), length=10).rewards) == 5
    assert steps == [5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["obs", "reward"])
def test_non_finite_transitions_are_left_out(bad, where):
    class Broken(Counter):
        def sample(self, obs, actions):
            next_obs, rewards = super().sample(obs, actions)
            (next_obs[:, 0] if where == "obs" else rewards)[obs[:, 0] == 1.5] = bad
            return next_obs, rewards

    data = branched_rollout(Broken(1, 1), ones, never, th.tensor([[0.0], [0.5]]), length=3)
    assert data.observations.flatten().tolist() == [0, 0.5, 1, 2]
    assert all(part.isfinite().all() for part in data[:5])
    everything_bad = branched_rollout(Broken(1, 1), ones, never, th.tensor([[1.5]]), length=3)
    assert len(everything_bad.rewards) == 0 and [part.shape[1] for part in everything_bad[:5]] == [1, 1, 1, 1, 1]


def test_the_policy_sees_where_the_branch_is_now():
    seen = []

    def policy(obs):
        seen.append(obs.clone())
        return th.ones_like(obs)

    branched_rollout(Counter(1, 1), policy, never, th.zeros(1, 1), length=3)
    assert [x.item() for x in seen] == [0, 1, 2]


def test_oracle_equals_the_true_system():
    """Imagined with the true system as dynamics, a branch is the episode the real env steps through."""
    env = gym.make("InvertedPendulum-v5")
    generator = np.random.default_rng(0)
    for seed in range(5):
        first, _ = env.reset(seed=seed)
        actions = generator.uniform(-1, 1, (60, 1)).astype(np.float32)
        queue = iter(actions)
        data = branched_rollout(
            TruePendulum(),
            lambda obs, queue=queue: th.tensor(next(queue)).unsqueeze(0),
            lambda obs, actions, next_obs: next_obs[:, 1].abs() > 0.2,
            th.tensor(first, dtype=th.float32).unsqueeze(0),
            length=60,
        )
        # Each imagined state is rounded to float32; stepping on from it is compared step by step.
        for i in range(len(data.rewards)):
            env.unwrapped.set_state(*np.split(data.observations[i].double().numpy(), 2))
            next_obs, reward, terminated, *_ = env.step(3 * actions[i])
            np.testing.assert_allclose(data.next_observations[i], next_obs, rtol=1e-6, atol=1e-7)
            assert data.rewards[i].item() == reward and bool(data.dones[i]) == terminated
        assert bool(data.dones[-1]) and not data.dones[:-1].any()


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        # The paper's tables in epochs of 1,000 steps (facts of the original code), warm-up not counted.
        (
            LinearRolloutSchedule(1, 15, 20_000, 150_000),
            {0: 1, 20_000: 1, 29_000: 1, 30_000: 2, 124_000: 12, 150_000: 15, 10**7: 15},
        ),
        (LinearRolloutSchedule(1, 25, 20_000, 100_000), {0: 1, 24_000: 2, 99_000: 24, 100_000: 25}),
        (LinearRolloutSchedule(1, 25, 20_000, 300_000), {31_000: 1, 32_000: 2, 299_000: 24, 300_000: 25}),
        (LinearRolloutSchedule(1, 1, 20_000, 150_000), {0: 1, 10**6: 1}),
        (LinearRolloutSchedule(2, 4, 100, 100), {99: 2, 100: 4}),
    ],
)
def test_linear_schedule(schedule, table):
    assert {step: schedule(step) for step in table} == table


@pytest.mark.parametrize("end", [103, 1_000, 130_000])
def test_linear_schedule_is_the_formula(end):
    schedule = LinearRolloutSchedule(1, 15, 100, end)
    for step in range(0, end + 200, max(end // 1000, 1)):
        fraction = min(max((step - 100) / (end - 100), 0), 1)
        # A float quotient may fall just short of a whole number.
        assert schedule(step) in {math.floor(1 + fraction * 14), math.floor(1 + fraction * 14 + 1e-9)}
        assert type(schedule(step)) is int


@pytest.mark.parametrize("spec", [3, {"min_length": 3, "max_length": 3, "start": 0, "end": 10}, lambda step: 3])
def test_forms_of_a_schedule(spec):
    assert rollout_length(spec, 17) == 3


@pytest.mark.parametrize(
    "spec",
    [
        0,
        -1,
        2.5,
        True,
        None,
        "auto",
        [1, 15],
        {"min_length": 1},
        {"min_length": 5, "max_length": 1, "start": 0, "end": 10},
        {"min_length": 0, "max_length": 3, "start": 0, "end": 10},
        {"min_length": 1, "max_length": 3, "start": 10, "end": 5},
        {"min_length": 1, "max_length": 3, "start": -1, "end": 5},
        {"min_length": 1, "max_length": 3, "start": 0, "end": 10, "step": 1},
    ],
)
def test_bad_schedules(spec):
    with pytest.raises(ValueError, match="rollout_schedule"):
        make_schedule(spec)


@pytest.mark.parametrize("length", [0, -3, 1.5, math.nan])
def test_a_callable_schedule_must_give_lengths(length):
    with pytest.raises(ValueError, match="not a whole number >= 1"):
        rollout_length(lambda step: length, 100)
