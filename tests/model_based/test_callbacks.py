import inspect
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from tiny import TruePendulum, equal_agents

from sb3_mbpo import MBPO, DynamicsModel, RolloutCallback
from sb3_mbpo.dynamics.explained_variance import Explained
from sb3_mbpo.trust.auto_rollout_length import drift

FAST: dict[str, Any] = {
    "policy": "MlpPolicy",
    "policy_kwargs": {"net_arch": [8]},
    "batch_size": 16,
    "rollout_batch_size": 30,
    "gradient_steps": 1,
    "dynamics_kwargs": {"net_arch": [8], "max_updates": 3},
    # What is learned here in a few updates explains nothing yet.
    "min_explained_variance": None,
    "seed": 0,
}


class Recorder(DynamicsModel):
    """A dynamics that predicts no change and notes when it is fitted, and on how much."""

    def __init__(self, obs_dim, action_dim, *, seed=None, device="cpu", minimum=1):
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        self.fits = []
        self.min_transitions = minimum

    def fit(self, transitions, progress=None):
        self.fits.append(len(transitions.rewards))
        return {}

    def sample(self, obs, actions):
        return obs.clone(), obs.new_zeros(len(obs))


def agent(env="Pendulum-v1", **kwargs) -> MBPO:
    defaults = {"dynamics_class": Recorder, "dynamics_kwargs": None, "learning_starts": 20, "model_train_freq": 10}
    return MBPO(env=env, **{**FAST, **defaults, **kwargs})


def test_first_fit_comes_before_the_first_update():
    updates_then = []

    class Spy(Recorder):
        def fit(self, transitions, progress=None):
            updates_then.append(model._n_updates)
            return super().fit(transitions, progress)

    model = agent(dynamics_class=Spy, learning_starts=23)
    model.learn(24)
    # SB3 updates past learning_starts: first after step 24.
    assert model.dynamics.fits == [24] and updates_then == [0] and model._n_updates == 1
    assert len(model.replay_buffer.model_buffer) == 30


def test_then_at_every_multiple():
    model = agent(learning_starts=23)
    model.learn(60)
    assert model.dynamics.fits == [24, 30, 40, 50, 60]


@pytest.mark.parametrize(("train_freq", "expected"), [(1, [21, 30, 42, 51, 60]), (4, [24, 36, 48, 60])])
def test_due_when_a_multiple_was_passed(train_freq, expected):
    """Three envs step over the multiples of ten."""
    model = agent(make_vec_env("Pendulum-v1", 3), train_freq=train_freq, learning_starts=19)
    model.learn(60)
    assert model.dynamics.fits == expected


def test_whole_episodes():
    model = agent(train_freq=(1, "episode"), learning_starts=100, model_train_freq=150)
    model.learn(800)
    assert model.dynamics.fits == [200, 400, 600, 800]


@pytest.mark.parametrize("kwargs", [{"real_ratio": 1}, {"gradient_steps": 0}])
def test_never_due(kwargs):
    model = agent(**kwargs)
    model.learn(50)
    assert model.dynamics.fits == [] and len(model.replay_buffer.model_buffer) == 0


def test_waits_for_enough_data():
    model = agent(learning_starts=0, dynamics_kwargs={"minimum": 12})
    model.learn(25)
    assert model.dynamics.fits == [12, 20]


def test_lifetime_is_what_counts():
    """k and what is due go on over `learn` calls, whether or not SB3's counter starts again."""
    model = agent(rollout_schedule={"min_length": 1, "max_length": 9, "start": 0, "end": 90}, rollout_batch_size=10)
    model.set_logger(configure(None, []))
    lengths = []
    for reset in (True, False, True):
        model.learn(30, reset_num_timesteps=reset)
        lengths.append(model.logger.name_to_value["dynamics/rollout_length"])
    # The random steps come again after a reset, without fits: 61 to 80.
    assert model.dynamics.fits == [21, 30, 40, 50, 60, 81, 90] and model.lifetime_timesteps == 90
    assert lengths == [1 + 8 * 30 // 90, 1 + 8 * 60 // 90, 9]


def test_lifetime_survives_save_and_load(tmp_path):
    model = agent(learning_starts=5, model_train_freq=100)
    model.learn(30)
    model.learn(10)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    assert loaded.lifetime_timesteps == 40 and loaded.dynamics_fitted_at == model.dynamics_fitted_at == 6
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(2, reset_num_timesteps=False)
    # No imagined data came along: they are made anew at once, then again when due.
    assert loaded.dynamics.fits == [41] and len(loaded.replay_buffer.model_buffer) == 30
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.dynamics.fits == [41, 100]


def test_retention_and_length():
    model = agent(rollout_schedule=3, retained_rollouts=2)
    model.learn(100)
    assert list(model.replay_buffer.model_buffer.refills) == [90, 90]


class Counting(BaseCallback):
    def __init__(self):
        super().__init__()
        self.inits, self.ends = 0, 0

    def _init_callback(self):
        self.inits += 1

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.ends += 1


def test_user_callbacks_of_every_form():
    called = []
    counting = Counting()
    forms = [
        None,
        counting,
        [counting],
        CallbackList([counting]),
        [],
        lambda locals_, globals_: called.append(1) or True,
        EveryNTimesteps(5, counting),
    ]
    for form in forms:
        model = agent(learning_starts=5)
        model.learn(12, callback=form)
        assert model.dynamics.fits == [6, 10]
    assert called == [1] * 12
    # Initialised once a run, never twice by ours.
    assert counting.inits == 4 and counting.ends == 3 * 12


def test_a_callback_that_stops():
    model = agent(learning_starts=5)
    model.learn(30, callback=lambda locals_, globals_: model.num_timesteps < 10)
    assert model.num_timesteps == 10 and model.dynamics.fits == [6]


def test_what_is_logged(tmp_path):
    env = gym.make("Pendulum-v1", max_episode_steps=50)
    model = MBPO(env=env, learning_starts=20, model_train_freq=25, **{**FAST, "gradient_steps": 2})
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, log_interval=1)
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    expected = "train_loss holdout_error epochs elites fit_seconds fit_cpu_seconds rollout_seconds rollout_cpu_seconds "
    expected += "rollout_length real_buffer_size "
    expected += "model_buffer_size real_share updates_per_transition termination termination_disagreement "
    expected += "updates diverged dropped clipped q_mean q_max q_bound explained_obs explained_reward branch_length "
    expected += "holdout_explained_obs holdout_explained_reward gate reward_error"
    assert {f"dynamics/{name}" for name in expected.split()} == {name for name in header if name.startswith("dynamics/")}
    assert all(len(name) <= 33 for name in header)
    values = model.logger.name_to_value
    model.logger.close()
    assert values["dynamics/real_buffer_size"] == 200 and values["dynamics/model_buffer_size"] == 120
    assert values["dynamics/updates_per_transition"] == pytest.approx(2, rel=0.02)


def test_every_fit_is_seen_by_tensorboard_and_nothing_is_dumped(monkeypatch):
    model = agent()
    model.set_logger(configure(None, []))
    monkeypatch.setattr(model.logger, "dump", lambda step=0: pytest.fail("dumped"))
    model.learn(100, log_interval=None)
    assert "dynamics/rollout_length" in model.logger.name_to_value


# tqdm's rich bar, which SB3 uses, announces itself as experimental.
@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_the_progress_bar_moves_during_a_fit(monkeypatch):
    said = []
    from tqdm.rich import tqdm

    monkeypatch.setattr(tqdm, "set_description", lambda self, what="", refresh=True: said.append(what))
    MBPO(env="Pendulum-v1", learning_starts=20, **FAST).learn(25, progress_bar=True)
    assert said[0] == "fitting the dynamics, 4 gradient steps" and "imagining, 30 of 30 branches" in said and said[-1] == ""


def test_imagined_states_follow_the_policy_and_the_real_states(monkeypatch):
    """Start states are real observations, actions those of the stochastic policy on normalised observations."""
    seen = []

    class Spy(Recorder):
        def sample(self, obs, actions):
            seen.append((obs.clone(), actions.clone()))
            return super().sample(obs, actions)

    model = agent(dynamics_class=Spy, rollout_batch_size=2000, learning_starts=20)
    model.learn(21)
    ((obs, actions),) = seen
    real = model.replay_buffer.real_transitions().observations
    assert (th.cdist(obs, real).min(dim=1).values < 1e-6).all() and actions.abs().max() <= 1
    # One start state many times: the spread of its actions is that of the policy at the time (not yet updated since).
    same = (obs == obs[0]).all(dim=1)
    assert actions[same].std() > 0.3 and len(np.unique(actions[same].numpy())) == same.sum()


class Cramped(Recorder):
    """A dynamics that memory has room for with so many rows."""

    room = 7
    asked: list[int]

    def sample(self, obs, actions):
        self.asked.append(len(obs))
        if len(obs) > self.room:
            raise th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().sample(obs, actions)


@pytest.mark.parametrize("length", [1, 3])
def test_memory_that_runs_out_halves_the_block_with_one_warning(monkeypatch, length):
    monkeypatch.setattr(Cramped, "asked", [], raising=False)
    model = agent(dynamics_class=Cramped, learning_starts=20, rollout_schedule=length)
    with pytest.warns(UserWarning, match="rollout of 30 start states; from now on 7 are imagined") as caught:
        model.learn(40)
    # 21, 30, 40: the first finds out, the others know.
    refill = [7] * 4 * length + [2] * length
    assert len(caught) == 1 and Cramped.asked == [30, 15, *refill * 3]
    assert list(model.replay_buffer.model_buffer.refills) == [30 * length] * 3
    assert "rollout_batch_size" in str(caught[0].message) and "model_buffer_size" in str(caught[0].message)


def test_no_memory_at_all_says_what_to_lower(monkeypatch):
    monkeypatch.setattr(Cramped, "asked", [], raising=False)
    monkeypatch.setattr(Cramped, "room", 0)
    model = agent(dynamics_class=Cramped, learning_starts=20, model_buffer_size=1234)
    with pytest.raises(MemoryError, match=r"rollout_batch_size=30.*model_buffer_size=1234"):
        model.learn(40)
    # Fit and refill are made up for when there is room again.
    assert model.dynamics_fitted_at is None and list(model.replay_buffer.model_buffer.refills) == []
    monkeypatch.setattr(Cramped, "room", 30)
    model.learn(5, reset_num_timesteps=False)
    assert list(model.replay_buffer.model_buffer.refills) == [30]


@pytest.fixture
def allow():
    """Lets this process have so many bytes of the GPU's memory more than it has, and no more."""

    def allow(n_bytes: float) -> None:
        th.cuda.empty_cache()
        total = th.cuda.get_device_properties(0).total_memory
        th.cuda.set_per_process_memory_fraction(min((th.cuda.memory_reserved() + n_bytes) / total, 1.0))

    yield allow
    th.cuda.set_per_process_memory_fraction(1.0)
    th.cuda.empty_cache()


# A GPU's memory can be filled on one only; Cramped plays it above.
@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_that_runs_out(allow):
    wide = {"net_arch": [4000], "max_updates": 3}
    large = {"dynamics_kwargs": wide, "rollout_batch_size": 100_000, "learning_starts": 20}
    # SB3's update: a capture needs memory of its own.
    model = MBPO(env="Pendulum-v1", device="cuda", fast_update=False, **FAST | large)
    # The hidden layer of one member, for a fifth of these rows, takes 320 MB.
    allow(300e6)
    with pytest.warns(UserWarning, match="rollout of 100000 start states; from now on [0-9]+ are imagined") as caught:
        model.learn(40)
    assert len(caught) == 1 and list(model.replay_buffer.model_buffer.refills) == [100_000]
    # The buffer of these branches takes 72 MB: halving them helps for a while only.
    model.rollout_schedule, model.dynamics_fitted_at = 20, None
    allow(20e6)
    with pytest.raises(MemoryError, match="rollout_batch_size=100000"):
        model.learn(5, reset_num_timesteps=False)
    allow(2e9)
    model.learn(5, reset_num_timesteps=False)
    assert list(model.replay_buffer.model_buffer.refills) == [100_000, 2_000_000]


def test_a_callback_of_ones_own_decides_when(tmp_path):
    class Once(RolloutCallback):
        def due(self):
            return super().due() and self.model.dynamics_fitted_at is None

    class Seldom(MBPO):
        rollout_callback_class = Once

    settings = {**FAST, "dynamics_class": Recorder, "dynamics_kwargs": None, "learning_starts": 20, "model_train_freq": 10}
    model = Seldom(env="Pendulum-v1", **settings)
    model.learn(60)
    assert model.dynamics.fits == [21] and list(model.replay_buffer.model_buffer.refills) == [30]
    assert "rollout_callback_class" not in vars(model) and model.logger.name_to_value["dynamics/real_buffer_size"] == 60
    model.save(tmp_path / "agent")
    assert Seldom.load(tmp_path / "agent").rollout_callback_class is Once and agent().rollout_callback_class is RolloutCallback


# ---------------------------------------------------------------------- a model that goes bad


class Breaks(Recorder):
    """Predicts no number where the first observation is below ``limit``."""

    limit = float("inf")

    def sample(self, obs, actions):
        next_obs, rewards = super().sample(obs, actions)
        next_obs[obs[:, 0] < self.limit] = th.nan
        return next_obs, rewards


def test_dropped_rows_are_counted_and_warned_of_once():
    model = agent(dynamics_class=Breaks, rollout_batch_size=200)
    model.dynamics.limit = 0.0
    with pytest.warns(UserWarning, match=r"\d+ of 200 imagined transitions were not finite and were left out") as caught:
        model.learn(40)
    assert model.dynamics.fits == [21, 30, 40] and len(caught) == 1
    rows, refills = model.replay_buffer.model_buffer.contents()
    assert rows.isfinite().all() and (rows[:, 0] >= 0).all()
    dropped = model.logger.name_to_value["dynamics/dropped"]
    assert 0 < dropped < 200 and refills[-1] == 200 - dropped
    model.learn(10, reset_num_timesteps=False)
    loaded_anew = agent(dynamics_class=Breaks)
    assert model._warned_of == ["dropped"] and loaded_anew._warned_of == []


def test_with_everything_dropped_sac_goes_on_with_real_data():
    """The model buffer is empty but in order, batches are all real, and the next good refill is used."""
    model = agent(dynamics_class=Breaks, rollout_batch_size=50, retained_rollouts=2)
    with pytest.warns(UserWarning, match="50 of 50 .*; nothing new is imagined until the next fit"):
        model.learn(35)
    buffer = model.replay_buffer
    assert model.dynamics.fits == [21, 30] and list(buffer.model_buffer.refills) == [0, 0] and model._n_updates == 15
    assert model.logger.name_to_value["dynamics/dropped"] == 50 and model.logger.name_to_value["dynamics/real_share"] == 1
    assert buffer.real_rows(16) == 16 and buffer.sample(16).observations.shape == (16, 3)
    model.dynamics.limit = -2.0
    model.learn(10, reset_num_timesteps=False)
    assert list(buffer.model_buffer.refills) == [0, 50] and model.logger.name_to_value["dynamics/dropped"] == 0
    assert buffer.real_rows(16) == 8 and buffer.sample(16).observations.isfinite().all()


def test_with_an_empty_model_buffer_batches_are_sb3s():
    model = agent(dynamics_class=Breaks)
    with pytest.warns(UserWarning, match="not finite"):
        model.learn(25)
    batches = []
    for sample in (model.replay_buffer.sample, partial(ReplayBuffer.sample, model.replay_buffer)):
        np.random.seed(5)
        batches.append(sample(16))
    assert all(th.equal(a, b) for a, b in zip(*(batch[:5] for batch in batches), strict=True))


def test_a_model_that_is_not_usable_yet():
    class Later(Recorder):
        usable = False

    model = agent(dynamics_class=Later)
    model.learn(35)
    assert model.dynamics.fits == [21, 30] and list(model.replay_buffer.model_buffer.refills) == [0, 0]
    assert "dynamics/rollout_length" not in model.logger.name_to_value
    model.dynamics.usable = True
    model.learn(10, reset_num_timesteps=False)
    assert list(model.replay_buffer.model_buffer.refills) == [0, 0, 30]


# ---------------------------------------------------------------------- trust


def explains(monkeypatch, *shares: float) -> None:
    """Let the dynamics explain these shares of the observations of the steps since each fit, one after the other."""
    left = list(shares)

    def explained(errors, of_constant, n):
        return Explained(1.0, left[0], th.full((len(errors),), left.pop(0)))

    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.explained", explained)


def test_the_gate_follows_what_was_explained_of_the_steps_since_the_fit(monkeypatch):
    """Of a batch of 16 with 4 real rows, 12 are imagined after the first fit, then 6 and none, and 12 again."""
    explains(monkeypatch, 0.075, 0.0, 0.6)
    model = agent(dynamics_class=TruePendulum, real_ratio=0.25, min_explained_variance=0.1, model_train_freq=30)
    real = []
    # Fits at 21, 30 (nine steps say too little), 60, 90 and 120.
    model.learn(125, callback=lambda locals_, globals_: real.append(model.replay_buffer.real_rows(16)) or True)
    # What is seen at a step was set at the end of the one before.
    assert [real[step - 1] for step in (22, 31, 60, 61, 90, 91, 120, 121, 125)] == [4, 4, 4, 10, 10, 16, 16, 4, 4]
    # Nothing is imagined that nobody would learn from.
    assert list(model.replay_buffer.model_buffer.refills) == [30, 30, 0, 30]


@pytest.mark.parametrize("n_envs", [1, 2])
def test_the_gate_is_measured_on_the_steps_since_the_fit_and_no_others(monkeypatch, n_envs):
    judged = []
    env = make_vec_env("Pendulum-v1", n_envs)
    model = agent(env, dynamics_class=TruePendulum, model_train_freq=30 * n_envs, rollout_batch_size=1)
    predict = model.predict_mean
    monkeypatch.setattr(
        model, "predict_mean", lambda steps: judged.append((model.dynamics_fitted_at, steps)) or predict(steps)
    )
    model.learn(95 * n_envs)
    real = model.replay_buffer.real_transitions()
    fits = [*(fitted_at for fitted_at, _ in judged), 90 * n_envs]
    assert len(judged) >= 2
    for (start, steps), end in zip(judged, fits[1:], strict=True):
        for mine, theirs in zip(steps[:5], real[:5], strict=True):
            assert th.equal(mine, theirs[start:end])
    # The true system is right about all of them.
    assert model.logger.name_to_value["dynamics/explained_obs"] > 0.9999 and max(model.forward_errors) < 1e-6


def test_a_gate_that_stays_shut_is_warned_of_once(monkeypatch):
    explains(monkeypatch, *[0.0] * 8)
    model = agent(dynamics_class=TruePendulum, min_explained_variance=0.1, model_train_freq=30)
    with pytest.warns(UserWarning, match=r"not used after 3 fits in a row.*observation, dimensions \[0, 1, 2\] is predicted"):
        model.learn(125)
    assert model.unused_fits == 3 and model.logger.name_to_value["dynamics/gate"] == "observation, dimensions [0, 1, 2]"
    # Later fits say nothing, and one good one is enough.
    model.learn(50, reset_num_timesteps=False)
    explains(monkeypatch, 1.0)
    model.learn(20, reset_num_timesteps=False)
    assert model.unused_fits == 0 and model.logger.name_to_value["dynamics/gate"] == "open"


def test_a_reward_that_nobody_can_predict_is_named():
    """Not after one fit, and not by the observations."""
    rng = np.random.default_rng(0)
    env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: rng.normal())
    with pytest.warns(UserWarning, match="the reward is predicted worst"):
        model = MBPO(env=env, **{**LEARNING, "model_train_freq": 100, "gradient_steps": 1}).learn(520)
    assert model.imagined_fraction == 0 and model.logger.name_to_value["dynamics/explained_obs"] > 0.5


def test_the_gate_is_logged_and_saved(tmp_path, monkeypatch):
    explains(monkeypatch, 0.075)
    model = agent(dynamics_class=TruePendulum, real_ratio=0.25, min_explained_variance=0.1, model_train_freq=30)
    model.learn(62)
    logged = model.logger.name_to_value
    assert logged["dynamics/real_share"] == 10 / 16 and logged["dynamics/explained_obs"] == 0.075
    model.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    assert loaded.imagined_fraction == pytest.approx(0.5) and loaded.real_ratio == 0.25
    assert loaded.forward_errors == model.forward_errors and len(loaded.forward_errors) == 4
    assert loaded.explained_at_fit == [logged["dynamics/explained_reward"], 0.075]


class NoPast(gym.Env):
    """The next observation has nothing to do with this one; the reward is for the action."""

    observation_space = gym.spaces.Box(-10, 10, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(size=2).astype(np.float32), -abs(float(action[0]) - 0.3), False, False, {}


LEARNING: dict[str, Any] = {**FAST, "learning_starts": 300, "dynamics_kwargs": {"net_arch": [32, 32]}}
del LEARNING["min_explained_variance"]


def test_dynamics_that_cannot_be_learned_are_not_learned_from():
    """The agent is SAC to the last bit, at the same number of updates."""
    model = MBPO(env=gym.wrappers.TimeLimit(NoPast(), 50), **LEARNING, fast_update=False).learn(310)
    assert model.imagined_fraction == 0 and model.replay_buffer.real_rows(100) == 100
    settings = {name: value for name, value in LEARNING.items() if name in inspect.signature(SAC).parameters}
    assert equal_agents(SAC(env=gym.wrappers.TimeLimit(NoPast(), 50), **settings).learn(310), model)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_what_is_remembered_from_fit_to_fit_earns_nothing(n_envs):
    """Each fit holds out rows that earlier ones were given; nothing is imagined after any of four."""
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(NoPast(), 50), n_envs, seed=0)
    shares = []
    settings = {**LEARNING, "model_train_freq": 100, "gradient_steps": 1, "learning_starts": 200}
    model = MBPO(env=env, **settings)
    with pytest.warns(UserWarning, match="not used after 3 fits in a row"):
        model.learn(520, callback=lambda *_: shares.append((model.dynamics_fitted_at, model.imagined_fraction)) or True)
    fits = dict(shares)
    fits.pop(None)
    assert len(fits) >= 4 and set(fits.values()) == {0}


def test_dynamics_that_can_be_learned_lose_nothing():
    model = MBPO(env="Pendulum-v1", **LEARNING).learn(310)
    assert model.imagined_fraction == 1 and model.replay_buffer.real_rows(100) == 50


@pytest.mark.parametrize("n_envs", [1, 3])
def test_auto_goes_as_far_as_the_true_system_would(n_envs):
    """With nothing measured yet k is 1; the truth holds to the cap."""
    model = agent(
        make_vec_env("Pendulum-v1", n_envs), dynamics_class=TruePendulum, rollout_schedule="auto", model_train_freq=120
    )
    lengths = []
    model.learn(130, callback=lambda locals_, globals_: lengths.append(model.rollout_length) or True)
    assert lengths[0] == lengths[110 // n_envs] == 1 and model.rollout_length == 15


def test_auto_stays_at_one_step_with_a_bad_dynamics(monkeypatch):
    measured = []
    monkeypatch.setattr(
        "sb3_mbpo.model_based.model_learning.drift", lambda *args: measured.append(drift(*args)) or measured[-1]
    )
    model = agent(rollout_schedule="auto", model_train_freq=50).learn(200)
    assert len(model.dynamics.fits) == 5 and model.rollout_length == 1
    assert len(measured) > 1 and all(len(errors) > 1 for errors in measured)


def test_auto_warns_where_it_cannot_measure():
    """What it asks for is enough."""
    envs = make_vec_env("Pendulum-v1", 4)
    settings = {"dynamics_class": TruePendulum, "rollout_schedule": "auto", "rollout_batch_size": 1}
    model = agent(envs, **settings, model_train_freq=20)
    with pytest.warns(UserWarning, match=r"n_envs=4 and model_train_freq=20: k stays 1. Raise it, to 76 for up to 15 steps"):
        model.learn(100)
    assert agent(envs, **settings, model_train_freq=24).learn(100).auto_rollout_length == 2
    assert agent(envs, **settings, model_train_freq=76).learn(240).auto_rollout_length == 15


@pytest.mark.parametrize("most", [1000, 25])
def test_auto_is_never_measured_on_what_was_fitted(most, monkeypatch):
    """Each time the steps since the last fit, no others, and of many the newest."""
    monkeypatch.setattr("sb3_mbpo.model_based.model_learning.MOST_STARTS", most)
    seen = []

    class Spy(Recorder):
        def sample(self, obs, actions):
            seen.append(obs.clone())
            return super().sample(obs, actions)

    model = agent(dynamics_class=Spy, rollout_schedule="auto", rollout_batch_size=1, model_train_freq=30).learn(80)
    real = model.replay_buffer.real_transitions().observations
    measured = [obs for obs in seen if len(obs) > 1]
    assert model.dynamics.fits == [21, 30, 60]
    assert th.equal(measured[0], real[max(30, 60 - most) : 60])


class EndsLater(gym.Env):
    """Nothing but draws from (-1, 1); from a certain step on, what is above ``limit`` ends the episode and costs 20."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, limit=0.5, begin=120):
        self.limit, self.begin, self.steps = limit, begin, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        ended = self.steps > self.begin and bool(obs[0] > self.limit)
        return obs, -20.0 * ended, ended, False, {}


@pytest.mark.parametrize("n_envs", [1, 2])
def test_ends_that_the_learned_termination_missed_are_learned_before_the_next_fit(n_envs):
    """Nothing has ended before the only fit of the dynamics. Imagined transitions of before end where real ones do now."""
    settings = {**FAST, "learning_starts": 100, "gradient_steps": 1, "model_train_freq": 1000, "rollout_batch_size": 500}
    env = make_vec_env(EndsLater, n_envs, env_kwargs={"begin": 120 // n_envs})
    model = MBPO(env=env, **settings, termination_fn="learned").learn(110)
    assert model.replay_buffer.model_buffer.contents()[0][:, -2].sum() == 0
    model.learn(400, reset_num_timesteps=False)
    assert len(model.replay_buffer.model_buffer.refills) == 1
    rows = model.replay_buffer.model_buffer.contents()[0]
    next_obs, dones, rewards = rows[:, 3], rows[:, -2] > 0.5, rows[:, -1]
    assert (dones == (next_obs > 0.5)).float().mean() > 0.95 and dones.float().mean() > 0.1
    assert rewards[~dones].abs().max() < 5


def test_a_known_termination_is_not_fitted_again(monkeypatch):
    settings = {**FAST, "learning_starts": 100, "gradient_steps": 1, "model_train_freq": 1000}
    fits = []
    monkeypatch.setattr(MBPO, "fit_termination", lambda self, transitions: fits.append(len(transitions.rewards)) or {})
    ends = lambda obs, actions, next_obs: next_obs[:, 0] > 2  # noqa: E731
    MBPO(env=EndsLater(), **settings, termination_fn=ends).learn(300)
    assert len(fits) == 1
