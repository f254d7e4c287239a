import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_mbpo.dynamics.base import DynamicsModel, DynamicsWrapper, KnownReward


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
    # The function gets the expected next observation, as another dynamics around it would.
    mean = known.predict_mean(obs, actions)
    th.testing.assert_close(mean[:, 0], obs[:, 0] + actions[:, 1] * mean[:, 1])
    assert known.own_reward


def test_what_a_model_need_not_offer():
    drift = Drift(2, 2, seed=0)
    assert not drift.offers_predict and not hasattr(drift, "elites")
    with pytest.raises(NotImplementedError, match="Drift has no method predict"):
        drift.predict(th.zeros(1, 2), th.zeros(1, 2))

    class Plain(DynamicsModel):
        fit, sample = Drift.fit, Drift.sample

    assert not hasattr(Plain(2, 2), "optimizer") and isinstance(drift.optimizer, th.optim.Adam)


def test_elites_may_be_a_buffer():
    class Buffered(Drift):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer("elites", th.tensor([1, 0]))

    assert Buffered(2, 2).elites.tolist() == [1, 0]


class Members(Drift):
    """Offers everything there is."""

    usable, own_reward, elites = False, False, th.tensor([1])

    def predict(self, obs, actions):
        mean = th.cat([obs[:, :1], obs + actions], dim=1).expand(3, -1, -1)
        return mean, th.full_like(mean, 0.5)

    def predict_mean(self, obs, actions):
        return self.predict(obs, actions)[0][1]

    def postprocess(self, obs, actions, next_obs, rewards):
        return next_obs + 1, rewards + 1


def test_a_wrapper_forwards_everything():
    inner = Members(2, 2, seed=0)
    wrapper = DynamicsWrapper(DynamicsWrapper(inner))
    obs, actions = th.randn(5, 2), th.randn(5, 2)
    for name in ("obs_dim", "action_dim", "generator", "min_transitions", "usable", "own_reward", "elites", "optimizer"):
        assert getattr(wrapper, name) is getattr(inner, name), name
    inner.usable, inner.min_transitions = True, 17
    assert wrapper.usable and wrapper.min_transitions == 17 and wrapper.offers_predict
    assert wrapper.fit([1, 2]) == {"seen": 2}
    assert all(th.equal(a, b) for a, b in zip(wrapper.predict(obs, actions), inner.predict(obs, actions), strict=True))
    assert th.equal(wrapper.predict_mean(obs, actions), inner.predict_mean(obs, actions))
    assert all(
        th.equal(a, b)
        for a, b in zip(wrapper.postprocess(obs, actions, obs, obs[:, 0]), (obs + 1, obs[:, 0] + 1), strict=True)
    )
    draws = []
    for model in (wrapper, inner):
        wrapper.seed(5)
        draws.append(model.sample(obs, actions)[0])
    assert th.equal(*draws) and {name.rpartition(".")[2] for name in wrapper.state_dict()} == {"weight", "bias"}
    assert not DynamicsWrapper(Drift(2, 2)).offers_predict


def test_a_wrapper_adjusts_whatever_is_predicted():
    class Doubles(DynamicsWrapper):
        own_reward = True

        def adjust(self, obs, actions, next_obs, rewards):
            return 2 * next_obs, rewards - obs[:, 0]

    inner = Members(2, 2, seed=0)
    doubles, obs, actions = Doubles(inner), th.randn(5, 2), th.randn(5, 2)
    next_obs, rewards = doubles.sample(obs, actions)
    inner.seed(0)
    expected = inner.sample(obs, actions)
    assert th.equal(next_obs, 2 * expected[0]) and th.equal(rewards, expected[1] - obs[:, 0])
    mean = inner.predict_mean(obs, actions)
    assert th.equal(doubles.predict_mean(obs, actions), th.cat([mean[:, :1] - obs[:, :1], 2 * mean[:, 1:]], dim=1))
    # What the inner one does comes first.
    assert th.equal(doubles.postprocess(obs, actions, obs, obs[:, 0])[0], 2 * (obs + 1))
    assert th.equal(doubles.predict(obs, actions)[0], inner.predict(obs, actions)[0]) and doubles.own_reward
