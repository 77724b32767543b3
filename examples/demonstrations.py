"""
Demonstrations: ten episodes of a simple controller, from which half of each batch is drawn. The car must swing to and fro to
get up the hill, and random actions hardly ever find that out.

    python examples/demonstrations.py

Needs the extra ``train``.
"""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mrq import MRQ
from sb3_mrq.demonstrations import DemonstrationReplayBuffer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps
# Small networks are enough here, and several times as fast
small = dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, z_sa_dim=128)

env = gym.make("MountainCarContinuous-v0")
transitions = []
for seed in range(10):
    obs, _ = env.reset(seed=seed)
    ended = False
    while not ended:
        # Push in the direction of movement
        action = np.float32([np.sign(obs[1]) * 0.7])
        next_obs, reward, terminated, truncated, _ = env.step(action)
        transitions.append((obs, action, reward, next_obs, terminated, truncated))
        obs, ended = next_obs, terminated or truncated

demonstrator = MRQ("MlpPolicy", env, policy_kwargs=small, buffer_size=20_000)
demonstrator.add_transitions(*(np.array(part) for part in zip(*transitions, strict=True)))
demonstrator.save_replay_buffer("demonstrations.pkl")

model = MRQ(
    "MlpPolicy",
    env,
    replay_buffer_class=DemonstrationReplayBuffer,
    replay_buffer_kwargs=dict(demonstration_buffer="demonstrations.pkl", demonstration_share=0.5),
    learning_starts=min(1_000, steps // 2),
    policy_kwargs=small,
    seed=0,
)
model.learn(steps)
mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
print(f"{len(transitions)} demonstrated transitions, return {mean:.0f}")
