"""
A task of the DeepMind Control suite from pixels: the last three RGB frames of 84 x 84, every action repeated twice.

    python examples/dm_control_pixels.py  # extra dmc
"""

import os

import gymnasium as gym

from sb3_mrq import MRQ

STEPS = int(os.environ.get("EXAMPLE_STEPS", "500000"))

env = gym.make("sb3_mrq.envs:dmc-visual/cartpole-swingup-v0")
print(f"observations {env.observation_space}, actions {env.action_space}")
model = MRQ("CnnPolicy", env, seed=0, learning_starts=min(10_000, STEPS // 2), verbose=1)
model.learn(STEPS)
print(f"{model._n_updates} training steps")
