"""
Storage of one kind of observation in the slots of a replay buffer, frame stacks as single frames.
"""

import warnings
from collections.abc import Iterable
from copy import copy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape


class ObservationStorage:
    """
    Observations in numbered slots. Consecutive observations of an episode are in consecutive slots of one ring.

    A channel-first uint8 image that is a stack of frames holds each frame again in the next observations. If the first
    observations look like such stacks, only the newest frame of each is stored, and the stack is put together again from the
    slots before. Each later observation is checked. An episode must begin with a stack that is filled up with copies of its
    first frame (as by gymnasium's ``FrameStackObservation``) or with zeros (as by ``VecFrameStack``). If a check fails,
    everything stored so far is converted to whole observations, with a warning.

    :param space: space of the observations
    :param n_slots: number of slots
    :param max_stack: most frames that a stack may have to be stored as single frames
    """

    def __init__(self, space: spaces.Space, n_slots: int, max_stack: int):
        shape = get_obs_shape(space)
        assert isinstance(shape, tuple), f"{space} is not one kind of observation"
        self.shape = shape
        self.dtype = np.dtype(np.float32) if space.dtype == np.float64 else np.dtype(space.dtype)
        self.n_slots = n_slots
        self.max_stack = max_stack
        # Channels of a frame, 0 if observations are stored whole
        self.frame_channels = 0
        self.n_stack = 1
        # np.zeros reserves address space only: memory is taken by the pages that are written to
        # With a frame of zeros after the last slot if single frames are stored
        self.padded = np.zeros((0,), dtype=self.dtype)
        # Of single frames: whether the stack is filled up with zeros if the episode is younger than the stack, or with copies
        self.zero_filled = np.zeros((0,), dtype=bool)

    @property
    def data(self) -> np.ndarray:
        """What is stored in the slots, no copy, (n_slots, ...)."""
        return self.padded[: self.n_slots]

    @property
    def stacked(self) -> bool:
        """Whether observations are stored as single frames."""
        return self.n_stack > 1

    def frame_sizes(self) -> list[int]:
        """
        :return: channels that a frame may have, if the observations are stacks, smallest first
        """
        if len(self.shape) != 3 or self.dtype != np.uint8:
            return []
        n = self.shape[0]
        return [c for c in range(1, n) if n % c == 0 and n // c <= self.max_stack]

    def get_state(self) -> dict[str, Any]:
        """
        :return: how observations are stored, as numbers for a JSON file
        """
        return {"allocated": bool(self.data.size), "frame_channels": self.frame_channels}

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Store observations in a given way from now on, and reserve the memory; nothing is stored then.

        :param state: from ``get_state``
        :raises ValueError: if observations of this shape cannot be stored so
        """
        channels = state["frame_channels"]
        if channels not in (0, *self.frame_sizes()):
            raise ValueError(f"Observations of the shape {self.shape} are no stacks of frames of {channels} channels.")
        if state["allocated"]:
            self._allocate(channels)

    def cast(self, obs: np.ndarray) -> np.ndarray:
        """
        :param obs: observations as the environments give them, (n, ...)
        :return: a copy in the storage's dtype and shape, (n, *shape)
        """
        return np.array(obs, dtype=self.dtype).reshape(-1, *self.shape)

    def _allocate(self, frame_channels: int) -> None:
        self.frame_channels = frame_channels
        self.n_stack = self.shape[0] // frame_channels if frame_channels else 1
        frame_shape = (frame_channels, *self.shape[1:]) if frame_channels else self.shape
        self.padded = np.zeros((self.n_slots + self.stacked, *frame_shape), dtype=self.dtype)
        self.zero_filled = np.zeros(self.n_slots if self.stacked else 0, dtype=bool)

    def _is_stack(self, obs: np.ndarray, next_obs: np.ndarray, beginning: np.ndarray, channels: int) -> bool:
        """Whether transitions, some of which begin an episode, fit stacks of frames of so many channels."""
        if not np.array_equal(obs[:, channels:], next_obs[:, :-channels]):
            return False
        first = obs[beginning]
        older = first[:, :-channels].reshape(len(first), self.shape[0] // channels - 1, channels, *self.shape[1:])
        copies = (older == first[:, None, -channels:]).all(axis=(1, 2, 3, 4))
        zeros = ~older.any(axis=(1, 2, 3, 4))
        return bool((copies | zeros).all())

    def allocate(self, obs: np.ndarray, next_obs: np.ndarray) -> None:
        """
        Reserve the memory, for single frames if the first transitions look like stacks of them.

        :param obs: first observations of all environments, (n, *shape)
        :param next_obs: the observations after them, (n, *shape)
        """
        shifted = [c for c in self.frame_sizes() if np.array_equal(obs[:, c:], next_obs[:, :-c])]
        stacks = [c for c in shifted if self._is_stack(obs, next_obs, np.ones(len(obs), dtype=bool), c)]
        if shifted and not stacks:
            self._warn("begin with copies of its first frame or with zeros", self.shape[0] // shifted[0])
        self._allocate(stacks[0] if stacks else 0)

    def fits(self, obs: np.ndarray, next_obs: np.ndarray, beginning: np.ndarray) -> bool:
        """
        :param obs: observations, (n, *shape)
        :param next_obs: the observations after them, (n, *shape)
        :param beginning: which of them begin an episode, bool (n,)
        :return: whether they can be stored in the way that observations are stored now
        """
        return not self.stacked or self._is_stack(obs, next_obs, beginning, self.frame_channels)

    def store_whole(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """
        Store whole observations from now on, because one came that does not continue the stack before it.

        :param chunks: slots, (m,), and the whole observations there, (m, *shape), of everything that is stored
        """
        self._warn("continue the stack before it", self.n_stack)
        whole = copy(self)
        whole._allocate(0)
        for slots, obs in chunks:
            whole.write(slots, obs)
        self.__dict__.update(whole.__dict__)

    def _warn(self, failure: str, n_stack: int) -> None:
        """Tell what storing whole observations means for a stack of frames that did not do what it should."""
        size = self.n_slots * int(np.prod(self.shape)) * self.dtype.itemsize
        warnings.warn(
            f"The image observations look like stacks of {n_stack} frames, which the replay buffer stores as single frames, "
            f"but one came that does not {failure}. From here on observations are stored whole: {size / 1e9:.3g} GB for the "
            f"full buffer instead of {size / n_stack / 1e9:.3g} GB.",
            stacklevel=4,
        )

    def write(self, slots: np.ndarray, obs: np.ndarray) -> None:
        """
        :param slots: (n,)
        :param obs: as from ``cast``, (n, *shape)
        """
        if self.stacked:
            # Only matters in the first observations of an episode, whose stacks are filled up
            self.zero_filled[slots] = ~obs[:, : self.frame_channels].any(axis=(1, 2, 3))
            obs = obs[:, -self.frame_channels :]
        self.data[slots] = obs
