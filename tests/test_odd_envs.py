"""What environments do at their oddest, and what must not become of the agent."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tiny import FAST

from sb3_mbpo import MBPO


class Odd(gym.Env):
    """A point that is pushed about, with something odd about it."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, reward_scale=1.0, ends=None, still=False, jumps_at=None, outside=False):
        if outside:
            # What it then does not keep to.
            self.observation_space = spaces.Box(-1e-3, 1e-3, (3,), np.float32)
        self.reward_scale, self.ends, self.still, self.jumps_at = reward_scale, ends, still, jumps_at
        self.steps, self.place = 0, np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.zeros(2) if self.still else self.np_random.normal(size=2)
        return self._observation(), {}

    def _observation(self):
        # The third dimension is constant, but for one step of the agent's life.
        third = 1e3 if self.steps == self.jumps_at else 7.0
        return np.array([*self.place, third], np.float32)

    def step(self, action):
        self.steps += 1
        if not self.still:
            self.place = 0.9 * self.place + 0.1 * action
        reward = self.reward_scale * (1.0 if self.still else -float(np.square(self.place).sum()))
        ended = bool(self.np_random.random() < 0.1) if self.ends is None else self.ends
        return self._observation(), reward, ended, False, {}


def trained(**oddity) -> MBPO:
    settings = {**FAST, "model_train_freq": 50, "dynamics_kwargs": {"net_arch": [8], "max_updates": 20}}
    agent = MBPO("MlpPolicy", Odd(**oddity), rollout_schedule=3, **settings)
    if oddity.get("reward_scale", 1.0) <= 1:
        return agent.learn(200)
    with pytest.warns(UserWarning, match=r"largest reward so far is .*TransformReward") as warned:
        agent.learn(200)
    assert len(warned) == 1
    return agent


@pytest.mark.parametrize(
    "oddity",
    [
        {"still": True},
        {"still": True, "reward_scale": 0.0},
        {"jumps_at": 45},
        {"jumps_at": 145},
        {"reward_scale": 1e-12},
        {"reward_scale": 1e12},
        {"outside": True},
        {"ends": False},
        {"ends": True},
        {"ends": True, "still": True, "reward_scale": 1e12},
    ],
    ids=str,
)
@pytest.mark.expensive
def test_trains(oddity):
    agent = trained(**oddity)
    networks = (agent.policy, agent.dynamics, agent.learned_reward, agent.learned_termination)
    assert all(value.isfinite().all() for network in networks for value in network.state_dict().values())
    assert agent._n_updates == 2 * 180
    rows = agent.replay_buffer.model_buffer.contents()[0]
    assert len(rows) and rows.isfinite().all() and agent.logger.name_to_value["dynamics/dropped"] == 0
    for optimizer in (agent.actor.optimizer, agent.critic.optimizer):
        assert all(state["exp_avg_sq"].isfinite().all() for state in optimizer.state.values())
    assert np.isfinite(agent.predict(np.full(3, 1e6, np.float32))[0]).all()


@pytest.mark.expensive
def test_rewards_whose_squares_leave_float32():
    """The critic learns nothing from them, but nothing becomes NaN, and the warning has come."""
    agent = trained(reward_scale=1e30)
    networks = (agent.policy, agent.dynamics, agent.learned_reward, agent.learned_termination)
    assert all(value.isfinite().all() for network in networks for value in network.state_dict().values())
    assert agent.replay_buffer.model_buffer.contents()[0].isfinite().all()


@pytest.mark.parametrize(("ends", "steps"), [(True, 1), (False, 3)])
def test_the_done_head_knows_one_class_only(ends, steps):
    agent = trained(ends=ends)
    data = agent.replay_buffer.model_buffer.contents()[0]
    # Refills at 21, 50, 100, 150 and 200, of which four are kept; 30 branches each.
    assert len(data) == 4 * 30 * steps and (data[:, -2] == float(ends)).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.expensive
def test_imagined_rewards_keep_their_scale(scale):
    agent = trained(reward_scale=scale)
    real, imagined = agent.replay_buffer.real_transitions().rewards, agent.replay_buffer.model_buffer.rewards()
    assert 0 < imagined.abs().max() <= 3 * real.abs().max()


@pytest.mark.expensive
def test_a_jump_of_a_dimension_that_hardly_moves_stays_bounded():
    agent = trained(jumps_at=145)
    third = agent.replay_buffer.model_buffer.contents()[0][:, 7]
    assert th.all((third >= 7 - 994) & (third <= 1e3 + 994))
