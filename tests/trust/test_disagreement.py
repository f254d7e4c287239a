"""Each formula against a slow way to the same number: densities on a grid, explicit matrices, float64."""

import itertools

import pytest
import torch as th

from sb3_mbpo.trust.disagreement import RESOLUTION, draw, geometric_jsd, information_fusion, information_loss, one_vs_rest_kl

MEMBERS, ROWS, DIMS = 4, 3, 2
GRID = th.linspace(-60, 60, 200_001, dtype=th.float64)


def members(seed=0, dtype=th.float64):
    generator = th.Generator().manual_seed(seed)
    mean = th.randn(MEMBERS, ROWS, DIMS, generator=generator, dtype=th.float64)
    return mean.to(dtype), (th.randn(MEMBERS, ROWS, DIMS, generator=generator, dtype=th.float64)).exp().to(dtype)


def log_density(mean, var):
    return -0.5 * ((GRID - mean) ** 2 / var + (2 * th.pi * var).log())


def integral(values):
    return th.trapezoid(values, GRID)


def kl(log_p, log_q):
    return integral(log_p.exp() * (log_p - log_q))


def test_geometric_jsd_on_a_grid():
    """The mean of the divergences from the normalised geometric mean of two densities; sums over dimensions."""
    mean, var = members()
    expected = th.zeros(ROWS, dtype=th.float64)
    for row, dim in itertools.product(range(ROWS), range(DIMS)):
        logs = [log_density(m, v) for m, v in zip(mean[:, row, dim], var[:, row, dim], strict=True)]
        for p, q in itertools.combinations(logs, 2):
            between = (p + q) / 2
            between = between - integral(between.exp()).log()
            expected[row] += (kl(between, p) + kl(between, q)) / 2 / 6
    th.testing.assert_close(geometric_jsd(mean, var), expected, rtol=1e-8, atol=0)


def test_geometric_jsd_in_matrices():
    """The formula as its authors' code has it, with full matrices."""
    mean, var = members(seed=1)
    expected = th.zeros(ROWS, dtype=th.float64)
    for row in range(ROWS):
        for i, j in itertools.combinations(range(MEMBERS), 2):
            (m1, m2), (s1, s2) = mean[[i, j], row], (th.diag(v) for v in var[[i, j], row])
            s = th.linalg.inv((th.linalg.inv(s1) + th.linalg.inv(s2)) / 2)
            m = s @ (th.linalg.inv(s1) @ m1 + th.linalg.inv(s2) @ m2) / 2
            squares = (m1 @ th.linalg.inv(s1) @ m1 + m2 @ th.linalg.inv(s2) @ m2) / 2 - m @ th.linalg.inv(s) @ m
            expected[row] += 0.5 * (squares + (s1.logdet() + s2.logdet()) / 2 - s.logdet()) / 6
    th.testing.assert_close(geometric_jsd(mean, var), expected, rtol=1e-10, atol=0)


def test_one_vs_rest_on_a_grid():
    mean, var = members(seed=2)
    chosen = th.tensor([3, 0, 1])
    expected = th.zeros(ROWS, dtype=th.float64)
    for row, dim in itertools.product(range(ROWS), range(DIMS)):
        logs = [log_density(m, v) for m, v in zip(mean[:, row, dim], var[:, row, dim], strict=True)]
        own = logs.pop(int(chosen[row]))
        mixture = th.stack(logs).exp().mean(dim=0)
        centre = integral(mixture * GRID)
        expected[row] += kl(own, log_density(centre, integral(mixture * (GRID - centre) ** 2)))
    th.testing.assert_close(one_vs_rest_kl(mean, var, chosen), expected, rtol=1e-8, atol=0)


def test_fusion_in_matrices():
    """The Kalman gain and the rest of the variance, with full matrices."""
    mean, var = members(seed=3)
    fused_mean, gain, conditional_var = information_fusion(mean, var)
    for row in range(ROWS):
        inverses = [th.linalg.inv(th.diag(v)) for v in var[:, row]]
        s = th.linalg.inv(sum(inverses) / MEMBERS)
        mu = s @ sum(inverse @ m for inverse, m in zip(inverses, mean[:, row], strict=True)) / MEMBERS
        epistemic = th.diag(sum((m - mu) ** 2 for m in mean[:, row]) / MEMBERS)
        k = s @ th.linalg.inv(s + epistemic)
        th.testing.assert_close(fused_mean[row], mu)
        th.testing.assert_close(gain[row], k.diag())
        th.testing.assert_close(conditional_var[row], ((th.eye(DIMS) - k) @ s).diag())


def test_fusion_is_what_bayes_says_on_a_grid():
    """Prior N(mu, S), a member's draw y with noise S_epi: the posterior's moments are mu + K (y - mu) and (1 - K) S."""
    mean, var = members(seed=4)
    fused_mean, gain, conditional_var = (part[0, 0] for part in information_fusion(mean, var))
    fused_var = 1 / (1 / var[:, 0, 0]).mean()
    epistemic, y = ((mean[:, 0, 0] - fused_mean) ** 2).mean(), th.tensor(1.7, dtype=th.float64)
    posterior = (log_density(fused_mean, fused_var) + log_density(y, epistemic)).exp()
    posterior = posterior / integral(posterior)
    centre = integral(posterior * GRID)
    th.testing.assert_close(fused_mean + gain * (y - fused_mean), centre)
    th.testing.assert_close(conditional_var, integral(posterior * (GRID - centre) ** 2))


def test_information_loss_is_entropy_above_the_resolution():
    variances = th.tensor([0.3, 4.0, 1e-13, 0.0], dtype=th.float64)
    expected = []
    for variance in variances[:2]:
        log_p = log_density(0.0, variance)
        expected.append((-integral(log_p.exp() * log_p) / th.log(th.tensor(2.0)) - th.log2(th.tensor(RESOLUTION))).item())
    # Entropies below that of a uniform density as wide as the resolution, and of nothing at all.
    assert information_loss(variances).tolist() == pytest.approx([*expected, information_loss(variances)[2].item(), 0])
    assert information_loss(th.tensor(RESOLUTION**2 / (2 * th.pi * th.e * 4))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_units_do_not_matter(seed):
    mean, var = members(seed)
    scale, shift = th.tensor([1e-3, 250.0], dtype=th.float64), th.tensor([5.0, -1e3], dtype=th.float64)
    chosen = th.tensor([0, 1, 2])
    th.testing.assert_close(geometric_jsd(scale * mean + shift, scale**2 * var), geometric_jsd(mean, var))
    th.testing.assert_close(one_vs_rest_kl(scale * mean + shift, scale**2 * var, chosen), one_vs_rest_kl(mean, var, chosen))
    fused_mean, gain, rest = information_fusion(mean, var)
    expected = scale * fused_mean + shift, gain, scale**2 * rest
    for ours, theirs in zip(information_fusion(scale * mean + shift, scale**2 * var), expected, strict=True):
        th.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("var", [1e-4, 1.0, 1e6])
def test_float32_keeps_a_small_disagreement(var):
    """Members that almost agree: differences of numbers that are nearly equal would leave nothing or less."""
    mean = 3 + th.tensor([0.0, 1.0, -1.0]).reshape(3, 1, 1) * 0.1 * var**0.5
    mean32, var32 = mean.float(), th.full_like(mean, var).float()
    exact = mean32.double(), var32.double()
    th.testing.assert_close(geometric_jsd(mean32, var32).double(), geometric_jsd(*exact), rtol=1e-3, atol=0)
    th.testing.assert_close(information_fusion(mean32, var32)[2].double(), information_fusion(*exact)[2], rtol=1e-2, atol=0)


def test_members_that_agree():
    mean, var = th.ones(3, 2, 2), th.full((3, 2, 2), 0.5)
    assert geometric_jsd(mean, var).tolist() == one_vs_rest_kl(mean, var, th.tensor([0, 2])).tolist() == [0, 0]
    fused_mean, gain, conditional_var = information_fusion(mean, var)
    assert (fused_mean == 1).all() and (gain == 1).all() and (conditional_var == 0).all()


def test_draws():
    """Each member as often as any other, with its own mean and variance, from the generator alone."""
    mean = th.tensor([0.0, 10.0, 20.0]).reshape(3, 1, 1).expand(3, 30_000, 2)
    var = th.tensor([0.01, 0.04, 0.09]).reshape(3, 1, 1).expand(3, 30_000, 2)
    before = th.get_rng_state()
    values, chosen = draw(mean, var, th.Generator().manual_seed(0))
    again, _ = draw(mean, var, th.Generator().manual_seed(0))
    assert th.equal(values, again) and th.equal(th.get_rng_state(), before)
    assert (chosen.bincount() / 30_000).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    for i in range(3):
        own = values[chosen == i]
        assert own.mean().item() == pytest.approx(10 * i, abs=0.02) and own.std().item() == pytest.approx(
            0.1 * (i + 1), rel=0.05
        )
        assert abs(th.corrcoef(own.T)[0, 1]) < 0.05
