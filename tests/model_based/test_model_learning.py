"""The agent's work with its model, called by hand; when ``learn`` calls it is in test_callbacks.py."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from tiny import FAST, TruePendulum

from sb3_mbpo import DHMBPO, MBPO, MBTD3, DynamicsModel
from sb3_mbpo.model_based.model_learning import ModelLearning


def pendulum(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Transitions of random actions, for ``prefill``."""
    env = gym.make("Pendulum-v1")
    rows: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "next_observations", "rewards")}
    obs, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    for _ in range(n):
        action = env.action_space.sample()
        next_obs, reward, *_ = env.step(action)
        for name, value in zip(rows, (obs, action, next_obs, reward), strict=True):
            rows[name].append(value)
        obs = next_obs
    return {name: np.array(values) for name, values in rows.items()} | {"terminations": np.zeros(n, bool)}


def prefilled(n: int = 60, cls: type = MBPO, **kwargs: Any) -> Any:
    """An agent that never learned, with real transitions."""
    agent = cls("MlpPolicy", "Pendulum-v1", **{**FAST, **kwargs})
    agent.prefill(pendulum(n))
    return agent


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize("cls", [MBPO, MBTD3, DHMBPO])
def test_before_any_learn(cls):
    agent, said = prefilled(cls=cls), []
    with pytest.raises(AttributeError):
        agent.logger  # noqa: B018
    fitted = agent.fit_dynamics(said.append)
    assert agent.dynamics.usable and agent.dynamics_fitted_at == 0 and said[0].startswith("fitting the dynamics")
    assert {"train_loss", "reward_error", "termination", "explained_obs", "gate", "fit_seconds", "fit_cpu_seconds"} <= {
        *fitted
    }
    assert fitted["gate"] == "open" and len(agent.replay_buffer.model_buffer) == 0
    imagined = agent.generate_rollouts(n=7, length=2, progress=said.append)
    assert list(agent.replay_buffer.model_buffer.refills) == [14] and said[-1] == "imagining, 7 of 7 branches"
    assert imagined.keys() == {
        *("rollout_length", "branch_length", "dropped", "clipped", "rollout_seconds", "rollout_cpu_seconds"),
    }
    assert (imagined["rollout_length"], imagined["branch_length"], imagined["dropped"]) == (2, 2, 0)
    # Imagined from real states.
    real, rows = agent.replay_buffer.real_transitions().observations, agent.replay_buffer.model_buffer.contents()[0]
    assert (th.cdist(rows[:7, :3], real).min(dim=1).values < 1e-6).all()
    agent.learn(30)
    assert agent._n_updates > 0


def test_the_fit_by_hand_is_a_fit_of_the_run():
    """``learn`` updates on what is there, and fits when the next multiple has passed."""
    agent = prefilled(model_train_freq=25, gradient_steps=1)
    agent.fit_dynamics()
    agent.generate_rollouts()
    fitted_at: list[int | None] = []
    agent.learn(60, callback=lambda *_: fitted_at.append(agent.dynamics_fitted_at) or True)
    assert [*dict.fromkeys(fitted_at)] == [0, 25, 50] and agent._n_updates == 40


def test_defaults_are_those_of_the_run():
    agent = prefilled(rollout_schedule={"min_length": 3, "max_length": 5, "start": 0, "end": 100})
    agent.fit_dynamics()
    assert agent.generate_rollouts()["rollout_length"] == 3
    assert list(agent.replay_buffer.model_buffer.refills) == [90]


def test_after_learn_nothing_is_logged_and_k_is_measured():
    agent = prefilled(dynamics_class=TruePendulum, dynamics_kwargs=None, rollout_schedule="auto", model_train_freq=60)
    agent.learn(110)
    agent.auto_rollout_length = 1
    log = dict(agent.logger.name_to_value)
    assert agent.fit_dynamics()["explained_obs"] > 0.9999 and agent.dynamics_fitted_at == 110
    assert agent.rollout_length == 15 == agent.generate_rollouts(n=2)["rollout_length"]
    assert agent.logger.name_to_value == log
    # Nothing is new since: k stays, and held-out rows set the imagined fraction.
    agent.fit_dynamics()
    assert agent.rollout_length == 15 and agent.imagined_fraction == 1


def test_a_rollout_is_made_whatever_the_dynamics_has_earned(monkeypatch):
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.imagined_fraction", lambda *given: 0.0)
    agent = prefilled()
    assert agent.fit_dynamics()["gate"] != "open" and agent.unused_fits == 1
    agent.generate_rollouts()
    assert len(agent.replay_buffer.model_buffer) == 30


# ---------------------------------------------------------------------- what is refused


def test_without_real_transitions():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match=r"fit_dynamics: 0 real transitions are too few, there must be at least .* prefill"):
        agent.fit_dynamics()
    with pytest.raises(ValueError, match=r"generate_rollouts: the dynamics has had no good fit yet\. Call fit_dynamics first"):
        agent.generate_rollouts()


def test_with_too_few_of_them():
    agent = prefilled(9)
    agent.dynamics.min_transitions = 10
    with pytest.raises(ValueError, match="fit_dynamics: 9 real transitions are too few, there must be at least 10"):
        agent.fit_dynamics()
    assert agent.dynamics_fitted_at is None and not agent.dynamics.usable


def test_a_rollout_needs_a_fit_to_the_present_world(tmp_path):
    agent = prefilled()
    with pytest.raises(ValueError, match="Call fit_dynamics first"):
        agent.generate_rollouts()
    agent.fit_dynamics()
    agent.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent")
    with pytest.raises(ValueError, match="generate_rollouts: 0 real transitions are too few"):
        loaded.generate_rollouts()
    agent.forget_transitions(keep=20)
    with pytest.raises(ValueError, match="Call fit_dynamics first"):
        agent.generate_rollouts()


def test_a_fit_that_leaves_nothing_usable_is_none_to_imagine_with():
    class Never(TruePendulum):
        usable = False

    agent = prefilled(dynamics_class=Never, dynamics_kwargs=None)
    agent.fit_dynamics()
    with pytest.raises(ValueError, match="had no good fit yet"):
        agent.generate_rollouts()


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, float("nan")])
@pytest.mark.parametrize("name", ["n", "length"])
def test_numbers_that_are_none(name, value):
    agent = prefilled()
    agent.fit_dynamics()
    with pytest.raises(ValueError, match=f"generate_rollouts: {name}=.* must be a whole number of at least 1"):
        agent.generate_rollouts(**{name: value})
    assert len(agent.replay_buffer.model_buffer.refills) == 0


# ---------------------------------------------------------------------- overridden


def test_learn_calls_what_a_subclass_makes_of_them():
    class Mine(MBPO):
        def fit_dynamics(self, progress=None):
            return {**super().fit_dynamics(progress), "mine": 7.0}

        def generate_rollouts(self, n=None, length=None, progress=None):
            short = super().generate_rollouts(5, 1, progress)
            return {**short, "long": super().generate_rollouts(2, 4, progress)["branch_length"]}

    agent = Mine("MlpPolicy", "Pendulum-v1", **FAST).learn(25)
    assert list(agent.replay_buffer.model_buffer.refills) == [5, 8]
    logged = agent.logger.name_to_value
    assert logged["dynamics/mine"] == 7 and logged["dynamics/long"] == 4 and logged["dynamics/rollout_length"] == 1
    assert issubclass(Mine, ModelLearning)


# ---------------------------------------------------------------------- memory


def test_the_room_that_memory_had_is_remembered_but_not_saved(tmp_path):
    class Cramped(DynamicsModel):
        def fit(self, transitions, progress=None):
            return {}

        def sample(self, obs, actions):
            if len(obs) > 8:
                raise MemoryError
            return obs, obs[:, 0]

    agent = prefilled(dynamics_class=Cramped, dynamics_kwargs=None)
    agent.fit_dynamics()
    with pytest.warns(UserWarning, match="rollout of 30 start states; from now on 7 are imagined at once"):
        agent.generate_rollouts()
    said: list[str] = []
    agent.generate_rollouts(progress=said.append)
    assert said[0] == "imagining, 7 of 30 branches"
    agent.save(tmp_path / "agent")
    assert "_rollout_block" in vars(agent)
    assert "_rollout_block" not in vars(MBPO.load(tmp_path / "agent"))
