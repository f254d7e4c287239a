"""What is refused, with which words; and what SB3 takes with sense, and so is taken here."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib  # noqa: F401  its absence is tested in test_variants.py
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from tiny import FAST

from sb3_mbpo import DHMBPO, MBPO, MBTD3, MBTQC, MBCrossQ
from sb3_mbpo.validation import rules as checks
from sb3_mbpo.validation.argument_table import ARGUMENTS, ENSEMBLE_ARGUMENTS
from sb3_mbpo.validation.misuse import check_before_learning

NAN, INF = math.nan, math.inf


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


def test_shown():
    assert checks.shown("a") == "'a'" and checks.shown(10**9) == "1000000000"
    assert len(checks.shown("x" * 10_000)) == 303
    assert checks.shown(10**5000) == "<int whose repr raises ValueError>"
    assert checks.shown(Unspeakable()) == "<Unspeakable whose repr raises RuntimeError>"


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, NAN, [1], np.array([1])])
def test_what_is_not_whole(value):
    assert not checks.is_whole(value)


@pytest.mark.parametrize("value", [True, "1", None, NAN, [1], 1j, np.array([1, 2]), -0.1, 1.1, INF, np.float32("nan")])
def test_what_is_no_share(value):
    assert not checks.is_number(value, 0, 1)


def test_what_is():
    assert checks.is_whole(0) and checks.is_whole(np.int64(5), 1, 5) and checks.is_whole(10**30)
    assert all(checks.is_number(value, 0, 1) for value in (0, 1, 0.5, np.float32(0.5), np.int64(1), 1e-320))
    assert all(map(checks.is_flag, (True, False, 0, 1, np.True_))) and not any(map(checks.is_flag, ("false", 2, None, 0.0)))


# ---------------------------------------------------------------- the constructor

# Checked by trying them out.
ELSEWHERE = {"policy", "env", "device", "action_noise"}


@pytest.mark.parametrize("cls", [MBPO, DHMBPO, MBTD3, MBTQC, MBCrossQ])
def test_every_argument_has_a_row(cls):
    assert cls.__signature__.parameters.keys() - ARGUMENTS.keys() - ELSEWHERE == {"_init_setup_model"}


def falls(obs, actions, next_obs):
    return next_obs[:, 0] < 0


def pays(obs, actions, next_obs):
    return next_obs[:, 0]


REFUSED = [
    *((MBPO, {"gamma": value}, "gamma=.* must be a number between 0 and 1.*default is 0.99") for value in (2, -0.1, NAN, "g")),
    *((MBPO, {"gamma": value}, "gamma=") for value in (None, True, [0.9], INF, 1j, 10**400)),
    *((MBPO, {"tau": value}, "tau=.* must be a number between 0 and 1.*default is 0.005") for value in (2, -1e-9, NAN, "t")),
    *(
        (MBPO, {"ent_coef": value}, 'ent_coef=.* must be "auto"')
        for value in (-1, NAN, INF, "autox", "auto_", "auto_0", "auto_-1")
    ),
    *((MBPO, {"ent_coef": value}, "ent_coef=") for value in ("auto_nan", "auto_inf", "on", None, True, 1e16, [0.1])),
    *((MBPO, {"target_entropy": value}, "target_entropy=.* must be 'auto' or a number") for value in (NAN, INF, "low", None)),
    *((MBPO, {"learning_rate": value}, "learning_rate=.* must be") for value in (-1, NAN, INF, 1e4, None, True, "3e-4x")),
    (MBPO, {"learning_rate": lambda progress: -progress}, "learning_rate=.* returned -1.0 at progress_remaining=1"),
    *(
        (MBPO, {"batch_size": value}, "batch_size=.* must be a whole number of at least 1")
        for value in (0, -4, 32.5, "b", None)
    ),
    *((MBPO, {"buffer_size": value}, "buffer_size=.* must be a whole number") for value in (0, -1, NAN, INF, 10**12, "big")),
    *((MBPO, {"learning_starts": value}, "learning_starts=.* whole number of at least 0") for value in (-1, 0.5, NAN, None)),
    *((MBPO, {"train_freq": value}, "train_freq=.* must be a whole number") for value in (0, -1, NAN, 1.5, None, 10**12, "x")),
    *(
        (MBPO, {"train_freq": value}, "train_freq=")
        for value in ((0, "step"), (1, "day"), (1,), (), (1, "step", 2), ("x", "step"))
    ),
    *(
        (MBPO, {"gradient_steps": value}, "gradient_steps=.* -1 for one .*default is 20")
        for value in (-2, 0.5, NAN, None, "many")
    ),
    *((MBPO, {"target_update_interval": value}, "target_update_interval=.* at least 1") for value in (0, -1, 1.5, None)),
    *((MBPO, {"use_sde": value}, "use_sde=.* must be true or false") for value in ("false", 2, None, np.array([1, 2]))),
    (MBPO, {"use_sde_at_warmup": "no"}, "use_sde_at_warmup='no' must be true or false"),
    *((MBPO, {"sde_sample_freq": value}, "sde_sample_freq=.* -1 for new noise") for value in (0, -2, 1.5, None)),
    *((MBPO, {"stats_window_size": value}, "stats_window_size=.* at least 1") for value in (0, -1, NAN, None)),
    *((MBPO, {"seed": value}, "seed=.* must be None or a whole number") for value in (-1, 2**32, 0.5, NAN, "s", True)),
    *((MBPO, {"verbose": value}, "verbose=.* must be 0, 1 or 2") for value in (-1, "loud", None, 0.5)),
    *((MBPO, {"device": value}, 'device=.* must be "auto"') for value in ("gpu", "meta", None, 0.5)),
    *((MBPO, {"tensorboard_log": value}, "tensorboard_log=.* must be None or a folder") for value in (3, True, [1])),
    *((MBPO, {"action_noise": value}, "action_noise=.* must be None or") for value in (0.1, "normal", NormalActionNoise)),
    (MBPO, {"action_noise": NormalActionNoise(np.zeros(2), np.ones(2))}, "action_noise=.* finite noise of shape"),
    *((MBPO, {"policy_kwargs": value}, "policy_kwargs=.* must be None or a mapping") for value in (3, "x", [1])),
    *(
        (MBPO, {"policy_kwargs": {"net_arch": value}}, "policy_kwargs: net_arch=")
        for value in ([0], [8.5], 8, "8", {"pi": [8]})
    ),
    (MBPO, {"policy_kwargs": {"n_critics": 0}}, "policy_kwargs: n_critics=0"),
    (MBPO, {"policy_kwargs": {"activation_fn": 3}}, "policy_kwargs: activation_fn=3 must be a class"),
    *(
        (MBPO, {"replay_buffer_kwargs": value}, "replay_buffer_kwargs=.* no other key than handle_timeout_termination")
        for value in (3, [1], {"n_steps": 3}, {"handle_timeout_termination": "no"})
    ),
    *(
        (MBPO, {"replay_buffer_class": value}, "replay_buffer_class=.* must be None: MBPO mixes real and imagined")
        for value in (dict, HerReplayBuffer, np.array([1, 2]))
    ),
    *((MBPO, {"n_steps": value}, "n_steps=.* must be 1: imagined transitions are single") for value in (3, None, True)),
    *(
        (MBPO, {"optimize_memory_usage": value}, "optimize_memory_usage=.* must be False: .*buffer_size")
        for value in (1, "no")
    ),
    *(
        (MBPO, {"updates_per_transition": value}, "updates_per_transition=.* must be None or a number above 0")
        for value in (0, -1, NAN, INF, "many", True)
    ),
    *((MBPO, {"warmup_actions": value}, "warmup_actions=") for value in (0, 1.5, NAN, True, "half", [0.5], dict)),
    *((MBPO, {"real_ratio": value}, "real_ratio=.* between 0") for value in (-0.1, 1.1, NAN, "half", None, True)),
    *((MBPO, {"model_train_freq": value}, "model_train_freq=.* at least 1") for value in (0, NAN, 2.5, "n", None)),
    *((MBPO, {"rollout_batch_size": value}, "rollout_batch_size=.* at least 1") for value in (0, -5, NAN, 10**12, None)),
    *((MBPO, {"retained_rollouts": value}, "retained_rollouts=.* at least 1") for value in (0, -1, 1.5, True, "three", None)),
    *((MBPO, {"model_buffer_size": value}, "model_buffer_size=.* must be None or") for value in (0, -1, NAN, 2**70, "all")),
    *(
        (MBPO, {"rollout_schedule": value}, "rollout_schedule=.* must be a length, .*'auto'")
        for value in (0, -1, NAN, 1.5, True, None, 10**12, "long", [1])
    ),
    (MBPO, {"rollout_schedule": lambda step: None}, "rollout_schedule=.* returns None at step 0"),
    (MBPO, {"rollout_schedule": lambda step: [][step]}, "rollout_schedule=.* raises IndexError"),
    (MBPO, {"rollout_schedule": {"min_length": 1, 2: 3}}, "rollout_schedule=.* must have exactly the keys min_length"),
    (MBPO, {"rollout_schedule": {"min_length": 3, "max_length": 1, "start": 0, "end": 9}}, "never shrink"),
    (MBPO, {"rollout_schedule": {"min_length": 1, "max_length": 2.5, "start": 0, "end": 9}}, "max_length=2.5 must be a whole"),
    *(
        (MBPO, {"dynamics_class": value}, "dynamics_class=")
        for value in (3, None, dict, th.nn.Linear, "sb3_mbpo.DynamicsModel")
    ),
    (MBPO, {"dynamics_class": lambda *args, **kwargs: 3, "dynamics_kwargs": None}, "dynamics_class=.* made a int"),
    *(
        (MBPO, {"dynamics_class": value}, "dynamics_class=.* must be a subclass .*dotted name .(module|No module)")
        for value in ("sb3_mbpo.Nothing", "no_such.Model")
    ),
    *((MBPO, {"dynamics_kwargs": value}, "dynamics_kwargs=.* must be None or a mapping") for value in (0, "x", [1])),
    (MBPO, {"dynamics_kwargs": {"members": 7}}, "dynamics_kwargs has no key 'members'; .* takes n_members"),
    *(
        (MBPO, {"termination_fn": value}, "termination_fn=")
        for value in (3, True, "sometimes", np.zeros(2), lambda o: o, pays)
    ),
    *((MBPO, {"reward_fn": value}, "reward_fn=") for value in (3, True, "learned", lambda o, a, n: o * NAN, falls)),
    *(
        (MBPO, {"rollout_filter": value}, "rollout_filter=.* must be None(,| or) 'macura', 'infoprop', 'm2ac', or a rule")
        for value in (3, True, "maccura", "os.nothing", object, lambda o, a, n: o)
    ),
    (MBPO, {"rollout_filter": "macura", "dynamics_kwargs": {"n_elites": 1}}, "rollout_filter='macura' .*2 members or more"),
    (MBPO, {"fast_update": "no"}, "fast_update='no' must be None, True or False"),
    (MBPO, {"env": 3}, "env=3 must be an env"),
    (MBPO, {"env": None}, "env=None must be an env"),
    (MBPO, {"policy": 3}, "policy=3 must be a policy class"),
    *((MBTD3, {"policy_delay": value}, "policy_delay=.* at least 1") for value in (0, -1, 1.5, NAN)),
    *((MBTD3, {"target_policy_noise": value}, "target_policy_noise=") for value in (-1, NAN, INF, "x")),
    *((MBTD3, {"target_noise_clip": value}, "target_noise_clip=") for value in (-1, NAN, "x", None)),
    *((MBTQC, {"top_quantiles_to_drop_per_net": value}, "top_quantiles_to_drop_per_net=") for value in (-1, 25, 30, 1.5)),
    (MBTQC, {"policy_kwargs": {"n_quantiles": 0}}, "policy_kwargs: n_quantiles=0"),
    (MBCrossQ, {"batch_size": 1}, "batch_size=1 must be a whole number of at least 2, where batch_norm"),
    *((MBCrossQ, {"policy_delay": value}, "policy_delay=.* at least 1") for value in (0, NAN)),
    *((cls, {"gamma": 2}, "gamma=2 must be") for cls in (MBTD3, MBTQC, MBCrossQ)),
]


@pytest.mark.parametrize(("cls", "kwargs", "message"), REFUSED)
def test_refused(cls, kwargs, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cls(**{"policy": "MlpPolicy", "env": "Pendulum-v1", "buffer_size": 100, "device": "cpu", **kwargs})


ENSEMBLE: dict[str, list] = {
    "n_members": [0, -1, 2.5, NAN, True, None, "x", 10**12],
    "n_elites": [0, 8, NAN, True, None],
    "net_arch": [[], [0], [8.5], [NAN], [True], 8, "8", None, [10**12]],
    "learning_rate": [0, -1, NAN, INF, True, None, "x", 1e30],
    "weight_decays": [[1e-4], [NAN] * 5, [-1] * 5, ["x"] * 5, 3, "x", [True] * 5],
    "batch_size": [0, NAN, True, None, 2.5],
    "holdout_ratio": [0, 1, NAN, True, None, "x"],
    "max_holdout": [0, NAN, True, None],
    "patience": [-1, NAN, True, None],
    "min_improvement": [-0.1, 1, NAN, True, None],
    "max_updates": [0, -1, NAN, True, 2.5, 10**12],
    "bootstrap": ["false", None, 3, NAN],
    "layer_norm": ["false", None, 3, NAN],
    "beta": [-0.1, 1.1, NAN, True, None, "x"],
    "target_mode": ["absolute", None, 3, True],
    "normalize_targets": ["false", None, 3, NAN],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ENSEMBLE.items() for value in values])
def test_refused_for_the_ensemble(name, value):
    with pytest.raises(ValueError, match=f"dynamics_kwargs: {name}="):
        MBPO("MlpPolicy", "Pendulum-v1", buffer_size=100, device="cpu", dynamics_kwargs={name: value})


def test_every_argument_of_the_ensemble_has_a_rule():
    assert ENSEMBLE_ARGUMENTS.keys() == ENSEMBLE.keys()


def halves(progress):
    return progress / 2000


TAKEN = [
    (MBPO, {"gamma": 0}),
    (MBPO, {"gamma": 1, "tau": 1}),
    (MBPO, {"tau": 0}),
    (MBPO, {"ent_coef": 0}),
    (MBPO, {"ent_coef": "0.1", "target_entropy": "-2"}),
    (MBPO, {"ent_coef": "auto_0.1", "target_entropy": np.float32(-1)}),
    (MBPO, {"learning_rate": 0}),
    (MBPO, {"learning_rate": np.float32(1e-3)}),
    (MBPO, {"learning_rate": halves}),
    (MBPO, {"gradient_steps": 0}),
    (MBPO, {"gradient_steps": -1, "train_freq": (1, "episode")}),
    (MBPO, {"train_freq": [np.int64(2), "step"], "batch_size": np.int64(8), "seed": np.int64(3)}),
    (MBPO, {"train_freq": 2.0}),
    (MBPO, {"replay_buffer_class": ReplayBuffer, "n_steps": np.int64(1), "optimize_memory_usage": 0}),
    (MBPO, {"replay_buffer_kwargs": {"handle_timeout_termination": False}}),
    (MBPO, {"learning_starts": 0, "stats_window_size": 1}),
    (MBPO, {"learning_starts": 10**15}),
    (MBPO, {"use_sde": 1, "sde_sample_freq": 2, "use_sde_at_warmup": True}),
    (MBPO, {"verbose": "0", "tensorboard_log": None, "policy_kwargs": None, "dynamics_kwargs": {"net_arch": ["8"]}}),
    (MBPO, {"policy_kwargs": {"net_arch": {"pi": [8], "qf": []}, "optimizer_kwargs": {"eps": 1e-5}}}),
    (MBPO, {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}),
    (MBPO, {"rollout_schedule": 2.0, "real_ratio": np.float32(0.5)}),
    (MBPO, {"rollout_filter": "sb3_mbpo.trust.filters.M2AC", "rollout_schedule": 2}),
    (MBTD3, {"target_policy_noise": 0, "target_noise_clip": INF, "policy_delay": 1}),
    (MBTQC, {"top_quantiles_to_drop_per_net": 0}),
    (MBTQC, {"top_quantiles_to_drop_per_net": 24}),
    (MBCrossQ, {"batch_size": 1, "policy_kwargs": {"batch_norm": False, "net_arch": [8]}}),
]


@pytest.mark.parametrize(("cls", "kwargs"), TAKEN)
def test_taken(cls, kwargs):
    agent = cls("MlpPolicy", gym.make("Pendulum-v1", max_episode_steps=10), **{**FAST, "buffer_size": 100, **kwargs}).learn(22)
    parameters = agent.policy.state_dict().values()
    assert agent.num_timesteps >= 22 and all(parameter.isfinite().all() for parameter in parameters)


# ---------------------------------------------------------------- learn


def test_learn_nothing(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(0)
    assert agent.num_timesteps == 0
    agent.save(tmp_path / "agent")
    MBPO.load(tmp_path / "agent")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        *(
            ({"total_timesteps": value}, "learn: total_timesteps=.* whole number of at least 0")
            for value in (-1, NAN, INF, 1.5)
        ),
        *(({"total_timesteps": value}, "learn: total_timesteps=") for value in ("many", None, True, [5])),
        *(({"log_interval": value}, "learn: log_interval=.* must be None or a whole number") for value in (0, -1, 1.5, "x")),
        *(({"callback": value}, "learn: callback=.* must be None") for value in (3, "x", (), [print], EvalCallback, [None])),
        *(({"tb_log_name": value}, "learn: tb_log_name=.* must be None or a text") for value in (3, b"x")),
        *(({name: "no"}, f"learn: {name}='no' must be true or false") for name in ("progress_bar", "reset_num_timesteps")),
    ],
)
def test_refused_by_learn(kwargs, message):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match=message):
        agent.learn(**{"total_timesteps": 5, **kwargs})
    assert agent.num_timesteps == 0


@pytest.mark.parametrize("callback", [None, CallbackList([]), [], lambda locals_, globals_: True])
def test_callbacks(callback):
    assert MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn("1e0", callback, log_interval=None).num_timesteps == 1
    assert isinstance(CallbackList([]), BaseCallback)


def test_batches_larger_than_the_buffer():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "buffer_size": 12, "real_ratio": 0.9})
    with pytest.warns(UserWarning, match="batch_size=16 needs 14 real transitions; with 12, some are repeated") as caught:
        agent.learn(25)
    assert len(caught) == 1 and caught[0].filename == __file__ and agent._n_updates > 0


def agent_of(n_envs, **changed):
    usual = {"gradient_steps": 1, "batch_size": 16, "buffer_size": 100, "real_ratio": 0.05}
    return SimpleNamespace(
        env=SimpleNamespace(num_envs=n_envs),
        train_freq=TrainFreq(1, TrainFrequencyUnit.STEP),
        dynamics=SimpleNamespace(min_transitions=10),
        **{**usual, **changed},
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"batch_size": 2000}, []),
        ({"batch_size": 2020}, ["batch_size=2020"]),
        ({"batch_size": 100, "real_ratio": 1}, []),
        ({"batch_size": 101, "real_ratio": 1}, ["batch_size=101"]),
        ({"buffer_size": 9, "batch_size": 4}, ["nothing will be imagined"]),
        ({"buffer_size": 9}, ["batch_size=16", "nothing will be imagined"]),
        ({"buffer_size": 9, "batch_size": 4, "real_ratio": 1}, []),
        # Callbacks are tested with such a buffer, and agents that only predict have it.
        ({"buffer_size": 1, "gradient_steps": 0}, []),
    ],
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_warnings_before_learning(changed, words, n_envs):
    # The envs share the buffer: three get 99 of 100.
    changed = {key: value - (key == "batch_size" and n_envs == 3 and value > 99) for key, value in changed.items()}
    warnings = list(check_before_learning(agent_of(n_envs, **changed)))
    assert len(warnings) == len(words)
    assert all(word.split("=")[0] in warning for word, warning in zip(words, warnings, strict=True))


def test_episodes_of_several_envs(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST, train_freq=(1, "episode"))
    agent.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", env=make_vec_env("Pendulum-v1", 2))
    assert loaded.predict(loaded.observation_space.sample())[0].shape == (1,)
    with pytest.raises(ValueError, match=r"train_freq=.* only with one env, but there are 2"):
        loaded.learn(5)


# ---------------------------------------------------------------- load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "agent"
    noise = NormalActionNoise(np.zeros(1), np.ones(1))
    MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), **FAST, action_noise=noise).learn(4).save(path)
    return path


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tau": 2}, "tau=2 must be"),
        ({"gamma": NAN}, "gamma=nan must be"),
        ({"learning_rate": -1}, "learning_rate=-1 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"verbose": "loud"}, "verbose='loud' must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"stats_window_size": 0}, "stats_window_size=0 must be"),
        ({"train_freq": (0, "step")}, "train_freq=.* must be"),
        ({"real_ratio": 3}, "real_ratio=3 must be"),
        ({"rollout_schedule": 0}, "rollout_schedule=0 must be"),
        ({"termination_fn": lambda o, a, n: o}, "termination_fn=.* returned"),
        ({"device": "gpu"}, "device='gpu' must be"),
        ({"env": 3}, "env=3 must be an env"),
        ({"dynamics_kwargs": {"n_members": 0}}, "dynamics_kwargs: n_members=0"),
        ({"dynamics_kwargs": {"net_arch": [5]}}, r"load: the networks in .* do not fit dynamics_kwargs=\{'net_arch': \[5\]\}"),
        ({"ent_coef": 0.1}, "load: the networks in .* do not fit ent_coef=0.1"),
        ({"use_sde": True}, "use_sde=True"),
    ],
)
def test_refused_by_load(saved, kwargs, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        MBPO.load(saved, **kwargs)


def test_noise_of_another_number_of_envs(saved):
    MBPO.load(saved, env=gym.make("Pendulum-v1")).learn(3)
