"""Layers of an ensemble, with one batched matrix product for all members, and the standardizer of its data."""

from itertools import pairwise
from typing import Any

import torch as th
from torch import nn

# A dimension whose standard deviation is below this fraction of its magnitude counts as constant: it is float32 rounding.
ROUNDING = 1e-6
# Epsilon of layer normalization. Outputs of an untrained layer have a small variance.
LAYER_NORM_EPS = 1e-3


class EnsembleLinear(nn.Module):
    """
    ``n_members`` independent affine maps, computed as one batched matrix product.

    The weights are initialized as in the original code: normal with standard deviation 1 / (2 sqrt(in_size)), truncated at two
    standard deviations. Biases are initialized to zero.

    :param n_members: number of maps
    :param in_size: number of input features
    :param out_size: number of output features
    :param generator: random generator of the initial weights; the global generators are not used
    """

    def __init__(self, n_members: int, in_size: int, out_size: int, generator: th.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.empty(n_members, in_size, out_size))
        self.bias = nn.Parameter(th.zeros(n_members, 1, out_size))
        std = 0.5 / in_size**0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std, generator=generator)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: inputs of each member ``(members, B, in_size)``
        :return: outputs ``(members, B, out_size)``
        """
        return th.baddbmm(self.bias, x, self.weight)

    def member(self, i: int, x: th.Tensor) -> th.Tensor:
        """
        :param i: index of a member
        :param x: its inputs ``(B, in_size)``
        :return: its outputs ``(B, out_size)``
        """
        return th.addmm(self.bias[i], x, self.weight[i])


class EnsembleMLP(nn.Module):
    """
    ``n_members`` independent multi-layer perceptrons with SiLU between the layers and a linear output.

    :param n_members: number of networks
    :param in_size: number of input features
    :param out_size: number of output features
    :param net_arch: sizes of the hidden layers, the same for every member
    :param generator: CPU random generator of the initial weights
    :param layer_norm: apply layer normalization, without learned scale and shift, to the input of each layer except the first
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
        # In the state dict, because the shapes of the weights are the same with and without layer normalization.
        self.register_buffer("normalized", th.tensor(float(layer_norm)))
        sizes = [in_size, *net_arch, out_size]
        self.layers = nn.ModuleList(EnsembleLinear(n_members, n_in, n_out, generator) for n_in, n_out in pairwise(sizes))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.normalized.fill_(float(self.layer_norm))
        given = state_dict.get(f"{prefix}normalized")
        # SB3's own tests load state dicts of random numbers.
        if given is not None and float(given) in (0.0, 1.0) and bool(given) != self.layer_norm:
            args[-1].append(
                f"{prefix}layer_norm is {self.layer_norm}, but {bool(given)} in the file; create the agent with the "
                "file's value in dynamics_kwargs: layer_norm"
            )

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: inputs of each member ``(members, B, in_size)``
        :return: outputs ``(members, B, out_size)``
        """
        *hidden, last = self.layers
        for layer in hidden:
            x = self._normalize(nn.functional.silu(layer(x)))
        return last(x)

    def _normalize(self, x: th.Tensor) -> th.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) if self.layer_norm else x

    def member(self, i: int, x: th.Tensor) -> th.Tensor:
        """
        :param i: index of a member
        :param x: its inputs ``(B, in_size)``
        :return: its outputs ``(B, out_size)``
        """
        *hidden, last = self.layers
        for layer in hidden:
            # In place: allocating memory for every layer costs as much as the function itself.
            x = self._normalize(nn.functional.silu(layer.member(i, x), inplace=True))  # type: ignore[operator]
        return last.member(i, x)  # type: ignore[operator]


class Standardizer(nn.Module):
    """
    Per-dimension shift and scale to zero mean and unit variance.

    A dimension that varies only by rounding counts as constant. Standardized values are clipped to ``limit``, so that a
    dimension that was almost constant and then jumps does not make the network diverge.

    :param size: number of dimensions
    :param limit: maximum absolute standardized value, in standard deviations
    :param constant_std: standard deviation that is used for a constant dimension
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
        :param magnitude: ``(size,)``; if it is larger than the absolute mean, rounding is measured by it. For differences,
            pass the magnitude of the values that were subtracted, which determines the rounding
        """
        data = x.double()
        mean, std = data.mean(dim=0), data.std(dim=0, correction=0)
        beside = mean.abs() if magnitude is None else th.maximum(mean.abs(), magnitude)
        negligible = std <= ROUNDING * beside.clamp(min=ROUNDING)
        self.varies.copy_(~negligible)
        self.mean.copy_(mean)
        self.std.copy_(th.where(negligible, self.constant_std, std))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``(..., size)``
        :return: ``(x - mean) / std``, clipped to ``limit``, same shape
        """
        return ((x - self.mean) / self.std).clamp(-self.limit, self.limit)

    def inverse(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: standardized values ``(..., size)``
        :return: ``z * std + mean``, same shape
        """
        return z * self.std + self.mean
