"""
A task of the DeepMind Control suite from pixels: the last three RGB frames of 84 x 84, every action repeated twice.

    python examples/dm_control_pixels.py

Needs the extra ``dmc``.
"""

import argparse

import gymnasium as gym

from sb3_mrq import MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=500_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps

env = gym.make("sb3_mrq.envs:dmc-visual/cartpole-swingup-v0")
print(f"observations {env.observation_space}, actions {env.action_space}")
model = MRQ("CnnPolicy", env, seed=0, learning_starts=min(10_000, steps // 2), verbose=1)
model.learn(steps)
print(f"{model._n_updates} training steps")
