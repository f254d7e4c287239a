import pytest
import torch as th
from torch import nn

from sb3_mbpo.stacks import Stack, StaticAdam, rows_for, views_of

SHAPES: list[tuple[int, ...]] = [(6, 5), (4, 6), (2, 4)]
N, BATCH = 3, 7


def make_networks() -> list[nn.Sequential]:
    th.manual_seed(0)
    networks = []
    for _ in range(N):
        layers = [layer for n_out, n_in in SHAPES for layer in (nn.Linear(n_in, n_out), nn.ReLU())]
        networks.append(nn.Sequential(*layers[:-1]).double())
    return networks


def stacked(networks: list[nn.Sequential]) -> tuple[th.Tensor, list[th.Tensor]]:
    parameters: list[th.Tensor] = [p for network in networks for p in network.parameters()]
    rows = rows_for(len(networks), parameters)
    for view, parameter in zip(views_of(rows, parameters), parameters, strict=True):
        view.copy_(parameter.detach())
    return rows, parameters


def test_rows_are_aligned_and_views_cover_them():
    rows, parameters = stacked(make_networks())
    used = sum(p.numel() for p in parameters) // N
    assert rows.shape == (N, 128) and used <= 128 and not rows.requires_grad
    for view in views_of(rows, parameters):
        view.fill_(th.nan)
    assert rows[:, :used].isnan().all() and (rows[:, used:] == 0).all()


def test_forward_and_backward_are_those_of_autograd():
    networks = make_networks()
    rows, parameters = stacked(networks)
    grads = th.full_like(rows, th.nan)
    x, delta = th.randn(N, BATCH, 5, dtype=th.float64), th.randn(N, BATCH, 2, dtype=th.float64)
    stack = Stack(rows, SHAPES, grads)
    outputs = stack.forward(x)
    by_first = stack.backward(outputs, delta)
    for i, network in enumerate(networks):
        first = network[0](x[i])
        first.retain_grad()
        last = network[1:](first)
        assert th.allclose(outputs[-1][i], last)
        last.backward(delta[i])
        assert th.allclose(by_first[i], first.grad)
    for grad, parameter in zip(views_of(grads, parameters), parameters, strict=True):
        assert parameter.grad is not None and th.allclose(grad, parameter.grad)


def test_no_gradients_where_none_are_wanted():
    rows, _ = stacked(make_networks())
    before, stack = rows.clone(), Stack(rows, SHAPES)
    stack.backward(stack.forward(th.randn(N, BATCH, 5, dtype=th.float64)), th.ones(N, BATCH, 2, dtype=th.float64))
    assert th.equal(rows, before)


@pytest.mark.parametrize("sizes", [[3], [9000, 5], [8192, 20000, 1]])
def test_adam_is_that_of_torch(sizes):
    """Tensors longer than what is handed over in one piece, too, and parameters that joined at different times."""
    th.manual_seed(0)
    parameters = [nn.Parameter(th.randn(size, dtype=th.float64)) for size in sizes]
    reference = th.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.95), eps=1e-4)
    rows = rows_for(1, [*parameters])
    static = StaticAdam(reference, rows)
    tensors = views_of(rows, [*parameters])
    for view, parameter in zip(tensors, parameters, strict=True):
        view.copy_(parameter.detach())
    for rate in (0.1, 0.01, 0.01):
        reference.param_groups[0]["lr"] = rate
        static.learning_rate.fill_(rate)
        for view, parameter in zip(views_of(static.grads, [*parameters]), parameters, strict=True):
            parameter.grad = th.randn_like(parameter)
            view.copy_(parameter.grad)
        reference.step()
        static.step()
        assert all(th.allclose(ours, p, rtol=1e-12) for ours, p in zip(tensors, parameters, strict=True))
    moments = [reference.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in parameters]
    assert all(th.allclose(ours, theirs, rtol=1e-12) for ours, theirs in zip(static.views[len(sizes) :], moments, strict=True))


@pytest.mark.parametrize("counts", [[4.0, 4.0], [4.0, 9.0]])
def test_each_parameter_has_its_own_counter(counts):
    """From moments of zero, a gradient of one moves by lr sqrt(1 - beta2^t) / (1 - beta1^t) (1 - beta1) / sqrt(1 - beta2)."""
    parameters = [nn.Parameter(th.zeros(9000, dtype=th.float64)), nn.Parameter(th.zeros(2, dtype=th.float64))]
    rows = rows_for(1, parameters)
    static = StaticAdam(th.optim.Adam(parameters, eps=0), rows)
    static.grads.fill_(1)
    static.learning_rate.fill_(0.5)
    static.set_counters(counts)
    static.step()
    for view, t in zip(views_of(rows, parameters), (count + 1 for count in counts), strict=True):
        step = 0.5 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * 0.1 / 0.001**0.5
        assert th.allclose(view, th.tensor(-step, dtype=th.float64), rtol=1e-10)
