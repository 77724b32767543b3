"""
What the replay buffer samples. A batch travels whole, from the buffer to the losses.
"""

from typing import Any, NamedTuple

import numpy as np
import torch as th


class SubtrajectorySamples(NamedTuple):
    """
    Sub-trajectories of H transitions, as torch tensors.

    :param observations: s_0 to s_H, the final observation repeated past the end of the episode, (B, H + 1, ...), or a dict of
        these. The learner replaces them by a list of H + 1 preprocessed observations, (B, ...) each.
    :param actions: Box actions scaled to [-1, 1], others as integers of the space, (B, H, action_dim). The learner replaces
        them by action vectors, (B, H, A).
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
    Transitions with what an n-step target needs, as torch tensors. Observations are dicts if the space is one.

    :param observations: s_0, (B, ...)
    :param actions: a_0, Box actions scaled to [-1, 1], others as integers of the space, (B, action_dim). The learner replaces
        them by action vectors, (B, A).
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
