"""
Signals that end training: recorded when they come, heeded between steps.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any


class StopSignals:
    """
    Records SIGTERM and SIGINT (Ctrl-C) instead of exiting, in ``received``. A second Ctrl-C, a second or more after the first,
    interrupts as usual. Outside of the main thread, where signals cannot be handled, this context manager does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            # None is a handler that was not installed from Python, and cannot be from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        # Some senders send twice at once, to a process and to its group
        if self.received is not None and number == signal.SIGINT and time.monotonic() - self._time >= 1:
            raise KeyboardInterrupt
        if self.received is None:
            self._time = time.monotonic()
            self.received = signal.Signals(number)

    @property
    def pending(self) -> bool:
        """Whether a signal has come, and training, which it is to end, still runs."""
        return self.received is not None and bool(self._handlers)

    def arrived(self, timeout: float = 1.0) -> bool:
        """
        :param timeout: how many seconds to wait for a signal that ended other processes and may be about to come here too
        :return: whether a signal has come
        """
        end = time.monotonic() + timeout
        while self._handlers and self.received is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.received is not None
