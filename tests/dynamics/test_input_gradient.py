"""Derivatives of an ensemble by its inputs: against autograd through the layers, in float64."""

import copy
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo import ProbabilisticEnsemble
from sb3_mbpo.dynamics.input_gradient import InputGradient
from sb3_mbpo.dynamics.layers import EnsembleMLP


def networks(layer_norm: bool, net_arch: list[int] | None = None) -> EnsembleMLP:
    arch = [7, 6] if net_arch is None else net_arch
    return EnsembleMLP(4, 3, 2, arch, th.Generator().manual_seed(0), layer_norm).double()


def inputs(n_members: int) -> th.Tensor:
    draw = th.Generator().manual_seed(1)
    return th.randn(n_members, 5, 3, generator=draw, dtype=th.float64).requires_grad_()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", [[], [6], [7, 6]])
def test_values_and_gradients_are_those_of_autograd(layer_norm: bool, net_arch: list[int]) -> None:
    mlp, x = networks(layer_norm, net_arch), inputs(4)
    expected, found = mlp(x), InputGradient(mlp)(x)
    weights = th.randn(expected.shape, generator=th.Generator().manual_seed(2), dtype=th.float64)
    assert th.allclose(found, expected, rtol=1e-12)
    gradients = [th.autograd.grad((output * weights).sum(), x)[0] for output in (expected, found)]
    assert th.allclose(gradients[1], gradients[0], rtol=1e-10, atol=1e-12) and gradients[0].any()


def test_some_members_and_weights_that_change() -> None:
    mlp = networks(False)
    through, x = InputGradient(mlp), inputs(2)
    assert th.allclose(through(x, [3, 1]), mlp(x.repeat(2, 1, 1)[[1, 1, 0, 0]])[[3, 1]])
    first: Any = mlp.layers[0]
    with th.no_grad():
        first.weight.mul_(2)
    assert th.allclose(through(x, [3, 1]), mlp(x.repeat(2, 1, 1)[[1, 1, 0, 0]])[[3, 1]])
    twin = copy.deepcopy(mlp)
    for parameter in twin.parameters():
        parameter.data.zero_()
    mlp.load_state_dict(twin.state_dict())
    assert not through(x, [3, 1]).any()


def test_weights_get_no_gradient() -> None:
    mlp, x = networks(False), inputs(4)
    InputGradient(mlp)(x).sum().backward()
    assert x.grad is not None and all(parameter.grad is None for parameter in mlp.parameters())


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_a_draw_is_the_same_with_and_without_a_gradient(rows: int) -> None:
    ensemble = ProbabilisticEnsemble(3, 1, seed=0, n_members=4, n_elites=3, net_arch=[8]).double()
    draw = th.Generator().manual_seed(3)
    obs, actions = (th.randn(rows, size, generator=draw, dtype=th.float64) for size in (3, 1))
    ensemble.seed(5)
    with th.no_grad():
        plain = ensemble.sample(obs, actions)
    ensemble.seed(5)
    through = ensemble.sample(obs.requires_grad_(), actions)
    assert all(th.allclose(a, b, rtol=1e-12) for a, b in zip(plain, through, strict=True))
    assert through[0].requires_grad


def test_a_draw_follows_a_fit() -> None:
    """Whatever its optimizer does to the weights."""
    draw = th.Generator().manual_seed(3)
    rows = ReplayBufferSamples(*(th.randn(40, size, generator=draw) for size in (3, 1, 3, 1, 1)))
    ensemble = ProbabilisticEnsemble(3, 1, seed=0, n_members=3, n_elites=2, net_arch=[8], max_updates=50)
    for _ in range(2):
        ensemble.fit(rows)
        ensemble.seed(5)
        through = ensemble.sample(rows.observations.requires_grad_(), rows.actions)[0]
        ensemble.seed(5)
        with th.no_grad():
            assert th.allclose(through, ensemble.sample(rows.observations, rows.actions)[0], atol=1e-5)
        rows = rows._replace(observations=rows.observations.detach() + 3)
