"""
Conversion of actions to vectors: Box actions scaled to [-1, 1], discrete actions as concatenated one-hots.

Shapes: ``B`` batch, ``A`` size of the action vector, ``D`` number of discrete dimensions.

An action has three forms: the actor's output u before its activation (B, A), the action vector a (B, A) that is the input of
encoder and critic, and the stored form (B, action_dim) in the replay buffer. The stored form of a Box action is a, the stored
form of a discrete action consists of integers of the space.
"""

import math
from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

from sb3_mrq.arguments import UnsupportedSpaceError


class BoxActions:
    """
    Continuous actions in any finite bounds, scaled to [-1, 1]: a = tanh(u).

    :param space: the action space
    """

    # Of discrete actions
    n_actions = 0

    def __init__(self, space: spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise UnsupportedSpaceError(
                f"Box actions must be floats, not {space.dtype}: use a MultiDiscrete space for integers ({space})."
            )
        if 0 in space.shape:
            raise UnsupportedSpaceError(f"The action space {space} has no dimensions: use a space with at least one.")
        for low, high in np.stack([space.low.ravel(), space.high.ravel()], axis=1):
            # As Python floats: the difference may overflow in the dtype of the space although actions can be scaled
            if not np.isfinite(float(high) - float(low)):
                raise UnsupportedSpaceError(
                    f"Box actions need finite bounds with a finite difference, but a dimension of {space} goes from "
                    f"{low} to {high}: give bounds in the environment's action_space, or with "
                    "gymnasium.wrappers.TransformAction."
                )
            if not low < high:
                raise UnsupportedSpaceError(
                    f"A dimension of the action space {space} goes from {low} to {high}, but the upper bound must be "
                    "larger than the lower one: remove this dimension from the space."
                )
        self.dim = int(np.prod(space.shape))

    def encode(self, stored: th.Tensor) -> th.Tensor:
        """
        :param stored: actions scaled to [-1, 1], (..., A)
        :return: action vectors, equal to the stored actions, (..., A)
        """
        return stored

    def activation(self, pre_activation: th.Tensor, gumbel: th.Tensor | None = None) -> th.Tensor:
        """
        :param pre_activation: u, (B, A)
        :param gumbel: unused
        :return: tanh(u), (B, A)
        """
        return th.tanh(pre_activation)

    def sample_gumbel(self, like: th.Tensor) -> th.Tensor | None:
        """
        :param like: unused
        :return: None, as continuous policies use no Gumbel noise
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

    def cloning_loss(self, pre_activation: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        :param pre_activation: u, (B, A)
        :param action: actions to imitate, (B, A)
        :return: mean squared error, 0-d
        """
        return F.mse_loss(th.tanh(pre_activation), action)

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
        :param action: action vectors, (B, A)
        :return: their stored form, equal to the action vectors, (B, A)
        """
        return action


class Constants(NamedTuple):
    """
    Constants of the conversions of discrete actions, on one device.

    :param starts: smallest value of each dimension, (D,)
    :param offsets: first column of each dimension in the action vector, (D,)
    :param table_index: position of each column in a (D, max_size) table with one row for each dimension, (A,)
    """

    starts: th.Tensor
    offsets: th.Tensor
    table_index: th.Tensor


class CategoricalActions:
    """
    Discrete, MultiDiscrete and MultiBinary actions as concatenated one-hots, with a Gumbel-softmax for each dimension:
    a = softmax((u + gumbel) / temperature).

    :param space: the action space
    :param temperature: temperature of the Gumbel-softmax
    """

    # One-hot entries are in [0, 1] and Box actions in [-1, 1], so the noise of discrete actions is halved
    NOISE_SCALE = 0.5
    # Most actions whose values are all computed: at default sizes, a batch of them takes two gigabytes for each layer
    MAX_LISTED = 4096
    # Most actions for which a policy is greedy by itself. With more of them, their values take most of the time.
    GREEDY_UP_TO = 32

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary, temperature: float = 10.0):
        if isinstance(space, spaces.Discrete):
            sizes, starts = [int(space.n)], [int(space.start)]
        elif isinstance(space, spaces.MultiDiscrete):
            if space.nvec.ndim != 1:
                raise UnsupportedSpaceError(
                    f"MultiDiscrete actions must have one axis, not the shape {space.shape}: flatten {space}."
                )
            sizes, starts = space.nvec.tolist(), np.broadcast_to(space.start, space.nvec.shape).tolist()
        else:
            if len(space.shape) != 1:
                raise UnsupportedSpaceError(
                    f"MultiBinary actions must have one axis, not the shape {space.shape}: flatten {space}."
                )
            sizes, starts = [2] * space.shape[0], [0] * space.shape[0]
        self.temperature = temperature
        self.sizes = sizes
        self.n_actions = math.prod(sizes)
        self.dim = sum(sizes)
        self.n_dimensions = len(sizes)
        self.max_size = max(sizes)
        offsets = th.tensor([0, *sizes[:-1]]).cumsum(0)
        table_index = th.cat([row * self.max_size + th.arange(size) for row, size in enumerate(sizes)])
        self._on_device = {th.device("cpu"): Constants(th.tensor(starts), offsets, table_index)}
        self._all: dict[th.device, th.Tensor] = {}

    def _constants(self, device: th.device) -> Constants:
        if device not in self._on_device:
            self._on_device[device] = Constants(*(tensor.to(device) for tensor in self._on_device[th.device("cpu")]))
        return self._on_device[device]

    def _table(self, columns: th.Tensor, fill: float) -> th.Tensor:
        """Convert (B, A) to (B, D, max_size). Dimensions with fewer than ``max_size`` values are padded with ``fill``."""
        table = columns.new_full((len(columns), self.n_dimensions * self.max_size), fill)
        table = table.index_copy(1, self._constants(columns.device).table_index, columns)
        return table.view(len(columns), self.n_dimensions, self.max_size)

    def decode(self, action: th.Tensor) -> th.Tensor:
        """
        :param action: a value for each column of the action vector, (B, A)
        :return: stored form of the action with the largest value in each dimension, (B, D)
        """
        table = self._table(action, fill=-th.inf)
        return table.argmax(dim=-1) + self._constants(action.device).starts

    def list_all(self, device: th.device) -> th.Tensor:
        """
        :param device: device of the result
        :return: the vectors of all actions, the last dimension varying fastest, (n_actions, A)
        """
        if device not in self._all:
            indices = th.cartesian_prod(*(th.arange(size, device=device) for size in self.sizes)).view(self.n_actions, -1)
            self._all[device] = self.encode(indices + self._constants(device).starts)
        return self._all[device]

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
        :param gumbel: standard Gumbel noise, (B, A), None for no noise
        :return: soft one-hots that sum to one in each dimension, (B, A)
        """
        logits = pre_activation if gumbel is None else pre_activation + gumbel
        soft = F.softmax(self._table(logits / self.temperature, fill=-th.inf), dim=-1)
        return soft.flatten(1).index_select(1, self._constants(soft.device).table_index)

    def sample_gumbel(self, like: th.Tensor) -> th.Tensor:
        """
        :param like: tensor that gives shape, dtype and device
        :return: standard Gumbel noise
        """
        # The negative logarithm of a standard exponential: a uniform number in float32 would cut off the tail
        return -th.empty_like(like).exponential_().clamp_min_(th.finfo(like.dtype).tiny).log_()

    def smooth(self, action: th.Tensor, noise: th.Tensor, std: float, clip: float) -> th.Tensor:
        """
        Target policy smoothing.

        :param action: soft one-hots, (B, A)
        :param noise: standard normal, (B, A)
        :param std: standard deviation of the noise, in the units of Box actions
        :param clip: largest absolute noise, in the units of Box actions
        :return: one-hots of the largest entries after adding the noise, (B, A)
        """
        std, clip = self.NOISE_SCALE * std, self.NOISE_SCALE * clip
        return self.encode(self.decode(action + (std * noise).clamp(-clip, clip)))

    def cloning_loss(self, pre_activation: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        :param pre_activation: u, (B, A)
        :param action: one-hots of the actions to imitate, (B, A)
        :return: cross entropy of softmax(u), mean over dimensions, 0-d
        """
        logits = self._table(pre_activation, fill=-th.inf)
        chosen = (pre_activation * action).sum(dim=1) / self.n_dimensions
        return (logits.logsumexp(dim=2).mean(dim=1) - chosen).mean()

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
    :param temperature: temperature of the Gumbel-softmax, for discrete spaces
    :return: conversions of its actions
    :raises UnsupportedSpaceError: if the space is not supported
    """
    if isinstance(space, spaces.Box):
        return BoxActions(space)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return CategoricalActions(space, temperature)
    raise UnsupportedSpaceError(
        f"MRQ supports Box, Discrete, MultiDiscrete and MultiBinary actions, not {space}: convert it, for example with "
        "gymnasium.wrappers.TransformAction."
    )


def check_can_list(actions: BoxActions | CategoricalActions, space: spaces.Space) -> None:
    """
    :param actions: conversions of the actions
    :param space: their space
    :raises UnsupportedSpaceError: if the values of all actions cannot be computed
    """
    if not isinstance(actions, CategoricalActions):
        fault = "is continuous"
    elif actions.n_actions > actions.MAX_LISTED:
        fault = f"has {actions.n_actions:,} of them, more than {actions.MAX_LISTED:,}"
    else:
        return
    raise UnsupportedSpaceError(
        f"A greedy policy compares the values of all actions, but {space} {fault}: pass discrete_policy='actor'."
    )


def is_greedy(discrete_policy: str, space: spaces.Space) -> bool:
    """
    :param discrete_policy: "greedy", "actor", or "auto" to choose by the number of actions
    :param space: the action space
    :return: whether the policy takes the action of the highest value, never for Box actions
    """
    actions = make_actions(space)
    if not isinstance(actions, CategoricalActions):
        return False
    return discrete_policy == "greedy" or (discrete_policy == "auto" and actions.n_actions <= actions.GREEDY_UP_TO)
