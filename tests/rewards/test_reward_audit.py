import warnings

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tiny import FAST

from sb3_mbpo import MBPO
from sb3_mbpo.rewards.audit import MOST_REWARDS, audit_rewards, judged_rows


def right(obs, actions, next_obs):
    """Of Pendulum-v1, from its source."""
    return -(th.atan2(obs[:, 1], obs[:, 0]) ** 2 + 0.1 * obs[:, 2] ** 2 + 0.001 * actions[:, 0] ** 2)


def turned(obs, actions, next_obs):
    return -right(obs, actions, next_obs)


def transitions(n=400, seed=0, noise=0.0):
    """Any states of Pendulum, with the right rewards; then noise in the observation, in standard deviations."""
    generator = th.Generator().manual_seed(seed)
    angle, speed, torque = (th.rand(n, generator=generator) * 2 - 1 for _ in range(3))
    obs = th.stack([(3 * angle).cos(), (3 * angle).sin(), 8 * speed], dim=1)
    actions = torque.unsqueeze(1)
    rewards = right(obs, 2 * actions, obs).unsqueeze(1)
    seen = obs + noise * obs.std(dim=0) * th.randn(obs.shape, generator=generator)
    return ReplayBufferSamples(seen, actions, seen + 0.1, th.zeros(n, 1), rewards)


def audited(reward_fn, data):
    return audit_rewards(reward_fn(data.observations, 2 * data.actions, data.next_observations), data)


@pytest.mark.parametrize("n", [20, 400])
def test_right(n):
    audit = audited(right, transitions(n))
    assert audit.disagreement < 1e-9 and audit.warning is None


@pytest.mark.parametrize("n", [20, 400])
@pytest.mark.parametrize(
    ("reward_fn", "words"),
    [
        (turned, r"explains 0\.00 of the variance .* the sign seems to be wrong"),
        (lambda *t: right(*t) + 5, "the real ones are smaller by 5; |the real ones are smaller by 5\\."),
        (lambda *t: right(*t) - 5, "the real ones are larger by 5"),
        (lambda *t: 2 * right(*t), "the real ones increase by about 0.5 if it increases by 1"),
        (lambda *t: -3 * right(*t), "the real ones are about -0.333 times as large"),
        (lambda *t: 0 * right(*t) + 1, "the largest difference is"),
        (lambda *t: right(*t) / 0, "not finite on"),
    ],
)
def test_wrong(reward_fn, words, n):
    audit = audited(reward_fn, transitions(n))
    assert audit.disagreement > 0.2
    with pytest.raises(AssertionError, match=words):
        assert audit.warning is None, audit.warning


def test_how_far_they_disagree():
    """Every number in the words, by hand: errors of 1 and -3, rewards of variance 1."""
    rewards = th.tensor([1.0, -1.0]).repeat(20).unsqueeze(1)
    data = transitions(40)._replace(rewards=rewards)
    predicted = rewards.flatten() * 3 - 1
    audit = audit_rewards(predicted, data)
    assert audit.disagreement == pytest.approx((1 + 9) / 2 / (40 / 39))
    assert "on 40 real transitions: it explains 0.00" in audit.warning and "largest difference is 3." in audit.warning
    assert "in [-1, 1], those of reward_fn in [-4, 2]" in audit.warning
    assert "the real ones increase by about 0.333 if it increases by 1" in audit.warning


def test_a_term_that_was_left_out():
    """It has zero mean and goes with nothing that the function says: only the transition predicts it."""
    data = transitions(400)
    data = data._replace(rewards=data.rewards + 2 * data.actions)
    assert audited(right, data).warning is not None


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_stochastic_rewards(noise):
    """The function gives their mean, and that is right. The wrong sign is found all the same, while it can be seen."""
    for seed in range(20):
        data = transitions(400, seed)
        generator = th.Generator().manual_seed(1000 + seed)
        noisy = data.rewards + noise * data.rewards.std() * th.randn(data.rewards.shape, generator=generator)
        audit = audited(right, data._replace(rewards=noisy))
        assert audit.warning is None and audit.disagreement > 0.5 * noise**2 / (1 + noise**2)
        assert noise > 1 or audited(turned, data._replace(rewards=noisy)).warning is not None


def test_chance_is_no_error():
    """Of few rows a regression explains something now and then: not beyond three standard errors."""
    warned = 0
    for seed in range(200):
        data = transitions(12, seed)
        noise = th.randn(12, 1, generator=th.Generator().manual_seed(1000 + seed))
        warned += audited(right, data._replace(rewards=data.rewards + 3 * noise)).warning is not None
    assert warned <= 2


def test_small_errors_are_tolerated():
    """A twentieth of a standard deviation is, a fifth is not."""
    data = transitions(400)
    predicted, std = right(data.observations, 2 * data.actions, data.observations), data.rewards.std()
    assert audit_rewards(predicted + 0.05 * std, data).warning is None
    assert audit_rewards(predicted + 0.2 * std, data).warning is not None


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.05])
def test_noisy_observations(noise):
    assert all(audited(right, transitions(400, seed, noise)).warning is None for seed in range(20))


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_units_and_rounding(size):
    data = transitions(400)
    large = data._replace(rewards=(size * data.rewards.double() + 100 * size).float())
    predicted = size * right(data.observations, 2 * data.actions, data.observations) + 100 * size
    assert audit_rewards(predicted, large).warning is None
    assert audit_rewards(predicted + 20 * size, large).warning is not None


def test_constant_rewards():
    data = transitions(400)
    for constant in (0.0, 1.0):
        paid = data._replace(rewards=th.full((400, 1), constant))
        assert audit_rewards(th.full((400,), constant), paid) == (0.0, None)
        assert audit_rewards(th.full((400,), constant + 0.1), paid).warning is not None


def test_too_few_say_nothing():
    assert audited(turned, transitions(7)) == (0.0, None)


def test_terminations_are_left_out():
    """A bonus at the end is nothing that the function is told of."""
    data = transitions(400)
    dones = (th.arange(400) % 10 == 9).float().unsqueeze(1)
    data = data._replace(dones=dones, rewards=data.rewards + 1000 * dones)
    rows = judged_rows(data)
    assert rows.tolist() == [i for i in range(400) if i % 10 != 9]
    judged = ReplayBufferSamples(*(part[rows] for part in data[:5]))
    assert audited(right, judged).disagreement < 1e-9


def test_rows_are_spread():
    dones = th.zeros(5 * MOST_REWARDS, 1)
    rows = judged_rows(ReplayBufferSamples(dones, dones, dones, dones, dones))
    assert rows.tolist() == list(range(0, 5 * MOST_REWARDS, 5))
    assert len(judged_rows(ReplayBufferSamples(*(th.ones(3, 1),) * 5))) == 0


# ---------------------------------------------------------------------- in an agent


def audited_agent(reward_fn, env="Pendulum-v1"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {**FAST, "gradient_steps": 1, "model_train_freq": 10}
        agent = MBPO("MlpPolicy", env, reward_fn=reward_fn, **settings).learn(45, log_interval=None)
    return agent, [str(warning.message) for warning in caught if "reward_fn" in str(warning.message)]


def test_turned_in_an_agent():
    """Said once in three fits, and again in another env; logged at each fit."""
    agent, caught = audited_agent(turned)
    assert len(caught) == 1 and "sign seems to be wrong" in caught[0] and "on 21 real transitions" in caught[0]
    assert agent.logger.name_to_value["dynamics/reward_disagreement"] > 1
    agent.set_env(gym.make("Pendulum-v1"))
    with pytest.warns(UserWarning, match="sign seems to be wrong"):
        agent.learn(10, reset_num_timesteps=False)


def test_right_in_an_agent():
    agent, caught = audited_agent(right)
    assert caught == [] and agent.logger.name_to_value["dynamics/reward_disagreement"] < 1e-6
    agent, _ = audited_agent(None)
    assert "dynamics/reward_disagreement" not in agent.logger.name_to_value


class PaysForForce(gym.Env):
    """Actions are in [-3, 1], observations of two dimensions; the reward is the force in the env's own scale."""

    observation_space = spaces.Box(-1, 1, (2, 2))
    action_space = spaces.Box(-3, 1, (1, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action[0, 0]), False, False, {}


def test_shapes_and_scale_are_the_envs():
    _, caught = audited_agent(lambda obs, actions, next_obs: actions[:, 0, 0] + 0 * obs[:, 1, 1], PaysForForce())
    assert caught == []
    _, caught = audited_agent(lambda obs, actions, next_obs: (actions[:, 0, 0] + 1) / 2, PaysForForce())
    assert len(caught) == 1
