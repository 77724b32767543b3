"""
Reading from the slots of the replay buffer, on the host or on a device.
"""

from typing import Any

import numpy as np
import torch as th

# Flags of a slot. A segment is an unbroken run of transitions of one episode.
HAS_TRANSITION = 1
ENDED = 2  # the transition is the last one of its segment
TERMINATED = 4  # the episode terminated with this transition
HAS_OBSERVATION = 8
SAMPLEABLE = 16  # the transition can be sampled


class Slots:
    """
    Reader of arrays with an entry for each slot of a replay buffer, all on one device. Each environment has a ring of
    ``ring_size`` consecutive slots.

    :param arrays: arrays with at least one entry per slot: ``actions``, ``rewards``, ``flags``, ``ages`` (number of previous
        observations in the segment), and ``observations KEY`` for each key of the observations. For stacks stored as single
        frames, there is also ``zero_filled KEY``, and ``observations KEY`` has a frame of zeros after the last slot.
    :param observation_shapes: shape of a whole observation by key, with the key None if the space is not a Dict
    :param ring_size: number of slots of each environment
    :param n_envs: number of environments
    """

    def __init__(
        self,
        arrays: dict[str, th.Tensor],
        observation_shapes: dict[Any, tuple[int, ...]],
        ring_size: int,
        n_envs: int,
    ):
        self.arrays = arrays
        self.observation_shapes = observation_shapes
        self.ring_size = ring_size
        self.n_slots = ring_size * n_envs
        self.device = arrays["rewards"].device

    def read(self, name: str, slots: th.Tensor) -> th.Tensor:
        """
        :param name: name of an array
        :param slots: (...)
        :return: entries of the array, (..., *)
        """
        array = self.arrays[name]
        # Indexing with square brackets takes up to 15 times as long on a CPU
        flat = slots.reshape(-1)
        if self.device.type != "cpu":
            return array.index_select(0, flat).view(*slots.shape, *array.shape[1:])
        # NumPy allocates huge pages, which reduces the time for many images to a quarter
        out = th.from_numpy(np.empty((len(flat), *array.shape[1:]), dtype=array[:0].numpy().dtype))
        return th.index_select(array, 0, flat, out=out).view(*slots.shape, *array.shape[1:])

    def back(self, slots: th.Tensor, steps: th.Tensor) -> th.Tensor:
        """
        :param slots: (...)
        :param steps: number of slots to go back in the ring, negative to go forward
        :return: the resulting slots, (...)
        """
        position = slots % self.ring_size
        return slots - position + (position - steps) % self.ring_size

    def follow(self, starts: th.Tensor, n_steps: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        Slots of sub-trajectories. After the end of a segment, its last observation and transition are repeated.

        :param starts: slots of the first transitions, (B,)
        :param n_steps: number of transitions, H
        :return: slots of the observations s_0 to s_H, (B, H + 1), slots of the transitions, (B, H), the mask, bool (B, H), and
            whether the segment was terminated with a transition, False after its end, bool (B, H)
        """
        steps = th.arange(n_steps + 1, device=self.device)
        slots = self.back(starts[:, None], -steps)
        flags = self.read("flags", slots)[:, :-1]
        ended = flags & ENDED
        # Nothing has ended before the transition
        mask = ended.cumsum(dim=1) == ended
        length = mask.sum(dim=1, keepdim=True)
        observations = slots.gather(1, th.minimum(steps, length))
        # The slot of a final observation has no valid action
        transitions = slots.gather(1, th.minimum(steps[:-1], length - 1))
        return observations, transitions, mask, ((flags & TERMINATED) != 0) & mask

    def observations(self, slots: th.Tensor) -> Any:
        """
        :param slots: (...)
        :return: whole observations, (..., *obs), or a dict of these
        """
        values = {key: self.observation(key, slots) for key in self.observation_shapes}
        return values[None] if None in values else values

    def observation(self, key: Any, slots: th.Tensor) -> th.Tensor:
        """
        :param key: key of the observations, None if the space is not a Dict
        :param slots: (...)
        :return: whole observations, (..., *obs)
        """
        if f"zero_filled {key}" not in self.arrays:
            return self.read(f"observations {key}", slots)
        shape = self.observation_shapes[key]
        n_stack = shape[0] // self.arrays[f"observations {key}"].shape[1]
        age = self.read("ages", slots)[..., None]
        steps = th.arange(n_stack - 1, -1, -1, device=self.device)
        frames = self.back(slots[..., None], th.minimum(age, steps))
        before_the_first = (age < steps) & self.read(f"zero_filled {key}", slots)[..., None]
        frames = frames.masked_fill_(before_the_first, self.n_slots)
        return self.read(f"observations {key}", frames).view(*slots.shape, *shape)
