"""
VecNormalize: observations and rewards scaled by running statistics. The replay buffer stores the original values, and
normalises each batch with the current statistics.

MRQ works without it: rewards are scaled by their mean absolute value, and the networks use layer norm. It helps if the scales
of observations differ by orders of magnitude.

    python examples/vec_normalize.py

Needs no extra.
"""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq import MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=15_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps

env = VecNormalize(make_vec_env("Pendulum-v1", seed=0))
model = MRQ("MlpPolicy", env, seed=0, learning_starts=min(10_000, steps // 2), verbose=1)
model.learn(steps)
model.save("mrq_normalized")
env.save("vec_normalize.pkl")

# For evaluation: the same statistics, which are not updated, and original rewards
eval_env = VecNormalize.load("vec_normalize.pkl", make_vec_env("Pendulum-v1", seed=1000))
eval_env.training = False
eval_env.norm_reward = False
mean, std = evaluate_policy(MRQ.load("mrq_normalized"), eval_env)
print(f"return {mean:.1f} +- {std:.1f}")
