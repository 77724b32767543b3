"""
MR.Q for Stable-Baselines3: hyperparameters, update schedule, logging, saving.
"""

from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_mrq.accelerate.precision import automatic_precision, bfloat16_is_fast, warn_if_changed
from sb3_mrq.accelerate.updates import Updates, restore_groups
from sb3_mrq.action_noise import hold_noise
from sb3_mrq.action_spaces import is_greedy, make_actions
from sb3_mrq.arguments import explain_foreign
from sb3_mrq.checks import DivergedError
from sb3_mrq.extractors import check_observation_space
from sb3_mrq.hyperparameters import UpdateHyperparameters, check_hyperparameters, check_replay_buffer, warn_about_settings
from sb3_mrq.learner import Learner, grad_norm
from sb3_mrq.networks import Actor, Critic, Encoder
from sb3_mrq.off_policy_algorithm import ResumableOffPolicyAlgorithm
from sb3_mrq.offline import cloning_scale
from sb3_mrq.persist.weights import add_reward_scales, restore_old_reward_scales
from sb3_mrq.policies import CnnPolicy, MlpPolicy, MRQPolicy, MultiInputPolicy


class MRQ(ResumableOffPolicyAlgorithm):
    """
    Model-based Representations for Q-learning (MR.Q).

    Paper: "Towards General-Purpose Model-Free Reinforcement Learning", Fujimoto, D'Oro, Zhang, Tian and Rabbat, ICLR 2025,
    https://arxiv.org/abs/2501.16142

    The default hyperparameters are the ones of the paper, for all tasks: continuous and discrete actions, vectors and images.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str), also one of ``gymnasium.make_vec``
    :param learning_rate: learning rate of value heads and policy, or a function of the progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer, over all environments. An episode of m steps takes m + 1 slots.
    :param learning_starts: how many uniformly random steps to do before learning starts, over all environments
    :param batch_size: Minibatch size for each gradient update
    :param gamma: the discount factor
    :param train_freq: Update the model every so many steps, or a tuple such as ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: How many training steps to do after each rollout, -1 for as many as environment steps in it
    :param action_noise: exploration noise for Box actions, replaces the built-in Gaussian noise (see ``exploration_noise``)
    :param replay_buffer_class: Replay buffer class to use, a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer` (the default)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: No effect, for compatibility with other algorithms: observations are always stored once.
    :param n_steps: Horizon of the value target
    :param encoder_horizon: Horizon over which the encoder predicts
    :param target_update_interval: Number of training steps (not environment steps, as in DQN) between replacements of the
        target networks. Each replacement also updates the reward scale, and is followed by as many encoder updates.
    :param encoder_learning_rate: learning rate of the encoder, or a function of the progress remaining (from 1 to 0)
    :param exploration_noise: Standard deviation of Gaussian noise added to actions scaled to [-1, 1] in rollouts. It is
        halved for the one-hot vectors of discrete actions, and so are ``target_policy_noise`` and ``target_noise_clip``. For a
        greedy policy, the size of the noise on values, in units of the reward scale.
    :param discrete_policy: Policy of discrete actions. ``"greedy"`` takes the action of the highest value; the value target is
        the highest value of the next observation. ``"actor"`` trains an actor with Gumbel-softmax, as in the paper. ``"auto"``
        is greedy for up to 32 actions, counting all combinations.
    :param target_policy_noise: Standard deviation of Gaussian noise added to target policy (smoothing noise)
    :param target_noise_clip: Limit for absolute value of target policy smoothing noise.
    :param max_grad_norm: Maximum gradient norm of the value heads, None for no clipping
    :param reward_scaling: Whether value targets are divided by the mean absolute reward of the replay buffer
    :param priority_alpha: Exponent of the priorities of the replay buffer, 0 for uniform sampling
    :param min_td_error: Transitions with a smaller TD error share the same priority
    :param dynamics_loss_weight: Weight of the embedding term of the encoder loss
    :param reward_loss_weight: Weight of the reward term of the encoder loss
    :param termination_loss_weight: Weight of the termination term of the encoder loss, 0 until an episode has terminated
    :param infonce_loss_weight: Weight of the contrastive term of the encoder loss (InfoNCE, from DR.Q)
    :param infonce_temperature: Temperature of the contrastive term
    :param replay_fade: Factor by which the probability of a transition falls with each one stored after it (from DR.Q)
    :param replay_fade_min: Lower bound on the product of these factors
    :param pre_activation_weight: Weight of the penalty on the squared pre-activations of the policy
    :param bc_weight: Weight of behaviour cloning (imitating the stored actions) in the policy loss of offline training, where
        values are divided by their mean size, see :meth:`train_offline`
    :param bc_steps: Number of transitions collected after offline training over which this weight falls to zero
    :param random_shift_pad: Largest random shift of images in training batches (data augmentation), in pixels, 0 for none
    :param precision: Precision of matrix products and activations in updates: ``"float32"``; ``"tf32"`` for matrix products in
        TF32 on GPUs that support it; ``"bfloat16"`` for processors with AMX or AVX512-BF16 and for GPUs. ``"auto"`` selects
        bfloat16 on such processors for vector observations and layers of this package and of torch, else float32.
        With bfloat16, normalise observations that differ by less than one per cent of their size.
    :param compile_updates: Whether to compile the losses with ``torch.compile``, which takes up to two minutes when training
        starts, and to capture training steps as CUDA graphs on a CUDA device. ``"auto"`` only captures on a CUDA device, and
        compiles on a CPU if the run is planned for at least ``COMPILE_FROM`` steps after the warm-up. If either fails,
        training continues without it, with a warning. Changes after the model is created or loaded have no effect.
    :param stats_window_size: Number of episodes that the rollout logging averages success rate, length and reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See :class:`~sb3_mrq.policies.MRQPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device used), 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run, the GPU if possible for auto
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    algorithm_name = "MRQ"
    learner_class: type[Learner] = Learner
    policy: MRQPolicy
    encoder: Encoder
    encoder_target: Encoder
    critic: Critic
    critic_target: Critic
    actor: Actor | None  # type: ignore[assignment]
    actor_target: Actor | None

    NETWORKS = ("encoder", "encoder_target", "critic", "critic_target", "actor", "actor_target")
    # Training steps between two transfers of the losses from the device to the logger
    METRICS_INTERVAL = 50
    # Steps from which compiling saves time: at default sizes it took 5 to 74 seconds and saved 12 to 54 ms per step
    COMPILE_FROM = 10_000

    @explain_foreign("MRQ")
    def __init__(
        self,
        policy: str | type[MRQPolicy],
        env: GymEnv | VectorEnv | str,
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
        encoder_learning_rate: float | Schedule = 1e-4,
        exploration_noise: float = 0.2,
        discrete_policy: str = "actor",
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.3,
        max_grad_norm: float | None = 20.0,
        reward_scaling: bool = True,
        priority_alpha: float = 0.4,
        min_td_error: float = 1.0,
        dynamics_loss_weight: float = 1.0,
        reward_loss_weight: float = 0.1,
        termination_loss_weight: float = 0.1,
        infonce_loss_weight: float = 0.0,
        infonce_temperature: float = 0.1,
        replay_fade: float = 1.0,
        replay_fade_min: float = 0.1,
        pre_activation_weight: float = 1e-5,
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
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.n_steps = n_steps
        self.encoder_horizon = encoder_horizon
        self.target_update_interval = target_update_interval
        self.encoder_learning_rate = encoder_learning_rate
        self.exploration_noise = exploration_noise
        self.discrete_policy = discrete_policy
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.max_grad_norm = max_grad_norm
        self.reward_scaling = reward_scaling
        self.priority_alpha = priority_alpha
        self.min_td_error = min_td_error
        self.dynamics_loss_weight = dynamics_loss_weight
        self.reward_loss_weight = reward_loss_weight
        self.termination_loss_weight = termination_loss_weight
        self.infonce_loss_weight = infonce_loss_weight
        self.infonce_temperature = infonce_temperature
        self.replay_fade = replay_fade
        self.replay_fade_min = replay_fade_min
        self.pre_activation_weight = pre_activation_weight
        self.bc_weight = bc_weight
        self.bc_steps = bc_steps
        self.random_shift_pad = random_shift_pad
        self.precision = precision
        self.compile_updates = compile_updates

        # Noise on values in the last step
        self._held_noise: np.ndarray | None = None
        # Training step before which the targets were last replaced, and number of encoder updates since then
        self._targets_replaced_at: int | None = None
        self._n_encoder_updates = 0

        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
        # Both raise errors for unsupported spaces, with the remedy
        check_observation_space(observation_space)
        make_actions(action_space)

    def _setup_model(self) -> None:
        # Replaces the method of OffPolicyAlgorithm, in which n_steps selects another replay buffer
        check_hyperparameters(self)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)

        fade = dict(fade=self.replay_fade, fade_min=self.replay_fade_min)
        self._create_replay_buffer(horizon=self.encoder_horizon, n_steps=self.n_steps, **fade)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            encoder_lr_schedule=self.encoder_lr_schedule,
            **self.policy_kwargs,
            **({"greedy": True} if is_greedy(self.discrete_policy, self.action_space) else {}),
        )
        self.policy = self.policy.to(self.device)
        for name in self.NETWORKS:
            setattr(self, name, getattr(self.policy, name))
        self._convert_train_freq()
        restore_old_reward_scales(self)
        trained = (getattr(self.policy, name) for name in self.policy.networks)
        self.automatic_precision = automatic_precision(self.device, *trained)
        self.learner = self.learner_class(self.policy, UpdateHyperparameters.from_model(self, self.automatic_precision))
        self.updates = Updates(self.learner, self.device, self.compile_updates, self.verbose)
        self.updates.compile(self.compile_updates is True)
        if self.verbose >= 1 and self.precision == "auto" and self.learner.hyperparameters.precision == "bfloat16":
            print("Using bfloat16 for matrix products of updates")

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.encoder_lr_schedule = FloatSchedule(self.encoder_learning_rate)

    @property
    def reward_scale(self) -> float:
        """Unit of the values: mean absolute reward of the buffer when the targets were last replaced (rbar in the paper)."""
        return self.critic.reward_scale.item()

    @reward_scale.setter
    def reward_scale(self, value: float) -> None:
        self.critic.reward_scale.fill_(value)

    @property
    def target_reward_scale(self) -> float:
        """Reward scale that the target networks were trained with (rbar' in the paper)."""
        return self.critic_target.reward_scale.item()

    @target_reward_scale.setter
    def target_reward_scale(self, value: float) -> None:
        self.critic_target.reward_scale.fill_(value)

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        check_hyperparameters(self)
        check_replay_buffer(self, self.replay_buffer)
        reset_num_timesteps = kwargs.get("reset_num_timesteps", args[1] if len(args) > 1 else True)
        last_step = total_timesteps + (0 if reset_num_timesteps else self.num_timesteps)
        warn_about_settings(self, last_step, reset_num_timesteps, bfloat16_is_fast(self.device))
        if self.compile_updates == "auto" and last_step - self.learning_starts >= self.COMPILE_FROM:
            self.updates.compile_on_cpu()
        set_up = super()._setup_learn(total_timesteps, *args, **kwargs)
        self.updates.rehearse(self.replay_buffer, self._last_obs, self.batch_size, self._vec_normalize_env)
        return set_up

    def _explore(self, obs: np.ndarray | dict[str, np.ndarray], with_noise: bool) -> np.ndarray:
        noise = self.exploration_noise if with_noise else 0.0
        if self.policy.greedy:
            self._held_noise = hold_noise(self._held_noise, (self.n_envs, self.policy.actions.n_actions))
            return self.updates.act(obs, noise * self._held_noise)
        return self.updates.act(obs, noise)

    def q_values(self, observations: Any, actions: Any = None) -> np.ndarray:
        """
        Values in units of the reward, see :meth:`sb3_mrq.policies.MRQPolicy.q_values`.

        :param observations: one or a batch, as ``predict`` takes them
        :param actions: one for each, as the environment takes them, or None for all of a Discrete space
        :return: (B, n_critics), or (B, n_actions, n_critics) without ``actions``; without B for one observation
        """
        return self.policy.q_values(observations, actions)

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Do training steps. Each is one update of the value heads and one of the policy. Every ``target_update_interval`` steps,
        the targets are replaced, the reward scale is updated, and ``target_update_interval`` encoder updates are done first.
        Nothing is done until a transition can be sampled. No environment is needed. Steps that a signal, an error or Ctrl-C
        has interrupted are left to the next call.

        :param gradient_steps: How many training steps to do
        :param batch_size: number of sub-trajectories of an encoder update, and of transitions of a value and policy update
        :raises DivergedError: if losses, embeddings or TD errors are not finite
        """
        assert self.replay_buffer is not None
        self.require_logger()
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)

        # Update learning rates according to their schedules
        self._update_learning_rate([network.optimizer for network in (self.critic, self.actor) if network is not None])
        encoder_learning_rate = self.encoder_lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.encoder.optimizer, encoder_learning_rate)
        self.logger.record("train/encoder_learning_rate", encoder_learning_rate)

        self.gradient_steps_left += gradient_steps
        # Nothing can be sampled until the first episode has ended or is longer than the horizon
        if self.replay_buffer.n_sampleable == 0:
            self.gradient_steps_left = 0
        if self.gradient_steps_left > 0 and not self.stop_signals.pending:
            self.learner.hyperparameters = UpdateHyperparameters.from_model(self, self.automatic_precision)
            self.learner.termination_switch.fill_(self.replay_buffer.has_terminated)
            self.learner.cloning_scale.fill_(cloning_scale(self))
            self.updates.prepare(self.replay_buffer, batch_size, self._vec_normalize_env)
        while self.gradient_steps_left > 0 and not self.stop_signals.pending and self._training_step():
            self.gradient_steps_left -= 1

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _training_step(self) -> bool:
        """
        :return: False if a signal interrupted the encoder burst, which the next call resumes
        """
        # Every target_update_interval steps: replace targets, update the reward scale, and do a burst of encoder updates
        if self._n_updates % self.target_update_interval == 0:
            if self._targets_replaced_at != self._n_updates:
                self._replace_targets()
                self._targets_replaced_at, self._n_encoder_updates = self._n_updates, 0
            while self._n_encoder_updates < self.target_update_interval:
                if self.stop_signals.pending:
                    return False
                self.progress.encoder_update(self, self._n_encoder_updates)
                self.updates.encoder()
                self._n_encoder_updates += 1
            self._log_encoder()
            self.progress.encoder_update(self, self._n_encoder_updates)
        self.updates.value_and_policy()

        self._n_updates += 1
        if self._n_updates % self.METRICS_INTERVAL == 1:
            self._log_value_and_policy()
        return True

    def _replace_targets(self) -> None:
        """Replace all target networks, with their reward scale, then update the reward scale of the critic."""
        assert self.replay_buffer is not None
        self.learner.replace_targets()
        if not self.reward_scaling:
            return
        mean = self.replay_buffer.mean_abs_reward(self._vec_normalize_env)
        # A new buffer without rewards so far does not change the unit of values that are already trained
        if mean > 0 or self.replay_buffer.full or self._targets_replaced_at is None:
            self.critic.reward_scale.fill_(max(mean, 1e-8))

    def _record(self, metrics: dict[str, float]) -> None:
        """Log metrics, and raise an error if one is not finite."""
        if not np.isfinite(list(metrics.values())).all():
            raise DivergedError(f"the means of the metrics of the last updates are {metrics}")
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)

    def _log_encoder(self) -> None:
        """Log metrics of the last burst of encoder updates and of the embeddings after it."""
        self._record(self.updates.encoder_metrics.take())
        metrics = self.learner.embedding_metrics(self.updates.sample_n_step())
        self._record(dict(zip(metrics, th.stack([*metrics.values()]).tolist(), strict=True)))
        self.logger.record("train/reward_scale", self.reward_scale)

    def _log_value_and_policy(self) -> None:
        """Log metrics of the last value and policy updates."""
        means = self.updates.value_policy_metrics.take()
        if means:
            self._record(means | ({} if self.actor is None else {"actor_grad_norm": grad_norm(self.actor).item()}))

    def dump_logs(self) -> None:
        """Write log data, including the metrics of the last updates and the time that remains."""
        self._log_value_and_policy()
        self.progress.record(self)
        super().dump_logs()

    @property
    def training_progress(self) -> tuple[int, ...]:
        """Timesteps, training steps, and encoder updates of the current burst."""
        return (*super().training_progress, self._n_encoder_updates)

    def get_checkpoint_info(self) -> dict[str, Any]:
        return {"precision": self.learner.hyperparameters.precision}

    def on_resume(self, info: dict[str, Any]) -> None:
        if self.precision == "auto":
            warn_if_changed(self.learner.hyperparameters.precision, info.get("precision"))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self.NETWORKS, "learner", "updates", "automatic_precision"]

    def get_parameters(self) -> dict[str, dict]:
        """:return: Mapping from names of the objects, policy and optimizers, to PyTorch state-dicts."""
        parameters = super().get_parameters()
        for name in self.policy.networks:
            # Undo changes that capturing has made
            restore_groups(parameters[f"{name}.optimizer"]["param_groups"], getattr(self, name).optimizer)
        return parameters

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a zip-file or a nested dictionary, see ``BaseAlgorithm.set_parameters``.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
        :param exact_match: Whether all parameters must be there; reward scales may be missing, as in files of version 0.1
        :param device: Device on which the code should run.
        """
        super().set_parameters(add_reward_scales(self, load_path_or_dict, device), exact_match, device)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"{name}.optimizer" for name in self.policy.networks)], []
