"""
Callbacks for :class:`~sb3_mrq.MRQ`.
"""

import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mrq.arguments import Number, check_argument
from sb3_mrq.hyperparameters import STEPS
from sb3_mrq.off_policy_algorithm import ResumableOffPolicyAlgorithm
from sb3_mrq.persist.checkpoints import write_checkpoint
from sb3_mrq.persist.stopping import StopSignals


class ResumableCheckpointCallback(BaseCallback):
    """
    Callback for saving checkpoints from which :meth:`sb3_mrq.mrq.MRQ.resume` continues training. A checkpoint holds the model,
    the replay buffer, the statistics of ``VecNormalize`` and the random generators. One is saved every ``save_freq`` steps and
    at the end of ``learn``.

    A checkpoint is a folder ``{name_prefix}_{number}_{num_timesteps}_steps``. It gets this name only when it is complete and
    on the disk. If saving fails, training ends with a :class:`~sb3_mrq.persist.checkpoints.CheckpointError`, and earlier
    checkpoints do not change.

    SIGTERM and Ctrl-C end training before the next rollout, with a checkpoint. ``learn`` then returns normally, and
    ``stopped_by`` is the signal. Running callbacks, such as an evaluation, finish first. Outstanding training steps are done
    when training is resumed.

    :param save_freq: Number of timesteps between checkpoints, counted as ``num_timesteps`` over all environments (SB3's
        ``CheckpointCallback`` counts calls of the callback)
    :param save_path: Folder for the checkpoints of one run at a time, created at the start of training. A relative path refers
        to the working directory at construction. In a configuration of rl-zoo3, None stands for the folder ``checkpoints`` in
        the folder of the run.
    :param name_prefix: Common prefix of the names of the checkpoints
    :param keep_last: How many checkpoints of a run to keep, None for all. The oldest is deleted after a new one is complete.
    :param at_episode_end: Whether to delay a checkpoint until all environments are between episodes, so that resuming cuts no
        episode short. The checkpoint at the end of ``learn`` is not delayed. Once each environment has ended ``PATIENCE``
        episodes, the checkpoint is saved in any case, with a warning.
    :param handle_signals: Whether SIGTERM and Ctrl-C end training with a checkpoint
    :param verbose: Verbosity level: 0 for no output, 1 for a line for each checkpoint
    """

    model: ResumableOffPolicyAlgorithm

    PATIENCE = 10

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path | None = None,
        name_prefix: str = "mrq",
        keep_last: int | None = 2,
        at_episode_end: bool = False,
        handle_signals: bool = True,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        save_freq = check_argument("save_freq", save_freq, STEPS)
        keep_last = check_argument("keep_last", keep_last, Number(integer=True, least=1, optional=True))
        if not name_prefix or Path(name_prefix).name != name_prefix:
            raise ValueError(f"name_prefix is {name_prefix!r}, but must be a valid beginning of a file name.")
        self.save_freq = save_freq
        # Before an environment or another callback changes the working directory
        self.save_path = None if save_path is None else Path(save_path).absolute()
        self.name_prefix = name_prefix
        self.keep_last = keep_last
        self.at_episode_end = at_episode_end
        self.handle_signals = handle_signals
        self.stopped_by: signal.Signals | None = None
        self._signals = StopSignals()
        self._learning = False
        # Training progress at the last checkpoint or the start of training, and whether a checkpoint was saved since the start
        self._saved_progress: tuple[int, ...] = (0,)
        self._saved = False
        # Number of episodes of each environment that have ended since a checkpoint became due
        self._n_ended = np.zeros(1, dtype=np.int64)
        self._warned = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableOffPolicyAlgorithm):
            raise TypeError(f"ResumableCheckpointCallback supports the algorithm MRQ, not {type(self.model).__name__}.")
        self._check_parent()
        if self.save_path is None:
            raise ValueError("save_path is None, but must be a folder for the checkpoints.")
        # Created here only: if the folder is missing when a checkpoint is saved, something is wrong with the disk
        self.save_path.resolve().mkdir(parents=True, exist_ok=True)

    def _check_parent(self) -> None:
        if self.parent is not None:
            raise ValueError(
                "Pass ResumableCheckpointCallback to learn, alone or in a list, not to "
                f"{type(self.parent).__name__}, which does not forward the start of rollouts and the end of training."
            )

    def _on_training_start(self) -> None:
        # Only now does a callback in a list have the parent of the list
        self._check_parent()
        self._saved_progress, self._saved = self.model.training_progress, False
        self._n_ended = np.zeros(self.model.n_envs, dtype=np.int64)
        self._learning, self.stopped_by = True, None
        self.model.learn_exit_stack.callback(self._on_learn_exit)
        if self.handle_signals:
            if threading.current_thread() is not threading.main_thread():
                warnings.warn(
                    "SIGTERM and Ctrl-C end training with a checkpoint only if learn runs in the main thread.", stacklevel=2
                )
            self.model.learn_exit_stack.enter_context(self._signals)
            self.model.stop_signals = self._signals

    def _on_learn_exit(self) -> None:
        self._learning = False

    def _on_rollout_start(self) -> None:
        # Only here are all transitions stored, and all training steps done or recorded as outstanding. A checkpoint after a
        # signal is not left to the end of training, at which other callbacks may take long.
        if self._signals.received is not None:
            self._save()
        elif self._is_due:
            assert self.model.replay_buffer is not None
            if self.model.replay_buffer.between_episodes or not self.at_episode_end:
                self._save()
            elif self._n_ended.min() >= self.PATIENCE:
                self._warn_of_cut_episodes()
                self._save()

    @property
    def _is_due(self) -> bool:
        return self.model.num_timesteps // self.save_freq > self._saved_progress[0] // self.save_freq

    def _warn_of_cut_episodes(self) -> None:
        if not self._warned:
            warnings.warn(
                f"In {self.PATIENCE} episodes, the environments were never all between episodes before a rollout, so "
                "checkpoints are saved in spite of at_episode_end: resuming cuts episodes short.",
                stacklevel=2,
            )
        self._warned = True

    def _on_step(self) -> bool:
        # Only counts: the transition of this step is not stored yet
        if self.at_episode_end and self._is_due:
            self._n_ended += self.locals["dones"]
        return True

    def _on_training_end(self) -> None:
        # rl-zoo3 calls this a second time, also after an error or Ctrl-C in the middle of an update
        if not self._learning:
            return
        if self._saved_progress != self.model.training_progress or (self._signals.received is not None and not self._saved):
            self._save()
        self.stopped_by = self._signals.received
        if self.stopped_by is not None:
            print(f"Training was stopped by {self.stopped_by.name}, after a checkpoint in {self.save_path}.", file=sys.stderr)

    def _save(self) -> None:
        assert self.save_path is not None
        path = write_checkpoint(self.model, self.save_path, self.name_prefix, self.keep_last)
        self._saved_progress, self._saved = self.model.training_progress, True
        self._n_ended[:] = 0
        if self.verbose >= 1:
            print(f"Saved the checkpoint {path}")
