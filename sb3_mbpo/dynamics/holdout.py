"""
Which transitions are held out of a fit: always the same ones.

With a new draw in each fit, a warm-started network would be judged by what it has learned from before.
"""

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

# An odd number whose multiples spread evenly over 32 bits (Knuth, The Art of Computer Programming, 6.4).
_SPREAD = 2654435761
_RANGE = 2**32
# Rows that are hashed at once, which bounds the memory that it takes.
_BLOCK = 10_000


def row_hash(transitions: ReplayBufferSamples) -> th.Tensor:
    """:return: a number between 0 and 1 that depends on a transition's content alone, ``(N,)``; as good as uniform"""
    parts = zip(*(part.split(_BLOCK) for part in transitions[:3]), strict=True)
    return th.cat([_hash(th.cat(list(block), dim=1)) for block in parts])


def _hash(content: th.Tensor) -> th.Tensor:
    bits = content.float().contiguous().view(th.int32).long()
    # Each column by a factor of its own; integer overflow wraps around.
    factors = (th.arange(1, bits.shape[1] + 1, device=bits.device) * _SPREAD) | 1
    mixed = (bits * factors).sum(dim=1)
    for shift in (32, 29):
        mixed = (mixed ^ (mixed >> shift)) * _SPREAD
    # The high half of the product: its low bits depend on low bits alone.
    return ((mixed >> 32) % _RANGE).double() / _RANGE


def held_out(transitions: ReplayBufferSamples, ratio: float, most: int) -> th.Tensor:
    """
    Choose hold-out rows by their content: a transition stays on its side while the data grow, and so do copies of it.

    :param transitions: at least two
    :param ratio: share of the rows
    :param most: rows at most; among more data the share falls, and rows leave the hold-out set but do not enter it
    :return: bool ``(N,)``; at least one row is held out and at least one is not
    """
    n = len(transitions.observations)
    wanted = max(1, min(round(n * ratio), most, n - 1))
    number = row_hash(transitions)
    chosen = number < wanted / n
    if not wanted / 2 <= int(chosen.sum()) <= min(2 * wanted, n - 1):
        # Few rows, or many copies of one: the share is kept all the same.
        chosen = th.zeros_like(chosen)
        chosen[number.argsort(stable=True)[:wanted]] = True
    return chosen
