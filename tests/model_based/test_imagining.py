import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO


def test_imagination_under_vec_normalize():
    """The policy sees normalised observations, dynamics and termination raw ones, with the statistics of the moment."""
    env = VecNormalize(make_vec_env("Pendulum-v1", 1), norm_obs=True)
    model = MBPO("MlpPolicy", env, **FAST).learn(50)
    env.obs_rms.mean = np.array([5.0, -5.0, 3.0])
    env.obs_rms.var = np.array([4.0, 9.0, 0.25])
    raw = th.tensor([[6.0, -4.0, 2.0]])
    seen = []
    model.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with model.imagining() as policy, th.no_grad():
        policy(raw)
    th.testing.assert_close(seen[0], th.tensor([[0.5, 1 / 3, -2.0]]), rtol=1e-4, atol=1e-5)
    raw_rewards = model.replay_buffer.real_transitions().rewards
    assert (
        raw_rewards.min() < -0.5
        and model.replay_buffer.model_buffer.rows[: len(model.replay_buffer.model_buffer), 8].min() < -0.5
    )


def test_imagination_leaves_the_policys_mode_alone():
    model = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    for training in (True, False):
        model.policy.set_training_mode(training)
        with pytest.raises(RuntimeError, match="inside"), model.imagining():
            assert not model.actor.training
            raise RuntimeError("inside")
        assert model.actor.training is training


def test_generalised_state_dependent_exploration():
    model = MBPO("MlpPolicy", "Pendulum-v1", use_sde=True, **FAST).learn(50)
    with model.imagining() as policy, th.no_grad():
        actions = policy(th.zeros(64, 3))
    assert len(np.unique(actions.numpy())) == 64
    assert len(model.actor.action_dist.exploration_matrices) == 1
