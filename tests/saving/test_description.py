import inspect
import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import LinearSchedule as LearningRateSchedule
from stable_baselines3.sac.policies import SACPolicy
from tiny import FAST

from sb3_mbpo import MBPO, MBTD3, DynamicsModel, LinearRolloutSchedule
from sb3_mbpo.saving.description import build, describe
from sb3_mbpo.saving.serialization import encode
from sb3_mbpo.terminations.known import TipFalls
from sb3_mbpo.trust.filters import M2AC, Infoprop, Macura
from sb3_mbpo.validation.class_registry import AGENTS
from sb3_mbpo.variants import MBTQC, MBCrossQ

ALGORITHMS = [MBPO, MBTD3, MBTQC, MBCrossQ]


def described(agent):
    return json.loads(json.dumps(describe(agent), allow_nan=False))


def make(cls=MBPO, env="Pendulum-v1", **kwargs):
    # One of the two is given.
    instead = {"gradient_steps": -1} if "updates_per_transition" in kwargs else {}
    return cls("MlpPolicy", env, **{**FAST, **instead, **kwargs})


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_described_and_built(cls):
    agent = make(cls).learn(30)
    again = build(described(agent))
    assert type(again) is cls and again.env is None
    assert described(again) == described(agent)
    for name, state in agent.get_parameters().items():
        if "optimizer" not in name:
            theirs = again.get_parameters()[name]
            assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in state.items()}
    assert again.num_timesteps == again.lifetime_timesteps == 30 and again.dynamics_fitted_at == agent.dynamics_fitted_at


# Of each argument, one value or more that is not its default.
VALUES: dict[str, list[Any]] = {
    "learning_rate": [1e-2, LearningRateSchedule(1e-3, 1e-4, 0.5)],
    "buffer_size": [123],
    "learning_starts": [7],
    "batch_size": [32],
    "tau": [0.02],
    "gamma": [0.9],
    "train_freq": [3, (2, "step"), (1, "episode")],
    "gradient_steps": [3, -1],
    "updates_per_transition": [2, 0.5],
    "warmup_actions": [0.3],
    "action_noise": [
        NormalActionNoise(np.zeros(1), np.ones(1)),
        OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)),
        VectorizedActionNoise(NormalActionNoise(np.zeros(1), np.ones(1)), 1),
    ],
    "replay_buffer_kwargs": [{"handle_timeout_termination": False}],
    "ent_coef": ["auto_0.3", 0.2],
    "target_update_interval": [2],
    "target_entropy": [-0.5],
    "use_sde": [True],
    "sde_sample_freq": [4],
    "use_sde_at_warmup": [True],
    "policy_delay": [5],
    "target_policy_noise": [0.1],
    "target_noise_clip": [0.3],
    "top_quantiles_to_drop_per_net": [1],
    "stats_window_size": [7],
    "policy_kwargs": [
        {"net_arch": {"pi": [4], "qf": [5, 6]}, "activation_fn": th.nn.Tanh},
        {"net_arch": [8], "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}, "n_critics": 3},
    ],
    "verbose": [1],
    "seed": [5, None],
    "real_ratio": [0.25],
    "model_train_freq": [11],
    "rollout_batch_size": [12],
    "rollout_schedule": [3, {"min_length": 1, "max_length": 4, "start": 10, "end": 20}, LinearRolloutSchedule(1, 2, 3, 4)],
    "retained_rollouts": [2],
    "model_buffer_size": [50],
    "prediction_clip_margin": [None, 0.5],
    "min_explained_variance": [0.5],
    "dynamics_window": [50],
    "rollout_filter": ["macura", "infoprop", "m2ac", Macura(xi=2, zeta=80.0), Infoprop(0.99, 0.1, 50), M2AC(alpha=0.1)],
    "termination_fn": ["learned", "never", TipFalls(0.5)],
    "dynamics_kwargs": [{"net_arch": [4, 4], "n_members": 3, "n_elites": 2, "weight_decays": [0.0, 1e-4, 0.1]}],
    "fast_update": [False, True],
}
# Only one value is accepted at construction, or allowed in a file; or the caller gives it every time.
ONE_VALUE = {"replay_buffer_class", "optimize_memory_usage", "n_steps", "policy", "env", "device", "_init_setup_model"}
ONE_VALUE |= {"tensorboard_log", "reward_fn", "dynamics_class"}
CASES = [
    (cls, name, value)
    for cls in ALGORITHMS
    for name, values in VALUES.items()
    for value in values
    if name in inspect.signature(cls).parameters and (cls is MBPO or name not in inspect.signature(MBPO).parameters)
]


@pytest.mark.parametrize(("cls", "name", "value"), CASES, ids=lambda part: str(part)[:40])
def test_every_argument(cls, name, value):
    env = gym.make("InvertedDoublePendulum-v5") if isinstance(value, TipFalls) else "Pendulum-v1"
    agent = make(cls, env, **{name: value})
    attribute = {"stats_window_size": "_stats_window_size"}.get(name, name)
    again = build(described(agent))
    assert described(again) == described(agent)
    ours, theirs = getattr(agent, attribute), getattr(again, attribute)
    assert type(theirs) is type(ours)
    if type(ours).__eq__ is not object.__eq__:
        assert theirs == ours
    assert described(agent)["arguments"][name] != described(make(cls, env))["arguments"][name]


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_no_argument_is_forgotten(cls):
    names = set(inspect.signature(cls).parameters)
    assert names - ONE_VALUE <= set(VALUES)
    assert set(describe(make(cls))["arguments"]) == names - {"policy", "env", "device", "_init_setup_model"}


def test_with_an_env_and_other_arguments():
    agent = make(action_noise=NormalActionNoise(np.zeros(1), np.ones(1)), tensorboard_log="/somewhere").learn(30)
    again = build(described(agent), make_vec_env("Pendulum-v1", 2), gradient_steps=4, verbose=1)
    assert again.gradient_steps == 4 and again.n_envs == 2 and again.replay_buffer.n_envs == 2
    assert again.tensorboard_log is None
    with pytest.warns(UserWarning, match="empty replay buffer"):
        again.learn(30, reset_num_timesteps=False)
    assert isinstance(again.action_noise, VectorizedActionNoise) and again.action_noise.n_envs == 2
    # Vectorised for two, then for one env again.
    alone = build(described(again), gym.make("Pendulum-v1"))
    with pytest.warns(UserWarning, match="empty replay buffer"):
        alone.learn(3)
    assert isinstance(alone.action_noise, NormalActionNoise)
    assert build(described(again), tensorboard_log="logs").tensorboard_log == "logs"


def test_an_env_of_other_spaces():
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        build(described(make()), gym.make("InvertedPendulum-v5"))


def test_the_termination_is_not_looked_up_again():
    agent = make(env=gym.make("Hopper-v5", healthy_z_range=(0.9, float("inf"))))
    again = build(described(agent), gym.make("Hopper-v5"))
    assert again.termination == agent.termination != make(env="Hopper-v5").termination


# ---------------------------------------------------------------------- what the caller has to bring


def schedule(progress):
    return 1e-3 * progress


def length(step):
    return 2


def falls(obs, actions, next_obs):
    return next_obs[:, 0] > 5


def pays(obs, actions, next_obs):
    return next_obs[:, 0]


class Cautious(Macura):
    pass


class Extractor(th.nn.Module):
    def __init__(self, space, features_dim=3):
        super().__init__()
        self.features_dim = features_dim

    def forward(self, x):
        return x.float()


class Persistent(DynamicsModel):
    def fit(self, transitions, progress=None):
        return {}

    def sample(self, obs, actions):
        return obs, obs[:, 0]


class OtherPolicy(SACPolicy):
    pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", schedule),
        ("learning_rate", lambda progress: 1e-3),
        ("rollout_schedule", length),
        ("termination_fn", falls),
        ("termination_fn", "test_description.falls"),
        ("reward_fn", pays),
        ("reward_fn", "test_description.pays"),
        ("rollout_filter", Cautious()),
        ("rollout_filter", "test_description.Cautious"),
        ("policy_kwargs", {"net_arch": [8], "features_extractor_class": Extractor}),
        ("policy_kwargs", {"net_arch": [8], "features_extractor_class": "test_description.Extractor"}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_functions_and_classes_of_the_callers(name, value):
    agent = make(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name}.* was .*, which no file can hold safely; pass your own: {name}="):
        build(described(agent))
    again = build(described(agent), **{name: value})
    assert getattr(again, name) == getattr(agent, name) and described(again) == described(agent)
    assert again.termination == agent.termination


def test_dynamics_of_the_callers():
    for value in (Persistent, "test_description.Persistent"):
        agent = make(dynamics_class=value, dynamics_kwargs=None)
        with pytest.raises(ValueError, match=r"dynamics_class was test_description.Persistent, .* dynamics_class="):
            build(described(agent))
        assert type(build(described(agent), dynamics_class=Persistent).dynamics) is Persistent
    assert build(described(make(dynamics_class="sb3_mbpo.ProbabilisticEnsemble"))).dynamics is not None


def test_a_policy_of_the_callers():
    agent = MBPO(OtherPolicy, "Pendulum-v1", **FAST)
    with pytest.raises(ValueError, match=r"policy was test_description.OtherPolicy, .* policy="):
        build(described(agent))
    assert type(build(described(agent), policy=OtherPolicy).policy) is OtherPolicy


class Mine(MBPO):
    def __init__(self, policy, env, *args, extra=3, forgotten=None, **kwargs):
        self.extra = extra
        super().__init__(policy, env, *args, **kwargs)


def test_a_class_of_the_callers():
    """No file can name it; who has it can say so. What it does not keep of its arguments cannot be described."""
    agent = make(Mine, extra=4)
    assert set(AGENTS) == {"DHMBPO", "MBPO", "MBTD3", "MBTQC", "MBCrossQ"}
    with pytest.raises(ValueError, match="class 'Mine' is not among DHMBPO, MBPO, MBTD3"):
        build(described(agent))
    with pytest.raises(ValueError, match="forgotten was an object"):
        build(described(agent), cls=Mine)
    again = build(described(agent), cls=Mine, forgotten=None)
    assert type(again) is Mine and again.extra == 4
    with pytest.raises(ValueError, match="an agent of class 'MBPO', not Mine"):
        build(described(make()), cls=Mine)


# ---------------------------------------------------------------------- hostile descriptions


@pytest.fixture(scope="module")
def good():
    return json.dumps(describe(make()))


def set_in(*keys, to):
    def change(description):
        for key in keys[:-1]:
            description = description[key]
        description[keys[-1]] = to

    return change


def argument(name, value):
    return set_in("arguments", name, to=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("format", to=1), "format=1 .*must be 2"),
        (set_in("format", to=True), "format=True"),
        (set_in("more", to=1), r"unknown keys \['more'\]"),
        (lambda d: d.pop("state"), r"lacks \['state'\]"),
        (set_in("class", to="os.system"), "'os.system' is not among DHMBPO, MBPO"),
        (set_in("class", to="__init__"), "is not among"),
        (set_in("class", to=["MBPO"]), "is not among"),
        (set_in("policy", to="os.system"), "must be one of MlpPolicy"),
        (set_in("policy", to={"$class": "os.system"}), "not among the classes"),
        (set_in("arguments", to=[]), "must be a JSON object"),
        (set_in("state", to={}), "state must have num_timesteps"),
        (set_in("state", "num_timesteps", to=-1), "num_timesteps=-1 is out of range"),
        (set_in("state", "num_timesteps", to=True), "is out of range"),
        (set_in("state", "_n_updates", to="3"), "is out of range"),
        (set_in("state", "_current_progress_remaining", to=None), "is out of range"),
        (set_in("state", "filter_state", to=["os.system"]), "filter_state=.* is out of range"),
        (set_in("state", "filter_state", to=3), "filter_state=3 is out of range"),
        (set_in("state", "filter_state", to=[{"$float": "nan"}, 1]), "filter_state=.* is out of range"),
        (set_in("n_envs", to=0), "n_envs=0"),
        (set_in("n_envs", to=10**15), "n_envs"),
        (set_in("n_envs", to="1"), "n_envs"),
        (set_in("observation_space", to=None), "observation_space=None must be a Box"),
        (set_in("action_space", "low", to=None), "action_space"),
        (set_in("termination", to="os.system"), "termination='os.system'"),
        (set_in("termination", to=None), "termination=None"),
        (set_in("termination", to={"$class": "torch.nn.ReLU"}), "termination="),
        (argument("__class__", 1), "has no argument '__class__'"),
        (argument("policy", "MlpPolicy"), "has no argument 'policy'"),
        (argument("device", "cuda"), "has no argument 'device'"),
        (argument("learning_rate", "os.system"), "learning_rate="),
        (argument("learning_rate", "torch.hub.load"), "learning_rate="),
        (argument("learning_rate", {"$class": "torch.nn.ReLU"}), "learning_rate="),
        (argument("rollout_schedule", "os.system"), "rollout_schedule="),
        (argument("rollout_schedule", [1]), "rollout_schedule="),
        (argument("termination_fn", "os.system"), "termination_fn="),
        (argument("termination_fn", "__import__"), "termination_fn="),
        (argument("reward_fn", "os.system"), "reward_fn="),
        (argument("rollout_filter", "os.system"), "rollout_filter="),
        (argument("rollout_filter", {"$class": "torch.nn.ReLU"}), "rollout_filter="),
        (
            argument("rollout_filter", {"$object": ["sb3_mbpo.M2AC", {"alpha": -1}]}),
            "M2AC: alpha=-1",
        ),
        (argument("dynamics_class", "os.system"), "dynamics_class="),
        (argument("dynamics_class", {"$class": "torch.nn.ReLU"}), "dynamics_class="),
        (argument("replay_buffer_class", "os.system"), "replay_buffer_class="),
        (argument("replay_buffer_kwargs", {"seed": 1}), "replay_buffer_kwargs"),
        (argument("policy_kwargs", {"activation_fn": "os.system"}), "policy_kwargs: activation_fn"),
        (argument("policy_kwargs", {"optimizer_class": "os.system"}), "policy_kwargs: optimizer_class"),
        (argument("policy_kwargs", {"features_extractor_class": "os.system"}), "policy_kwargs: features_extractor_class"),
        (argument("policy_kwargs", {"activation_fn": {"$class": "torch.optim.Adam"}}), "cannot be built"),
        (argument("policy_kwargs", {"nonsense": 1}), "cannot be built: .*unexpected keyword argument 'nonsense'"),
        (argument("policy_kwargs", {"net_arch": "wide"}), "net_arch='wide' must be a list"),
        (argument("policy_kwargs", []), "policy_kwargs="),
        (argument("dynamics_kwargs", {"nonsense": 1}), "dynamics_kwargs has no key 'nonsense'"),
        (argument("dynamics_kwargs", 3), "dynamics_kwargs="),
        (argument("batch_size", True), "batch_size="),
        (argument("batch_size", None), "batch_size="),
        (argument("gamma", "high"), "gamma="),
        (argument("buffer_size", 10**18), "buffer_size=.* at most"),
        (argument("use_sde", "false"), "use_sde="),
        (argument("verbose", []), "verbose="),
        *(
            (argument(name, 10**8), f"^{name}=100000000 is more than")
            for name in ("gradient_steps", "batch_size", "rollout_batch_size")
        ),
        (argument("updates_per_transition", 1e12), "^updates_per_transition=.* pass your own: updates_per_transition="),
        (argument("dynamics_kwargs", {"max_updates": "1e8"}), "^dynamics_kwargs: max_updates=100000000 is more than"),
        (set_in("state", "updates_owed", to=10**12), "updates_owed=1000000000000 is out of range"),
        (set_in("state", "forward_errors", to=[0.0] * 5), "state: forward_errors has 5 numbers, but must have 4"),
        (set_in("state", "prediction_bounds", to=[0.0]), "state: prediction_bounds has 1 numbers, but must have 12"),
        (argument("seed", -1), "seed|Seed"),
        (argument("seed", 1.5), "seed="),
        (argument("action_noise", {"$class": "torch.nn.ReLU"}), "action_noise="),
        (argument("fast_update", "yes"), "fast_update="),
        (argument("train_freq", {"$tuple": [1, "os.system"]}), "train_freq"),
        (argument("real_ratio", 7), "real_ratio=7"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
@pytest.mark.filterwarnings("ignore:This system does not have apparently enough memory")
def test_hostile_descriptions(good, change, message):
    description = json.loads(good)
    change(description)
    with pytest.raises(ValueError, match=message):
        build(description)


@pytest.mark.parametrize("description", [None, [], "MBPO", 1, {}])
def test_no_description_at_all(description):
    with pytest.raises(ValueError, match="description"):
        build(description)


def test_spaces_that_mbpo_cannot_imagine_in(good):
    description = json.loads(good)
    description["action_space"] = encode(spaces.Box(-np.inf, np.inf, (1,)), objects=True)
    with pytest.raises(ValueError, match="unbounded"):
        build(description)


def test_unknown_overrides(good):
    with pytest.raises(ValueError, match="MBPO has no argument 'real_ration'"):
        build(json.loads(good), real_ration=0.1)


def test_an_argument_that_came_later(good):
    description = json.loads(good)
    del description["arguments"]["retained_rollouts"]
    assert build(description).retained_rollouts == 4
