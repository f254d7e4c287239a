"""The ensemble's training loss with an explicit gradient, which avoids autograd's overhead."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_mbpo.dynamics.layers import LAYER_NORM_EPS, EnsembleLinear, EnsembleMLP

# Maps standardized inputs and targets, each (members, rows, ...), to the loss; stores its gradient in the parameters' grad.
Gradient = Callable[[th.Tensor, th.Tensor], th.Tensor]


def autograd_of(loss_of: Gradient, parameters: Iterable[nn.Parameter]) -> Gradient:
    """
    Compute the gradient of any loss by autograd.

    :param loss_of: maps standardized inputs and targets to the loss
    :param parameters: parameters whose ``grad`` is set
    :return: see :data:`Gradient`
    """
    parameters = list(parameters)

    def gradient(x: th.Tensor, y: th.Tensor) -> th.Tensor:
        loss = loss_of(x, y)
        for parameter, value in zip(parameters, th.autograd.grad(loss, parameters), strict=True):
            parameter.grad = value
        return loss.detach()

    return gradient


def is_replaced(part: Any, kind: type, *names: str) -> bool:
    """
    :param part: a module
    :param kind: its original class
    :param names: methods of ``kind``
    :return: whether ``part`` replaces one of the methods, in its class or instance, or has hooks
    """
    hooked = any(vars(part)[f"_{hooks}"] for hooks in ("forward_pre_hooks", "forward_hooks", "backward_hooks"))
    return hooked or any(name in vars(part) or getattr(type(part), name, None) is not getattr(kind, name) for name in names)


class LikelihoodGradient:
    """
    Loss and gradient of an ensemble of Gaussians.

    With mu and raw log-variance r from the network, and the soft bounds of Chua et al. (2018), appendix A.1:

        l' = max - softplus(max - r),  l = min + softplus(l' - min)
        L  = sum over members of mean(w ((mu - y)^2 exp(-l) + l)) + 0.01 (sum(max) - sum(min)),  w = exp(beta l)

    No gradient flows through w. The mean and the sums are over the targets that vary. Memory for activations is allocated once
    per batch size.

    :param mlp: its output is mu and r, concatenated
    :param bounds: min and max, ``(targets,)`` each
    :param varies: 1 for targets that vary, 0 for constant ones, ``(targets,)``
    :param beta: see :class:`.ProbabilisticEnsemble`
    """

    @staticmethod
    def covers(mlp: nn.Module) -> bool:
        """
        :param mlp: the networks
        :return: whether the explicit gradient supports them
        """
        return not is_replaced(mlp, EnsembleMLP, "forward") and not any(
            is_replaced(layer, EnsembleLinear, "forward") for layer in mlp.layers  # type: ignore[union-attr]
        )

    def __init__(self, mlp: EnsembleMLP, bounds: Sequence[nn.Parameter], varies: th.Tensor, beta: float) -> None:
        self.beta = beta
        self.bounds, self.varies, self.layer_norm = list(bounds), varies, mlp.layer_norm
        self.n_targets = max(float(varies.sum()), 1.0)
        layers: list[Any] = [*mlp.layers]
        self.layers: list[tuple[nn.Parameter, nn.Parameter]] = [(layer.weight, layer.bias) for layer in layers]
        self.memory: dict[int, tuple[list[th.Tensor], ...]] = {}
        for parameter in [p for pair in self.layers for p in pair] + self.bounds:
            if parameter.grad is None:
                parameter.grad = th.zeros_like(parameter)

    def _memory_for(self, rows: int) -> tuple[list[th.Tensor], ...]:
        """:return: for each layer, its value before SiLU, after SiLU (not for the last), and the gradient of the former"""
        if rows not in self.memory:
            values = [weight.detach().new_empty(len(weight), rows, weight.shape[2]) for weight, _ in self.layers]
            self.memory[rows] = (values, [th.empty_like(v) for v in values[:-1]], [th.empty_like(v) for v in values])
        return self.memory[rows]

    @th.no_grad()
    def __call__(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        :param x: standardized inputs ``(members, rows, inputs)``
        :param y: standardized targets ``(members, rows, targets)``
        :return: L, a scalar; its gradient is stored in the parameters' ``grad``
        """
        values, outputs, deltas = self._memory_for(x.shape[1])
        inputs, norms = [x, *outputs], []
        for i, (weight, bias) in enumerate(self.layers):
            th.baddbmm(bias, inputs[i], weight, out=values[i])
            if i < len(outputs):
                th.ops.aten.silu.out(values[i], out=outputs[i])
                if self.layer_norm:
                    norms.append(th.native_layer_norm(outputs[i], outputs[i].shape[-1:], None, None, LAYER_NORM_EPS))
                    inputs[i + 1] = norms[i][0]
        loss = self._likelihood(values[-1], y, deltas[-1])
        for i in reversed(range(len(self.layers))):
            weight, bias = self.layers[i]
            assert weight.grad is not None and bias.grad is not None
            th.bmm(inputs[i].transpose(1, 2), deltas[i], out=weight.grad)
            th.sum(deltas[i], 1, keepdim=True, out=bias.grad)
            if i > 0:
                before = th.bmm(deltas[i], weight.transpose(1, 2), out=deltas[i - 1])
                if self.layer_norm:
                    _, mean, rstd = norms[i - 1]
                    output, wanted = outputs[i - 1], [True, False, False]
                    before.copy_(
                        th.ops.aten.native_layer_norm_backward(
                            before, output, output.shape[-1:], mean, rstd, None, None, wanted
                        )[0]
                    )
                th.ops.aten.silu_backward.grad_input(before, values[i - 1], grad_input=before)
        return loss

    def _likelihood(self, out: th.Tensor, y: th.Tensor, delta: th.Tensor) -> th.Tensor:
        """:return: L for the network's ``out``; its gradients are stored in ``delta`` and in the ``grad`` of the bounds"""
        least, most = self.bounds
        mean, raw = out.chunk(2, dim=-1)
        by_mean, by_raw = delta.chunk(2, dim=-1)
        room_above = most - raw
        bounded = most - nn.functional.softplus(room_above)
        room_below = bounded - least
        log_variance = least + nn.functional.softplus(room_below)

        error, precision = mean - y, (-log_variance).exp()
        weighted = error * precision
        share = self.varies / (y.shape[1] * self.n_targets)
        if self.beta:
            share = share * (self.beta * log_variance).exp()
        th.mul(weighted, 2 * share, out=by_mean)
        by_log_variance = (1 - error * weighted) * share
        by_bounded = by_log_variance * room_below.sigmoid()
        th.mul(by_bounded, room_above.sigmoid(), out=by_raw)
        assert least.grad is not None and most.grad is not None
        th.sum(by_log_variance - by_bounded, (0, 1), out=least.grad).sub_(0.01 * self.varies)
        th.sum(by_bounded - by_raw, (0, 1), out=most.grad).add_(0.01 * self.varies)
        return ((error * weighted + log_variance) * share).sum() + 0.01 * ((most - least) * self.varies).sum()
