"""Numbers too small to be told from zero at full precision: a CPU computes with them many times slower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th


def flushed() -> bool:
    """Whether this thread takes denormal results for zero."""
    # torch sets this state and does not tell it.
    return not (th.full((1,), 1e-39) * 1.0).any()


@contextmanager
def flush_denormals() -> Iterator[None]:
    """
    Within, denormal results are zero, in this thread and those it starts; afterwards, what was set before, in this thread.

    Threads that it starts, such as torch's workers at their first use, take the mode over and keep it.

    Adam's moments of units that never fire decay into denormals and stay there.
    """
    before = flushed()
    th.set_flush_denormal(True)
    try:
        yield
    finally:
        th.set_flush_denormal(before)
