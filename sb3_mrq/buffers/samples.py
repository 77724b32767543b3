"""
Samples of the replay buffer.
"""

from typing import Any, NamedTuple

import numpy as np
import torch as th


class SubtrajectorySamples(NamedTuple):
    """
    Sub-trajectories of H transitions, as torch tensors.

    :param observations: s_0 to s_H, (B, H + 1, ...) or a dict of these. After the end of an episode, its final observation is
        repeated. The learner replaces them by a list of H + 1 preprocessed observations, (B, ...) each.
    :param actions: Box actions scaled to [-1, 1], discrete actions as integers of the space, (B, H, action_dim). The learner
        replaces them by action vectors, (B, H, A).
    :param rewards: 0 where the mask is 0, (B, H)
    :param terminated: 1 where the episode terminated (not truncated), else 0, (B, H)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
    :param indices: slots of the starts, for ``update_priorities``, (B,); a tensor if they were sampled on a device
    """

    observations: Any
    actions: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    mask: th.Tensor
    indices: np.ndarray | th.Tensor | None = None


class NStepSamples(NamedTuple):
    """
    Transitions with rewards and last observation of an n-step target, as torch tensors. Observations are dicts for Dict
    spaces.

    :param observations: s_0, (B, ...)
    :param actions: a_0, Box actions scaled to [-1, 1], discrete actions as integers of the space, (B, action_dim). The learner
        replaces them by action vectors, (B, A).
    :param rewards: 0 where the mask is 0, (B, n)
    :param terminated: 1 where the episode terminated (not truncated), else 0, (B, n)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, n)
    :param next_observations: s_n, or the final observation of an episode that ends earlier, (B, ...)
    :param indices: slots of the starts, for ``update_priorities``, (B,); a tensor if they were sampled on a device
    """

    observations: Any
    actions: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    mask: th.Tensor
    next_observations: Any
    indices: np.ndarray | th.Tensor | None = None
