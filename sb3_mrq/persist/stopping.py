"""
Signals that end training between rollouts.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any


class StopSignals:
    """
    Context manager that records SIGTERM and SIGINT (Ctrl-C) in ``received`` instead of exiting. A second Ctrl-C at least a
    second after the first one interrupts as usual. Has no effect outside the main thread, where signals cannot be handled.
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
            # None is a handler that was not installed from Python, and cannot be restored from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        # Some programs send the signal twice at once, to the process and to its group
        if self.received is not None and number == signal.SIGINT and time.monotonic() - self._time >= 1:
            raise KeyboardInterrupt
        if self.received is None:
            self._time = time.monotonic()
            self.received = signal.Signals(number)

    @property
    def pending(self) -> bool:
        """Whether a signal was received and training has not ended yet."""
        return self.received is not None and bool(self._handlers)

    def arrived(self, timeout: float = 1.0) -> bool:
        """
        Wait for a signal that has already reached other processes.

        :param timeout: seconds to wait
        :return: whether a signal was received
        """
        end = time.monotonic() + timeout
        while self._handlers and self.received is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.received is not None
