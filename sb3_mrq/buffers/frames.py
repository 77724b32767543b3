"""
Storage of observations in the slots of a replay buffer, with frame stacks as single frames.
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
    Observations of one space in numbered slots. Consecutive observations of an episode are in consecutive slots of a ring.

    Consecutive stacks of frames share most of their frames. If the first channel-first uint8 images are such stacks, only the
    newest frame of each is stored, and stacks are rebuilt from the preceding slots. Each later observation is checked. The
    first stack of an episode must be padded with copies of its first frame (like gymnasium's ``FrameStackObservation``) or
    with zeros (like ``VecFrameStack``). If a check fails, everything stored so far is converted to whole observations, with a
    warning.

    :param space: space of the observations
    :param n_slots: number of slots
    :param max_stack: maximum number of frames of a stack that is stored as single frames
    """

    def __init__(self, space: spaces.Space, n_slots: int, max_stack: int):
        shape = get_obs_shape(space)
        assert isinstance(shape, tuple), f"{space} is a Dict space"
        self.shape = shape
        self.dtype = np.dtype(np.float32) if space.dtype == np.float64 else np.dtype(space.dtype)
        self.n_slots = n_slots
        self.max_stack = max_stack
        # Number of channels of a frame, 0 if observations are stored whole
        self.frame_channels = 0
        self.n_stack = 1
        # np.zeros only reserves address space: memory is used once it is written to
        # Has a frame of zeros after the last slot if single frames are stored
        self.padded = np.zeros((0,), dtype=self.dtype)
        # For single frames: whether stacks at the beginning of the episode are padded with zeros, not copies
        self.zero_filled = np.zeros((0,), dtype=bool)

    @property
    def data(self) -> np.ndarray:
        """Contents of the slots, not a copy, (n_slots, ...)."""
        return self.padded[: self.n_slots]

    @property
    def stacked(self) -> bool:
        """Whether observations are stored as single frames."""
        return self.n_stack > 1

    def frame_sizes(self) -> list[int]:
        """
        :return: possible numbers of channels of a frame, ascending; empty if observations cannot be stacks
        """
        if len(self.shape) != 3 or self.dtype != np.uint8:
            return []
        n = self.shape[0]
        return [c for c in range(1, n) if n % c == 0 and n // c <= self.max_stack]

    def get_state(self) -> dict[str, Any]:
        """
        :return: storage format, in JSON types
        """
        return {"allocated": bool(self.data.size), "frame_channels": self.frame_channels}

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Set the storage format and allocate empty arrays.

        :param state: result of ``get_state``
        :raises ValueError: if the format does not fit the shape of the observations
        """
        channels = state["frame_channels"]
        if channels not in (0, *self.frame_sizes()):
            raise ValueError(f"Observations of the shape {self.shape} cannot be stacks of frames with {channels} channels.")
        if state["allocated"]:
            self._allocate(channels)

    def cast(self, obs: np.ndarray) -> np.ndarray:
        """
        :param obs: observations of the environments, (n, ...)
        :return: a copy with dtype and shape of the storage, (n, *shape)
        """
        return np.array(obs, dtype=self.dtype).reshape(-1, *self.shape)

    def _allocate(self, frame_channels: int) -> None:
        self.frame_channels = frame_channels
        self.n_stack = self.shape[0] // frame_channels if frame_channels else 1
        frame_shape = (frame_channels, *self.shape[1:]) if frame_channels else self.shape
        self.padded = np.zeros((self.n_slots + self.stacked, *frame_shape), dtype=self.dtype)
        self.zero_filled = np.zeros(self.n_slots if self.stacked else 0, dtype=bool)

    def _is_stack(self, obs: np.ndarray, next_obs: np.ndarray, beginning: np.ndarray, channels: int) -> bool:
        """Whether observations are stacks of frames with this number of channels; ``beginning`` marks starts of episodes."""
        if not np.array_equal(obs[:, channels:], next_obs[:, :-channels]):
            return False
        first = obs[beginning]
        older = first[:, :-channels].reshape(len(first), self.shape[0] // channels - 1, channels, *self.shape[1:])
        copies = (older == first[:, None, -channels:]).all(axis=(1, 2, 3, 4))
        zeros = ~older.any(axis=(1, 2, 3, 4))
        return bool((copies | zeros).all())

    def allocate(self, obs: np.ndarray, next_obs: np.ndarray) -> None:
        """
        Allocate the arrays, for single frames if the first observations are stacks.

        :param obs: first observations of all environments, (n, *shape)
        :param next_obs: the next observations, (n, *shape)
        """
        shifted = [c for c in self.frame_sizes() if np.array_equal(obs[:, c:], next_obs[:, :-c])]
        stacks = [c for c in shifted if self._is_stack(obs, next_obs, np.ones(len(obs), dtype=bool), c)]
        if shifted and not stacks:
            self._warn("begin with copies of its first frame or with zeros", self.shape[0] // shifted[0])
        self._allocate(stacks[0] if stacks else 0)

    def fits(self, obs: np.ndarray, next_obs: np.ndarray, beginning: np.ndarray) -> bool:
        """
        :param obs: observations, (n, *shape)
        :param next_obs: the next observations, (n, *shape)
        :param beginning: which observations begin an episode, bool (n,)
        :return: whether they can be stored in the current format
        """
        return not self.stacked or self._is_stack(obs, next_obs, beginning, self.frame_channels)

    def store_whole(self, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """
        Convert to whole observations, because an observation does not continue the previous stack.

        :param chunks: slots (m,) and their whole observations (m, *shape), of everything that is stored
        """
        self._warn("continue the previous stack", self.n_stack)
        whole = copy(self)
        whole._allocate(0)
        for slots, obs in chunks:
            whole.write(slots, obs)
        self.__dict__.update(whole.__dict__)

    def _warn(self, failure: str, n_stack: int) -> None:
        """Warn that observations are stored whole, with the memory that this takes."""
        size = self.n_slots * int(np.prod(self.shape)) * self.dtype.itemsize
        warnings.warn(
            f"The image observations look like stacks of {n_stack} frames, which the replay buffer stores as single frames, "
            f"but one of them does not {failure}. Therefore observations are now stored whole: the full buffer takes "
            f"{size / 1e9:.3g} GB instead of {size / n_stack / 1e9:.3g} GB.",
            stacklevel=4,
        )

    def write(self, slots: np.ndarray, obs: np.ndarray) -> None:
        """
        :param slots: (n,)
        :param obs: result of ``cast``, (n, *shape)
        """
        if self.stacked:
            # Only used at the beginning of an episode, when stacks are padded
            self.zero_filled[slots] = ~obs[:, : self.frame_channels].any(axis=(1, 2, 3))
            obs = obs[:, -self.frame_channels :]
        self.data[slots] = obs
