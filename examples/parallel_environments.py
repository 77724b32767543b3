"""
Several environments, each in its own process. After each step of all environments there is one training step for each of them
(gradient_steps=-1), so that the ratio of training to experience stays the same.

    python examples/parallel_environments.py  # extra mujoco
"""

import os

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_mrq import MRQ

STEPS = int(os.environ.get("EXAMPLE_STEPS", "100000"))

if __name__ == "__main__":  # the processes import this file
    env = make_vec_env("HalfCheetah-v5", n_envs=4, seed=0, vec_env_cls=SubprocVecEnv)
    model = MRQ("MlpPolicy", env, seed=0, learning_starts=min(10_000, STEPS // 2), verbose=1)
    model.learn(STEPS)
    print(f"{model.num_timesteps} steps of {env.num_envs} environments, {model._n_updates} training steps")
    env.close()
