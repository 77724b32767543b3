"""
Train MR.Q with its default hyperparameters on one task and write the evaluation returns to a CSV file.

    python -m benchmarks.learning cartpole-swingup --seed 0 --steps 20000
    python -m benchmarks.learning CartPole-v1 --seed 0 --steps 20000 --eval-freq 1000 --until 475

A name such as ``cartpole-swingup`` is short for ``dmc/cartpole-swingup-v0``, a task of the DeepMind Control suite as
preprocessed by ``sb3_mrq.envs``; any other is an environment of gymnasium.
"""

import argparse
import csv
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

import sb3_mrq.envs  # noqa: F401
from sb3_mrq import MRQ


def processor() -> str:
    """
    :return: name of the processor, as far as the system tells
    """
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.open() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0] if names else platform.processor()


def make_env(task: str) -> gym.Env:
    """
    :param task: ``<domain>-<task>`` of the DeepMind Control suite, or an id of gymnasium
    :return: the environment, preprocessed
    """
    return gym.make(f"dmc/{task}-v0" if task[0].islower() and "-v" not in task else task)


class EvaluationCallback(BaseCallback):
    """
    Evaluate every so many steps and before the first one, append the returns to a CSV file, and stop where the task is solved.

    :param env: evaluation environments
    :param path: CSV file
    :param freq: steps between two evaluations
    :param n_episodes: episodes of an evaluation
    :param task: value of the first column
    :param until: mean return at which to stop, None for never
    """

    def __init__(self, env: VecEnv, path: Path, freq: int, n_episodes: int, task: str, until: float | None):
        super().__init__()
        self.env = env
        self.path = path
        self.freq = freq
        self.n_episodes = n_episodes
        self.task = task
        self.until = until

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        self._evaluate()

    def _evaluate(self) -> float:
        returns, lengths = evaluate_policy(self.model, self.env, self.n_episodes, return_episode_rewards=True)
        row = [
            self.task,
            self.num_timesteps,
            self.model.seed,
            f"{np.mean(returns):.2f}",
            f"{np.std(returns):.2f}",
            f"{np.mean(lengths):.1f}",
            round(time.monotonic() - self.start),
        ]
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        tqdm.write(f"{self.task} seed {self.model.seed} step {self.num_timesteps}: return {row[3]} +- {row[4]}")
        return float(np.mean(returns))

    def _on_step(self) -> bool:
        if self.num_timesteps % self.freq:
            return True
        mean = self._evaluate()
        return self.until is None or mean < self.until


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--eval-freq", type=int, default=5_000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--until", type=float, help="stop at an evaluation with this mean return")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="torch.set_float32_matmul_precision: medium computes float32 products in bfloat16 where that is faster",
    )
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="see MRQ")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if args.threads:
        th.set_num_threads(args.threads)
    th.set_float32_matmul_precision(args.matmul_precision)

    env = make_vec_env(lambda: make_env(args.task), seed=args.seed)
    eval_env = make_vec_env(lambda: make_env(args.task), seed=args.seed + 1000)
    model = MRQ("MlpPolicy", env, seed=args.seed, precision=args.precision)

    args.out.mkdir(parents=True, exist_ok=True)
    variant = "-bfloat16" if args.precision == "bfloat16" else ""
    path = args.out / f"mrq-{args.task.replace('/', '_')}{variant}-seed{args.seed}.csv"
    versions = ", ".join(f"{name} {version(name)}" for name in ("stable-baselines3", "torch", "gymnasium", "numpy"))
    with path.open("w", newline="") as file:
        file.write(
            f"# command: python -m benchmarks.learning {shlex.join(sys.argv[1:] if arguments is None else arguments)}\n"
        )
        file.write(f"# versions: python {platform.python_version()}, {versions}\n")
        file.write(f"# machine: {platform.machine()}, {th.get_num_threads()} threads of {processor()}, {model.device}\n")
        file.write(f"# precision: {args.precision}, float32 matrix products {args.matmul_precision}\n")
        csv.writer(file, lineterminator="\n").writerow(
            ["env", "timesteps", "seed", "return_mean", "return_std", "length_mean", "seconds"]
        )

    callback = EvaluationCallback(eval_env, path, args.eval_freq, args.eval_episodes, args.task, args.until)
    model.learn(args.steps, callback=callback, progress_bar=sys.stdout.isatty())


if __name__ == "__main__":
    main()
