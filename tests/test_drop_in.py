"""What works with SAC works with MBPO: the arguments, environments, callbacks and habits of Stable-Baselines3's users."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common import callbacks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from tiny import FAST, equal_agents

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.buffers.replay_buffer import balanced_ratio


def short(**kwargs):
    """Pendulum whose episodes end soon enough for callbacks and logs to see some."""
    return gym.make("Pendulum-v1", max_episode_steps=10, **kwargs)


def imagined(agent):
    """Observations, actions, next observations, dones, rewards that were imagined."""
    buffer = agent.replay_buffer.model_buffer
    return buffer.rows[: len(buffer)].split(buffer.widths, dim=1)


# ---------------------------------------------------------------------- environments, steps and updates


@pytest.mark.parametrize(
    "env",
    [
        *("Pendulum-v1", short(), Monitor(short()), make_vec_env("Pendulum-v1", 2)),
        VecFrameStack(make_vec_env("Pendulum-v1", 2), 3),
    ],
    ids=lambda env: type(env).__name__,
)
def test_forms_of_env(env):
    agent = MBPO("MlpPolicy", env, **FAST).learn(40)
    assert agent.n_envs == getattr(env, "num_envs", 1) and len(imagined(agent)[0]) > 0


@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "expected"),
    [(1, 2, 17 * 2), (1, -1, 17 * 3), (4, 5, 5 * 5), (4, -1, 5 * 12), ((2, "step"), 3, 9 * 3), (1, 0, 0)],
)
def test_updates_are_counted_per_train_freq(train_freq, gradient_steps, expected):
    """Of three envs, 60 transitions, of which the first 9 (in whole rollouts) come too early: as SAC does it."""
    kwargs = {**FAST, "learning_starts": 9, "train_freq": train_freq, "gradient_steps": gradient_steps}
    agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 3), **kwargs).learn(60, log_interval=None)
    plain = {key: kwargs[key] for key in ("batch_size", "learning_starts", "train_freq", "gradient_steps")}
    assert agent._n_updates == SAC("MlpPolicy", make_vec_env("Pendulum-v1", 3), **plain).learn(60)._n_updates == expected


@pytest.mark.parametrize(
    ("n_envs", "train_freq", "updates", "expected"),
    [
        (1, 1, 3, 3 * 40),
        (3, 1, 3, 3 * 42),
        (3, 4, 3, 3 * 48),
        (1, (1, "episode"), 3, 3 * 40),
        # Of fractions, nothing is lost.
        (1, 1, 0.5, 20),
        (3, 1, 0.25, 11),
    ],
)
@pytest.mark.parametrize("cls", [MBPO, DHMBPO])
def test_updates_are_counted_per_transition(cls, n_envs, train_freq, updates, expected):
    """Of 60 transitions, those of the rollout that goes beyond the first 20, and all after it."""
    kwargs = {key: value for key, value in FAST.items() if key != "gradient_steps"}
    envs = make_vec_env("Pendulum-v1", n_envs, env_kwargs={"max_episode_steps": 10})
    agent = cls("MlpPolicy", envs, **kwargs, train_freq=train_freq, updates_per_transition=updates).learn(60)
    assert agent._n_updates == expected and agent.real_ratio == (0 if cls is DHMBPO else balanced_ratio(updates))


def test_all_learning_between_episodes():
    """Nothing is fitted, imagined or updated within an episode."""
    during = []

    class Look(callbacks.BaseCallback):
        def _on_step(self):
            during.append((self.num_timesteps, self.model._n_updates, self.model.dynamics_fitted_at))
            return True

    kwargs = {**FAST, "gradient_steps": -1, "learning_starts": 0, "model_train_freq": 3}
    MBPO("MlpPolicy", short(), **kwargs, updates_per_transition=4, train_freq=(1, "episode")).learn(30, Look())
    for step, updates, fitted_at in during:
        finished = (step - 1) // 10 * 10
        assert updates == 4 * finished and fitted_at == (finished or None)


def test_updates_per_transition_or_per_train_freq(tmp_path):
    with pytest.raises(ValueError, match="updates_per_transition=3 replaces gradient_steps=2: pass one of the two"):
        MBPO("MlpPolicy", "Pendulum-v1", **FAST, updates_per_transition=3)
    for name, value in (("agent", {}), ("other", {"gradient_steps": -1, "updates_per_transition": 3})):
        MBPO("MlpPolicy", "Pendulum-v1", **FAST | value).save(tmp_path / name)
    for safe in (False, True):
        agent = MBPO.load(tmp_path / "agent", updates_per_transition=3, safe=safe)
        assert (agent.gradient_steps, agent.updates_per_transition) == (-1, 3)
        agent = MBPO.load(tmp_path / "other", safe=safe)
        assert (agent.gradient_steps, agent.updates_per_transition) == (-1, 3)
        agent = MBPO.load(tmp_path / "other", gradient_steps=5, safe=safe)
        assert (agent.gradient_steps, agent.updates_per_transition) == (5, None)


@pytest.mark.parametrize(
    ("train_freq", "few"),
    [
        (50, r"train_freq=\(50, 'step'\), there are 0.4 updates per transition"),
        ((1, "episode"), r"there are 20 updates per episode"),
    ],
)
def test_a_train_freq_with_the_default_of_gradient_steps(train_freq, few):
    kwargs = {key: value for key, value in FAST.items() if key != "gradient_steps"}
    with pytest.warns(UserWarning, match=f"{few}.*Pass updates_per_transition=20"):
        MBPO("MlpPolicy", "Pendulum-v1", **kwargs, train_freq=train_freq)


def test_realised_updates_are_logged():
    agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 3), **{**FAST, "gradient_steps": 6})
    agent.set_logger(configure(None, []))
    agent.learn(300, log_interval=None)
    assert agent.logger.name_to_value["dynamics/updates_per_transition"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("train_freq", [4, (4, "step"), (1, "episode")])
def test_units_of_train_freq(train_freq):
    agent = MBPO("MlpPolicy", short(), **{**FAST, "train_freq": train_freq, "gradient_steps": -1}).learn(60)
    # Past the first 20 transitions: all of the rollouts that end there.
    assert agent._n_updates == {4: 40, (4, "step"): 40, (1, "episode"): 40}[train_freq]


@pytest.mark.parametrize("train_freq", ["episode", (1, "day")], ids=str)
def test_what_is_no_train_freq(train_freq):
    """Numbers that are text, and lists, from YAML are read, see test_model_based.py."""
    with pytest.raises(ValueError, match="train_freq"):
        MBPO("MlpPolicy", "Pendulum-v1", train_freq=train_freq)


def test_several_envs_with_the_default_of_gradient_steps(tmp_path):
    kwargs = {key: value for key, value in FAST.items() if key != "gradient_steps"}
    with pytest.warns(
        UserWarning, match=r"gradient_steps is left at its default.* 3 envs.*Pass updates_per_transition=20"
    ) as caught:
        agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 3), **kwargs)
    assert len(caught) == 1 and caught[0].filename == __file__
    agent.save(tmp_path / "agent")
    # Nobody who said a number or has one env is told, nor who loads: a warning is an error here.
    MBPO.load(tmp_path / "agent", env=make_vec_env("Pendulum-v1", 2))
    MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 3), gradient_steps=20, **kwargs)
    MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 1), **kwargs)


@pytest.mark.filterwarnings("ignore:batch_size=16 needs", "ignore:buffer_size=1 allows")
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kwargs", [{"learning_starts": 0}, {"learning_starts": 0, "buffer_size": 1}], ids=str)
def test_from_the_first_transition_on(n_envs, kwargs):
    agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), **{**FAST, **kwargs}).learn(30)
    assert agent._n_updates == 2 * 30 // n_envs
    assert all(th.isfinite(value).all() for value in agent.policy.state_dict().values())


def test_train_outside_learn(tmp_path):
    """On transitions from elsewhere, with no learn() before and no dynamics fitted."""
    SAC("MlpPolicy", "Pendulum-v1", learning_starts=100).learn(50).save_replay_buffer(tmp_path / "buffer")
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    agent.load_replay_buffer(tmp_path / "buffer")
    agent.set_logger(configure(None, []))
    before = copy.deepcopy(agent.policy.state_dict())
    agent.train(3, batch_size=8)
    assert agent._n_updates == agent.logger.name_to_value["train/n_updates"] == 3
    assert not th.equal(before["actor.mu.weight"], agent.policy.state_dict()["actor.mu.weight"])


# ---------------------------------------------------------------------- exploration and entropy


@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise_is_for_real_steps_only(n_envs):
    push = NormalActionNoise(mean=np.array([9.0]), sigma=np.array([0.1]))
    agent = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), action_noise=push, **FAST).learn(40)
    assert isinstance(agent.action_noise, VectorizedActionNoise if n_envs > 1 else NormalActionNoise)
    assert (agent.replay_buffer.actions[: agent.replay_buffer.size()] == 1).all()
    assert len(imagined(agent)[1].unique()) > 20


def test_action_noise_with_a_memory():
    noise = OrnsteinUhlenbeckActionNoise(mean=np.zeros(1), sigma=0.1 * np.ones(1))
    MBPO("MlpPolicy", short(), action_noise=noise, **FAST).learn(40)


@pytest.mark.parametrize(
    ("kwargs", "start"),
    [({"ent_coef": 0.2}, 0.2), ({"ent_coef": "auto"}, 1), ({"ent_coef": "auto_0.1"}, 0.1), ({"target_entropy": -3.0}, 1)],
    ids=str,
)
@pytest.mark.parametrize("fast_update", [True, False])
def test_forms_of_ent_coef(kwargs, start, fast_update):
    agent = MBPO("MlpPolicy", "Pendulum-v1", fast_update=fast_update, **FAST, **kwargs)
    agent.set_logger(configure(None, []))
    agent.learn(60, log_interval=None)
    logged = agent.logger.name_to_value["train/ent_coef"]
    fixed = kwargs.get("ent_coef") == 0.2
    assert logged == pytest.approx(start, rel=1e-6 if fixed else 0.1)
    assert (agent.ent_coef_optimizer is None) is fixed and (logged != pytest.approx(start, rel=1e-6)) is not fixed
    assert agent.target_entropy == kwargs.get("target_entropy", -1)


def test_sde_that_is_sampled_anew():
    """Its noise is of one shape in the env and of another in imagination."""
    env = make_vec_env("Pendulum-v1", 2)
    agent = MBPO("MlpPolicy", env, use_sde=True, sde_sample_freq=3, use_sde_at_warmup=True, **FAST).learn(60)
    with agent.imagining() as policy, th.no_grad():
        policy(th.zeros(7, 3))
    assert len(agent.actor.action_dist.exploration_matrices) == 2


# ---------------------------------------------------------------------- policies and optimizers


class Extractor(FlattenExtractor):
    """Batch normalisation and dropout."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        width = self.features_dim
        self.layers = th.nn.Sequential(th.nn.Linear(width, width), th.nn.BatchNorm1d(width), th.nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(super().forward(observations))


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"net_arch": {"pi": [8, 8], "qf": [4]}},
        {"net_arch": [8], "n_critics": 1},
        {"net_arch": [8], "n_critics": 3, "activation_fn": th.nn.Tanh},
        {"net_arch": [8], "optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}},
        {"net_arch": [8], "features_extractor_class": Extractor},
        {"net_arch": [8], "features_extractor_class": Extractor, "share_features_extractor": True},
        {"net_arch": [8], "use_expln": True, "log_std_init": -2},
    ],
    ids=str,
)
def test_custom_policies(policy_kwargs, tmp_path):
    given = copy.deepcopy(policy_kwargs)
    agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "policy_kwargs": policy_kwargs}).learn(40)
    assert policy_kwargs == given and agent._n_updates == 40
    agent.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent")
    assert equal_agents(agent, loaded)
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert np.array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_imagining_moves_no_batch_norm_statistics_and_drops_nothing():
    kwargs = {**FAST, "policy_kwargs": {"net_arch": [8], "features_extractor_class": Extractor}}
    agent = MBPO("MlpPolicy", "Pendulum-v1", **kwargs).learn(40)
    agent.policy.set_training_mode(True)
    norm = agent.actor.features_extractor.layers[1]
    before = norm.running_mean.clone()
    obs = th.ones(200, 3)
    with agent.imagining() as policy, th.no_grad():
        policy(obs)
        features = agent.actor.extract_features(obs, agent.actor.features_extractor)
    assert th.equal(norm.running_mean, before) and th.equal(features, features[:1].expand_as(features))
    agent.train(1, 16)
    assert not th.equal(norm.running_mean, before)


def test_learning_rate_schedule_is_the_agents_not_the_dynamics():
    agent = MBPO("MlpPolicy", "Pendulum-v1", learning_rate=lambda left: 0.5 * left, **FAST)
    own = agent.dynamics.optimizer.param_groups[0]["lr"]
    agent.learn(40)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (agent.actor.optimizer, agent.critic.optimizer)]
    assert rates == [pytest.approx(0)] * 2 and agent.dynamics.optimizer.param_groups[0]["lr"] == own > 0


def test_compiled_policy(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    agent.policy = th.compile(agent.policy, backend="eager")
    agent.learn(40).save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    obs = agent.observation_space.sample()
    assert np.array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    plain = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)
    # The alias that the algorithm trains is not the compiled one, here as in SAC.
    assert th.allclose(plain.actor.mu.weight, agent.actor.mu.weight)


def test_pickled_and_copied():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)
    for other in (pickle.loads(pickle.dumps(agent)), copy.deepcopy(agent)):
        assert equal_agents(agent, other) and all(map(th.equal, imagined(agent), imagined(other)))
        other.learn(20, reset_num_timesteps=False)
        assert other.num_timesteps == 60 and not equal_agents(agent, other)


# ---------------------------------------------------------------------- VecNormalize, callbacks, logs


@pytest.mark.filterwarnings("ignore:env. the agent learned from observations normalized by VecNormalize")
def test_another_vec_normalize():
    """What set_env brings is what batches and imagined policies see, not what the agent was made with."""
    first, second = (VecNormalize(make_vec_env("Pendulum-v1", 1), training=training) for training in (True, False))
    agent = MBPO("MlpPolicy", first, **FAST).learn(40)
    second.obs_rms.mean, second.obs_rms.var, second.norm_reward = np.full(3, 100.0), np.ones(3), False
    seen = []
    agent.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean().item()))
    for env, expected in ((second, -10), (make_vec_env("Pendulum-v1", 1), 0)):
        agent.set_env(env)
        agent._setup_learn(10)
        with agent.imagining() as policy, th.no_grad():
            policy(th.zeros(1, 3))
        assert seen[-1] == expected
        batch = agent.replay_buffer.sample(16, env=agent._vec_normalize_env)
        assert (batch.observations == -10).all().item() is (expected == -10)
        assert batch.rewards.min() < -0.1
    agent.set_env(second)
    agent.learn(30)


def test_all_stock_callbacks_at_once(tmp_path):
    env, eval_env = (VecNormalize(make_vec_env(short, 1)) for _ in range(2))
    everything = [
        callbacks.CheckpointCallback(25, tmp_path, save_replay_buffer=True, save_vecnormalize=True),
        callbacks.EvalCallback(
            eval_env,
            callbacks.StopTrainingOnRewardThreshold(1e9),
            callbacks.StopTrainingOnNoModelImprovement(1000),
            n_eval_episodes=1,
            eval_freq=20,
            best_model_save_path=tmp_path,
            verbose=0,
        ),
        callbacks.EveryNTimesteps(10, callbacks.ConvertCallback(lambda *_: True)),
        callbacks.LogEveryNTimesteps(15),
        callbacks.StopTrainingOnMaxEpisodes(6),
    ]
    agent = MBPO("MlpPolicy", env, **FAST).learn(1000, callback=everything, progress_bar=True)
    assert agent.num_timesteps == 60
    MBPO.load(tmp_path / "best_model")
    env = VecNormalize.load(tmp_path / "rl_model_vecnormalize_50_steps.pkl", make_vec_env(short, 1))
    again = MBPO.load(tmp_path / "rl_model_50_steps", env=env)
    again.load_replay_buffer(tmp_path / "rl_model_replay_buffer_50_steps")
    again.learn(20, reset_num_timesteps=False)
    assert again.num_timesteps == again.replay_buffer.size() + 1 == 70


def keys_logged(cls, folder, **kwargs):
    agent = cls("MlpPolicy", short(), **kwargs)
    agent.set_logger(configure(str(folder), ["csv"]))
    agent.learn(60, log_interval=1)
    agent.logger.close()
    return set((folder / "progress.csv").read_text().splitlines()[0].split(","))


@pytest.mark.parametrize("fast_update", [True, False])
def test_logged_is_what_sac_logs_and_dynamics(tmp_path, fast_update):
    ours = keys_logged(MBPO, tmp_path / "ours", fast_update=fast_update, **FAST)
    theirs = keys_logged(SAC, tmp_path / "theirs", learning_starts=20)
    assert {key for key in ours if not key.startswith("dynamics/")} == theirs and len(ours) > len(theirs)


def test_tensorboard_folder_is_continued(tmp_path):
    """In place where the count of steps goes on, also from a file; another one where it starts again."""

    def runs():
        return {path.name: len(list(path.iterdir())) for path in (tmp_path / "logs").iterdir()}

    agent = MBPO("MlpPolicy", "Pendulum-v1", tensorboard_log=str(tmp_path / "logs"), **FAST).learn(25)
    agent.learn(5, reset_num_timesteps=False)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    agent = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    agent.load_replay_buffer(tmp_path / "buffer")
    agent.learn(5, reset_num_timesteps=False)
    assert runs() == {"MBPO_1": 3}
    agent.learn(5)
    assert runs() == {"MBPO_1": 3, "MBPO_2": 1}


def test_stats_window_size():
    agent = MBPO("MlpPolicy", short(), stats_window_size=3, **FAST).learn(60)
    assert len(agent.ep_info_buffer) == agent.ep_info_buffer.maxlen == 3
