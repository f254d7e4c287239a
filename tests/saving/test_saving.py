import copy
import gc
import io
import sys
import weakref
import zipfile

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST, TruePendulum, equal_agents

import sb3_mbpo
from sb3_mbpo import DHMBPO, MBPO, MBTD3


def falls(obs, actions, next_obs):
    return next_obs[:, 1].abs() > 0.2


def pays(obs, actions, next_obs):
    return 2 * actions[:, 0] + next_obs[:, 0]


def batch_of(agent):
    np.random.seed(0)
    return agent.replay_buffer.sample(64)[:5]


def test_save_and_load(tmp_path):
    model = MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn="learned", **FAST).learn(100)
    model.save(tmp_path / "agent")
    assert (tmp_path / "agent.zip").stat().st_size < 800_000
    for env in (None, "InvertedPendulum-v5", gym.make("InvertedPendulum-v5"), make_vec_env("InvertedPendulum-v5", 3)):
        loaded = MBPO.load(tmp_path / "agent", env=env)
        assert equal_agents(model, loaded)
        for name in ("dynamics", "learned_reward", "learned_termination"):
            pairs = zip(getattr(model, name).state_dict().values(), getattr(loaded, name).state_dict().values(), strict=True)
            assert all(th.equal(a, b) for a, b in pairs)
        settings = [agent.dynamics.optimizer.state_dict()["param_groups"] for agent in (model, loaded)]
        assert settings[0] == settings[1]
    with pytest.warns(UserWarning, match="empty replay buffer"):
        loaded.learn(60, reset_num_timesteps=False)


def test_load_with_other_arguments(tmp_path):
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(30).save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), real_ratio="5e-1", retained_rollouts=1)
    with pytest.warns(UserWarning, match="empty replay buffer"):
        loaded.learn(60)
    assert loaded.replay_buffer.real_rows(10) == 5 and len(loaded.replay_buffer.model_buffer) == 30


def test_sacs_replay_buffer(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", learning_starts=1000).learn(200).save_replay_buffer(tmp_path / "buffer")
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(30)
    assert model.replay_buffer.size() == 230 and model.replay_buffer.real_rows(100) == 50


def test_replay_buffer_that_was_thrown_away(tmp_path):
    """To make room, say. What is loaded is mixed with imagined rows as ever."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    agent.save_replay_buffer(tmp_path / "buffer", imagined=True)
    agent.replay_buffer = None
    with pytest.raises(ValueError, match=r"learn: .*replay_buffer is None: .*load_replay_buffer"):
        agent.learn(10)
    agent.load_replay_buffer(tmp_path / "buffer")
    assert agent.replay_buffer.size() == 60 and agent.replay_buffer.real_rows(100) == 50
    agent.learn(10, reset_num_timesteps=False)


def test_replay_buffer_goes_where_the_agent_is(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", device="cpu", **FAST)
    agent.save_replay_buffer(tmp_path / "buffer")
    # As SB3's agents are moved; without a GPU it is only the name that moves.
    agent.device = th.device("cuda")
    agent.load_replay_buffer(tmp_path / "buffer")
    assert agent.replay_buffer.device.type == "cuda"


def test_going_on_without_the_replay_buffer(tmp_path):
    """A loud warning, and no refit to a handful of new transitions."""
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    model.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    with pytest.warns(UserWarning, match="After 60 steps, the agent continues with an empty replay buffer"):
        loaded.learn(15, reset_num_timesteps=False)
    assert loaded.dynamics_fitted_at == model.dynamics_fitted_at
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.dynamics_fitted_at == 80


def test_load_with_a_reward_or_termination_function(tmp_path):
    model = MBPO("MlpPolicy", "InvertedPendulum-v5", **FAST).learn(40)
    model.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", reward_fn=pays, termination_fn=falls)
    assert loaded.termination is falls and type(loaded.imagined_dynamics).__name__ == "KnownReward"
    loaded.save(tmp_path / "again")
    assert MBPO.load(tmp_path / "again", reward_fn=None).imagined_dynamics is not None


def test_a_wrong_termination_is_noticed_again_after_loading(tmp_path):
    model = MBPO("MlpPolicy", "InvertedPendulum-v5", termination_fn="never", **FAST)
    with pytest.warns(UserWarning, match="real transitions"):
        model.learn(60)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("InvertedPendulum-v5"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    with pytest.warns(UserWarning, match="real transitions"):
        loaded.learn(30, reset_num_timesteps=False)


# ---------------------------------------------------------------------- files that do not fit


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"real_ration": 0.1}, "MBPO has no argument 'real_ration'; did you mean 'real_ratio'?"),
        ({"gradient_step": 3}, "did you mean 'gradient_steps'?"),
        ({"xyz": 3}, "has no argument 'xyz'$"),
        ({"policy": "MlpPolicy"}, "has no argument 'policy'"),
    ],
)
def test_misspelt_arguments_of_load(tmp_path, kwargs, message):
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).save(tmp_path / "agent")
    with pytest.raises(ValueError, match="load: .*" + message.replace("?", r"\?")):
        MBPO.load(tmp_path / "agent", **kwargs)


def test_arguments_of_load_take_effect(tmp_path):
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).save(tmp_path / "agent")
    changed = {"stats_window_size": 7, "gradient_steps": 3, "verbose": 0, "buffer_size": 77, "tensorboard_log": None}
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), seed=9, **changed).learn(5)
    assert loaded.ep_info_buffer.maxlen == 7 and loaded.gradient_steps == 3 and loaded.replay_buffer.buffer_size == 77


@pytest.mark.parametrize("safe", [False, True])
def test_layers_are_as_they_were_trained(tmp_path, safe):
    """Weights of the same shapes, with another layer normalization, would predict something else."""
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).save(tmp_path / "agent")
    other = {"dynamics_kwargs": {**FAST["dynamics_kwargs"], "layer_norm": True}}
    with pytest.raises(ValueError, match="layer_norm is True, but False in the file"):
        MBPO.load(tmp_path / "agent", safe=safe, **other)


def in_memory(agent):
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    return file


@pytest.mark.parametrize("where", ["file", "name", "memory"])
def test_an_agent_without_dynamics(tmp_path, where):
    """The way that the error names works."""
    sac = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(FAST["policy_kwargs"]), learning_starts=5, seed=1).learn(20)
    sac.save(tmp_path / "sac.zip")
    source = {"file": tmp_path / "sac.zip", "name": str(tmp_path / "sac"), "memory": in_memory(sac)}[where]
    with pytest.raises(ValueError, match=r"holds no dynamics.*set_parameters\(path, exact_match=False\)"):
        MBPO.load(source)
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    agent.set_parameters(source, exact_match=False)
    agent.log_ent_coef.data = sac.log_ent_coef.data  # SB3 counts it among neither
    assert equal_agents(agent, sac)
    assert agent.learn(40).num_timesteps == 40


def test_no_zip_at_all(tmp_path):
    (tmp_path / "agent.zip").write_bytes(b"nothing")
    for load in (MBPO.load, MBPO("MlpPolicy", "Pendulum-v1", **FAST).set_parameters):
        with pytest.raises(ValueError, match=r"(load|set_parameters): .*agent.zip: it is not a zip file, or is damaged"):
            load(tmp_path / "agent.zip")
    with pytest.raises(FileNotFoundError):
        MBPO.load(tmp_path / "other.zip")


@pytest.fixture(scope="module")
def agent():
    return MBPO("MlpPolicy", "Pendulum-v1", termination_fn="learned", **FAST).learn(40)


def test_a_damaged_zip_is_called_damaged(tmp_path, agent):
    """Cut off anywhere, or a byte changed: not taken for the file of another algorithm, whole as the zips inside it may be."""
    agent.save(tmp_path / "whole")
    content, other = (tmp_path / "whole.zip").read_bytes(), MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "seed": 1})
    before = copy.deepcopy(other.get_parameters())
    lengths = [int(share * len(content)) for share in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999)]
    damaged = [content[:length] for length in lengths]
    with zipfile.ZipFile(tmp_path / "whole.zip") as archive:
        for member in archive.infolist():
            place = member.header_offset + 30 + len(member.filename) + member.file_size // 2
            damaged.append(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
    for one in damaged:
        (tmp_path / "agent.zip").write_bytes(one)
        for load in (MBPO.load, other.set_parameters):
            with pytest.raises(ValueError, match=r"(load|set_parameters): .*agent.zip: it is .*damaged"):
                load(tmp_path / "agent.zip")
    assert same_state(before, other.get_parameters())


# Where a number is spoilt, what then, and what the error says.
SPOILT = {
    "policy": (lambda a: a.actor.mu.weight, "policy: actor.mu.weight is not finite in 1 of 8 numbers"),
    "target": (lambda a: a.critic_target.qf1[0].bias, "policy: critic_target.qf1.0.bias is not finite in 1 of 8"),
    "variable": (lambda a: a.log_ent_coef, "log_ent_coef is not finite in 1 of 1"),
    "dynamics": (lambda a: a.dynamics.mlp.layers[0].weight, "dynamics: mlp.layers.0.weight is not finite"),
    "reward": (lambda a: next(a.learned_reward.parameters()), "learned_reward: .* is not finite in 1 of"),
    "termination": (lambda a: next(a.learned_termination.parameters()), "learned_termination: .* is not finite in 1 of"),
    "optimizer": (
        lambda a: next(iter(a.actor.optimizer.state.values()))["exp_avg"],
        "actor.optimizer: exp_avg of parameter 0 is not finite",
    ),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SPOILT)
def test_weights_that_are_not_finite(tmp_path, agent, name, value):
    """Refused with what and where, by each way to load; an infinite moment of Adam is harmless."""
    spoilt = copy.deepcopy(agent)
    part, message = SPOILT[name]
    part(spoilt).data.view(-1)[0] = value
    spoilt.save(tmp_path / "agent")
    other = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "seed": 1})
    before = copy.deepcopy(other.get_parameters())
    loads = [MBPO.load, lambda path: MBPO.load(path, safe=True)]
    # SB3 does not count variables among the parameters.
    loads += [other.set_parameters] if name != "variable" else []
    for load in loads:
        if (name, value) == ("optimizer", float("inf")):
            load(tmp_path / "agent")
            continue
        with pytest.raises(ValueError, match=rf"(load|set_parameters): .*agent: {message}.* Load an agent or a checkpoint"):
            load(tmp_path / "agent")
        assert same_state(before, other.get_parameters())


# ---------------------------------------------------------------------- replay buffers


@pytest.mark.parametrize("imagined", [False, True])
def test_replay_buffer_with_and_without_what_was_imagined(tmp_path, imagined):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer", imagined=imagined)
    assert len(agent.replay_buffer.model_buffer) == 30
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert len(loaded.replay_buffer.model_buffer) == 30 * imagined
    rows = zip(agent.replay_buffer.real_transitions()[:5], loaded.replay_buffer.real_transitions()[:5], strict=True)
    assert all(th.equal(a, b) for a, b in rows)


def test_plain_sac_reads_the_replay_buffer(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    agent.save_replay_buffer(tmp_path / "buffer", imagined=True)
    sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=0)
    sac.load_replay_buffer(tmp_path / "buffer")
    assert sac.learn(10).replay_buffer.size() == 70


def test_files_grow_with_what_is_filled(tmp_path):
    for size in (1_000, 1_000_000):
        agent = MBPO("MlpPolicy", "Pendulum-v1", buffer_size=size, **FAST).learn(60)
        agent.save_replay_buffer(tmp_path / f"{size}")
        agent.save(tmp_path / f"agent{size}")
    small, large = ((tmp_path / f"{size}.pkl").stat().st_size for size in (1_000, 1_000_000))
    assert large < small + 100 < 11_000
    small, large = ((tmp_path / f"agent{size}.zip").stat().st_size for size in (1_000, 1_000_000))
    assert abs(large - small) < 1_000


# ---------------------------------------------------------------------- to and fro


def same_state(ours, theirs) -> bool:
    """Two state dicts, of a network or of an optimizer."""
    if isinstance(ours, th.Tensor):
        return th.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same_state(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same_state, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("name", ["TQC", "CrossQ"])
def test_the_model_free_agent_of_the_contrib_package(name):
    contrib = pytest.importorskip("sb3_contrib")
    agent = getattr(sb3_mbpo, f"MB{name}")("MlpPolicy", "Pendulum-v1", **FAST).learn(40)
    plain = getattr(agent, f"to_{name.lower()}")()
    assert type(plain) is getattr(contrib, name)
    parameters = plain.get_parameters()
    assert parameters and all(same_state(agent.get_parameters()[key], state) for key, state in parameters.items())


def test_the_policy_kwargs_it_was_made_with(tmp_path):
    """As with SAC, the same dictionary does at construction and at loading; another one is refused."""
    settings = {"net_arch": [8], "activation_fn": th.nn.Tanh}
    agent = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "policy_kwargs": settings})
    agent.save(tmp_path / "agent")
    assert settings == {"net_arch": [8], "activation_fn": th.nn.Tanh}
    loaded = MBPO.load(tmp_path / "agent", policy_kwargs=settings)
    assert loaded.policy_kwargs == agent.policy_kwargs
    with pytest.raises(ValueError, match="policy kwargs"):
        MBPO.load(tmp_path / "agent", policy_kwargs={"net_arch": [9]})


def test_what_is_left_out_and_what_is_put_in(tmp_path):
    """``exclude`` and ``include``, as SB3 means them."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)
    agent.save(tmp_path / "without", exclude=["retained_rollouts", "ep_info_buffer"])
    agent.save(tmp_path / "with", include=["dynamics_fitted_at", "replay_buffer"])
    data = [load_from_zip_file(tmp_path / name)[0] for name in ("without", "with")]
    assert "retained_rollouts" not in data[0] and "ep_info_buffer" not in data[0] and "real_ratio" in data[0]
    assert data[1]["replay_buffer"].size() == 40 and data[1]["dynamics_fitted_at"] == agent.dynamics_fitted_at
    assert MBPO.load(tmp_path / "without", retained_rollouts=3).retained_rollouts == 3


@pytest.mark.parametrize(("cls", "base", "method"), [(MBPO, SAC, "to_sac"), (MBTD3, TD3, "to_td3")], ids=["MBPO", "MBTD3"])
def test_the_model_free_agent(tmp_path, cls, base, method, monkeypatch):
    """Of SB3's own class, equal in all that both have, independent, and saved as one that never heard of us."""
    agent = cls("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    plain = getattr(agent, method)()
    assert type(plain) is base and type(plain.replay_buffer).__module__.startswith("stable_baselines3")
    assert plain.num_timesteps == 60 and plain.gradient_steps == 2 and plain.seed == 0
    for name, state in plain.get_parameters().items():
        assert same_state(agent.get_parameters()[name], state), name
    if cls is MBPO:
        assert th.equal(plain.log_ent_coef, agent.log_ent_coef)
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert np.array_equal(plain.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    plain.save(tmp_path / "plain")
    with monkeypatch.context() as patch:
        # As where sb3_mbpo is not installed.
        for name in [name for name in sys.modules if name.partition(".")[0] == "sb3_mbpo"]:
            patch.setitem(sys.modules, name, None)
        loaded = base.load(tmp_path / "plain", env=gym.make("Pendulum-v1"))
    before = copy.deepcopy(agent.policy.state_dict())
    loaded.learn(40)
    plain.learn(40, reset_num_timesteps=False)
    assert all(th.equal(before[key], value) for key, value in agent.policy.state_dict().items())
    assert set(vars(loaded)) == set(vars(base("MlpPolicy", "Pendulum-v1").learn(2)))


def test_the_model_free_agent_of_a_subclass():
    class Mine(MBPO):
        def __init__(self, *args, of_mine=3, **kwargs):
            super().__init__(*args, **kwargs)
            self.of_mine, self.file = of_mine, open(__file__)

    agent = Mine("MlpPolicy", "Pendulum-v1", **FAST)
    with agent.file:
        assert vars(agent.to_sac()).keys() == vars(SAC("MlpPolicy", "Pendulum-v1")).keys()


def true_transitions(buffer):
    """For each stored step, whether Pendulum goes from that observation by that action to the next one."""
    obs, actions, next_obs = (
        getattr(buffer, name)[: buffer.size(), 0] for name in ("observations", "actions", "next_observations")
    )
    predicted, _ = TruePendulum(3, 1).sample(th.as_tensor(obs), th.as_tensor(actions))
    return np.abs(predicted.numpy() - next_obs).max(axis=1) < 1e-3


@pytest.mark.parametrize(("cls", "method"), [(MBPO, "to_sac"), (DHMBPO, "to_sac"), (MBTD3, "to_td3")])
def test_both_may_learn_in_the_env_that_they_share(cls, method):
    """By turns: no transition leads from where the one was to where the other has gone."""
    agent = cls("MlpPolicy", "Pendulum-v1", **FAST).learn(30)
    agent.learn(5, reset_num_timesteps=False)
    first, second = getattr(agent, method)(), getattr(agent, method)()
    assert first.env is agent.env
    for one in (first, agent, first, agent, agent, second, agent):
        one.learn(7, reset_num_timesteps=False)
    for one in (agent, first, second):
        assert true_transitions(one.replay_buffer).all()


@pytest.mark.parametrize("then", ["gone", "elsewhere", "learns elsewhere"])
def test_a_model_free_agent_that_has_left(then):
    """It has stepped the env before."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(30)
    plain = agent.to_sac().learn(7)
    if then == "gone":
        del plain
        gc.collect()
    else:
        plain.set_env(gym.make("Pendulum-v1"))
        plain.learn(7 if then == "learns elsewhere" else 0)
    agent.learn(7, reset_num_timesteps=False)
    assert true_transitions(agent.replay_buffer).all() and agent._plain_agents == ()


def test_an_agent_that_comes_back_to_the_env_it_shared():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(30)
    plain, env = agent.to_sac().learn(3), agent.env
    for one in (gym.make("Pendulum-v1"), env):
        agent.set_env(one)
        agent.learn(5, reset_num_timesteps=False)
    plain.learn(5, reset_num_timesteps=False)
    for one in (agent, plain):
        assert true_transitions(one.replay_buffer).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda agent: cloudpickle.loads(cloudpickle.dumps(agent))])
@pytest.mark.parametrize("steps", [0, 7])
def test_copies_of_an_agent_that_shares_its_env(duplicate, steps):
    """The copy goes on where the env is, and shares it with nobody."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(30)
    plain = agent.to_sac()
    if steps:
        plain.learn(steps)
    other = duplicate(agent)
    assert other._plain_agents == () and len(agent._plain_agents) == 1 and (other._last_obs is None) == bool(steps)
    for one in (other, agent, plain):
        one.learn(7, reset_num_timesteps=False)
        assert true_transitions(one.replay_buffer).all()


def test_an_agent_whose_model_free_one_does_not_learn_goes_on_undisturbed():
    """To the last bit, also where that one has an env of its own."""
    agents = [MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(30) for _ in range(2)]
    plain = agents[0].to_sac()
    plain.set_env(gym.make("Pendulum-v1"))
    state = th.get_rng_state(), np.random.get_state()
    for agent in agents:
        th.set_rng_state(state[0])
        np.random.set_state(state[1])
        agent.learn(10, reset_num_timesteps=False)
        plain.learn(3, reset_num_timesteps=False)
    assert equal_agents(*agents)


def test_the_model_free_agent_is_not_kept_alive(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    reference = weakref.ref(agent.to_sac())
    gc.collect()
    assert reference() is None
    agent.save(tmp_path / "agent")
    assert MBPO.load(tmp_path / "agent", env=agent.env).learn(3) and agent.learn(3)


def test_the_model_free_agent_without_an_env(tmp_path):
    MBPO("MlpPolicy", "Pendulum-v1", ent_coef=0.2, **FAST).learn(40).save(tmp_path / "agent")
    plain = MBPO.load(tmp_path / "agent").to_sac()
    assert plain.env is None and plain.ent_coef == 0.2


def test_the_model_free_agent_under_vec_normalize():
    agent = MBPO("MlpPolicy", VecNormalize(make_vec_env("Pendulum-v1", 2)), **FAST).learn(60)
    plain = agent.to_sac().learn(60)
    assert plain.get_vec_normalize_env() is agent.get_vec_normalize_env()


def test_a_copy_goes_on_as_the_original():
    """``deepcopy`` takes everything along, the imagined rows and the random streams of the model included."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    other = copy.deepcopy(agent)
    assert equal_agents(agent, other)
    assert all(th.equal(a, b) for a, b in zip(batch_of(agent), batch_of(other), strict=True))
    for one in (agent, other):
        th.manual_seed(0)
        np.random.seed(0)
        one.train(5, 16)
    assert equal_agents(agent, other)


@pytest.mark.parametrize("other", [DHMBPO, MBTD3])
def test_an_agent_of_another_algorithm(tmp_path, other):
    path = tmp_path / "agent.zip"
    MBPO("MlpPolicy", "Pendulum-v1", **FAST).save(path)
    with pytest.raises(ValueError, match=f"it holds an agent of class 'MBPO', not {other.__name__}"):
        other.load(path)


def test_an_agent_of_a_subclass_and_of_its_base(tmp_path):
    class Mine(MBPO):
        pass

    path = tmp_path / "agent.zip"
    for saved, loaded in ((MBPO, Mine), (Mine, MBPO)):
        saved("MlpPolicy", "Pendulum-v1", **FAST).save(path)
        assert type(loaded.load(path)) is loaded
