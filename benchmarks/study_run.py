"""
One run of ``benchmarks.study``: rl-zoo3's training script, with the benchmarks' evaluations instead of its own.

    python -m benchmarks.study_run <folder> <steps between evaluations> <episodes per evaluation> <arguments of sb3-mrq train>

If the study is killed, its runs end as on SIGTERM, ``mrq`` with a checkpoint.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import rl_zoo3.train
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space

from benchmarks.evaluation import EvaluationCallback, machine, papers_atari, versions
from benchmarks.study import STUDY_PROCESS, VERSIONS, read_json
from sb3_mrq import MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.checks import subspaces_of
from sb3_mrq.persist.files import atomic_file
from sb3_mrq.zoo.configuration import ALGORITHMS
from sb3_mrq.zoo.exp_manager import CHECKPOINTS, MRQExperimentManager
from sb3_mrq.zoo.scripts import run

# Steps between two checkpoints of mrq. Each contains the replay buffer, several gigabytes with images: these runs write one
# every tenth of the run, within these two bounds.
CHECKPOINT_FREQ = 5_000
CHECKPOINT_FREQ_IMAGES = 50_000


class StudyManager(MRQExperimentManager):
    """
    Experiment manager with the benchmarks' evaluations. After training it records settings, versions and machine.
    """

    folder: Path
    evaluation_freq: int
    evaluation_episodes: int

    def create_callbacks(self) -> None:
        super().create_callbacks()
        env = self.create_envs(1, eval_env=True)
        env.seed(self.seed + 1000)
        if ExperimentManager.is_atari(self.env_name.gym_id):
            env = papers_atari(env, self.seed)
        if self.algo in ALGORITHMS:
            freq = checkpoint_freq(env.observation_space, self.n_timesteps)
            self.callbacks.append(ResumableCheckpointCallback(freq, self.folder / CHECKPOINTS, keep_last=2))
        self.callbacks.append(
            EvaluationCallback(
                env,
                self.folder / "evaluations.csv",
                self.evaluation_freq,
                self.evaluation_episodes,
                self.env_name.gym_id,
            )
        )

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        # A signal in the last step puts its training steps off
        if model.num_timesteps < self._n_timesteps_given or (isinstance(model, MRQ) and model.is_stopping):
            sys.exit("The run was stopped by a signal before its end, after a checkpoint. Repeat the study to resume it.")
        super().save_trained_model(model)
        where = machine(model.device)
        if isinstance(model, MRQ):
            where += f", {model.learner.hyperparameters.precision}"
        record = {"versions": " / ".join(recorded_versions(self.folder)), "machine": where, "command": sys.argv}
        settings = read_json(self.folder / "settings.json")
        with atomic_file(self.folder / "run.json") as file:
            file.write(json.dumps({"settings": settings, **record}, indent=2).encode())
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)


def checkpoint_freq(observation_space: spaces.Space, steps: int) -> int:
    """
    :param observation_space: observation space of the environment
    :param steps: number of steps of the whole run
    :return: steps between two checkpoints
    """
    images = any(map(is_image_space, subspaces_of(observation_space).values()))
    return min(max(CHECKPOINT_FREQ, steps // 10), CHECKPOINT_FREQ_IMAGES) if images else CHECKPOINT_FREQ


def recorded_versions(folder: Path) -> list[str]:
    """
    :param folder: folder of a run
    :return: package versions of each part of the run, without repetitions
    """
    path = folder / VERSIONS
    return path.read_text().splitlines() if path.exists() else []


def record_versions(folder: Path) -> None:
    """
    Append the current versions at the start, as code and commit may change during the run.

    :param folder: folder of the run
    """
    before, now = recorded_versions(folder), versions()
    if before[-1:] != [now]:
        with (folder / VERSIONS).open("a") as file:
            print(now, file=file)


def end_with_parent(parent: int) -> None:
    """
    Terminate this process when its parent ends.

    :param parent: process id of the parent
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    if STUDY_PROCESS in os.environ:
        end_with_parent(int(os.environ[STUDY_PROCESS]))
    folder, freq, episodes, *arguments = sys.argv[1:]
    StudyManager.folder = Path(folder).absolute()
    record_versions(StudyManager.folder)
    StudyManager.evaluation_freq = int(freq)
    StudyManager.evaluation_episodes = int(episodes)
    rl_zoo3.train.ExperimentManager = StudyManager  # type: ignore[misc]
    run("train", arguments)


if __name__ == "__main__":
    main()
