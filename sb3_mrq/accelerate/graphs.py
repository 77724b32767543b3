"""
Functions recorded once as CUDA graphs and replayed, so that the host has nothing to do but start them.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch as th


class CaptureError(RuntimeError):
    """
    A function cannot be captured as a graph. Nothing of what it does has been done.
    """


class Graph:
    """
    A function of no arguments that works on tensors which stay where they are. On a CUDA device its first calls run as they
    are, on a stream of their own; one is then captured, and from there on all calls replay what was captured. On other devices
    every call runs as it is.

    What a graph has captured knows nothing of numbers or tensors that change their place: a learning rate must be a tensor, a
    loaded optimiser needs a new graph. See ``watch``.

    :param function: what to capture. It must not wait for the device. Its outputs are tensors, or nested tuples of them, that
        the next call overwrites.
    :param device: where its tensors are
    :param watch: what must stay as it was when the function was captured, anything that compares: where it differs, ``check``
        throws the graph away
    :raises CaptureError: when called, if the function cannot be captured
    """

    # Calls that run as they are before one is captured: libraries set themselves up, and optimisers make their state. The last
    # one is watched: what waits for the device then would fail when it is captured.
    WARM_UP = 3

    def __init__(self, function: Callable[[], Any], device: th.device, watch: Callable[[], Any] = lambda: None):
        self.function = function
        self.device = device
        self.watch = watch
        self.reset()

    def reset(self) -> None:
        """Throw the graph away, if there is one, and begin anew."""
        self._calls = 0
        self._host_sync: str | None = None
        self._replay: Callable[[], None] | None = None
        self._outputs: Any = None
        self._watched: Any = None

    @property
    def captured(self) -> bool:
        """Whether calls replay what was captured."""
        return self._replay is not None

    def check(self) -> bool:
        """
        :return: whether what was captured is still right, if something was; otherwise it is thrown away
        """
        if self._replay is None or self._watched == self.watch():
            return True
        self.reset()
        return False

    def __call__(self) -> Any:
        if self._replay is None:
            if self._calls < self.WARM_UP or not self.can_capture(self.device):
                self._calls += 1
                return self._run(watched=self._calls == self.WARM_UP)
            if self._host_sync is not None:
                raise CaptureError(f"What waits for the device cannot be captured: {self._host_sync}")
            try:
                with on_device(self.device):
                    self._replay, self._outputs = self.capture(self.function)
            except Exception as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            self._watched = self.watch()
        self._replay()
        return self._outputs

    def _run(self, watched: bool) -> Any:
        if self.device.type != "cuda":
            return self.function()
        # Work that is captured later must not have run on the default stream
        stream = side_stream(self.device)
        stream.wait_stream(th.cuda.current_stream(self.device))
        with on_device(self.device), th.cuda.stream(stream):
            if watched:
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
        Record a function on the current CUDA device, without doing what it does. If that fails the device is left as it was:
        ``torch.cuda.graph`` by itself would leave its stream the current one, and before torch 2.13 the random generator as if
        it was still captured.

        :param function: as in the constructor
        :return: what replays it, and its outputs
        """
        # Graphs and memory that are no longer used must not be given back while another is captured
        gc.collect()
        graph = th.cuda.CUDAGraph()
        stream = side_stream(th.device("cuda", th.cuda.current_device()))
        before = th.cuda.current_stream()
        try:
            with th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
        except BaseException:
            # Kept, since torch's allocator may refer to it
            _failed.append(graph)
            th.cuda.set_stream(before)
            # A capture that succeeds ends what the one that failed has begun
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
    :return: the one stream there on which functions warm up and are captured; each stream has memory of its own
    """
    index = th.cuda.current_device() if device.index is None else device.index
    if index not in _side_streams:
        _side_streams[index] = th.cuda.Stream(index)
    return _side_streams[index]


def on_device(device: th.device) -> contextlib.AbstractContextManager:
    """
    :param device: any device
    :return: makes it the current CUDA device, if it is one
    """
    return th.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free_cached_memory(device: th.device) -> None:
    """
    Free what models that are gone have left behind on a CUDA device: graphs and what they belong to refer to each other, and
    torch keeps the memory of what is gone.

    :param device: any device
    """
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):
            th.cuda.empty_cache()


def detect_host_sync(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """
    :param function: works on a CUDA device
    :return: what it returns, and what torch says of an operation in it that waits for the device, None if there was none
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
    The way of small arrays from the host to a device, all of them in one copy: a few buffers in pinned memory, used in turn,
    each with one array beside the other, and the arrays' counterparts on the device.

    :param arrays: shape and dtype of each array, by name
    :param device: where to
    """

    # Buffers in pinned memory: while the device reads one, the next is filled
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
        :return: the arrays to fill, of the buffer whose turn it is, once the device has read what they held before
        """
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        return self._host[self._turn]

    def send(self) -> None:
        """Copy what was filled to ``device_arrays``, after all work that was given to the device before."""
        self._target.copy_(self._sources[self._turn], non_blocking=True)
        if self._cuda:
            self._sent[self._turn] = th.cuda.current_stream(self._target.device).record_event()
        self._turn = (self._turn + 1) % self.DEPTH
