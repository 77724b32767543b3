"""
Sampling of indices in proportion to their priorities with a sum tree.
"""

from itertools import pairwise

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

    def _zeros(self, nodes: int) -> th.Tensor:
        if self.device is None:
            return th.from_numpy(np.zeros((nodes, self.fan_out)))
        return th.zeros((nodes, self.fan_out), dtype=th.float64, device=self.device)

    @property
    def leaves(self) -> th.Tensor:
        """All priorities, not a copy, float64 (capacity,). Call ``rebuild`` after writing to them."""
        return self.levels[0].view(-1)[: self.capacity]

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self.levels[-1].sum())

    def get(self, indices: th.Tensor) -> th.Tensor:
        """
        :param indices: (n,)
        :return: their priorities, float64 (n,)
        """
        return self.levels[0].view(-1).index_select(0, indices)

    def set(self, indices: th.Tensor, priorities: th.Tensor) -> None:
        """
        :param indices: (n,). For duplicates, the last priority is set on the host, and any of them on a device.
        :param priorities: finite and not negative, (n,), or 0-d for all indices
        """
        if self.device is None:
            # NumPy is four times as fast as torch for one or two indices
            self._set_on_host(indices.numpy(), priorities.numpy())
            return
        self.levels[0].view(-1).index_put_((indices,), priorities.to(th.float64))
        nodes = indices
        for children, parents in pairwise(self.levels):
            nodes = nodes // self.fan_out
            parents.view(-1).index_put_((nodes,), children.index_select(0, nodes).sum(dim=1))

    def _set_on_host(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        levels = [level.numpy() for level in self.levels]
        levels[0].reshape(-1)[indices] = priorities
        for children, parents in pairwise(levels):
            indices = indices // self.fan_out
            parents.reshape(-1)[indices] = children[indices].sum(axis=1)

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

    def sample(self, n: int) -> th.Tensor:
        """
        Sample indices with replacement, in proportion to their priorities, of which at least one must be positive. The host
        uses NumPy's global random generator, and a device uses torch's.

        :param n: number of indices
        :return: (n,)
        """
        # Position of the sample within its node, from 0 to 1. Rescaling it at each level keeps more than 30 of its 53 random
        # bits for the leaves. Unlike a remainder of the total, it cannot leave the node through rounding.
        if self.device is None:
            position = th.from_numpy(np.random.random((n, 1)))
        else:
            position = th.rand(n, 1, dtype=th.float64, device=self.device)
        nodes: th.Tensor | None = None
        for level in reversed(self.levels):
            if nodes is None:
                cumulative = level.cumsum(dim=1).expand(n, -1).contiguous()
            else:
                cumulative = level.index_select(0, nodes).cumsum(dim=1)
            total = cumulative[:, -1:]
            mass = th.minimum(position * total, total.nextafter(th.zeros_like(total)))
            # Clamped, as searchsorted may exceed the last child if priorities are NaN
            child = th.searchsorted(cumulative, mass, right=True).clamp_max_(self.fan_out - 1)
            upper = cumulative.gather(1, child)
            lower = cumulative.gather(1, (child - 1).clamp_min_(0)).masked_fill_(child == 0, 0.0)
            position = (mass - lower) / (upper - lower)
            nodes = child[:, 0] if nodes is None else nodes * self.fan_out + child[:, 0]
        assert nodes is not None
        return nodes
