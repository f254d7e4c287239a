import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_mbpo.dynamics.layers import EnsembleLinear, EnsembleMLP, Standardizer


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def test_members_are_separate_networks():
    """Each member equals a plain torch network with its weights."""
    mlp = EnsembleMLP(3, 4, 2, [5, 6], generator()).double()
    x = th.randn(3, 7, 4, dtype=th.float64)
    out = mlp(x)
    for member in range(3):
        layers: list[nn.Module] = []
        for layer in mlp.layers:
            plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[2]).double()
            plain.weight.data = layer.weight[member].T
            plain.bias.data = layer.bias[member, 0]
            layers += [plain, nn.SiLU()]
        th.testing.assert_close(out[member], nn.Sequential(*layers[:-1])(x[member]), rtol=1e-12, atol=1e-12)


def test_one_member():
    mlp = EnsembleMLP(4, 3, 2, [5, 6], generator()).double()
    x = th.randn(4, 6, 3, dtype=th.float64)
    for i in range(4):
        th.testing.assert_close(mlp.member(i, x[i]), mlp(x)[i], rtol=1e-12, atol=1e-12)
    assert mlp.member(0, x[0, :0]).shape == (0, 2)


def test_gradients_in_float64():
    mlp = EnsembleMLP(2, 3, 2, [4], generator()).double()
    x = th.randn(2, 3, 3, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(mlp, (x,))
    assert th.autograd.gradcheck(lambda rows: mlp.member(1, rows), (x[1].detach().requires_grad_(),))


def test_initial_weights():
    """Standard deviation of a normal of 1 / (2 sqrt(fan_in)) cut at two of its standard deviations; zero biases."""
    layer = EnsembleLinear(7, 100, 300, generator())
    std = 0.5 / 100**0.5
    assert layer.weight.abs().max() <= 2 * std
    # A standard normal cut at +-2 has a standard deviation of 0.8796.
    assert layer.weight.std().item() == pytest.approx(0.8796 * std, rel=0.01)
    assert (layer.bias == 0).all()


def test_own_generator():
    before = th.get_rng_state(), np.random.get_state()[1].copy()
    first, same, other = (EnsembleMLP(2, 3, 2, [4], generator(seed)) for seed in (0, 0, 1))
    assert (before[0] == th.get_rng_state()).all() and (before[1] == np.random.get_state()[1]).all()
    assert all(th.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not th.equal(first.layers[0].weight, other.layers[0].weight)
    assert not th.equal(first.layers[0].weight[0], first.layers[0].weight[1])


def test_standardizer():
    data = th.randn(1000, 3, generator=generator()) * th.tensor([1.0, 1e3, 1e-3]) + th.tensor([0.0, -5e4, 2.0])
    standardizer = Standardizer(3)
    standardizer.fit(data)
    z = standardizer(data)
    np.testing.assert_allclose(z.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(z.std(0, correction=0), 1, atol=2e-3)
    th.testing.assert_close(standardizer.inverse(z), data)


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e5, 1e-9])
def test_standardizer_of_a_constant(rows, value):
    """A constant dimension gives zero, and a finite, bounded number after it has moved."""
    standardizer = Standardizer(1)
    standardizer.fit(th.full((rows, 1), value))
    assert standardizer(th.full((1, 1), value)).item() == 0
    assert standardizer(th.full((1, 1), value + 1e6)).item() == 10


def test_noise_of_a_constant_target():
    standardizer = Standardizer(2, constant_std=1e-3)
    standardizer.fit(th.tensor([[5.0, 1.0], [5.0, 3.0]]))
    th.testing.assert_close(standardizer.inverse(th.ones(1, 2)), th.tensor([[5.001, 3.0]]))


def test_standardizer_keeps_a_small_but_real_spread():
    data = th.randn(500, 1, generator=generator()) * 1e-4
    standardizer = Standardizer(1)
    standardizer.fit(data)
    assert standardizer.std.item() == pytest.approx(1e-4, rel=0.1)
