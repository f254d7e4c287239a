"""How far a policy moved, against SB3's own densities and known shifts."""

import math

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import FAST

from sb3_mbpo import MBPO, MBTD3
from sb3_mbpo.buffers.normalization import normalize_obs
from sb3_mbpo.diagnostics.policy_shift import gaussians, policy_shift, snapshot

OBS = np.random.default_rng(0).normal(size=(700, 3))


def test_no_shift_from_itself():
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    assert policy_shift(agent, [snapshot(agent), snapshot(agent)], OBS) == pytest.approx(0, abs=1e-9)


def test_shift_of_the_mean_alone():
    """The pre-squash mean moves by d standard deviations: erf(d / (2 sqrt 2)), whatever the tanh does to it."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST)
    before = snapshot(agent)
    with th.no_grad():
        agent.actor.log_std.weight.zero_()
        agent.actor.log_std.bias.fill_(math.log(0.5))
    same_std = snapshot(agent)
    with th.no_grad():
        agent.actor.mu.bias += 0.4
    shift = math.erf(0.8 / math.sqrt(8))
    assert policy_shift(agent, [same_std], OBS) == pytest.approx(shift, abs=0.04)
    # Of a mixture: the mean over its parts.
    parts = [policy_shift(agent, [one], OBS) for one in (before, same_std)]
    assert policy_shift(agent, [before, same_std], OBS) == pytest.approx(np.mean(parts))


@pytest.mark.parametrize("use_sde", [False, True])
def test_gaussians_are_those_of_the_policy(use_sde):
    """SB3's own log-probability of the squashed action, without the correction for tanh."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", use_sde=use_sde, **FAST)
    mean, std = gaussians(agent, agent.actor, snapshot(agent), OBS[:20])
    obs = th.as_tensor(OBS[:20], dtype=th.float32)
    dist = agent.actor.action_dist.proba_distribution(*(out := agent.actor.get_action_dist_params(obs))[:2], **out[2])
    actions = th.as_tensor(mean + 0.3 * std, dtype=th.float32).tanh()
    gaussian = (-0.5 * 0.3**2 - np.log(std) - 0.5 * math.log(2 * math.pi))[:, 0]
    squash = 1 - actions.numpy()[:, 0] ** 2 + 1e-6
    np.testing.assert_allclose(dist.log_prob(actions).detach().numpy(), gaussian - np.log(squash), rtol=1e-3, atol=1e-3)


def test_an_earlier_policy_saw_earlier_statistics():
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    agent = MBPO("MlpPolicy", env, **FAST).learn(50)
    before, mean = snapshot(agent), env.obs_rms.mean.copy()
    expected = agent.actor.get_action_dist_params(normalize_obs(th.as_tensor(OBS, dtype=th.float32), env))[0]
    env.obs_rms.mean = mean + 1
    moved = policy_shift(agent, [before], OBS)
    assert moved > 0.01
    np.testing.assert_allclose(gaussians(agent, agent.actor, before, OBS)[0], expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    env.obs_rms.mean = mean
    assert policy_shift(agent, [before], OBS) == pytest.approx(0, abs=1e-9)


def test_a_deterministic_policy_has_no_density():
    assert snapshot(MBTD3("MlpPolicy", "Pendulum-v1", **FAST)) is None
