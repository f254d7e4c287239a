import copy
import math

import gymnasium as gym
import pytest
import torch as th
from test_probabilistic_ensemble import linear_system
from tiny import FAST

from sb3_mbpo import MBPO, ProbabilisticEnsemble
from sb3_mbpo.dynamics.divergence import FAR, LastGood, draw_errors, revive

NAN = math.nan
SMALL = {"net_arch": [16, 16], "seed": 0, "max_updates": 20}


def same(first, second) -> bool:
    """Two states, to the last bit; infinite hold-out errors are equal, too."""
    a, b = ({**state[0], **{str(i): s["exp_avg"] for i, s in state[1]["state"].items()}} for state in (first, second))
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


def state_of(ensemble):
    return copy.deepcopy((ensemble.state_dict(), ensemble.optimizer.state_dict()))


# ---------------------------------------------------------------------- falling back


# Either overflows, one at once.
@pytest.mark.parametrize("rate", [1e3, 1e30])
@pytest.mark.parametrize("normalize_targets", [True, False])
def test_a_fit_that_explodes_leaves_everything_as_it_was(rate, normalize_targets):
    ensemble = ProbabilisticEnsemble(3, 2, normalize_targets=normalize_targets, **SMALL)
    assert ensemble.fit(linear_system(200))["diverged"] == 0 and ensemble.usable
    before, ensemble.learning_rate = state_of(ensemble), rate
    # Other data: the standardisers must go back, too, or the old weights would see inputs on another scale.
    other = linear_system(200, seed=2)
    obs, change = 3 + 7 * other.observations, other.next_observations - other.observations
    with pytest.warns(UserWarning, match="diverged; it keeps its previous weights. Lower"):
        metrics = ensemble.fit(other._replace(observations=obs, next_observations=obs + change))
    assert metrics["diverged"] == 1 and same(before, state_of(ensemble)) and ensemble.usable
    ensemble.learning_rate = 1e-3
    assert ensemble.fit(linear_system(200))["diverged"] == 0


def test_never_a_good_fit():
    ensemble = ProbabilisticEnsemble(3, 2, learning_rate=1e3, **SMALL)
    assert not ensemble.usable
    with pytest.warns(UserWarning, match="never had a good fit, and is not used"):
        assert ensemble.fit(linear_system(200))["holdout_error"] == math.inf
    assert not ensemble.usable and ensemble.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(("n_good", "diverged"), [(5, False), (4, True)])
def test_as_many_sound_members_as_elites_are_enough(n_good, diverged):
    """Bad ones are no elites then."""
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    last, data = LastGood(ensemble), linear_system(50, seed=1)
    x = ensemble.input_standardizer(th.cat([data.observations, data.actions], dim=1))
    y = ensemble.target_standardizer(th.cat([data.rewards, data.next_observations - data.observations], dim=1))
    with th.no_grad():
        ensemble.mlp.layers[-1].bias[: 7 - n_good] = 1e3
    ensemble.holdout_errors[:] = th.arange(7)
    if diverged:
        with pytest.warns(UserWarning, match="diverged"):
            assert last.settle(True, y, x, y)
        assert same(last.state, state_of(ensemble))
    else:
        assert not last.settle(True, y, x, y) and sorted(ensemble.elites.tolist()) == [2, 3, 4, 5, 6]
        assert ensemble.holdout_errors[:2].isinf().all()


def test_variance_counts():
    """Members whose mean is right, but whose noise is not."""
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    last, x, y = LastGood(ensemble), th.zeros(9, 5), th.zeros(9, 4)
    with th.no_grad():
        ensemble.max_log_variance[:] = 100.0
        ensemble.mlp.layers[-1].bias[..., 4:] = 80.0
    with pytest.warns(UserWarning, match="diverged"):
        assert last.settle(True, th.randn(100, 4), x, y)


@pytest.mark.parametrize(("times", "sound"), [(0.9, True), (1.1, False)])
def test_how_far_is_far(times, sound):
    """Off by FAR times the variance of the targets, held-out and others; the variance of a draw is next to none."""
    ensemble = ProbabilisticEnsemble(1, 1, net_arch=[4], seed=0)
    y_train, x, y = th.tensor([[1.0, -1.0], [-1.0, 1.0]]), th.zeros(2, 2), th.tensor([[1.0, 1.0], [-1.0, -1.0]])
    with th.no_grad():
        for parameter in ensemble.mlp.parameters():
            parameter.zero_()
        last = LastGood(ensemble)
        ensemble.mlp.layers[-1].bias[..., :2] = math.sqrt(times * FAR * 2)
        ensemble.mlp.layers[-1].bias[..., 2:] = -10
    assert bool(last._sound(y_train, x, y).all()) == sound


def test_worse_than_the_variance_but_better_than_before_is_no_divergence():
    """Raw targets of a thousandth, a first fit of a few steps."""
    data = linear_system(100)
    small = data._replace(
        rewards=data.rewards * 1e-4, next_observations=data.observations + 1e-4 * (data.next_observations - data.observations)
    )
    ensemble = ProbabilisticEnsemble(3, 2, net_arch=[16], normalize_targets=False, max_updates=1, seed=0)
    assert ensemble.fit(small)["diverged"] == 0 and ensemble.usable


def test_constant_targets_are_no_divergence():
    data = linear_system(100)
    still = data._replace(next_observations=data.observations, rewards=th.ones(100, 1))
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    assert [ensemble.fit(still)["diverged"] for _ in range(4)] == [0, 0, 0, 0]


def test_draw_errors_by_hand():
    ensemble = ProbabilisticEnsemble(1, 1, n_members=2, n_elites=1, net_arch=[4], seed=0)
    with th.no_grad():
        for parameter in ensemble.mlp.parameters():
            parameter.zero_()
        ensemble.mlp.layers[-1].bias[0, 0] = th.tensor([1.0, 2.0, -3.0, -3.0])
    x, y = th.zeros(2500, 2), th.tensor([[1.0, 4.0]]).expand(2500, 2)
    _, log_variance = ensemble._distribution(x[:1].expand(2, -1, -1))
    noise = log_variance.exp().mean(dim=(1, 2))
    th.testing.assert_close(draw_errors(ensemble, x, y), th.tensor([(0 + 4) / 2, (1 + 16) / 2]) + noise.detach())


def test_a_sound_fit_draws_nothing():
    """And its numbers are what they were without a look at its soundness."""
    metrics, states = [], []
    for look in (True, False):
        ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
        with pytest.MonkeyPatch.context() as patch:
            if not look:
                patch.setattr(LastGood, "settle", lambda *_: False)
                patch.setattr("sb3_mbpo.dynamics.divergence.revive", lambda _: None)
            metrics.append(ensemble.fit(linear_system(200)))
        states.append((state_of(ensemble), ensemble.generator.get_state()))
    assert metrics[0] == metrics[1] and same(states[0][0], states[1][0]) and th.equal(states[0][1], states[1][1])


# ---------------------------------------------------------------------- reviving


def test_a_lost_member_starts_anew_and_learns():
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    with th.no_grad():
        ensemble.mlp.layers[1].weight[2, 0, 0] = NAN
    old = [weight.detach().clone() for weight in ensemble.mlp.parameters()]
    revive(ensemble)
    others = [0, 1, 3, 4, 5, 6]
    assert all(th.equal(a[others], b[others]) for a, b in zip(old, ensemble.mlp.parameters(), strict=True))
    assert all(weight.isfinite().all() for weight in ensemble.mlp.parameters())
    assert ensemble.holdout_errors.isinf().tolist() == [False, False, True, False, False, False, False]
    assert not any(th.equal(ensemble.mlp.layers[0].weight[2], ensemble.mlp.layers[0].weight[i]) for i in others)
    assert ensemble.fit(linear_system(200))["diverged"] == 0 and ensemble.holdout_errors.isfinite().all()


def test_all_members_and_the_bounds_lost():
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    with th.no_grad():
        for parameter in ensemble.parameters():
            parameter.fill_(NAN)
    assert ensemble.fit(linear_system(200))["diverged"] == 0
    assert ensemble.usable and all(parameter.isfinite().all() for parameter in ensemble.parameters())


def test_nothing_lost_nothing_done():
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    before, random_state = state_of(ensemble), ensemble.generator.get_state()
    revive(ensemble)
    assert same(before, state_of(ensemble)) and th.equal(random_state, ensemble.generator.get_state())


# ---------------------------------------------------------------------- in an agent


def test_rollouts_wait_for_a_good_fit(tmp_path):
    """SAC goes on with real data meanwhile, as SAC; fits are tried when due, not at every step."""
    settings = {**FAST, "dynamics_kwargs": {"net_arch": [8], "max_updates": 20, "learning_rate": 1000}, "model_train_freq": 10}
    agent = MBPO("MlpPolicy", "Pendulum-v1", **settings)
    fits = []
    fit, agent.dynamics.fit = agent.dynamics.fit, lambda *args, **kwargs: fits.append(1) or fit(*args, **kwargs)
    with pytest.warns(UserWarning, match="never had a good fit"):
        agent.learn(45)
    del agent.dynamics.fit
    assert len(fits) == 3 and agent._n_updates == 50 and len(agent.replay_buffer.model_buffer) == 0
    assert agent.replay_buffer.real_rows(16) == 16 and all(p.isfinite().all() for p in agent.policy.parameters())
    assert agent.logger.name_to_value["dynamics/diverged"] == 1 and "dynamics/dropped" not in agent.logger.name_to_value
    agent.save(tmp_path / "agent")
    assert not MBPO.load(tmp_path / "agent").dynamics.usable
    agent.dynamics.learning_rate = 1e-3
    agent.learn(10, reset_num_timesteps=False)
    assert agent.dynamics.usable and len(agent.replay_buffer.model_buffer) == 30


def test_after_a_good_fit_rollouts_go_on():
    agent = MBPO("MlpPolicy", gym.make("Pendulum-v1"), model_train_freq=10, **FAST).learn(25)
    agent.dynamics.learning_rate = 1e30
    with pytest.warns(UserWarning, match="keeps its previous weights"):
        agent.learn(10, reset_num_timesteps=False)
    # Two refills, the second from newer states, both finite.
    assert list(agent.replay_buffer.model_buffer.refills) == [30, 30]
    assert agent.replay_buffer.model_buffer.contents()[0].isfinite().all()
