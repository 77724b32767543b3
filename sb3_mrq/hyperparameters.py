"""
Hyperparameters of the updates, and checks of all hyperparameters.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_mrq.action_spaces import is_greedy
from sb3_mrq.arguments import Instance, Number, OneOf, Requirement, Switch, check_argument, plain
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.persist.replay_files import buffer_mismatch_error

#: precisions in which networks can compute; ``"auto"`` selects one of them
PRECISIONS = ("float32", "tf32", "bfloat16")


class TrainFrequency:
    """A number of steps, or a pair of a number and a unit."""

    _number = Number(integer=True, least=1)

    def accepts(self, value: Any) -> bool:
        number, unit = value if isinstance(value, tuple) and len(value) == 2 else (value, "step")
        return self._number.accepts(number) and getattr(unit, "value", unit) in ("step", "episode")

    def describe(self, value: Any) -> str:
        return f"a pair such as (1, 'episode') or (1, 'step'), or {self._number.describe(value)}"


FRACTION = Number(least=0, most=1)
COUNT = Number(integer=True, least=1)
# Compared with numbers of steps, so that 1e4 and infinity do
STEPS = Number(least=1, infinite=True)
NOT_NEGATIVE = Number(least=0)
POSITIVE = Number(above=0)
# Layer norm of a single unit is always zero
UNITS = Number(integer=True, least=2)
# What NumPy takes
SEED = Number(integer=True, least=0, most=2**32 - 1, optional=True)
LEARNING_RATE = Number(least=0, schedule=True)

#: what each argument of ``MRQ`` must be, those left out are checked by Stable-Baselines3 or have a check of their own
REQUIREMENTS: dict[str, Requirement] = {
    "learning_rate": LEARNING_RATE,
    "buffer_size": COUNT,
    # Stable-Baselines3 takes any number: a float, and a negative one for none
    "learning_starts": Number(infinite=True),
    "batch_size": COUNT,
    "gamma": FRACTION,
    "train_freq": TrainFrequency(),
    # Any negative number means as many as steps
    "gradient_steps": Number(integer=True),
    "replay_buffer_kwargs": Instance((Mapping,), "a dict of arguments of the replay buffer, or None."),
    "n_steps": COUNT,
    "encoder_horizon": COUNT,
    "target_update_interval": COUNT,
    "encoder_learning_rate": LEARNING_RATE,
    "exploration_noise": Number(least=0, infinite=True),
    "discrete_policy": OneOf(("auto", "greedy", "actor")),
    "target_policy_noise": NOT_NEGATIVE,
    "target_noise_clip": Number(least=0, infinite=True),
    "max_grad_norm": Number(above=0, infinite=True, optional=True),
    "reward_scaling": Switch(),
    "priority_alpha": NOT_NEGATIVE,
    "min_td_error": POSITIVE,
    "dynamics_loss_weight": NOT_NEGATIVE,
    "reward_loss_weight": NOT_NEGATIVE,
    "termination_loss_weight": NOT_NEGATIVE,
    "infonce_loss_weight": NOT_NEGATIVE,
    "infonce_temperature": POSITIVE,
    "replay_fade": Number(above=0, most=1),
    "replay_fade_min": FRACTION,
    "pre_activation_weight": NOT_NEGATIVE,
    "bc_weight": NOT_NEGATIVE,
    "bc_steps": Number(least=0, infinite=True),
    "random_shift_pad": Number(integer=True, least=0),
    "precision": OneOf(("auto", *PRECISIONS)),
    "compile_updates": OneOf(("auto", True, False)),
    "stats_window_size": Number(integer=True, least=0),
    "tensorboard_log": Instance((str, PathLike, type(None)), "a folder, or None."),
    "policy_kwargs": Instance((Mapping,), "a dict of arguments of the policy, or None."),
    "seed": SEED,
}


class ModuleClass:
    """A class of modules, or another function that makes one."""

    def accepts(self, value: Any) -> bool:
        return callable(value) and not isinstance(value, nn.Module)

    def describe(self, value: Any) -> str:
        return "a class such as torch.nn.ReLU, neither its name nor an instance."


#: what each argument of ``MRQPolicy`` must be, but for ``net_arch``
POLICY_REQUIREMENTS: dict[str, Requirement] = {
    "activation_fn": ModuleClass(),
    "actor_activation_fn": ModuleClass(),
    "z_s_dim": UNITS,
    "z_a_dim": COUNT,
    "z_sa_dim": COUNT,
    "n_reward_bins": Number(integer=True, least=2),
    # Beyond 80 the exponential leaves the range of float32
    "reward_bins_limit": Number(above=0, most=80),
    "gumbel_temperature": POSITIVE,
    "features_extractor_class": Instance((type,), "a class derived from BaseFeaturesExtractor."),
    "features_extractor_kwargs": Instance((Mapping, type(None)), "a dict of arguments of the features extractor, or None."),
    "normalize_images": Switch(),
    "optimizer_class": Instance((type, partial), "a class such as torch.optim.AdamW."),
    "optimizer_kwargs": Instance((Mapping, type(None)), "a dict of arguments of the optimizer, or None."),
    "n_critics": COUNT,
    "greedy": Switch(),
}


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
    :param bc_weight: weight of behaviour cloning in the policy loss
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
    bc_weight: float
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


def check_policy(policy: Any, algorithm: type[BaseAlgorithm]) -> None:
    """
    :param policy: the argument ``policy`` of the constructor
    :param algorithm: the algorithm, with ``policy_aliases``
    :raises ValueError: if the policy is neither one of these names nor a subclass of one of these classes
    """
    # A subclass may replace the aliases, but policies of its base classes work too
    aliases: list[dict[str, type]] = [vars(parent).get("policy_aliases", {}) for parent in algorithm.__mro__]
    classes = tuple(policy_class for names in aliases for policy_class in names.values())
    if isinstance(policy, str):
        known, shown = policy in algorithm.policy_aliases, repr(policy)
    elif isinstance(policy, type):
        known, shown = issubclass(policy, classes), f"{policy.__module__}.{policy.__name__}"
    elif isinstance(policy, nn.Module):
        known, shown = False, f"an object of the class {type(policy).__name__}"
    else:
        # A function that creates a policy
        known, shown = callable(policy), repr(policy)
    if not known:
        base = min(classes, key=lambda policy_class: len(policy_class.__mro__))
        raise ValueError(
            f"policy is {shown}, but must be one of the names {', '.join(map(repr, algorithm.policy_aliases))}, or a "
            f"subclass of {base.__module__}.{base.__name__}. Arguments of the policy are passed as policy_kwargs."
        )


def check_hyperparameters(model: Any) -> None:
    """
    Check all hyperparameters, and convert scalars of NumPy to Python.

    :param model: an ``MRQ``
    :raises ValueError: if a hyperparameter of the model is invalid
    """
    for name, requirement in REQUIREMENTS.items():
        attribute = name if hasattr(model, name) else f"_{name}"
        value = getattr(model, attribute)
        if type(value) is tuple:
            value = tuple(map(plain, value))
        setattr(model, attribute, check_argument(name, value, requirement))
    for name, argument in (
        ("horizon", "encoder_horizon"),
        ("n_steps", "n_steps"),
        ("fade", "replay_fade"),
        ("fade_min", "replay_fade_min"),
    ):
        if name in model.replay_buffer_kwargs:
            raise ValueError(f"replay_buffer_kwargs sets {name}, but the model needs it too: pass {argument} to the model.")
    if model.bc_weight > 0 and is_greedy(model.discrete_policy, model.action_space):
        raise ValueError("A greedy policy has no actor that bc_weight could train by imitation: pass discrete_policy='actor'.")
    buffer_class = model.replay_buffer_class
    is_ours = isinstance(buffer_class, type) and issubclass(buffer_class, SubtrajectoryReplayBuffer)
    if buffer_class is HerReplayBuffer:
        raise ValueError(
            "HerReplayBuffer cannot sample the sub-trajectories that MR.Q learns from: pass "
            "sb3_mrq.buffers.HerSubtrajectoryReplayBuffer, which takes the same arguments."
        )
    if buffer_class is not None and not is_ours:
        raise ValueError(
            f"{getattr(buffer_class, '__name__', repr(buffer_class))} cannot sample the sub-trajectories that MR.Q learns "
            "from: omit replay_buffer_class, or pass a subclass of sb3_mrq.buffers.SubtrajectoryReplayBuffer."
        )


def check_replay_buffer(model: Any, replay_buffer: ReplayBuffer | None) -> None:
    """
    :param model: an ``MRQ``
    :param replay_buffer: a replay buffer for the model
    :raises ValueError: if the model cannot learn from this buffer
    """
    if replay_buffer is None:
        raise ValueError("The model has no replay buffer to learn from: load one with load_replay_buffer.")
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
    replay_buffer.check_size()


def warn_about_settings(model: Any, last_step: int, reset_num_timesteps: bool, bfloat16_is_fast: bool) -> None:
    """
    Warn about settings that are allowed, but are probably a mistake. The warning that nothing will be learned is given once
    per model.

    :param model: an ``MRQ``
    :param last_step: last timestep of the training that is about to start
    :param reset_num_timesteps: whether its timesteps are counted from 0
    :param bfloat16_is_fast: whether the device has instructions for bfloat16
    """
    warn = partial(warnings.warn, stacklevel=5)
    if last_step <= model.learning_starts:
        first_step = 0 if reset_num_timesteps else model.num_timesteps
        frequency, unit = model.train_freq
        # Rollouts are not cut short, and the length of an episode is unknown
        rollout = frequency * model.n_envs
        ends_in_warm_up = first_step + math.ceil((last_step - first_step) / rollout) * rollout <= model.learning_starts
        if unit is TrainFrequencyUnit.STEP and ends_in_warm_up and not model.gradient_steps_left and not model.warm_up_warned:
            # Once, as learn may be called for one step at a time
            model.warm_up_warned = True
            warn(
                f"Nothing will be learned in this call of learn: it ends at step {last_step}, which is not above "
                f"learning_starts={model.learning_starts}. Train for longer, or reduce learning_starts."
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
