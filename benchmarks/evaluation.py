"""
Evaluation during training for the benchmarks: before the first step and at a fixed interval, with the returns in a CSV file.
"""

import csv
import io
import platform
import subprocess
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

import sb3_mrq
from sb3_mrq import MRQ
from sb3_mrq.diagnostics.episodes import no_side_effects
from sb3_mrq.persist.files import atomic_file

# Probability of a random action in evaluations on Atari, section 5 of the paper's appendix
RANDOM_ACTIONS = 0.001

COLUMNS = ("task", "seed", "step", "return", "return_std", "length", "seconds")


def processor() -> str:
    """
    :return: name of the processor, empty if unknown
    """
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.open() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0] if names else platform.processor()


def commit(folder: Path) -> str | None:
    """
    :param folder: folder of a package
    :return: commit of the package's git repository, with "-dirty" if files were changed since. None for an installed package.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A package may be installed inside another repository
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> str:
    """
    :return: versions of Python and of the installed packages that results depend on
    """
    found = [f"python {platform.python_version()}"]
    optional = ("rl-zoo3", "mujoco", "dm-control", "ale-py")
    for name in ("sb3-mrq", "stable-baselines3", "torch", "gymnasium", "numpy", *optional):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
        if name == "sb3-mrq":
            revision = commit(Path(sb3_mrq.__file__).parent)
            found[-1] += f" ({revision})" if revision else ""
    return ", ".join(found)


def machine(device: str | th.device) -> str:
    """
    :param device: device of a model
    :return: architecture, threads, processor and device
    """
    gpu = f", {th.cuda.get_device_name()}" if "cuda" in str(device) else ""
    return f"{platform.machine()}, {th.get_num_threads()} threads of {processor()}, {device}{gpu}"


class RandomActions(VecEnvWrapper):
    """
    Replace actions by random ones with a small probability, as in evaluations on Atari.

    :param venv: the environments
    :param probability: probability of a random action, for each environment and step
    :param seed: seed of the random actions and of their times
    """

    def __init__(self, venv: VecEnv, probability: float, seed: int):
        super().__init__(venv)
        self.probability = probability
        self._seed(seed)

    def _seed(self, seed: int | None) -> None:
        self.random = np.random.default_rng(seed)
        self.action_space.seed(seed)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        self._seed(seed)
        return super().seed(seed)

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        actions = np.array(actions)
        for i in np.flatnonzero(self.random.random(self.num_envs) < self.probability):
            actions[i] = self.action_space.sample()
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()


def papers_atari(env: VecEnv, seed: int) -> VecEnv:
    """
    :param env: Atari games to evaluate on
    :param seed: seed of the random actions
    :return: the games with the paper's random actions, and with episode lengths in steps of the agent
    """
    env = RandomActions(env, RANDOM_ACTIONS, seed)
    with warnings.catch_warnings():
        # The Monitor inside counts raw frames
        warnings.filterwarnings("ignore", "The environment is already wrapped with a `Monitor`", UserWarning)
        return VecMonitor(env)


def copy_normalization(source: VecEnv, target: VecEnv) -> None:
    """
    Copy the statistics of ``VecNormalize``, at any depth of wrappers.

    :param source: training environments
    :param target: evaluation environments
    :raises ValueError: if only the training environments have a ``VecNormalize``
    """
    ours, theirs = unwrap_vec_normalize(source), unwrap_vec_normalize(target)
    if ours is None:
        return
    if theirs is None:
        raise ValueError(
            "The environments are normalized for training, but not for evaluation. Wrap the evaluation environments in "
            "VecNormalize too."
        )
    if hasattr(ours, "obs_rms"):  # missing with norm_obs=False
        theirs.obs_rms = deepcopy(ours.obs_rms)
    theirs.ret_rms = deepcopy(ours.ret_rms)


class EvaluationCallback(BaseCallback):
    """
    Evaluate before the first step, at a fixed interval and at the end, and append the returns to a CSV file. A resumed run
    continues its file after the evaluations up to its checkpoint.

    The first evaluation uses the seed of the environments. Each later one has its own seed, derived from the seed of the
    model, so that a resumed run is evaluated on the same episodes as an uninterrupted one.

    :param env: evaluation environments
    :param path: CSV file, created with a header if it does not exist
    :param freq: steps between two evaluations
    :param n_episodes: episodes per evaluation
    :param task: value of the column task
    """

    def __init__(self, env: VecEnv, path: Path, freq: int, n_episodes: int, task: str):
        super().__init__()
        self.env = env
        self.path = path.absolute()
        self.freq = freq
        self.n_episodes = n_episodes
        self.task = task

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        self.next_evaluation = 0
        self.n_evaluations = 0
        if self.num_timesteps > 0:
            self._continue_file()
        else:
            self._evaluate_if_due()

    def _continue_file(self) -> None:
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.num_timesteps]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        # Never a partial file, even if the process is killed here
        with atomic_file(self.path) as file:
            file.write(text.getvalue().encode())
        self.n_evaluations = len(rows)
        # A checkpoint comes after the evaluation of its step
        self._plan_next()
        # From the checkpoint
        self.start -= self.model.training_seconds  # type: ignore[attr-defined]

    def _plan_next(self) -> None:
        self.next_evaluation = (self.num_timesteps // self.freq + 1) * self.freq
        end = self.locals.get("total_timesteps", 0)
        if self.num_timesteps < end:
            self.next_evaluation = min(self.next_evaluation, end)

    def _evaluate_if_due(self) -> None:
        if self.num_timesteps < self.next_evaluation:
            return
        started = time.monotonic()
        assert self.model.env is not None
        copy_normalization(self.model.env, self.env)
        # The paper samples from MR.Q's discrete policies, which must not affect the random numbers of training
        deterministic = not isinstance(self.model, MRQ) or isinstance(self.model.action_space, spaces.Box)
        with no_side_effects(self.model):
            if self.n_evaluations and self.model.seed is not None:
                entropy = [self.model.seed + 1000, self.n_evaluations]
                self.env.seed(int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1))
            returns, lengths = evaluate_policy(
                self.model, self.env, self.n_episodes, deterministic=deterministic, return_episode_rewards=True
            )
        self._plan_next()
        self.n_evaluations += 1
        row = (
            self.task,
            self.model.seed,
            self.num_timesteps,
            f"{np.mean(returns):.2f}",
            f"{np.std(returns):.2f}",
            f"{np.mean(lengths):.1f}",
            round(started - self.start),
        )
        begins = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if begins:
                writer.writerow(COLUMNS)
            writer.writerow(row)
        # Evaluations do not count as training time
        self.start += time.monotonic() - started
        print(f"{self.task} seed {self.model.seed} step {self.num_timesteps}: return {row[3]} +- {row[4]}", flush=True)

    def _on_step(self) -> bool:
        # Saved with the model
        self.model.training_seconds = time.monotonic() - self.start  # type: ignore[attr-defined]
        self._evaluate_if_due()
        return True
