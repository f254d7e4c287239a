"""Networks of one shape side by side in static memory: few operations for all of them, and always at the same addresses."""

import math
from typing import Any

import torch as th
from torch.optim.adam import adam

# Numbers: rows begin where a GPU likes to read.
_ALIGNMENT = 64
# Numbers: the fused kernel of Adam gives a short tensor to one block of threads, so the work on a long one is divided.
_PIECE = 8192


def rows_for(n: int, parameters: list[th.Tensor]) -> th.Tensor:
    """Zeros for the parameters of ``n`` networks of one shape, a row each: ``(n, P)``."""
    size = sum(parameter.numel() for parameter in parameters) // n
    return parameters[0].new_zeros(n, -(-size // _ALIGNMENT) * _ALIGNMENT)


def views_of(rows: th.Tensor, parameters: list[th.Tensor]) -> list[th.Tensor]:
    """The parts of ``rows`` that stand for these parameters, network by network, in their shapes."""
    sizes = [parameter.numel() for parameter in parameters[: len(parameters) // len(rows)]]
    parts = [part for row in rows for part in row[: sum(sizes)].split(sizes)]
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def through_relu(delta: th.Tensor, output: th.Tensor) -> th.Tensor:
    """``delta * 1[output > 0]``"""
    return th.ops.aten.threshold_backward(delta, output, 0)


def _layers(rows: th.Tensor, shapes: list[tuple[int, ...]]) -> list[tuple[th.Tensor, th.Tensor]]:
    """The parts of ``rows`` that are weights ``(n, out, in)`` and biases ``(n, 1, out)``, layer by layer."""
    sizes = [size for shape in shapes for size in (math.prod(shape), shape[0])]
    parts = rows[:, : sum(sizes)].split(sizes, dim=1)
    return [(w.unflatten(1, shape), b.unsqueeze(1)) for w, b, shape in zip(parts[::2], parts[1::2], shapes, strict=True)]


class Stack:
    """
    ``n`` networks of linear layers with ReLU between them.

    :param rows: their parameters ``(n, P)``, weight and bias in turn
    :param shapes: ``(out, in)`` of each layer
    :param grads: where gradients go, laid out as ``rows``; ``None``: they are not wanted
    """

    def __init__(self, rows: th.Tensor, shapes: list[tuple[int, ...]], grads: th.Tensor | None = None) -> None:
        self.layers, self.grads = _layers(rows, shapes), [] if grads is None else _layers(grads, shapes)

    def forward(self, x: th.Tensor) -> list[th.Tensor]:
        """
        ``h_l = relu(h_{l-1} W_l^T + b_l)``, the last without relu.

        :param x: ``h_0``, ``(n, B, in)``
        :return: all ``h_l``, ``h_0`` included
        """
        outputs = [x]
        for weight, bias in self.layers:
            if len(outputs) > 1:
                outputs[-1].relu_()
            outputs.append(th.baddbmm(bias, outputs[-1], weight.transpose(1, 2)))
        return outputs

    def backward(self, outputs: list[th.Tensor], delta: th.Tensor) -> th.Tensor:
        """
        Set the gradients, if they are wanted.

        :param outputs: of :meth:`forward`; the last one is not looked at
        :param delta: the loss by the last output, ``(n, B, out)``
        :return: the loss by the first layer's output, before its relu
        """
        for i in reversed(range(len(self.layers))):
            if self.grads:
                th.bmm(delta.transpose(1, 2), outputs[i], out=self.grads[i][0])
                th.sum(delta, 1, keepdim=True, out=self.grads[i][1])
            if i > 0:
                delta = through_relu(th.bmm(delta, self.layers[i][0]), outputs[i])
        return delta


class StaticAdam:
    """
    What an Adam without options other than betas and eps does, on ``rows``; the learning rate is a tensor.

    :param optimizer: the one that it stands in for; all its parameters are in ``rows``
    :param rows: see :func:`rows_for`
    """

    def __init__(self, optimizer: Any, rows: th.Tensor) -> None:
        group = optimizer.param_groups[0]
        parameters = group["params"]
        (self.beta1, self.beta2), self.eps = group["betas"], group["eps"]
        self.learning_rate = rows.new_zeros(())
        self.grads, *moments = (th.zeros_like(rows) for _ in range(3))
        values, grads, averages, squares = (views_of(part, parameters) for part in (rows, self.grads, *moments))
        #: Parameters, first and second moments, each as :func:`views_of` orders them.
        self.views = [*values, *averages, *squares]
        self._pieces: list[Any] = [
            [piece for view in part for piece in view.flatten().split(_PIECE)] for part in (values, grads, averages, squares)
        ]
        counts = [-(-parameter.numel() // _PIECE) for parameter in parameters]
        # The fused kernel knows float32 counters only.
        self._counters = th.zeros(sum(counts), dtype=th.float32, device=rows.device)
        self._steps, self._counters_of = list(self._counters.unbind()), self._counters.split(counts)

    def set_counters(self, counts: list[float]) -> None:
        """:param counts: the steps so far of each parameter"""
        if len(set(counts)) == 1:
            self._counters.fill_(counts[0])
            return
        for counters, count in zip(self._counters_of, counts, strict=True):
            counters.fill_(count)

    def step(self) -> None:
        """One step from the gradients in ``grads``."""
        params, grads, averages, squares = self._pieces
        options: Any = {"lr": self.learning_rate, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "fused": True}
        adam(params, grads, averages, squares, [], self._steps, amsgrad=False, maximize=False, weight_decay=0.0, **options)
