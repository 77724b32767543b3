"""
One run of a comparison in its own process: rl-zoo3's training script, with this package's evaluations instead of its own.

    python -m sb3_mrq.compare.train <run in JSON>
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings

import rl_zoo3.train
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecMonitor

from sb3_mrq import MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.compare.algorithms import resolve, zoo_section
from sb3_mrq.compare.evaluation import EvaluationCallback
from sb3_mrq.compare.runs import FINISHED, Run
from sb3_mrq.persist.checkpoints import newest_with_model
from sb3_mrq.persist.files import atomic_file
from sb3_mrq.zoo.configuration import ALGORITHMS
from sb3_mrq.zoo.exp_manager import CHECKPOINTS, MRQExperimentManager
from sb3_mrq.zoo.scripts import run as run_script

# Steps between two checkpoints of MR.Q: a tenth of the run, within these bounds. Each contains the replay buffer.
CHECKPOINT_FREQ = (5_000, 50_000)
# Probability of a random action in evaluations on Atari, section 5 of the paper's appendix
RANDOM_ACTIONS = 0.001


class CompareManager(MRQExperimentManager):
    """
    Experiment manager with the evaluations of a comparison, which marks the run as finished after training.
    """

    run: Run

    def create_callbacks(self) -> None:
        super().create_callbacks()
        run = self.run
        env = self.create_envs(1, eval_env=True)
        if self._is_atari:
            with warnings.catch_warnings():
                # The Monitor inside counts raw frames
                warnings.filterwarnings("ignore", "The environment is already wrapped with a `Monitor`", UserWarning)
                env = VecMonitor(env)
        if self.algo in ALGORITHMS:
            low, high = CHECKPOINT_FREQ
            freq = min(max(low, run.steps // 10), high)
            self.callbacks.append(ResumableCheckpointCallback(freq, run.folder / CHECKPOINTS, keep_last=2))
        self.callbacks.append(EvaluationCallback(env, run, RANDOM_ACTIONS if self._is_atari else 0.0))

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        # A signal in the last step puts its training steps off
        if model.num_timesteps < self.run.steps or (isinstance(model, MRQ) and model.is_stopping):
            sys.exit("The run was stopped by a signal before its end, after a checkpoint. Repeat the command to resume it.")
        super().save_trained_model(model)
        (self.run.folder / FINISHED).touch()
        shutil.rmtree(self.run.folder / CHECKPOINTS, ignore_errors=True)


def prepare(run: Run) -> list[str]:
    """
    Write settings and hyperparameters to the folder of a run.

    :param run: the run
    :return: arguments of ``sb3-mrq train``, without its own evaluations
    """
    algo, hyperparams = resolve(run.algorithm)
    arguments = ["--algo", algo, "--env", run.task, "--seed", str(run.seed), "--n-timesteps", str(run.steps)]
    arguments += ["--num-threads", str(run.threads), "--device", run.device, "--log-folder", str(run.folder / "zoo")]
    arguments += ["--eval-freq", "-1", "--verbose", "0"]
    checkpoints, section = run.folder / CHECKPOINTS, zoo_section(algo, run.task)
    if checkpoints.is_dir() and newest_with_model(checkpoints) is not None:
        arguments += ["--trained-agent", str(checkpoints)]
    if section is not None:
        (run.folder / "hyperparams.yml").write_text(yaml.safe_dump({run.task: section}))
        arguments += ["--conf-file", str(run.folder / "hyperparams.yml")]
    for option, values in (("--gym-packages", run.gym_packages.split()), ("--hyperparams", hyperparams)):
        arguments += [option, *values] if values else []
    with atomic_file(run.folder / "settings.json") as file:
        file.write(json.dumps(run.settings, indent=2).encode())
    return arguments


def end_with_parent() -> None:
    """
    Terminate this process, MR.Q with a checkpoint, when its parent has ended.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    end_with_parent()
    run = CompareManager.run = Run(**json.loads(sys.argv[1]))
    # Held until this process ends, which may be later than the command that started it
    with (run.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{run.folder} is in use by another process, which must end first.")
        if not run.finished:  # by another command in the meantime
            rl_zoo3.train.ExperimentManager = CompareManager  # type: ignore[misc]
            run_script("train", prepare(run))


if __name__ == "__main__":
    main()
