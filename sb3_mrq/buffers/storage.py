"""
Storage of episodes in the slots of a replay buffer: what is written when, and what leaves again.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer

from sb3_mrq.buffers.frames import ObservationStorage
from sb3_mrq.buffers.priorities import FadedPriorityTree, PriorityTree
from sb3_mrq.buffers.slots import ENDED, HAS_OBSERVATION, HAS_TRANSITION, SAMPLEABLE, TERMINATED, Slots
from sb3_mrq.checks import LARGEST_REWARD, BadValueError, ObservationChecks, check_range, check_type, subspaces_of

try:
    import psutil
except ImportError:
    psutil = None


SelfStorage = TypeVar("SelfStorage", bound="SegmentStorage")


class Copy(Protocol):
    """A copy of the buffer that is kept up to date, see :class:`sb3_mrq.accelerate.device_copy.DeviceCopy`."""

    def mark(self, slots: np.ndarray, activated: bool = False) -> None:
        """Note that slots, (n,), have changed; ``activated`` if they can be sampled from now on."""

    def read_priorities(self, slots: np.ndarray) -> tuple[th.Tensor, float]:
        """Return the priorities of slots, (n,), and the largest one ever assigned."""

    def write_priorities(self, slots: np.ndarray, priorities: th.Tensor, max_priority: float) -> None:
        """Set the priorities of slots, (n,), and the largest one ever assigned."""

    def close(self) -> None:
        """Free the memory."""


class BufferState(NamedTuple):
    """
    What a replay buffer holds.

    :param numbers: numbers, strings and lists of these, for a JSON file
    :param slots: arrays with an entry for each slot, by name; no copies, (n_slots, ...) each
    :param environments: arrays with an entry for each environment, by name, (n_envs, ...) each
    :param written: how many slots of each environment's ring were ever written to; the others hold zeros, (n_envs,)
    """

    numbers: dict[str, Any]
    slots: dict[str, np.ndarray]
    environments: dict[str, np.ndarray]
    written: np.ndarray


class SegmentStorage(ReplayBuffer):
    """
    What a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer` stores: the episodes of several environments, and which of their
    transitions can be sampled. The parameters are those of the buffer.
    """

    # Called with a capacity, and with a device for a copy there
    priorities_class: Callable[..., PriorityTree] = PriorityTree
    # Slots handled at once if all of them are
    CHUNK = 1 << 17

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = True,
        handle_timeout_termination: bool = True,
        horizon: int = 5,
        n_steps: int = 3,
        fade: float = 1.0,
        fade_min: float = 0.1,
    ):
        # Not ReplayBuffer's constructor, which allocates everything at once
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.optimize_memory_usage = True
        self.handle_timeout_termination = handle_timeout_termination
        if horizon < 1 or n_steps < 1:
            raise ValueError(f"horizon ({horizon}) and n_steps ({n_steps}) must be at least 1.")
        if not (0 < fade <= 1 and 0 <= fade_min <= 1):
            raise ValueError(f"fade ({fade}) must be above 0 and at most 1, and fade_min ({fade_min}) between 0 and 1.")
        self.fade, self.fade_min = fade, fade_min
        if self.fades:
            self.priorities_class = partial(FadedPriorityTree, fade=fade, fade_min=fade_min)
        # As in ReplayBuffer, from here on the size for each environment
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.horizon = horizon
        self.n_steps = n_steps
        self.checks = ObservationChecks(observation_space, n_envs)
        # Transitions from a start on that must be stored before it can be sampled
        self.lookahead = max(horizon, n_steps)
        self.reset()

    def reset(self) -> None:
        """
        Empty the buffer and give its memory back.
        """
        self.pos = 0
        self.full = False
        self._max_priority = 1.0
        self.has_terminated = False
        self.n_sampleable = 0
        self._n_stored = 0
        self.n_added = 0
        self._storages: dict[str | None, ObservationStorage] = {}
        # Allocated by the first add
        self.actions = np.zeros((0, self.action_dim))
        self.rewards = np.zeros(0, dtype=np.float32)
        self._flags = np.zeros(0, dtype=np.uint8)
        self._ages = np.zeros(0, dtype=np.uint8)
        self._priorities = self.priorities_class(1)
        self._slots: Slots | None = None
        # First slot of the ring of each environment
        self._ring = np.arange(self.n_envs) * self.buffer_size
        # Write position in each ring: slot of the latest next observation, or of the next first one if no segment is running
        self._write_pos = np.zeros(self.n_envs, dtype=np.int64)
        # Whether a segment is running, and how many transitions it has
        self._running = np.zeros(self.n_envs, dtype=bool)
        self._length = np.zeros(self.n_envs, dtype=np.int64)
        self._last_next_obs: dict[str | None, np.ndarray] = {}
        self._copy: Copy | None = None

    @property
    def fades(self) -> bool:
        """Whether the probability of a transition falls with its age."""
        return self.fade < 1 and self.fade_min < 1

    def check_size(self) -> None:
        """
        :raises ValueError: if the buffer is too small for the horizon and the number of environments
        """
        smallest = self.lookahead + 2
        if self.buffer_size < smallest:
            raise ValueError(
                f"The replay buffer has {self.buffer_size} slots for each of {self.n_envs} environments, but a horizon of "
                f"{self.lookahead} steps takes {smallest}: use a buffer_size of {smallest * self.n_envs} or more."
            )

    def _allocate(self) -> None:
        self.check_size()
        n_slots = self.buffer_size * self.n_envs
        # With more frames in a stack there might be times when nothing can be sampled
        max_stack = min(self.buffer_size - self.lookahead - 1, 255)
        dtype = np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype
        self.actions = np.zeros((n_slots, self.action_dim), dtype=dtype)
        self.rewards = np.zeros(n_slots, dtype=np.float32)
        self._flags = np.zeros(n_slots, dtype=np.uint8)
        self._ages = np.zeros(n_slots, dtype=np.uint8)
        self._priorities = self.priorities_class(n_slots)
        # Last: this tells that the others are there
        self._storages = {
            key: ObservationStorage(subspace, n_slots, max_stack)
            for key, subspace in subspaces_of(self.observation_space).items()
        }

    @contextmanager
    def _explain_memory_error(self) -> Iterator[None]:
        """Raise a ``MemoryError`` in this context again with the remedy."""
        try:
            yield
        except MemoryError as error:
            raise MemoryError(
                f"{self.buffer_size * self.n_envs} slots of the replay buffer take more memory than there is: use a smaller "
                f"buffer_size. {error}"
            ) from error

    def _check_memory(self) -> None:
        """Warn if memory will not suffice once every slot is written to, as the buffers of SB3 do."""
        if psutil is None:
            return
        size = sum(array.nbytes for array in self._slot_arrays().values())
        available = psutil.virtual_memory().available
        if size > available:
            warnings.warn(
                "This system does not have apparently enough memory to store the complete replay buffer "
                f"{size / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=3,
            )

    def size(self) -> int:
        """
        :return: number of stored transitions, over all environments
        """
        return self._n_stored

    @property
    def max_priority(self) -> float:
        """Largest priority ever assigned."""
        self._pull_priorities()
        return self._max_priority

    def attach_copy(self, copy: Copy) -> None:
        """
        Keep a copy of the buffer up to date. From then on its priorities count; whoever asks this buffer for priorities gets
        those of the copy.

        :param copy: told of each slot that changes, instead of the copy before it
        """
        self.detach_copy()
        self._copy = copy

    def detach_copy(self) -> None:
        """Take over the priorities of the attached copy, if there is one, and close it."""
        self._pull_priorities()
        if self._copy is not None:
            self._copy.close()
        self._copy = None

    def arrays(self) -> dict[str, np.ndarray]:
        """
        :return: arrays with an entry for each slot, or more, as :class:`~sb3_mrq.buffers.slots.Slots` reads them; no copies
        """
        arrays = {"actions": self.actions, "rewards": self.rewards, "flags": self._flags, "ages": self._ages}
        arrays |= {name: tensor.numpy() for name, tensor in self._priorities.arrays().items()}
        for key, storage in self._storages.items():
            arrays[f"observations {key}"] = storage.padded
            if storage.stacked:
                arrays[f"zero_filled {key}"] = storage.zero_filled
        return arrays

    def observation_shapes(self) -> dict[Any, tuple[int, ...]]:
        """
        :return: shape of one whole observation by key of a Dict, under None if the space is no Dict
        """
        return {key: storage.shape for key, storage in self._storages.items()}

    @property
    def slots(self) -> Slots:
        """The slots on the host, for reading."""
        if self._slots is None:
            arrays = {name: th.from_numpy(array) for name, array in self.arrays().items()}
            self._slots = Slots(arrays, self.observation_shapes(), self.buffer_size, self.n_envs)
        return self._slots

    def sampleable(self, slots: np.ndarray) -> np.ndarray:
        """
        :param slots: (n,)
        :return: whether a sub-trajectory can start there, bool (n,)
        """
        return (self._flags[slots] & SAMPLEABLE) != 0

    def priorities(self) -> th.Tensor:
        """
        :return: the priority of each slot, float64 (n_slots,); only those of sampleable slots have a meaning
        """
        self._pull_priorities()
        return self._priorities.leaves.clone()

    def _pull_priorities(self) -> None:
        """Take over the priorities of the attached copy, if there is one."""
        if self._copy is not None:
            starts = np.flatnonzero(self._flags & SAMPLEABLE)
            priorities, self._max_priority = self._copy.read_priorities(starts)
            self._priorities.set(th.from_numpy(starts), priorities)

    def __getstate__(self) -> dict[str, Any]:
        self._pull_priorities()
        return self.__dict__ | {"_copy": None, "_slots": None}

    def _cast(self, obs: np.ndarray | dict[str, np.ndarray]) -> dict[str | None, np.ndarray]:
        values: dict[Any, np.ndarray] = obs if isinstance(obs, dict) else {None: obs}
        return {key: storage.cast(values[key]) for key, storage in self._storages.items()}

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store one transition of each environment.

        :param obs: observations, (n_envs, ...) or a dict of these
        :param next_obs: observations after the step, for an episode that ended its final one, (n_envs, ...)
        :param action: Box actions scaled to [-1, 1], others as integers of the space, (n_envs, ...)
        :param reward: (n_envs,)
        :param done: whether the episode ended, (n_envs,)
        :param infos: ``info["TimeLimit.truncated"]`` tells that an episode did not end by termination
        :raises ValueError: if the buffer is too small (at the first call)
        :raises BadValueError: if an observation or reward cannot be learned from; nothing is stored then
        """
        if not self._storages:
            with self._explain_memory_error():
                self._allocate()
        action = np.reshape(action, (self.n_envs, self.action_dim))
        done = np.asarray(done, dtype=bool)
        reward = np.asarray(reward)
        for name, value in (("reward", reward), ("done", done)):
            if value.shape != (self.n_envs,):
                raise BadValueError(f"The environments gave {name}s of the shape {value.shape}, not {(self.n_envs,)}")
        check_type(reward, "reward")
        check_range(reward, "reward", LARGEST_REWARD)
        reward = reward.astype(np.float32, copy=False)
        ended = bool(np.count_nonzero(done))
        self.checks.check(next_obs, "final observation" if ended else "observation")
        next_obs_ = self._cast(next_obs)
        self.checks.check_form(obs)
        with np.errstate(invalid="ignore", over="ignore"):  # what casting spoils is refused below
            obs_ = self._cast(obs)
        continues = self._continues(obs_)
        all_continue = np.count_nonzero(continues) == self.n_envs
        if not all_continue:
            # The others have been checked as next observations of the step before
            self.checks.check(obs)
            self._close(self._running & ~continues)

        beginning = ~self._running
        self._prepare_storages(obs_, next_obs_, beginning)
        slots = self._ring + self._write_pos
        if not all_continue:
            first_obs = {key: value[beginning] for key, value in obs_.items()}
            self._write_observations(slots[beginning], first_obs, ages=None)
            self._length[beginning] = 0
        next_pos = (self._write_pos + 1) % self.buffer_size
        self.full |= bool(np.count_nonzero(next_pos) < self.n_envs)
        self._write_observations(self._ring + next_pos, next_obs_, ages=self._ages[slots])

        self.actions[slots] = action
        self.rewards[slots] = reward
        flags = np.full(self.n_envs, HAS_OBSERVATION | HAS_TRANSITION, dtype=np.uint8)
        if ended:
            truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool)
            terminated = done & ~truncated if self.handle_timeout_termination else done
            flags[terminated] |= TERMINATED
            self.has_terminated |= bool(terminated.any())
        self._changed(slots)
        # Next to each other, since they would not fit together after Ctrl-C between them
        self._flags[slots] = flags
        self._n_stored += self.n_envs
        self.n_added += self.n_envs
        faded = self._priorities.store(slots, self.n_added)
        if faded is not None:
            self._changed(faded)
        self._length += 1
        self._write_pos = next_pos
        self._running[:] = True
        self._last_next_obs = next_obs_
        complete = self._length >= self.lookahead
        if np.count_nonzero(complete):
            self._activate(self._ring[complete] + (self._write_pos[complete] - self.lookahead) % self.buffer_size)
        if ended:
            self._close(done)
        self.pos = int(self._write_pos[0])

    def _prepare_storages(
        self, obs: dict[str | None, np.ndarray], next_obs: dict[str | None, np.ndarray], beginning: np.ndarray
    ) -> None:
        """Allocate the storages at the first transitions, and let those that new ones do not fit store whole observations."""
        changed = False
        for key, storage in self._storages.items():
            if not storage.data.size:
                with self._explain_memory_error():
                    storage.allocate(obs[key], next_obs[key])
            elif not storage.fits(obs[key], next_obs[key], beginning):
                with self._explain_memory_error():
                    storage.store_whole(self._stored_observations(key))
            else:
                continue
            changed, self._slots = True, None
        if changed:
            self._check_memory()

    def _stored_observations(self, key: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Slots, (m,), and the observations there, (m, ...), a few hundred at a time."""
        stored = np.flatnonzero(self._flags & HAS_OBSERVATION)
        for first in range(0, len(stored), 256):
            slots = stored[first : first + 256]
            yield slots, self.slots.observation(key, th.from_numpy(slots)).numpy()

    def _continues(self, obs: dict[str | None, np.ndarray]) -> np.ndarray:
        """
        :param obs: of all environments
        :return: where they are the next observations of the step before, in a segment that is running, bool (n_envs,)
        """
        continues = self._running
        if np.count_nonzero(continues):
            for key, value in obs.items():
                same = (value == self._last_next_obs[key]).reshape(self.n_envs, -1)
                continues = continues & np.logical_and.reduce(same, axis=1)
        return continues

    def _write_observations(self, slots: np.ndarray, obs: dict[str | None, np.ndarray], ages: np.ndarray | None) -> None:
        """
        Write observations over whatever the slots hold.

        :param slots: (m,)
        :param obs: (m, ...) each
        :param ages: ages of the observations before them, (m,), None if they begin a segment
        """
        self._evict(slots)
        for key, storage in self._storages.items():
            storage.write(slots, obs[key])
        self._ages[slots] = 0 if ages is None else np.minimum(ages, 254) + 1
        self._flags[slots] = HAS_OBSERVATION
        self._changed(slots)

    def _changed(self, slots: np.ndarray, activated: bool = False) -> None:
        if self._copy is not None:
            self._copy.mark(slots, activated)

    def _evict(self, slots: np.ndarray) -> None:
        """Remove the transitions that start at the slots, or need them for their stack of frames."""
        if not self.full:
            return
        depth = max(storage.n_stack for storage in self._storages.values())
        if depth > 1:
            position = slots % self.buffer_size
            steps = np.arange(depth)[:, None]
            following = slots - position + (position + steps) % self.buffer_size
            slots = following[self._ages[following] >= steps]
        slots = slots[(self._flags[slots] & HAS_TRANSITION) != 0]
        if len(slots) == 0:
            return
        self.n_sampleable -= int(np.count_nonzero(self.sampleable(slots)))
        self._flags[slots] = HAS_OBSERVATION
        self.rewards[slots] = 0
        self._n_stored -= len(slots)
        self._set_priorities(slots, 0.0)
        self._changed(slots)

    def _activate(self, slots: np.ndarray) -> None:
        """Let sub-trajectories start at the slots from now on."""
        self._flags[slots] |= SAMPLEABLE
        self._set_priorities(slots, self._max_priority)
        self.n_sampleable += len(slots)
        self._changed(slots, activated=True)

    def _set_priorities(self, slots: np.ndarray, priority: float) -> None:
        self._priorities.set(th.from_numpy(slots), th.tensor(priority, dtype=th.float64))

    def _close(self, envs: np.ndarray) -> None:
        """End the running segment of some environments, bool (n_envs,), at its last observation, which keeps its slot."""
        if not envs.any():
            return
        ring, write_pos, length = self._ring[envs, None], self._write_pos[envs, None], self._length[envs, None]
        last = (ring + (write_pos - 1) % self.buffer_size)[:, 0]
        self._flags[last] |= ENDED
        self._changed(last)
        if self.lookahead > 1:
            back = np.arange(1, self.lookahead)
            waiting = ring + (write_pos - back) % self.buffer_size
            self._activate(waiting[back <= length])
        self._write_pos[envs] = (self._write_pos[envs] + 1) % self.buffer_size
        self.full |= bool((self._write_pos[envs] == 0).any())
        self._running[envs] = False

    @property
    def between_episodes(self) -> bool:
        """Whether the next transitions of all environments begin new episodes."""
        return not self._running.any()

    def empty_copy(self: SelfStorage, buffer_size: int) -> SelfStorage:
        """
        :param buffer_size: number of slots for each environment
        :return: an empty buffer of this size, otherwise like this one
        """
        buffer = copy(self)
        buffer.buffer_size = buffer_size
        buffer.reset()
        return buffer

    def get_state(self) -> BufferState:
        """
        :return: everything that ``set_state`` of a buffer with the same arguments needs to hold the same
        """
        self._pull_priorities()
        numbers = {
            "pos": self.pos,
            "full": self.full,
            "max_priority": self._max_priority,
            "has_terminated": self.has_terminated,
            "n_sampleable": self.n_sampleable,
            "n_stored": self._n_stored,
            "n_added": self.n_added,
            "storages": [[key, storage.get_state()] for key, storage in self._storages.items()],
        }
        used = (self._flags != 0).reshape(self.n_envs, -1)
        last = used.shape[1] - used[:, ::-1].argmax(axis=1) if used.size else 0
        written = np.where(used.any(axis=1), last, 0)
        return BufferState(numbers, self._slot_arrays(), self._environment_arrays(), written)

    def set_state(self, numbers: dict[str, Any], fill: Callable[[BufferState], None]) -> None:
        """
        Hold what another buffer with the same arguments held, and nothing else. After an error the buffer is empty.

        :param numbers: those of its state
        :param fill: called once, with a state whose arrays are zero and are to be filled
        :raises ValueError: if it cannot be the state of a buffer with these arguments
        """
        self.reset()
        try:
            if numbers["storages"]:
                self._allocate()
                for key, state in numbers["storages"]:
                    self._storages[key].set_state(state)
                # To be filled
                self._last_next_obs = {
                    key: np.zeros((self.n_envs, *storage.shape), dtype=storage.dtype)
                    for key, storage in self._storages.items()
                    if storage.data.size
                }
            fill(BufferState(numbers, self._slot_arrays(), self._environment_arrays(), np.zeros(self.n_envs, dtype=np.int64)))
            self.pos = numbers["pos"]
            self.full = numbers["full"]
            self._max_priority = numbers["max_priority"]
            self.has_terminated = numbers["has_terminated"]
            self.n_sampleable = numbers["n_sampleable"]
            self._n_stored = numbers["n_stored"]
            # Files of 0.1 do not have it
            self.n_added = numbers.get("n_added", self._n_stored)
            self._rebuild_priorities()
        except BaseException:
            self.reset()
            raise

    def _slot_arrays(self) -> dict[str, np.ndarray]:
        if not self._storages:
            return {}
        arrays = self.arrays() | {f"observations {key}": storage.data for key, storage in self._storages.items()}
        return {**arrays, "priorities": self._priorities.leaves.numpy()}

    def _environment_arrays(self) -> dict[str, np.ndarray]:
        # The names are those of the files of 0.1
        arrays = {"head": self._write_pos, "running": self._running, "length": self._length}
        for key, value in self._last_next_obs.items():
            arrays[f"last_next_obs{'' if key is None else f' {key}'}"] = value
        return arrays

    def _rebuild_priorities(self) -> None:
        """
        Complete the priorities after their leaves were written to.

        :raises ValueError: if what the buffer holds does not fit together
        """
        priorities = self._priorities.leaves.numpy()
        if not (self._flags & SAMPLEABLE).any():
            # Files of 0.1 do not have this flag
            self._flags[np.flatnonzero(priorities)] |= SAMPLEABLE
        n_stored, n_sampleable = (int(np.count_nonzero(self._flags & flag)) for flag in (HAS_TRANSITION, SAMPLEABLE))
        if (n_stored, n_sampleable) != (self._n_stored, self.n_sampleable):
            raise ValueError(
                f"There are {n_stored} transitions, {n_sampleable} to be sampled, but there should be {self._n_stored}, "
                f"{self.n_sampleable} to be sampled."
            )
        if not (priorities.max() < np.inf and priorities.min() >= 0 and 0 < self._max_priority < np.inf):
            raise ValueError("There are priorities that are negative or not finite.")
        if ((self._write_pos < 0) | (self._write_pos >= self.buffer_size) | (self._length < 0)).any():
            raise ValueError("The next slot to write to is outside the buffer.")
        self._priorities.advance(self.n_added)
        for first in range(0, len(priorities), self.CHUNK):
            if priorities[first : first + self.CHUNK].any():
                self._priorities.rebuild(first, min(first + self.CHUNK, len(priorities)))
