import copy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.probabilistic_ensemble import ProbabilisticEnsemble

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


@pytest.mark.parametrize("target_mode", ["delta", "next"])
@pytest.mark.parametrize("normalize_targets", [True, False])
def test_recovers_a_linear_system_and_its_noise(target_mode, normalize_targets):
    noise = 0.3
    modes = {"target_mode": target_mode, "normalize_targets": normalize_targets}
    # The mean ends a fit long before the variance has settled; here it is given the time.
    ensemble = ProbabilisticEnsemble(3, 2, net_arch=[32], seed=0, patience=1000, max_updates=1500, **modes)
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


def test_loss_by_hand():
    ensemble = ProbabilisticEnsemble(1, 1, n_members=2, n_elites=1, net_arch=[3], seed=0).double()
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
                terms.append((mean - y[member, row, dim].item()) ** 2 * np.exp(-log_var) + log_var)
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


def test_best_weights_come_back():
    """With noise only, more epochs overfit: what is kept is no worse on hold-out than one epoch was."""
    data = linear_system(60, noise=1.0)
    patient = ProbabilisticEnsemble(3, 2, patience=30, **SMALL)
    seen: list[th.Tensor] = []
    measure = patient._holdout_error

    def spy(x, y):
        seen.append(measure(x, y))
        return seen[-1]

    patient._holdout_error = spy
    patient.fit(data)
    epochs, final = th.stack(seen[:-1]), seen[-1]
    # One per cent is the least improvement that counts.
    assert (final <= epochs.min(dim=0).values * 1.0101 + 1e-6).all()
    assert (epochs[-1] > final * 1.05).any()


@pytest.mark.parametrize(("max_updates", "epochs"), [(1, 1), (9, 3), (12, 3), (13, 4)])
def test_bounded_work(max_updates, epochs):
    # 800 training transitions are 4 gradient steps an epoch; the bound is checked after each.
    metrics = ProbabilisticEnsemble(3, 2, max_updates=max_updates, **SMALL).fit(linear_system(1000))
    assert metrics["epochs"] == epochs


def test_an_epoch_of_much_data():
    """With a bound on an epoch, it is as many batches of a random part; with fewer than that, all of the data as ever."""
    data, seen = linear_system(1000), []
    bounded = ProbabilisticEnsemble(3, 2, max_updates=6, epoch_updates=2, **SMALL)
    gradient = bounded._gradient()

    def spy(x, y):
        seen.append(x[0])
        return gradient(x, y)

    bounded._gradient = lambda: spy
    metrics = bounded.fit(data)
    assert (metrics["epochs"], metrics["updates"]) == (3, 6)
    batches = [{tuple(row) for row in batch.tolist()} for batch in seen]
    # Drawn anew: the epochs' parts are not one and the same.
    assert batches[0] | batches[1] != batches[2] | batches[3]
    wide, unbounded = (ProbabilisticEnsemble(3, 2, max_updates=12, epoch_updates=bound, **SMALL) for bound in (4, None))
    assert wide.fit(data) == unbounded.fit(data)


def test_patience_ends_a_fit():
    metrics = ProbabilisticEnsemble(3, 2, patience=2, min_improvement=0.999, **SMALL).fit(linear_system(100))
    # Nothing after the first epoch improves by so much.
    assert metrics["epochs"] == 4


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
    second.fit(linear_system(50))
    assert [(g["lr"], g["weight_decay"]) for g in second.optimizer.param_groups] == [(5e-2, d) for d in (0.1, 0.2, 0.3, 0.0)]


def test_warm_start():
    data = linear_system(500)
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL)
    first, second = ensemble.fit(data), ensemble.fit(data)
    assert second["epochs"] < first["epochs"] and second["holdout_error"] < 2 * first["holdout_error"]


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
        expected = (squared + 1e-6).prod(axis=1) ** (1 / 4) if normalize else squared.mean(axis=1)
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
    ],
)
def test_bad_arguments(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"dynamics_kwargs: {name}="):
        ProbabilisticEnsemble(3, 2, **kwargs)


def test_what_is_only_remembered_is_not_explained():
    """Each fit holds out other rows; an ensemble that knows by heart what it was given, and nothing else, explains nothing."""
    outcomes = th.randn(450, 4, generator=th.Generator().manual_seed(0))

    class Remembers(ProbabilisticEnsemble):
        def predict(self, obs, actions):
            rows = obs[:, 0].long()
            return th.where((rows < 300).unsqueeze(1), outcomes[rows], 0.0).expand(7, -1, -1), th.ones(7, len(obs), 4)

    obs = th.zeros(450, 3)
    obs[:, 0] = th.arange(450)
    data = (obs, th.zeros(450, 2), outcomes[:, 1:], th.zeros(450, 1), outcomes[:, :1])
    ensemble = Remembers(3, 2, **SMALL, max_updates=1)
    given = [ensemble.fit(ReplayBufferSamples(*(part[:n] for part in data))) for n in (300, 450)]
    assert (given[0]["explained_obs"], given[0]["explained_reward"]) == pytest.approx((1, 1))
    assert (given[1]["explained_obs"], given[1]["explained_reward"]) == (0, 0)
    # In a buffer that is full nothing can be told to be new: then all that is held out counts.
    assert 0.5 < float(ensemble.fit(ReplayBufferSamples(*data))["explained_obs"]) < 0.8


def test_new_rows_are_known_after_a_fit():
    ensemble = ProbabilisticEnsemble(3, 2, **SMALL, max_updates=2)
    assert ensemble.known_rows == 0
    ensemble.fit(linear_system(100))
    assert ensemble.known_rows == 100
    other = ProbabilisticEnsemble(3, 2, **SMALL)
    other.load_state_dict(ensemble.state_dict())
    assert other.known_rows == 100
    # A fit that is taken back has learned nothing.
    with pytest.warns(UserWarning, match="diverged"):
        ensemble.fit(linear_system(200)._replace(rewards=th.full((200, 1), float("nan"))))
    assert ensemble.known_rows == 100
