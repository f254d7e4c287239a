"""Real transitions are what happened: ends of episodes that were lost, and time limits reported as terminations."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from tiny import FAST

from sb3_mbpo import MBPO, DynamicsModel
from sb3_mbpo.buffers.replay_buffer import MixedReplayBuffer
from sb3_mbpo.validation.episode_ends import ENDLESS, Steps, endless, lost_ends, reported_limit


class Walk(gym.Env):
    """
    A random walk from near 0 that ends outside [-1, 1]. The second dimension counts the steps of the env's life, so that each
    observation tells when it was made.
    """

    observation_space: gym.Space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, in_place: bool = True, home: bool = False, seed: int = 0) -> None:
        self.in_place, self.home, self.rng = in_place, home, np.random.default_rng(seed)
        self.state, self.life = np.zeros(2, np.float32), 0

    def _observation(self) -> Any:
        return self.state if self.in_place else self.state.copy()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.state[:] = 0.0 if self.home else self.rng.uniform(-0.2, 0.2), 0 if self.home else self.life
        return self._observation(), {}

    def step(self, action: np.ndarray) -> Any:
        self.life += 1
        self.state[:] = self.state[0] + 0.4 * action[0], self.life
        ended = bool(abs(self.state[0]) > 1)
        if ended and self.home:
            self.state[:] = 0
        return self._observation(), float(self.state[0]), ended, False, {}


class Dicts(Walk):
    observation_space = spaces.Dict(a=Walk.observation_space)

    def _observation(self) -> Any:
        return {"a": super()._observation()}


class SameStart(Walk):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.state[:] = 0
        return self._observation(), {}


class SameArray(gym.ObservationWrapper):
    """Writes what it makes of each observation to one array."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.array = np.zeros(2, np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.array[:] = 2 * observation
        return self.array


class OwnVecEnv(VecEnv):
    """
    Vectorised by hand. ``how``: "copied": as it should be; "view": the last observation is a view of the array that the reset
    writes to; "missing": there is none; "one array": observations are always the same array, the last one copied.
    """

    def __init__(self, how: str, kind: type[Walk] = Walk) -> None:
        self.envs = [kind(in_place=False, seed=i) for i in range(2)]
        super().__init__(2, kind.observation_space, kind.action_space)
        self.how, self.array = how, np.zeros((2, 2), np.float32)
        self.render_mode, self.actions = None, np.zeros(())

    def reset(self) -> np.ndarray:
        self.array[:] = [env.reset()[0] for env in self.envs]
        return self.array if self.how == "one array" else self.array.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in self.envs]
        for i, env in enumerate(self.envs):
            self.array[i], rewards[i], dones[i], *_ = env.step(self.actions[i])
            if dones[i]:
                if self.how != "missing":
                    infos[i]["terminal_observation"] = self.array[i] if self.how == "view" else self.array[i].copy()
                self.array[i] = env.reset()[0]
        return self.array if self.how == "one array" else self.array.copy(), rewards, dones, infos

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(env, attr_name, None) for env in self.envs]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None: ...


class Plain(VecEnvWrapper):
    """A wrapper that changes nothing."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class Recorder(DynamicsModel):
    """Notes what it is fitted on."""

    def fit(self, transitions: Any, progress: Any = None) -> dict[str, float | str]:
        self.last = transitions
        return {}

    def sample(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return obs.clone(), obs.new_zeros(len(obs))


def learned(env: Any, **kwargs: Any) -> Any:
    """After fits at the first step past 392 and at 400."""
    settings = {**FAST, "dynamics_class": Recorder, "dynamics_kwargs": None, "gradient_steps": 1, "model_train_freq": 50}
    return MBPO("MlpPolicy", env, **{**settings, "learning_starts": 392, **kwargs}).learn(400)


def wrong_ends(data: Any, scale: float = 1.0) -> tuple[int, int]:
    """How many next observations at an end are inside, and how many ends there are."""
    ends = data.dones[:, 0] > 0.5
    return int((data.next_observations[ends][:, 0].abs() < scale * 0.99).sum()), int(ends.sum())


IN_PLACE: dict[str, tuple[Callable[[], Any], float]] = {
    "bare": (Walk, 1),
    "Monitor": (lambda: Monitor(Walk()), 1),
    "two": (lambda: DummyVecEnv([Walk, lambda: Walk(seed=1)]), 1),
    "a wrapper's array": (lambda: SameArray(Walk(in_place=False)), 2),
    "Autoreset": (lambda: gym.wrappers.Autoreset(Walk()), 1),
    "VecMonitor": (lambda: VecMonitor(DummyVecEnv([Walk])), 1),
    "VecNormalize": (lambda: VecNormalize(DummyVecEnv([Walk])), 1),
    "a wrapper of one's own": (lambda: Plain(DummyVecEnv([Walk])), 1),
    "an array of its own": (lambda: OwnVecEnv("one array"), 1),
    "own under VecNormalize": (lambda: VecNormalize(OwnVecEnv("one array")), 1),
    "own, copied": (lambda: OwnVecEnv("copied"), 1),
    "a Dict": (lambda: VecExtractDictObs(DummyVecEnv([Dicts]), "a"), 1),
}


@pytest.mark.parametrize(("make", "scale"), IN_PLACE.values(), ids=IN_PLACE)
def test_observations_written_in_place(make: Callable[[], Any], scale: float) -> None:
    """In the replay buffer, each next observation is the one that the step made; nothing is warned of."""
    agent = learned(make())
    buffer = agent.replay_buffer
    obs, next_obs = buffer.observations[: buffer.size()], buffer.next_observations[: buffer.size()]
    assert np.allclose(next_obs[..., 1] - obs[..., 1], scale, atol=1e-3)
    wrong, ends = wrong_ends(agent.dynamics.last, scale)
    assert wrong == 0 and ends > 10 and len(agent.dynamics.last.dones) == 400
    assert agent._warned_of == []


def test_frames_of_observations_written_in_place() -> None:
    agent = learned(VecFrameStack(DummyVecEnv([Walk]), 3))
    data = agent.dynamics.last
    ends = data.dones[:, 0] > 0.5
    assert ends.sum() > 10 and (data.next_observations[ends][:, 4].abs() > 0.99).all()


LOSING: dict[str, Callable[[], Any]] = {
    "SubprocVecEnv": lambda: SubprocVecEnv([Walk, partial(Walk, seed=1)], start_method="fork"),
    "view": lambda: OwnVecEnv("view"),
    "missing": lambda: OwnVecEnv("missing"),
    "missing, always the same start": lambda: OwnVecEnv("missing", kind=SameStart),
    "VecNormalize": lambda: VecNormalize(OwnVecEnv("view")),
    "VecNormalize, missing": lambda: VecNormalize(OwnVecEnv("missing")),
    "VecFrameStack": lambda: VecFrameStack(OwnVecEnv("missing"), 2),
}


@pytest.mark.parametrize("make", LOSING.values(), ids=LOSING)
@pytest.mark.filterwarnings("ignore:VecFrameStack wrapping a VecEnv without terminal_observation")
def test_ends_that_are_lost_are_left_out_with_one_warning(make: Callable[[], Any]) -> None:
    env = make()
    with pytest.warns(UserWarning, match=r"first observation of the next .*obs.copy\(\).*'terminal_observation'") as caught:
        agent = learned(env)
    env.close()
    ours = [one for one in caught if "VecFrameStack wrapping" not in str(one.message)]
    assert len(ours) == 1 and agent._warned_of == ["ends"]
    buffer = agent.replay_buffer
    lost = int(buffer.dones.sum())
    # SAC has them: it masks what comes after a termination.
    assert lost > 10 and buffer.size() * buffer.n_envs == 400
    data = agent.dynamics.last
    assert len(data.dones) == 400 - lost and data.dones.sum() == 0
    jumps = data.next_observations - data.observations
    assert (jumps[:, 0].abs() < 0.41).all()


@pytest.mark.parametrize("kind", [DummyVecEnv, partial(SubprocVecEnv, start_method="fork")])
def test_copies_are_kept_in_other_processes(kind: Any) -> None:
    env = kind([partial(Walk, in_place=False), partial(Walk, in_place=False, seed=1)])
    agent = learned(env)
    env.close()
    wrong, ends = wrong_ends(agent.dynamics.last)
    assert wrong == 0 and ends > 10


def test_episodes_that_end_where_they_begin() -> None:
    """Every one of them does, and no observation is lost: where last observations are copied, that is known."""
    data = learned(Walk(home=True)).dynamics.last
    assert data.dones.sum() > 10 and (data.next_observations[data.dones[:, 0] > 0.5] == 0).all()


# ---------------------------------------------------------------------- lost ends, by hand


def ring(obs: Any, next_obs: Any, dones: Any, limits: Any = None, newest: int | None = None) -> Steps:
    before, after = (np.asarray(part, np.float64).reshape(len(part), 1, 1) for part in (obs, next_obs))
    ended, cut = (np.asarray(part, bool).reshape(-1, 1) for part in (dones, np.zeros(len(obs)) if limits is None else limits))
    return Steps(before, after, ended, cut, newest=len(obs) - 1 if newest is None else newest)


def test_most_of_a_kind_are_lost_or_none() -> None:
    """Of three terminations one leads where the next episode begins by accident; so does one of one time limit."""
    obs, next_obs = [0, 1, 0, 1, 5, 1, 7, 1], [1, 3, 1, 5, 9, 7, 9, 4]
    dones, limits = [0, 1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]
    assert lost_ends(ring(obs, next_obs, dones, limits)).flatten().tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    next_obs[3] = 6
    assert not lost_ends(ring(obs, next_obs, dones, limits)).any()
    limits[5] = 1
    assert lost_ends(ring(obs, next_obs, dones, limits)).flatten().tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_the_newest_end_goes_with_the_others() -> None:
    """What comes after it is not stored yet, and in a ring what stands behind it is the oldest step."""
    obs, next_obs, dones = [4, 0, 1, 2], [5, 1, 2, 4], [0, 0, 0, 1]
    assert not lost_ends(ring(obs, next_obs, dones)).any()
    assert not lost_ends(ring(obs, next_obs, dones, newest=3)).any()
    # The same rows, but the newest is another: behind the end is its successor.
    assert lost_ends(ring(obs, next_obs, dones, newest=1)).flatten().tolist() == [0, 0, 0, 1]
    obs, next_obs, dones = [0, 1, 7, 1], [1, 7, 1, 9], [0, 1, 0, 1]
    assert lost_ends(ring(obs, next_obs, dones)).flatten().tolist() == [0, 1, 0, 1]


def test_where_nothing_moves_nothing_is_lost() -> None:
    assert not lost_ends(ring([7] * 6, [7] * 6, [1] * 6)).any()
    assert not lost_ends(ring([7] * 6, [7] * 6, [0] * 6)).any()


def test_same_start_and_end_without_copies_count_as_lost() -> None:
    steps = ring([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1])
    assert lost_ends(steps).flatten().tolist() == [0, 1] * 3 and not lost_ends(steps, copied=True).any()


# ---------------------------------------------------------------------- time limits


class Limited(gym.Env):
    """
    A noisy point in [-1, 1]^3. It ends after ``limit`` steps, as terminated; and, of what is asked for, in a region, at
    random, or with the time in its observation.
    """

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, limit: int | None = 40, region: float = 9.0, chance: float = 0.0, shows_time: bool = False) -> None:
        self.limit, self.region, self.chance, self.shows_time = limit, region, chance, shows_time
        self.observation_space = spaces.Box(-np.inf, np.inf, (3 + shows_time,))
        self.rng = np.random.default_rng(0)

    def _observation(self) -> np.ndarray:
        return np.array([*self.place, *([self.time] if self.shows_time else [])], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.time, self.place = 0, self.rng.uniform(-1, 1, 3)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> Any:
        self.time += 1
        self.place = np.clip(self.place + self.rng.normal(0, 0.3, 3) + 0.1 * action, -1, 1)
        ended = self.time == self.limit or self.place[0] > self.region or self.rng.random() < self.chance
        return self._observation(), 0.0, bool(ended), False, {}


REPORTED: dict[str, Any] = {
    "always": ({}, 1, "([0-9]+) of \\1 terminated episodes ended after exactly 40 steps"),
    "three envs": ({}, 3, "exactly 40 steps"),
    "short": ({"limit": 6}, 1, "exactly 6 steps"),
    "beside falls": ({"region": 0.995, "limit": 20}, 1, "of [0-9]+ terminated episodes ended after exactly 20 steps"),
    "beside chance": ({"chance": 0.02}, 1, "exactly 40 steps"),
}


@pytest.mark.parametrize("settings", [{}, {"termination_fn": "never"}], ids=["learned", "never"])
@pytest.mark.parametrize(("options", "n_envs", "words"), REPORTED.values(), ids=REPORTED)
def test_a_time_limit_reported_as_a_termination(options: Any, n_envs: int, words: str, settings: Any) -> None:
    """One warning, though a function that never ends episodes disagrees with the env."""
    env = DummyVecEnv([partial(Limited, **options)] * n_envs)
    with pytest.warns(UserWarning, match=words + r".*TimeLimit\(env, [0-9]+\)") as caught:
        agent = learned(env, **settings)
    assert agent._warned_of == ["limit"]
    assert len(caught) == 1


@pytest.mark.parametrize("train_freq", [1, (1, "episode")])
def test_a_limit_is_found_again_after_episodes_were_cut(train_freq: Any) -> None:
    """Another ``learn`` resets the env in the midst of an episode."""
    agent = MBPO("MlpPolicy", Limited(), **{**FAST, "learning_starts": 1000, "train_freq": train_freq})
    for _ in range(3):
        agent.learn(90)
    assert "exactly 40 steps" in (agent.replay_buffer.reported_limit() or "")


class Falls(gym.Env):
    """Ends when its height falls below 0, after as many steps as the fall takes: always the same number."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.height, self.speed = 1.0, 0.0
        return np.array([self.height, 0], np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.speed -= 0.01
        self.height += self.speed
        return np.array([self.height, self.speed + 0.1 * action[0]], np.float32), 0.0, self.height < 0, False, {}


TRUE_ENDS: dict[str, Callable[[], gym.Env]] = {
    "falls": lambda: gym.wrappers.TimeLimit(Limited(None, region=0.9), 50),
    "chance": lambda: gym.wrappers.TimeLimit(Limited(None, chance=0.2), 100),
    "the time is observed": lambda: Limited(shows_time=True),
    "always equally long": Falls,
    "truncated": lambda: gym.wrappers.TimeLimit(Limited(None), 40),
    "one step": lambda: Limited(1),
    "longer ones": lambda: gym.wrappers.TimeLimit(Limited(None, region=0.99), 30),
    "InvertedDoublePendulum": lambda: gym.make("InvertedDoublePendulum-v5"),
    "InvertedPendulum": lambda: gym.make("InvertedPendulum-v5"),
    "Hopper": lambda: gym.make("Hopper-v5"),
    "MountainCarContinuous": lambda: gym.make("MountainCarContinuous-v0"),
    "Pendulum": lambda: gym.make("Pendulum-v1"),
}


@pytest.mark.parametrize("make", TRUE_ENDS.values(), ids=TRUE_ENDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_false_alarm(make: Callable[[], gym.Env], seed: int) -> None:
    """Over random play, looked at after each 50 steps."""
    env = DummyVecEnv([make])
    env.seed(seed)
    env.action_space.seed(seed)
    buffer = MixedReplayBuffer(3000, env.observation_space, env.action_space, seed=0)
    obs = env.reset()
    for step in range(1, 2001):
        actions = env.action_space.sample()[None]
        new_obs, rewards, dones, infos = env.step(actions)
        next_obs = infos[0]["terminal_observation"][None] if dones[0] else new_obs
        buffer.add(obs, next_obs, actions, rewards, dones, infos)
        obs = new_obs
        if step % 50 == 0:
            assert buffer.reported_limit() is None
            assert not buffer.lost_ends().any()


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([10] * 3, True),
        ([10] * 2, False),
        ([10] * 5 + [3, 7], True),
        ([10] * 4 + [3, 7], False),
        # Lengths that pile up below the longest as well.
        ([10] * 9 + [9, 9, 9], False),
        ([10] * 9 + [9, 9], True),
        ([10] * 9 + [11], False),
        ([4] * 9, False),
    ],
)
def test_lengths_by_hand(lengths: list[int], found: bool) -> None:
    dones = np.concatenate([[False] * (length - 1) + [True] for length in lengths])
    # Every step like every other, with nothing in between.
    obs = np.tile([1.0, -1.0], len(dones))[: len(dones)]
    warning = reported_limit(ring(obs, -obs, dones), from_start=True)
    assert (warning is not None) == found
    # A longer one that still goes on.
    dones = np.concatenate([dones, [False] * 12])
    obs = np.tile([1.0, -1.0], len(dones))[: len(dones)]
    assert reported_limit(ring(obs, -obs, dones), from_start=True) is None


def test_limits_in_a_ring() -> None:
    """The oldest episode has lost its start, and does not count as a longer or a shorter one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = MBPO("MlpPolicy", Limited(), **{**FAST, "learning_starts": 10_000, "buffer_size": 170}).learn(330)
    assert "3 of 3 terminated episodes ended after exactly 40 steps" in (agent.replay_buffer.reported_limit() or "")


def test_nothing_of_nothing() -> None:
    one = ring([0], [1], [0])
    assert reported_limit(one, from_start=True) is None and not lost_ends(one).any()


def test_an_env_that_never_ends_an_episode() -> None:
    dones = np.zeros((ENDLESS, 2), bool)
    assert endless(dones[1:]) is None
    assert "No episode has ended in 10,000 steps" in str(endless(dones))
    dones[7, 1] = True
    assert endless(dones) is None


def test_an_env_without_a_time_limit_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("sb3_mbpo.validation.episode_ends.ENDLESS", 60)
    env = gym.make("Pendulum-v1").unwrapped
    agent = MBPO("MlpPolicy", env, **{**FAST, "model_train_freq": 20, "gradient_steps": 1})
    agent.learn(50)
    assert len(recwarn) == 0
    agent.learn(50, reset_num_timesteps=False)
    assert [str(one.message).partition(":")[0] for one in recwarn] == ["No episode has ended in 60 steps"]
