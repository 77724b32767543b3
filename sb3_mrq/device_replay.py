"""
A copy of the replay buffer on a device, from which batches are drawn there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mrq.buffers import ENDED, TERMINATED, NStepSamples, SubtrajectoryReplayBuffer, SubtrajectorySamples
from sb3_mrq.graphs import CaptureError, Graph, Staging
from sb3_mrq.priorities import DevicePriorities

# What becomes of the priority of a place that has changed
KEEP, ZERO, MAX = 0, 1, 2


class DeviceReplay:
    """
    All places of a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer` on a device, frame stacks as single frames here too,
    and their priorities. The buffer goes on storing transitions in the host's memory and notes which places change; before the
    next batch these go to the device in one copy. Drawing, gathering and the new priorities of a batch are work of the device
    alone, with static shapes, to be captured as CUDA graphs.

    :param buffer: with at least one transition
    :param device: with room for ``size_of(buffer)`` bytes
    :raises CaptureError: for types of observations that torch stores, but hardly computes with
    """

    def __init__(self, buffer: SubtrajectoryReplayBuffer, device: th.device):
        self.device = device
        self._buffer = buffer
        self._host = buffer.places()
        for name, array in self._host.items():
            if array.dtype.kind == "u" and array.dtype.itemsize > 1:
                raise CaptureError(f"{name} are of the type {array.dtype}.")
        n_places = len(self._host["rewards"])
        # One place more than there are, for what fills up a copy of fewer places
        self._nowhere = n_places
        self._arrays = {name: self._upload(array) for name, array in self._host.items()}
        self.max_priority = th.full((), buffer.max_priority, dtype=th.float64, device=device)
        self.priorities = DevicePriorities(n_places + 1, device)
        self.priorities.fill(th.from_numpy(buffer.priorities(np.arange(n_places))).to(device))

        # A step of one environment changes four places at most times
        self._n_slots = 8 * (1 + buffer.n_envs)
        self._staging = Staging(
            {
                "places": ((self._n_slots,), th.int64),
                "priorities": ((self._n_slots,), th.int64),
                **{name: ((self._n_slots, *array.shape[1:]), array.dtype) for name, array in self._arrays.items()},
            },
            device,
        )
        self._write: Callable[[], None] = Graph(self._write_staged, device)
        self._marked: list[np.ndarray] = []
        self._activated: list[np.ndarray] = []

    def close(self) -> None:
        """Give the memory on the device back; graphs that refer to it would keep it."""
        self._arrays.clear()
        self._write = self._write_staged
        del self.priorities, self._staging

    @staticmethod
    def size_of(buffer: SubtrajectoryReplayBuffer) -> int:
        """
        :param buffer: a replay buffer
        :return: bytes that its copy takes
        """
        places = buffer.places()
        return sum(array.nbytes for array in places.values()) + 8 * len(places["rewards"])

    def _upload(self, array: np.ndarray) -> th.Tensor:
        """An array with one place more, on the device; of a large one only the pages that have been written to are read."""
        n = len(array)
        if not self._buffer.full and self._buffer.n_envs == 1:
            n = min(n, self._buffer.pos + 1)
        copy = th.zeros((len(array) + 1, *array.shape[1:]), dtype=th.from_numpy(array[:0]).dtype, device=self.device)
        copy[:n].copy_(th.from_numpy(array[:n]))
        return copy

    def is_current(self, buffer: SubtrajectoryReplayBuffer) -> bool:
        """
        :param buffer: the buffer
        :return: whether this is a copy of the arrays in which it stores observations now
        """
        places = buffer.places()
        return places.keys() == self._host.keys() and all(places[name] is array for name, array in self._host.items())

    def mark(self, places: np.ndarray, activated: bool = False) -> None:
        """
        Note that places have changed on the host.

        :param places: (n,)
        :param activated: whether they can be sampled from now on, at the largest priority
        """
        self._marked.append(places)
        if activated:
            self._activated.append(places)
        if len(self._marked) > 1000:
            # Many steps without training
            self._marked = [np.unique(np.concatenate(self._marked))]
            self._activated = [np.unique(np.concatenate(self._activated))] if self._activated else []

    def flush(self) -> None:
        """Bring over what has changed on the host."""
        if not self._marked:
            return
        places = np.unique(np.concatenate(self._marked))
        activated = np.isin(places, np.concatenate([places[:0], *self._activated]))
        sampleable = self._buffer.priorities(places) > 0
        changes = np.where(sampleable, np.where(activated, MAX, KEEP), ZERO)
        self._marked.clear()
        self._activated.clear()
        for start in range(0, len(places), self._n_slots):
            chunk = places[start : start + self._n_slots]
            n = len(chunk)
            slots = self._staging.begin()
            slots["places"][:n] = chunk
            slots["places"][n:] = self._nowhere
            slots["priorities"][:n] = changes[start : start + n]
            slots["priorities"][n:] = ZERO
            for name, array in self._host.items():
                np.take(array, chunk, axis=0, out=slots[name][:n])
            self._staging.send()
            try:
                self._write()
            except CaptureError:
                # Nothing must be lost. Where this cannot be captured the updates cannot either, and tell so.
                self._write = self._write_staged
                self._write()

    def _write_staged(self) -> None:
        staged = self._staging.device_arrays
        places = staged["places"]
        for name, array in self._arrays.items():
            array.index_copy_(0, places, staged[name])
        changes = staged["priorities"]
        now = self.priorities.get(places)
        self.priorities.set(places, th.where(changes == MAX, self.max_priority, th.where(changes == KEEP, now, 0.0)))

    def read_priorities(self, indices: np.ndarray) -> tuple[np.ndarray, float]:
        """
        :param indices: places, (n,)
        :return: their priorities as they are on the device, (n,), and the largest one ever assigned
        """
        self.flush()
        priorities = self.priorities.get(th.from_numpy(indices).to(self.device))
        return priorities.cpu().numpy(), float(self.max_priority)

    def write_priorities(self, indices: np.ndarray, priorities: np.ndarray, max_priority: float) -> None:
        """
        :param indices: places, (n,)
        :param priorities: what to set their priorities to, (n,)
        :param max_priority: the largest one ever assigned
        """
        self.priorities.set(*(th.from_numpy(array).to(self.device) for array in (indices, priorities)))
        self.max_priority.fill_(max_priority)

    def update_priorities(self, indices: th.Tensor, priorities: th.Tensor) -> None:
        """
        :param indices: ``indices`` of a sample, since which nothing was added, (B,)
        :param priorities: positive, (B,)
        """
        # Where training has diverged draws must still be places, until that is told
        priorities = priorities.nan_to_num(nan=1.0)
        self.priorities.set(indices, priorities)
        th.maximum(self.max_priority, priorities.amax().to(self.max_priority.dtype), out=self.max_priority)

    def sample(self, batch_size: int) -> SubtrajectorySamples:
        """
        As ``SubtrajectoryReplayBuffer.sample``, but of what was there at the last ``flush``.

        :param batch_size: Number of sub-trajectories
        :return: the sub-trajectories
        """
        return self.get_subtrajectories(self._draw(batch_size))

    def sample_n_step(self, batch_size: int) -> NStepSamples:
        """
        As ``SubtrajectoryReplayBuffer.sample_n_step``, but of what was there at the last ``flush``.

        :param batch_size: Number of transitions
        :return: the transitions
        """
        return self.get_n_step(self._draw(batch_size))

    def _draw(self, batch_size: int) -> th.Tensor:
        # Where training has diverged, and priorities are not numbers, any place there is: one beyond them all would end the
        # device's context, and with it the chance to tell
        return self.priorities.sample(batch_size).clamp_max(self._nowhere - 1)

    def get_subtrajectories(self, indices: th.Tensor) -> SubtrajectorySamples:
        """
        :param indices: places of starts, (B,)
        :return: the sub-trajectories that begin there
        """
        places, transitions, mask = self._follow(indices, self._buffer.horizon)
        return SubtrajectorySamples(
            self._observations(places), self._arrays["actions"][transitions], *self._masked(transitions, mask), indices
        )

    def get_n_step(self, indices: th.Tensor) -> NStepSamples:
        """
        :param indices: places of starts, (B,)
        :return: the transitions that begin there, with the rewards and the observation of an n-step target
        """
        places, transitions, mask = self._follow(indices, self._buffer.n_steps)
        return NStepSamples(
            self._observations(places[:, 0]),
            self._arrays["actions"][indices],
            *self._masked(transitions, mask),
            self._observations(places[:, -1]),
            indices,
        )

    def _previous(self, places: th.Tensor, steps: th.Tensor) -> th.Tensor:
        """The places so many steps before, in the same ring."""
        position = places % self._buffer.buffer_size
        return places - position + (position - steps) % self._buffer.buffer_size

    def _follow(self, indices: th.Tensor, n_steps: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """As of the buffer; the mask is an integer one."""
        steps = th.arange(n_steps + 1, device=self.device)
        places = self._previous(indices[:, None], -steps)
        going_on = ((self._arrays["flags"][places[:, :-2]] & ENDED) == 0).long().cumprod(dim=1)
        mask = th.cat([th.ones_like(places[:, :1]), going_on], dim=1)
        length = mask.sum(dim=1, keepdim=True)
        observations = places.gather(1, th.minimum(steps, length))
        transitions = places.gather(1, th.minimum(steps[:-1], length - 1))
        return observations, transitions, mask

    def _masked(self, places: th.Tensor, mask: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Rewards, terminations and the mask itself as float tensors, (B, H) each."""
        terminated = (self._arrays["flags"][places] & TERMINATED) != 0
        return self._arrays["rewards"][places].where(mask == 1, 0.0), (terminated & (mask == 1)).float(), mask.float()

    def _observations(self, places: th.Tensor) -> Any:
        """(...) places to (..., *obs) tensors, or a dict of these."""
        is_dict = isinstance(self._buffer.observation_space, spaces.Dict)
        values = {key: self._gather(key, places, shape) for key, shape in self._buffer.observation_shapes().items()}
        return values if is_dict else values[None]

    def _gather(self, key: Any, places: th.Tensor, shape: tuple[int, ...]) -> th.Tensor:
        """Whole observations, (..., *shape), see ``ObservationStorage.gather``."""
        data = self._arrays[f"observations {key}"]
        zero_filled = self._arrays.get(f"zero_filled {key}")
        if zero_filled is None:
            return data[places]
        n_stack = shape[0] // data.shape[1]
        back = th.arange(n_stack - 1, -1, -1, device=self.device)
        age = self._arrays["ages"][places][..., None]
        frames = data[self._previous(places[..., None], th.minimum(age, back))]
        before_the_first = (age < back) & zero_filled[places][..., None]
        return frames.masked_fill_(before_the_first[..., None, None, None], 0).view(*places.shape, *shape)
