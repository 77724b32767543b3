"""
What training tells its user: what begins, the time of a step, and the time that remains.
"""

import time
from collections import deque
from typing import Any, NamedTuple

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback


def duration(seconds: float) -> str:
    """
    :param seconds: a time
    :return: the time in words, such as "45 s", "12 min" or "1 h 17 min"
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def milliseconds(seconds: float) -> str:
    """
    :param seconds: a time
    :return: the time in milliseconds, with at least two digits
    """
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2g} ms"


def progress_bars(callback: BaseCallback) -> list[ProgressBarCallback]:
    """
    :param callback: a callback, or a list of callbacks
    :return: the progress bars among them
    """
    if isinstance(callback, CallbackList):
        return [bar for child in callback.callbacks for bar in progress_bars(child)]
    return [callback] if isinstance(callback, ProgressBarCallback) else []


class Point(NamedTuple):
    """
    :param time: seconds, of a clock without a fixed origin
    :param timesteps: steps of the environments so far
    :param updates: training steps so far
    """

    time: float
    timesteps: int
    updates: int

    @classmethod
    def now(cls, model: Any) -> "Point":
        """
        :param model: the algorithm
        :return: its present progress
        """
        return cls(time.perf_counter(), model.num_timesteps, model._n_updates)


class TrainingProgress:
    """
    Measures the speed of training and reports it in messages (``verbose=1``), progress bars and the log.

    A burst of encoder updates comes before many training steps, so a speed is measured over whole cycles of both. The first
    estimate, before a cycle is complete, adds the times of an encoder update and of a step.
    """

    # Seconds after which a line is logged although no episode has ended
    LOG_SECONDS = 60.0
    # First updates of each kind, which may include compiling and capturing, and training steps of the first estimate
    SKIPPED, MEASURED = 10, 50
    # Cycles over which the speed is averaged
    CYCLES = 10
    # Seconds between changes of a progress bar
    SHOWN_SECONDS = 0.2

    def __init__(self) -> None:
        self.bars: list[ProgressBarCallback] = []
        self._running = False
        self._logged = Point(0.0, 0, 0)
        self._shown = 0.0
        # Time of an encoder update, and when and at which update its measurement began
        self._encoder_seconds = 0.0
        self._burst: tuple[float, int] | None = None
        self._burst_ended = False
        # End of the first burst, and start of the steps that are measured after it
        self._begun: Point | None = None
        self._window = self._logged
        # Ends of the last bursts, or rather of the calls of ``train`` with one
        self._cycles: deque[Point] = deque(maxlen=self.CYCLES + 1)
        self._seconds_per_step: float | None = None

    def start(self, model: Any, callback: BaseCallback) -> None:
        """
        Start to measure, when training starts.

        :param model: the algorithm
        :param callback: its callbacks, with their progress bars
        """
        self.bars, self._running, self._logged = progress_bars(callback), True, Point.now(model)
        if model.num_timesteps < model.learning_starts and not model.offline:
            self._show("warm-up")

    def stop(self) -> None:
        """Release the progress bars when training ends."""
        self.bars, self._running = [], False

    def _show(self, text: str) -> None:
        self._shown = time.perf_counter()
        for bar in self.bars:
            bar.pbar.set_description(text)

    def _due(self, now: float) -> bool:
        return bool(self.bars) and now - self._shown >= self.SHOWN_SECONDS

    def encoder_update(self, model: Any, done: int) -> None:
        """
        Report before each encoder update of a burst, and after the last one.

        :param model: the algorithm
        :param done: number of encoder updates of the burst so far
        """
        now, total = time.perf_counter(), model.target_update_interval
        if self._running and done == model._n_updates == 0 and model.verbose >= 1:
            warm_up = "" if model.offline else f"Warm-up done after {model.learning_starts:,} steps. "
            burst = f"a burst of {total} encoder updates"
            print(f"{warm_up}Training begins with {burst}. Another follows every {total} training steps.")
        if done == total:
            if self._burst is not None and done > self._burst[1]:
                self._encoder_seconds = (now - self._burst[0]) / (done - self._burst[1])
            self._burst, self._burst_ended = None, True
        elif self._burst is None or done <= min(self.SKIPPED, total // 2):
            self._burst = now, done
        if self._due(now) or (self.bars and done in (0, total)):
            self._show(f"encoder {done}/{total}")

    def step(self, model: Any) -> None:
        """
        Report between calls of ``train``.

        :param model: the algorithm
        """
        now = Point.now(model)
        if self._burst_ended:
            self._cycles.append(now)
            self._burst_ended = False
            self._begun = self._begun or now
            if self._seconds_per_step is not None:
                self._seconds_per_step = self._cycle_estimate() or self._seconds_per_step
        if self._begun is None:
            return
        updates = now.updates - self._begun.updates
        if updates < self.SKIPPED:
            self._window = now
        elif self._seconds_per_step is None and updates >= self.SKIPPED + self.MEASURED:
            self._seconds_per_step = self._cycle_estimate() or self._first_estimate(now)
            if model.verbose >= 1 and self._seconds_per_step is not None:
                step, remaining = milliseconds(self._seconds_per_step), duration(self.remaining_seconds(model) or 0.0)
                print(f"Training: {step} per step, {remaining} remain.")
        if self._due(now.time):
            seconds = self.remaining_seconds(model)
            self._show("training" if seconds is None else f"{duration(seconds)} remain")

    def _cycle_estimate(self) -> float | None:
        """
        :return: seconds per timestep over the last cycles, None before one is complete
        """
        first, last = self._cycles[0], self._cycles[-1]
        return (last.time - first.time) / (last.timesteps - first.timesteps) if last.timesteps > first.timesteps else None

    def _first_estimate(self, now: Point) -> float | None:
        """
        :param now: the present progress
        :return: seconds per timestep, to each of whose training steps belongs one encoder update
        """
        seconds = now.time - self._window.time + (now.updates - self._window.updates) * self._encoder_seconds
        steps = now.timesteps - self._window.timesteps
        return seconds / steps if steps > 0 else None

    def remaining_seconds(self, model: Any) -> float | None:
        """
        :param model: the algorithm
        :return: time that the remaining timesteps will take at the speed of the last cycles, None before it is known
        """
        return None if self._seconds_per_step is None else self._seconds_per_step * model.remaining_timesteps

    @property
    def log_due(self) -> bool:
        """Whether nothing has been logged for ``LOG_SECONDS``."""
        return self._running and time.perf_counter() - self._logged.time >= self.LOG_SECONDS

    def record(self, model: Any) -> None:
        """
        Record the steps a second since the last log, and the seconds that remain.

        :param model: the algorithm
        """
        if not self._running:
            return
        now, last = Point.now(model), self._logged
        self._logged = now
        model.logger.record("time/fps_recent", (now.timesteps - last.timesteps) / max(now.time - last.time, 1e-9))
        remaining = self.remaining_seconds(model)
        if remaining is not None:
            model.logger.record("time/remaining_s", round(remaining))


class TrainingCallbacks(CallbackList):
    """
    The callbacks of ``learn``, with reports on its progress. Outstanding training steps are done after the start of training
    of all callbacks.
    """

    model: Any

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.model.progress = TrainingProgress()
        self.model.progress.start(self.model, self)
        self.model.learn_exit_stack.callback(self.model.progress.stop)
        if self.model.gradient_steps_left > 0:
            self.model.train(0, self.model.batch_size)

    def _on_rollout_start(self) -> None:
        self.model.progress.step(self.model)
        super()._on_rollout_start()

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        # A long episode, or several of them, would be silent. With log_interval=None, learn is meant to be.
        if self.locals.get("log_interval") is not None and self.model.progress.log_due:
            self.model.dump_logs()
