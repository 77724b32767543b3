"""
Storage of episodes in the slots of a replay buffer: writing and overwriting transitions.
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
from stable_baselines3.common.vec_env import VecEnv

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
    """Interface of a copy of the buffer, see :class:`sb3_mrq.accelerate.device_copy.DeviceCopy`."""

    def mark(self, slots: np.ndarray, activated: bool = False) -> None:
        """Mark slots, (n,), that have changed; ``activated`` if they can now be sampled."""

    def read_priorities(self, slots: np.ndarray) -> tuple[th.Tensor, float]:
        """Return the priorities of slots, (n,), and the largest priority ever assigned."""

    def write_priorities(self, slots: np.ndarray, priorities: th.Tensor, max_priority: float) -> None:
        """Set the priorities of slots, (n,), and the largest priority ever assigned."""

    def close(self) -> None:
        """Free the memory."""


class BufferState(NamedTuple):
    """
    Contents of a replay buffer.

    :param numbers: scalar state, in JSON types
    :param slots: arrays with an entry for each slot, by name, not copies, (n_slots, ...) each
    :param environments: arrays with an entry for each environment, by name, (n_envs, ...) each
    :param written: number of slots of each environment that have been used, (n_envs,); the remaining ones are zero
    """

    numbers: dict[str, Any]
    slots: dict[str, np.ndarray]
    environments: dict[str, np.ndarray]
    written: np.ndarray


class SegmentStorage(ReplayBuffer):
    """
    Storage of a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`, with the same parameters: the episodes of several
    environments, and which transitions can be sampled.
    """

    # Called with a capacity, and for a copy also with a device
    priorities_class: Callable[..., PriorityTree] = PriorityTree
    # Whether transitions can be sampled only after the end of their episode, and whether sampling needs the host
    waits_for_end = False
    only_on_host = False
    # Number of slots processed at once in operations on all slots
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
        # Not the constructor of ReplayBuffer, which allocates memory
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.optimize_memory_usage = True
        self.handle_timeout_termination = handle_timeout_termination
        if horizon < 1 or n_steps < 1:
            raise ValueError(f"horizon is {horizon} and n_steps is {n_steps}, but both must be at least 1.")
        if not (0 < fade <= 1 and 0 <= fade_min <= 1):
            raise ValueError(f"fade is {fade} and fade_min is {fade_min}, but must be in (0, 1] and [0, 1].")
        self.fade, self.fade_min = fade, fade_min
        if self.fades:
            self.priorities_class = partial(FadedPriorityTree, fade=fade, fade_min=fade_min)
        # As in ReplayBuffer, this is the size for each environment
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.horizon = horizon
        self.n_steps = n_steps
        self.checks = ObservationChecks(observation_space, n_envs)
        # Number of transitions of a sub-trajectory that must be stored before it can be sampled
        self.lookahead = max(horizon, n_steps)
        self.reset()

    def reset(self) -> None:
        """
        Empty the buffer and free its memory.
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
        # Write position in each ring: slot of the last next observation, or of the next first observation if no segment is
        # running
        self._write_pos = np.zeros(self.n_envs, dtype=np.int64)
        # Whether a segment is running, and its number of transitions
        self._running = np.zeros(self.n_envs, dtype=bool)
        self._length = np.zeros(self.n_envs, dtype=np.int64)
        self._last_next_obs: dict[str | None, np.ndarray] = {}
        self._copy: Copy | None = None

    @property
    def fades(self) -> bool:
        """Whether the probability of a transition falls with its age."""
        return self.fade < 1 and self.fade_min < 1

    def stop_fading(self) -> None:
        """Sample by priority alone from now on."""
        if not self.fades:
            return
        priorities = self.priorities()
        self.fade, self._slots = 1.0, None
        self.priorities_class = PriorityTree
        self._priorities = PriorityTree(len(priorities))
        self._priorities.set(th.arange(len(priorities)), priorities)

    def check_size(self) -> None:
        """
        :raises ValueError: if the buffer is too small for the horizon and the number of environments
        """
        smallest = self.lookahead + 2
        if self.buffer_size < smallest:
            raise ValueError(
                f"The replay buffer has {self.buffer_size} slots for each of {self.n_envs} environments, but a horizon of "
                f"{self.lookahead} steps needs {smallest}: use a buffer_size of {smallest * self.n_envs} or more."
            )

    def _allocate(self) -> None:
        self.check_size()
        n_slots = self.buffer_size * self.n_envs
        # Larger stacks could leave no transition to sample
        max_stack = min(self.buffer_size - self.lookahead - 1, 255)
        dtype = np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype
        self.actions = np.zeros((n_slots, self.action_dim), dtype=dtype)
        self.rewards = np.zeros(n_slots, dtype=np.float32)
        self._flags = np.zeros(n_slots, dtype=np.uint8)
        self._ages = np.zeros(n_slots, dtype=np.uint8)
        self._priorities = self.priorities_class(n_slots)
        # Assigned last, as it marks the other arrays as allocated
        self._storages = {
            key: ObservationStorage(subspace, n_slots, max_stack)
            for key, subspace in subspaces_of(self.observation_space).items()
        }

    @contextmanager
    def _explain_memory_error(self) -> Iterator[None]:
        """Add a remedy to a ``MemoryError`` in this context."""
        try:
            yield
        except MemoryError as error:
            raise MemoryError(
                f"The {self.buffer_size * self.n_envs} slots of the replay buffer take more memory than available: use a "
                f"smaller buffer_size. {error}"
            ) from error

    def _check_memory(self) -> None:
        """Warn like the buffers of SB3 if the full buffer will not fit into memory."""
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
        Attach a copy, which replaces the previous one. The buffer marks changed slots in it, and takes priorities from it.

        :param copy: the copy
        """
        self.detach_copy()
        self._copy = copy

    def detach_copy(self) -> None:
        """Fetch the priorities of the attached copy, if there is one, and close it."""
        self._pull_priorities()
        if self._copy is not None:
            self._copy.close()
        self._copy = None

    def arrays(self) -> dict[str, np.ndarray]:
        """
        :return: arrays for :class:`~sb3_mrq.buffers.slots.Slots`, not copies
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
        :return: shape of a whole observation by key, with the key None if the space is not a Dict
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
        :return: whether the transitions in the slots can be sampled, bool (n,)
        """
        return (self._flags[slots] & SAMPLEABLE) != 0

    def priorities(self) -> th.Tensor:
        """
        :return: priority of each slot, float64 (n_slots,), undefined for slots that cannot be sampled
        """
        self._pull_priorities()
        return self._priorities.leaves.clone()

    def _pull_priorities(self) -> None:
        """Fetch the priorities of the attached copy, if there is one."""
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
        :param next_obs: next observations, or the final observation of an episode that ended, (n_envs, ...)
        :param action: Box actions scaled to [-1, 1], discrete actions as integers of the space, (n_envs, ...)
        :param reward: (n_envs,)
        :param done: whether the episode ended, (n_envs,)
        :param infos: ``info["TimeLimit.truncated"]`` marks an episode that was truncated
        :raises ValueError: if the buffer is too small (at the first call)
        :raises BadValueError: if an observation or a reward is invalid; nothing is stored
        """
        self._allocate_at_first()
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
        with np.errstate(invalid="ignore", over="ignore"):  # values that overflow are rejected below
            obs_ = self._cast(obs)
        continues = self._continues(obs_)
        all_continue = np.count_nonzero(continues) == self.n_envs
        if not all_continue:
            # Otherwise they have been checked as next observations of the previous step
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
        self._store_infos(slots, infos)
        flags = np.full(self.n_envs, HAS_OBSERVATION | HAS_TRANSITION, dtype=np.uint8)
        if ended:
            truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool)
            terminated = done & ~truncated if self.handle_timeout_termination else done
            flags[terminated] |= TERMINATED
            self.has_terminated |= bool(terminated.any())
        self._changed(slots)
        # Consecutive statements, so that Ctrl-C is unlikely to leave them inconsistent
        self._flags[slots] = flags
        self._count(slots)
        self._length += 1
        self._write_pos = next_pos
        self._running[:] = True
        self._last_next_obs = next_obs_
        complete = self._length >= self.lookahead
        if not self.waits_for_end and np.count_nonzero(complete):
            self._activate(self._ring[complete] + (self._write_pos[complete] - self.lookahead) % self.buffer_size)
        if ended:
            self._close(done)
        self.pos = int(self._write_pos[0])

    def add_episode(
        self, env: int, obs: np.ndarray | dict[str, np.ndarray], actions: np.ndarray, rewards: np.ndarray, terminated: bool
    ) -> None:
        """
        Store a whole episode of m transitions, as ``add`` would one by one. A running segment ends. Values are not checked.

        :param env: number of the environment, of which the buffer has at least m + 1 slots
        :param obs: observations from the first to the final one, (m + 1, ...) or a dict of these
        :param actions: Box actions scaled to [-1, 1], discrete actions as integers of the space, (m, ...)
        :param rewards: (m,)
        :param terminated: whether the episode was terminated, not truncated
        """
        self._allocate_at_first()
        n = len(rewards)
        this_env = np.arange(self.n_envs) == env
        self._close(self._running & this_env)
        obs_ = self._cast(obs)
        # The first transition alone decides whether frames are stacked
        for last in (1, n):
            first_obs, next_obs = ({key: value[i : last + i] for key, value in obs_.items()} for i in (0, 1))
            self._prepare_storages(first_obs, next_obs, np.arange(last) == 0)
        positions = self._write_pos[env] + np.arange(n + 1)
        self.full |= bool(positions[-1] >= self.buffer_size)
        slots = self._ring[env] + positions % self.buffer_size
        self._write_observations(slots, obs_, ages=np.arange(-1, n))
        slots = slots[:-1]
        self.actions[slots] = actions.reshape(n, self.action_dim)
        self.rewards[slots] = rewards
        self._flags[slots] |= HAS_TRANSITION
        if terminated or not self.handle_timeout_termination:
            self._flags[slots[-1]] |= TERMINATED
            self.has_terminated = True
        self._count(slots)
        self._length[env] = n
        self._write_pos[env] = positions[-1] % self.buffer_size
        self._running[env] = True
        for key, value in obs_.items():
            self._last_next_obs.setdefault(key, np.zeros((self.n_envs, *value.shape[1:]), dtype=value.dtype))[env] = value[-1]
        if not self.waits_for_end:
            self._activate(slots[: max(n - self.lookahead + 1, 0)])
        self._close(this_env)
        self.pos = int(self._write_pos[0])

    def _allocate_at_first(self) -> None:
        """Allocate memory, unless it was allocated before."""
        if not self._storages:
            with self._explain_memory_error():
                self._allocate()

    def _count(self, slots: np.ndarray) -> None:
        """Count transitions that have been stored in slots, in this order."""
        self._n_stored += len(slots)
        self.n_added += len(slots)
        faded = self._priorities.store(slots, self.n_added)
        if faded is not None:
            self._changed(faded)

    def _store_infos(self, slots: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Store the infos of transitions, for a subclass that needs them."""

    def set_env(self, env: VecEnv | None) -> None:
        """
        Called with the environments of the model, also after they have changed. A subclass may use them to read samples.

        :param env: the environments
        """

    def _prepare_storages(
        self, obs: dict[str | None, np.ndarray], next_obs: dict[str | None, np.ndarray], beginning: np.ndarray
    ) -> None:
        """Allocate the storages at the first transition, or convert them if observations do not fit the storage format."""
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
        """Iterate over used slots, (m,), and their observations, (m, ...), a few hundred at a time."""
        stored = np.flatnonzero(self._flags & HAS_OBSERVATION)
        for first in range(0, len(stored), 256):
            slots = stored[first : first + 256]
            yield slots, self.slots.observation(key, th.from_numpy(slots)).numpy()

    def _continues(self, obs: dict[str | None, np.ndarray]) -> np.ndarray:
        """
        :param obs: observations of all environments, (n_envs, ...) each
        :return: whether they continue the running segments, as the next observations of the previous step, bool (n_envs,)
        """
        continues = self._running
        if np.count_nonzero(continues):
            for key, value in obs.items():
                same = (value == self._last_next_obs[key]).reshape(self.n_envs, -1)
                continues = continues & np.logical_and.reduce(same, axis=1)
        return continues

    def _write_observations(self, slots: np.ndarray, obs: dict[str | None, np.ndarray], ages: np.ndarray | None) -> None:
        """
        Write observations, and remove transitions that are overwritten.

        :param slots: (m,)
        :param obs: observations by key, (m, ...) each
        :param ages: ages of the previous observations, (m,), None if the observations begin a segment
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
        """Remove transitions that start in the slots, or whose frame stack needs them."""
        if not self.full:
            return
        depth = max(storage.n_stack for storage in self._storages.values())
        if depth > 1:
            position = slots % self.buffer_size
            steps = np.arange(depth)[:, None]
            following = slots - position + (position + steps) % self.buffer_size
            slots = following[self._ages[following] >= steps]
            slots = np.unique(slots)
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
        """Make the transitions in the slots sampleable."""
        self._flags[slots] |= SAMPLEABLE
        self._set_priorities(slots, self._max_priority)
        self.n_sampleable += len(slots)
        self._changed(slots, activated=True)

    def _set_priorities(self, slots: np.ndarray, priority: float) -> None:
        self._priorities.set(th.from_numpy(slots), th.tensor(priority, dtype=th.float64))

    def _close(self, envs: np.ndarray) -> None:
        """End the running segments of some environments, bool (n_envs,)."""
        if not envs.any():
            return
        ring, write_pos, length = self._ring[envs, None], self._write_pos[envs, None], self._length[envs, None]
        last = (ring + (write_pos - 1) % self.buffer_size)[:, 0]
        self._flags[last] |= ENDED
        self._changed(last)
        n_waiting = min(int(length.max()), self.buffer_size - 1) if self.waits_for_end else self.lookahead - 1
        if n_waiting > 0:
            back = np.arange(1, n_waiting + 1)
            waiting = ring + (write_pos - back) % self.buffer_size
            self._activate(waiting[back <= length])
        self._write_pos[envs] = (self._write_pos[envs] + 1) % self.buffer_size
        self.full |= bool((self._write_pos[envs] == 0).any())
        self._running[envs] = False

    @property
    def between_episodes(self) -> bool:
        """Whether the next transition of each environment begins a new episode."""
        return not self._running.any()

    def empty_copy(self: SelfStorage, buffer_size: int) -> SelfStorage:
        """
        :param buffer_size: number of slots for each environment
        :return: an empty buffer of this size, with otherwise the same arguments
        """
        buffer = copy(self)
        buffer.buffer_size = buffer_size
        buffer.reset()
        return buffer

    def get_state(self) -> BufferState:
        """
        :return: contents of the buffer, for ``set_state`` of a buffer with the same arguments
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
        Replace the contents by the contents of another buffer with the same arguments. After an error the buffer is empty.

        :param numbers: ``numbers`` of the state of the other buffer
        :param fill: called once with a state, whose arrays it must fill in place
        :raises ValueError: if the state is inconsistent, or does not fit the arguments
        """
        self.reset()
        try:
            if numbers["storages"]:
                self._allocate()
                for key, state in numbers["storages"]:
                    self._storages[key].set_state(state)
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
        # Names as in files of version 0.1
        arrays = {"head": self._write_pos, "running": self._running, "length": self._length}
        for key, value in self._last_next_obs.items():
            arrays[f"last_next_obs{'' if key is None else f' {key}'}"] = value
        return arrays

    def _rebuild_priorities(self) -> None:
        """
        Recompute the sums of priorities after the leaves were written to, and check the state.

        :raises ValueError: if the state is inconsistent
        """
        priorities = self._priorities.leaves.numpy()
        if not (self._flags & SAMPLEABLE).any():
            # Files of version 0.1 do not have this flag
            self._flags[np.flatnonzero(priorities)] |= SAMPLEABLE
        n_stored, n_sampleable = (int(np.count_nonzero(self._flags & flag)) for flag in (HAS_TRANSITION, SAMPLEABLE))
        if (n_stored, n_sampleable) != (self._n_stored, self.n_sampleable):
            raise ValueError(
                f"The flags mark {n_stored} transitions, of which {n_sampleable} can be sampled, but the counters are "
                f"{self._n_stored} and {self.n_sampleable}."
            )
        if not (priorities.max() < np.inf and priorities.min() >= 0 and 0 < self._max_priority < np.inf):
            raise ValueError("A priority is negative or not finite.")
        if ((self._write_pos < 0) | (self._write_pos >= self.buffer_size) | (self._length < 0)).any():
            raise ValueError("A write position is outside the buffer, or the length of a segment is negative.")
        self._priorities.advance(self.n_added)
        for first in range(0, len(priorities), self.CHUNK):
            if priorities[first : first + self.CHUNK].any():
                self._priorities.rebuild(first, min(first + self.CHUNK, len(priorities)))
