"""
Formulas of MR.Q as functions on tensors: two-hot rewards, terms of the encoder loss, n-step target, value loss, policy loss,
priorities.

Equation numbers refer to Fujimoto et al., "Towards General-Purpose Model-Free Reinforcement Learning", ICLR 2025.
Shapes: ``B`` batch, ``H`` horizon of the encoder, ``n`` horizon of the value, ``K`` reward bins, ``Z`` size of z_s, ``A``
action vector.
"""

import torch as th
from torch.nn import functional as F


def symexp(x: th.Tensor) -> th.Tensor:
    """
    Symmetric exponential sign(x) (exp|x| - 1), the inverse of the symmetric logarithm.

    :param x: any shape
    :return: same shape
    """
    return th.sign(x) * th.expm1(th.abs(x))


def reward_bins(
    n_bins: int = 65,
    limit: float = 10.0,
    dtype: th.dtype | None = None,
    device: th.device | str | None = None,
) -> th.Tensor:
    """
    Centres of the reward bins: ``symexp`` of evenly spaced points, dense around zero.

    :param n_bins: number of bins
    :param limit: the centres go from ``symexp(-limit)`` to ``symexp(limit)``
    :param dtype: dtype of the result, torch's default if None
    :param device: device of the result
    :return: ascending centres, (K,)
    """
    return symexp(th.linspace(-limit, limit, n_bins, dtype=th.float64)).to(
        dtype=dtype or th.get_default_dtype(), device=device
    )


def two_hot(rewards: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """
    Encode rewards as weights of the two neighbouring bins, linear in the reward (section 4.1 of the paper). A reward outside
    the bins has all its weight on the nearest bin.

    :param rewards: (...)
    :param bins: ascending bin centres, (K,)
    :return: weights that sum to one, (..., K)
    """
    rewards = rewards.clamp(bins[0], bins[-1])
    # At most the last bin but one, so that the upper neighbour exists
    lower = (th.searchsorted(bins, rewards.contiguous(), right=True) - 1).clamp(0, len(bins) - 2)
    upper_weight = (rewards - bins[lower]) / (bins[lower + 1] - bins[lower])
    weights = rewards.new_zeros((*rewards.shape, len(bins)))
    weights.scatter_(-1, lower.unsqueeze(-1), (1 - upper_weight).unsqueeze(-1))
    weights.scatter_(-1, lower.unsqueeze(-1) + 1, upper_weight.unsqueeze(-1))
    return weights


def dynamics_loss(predicted_z_s: th.Tensor, target_z_s: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Squared error of the predicted embeddings (equation 15 of the paper). Like all terms of the encoder loss, it is summed over
    the horizon, and averaged over the whole batch including masked entries.

    :param predicted_z_s: state embeddings that the linear model predicts, (B, H, Z)
    :param target_z_s: embeddings of the observed next observations by the target encoder, (B, H, Z)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
    :return: 0-d
    """
    return (mask * F.mse_loss(predicted_z_s, target_z_s, reduction="none").mean(dim=-1)).sum() / len(mask)


def reward_loss(reward_logits: th.Tensor, rewards: th.Tensor, mask: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """
    Cross-entropy of the predicted rewards (equation 14 of the paper).

    :param reward_logits: predicted logits over the reward bins, (B, H, K)
    :param rewards: (B, H)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
    :param bins: centres of the reward bins, (K,)
    :return: 0-d
    """
    cross_entropy = -(two_hot(rewards, bins) * F.log_softmax(reward_logits, dim=-1)).sum(dim=-1)
    return (mask * cross_entropy).sum() / len(mask)


def termination_loss(predicted_terminated: th.Tensor, terminated: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Squared error of the predicted terminations (equation 16 of the paper).

    :param predicted_terminated: (B, H)
    :param terminated: 1 where the episode terminated (not truncated), else 0, (B, H)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
    :return: 0-d
    """
    return (mask * (predicted_terminated - terminated) ** 2).sum() / len(mask)


def infonce_loss(predicted_z_s: th.Tensor, target_z_s: th.Tensor, mask: th.Tensor, temperature: float = 0.1) -> th.Tensor:
    """
    Contrastive loss of the predicted embeddings (InfoNCE, of DR.Q): each prediction is to be more similar to the embedding of
    its own next observation than to the targets of the other rows of the batch, at the same step of the horizon. Similarity
    is the cosine divided by the temperature. Rows past the end of their episode count neither as predictions nor as targets.

    :param predicted_z_s: state embeddings that the linear model predicts, (B, H, Z)
    :param target_z_s: embeddings of the observed next observations by the target encoder, (B, H, Z)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
    :param temperature: smaller ones tell apart more sharply
    :return: sum over the horizon of the mean over the batch, masked entries included, 0-d
    """
    # (H, B, Z) each
    predicted, target = (F.normalize(z_s.transpose(0, 1), dim=-1) for z_s in (predicted_z_s, target_z_s))
    similarities = predicted @ target.transpose(1, 2) / temperature
    own = similarities.diagonal(dim1=1, dim2=2)
    # A masked row keeps its own embedding, so that its loss is finite before it is masked
    excluded = (mask.T == 0).unsqueeze(1) & ~th.eye(len(mask), dtype=th.bool, device=mask.device)
    losses = similarities.masked_fill(excluded, -th.inf).logsumexp(dim=2) - own
    return (mask.T * losses).sum() / len(mask)


def n_step_return(rewards: th.Tensor, terminated: th.Tensor, mask: th.Tensor, gamma: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Discounted sum of the rewards up to and including the last transition of the episode, and the discount of the value after
    it (equation 19 of the paper): gamma to the power of the number of transitions, zero after a termination.

    :param rewards: (B, n)
    :param terminated: 1 where the episode terminated (not truncated), else 0, (B, n)
    :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, n)
    :param gamma: discount factor
    :return: sum of rewards, and discount of the bootstrap value, (B, 1) each
    """
    steps = th.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)
    returns = (mask * gamma**steps * rewards).sum(dim=1, keepdim=True)
    alive = 1 - (mask * terminated).amax(dim=1, keepdim=True)
    discount = alive * gamma ** mask.sum(dim=1, keepdim=True)
    return returns, discount


def value_target(
    returns: th.Tensor,
    discount: th.Tensor,
    next_value: th.Tensor,
    reward_scale: float | th.Tensor,
    target_reward_scale: float | th.Tensor,
) -> th.Tensor:
    """
    The n-step target in units of the current reward scale (equation 19 of the paper).

    :param returns: discounted sum of rewards, (B, 1)
    :param discount: discount of the bootstrap value, (B, 1)
    :param next_value: value of the target policy's action for the last observation, minimum of the target heads, (B, 1)
    :param reward_scale: mean absolute reward of the buffer, the unit of the online values
    :param target_reward_scale: unit of the target values
    :return: (B, 1)
    """
    return (returns + discount * target_reward_scale * next_value) / reward_scale


def value_loss(q: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Smooth-L1 loss (Huber, beta 1), mean over batch and heads (equation 18 of the paper).

    :param q: (B, n_critics)
    :param target: (B, 1)
    :return: 0-d
    """
    return F.smooth_l1_loss(q, target.expand_as(q))


def policy_loss(q: th.Tensor, pre_activation: th.Tensor, pre_activation_weight: float = 1e-5) -> th.Tensor:
    """
    Deterministic policy gradient with a small penalty on the pre-activations (equation 20 of the paper).

    :param q: values of the policy's actions, (B, n_critics)
    :param pre_activation: the policy's output before tanh or softmax, (B, A)
    :param pre_activation_weight: weight of the penalty
    :return: 0-d
    """
    return -q.mean() + pre_activation_weight * pre_activation.square().mean()


def td_priority(q: th.Tensor, target: th.Tensor, alpha: float = 0.4, min_td_error: float = 1.0) -> th.Tensor:
    """
    Priority of LAP (Fujimoto et al., 2020, arXiv 2007.06049): the largest absolute error of the heads, at least
    ``min_td_error``, to the power ``alpha``. An infinite error, from a target that overflows float32, counts as the largest
    float32, so that priorities are finite.

    :param q: (B, n_critics)
    :param target: (B, 1)
    :param alpha: exponent, 0 for uniform sampling
    :param min_td_error: smaller errors, for which the Huber loss is quadratic, share the same priority
    :return: (B,)
    """
    return (q - target).abs().amax(dim=1).clamp(min_td_error, th.finfo(q.dtype).max) ** alpha
