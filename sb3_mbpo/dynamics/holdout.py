"""
Chooses the hold-out set of a fit: always the same transitions.

With a new random choice in each fit, the hold-out error would include transitions that earlier fits trained on.
"""

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# An odd number whose multiples spread evenly over 32 bits (Knuth, The Art of Computer Programming, 6.4).
_SPREAD = 2654435761
_RANGE = 2**32
# Number of rows hashed at once, which limits the memory in use.
_BLOCK = 10_000


def row_hash(transitions: ReplayBufferSamples) -> th.Tensor:
    """
    :param transitions: raw and flat
    :return: a number between 0 and 1 per transition, which depends only on its content, ``(N,)``; approximately uniform
    """
    parts = zip(*(part.split(_BLOCK) for part in transitions[:3]), strict=True)
    return th.cat([_hash(th.cat(list(block), dim=1)) for block in parts])


def _hash(content: th.Tensor) -> th.Tensor:
    bits = content.float().contiguous().view(th.int32).long()
    # Each column has its own factor. Integer overflow wraps around.
    factors = (th.arange(1, bits.shape[1] + 1, device=bits.device) * _SPREAD) | 1
    mixed = (bits * factors).sum(dim=1)
    for shift in (32, 29):
        mixed = (mixed ^ (mixed >> shift)) * _SPREAD
    # Use the high half of the product: the low bits of a product depend only on low bits.
    return ((mixed >> 32) % _RANGE).double() / _RANGE


def held_out(transitions: ReplayBufferSamples, ratio: float, most: int) -> th.Tensor:
    """
    Choose hold-out rows by their content, so that a transition and its copies stay in the same set as the data grow.

    :param transitions: at least two
    :param ratio: fraction of rows to hold out
    :param most: maximum number of rows; with more data, the fraction falls, and rows only leave the hold-out set
    :return: bool ``(N,)``; at least one row is held out and at least one is not
    """
    n = len(transitions.observations)
    wanted = max(1, min(round(n * ratio), most, n - 1))
    number = row_hash(transitions)
    chosen = number < wanted / n
    if not wanted / 2 <= int(chosen.sum()) <= min(2 * wanted, n - 1):
        # With few rows or many copies, the hash does not give the wanted number of rows: choose the smallest hashes.
        chosen = th.zeros_like(chosen)
        chosen[number.argsort(stable=True)[:wanted]] = True
    return chosen
