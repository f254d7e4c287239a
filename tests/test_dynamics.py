import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_mbpo.dynamics import DynamicsModel, KnownReward


class Drift(DynamicsModel):
    """Moves by the action and noise; counts what it is fitted on."""

    min_transitions = 3

    def __init__(self, obs_dim, action_dim, *, seed=None, device="cpu"):
        super().__init__(obs_dim, action_dim, seed=seed, device=device)
        self.layer = nn.Linear(1, 1)
        self.optimizer = th.optim.Adam(self.layer.parameters())

    def fit(self, transitions, progress=None):
        return {"seen": len(transitions)}

    def sample(self, obs, actions):
        return obs + actions + th.randn(obs.shape, generator=self.generator), obs[:, 0]


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="fit"):
        DynamicsModel(1, 1)


def test_the_seed_is_all_there_is():
    before = th.get_rng_state(), np.random.get_state()[1].copy()
    draws = [Drift(2, 2, seed=seed).sample(th.zeros(4, 2), th.zeros(4, 2))[0] for seed in (0, 0, 1, None, None)]
    assert th.equal(draws[0], draws[1])
    assert not any(th.equal(a, b) for a, b in [(draws[0], draws[2]), (draws[0], draws[3]), (draws[3], draws[4])])
    model = Drift(2, 2, seed=0)
    model.seed(1)
    assert th.equal(model.sample(th.zeros(4, 2), th.zeros(4, 2))[0], draws[2])
    # nn.Linear of the test model draws its weights from the global generator, nothing else does.
    th.set_rng_state(before[0])
    DynamicsModel.__init__(model, 2, 2, seed=None)
    assert th.equal(before[0], th.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_known_reward():
    drift = Drift(2, 2, seed=0)
    known = KnownReward(drift, lambda obs, actions, next_obs: obs[:, 0] + actions[:, 1] * next_obs[:, 0])
    obs, actions = th.randn(5, 2), th.randn(5, 2)
    next_obs, rewards = known.sample(obs, actions)
    th.testing.assert_close(rewards, obs[:, 0] + actions[:, 1] * next_obs[:, 0])
    drift.seed(0)
    assert th.equal(next_obs, drift.sample(obs, actions)[0])
    # Everything else is the other model's: fit, weights, random stream.
    assert isinstance(known, DynamicsModel) and known.min_transitions == 3 and known.fit([1, 2]) == {"seen": 2}
    assert known.generator is drift.generator
