"""Networks of one shape side by side in static memory: few operations for all of them, and always at the same addresses."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch as th
from torch.optim.adam import adam

from sb3_mbpo.fast_sac.side_stream import SideStream

# Numbers in front of each input, a one and zeros, and of each row of weights, a bias and zeros: one product does both.
# Four, so that what comes after them begins where a GPU likes to read, if layers are a multiple of four wide.
LEAD = 4
# Numbers: so do whole networks, and their moments for Adam.
_ALIGNMENT = 64
# Numbers: the fused kernel of Adam gives a short tensor to one block of threads, so the work on a long one is divided.
_PIECE = 4096

Shapes = list[tuple[int, int]]


def _sizes(shapes: Shapes) -> list[int]:
    return [n_out * (LEAD + n_in) for n_out, n_in in shapes]


def aligned(size: int) -> int:
    """The room for so many numbers."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def row_size(shapes: Shapes) -> int:
    """The room for a network with layers of these shapes ``(out, in)``."""
    return aligned(sum(_sizes(shapes)))


def layers_of(rows: th.Tensor, shapes: Shapes) -> list[th.Tensor]:
    """The parts of ``rows (n, row_size)`` that are ``[bias, 0, 0, 0, weight]``, ``(n, out, LEAD + in)``, layer by layer."""
    sizes = _sizes(shapes)
    parts = rows[:, : sum(sizes)].split(sizes, dim=1)
    return [part.unflatten(1, (n_out, -1)) for part, (n_out, _) in zip(parts, shapes, strict=True)]


def views_of(rows: th.Tensor, shapes: Shapes, heads: int = 1) -> list[th.Tensor]:
    """
    The parts of ``rows`` that stand for weight and bias of each linear layer in turn, network by network.

    :param rows: ``(n, row_size)``
    :param shapes: ``(out, in)`` of each layer
    :param heads: linear layers that the last one consists of
    """
    layers = layers_of(rows, shapes)
    parts = [part for network in zip(*layers, strict=True) for part in (*network[:-1], *network[-1].chunk(heads))]
    return [view for part in parts for view in (part[:, LEAD:], part[:, 0])]


def lead_of(rows: int, like: th.Tensor) -> th.Tensor:
    """What stands in front of an input: a one and zeros, ``(rows, LEAD)``."""
    return like.new_tensor([1.0] + [0.0] * (LEAD - 1)).repeat(rows, 1)


class Stack:
    """
    ``n`` networks of linear layers with ReLU between them.

    :param rows: their parameters ``(n, row_size)``
    :param shapes: ``(out, in)`` of each layer
    :param inputs: how many inputs there will be, ``(m, B)``; ``m`` is ``n``, or any number if ``n`` is one
    :param side: where gradients are computed, beside what the next layer waits for
    """

    def __init__(self, rows: th.Tensor, shapes: Shapes, inputs: tuple[int, int], side: SideStream) -> None:
        self.layers, lead = layers_of(rows, shapes), lead_of(inputs[1], rows).expand(*inputs, -1)
        self._hidden = [th.cat([lead, rows.new_zeros(*inputs, n_out)], dim=2) for n_out, _ in shapes[:-1]]
        self._side = side

    def forward(self, x: th.Tensor) -> list[th.Tensor]:
        """
        ``h_l = relu(h_{l-1} W_l^T + b_l)``, the last without relu.

        :param x: ``h_0`` behind its lead, ``(m, B, LEAD + in)``
        :return: all ``h_l``, ``h_0`` included, each behind its lead but the last; overwritten by the next call
        """
        outputs = [x, *self._hidden]
        for layer, before, hidden in zip(self.layers, outputs, self._hidden, strict=False):
            th.bmm(before, layer.transpose(1, 2).expand(len(x), -1, -1), out=hidden[:, :, LEAD:])
            hidden.relu_()
        return [*outputs, th.bmm(outputs[-1], self.layers[-1].transpose(1, 2).expand(len(x), -1, -1))]

    def backward(self, outputs: list[th.Tensor], delta: th.Tensor, grads: Sequence[th.Tensor] = ()) -> th.Tensor:
        """
        :param outputs: of :meth:`forward`, ``n`` of them; the last one is not looked at
        :param delta: the loss by the last output, ``(n, B, out)``
        :param grads: where the loss by each layer goes, if it is wanted: :func:`layers_of` rows of their own; then all that
            runs beside is joined
        :return: the loss by the first layer's output, before its relu
        """
        deltas = [delta]
        for i in reversed(range(len(self.layers))):
            if grads:
                with self._side.beside():
                    th.bmm(deltas[-1].transpose(1, 2), outputs[i], out=grads[i])
            if i > 0:
                # delta W_i where h_i > 0: relu's derivative, in one operation.
                delta = th.bmm(deltas[-1], self.layers[i][:, :, LEAD:])
                deltas.append(th.ops.aten.threshold_backward(delta, outputs[i][:, :, LEAD:], 0))
        if grads:
            self._side.join()
        return deltas[-1]


class Mirror:
    """
    Memory that holds the numbers of other tensors in an order of its own, with zeros between them.

    :param memory: ``(N,)``; zero where no view looks
    :param views: given ``memory`` or its like, the parts that stand for the tensors, in their order, of their sizes
    """

    def __init__(self, memory: th.Tensor, views: Callable[[th.Tensor], list[th.Tensor]]) -> None:
        self.memory, self._zero = memory, memory.new_zeros(1)
        parts = views(index := th.zeros(memory.shape, dtype=th.int64))
        self._sizes = [part.numel() for part in parts]
        # Of each place in memory its place among all numbers of the tensors, after a zero; and the other way round.
        for part, numbers in zip(parts, (1 + th.arange(sum(self._sizes))).split(self._sizes), strict=True):
            part.copy_(numbers.view_as(part))
        places = index.argsort(stable=True)[len(index) - sum(self._sizes) :]
        self._index, self._places = index.to(memory.device), places.to(memory.device)

    def read(self, tensors: list[th.Tensor]) -> None:
        """Take over what the tensors hold."""
        numbers = th.cat([self._zero, *(tensor.reshape(-1) for tensor in tensors)])
        th.index_select(numbers, 0, self._index, out=self.memory)

    def write(self, tensors: list[th.Tensor]) -> None:
        """Let the tensors hold what stands in memory."""
        parts = self.memory.index_select(0, self._places).split(self._sizes)
        th._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


class StaticAdam:
    """
    What Adams without options other than betas and eps do, each on a part of its own; the learning rate is a tensor.

    A number whose gradient and moments are zero stays as it is, unless eps is zero.

    :param group: their settings, as in ``param_groups``
    :param parts: of each, parameters, gradients, first and second moments: ``(N,)``
    """

    def __init__(self, group: Any, parts: Sequence[Sequence[th.Tensor]]) -> None:
        (self.beta1, self.beta2), self.eps = group["betas"], group["eps"]
        self.learning_rate = parts[0][0].new_zeros(())
        pieces = [[tensor.split(_PIECE) for tensor in part] for part in parts]
        self._pieces: list[Any] = [[*chain(*tensors)] for tensors in zip(*pieces, strict=True)]
        counts = [len(values) for values, *_ in pieces]
        # The fused kernel knows float32 counters only.
        counters = th.zeros(sum(counts), dtype=th.float32, device=self.learning_rate.device)
        self._steps, self._counters_of = list(counters.unbind()), counters.split(counts)

    def set_counters(self, counts: Sequence[float]) -> None:
        """:param counts: the steps so far of each part"""
        for counters, count in zip(self._counters_of, counts, strict=True):
            counters.fill_(count)

    def step(self) -> None:
        """One step from the gradients."""
        params, grads, averages, squares = self._pieces
        options: Any = {"lr": self.learning_rate, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "fused": True}
        adam(params, grads, averages, squares, [], self._steps, amsgrad=False, maximize=False, weight_decay=0.0, **options)
