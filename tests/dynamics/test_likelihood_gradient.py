import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mbpo import ProbabilisticEnsemble
from sb3_mbpo.dynamics.fused_nll import LikelihoodGradient
from sb3_mbpo.dynamics.layers import EnsembleMLP


def loss_by_definition(mlp, least, most, varies, beta, x, y):
    """Member by member, for autograd."""
    total = 0.01 * (most[varies].sum() - least[varies].sum())
    for member in range(len(x)):
        h = x[member]
        for i, layer in enumerate(mlp.layers):
            h = h @ layer.weight[member] + layer.bias[member]
            if i < len(mlp.layers) - 1:
                h = h * h.sigmoid()
                if mlp.layer_norm:
                    h = (h - h.mean(dim=1, keepdim=True)) / (h.var(dim=1, correction=0, keepdim=True) + 1e-3).sqrt()
        mean, raw = h.chunk(2, dim=1)
        bounded = most - (1 + (most - raw).exp()).log()
        log_variance = least + (1 + (bounded - least).exp()).log()
        weight = (beta * log_variance.detach()).exp()
        total = total + (weight * ((mean - y[member]) ** 2 / log_variance.exp() + log_variance))[:, varies].mean()
    return total


@pytest.mark.parametrize("net_arch", [[7], [8, 5, 6]])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("constant", "beta"), [(None, 0.5), (1, 0.5), (1, 0.0)])
def test_gradient_in_float64(net_arch, members, layer_norm, constant, beta):
    """Against autograd; also with other numbers of rows in between, and a target that is constant."""
    generator = th.Generator().manual_seed(0)
    varies = th.arange(3) != (-1 if constant is None else constant)
    mlp = EnsembleMLP(members, 4, 6, net_arch, generator, layer_norm).double()
    least, most = nn.Parameter(th.tensor([-3.0, -1, 0.1]).double()), nn.Parameter(th.tensor([0.5, 0.2, 0.3]).double())
    parameters = [*mlp.parameters(), least, most]
    gradient = LikelihoodGradient(mlp, (least, most), varies.double(), beta)
    for rows in (10, 3, 10):
        x = th.randn(members, rows, 4, generator=generator).double()
        y = th.randn(members, rows, 3, generator=generator).double() * 2
        loss = loss_by_definition(mlp, least, most, varies, beta, x, y)
        expected = th.autograd.grad(loss, parameters)
        assert gradient(x, y).item() == pytest.approx(loss.item(), rel=1e-12)
        for parameter, theirs in zip(parameters, expected, strict=True):
            th.testing.assert_close(parameter.grad, theirs, rtol=1e-11, atol=1e-14)


def test_gradient_of_the_ensembles_own_loss():
    """In float32, at the sizes of the default."""
    ensemble = ProbabilisticEnsemble(11, 3, seed=0)
    x, y = th.randn(7, 256, 14), th.randn(7, 256, 12)
    gradient = ensemble._gradient()
    assert isinstance(gradient, LikelihoodGradient)
    loss = ensemble.negative_log_likelihood(x, y)
    expected = th.autograd.grad(loss, list(ensemble.parameters()))
    th.testing.assert_close(gradient(x, y), loss.detach())
    for parameter, theirs in zip(ensemble.parameters(), expected, strict=True):
        assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm()


class Weighted(ProbabilisticEnsemble):
    def negative_log_likelihood(self, x, y):
        return 0 * super().negative_log_likelihood(x, y)


class Constant(ProbabilisticEnsemble):
    def _bounded(self, output):
        return tuple(0 * part for part in super()._bounded(output))


class ConstantMLP(EnsembleMLP):
    def forward(self, x):
        return 0 * super().forward(x)


def replace(part: object, name: str) -> None:
    """By a method that gives zeros, on this object only."""
    original = getattr(part, name)
    setattr(part, name, lambda *args: 0 * original(*args))


# The networks' gradient is 0 in each, so no weight may move.
OWN_LOSSES = {
    "the loss": (Weighted, lambda ensemble: None),
    "the bounds of the variance": (Constant, lambda ensemble: None),
    "networks of another class": (ProbabilisticEnsemble, lambda ensemble: setattr(ensemble.mlp, "__class__", ConstantMLP)),
    "the loss of one ensemble": (ProbabilisticEnsemble, lambda ensemble: replace(ensemble, "negative_log_likelihood")),
    "its networks": (ProbabilisticEnsemble, lambda ensemble: replace(ensemble.mlp, "forward")),
    "a hook": (
        ProbabilisticEnsemble,
        lambda ensemble: ensemble.mlp.layers[-1].register_forward_hook(lambda layer, args, out: 0 * out),
    ),
    "one layer": (ProbabilisticEnsemble, lambda ensemble: replace(ensemble.mlp.layers[-1], "forward")),
}


@pytest.mark.parametrize("own", [*OWN_LOSSES, None])
def test_a_loss_of_ones_own_is_the_one_that_is_minimised(own):
    data = ReplayBufferSamples(th.randn(60, 2), th.randn(60, 1), th.randn(60, 2), th.zeros(60, 1), th.randn(60, 1))
    cls, change = OWN_LOSSES.get(own, (ProbabilisticEnsemble, lambda ensemble: None))
    ensemble = cls(2, 1, net_arch=[8], weight_decays=[0, 0], max_updates=3, seed=0)
    change(ensemble)
    before = ensemble.mlp.layers[0].weight.detach().clone()
    ensemble.fit(data)
    assert th.equal(ensemble.mlp.layers[0].weight, before) == (own is not None)
