"""
Compare MRQ with SB3's own algorithms on one task: return against environment steps and against wall time.

    python examples/compare.py --env Pendulum-v1 --steps 15000 --seeds 2  # extra zoo
    python examples/compare.py --env CartPole-v1 --steps 30000 --out runs/compare-cartpole

Box actions: MRQ, TD3 and SAC. Discrete actions: MRQ, DQN and QR-DQN. All have their default hyperparameters and the same
environments, seeds and evaluations. They run one after the other, so that their times can be compared. ``--out`` is the folder
for ``compare.png``, ``compare.svg`` and ``compare.csv``.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_mrq.envs  # noqa: F401 registers the benchmark tasks
from sb3_mrq import MRQ
from sb3_mrq.diagnostics.episodes import no_side_effects

COLORS = ("#0072B2", "#D55E00", "#009E73")


class Evaluation(BaseCallback):
    """
    Records the mean return, and the seconds of training so far, before training, every ``freq`` steps and at the end.

    :param env_id: id of the environment
    :param freq: steps between two evaluations
    :param episodes: episodes of an evaluation
    :param seed: seed of the evaluation environment
    """

    def __init__(self, env_id: str, freq: int, episodes: int, seed: int):
        super().__init__()
        self.env = make_vec_env(env_id, seed=seed)
        self.freq = freq
        self.episodes = episodes
        self.rows: list[tuple[int, float, float]] = []

    def _on_training_start(self) -> None:
        self.start = time.perf_counter()
        self._evaluate()

    def _evaluate(self) -> None:
        began = time.perf_counter()
        # The paper samples MR.Q's discrete policies in evaluations. This must not change the random numbers of training
        deterministic = not isinstance(self.model, MRQ) or isinstance(self.model.action_space, spaces.Box)
        with no_side_effects(self.model):
            mean, _ = evaluate_policy(self.model, self.env, self.episodes, deterministic=deterministic)
        self.rows.append((self.num_timesteps, began - self.start, float(mean)))  # type: ignore[arg-type]
        # Evaluations do not count as training
        self.start += time.perf_counter() - began

    def _on_step(self) -> bool:
        if self.num_timesteps % self.freq == 0 or self.num_timesteps == self.locals["total_timesteps"]:
            self._evaluate()
        return True


def algorithms_for(env_id: str) -> dict[str, Any]:
    """
    :param env_id: id of the environment
    :return: classes of algorithms that take its actions, by name
    """
    env = gym.make(env_id)
    box = isinstance(env.action_space, spaces.Box)
    env.close()
    return {"MRQ": MRQ, "TD3": TD3, "SAC": SAC} if box else {"MRQ": MRQ, "DQN": DQN, "QR-DQN": QRDQN}


def draw(results: dict[str, np.ndarray], env_id: str, out: Path) -> None:
    """
    :param results: steps, seconds and returns by algorithm, (n_seeds, n_evaluations, 3)
    :param env_id: id of the environment
    :param out: folder for the figure
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for (name, rows), color in zip(results.items(), COLORS, strict=False):
        for k, axis in enumerate(axes):
            for seed in rows:
                axis.plot(seed[:, k], seed[:, 2], color=color, alpha=0.3, linewidth=1)
            mean = rows.mean(axis=0)
            axis.plot(mean[:, k], mean[:, 2], color=color, marker="o", markersize=3, label=name)
    for axis, label in zip(axes, ("environment steps", "seconds of training"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{env_id}, {len(next(iter(results.values())))} seeds")
    for suffix in ("png", "svg"):
        figure.savefig(out / f"compare.{suffix}", dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="id of the environment (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15_000, help="steps of the environment (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each algorithm (default: %(default)s)")
    parser.add_argument("--eval-freq", type=int, default=1_000, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--eval-episodes", type=int, default=10, help="episodes of an evaluation (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.threads:
        th.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    results: dict[str, np.ndarray] = {}
    with (args.out / "compare.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env", "algorithm", "seed", "step", "seconds", "return"])
        for name, algorithm in algorithms_for(args.env).items():
            seeds = []
            for seed in range(args.seeds):
                model = algorithm("MlpPolicy", make_vec_env(args.env, seed=seed), seed=seed)
                evaluation = Evaluation(args.env, args.eval_freq, args.eval_episodes, seed + 1000)
                model.learn(args.steps, callback=evaluation)
                writer.writerows((args.env, name, seed, *row) for row in evaluation.rows)
                file.flush()
                seeds.append(evaluation.rows)
                _, seconds, mean = evaluation.rows[-1]
                print(f"{name}, seed {seed}: return {mean:.1f} after {seconds:.0f} s")
            # Some algorithms continue to the end of a rollout
            results[name] = np.array([rows[: min(map(len, seeds))] for rows in seeds])
            # After each algorithm, in case a later one fails or is interrupted
            draw(results, args.env, args.out)
    print(args.out / "compare.png")


if __name__ == "__main__":
    main()
