"""Signals that end a run: they are noted when they arrive, and the run ends when it can be saved."""

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Raised during long work to abort it, so that it can be undone. ``learn`` catches it."""


class Interrupts:
    """
    Handles signals between ``listen`` and ``close``. The first one is noted; the second one has its usual effect.

    :param signals: Names such as ``"SIGTERM"``. Signals that the system does not have are ignored
    """

    def __init__(self, signals: Iterable[str]) -> None:
        unknown = [name for name in signals if not (isinstance(name, str) and name.startswith("SIG"))]
        if unknown:
            raise ValueError(f"signals={signals!r} must be names of signals, such as 'SIGTERM'")
        self.signals = [getattr(signal, name) for name in signals if hasattr(signal, name)]
        #: The signal that has arrived; ``None``: none has.
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Install the handlers. Does nothing outside of the main thread, where Python does not allow it."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in self.signals}

    def close(self) -> None:
        """Restore the previous handlers."""
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def check(self) -> None:
        """
        :raises Interrupted: a signal has arrived
        """
        if self.received is not None:
            raise Interrupted(self.received.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            return
        self.close()
        os.kill(os.getpid(), number)
