"""
DR.Q, the successor of MR.Q: the same algorithm with a contrastive term in the encoder loss and priorities that fade with age.
"""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_mrq import policies
from sb3_mrq.arguments import explain_foreign
from sb3_mrq.mrq import MRQ


class MlpPolicy(policies.MRQPolicy):
    """Policy class of DR.Q. Its encoder is wider than MR.Q's, and its weight decay larger."""

    default_net_arch = policies.MRQPolicy.default_net_arch | {"encoder": [750, 750]}
    default_weight_decay = 0.01


class CnnPolicy(MlpPolicy, policies.CnnPolicy):
    """Policy class of DR.Q for images."""


class MultiInputPolicy(MlpPolicy, policies.MultiInputPolicy):
    """Policy class of DR.Q for Dict observations of images and vectors."""


class DRQ(MRQ):
    """
    Debiased model-based Representations for Q-learning (DR.Q), not to be confused with DrQ and DrQ-v2.

    Paper: "Debiased Model-based Representations for Sample-efficient Continuous Control", Lyu, Lin, Fujimoto, Yang, Chen,
    Yang, Lu and Ye, ICML 2026, https://arxiv.org/abs/2605.11711

    Every difference from MR.Q is a default: of an argument of :class:`~sb3_mrq.MRQ`, or of the policy.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of value heads and policy, a number or a schedule
    :param buffer_size: size of the replay buffer, over all environments
    :param learning_starts: how many random steps to collect before learning starts, over all environments
    :param batch_size: Minibatch size for each gradient update
    :param gamma: the discount factor
    :param train_freq: update the model every so many steps, or ``(n, "episode")``
    :param gradient_steps: how many training steps to do after each rollout, -1 for as many as steps in it
    :param action_noise: exploration noise for Box actions, in place of the Gaussian noise
    :param replay_buffer_class: a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer` (the default)
    :param replay_buffer_kwargs: keyword arguments of the replay buffer
    :param optimize_memory_usage: of no effect: observations are always stored once
    :param n_steps: Horizon of the value target
    :param encoder_horizon: Horizon over which the encoder predicts
    :param target_update_interval: training steps between replacements of the targets, each followed by as many encoder updates
    :param encoder_learning_rate: learning rate of the encoder, a number or a schedule
    :param exploration_noise: standard deviation of the noise on actions scaled to [-1, 1], half of it for discrete actions
    :param discrete_policy: ``"greedy"``, ``"actor"`` or ``"auto"``, see :class:`~sb3_mrq.MRQ`
    :param target_policy_noise: standard deviation of the target policy's smoothing noise
    :param target_noise_clip: bound on the smoothing noise
    :param max_grad_norm: bound on the gradient norm of the value heads, None (the default) for no bound
    :param reward_scaling: whether value targets are divided by the mean absolute reward of the replay buffer
    :param priority_alpha: Exponent of the priorities of the replay buffer, 0 for uniform sampling
    :param min_td_error: Transitions with a smaller TD error share the same priority
    :param dynamics_loss_weight: Weight of the embedding term of the encoder loss
    :param reward_loss_weight: Weight of the reward term of the encoder loss
    :param termination_loss_weight: weight of the termination term of the encoder loss
    :param infonce_loss_weight: weight of the contrastive term of the encoder loss
    :param infonce_temperature: temperature of the contrastive term
    :param replay_fade: factor by which the probability of a transition falls with each one stored after it
    :param replay_fade_min: lower bound on the product of these factors
    :param pre_activation_weight: Weight of the penalty on the squared pre-activations of the policy
    :param bc_weight: weight of behaviour cloning in offline training, see :class:`~sb3_mrq.MRQ`
    :param bc_steps: transitions after offline training over which this weight falls to zero
    :param random_shift_pad: Largest shift, in pixels, of the images in training batches (data augmentation), 0 for none
    :param precision: ``"float32"``, ``"tf32"``, ``"bfloat16"`` or ``"auto"``, see :class:`~sb3_mrq.MRQ`
    :param compile_updates: whether to compile and capture updates, ``"auto"`` where it pays, see :class:`~sb3_mrq.MRQ`
    :param stats_window_size: number of episodes over which the rollout logs average
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments of the policy, see :class:`~sb3_mrq.policies.MRQPolicy`
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: device (cpu, cuda, ...), ``auto`` for the GPU if possible
    :param _init_setup_model: whether to build the networks at the creation of the instance
    """

    algorithm_name = "DRQ"
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    @explain_foreign("DRQ")
    def __init__(
        self,
        policy: str | type[policies.MRQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 10_000,
        batch_size: int = 256,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = -1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = True,
        n_steps: int = 3,
        encoder_horizon: int = 5,
        target_update_interval: int = 250,
        encoder_learning_rate: float | Schedule = 3e-4,
        exploration_noise: float = 0.2,
        discrete_policy: str = "actor",
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.3,
        max_grad_norm: float | None = None,
        reward_scaling: bool = False,
        priority_alpha: float = 0.4,
        min_td_error: float = 1.0,
        dynamics_loss_weight: float = 1.0,
        reward_loss_weight: float = 0.1,
        termination_loss_weight: float = 0.0,
        infonce_loss_weight: float = 0.1,
        infonce_temperature: float = 0.1,
        replay_fade: float = 0.9999,
        replay_fade_min: float = 0.1,
        pre_activation_weight: float = 0.0,
        bc_weight: float = 0.0,
        bc_steps: int = 0,
        random_shift_pad: int = 4,
        precision: str = "auto",
        compile_updates: bool | str = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            encoder_horizon=encoder_horizon,
            target_update_interval=target_update_interval,
            encoder_learning_rate=encoder_learning_rate,
            exploration_noise=exploration_noise,
            discrete_policy=discrete_policy,
            target_policy_noise=target_policy_noise,
            target_noise_clip=target_noise_clip,
            max_grad_norm=max_grad_norm,
            reward_scaling=reward_scaling,
            priority_alpha=priority_alpha,
            min_td_error=min_td_error,
            dynamics_loss_weight=dynamics_loss_weight,
            reward_loss_weight=reward_loss_weight,
            termination_loss_weight=termination_loss_weight,
            infonce_loss_weight=infonce_loss_weight,
            infonce_temperature=infonce_temperature,
            replay_fade=replay_fade,
            replay_fade_min=replay_fade_min,
            pre_activation_weight=pre_activation_weight,
            bc_weight=bc_weight,
            bc_steps=bc_steps,
            random_shift_pad=random_shift_pad,
            precision=precision,
            compile_updates=compile_updates,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )
