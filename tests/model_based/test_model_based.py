import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from tiny import FAST

from sb3_mbpo import MBPO, ModelBased
from sb3_mbpo.runtime.denormals import flushed
from sb3_mbpo.terminations.known import NeverTerminates


class Box(gym.Env):
    """Noise that ends now and then; the spaces are what matters."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def _observation(self):
        shape = self.observation_space.shape
        return self.np_random.uniform(0, 1, shape).astype(self.observation_space.dtype)

    def step(self, action):
        assert self.action_space.contains(action)
        return self._observation(), float(self.np_random.normal()), bool(self.np_random.random() < 0.1), False, {}


def own(function):
    """The dotted name of a function of this module."""
    return f"{__name__}.{function}"


def falls(obs, actions, next_obs):
    return next_obs[:, 1].abs() > 0.2


def pays(obs, actions, next_obs):
    return 2 * actions[:, 0] + next_obs[:, 0]


# ---------------------------------------------------------------------- the constructor


def test_signature_is_sacs_then_ours():
    theirs, ours = (inspect.signature(cls).parameters for cls in (SAC, MBPO))
    assert list(ours)[: len(theirs)] == list(theirs)
    changed = {name for name in theirs if theirs[name].default != ours[name].default}
    assert changed == {"gradient_steps"} and ours["gradient_steps"].default == 20
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])
    model = MBPO("MlpPolicy", "Pendulum-v1", 1e-3, 5000, 7)
    assert (model.learning_rate, model.buffer_size, model.learning_starts, model.gradient_steps) == (1e-3, 5000, 7, 20)
    assert MBPO("MlpPolicy", "Pendulum-v1", 1e-3, 5000, 7, 256, 0.005, 0.99, 1, 3).gradient_steps == 3


def test_arguments_are_kept_under_their_names():
    model = MBPO("MlpPolicy", "Pendulum-v1", real_ratio=0.5, retained_rollouts=2, model_train_freq=7)
    names = [name for name in inspect.signature(MBPO).parameters if not name.startswith("_")]
    missing = [n for n in names if not hasattr(model, n) and n not in ("policy", "stats_window_size")]
    assert missing == [] and model.real_ratio == 0.5 and model.retained_rollouts == 2 and model.model_train_freq == 7


@pytest.mark.parametrize(
    ("kwargs", "n_envs", "share"),
    [
        ({}, 1, 0.05),
        ({"gradient_steps": 5}, 1, 0.2),
        ({"gradient_steps": 160, "train_freq": 32}, 1, 0.2),
        ({"gradient_steps": 20}, 4, 0.2),
        ({"gradient_steps": -1}, 1, 0.5),
        ({"gradient_steps": 50, "train_freq": (1, "episode")}, 1, 0.05),
        ({"gradient_steps": -1, "train_freq": (1, "episode")}, 1, 0.5),
        ({"gradient_steps": 5, "real_ratio": "auto"}, 1, 0.2),
        ({"gradient_steps": 5, "real_ratio": 0}, 1, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:gradient_steps")
def test_real_ratio_follows_from_the_updates_of_a_transition(kwargs, n_envs, share, tmp_path):
    model = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), **kwargs)
    assert model.real_ratio == pytest.approx(share) == model.replay_buffer.real_ratio
    model.save(tmp_path / "agent")
    assert MBPO.load(tmp_path / "agent").real_ratio == pytest.approx(share)


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_everything_from_yaml():
    settings = yaml.safe_load(f"""
        policy: MlpPolicy
        learning_rate: 1e-3
        buffer_size: 1e5
        learning_starts: 1e1
        tau: 1e-2
        train_freq: ["2", step]
        gradient_steps: "2"
        batch_size: 16
        policy_kwargs: {{net_arch: [8], activation_fn: torch.nn.Tanh, optimizer_kwargs: {{eps: 1e-5}}}}
        replay_buffer_class: sb3_mbpo.MixedReplayBuffer
        real_ratio: 5e-2
        model_train_freq: 2e1
        rollout_batch_size: 3e1
        rollout_schedule: {{min_length: 1, max_length: 2, start: 0, end: 2e1}}
        stats_window_size: 1e1
        seed: 1e1
        model_buffer_size: 1e3
        termination_fn: {own("falls")}
        reward_fn: {own("pays")}
        rollout_filter: sb3_mbpo.trust.filters.Macura
        dynamics_class: sb3_mbpo.ProbabilisticEnsemble
        dynamics_kwargs: {{learning_rate: 1e-2, max_updates: 1e1, net_arch: ["8"], weight_decays: [1e-4, 1e-5]}}
        """)
    model = MBPO(env="InvertedPendulum-v5", **settings).learn(30)
    assert model.learning_rate == 1e-3 and model.learning_starts == 10 and model.gradient_steps == 2
    assert isinstance(model.buffer_size, int) and model.replay_buffer.model_buffer.max_rows == 1000
    assert model.dynamics.optimizer.param_groups[0]["lr"] == 1e-2 and model.dynamics.max_updates == 10
    assert isinstance(model.actor.latent_pi[1], th.nn.Tanh) and model.termination is falls


def k_of(num_timesteps):
    return 2 if num_timesteps > 25 else 1


def rate_of(progress_remaining):
    return 1e-3 * progress_remaining


def test_functions_by_name_where_a_number_is_usual():
    model = MBPO("MlpPolicy", "Pendulum-v1", rollout_schedule=own("k_of"), learning_rate=own("rate_of"), **FAST).learn(30)
    assert model.rollout_schedule is k_of and model.actor.optimizer.param_groups[0]["lr"] < 1e-3


def test_the_callers_dictionaries_stay_as_they_are():
    policy_kwargs, buffer_kwargs, dynamics_kwargs = {"net_arch": [8]}, {"handle_timeout_termination": True}, {"net_arch": [8]}
    for cls in (MBPO, MBPO):
        cls(
            "MlpPolicy",
            "Pendulum-v1",
            policy_kwargs=policy_kwargs,
            replay_buffer_kwargs=buffer_kwargs,
            dynamics_kwargs=dynamics_kwargs,
        )
    assert policy_kwargs == dynamics_kwargs == {"net_arch": [8]} and buffer_kwargs == {"handle_timeout_termination": True}


@pytest.mark.parametrize(
    ("observation_space", "action_space", "named"),
    [
        (spaces.Dict({"a": spaces.Discrete(3)}), spaces.Box(-1, 1, (1,)), "observation space Dict"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1, 1, (1,)), "observation space Box"),
        (spaces.Discrete(4), spaces.Box(-1, 1, (1,)), "observation space Discrete"),
        (spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "action space Discrete"),
        (spaces.Box(-1, 1, (2,)), spaces.Box(-np.inf, np.inf, (1,)), "action space Box"),
    ],
)
def test_refused_spaces(observation_space, action_space, named):
    with pytest.raises(ValueError, match=f"env: the {named}"):
        MBPO("MlpPolicy", Box(observation_space, action_space))


def test_unknown_argument():
    with pytest.raises(TypeError, match="rollout_lenght"):
        MBPO("MlpPolicy", "Pendulum-v1", rollout_lenght=3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_steps": 0},
        {"gradient_steps": -1},
        {"learning_starts": 0},
        pytest.param(
            {"buffer_size": 1}, marks=pytest.mark.filterwarnings("ignore:batch_size=16 needs", "ignore:buffer_size=1 allows")
        ),
        {"real_ratio": 0},
        {"real_ratio": 1},
    ],
)
def test_legal_extremes(kwargs):
    MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, **kwargs}).learn(40)


# ---------------------------------------------------------------------- environments


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_many_envs(vec_env):
    env = make_vec_env("InvertedPendulum-v5", 2, vec_env_cls=vec_env)
    model = MBPO("MlpPolicy", env, **FAST).learn(60)
    assert len(model.replay_buffer.model_buffer) > 0 and not isinstance(model.termination, str)
    env.close()


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (spaces.Box(0, 1, (3,), np.float64), spaces.Box(-1, 1, (1,), np.float64)),
        (spaces.Box(0, 1, (2, 3), np.float32), spaces.Box(np.array([[-3, 0], [1, 2]], np.float32), 5, (2, 2), np.float32)),
        (spaces.Box(0, 9, (4,), np.int64), spaces.Box(-1, 1, (1,))),
    ],
)
def test_other_boxes(observation_space, action_space):
    """Dtypes and shapes; what a user's function sees are the env's own."""
    seen = []

    def termination(obs, actions, next_obs):
        seen.append((obs.shape[1:], actions.shape[1:], next_obs.shape[1:], obs.dtype, actions.dtype))
        low, high = th.as_tensor(action_space.low), th.as_tensor(action_space.high)
        assert (actions >= low - 1e-5).all() and (actions <= high + 1e-5).all()
        return th.zeros(len(obs), dtype=th.bool)

    env = Box(observation_space, action_space)
    check_env(env, warn=False)
    model = MBPO("MlpPolicy", env, termination_fn=termination, **FAST)
    with pytest.warns(UserWarning, match="termination_fn|termination"):
        model.learn(60)
    expected = (observation_space.shape, action_space.shape, observation_space.shape, th.float32, th.float32)
    assert set(seen) == {expected}
    assert model.replay_buffer.sample(16).observations.shape == (16, *observation_space.shape)


# ---------------------------------------------------------------------- termination and reward


def test_termination_is_looked_up_in_the_env(capsys):
    MBPO("MlpPolicy", "Hopper-v5", verbose=1)
    assert "termination: known" in capsys.readouterr().out
    model = MBPO("MlpPolicy", gym.make("Hopper-v5", healthy_z_range=(0.9, 2.0)))
    high, low = th.zeros(2, 1, 11)
    high[:, 0], low[:, 0] = 1.2, 0.8
    assert model.terminates(low, th.zeros(1, 3), low).item() and not model.terminates(high, th.zeros(1, 3), high).item()


def test_unknown_env_learns_its_termination(capsys):
    model = MBPO("MlpPolicy", Box(spaces.Box(0, 1, (2,))), verbose=1, **FAST)
    assert model.termination == "learned" and "termination: learned" in capsys.readouterr().out
    model.learn(60)


@pytest.mark.parametrize(
    ("given", "resolved"), [("never", NeverTerminates()), ("learned", "learned"), (falls, falls), (own("falls"), falls)]
)
def test_forms_of_termination_fn(given, resolved):
    assert MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn=given).termination == resolved


def test_wrong_termination_is_noticed():
    model = MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn="never", **FAST)
    with pytest.warns(UserWarning, match=r"\d+ of \d+") as caught:
        model.learn(100)
    # Once, not at each of the fits.
    assert len(caught) == 1


def test_right_termination_is_not_complained_about():
    MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn=falls, **FAST).learn(100)


def test_termination_is_saved_by_value(tmp_path):
    model = MBPO("MlpPolicy", gym.make("Hopper-v5", healthy_z_range=(0.9, 2.0)), **FAST)
    model.save(tmp_path / "agent")
    for env in (None, gym.make("Hopper-v5")):
        assert MBPO.load(tmp_path / "agent", env=env).termination == model.termination


def test_another_env_is_held_against_what_was_found():
    model = MBPO("MlpPolicy", "Hopper-v5", **FAST)
    model.set_env(gym.make("Hopper-v5"))
    with pytest.warns(UserWarning, match="set_env: imagined episodes still end by"):
        model.set_env(gym.make("Hopper-v5", healthy_z_range=(0.9, 2.0)))


@pytest.mark.parametrize("termination_fn", ["never", "learned"])
def test_time_limits_are_no_missed_ends_where_sac_takes_them_for_terminations(termination_fn):
    """Time limits are neither compared with a function nor learned from; warnings are errors here."""
    env, kwargs = gym.make("Pendulum-v1", max_episode_steps=10), {"handle_timeout_termination": False}
    model = MBPO("MlpPolicy", env, termination_fn=termination_fn, replay_buffer_kwargs=kwargs, **FAST).learn(100)
    assert model.replay_buffer.dones.sum() == 10 and model._warned_of == []
    data = model.replay_buffer.real_transitions()
    assert data.dones.sum() == 0 and not model.terminates(*data[:3]).any()


def test_learned_termination_learns_from_terminations_only():
    """Pendulum's time limit teaches nothing; InvertedPendulum's falls do."""
    limited = MBPO("MlpPolicy", gym.make("Pendulum-v1", max_episode_steps=10), termination_fn="learned", **FAST).learn(150)
    data = limited.replay_buffer.real_transitions()
    assert limited.replay_buffer.dones.sum() > 10 and not limited.terminates(*data[:3]).any()
    model = MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn="learned", **{**FAST, "learning_starts": 400}).learn(500)
    data = model.replay_buffer.real_transitions()
    assert (model.terminates(*data[:3]) == (data.dones[:, 0] > 0)).float().mean() > 0.97


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_reward_function():
    model = MBPO("MlpPolicy", gym.make("InvertedPendulum-v5"), reward_fn=pays, **FAST).learn(50)
    rows = model.replay_buffer.model_buffer
    _, actions, next_obs, _, rewards = rows.rows[: len(rows)].split(rows.widths, dim=1)
    # InvertedPendulum's actions reach from -3 to 3.
    th.testing.assert_close(rewards[:, 0], 2 * 3 * actions[:, 0] + next_obs[:, 0], rtol=1e-4, atol=1e-5)


def test_real_ratio_may_change_between_runs():
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)
    model.real_ratio = 1.0
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer.real_rows(100) == 100


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_reward_function_in_double_precision():
    MBPO("MlpPolicy", "Pendulum-v1", reward_fn=lambda o, a, n: o[:, 0].double(), **FAST).learn(40)


def test_a_base_with_arguments_of_its_own():
    class Extra(SAC):
        def __init__(self, *args, extra=1, **kwargs):
            self.extra = extra
            super().__init__(*args, **kwargs)

    class Mixed(ModelBased, Extra):
        pass

    model = Mixed("MlpPolicy", "Pendulum-v1", extra=3, real_ratio=0.5)
    assert model.extra == 3 and model.gradient_steps == 20 and model.real_ratio == 0.5
    with pytest.raises(ValueError, match="gamma=2 must be"):
        Mixed("MlpPolicy", "Pendulum-v1", gamma=2)
    assert "fast_update" in inspect.signature(type("Mine", (MBPO,), {"__init__": lambda self, *a, **k: None})).parameters


def test_set_random_seed_reaches_everything():
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)
    draws = []
    for seed in (5, 5, 6):
        model.set_random_seed(seed)
        draws.append((model.replay_buffer.start_states(20), model.dynamics.sample(th.zeros(20, 3), th.zeros(20, 1))[0]))
    assert all(th.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(th.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))


def test_tensorboard_folder(tmp_path):
    MBPO("MlpPolicy", "Pendulum-v1", tensorboard_log=str(tmp_path), **FAST).learn(30)
    assert [path.name for path in tmp_path.iterdir()] == ["MBPO_1"]


@pytest.mark.parametrize("real_ratio", [0.05, 1])
def test_denormals_are_flushed_while_learning_with_a_model(real_ratio):
    if not th.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush denormals")
    seen = []
    model = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "real_ratio": real_ratio})
    model.learn(5, callback=lambda *_: seen.append(flushed()) or True)
    assert set(seen) == {real_ratio < 1} and not flushed()
