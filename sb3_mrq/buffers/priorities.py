"""
Sampling of indices in proportion to their priorities, cheaper than a pass over all of them.
"""

from itertools import pairwise

import numpy as np
import torch as th


class PriorityTree:
    """
    A tree of sums: the leaves are the priorities, each node above is the sum of its children. Changing or drawing an index
    visits one node a level. Sums are recomputed from the children whenever one changes, never updated by differences, so
    that no rounding error accumulates.

    On the host the fan-out is 32: at most five levels for 33 million indices. On a device it is 1024, because the number of
    operations counts there, not their size.

    :param capacity: number of indices, at least 1
    :param device: of the tree, and of everything that it takes and returns; the host if None
    """

    HOST_FAN_OUT, DEVICE_FAN_OUT = 32, 1024
    # Small trees have as many levels as one of a million leaves: it costs little, and sampling takes the same time
    MIN_LEVELS = 4

    def __init__(self, capacity: int, device: th.device | None = None):
        self.capacity = capacity
        self.device = device
        self.fan_out = self.HOST_FAN_OUT if device is None else self.DEVICE_FAN_OUT
        # Leaves first. Each level is (nodes, fan_out): row i holds the children of node i of the next level. On the host this
        # reserves address space only: memory is taken by the pages that are written to.
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
        """The priorities themselves, no copy, float64 (capacity,). Call ``rebuild`` after writing to them."""
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
        :param indices: (n,). If one occurs twice, the last one counts on the host, either of them on a device.
        :param priorities: finite, not negative, (n,) or 0-d for all
        """
        if self.device is None:
            # Four times as fast for the one or two indices of a step
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
        Renew the sums above a range of priorities.

        :param start: first index of the range
        :param stop: last index of the range, plus 1
        """
        if start >= stop:
            return
        first, last = start, stop - 1
        for children, parents in pairwise(self.levels):
            first, last = first // self.fan_out, last // self.fan_out
            parents.view(-1)[first : last + 1] = children[first : last + 1].sum(dim=1)

    def sample(self, n: int) -> th.Tensor:
        """
        Draw indices independently, each with probability proportional to its priority; at least one must be positive. On the
        host NumPy's global generator is used, on a device torch's.

        :param n: number of indices
        :return: (n,)
        """
        # Where in the node's share of the total the draw falls, from 0 to 1. It is rescaled at each level, which keeps more
        # than 30 of its 53 random bits for the leaves and, unlike a remainder of the total, cannot fall outside a node
        # through rounding.
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
            # Beyond the last child if priorities are not numbers
            child = th.searchsorted(cumulative, mass, right=True).clamp_max_(self.fan_out - 1)
            upper = cumulative.gather(1, child)
            lower = cumulative.gather(1, (child - 1).clamp_min_(0)).masked_fill_(child == 0, 0.0)
            position = (mass - lower) / (upper - lower)
            nodes = child[:, 0] if nodes is None else nodes * self.fan_out + child[:, 0]
        assert nodes is not None
        return nodes
