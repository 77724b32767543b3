"""
Training from the replay buffer alone.
"""

import contextlib
import time
from collections import deque
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_mrq.arguments import Number, check_argument
from sb3_mrq.hyperparameters import check_hyperparameters, check_replay_buffer
from sb3_mrq.persist.stopping import StopSignals

# Training steps between two lines of the log
LOG_INTERVAL = 1_000


class OfflineProgressBar(ProgressBarCallback):
    """Progress bar in training steps."""

    def _on_step(self) -> bool:
        self.pbar.update(1)
        return True


def train_offline(model: Any, n_updates: int, callback: MaybeCallback = None, progress_bar: bool = False) -> None:
    """
    Do training steps from the replay buffer, without environment steps. Each counts as a timestep, as in
    ``learn(n_updates, reset_num_timesteps=False)``: for schedules, the logger, callbacks and checkpoints. After ``resume``,
    ``train_offline(model.remaining_timesteps)`` finishes the run.

    :param model: an ``MRQ``
    :param n_updates: number of training steps
    :param callback: called at every training step, for example to evaluate
    :param progress_bar: whether to display a progress bar
    :raises ValueError: if nothing can be sampled from the replay buffer
    """
    check_argument("n_updates", n_updates, Number(integer=True, least=0))
    check_hyperparameters(model)
    check_replay_buffer(model, model.replay_buffer)
    if model.replay_buffer.n_sampleable == 0:
        raise ValueError(
            "The replay buffer has no transitions to train from: use add_transitions, load_minari or load_replay_buffer first."
        )
    model.start_time = time.time_ns()
    model._num_timesteps_at_start = model.num_timesteps
    model._total_timesteps = model.num_timesteps + n_updates
    model.require_logger()
    if model.ep_info_buffer is None:
        model.ep_info_buffer, model.ep_success_buffer = (deque(maxlen=model._stats_window_size) for _ in range(2))
    if model.compile_updates == "auto" and n_updates >= model.COMPILE_FROM:
        model.updates.compile_on_cpu()
    model.stop_signals = StopSignals()
    model.offline = True
    with contextlib.ExitStack() as model.learn_exit_stack:
        model.learn_exit_stack.callback(setattr, model, "offline", False)
        callbacks = model._init_callback(callback)
        if progress_bar:
            callbacks.callbacks.append(OfflineProgressBar())
            callbacks.init_callback(model)
        # Callbacks may read these, as in a rollout
        steps = {"dones": np.ones(model.n_envs, dtype=bool), "infos": [{} for _ in range(model.n_envs)]}
        callbacks.on_training_start(locals(), globals())
        while True:
            callbacks.on_rollout_start()
            if model.num_timesteps >= model._total_timesteps or model.stop_signals.pending:
                break
            model.num_timesteps += 1
            callbacks.update_locals(steps)
            if not callbacks.on_step():
                break
            model._update_current_progress_remaining(model.num_timesteps, model._total_timesteps)
            model.train(1, model.batch_size)
            if model.num_timesteps % LOG_INTERVAL == 0 or model.progress.log_due:
                model.dump_logs()
        callbacks.on_training_end()
    model.bc_from = model.replay_buffer.n_added


def cloning_scale(model: Any) -> float:
    """
    :param model: an ``MRQ``
    :return: factor of ``bc_weight``: 1 in offline training, falling to 0 over ``bc_steps`` transitions collected after it
    """
    if model.offline:
        return 1.0
    collected = model.replay_buffer.n_added - model.bc_from
    return max(0.0, 1.0 - collected / model.bc_steps) if model.bc_steps > 0 else 0.0
