"""
Several environments, each in its own process. After each step of all environments there is one training step for each of them
(gradient_steps=-1), so that the ratio of training to experience stays the same.

    python examples/parallel_environments.py

Needs the extra ``mujoco``.
"""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_mrq import MRQ

if __name__ == "__main__":  # the processes import this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the environment (default: %(default)s)")
    steps = parser.parse_args().steps

    env = make_vec_env("HalfCheetah-v5", n_envs=4, seed=0, vec_env_cls=SubprocVecEnv)
    model = MRQ("MlpPolicy", env, seed=0, learning_starts=min(10_000, steps // 2), verbose=1)
    model.learn(steps)
    print(f"{model.num_timesteps} steps of {env.num_envs} environments, {model._n_updates} training steps")
    env.close()
