"""
Numbers on the device: means of metrics, and inputs of updates that change during training.
"""

import torch as th


class MetricMeans:
    """
    Means of metrics over several updates, accumulated on the device.

    :param device: device of the metrics
    """

    def __init__(self, device: th.device):
        self.device = device
        self._names: list[str] = []
        # The last entry counts the updates
        self._sums = th.zeros(1, device=device)
        self._one = th.ones((), device=device)

    def add(self, metrics: dict[str, th.Tensor]) -> None:
        """
        :param metrics: 0-d tensors by name, with the same names at each call
        """
        if not self._names:
            self._names = list(metrics)
            self._sums = th.zeros(len(metrics) + 1, device=self.device)
        self._sums.add_(th.stack([*metrics.values(), self._one]))

    def take(self) -> dict[str, float]:
        """
        :return: the means since the last call, empty if nothing was added
        """
        *sums, count = self._sums.tolist()
        self._sums.zero_()
        return {name: value / count for name, value in zip(self._names, sums, strict=True)} if count else {}


class Scalars:
    """
    Numbers as 0-d tensors at fixed addresses, for compiled or captured code, in which Python numbers are constants.

    :param device: device of the tensors
    """

    def __init__(self, device: th.device):
        self.device = device
        self._values: dict[str, float] = {}
        self._tensors: dict[str, th.Tensor] = {}

    def set(self, **values: float) -> None:
        """
        :param values: numbers by name
        """
        for name, value in values.items():
            if name not in self._tensors:
                self._tensors[name] = th.full((), float(value), device=self.device)
            elif self._values[name] != value:
                self._tensors[name].fill_(value)
            self._values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> th.Tensor:
        return self._tensors[name]
