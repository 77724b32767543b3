"""
Sampling of indices in proportion to their priorities with a sum tree.

Code that changes priorities uses only what NumPy arrays and tensors have in common: for one or two indices NumPy is four
times as fast as torch.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th


class PriorityTree:
    """
    Sum tree: the leaves are the priorities, and each inner node is the sum of its children. Setting or sampling an index
    visits one node per level. A sum is always recomputed from its children, so rounding errors do not accumulate.

    The fan-out is 32 on the host, which gives at most five levels for 33 million indices. It is 1024 on a device, whose speed
    depends on the number of operations rather than on their size.

    :param capacity: number of indices, at least 1
    :param device: device of the tree, and of all arguments and results; the host if None
    """

    HOST_FAN_OUT, DEVICE_FAN_OUT = 32, 1024
    LARGEST_POSITION = 1 - 2.0**-40
    # Small trees have as many levels as a tree of a million leaves, so that sampling always takes the same time
    MIN_LEVELS = 4

    def __init__(self, capacity: int, device: th.device | None = None):
        self.capacity = capacity
        self.device = device
        self.fan_out = self.HOST_FAN_OUT if device is None else self.DEVICE_FAN_OUT
        # Leaves first. Each level is (nodes, fan_out): row i holds the children of node i of the next level. On the host this
        # only reserves address space: memory is used once it is written to.
        self.levels: list[th.Tensor] = []
        min_levels = self.MIN_LEVELS if device is None else 1
        nodes = capacity
        while len(self.levels) < min_levels or nodes > 1:
            nodes = -(-nodes // self.fan_out)
            self.levels.append(self._zeros(nodes))

    def _zeros(self, nodes: int, dtype: type = np.float64) -> th.Tensor:
        zeros: np.ndarray = np.zeros((nodes, self.fan_out), dtype=dtype)
        return th.from_numpy(zeros) if self.device is None else th.as_tensor(zeros, device=self.device)

    @property
    def leaves(self) -> th.Tensor:
        """All priorities, not a copy, float64 (capacity,). Call ``rebuild`` after writing to them."""
        return self.levels[0].view(-1)[: self.capacity]

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._weights(len(self.levels) - 1, th.zeros(1, dtype=th.int64, device=self.device)).sum())

    def get(self, indices: th.Tensor) -> th.Tensor:
        """
        :param indices: (n,)
        :return: their priorities, float64 (n,)
        """
        return self.levels[0].view(-1).index_select(0, indices)

    def weight(self, indices: th.Tensor) -> th.Tensor:
        """
        :param indices: (n,)
        :return: weights that sampling is proportional to, which are the priorities here, float64 (n,)
        """
        return self.get(indices)

    def set(self, indices: th.Tensor, priorities: th.Tensor) -> None:
        """
        :param indices: (n,). For duplicates, the last priority is set on the host, and any of them on a device.
        :param priorities: finite and not negative, (n,), or 0-d for all indices
        """
        priorities = priorities.to(th.float64)
        self._arrays(self.levels)[0].reshape(-1)[self._array(indices)] = self._array(priorities)
        self._renew(indices)

    def _array(self, tensor: th.Tensor) -> Any:
        """The tensor as a NumPy array if the tree is on the host."""
        return tensor.numpy() if self.device is None else tensor

    def _arrays(self, tensors: list[th.Tensor]) -> list[Any]:
        return [self._array(tensor) for tensor in tensors]

    def _renew(self, indices: th.Tensor) -> None:
        """Recompute the sums above some indices, (n,)."""
        nodes = self._array(indices)
        for children, parents in pairwise(self._arrays(self.levels)):
            nodes = nodes // self.fan_out
            parents.reshape(-1)[nodes] = children[nodes].sum(axis=1)

    def rebuild(self, start: int, stop: int) -> None:
        """
        Recompute the sums above a range of priorities.

        :param start: first index of the range
        :param stop: end of the range, exclusive
        """
        if start >= stop:
            return
        first, last = start, stop - 1
        for children, parents in pairwise(self.levels):
            first, last = first // self.fan_out, last // self.fan_out
            parents.view(-1)[first : last + 1] = children[first : last + 1].sum(dim=1)

    def _weights(self, level: int, nodes: th.Tensor) -> th.Tensor:
        """
        :param level: 0 for the leaves
        :param nodes: rows of the level, (n,)
        :return: weights of the children of the nodes, (n, fan_out)
        """
        return self.levels[level].index_select(0, nodes)

    def sample(self, n: int) -> th.Tensor:
        """
        Sample indices with replacement, in proportion to their priorities, of which at least one must be positive. The host
        uses NumPy's global random generator, and a device uses torch's.

        :param n: number of indices
        :return: (n,)
        """
        # Position of the sample within its node, from 0 to 1. Rescaling it at each level keeps more than 30 of its 53 random
        # bits for the leaves. Unlike a remainder of the total, it cannot leave the node through rounding: it is below 1 by
        # more than the rounding error of its product with the total.
        if self.device is None:
            position = th.from_numpy(np.random.random((n, 1)))
        else:
            position = th.rand(n, 1, dtype=th.float64, device=self.device)
        # All samples start at the single node of the last level
        nodes = th.zeros(n, dtype=th.int64, device=self.device)
        for level in reversed(range(len(self.levels))):
            weights = self._weights(level, nodes)
            cumulative = weights.cumsum(dim=1)
            mass = position.clamp_(0, self.LARGEST_POSITION) * cumulative[:, -1:]
            # Clamped, as searchsorted may exceed the last child if priorities are NaN
            child = th.searchsorted(cumulative, mass, right=True).clamp_max_(self.fan_out - 1)
            position = (mass - cumulative.gather(1, child)) / weights.gather(1, child) + 1
            nodes = nodes * self.fan_out + child[:, 0]
        return nodes

    # Hooks for weights that depend on when a transition was stored

    def store(self, indices: np.ndarray, n_stored: int) -> np.ndarray | None:
        """
        Register transitions that have been stored at some indices. Only for a tree on the host.

        :param indices: indices in the order of storing, whose priorities are still zero, (n,)
        :param n_stored: number of transitions stored so far, including these
        :return: indices whose sums a copy of the tree must renew too, (n,), or None
        """

    def advance(self, n_stored: int) -> None:
        """
        :param n_stored: number of transitions stored so far
        """

    def arrays(self) -> dict[str, th.Tensor]:
        """
        :return: further data of each index by name, (capacity,) each, not copies. Call ``rebuild`` after writing to them.
        """
        return {}


class FadedPriorityTree(PriorityTree):
    """
    Priorities that fade with the age of a transition, the number of transitions stored after it: the weight of an index is
    priority times ``max(fade_min, fade ** age)`` (DR.Q, Lyu et al., 2026, arXiv 2605.11711).

    The leaves are the priorities. Each node above holds two sums: the weights of *old* transitions, which have faded to
    ``fade_min``, and the weights of *recent* ones. A new transition changes all recent weights by the same factor, which is
    kept apart, and turns at most one recent transition into an old one.

    :param capacity: number of indices, at least 1
    :param device: of the tree, and of everything that it takes and returns; the host if None
    :param fade: factor of the weight for each transition stored since, between 0 and 1
    :param fade_min: the factor falls no lower
    """

    # The common factor is kept apart until it is smaller than this
    SMALLEST_FACTOR = 1e-3

    def __init__(self, capacity: int, device: th.device | None = None, *, fade: float, fade_min: float):
        super().__init__(capacity, device)
        self.fade = fade
        # Sums of recent weights without their common factor. The sums in ``levels`` are sums of old weights.
        self.recent = [level.clone() for level in self.levels[1:]]
        # Number of transitions stored up to and including the one at an index, 0 if there is none
        self._stored_at = self._zeros(len(self.levels[0]), np.int64)
        # Age from which a transition is old. No stored transition is older than the number of indices.
        old_age = math.ceil(math.log(fade_min) / math.log(fade)) if fade_min > 0 else capacity
        self.old_age = max(1, min(old_age, capacity))
        # Factor by age; the last one is for all old transitions
        self._fades = th.as_tensor(np.maximum(fade ** np.arange(self.old_age + 1.0), fade_min), device=device)
        # Ring of the indices of recent transitions, at their number modulo ``old_age``
        self._recent_indices: np.ndarray | None = None
        # Number of transitions stored so far, and at the time when the common factor was 1
        self._now: Any = 0 if device is None else th.zeros((), dtype=th.int64, device=device)
        self._reference = 0
        self._factor: Any = 1.0 if device is None else th.ones((), dtype=th.float64, device=device)

    def store(self, indices: np.ndarray, n_stored: int) -> np.ndarray | None:
        if len(indices) > self.old_age:
            # The first ones become old while the others are stored
            first, rest = np.split(indices, [self.old_age])
            changed = [self.store(part, n_stored - left) for part, left in ((first, len(rest)), (rest, 0))]
            return np.concatenate([part for part in changed if part is not None])
        stored_at = self._stored_at.view(-1).numpy()
        if self._recent_indices is None:
            self._recent_indices = np.zeros(self.old_age, dtype=np.int64)
            before = np.flatnonzero(stored_at > max(n_stored - len(indices) - self.old_age, 0))
            self._recent_indices[stored_at[before] % self.old_age] = before
        stored_at[indices] = numbers = np.arange(n_stored - len(indices), n_stored) + 1
        positions = numbers % self.old_age
        old = self._recent_indices[positions]
        self._recent_indices[positions] = indices
        self.advance(n_stored)
        if n_stored <= self.old_age:
            return None
        self._renew(th.from_numpy(old))
        return old

    def advance(self, n_stored: int) -> None:
        factor = self.fade ** (n_stored - self._reference)
        if factor < self.SMALLEST_FACTOR:
            for sums in self.recent:
                sums.mul_(factor)
            self._reference, factor = n_stored, 1.0
        if self.device is None:
            self._now, self._factor = n_stored, factor
        else:
            self._now.fill_(n_stored)
            self._factor.fill_(factor)

    def arrays(self) -> dict[str, th.Tensor]:
        return {"stored_at": self._stored_at.view(-1)[: self.capacity]}

    def _ages(self, stored_at: Any) -> Any:
        """Ages, at most ``old_age``."""
        return (self._now - stored_at).clip(0, self.old_age)

    def weight(self, indices: th.Tensor) -> th.Tensor:
        ages = self._ages(self._stored_at.view(-1).index_select(0, indices))
        return self.get(indices) * self._fades.index_select(0, ages)

    def _weights(self, level: int, nodes: th.Tensor) -> th.Tensor:
        children = super()._weights(level, nodes)
        if level == 0:
            ages = self._ages(self._stored_at.index_select(0, nodes))
            return children * self._fades.index_select(0, ages.view(-1)).view(ages.shape)
        return children + self.recent[level - 1].index_select(0, nodes) * self._factor

    def _renew(self, indices: th.Tensor) -> None:
        old, recent = self._arrays(self.levels), self._arrays(self.recent)
        nodes = self._array(indices)
        for level in range(len(recent)):
            nodes = nodes // self.fan_out
            if level == 0:
                ages = self._ages(self._array(self._stored_at)[nodes])
                weights = old[0][nodes] * self._array(self._fades)[ages]
                is_old = ages == self.old_age
                sums = (weights * is_old).sum(axis=1), (weights * ~is_old).sum(axis=1) / self._factor
            else:
                sums = old[level][nodes].sum(axis=1), recent[level - 1][nodes].sum(axis=1)
            old[level + 1].reshape(-1)[nodes], recent[level].reshape(-1)[nodes] = sums

    def rebuild(self, start: int, stop: int) -> None:
        self._renew(th.arange(start - start % self.fan_out, stop, self.fan_out, device=self.device))
