"""
How a signal ends training: noted down where it comes, heeded where callbacks evaluate and between updates.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList

if TYPE_CHECKING:
    from sb3_mrq.mrq import MRQ


class EvaluationStopped(KeyboardInterrupt):
    """
    What ``predict`` raises in a callback where a signal is to end training, see
    :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback`: what it is called for, such as an evaluation, may take longer than
    there is time for a checkpoint.
    """


class StopSignals:
    """
    Context manager in which SIGTERM and SIGINT (Ctrl-C) end nothing but are noted down, in ``received``. A second Ctrl-C, a
    second or more after the first, interrupts as usual. Outside of the main thread, where signals cannot be handled, it does
    nothing.
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
            # None is one that was not installed from Python, and cannot be from here
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
        """Whether one has come, and what it is to end still runs."""
        return self.received is not None and bool(self._handlers)

    def arrived(self, timeout: float = 1.0) -> bool:
        """
        :param timeout: how many seconds to wait for a signal that ended other processes and may be about to come here too
        :return: whether one has come
        """
        end = time.monotonic() + timeout
        while self._handlers and self.received is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.received is not None


class StoppableCallbacks(CallbackList):
    """
    The callbacks of a call of ``learn``. What they do in a rollout ends where ``predict`` raises :class:`EvaluationStopped`,
    but the rollout goes on to its end, so that nothing is lost. Training steps that were put off are done when training
    starts, once all callbacks are ready.

    :param callback: the callbacks, initialised
    :param model: the model that learns
    """

    model: "MRQ"

    def __init__(self, callback: BaseCallback, model: "MRQ"):
        super().__init__([callback])
        self.model = model

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.model.gradient_steps_left > 0:
            self.model.train(0, self.model.batch_size)

    def _on_rollout_start(self) -> None:
        with self._stoppable():
            super()._on_rollout_start()

    def _on_step(self) -> bool:
        # The end comes before the next rollout
        continue_training = True
        with self._stoppable():
            continue_training = super()._on_step()
        return continue_training

    def _on_rollout_end(self) -> None:
        with self._stoppable():
            super()._on_rollout_end()

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        self.model.in_rollout_callback = True
        try:
            yield
        except EvaluationStopped:
            pass
        finally:
            self.model.in_rollout_callback = False
