"""
A copy of the replay buffer on a device, for sampling on the device.
"""

import weakref
from collections.abc import Callable

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq.accelerate.graphs import CaptureError, Graph, Staging
from sb3_mrq.buffers import NStepSamples, SubtrajectoryReplayBuffer, SubtrajectorySamples
from sb3_mrq.buffers.slots import Slots

# New priority of a slot that has changed: unchanged, zero, or the largest priority
KEEP, ZERO, MAX = 0, 1, 2


class DeviceCopy:
    """
    Copy of all slots and priorities of a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer` on a device. Frame stacks are
    stored as single frames. The buffer still stores transitions in host memory, and marks slots that have changed; before the
    next batch, these are copied to the device in one transfer. Sampling and updating priorities only use the device, with
    static shapes, so they can be captured as CUDA graphs.

    :param buffer: a replay buffer with at least one transition
    :param device: a device with at least ``size_of(buffer)`` bytes of free memory
    :raises CaptureError: if torch does not support computing with the dtype of an array
    """

    def __init__(self, buffer: SubtrajectoryReplayBuffer, device: th.device):
        self.device = device
        # Weak references, so that the memory is freed if the model drops the buffer
        self._buffer = weakref.proxy(buffer)
        host = buffer.arrays()
        for name, array in host.items():
            if array.dtype.kind == "u" and array.dtype.itemsize > 1:
                raise CaptureError(f"The dtype {array.dtype} of {name} is not supported on a device.")
        self._n_slots = len(host["rewards"])
        # Additional slot, after the last slot and the frame of zeros, to which the padding of a chunk is written
        self._padding_slot = self._n_slots + 1
        self.priorities = buffer.priorities_class(self._padding_slot + 1, device)
        # The arrays of the priorities are views, made anew for each call
        self._copied = {name: weakref.ref(array) for name, array in host.items() if name not in self.priorities.arrays()}
        arrays = {name: self._upload(array, self.priorities.arrays().get(name)) for name, array in host.items()}
        self.slots = Slots(arrays, buffer.observation_shapes(), buffer.buffer_size, buffer.n_envs)
        self.max_priority = th.full((), buffer.max_priority, dtype=th.float64, device=device)
        self.priorities.advance(buffer.n_added)
        self.priorities.leaves[: self._n_slots].copy_(buffer.priorities())
        self.priorities.rebuild(0, self._padding_slot + 1)

        # A step of an environment usually changes at most four slots
        self._n_staged = 8 * (1 + buffer.n_envs)
        self._staging = Staging(
            {
                "slots": ((self._n_staged,), th.int64),
                "priorities": ((self._n_staged,), th.int64),
                **{name: ((self._n_staged, *array.shape[1:]), array.dtype) for name, array in arrays.items()},
            },
            device,
        )
        self.write: Callable[[], None] = Graph(self._write_staged, device)
        # Slots that have changed, and whether they can now be sampled
        self._marked: dict[int, bool] = {}
        buffer.attach_copy(self)
        weakref.finalize(buffer, self.close).atexit = False

    def close(self) -> None:
        """Free the memory on the device, even if graphs still refer to this object."""
        self.slots.arrays.clear()
        self.write = self._write_staged
        for name in ("priorities", "_staging"):
            vars(self).pop(name, None)

    @staticmethod
    def size_of(buffer: SubtrajectoryReplayBuffer) -> int:
        """
        :param buffer: a replay buffer
        :return: size of its copy in bytes
        """
        arrays = buffer.arrays()
        return sum(array.nbytes for array in arrays.values()) + 8 * len(arrays["rewards"])

    def _upload(self, array: np.ndarray, copy: th.Tensor | None) -> th.Tensor:
        """
        Copy an array to the device, extended by ``_padding_slot``. Only memory pages that have been written to are read.

        :param array: array on the host
        :param copy: tensor to copy to, a new one if None
        :return: the tensor
        """
        n = len(array)
        if not self._buffer.full and self._buffer.n_envs == 1:
            n = min(n, self._buffer.pos + 1)
        if copy is None:
            shape = (self._padding_slot + 1, *array.shape[1:])
            copy = th.zeros(shape, dtype=th.from_numpy(array[:0]).dtype, device=self.device)
        copy[:n].copy_(th.from_numpy(array[:n]))
        return copy

    def is_current(self, buffer: SubtrajectoryReplayBuffer) -> bool:
        """
        :param buffer: a replay buffer
        :return: whether this is a copy of the current arrays of this buffer
        """
        arrays = buffer.arrays()
        return all(name in arrays and arrays[name] is copied() for name, copied in self._copied.items())

    def mark(self, slots: np.ndarray, activated: bool = False) -> None:
        """
        Mark slots that have changed on the host.

        :param slots: (n,)
        :param activated: whether they can now be sampled, with the largest priority
        """
        for slot in slots.tolist():
            self._marked[slot] = activated or self._marked.get(slot, False)

    def flush(self) -> None:
        """Copy slots that have changed on the host to the device."""
        if not self._marked:
            return
        slots = np.array([*self._marked])
        activated = np.array([*self._marked.values()])
        changes = np.where(self._buffer.sampleable(slots), np.where(activated, MAX, KEEP), ZERO)
        self._marked.clear()
        host = self._buffer.arrays()
        self.priorities.advance(self._buffer.n_added)
        for start in range(0, len(slots), self._n_staged):
            chunk = slots[start : start + self._n_staged]
            n = len(chunk)
            staged = self._staging.begin()
            staged["slots"][:n] = chunk
            staged["slots"][n:] = self._padding_slot
            staged["priorities"][:n] = changes[start : start + n]
            staged["priorities"][n:] = ZERO
            for name, array in host.items():
                np.take(array, chunk, axis=0, out=staged[name][:n])
            self._staging.send()
            try:
                self.write()
            except CaptureError:
                # No change may be lost. If this cannot be captured, neither can the updates, which then raise the error.
                self.write = self._write_staged
                self.write()

    def _write_staged(self) -> None:
        staged = self._staging.device_arrays
        slots = staged["slots"]
        for name, array in self.slots.arrays.items():
            array.index_copy_(0, slots, staged[name])
        changes = staged["priorities"]
        now = self.priorities.get(slots)
        self.priorities.set(slots, th.where(changes == MAX, self.max_priority, th.where(changes == KEEP, now, 0.0)))

    def read_priorities(self, slots: np.ndarray) -> tuple[th.Tensor, float]:
        """
        :param slots: (n,)
        :return: priorities on the device as a host tensor (n,), and the largest priority ever assigned
        """
        self.flush()
        return self.priorities.get(th.from_numpy(slots).to(self.device)).cpu(), float(self.max_priority)

    def write_priorities(self, slots: np.ndarray, priorities: th.Tensor, max_priority: float) -> None:
        """
        :param slots: (n,)
        :param priorities: new priorities, on the host, (n,)
        :param max_priority: largest priority ever assigned
        """
        self.priorities.set(th.from_numpy(slots).to(self.device), priorities.to(self.device))
        self.max_priority.fill_(max_priority)

    def update_priorities(self, indices: th.Tensor, priorities: th.Tensor) -> None:
        """
        :param indices: ``indices`` of a batch, which must still be stored, (B,)
        :param priorities: new priorities, positive, (B,)
        """
        # After training has diverged, indices must be valid until the error is raised
        priorities = priorities.nan_to_num(nan=1.0)
        self.priorities.set(indices, priorities)
        th.maximum(self.max_priority, priorities.amax().to(self.max_priority.dtype), out=self.max_priority)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SubtrajectorySamples:
        """
        Like ``SubtrajectoryReplayBuffer.sample``, from the contents at the last ``flush``.

        :param batch_size: Number of sub-trajectories
        :param env: unused, as ``VecNormalize`` is not supported on a device
        :return: the sub-trajectories
        """
        return self._buffer.read(self.slots, self._draw(batch_size), self._buffer.horizon)

    def sample_n_step(self, batch_size: int, env: VecNormalize | None = None) -> NStepSamples:
        """
        Like ``SubtrajectoryReplayBuffer.sample_n_step``, from the contents at the last ``flush``.

        :param batch_size: Number of transitions
        :param env: unused, as ``VecNormalize`` is not supported on a device
        :return: the transitions
        """
        return self._buffer.read_n_step(self.slots, self._draw(batch_size))

    def _draw(self, batch_size: int) -> th.Tensor:
        # After training has diverged, priorities may be NaN. An index out of range would make the CUDA context unusable before
        # an error can be raised.
        return self.priorities.sample(batch_size).clamp_max(self._n_slots - 1)
