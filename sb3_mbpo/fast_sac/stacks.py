"""Networks of equal shape in one block of static memory: few operations for all of them, and constant addresses."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch as th
from torch.optim.adam import adam

from sb3_mbpo.fast_sac.side_stream import SideStream

# Number of values before each input (a one and zeros) and before each row of weights (a bias and zeros): one matrix product
# then includes the bias. Four values keep the rest aligned if layer sizes are multiples of four.
LEAD = 4
# Networks and their Adam moments start at multiples of this many values.
_ALIGNMENT = 64
# Long tensors are split into pieces of this many values, because Adam's fused kernel uses one thread block per short tensor.
_PIECE = 4096

Shapes = list[tuple[int, int]]


def _sizes(shapes: Shapes) -> list[int]:
    return [n_out * (LEAD + n_in) for n_out, n_in in shapes]


def aligned(size: int) -> int:
    """:return: number of values that ``size`` values take in memory, with alignment"""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def row_size(shapes: Shapes) -> int:
    """:return: number of values that a network with layers of these shapes ``(out, in)`` takes in memory"""
    return aligned(sum(_sizes(shapes)))


def layers_of(rows: th.Tensor, shapes: Shapes) -> list[th.Tensor]:
    """:return: for each layer, its part ``[bias, 0, 0, 0, weight]`` of ``rows (n, row_size)``, ``(n, out, LEAD + in)``"""
    sizes = _sizes(shapes)
    parts = rows[:, : sum(sizes)].split(sizes, dim=1)
    return [part.unflatten(1, (n_out, -1)) for part, (n_out, _) in zip(parts, shapes, strict=True)]


def views_of(rows: th.Tensor, shapes: Shapes, heads: int = 1) -> list[th.Tensor]:
    """
    The parts of ``rows`` with weight and bias of each linear layer, ordered by network and layer.

    :param rows: memory of ``n`` networks ``(n, row_size)``
    :param shapes: ``(out, in)`` of each layer
    :param heads: number of linear layers that are combined in the last one
    :return: views of ``rows``
    """
    layers = layers_of(rows, shapes)
    parts = [part for network in zip(*layers, strict=True) for part in (*network[:-1], *network[-1].chunk(heads))]
    return [view for part in parts for view in (part[:, LEAD:], part[:, 0])]


def lead_of(rows: int, like: th.Tensor) -> th.Tensor:
    """:return: the values before an input: a one and zeros, ``(rows, LEAD)``"""
    return like.new_tensor([1.0] + [0.0] * (LEAD - 1)).repeat(rows, 1)


class Stack:
    """
    ``n`` networks of linear layers with ReLU between them.

    :param rows: Their parameters ``(n, row_size)``
    :param shapes: ``(out, in)`` of each layer
    :param inputs: Shape ``(m, B)`` of the inputs; ``m`` is ``n``, or any number if ``n`` is 1
    :param side: Stream for the gradients of the weights, which the next layer does not need
    """

    def __init__(self, rows: th.Tensor, shapes: Shapes, inputs: tuple[int, int], side: SideStream) -> None:
        self.layers, lead = layers_of(rows, shapes), lead_of(inputs[1], rows).expand(*inputs, -1)
        self._hidden = [th.cat([lead, rows.new_zeros(*inputs, n_out)], dim=2) for n_out, _ in shapes[:-1]]
        self._side = side

    def forward(self, x: th.Tensor) -> list[th.Tensor]:
        """
        ``h_l = relu(h_{l-1} W_l^T + b_l)``, the last one without relu.

        :param x: ``h_0`` after its lead, ``(m, B, LEAD + in)``
        :return: all ``h_l`` including ``h_0``, each after its lead except the last; overwritten by the next call
        """
        outputs = [x, *self._hidden]
        for layer, before, hidden in zip(self.layers, outputs, self._hidden, strict=False):
            th.bmm(before, layer.transpose(1, 2).expand(len(x), -1, -1), out=hidden[:, :, LEAD:])
            hidden.relu_()
        return [*outputs, th.bmm(outputs[-1], self.layers[-1].transpose(1, 2).expand(len(x), -1, -1))]

    def backward(self, outputs: list[th.Tensor], delta: th.Tensor, grads: Sequence[th.Tensor] = ()) -> th.Tensor:
        """
        Compute gradients.

        :param outputs: outputs of :meth:`forward` for ``n`` inputs; the last one is not used
        :param delta: gradient of the last output, ``(n, B, out)``
        :param grads: :func:`layers_of` separate rows, where the gradients of the layers are stored, and the side stream is
            joined; empty: they are not computed
        :return: gradient of the first layer's output, before its relu
        """
        deltas = [delta]
        for i in reversed(range(len(self.layers))):
            if grads:
                with self._side.beside():
                    th.bmm(deltas[-1].transpose(1, 2), outputs[i], out=grads[i])
            if i > 0:
                # delta W_i where h_i > 0: the gradient of relu, in one operation.
                delta = th.bmm(deltas[-1], self.layers[i][:, :, LEAD:])
                deltas.append(th.ops.aten.threshold_backward(delta, outputs[i][:, :, LEAD:], 0))
        if grads:
            self._side.join()
        return deltas[-1]


class Mirror:
    """
    Memory with a copy of other tensors, in a different order and with zeros between them.

    :param memory: The memory ``(N,)``; zero outside of all views
    :param views: Maps ``memory``, or a tensor of its shape, to the parts that correspond to the tensors, in their order
    """

    def __init__(self, memory: th.Tensor, views: Callable[[th.Tensor], list[th.Tensor]]) -> None:
        self.memory, self._zero = memory, memory.new_zeros(1)
        parts = views(index := th.zeros(memory.shape, dtype=th.int64))
        self._sizes = [part.numel() for part in parts]
        # Index in memory -> index among all values of the tensors, after a zero; and the inverse.
        for part, numbers in zip(parts, (1 + th.arange(sum(self._sizes))).split(self._sizes), strict=True):
            part.copy_(numbers.view_as(part))
        places = index.argsort(stable=True)[len(index) - sum(self._sizes) :]
        self._index, self._places = index.to(memory.device), places.to(memory.device)

    def read(self, tensors: list[th.Tensor]) -> None:
        """Copy the tensors to memory."""
        numbers = th.cat([self._zero, *(tensor.reshape(-1) for tensor in tensors)])
        th.index_select(numbers, 0, self._index, out=self.memory)

    def write(self, tensors: list[th.Tensor]) -> None:
        """Copy memory to the tensors."""
        parts = self.memory.index_select(0, self._places).split(self._sizes)
        th._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


class StaticAdam:
    """
    Several Adam optimizers with the same settings, without options other than betas and eps. The learning rate is a tensor.

    A parameter whose gradient and moments are zero does not change, unless eps is zero.

    :param group: Settings of the optimizers, as in ``param_groups``
    :param parts: For each optimizer: parameters, gradients, first and second moments, each ``(N,)``
    """

    def __init__(self, group: Any, parts: Sequence[Sequence[th.Tensor]]) -> None:
        (self.beta1, self.beta2), self.eps = group["betas"], group["eps"]
        self.learning_rate = parts[0][0].new_zeros(())
        pieces = [[tensor.split(_PIECE) for tensor in part] for part in parts]
        self._pieces: list[Any] = [[*chain(*tensors)] for tensors in zip(*pieces, strict=True)]
        counts = [len(values) for values, *_ in pieces]
        # The fused kernel needs float32 counters.
        counters = th.zeros(sum(counts), dtype=th.float32, device=self.learning_rate.device)
        self._steps, self._counters_of = list(counters.unbind()), counters.split(counts)

    def set_counters(self, counts: Sequence[float]) -> None:
        """:param counts: number of steps so far of each optimizer"""
        for counters, count in zip(self._counters_of, counts, strict=True):
            counters.fill_(count)

    def step(self) -> None:
        """Do one step with the current gradients."""
        params, grads, averages, squares = self._pieces
        options: Any = {"lr": self.learning_rate, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "fused": True}
        adam(params, grads, averages, squares, [], self._steps, amsgrad=False, maximize=False, weight_decay=0.0, **options)
