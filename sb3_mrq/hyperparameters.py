"""
The hyperparameters of the updates, and which values of all of them can work.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from gymnasium import spaces

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.precision import PRECISIONS

if TYPE_CHECKING:
    from sb3_mrq.mrq import MRQ


@dataclass(frozen=True)
class UpdateHyperparameters:
    """
    Hyperparameters of the updates, under the names that they have in ``MRQ``.

    :param gamma: discount factor
    :param max_grad_norm: bound on the gradient norm of the critic, over all heads together
    :param target_policy_noise: standard deviation of the target policy's smoothing noise
    :param target_noise_clip: bound on it
    :param priority_alpha: exponent of the priorities
    :param min_td_error: errors below this have one priority
    :param dynamics_loss_weight: weight of the embedding term in the encoder loss
    :param reward_loss_weight: weight of the reward term
    :param termination_loss_weight: weight of the termination term
    :param pre_activation_weight: weight of the penalty on the policy's pre-activations
    :param precision: "bfloat16" where networks are to compute matrix products, and keep activations, in bfloat16 (values
        and their targets, weights, losses and optimisers are in float32 in any case); "tf32" where float32 matrix products may
        be computed in TF32 if the device can (``torch.set_float32_matmul_precision("high")`` during updates)
    """

    gamma: float
    max_grad_norm: float
    target_policy_noise: float
    target_noise_clip: float
    priority_alpha: float
    min_td_error: float
    dynamics_loss_weight: float
    reward_loss_weight: float
    termination_loss_weight: float
    pre_activation_weight: float
    precision: str


def check_hyperparameters(model: "MRQ") -> None:
    """
    :param model: whose hyperparameters to check
    :raises ValueError: for values that cannot work, before any work is lost
    """
    for name, least in (
        ("n_steps", 1),
        ("encoder_horizon", 1),
        ("batch_size", 1),
        ("target_update_interval", 1),
        ("random_shift_pad", 0),
        ("buffer_size", 1),
    ):
        value = getattr(model, name)
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}.")
    for name in (
        "exploration_noise",
        "target_policy_noise",
        "target_noise_clip",
        "priority_alpha",
        "dynamics_loss_weight",
        "reward_loss_weight",
        "termination_loss_weight",
        "pre_activation_weight",
    ):
        value = getattr(model, name)
        if not value >= 0:
            raise ValueError(f"{name} is {value}, but must not be negative.")
    for name in ("max_grad_norm", "min_td_error"):
        value = getattr(model, name)
        if not value > 0:
            raise ValueError(f"{name} is {value}, but must be positive.")
    for name, choices in (
        ("precision", ("auto", *PRECISIONS)),
        ("compile_updates", ("auto", True, False)),
    ):
        value = getattr(model, name)
        # 1 is equal to True
        if value not in choices or not isinstance(value, (str, bool)):
            raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")
    if not 0 <= model.gamma <= 1:
        raise ValueError(f"gamma is {model.gamma}, but must be between 0 and 1.")
    if model.action_noise is not None and not isinstance(model.action_space, spaces.Box):
        raise ValueError(
            f"action_noise is for Box actions, not {model.action_space}: leave it out and set exploration_noise instead."
        )
    for name, of_model in (("horizon", "encoder_horizon"), ("n_steps", "n_steps")):
        if name in model.replay_buffer_kwargs:
            raise ValueError(f"replay_buffer_kwargs sets {name}, but the model must know: pass it {of_model} instead.")
    if model.replay_buffer_class is not None and not issubclass(model.replay_buffer_class, SubtrajectoryReplayBuffer):
        raise ValueError(
            f"{model.replay_buffer_class.__name__} cannot give the sub-trajectories that MR.Q learns from: leave "
            "replay_buffer_class out, or derive a class from sb3_mrq.buffers.SubtrajectoryReplayBuffer."
        )
