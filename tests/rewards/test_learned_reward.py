"""The learned reward of a transition."""

import sys
from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tiny import FAST, equal_agents

from sb3_mbpo import MBPO, DynamicsModel
from sb3_mbpo.rewards.learned import LearnedReward, TransitionReward
from sb3_mbpo.rollouts import branched_rollout
from sb3_mbpo.trust.prediction_bounds import PredictionBounds

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ends
import streams

POLE = "InvertedPendulum-v5"


def penalty_task(n: int = 1500, seed: int = 0) -> tuple[ReplayBufferSamples, DynamicsModel]:
    return streams.stream("ForbiddenDisc-v0", n, seed), ends.TrueForbiddenDisc(4, 2, seed=0)


def made_up(n: int, bonus: th.Tensor | float, n_ends: int) -> ReplayBufferSamples:
    """Rewards 3 x next_obs[0] + 0.5 x action, and a bonus in the first ``n_ends`` rows, which end."""
    generator = th.Generator().manual_seed(0)
    obs, actions = th.randn(n, 2, generator=generator), th.rand(n, 1, generator=generator) * 2 - 1
    next_obs = obs + 0.3 * actions
    dones = (th.arange(n) < n_ends).float()[:, None]
    rewards = 3 * next_obs[:, :1] + 0.5 * actions + dones * bonus
    return ReplayBufferSamples(obs, actions, next_obs, dones, rewards)


class Moves(DynamicsModel):
    """What ``made_up`` does, and a reward that is wrong."""

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        return obs + 0.3 * actions, th.full((len(obs),), 999.0)


def test_a_penalty_at_the_end_is_paid_there_and_nowhere_else() -> None:
    data, dynamics = penalty_task()
    assert 10 <= int(data.dones.sum()) <= 200
    reward = LearnedReward(4, 2, seed=0, device="cpu")
    metrics = reward.fit(data, dynamics)
    fresh = streams.joined(streams.episodes("ForbiddenDisc-v0", 40, 0, 777))
    ended = fresh.dones[:, 0] > 0.5
    with th.no_grad():
        error = (reward(*fresh[:3], ended) - fresh.rewards[:, 0]).abs()
        would_be = reward(*fresh[:3], ~ended)
    assert error[~ended].mean() < 0.1 and error[ended].mean() < 0.5
    # Nothing but the end decides on the 20.
    assert would_be[ended].min() > -5 and would_be[~ended].max() < -15
    assert float(metrics["explained_reward"]) > 0.95 and float(metrics["reward_error"]) < 0.2


@pytest.mark.parametrize("n_ends", [1, 2, 30])
def test_a_constant_bonus_is_known_after_one_end(n_ends: int) -> None:
    data = made_up(600, 100.0, n_ends)
    reward = LearnedReward(2, 1, seed=0, device="cpu")
    reward.fit(data, Moves(2, 1, seed=0))
    fresh = made_up(200, 100.0, 200)
    with th.no_grad():
        paid = reward(*fresh[:3], fresh.dones[:, 0] > 0.5)
    assert (paid - fresh.rewards[:, 0]).abs().mean() < 1.0


def test_a_bonus_that_depends_on_the_state_is_learned() -> None:
    """A landing pays 100, a crash costs as much."""
    data, fresh = made_up(900, 0.0, 60), made_up(400, 0.0, 400)
    for rows in (data, fresh):
        rows.rewards.add_(rows.dones * 100 * rows.next_observations[:, :1].sign())
    reward = LearnedReward(2, 1, seed=0, device="cpu")
    reward.fit(data, Moves(2, 1, seed=0))
    with th.no_grad():
        paid = reward(*fresh[:3], fresh.dones[:, 0] > 0.5)
    right = (paid.sign() == fresh.rewards[:, 0].sign()).float().mean()
    assert right > 0.9


def test_the_reward_relies_on_what_the_dynamics_predicts_well() -> None:
    """A dynamics whose predictions are noise: the reward has to be read off observation and action."""

    class Noise(Moves):
        def sample(self, obs, actions):
            return obs + 0.3 * actions + th.randn(obs.shape, generator=self.generator), obs[:, 0]

    data, dynamics = made_up(1000, 0.0, 0), Noise(2, 1, seed=0)
    reward = LearnedReward(2, 1, seed=0, device="cpu")
    reward.fit(data, dynamics)
    next_obs, _ = dynamics.sample(data.observations, data.actions)
    with th.no_grad():
        error = (reward(*data[:2], next_obs, th.zeros(1000, dtype=th.bool)) - data.rewards[:, 0]).square().mean()
    assert error < 0.2 * data.rewards.var()


def test_a_fit_does_not_make_held_out_rewards_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    data, dynamics = made_up(500, 0.0, 0), Moves(2, 1, seed=0)
    reward = LearnedReward(2, 1, seed=0, device="cpu")
    first = reward.fit(data, dynamics)["reward_error"]
    monkeypatch.setattr("sb3_mbpo.rewards.learned._LEARNING_RATE", 10.0)
    before = reward.state_dict()["going_on.network.layers.0.weight"].clone()
    assert reward.fit(data, dynamics)["reward_error"] == pytest.approx(first)
    assert th.equal(reward.state_dict()["going_on.network.layers.0.weight"], before)


def test_an_interrupted_fit_changes_nothing() -> None:
    class Stop(Exception):
        pass

    def stop(words: str) -> None:
        raise Stop

    reward = LearnedReward(2, 1, seed=0, device="cpu")
    before = {name: value.clone() for name, value in reward.state_dict().items()}
    with pytest.raises(Stop):
        reward.fit(made_up(500, 0.0, 10), Moves(2, 1, seed=0), stop)
    assert all(th.equal(value, before[name]) for name, value in reward.state_dict().items())


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("n_ends", [0, 1, 5])
def test_next_to_nothing_is_no_error(n: int, n_ends: int) -> None:
    reward, data = LearnedReward(2, 1, seed=0, device="cpu"), made_up(n, 5.0, min(n, n_ends))
    metrics = reward.fit(data, Moves(2, 1, seed=0))
    assert all(value == value for value in metrics.values())
    assert all(value.isfinite().all() and value.is_floating_point() for value in reward.state_dict().values())
    with th.no_grad():
        assert reward(*data[:3], data.dones[:, 0] > 0.5).isfinite().all()


# ---------------------------------------------------------------------- in imagination


def test_imagined_transitions_are_paid_by_whether_they_end() -> None:
    data, dynamics = penalty_task()
    reward = LearnedReward(4, 2, seed=0, device="cpu")
    reward.fit(data, dynamics)
    around = TransitionReward(dynamics, reward, ends.ForbiddenDisc.ended)
    imagined = branched_rollout(
        PredictionBounds(data, 1.0).wrap(around),
        lambda obs: th.cat([th.ones(len(obs), 1), -obs[:, 1:2]], dim=1).clamp(-1, 1),
        ends.ForbiddenDisc.ended,
        data.observations[:300],
        10,
    )
    truth = ends.ForbiddenDisc.reward(*imagined[:3])
    ended = imagined.dones[:, 0] > 0.5
    error = (imagined.rewards[:, 0] - truth).abs()
    assert int(ended.sum()) > 20 and error[ended].mean() < 0.7 and error[~ended].mean() < 0.15


def test_rewards_are_clipped_apart_on_the_way_and_at_the_end() -> None:
    class Says(th.nn.Module):
        def forward(self, obs, actions, next_obs, terminated):
            return th.where(terminated, -1000.0, 1000.0)

    data, dynamics = penalty_task()
    bounds = PredictionBounds(data, 1.0)
    around = TransitionReward(dynamics, Says(), lambda obs, actions, next_obs: obs[:, 0] > -0.5)  # type: ignore[arg-type]
    _, rewards = bounds.wrap(around).sample(data.observations[:200], data.actions[:200])
    going = data.rewards[data.dones < 0.5]
    spread = going.max() - going.min()
    ended = data.observations[:200, 0] > -0.5
    th.testing.assert_close(rewards[~ended], (going.max() + spread).expand(int((~ended).sum())))
    ending = data.rewards[data.dones > 0.5]
    th.testing.assert_close(rewards[ended], (ending.min() - spread).expand(int(ended.sum())))
    assert bounds.clipped == 1


def test_a_termination_is_not_asked_about_numbers_that_are_none() -> None:
    class Breaks(Moves):
        def sample(self, obs, actions):
            next_obs, rewards = super().sample(obs, actions)
            next_obs[0] = th.nan
            return next_obs, rewards

    def ended(obs, actions, next_obs):
        assert next_obs.isfinite().all()
        return next_obs[:, 0] > 0

    around = TransitionReward(Breaks(2, 1, seed=0), LearnedReward(2, 1, seed=0, device="cpu"), ended)
    next_obs, rewards = around.sample(th.zeros(3, 2), th.zeros(3, 1))
    assert next_obs[0].isnan().all() and rewards.isfinite().all()


def test_gradients_pass() -> None:
    around = TransitionReward(
        Moves(2, 1, seed=0), LearnedReward(2, 1, seed=0, device="cpu"), lambda obs, actions, next_obs: obs[:, 0] > 0
    )
    around.reward.fit(made_up(200, 1.0, 10), around.dynamics)
    actions = th.zeros(4, 1, requires_grad=True)
    around.sample(th.ones(4, 2), actions)[1].sum().backward()
    assert actions.grad is not None and actions.grad.abs().min() > 0


# ---------------------------------------------------------------------- in an agent


def predicted(agent: MBPO, rows: ReplayBufferSamples) -> th.Tensor:
    rewards = agent.predict_reward(*rows[:3], rows.dones[:, 0] > 0.5)
    assert rewards is not None
    return rewards


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_the_reward_is_learned_unless_it_is_known_or_joint() -> None:
    agents = {
        name: MBPO("MlpPolicy", POLE, reward_fn=reward_fn, **FAST).learn(25)
        for name, reward_fn in {"learned": None, "joint": "joint", "known": lambda obs, actions, next_obs: obs[:, 0]}.items()
    }
    kinds = {name: type(agent.imagined_dynamics).__name__ for name, agent in agents.items()}
    assert kinds == {"learned": "TransitionReward", "joint": "ProbabilisticEnsemble", "known": "KnownReward"}
    rows = agents["learned"].replay_buffer.real_transitions()
    assert agents["joint"].predict_reward(*rows[:3], rows.dones[:, 0] > 0.5) is None
    assert th.equal(predicted(agents["known"], rows), rows.observations[:, 0])
    assert predicted(agents["learned"], rows).shape == (len(rows.rewards),)
    logged = {name: "dynamics/reward_error" in agent.logger.name_to_value for name, agent in agents.items()}
    assert logged == {"learned": True, "joint": False, "known": False}


def test_joint_is_the_dynamics_own_reward() -> None:
    agent = MBPO("MlpPolicy", POLE, reward_fn="joint", **FAST).learn(25)
    rows = agent.replay_buffer.real_transitions()
    state = agent.dynamics.generator.get_state()
    with th.no_grad():
        first = agent.dynamics.sample(*rows[:2])
        agent.dynamics.generator.set_state(state)
        second = agent.imagined_dynamics.sample(*rows[:2])
    assert th.equal(first[1], second[1])
    assert all(th.equal(a, b) for a, b in zip(agent.learned_reward.parameters(), untrained(), strict=True))


def untrained() -> list[th.Tensor]:
    return list(LearnedReward(4, 1, seed=0, device="cpu").parameters())


def test_a_dynamics_class_of_the_users_keeps_its_rewards() -> None:
    agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "dynamics_class": Moves, "dynamics_kwargs": None})
    assert type(agent.imagined_dynamics) is Moves


def test_it_is_saved_loaded_and_seeded(tmp_path: Path) -> None:
    agent = MBPO("MlpPolicy", POLE, **FAST).learn(30)
    rows = agent.replay_buffer.real_transitions()
    agent.save(tmp_path / "agent")
    for safe in (False, True):
        loaded = MBPO.load(tmp_path / "agent", safe=safe)
        assert bool(loaded.learned_reward.fitted)
        assert th.equal(predicted(loaded, rows), predicted(agent, rows))
    for one in (agent, loaded):
        one.set_random_seed(3)
        one.fit_reward(rows)
    assert th.equal(predicted(loaded, rows), predicted(agent, rows))
    MBPO("MlpPolicy", POLE, reward_fn="joint", **FAST).save(tmp_path / "joint")
    assert MBPO.load(tmp_path / "joint", safe=True).reward_fn == "joint"


def test_two_runs_of_one_seed_are_equal() -> None:
    first, second = (MBPO("MlpPolicy", POLE, **FAST).learn(40) for _ in range(2))
    assert equal_agents(first, second)
    state = second.learned_reward.state_dict()
    assert all(th.equal(value, state[name]) for name, value in first.learned_reward.state_dict().items())


def test_observations_whose_sums_are_alike_teach_a_reward():
    """One-hot observations: rows are held out by all of their content, not by a sum of it."""
    generator = th.Generator().manual_seed(0)
    obs = th.eye(4)[th.randint(4, (400,), generator=generator)]
    actions = 2 * th.rand(400, 1, generator=generator) - 1
    rewards = actions * (obs @ th.tensor([[1.0], [2.0], [-1.0], [0.5]]))
    rows = ReplayBufferSamples(obs, actions, obs, th.zeros(400, 1), rewards)
    learned = LearnedReward(4, 1, seed=0, device="cpu")
    metrics = learned.fit(rows, Still(4, 1))
    with th.no_grad():
        errors = learned(obs, actions, obs, th.zeros(400, dtype=th.bool)) - rewards[:, 0]
    assert errors.var() < 0.05 * rewards.var() and metrics["explained_reward"] > 0.9


def test_too_few_rows_explain_nothing_and_forget_nothing():
    """A constant earns no trust; and a handful of rows after ``forget_transitions`` leaves what was learned."""
    generator = th.Generator().manual_seed(0)
    obs, actions = th.randn(400, 2, generator=generator), th.randn(400, 1, generator=generator)
    rows = ReplayBufferSamples(obs, actions, obs, th.zeros(400, 1), obs[:, :1].clone())
    few = ReplayBufferSamples(*(part[:2] for part in rows[:5]))
    learned = LearnedReward(2, 1, seed=0, device="cpu")
    assert learned.fit(few, Still(2, 1))["explained_reward"] == 0
    learned.fit(rows, Still(2, 1))
    never = th.zeros(400, dtype=th.bool)
    with th.no_grad():
        before = learned(obs, actions, obs, never)
        learned.fit(few, Still(2, 1))
        assert th.equal(learned(obs, actions, obs, never), before)


def test_a_reward_that_is_not_a_number_is_left_out():
    generator = th.Generator().manual_seed(0)
    obs, actions = th.randn(400, 2, generator=generator), th.randn(400, 1, generator=generator)
    rewards = obs[:, :1].clone()
    rewards[7] = float("nan")
    learned = LearnedReward(2, 1, seed=0, device="cpu")
    metrics = learned.fit(ReplayBufferSamples(obs, actions, obs, th.zeros(400, 1), rewards), Still(2, 1))
    assert metrics["explained_reward"] > 0.9 and all(value.isfinite().all() for value in learned.state_dict().values())


class Still(DynamicsModel):
    """Nothing moves."""

    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        return obs, obs[:, 0]
