"""
Stable-Baselines3's ``OffPolicyAlgorithm``, stoppable by signals, resumable from checkpoints, strict about environments.
"""

import contextlib
import io
import pathlib
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_normalize

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.checks import BadValueError, check_vec_normalize, count_env_steps, explain_dead_worker, subspaces_of
from sb3_mrq.persist.checkpoints import resume, set_generators
from sb3_mrq.persist.replay_files import load_replay_buffer, save_replay_buffer
from sb3_mrq.persist.stopping import StopSignals

SelfResumable = TypeVar("SelfResumable", bound="ResumableOffPolicyAlgorithm")


class TrainingCallbacks(CallbackList):
    """The callbacks of ``learn``. Once all of them are ready, training steps that were put off are done."""

    model: "ResumableOffPolicyAlgorithm"

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.model.gradient_steps_left > 0:
            self.model.train(0, self.model.batch_size)


class ResumableOffPolicyAlgorithm(OffPolicyAlgorithm):
    """
    An off-policy algorithm that learns from a :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`. A subclass implements
    ``train`` as those of Stable-Baselines3 do, but does ``gradient_steps_left`` steps, and stops early if ``is_stopping``.

    The parameters are those of ``OffPolicyAlgorithm``.
    """

    replay_buffer: SubtrajectoryReplayBuffer | None
    default_replay_buffer_class: type[SubtrajectoryReplayBuffer] = SubtrajectoryReplayBuffer
    # Clean-up registered by callbacks, run when ``learn`` returns or raises
    while_learning: contextlib.ExitStack

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Training steps that a signal, Ctrl-C or an error has interrupted, which the next call of ``train`` does first
        self.gradient_steps_left = 0
        # The run that checkpoints belong to, and the names of those that resuming passed over
        self.run_id: str | None = None
        self.damaged_checkpoints: list[str] = []
        # Random generators of the checkpoint that this model was resumed from, until it learns
        self.resumed_generators: dict[str, Any] | None = None
        # Watched by a callback, if at all
        self.stop_signals = StopSignals()
        # Steps that the environments had made when learning ended, None if that is not known
        self._env_steps: list[int] | None = None

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
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

    def _create_replay_buffer(self, **kwargs: Any) -> None:
        """
        :param kwargs: arguments of the replay buffer that are hyperparameters of the model
        """
        if self.replay_buffer_class is None:
            self.replay_buffer_class = self.default_replay_buffer_class
        if self.replay_buffer is None:
            self.replay_buffer = self.replay_buffer_class(  # type: ignore[assignment]
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                **kwargs,
                **self.replay_buffer_kwargs,
            )

    # Learning

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
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

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps:
            # Another run, whose checkpoints do not replace those of the one before
            self.run_id, self.damaged_checkpoints = None, []
        # OffPolicyAlgorithm would mark the last transition in the buffer as a termination here. The buffer itself notices
        # that the environment was reset.
        self.optimize_memory_usage = False
        env_steps = self._count_env_steps()
        if self._env_steps is not None and env_steps is not None and env_steps != self._env_steps:
            # Evaluated in since then, or another one: the next observation does not follow from the last one
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
        obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        assert obs is not None
        try:
            self._check_observations(obs)
        except BadValueError:
            self._last_obs = None
            raise
        if self.resumed_generators is not None:
            # Something that was done since then, such as making an environment for evaluations, may have drawn from them
            set_generators(self, self.resumed_generators)
        self.resumed_generators = None
        return total_timesteps, callback

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callbacks = TrainingCallbacks([super()._init_callback(callback, progress_bar)])
        callbacks.model = self
        return callbacks

    def _require_logger(self) -> None:
        """Without ``learn`` there is none yet."""
        if not hasattr(self, "_logger"):
            self.set_logger(configure_logger(self.verbose, self.tensorboard_log))

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

    def _explore(self, obs: np.ndarray | dict[str, np.ndarray], with_noise: bool) -> np.ndarray:
        """
        The action of the policy in a rollout.

        :param obs: of all environments, (n_envs, ...) or a dict of these
        :param with_noise: whether to add the algorithm's own exploration noise
        :return: Box actions scaled to [-1, 1], others as integers of the space, (n_envs, action_dim)
        """
        raise NotImplementedError

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            # Warmup phase
            action = np.array([self.action_space.sample() for _ in range(n_envs)])
            return action, self.policy.scale_action(action) if isinstance(self.action_space, spaces.Box) else action

        assert self._last_obs is not None, "self._last_obs was not set"
        buffer_action = self._explore(self._last_obs, with_noise=action_noise is None)
        buffer_action = buffer_action.reshape(n_envs, *self.action_space.shape)  # type: ignore[misc]
        if not isinstance(self.action_space, spaces.Box):
            buffer_action = buffer_action.astype(self.action_space.dtype)
            return buffer_action, buffer_action
        if action_noise is not None:
            noise = np.reshape(action_noise(), buffer_action.shape)
            buffer_action = np.clip(buffer_action + noise, -1, 1).astype(np.float32)
        return self.policy.unscale_action(buffer_action), buffer_action

    # What environments give

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
            raise type(error)(error.fault, self.num_timesteps) from None
        self._last_obs = new_obs
        self._last_original_obs = original_obs

    def _set_final_observation(self, next_obs: np.ndarray | dict[str, np.ndarray], i: int, info: dict[str, Any]) -> None:
        """
        :param next_obs: of all environments, (n_envs, ...) or a dict of these, in which to put the final observation
        :param i: index of an environment whose episode has ended
        :param info: of that environment, with the final observation, as normalised by ``VecNormalize`` if there is one
        :raises BadValueError: if there is none, or one that does not fit the space. OffPolicyAlgorithm would take the first
            observation of the next episode instead.
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
                raise BadValueError(f"Environment {i} gave a final observation {form}, which is not in {space}")
            if rows.dtype.kind in "iu" and value.dtype.kind == "f":
                # Normalisation and its inverse leave rounding errors of an integer, which would be truncated
                value = np.rint(value)
                bounds = np.iinfo(rows.dtype)
                if not ((value >= bounds.min) & (value <= bounds.max)).all():
                    raise BadValueError(f"Environment {i} gave a final observation {value}, which is not in {space}")
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
            raise type(error)(error.fault, self.num_timesteps) from None

    def _count_env_steps(self) -> list[int] | None:
        return None if self.env is None or self._last_obs is None else count_env_steps(self.env)

    # Stopping and resuming

    @property
    def is_stopping(self) -> bool:
        """Whether a signal is to end training, or has just ended it."""
        return self.stop_signals.received is not None

    @property
    def remaining_timesteps(self) -> int:
        """Steps from here to the end of the last call of ``learn``, as it was planned."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    @property
    def training_progress(self) -> tuple[int, ...]:
        """Numbers of which at least one has grown if anything was learned: steps and training steps."""
        return self.num_timesteps, self._n_updates

    def get_checkpoint_info(self) -> dict[str, Any]:
        """
        :return: what a checkpoint says of the run besides model, replay buffer and generators, for a JSON file
        """
        return {}

    def on_resume(self, info: dict[str, Any]) -> None:
        """
        Called at the end of ``resume``.

        :param info: from ``get_checkpoint_info``; entries may be missing in checkpoints of earlier versions
        """

    @classmethod
    def resume(
        cls: type[SelfResumable],
        folder: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        name_prefix: str = "mrq",
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Continue from the newest complete checkpoint that a
        :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback` has written. To finish the run::

            model = MRQ.resume("checkpoints", env)
            model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=...)

        If environments are deterministic and the checkpoint was made between episodes, this gives the same weights, to the
        last bit, as a run that was never interrupted, on the same machine with the same versions and number of threads. Random
        environments are seeded by the model's seed and the number of steps so far: their episodes are new ones. An episode
        that was running is truncated. The random generators are set when ``resume`` ends, and again when learning starts.

        A damaged checkpoint is passed over, with a warning, for the one before it. Like all models of Stable-Baselines3,
        checkpoints hold pickles: resume only from those that you trust.

        :param folder: folder of checkpoints, or one checkpoint
        :param env: environment like that of the run (if registered in Gym, can be str). If that was in a ``VecNormalize`` and
            this one is not, it is wrapped in one; in any case its statistics and settings are those of the checkpoint.
        :param device: Device on which the code should run.
        :param name_prefix: what the names of the checkpoints begin with
        :param kwargs: extra arguments to change the model when loading
        :return: model that continues the run, with its replay buffer
        :raises FileNotFoundError: if there is no complete checkpoint
        :raises ValueError: if no checkpoint can be used, or for another kind of environment
        """
        return resume(cls, folder, env, device, name_prefix, **kwargs)

    # Files

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as plain arrays, see :mod:`sb3_mrq.persist.replay_files`.

        :param path: Path to the file where the replay buffer should be saved, to which ``.pkl`` is added if it has no suffix,
            as in SB3, or a file. At any moment a path holds what was there before, or all of the buffer.
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
        self.replay_buffer.detach_copy()
        self.replay_buffer = replay_buffer

    def _excluded_save_params(self) -> list[str]:
        of_this_process = [
            "run_id",
            "damaged_checkpoints",
            "resumed_generators",
            "stop_signals",
            "while_learning",
            "_env_steps",
        ]
        return [*super()._excluded_save_params(), *of_this_process]
