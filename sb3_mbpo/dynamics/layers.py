"""The layers of an ensemble: every member's matrix product in one batched call, and the standardiser of its data."""

from itertools import pairwise
from typing import Any

import torch as th
from torch import nn

# Beside its magnitude a spread this small is rounding of float32, and the dimension constant.
ROUNDING = 1e-6
# Added to the variance of a layer's outputs by layer normalization: that of a layer that has not learned yet is small.
LAYER_NORM_EPS = 1e-3


class EnsembleLinear(nn.Module):
    """
    ``n_members`` independent affine maps, computed as one batched matrix product.

    The weights start as the original code draws them: normal, cut at two standard deviations,
    of standard deviation 1 / (2 sqrt(in_size)); the biases start at zero.

    :param n_members: number of maps
    :param in_size: input features
    :param out_size: output features
    :param generator: source of the initial weights; the global generators are not touched
    """

    def __init__(self, n_members: int, in_size: int, out_size: int, generator: th.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.empty(n_members, in_size, out_size))
        self.bias = nn.Parameter(th.zeros(n_members, 1, out_size))
        std = 0.5 / in_size**0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std, generator=generator)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: ``(members, B, out_size)`` of ``x (members, B, in_size)``"""
        return th.baddbmm(self.bias, x, self.weight)

    def member(self, i: int, x: th.Tensor) -> th.Tensor:
        """:return: ``(B, out_size)``, what member ``i`` makes of ``x (B, in_size)``"""
        return th.addmm(self.bias[i], x, self.weight[i])


class EnsembleMLP(nn.Module):
    """
    ``n_members`` independent multi-layer perceptrons with SiLU between the layers and a linear output.

    :param n_members: number of networks
    :param in_size: input features
    :param out_size: output features
    :param net_arch: sizes of the hidden layers, the same for every member
    :param generator: source of the initial weights (a CPU generator)
    :param layer_norm: normalize what goes into each layer but the first, without learned scale and shift
    """

    normalized: th.Tensor

    def __init__(
        self,
        n_members: int,
        in_size: int,
        out_size: int,
        net_arch: list[int],
        generator: th.Generator,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        # In the state dict: the shapes of the weights do not tell.
        self.register_buffer("normalized", th.tensor(float(layer_norm)))
        sizes = [in_size, *net_arch, out_size]
        self.layers = nn.ModuleList(EnsembleLinear(n_members, n_in, n_out, generator) for n_in, n_out in pairwise(sizes))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.normalized.fill_(float(self.layer_norm))
        given = state_dict.get(f"{prefix}normalized")
        # SB3's own tests load random numbers.
        if given is not None and float(given) in (0.0, 1.0) and bool(given) != self.layer_norm:
            args[-1].append(
                f"{prefix}layer_norm is {self.layer_norm}, that of the file is {bool(given)}; the agent must be made with "
                "dynamics_kwargs: layer_norm of the file"
            )

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: ``(members, B, out_size)`` of ``x (members, B, in_size)``"""
        *hidden, last = self.layers
        for layer in hidden:
            x = self._normalize(nn.functional.silu(layer(x)))
        return last(x)

    def _normalize(self, x: th.Tensor) -> th.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) if self.layer_norm else x

    def member(self, i: int, x: th.Tensor) -> th.Tensor:
        """:return: ``(B, out_size)``, what member ``i`` makes of ``x (B, in_size)``"""
        *hidden, last = self.layers
        for layer in hidden:
            # In place: fresh memory for every layer costs as much as the function itself.
            x = self._normalize(nn.functional.silu(layer.member(i, x), inplace=True))  # type: ignore[operator]
        return last.member(i, x)  # type: ignore[operator]


class Standardizer(nn.Module):
    """
    Per-dimension shift and scale to zero mean and unit variance.

    A dimension whose spread is no more than rounding beside its magnitude counts as constant;
    a standardised value is cut at ``limit``, so that a dimension that hardly moved so far and then jumps
    does not drive a network to infinity.

    :param size: number of dimensions
    :param limit: largest magnitude of a standardised value, in standard deviations
    :param constant_std: what stands for the standard deviation of a constant dimension
    """

    # Float buffers: SB3 draws `rand_like` of every entry of a state dict, and loads with `weights_only=True`.
    mean: th.Tensor
    std: th.Tensor
    varies: th.Tensor  # 0 for a dimension that was constant in the last fit, else 1

    def __init__(self, size: int, limit: float = 10.0, constant_std: float = 1.0) -> None:
        super().__init__()
        self.limit, self.constant_std = limit, constant_std
        self.register_buffer("mean", th.zeros(size))
        self.register_buffer("std", th.ones(size))
        self.register_buffer("varies", th.ones(size))

    def fit(self, x: th.Tensor, magnitude: th.Tensor | None = None) -> None:
        """
        :param x: ``(N, size)``, N >= 1; the statistics are computed in float64
        :param magnitude: ``(size,)``, beside which a spread is rounding if that is larger than the mean: a difference is
            rounded as the numbers are that it is made of
        """
        data = x.double()
        mean, std = data.mean(dim=0), data.std(dim=0, correction=0)
        beside = mean.abs() if magnitude is None else th.maximum(mean.abs(), magnitude)
        negligible = std <= ROUNDING * beside.clamp(min=ROUNDING)
        self.varies.copy_(~negligible)
        self.mean.copy_(mean)
        self.std.copy_(th.where(negligible, self.constant_std, std))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: ``(x - mean) / std``, cut at ``limit``; shape of ``x``, ``(..., size)``"""
        return ((x - self.mean) / self.std).clamp(-self.limit, self.limit)

    def inverse(self, z: th.Tensor) -> th.Tensor:
        """:return: ``z * std + mean``; shape of ``z``, ``(..., size)``"""
        return z * self.std + self.mean
