"""Signals that ask a run to end: noted when they come, obeyed when nothing is lost by it."""

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Raised inside a long piece of work that is to be broken off and rolled back; never leaves ``learn``."""


class Interrupts:
    """
    Listens to signals between ``listen`` and ``close``. The first one is noted; the second one does what it always did.

    :param signals: by name, such as ``"SIGTERM"``; those that the system does not have are left out
    """

    def __init__(self, signals: Iterable[str]) -> None:
        unknown = [name for name in signals if not (isinstance(name, str) and name.startswith("SIG"))]
        if unknown:
            raise ValueError(f"signals={signals!r} must be names of signals, such as 'SIGTERM'")
        self.signals = [getattr(signal, name) for name in signals if hasattr(signal, name)]
        #: The signal that came, if one did.
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Off the main thread, where Python allows no handlers, nothing happens."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in self.signals}

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def check(self) -> None:
        """
        :raises Interrupted: a signal came
        """
        if self.received is not None:
            raise Interrupted(self.received.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            return
        self.close()
        os.kill(os.getpid(), number)
