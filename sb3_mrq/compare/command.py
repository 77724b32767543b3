"""
The script ``compare``: its command line, and the course of a comparison.
"""

import argparse
import signal
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
from gymnasium import spaces

from sb3_mrq.compare.algorithms import VARIANTS, resolve
from sb3_mrq.compare.report import make_report, read_results
from sb3_mrq.compare.runner import RUNS_PER_GPU, local_runs, ray_runs, run_all
from sb3_mrq.compare.runs import Run
from sb3_mrq.envs import ATARI_GAMES, DMC_TASKS, DMC_VISUAL_TASKS, GYM_LOCOMOTION
from sb3_mrq.zoo.configuration import ConfigurationError
from sb3_mrq.zoo.scripts import check_task

#: tasks, training steps in the paper and steps between two evaluations
SUITES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "gym": (GYM_LOCOMOTION, 1_000_000, 5_000),
    "dmc": (DMC_TASKS, 500_000, 5_000),
    "dmc-visual": (DMC_VISUAL_TASKS, 500_000, 5_000),
    "atari": (ATARI_GAMES, 2_500_000, 100_000),
}

DESCRIPTION = f"""Train algorithms on the same tasks with the same seeds, steps and evaluations, and report on them.

    sb3-mrq compare --env HalfCheetah-v5 --algos mrq,drq,td3,sac --seeds 5 --steps 100000 --out runs/cheetah
    sb3-mrq compare --suite dmc --algos mrq,td3,sac --seeds 3 --steps 30000 --out runs/dmc

Each run is rl-zoo3's training script in its own process, with rl-zoo3's hyperparameters. An algorithm can be given others, as
in mrq:n_steps=1:precision=float32. There are named variants:
{textwrap.fill(", ".join(VARIANTS), 127, break_on_hyphens=False)}.

Repeating a command skips finished runs and resumes interrupted ones, of mrq and drq from their last checkpoint, of others from
the beginning. Ctrl-C and SIGTERM end the runs, of mrq and drq with a checkpoint. Failed runs are listed at the end. The report
in the folder --out covers all finished runs there, of other commands too; sb3-mrq report makes it again."""


def parse() -> argparse.Namespace:
    """
    :return: arguments of the command line
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--env", nargs="+", metavar="ID", help="ids of environments")
    what.add_argument("--suite", choices=SUITES, help="all tasks of a part of the paper's benchmark")
    parser.add_argument("--algos", metavar="NAME,NAME", help="(default: mrq,td3,sac, or mrq,dqn,qrdqn for discrete actions)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="environment steps of each run (default: the paper's)")
    parser.add_argument("--eval-freq", type=int, help="steps between two evaluations (default: the paper's, or --steps / 20)")
    parser.add_argument("--eval-episodes", type=int, default=10, help="episodes of an evaluation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: %(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help=f"runs side by side (default: all processors, {RUNS_PER_GPU} runs on a GPU)")
    where.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="use a Ray cluster that shares --out (default: a new one here)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    args = parser.parse_args()
    for name in ("seeds", "steps", "eval_freq", "eval_episodes", "jobs", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1.")
    return args


def plan(args: argparse.Namespace) -> list[Run]:
    """
    :param args: arguments of the command line
    :return: all runs of the comparison. Seeds are in the outer loop: an interrupted comparison has results of every task.
    :raises ConfigurationError: for mistakes in the arguments
    """
    # No duplicates: two runs cannot share a folder
    tasks = SUITES[args.suite][0] if args.suite else tuple(dict.fromkeys(args.env))
    for task in tasks:
        check_task(task)
    if args.algos is None:
        env = gym.make(tasks[0])
        args.algos = "mrq,td3,sac" if isinstance(env.action_space, spaces.Box) else "mrq,dqn,qrdqn"
        env.close()
    algorithms = dict.fromkeys(name.strip() for name in args.algos.split(","))
    for algorithm in algorithms:
        resolve(algorithm)
    common = (args.eval_episodes, str(args.out.resolve()), args.threads, args.device, " ".join(args.gym_packages))
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for task in tasks:
            _, papers_steps, papers_freq = next((suite for suite in SUITES.values() if task in suite[0]), (None, None, None))
            steps = args.steps or papers_steps
            if steps is None:
                raise ConfigurationError(f"--steps is needed for {task}, which is not among the paper's tasks.")
            freq = min(args.eval_freq or papers_freq or max(1, steps // 20), steps)
            runs += [Run(task, name, seed, steps, freq, *common) for name in algorithms]
    for run in runs:
        run.check_settings()
    return runs


def compare_script() -> None:
    """
    Make the comparison requested on the command line.
    """
    args = parse()
    runs = plan(args)
    to_do = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs in {args.out}, {len(runs) - len(to_do)} of them already finished.", flush=True)
    started = local_runs(to_do, args.jobs) if args.ray is None else ray_runs(to_do, args.ray or None)
    try:
        failures = run_all(runs, started)
    except KeyboardInterrupt:
        n_finished = sum(run.finished for run in runs)
        print(f"Stopped: {n_finished} of {len(runs)} runs are finished. Repeat the command to continue.")
        sys.exit(128 + signal.SIGINT)
    if len(failures) < len(runs):
        print(make_report(read_results([args.out]), None, args.out, "Comparison"))
    for name, failure in failures.items():
        print(f"FAILED {name}: {failure}")
    if failures:
        sys.exit(1)
