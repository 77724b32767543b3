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

from sb3_mrq.off_policy_algorithm import ResumableOffPolicyAlgorithm
from sb3_mrq.persist.checkpoints import write_checkpoint
from sb3_mrq.persist.stopping import StopSignals


class ResumableCheckpointCallback(BaseCallback):
    """
    Every so many steps, and where ``learn`` ends, write model, replay buffer, statistics of ``VecNormalize`` and random
    generators as one unit, from which :meth:`sb3_mrq.mrq.MRQ.resume` continues.

    A checkpoint is a folder ``{name_prefix}_{number}_{num_timesteps}_steps``, which has its name only once it is complete and
    on the disk: whatever happens, the newest complete one is there. Where writing fails, training ends with a
    :class:`~sb3_mrq.persist.checkpoints.CheckpointError`, and the checkpoints before it are left as they are.

    SIGTERM and Ctrl-C end training before the next rollout, with a checkpoint. ``learn`` then returns as if it had finished;
    ``stopped_by`` tells the signal. Callbacks, such as an evaluation, run to their end first. Training steps are put off until
    training goes on.

    :param save_freq: number of steps between checkpoints, counted as ``num_timesteps`` over all environments (not, as in SB3's
        ``CheckpointCallback``, in calls of the callback)
    :param save_path: folder for the checkpoints, of one run at a time, which is made where training starts. With rl-zoo3
        ``checkpoints`` in the folder of the run, where it is None.
    :param name_prefix: what the names of the checkpoints begin with
    :param keep_last: how many checkpoints of a run to keep, None for all. While one is written there is one more.
    :param at_episode_end: whether to put a checkpoint off until all environments are between episodes, so that no episode is
        cut short where training is resumed; not those at the end of ``learn``. If that does not happen until each
        environment has ended ``PATIENCE`` episodes, there is a checkpoint all the same, with a warning.
    :param handle_signals: whether SIGTERM and Ctrl-C end training with a checkpoint
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
        if save_freq < 1 or (keep_last is not None and keep_last < 1):
            raise ValueError(f"save_freq is {save_freq} and keep_last {keep_last}, but both must be at least 1.")
        if not name_prefix or Path(name_prefix).name != name_prefix:
            raise ValueError(f"name_prefix is {name_prefix!r}, but must be the beginning of a name of a file.")
        self.save_freq = save_freq
        self.save_path = save_path
        self.name_prefix = name_prefix
        self.keep_last = keep_last
        self.at_episode_end = at_episode_end
        self.handle_signals = handle_signals
        self.stopped_by: signal.Signals | None = None
        self._signals = StopSignals()
        self._learning = False
        # At the last checkpoint, or where training started, and whether there was a checkpoint since
        self._saved_progress: tuple[int, ...] = (0,)
        self._saved = False
        # Episodes of each environment that have ended since a checkpoint was due
        self._n_ended = np.zeros(1, dtype=np.int64)
        self._warned = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableOffPolicyAlgorithm):
            raise TypeError(f"ResumableCheckpointCallback is for MRQ, not for {type(self.model).__name__}.")
        self._check_parent()
        if self.save_path is None:
            raise ValueError("save_path is missing: the folder for the checkpoints.")
        # Not where a checkpoint is written: if the folder is gone then, something is wrong with the disk
        Path(self.save_path).mkdir(parents=True, exist_ok=True)

    def _check_parent(self) -> None:
        if self.parent is not None:
            raise ValueError(
                "ResumableCheckpointCallback must be given to learn by itself or in a list, not to "
                f"{type(self.parent).__name__}, which does not tell it when rollouts begin and training ends."
            )

    def _on_training_start(self) -> None:
        # In a list it has the list's parent from here on
        self._check_parent()
        self._saved_progress, self._saved = self.model.training_progress, False
        self._n_ended = np.zeros(self.model.n_envs, dtype=np.int64)
        self._learning, self.stopped_by = True, None
        self.model.while_learning.callback(self._on_learn_exit)
        if self.handle_signals:
            if threading.current_thread() is not threading.main_thread():
                warnings.warn("SIGTERM and Ctrl-C can end training with a checkpoint in the main thread only.", stacklevel=2)
            self.model.while_learning.enter_context(self._signals)
            self.model.stop_signals = self._signals

    def _on_learn_exit(self) -> None:
        self._learning = False

    def _on_rollout_start(self) -> None:
        # The only place where everything is stored and trained on, or put off. Training ends here where it is to, and other
        # callbacks may have much to do at its end.
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
                f"The environments were not between episodes at once before a rollout in {self.PATIENCE} episodes, so "
                "checkpoints are made in spite of at_episode_end: episodes are cut short where training is resumed.",
                stacklevel=2,
            )
        self._warned = True

    def _on_step(self) -> bool:
        # The transition of this step is not stored yet
        if self.at_episode_end and self._is_due:
            self._n_ended += self.locals["dones"]
        return True

    def _on_training_end(self) -> None:
        # rl-zoo3 calls this a second time, also where an error or Ctrl-C came in the middle of an update
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
