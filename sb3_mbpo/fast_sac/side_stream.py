"""A second stream of a GPU, for work that the main one need not wait for at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th


class SideStream:
    """
    Launches that run beside those of the current stream, also where both become one CUDA graph; on a CPU, each in its turn.

    Before :meth:`join`, what they read must neither be freed nor overwritten, and what they write must not be read.

    :param device: where the work is done
    """

    def __init__(self, device: th.device) -> None:
        self._stream = th.cuda.Stream(device) if device.type == "cuda" else None
        # In a capture, to wait for a stream that takes no part in it is an error.
        self._to_join = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within waits for all that was launched before, and nothing waits for it before :meth:`join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(th.cuda.current_stream(self._stream.device))
        self._to_join = True
        with th.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on waits for all that runs beside, if anything does."""
        if self._stream is not None and self._to_join:
            th.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._to_join = False
