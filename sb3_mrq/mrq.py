"""
MR.Q for Stable-Baselines3: hyperparameters, schedule (what is updated when), logging, and what is saved.
"""

import contextlib
import io
import pathlib
import threading
import warnings
from copy import deepcopy
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_normalize

from sb3_mrq.action_spaces import make_actions
from sb3_mrq.augmentation import random_shift
from sb3_mrq.buffers import NStepSamples, SubtrajectoryReplayBuffer, SubtrajectorySamples
from sb3_mrq.checkpoints import resume, set_generators
from sb3_mrq.checks import (
    BadValueError,
    DivergedError,
    check_vec_normalize,
    count_env_steps,
    explain_dead_worker,
    subspaces_of,
)
from sb3_mrq.device_replay import DeviceReplay
from sb3_mrq.device_training import DeviceTraining, release, restore_groups
from sb3_mrq.extractors import check_observation_space
from sb3_mrq.graphs import CaptureError, Graph, give_back_memory
from sb3_mrq.hyperparameters import UpdateHyperparameters, check_hyperparameters
from sb3_mrq.learner import EncoderMetrics, Learner, ValuePolicyMetrics, grad_norm
from sb3_mrq.metrics import MetricMeans, Scalars
from sb3_mrq.networks import Actor, Critic, Encoder
from sb3_mrq.observations import Observation, map_observation, unbind_time
from sb3_mrq.policies import CnnPolicy, MlpPolicy, MRQPolicy, MultiInputPolicy
from sb3_mrq.precision import automatic_precision, bfloat16_is_fast
from sb3_mrq.replay_files import load_replay_buffer, other_buffer_error, save_replay_buffer
from sb3_mrq.stopping import EvaluationStopped, StoppableCallbacks, StopSignals

SelfMRQ = TypeVar("SelfMRQ", bound="MRQ")

# Among the parameters of a model
REWARD_SCALES = "reward_scales"


class MRQ(OffPolicyAlgorithm):
    """
    Model-based Representations for Q-learning (MR.Q).

    Paper: "Towards General-Purpose Model-Free Reinforcement Learning", Fujimoto, D'Oro, Zhang, Tian and Rabbat, ICLR 2025,
    https://arxiv.org/abs/2501.16142

    The default hyperparameters are the paper's and are meant for every task: continuous and discrete actions, vectors and
    images.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of value heads and policy,
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer, over all environments. The final observation of an episode takes a place of
        its own: an episode of m steps takes m + 1.
    :param learning_starts: how many steps of the model to collect transitions for before learning starts, over all
        environments. Until then actions are uniformly random.
    :param batch_size: Minibatch size for each gradient update
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many training steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many as steps done in the environment during the rollout.
    :param action_noise: exploration noise for Box actions, in place of the built-in Gaussian noise (see ``exploration_noise``)
    :param replay_buffer_class: Replay buffer class to use, a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer` (the default)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Accepted as in other algorithms, but of no effect: observations are always stored once.
    :param n_steps: Horizon of the value target
    :param encoder_horizon: Horizon over which the encoder predicts
    :param target_update_interval: Number of training steps (not of environment steps, as in DQN) between replacements of the
        target networks. Each also renews the reward scale, and is followed by as many encoder updates.
    :param encoder_learning_rate: learning rate of the encoder,
        it can be a function of the current progress remaining (from 1 to 0)
    :param exploration_noise: Standard deviation of Gaussian noise added to actions scaled to [-1, 1] where transitions are
        collected. Half of it is added to the one-hot vectors of discrete actions; likewise ``target_policy_noise`` and
        ``target_noise_clip``.
    :param target_policy_noise: Standard deviation of Gaussian noise added to target policy (smoothing noise)
    :param target_noise_clip: Limit for absolute value of target policy smoothing noise.
    :param max_grad_norm: Bound on the gradient norm of the value heads
    :param priority_alpha: Exponent of the priorities of the replay buffer, 0 for uniform sampling
    :param min_td_error: Transitions with a smaller TD error share the same priority
    :param dynamics_loss_weight: Weight of the embedding term of the encoder loss
    :param reward_loss_weight: Weight of the reward term of the encoder loss
    :param termination_loss_weight: Weight of the termination term of the encoder loss, which is
        left out until an episode has terminated
    :param pre_activation_weight: Weight of the penalty on the squared pre-activations of the policy
    :param random_shift_pad: Largest shift, in pixels, of the images in training batches (data augmentation), 0 for none
    :param precision: ``"float32"``; ``"tf32"`` for float32 matrix products in TF32 on GPUs that have it; or ``"bfloat16"`` for
        networks that compute matrix products and keep activations in bfloat16, which pays on processors with AMX or
        AVX512-BF16, and is meant for GPUs. It has 8 bits: observations that differ by less than a hundredth of their size
        should be normalised, or float32. Values and their targets, weights, losses and optimisers are in float32 in any case.
        ``"auto"`` is bfloat16 on such a processor where observations are vectors, with the layers of this package and of
        torch; else it is float32. ``model.learner.hyperparameters.precision`` says which.
    :param compile_updates: Whether to compile the losses with ``torch.compile``, which takes up to two minutes when training
        starts. On a CUDA device whole training steps are also captured as CUDA graphs, with a copy of the replay buffer on the
        device. ``"auto"`` captures them there, where it can, without compiling. On a CPU it compiles if ``learn`` is to run
        for at least ``COMPILE_FROM`` steps after the warm-up, or calls of ``learn`` have made as many training steps since the
        model was created or loaded, in the main thread.
        If compiling or capturing fails, training goes on without it, after a warning.
        Read when the model is created or loaded; later changes have no effect.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. See :class:`~sb3_mrq.policies.MRQPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MRQPolicy
    replay_buffer: SubtrajectoryReplayBuffer | None
    encoder: Encoder
    encoder_target: Encoder
    critic: Critic
    critic_target: Critic
    actor: Actor
    actor_target: Actor
    # What callbacks want undone when learning ends, however it does
    while_learning: contextlib.ExitStack

    # Training steps between two transfers of the losses from the device to the logger
    METRICS_INTERVAL = 50
    # Steps from which compilation is worth while. At default sizes it took 5 to 74 seconds and saved 12 to 54 ms of a step; at
    # smaller ones it saves less.
    COMPILE_FROM = 10_000
    # Of the memory that is free on a GPU, what the replay buffer may take there
    SHARE_OF_DEVICE = 0.7

    def __init__(
        self,
        policy: str | type[MRQPolicy],
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
        encoder_learning_rate: float | Schedule = 1e-4,
        exploration_noise: float = 0.2,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.3,
        max_grad_norm: float = 20.0,
        priority_alpha: float = 0.4,
        min_td_error: float = 1.0,
        dynamics_loss_weight: float = 1.0,
        reward_loss_weight: float = 0.1,
        termination_loss_weight: float = 0.1,
        pre_activation_weight: float = 1e-5,
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
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.max_grad_norm = max_grad_norm
        self.priority_alpha = priority_alpha
        self.min_td_error = min_td_error
        self.dynamics_loss_weight = dynamics_loss_weight
        self.reward_loss_weight = reward_loss_weight
        self.termination_loss_weight = termination_loss_weight
        self.pre_activation_weight = pre_activation_weight
        self.random_shift_pad = random_shift_pad
        self.precision = precision
        self.compile_updates = compile_updates

        # rbar and rbar': mean absolute reward of the buffer when the targets were last replaced, and the time before
        self.reward_scale = 1.0
        self.target_reward_scale = 0.0
        # Training step before which that was, and encoder updates since, of those that belong to it
        self._targets_replaced_at: int | None = None
        self._n_encoder_updates = 0
        # Training steps still to be done: outside of train those that a signal, Ctrl-C or an error has kept from being done
        self.gradient_steps_left = 0

        # Of checkpoints: which run they are of, the names of those that resuming passed over, and what else there was in the
        # one that this model was resumed from, until it learns
        self.run_id: str | None = None
        self.damaged_checkpoints: list[str] = []
        self.resumed_generators: dict[str, Any] | None = None
        self.resumed_compiled: bool | None = None
        # Watched by a callback, if at all
        self.stop_signals = StopSignals()
        self.in_rollout_callback = False
        # Steps that the environments had made when learning ended, None where that is not known
        self._env_steps: list[int] | None = None

        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, (gym.Env, VecEnv)):
            # Both raise errors for spaces that are not supported, with the remedy. Others are converted first, or refused.
            check_observation_space(env.observation_space)
            make_actions(env.action_space)
        wrapped = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        vec_normalize = unwrap_vec_normalize(wrapped)
        if isinstance(wrapped, VecTransposeImage) and vec_normalize is not None:
            # Original observations, which are stored, and final ones would have their axes in another order
            raise ValueError(
                "VecNormalize is around images whose channels come last: put a VecTransposeImage inside of it, as in "
                "VecNormalize(VecTransposeImage(env))."
            )
        if vec_normalize is not None and vec_normalize.observation_space.shape != wrapped.observation_space.shape:
            raise ValueError(
                f"The observations of VecNormalize {vec_normalize.observation_space.shape} are changed outside of it, to "
                f"{wrapped.observation_space.shape}: put VecNormalize around the other wrappers, such as VecFrameStack."
            )
        return wrapped

    def _setup_model(self) -> None:
        # Not that of OffPolicyAlgorithm, in which n_steps chooses another replay buffer
        check_hyperparameters(self)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)

        if self.replay_buffer_class is None:
            self.replay_buffer_class = SubtrajectoryReplayBuffer
        if self.replay_buffer is None:
            self.replay_buffer = self.replay_buffer_class(  # type: ignore[assignment,call-arg]
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                horizon=self.encoder_horizon,
                n_steps=self.n_steps,
                **self.replay_buffer_kwargs,
            )

        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            encoder_lr_schedule=self.encoder_lr_schedule,
            **self.policy_kwargs,
        )
        self.policy = self.policy.to(self.device)
        self._create_aliases()
        self._convert_train_freq()
        # Training steps before the model was created or loaded
        self.updates_before = self._n_updates
        # Once, as networks and device stay, and hyperparameters are looked up at every training step
        self.automatic_precision = automatic_precision(self.device, self.encoder, self.critic, self.actor)
        self.learner = Learner(self.policy, self._learner_hyperparameters(), compiled=self.compile_updates is True)
        if self.verbose >= 1 and self.precision == "auto" and self.learner.hyperparameters.precision == "bfloat16":
            print("Using bfloat16 for matrix products of updates")
        # Metrics of the last updates, on the device until they are logged
        self._encoder_metrics = MetricMeans(EncoderMetrics._fields, self.device)
        self._value_policy_metrics = MetricMeans(ValuePolicyMetrics._fields, self.device)
        self._scalars = Scalars(self.device)
        self._device_training: DeviceTraining | None = None
        self._may_capture = self.compile_updates is not False and Graph.can_capture(self.device)

    def _learner_hyperparameters(self) -> UpdateHyperparameters:
        """
        :return: the hyperparameters of the updates, as they are now
        """
        values = {field.name: getattr(self, field.name) for field in fields(UpdateHyperparameters)}
        if self.precision == "auto":
            values["precision"] = self.automatic_precision
        return UpdateHyperparameters(**values)

    def _create_aliases(self) -> None:
        self.encoder = self.policy.encoder
        self.encoder_target = self.policy.encoder_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.encoder_lr_schedule = FloatSchedule(self.encoder_learning_rate)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        assert self.replay_buffer is not None
        check_hyperparameters(self)
        self._check_replay_buffer(self.replay_buffer)
        if reset_num_timesteps:
            # Another run, whose checkpoints do not replace those of the one before
            self.run_id, self.damaged_checkpoints = None, []
        self.replay_buffer.check_size()
        self._warn_of_settings(total_timesteps + (0 if reset_num_timesteps else self.num_timesteps), reset_num_timesteps)
        # OffPolicyAlgorithm would mark the last transition in the buffer as a termination here. The buffer itself notices
        # that the environment was reset.
        self.optimize_memory_usage = False
        env_steps = self._count_env_steps()
        if self._env_steps is not None and env_steps is not None and env_steps != self._env_steps:
            # Evaluated in since then, or another one: what comes next does not follow from the last observation
            self._last_obs = None
        try:
            total_timesteps, callback = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            check_vec_normalize(self._vec_normalize_env)
        except BaseException as error:
            # Whether the environment was reset is not known
            self._last_obs = None
            explain_dead_worker(self.env, error, self.num_timesteps)
            raise
        if self.compile_updates == "auto":
            to_come = self._total_timesteps - max(self.learning_starts, self.num_timesteps)
            # As many as have been made are likely to follow, where learn is called again and again
            steps = max(to_come, self._n_updates - self.updates_before)
            # The compiler is not meant for several threads at once, such as those of a hyperparameter search
            alone = threading.current_thread() is threading.main_thread()
            worth_while = self.learner.compiled or steps >= self.COMPILE_FROM
            compiled = self.device.type == "cpu" and alone and worth_while and not self.learner.compiling_failed
            if self.resumed_compiled is not None:
                compiled = self.resumed_compiled
            if compiled != self.learner.compiled:
                self.learner.set_compiled(compiled)
        obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        assert obs is not None
        try:
            self._check_observations(obs)
        except BadValueError:
            self._last_obs = None
            raise
        if self.resumed_generators is not None:
            # What was done since then, such as making an environment for evaluations, may have drawn from them
            set_generators(self, self.resumed_generators)
        self.resumed_generators = self.resumed_compiled = None
        return total_timesteps, callback

    def _warn_of_settings(self, last_step: int, reset_num_timesteps: bool) -> None:
        """
        Warn of what is allowed, but hardly meant.

        :param last_step: of the training that is about to begin
        :param reset_num_timesteps: whether its steps are counted from 0
        """
        assert self.replay_buffer is not None
        warn = partial(warnings.warn, stacklevel=5)
        if last_step <= self.learning_starts:
            warn(
                f"Nothing will be learned: {last_step} steps end before learning_starts={self.learning_starts}. Train for "
                "longer, or let learning start earlier."
            )
            return
        if reset_num_timesteps and self._n_updates > 0 and 0 < self.learning_starts <= self.replay_buffer.size():
            warn(
                f"The first {self.learning_starts} steps will be random again, and nothing learned in them: steps are counted "
                "from 0. To go on from where training was, pass reset_num_timesteps=False; or set learning_starts=0."
            )
        if self.precision == "bfloat16" and not bfloat16_is_fast(self.device):
            warn(
                f"precision='bfloat16' makes training many times slower here, as this device ({self.device}) has no "
                "instructions for it. Leave precision out, or set it to 'float32'."
            )

    def _count_env_steps(self) -> list[int] | None:
        return None if self.env is None or self._last_obs is None else count_env_steps(self.env)

    def _check_replay_buffer(self, replay_buffer: ReplayBuffer) -> None:
        """
        :raises ValueError: if training cannot go on with a replay buffer
        """
        if not isinstance(replay_buffer, SubtrajectoryReplayBuffer):
            raise ValueError(
                f"MR.Q learns from a SubtrajectoryReplayBuffer, not from a {type(replay_buffer).__name__}: start with "
                "an empty buffer."
            )
        for name, theirs, ours in (
            ("number of environments", replay_buffer.n_envs, self.n_envs),
            ("horizon", replay_buffer.horizon, self.encoder_horizon),
            ("n_steps", replay_buffer.n_steps, self.n_steps),
            ("observation space", replay_buffer.observation_space, self.observation_space),
            ("action space", replay_buffer.action_space, self.action_space),
        ):
            if theirs != ours:
                raise other_buffer_error(name, theirs, ours)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as plain arrays, see :mod:`sb3_mrq.replay_files`.

        :param path: Path to the file where the replay buffer should be saved, to which ``.pkl`` is added where it has no
            suffix, as in SB3, or a file. Under a path there is at any moment what was there before, or all of the buffer.
        """
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        save_replay_buffer(path, self.replay_buffer)

    def load_replay_buffer(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        truncate_last_traj: bool = True,
    ) -> None:
        """
        Load a replay buffer saved by ``save_replay_buffer``. No code from the file is run.

        :param path: Path to the file, whatever its name, or a file.
        :param truncate_last_traj: of no effect: the buffer itself notices whether the environment goes on where it ended
        :raises ReplayFileError: if it is no such file, or a damaged one; the present buffer stays then
        :raises ValueError: if it is a buffer for other environments; the present buffer stays then
        """
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        replay_buffer = load_replay_buffer(path, self.replay_buffer, self.verbose)
        # Two copies on the device may be more than it has room for
        self.replay_buffer.drop_mirror()
        self.replay_buffer = replay_buffer

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        # As OffPolicyAlgorithm does, but for final observations, see there
        if self._vec_normalize_env is None:
            self._last_original_obs, original_obs, original_reward = self._last_obs, new_obs, reward
        else:
            original_obs = self._vec_normalize_env.get_original_obs()
            original_reward = self._vec_normalize_env.get_original_reward()
        next_obs = deepcopy(original_obs)
        if dones.any():
            # The first observation of the next episode is not stored now, but acted on before it is
            self._check_observations(original_obs)
        try:
            for i, info in enumerate(infos):
                if dones[i]:
                    self._set_final_observation(next_obs, i, info)
            last_obs: Any = self._last_original_obs
            replay_buffer.add(last_obs, next_obs, buffer_action, original_reward, dones, infos)  # type: ignore[arg-type]
        except BadValueError as error:
            raise self._at_this_step(error) from None
        self._last_obs = new_obs
        self._last_original_obs = original_obs

    def _set_final_observation(self, next_obs: np.ndarray | dict[str, np.ndarray], i: int, info: dict[str, Any]) -> None:
        """
        :param next_obs: of all environments, (n_envs, ...) or a dict of these, in which to put the final observation
        :param i: index of an environment whose episode has ended
        :param info: of that environment, with the final observation, as normalised by ``VecNormalize`` if there is one
        :raises BadValueError: if there is none, where OffPolicyAlgorithm would take the first observation of the next episode,
            or one that does not fit the space
        """
        final_obs = info.get("terminal_observation")
        if final_obs is None:
            raise BadValueError(f"Environment {i} gave no final observation")
        if self._vec_normalize_env is not None:
            final_obs = self._vec_normalize_env.unnormalize_obs(final_obs)
        for key, space in subspaces_of(self.observation_space).items():
            rows: Any = next_obs if key is None else next_obs[key]
            value = np.asarray(final_obs if key is None else final_obs[key])
            if value.size != rows[i].size or value.dtype.kind not in "biuf":
                form = f"of the type {value.dtype} and the shape {value.shape}"
                raise BadValueError(f"Environment {i} gave a final observation {form}, which is not in {space},")
            if rows.dtype.kind in "iu" and value.dtype.kind == "f":
                # What normalisation and its inverse leave of an integer would be truncated, and what is out of range wrapped
                value = np.rint(value)
                bounds = np.iinfo(rows.dtype)
                if not ((value >= bounds.min) & (value <= bounds.max)).all():
                    raise BadValueError(f"Environment {i} gave a final observation {value}, which is not in {space},")
            rows[i] = value.reshape(rows[i].shape)

    def _check_observations(self, obs: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        :param obs: observations of all environments, before normalisation
        :raises BadValueError: if one cannot be learned from
        """
        assert self.replay_buffer is not None
        try:
            self.replay_buffer.checks.check(obs)
        except BadValueError as error:
            raise self._at_this_step(error) from None

    def _at_this_step(self, error: BadValueError) -> BadValueError:
        return type(error)(
            f"{error} at step {self.num_timesteps}, from which MR.Q cannot learn: fix the environment or clip what it gives. "
            "The replay buffer holds what came before."
        )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        return StoppableCallbacks(super()._init_callback(callback, progress_bar), self)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect experiences and store them into the replay buffer, see ``OffPolicyAlgorithm.collect_rollouts``.
        """
        if self.stop_signals.pending:
            # This is where a checkpoint is made
            callback.on_rollout_start()
            return RolloutReturn(0, 0, continue_training=False)
        complete = False
        try:
            rollout = super().collect_rollouts(env, callback, *args, **kwargs)
            complete = rollout.continue_training
        except (EOFError, ConnectionError) as error:
            if not self.stop_signals.arrived():
                explain_dead_worker(self.env, error, self.num_timesteps)
                raise
            # Ctrl-C reaches the processes of the environments as well, which are gone now
            rollout = RolloutReturn(0, 0, continue_training=False)
        finally:
            if not complete:
                # A callback, an error or Ctrl-C came between a step of the environment and its storing. Go on from a reset,
                # not from an observation that is past.
                self._last_obs = None
        return rollout

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation (and optional hidden state), see ``BaseAlgorithm.predict``.

        :param observation: the input observation, of one environment or of several
        :param state: passed on as it is, for there are no recurrent policies
        :param episode_start: of no effect, likewise
        :param deterministic: Whether to return the best action, or to sample discrete actions; Box actions are the same
        :return: the model's action, and ``state``
        :raises EvaluationStopped: in what callbacks do in a rollout, where a signal is to end training
        """
        # The signals are those of the main thread; others may go on to use the model
        if self.in_rollout_callback and self.stop_signals.pending and threading.current_thread() is threading.main_thread():
            raise EvaluationStopped
        return super().predict(observation, state, episode_start, deterministic)

    def _sample_action(
        self,
        learning_starts: int,
        action_noise: ActionNoise | None = None,
        n_envs: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            # Warmup phase
            action = np.array([self.action_space.sample() for _ in range(n_envs)])
            return action, self.policy.scale_action(action) if isinstance(self.action_space, spaces.Box) else action

        assert self._last_obs is not None, "self._last_obs was not set"
        buffer_action = self._explore(self._last_obs, 0.0 if action_noise is not None else self.exploration_noise)
        buffer_action = buffer_action.reshape(n_envs, *self.action_space.shape)  # type: ignore[misc]
        if not isinstance(self.action_space, spaces.Box):
            buffer_action = buffer_action.astype(self.action_space.dtype)
            return buffer_action, buffer_action
        if action_noise is not None:
            noise = np.reshape(action_noise(), buffer_action.shape)
            buffer_action = np.clip(buffer_action + noise, -1, 1).astype(np.float32)
        return self.policy.unscale_action(buffer_action), buffer_action

    def _explore(self, obs: np.ndarray | dict[str, np.ndarray], noise: float) -> np.ndarray:
        if self._device_training is not None:
            try:
                action = self._device_training.act(obs, noise)
                if not np.isfinite(action).all():
                    raise DivergedError(f"the policy's action is {action}")
                return action
            except CaptureError as error:
                self._give_up_capturing(error)
        return self.policy.explore(obs, noise)

    def _preprocess(self, obs: Observation) -> Observation:
        """
        :param obs: sampled observations, (B, ...) or a dict of these
        :return: as the encoder takes them, images randomly shifted
        """
        if self.random_shift_pad > 0:
            obs = map_observation(self._augment, obs, self.observation_space)
        return self.policy.preprocess(obs)

    def _augment(self, obs: th.Tensor, space: spaces.Space) -> th.Tensor:
        return random_shift(obs, self.random_shift_pad) if self.policy.is_image(space) else obs

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Do training steps: one update of the value heads and one of the policy each. Before every
        ``target_update_interval``-th, the targets are replaced, the reward scale is renewed, and as many encoder updates are
        done. While no transition can be sampled nothing is done.

        Where a signal is to end training, they are put off until training goes on: done before those of the next call. Those
        that an error or Ctrl-C has kept from being done are, too.

        :param gradient_steps: How many training steps to do
        :param batch_size: sub-trajectories of an encoder update, transitions of a value and policy update
        :raises DivergedError: if what the networks compute is not finite
        """
        assert self.replay_buffer is not None
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)

        # Update learning rates according to their schedules
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        encoder_learning_rate = self.encoder_lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.encoder.optimizer, encoder_learning_rate)
        self.logger.record("train/encoder_learning_rate", encoder_learning_rate)

        self.gradient_steps_left += gradient_steps
        # Where the first episode is shorter than the horizon there is nothing yet
        if self.replay_buffer.n_sampleable == 0:
            self.gradient_steps_left = 0
        if self.gradient_steps_left > 0 and not self.stop_signals.pending:
            self.learner.hyperparameters = self._learner_hyperparameters()
            self._set_scalars()
            self._prepare_capturing(batch_size)
        while self.gradient_steps_left > 0 and not self.stop_signals.pending and self._training_step(batch_size):
            self.gradient_steps_left -= 1

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _training_step(self, batch_size: int) -> bool:
        """
        One training step.

        :param batch_size: as for ``train``
        :return: whether it has been done: not if a signal came in a burst of encoder updates, which is then put off too
        """
        # Every so many steps: new targets, new reward scale, and the encoder updates of the steps to come
        if self._n_updates % self.target_update_interval == 0:
            if self._targets_replaced_at != self._n_updates:
                self._replace_targets()
                self._targets_replaced_at, self._n_encoder_updates = self._n_updates, 0
            # One that was broken off goes on where it was: its training step has not been counted
            while self._n_encoder_updates < self.target_update_interval:
                if self.stop_signals.pending:
                    return False
                self._train_encoder(batch_size)
                self._n_encoder_updates += 1
            self._log_encoder()
        self._train_value_and_policy(batch_size)

        self._n_updates += 1
        if self._n_updates % self.METRICS_INTERVAL == 1:
            self._log_value_and_policy()
        return True

    def _prepare_capturing(self, batch_size: int) -> None:
        """
        Make ready for training steps that are captured as graphs, if they are to be and can be.
        """
        assert self.replay_buffer is not None
        if not self._may_capture:
            return
        try:
            if self._vec_normalize_env is not None:
                raise CaptureError("VecNormalize works on the host.")
            if threading.current_thread() is not threading.main_thread():
                raise CaptureError("Torch captures one graph at a time, here only in the main thread.")
            if th.are_deterministic_algorithms_enabled():
                raise CaptureError("torch.use_deterministic_algorithms excludes the sums by which indices are drawn there.")
            if self._device_training is None or self._device_training.batch_size != batch_size:
                free = self._free_memory()
                size = DeviceReplay.size_of(self.replay_buffer)
                if self._device_training is None and size > self.SHARE_OF_DEVICE * free:
                    raise CaptureError(f"The replay buffer takes {size / 1e9:.3g} GB, of {free / 1e9:.3g} GB free there.")
                self._device_training = DeviceTraining(self, batch_size)
            else:
                self._device_training.prepare()
        except (CaptureError, TypeError, th.OutOfMemoryError) as error:
            self._give_up_capturing(error, warn=self.compile_updates is True)

    def _free_memory(self) -> float:
        """Bytes that are free on the device, once what models before this one have left behind is given back."""
        give_back_memory(self.device)
        return th.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else np.inf

    def _give_up_capturing(self, error: Exception, warn: bool = True) -> None:
        """
        Train without graphs from now on.

        :param error: the reason
        :param warn: whether to warn; otherwise it is said as information, as where nobody asked for graphs that cannot be
        """
        if warn:
            warnings.warn(
                f"Training steps could not be captured as CUDA graphs, so they run as they are, slower but with the same "
                f"results. Set compile_updates=False to do so from the start. {error}",
                stacklevel=2,
            )
        elif self.verbose >= 1:
            print(f"Training steps are not captured as CUDA graphs: {error}")
        self._may_capture = False
        release(self)
        self._device_training = None
        give_back_memory(self.device)

    def _train_encoder(self, batch_size: int) -> None:
        """
        One encoder update on a new batch.

        :param batch_size: number of sub-trajectories
        """
        assert self.replay_buffer is not None
        if self._device_training is not None:
            try:
                return self._device_training.update_encoder()
            except CaptureError as error:
                self._give_up_capturing(error)
        samples = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
        self._encoder_metrics.add(self._update_encoder(samples))

    def _train_value_and_policy(self, batch_size: int) -> None:
        """
        One value and one policy update on a new batch, whose transitions take new priorities.

        :param batch_size: number of transitions
        """
        assert self.replay_buffer is not None
        if self._device_training is not None:
            try:
                return self._device_training.update_value_and_policy()
            except CaptureError as error:
                self._give_up_capturing(error)
        samples = self.replay_buffer.sample_n_step(batch_size, env=self._vec_normalize_env)
        priorities, metrics = self._update_value_and_policy(samples)
        assert isinstance(samples.indices, np.ndarray)
        new_priorities = priorities.cpu().numpy()
        if not np.isfinite(new_priorities).all():
            raise DivergedError("TD errors are not finite")
        self.replay_buffer.update_priorities(samples.indices, new_priorities)
        self._value_policy_metrics.add(metrics)

    def _set_scalars(self) -> None:
        """
        Bring numbers that change during training to where the updates read them.
        """
        assert self.replay_buffer is not None
        self._scalars.set(
            reward_scale=self.reward_scale,
            target_reward_scale=self.target_reward_scale,
            termination_switch=float(self.replay_buffer.has_terminated),
        )

    def _replace_targets(self) -> None:
        """
        Replace all target networks and renew the reward scale; the targets keep the scale they were trained under.
        """
        assert self.replay_buffer is not None
        self.learner.replace_targets()
        self.target_reward_scale = self.reward_scale
        mean = self.replay_buffer.mean_abs_reward(self._vec_normalize_env)
        # Where training goes on with a new buffer, which no reward has come into, the values keep their units
        if mean > 0 or self.replay_buffer.full or self._targets_replaced_at is None:
            self.reward_scale = max(mean, 1e-8)
        self._set_scalars()

    def _update_encoder(self, samples: SubtrajectorySamples) -> EncoderMetrics:
        """
        One encoder update.

        :param samples: a batch from the replay buffer
        :return: the losses before it
        """
        obs = [self._preprocess(step) for step in unbind_time(samples.observations)]
        return self.learner.update_encoder(
            obs[0],
            obs[1:],
            self.policy.actions.encode(samples.actions),
            samples.rewards,
            samples.terminated,
            samples.mask,
            termination_switch=self._scalars["termination_switch"],
        )

    def _update_value_and_policy(self, samples: NStepSamples) -> tuple[th.Tensor, ValuePolicyMetrics]:
        """
        One value and one policy update.

        :param samples: a batch from the replay buffer
        :return: new priorities, (B,), and the losses before it
        """
        return self.learner.update_value_and_policy(
            self._preprocess(samples.observations),
            self.policy.actions.encode(samples.actions),
            samples.rewards,
            samples.terminated,
            samples.mask,
            self._preprocess(samples.next_observations),
            self._scalars["reward_scale"],
            self._scalars["target_reward_scale"],
            self.learner.sample_noise(len(samples.indices)),
        )

    def _record_means(self, metrics: MetricMeans) -> bool:
        """
        :param metrics: means to record
        :return: whether there were any
        """
        means = metrics.take()
        # Seen earlier in TD errors, but for those of captured steps and where all priorities are the same
        if not np.isfinite(list(means.values())).all():
            raise DivergedError(f"means of the last updates are {means}")
        for name, mean in means.items():
            self.logger.record(f"train/{name}", mean)
        return bool(means)

    def _log_encoder(self) -> None:
        """
        Record what there is to know about the encoder updates just done, and about the embedding they led to.
        """
        assert self.replay_buffer is not None
        self._record_means(self._encoder_metrics)
        if self._device_training is not None:
            samples = self._device_training.replay.sample_n_step(self.batch_size)
        else:
            samples = self.replay_buffer.sample_n_step(self.batch_size, env=self._vec_normalize_env)
        self.policy.set_training_mode(False)
        with th.no_grad():
            z_s = self.encoder.state(self.policy.preprocess(samples.observations))
        self.policy.set_training_mode(True)
        if not th.isfinite(z_s).all():
            raise DivergedError("embeddings are not finite")
        # Effective rank (Roy and Vetterli, 2007) around the mean: exponential of the entropy of the normalised singular values
        shares = th.linalg.svdvals(z_s - z_s.mean(dim=0))
        shares = shares / shares.sum().clamp_min(1e-12)
        rank = th.special.entr(shares).sum().exp()
        values = th.stack([grad_norm(self.encoder), z_s.norm(dim=1).mean(), rank]).tolist()
        for name, value in zip(("encoder_grad_norm", "z_s_norm", "z_s_effective_rank"), values, strict=True):
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/reward_scale", self.reward_scale)

    def _log_value_and_policy(self) -> None:
        """Record what there is to know about the last value and policy updates."""
        if self._record_means(self._value_policy_metrics):
            self.logger.record("train/actor_grad_norm", grad_norm(self.actor).item())

    def dump_logs(self) -> None:
        """
        Write log data, that of the last updates included.
        """
        self._log_value_and_policy()
        super().dump_logs()

    def learn(
        self: SelfMRQ,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MRQ",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMRQ:
        self.stop_signals = StopSignals()
        with contextlib.ExitStack() as self.while_learning:
            super().learn(
                total_timesteps=total_timesteps,
                callback=callback,
                log_interval=log_interval,
                tb_log_name=tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
        self._env_steps = self._count_env_steps()
        return self

    @classmethod
    def resume(
        cls: type[SelfMRQ],
        folder: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        name_prefix: str = "mrq",
        **kwargs: Any,
    ) -> SelfMRQ:
        """
        Continue from the newest complete checkpoint that a
        :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback` has written. To finish the run::

            model = MRQ.resume("checkpoints", env)
            model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=...)

        Where environments are deterministic and the checkpoint was made between episodes, this gives the same weights, to the
        last bit, as a run that was never interrupted, on the same machine with the same versions and number of threads. Random
        environments are seeded by the model's seed and the number of steps so far: their episodes are new ones. An episode
        that was running is truncated. The random generators are set where ``resume`` ends, and again where learning starts.

        A damaged checkpoint is passed over, with a warning, for the one before it. Like all models of Stable-Baselines3,
        checkpoints hold pickles: resume from those only that you trust.

        :param folder: folder of checkpoints, or one checkpoint
        :param env: environment like that of the run (if registered in Gym, can be str). Where that was in a ``VecNormalize``
            and this one is not, it is wrapped in one; in any case its statistics and settings are those of the checkpoint.
        :param device: Device on which the code should run.
        :param name_prefix: what the names of the checkpoints begin with
        :param kwargs: extra arguments to change the model when loading
        :return: model that goes on where the run was, with its replay buffer
        :raises FileNotFoundError: if there is no complete checkpoint
        :raises ValueError: if no checkpoint can be used, or for another kind of environment
        """
        return resume(cls, folder, env, device, name_prefix, **kwargs)

    @property
    def remaining_timesteps(self) -> int:
        """Steps from here to the end of the last call of ``learn``, as it was planned."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    @property
    def is_stopping(self) -> bool:
        """Whether a signal is to end training, or has just ended it."""
        return self.stop_signals.received is not None

    def _excluded_save_params(self) -> list[str]:
        networks = ["encoder", "encoder_target", "critic", "critic_target", "actor", "actor_target"]
        on_device = ["_encoder_metrics", "_value_policy_metrics", "_scalars", "_device_training", "_may_capture"]
        of_this_process = [
            "run_id",
            "damaged_checkpoints",
            "resumed_generators",
            "resumed_compiled",
            "stop_signals",
            "in_rollout_callback",
            "automatic_precision",
            "updates_before",
            "while_learning",
            "_env_steps",
        ]
        return [*super()._excluded_save_params(), *networks, "learner", *on_device, *of_this_process]

    def get_parameters(self) -> dict[str, dict]:
        """
        Return the parameters of the agent. This includes parameters from different networks.

        :return: Mapping of from names of the objects to PyTorch state-dicts.
        """
        parameters = super().get_parameters()
        for name in self._get_torch_save_params()[0]:
            if name.endswith("optimizer"):
                # As they would be if training steps were not captured
                restore_groups(parameters[name]["param_groups"], recursive_getattr(self, name))
        # The units of the values
        parameters[REWARD_SCALES] = {name: getattr(self, name) for name in ("reward_scale", "target_reward_scale")}
        return parameters

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules (see
        ``get_parameters``), and the reward scales, in whose units the values are.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception. The reward scales may be missing, as in files of older versions.
        :param device: Device on which the code should run.
        """
        given: Any = load_path_or_dict
        if not isinstance(given, dict):
            given = load_from_zip_file(given, device=device, load_data=False)[1]
        parameters: dict[str, Any] = dict(given)
        scales = parameters.pop(REWARD_SCALES, {})
        super().set_parameters(parameters, exact_match, device)
        for name, value in scales.items():
            setattr(self, name, float(value))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "encoder.optimizer", "critic.optimizer", "actor.optimizer"]
        return state_dicts, []
