import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.envs import IdentityEnvBox

import sb3_mbpo
from sb3_mbpo.trust.value_bound import breach, entropy_bonus, odd_scale, q_values, return_bounds

LOG2 = math.log(2)


# ---------------------------------------------------------------------- the bound


@pytest.mark.parametrize(
    ("least", "most", "gamma", "bonus", "expected"),
    [
        (0, 1, 0.9, 0, (0, 10)),
        (-1, 1, 0.9, 0, (-10, 10)),
        # Rewards that are never negative may end at once, those that are never positive too.
        (1, 1, 0.9, 0, (1, 10)),
        (-2, -1, 0.9, 0, (-20, -1)),
        # Entropy comes from the second step on, and may outweigh the cost of a step.
        (0, 1, 0.9, 0.5, (0, 1 + 9 * 1.5)),
        (-2, -1, 0.9, 0.5, (-20, -1)),
        (-2, -1, 0.9, 3, (-20, -1 + 9 * 2)),
        (-1, 1, 0, 5, (-1, 1)),
        (1e-12, 1e12, 0.99, 0, (1e-12, 1e14)),
    ],
)
def test_bounds_by_hand(least, most, gamma, bonus, expected):
    assert return_bounds(least, most, gamma, bonus) == pytest.approx(expected, rel=1e-9)


def test_no_bound_without_discount():
    assert return_bounds(0, 1, 1.0) is None and breach(1e30, None) is None


def test_the_soft_value_of_the_best_case_is_the_bound():
    """One state, reward 1 whatever is done, a uniform policy: the fixed point of SAC's own equation."""
    alpha, gamma = 0.3, 0.9
    value = 0.0
    for _ in range(500):
        value = 1 + gamma * (value + alpha * 2 * LOG2)
    agent = SimpleNamespace(action_space=gym.spaces.Box(-1, 1, (2,)), log_ent_coef=None, ent_coef_tensor=th.tensor(alpha))
    assert value == pytest.approx(return_bounds(1, 1, gamma, entropy_bonus(agent))[1], rel=1e-6)


def test_no_squashed_gaussian_has_more_entropy():
    """With SB3's own log-probability and its epsilon, over means and spreads; the mean over the noise by quadrature."""
    noise = th.linspace(-10, 10, 4001, dtype=th.float64)
    weight = th.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi)
    means, log_stds = th.meshgrid(th.linspace(0, 8, 17), th.linspace(-5, 2, 36), indexing="ij")
    slope = 1 - th.tanh(means.unsqueeze(-1) + log_stds.exp().unsqueeze(-1) * noise) ** 2
    entropy = 0.5 * math.log(2 * math.pi * math.e) + log_stds + th.trapezoid(weight * th.log(slope + 1e-6), noise)
    assert 0.6 < entropy.max().item() < LOG2


@pytest.mark.parametrize(
    ("ent_coef", "learned", "alpha"),
    [("auto", 0.2, 1), ("auto", 3.0, 3), ("auto_0.1", 0.05, 0.1), ("auto_0.1", 0.4, 0.4), (0.25, None, 0.25)],
)
def test_entropy_coefficients(ent_coef, learned, alpha):
    agent = SAC("MlpPolicy", "Pendulum-v1", ent_coef=ent_coef, policy_kwargs={"net_arch": [4]})
    if learned is not None:
        agent.log_ent_coef.data.fill_(math.log(learned))
    assert entropy_bonus(agent) == pytest.approx(alpha * LOG2, rel=1e-5)


def test_algorithms_without_entropy():
    assert entropy_bonus(TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [4]})) == 0


@pytest.mark.parametrize(
    ("largest", "breached"), [(10, False), (20.9, False), (21.1, True), (1e9, True), (math.inf, True), (math.nan, True)]
)
def test_breach(largest, breached):
    """By as much again as returns span, and 1."""
    warning = breach(largest, (0.0, 10.0))
    assert (warning is not None) == breached
    if breached:
        assert f"{largest:.3g}" in warning and "10 at most" in warning and "Reduce gradient_steps" in warning


@pytest.mark.parametrize("high", [0.1, 10, 1000])
def test_fresh_critics_are_no_breach_where_all_rewards_are_zero(high):
    """They predict numbers of the size of what they are given; ten times as much is a breach."""
    for seed in range(8):
        agent = TD3("MlpPolicy", IdentityEnvBox(-high, high), policy_kwargs={"net_arch": [16]}, seed=seed, buffer_size=10)
        obs, actions = th.linspace(-high, high, 200).unsqueeze(1), th.linspace(-1, 1, 200).unsqueeze(1)[th.randperm(200)]
        size = th.cat([obs, actions], dim=1).norm(dim=1).max().item()
        largest = q_values(agent.critic, obs, actions).max().item()
        assert breach(largest, (0.0, 0.0), size) is None
        assert breach(10 * size, (0.0, 0.0), size) is not None


@pytest.mark.parametrize(
    ("least", "most", "size"),
    [
        *((-16, 0, None), (0, 0, None), (0, 1e4, None), (0, 1e-4, None)),
        *((-1e12, 1, "1e+12"), (0, 9e-5, "9e-05"), (-9e-5, 0, "9e-05")),
    ],
)
def test_odd_scale(least, most, size):
    warning = odd_scale(least, most, 1000)
    assert (warning is None) == (size is None)
    if warning is not None:
        assert f"reward so far is {size} in absolute value" in warning and "TransformReward" in warning


def test_small_rewards_may_be_followed_by_larger_ones():
    assert odd_scale(0, 9e-5, 999) is None and odd_scale(-1e12, 0, 1) is not None


# ---------------------------------------------------------------------- what the critics say


@pytest.mark.parametrize("name", ["SAC", "TD3", "DDPG", "TQC", "CrossQ"])
def test_critics(name):
    agent: object
    if name in ("TQC", "CrossQ"):
        cls = getattr(pytest.importorskip("sb3_contrib"), name)
    else:
        cls = {"SAC": SAC, "TD3": TD3, "DDPG": DDPG}[name]
    agent = cls("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, seed=0)
    agent.policy.set_training_mode(True)
    obs, actions = th.randn(6, 3), th.rand(6, 1) * 2 - 1
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    random_state = th.get_rng_state()
    values = q_values(agent.critic, obs, actions)
    assert agent.critic.training and not values.requires_grad and th.equal(random_state, th.get_rng_state())
    assert all(th.equal(before[key], value) for key, value in agent.policy.state_dict().items())
    agent.policy.set_training_mode(False)
    with th.no_grad():
        said = agent.critic(obs, actions)
    expected = said.mean(dim=2) if name == "TQC" else th.cat(said, dim=1)
    assert values.shape == (6, 1 if name == "DDPG" else 2) and th.equal(values, expected)
    q_values(agent.critic, obs, actions)
    assert not agent.critic.training


def test_a_critic_that_fails_is_left_as_it_was():
    agent = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]})
    agent.policy.set_training_mode(True)
    with pytest.raises(RuntimeError):
        q_values(agent.critic, th.zeros(2, 5), th.zeros(2, 1))
    assert agent.critic.training


# ---------------------------------------------------------------------- in an agent

TINY = {"batch_size": 16, "learning_starts": 20, "rollout_batch_size": 30, "gradient_steps": 1, "seed": 0}
OURS = {
    "policy_kwargs": {"net_arch": [8]},
    "dynamics_kwargs": {"net_arch": [8], "max_updates": 3},
    # What is learned here in a few updates explains nothing yet.
    "min_explained_variance": None,
}


def shout(agent, value=1e6):
    """Let the last bias of every critic say so."""
    for network in getattr(agent.critic, "q_networks"):  # noqa: B009
        network[-1].bias.data.fill_(value)


@pytest.mark.parametrize("name", ["MBPO", "MBTD3", "MBTQC", "MBCrossQ"])
def test_logged_and_warned_of_once(name):
    cls = getattr(sb3_mbpo, name)
    agent = cls("MlpPolicy", "Pendulum-v1", model_train_freq=10, learning_rate=1e-9, **TINY, **OURS)
    agent.learn(25)
    values = dict(agent.logger.name_to_value)
    assert values["dynamics/q_mean"] < values["dynamics/q_max"] < 5 and agent._warned_of == []
    assert values["dynamics/q_bound"] == pytest.approx(
        return_bounds(-20, agent.replay_buffer.real_transitions().rewards[:21].max().item(), 0.99, entropy_bonus(agent))[1]
    )
    shout(agent)
    with pytest.warns(UserWarning, match=r"expects a return of 1e\+06, but .* allow .* at most") as caught:
        agent.learn(40, reset_num_timesteps=False)
    assert len(caught) == 1 and agent._warned_of == ["values"]
    values = agent.logger.name_to_value
    assert values["dynamics/q_mean"] == pytest.approx(1e6, rel=0.01) == values["dynamics/q_max"]


@pytest.mark.parametrize("seed", range(3))
def test_equal_rewards_are_no_alarm(seed):
    """The critics of 17 of 24 such agents predict more than 1 before their first update."""
    settings = {**TINY, **OURS, "policy_kwargs": {"net_arch": [16]}, "seed": seed}
    agent = sb3_mbpo.MBTD3("MlpPolicy", IdentityEnvBox(-10, 10, eps=-1), **settings).learn(25)
    assert agent._warned_of == []
    shout(agent)
    with pytest.warns(UserWarning, match=r"expects a return of 1e\+06, but .* allow 0 at most"):
        agent.model_train_freq = 5
        agent.learn(10, reset_num_timesteps=False)


def test_no_bound_is_logged_without_discount():
    agent = sb3_mbpo.MBPO("MlpPolicy", "Pendulum-v1", gamma=1, **TINY, **OURS)
    shout(agent)
    agent.learn(25)
    assert "dynamics/q_bound" not in agent.logger.name_to_value and "dynamics/q_max" in agent.logger.name_to_value


def pays(obs, actions, next_obs):
    return th.full((len(obs),), 1e4)


@pytest.mark.filterwarnings("ignore:reward_fn disagrees")
def test_known_rewards_count_as_seen():
    """A goal that was never reached so far, but whose reward is known: high values are right."""
    agent = sb3_mbpo.MBPO("MlpPolicy", "Pendulum-v1", reward_fn=pays, **TINY, **OURS)
    shout(agent, 1e5)
    agent.learn(25)
    assert agent.logger.name_to_value["dynamics/q_bound"] == pytest.approx(1e6, rel=0.001)


def test_under_vec_normalize():
    """Values are of normalised rewards and observations, and so is the bound."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    env = VecNormalize(make_vec_env("Pendulum-v1", 1), clip_reward=0.5)
    agent = sb3_mbpo.MBPO("MlpPolicy", env, ent_coef=0.0, **TINY, **OURS).learn(21)
    seen = []
    agent.critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    env.obs_rms.mean, env.obs_rms.var = np.array([5.0, -5.0, 3.0]), np.array([4.0, 9.0, 0.25])
    real = agent.replay_buffer.real_transitions()
    metrics = agent.judge_values(real._replace(rewards=real.rewards.abs() + 100))
    assert metrics["q_bound"] == pytest.approx(50)
    th.testing.assert_close(seen[0][:21], (real.observations - th.tensor([5.0, -5, 3])) / th.tensor([2.0, 3, 0.5]))
