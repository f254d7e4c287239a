"""
Ensembles with explicit gradients with respect to their inputs only.

A policy that is trained with gradients through the dynamics does not need gradients of the weights. One matrix product
computes a layer of all members, and autograd stores a single entry for all layers.
"""

from collections.abc import Sequence
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_mbpo.dynamics.fused_nll import LikelihoodGradient, is_replaced
from sb3_mbpo.dynamics.layers import LAYER_NORM_EPS, EnsembleMLP

# Weight and bias of a layer, (M, in_size, out_size) and (M, 1, out_size).
Weights = list[tuple[th.Tensor, th.Tensor]]


class InputGradient:
    """
    Computes some members of an ensemble, with gradients with respect to their inputs only.

    :param mlp: the ensemble
    """

    def __init__(self, mlp: EnsembleMLP) -> None:
        self.mlp = mlp
        self._state: list[Any] = []
        self._chosen: Weights = []

    def __call__(self, x: th.Tensor, members: Sequence[int] | None = None) -> th.Tensor:
        """
        :param x: inputs of each member ``(M, B, in_size)``
        :param members: indices of the M members; ``None``: all members, in order
        :return: ``(M, B, out_size)``
        """
        layers: list[Any] = [*self.mlp.layers]
        weights = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
        if members is not None:
            weights = self._of(members, weights)
        return _Through.apply(x, weights, self.mlp.layer_norm)  # type: ignore[no-any-return]

    def covers(self) -> bool:
        """Whether the explicit gradient supports these networks."""
        return LikelihoodGradient.covers(self.mlp) and not is_replaced(self.mlp, EnsembleMLP, "member")

    def rows(self, x: th.Tensor, members: Sequence[int], places: th.Tensor) -> th.Tensor:
        """
        Compute each row with one member.

        :param x: inputs ``(B, in_size)``
        :param members: indices of M members
        :param places: a different number for each row, ``(B,)``; with S = ceil(B / M), numbers from 0 to S - 1 are rows of the
            first member, from S to 2 S - 1 of the second, and so on
        :return: outputs ``(B, out_size)``
        """
        size = -(-len(x) // len(members))
        if x.requires_grad and self.covers():
            lined_up = x.new_zeros(size * len(members), x.shape[1]).index_copy(0, places, x)
            return self(lined_up.unflatten(0, (len(members), size)), members).flatten(0, 1)[places]
        order = places.argsort()
        lines = x[order].split((places // size).bincount(minlength=len(members)).tolist())
        output = th.cat([self.mlp.member(i, line) for i, line in zip(members, lines, strict=True)])
        return output.index_copy(0, order, output)

    def forget(self) -> None:
        """Call this when the weights have changed. Not every optimizer increases the version counter of tensors."""
        self._state = []

    def _of(self, members: Sequence[int], weights: Weights) -> Weights:
        """Copy some members' weights. A copy costs as much as a matrix product, so it is kept until the weights change."""
        tensors = [tensor for pair in weights for tensor in pair]
        state = [*members, *((tensor.data_ptr(), tensor._version) for tensor in tensors)]
        if state != self._state:
            chosen = th.as_tensor(members, device=tensors[0].device)
            self._chosen = [(weight[chosen], bias[chosen]) for weight, bias in weights]
            self._state = state
        return self._chosen


class _Through(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weights: Weights, layer_norm: bool) -> th.Tensor:  # type: ignore[override]
        values, norms = [], []
        for weight, bias in weights[:-1]:
            values.append(th.baddbmm(bias, x, weight))
            x = th.nn.functional.silu(values[-1])
            if layer_norm:
                normalized, mean, rstd = th.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
                norms.append((x, x.shape[-1:], mean, rstd, None, None, [True, False, False]))
                x = normalized
        ctx.weights, ctx.values, ctx.norms = weights, values, norms
        return th.baddbmm(weights[-1][1], x, weights[-1][0])

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, delta: th.Tensor) -> tuple[th.Tensor, None, None]:  # type: ignore[override]
        for i in reversed(range(len(ctx.weights))):
            delta = th.bmm(delta, ctx.weights[i][0].transpose(1, 2))
            if i > 0:
                if ctx.norms:
                    delta = th.ops.aten.native_layer_norm_backward(delta, *ctx.norms[i - 1])[0]
                delta = th.ops.aten.silu_backward(delta, ctx.values[i - 1])
        return delta, None, None
