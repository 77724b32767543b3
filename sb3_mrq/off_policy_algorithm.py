"""
Stable-Baselines3's ``OffPolicyAlgorithm`` with stopping on signals, resuming from checkpoints, and checks of environments.
"""

import contextlib
import io
import os
import pathlib
from copy import deepcopy
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.utils import configure_logger, get_device
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_normalize

from sb3_mrq.action_noise import check_action_noise, sample_noise
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.checks import (
    BadValueError,
    FinalObservationChecks,
    check_vec_normalize,
    copy_first_observation,
    copy_observation,
    count_env_steps,
    explain_dead_worker,
    subspaces_of,
    to_array,
)
from sb3_mrq.datasets import add_transitions
from sb3_mrq.hyperparameters import check_policy
from sb3_mrq.offline import train_offline
from sb3_mrq.persist.checkpoints import resume, set_generators
from sb3_mrq.persist.models import check_saved_model
from sb3_mrq.persist.replay_files import load_replay_buffer, save_replay_buffer
from sb3_mrq.persist.stopping import StopSignals
from sb3_mrq.progress import TrainingCallbacks, TrainingProgress
from sb3_mrq.vec_env import copy_observations_of, from_vector_env, make_env

SelfResumable = TypeVar("SelfResumable", bound="ResumableOffPolicyAlgorithm")


class ResumableOffPolicyAlgorithm(OffPolicyAlgorithm):
    """
    Base class of off-policy algorithms that learn from a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`. A subclass
    implements ``train`` as in Stable-Baselines3, but adds the steps to ``gradient_steps_left``, counts them down, and stops
    early if ``stop_signals.pending``.

    The parameters are the same as in ``OffPolicyAlgorithm``.
    """

    replay_buffer: SubtrajectoryReplayBuffer | None
    # Saved with a model, which other algorithms refuse to load
    algorithm_name: str
    default_replay_buffer_class: type[SubtrajectoryReplayBuffer] = SubtrajectoryReplayBuffer
    # Clean-up registered by callbacks, run when ``learn`` returns or raises
    learn_exit_stack: contextlib.ExitStack

    def __init__(self, policy: Any, env: GymEnv | VectorEnv | str | None, *args: Any, **kwargs: Any):
        check_policy(policy, type(self))
        # A relative ``tensorboard_log`` refers to this folder. Environments may change the working directory. The attribute
        # itself stays relative, as it is saved with the model, which may be loaded on another machine.
        self.start_folder = os.getcwd()
        super().__init__(policy, make_env(env, kwargs.get("verbose", 0)), *args, **kwargs)
        self.algorithm = self.algorithm_name
        if self.env is not None:
            check_action_noise(self.action_noise, self.action_space, self.n_envs)
        # Outstanding training steps, which a signal, Ctrl-C or an error has interrupted. The next call of ``train`` does them.
        self.gradient_steps_left = 0
        # Whether there was a warning that nothing will be learned
        self.warm_up_warned = False
        # Id of the run in its checkpoints, and names of damaged checkpoints that ``resume`` skipped
        self.run_id: str | None = None
        self.damaged_checkpoints: list[str] = []
        # States of the random generators in the checkpoint, set again at the first call of ``learn``
        self.resumed_generators: dict[str, Any] | None = None
        # Replaced by a callback that handles signals
        self.stop_signals = StopSignals()
        # Replaced when training starts
        self.progress = TrainingProgress()
        # Number of steps of each environment at the end of ``learn``, None if unknown
        self._env_steps: list[int] | None = None
        self.final_checks = FinalObservationChecks()
        # Whether training is offline, and number of transitions stored when it last was
        self.offline = False
        self.bc_from = 0

    @staticmethod
    def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """
        Called before environments are wrapped; a subclass raises its errors here.

        :param observation_space: Observation space
        :param action_space: Action space
        :raises ValueError: if a space is not supported
        """

    @classmethod
    def _wrap_env(cls, env: GymEnv | VectorEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            env = from_vector_env(env, verbose, monitor_wrapper)
        if isinstance(env, (gym.Env, VecEnv)):
            # Other kinds of environments are converted or rejected by SB3
            cls.check_spaces(env.observation_space, env.action_space)
        wrapped = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        if not isinstance(env, VecEnv):
            wrapped = OffPolicyAlgorithm._wrap_env(copy_observations_of(wrapped))
        vec_normalize = unwrap_vec_normalize(wrapped)
        if isinstance(wrapped, VecTransposeImage) and vec_normalize is not None:
            # Its original and final observations would not be channel-first
            raise ValueError(
                "VecNormalize wraps channel-last images: put a VecTransposeImage inside it, as in "
                "VecNormalize(VecTransposeImage(env))."
            )
        if vec_normalize is not None and vec_normalize.observation_space.shape != wrapped.observation_space.shape:
            raise ValueError(
                "A wrapper around VecNormalize changes the shape of the observations from "
                f"{vec_normalize.observation_space.shape} to {wrapped.observation_space.shape}: put VecNormalize around the "
                "other wrappers, such as VecFrameStack."
            )
        return wrapped

    def _create_replay_buffer(self, **kwargs: Any) -> None:
        """
        Create the replay buffer, unless there is one.

        :param kwargs: arguments of the replay buffer that are hyperparameters of the model
        """
        if self.replay_buffer_class is None:
            self.replay_buffer_class = self.default_replay_buffer_class
        self._buffer_hyperparameters = kwargs
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer()
        self.replay_buffer.set_env(self.env)

    def _make_replay_buffer(self) -> SubtrajectoryReplayBuffer:
        """
        :return: an empty replay buffer
        """
        assert self.replay_buffer_class is not None
        return self.replay_buffer_class(  # type: ignore[return-value]
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            **self._buffer_hyperparameters,
            **self.replay_buffer_kwargs,
        )

    # Learning

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
        # Named after the algorithm by default
        self.stop_signals = StopSignals()
        with contextlib.ExitStack() as self.learn_exit_stack:
            super().learn(
                total_timesteps=total_timesteps,
                callback=callback,
                log_interval=log_interval,
                tb_log_name=tb_log_name or self.algorithm_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
        self._env_steps = self._count_env_steps()
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        check_action_noise(self.action_noise, self.action_space, self.n_envs)
        if reset_num_timesteps:
            # A new run, whose checkpoints do not replace checkpoints of the previous one
            self.run_id, self.damaged_checkpoints = None, []
        # OffPolicyAlgorithm would mark the last transition in the buffer as a termination here. The buffer itself detects that
        # the environment was reset.
        self.optimize_memory_usage = False
        env_steps = self._count_env_steps()
        if self._env_steps is not None and env_steps is not None and env_steps != self._env_steps:
            # The environment was replaced, or stepped by others, so the last observation is outdated
            self._last_obs = None
        tensorboard_log, self.tensorboard_log = self.tensorboard_log, self._absolute_tensorboard_log
        try:
            total_timesteps, callback = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            check_vec_normalize(self._vec_normalize_env)
        except BaseException as error:
            # It is unknown whether the environment was reset
            self._last_obs = None
            explain_dead_worker(self.env, error, self.num_timesteps)
            raise
        finally:
            self.tensorboard_log = tensorboard_log
        try:
            self._last_obs = copy_first_observation(self._last_obs, self.observation_space, self.num_timesteps)
            obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
            assert obs is not None
            self._check_observations(obs)
        except (BadValueError, TypeError):
            self._last_obs = None
            raise
        if self.resumed_generators is not None:
            # Creating an evaluation environment, for example, may have used the generators since ``resume``
            set_generators(self, self.resumed_generators)
        self.resumed_generators = None
        return total_timesteps, callback

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callbacks = TrainingCallbacks([super()._init_callback(callback, progress_bar)])
        callbacks.model = self
        return callbacks

    @property
    def _absolute_tensorboard_log(self) -> str | None:
        return None if self.tensorboard_log is None else os.path.join(self.start_folder, self.tensorboard_log)

    def require_logger(self) -> None:
        """Create a logger if ``train`` is called before ``learn``."""
        if not hasattr(self, "_logger"):
            self.set_logger(configure_logger(self.verbose, self._absolute_tensorboard_log))

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect experiences and store them into the replay buffer, see ``OffPolicyAlgorithm.collect_rollouts``.
        """
        if self.stop_signals.pending:
            # ResumableCheckpointCallback saves a checkpoint here
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
            # Ctrl-C has also ended the processes of the environments
            rollout = RolloutReturn(0, 0, continue_training=False)
        finally:
            if not complete:
                # A callback, an error or Ctrl-C may have interrupted the loop before the last transition was stored. The next
                # call starts with a reset, as the last observation is outdated.
                self._last_obs = None
        return rollout

    def _explore(self, obs: np.ndarray | dict[str, np.ndarray], with_noise: bool) -> np.ndarray:
        """
        Compute the action of the policy in a rollout.

        :param obs: observations of all environments, (n_envs, ...) or a dict of these
        :param with_noise: whether to add the algorithm's own exploration noise
        :return: Box actions scaled to [-1, 1], discrete actions as integers of the space, (n_envs, action_dim)
        """
        raise NotImplementedError

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            # Warmup phase
            action = np.array([self.action_space.sample() for _ in range(n_envs)])
            # Environments may write to the action that they are given
            return action, self.policy.scale_action(action) if isinstance(self.action_space, spaces.Box) else action.copy()

        assert self._last_obs is not None, "self._last_obs was not set"
        buffer_action = self._explore(self._last_obs, with_noise=action_noise is None)
        buffer_action = buffer_action.reshape(n_envs, *self.action_space.shape)  # type: ignore[misc]
        if not isinstance(self.action_space, spaces.Box):
            buffer_action = buffer_action.astype(self.action_space.dtype)
            return buffer_action, buffer_action.copy()
        if action_noise is not None:
            noise = sample_noise(action_noise, n_envs, self.action_space.shape)
            buffer_action = np.clip(buffer_action + noise, -1, 1).astype(np.float32)
        return self.policy.unscale_action(buffer_action), buffer_action

    # Observations of environments

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        # As in OffPolicyAlgorithm, except for final observations
        try:
            # Copies, as environments may write to their arrays in the next step
            new_obs = copy_observation(new_obs, self.observation_space)
            dones = to_array(dones, "done").astype(bool)
            if self._vec_normalize_env is None:
                self._last_original_obs, original_obs, original_reward = self._last_obs, new_obs, reward
            else:
                original_obs = self._vec_normalize_env.get_original_obs()
                original_reward = self._vec_normalize_env.get_original_reward()
            next_obs = original_obs
            # The buffer rejects other shapes
            if dones.shape == (self.n_envs,) and dones.any():
                # The first observation of the next episode is used for acting before the buffer checks it
                self._check_observations(original_obs)
                next_obs = deepcopy(original_obs)
                for i in np.flatnonzero(dones).tolist():
                    self._set_final_observation(next_obs, i, infos[i])
                    self.final_checks.compare(infos[i]["terminal_observation"], new_obs, i)
            last_obs: Any = self._last_original_obs
            replay_buffer.add(
                last_obs,
                next_obs,  # type: ignore[arg-type]
                buffer_action,
                to_array(original_reward, "reward"),
                dones,
                infos,
            )
        except BadValueError as error:
            raise type(error)(error.fault, self.num_timesteps) from None
        self._last_obs = new_obs
        self._last_original_obs = original_obs

    def _set_final_observation(self, next_obs: np.ndarray | dict[str, np.ndarray], i: int, info: dict[str, Any]) -> None:
        """
        Replace the first observation of the next episode by the final observation of the episode that has ended.

        :param next_obs: observations of all environments, (n_envs, ...) or a dict of these, changed in place
        :param i: index of an environment whose episode has ended
        :param info: info of this environment with the final observation, normalised if there is a ``VecNormalize``
        :raises BadValueError: if the final observation is missing or does not fit the space
        """
        final_obs = info.get("terminal_observation")
        if final_obs is None:
            raise BadValueError(f"Environment {i} gave no final observation")
        if self._vec_normalize_env is not None:
            final_obs = self._vec_normalize_env.unnormalize_obs(final_obs)
        for key, space in subspaces_of(self.observation_space).items():
            rows: Any = next_obs if key is None else next_obs[key]
            given = final_obs if key is None else final_obs[key]
            value = np.asarray(given.detach().cpu() if isinstance(given, th.Tensor) else given)
            if value.size != rows[i].size or value.dtype.kind not in "biuf":
                form = f"of the type {value.dtype} and the shape {value.shape}"
                raise BadValueError(f"Environment {i} gave a final observation {form}, which is not in {space}")
            if rows.dtype.kind in "iu" and value.dtype.kind == "f":
                # Normalisation and its inverse leave rounding errors, and the cast to integers would truncate
                value = np.rint(value)
                bounds = np.iinfo(rows.dtype)
                if not ((value >= bounds.min) & (value <= bounds.max)).all():
                    raise BadValueError(f"Environment {i} gave a final observation {value}, which is not in {space}")
            rows[i] = value.reshape(rows[i].shape)

    def _check_observations(self, obs: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        :param obs: observations of all environments, before normalisation
        :raises BadValueError: if an observation is invalid, see :class:`~sb3_mrq.checks.ObservationChecks`
        """
        assert self.replay_buffer is not None
        try:
            self.replay_buffer.checks.check(obs)
        except BadValueError as error:
            raise type(error)(error.fault, self.num_timesteps) from None

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """
        Checks the validity of the environment, and if it is coherent, set it as the current environment, see
        ``BaseAlgorithm.set_env``.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training
        """
        self.final_checks = FinalObservationChecks()
        super().set_env(env, force_reset)  # type: ignore[arg-type]
        if self.replay_buffer is not None:
            self.replay_buffer.set_env(self.env)

    def _count_env_steps(self) -> list[int] | None:
        return None if self.env is None or self._last_obs is None else count_env_steps(self.env)

    # Stopping and resuming

    @property
    def is_stopping(self) -> bool:
        """Whether a signal is ending training, or has ended it."""
        return self.stop_signals.received is not None

    @property
    def remaining_timesteps(self) -> int:
        """Timesteps that remain to ``total_timesteps`` of the last call of ``learn``."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    @property
    def training_progress(self) -> tuple[int, ...]:
        """Counters of which at least one increases with any progress: timesteps and training steps."""
        return self.num_timesteps, self._n_updates

    def get_checkpoint_info(self) -> dict[str, Any]:
        """
        :return: additional information for a checkpoint, in JSON types
        """
        return {}

    def on_resume(self, info: dict[str, Any]) -> None:
        """
        Called at the end of ``resume``.

        :param info: result of ``get_checkpoint_info``; entries may be missing in checkpoints of earlier versions
        """

    @classmethod
    def resume(
        cls: type[SelfResumable],
        folder: str | pathlib.Path,
        env: GymEnv | VectorEnv | str,
        device: th.device | str = "auto",
        name_prefix: str = "mrq",
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Continue from the newest complete checkpoint of a :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback`. To finish
        the run::

            model = MRQ.resume("checkpoints", env)
            model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=...)

        With deterministic environments and a checkpoint between episodes, the weights are bit-identical to an uninterrupted
        run on the same machine, with the same versions and number of threads. Random environments are seeded with the seed of
        the model and the number of timesteps, and continue with new episodes. An episode that was running is truncated. The
        random generators are restored at the end of ``resume``, and again when ``learn`` starts.

        If a checkpoint is damaged, the one before it is used, with a warning. Like all models of Stable-Baselines3,
        checkpoints contain pickles: only resume from checkpoints that you trust.

        :param folder: folder of checkpoints, one checkpoint, or its ``model.zip``
        :param env: environment of the same kind as in the run (if registered in Gym, can be str). If the run used
            ``VecNormalize``, the environment is wrapped in one if necessary, and statistics and settings are restored.
        :param device: Device on which the code should run.
        :param name_prefix: common prefix of the names of the checkpoints
        :param kwargs: extra arguments to change the model when loading
        :return: model that continues the run, with its replay buffer
        :raises FileNotFoundError: if there is no complete checkpoint
        :raises ValueError: if no checkpoint can be used, or if the environment does not match
        """
        # The folder first: making an environment may change the working directory
        folder = pathlib.Path(folder).absolute()
        return resume(cls, folder, make_env(env), device, name_prefix, **kwargs)

    # Files

    @classmethod
    def load(
        cls: type[SelfResumable], path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any
    ) -> SelfResumable:
        """
        Load a model from a zip-file, see ``BaseAlgorithm.load``.

        :param path: path to the file (or a file-like)
        :param args: further arguments of ``BaseAlgorithm.load``
        :param kwargs: further arguments of ``BaseAlgorithm.load``, and arguments to change the model when loading
        :return: new model with the loaded parameters
        :raises ValueError: if it is a model of another algorithm
        """
        check_saved_model(path, cls.algorithm_name)
        return super().load(path, *args, **kwargs)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as plain arrays, see :mod:`sb3_mrq.persist.replay_files`. A file at this path is replaced only
        when the new one is complete.

        :param path: Path to the file where the replay buffer should be saved, or a file object. ``.pkl`` is added to a path
            without a suffix, as in SB3.
        """
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        save_replay_buffer(path, self.replay_buffer)

    def load_replay_buffer(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        truncate_last_traj: bool = True,
    ) -> None:
        """
        Load a replay buffer saved by ``save_replay_buffer``. No code from the file is run. The current buffer stays in memory
        until the new one is loaded, unless ``replay_buffer`` is set to None first.

        :param path: Path to the file, or a file object.
        :param truncate_last_traj: No effect: the buffer itself detects whether the environment continues the last episode
        :raises ReplayFileError: if the file is damaged or not a replay buffer; the current buffer is kept
        :raises ValueError: if the buffer is for other environments; the current buffer is kept
        """
        like = self._make_replay_buffer() if self.replay_buffer is None else self.replay_buffer
        replay_buffer = load_replay_buffer(path, like, self.verbose)
        # The device of the model may have changed
        replay_buffer.device = get_device(self.device)
        # The device may not have enough memory for two copies
        like.detach_copy()
        replay_buffer.set_env(self.env)
        self.replay_buffer = replay_buffer

    def add_transitions(
        self,
        observations: Any,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: Any,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """
        Store whole episodes in the replay buffer, see :func:`sb3_mrq.datasets.add_transitions`.

        :param observations: of all episodes, one after the other, (N, ...) or a dict of these
        :param actions: as the environment takes them, (N, ...)
        :param rewards: (N,)
        :param next_observations: (N, ...) or a dict of these
        :param terminated: (N,)
        :param truncated: (N,); each episode must be terminated or truncated
        :raises ValueError: if the data do not fit; nothing is stored then
        """
        add_transitions(self, observations, actions, rewards, next_observations, terminated, truncated)

    def train_offline(self, n_updates: int, callback: MaybeCallback = None, progress_bar: bool = False) -> None:
        """
        Train from the replay buffer alone, see :func:`sb3_mrq.offline.train_offline`.

        :param n_updates: number of training steps, which count as timesteps
        :param callback: called at every training step
        :param progress_bar: whether to display a progress bar
        :raises ValueError: if nothing can be sampled from the replay buffer
        """
        train_offline(self, n_updates, callback, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        process_state = [
            "start_folder",
            "_buffer_hyperparameters",
            "warm_up_warned",
            "run_id",
            "damaged_checkpoints",
            "resumed_generators",
            "stop_signals",
            "progress",
            "learn_exit_stack",
            "_env_steps",
            "final_checks",
            "offline",
        ]
        return [*super()._excluded_save_params(), *process_state]
