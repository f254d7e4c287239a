"""A second CUDA stream, for work that the main stream does not need immediately."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th


class SideStream:
    """
    Runs operations in parallel with the current stream, also inside a CUDA graph. On a CPU, they run sequentially.

    Before :meth:`join`, the inputs of these operations must not be freed or overwritten, and their outputs must not be read.

    :param device: Device of the operations
    """

    def __init__(self, device: th.device) -> None:
        self._stream = th.cuda.Stream(device) if device.type == "cuda" else None
        # During a capture, waiting for a stream that is not part of it is an error.
        self._to_join = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Operations inside this context wait for all earlier ones. Later ones do not wait for them before :meth:`join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(th.cuda.current_stream(self._stream.device))
        self._to_join = True
        with th.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Later operations wait for all operations of this stream."""
        if self._stream is not None and self._to_join:
            th.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._to_join = False
