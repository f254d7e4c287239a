"""What an env may return, on every kind of env; test_collecting.py has what a wrong answer does to an agent."""

import pickle
import timeit
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_mbpo import InvalidTransition
from sb3_mbpo.validation.env_outputs import CheckedArrays, add_checks

FINE = np.array([0.1, 0.2, 0.3], np.float32)
NAN = np.array([0.1, np.nan, 0.3], np.float32)


class Scripted(gym.Env):
    """Answers as told: ``script[n]`` is the answer to the n-th step, ``resets[n]`` that to the n-th reset (from 0)."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, script=None, resets=None, space=None):
        self.observation_space = space or spaces.Box(-np.inf, np.inf, (3,))
        self.script, self.resets = script or {}, resets or {}
        self.steps = self.n_resets = -1

    def reset(self, *, seed=None, options=None) -> Any:
        self.n_resets += 1
        return self.resets.get(self.n_resets, (FINE, {}))

    def step(self, action) -> Any:
        self.steps += 1
        answer = self.script.get(self.steps, (FINE, 1.0, False, False, {}))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Spoiling(VecEnvWrapper):
    """A wrapper of the user's own that makes of the second env's second step what it is told to."""

    def __init__(self, venv, spoil):
        super().__init__(venv)
        self.spoil, self.steps = spoil, 0

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        self.steps += 1
        return self.spoil(obs, rewards, dones, infos) if self.steps == 2 else (obs, rewards, dones, infos)


def checked(env) -> Any:
    """What an agent steps."""
    return env if add_checks(env) else CheckedArrays(env)


def stepped(env, n=3) -> Any:
    """Reset and stepped as an agent does it, then closed. The last observations."""
    env = checked(env)
    try:
        obs = env.reset()
        for _ in range(n):
            obs = env.step(np.zeros((env.num_envs, 1), np.float32))[0]
        return obs
    finally:
        env.close()


def two_envs(kind, script=None, resets=None, monitor=True, space=None):
    """The second of them has the script."""

    def make(script, resets):
        env = Scripted(script, resets, space)
        return Monitor(env) if monitor else env

    kwargs = {"start_method": "fork"} if kind is SubprocVecEnv else {}
    return kind([partial(make, None, None), partial(make, script, resets)], **kwargs)


BAD_STEPS: dict[str, Any] = {
    "nan": ((NAN, 1.0, False, False, {}), "the observation is not finite in float32 in 1 of 3 dimensions: [1] = nan"),
    "last": ((NAN, 1.0, True, False, {}), "the last observation is not finite in float32 in 1 of 3 dimensions: [1] = nan"),
    "inf": ((FINE * np.inf, 1.0, False, False, {}), "3 of 3 dimensions: [0] = inf"),
    "spread": ((np.zeros(1, np.float32), 1.0, False, False, {}), "the observation has shape (1,) and not (3,)"),
    "last spread": ((np.zeros(1), 1.0, False, True, {}), "the last observation has shape (1,) and not (3,)"),
    "too long": ((np.zeros(4), 1.0, False, False, {}), "has shape (4,) and not (3,)"),
    "text": ((np.array(["1", "2", "3"]), 1.0, False, False, {}), "has dtype <U1 and not float32"),
    "reward nan": ((FINE, np.nan, False, False, {}), "the reward is not finite in float32: nan"),
    "reward inf": ((FINE, -np.inf, True, False, {}), "the reward is not finite in float32: -inf"),
}
# In a SubprocVecEnv, they end the process of the env.
BAD_API: dict[str, Any] = {
    "reward none": ((FINE, None, False, False, {}), "reward must be a scalar"),
    "reward array": ((FINE, np.zeros(2), False, False, {}), "reward must be a scalar"),
    "reward (1,)": ((FINE, np.zeros(1), False, False, {}), "reward must be a scalar"),
    "terminated none": ((FINE, 1.0, None, False, {}), "terminated must be true or false, but is None. Return a bool"),
    "truncated none": ((FINE, 1.0, False, None, {}), "truncated must be true or false, but is None"),
    "terminated nan": ((FINE, 1.0, np.nan, False, {}), "terminated must be true or false, but is nan"),
    "terminated text": ((FINE, 1.0, "False", False, {}), "terminated must be true or false, but is 'False'"),
    "terminated array": ((FINE, 1.0, np.array([False]), False, {}), "terminated must be true or false, but is array"),
    "terminated arrays": ((FINE, 1.0, np.zeros(3), False, {}), "terminated"),
    "old": ((FINE, 1.0, False, {}), "step() must return the five values of Gymnasium's API"),
}
BAD_RESETS: dict[str, Any] = {
    "nan": ((NAN, {}), "the observation of reset() is not finite in float32 in 1 of 3 dimensions: [1] = nan"),
    "spread": ((np.zeros(1), {}), "the observation of reset() has shape (1,) and not (3,)"),
}


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize(("answer", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_bad_steps_are_named(kind, answer, message):
    with pytest.raises(InvalidTransition) as caught:
        stepped(two_envs(kind, {1: answer}))
    assert message in str(caught.value) and str(caught.value).startswith("env 1: the ") and caught.value.env_index == 1


@pytest.mark.parametrize("monitor", [True, False])
@pytest.mark.parametrize(("answer", "message"), BAD_API.values(), ids=BAD_API)
def test_another_api_is_named(answer, message, monitor):
    with pytest.raises(InvalidTransition) as caught:
        stepped(two_envs(DummyVecEnv, {1: answer}, monitor=monitor))
    assert message in str(caught.value) and caught.value.env_index == 1


@pytest.mark.parametrize("flag", [None, np.nan, "no", np.array([False])])
@pytest.mark.parametrize("where", ["terminated", "truncated"])
def test_flags_from_another_process_are_named(where, flag):
    """As far as they come through it: of ``terminated``, what counts as false there is lost if ``truncated`` is False."""
    flags = (flag, False if flag else flag) if where == "terminated" else (False, flag)
    with pytest.raises(InvalidTransition, match="env 1: terminated or truncated must be true or false"):
        stepped(two_envs(SubprocVecEnv, {1: (FINE, 1.0, *flags, {})}, monitor=False))


@pytest.mark.parametrize("flag", [np.bool_(False), 0, 0.0, np.array(False)])
def test_flags_that_equal_false_go_through(flag):
    for kind in (DummyVecEnv, SubprocVecEnv):
        stepped(two_envs(kind, {i: (FINE, 1.0, flag, flag, {}) for i in range(9)}))


def test_another_api_is_named_under_gymnasiums_wrappers():
    for script, resets in (({0: (FINE, 1.0, False, {})}, None), (None, {0: FINE})):
        env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(Scripted(script, resets), 5))
        with pytest.raises(InvalidTransition, match=r"must return the (two|five) values"):
            stepped(DummyVecEnv([lambda env=env: env]))


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(("answer", "message"), BAD_RESETS.values(), ids=BAD_RESETS)
def test_bad_resets_are_named(kind, n, answer, message):
    """The first, and that at the end of an episode."""
    ends = {1: (FINE, 1.0, True, False, {})}
    with pytest.raises(InvalidTransition) as caught:
        stepped(two_envs(kind, ends, {n: answer}))
    assert message in str(caught.value) and caught.value.env_index == 1


@pytest.mark.parametrize("resets", [FINE, FINE[:2], list(FINE), 0.0, None])
@pytest.mark.parametrize("n", [0, 1])
def test_reset_without_info(resets, n):
    """Also an observation of two numbers, which would pass for observation and info."""
    space = spaces.Box(-1, 1, np.shape(resets) if resets is not None else ())
    fine = (np.zeros(space.shape, np.float32), 1.0, True, False, {})
    env = two_envs(DummyVecEnv, {0: fine}, {0: (fine[0], {}), n: resets}, space=space)
    env.envs[0].env.resets = {i: (fine[0], {}) for i in range(9)}
    env.envs[0].env.script = {i: fine for i in range(9)}
    with pytest.raises(InvalidTransition, match=r"env 1: reset\(\) must return the two values of Gymnasium's API"):
        stepped(env)


def test_other_envs_are_heard_before_a_subprocess_is_refused():
    """Else its neighbours' answers would be taken for those to the next call, and closing would wait for ever."""
    bad = SubprocVecEnv([partial(Scripted, {0: (NAN, 1.0, False, False, {})}), Scripted, Scripted], start_method="fork")
    checked(bad).reset()
    with pytest.raises(InvalidTransition, match="env 0"):
        bad.step(np.zeros((3, 1)))
    assert np.array_equal(bad.reset(), [FINE] * 3)
    obs, rewards, *_ = bad.step(np.zeros((3, 1)))
    assert obs.shape == (3, 3) and rewards.tolist() == [1, 1, 1]
    bad.close()


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize(("answer", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_statistics_of_vec_normalize_stay_clean(kind, answer, message):
    env = VecNormalize(VecMonitor(two_envs(kind, {1: answer}, monitor=False)))
    checked(env).reset()
    env.step(np.zeros((2, 1)))
    before = pickle.dumps((env.obs_rms, env.ret_rms, env.returns))
    with pytest.raises(InvalidTransition) as caught:
        env.step(np.zeros((2, 1)))
    assert message in str(caught.value) and pickle.dumps((env.obs_rms, env.ret_rms, env.returns)) == before
    env.close()


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_statistics_stay_clean_of_a_bad_reset(kind):
    env = VecNormalize(two_envs(kind, resets={0: (NAN, {})}))
    with pytest.raises(InvalidTransition):
        stepped(env)
    assert env.obs_rms.count < 1 and np.isfinite(env.obs_rms.mean).all()


def with_(obs=None, reward=None, done=None, last=None):
    def spoil(all_obs, rewards, dones, infos):
        all_obs, rewards = np.array(all_obs), np.array(rewards, np.float64)
        if obs is not None:
            all_obs[1] = obs
        if reward is not None:
            rewards[1] = reward
        if last is not None:
            dones, infos = np.array([False, True]), [{}, {"terminal_observation": last}]
        return all_obs, rewards, dones, infos

    return spoil


SPOILED: dict[str, Any] = {
    "obs": (with_(obs=NAN), "env 1: the observation is not finite in float32 in 1 of 3 dimensions: [1] = nan"),
    "reward": (with_(reward=np.inf), "env 1: the reward is not finite in float32: inf"),
    "last": (with_(last=NAN), "env 1: the last observation is not finite"),
    "last shape": (with_(last=NAN[:2]), "env 1: the last observation has shape (2,) and not (3,)"),
    "first": (with_(last=FINE, obs=NAN), "env 1: the observation of reset() is not finite"),
    "rows": (lambda o, r, d, i: (o[:1], r, d, i), "the observations must be one for each of 2 envs, but are array"),
    "columns": (lambda o, r, d, i: (o[:, :2], r, d, i), "env 0: the observation has shape (2,) and not (3,)"),
    "rewards": (lambda o, r, d, i: (o, r[:, None], d, i), "env 0: the reward must be a scalar"),
    "dones": (lambda o, r, d, i: (o, r, [False, None], i), "env 1: terminated or truncated must be true or false, but is"),
    "few rewards": (lambda o, r, d, i: (o, r[:1], d, i), "the rewards must be one for each of 2 envs, but are array([1.]"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_behind_a_wrapper_of_the_users_own(spoil, message):
    with pytest.raises(InvalidTransition) as caught:
        stepped(Spoiling(two_envs(DummyVecEnv), spoil))
    assert message in str(caught.value)


# VecNormalize cannot compute with them, and its own error comes first.
NUMPY = {"columns", "last shape", "dones"}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in VecNormalize
def test_statistics_are_put_back_behind_a_wrapper_of_the_users_own(name):
    spoil, message = SPOILED[name]
    env = VecNormalize(Spoiling(two_envs(DummyVecEnv), spoil))
    outer = checked(env)
    outer.reset()
    outer.step(np.zeros((2, 1)))
    before = pickle.dumps((env.obs_rms, env.ret_rms, env.returns, env.old_obs))
    with pytest.raises((ValueError, IndexError)) as caught:
        outer.step(np.zeros((2, 1)))
    assert pickle.dumps((env.obs_rms, env.ret_rms, env.returns, env.old_obs)) == before
    assert name in NUMPY or (isinstance(caught.value, InvalidTransition) and message in str(caught.value))
    # The next step is fine again.
    assert np.isfinite(outer.step(np.zeros((2, 1)))[0]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in VecNormalize
def test_what_vec_normalize_clips_is_not_hidden():
    for spoil in (with_(obs=FINE * np.inf), with_(reward=np.inf)):
        with pytest.raises(InvalidTransition, match=r"env 1: the (observation|reward) is not finite in float32.*inf"):
            stepped(VecNormalize(Spoiling(two_envs(DummyVecEnv), spoil)))


def test_a_wrapper_around_vec_normalize():
    with pytest.raises(InvalidTransition, match="not finite"):
        stepped(Spoiling(VecNormalize(two_envs(DummyVecEnv)), with_(obs=NAN)))


class Own(DummyVecEnv):
    """A vectorised env that may do anything."""


def test_a_vectorised_env_of_the_users_own():
    for resets, script in (({0: (NAN, {})}, None), (None, {1: (NAN, 1.0, True, False, {})})):
        for wrap in (lambda env: env, VecNormalize):
            with pytest.raises(InvalidTransition, match=r"env 1: .*1 of 3 dimensions: \[1\] = nan"):
                stepped(wrap(two_envs(Own, script, resets)))


def test_stacked_and_fine():
    env = VecFrameStack(two_envs(DummyVecEnv, {1: (FINE, 1.0, True, False, {})}), 2)
    assert stepped(env, n=4).shape == (2, 6)


def test_dict_observations_that_a_wrapper_takes_apart():
    class Dicts(Scripted):
        def __init__(self, values):
            super().__init__(space=spaces.Dict(a=spaces.Box(-1, 1, (3,))))
            self.values = values

        def reset(self, *, seed=None, options=None):
            return {"a": FINE}, {}

        def step(self, action):
            return {"a": self.values.pop()}, 1.0, False, False, {}

    stepped(VecExtractDictObs(DummyVecEnv([lambda: Dicts([FINE] * 3)]), "a"))
    with pytest.raises(InvalidTransition, match="env 0: the observation at 'a' is not finite"):
        stepped(VecExtractDictObs(DummyVecEnv([lambda: Dicts([FINE, NAN, FINE])]), "a"))


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize(
    ("obs", "space"),
    [
        (FINE.astype(np.float64), spaces.Box(-1, 1, (3,))),
        (FINE, spaces.Box(-1, 1, (3,), np.float64)),
        (np.array([1, 2, 3]), spaces.Box(-9, 9, (3,), np.int32)),
        ([0.5, 1, 2], spaces.Box(-1, 1, (3,))),
    ],
)
def test_what_sb3_casts_goes_through(kind, obs, space):
    answers = {i: (obs, np.float32(1), i == 1, False, {}) for i in range(9)}
    env = two_envs(kind, answers, {i: (obs, {}) for i in range(9)}, space=space)
    if kind is DummyVecEnv:
        env.envs[0].env.resets, env.envs[0].env.script = env.envs[1].env.resets, env.envs[1].env.script
        stepped(env)
    else:
        env.close()
        env = SubprocVecEnv([partial(Scripted, answers, {i: (obs, {}) for i in range(9)}, space)] * 2, start_method="fork")
        stepped(env)


def test_an_env_that_raises_is_not_interfered_with():
    for error in (ValueError("not enough values to unpack (expected 5, got 4)"), TypeError("mine"), ZeroDivisionError("mine")):
        with pytest.raises(type(error)) as caught:
            stepped(two_envs(DummyVecEnv, {1: error}))
        assert caught.value is error


def test_a_process_that_ended_is_named(capfd):
    # One env: of several forked ones each keeps the others' connections open, and SB3 waits for ever.
    env = checked(SubprocVecEnv([partial(Scripted, {1: ZeroDivisionError("mine")})], start_method="fork"))
    env.reset()
    env.step(np.zeros((1, 1)))
    with pytest.raises((EOFError, ConnectionError), match="env 0: its process has ended"):
        env.step(np.zeros((1, 1)))
    assert "ZeroDivisionError: mine" in capfd.readouterr().err
    for process in env.processes:
        process.terminate()


def test_envs_put_in_later_are_the_ones_stepped():
    env = checked(two_envs(DummyVecEnv))
    env.reset()
    env.envs[1] = Scripted({0: (NAN, 1.0, False, False, {})})
    with pytest.raises(InvalidTransition, match="env 1"):
        env.step(np.zeros((2, 1)))


@pytest.mark.parametrize("shape", [(40,), (2, 3), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_long_and_many_dimensional_and_large(shape, dtype):
    """Large, but not too large: their squares are, in their own precision."""
    obs = np.full(shape, 6e4 if dtype is np.float16 else 1e30, dtype)
    answers, resets = {i: (obs, -1e38, i == 1, False, {}) for i in range(4)}, {i: (obs, {}) for i in range(4)}
    space = spaces.Box(-np.inf, np.inf, shape, dtype)
    stepped(DummyVecEnv([lambda: Scripted(answers, resets, space)]))
    answers[2] = (obs * np.inf, 1.0, False, False, {})
    with pytest.raises(InvalidTransition, match=f"{max(obs.size, 1)} of {obs.size} dimensions: .* = inf"):
        stepped(DummyVecEnv([lambda: Scripted(answers, resets, space)]))


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_an_env_that_checks_is_otherwise_as_before(kind):
    env = two_envs(kind, {2: (FINE, 1.0, False, True, {"own": 1})})
    twin = two_envs(kind, {2: (FINE, 1.0, False, True, {"own": 1})})
    assert add_checks(env) and add_checks(env) and isinstance(env, kind)
    for one in (env, twin):
        one.seed(3)
        one.set_options({"a": 1})
    assert np.array_equal(env.reset(), twin.reset()) and env.reset_infos == twin.reset_infos
    for _ in range(4):
        ours, theirs = env.step(np.zeros((2, 1), np.float32)), twin.step(np.zeros((2, 1), np.float32))
        assert [part.dtype for part in ours[:3]] == [part.dtype for part in theirs[:3]]
        assert all(np.array_equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
        for a, b in zip(ours[3], theirs[3], strict=True):
            assert a.keys() == b.keys() and a["TimeLimit.truncated"] == b["TimeLimit.truncated"]
    assert env.env_is_wrapped(Monitor) == [True, True] and env.get_attr("steps") == [3, 3]
    env.close()
    twin.close()


@pytest.mark.expensive
def test_costs_little():
    """Of the bare env step, which learning makes many times longer; benchmarks/env_outputs.py has the figure."""
    plain, ours = (DummyVecEnv([lambda: Monitor(gym.make("Hopper-v5"))]) for _ in range(2))
    add_checks(ours)
    for env in (plain, ours):
        env.seed(0)
        env.reset()
    actions = np.zeros((1, 3), np.float32)
    # In turns: whatever else the machine does strikes both.
    rounds = [[timeit.timeit(lambda env=env: env.step(actions), number=500) for env in (plain, ours)] for _ in range(15)]
    of_plain, of_ours = (min(seconds) for seconds in zip(*rounds, strict=True))
    assert of_ours < 1.1 * of_plain
