"""
Goals: flip bits one by one until they match a pattern. Only the match is rewarded. With relabelled goals every episode teaches
something.

    python examples/goals.py

Needs no extra.
"""

import argparse

from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mrq import MRQ
from sb3_mrq.buffers import HerSubtrajectoryReplayBuffer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=5_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps
# Small networks are enough here, and several times as fast
small = dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, z_sa_dim=128)

model = MRQ(
    "MultiInputPolicy",
    BitFlippingEnv(n_bits=5, continuous=False),
    replay_buffer_class=HerSubtrajectoryReplayBuffer,
    replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
    policy_kwargs=small,
    discrete_policy="greedy",
    learning_starts=min(1_000, steps // 2),
    seed=0,
    verbose=1,
)
model.learn(steps)
# A step costs 1 until the pattern matches: -5 is an episode that has failed
returns, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
print(f"mean return {returns:.1f}")
