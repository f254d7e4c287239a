import copy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.dynamics.holdout import held_out
from sb3_mbpo.dynamics.probabilistic_ensemble import LOOK_EVERY, ProbabilisticEnsemble

SMALL = {"net_arch": [64, 64], "seed": 0}


def linear_system(n: int, noise: float = 0.0, seed: int = 0, obs_dim: int = 3, action_dim: int = 2) -> ReplayBufferSamples:
    """s' = s + A s + B a + noise, r = c.(s, a) + noise; the noise has the same size in every dimension."""
    generator = th.Generator().manual_seed(seed)
    system = th.randn(obs_dim + action_dim, 1 + obs_dim, generator=th.Generator().manual_seed(100)) * 0.3
    obs = th.randn(n, obs_dim, generator=generator)
    actions = th.rand(n, action_dim, generator=generator) * 2 - 1
    change = th.cat([obs, actions], dim=1) @ system
    change = change + noise * th.randn(n, 1 + obs_dim, generator=generator)
    return ReplayBufferSamples(obs, actions, obs + change[:, 1:], th.zeros(n, 1), change[:, :1])


def outcome(data: ReplayBufferSamples) -> th.Tensor:
    return th.cat([data.rewards, data.next_observations], dim=1)


@pytest.mark.parametrize("target_mode", ["auto", "delta", "next"])
@pytest.mark.parametrize("normalize_targets", [True, False])
def test_recovers_a_linear_system_and_its_noise(target_mode, normalize_targets):
    noise = 0.3
    modes = {"target_mode": target_mode, "normalize_targets": normalize_targets}
    # The mean ends a fit long before the variance has settled; here it is given the time.
    ensemble = ProbabilisticEnsemble(3, 2, net_arch=[32], seed=0, patience=1000, batch_size=256, max_updates=750, **modes)
    ensemble.fit(linear_system(3000, noise))
    fresh, noiseless = linear_system(2000, noise, seed=1), linear_system(2000, 0.0, seed=1)
    with th.no_grad():
        mean, var = (part[ensemble.elites] for part in ensemble.predict(fresh.observations, fresh.actions))
    # The systematic error is well below the noise, and the predicted noise is the true one.
    assert (mean.mean(0) - outcome(noiseless)).square().mean().sqrt() < 0.35 * noise
    assert var.mean(dim=(0, 1)).sqrt().numpy() == pytest.approx(np.full(4, noise), rel=0.15)
    # Nominal 90 % intervals of the ensemble (all drawn from one elite a row) cover 85 to 95 % of what happens.
    with th.no_grad():
        draws = [ensemble.sample(fresh.observations, fresh.actions) for _ in range(200)]
    drawn = th.stack([th.cat([rewards.unsqueeze(1), next_obs], dim=1) for next_obs, rewards in draws])
    low, high = drawn.quantile(0.05, dim=0), drawn.quantile(0.95, dim=0)
    coverage = ((low <= outcome(fresh)) & (outcome(fresh) <= high)).float().mean(dim=0)
    assert ((coverage > 0.85) & (coverage < 0.95)).all(), coverage


def test_members_are_independent():
    """Other weights at the start, other bootstraps in the fit: the members disagree, more so off the data."""
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(300, 0.1))
    near, far = th.randn(200, 3), th.randn(200, 3) * 6
    actions = th.zeros(200, 2)
    with th.no_grad():
        spread = [ensemble.predict(obs, actions)[0].std(dim=0).mean() for obs in (near, far)]
    assert 0 < 2 * spread[0] < spread[1]
    with th.no_grad():
        means, _ = ensemble.predict(near, actions)
    distances = th.cdist(means.flatten(1), means.flatten(1)) + th.eye(7) * 1e9
    assert distances.min() > 1e-3


def test_elites_are_the_best_on_the_holdout_set():
    ensemble = ProbabilisticEnsemble(2, 1, n_members=4, n_elites=2, **SMALL)
    ensemble.holdout_errors.copy_(th.tensor([0.3, 0.1, float("inf"), 0.2]))
    assert ensemble.elites.tolist() == [1, 3]
    data = linear_system(400, 0.05, obs_dim=2, action_dim=1)
    metrics = ensemble.fit(data)
    assert metrics["elites"] == " ".join(str(i) for i in sorted(ensemble.elites.tolist()))
    assert metrics["holdout_error"] == pytest.approx(ensemble.holdout_errors.sort().values[:2].mean().item())


def test_only_elites_are_sampled_each_as_often_and_anew_for_every_row():
    """Members that predict their own number: what is drawn tells who was asked."""
    ensemble = ProbabilisticEnsemble(1, 1, normalize_targets=False, net_arch=[4], seed=0)
    ensemble.holdout_errors.copy_(th.arange(7.0).flip(0))
    with th.no_grad():
        for parameter in ensemble.mlp.parameters():
            parameter.zero_()
        ensemble.mlp.layers[-1].bias[:, 0, 0] = th.arange(7.0)
        ensemble.mlp.layers[-1].bias[:, 0, 2:] = -50
        ensemble.min_log_variance.fill_(-50)
        obs, actions = th.zeros(10_000, 1), th.zeros(10_000, 1)
        first, second = (ensemble.sample(obs, actions)[1].round().long() for _ in range(2))
    counts = first.bincount(minlength=7)
    assert counts[:2].sum() == 0 and (counts[2:] > 1800).all() and (counts[2:] < 2200).all()
    # Independent draws of five agree on a fifth of the rows.
    assert 0.18 < (first == second).float().mean() < 0.22
    # Neighbouring rows as well: no blocks, no balanced permutation.
    assert 0.18 < (first[1:] == first[:-1]).float().mean() < 0.22


def test_sample_follows_the_chosen_members_distribution():
    """Row by row against `predict`: with one elite, mean and spread of many draws are its mean and variance."""
    ensemble = ProbabilisticEnsemble(3, 2, n_members=3, n_elites=1, **SMALL)
    ensemble.fit(linear_system(500, 0.2))
    data = linear_system(5, seed=3)
    with th.no_grad():
        mean, var = (part[ensemble.elites[0]] for part in ensemble.predict(data.observations, data.actions))
        many = [part.repeat(20_000, 1) for part in (data.observations, data.actions)]
        next_obs, rewards = ensemble.sample(*many)
    drawn = th.cat([rewards.unsqueeze(1), next_obs], dim=1).reshape(20_000, 5, 4)
    th.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=5 * var.max().sqrt().item() / 20_000**0.5)
    th.testing.assert_close(drawn.var(0), var, rtol=0.06, atol=0)


@pytest.mark.parametrize("rows", [200, 2, 0])
def test_each_row_is_its_own(rows):
    """Without noise, every row is what one of several elites predicts for that row; fewer rows than elites are no trouble."""
    ensemble = ProbabilisticEnsemble(3, 2, n_members=4, n_elites=3, **SMALL)
    ensemble.fit(linear_system(500, 0.2))
    ensemble.max_log_variance.data.fill_(-60.0)
    ensemble.min_log_variance.data.fill_(-80.0)
    obs, actions = th.randn(rows, 3), th.randn(rows, 2)
    with th.no_grad():
        next_obs, rewards = ensemble.sample(obs, actions)
        mean = ensemble.predict(obs, actions)[0][ensemble.elites]
    distance = (mean - th.cat([rewards.unsqueeze(1), next_obs], dim=1)).abs().amax(dim=2)
    assert next_obs.shape == (rows, 3) and (distance.amin(dim=0) < 1e-4).all()
    # Which of them differs from row to row.
    assert rows < 10 or len(set(distance.argmin(dim=0).tolist())) == 3


def test_sample_is_differentiable():
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL).double()
    obs, actions = (th.randn(6, n, dtype=th.float64, requires_grad=True) for n in (3, 2))

    def draw(obs, actions):
        ensemble.seed(1)
        return ensemble.sample(obs, actions)

    ensemble.fit(ReplayBufferSamples(*(part.double() for part in linear_system(100)[:5])))
    assert th.autograd.gradcheck(draw, (obs, actions))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_by_hand(beta):
    ensemble = ProbabilisticEnsemble(1, 1, n_members=2, n_elites=1, net_arch=[3], seed=0, beta=beta).double()
    x, y = th.randn(2, 4, 2, dtype=th.float64), th.randn(2, 4, 2, dtype=th.float64)
    raw = ensemble.mlp(x).detach().numpy()
    expected = 0.0
    for member in range(2):
        terms = []
        for row in range(4):
            for dim in range(2):
                mean, log_var = raw[member, row, dim], raw[member, row, 2 + dim]
                log_var = 0.5 - np.log1p(np.exp(0.5 - log_var))
                log_var = -10 + np.log1p(np.exp(log_var + 10))
                weight = np.exp(log_var) ** beta
                terms.append(weight * ((mean - y[member, row, dim].item()) ** 2 * np.exp(-log_var) + log_var))
        expected += np.mean(terms)
    expected += 0.01 * (2 * 0.5 - 2 * -10)
    assert ensemble.negative_log_likelihood(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_weight_decay_per_layer():
    """Adam's weight_decay is the gradient of 0.5 * wd * W^2; biases and bounds carry none."""
    ensemble = ProbabilisticEnsemble(3, 2)
    groups = ensemble.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4, 0]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1, 1, 5 + 2]
    assert all(group["params"][0].shape[0] == 7 and group["params"][0].dim() == 3 for group in groups[:5])


def looks_of(ensemble: ProbabilisticEnsemble) -> list[th.Tensor]:
    """:return: filled with the hold-out errors that the ensemble measures from now on"""
    seen: list[th.Tensor] = []
    measure = ensemble._holdout_error

    def spy(x, y):
        seen.append(measure(x, y))
        return seen[-1]

    ensemble._holdout_error = spy  # type: ignore[method-assign]
    return seen


def test_best_weights_come_back():
    """With noise only, more steps overfit: what is kept is no worse on hold-out rows than at any look."""
    patient = ProbabilisticEnsemble(3, 2, patience=600, **SMALL)
    seen = looks_of(patient)
    patient.fit(linear_system(60, noise=1.0))
    looks, final = th.stack(seen[:-1]), seen[-1]
    assert len(looks) > 10 and th.equal(final, looks.min(dim=0).values)
    assert (looks[-1] > final * 1.02).any()


def test_no_fit_makes_a_member_worse():
    """Where the training rows teach what the hold-out rows refute, the weights from before stay, and predict the same."""
    data, probe = linear_system(300), linear_system(50, seed=7)
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(data)
    with th.no_grad():
        before = ensemble.predict(probe.observations, probe.actions)
    train = ~held_out(data, 0.2, 1000)
    # Not a function of the inputs, of the same mean and spread; which rows are held out does not depend on the rewards.
    shuffled = data.rewards[train][th.randperm(int(train.sum()), generator=th.Generator().manual_seed(1))]
    rewards = data.rewards.clone()
    rewards[train] = shuffled
    # The reward alone counts.
    ensemble._targets = lambda rows: th.cat([rows.rewards, 0 * rows.next_observations], dim=1)  # type: ignore[method-assign]
    assert ensemble.fit(data._replace(rewards=rewards))["updates"] > 0
    with th.no_grad():
        after = ensemble.predict(probe.observations, probe.actions)
    th.testing.assert_close(after[0][..., 0], before[0][..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize_targets", [True, False])
@pytest.mark.parametrize("target_mode", ["delta", "next"])
def test_new_statistics_of_the_data_leave_predictions_as_they_were(target_mode, normalize_targets):
    """Without a gradient step, a fit to data elsewhere and of another spread changes nothing; in float64 to rounding."""
    modes = {"target_mode": target_mode, "normalize_targets": normalize_targets}
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL, **modes).double()
    data = ReplayBufferSamples(*(part.double() for part in linear_system(200, 0.1)[:5]))
    ensemble.fit(data)
    ensemble.gain.fill_(1.0)
    probe = [part.double() for part in linear_system(50, seed=3)[:2]]
    with th.no_grad():
        before = ensemble.predict(*probe)
    moved = ReplayBufferSamples(2.0 * data.observations + 1, *data[1:2], 2.0 * data.next_observations + 2, *data[3:5])
    statistics = ensemble.input_standardizer.mean.clone()
    ensemble._split(moved)
    assert not th.allclose(ensemble.input_standardizer.mean, statistics)
    with th.no_grad():
        after = ensemble.predict(*probe)
    for a, b in zip(before, after, strict=True):
        th.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_dimension_that_becomes_constant_leaves_predictions_as_they_were():
    """At its value: a goal that stays where it is in the newest data, which the network has learned to use."""
    ensemble = ProbabilisticEnsemble(4, 2, **SMALL)
    data = linear_system(400)
    goal = th.rand(400, 1, generator=th.Generator().manual_seed(0))
    varied = with_more_dimensions(data, goal, goal)._replace(rewards=goal * data.rewards)
    ensemble.fit(varied)
    ensemble.gain.fill_(1.0)
    still = with_more_dimensions(data, level := th.full((400, 1), 0.8), level)._replace(rewards=0.8 * data.rewards)
    with th.no_grad():
        before = ensemble.predict(still.observations, still.actions)[0]
        ensemble._split(still)
        after = ensemble.predict(still.observations, still.actions)[0]
    assert ensemble.input_standardizer.varies[3] == 0
    # But for rows so far out that their inputs are cut.
    inside = (data.observations.abs() < 2.5).all(dim=1)
    th.testing.assert_close(after[:, inside], before[:, inside], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target_mode", ["auto", "delta", "next"])
def test_constant_raw_targets_are_their_mean(target_mode):
    """A reward of 1 and a clock, in the units of the env."""
    data = linear_system(200)
    clock = 0.05 * th.arange(200.0).unsqueeze(1)
    data = with_more_dimensions(data, clock, clock + 0.05)._replace(rewards=th.ones(200, 1))
    ensemble = ProbabilisticEnsemble(4, 2, normalize_targets=False, target_mode=target_mode, max_updates=10, **SMALL)
    ensemble.fit(data)
    mean = ensemble.predict_mean(data.observations, data.actions)
    assert (mean[:, 0] == 1).all()
    assert target_mode == "next" or (mean[:, 4] - clock[:, 0] - 0.05).abs().max() < 1e-5


@pytest.mark.parametrize("max_updates", [1, 60, 130])
def test_bounded_work(max_updates):
    """Half as much again in the first fit."""
    ensemble = ProbabilisticEnsemble(3, 2, max_updates=max_updates, min_improvement=0, **SMALL)
    data = linear_system(1000)
    assert [ensemble.fit(data)["updates"] for _ in range(2)] == [int(1.5 * max_updates), max_updates]


def test_patience_counts_gradient_steps():
    """On little data as on much: nothing after the first look improves by so much."""
    for n in (100, 2000):
        ensemble = ProbabilisticEnsemble(3, 2, patience=150, min_improvement=0.999, normalize_targets=False, **SMALL)
        # The first look, 150 steps without an improvement, and the decay of the learning rate.
        assert ensemble.fit(linear_system(n))["updates"] == LOOK_EVERY + 150 + 100


def test_an_interrupted_fit_has_not_happened():
    """Ctrl-C, or an error of a callback: weights, standardizers, hold-out errors and random numbers are those before."""
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    before, random_state = copy.deepcopy(ensemble.state_dict()), ensemble.generator.get_state()
    other = linear_system(200, seed=2)
    data = other._replace(observations=other.observations + 5, next_observations=other.next_observations + 5)

    def interrupt(words):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensemble.fit(data, progress=interrupt)
    assert all(th.equal(value, before[name]) for name, value in ensemble.state_dict().items())
    assert th.equal(ensemble.generator.get_state(), random_state) and ensemble.usable


def test_a_second_fit_learns_as_well_as_a_new_network():
    """A point that stays where it starts: the second half of the data is elsewhere."""
    rng = np.random.default_rng(0)
    rows: list[list] = [[] for _ in range(5)]
    for _ in range(6):
        x, v = rng.normal(size=2), np.zeros(2)
        for _ in range(100):
            action, old = rng.uniform(-1, 1, 2), [*x, *v]
            v = 0.9 * v + 0.1 * action
            x = x + 0.1 * v
            for kept, value in zip(rows, (old, action, [*x, *v], [0.0], [-(x @ x)]), strict=True):
                kept.append(value)
    data = ReplayBufferSamples(*(th.as_tensor(np.array(part), dtype=th.float32) for part in rows))
    warm, fresh = (ProbabilisticEnsemble(4, 2, seed=0, net_arch=[100] * 4) for _ in range(2))
    warm.fit(ReplayBufferSamples(*(part[:300] for part in data[:5])))
    explained = []
    for ensemble in (warm, fresh):
        ensemble.fit(data)
        error = ensemble.predict_mean(data.observations, data.actions)[:, :1] - data.rewards
        explained.append(1 - (error**2).mean().item() / data.rewards.var().item())
    assert explained[0] > 0.95 and explained[0] > explained[1] - 0.02, explained


def test_a_diverging_fit_keeps_the_old_weights():
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(200))
    before = [weight.detach().clone() for weight in ensemble.mlp.parameters()]
    ensemble.learning_rate = 1e30
    with pytest.warns(UserWarning, match="diverged"):
        ensemble.fit(linear_system(200, seed=2))
    assert all(th.equal(a, b) for a, b in zip(before, ensemble.mlp.parameters(), strict=True))
    data = linear_system(50, seed=3)
    with th.no_grad():
        assert all(part.isfinite().all() for part in ensemble.sample(data.observations, data.actions))
    # Nothing of the failure is left behind: the next fit is a good one.
    ensemble.learning_rate = 1e-3
    assert np.isfinite(ensemble.fit(linear_system(200, seed=2))["train_loss"])


def test_settings_apply_after_loading_an_optimizer():
    """load(dynamics_kwargs=...) with another learning rate: the loaded optimizer does not bring the old one back."""
    first = ProbabilisticEnsemble(3, 2, **SMALL)
    first.fit(linear_system(50))
    second = ProbabilisticEnsemble(3, 2, learning_rate=5e-2, weight_decays=[0.1, 0.2, 0.3], **SMALL)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    rates: list[float] = []
    step = second.optimizer.step
    second.optimizer.step = lambda: rates.append(second.optimizer.param_groups[0]["lr"]) or step()
    second.fit(linear_system(50))
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.1, 0.2, 0.3, 0.0]
    assert max(rates) == pytest.approx(5e-2)


def test_warm_start():
    data = linear_system(500)
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    first, second = ensemble.fit(data), ensemble.fit(data)
    assert second["updates"] < first["updates"] and second["holdout_error"] <= first["holdout_error"]


def test_reward_scale_does_not_matter():
    """A reward a thousand times larger than the state changes leaves the fit of the states as it was (normalised targets)."""
    data = linear_system(1000, 0.05)
    large = data._replace(rewards=data.rewards * 1e3)
    errors = []
    for transitions in (data, large):
        ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
        ensemble.fit(transitions)
        fresh = linear_system(1000, 0.0, seed=5)
        with th.no_grad():
            mean, _ = ensemble.predict(fresh.observations, fresh.actions)
        errors.append((mean.mean(0)[:, 1:] - fresh.next_observations).square().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_an_unpredictable_reward_does_not_end_the_fit():
    """Pure noise in one dimension: the others are learned as well as without it."""
    data = linear_system(400)
    noise = data._replace(rewards=th.randn(400, 1, generator=th.Generator().manual_seed(7)))
    fresh = linear_system(1000, seed=5)
    errors = []
    for transitions in (data, noise):
        ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
        ensemble.fit(transitions)
        with th.no_grad():
            mean, _ = ensemble.predict(fresh.observations, fresh.actions)
        errors.append((mean[ensemble.elites].mean(0)[:, 1:] - fresh.next_observations).square().mean().sqrt().item())
    assert errors[1] < 2.5 * errors[0], errors


def test_holdout_error_by_hand():
    """Raw targets: the plain mean. Standardised ones: the geometric mean over dimensions, with a floor."""
    data = linear_system(200)
    for normalize in (False, True):
        ensemble = ProbabilisticEnsemble(3, 2, normalize_targets=normalize, **SMALL)
        ensemble.fit(data)
        x = ensemble.input_standardizer(th.cat([data.observations, data.actions], dim=1))
        y = ensemble.target_standardizer(th.cat([data.rewards, data.next_observations - data.observations], dim=1))
        with th.no_grad():
            mean, _ = ensemble._distribution(x.expand(7, -1, -1))
        squared = ((mean - y) ** 2).mean(dim=1).numpy()
        # As if a constant were predicted where the prediction is worse than one.
        expected = (squared.clip(max=1) + 1e-6).prod(axis=1) ** (1 / 4) if normalize else squared.mean(axis=1)
        np.testing.assert_allclose(ensemble._holdout_error(x, y), expected, rtol=1e-4)


def test_seeds_and_global_generators():
    data = linear_system(200, 0.1)
    before = th.get_rng_state(), np.random.get_state()[1].copy()
    runs = []
    for seed in (0, 0, 1, None):
        ensemble = ProbabilisticEnsemble(3, 2, net_arch=[16], seed=seed)
        ensemble.fit(data)
        with th.no_grad():
            runs.append(ensemble.sample(data.observations, data.actions)[0])
    assert (before[0] == th.get_rng_state()).all() and (before[1] == np.random.get_state()[1]).all()
    assert th.equal(runs[0], runs[1]) and not th.equal(runs[0], runs[2]) and not th.equal(runs[0], runs[3])


def test_state_dict_is_float_and_complete():
    ensemble, other = (ProbabilisticEnsemble(3, 2, net_arch=[16], seed=seed) for seed in (0, 1))
    ensemble.fit(linear_system(200))
    state = ensemble.state_dict()
    assert all(value.is_floating_point() and value.numel() > 0 for value in state.values())
    other.load_state_dict(copy.deepcopy(state))
    other.seed(5), ensemble.seed(5)
    data = linear_system(10, seed=9)
    with th.no_grad():
        a, b = (model.sample(data.observations, data.actions) for model in (ensemble, other))
    assert th.equal(a[0], b[0]) and th.equal(a[1], b[1])


@pytest.mark.parametrize("n", [10, 11, 20])
def test_few_transitions(n):
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(linear_system(n))
    assert all(value.isfinite().all() for value in ensemble.state_dict().values())


def test_too_few_transitions():
    with pytest.raises(ValueError, match="at least 10 transitions, got 9"):
        ProbabilisticEnsemble(3, 2).fit(linear_system(9))


def test_constant_dimensions():
    """Observations and rewards that never change are predicted as such, and stay finite when they do change."""
    data = linear_system(300)
    observations, next_observations = data.observations.clone(), data.next_observations.clone()
    observations[:, 1] = next_observations[:, 1] = 7.0
    data = data._replace(observations=observations, next_observations=next_observations, rewards=th.ones(300, 1))
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    ensemble.fit(data)
    moved = observations[:50].clone()
    moved[:, 1] = 1e4
    with th.no_grad():
        next_obs, rewards = ensemble.sample(observations[:50], data.actions[:50])
        far, _ = ensemble.sample(moved, data.actions[:50])
    assert (next_obs[:, 1] - 7).abs().max() < 0.01 and (rewards - 1).abs().max() < 0.01
    assert far.isfinite().all()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_members": 0},
        {"n_elites": 8},
        {"n_elites": 0},
        {"net_arch": []},
        {"learning_rate": 0},
        {"weight_decays": [1e-4]},
        {"batch_size": 0},
        {"holdout_ratio": 1.0},
        {"holdout_ratio": 0.0},
        {"max_holdout": 0},
        {"patience": -1},
        {"max_updates": 0},
        {"min_improvement": -0.1},
        {"min_improvement": 1.0},
        {"target_mode": "absolute"},
        {"layer_norm": "yes"},
    ],
)
def test_bad_arguments(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"dynamics_kwargs: {name}="):
        ProbabilisticEnsemble(3, 2, **kwargs)


def with_more_dimensions(data: ReplayBufferSamples, more: th.Tensor, next_more: th.Tensor) -> ReplayBufferSamples:
    observations = th.cat([data.observations, more], dim=1)
    return data._replace(observations=observations, next_observations=th.cat([data.next_observations, next_more], dim=1))


def explained_of_first(ensemble: ProbabilisticEnsemble, data: ReplayBufferSamples, dims: int) -> float:
    """:return: share of the variance of the reward and the first observations that is explained"""
    truth = th.cat([data.rewards, data.next_observations[:, :dims]], dim=1)
    prediction = ensemble.predict_mean(data.observations, data.actions)[:, : 1 + dims]
    return 1 - ((prediction - truth).var(dim=0) / truth.var(dim=0)).mean().item()


@pytest.mark.parametrize("kind", ["constant", "a goal of each episode", "spikes"])
def test_dimensions_that_tell_nothing_change_nothing(kind):
    """Neither when a fit ends, within a factor of two, nor what is explained of the others."""
    generator = th.Generator().manual_seed(0)
    data, fresh = linear_system(600), linear_system(300, seed=5)
    ensembles = [ProbabilisticEnsemble(dims, 2, net_arch=[64, 64], seed=0) for dims in (3, 23)]
    if kind == "constant":
        more = [(part := th.full((n, 20), 3.0), part) for n in (600, 300)]
    elif kind == "spikes":
        # Contact forces: zero nearly always.
        more = [
            tuple(th.randn(n, 20, generator=generator) * (th.rand(n, 20, generator=generator) < 0.02) for _ in range(2))
            for n in (600, 300)
        ]
    else:
        goals = th.randn(6, 20, generator=generator)
        more = [(part := goals.repeat_interleave(n // 6, dim=0), part) for n in (600, 300)]
    wide, fresh_wide = (with_more_dimensions(part, *extra) for part, extra in zip((data, fresh), more, strict=True))
    metrics = [ensemble.fit(part) for ensemble, part in zip(ensembles, (data, wide), strict=True)]
    shares = [explained_of_first(ensemble, part, 3) for ensemble, part in zip(ensembles, (fresh, fresh_wide), strict=True)]
    assert shares[0] > 0.9 and shares[1] > 0.8 * shares[0], shares
    assert 0.5 <= metrics[1]["updates"] / metrics[0]["updates"] <= 2, metrics


@pytest.mark.expensive
def test_what_cannot_be_predicted_is_predicted_to_be_its_mean():
    """A network that has overfitted noise does not say so; what can be predicted is left as it is."""
    data, fresh = linear_system(300), linear_system(500, seed=5)
    noise = th.Generator().manual_seed(3)
    data, fresh = (part._replace(rewards=th.randn(len(part.rewards), 1, generator=noise)) for part in (data, fresh))
    ensemble = ProbabilisticEnsemble(3, 2, seed=0, patience=1000, max_updates=500)
    ensemble.fit(data)
    mean = ensemble.predict_mean(fresh.observations, fresh.actions)
    variance, gain = fresh.rewards.var(), ensemble.gain.clone()
    ensemble.gain.fill_(1.0)
    overfitted = ensemble.predict_mean(fresh.observations, fresh.actions)
    ensemble.gain.copy_(gain)
    worse_than_mean = [(part[:, :1] - fresh.rewards).square().mean() / variance - 1 for part in (mean, overfitted)]
    assert worse_than_mean[0] < 0.2 and worse_than_mean[1] > 2 * worse_than_mean[0]
    assert (ensemble.gain[..., 0] < 0.85).all() and (ensemble.gain[..., 1:] > 0.95).all()
    with th.no_grad():
        draws = [ensemble.sample(fresh.observations, fresh.actions)[1] for _ in range(200)]
    # Draws are around the same means.
    assert (th.stack(draws).mean(dim=0) - mean[:, 0]).square().mean() < 0.05


def test_of_each_dimension_the_target_that_varies_less():
    """A position, whose change is predicted, beside noise, whose next value has nothing to do with the last one."""
    generator = th.Generator().manual_seed(0)
    position, actions = th.randn(400, 1, generator=generator), th.rand(400, 1, generator=generator)
    noise = th.randn(401, 1, generator=generator)
    obs = th.cat([position, noise[:-1]], dim=1)
    data = ReplayBufferSamples(obs, actions, th.cat([position + 0.1 * actions, noise[1:]], dim=1), th.zeros(400, 1), actions)
    ensemble = ProbabilisticEnsemble(2, 1, **SMALL)
    ensemble.fit(data)
    assert ensemble.relative.tolist() == [1, 0]
    error = (ensemble.predict_mean(obs, actions)[:, 1:] - data.next_observations).var(dim=0)
    assert error[0] < 1e-4 and error[1] < 1.1 * noise.var()
    # The other way round in the next fit, by more than a little.
    swapped = data._replace(observations=obs.flip(1), next_observations=data.next_observations.flip(1))
    ensemble.fit(swapped)
    assert ensemble.relative.tolist() == [0, 1]
    error = (ensemble.predict_mean(obs.flip(1), actions)[:, 2] - swapped.next_observations[:, 1]).var()
    assert error < 1e-3


def test_gain_by_hand():
    """One member says the target, another twice as much, a third its opposite; three rows in advance say 1."""
    ensemble = ProbabilisticEnsemble(1, 1, n_members=3, n_elites=1, net_arch=[4], seed=0)
    said = th.tensor([1.0, 2.0, -1.0]).reshape(3, 1, 1)
    ensemble._distribution = lambda x: (said * x[..., :2], x)  # type: ignore[method-assign]
    x = th.tensor([[1.0, 2.0], [-1.0, 2.0]])
    ensemble._fit_gain(x, x)
    expected = [[1, 1], [(3 + 2 * 2) / (3 + 4 * 2), (3 + 2 * 8) / (3 + 4 * 8)], [(3 - 2) / (3 + 2), 0]]
    th.testing.assert_close(ensemble.gain[:, 0], th.tensor(expected))


def test_a_constant_dimension_is_predicted_as_it_is_and_joins_when_it_moves():
    data = linear_system(400)
    still = with_more_dimensions(data, th.full((400, 1), 7.0), th.full((400, 1), 7.0))
    ensemble = ProbabilisticEnsemble(4, 2, **SMALL)
    ensemble.fit(still)
    with th.no_grad():
        mean, var = ensemble.predict(still.observations, still.actions)
        next_obs, _ = ensemble.sample(still.observations, still.actions)
    assert (mean[..., 4] == 7).all() and (var[..., 4] == 0).all() and (next_obs[:, 3] == 7).all()
    assert (var[..., :4] > 0).all()
    moving = with_more_dimensions(data, level := 7 + data.observations[:, :1], level + data.actions[:, :1])
    ensemble.fit(moving)
    error = ensemble.predict_mean(moving.observations, moving.actions)[:, 4] - moving.next_observations[:, 3]
    assert error.var() < 0.05 * data.actions[:, 0].var()


@pytest.mark.parametrize("magnitude", [1.0, 300.0, 1e5])
def test_a_difference_that_is_rounding_is_constant(magnitude):
    """A goal that the env computes anew in each step differs from itself in the last bit."""
    data = linear_system(200)
    goal = magnitude * (1 + th.rand(200, 1, generator=th.Generator().manual_seed(0)))
    rounded = th.nextafter(goal, th.where(th.arange(200).unsqueeze(1) % 2 == 0, th.inf, -th.inf))
    ensemble = ProbabilisticEnsemble(4, 2, max_updates=5, **SMALL)
    ensemble.fit(with_more_dimensions(data, goal, rounded))
    assert ensemble.target_standardizer.varies.tolist() == [1, 1, 1, 1, 0]


def test_nothing_that_varies():
    """Rewards and observations that never change are known without a gradient that tells anything."""
    data = linear_system(100)
    still = data._replace(observations=th.ones(100, 3), next_observations=th.ones(100, 3), rewards=th.ones(100, 1))
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    metrics = ensemble.fit(still)
    assert metrics["explained_obs"] == metrics["explained_reward"] == 1 and ensemble.usable
    with th.no_grad():
        next_obs, rewards = ensemble.sample(still.observations, still.actions)
    assert th.equal(next_obs, still.next_observations) and th.equal(rewards, still.rewards[:, 0])
