"""
Action spaces as the vectors that the encoder sees: Box scaled to [-1, 1], everything else as concatenated one-hots.

Shapes: ``B`` batch, ``A`` size of the action vector, ``D`` number of discrete dimensions.

An action exists in three forms: the policy's pre-activation u (B, A), the vector a (B, A) that encoder and value see, and the
stored form (B, action_dim) of the replay buffer and of SB3's policies: a itself for Box, the integers of the space otherwise.
"""

from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from torch.nn import functional as F


class BoxActions:
    """
    Continuous actions in any finite bounds, scaled to [-1, 1]: a = tanh(u).

    :param space: the action space
    """

    def __init__(self, space: spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise ValueError(
                f"Box actions must be floats, not {space.dtype}: use a MultiDiscrete space for integers ({space})."
            )
        if 0 in space.shape:
            raise ValueError(f"The action space {space} has no dimension, so that there is nothing to choose.")
        for low, high in np.stack([space.low.ravel(), space.high.ravel()], axis=1):
            # As Python floats: in the space's own dtype the difference may be infinite where actions are still scaled well
            if not np.isfinite(float(high) - float(low)):
                raise ValueError(
                    f"Box actions need finite bounds, a finite distance apart, but one dimension of {space} goes from "
                    f"{low} to {high}: give bounds in the environment's action_space, or with "
                    "gymnasium.wrappers.TransformAction."
                )
            if not low < high:
                raise ValueError(
                    f"A dimension of the action space {space} goes from {low} to {high}, so that there is nothing to choose: "
                    "leave this dimension out of the space."
                )
        self.dim = int(np.prod(space.shape))

    def encode(self, stored: th.Tensor) -> th.Tensor:
        """
        :param stored: actions scaled to [-1, 1], (..., A)
        :return: the action vector, the same
        """
        return stored

    def activation(self, pre_activation: th.Tensor, gumbel: th.Tensor | None = None) -> th.Tensor:
        """
        :param pre_activation: u, (B, A)
        :param gumbel: not used
        :return: tanh(u), (B, A)
        """
        return th.tanh(pre_activation)

    def sample_gumbel(self, like: th.Tensor) -> th.Tensor | None:
        """
        :param like: tensor of the shape and on the device of the noise
        :return: None, continuous policies have no such noise
        """
        return None

    def smooth(self, action: th.Tensor, noise: th.Tensor, std: float, clip: float) -> th.Tensor:
        """
        Target policy smoothing.

        :param action: (B, A)
        :param noise: standard normal, (B, A)
        :param std: standard deviation of the noise
        :param clip: largest absolute noise
        :return: a + clip(noise) in [-1, 1], (B, A)
        """
        return (action + (std * noise).clamp(-clip, clip)).clamp(-1, 1)

    def add_noise(self, action: th.Tensor, std: float | th.Tensor) -> th.Tensor:
        """
        Exploration noise.

        :param action: (B, A)
        :param std: standard deviation of the noise
        :return: a + noise in [-1, 1], (B, A)
        """
        return (action + std * th.randn_like(action)).clamp(-1, 1)

    def decode(self, action: th.Tensor) -> th.Tensor:
        """
        :param action: action vector, (B, A)
        :return: its stored form, the same
        """
        return action


class Constants(NamedTuple):
    """
    What the conversions of discrete actions compute with, on one device.

    :param starts: smallest value of each dimension, (D,)
    :param offsets: first column of each dimension in the action vector, (D,)
    :param table_index: position of each column in a (D, max_size) table with one row for each dimension, (A,)
    """

    starts: th.Tensor
    offsets: th.Tensor
    table_index: th.Tensor


class CategoricalActions:
    """
    Discrete, MultiDiscrete and MultiBinary actions as concatenated one-hots, one Gumbel-softmax for each dimension:
    a = softmax((u + gumbel) / temperature).

    :param space: the action space
    :param temperature: of the Gumbel-softmax
    """

    # One-hot vectors span [0, 1] where Box actions span [-1, 1]: all noise is half of what it is there
    NOISE_SCALE = 0.5

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary, temperature: float = 10.0):
        if isinstance(space, spaces.Discrete):
            sizes, starts = [int(space.n)], [int(space.start)]
        elif isinstance(space, spaces.MultiDiscrete):
            if space.nvec.ndim != 1:
                raise ValueError(f"MultiDiscrete actions must have one axis, not the shape {space.shape}: flatten {space}.")
            sizes, starts = space.nvec.tolist(), np.broadcast_to(space.start, space.nvec.shape).tolist()
        else:
            if len(space.shape) != 1:
                raise ValueError(f"MultiBinary actions must have one axis, not the shape {space.shape}: flatten {space}.")
            sizes, starts = [2] * space.shape[0], [0] * space.shape[0]
        self.temperature = temperature
        self.dim = sum(sizes)
        self.n_dimensions = len(sizes)
        self.max_size = max(sizes)
        offsets = th.tensor([0, *sizes[:-1]]).cumsum(0)
        table_index = th.cat([row * self.max_size + th.arange(size) for row, size in enumerate(sizes)])
        self._on_device = {th.device("cpu"): Constants(th.tensor(starts), offsets, table_index)}

    def _constants(self, device: th.device) -> Constants:
        if device not in self._on_device:
            self._on_device[device] = Constants(*(tensor.to(device) for tensor in self._on_device[th.device("cpu")]))
        return self._on_device[device]

    def _table(self, columns: th.Tensor, fill: float) -> th.Tensor:
        """(B, A) to (B, D, max_size), dimensions of fewer values filled up."""
        table = columns.new_full((len(columns), self.n_dimensions * self.max_size), fill)
        table = table.index_copy(1, self._constants(columns.device).table_index, columns)
        return table.view(len(columns), self.n_dimensions, self.max_size)

    def decode(self, action: th.Tensor) -> th.Tensor:
        """
        :param action: a value for each column of the action vector, (B, A)
        :return: stored form of the largest of each dimension, (B, D)
        """
        table = self._table(action, fill=-th.inf)
        return table.argmax(dim=-1) + self._constants(action.device).starts

    def encode(self, stored: th.Tensor) -> th.Tensor:
        """
        :param stored: integers of the space, (..., D)
        :return: concatenated one-hots, float32 (..., A)
        """
        starts, offsets, _ = self._constants(stored.device)
        columns = stored.long() - starts + offsets
        one_hot = th.zeros((*stored.shape[:-1], self.dim), device=stored.device)
        return one_hot.scatter_(-1, columns, 1.0)

    def activation(self, pre_activation: th.Tensor, gumbel: th.Tensor | None = None) -> th.Tensor:
        """
        :param pre_activation: u, (B, A)
        :param gumbel: standard Gumbel noise, (B, A), None for none
        :return: soft one-hots that sum to one in each dimension, (B, A)
        """
        logits = pre_activation if gumbel is None else pre_activation + gumbel
        soft = F.softmax(self._table(logits / self.temperature, fill=-th.inf), dim=-1)
        return soft.flatten(1).index_select(1, self._constants(soft.device).table_index)

    def sample_gumbel(self, like: th.Tensor) -> th.Tensor:
        """
        :param like: tensor of the shape and on the device of the noise
        :return: standard Gumbel noise of that shape
        """
        # The negative logarithm of a standard exponential. Of a uniform number's logarithm float32 would cut off the tail.
        return -th.empty_like(like).exponential_().clamp_min_(th.finfo(like.dtype).tiny).log_()

    def smooth(self, action: th.Tensor, noise: th.Tensor, std: float, clip: float) -> th.Tensor:
        """
        Target policy smoothing.

        :param action: soft one-hots, (B, A)
        :param noise: standard normal, (B, A)
        :param std: standard deviation of the noise, in the units of Box actions
        :param clip: largest absolute noise, in the units of Box actions
        :return: one-hots of the largest entries after the noise, (B, A)
        """
        std, clip = self.NOISE_SCALE * std, self.NOISE_SCALE * clip
        return self.encode(self.decode(action + (std * noise).clamp(-clip, clip)))

    def add_noise(self, action: th.Tensor, std: float | th.Tensor) -> th.Tensor:
        """
        Exploration noise.

        :param action: soft one-hots, (B, A)
        :param std: standard deviation of the noise, in the units of Box actions
        :return: a + noise, (B, A)
        """
        return action + self.NOISE_SCALE * std * th.randn_like(action)


def make_actions(space: spaces.Space, temperature: float = 10.0) -> BoxActions | CategoricalActions:
    """
    :param space: the action space
    :param temperature: of the Gumbel-softmax of discrete spaces
    :return: its conversions
    :raises ValueError: if the space is not supported
    """
    if isinstance(space, spaces.Box):
        return BoxActions(space)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return CategoricalActions(space, temperature)
    raise ValueError(
        f"MRQ supports Box, Discrete, MultiDiscrete and MultiBinary actions, not {space}: convert it, for example with "
        "gymnasium.wrappers.TransformAction."
    )
