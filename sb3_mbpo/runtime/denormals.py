"""Denormal numbers, which are so close to zero that a CPU computes with them many times slower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th


def flushed() -> bool:
    """:return: whether denormal results are set to zero in this thread"""
    # torch can set this state, but not read it.
    return not (th.full((1,), 1e-39) * 1.0).any()


@contextmanager
def flush_denormals() -> Iterator[None]:
    """
    Set denormal results to zero in this context. Afterwards, the previous mode of this thread is restored.

    Threads that are started in this context, such as torch's workers at their first use, inherit the mode and keep it.

    This matters because Adam's moments of inactive units decay to denormal numbers and stay there.
    """
    before = flushed()
    th.set_flush_denormal(True)
    try:
        yield
    finally:
        th.set_flush_denormal(before)
