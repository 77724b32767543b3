"""
Train, evaluate, save, load and act.

    python examples/first_steps.py

Needs no extra.
"""

import argparse

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mrq import MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=15_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps

# Nothing is learned in the first 10,000 steps, which are random (learning_starts)
model = MRQ("MlpPolicy", "Pendulum-v1", seed=0, verbose=1)
model.learn(steps)
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
print(f"return {mean:.1f} +- {std:.1f}")

# As with every algorithm of Stable-Baselines3
model.save("mrq_pendulum")
model.save_replay_buffer("mrq_pendulum_buffer")
del model

model = MRQ.load("mrq_pendulum", env=gym.make("Pendulum-v1"))
model.load_replay_buffer("mrq_pendulum_buffer")
model.learn(steps // 10, reset_num_timesteps=False)

env = gym.make("Pendulum-v1")
obs, _ = env.reset(seed=1)
total = 0.0
for _ in range(200):
    action, _ = model.predict(obs, deterministic=True)
    obs, reward, terminated, truncated, _ = env.step(action)
    total += float(reward)
print(f"one episode: {total:.1f}")
