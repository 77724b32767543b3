"""
Functions that are captured once as CUDA graphs and replayed, with little work for the host.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch as th


class CaptureError(RuntimeError):
    """
    A function cannot be captured as a CUDA graph. The call that raised this had no effect.
    """


class Graph:
    """
    A function without arguments that works on tensors at fixed addresses. On a CUDA device, the first calls run normally, on a
    side stream. Then the function is captured, and later calls replay the graph. On other devices, every call runs normally.

    A graph contains Python numbers and tensor addresses as constants. A learning rate must therefore be a tensor, and a loaded
    optimiser needs a new graph, see ``watch``.

    :param function: function to capture. It must not wait for the device. Its outputs are tensors, or nested tuples of
        tensors, which the next call overwrites.
    :param device: device of its tensors
    :param watch: returns the constants of the graph. If they have changed since capturing, ``check`` discards the graph.
    :raises CaptureError: when called, if the function cannot be captured
    """

    # Calls before capturing, in which libraries are initialised and optimisers create their state. The last one detects
    # operations that wait for the device, which would make capturing fail.
    WARM_UP = 3

    def __init__(self, function: Callable[[], Any], device: th.device, watch: Callable[[], Any] = lambda: None):
        self.function = function
        self.device = device
        self.watch = watch
        self.reset()

    def reset(self) -> None:
        """Discard the graph, and start again with warm-up calls."""
        self._calls = 0
        self._host_sync: str | None = None
        self._replay: Callable[[], None] | None = None
        self._outputs: Any = None
        self._watched: Any = None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._replay is not None

    def check(self) -> bool:
        """
        :return: False if the graph was outdated and has been discarded
        """
        if self._replay is None or self._watched == self.watch():
            return True
        self.reset()
        return False

    def __call__(self) -> Any:
        if self._replay is None:
            if self._calls < self.WARM_UP or not self.can_capture(self.device):
                self._calls += 1
                return self._warm_up(detect_sync=self._calls == self.WARM_UP)
            if self._host_sync is not None:
                raise CaptureError(f"An operation that waits for the device cannot be captured: {self._host_sync}")
            try:
                with on_device(self.device):
                    self._replay, self._outputs = self.capture(self.function)
            except Exception as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            self._watched = self.watch()
        self._replay()
        return self._outputs

    def _warm_up(self, detect_sync: bool) -> Any:
        if self.device.type != "cuda":
            return self.function()
        # Work that is captured later must not run on the default stream before
        stream = side_stream(self.device)
        stream.wait_stream(th.cuda.current_stream(self.device))
        with on_device(self.device), th.cuda.stream(stream):
            if detect_sync:
                outputs, self._host_sync = detect_host_sync(self.function)
            else:
                outputs = self.function()
        th.cuda.current_stream(self.device).wait_stream(stream)
        return outputs

    @staticmethod
    def can_capture(device: th.device) -> bool:
        """
        :param device: a device
        :return: whether graphs can be captured on it
        """
        return device.type == "cuda"

    @staticmethod
    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """
        Capture a function on the current CUDA device, without executing it. An error leaves the device in a usable state.
        After a failure, ``torch.cuda.graph`` alone would leave its stream the current one and, before torch 2.13, the random
        generator in capture mode.

        :param function: as in the constructor
        :return: function that replays the graph, and outputs of the graph
        """
        # Unused graphs and memory must not be freed during the capture
        gc.collect()
        graph = th.cuda.CUDAGraph()
        stream = side_stream(th.device("cuda", th.cuda.current_device()))
        before = th.cuda.current_stream()
        try:
            with th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
        except BaseException:
            # Kept, as the allocator of torch may refer to it
            _failed.append(graph)
            th.cuda.set_stream(before)
            # A successful capture ends the capture mode of the random generator
            with contextlib.suppress(RuntimeError), th.cuda.graph(th.cuda.CUDAGraph(), stream=th.cuda.Stream()):
                th.zeros((), device="cuda")
            th.cuda.set_stream(before)
            raise
        return graph.replay, outputs


_failed: list[Any] = []
_side_streams: dict[int, Any] = {}


def side_stream(device: th.device) -> Any:
    """
    :param device: a CUDA device
    :return: stream for warming up and capturing, the same for all graphs, as each stream has its own memory pool
    """
    index = th.cuda.current_device() if device.index is None else device.index
    if index not in _side_streams:
        _side_streams[index] = th.cuda.Stream(index)
    return _side_streams[index]


def on_device(device: th.device) -> contextlib.AbstractContextManager:
    """
    :param device: any device
    :return: context in which it is the current CUDA device; no effect for other devices
    """
    return th.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free_cached_memory(device: th.device) -> None:
    """
    Free memory of deleted models on a CUDA device. Graphs are in reference cycles, and torch caches freed memory.

    :param device: any device
    """
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):
            th.cuda.empty_cache()


def detect_host_sync(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """
    Call a function and detect operations that wait for the device.

    :param function: function that works on a CUDA device
    :return: its outputs, and torch's warning about such an operation, None if there was none
    """
    mode = th.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        th.cuda.set_sync_debug_mode("warn")
        try:
            outputs = function()
        finally:
            th.cuda.set_sync_debug_mode(mode)
    waits = None
    for warning in caught:
        message = str(warning.message)
        if "called a synchronizing CUDA operation" in message:
            waits = message
        elif "Synchronization debug mode" not in message:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return outputs, waits


class Staging:
    """
    Transfer of several small arrays from the host to a device in one copy. The arrays are packed into a buffer in pinned
    memory. Several buffers are used in turn.

    :param arrays: shape and dtype of each array, by name
    :param device: target device
    """

    # Number of buffers in pinned memory: while the device reads one, the next is filled
    DEPTH = 4
    ALIGNMENT = 16

    def __init__(self, arrays: dict[str, tuple[tuple[int, ...], th.dtype]], device: th.device):
        self._cuda = device.type == "cuda"
        self._layout: dict[str, tuple[int, int, tuple[int, ...], th.dtype]] = {}
        size = 0
        for name, (shape, dtype) in arrays.items():
            n_bytes = th.Size(shape).numel() * dtype.itemsize
            self._layout[name] = size, size + n_bytes, shape, dtype
            size += -(-n_bytes // self.ALIGNMENT) * self.ALIGNMENT
        self._target = th.zeros(size, dtype=th.uint8, device=device)
        self._sources = [th.zeros(size, dtype=th.uint8, pin_memory=self._cuda) for _ in range(self.DEPTH)]
        self._host = [{name: tensor.numpy() for name, tensor in self._views(source).items()} for source in self._sources]
        self._sent: list[Any] = [None] * self.DEPTH
        self._turn = 0
        self.device_arrays = self._views(self._target)

    def _views(self, flat: th.Tensor) -> dict[str, th.Tensor]:
        return {name: flat[start:end].view(dtype).view(shape) for name, (start, end, shape, dtype) in self._layout.items()}

    def begin(self) -> dict[str, Any]:
        """
        :return: the arrays to fill, by name, after waiting until the device has read their previous contents
        """
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        return self._host[self._turn]

    def send(self) -> None:
        """Copy the filled arrays to ``device_arrays``, after all work that is already queued on the device."""
        self._target.copy_(self._sources[self._turn], non_blocking=True)
        if self._cuda:
            self._sent[self._turn] = th.cuda.current_stream(self._target.device).record_event()
        self._turn = (self._turn + 1) % self.DEPTH
