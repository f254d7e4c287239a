"""Formulas for the disagreement of ensemble members and for their fusion."""

import math
from itertools import combinations

import torch as th

# Resolution of Infoprop: its authors' constant, in the units of the values.
RESOLUTION = 1e-6


def geometric_jsd(mean: th.Tensor, var: th.Tensor) -> th.Tensor:
    """
    The geometric Jensen-Shannon divergence of diagonal Gaussians with weight 1/2 (Frauenknecht et al., 2024, in the dual form
    of their code), averaged over all pairs of members: (KL(G || P_i) + KL(G || P_j)) / 2, where G is the normalized geometric
    mean of P_i and P_j. Per dimension: (mu_i - mu_j)^2 / (4 (S_i + S_j)) + ln((S_i + S_j) / (2 sqrt(S_i S_j))) / 2.

    :param mean: ``(members, B, dims)``, at least two members
    :param var: variances, same shape
    :return: divergence in nats ``(B,)``, independent of the units
    """
    pairs = list(combinations(range(len(mean)), 2))
    total = mean.new_zeros(mean.shape[1])
    for i, j in pairs:
        both = var[i] + var[j]
        spread = (both / (2 * (var[i] * var[j]).sqrt())).log()
        total += ((mean[i] - mean[j]) ** 2 / (4 * both) + spread / 2).sum(dim=-1)
    return total / len(pairs)


def one_vs_rest_kl(mean: th.Tensor, var: th.Tensor, chosen: th.Tensor) -> th.Tensor:
    """
    KL(N(mu_i, S_i) || N(m, V)) between one member and a Gaussian with the moments of the mixture of the others: m is the mean
    of the others' mu_j, and V is the mean of S_j + (mu_j - m)^2 (Pan et al., 2020).

    :param mean: ``(members, B, dims)``, at least two members
    :param var: variances, same shape
    :param chosen: i of each row, ``(B,)``
    :return: divergence in nats ``(B,)``, independent of the units
    """
    rest = 1 - th.nn.functional.one_hot(chosen, len(mean)).T.unsqueeze(-1).to(mean.dtype)
    rest_mean = (rest * mean).sum(dim=0) / (len(mean) - 1)
    rest_var = (rest * (var + (mean - rest_mean) ** 2)).sum(dim=0) / (len(mean) - 1)
    own_mean, own_var = of_members(mean, chosen), of_members(var, chosen)
    return 0.5 * ((rest_var / own_var).log() + (own_var + (own_mean - rest_mean) ** 2) / rest_var - 1).sum(dim=-1)


def information_fusion(mean: th.Tensor, var: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Treat the members as noisy observations of one Gaussian (Frauenknecht et al., 2025). Per dimension:
    S = 1 / mean_e(1 / S_e), mu = S mean_e(mu_e / S_e), S_epi = mean_e (mu_e - mu)^2, gain K = S / (S + S_epi). Given a draw y
    of a member, the next value is N(mu + K (y - mu), (1 - K) S).

    :param mean: ``(members, B, dims)``
    :param var: variances, same shape
    :return: mu, K and (1 - K) S, each ``(B, dims)``
    """
    fused_var = 1 / (1 / var).mean(dim=0)
    fused_mean = fused_var * (mean / var).mean(dim=0)
    epistemic = ((mean - fused_mean) ** 2).mean(dim=0)
    gain = fused_var / (fused_var + epistemic)
    # Not (1 - gain) * fused_var, which is only rounding if the members agree.
    return fused_mean, gain, gain * epistemic


def information_loss(conditional_var: th.Tensor) -> th.Tensor:
    """
    max(0, log2(2 pi e var) / 2 - log2(resolution)): missing information about a value, at the given resolution.

    :param conditional_var: (1 - K) S of :func:`information_fusion`
    :return: information in bits, same shape
    """
    return (0.5 * (2 * math.pi * math.e * conditional_var).log2() - math.log2(RESOLUTION)).clamp(min=0)


def of_members(values: th.Tensor, chosen: th.Tensor) -> th.Tensor:
    """
    :param values: ``(members, B, dims)``
    :param chosen: index of the member of each row, ``(B,)``
    :return: values of the chosen members ``(B, dims)``
    """
    return values[chosen, th.arange(len(chosen), device=chosen.device)]


def draw(mean: th.Tensor, var: th.Tensor, generator: th.Generator) -> tuple[th.Tensor, th.Tensor]:
    """
    Draw each row from one member, chosen uniformly and independently, as in the paper.

    :param mean: ``(members, B, dims)``
    :param var: variances, same shape
    :param generator: random generator
    :return: values ``(B, dims)`` and the indices of their members ``(B,)``
    """
    chosen = th.randint(len(mean), mean.shape[1:2], generator=generator, device=mean.device)
    noise = th.randn(mean.shape[1:], generator=generator, device=mean.device)
    return of_members(mean, chosen) + noise * of_members(var, chosen).sqrt(), chosen
