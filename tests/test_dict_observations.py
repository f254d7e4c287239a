"""Dict observations of vectors: learning, and everything around it, as with SAC and its ``MultiInputPolicy``."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from reach import Reach, distance, reach
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tiny import FAST, equal_agents

import sb3_mbpo
from sb3_mbpo import DHMBPO, MBPO, MBTD3, MBTQC, InvalidTransition, ModelErrorCallback, ResumeCallback

SHARED = copy.deepcopy(
    {key: FAST[key] for key in ("policy_kwargs", "batch_size", "learning_starts", "gradient_steps", "seed")}
)
SHARED["buffer_size"] = 1000
KEYS = ["achieved_goal", "desired_goal", "observation"]


def envs(n_envs=1, normalize=None, seed=0):
    """:param normalize: keys of the observation that are normalized; ``None``: none, and no reward either"""
    env = make_vec_env(reach, n_envs, seed=seed)
    return env if normalize is None else VecNormalize(env, norm_obs_keys=normalize)


def made(env=None, **kwargs):
    return MBPO("MultiInputPolicy", reach() if env is None else env, **{**FAST, "buffer_size": 1000, **kwargs})


def equal_batches(first, second):
    for a, b in zip(first[:5], second[:5], strict=True):
        parts = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]
        assert all(one.dtype == other.dtype and th.equal(one, other) for one, other in parts)


# ---------------------------------------------------------------------- what SAC learns from


@pytest.mark.parametrize("normalize", [None, ["observation"], KEYS], ids=["raw", "one key", "all keys"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_model_off_is_sac_bit_for_bit(n_envs, normalize):
    plain = SAC("MultiInputPolicy", envs(n_envs, normalize), **SHARED).learn(90)
    assert equal_agents(made(envs(n_envs, normalize), real_ratio=1).learn(90), plain)
    # The test can fail: with the model on, the agents part.
    assert not equal_agents(made(envs(n_envs, normalize)).learn(90), plain)


@pytest.mark.parametrize("normalize", [None, ["observation"]], ids=["raw", "one key"])
def test_batches_are_those_of_dict_replay_buffer(normalize):
    """Of real rows, to the last bit; imagined rows have the same keys, shapes and units."""
    agent = made(envs(2, normalize)).learn(60)
    plain = SAC("MultiInputPolicy", envs(2, normalize), **SHARED).learn(60).replay_buffer
    assert type(plain) is DictReplayBuffer
    plain.observations, plain.next_observations = (
        agent.codec.unflatten(getattr(agent.replay_buffer, name)) for name in ("observations", "next_observations")
    )
    for name in ("actions", "rewards", "dones", "timeouts"):
        setattr(plain, name, getattr(agent.replay_buffer, name))
    batches, env = [], agent._vec_normalize_env
    agent.replay_buffer.real_ratio = 1.0
    for buffer in (agent.replay_buffer, plain):
        np.random.seed(0)
        batches.append(buffer.sample(40, env=env))
    ours, theirs = batches
    assert type(ours) is type(theirs) is DictReplayBufferSamples
    equal_batches(ours, theirs)
    agent.replay_buffer.real_ratio = 0.0
    imagined = agent.replay_buffer.sample(400, env=env)
    for key in KEYS:
        assert imagined.observations[key].shape[1:] == theirs.observations[key].shape[1:]
        assert imagined.observations[key].dtype == th.float32
        # Start states are real, so they are as spread out as the real ones.
        assert imagined.observations[key].std().item() == pytest.approx(ours.observations[key].std().item(), rel=0.4)


def test_it_learns_as_in_the_flattened_env():
    """Of the same entries in the same order, the same agent comes to be, but for the rounding of matrix products."""
    flat = MBPO("MlpPolicy", gym.wrappers.FlattenObservation(reach()), **FAST).learn(60)
    agent = made().learn(60)
    for name in ("dynamics", "learned_reward", "learned_termination"):
        pairs = zip(*(getattr(one, name).state_dict().values() for one in (agent, flat)), strict=True)
        assert all(th.equal(a, b) for a, b in pairs)
    pairs = zip(agent.policy.state_dict().values(), flat.policy.state_dict().values(), strict=True)
    assert all(th.allclose(a, b, atol=1e-4) for a, b in pairs)


@pytest.mark.parametrize("cls", [MBTD3, MBTQC])
def test_other_algorithms(cls, tmp_path):
    agent = cls("MultiInputPolicy", reach(), **FAST).learn(40)
    assert len(agent.replay_buffer.model_buffer) > 0
    agent.save(tmp_path / "agent")
    obs = agent.observation_space.sample()
    actions = [one.predict(obs, deterministic=True)[0] for one in (agent, cls.load(tmp_path / "agent"))]
    np.testing.assert_array_equal(*actions)


# ---------------------------------------------------------------------- users' functions


def test_users_functions_get_dicts(recwarn):
    """In the env's units and shapes: the reward, computed from them, is the env's; VecNormalize makes no difference."""

    def far(obs, actions, next_obs):
        assert list(obs) == list(next_obs) == KEYS
        assert obs["observation"].shape == (len(actions), 2, 2) and obs["achieved_goal"].shape == (len(actions), 2)
        assert actions.shape[1:] == (2,) and bool((actions[:, 1] >= -0.2 - 1e-6).all() and (actions[:, 1] <= 0.6 + 1e-6).all())
        seen.append((obs, actions, next_obs))
        return next_obs["achieved_goal"].norm(dim=1) > 100

    seen = []
    agent = made(envs(2, KEYS), reward_fn=distance, termination_fn=far).learn(80)
    assert agent.fit_dynamics()["reward_disagreement"] < 1e-6
    obs, actions, next_obs = seen[-1]
    # Of real transitions, by the last fit: the env's own equation.
    speed = 0.5 * obs["observation"][:, 1] + 0.5 * actions
    assert th.allclose(next_obs["observation"][:, 1], speed, atol=1e-5)
    assert not [warning for warning in recwarn if "reward_fn" in str(warning.message)]


def test_a_function_for_flat_observations_is_told_of_the_keys():
    with pytest.raises(ValueError, match=r"reward_fn=.* in a dry run; .*dicts with the keys \['achieved_goal', 'desired"):
        made(reward_fn=lambda obs, actions, next_obs: next_obs[:, 0])

    def forgetful(obs, actions, next_obs):
        next_obs["achieved_goal"] -= next_obs["desired_goal"]
        return next_obs["achieved_goal"].norm(dim=1)

    with pytest.raises(ValueError, match="modifies its inputs"):
        made(reward_fn=forgetful)


def test_learned_terminations():
    class Falls(Reach):
        def step(self, action):
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, bool(obs["achieved_goal"][1] > 0.5), truncated, info

    agent = made(gym.wrappers.TimeLimit(Falls(), 20), learning_starts=250).learn(252)
    real = agent.replay_buffer.real_transitions()
    found = agent.terminates(*real[:3])
    assert real.dones.sum() > 5 and (found == (real.dones[:, 0] > 0.5)).float().mean() > 0.97


@pytest.mark.expensive
def test_a_goal_env_learns_by_the_reward_of_its_goal():
    """About -4 after 400 steps, for two seeds; -30 at the start, and -25 after as many steps without the model."""
    small = {"net_arch": [64, 64]}
    agent = MBPO(
        "MultiInputPolicy",
        reach(),
        reward_fn=distance,
        gamma=0.9,
        learning_rate=1e-3,
        model_train_freq=100,
        rollout_batch_size=2000,
        gradient_steps=5,
        policy_kwargs=small,
        dynamics_kwargs={**small, "max_updates": 500},
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Evaluation environment is not wrapped")
        before, _ = evaluate_policy(agent, reach())
        agent.learn(500)
        after, _ = evaluate_policy(agent, reach())
    assert before < -15 and after > -8


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("normalize", [None, KEYS], ids=["raw", "all keys"])
def test_saved_and_loaded(tmp_path, safe, normalize):
    agent = made(envs(2, normalize)).learn(60)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer", imagined=True, safe=safe)
    loaded = MBPO.load(tmp_path / "agent", env=agent.env, safe=safe)
    loaded.load_replay_buffer(tmp_path / "buffer", safe=safe)
    assert list(loaded.observation_space) == KEYS and loaded.observation_space == agent.observation_space
    assert equal_agents(loaded, agent)
    for name in ("observations", "next_observations", "actions"):
        np.testing.assert_array_equal(getattr(loaded.replay_buffer, name), getattr(agent.replay_buffer, name))
    loaded.learn(20, reset_num_timesteps=False)
    assert type(loaded.replay_buffer.sample(8)) is DictReplayBufferSamples


def test_to_and_from_sac(tmp_path):
    agent = made(envs(2)).learn(60)
    plain = agent.to_sac()
    assert type(plain.replay_buffer) is DictReplayBuffer and equal_agents(plain, agent)
    plain.learn(60)
    plain.save_replay_buffer(tmp_path / "plain")
    agent.load_replay_buffer(tmp_path / "plain")
    rows = plain.replay_buffer.size()
    assert agent.replay_buffer.size() == rows
    for name in ("observations", "next_observations"):
        np.testing.assert_equal(
            agent.codec.unflatten(getattr(agent.replay_buffer, name)[:rows]),
            {key: array[:rows] for key, array in getattr(plain.replay_buffer, name).items()},
        )
    agent.learn(20, reset_num_timesteps=False)
    other = {"achieved_goal": "observation", "observation": "achieved_goal", "desired_goal": "desired_goal"}
    space = gym.spaces.Dict({key: agent.observation_space[name] for key, name in other.items()})
    with pytest.raises(ValueError, match="this replay buffer has obs_shape="):
        agent.replay_buffer = DictReplayBuffer(10, space, agent.action_space, n_envs=2)


def test_prefill():
    source = SAC("MultiInputPolicy", envs(2), **SHARED).learn(100)
    agent = made()
    agent.prefill(source.replay_buffer)
    data = agent.replay_buffer.real_transitions()
    obs, actions, next_obs = agent.codec.decode(*data[:3])
    assert len(actions) == 100 and data.dones.sum() == 0 and agent.replay_buffer.timeouts.sum() == 4
    assert th.allclose(data.rewards[:, 0], distance(obs, actions, next_obs), rtol=1e-5)
    arrays = {
        "observations": {key: part.numpy() for key, part in obs.items()},
        "next_observations": {key: part.numpy() for key, part in next_obs.items()},
        **{"actions": actions.numpy(), "rewards": data.rewards[:, 0].numpy(), "terminations": np.zeros(100, bool)},
    }
    other = made()
    other.prefill(arrays)
    assert all(th.allclose(a, b, atol=1e-6) for a, b in zip(other.replay_buffer.real_transitions()[:5], data[:5], strict=True))
    agent.prefill(other.replay_buffer)
    assert agent.replay_buffer.size() == 200
    agent.learn(40)
    del arrays["observations"]["desired_goal"]
    with pytest.raises(ValueError, match=r"prefill: the observations have the keys \['achieved_goal', 'obs.*, but this"):
        other.prefill(arrays)
    arrays["observations"] = arrays["next_observations"] | {"desired_goal": np.zeros((99, 2))}
    with pytest.raises(ValueError, match="prefill: the observations do not fit Dict"):
        other.prefill(arrays)


@pytest.mark.parametrize("normalize", [None, ["observation"]], ids=["raw", "one key"])
@pytest.mark.expensive
def test_a_run_that_is_resumed_ends_as_if_it_had_never_stopped(tmp_path, normalize):
    agents = []
    for folder, totals in (("whole", [90]), ("parts", [50, 90])):
        for total in totals:
            agent = made(envs(2, normalize), model_train_freq=20)
            agent.learn(total, ResumeCallback(tmp_path / folder))
        agents.append(agent)
    assert equal_agents(*agents)
    first, second = (agent.replay_buffer for agent in agents)
    np.testing.assert_array_equal(first.observations, second.observations)
    assert th.equal(first.model_buffer.contents()[0], second.model_buffer.contents()[0])


# ---------------------------------------------------------------------- what the env returns


class Wrong(Reach):
    """Returns something else in step 30 of its life."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong, self.life = wrong, 0

    def step(self, action):
        self.life += 1
        obs, *rest = super().step(action)
        return (self.wrong(obs) if self.life == 30 else obs), *rest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda obs: obs | {"desired_goal": np.array([0, np.nan])}, "the observation at 'desired_goal' is not finite"),
        (
            lambda obs: obs | {"observation": np.zeros(4, np.float32)},
            r"observation at 'observation' has shape \(4,\) and not",
        ),
        (lambda obs: {"observation": obs["observation"]}, "the observation must be a dict with the keys"),
        (lambda obs: np.zeros(8), "the observation must be a dict with the keys"),
    ],
)
@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_invalid_observations(wrong, message, kind):
    """The step is named; it is not stored, counted or learned from."""
    env = kind([lambda: Wrong(wrong)])
    agent = made(env, learning_starts=100)
    with pytest.raises(InvalidTransition, match=f"env 0, after 29 steps: .*{message}"):
        agent.learn(60)
    assert agent.replay_buffer.size() == agent.num_timesteps == 29
    agent.learn(10)
    env.close()


def test_last_observations_are_copied():
    """The env writes to the same arrays in its reset."""

    class InPlace(Reach):
        def _obs(self):
            obs = super()._obs()
            if not hasattr(self, "arrays"):
                self.arrays = obs
            for key, array in self.arrays.items():
                array[...] = obs[key]
            return self.arrays

    agent = made(gym.wrappers.TimeLimit(InPlace(), 5), learning_starts=100).learn(60)
    obs, actions, next_obs = agent.codec.decode(*agent.replay_buffer.real_transitions()[:3])
    assert th.allclose(next_obs["observation"][:, 1], 0.5 * obs["observation"][:, 1] + 0.5 * actions, atol=1e-5)
    assert len(actions) == 60


# ---------------------------------------------------------------------- measurements, and what is not supported


def test_warm_up_actions_of_a_function():
    seen = []

    def acts(obs):
        seen.append({key: array.shape for key, array in obs.items()})
        return np.zeros((2, *agent.action_space.shape))

    agent = made(envs(2), warmup_actions=acts, learning_starts=20)
    agent.learn(10)
    shapes = {key: (2, *box.shape) for key, box in agent.observation_space.items()}
    assert seen == [shapes] * 5
    np.testing.assert_allclose(agent.codec.decode_actions(agent.replay_buffer.actions[:5]), 0, atol=1e-6)


def test_the_dynamics_is_measured(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ModelErrorCallback")
        callback = ModelErrorCallback(reach, every=40, n_episodes=1, horizons=[1, 3])
        agent = made(envs(1, KEYS), reward_fn=distance).learn(120, callback)
    numbers = callback.diagnosis.numbers(1)
    assert np.isfinite([numbers["error"], numbers["r2_mean"]]).all()
    assert 0 < agent.logger.name_to_value.get("model_error/policy_shift_tv", 0.5) < 1 and len(callback.snapshots) >= 3
    pytest.importorskip("matplotlib")
    from sb3_mbpo.diagnostics.report import write_report

    write_report(agent, tmp_path / "report.html", env=reach, n_episodes=1, horizon=3)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"export: Dict observations are not supported. .*FlattenObservation\(env\)"):
        made().export(tmp_path / "policy.pt")


@pytest.mark.parametrize("cls", [DHMBPO, sb3_mbpo.MBCrossQ])
def test_algorithms_without_a_policy_for_them(cls):
    with pytest.raises(ValueError, match=r"no policy for Dict observations. Flatten them with gymnasium.wrappers.FlattenObs"):
        cls("MlpPolicy", reach())
    cls("MlpPolicy", gym.wrappers.FlattenObservation(reach()), **FAST).learn(25)
    with pytest.raises(ValueError, match=r"FlattenObservation\(env\)"):
        cls("MultiInputPolicy", reach())


# ---------------------------------------------------------------------- buffers of envs with other entries


class Entries(gym.Env):
    """A Dict of two vectors, of 3 numbers in all."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, a, b):
        self.observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (a,)), "b": spaces.Box(-9, 9, (b,))})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {key: np.ones(box.shape, np.float32) for key, box in self.observation_space.items()}, {}

    def step(self, action):
        return self.reset()[0], 0.0, False, True, {}


def test_rows_of_other_entries_are_refused(tmp_path):
    """Flat rows have the same size."""
    agent, other = (made(Entries(*sizes), learning_starts=100) for sizes in ((2, 1), (1, 2)))
    agent.learn(20)
    agent.save_replay_buffer(tmp_path / "buffer.pt", safe=True)
    with pytest.raises(
        ValueError, match=r"entries \[\['a', \[2\]\], \['b', \[1\]\]\], but this agent's have \[\['a', \[1\]\]"
    ):
        other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    with pytest.raises(ValueError, match=r"prefill: .*entries"):
        other.prefill(agent.replay_buffer)
    flat = MBPO("MlpPolicy", gym.wrappers.FlattenObservation(Entries(2, 1)), **FAST)
    with pytest.raises(ValueError, match="entries"):
        flat.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert other.replay_buffer.size() == flat.replay_buffer.size() == 0
