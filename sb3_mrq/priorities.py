"""
Sampling of indices in proportion to their priorities, cheaper than a pass over all of them.
"""

from itertools import pairwise

import numpy as np
import torch as th


class PriorityTree:
    """
    A tree of sums with a fan-out of 32: the leaves are the priorities, each node above is the sum of its 32 children.
    Changing or drawing an index visits one node a level, at most five for 33 million indices. Sums are recomputed from the
    children whenever one changes, never updated by differences, so that no rounding error accumulates.

    :param capacity: number of indices, at least 1
    """

    FAN_OUT = 32
    # Small trees have as many levels as one of a million leaves: it costs little, and sampling takes the same time
    MIN_LEVELS = 4

    def __init__(self, capacity: int):
        self.capacity = capacity
        # Leaves first. Each level is (nodes, FAN_OUT): row i holds the children of node i of the next level. np.zeros
        # reserves address space only: memory is taken by the pages that are written to.
        self._levels: list[np.ndarray] = []
        nodes = capacity
        while len(self._levels) < self.MIN_LEVELS or nodes > 1:
            nodes = -(-nodes // self.FAN_OUT)
            self._levels.append(np.zeros((nodes, self.FAN_OUT)))

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._levels[-1].sum())

    def get(self, indices: np.ndarray) -> np.ndarray:
        """
        :param indices: (n,)
        :return: their priorities, (n,)
        """
        return self._levels[0].reshape(-1)[indices]

    def set(self, indices: np.ndarray, priorities: np.ndarray | float) -> None:
        """
        :param indices: (n,), where one stands twice the last one counts
        :param priorities: finite, not negative, (n,) or one for all
        """
        self._levels[0].reshape(-1)[indices] = priorities
        nodes = np.asarray(indices)
        for children, parents in pairwise(self._levels):
            nodes = nodes // self.FAN_OUT
            parents.reshape(-1)[nodes] = children[nodes].sum(axis=1)

    @property
    def leaves(self) -> np.ndarray:
        """The priorities themselves, no copy, (capacity,). After writing to them call ``rebuild``."""
        return self._levels[0].reshape(-1)[: self.capacity]

    def rebuild(self, start: int, stop: int) -> None:
        """
        Renew the sums above a range of priorities.

        :param start: first index of the range
        :param stop: last index of the range, plus 1
        """
        if start >= stop:
            return
        first, last = start, stop - 1
        for children, parents in pairwise(self._levels):
            first, last = first // self.FAN_OUT, last // self.FAN_OUT
            parents.reshape(-1)[first : last + 1] = children[first : last + 1].sum(axis=1)

    def sample(self, n: int) -> np.ndarray:
        """
        Draw indices independently, each with probability proportional to its priority.

        :param n: number of indices
        :return: (n,)
        :raises ValueError: if all priorities are zero
        """
        if not self._levels[-1].any():
            raise ValueError("Nothing to sample: all priorities are zero.")
        nodes = np.zeros(n, dtype=np.int64)
        rows = np.arange(n)
        # Where in the node's share of the total the draw falls, from 0 to 1. It is rescaled at each level, which keeps more
        # than 30 of its 53 random bits for the leaves and, unlike a remainder of the total, cannot fall outside a node
        # through rounding.
        position = np.random.random(n)
        for level in reversed(self._levels):
            cumulative = level[nodes].cumsum(axis=1)
            total = cumulative[:, -1]
            mass = np.minimum(position * total, np.nextafter(total, 0.0))
            child = (cumulative <= mass[:, None]).sum(axis=1)
            upper = cumulative[rows, child]
            lower = np.where(child > 0, cumulative[rows, child - 1], 0.0)
            position = (mass - lower) / (upper - lower)
            nodes = nodes * self.FAN_OUT + child
        return nodes


class DevicePriorities:
    """
    The same on a device, without work of the host: two levels, the priorities in rows and the sums of the rows.

    :param capacity: number of indices, at least 1
    :param device: where to
    """

    ROW = 1024

    def __init__(self, capacity: int, device: th.device):
        n_rows = -(-capacity // self.ROW)
        self.rows = th.zeros((n_rows, self.ROW), dtype=th.float64, device=device)
        self.sums = th.zeros(n_rows, dtype=th.float64, device=device)

    def get(self, indices: th.Tensor) -> th.Tensor:
        """
        :param indices: (n,)
        :return: their priorities, float64 (n,)
        """
        return self.rows.view(-1)[indices]

    def set(self, indices: th.Tensor, priorities: th.Tensor) -> None:
        """
        :param indices: (n,), where one stands twice any one counts
        :param priorities: finite, not negative, (n,)
        """
        self.rows.view(-1).index_put_((indices,), priorities.to(self.rows.dtype))
        rows = indices // self.ROW
        self.sums.index_put_((rows,), self.rows[rows].sum(dim=1))

    def fill(self, priorities: th.Tensor) -> None:
        """
        As ``set``, but of the first m indices, in a pass over all of them.

        :param priorities: finite, not negative, (m,)
        """
        self.rows.view(-1)[: len(priorities)] = priorities
        th.sum(self.rows, dim=1, out=self.sums)

    def sample(self, n: int) -> th.Tensor:
        """
        Draw indices independently, each with probability proportional to its priority; there must be one above zero.

        :param n: number of indices
        :return: (n,)
        """
        position = th.rand(n, 1, dtype=th.float64, device=self.rows.device)
        row, position = self._descend(self.sums[None], position)
        column, _ = self._descend(self.rows[row[:, 0]], position)
        return (row * self.ROW + column)[:, 0]

    @staticmethod
    def _descend(level: th.Tensor, position: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param level: priorities to choose from, (n, m), or (1, m) if they are the same for all
        :param position: where in their sum, from 0 to 1, (n, 1)
        :return: which one that is, and where in it, from 0 to 1, (n, 1) both
        """
        cumulative = level.cumsum(dim=1).expand(len(position), -1).contiguous()
        total = cumulative[:, -1:]
        mass = th.minimum(position * total, total.nextafter(th.zeros_like(total)))
        # One beyond the last where priorities are not numbers
        child = th.searchsorted(cumulative, mass, right=True).clamp_max(level.shape[1] - 1)
        upper = cumulative.gather(1, child)
        lower = cumulative.gather(1, (child - 1).clamp_min(0)).where(child > 0, 0.0)
        return child, (mass - lower) / (upper - lower)
