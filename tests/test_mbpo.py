import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST, TruePendulum, equal_agents

from sb3_mbpo import MBPO, MixedReplayBuffer

# SB3 writes into the policy_kwargs it is given.
SHARED = copy.deepcopy(
    {key: FAST[key] for key in ("policy_kwargs", "batch_size", "learning_starts", "gradient_steps", "seed")}
)


# ---------------------------------------------------------------------- SAC with the model off


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_model_off_is_sac_bit_for_bit(env_id, n_envs, normalize):
    agents = []
    for cls in (MBPO, SAC):
        env = make_vec_env(env_id, n_envs, seed=0)
        env = VecNormalize(env) if normalize else env
        kwargs = {**SHARED, "seed": 3, "learning_starts": 40}
        agents.append(cls("MlpPolicy", env, **kwargs, **({"real_ratio": 1} if cls is MBPO else {})).learn(150))
    assert equal_agents(*agents)
    # The test can fail: with the model on, the agents part.
    other = MBPO("MlpPolicy", make_vec_env(env_id, n_envs, seed=0), **{**FAST, "seed": 3, "learning_starts": 40}).learn(150)
    assert not equal_agents(other, agents[1])


def test_model_off_and_on_again():
    """With imagined rows lying about, real_ratio=1 still draws what SAC would."""
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    assert len(model.replay_buffer.model_buffer) > 0
    model.replay_buffer.real_ratio = 1.0
    np.random.seed(0)
    batch = model.replay_buffer.sample(50)
    np.random.seed(0)
    assert th.equal(batch.rewards, super(MixedReplayBuffer, model.replay_buffer).sample(50).rewards)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_same_seed_same_agent(env_id):
    first, second = (MBPO("MlpPolicy", env_id, **FAST).learn(80) for _ in range(2))
    assert equal_agents(first, second)
    for name in ("dynamics", "learned_reward", "learned_termination"):
        pairs = zip(*(getattr(agent, name).state_dict().values() for agent in (first, second)), strict=True)
        assert all(th.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------- the fast update


def test_fast_update_gives_sacs_numbers():
    """Ours and SB3's from the same start; the difference is rounding."""
    agents = [MBPO("MlpPolicy", "Pendulum-v1", fast_update=fast, **{**FAST, "gradient_steps": 1}) for fast in (True, False)]
    for agent in agents:
        agent.set_random_seed(1)
        agent.env.seed(1)
        agent.learn(40)
    first, second = (agent.policy.state_dict() for agent in agents)
    assert all(th.allclose(first[key], second[key], rtol=1e-3, atol=1e-5) for key in first)
    assert agents[0].logger.name_to_value.keys() == agents[1].logger.name_to_value.keys()


@pytest.mark.parametrize(
    ("kwargs", "fast"),
    [
        ({}, True),
        ({"real_ratio": 1}, False),
        ({"real_ratio": 1, "fast_update": True}, True),
        ({"fast_update": False}, False),
        ({"use_sde": True}, False),
        ({"policy_kwargs": {"activation_fn": th.nn.Tanh}}, False),
    ],
)
def test_which_update_runs(kwargs, fast, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr("sb3_mbpo.fast_sac.cpu.train", lambda agent, *args: ran.append("fast"))
    monkeypatch.setattr(SAC, "train", lambda agent, *args: ran.append("SB3"))
    MBPO("MlpPolicy", "Pendulum-v1", verbose=1, **{**FAST, **kwargs}).learn(25)
    assert ran == ["fast" if fast else "SB3"] * 5
    assert f"SAC update: {'fast' if fast else 'Stable-Baselines3'}" in capsys.readouterr().out


def test_fast_update_that_does_not_cover_the_agent():
    with pytest.raises(ValueError, match=r"fast_update=True does not support this agent: gSDE. Leave it at None"):
        MBPO("MlpPolicy", "Pendulum-v1", use_sde=True, fast_update=True)


@pytest.mark.parametrize("how", ["class", "object"])
def test_a_buffer_that_draws_in_its_own_way_is_asked(how):
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(25)
    buffer, asked = model.replay_buffer, []

    def sample(*args: Any, **kwargs: Any) -> ReplayBufferSamples:
        asked.append(args)
        return MixedReplayBuffer.sample(buffer, *args, **kwargs)

    if how == "class":
        buffer.__class__ = type("Own", (MixedReplayBuffer,), {"sample": staticmethod(sample)})
    else:
        buffer.sample = sample
    model.train(3, 16)
    assert len(asked) == 3


def test_a_plain_replay_buffer_can_be_trained_from():
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(25)
    plain = ReplayBuffer(100, model.observation_space, model.action_space, device="cpu")
    for _ in range(20):
        obs, action = model.observation_space.sample(), model.action_space.sample()
        plain.add(obs, obs, action, np.zeros(1), np.zeros(1), [{}])
    model.replay_buffer = plain
    before = model.actor.mu.weight.detach().clone()
    model.train(3, 16)
    assert not th.equal(model.actor.mu.weight, before)


def test_another_update_is_said_once(capsys):
    model = MBPO("MlpPolicy", "Pendulum-v1", verbose=1, **FAST).learn(25)
    model.actor.mu.register_forward_hook(lambda *args: None)
    model.train(1, 16)
    model.train(1, 16)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SAC update")]
    assert said == ["SAC update: fast", "SAC update: Stable-Baselines3's own (hooks)"]


def test_a_compiled_policy_is_updated_fast(capsys):
    """SB3 trains the actor and the critics that it wraps."""
    models = []
    for compiled in (False, True):
        model = MBPO("MlpPolicy", "Pendulum-v1", verbose=1, **FAST)
        model.policy = th.compile(model.policy, backend="eager") if compiled else model.policy
        models.append(model.learn(25))
    assert [line for line in capsys.readouterr().out.splitlines() if "SAC update" in line] == ["SAC update: fast"] * 2
    assert all(map(th.equal, *(model.actor.parameters() for model in models)))


@pytest.mark.parametrize("fast_update", [True, None])
def test_networks_changed_after_construction(fast_update):
    """The fast update would train frozen weights."""
    model = MBPO("MlpPolicy", "Pendulum-v1", fast_update=fast_update, **FAST).learn(25)
    bias = next(model.critic.parameters()).requires_grad_(False)
    before = bias.detach().clone()
    if fast_update:
        with pytest.raises(ValueError, match="fast_update=True does not support this agent: parameters frozen"):
            model.train(2, 16)
    else:
        model.train(2, 16)
    assert th.equal(bias, before)


@pytest.mark.parametrize("captured", [True, False])
def test_on_a_gpu_the_update_is_captured_or_sb3s(captured, monkeypatch):
    """Only the dispatch: the capture itself is tested in test_cuda_update.py."""
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(25)
    ran = []
    monkeypatch.setattr("sb3_mbpo.fast_sac.cuda_graph.train", lambda agent, batches: ran.append("captured") or captured)
    monkeypatch.setattr("sb3_mbpo.fast_sac.cpu.train", lambda agent, batches: ran.append("on the CPU"))
    monkeypatch.setattr(SAC, "train", lambda agent, *args: ran.append("SB3"))
    model.device = th.device("cuda")
    model.train(2, 16)
    assert ran == (["captured"] if captured else ["captured", "SB3"])


def test_what_a_gpu_has_no_place_for(monkeypatch, capsys):
    """It is SB3's update there, ours on a CPU; and it is ours again when that has passed."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", verbose=1, **FAST).learn(25)
    counter = agent.actor.optimizer.state[agent.actor.mu.weight]["step"]
    counter += 30
    assert agent._is_fast()
    monkeypatch.setattr(agent, "device", th.device("cuda"))
    capsys.readouterr()
    assert not agent._is_fast()
    assert (
        "Stable-Baselines3's own (on a GPU, unequal numbers of steps of one optimizer's parameters)" in capsys.readouterr().out
    )
    agent.fast_update = True
    with pytest.raises(ValueError, match="fast_update=True does not support this agent: on a GPU, unequal"):
        agent._is_fast()
    counter -= 30
    assert agent._is_fast()


def test_a_subclass_may_change_the_update():
    class Slow(MBPO):
        def train(self, gradient_steps, batch_size=64):
            self.trained = getattr(self, "trained", 0) + 1
            super().train(gradient_steps, batch_size)

    assert Slow("MlpPolicy", "Pendulum-v1", **FAST).learn(25).trained == 5


# ---------------------------------------------------------------------- learning


def test_the_oracle_is_pendulum():
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=0)
    oracle = TruePendulum(3, 1)
    for _ in range(100):
        action = env.action_space.sample()
        predicted, reward = oracle.sample(th.tensor(obs).unsqueeze(0), th.tensor(action).unsqueeze(0) / 2)
        obs, true_reward, *_ = env.step(action)
        np.testing.assert_allclose(predicted[0], obs, atol=1e-5)
        assert reward.item() == pytest.approx(true_reward, abs=1e-4)


def pendulum_return(seed: int = 0, **kwargs) -> float:
    """What MBPO with small networks gets after 1,300 steps, in about a minute."""
    small: dict[str, Any] = {"policy_kwargs": {"net_arch": [64, 64]}, "learning_rate": 1e-3, "gradient_steps": 15}
    model = MBPO(
        "MlpPolicy", "Pendulum-v1", learning_starts=300, rollout_batch_size=20_000, seed=seed, **small, **kwargs
    ).learn(1300)
    mean, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", 1, seed=100), n_eval_episodes=10)
    assert isinstance(mean, float)
    return mean


FAST_ENSEMBLE = {"net_arch": [100, 100, 100], "max_updates": 500}


def test_learns():
    """Fails if MBPO stops learning: about -195 is what two seeds got, about -1,200 what a random policy gets."""
    assert pendulum_return(dynamics_kwargs=FAST_ENSEMBLE) > -400


@pytest.mark.expensive
def test_learns_at_least_as_fast_with_the_true_system():
    """Perfect dynamics must not do worse than the ensemble, beyond the spread of ten evaluation episodes."""
    oracle = [pendulum_return(seed, dynamics_class=TruePendulum) for seed in range(2)]
    learned = [pendulum_return(seed, dynamics_kwargs=FAST_ENSEMBLE) for seed in range(2)]
    assert np.mean(oracle) > np.mean(learned) - 100, (oracle, learned)
