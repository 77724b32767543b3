"""
The replay buffer of MR.Q: sub-trajectories of several environments, sampled by priority.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq.checks import LARGEST_REWARD, BadValueError, ObservationChecks, check_range, check_type, subspaces_of
from sb3_mrq.frames import ObservationStorage
from sb3_mrq.observations import map_observation, unbind_time
from sb3_mrq.priorities import PriorityTree

try:
    import psutil
except ImportError:
    psutil = None

if TYPE_CHECKING:
    from sb3_mrq.device_replay import DeviceReplay

# Flags of a place. A stretch is an uninterrupted piece of an episode: all of it, but for a reset in the middle.
STORED = 1  # holds a transition, not only an observation
ENDED = 2  # the transition is the last of its stretch
TERMINATED = 4  # ... and the episode terminated there
PRESENT = 8  # holds an observation


class SubtrajectorySamples(NamedTuple):
    """
    Sub-trajectories of H transitions, torch tensors, ``indices`` too where they were drawn on the device. Observations are
    dicts where the space is one.

    :param observations: s_0 to s_H, the final observation repeated past the end of the episode, (B, H + 1, ...)
    :param actions: Box actions scaled to [-1, 1], others as integers of the space, (B, H, action_dim)
    :param rewards: 0 where the mask is 0, (B, H)
    :param terminated: 1 where the episode terminated (not truncated), else 0, (B, H)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
    :param indices: places of the starts, for ``update_priorities``, (B,)
    """

    observations: th.Tensor | dict[str, th.Tensor]
    actions: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    mask: th.Tensor
    indices: np.ndarray | th.Tensor


class NStepSamples(NamedTuple):
    """
    Transitions with what an n-step target needs, torch tensors, ``indices`` too where they were drawn on the device.
    Observations are dicts where the space is one.

    :param observations: s_0, (B, ...)
    :param actions: a_0, Box actions scaled to [-1, 1], others as integers of the space, (B, action_dim)
    :param rewards: 0 where the mask is 0, (B, n)
    :param terminated: 1 where the episode terminated (not truncated), else 0, (B, n)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, n)
    :param next_observations: s_n, or the final observation of an episode that ends before, (B, ...)
    :param indices: places of the starts, for ``update_priorities``, (B,)
    """

    observations: th.Tensor | dict[str, th.Tensor]
    actions: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    mask: th.Tensor
    next_observations: th.Tensor | dict[str, th.Tensor]
    indices: np.ndarray | th.Tensor


class BufferState(NamedTuple):
    """
    What a replay buffer holds.

    :param numbers: numbers, strings and lists of these, for a JSON file
    :param places: what there is for every place, by name: the arrays themselves, no copies, (n_places, ...) each
    :param environments: what there is for every environment, by name, (n_envs, ...) each
    :param written: how many places of each environment's ring were ever written to; the others hold zeros, (n_envs,)
    """

    numbers: dict[str, Any]
    places: dict[str, np.ndarray]
    environments: dict[str, np.ndarray]
    written: np.ndarray


class SubtrajectoryReplayBuffer(ReplayBuffer):
    """
    Replay buffer that samples sub-trajectories by priority (LAP, Fujimoto et al., 2020, arXiv 2007.06049).

    Every environment has a ring of ``buffer_size // n_envs`` places of its own. A place holds one observation and the action,
    reward and flags of the transition that starts there; the next observation is the one in the next place. The final
    observation of an episode takes a place of its own, so that an episode of m transitions takes m + 1 places. Frame stacks
    are stored as single frames (see :class:`sb3_mrq.frames.ObservationStorage`); a transition leaves the buffer with the
    oldest frame it needs.

    An ``add`` whose observation is not the next observation of that environment's previous ``add`` closes the episode before
    it as truncated: the environment was reset in the middle.

    A transition can be sampled once ``max(horizon, n_steps)`` transitions from it on are there, or its episode has ended.
    It then takes the largest priority ever assigned. Past the end of an episode sub-trajectories are masked.

    Memory is allocated by the first ``add`` and taken as places are written to.

    :param buffer_size: Number of places, over all environments
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Accepted as SB3's buffers do; observations are always stored once
    :param handle_timeout_termination: whether truncation and termination are told apart; if not, no value is expected after
        either
    :param horizon: Transitions in a sub-trajectory
    :param n_steps: Transitions of the n-step samples
    """

    # Priorities handled at once where all are
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
    ):
        # Not ReplayBuffer's constructor, which allocates everything at once
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.optimize_memory_usage = True
        self.handle_timeout_termination = handle_timeout_termination
        if horizon < 1 or n_steps < 1:
            raise ValueError(f"horizon ({horizon}) and n_steps ({n_steps}) must be at least 1.")
        # As in ReplayBuffer, from here on the size for each environment
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.horizon = horizon
        self.n_steps = n_steps
        self.checks = ObservationChecks(observation_space, n_envs)
        # Transitions from a start on that must be there for it to be sampled
        self.reach = max(horizon, n_steps)
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
        self._storages: dict[str | None, ObservationStorage] = {}
        # Allocated by the first add
        self.actions = np.zeros((0, self.action_dim))
        self.rewards = np.zeros(0, dtype=np.float32)
        self._flags = np.zeros(0, dtype=np.uint8)
        self._ages = np.zeros(0, dtype=np.uint8)
        self._priorities = PriorityTree(1)
        # First place of the ring of each environment
        self._ring = np.arange(self.n_envs) * self.buffer_size
        # Where in its ring the latest next observation is or, if no stretch is running, the next first one will be
        self._head = np.zeros(self.n_envs, dtype=np.int64)
        # Whether a stretch is running, and how many transitions it has
        self._running = np.zeros(self.n_envs, dtype=bool)
        self._length = np.zeros(self.n_envs, dtype=np.int64)
        self._last_next_obs: dict[str | None, np.ndarray] = {}
        self._mirror: DeviceReplay | None = None

    def check_size(self) -> None:
        """
        :raises ValueError: if the buffer is too small for the horizon and the number of environments
        """
        smallest = self.reach + 2
        if self.buffer_size < smallest:
            raise ValueError(
                f"The replay buffer has {self.buffer_size} places for each of {self.n_envs} environments, but a horizon of "
                f"{self.reach} steps takes {smallest}: use a buffer_size of {smallest * self.n_envs} or more."
            )

    def _allocate(self) -> None:
        self.check_size()
        n_places = self.buffer_size * self.n_envs
        # With more frames in a stack there might be times when nothing can be sampled
        max_stack = min(self.buffer_size - self.reach - 1, 255)
        dtype = np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype
        self.actions = np.zeros((n_places, self.action_dim), dtype=dtype)
        self.rewards = np.zeros(n_places, dtype=np.float32)
        self._flags = np.zeros(n_places, dtype=np.uint8)
        self._ages = np.zeros(n_places, dtype=np.uint8)
        self._priorities = PriorityTree(n_places)
        # Last, as what tells that the others are there
        self._storages = {
            key: ObservationStorage(subspace, self.buffer_size, self.n_envs, max_stack)
            for key, subspace in subspaces_of(self.observation_space).items()
        }

    @contextmanager
    def _remedy(self) -> Iterator[None]:
        """For what takes memory, an error that says what to do where there is none."""
        try:
            yield
        except MemoryError as error:
            raise MemoryError(
                f"{self.buffer_size * self.n_envs} places of the replay buffer take more memory than there is: use a smaller "
                f"buffer_size. {error}"
            ) from error

    def _check_memory(self) -> None:
        """Warn where memory will not do once every place is written to, as the buffers of SB3 do."""
        if psutil is None:
            return
        size = sum(array.nbytes for array in self._place_arrays().values())
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

    def mirror(self, device: th.device) -> "DeviceReplay":
        """
        Keep a copy of everything on a device, to sample there without work of the host. From then on the copy's priorities
        count; what is asked of this buffer takes them from there.

        :param device: where to, one that has room for ``DeviceReplay.size_of(self)`` bytes
        :return: the copy, the same one until the buffer is emptied or stores its observations in another way
        """
        from sb3_mrq.device_replay import DeviceReplay

        if self._mirror is None or self._mirror.device != device or not self._mirror.is_current(self):
            self.drop_mirror()
            self._mirror = DeviceReplay(self, device)
        return self._mirror

    def drop_mirror(self) -> None:
        """Give up the copy on a device, if there is one."""
        self._pull_priorities()
        if self._mirror is not None:
            self._mirror.close()
        self._mirror = None

    def places(self) -> dict[str, np.ndarray]:
        """
        :return: what there is for every place, by name, (n_places, ...) each: the arrays themselves, no copies
        """
        arrays = {"actions": self.actions, "rewards": self.rewards, "flags": self._flags, "ages": self._ages}
        for key, storage in self._storages.items():
            arrays[f"observations {key}"] = storage.data
            if storage.stacked:
                arrays[f"zero_filled {key}"] = storage.zero_filled
        return arrays

    def observation_shapes(self) -> dict[Any, tuple[int, ...]]:
        """
        :return: shape of one whole observation by key of a Dict, under None where it is none
        """
        return {key: storage.shape for key, storage in self._storages.items()}

    def priorities(self, indices: np.ndarray) -> np.ndarray:
        """
        :param indices: places, (n,)
        :return: their priorities, positive for those that can be sampled, (n,). Where there is a copy on a device the positive
            ones may be out of date.
        """
        return self._priorities.get(indices)

    def _pull_priorities(self) -> None:
        """Take over the priorities of the copy on a device, if there is one."""
        if self._mirror is not None:
            places = np.flatnonzero(self._priorities.get(np.arange(len(self._flags))))
            priorities, self._max_priority = self._mirror.read_priorities(places)
            self._priorities.set(places, priorities)

    def __getstate__(self) -> dict[str, Any]:
        self._pull_priorities()
        return self.__dict__ | {"_mirror": None}

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
            with self._remedy():
                self._allocate()
        action = np.reshape(action, (self.n_envs, self.action_dim))
        done = np.asarray(done, dtype=bool)
        reward = np.asarray(reward)
        for name, value in (("reward", reward), ("done", done)):
            if value.shape != (self.n_envs,):
                raise BadValueError(f"The environments gave {name}s of the shape {value.shape}, not {(self.n_envs,)},")
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
        stored_otherwise = False
        for key, storage in self._storages.items():
            if not storage.data.size:
                with self._remedy():
                    storage.allocate(obs_[key], next_obs_[key])
            elif not storage.fits(obs_[key], next_obs_[key], beginning):
                with self._remedy():
                    storage.refit(obs_[key], next_obs_[key], beginning, np.flatnonzero(self._flags & PRESENT), self._ages)
            else:
                continue
            stored_otherwise = True
        if stored_otherwise:
            self._check_memory()

        places = self._ring + self._head
        if not all_continue:
            first_obs = {key: value[beginning] for key, value in obs_.items()}
            self._write_observations(places[beginning], first_obs, ages=None)
            self._length[beginning] = 0
        next_head = (self._head + 1) % self.buffer_size
        self.full |= bool(np.count_nonzero(next_head) < self.n_envs)
        self._write_observations(self._ring + next_head, next_obs_, ages=self._ages[places])

        self.actions[places] = action
        self.rewards[places] = reward
        flags = np.full(self.n_envs, PRESENT | STORED, dtype=np.uint8)
        if ended:
            truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool)
            terminated = done & ~truncated if self.handle_timeout_termination else done
            flags[terminated] |= TERMINATED
            self.has_terminated |= bool(terminated.any())
        self._changed(places)
        # Side by side, as Ctrl-C may come in between, after which these would not fit together
        self._flags[places] = flags
        self._n_stored += self.n_envs
        self._length += 1
        self._head = next_head
        self._running[:] = True
        self._last_next_obs = next_obs_
        complete = self._length >= self.reach
        if np.count_nonzero(complete):
            self._activate(self._ring[complete] + (self._head[complete] - self.reach) % self.buffer_size)
        if ended:
            self._close(done)
        self.pos = int(self._head[0])

    def _continues(self, obs: dict[str | None, np.ndarray]) -> np.ndarray:
        """
        :param obs: of all environments
        :return: where they are the next observations of the step before, in a stretch that is running, bool (n_envs,)
        """
        continues = self._running
        if np.count_nonzero(continues):
            for key, value in obs.items():
                same = (value == self._last_next_obs[key]).reshape(self.n_envs, -1)
                continues = continues & np.logical_and.reduce(same, axis=1)
        return continues

    def _write_observations(self, places: np.ndarray, obs: dict[str | None, np.ndarray], ages: np.ndarray | None) -> None:
        """
        Write observations, over whatever is there.

        :param places: (m,)
        :param obs: (m, ...) each
        :param ages: ages of the observations before them, (m,), None where they begin a stretch
        """
        self._evict(places)
        for key, storage in self._storages.items():
            storage.write(places, obs[key])
        self._ages[places] = 0 if ages is None else np.minimum(ages, 254) + 1
        self._flags[places] = PRESENT
        self._changed(places)

    def _changed(self, places: np.ndarray, activated: bool = False) -> None:
        if self._mirror is not None:
            self._mirror.mark(places, activated)

    def _evict(self, places: np.ndarray) -> None:
        """Take the transitions out that start at the places, or need them for their stack of frames."""
        if not self.full:
            return
        depth = max(storage.n_stack for storage in self._storages.values())
        if depth > 1:
            position = places % self.buffer_size
            steps = np.arange(depth)[:, None]
            following = places - position + (position + steps) % self.buffer_size
            places = following[self._ages[following] >= steps]
        places = places[(self._flags[places] & STORED) != 0]
        if len(places) == 0:
            return
        self._flags[places] = PRESENT
        self.rewards[places] = 0
        self._n_stored -= len(places)
        self.n_sampleable -= int(np.count_nonzero(self._priorities.get(places)))
        self._priorities.set(places, 0.0)
        self._changed(places)

    def _activate(self, places: np.ndarray) -> None:
        """Let transitions be sampled from now on."""
        self._priorities.set(places, self._max_priority)
        self.n_sampleable += len(places)
        self._changed(places, activated=True)

    def _close(self, envs: np.ndarray) -> None:
        """End the running stretch of some environments, bool (n_envs,), at its last observation, which keeps its place."""
        if not envs.any():
            return
        ring, head, length = self._ring[envs, None], self._head[envs, None], self._length[envs, None]
        last = (ring + (head - 1) % self.buffer_size)[:, 0]
        self._flags[last] |= ENDED
        self._changed(last)
        if self.reach > 1:
            back = np.arange(1, self.reach)
            waiting = ring + (head - back) % self.buffer_size
            self._activate(waiting[back <= length])
        self._head[envs] = (self._head[envs] + 1) % self.buffer_size
        self.full |= bool((self._head[envs] == 0).any())
        self._running[envs] = False

    @property
    def between_episodes(self) -> bool:
        """Whether the next transitions of all environments begin new episodes."""
        return not self._running.any()

    def empty_copy(self, buffer_size: int) -> "SubtrajectoryReplayBuffer":
        """
        :param buffer_size: number of places for each environment
        :return: an empty buffer of this size, otherwise like this one
        """
        buffer = copy(self)
        buffer.buffer_size = buffer_size
        buffer.reset()
        return buffer

    def get_state(self) -> BufferState:
        """
        :return: all that is needed to make an equal buffer of one with the same arguments, see ``set_state``
        """
        self._pull_priorities()
        numbers = {
            "pos": self.pos,
            "full": self.full,
            "max_priority": self._max_priority,
            "has_terminated": self.has_terminated,
            "n_sampleable": self.n_sampleable,
            "n_stored": self._n_stored,
            "storages": [[key, storage.get_state()] for key, storage in self._storages.items()],
        }
        used = (self._flags != 0).reshape(self.n_envs, -1)
        written = np.where(used.any(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1), 0) if used.size else self._head * 0
        return BufferState(numbers, self._place_arrays(), self._environment_arrays(), written)

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
                # What the last observations look like is known before there are any
                self._last_next_obs = {
                    key: np.zeros((self.n_envs, *storage.shape), dtype=storage.dtype)
                    for key, storage in self._storages.items()
                    if storage.data.size
                }
            fill(BufferState(numbers, self._place_arrays(), self._environment_arrays(), np.zeros(self.n_envs, dtype=np.int64)))
            self.pos = numbers["pos"]
            self.full = numbers["full"]
            self._max_priority = numbers["max_priority"]
            self.has_terminated = numbers["has_terminated"]
            self.n_sampleable = numbers["n_sampleable"]
            self._n_stored = numbers["n_stored"]
            self._rebuild_priorities()
        except BaseException:
            self.reset()
            raise

    def _place_arrays(self) -> dict[str, np.ndarray]:
        return {**self.places(), "priorities": self._priorities.leaves} if self._storages else {}

    def _environment_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"head": self._head, "running": self._running, "length": self._length}
        for key, value in self._last_next_obs.items():
            arrays[f"last_next_obs{'' if key is None else f' {key}'}"] = value
        return arrays

    def _rebuild_priorities(self) -> None:
        """
        Complete the priorities after their leaves were written to.

        :raises ValueError: if what the buffer holds does not fit together
        """
        priorities = self._priorities.leaves
        n_stored = int(np.count_nonzero(self._flags & STORED))
        n_sampleable = int(np.count_nonzero(priorities))
        if (n_stored, n_sampleable) != (self._n_stored, self.n_sampleable):
            raise ValueError(
                f"There are {n_stored} transitions, {n_sampleable} to be sampled, but there should be {self._n_stored}, "
                f"{self.n_sampleable} to be sampled."
            )
        if not (priorities.max() < np.inf and priorities.min() >= 0 and 0 < self._max_priority < np.inf):
            raise ValueError("There are priorities that are negative or not finite.")
        if ((self._head < 0) | (self._head >= self.buffer_size) | (self._length < 0)).any():
            raise ValueError("The next place to write to is outside the buffer.")
        for first in range(0, len(priorities), self.CHUNK):
            if priorities[first : first + self.CHUNK].any():
                self._priorities.rebuild(first, min(first + self.CHUNK, len(priorities)))

    def _draw(self, batch_size: int) -> np.ndarray:
        if self.n_sampleable == 0:
            raise ValueError(
                "There is no transition to sample yet: none whose horizon is complete or whose episode has ended."
            )
        self._pull_priorities()
        return self._priorities.sample(batch_size)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SubtrajectorySamples:  # type: ignore[override]
        """
        Sample sub-trajectories of ``horizon`` transitions, their starts by priority.

        :param batch_size: Number of sub-trajectories
        :param env: VecNormalize to normalize observations and rewards with
        :return: the sub-trajectories
        :raises ValueError: if there is none yet
        """
        return self.get_subtrajectories(self._draw(batch_size), env)

    def sample_n_step(self, batch_size: int, env: VecNormalize | None = None) -> NStepSamples:
        """
        Sample transitions by priority, with the rewards and the observation of an ``n_steps`` target.

        :param batch_size: Number of transitions
        :param env: VecNormalize to normalize observations and rewards with
        :return: the transitions
        :raises ValueError: if there is none yet
        """
        return self.get_n_step(self._draw(batch_size), env)

    def update_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """
        :param indices: ``indices`` of a sample, since which nothing was added; places without a transition are passed over
        :param priorities: positive, (B,)
        """
        if self.n_sampleable == 0:
            return
        priorities = np.asarray(priorities, dtype=np.float64)
        self._pull_priorities()
        present = self._priorities.get(indices) > 0
        if not (np.isfinite(priorities).all() and (priorities > 0).all()):
            raise ValueError(f"Priorities must be positive and finite, not {priorities.min()} to {priorities.max()}.")
        self._priorities.set(indices[present], priorities[present])
        self._max_priority = max(self._max_priority, float(priorities[present].max(initial=0.0)))
        if self._mirror is not None:
            self._mirror.write_priorities(indices[present], self._priorities.get(indices[present]), self._max_priority)

    def sampling_probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """
        :return: places of all starts that can be sampled, and the probability of each, (n,) both
        """
        self._pull_priorities()
        priorities = self._priorities.get(np.arange(len(self._flags)))
        indices = np.flatnonzero(priorities)
        return indices, priorities[indices] / priorities.sum()

    def mean_abs_reward(self, env: VecNormalize | None = None) -> float:
        """
        :param env: VecNormalize to normalize rewards with
        :return: mean absolute reward of all stored transitions, 0 if there are none
        """
        if self._n_stored == 0:
            return 0.0
        rewards = self.rewards
        if env is not None:
            # Places without a transition hold a zero, which normalisation (a division) leaves as it is
            rewards = self._normalize_reward(rewards, env)
        return float(np.abs(rewards).sum(dtype=np.float64)) / self._n_stored

    def _follow(self, indices: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        :param indices: places of starts, (B,)
        :param n_steps: H
        :return: places of the observations s_0 to s_H, (B, H + 1), and of the transitions, (B, H), the last one of the episode
            repeated past its end, and the mask, bool (B, H)
        """
        position = indices % self.buffer_size
        ring = (indices - position)[:, None]
        steps = np.arange(n_steps + 1)
        places = ring + (position[:, None] + steps) % self.buffer_size
        mask = np.ones((len(indices), n_steps), dtype=bool)
        np.logical_and.accumulate((self._flags.take(places[:, :-2]) & ENDED) == 0, axis=1, out=mask[:, 1:])
        length = mask.sum(axis=1)[:, None]
        observations = np.take_along_axis(places, np.minimum(steps, length), axis=1)
        # A final observation's place holds no action, not even one of the space
        transitions = np.take_along_axis(places, np.minimum(steps[:-1], length - 1), axis=1)
        return observations, transitions, mask

    def _observations(self, places: np.ndarray, env: VecNormalize | None) -> th.Tensor | dict[str, th.Tensor]:
        """(...) places to (..., *obs) tensors."""
        values: dict[Any, np.ndarray] = {key: s.gather(places, self._ages) for key, s in self._storages.items()}
        obs = self._normalize_obs(values if isinstance(self.observation_space, spaces.Dict) else values[None], env)
        return map_observation(partial(self.to_torch, copy=False), obs)

    def _masked(
        self, places: np.ndarray, mask: np.ndarray, env: VecNormalize | None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Rewards, terminations and the mask itself as float tensors, (B, H) each."""
        rewards = np.where(mask, self._normalize_reward(self.rewards.take(places), env), np.float32(0))
        terminated = mask & ((self._flags.take(places) & TERMINATED) != 0)
        return (
            self.to_torch(rewards, copy=False),
            self.to_torch(terminated.astype(np.float32), copy=False),
            self.to_torch(mask.astype(np.float32), copy=False),
        )

    def get_subtrajectories(self, indices: np.ndarray, env: VecNormalize | None = None) -> SubtrajectorySamples:
        """
        :param indices: places of starts, (B,)
        :param env: VecNormalize to normalize observations and rewards with
        :return: the sub-trajectories of ``horizon`` transitions that begin there
        """
        places, transitions, mask = self._follow(indices, self.horizon)
        return SubtrajectorySamples(
            self._observations(places, env),
            self.to_torch(self.actions.take(transitions, axis=0), copy=False),
            *self._masked(transitions, mask, env),
            indices,
        )

    def get_n_step(self, indices: np.ndarray, env: VecNormalize | None = None) -> NStepSamples:
        """
        :param indices: places of starts, (B,)
        :param env: VecNormalize to normalize observations and rewards with
        :return: the transitions that begin there, with the rewards and the observation of an ``n_steps`` target
        """
        places, transitions, mask = self._follow(indices, self.n_steps)
        # Both observations at once: (B, 2) places
        first, last = unbind_time(self._observations(places[:, [0, -1]], env))
        rewards, terminated, mask_ = self._masked(transitions, mask, env)
        return NStepSamples(
            first, self.to_torch(self.actions.take(indices, axis=0), copy=False), rewards, terminated, mask_, last, indices
        )

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> SubtrajectorySamples:
        return self.get_subtrajectories(batch_inds, env)
