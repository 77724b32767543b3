"""
Offline training: learn from the replay buffer of a run that was stopped half-way, without a further step of the environment.

    python examples/offline.py

Needs the extra ``train``.
"""

import argparse

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mrq import MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=10_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps
# Small networks are enough here, and several times as fast
small = dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, z_sa_dim=128)

teacher = MRQ("MlpPolicy", "Pendulum-v1", policy_kwargs=small, seed=0, learning_starts=steps // 2)
teacher.learn(steps)
teacher.save_replay_buffer("pendulum_buffer.pkl")
# An episode has 200 steps
data = 200 * np.mean(teacher.replay_buffer.rewards[: teacher.replay_buffer.pos])

# Values of actions that are not in the data are guesses: bc_weight keeps the policy near those that are
model = MRQ("MlpPolicy", "Pendulum-v1", policy_kwargs=small, seed=0, bc_weight=0.4)
model.load_replay_buffer("pendulum_buffer.pkl")
model.train_offline(steps)
mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
print(f"return of the data {data:.0f}, of the policy {mean:.0f}")
