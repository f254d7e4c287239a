"""A bad step in the life of an agent: what is stored, counted and learned, and how it goes on."""

import pickle
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tiny import FAST, equal_agents

from sb3_mbpo import MBPO, MBTD3, InvalidTransition


class Failing(gym.Env):
    """Fine but for its n-th step or reset (from 1), where it does as told. Observations count the steps of the episode."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, n=0, how="nan"):
        self.n, self.how = n, how
        self.steps = self.resets = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.time = self.resets + 1, 0
        bad = self.how == "reset" and self.resets == self.n
        return np.array([np.nan if bad else 0, self.steps], np.float32), {}

    def step(self, action):
        self.steps, self.time = self.steps + 1, self.time + 1
        obs, reward, terminated = np.array([self.time, self.steps], np.float32), float(action[0]), self.time == 9
        if self.how != "reset" and self.steps == self.n:
            if self.how == "raise":
                raise ZeroDivisionError("mine")
            terminated = terminated or self.how == "last"
            obs, reward = (obs, np.nan) if self.how == "reward" else (obs * np.nan, reward)
        return obs, reward, terminated, False, {}


def at_nine(obs, actions, next_obs):
    return next_obs[:, 0] >= 9


def agent(env, cls=MBPO, **kwargs):
    kwargs = {**FAST, "termination_fn": at_nine, "model_train_freq": 10, **kwargs}
    return cls("MlpPolicy", env, **kwargs)


def untouched(env) -> bool:
    return isinstance(env, DummyVecEnv) and type(env.envs[0]) is Failing


def state(model) -> bytes:
    """Whatever learning could have changed."""
    buffer = model.replay_buffer
    parts = [getattr(buffer, name)[:60].tobytes() for name in ("observations", "next_observations", "rewards", "dones")]
    weights = [
        value.numpy().tobytes() for name in ("policy", "dynamics") for value in getattr(model, name).state_dict().values()
    ]
    statistics = model.get_vec_normalize_env() and pickle.dumps((model.env.obs_rms, model.env.ret_rms))
    counters = (buffer.pos, model.num_timesteps, model._n_updates, model._episode_num, len(buffer.model_buffer))
    return pickle.dumps((parts, weights, statistics, counters, list(model.ep_info_buffer)))


class Last(BaseCallback):
    """The agent's state after each whole round of step, storing and learning."""

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.last = state(self.model)


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("how", ["nan", "last", "reward"])
@pytest.mark.parametrize("n", [5, 27])
def test_a_bad_step_leaves_the_agent_as_it_was(n, how, normalized, kind):
    """In warm-up and later; the first env of two is the bad one."""
    env = kind([lambda: Failing(n, how), Failing], **({"start_method": "fork"} if kind is SubprocVecEnv else {}))
    model = agent(VecNormalize(env) if normalized else env, gradient_steps=1)
    last = Last()
    with pytest.raises(InvalidTransition) as caught:
        model.learn(100, callback=last)
    assert (caught.value.env_index, caught.value.step) == (0, 2 * (n - 1)) and model.num_timesteps == 2 * (n - 1)
    assert model.replay_buffer.size() == n - 1 and (n < 20) == (model._n_updates == 0)
    assert state(model) == last.last
    # It goes on, from a new episode.
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 2 * (n - 1) + 20 and model.replay_buffer.size() == n - 1 + 10
    first = model.replay_buffer.observations[n - 1]
    assert first[:, 0].tolist() == [0, 0]
    assert all(
        np.isfinite(getattr(model.replay_buffer, name)).all() for name in ("observations", "next_observations", "rewards")
    )
    env.close()


@pytest.mark.parametrize("cls", [MBPO, SAC])
def test_transitions_after_an_env_raised_are_real(cls):
    """The exception is the env's own. SAC stores a transition from the last state before it to a state after it."""
    env = DummyVecEnv([Failing, lambda: Failing(5, "raise")])
    model = agent(env) if cls is MBPO else SAC("MlpPolicy", env, learning_starts=100)
    with pytest.raises(ZeroDivisionError, match="mine"):
        model.learn(100)
    assert model.num_timesteps == 8
    model.learn(12, reset_num_timesteps=False)
    buffer = model.replay_buffer
    one_further = buffer.next_observations[:10, :, 0] - buffer.observations[:10, :, 0] == 1
    assert one_further.all() == (cls is MBPO)


@pytest.mark.parametrize("cls", [MBPO, SAC])
def test_transitions_after_a_callback_raised_are_real(cls):
    """The step is counted and not stored. SAC stores a transition from the state before it to the state after the next."""

    class Raises(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 8:
                raise KeyboardInterrupt
            return True

    model = agent(Failing()) if cls is MBPO else SAC("MlpPolicy", Failing(), learning_starts=100)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, Raises())
    model.learn(12, reset_num_timesteps=False)
    buffer = model.replay_buffer
    one_further = buffer.next_observations[: buffer.pos, :, 0] - buffer.observations[: buffer.pos, :, 0] == 1
    assert one_further.all() == (cls is MBPO)


@pytest.mark.parametrize("n", [1, 3])
def test_a_bad_reset(n):
    """The first one, and one in the middle of learning: that comes with the last step of an episode."""
    model = agent(VecNormalize(DummyVecEnv([lambda: Failing(n, "reset")])))
    with pytest.raises(InvalidTransition, match=r"env 0, after \d+ steps: the observation of reset\(\)") as caught:
        model.learn(100)
    assert caught.value.step == model.num_timesteps == (0 if n == 1 else 17)
    assert model.replay_buffer.pos == model.num_timesteps and np.isfinite(model.env.obs_rms.mean).all()
    model.learn(5, reset_num_timesteps=False)
    assert model.replay_buffer.pos == model.num_timesteps == (5 if n == 1 else 22)


def test_a_bad_reset_at_the_start_of_another_run():
    """Steps of the first run stay counted."""
    env = Failing(4, "reset")
    model = agent(env).learn(20)
    with pytest.raises(InvalidTransition, match=r"env 0, after 0 steps: the observation of reset"):
        model.learn(10)
    assert model.lifetime_timesteps == 20
    assert model.learn(10, reset_num_timesteps=False).lifetime_timesteps == 30


@pytest.mark.parametrize("train_freq", [1, (1, "episode")])
def test_callbacks_and_copies_see_the_env_as_it_is(train_freq):
    env = DummyVecEnv([Failing])
    model = agent(env, train_freq=train_freq)

    def look(locals_, globals_):
        assert locals_["env"] is env and model.get_env() is env and untouched(env)
        assert untouched(pickle.loads(pickle.dumps(env)))
        return True

    model.learn(30, callback=look)
    assert untouched(env)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_checks_its_own_env(copy):
    model = agent(DummyVecEnv([lambda: Failing(9)])).learn(3)
    twin = copy(model)
    for one in (twin, model):
        with pytest.raises(InvalidTransition, match="env 0, after 8 steps"):
            one.learn(20, reset_num_timesteps=False)
        assert one.env.envs[0].steps == 9 and untouched(one.env)


def test_a_callback_that_stops_and_one_that_raises():
    model_steps: list[int] = []
    env = DummyVecEnv([Failing])
    model = agent(env).learn(30, callback=lambda locals_, globals_: model_steps.append(1) or len(model_steps) < 7)
    assert model.num_timesteps == 7 and untouched(env)
    assert model._last_obs is not None

    def fail(locals_, globals_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.learn(30, callback=fail, reset_num_timesteps=False)
    # The step that the env has made was not stored, so the next `learn` resets the env.
    assert model._last_obs is None and untouched(env)


def test_another_env_is_watched_too():
    model = agent(Failing()).learn(5)
    model.set_env(Failing(3))
    with pytest.raises(InvalidTransition, match="env 0, after 7 steps"):
        model.learn(10, reset_num_timesteps=False)
    # Also one that a callback puts in.
    model, other = agent(Failing()), DummyVecEnv([lambda: Failing(3)])
    other.reset()
    with pytest.raises(InvalidTransition, match="env 0, after 6 steps"):
        model.learn(20, callback=lambda *_: model.num_timesteps != 4 or model.set_env(other, force_reset=False) or True)


@pytest.mark.parametrize("normalized", [False, True])
def test_with_the_model_off_it_is_sac(normalized):
    """Bit for bit, statistics included, though everything is checked."""
    agents = []
    for cls in (MBPO, SAC):
        env = make_vec_env("Pendulum-v1", 2, seed=1)
        kwargs = {"real_ratio": 1} if cls is MBPO else {}
        # SB3 writes into them.
        own = {
            key: deepcopy(FAST[key]) for key in ("policy_kwargs", "batch_size", "learning_starts", "gradient_steps", "seed")
        }
        agents.append(cls("MlpPolicy", VecNormalize(env) if normalized else env, **own, **kwargs).learn(300))
    assert equal_agents(*agents)
    ours, theirs = (model.replay_buffer.observations[:150] for model in agents)
    assert np.array_equal(ours, theirs)
    if normalized:
        assert all(np.array_equal(agents[0].env.obs_rms.mean, model.env.obs_rms.mean) for model in agents)


def test_learning_that_diverges():
    with pytest.raises(ValueError, match=r"Learning has diverged: after \d+ steps .*Lower learning_rate=1000"):
        agent("Pendulum-v1", learning_rate=1e3, termination_fn=None).learn(300)


def test_an_env_is_not_blamed_for_actions_that_are_not_finite():
    env = gym.make("Pendulum-v1", disable_env_checker=True)
    model = agent(env, MBTD3, learning_starts=0, gradient_steps=0, termination_fn=None)
    next(model.actor.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"Learning has diverged: after 0 steps and 0 updates, the policy's actor\."):
        model.learn(5)
