"""
Hyperparameters of the updates, and checks of all hyperparameters.
"""

import warnings
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.persist.replay_files import buffer_mismatch_error

#: precisions in which networks can compute; ``"auto"`` selects one of them
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class UpdateHyperparameters:
    """
    Hyperparameters of the updates, named as in ``MRQ``.

    :param gamma: discount factor
    :param max_grad_norm: maximum gradient norm of the critic, over all heads together, None for no clipping
    :param target_policy_noise: standard deviation of the smoothing noise of the target policy
    :param target_noise_clip: limit for the absolute value of that noise
    :param priority_alpha: exponent of the priorities
    :param min_td_error: smaller TD errors share the same priority
    :param dynamics_loss_weight: weight of the embedding term in the encoder loss
    :param reward_loss_weight: weight of the reward term
    :param termination_loss_weight: weight of the termination term
    :param infonce_loss_weight: weight of the contrastive term
    :param infonce_temperature: what similarities of embeddings are divided by
    :param pre_activation_weight: weight of the penalty on the policy's pre-activations
    :param random_shift_pad: largest shift of images, in pixels
    :param precision: "float32"; "bfloat16" for matrix products and activations in bfloat16 (values and their targets, weights,
        losses and optimisers are in float32 in any case); "tf32" for float32 matrix products in TF32 on devices that support
        it (``torch.set_float32_matmul_precision("high")`` during updates)
    """

    gamma: float
    max_grad_norm: float | None
    target_policy_noise: float
    target_noise_clip: float
    priority_alpha: float
    min_td_error: float
    dynamics_loss_weight: float
    reward_loss_weight: float
    termination_loss_weight: float
    infonce_loss_weight: float
    infonce_temperature: float
    pre_activation_weight: float
    random_shift_pad: int
    precision: str

    @classmethod
    def from_model(cls, model: Any, automatic_precision: str) -> "UpdateHyperparameters":
        """
        :param model: an ``MRQ``
        :param automatic_precision: precision that ``"auto"`` selects
        :return: its current hyperparameters of the updates
        """
        values = {field.name: getattr(model, field.name) for field in fields(cls)}
        if values["precision"] == "auto":
            values["precision"] = automatic_precision
        return cls(**values)


def check_hyperparameters(model: Any) -> None:
    """
    :param model: an ``MRQ``
    :raises ValueError: if a hyperparameter of the model is invalid
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
        "infonce_loss_weight",
        "pre_activation_weight",
    ):
        value = getattr(model, name)
        if not value >= 0:
            raise ValueError(f"{name} is {value}, but must not be negative.")
    for name in ("max_grad_norm", "min_td_error", "infonce_temperature"):
        value = getattr(model, name)
        if not (value is None and name == "max_grad_norm") and not value > 0:
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
    if not 0 < model.replay_fade <= 1:
        raise ValueError(f"replay_fade is {model.replay_fade}, but must be above 0 and at most 1 (no fading).")
    if not 0 <= model.replay_fade_min <= 1:
        raise ValueError(f"replay_fade_min is {model.replay_fade_min}, but must be between 0 and 1.")
    if model.action_noise is not None and not isinstance(model.action_space, spaces.Box):
        raise ValueError(
            f"action_noise is for Box actions, not {model.action_space}: leave it out and set exploration_noise instead."
        )
    for name, argument in (("horizon", "encoder_horizon"), ("n_steps", "n_steps")):
        if name in model.replay_buffer_kwargs:
            raise ValueError(f"replay_buffer_kwargs sets {name}, but the model needs it too: pass {argument} to the model.")
    if model.replay_buffer_class is not None and not issubclass(model.replay_buffer_class, SubtrajectoryReplayBuffer):
        raise ValueError(
            f"{model.replay_buffer_class.__name__} cannot sample the sub-trajectories that MR.Q learns from: omit "
            "replay_buffer_class, or pass a subclass of sb3_mrq.buffers.SubtrajectoryReplayBuffer."
        )


def check_replay_buffer(model: Any, replay_buffer: ReplayBuffer) -> None:
    """
    :param model: an ``MRQ``
    :param replay_buffer: a replay buffer for the model
    :raises ValueError: if the model cannot learn from this buffer
    """
    if not isinstance(replay_buffer, SubtrajectoryReplayBuffer):
        raise ValueError(
            f"MR.Q learns from a SubtrajectoryReplayBuffer, not from a {type(replay_buffer).__name__}: start with an empty "
            "buffer."
        )
    for name, found, expected in (
        ("number of environments", replay_buffer.n_envs, model.n_envs),
        ("horizon", replay_buffer.horizon, model.encoder_horizon),
        ("n_steps", replay_buffer.n_steps, model.n_steps),
        ("replay_fade", replay_buffer.fade, model.replay_fade),
        ("replay_fade_min", replay_buffer.fade_min, model.replay_fade_min),
        ("observation space", replay_buffer.observation_space, model.observation_space),
        ("action space", replay_buffer.action_space, model.action_space),
    ):
        if found != expected:
            raise buffer_mismatch_error(name, found, expected)


def warn_about_settings(model: Any, last_step: int, reset_num_timesteps: bool, bfloat16_is_fast: bool) -> None:
    """
    Warn about settings that are allowed, but are probably a mistake.

    :param model: an ``MRQ``
    :param last_step: last timestep of the training that is about to start
    :param reset_num_timesteps: whether its timesteps are counted from 0
    :param bfloat16_is_fast: whether the device has instructions for bfloat16
    """
    warn = partial(warnings.warn, stacklevel=6)
    if last_step <= model.learning_starts:
        warn(
            f"Nothing will be learned: {last_step} steps are fewer than learning_starts={model.learning_starts}. Train "
            "for longer, or reduce learning_starts."
        )
        return
    if reset_num_timesteps and model._n_updates > 0 and 0 < model.learning_starts <= model.replay_buffer.size():
        warn(
            f"The first {model.learning_starts} steps will be random again, without learning, as steps are counted from 0. "
            "Pass reset_num_timesteps=False to continue training, or set learning_starts=0."
        )
    if model.precision == "bfloat16" and not bfloat16_is_fast:
        warn(
            f"precision='bfloat16' makes training many times slower on this device ({model.device}), which has no "
            "instructions for it. Omit precision, or set it to 'float32'."
        )
