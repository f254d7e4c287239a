"""A fit and the rollouts after it happen as a whole or not at all."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tiny import FAST

from sb3_mbpo import MBPO, MBTD3, DynamicsModel, ModelBased, RolloutCallback
from sb3_mbpo.dynamics.probabilistic_ensemble import ProbabilisticEnsemble
from sb3_mbpo.rewards.learned import LearnedReward
from sb3_mbpo.terminations.learned import LearnedTermination


class Walk(gym.Env):
    """A random walk that ends outside [-1, 1]."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (1,)), spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.float32(self.np_random.uniform(-0.2, 0.2))
        return np.array([self.place]), {}

    def step(self, action: np.ndarray) -> Any:
        self.place = np.float32(self.place + 0.5 * action[0])
        return np.array([self.place]), float(self.place), bool(abs(self.place) > 1), False, {}


class Failure:
    """Raises ``error`` when it is called for the n-th time, counted from ``arm`` on; calls ``function`` before."""

    def __init__(self, error: BaseException, function: Callable[..., Any]) -> None:
        self.error, self.function, self.left = error, function, -1

    def arm(self, n: int) -> None:
        self.left = n

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return result


class Own(DynamicsModel):
    """A user's own: one linear layer, an optimizer, noise; fails in the midst of a fit."""

    fail: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, obs_dim: int, action_dim: int, *, seed: int | None = None, device: Any = "cpu") -> None:
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        self.layer = th.nn.Linear(obs_dim + action_dim, obs_dim + 1)
        self.optimizer: th.optim.Adam = th.optim.Adam(self.parameters(), lr=1e-2)

    def fit(self, transitions: Any, progress: Any = None) -> dict[str, float | str]:
        x = th.cat([transitions.observations, transitions.actions], dim=1)
        y = th.cat([transitions.rewards, transitions.next_observations], dim=1)
        for _ in range(5):
            rows = th.randint(len(x), (16,), generator=self.generator)
            self.optimizer.zero_grad()
            ((self.layer(x[rows]) - y[rows]) ** 2).mean().backward()
            self.optimizer.step()
            self.fail()
        return {"own": 1.0}

    @th.no_grad()
    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        predicted = self.layer(th.cat([obs, actions], dim=1))
        noise = th.randn(len(obs), generator=self.generator)
        return predicted[:, 1:] + 0.1 * noise.unsqueeze(1), predicted[:, 0]


LEARNED = ("dynamics", "learned_reward", "learned_termination")


def flat(value: Any) -> Any:
    """Comparable with ``==``."""
    if isinstance(value, th.Tensor):
        return value.detach().cpu().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def state(agent: Any) -> dict[str, Any]:
    """What a fit and a rollout change."""
    buffer = agent.replay_buffer
    generators = {name: getattr(agent, name).generator for name in (*LEARNED, "replay_buffer")}
    plain = [
        *(
            "auto_rollout_length",
            "imagined_fraction",
            "filter_state",
            "dynamics_fitted_at",
            "num_timesteps",
            "rollout_length",
        ),
        *("forward_errors", "explained_at_fit", "unused_fits"),
    ]
    return {
        "parameters": flat(agent.get_parameters()),
        "generators": {name: flat(generator.get_state()) for name, generator in generators.items()},
        "random": flat([th.get_rng_state(), np.random.get_state()]),
        "plain": {name: flat(getattr(agent, name)) for name in plain},
        "log": dict(agent.logger.name_to_value) if hasattr(agent, "_logger") else {},
        "refills": list(buffer.model_buffer.refills),
        "imagined": flat(buffer.model_buffer.contents()[0]),
    }


def run(monkeypatch: pytest.MonkeyPatch, failure: Failure, n: int, cls: type = MBPO, **kwargs: Any) -> tuple[Any, Any]:
    """
    Learn through one fit, then into the next one, which fails.

    :return: the agent, and its state right before the failed fit
    """
    settings = {**FAST, "model_train_freq": 30, "gradient_steps": 1, "rollout_schedule": "auto", **kwargs}
    agent = cls("MlpPolicy", Walk(), **settings)
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.ROLLOUT_BLOCK", {"cpu": 7})
    states: list[Any] = []
    original = RolloutCallback._on_rollout_end

    def watched(self: RolloutCallback) -> None:
        states.append(state(agent))
        original(self)

    monkeypatch.setattr(RolloutCallback, "_on_rollout_end", watched)
    agent.learn(55)
    assert agent.dynamics_fitted_at == 30 and len(agent.replay_buffer.model_buffer)
    failure.arm(n)
    with pytest.raises(type(failure.error)) as caught:
        agent.learn(20, reset_num_timesteps=False)
    assert caught.value is failure.error and agent.num_timesteps == 60
    return agent, states[-1]


def fails_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> Failure:
    failure = Failure(error, getattr(owner, name))
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: failure(*args, **kwargs))
    return failure


def goes_on(agent: Any) -> None:
    """The fit is made up for with the next step, and the one after it comes when it is due."""
    agent.learn(35, reset_num_timesteps=False)
    assert agent.dynamics_fitted_at == 90 and len(agent.replay_buffer.model_buffer)


PLACES: dict[str, tuple[Any, str, int]] = {
    "at the first word of the fit": (RolloutCallback, "_say", 1),
    "when the dynamics is fitted": (ProbabilisticEnsemble, "fit", 1),
    "when the reward is fitted": (LearnedReward, "fit", 1),
    "when the termination is fitted": (LearnedTermination, "fit", 1),
    "when a first block was imagined": (ModelBased, "_lower_block", 1),
    "at the very end": (ModelBased, "judge_values", 1),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("mine")], ids=repr)
@pytest.mark.parametrize(("owner", "name", "n"), PLACES.values(), ids=PLACES)
def test_an_interrupted_fit_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int, error: BaseException
) -> None:
    failure = fails_after(monkeypatch, owner, name, error)
    agent, before = run(monkeypatch, failure, n, rollout_filter="macura")
    assert state(agent) == before
    goes_on(agent)


@pytest.mark.parametrize("argument", ["reward_fn", "termination_fn"])
@pytest.mark.parametrize(("n", "refills"), [(1, [90]), (2, [90])])
def test_an_error_in_a_users_function(monkeypatch: pytest.MonkeyPatch, argument: str, n: int, refills: list[int]) -> None:
    functions: dict[str, Callable[..., th.Tensor]] = {
        "reward_fn": lambda obs, actions, next_obs: next_obs[:, 0],
        "termination_fn": lambda obs, actions, next_obs: next_obs[:, 0].abs() > 1,
    }
    failure = Failure(ZeroDivisionError("mine"), functions[argument])
    agent, before = run(monkeypatch, failure, n, MBTD3, **{argument: failure})
    assert state(agent) == before
    goes_on(agent)


def test_a_refill_cut_in_its_midst_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the oldest refill made room for it, and are gone with it. All else is as before."""
    failure = Failure(KeyboardInterrupt(), lambda obs, actions, next_obs: next_obs[:, 0])
    # The look at the steps since the last fit and the audit of reward_fn ask once each, and so does the first block.
    agent, before = run(monkeypatch, failure, 4, reward_fn=failure, retained_rollouts=2, rollout_schedule=1)
    after = state(agent)
    refills, imagined = before.pop("refills"), before.pop("imagined")
    assert refills == [30, 30] and after.pop("refills") == [30]
    assert after.pop("imagined") == imagined[len(imagined) // 2 :] and after == before
    goes_on(agent)


@pytest.mark.parametrize("n", [1, 4])
def test_a_dynamics_of_ones_own(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    failure = Failure(RuntimeError("mine"), lambda: None)
    monkeypatch.setattr(Own, "fail", staticmethod(lambda: failure()))
    agent, before = run(monkeypatch, failure, n, dynamics_class=Own, dynamics_kwargs=None)
    assert state(agent) == before and "dynamics.optimizer" in before["parameters"]
    goes_on(agent)


def interrupting(n: int) -> Callable[[str], None]:
    """Raises when it is told something for the n-th time."""
    failure = Failure(KeyboardInterrupt(), lambda what: None)
    failure.arm(n)
    return failure


@pytest.mark.parametrize("learned", [0, 55])
def test_what_is_called_by_hand_leaves_no_trace_either(learned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first ``learn`` as well, when there is no logger."""
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.ROLLOUT_BLOCK", {"cpu": 7})
    settings = {**FAST, "model_train_freq": 30, "gradient_steps": 1, "rollout_filter": "macura"}
    agent = MBPO("MlpPolicy", Walk(), **settings)
    if learned:
        agent.learn(learned)
    else:
        agent.prefill(MBTD3("MlpPolicy", Walk(), **settings).learn(15).replay_buffer)
    before = state(agent)
    with pytest.raises(KeyboardInterrupt):
        agent.fit_dynamics(interrupting(2))
    assert state(agent) == before
    agent.fit_dynamics()
    before = state(agent)
    with pytest.raises(KeyboardInterrupt):
        agent.generate_rollouts(20, 2, interrupting(2))
    assert state(agent) == before
    # As a whole the second time.
    agent.generate_rollouts(20, 2)
    assert len(agent.replay_buffer.model_buffer.refills) == len(before["refills"]) + 1


@pytest.mark.parametrize("retained", [1, 2, 4])
def test_several_rollouts_of_one_update_are_all_taken_back(monkeypatch: pytest.MonkeyPatch, retained: int) -> None:
    """Those of before that had not left by then are still there, and no others."""

    class Thrice(MBPO):
        def generate_rollouts(self, n: Any = None, length: Any = None, progress: Any = None) -> dict[str, float]:
            return [super(Thrice, self).generate_rollouts(n, length, progress) for _ in range(3)][-1]

    failure = fails_after(monkeypatch, ModelBased, "judge_values", KeyboardInterrupt())
    agent, before = run(monkeypatch, failure, 1, Thrice, retained_rollouts=retained, rollout_schedule=1)
    after = state(agent)
    kept = max(retained - 3, 0)
    refills, imagined = before.pop("refills"), before.pop("imagined")
    assert after.pop("refills") == refills[len(refills) - kept :] and imagined.endswith(after.pop("imagined"))
    assert after == before
    goes_on(agent)


def test_a_loaded_agent_without_an_env_leaves_no_trace_either(tmp_path: Any) -> None:
    agent = MBPO("MlpPolicy", Walk(), **FAST).learn(25)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    loaded = MBPO.load(tmp_path / "agent")
    loaded.load_replay_buffer(tmp_path / "buffer")
    before = state(loaded)
    with pytest.raises(KeyboardInterrupt):
        loaded.generate_rollouts(progress=interrupting(1))
    assert state(loaded) == before and loaded.generate_rollouts()["dropped"] == 0


def test_what_was_warned_of_stays_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where warnings are errors, a fit that warns fails; the next one does not warn again."""
    env = gym.wrappers.TransformReward(Walk(), lambda reward: 1e6 * float(reward))
    agent = MBPO("MlpPolicy", env, **{**FAST, "model_train_freq": 30})
    with pytest.raises(UserWarning, match="largest reward"):
        agent.learn(40)
    assert agent.dynamics_fitted_at is None and agent._warned_of == ["rewards"]
    agent.learn(20, reset_num_timesteps=False)
    assert agent.dynamics_fitted_at is not None
