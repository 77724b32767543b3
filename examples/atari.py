"""
Atari from pixels, with the paper's preprocessing. Meant for a GPU: a training step takes 0.4 to 1.4 s on two CPU threads.

    python examples/atari.py

Needs the extra ``atari``.
"""

import argparse

from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_mrq import MRQ
from sb3_mrq.envs import AtariWrapper

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2_500_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps

# Frames are stored once in the replay buffer: a million of them take 7 GB
env = make_vec_env("ALE/Pong-v5", wrapper_class=AtariWrapper, seed=0)
eval_env = make_vec_env("ALE/Pong-v5", wrapper_class=AtariWrapper, seed=1000)
model = MRQ("CnnPolicy", env, seed=0, learning_starts=min(10_000, steps // 2), verbose=1)
evaluation = EvalCallback(eval_env, eval_freq=100_000, n_eval_episodes=10, best_model_save_path="runs/pong")
model.learn(steps, callback=evaluation)
print(f"{model._n_updates} training steps, observations of {model.observation_space.shape}")
