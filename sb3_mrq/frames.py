"""
Storage of one kind of observation in the places of a replay buffer, frame stacks as single frames.
"""

import warnings
from copy import copy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape


class ObservationStorage:
    """
    Observations in numbered places, ``n_rings`` rings of ``ring_size`` places each. Consecutive observations of an episode
    stand in consecutive places of one ring.

    A channel-first uint8 image that is a stack of frames holds each frame again in the next observations. Where that is so,
    found out from the first observations and checked at each later one, only the newest frame of each observation is stored,
    and the stack is put together again from the places before. An episode must then begin with a stack that is filled up with
    copies of its first frame (as by gymnasium's ``FrameStackObservation``) or with zeros (as by ``VecFrameStack``). Where the
    check fails, everything stored so far is converted, to larger frames or to whole observations.

    :param space: space of the observations
    :param ring_size: places in each ring
    :param n_rings: number of rings
    :param max_stack: most frames a stack may have to be stored as single frames
    """

    # Places converted at once where a stack turns out not to be one
    CHUNK = 256

    def __init__(self, space: spaces.Space, ring_size: int, n_rings: int, max_stack: int):
        shape = get_obs_shape(space)
        assert isinstance(shape, tuple), f"{space} is not one kind of observation"
        self.shape = shape
        self.dtype = np.dtype(np.float32) if space.dtype == np.float64 else np.dtype(space.dtype)
        self.ring_size = ring_size
        self.n_places = ring_size * n_rings
        # Channels of a frame that may turn out to be stacked, smallest first
        self.candidates: list[int] = []
        if len(shape) == 3 and self.dtype == np.uint8:
            n_channels = shape[0]
            self.candidates = [c for c in range(1, n_channels) if n_channels % c == 0 and n_channels // c <= max_stack]
        self.frame_channels = 0
        self.n_stack = 1
        # np.zeros reserves address space only: memory is taken by the pages that are written to
        self.data = np.zeros((0,), dtype=self.dtype)
        # Of single frames: whether the stack is filled up with zeros where the episode is younger than the stack, or with
        # copies
        self.zero_filled = np.zeros((0,), dtype=bool)

    @property
    def stacked(self) -> bool:
        """Whether observations are stored as single frames."""
        return self.n_stack > 1

    def get_state(self) -> dict[str, Any]:
        """
        :return: how observations are stored, as numbers for a JSON file
        """
        return {
            "allocated": bool(self.data.size),
            "frame_channels": self.frame_channels,
            "candidates": [int(channels) for channels in self.candidates],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Store observations in a given way from now on, and reserve the memory; nothing is stored then.

        :param state: from ``get_state``
        :raises ValueError: if observations of this shape cannot be stored so
        """
        possible = {0}
        if len(self.shape) == 3 and self.dtype == np.uint8:
            possible |= {c for c in range(1, self.shape[0]) if self.shape[0] % c == 0}
        for channels in (state["frame_channels"], *state["candidates"]):
            if channels not in possible:
                raise ValueError(f"Observations of the shape {self.shape} are no stacks of frames of {channels} channels.")
        self.candidates = list(state["candidates"])
        if state["allocated"]:
            self._allocate(state["frame_channels"])

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
        self.data = np.zeros((self.n_places, *frame_shape), dtype=self.dtype)
        self.zero_filled = np.zeros(self.n_places if self.stacked else 0, dtype=bool)

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
        shifted = [c for c in self.candidates if np.array_equal(obs[:, c:], next_obs[:, :-c])]
        self.candidates = [c for c in shifted if self._is_stack(obs, next_obs, np.ones(len(obs), dtype=bool), c)]
        if shifted and not self.candidates:
            self._warn("begin with copies of its first frame or with zeros", self.shape[0] // shifted[0])
        self._allocate(self.candidates.pop(0) if self.candidates else 0)

    def fits(self, obs: np.ndarray, next_obs: np.ndarray, beginning: np.ndarray) -> bool:
        """
        :param obs: observations, (n, *shape)
        :param next_obs: the observations after them, (n, *shape)
        :param beginning: which of them begin an episode, bool (n,)
        :return: whether they can be stored in the way that observations are stored now
        """
        return not self.stacked or self._is_stack(obs, next_obs, beginning, self.frame_channels)

    def refit(
        self, obs: np.ndarray, next_obs: np.ndarray, beginning: np.ndarray, stored: np.ndarray, ages: np.ndarray
    ) -> None:
        """
        Find another way of storing for observations that do not fit, and convert what is stored to it.

        :param obs: observations, (n, *shape)
        :param next_obs: the observations after them, (n, *shape)
        :param beginning: which of them begin an episode, bool (n,)
        :param stored: places that hold an observation now, (m,)
        :param ages: for each place of the buffer, observations before it in its episode
        """
        while self.candidates:
            channels = self.candidates.pop(0)
            if self._is_stack(obs, next_obs, beginning, channels) and self._convert(channels, stored, ages):
                return
        self._warn("continue the stack before it", self.n_stack)
        self._convert(0, stored, ages)

    def _warn(self, failure: str, n_stack: int) -> None:
        """Tell what storing whole observations means for a stack of frames that did not do what it should."""
        size = self.n_places * int(np.prod(self.shape)) * self.dtype.itemsize
        warnings.warn(
            f"The image observations look like stacks of {n_stack} frames, which the replay buffer stores as single frames, "
            f"but one came that does not {failure}. From here on observations are stored whole: {size / 1e9:.3g} GB for the "
            f"full buffer instead of {size / n_stack / 1e9:.3g} GB.",
            stacklevel=4,
        )

    def _convert(self, frame_channels: int, stored: np.ndarray, ages: np.ndarray) -> bool:
        """Store what is in ``stored`` in another way (see ``_allocate``) unless something would be lost."""
        converted = copy(self)
        converted._allocate(frame_channels)
        chunks = np.split(stored, range(self.CHUNK, len(stored), self.CHUNK))
        for places in chunks:
            converted.write(places, self.gather(places, ages))
        if not all(np.array_equal(self.gather(places, ages), converted.gather(places, ages)) for places in chunks):
            return False
        self.__dict__.update(converted.__dict__)
        return True

    def write(self, places: np.ndarray, obs: np.ndarray) -> None:
        """
        :param places: (n,)
        :param obs: as from ``cast``, (n, *shape)
        """
        if self.stacked:
            # Where it matters, in the first observations of an episode, the oldest frame of the stack is not an observed one
            self.zero_filled[places] = ~obs[:, : self.frame_channels].any(axis=(1, 2, 3))
            obs = obs[:, -self.frame_channels :]
        self.data[places] = obs

    def previous(self, places: np.ndarray, steps: np.ndarray | int) -> np.ndarray:
        """
        :param places: (...)
        :param steps: how many places to go back in the ring, less than ``ring_size``
        :return: (...)
        """
        position = places % self.ring_size
        return places - steps + np.where(position < steps, self.ring_size, 0)

    def gather(self, places: np.ndarray, ages: np.ndarray) -> np.ndarray:
        """
        :param places: (...)
        :param ages: for each place of the buffer, observations before it in its episode
        :return: whole observations, (..., *shape)
        """
        if not self.stacked:
            return self.data.take(places, axis=0)  # several times as fast as indexing
        age = ages[places]
        out = np.empty((*places.shape, self.n_stack, *self.data.shape[1:]), dtype=self.dtype)
        for back in range(self.n_stack):
            frames = self.data.take(self.previous(places, np.minimum(age, back)), axis=0)
            if back > 0:
                frames[(age < back) & self.zero_filled[places]] = 0
            out[..., self.n_stack - 1 - back, :, :, :] = frames
        return out.reshape(*places.shape, *self.shape)
