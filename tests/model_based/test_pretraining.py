"""Learning from data before the first step of the env."""

import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST, equal_agents

from sb3_mbpo import DHMBPO, MBPO, ResumeCallback


@pytest.fixture(scope="module")
def data():
    return SAC("MlpPolicy", "Pendulum-v1", learning_starts=1000, seed=1).learn(300).replay_buffer


def made(cls=MBPO, env="Pendulum-v1", **kwargs):
    return cls("MlpPolicy", env, **{**FAST, "learning_starts": 0, "model_train_freq": 10, **kwargs})


@pytest.mark.parametrize("cls", [MBPO, DHMBPO])
def test_learned_before_the_first_step(cls, data):
    agent = made(cls)
    before = agent.predict(np.ones(3, np.float32), deterministic=True)[0]
    agent.prefill(data)
    agent.pretrain(50)
    assert agent._n_updates == 50 and agent.num_timesteps == agent.lifetime_timesteps == 0 == agent.dynamics_fitted_at
    assert len(agent.replay_buffer.model_buffer) > 0 and agent.replay_buffer.size() == 300
    assert agent.predict(np.ones(3, np.float32), deterministic=True)[0] != before
    # The fit was the first one: the next is due at a multiple of model_train_freq.
    fitted = []
    fit = agent.fit_dynamics
    agent.fit_dynamics = lambda progress=None: fitted.append(agent.num_timesteps) or fit(progress)
    agent.learn(12)
    assert fitted == [10] and agent._n_updates == 50 + 2 * 12
    # Updates of pretrain belong to no transition.
    assert agent.logger.name_to_value["dynamics/updates_per_transition"] <= 2


def test_rollouts_are_made_anew_as_often_as_in_learn(data):
    agent = made(gradient_steps=-1, updates_per_transition=3, rollout_batch_size=7, retained_rollouts=9)
    agent.prefill(data)
    agent.pretrain(65)
    # After 30 and 60 updates: ten transitions' worth.
    assert list(agent.replay_buffer.model_buffer.refills) == [7, 7, 7]
    assert agent.pretrain(0)._n_updates == 65


def test_with_the_model_off_it_is_sac(data):
    agent = made(real_ratio=1.0)
    agent.prefill(data)
    agent.pretrain(20)
    plain = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, batch_size=16, seed=0)
    plain._setup_learn(0)
    plain.replay_buffer = data
    plain.set_random_seed(0), agent.set_random_seed(0)
    agent.pretrain(20)
    assert agent.dynamics_fitted_at is None and len(agent.replay_buffer.model_buffer) == 0 and agent._n_updates == 40


def test_without_data():
    with pytest.raises(ValueError, match=r"0 real transitions are too few.*prefill"):
        made().pretrain(5)
    with pytest.raises(ValueError, match="pretrain: gradient_steps=-1 must be a whole number of at least 0"):
        made().pretrain(-1)


def test_statistics_that_are_missing(data):
    agent = made(env=VecNormalize(make_vec_env("Pendulum-v1", 1)))
    agent.prefill(data)
    with pytest.warns(UserWarning, match="pretrain: the VecNormalize has no statistics yet"):
        agent.pretrain(1)


@pytest.mark.expensive
def test_a_run_that_began_so_is_resumed(data, tmp_path):
    def run(total, folder):
        agent = made()
        agent.prefill(data)
        return agent.pretrain(20).learn(total, ResumeCallback(tmp_path / folder))

    run(15, "cut")
    assert equal_agents(run(25, "cut"), run(25, "whole"))
