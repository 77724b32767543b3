"""
Train MR.Q with its default hyperparameters on one task and write the evaluation returns to a CSV file.

    python -m benchmarks.learning cartpole-swingup --seed 0 --steps 20000
    python -m benchmarks.learning CartPole-v1 --seed 0 --steps 20000 --eval-freq 1000 --until 475

A name such as ``cartpole-swingup`` is short for ``dmc/cartpole-swingup-v0``, a task of the DeepMind Control suite as
preprocessed by ``sb3_mrq.envs``; any other is an environment of gymnasium. Observations are vectors; for others, and for many
runs at once, see ``benchmarks.study``.
"""

import argparse
import csv
import shlex
import sys
from pathlib import Path

import gymnasium as gym
import torch as th
from stable_baselines3.common.env_util import make_vec_env

import sb3_mrq.envs  # noqa: F401
from benchmarks.evaluation import COLUMNS, EvaluationCallback, machine, versions
from sb3_mrq import MRQ
from sb3_mrq.hyperparameters import PRECISIONS


def make_env(task: str) -> gym.Env:
    """
    :param task: ``<domain>-<task>`` of the DeepMind Control suite, or an id of gymnasium
    :return: the environment, preprocessed
    """
    return gym.make(f"dmc/{task}-v0" if task[0].islower() and "-v" not in task else task)


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
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help="see MRQ")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        th.set_num_threads(args.threads)
    th.set_float32_matmul_precision(args.matmul_precision)

    env = make_vec_env(lambda: make_env(args.task), seed=args.seed)
    eval_env = make_vec_env(lambda: make_env(args.task), seed=args.seed + 1000)
    model = MRQ("MlpPolicy", env, seed=args.seed, precision=args.precision)

    precision = model.learner.hyperparameters.precision
    variant = "" if precision == "float32" else f"-{precision}"
    if args.matmul_precision != "highest":
        variant += f"-{args.matmul_precision}"
    path = args.out / f"mrq-{args.task.replace('/', '_')}{variant}-seed{args.seed}.csv"
    if path.exists():
        parser.error(f"{path} exists: move it away, or give another folder with --out.")
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    with path.open("w", newline="") as file:
        file.write(f"# command: python -m benchmarks.learning {command}\n")
        file.write(f"# versions: {versions()}\n")
        file.write(f"# machine: {machine(model.device)}\n")
        file.write(f"# precision: {precision}, float32 matrix products {args.matmul_precision}\n")
        csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    callback = EvaluationCallback(eval_env, path, args.eval_freq, args.eval_episodes, args.task, args.until)
    model.learn(args.steps, callback=callback, progress_bar=sys.stdout.isatty())


if __name__ == "__main__":
    main()
