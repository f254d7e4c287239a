import pytest
import torch as th
from torch import nn

from sb3_mbpo.fast_sac.side_stream import SideStream
from sb3_mbpo.fast_sac.stacks import LEAD, Mirror, Stack, StaticAdam, layers_of, lead_of, row_size, views_of

SHAPES: list[tuple[int, int]] = [(6, 5), (4, 6), (2, 4)]
N, BATCH = 3, 7
SIDE = SideStream(th.device("cpu"))


def make_networks() -> list[nn.Sequential]:
    th.manual_seed(0)
    networks = []
    for _ in range(N):
        layers = [layer for n_out, n_in in SHAPES for layer in (nn.Linear(n_in, n_out), nn.ReLU())]
        networks.append(nn.Sequential(*layers[:-1]).double())
    return networks


def stacked(networks: list[nn.Sequential]) -> tuple[th.Tensor, list[th.Tensor]]:
    parameters: list[th.Tensor] = [p for network in networks for p in network.parameters()]
    rows = th.zeros(len(networks), row_size(SHAPES), dtype=th.float64)
    for view, parameter in zip(views_of(rows, SHAPES), parameters, strict=True):
        view.copy_(parameter.detach())
    return rows, parameters


def behind_lead(x: th.Tensor) -> th.Tensor:
    return th.cat([lead_of(x.shape[1], x).expand(len(x), -1, -1), x], dim=2)


def test_rows_are_aligned_and_zero_between_parameters():
    rows, parameters = stacked(make_networks())
    assert rows.shape[1] % 64 == 0
    for view in views_of(rows, SHAPES):
        view.fill_(th.nan)
    assert rows.isnan().sum() == sum(p.numel() for p in parameters) and rows.nansum() == 0


def test_heads_are_one_layer():
    """Weight and bias of two heads, where one layer of twice the size has its own."""
    rows = th.zeros(1, row_size(SHAPES))
    views = views_of(rows, SHAPES, heads=2)
    assert [view.shape for view in views[-4:]] == [(1, 4), (1,), (1, 4), (1,)]
    for i, view in enumerate(views):
        view.fill_(i)
    weight, bias = views_of(rows, SHAPES)[-2:]
    assert weight.tolist() == [[4] * 4, [6] * 4] and bias.tolist() == [5, 7]


def test_lead_is_what_a_bias_stands_against():
    assert lead_of(2, th.zeros((), dtype=th.float64)).tolist() == [[1] + (LEAD - 1) * [0]] * 2


def test_forward_and_backward_are_those_of_autograd():
    networks = make_networks()
    rows, parameters = stacked(networks)
    grads = th.zeros_like(rows)
    x, delta = th.randn(N, BATCH, 5, dtype=th.float64), th.randn(N, BATCH, 2, dtype=th.float64)
    stack = Stack(rows, SHAPES, (N, BATCH), SIDE)
    # What an earlier call left is no part of it.
    for given in (th.full_like(x, 9), x):
        outputs = stack.forward(behind_lead(given))
    by_first = stack.backward(outputs, delta, layers_of(grads.fill_(th.nan), SHAPES))
    for i, network in enumerate(networks):
        first = network[0](x[i])
        first.retain_grad()
        last = network[1:](first)
        assert th.allclose(outputs[-1][i], last)
        last.backward(delta[i])
        assert th.allclose(by_first[i], first.grad)
    for grad, parameter in zip(views_of(grads, SHAPES), parameters, strict=True):
        assert parameter.grad is not None and th.allclose(grad, parameter.grad)
        grad.fill_(0)
    # Zeros between parameters have no gradient, or Adam would move them.
    used = sum(layer[0].numel() for layer in layers_of(rows, SHAPES))
    assert (grads[:, :used] == 0).all()


def test_one_network_for_several_inputs():
    network = make_networks()[0]
    rows, _ = stacked([network])
    x = th.randn(2, BATCH, 5, dtype=th.float64)
    assert th.allclose(Stack(rows, SHAPES, (2, BATCH), SIDE).forward(behind_lead(x))[-1], network(x))


def test_no_gradients_where_none_are_wanted():
    networks = make_networks()
    rows, _ = stacked(networks)
    before, stack, x = rows.clone(), Stack(rows, SHAPES, (N, BATCH), SIDE), th.randn(N, BATCH, 5, dtype=th.float64)
    delta = stack.backward(stack.forward(behind_lead(x)), th.ones(N, BATCH, 2, dtype=th.float64))
    assert delta.shape == (N, BATCH, 6) and th.equal(rows, before)


def test_mirror_holds_tensors_in_another_order():
    th.manual_seed(0)
    memory = th.full((12,), th.nan)
    mirror = Mirror(memory, lambda part: [part[6:12].view(2, 3)[:, 1:], part[2:4], part[5:6]])
    tensors = [th.randn(2, 2), th.randn(2), th.randn(1)]
    mirror.read(tensors)
    (a, b), (c, d) = tensors[0].tolist()
    assert mirror.memory is memory and memory.tolist() == [
        0,
        0,
        *tensors[1].tolist(),
        0,
        *tensors[2].tolist(),
        0,
        a,
        b,
        0,
        c,
        d,
    ]
    memory += 1
    expected = [tensor + 1 for tensor in tensors]
    mirror.write(tensors)
    assert all(th.equal(ours, theirs) for ours, theirs in zip(tensors, expected, strict=True))
    # It reads what is there now, and zeros where nothing is mirrored.
    tensors[1].zero_()
    mirror.read(tensors)
    assert memory[:5].tolist() == [0] * 5


def parts_of(parameters: list[nn.Parameter]) -> list[list[th.Tensor]]:
    """Parameters, gradients and moments of each."""
    return [[p.detach().clone().flatten(), *(th.zeros(p.numel(), dtype=p.dtype) for _ in range(3))] for p in parameters]


@pytest.mark.parametrize("sizes", [[3], [9000, 5], [8192, 20000, 1]])
def test_adam_is_that_of_torch(sizes):
    """Tensors longer than what is handed over in one piece, too."""
    th.manual_seed(0)
    parameters = [nn.Parameter(th.randn(size, dtype=th.float64)) for size in sizes]
    reference, parts = th.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.95), eps=1e-4), parts_of(parameters)
    static = StaticAdam(reference.param_groups[0], parts)
    for rate in (0.1, 0.01, 0.01):
        reference.param_groups[0]["lr"] = rate
        static.learning_rate.fill_(rate)
        for (_, grad, *_), parameter in zip(parts, parameters, strict=True):
            parameter.grad = th.randn_like(parameter)
            grad.copy_(parameter.grad)
        reference.step()
        static.step()
        for (ours, _, *moments), parameter in zip(parts, parameters, strict=True):
            state = reference.state[parameter]
            theirs = [parameter, state["exp_avg"], state["exp_avg_sq"]]
            assert all(th.allclose(a, b, rtol=1e-12) for a, b in zip([ours, *moments], theirs, strict=True))


@pytest.mark.parametrize("counts", [[4.0, 4.0], [4.0, 9.0]])
def test_each_part_has_its_own_counter(counts):
    """From moments of zero, a gradient of one moves by lr sqrt(1 - beta2^t) / (1 - beta1^t) (1 - beta1) / sqrt(1 - beta2)."""
    parameters = [nn.Parameter(th.zeros(9000, dtype=th.float64)), nn.Parameter(th.zeros(2, dtype=th.float64))]
    parts = parts_of(parameters)
    static = StaticAdam(th.optim.Adam(parameters, eps=0).param_groups[0], parts)
    static.learning_rate.fill_(0.5)
    static.set_counters(counts)
    for _, grad, *_ in parts:
        grad.fill_(1)
    static.step()
    for (values, *_), t in zip(parts, (count + 1 for count in counts), strict=True):
        step = 0.5 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * 0.1 / 0.001**0.5
        assert th.allclose(values, th.tensor(-step, dtype=th.float64), rtol=1e-10)


def test_zeros_without_gradient_stay_zeros():
    """Which is what stands between parameters."""
    parts = parts_of([nn.Parameter(th.zeros(5))])
    static = StaticAdam(th.optim.Adam([nn.Parameter(th.zeros(5))]).param_groups[0], parts)
    static.learning_rate.fill_(1)
    static.step()
    assert all((tensor == 0).all() for tensor in parts[0])
