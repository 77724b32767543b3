"""
Search hyperparameters with Optuna. For rl-zoo3's own search see ``sb3-mrq train --algo mrq -optimize``.

MR.Q is meant to work without a search. This is for tasks that need one.

    python examples/search.py

Needs the extra ``zoo``.
"""

import argparse

import gymnasium as gym
import optuna
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mrq import MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=15_000, help="steps of each trial (default: %(default)s)")
parser.add_argument("--trials", type=int, default=20, help="number of trials (default: %(default)s)")
args = parser.parse_args()


def objective(trial: optuna.Trial) -> float:
    """Mean return after training."""
    model = MRQ(
        "MlpPolicy",
        "Pendulum-v1",
        seed=trial.number,
        learning_starts=min(10_000, args.steps // 2),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
        encoder_horizon=trial.suggest_int("encoder_horizon", 1, 8),
        exploration_noise=trial.suggest_float("exploration_noise", 0.05, 0.4),
    )
    model.learn(args.steps)
    mean, _ = evaluate_policy(model, Monitor(gym.make("Pendulum-v1")), n_eval_episodes=10)
    return float(mean)


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=args.trials)
print(f"best of {len(study.trials)} trials: {study.best_value:.1f} with {study.best_params}")
