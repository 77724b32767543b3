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
parser.add_argument("--steps", type=int, default=8_000, help="steps of the environment (default: %(default)s)")
parser.add_argument("--bits", type=int, default=5, help="length of the pattern (default: %(default)s)")
args = parser.parse_args()
# Small networks are enough here, and several times as fast
small = dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, z_sa_dim=128)

model = MRQ(
    "MultiInputPolicy",
    BitFlippingEnv(n_bits=args.bits, continuous=False),
    replay_buffer_class=HerSubtrajectoryReplayBuffer,
    replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
    policy_kwargs=small,
    discrete_policy="greedy",
    # A goal never changes, so an encoder that drops all but the goal predicts next embeddings well. It must predict rewards.
    dynamics_loss_weight=0.0,
    reward_loss_weight=1.0,
    encoder_learning_rate=1e-3,
    gamma=0.95,
    batch_size=128,
    # Many episodes are needed, and a training step takes much longer than a step of this environment
    learning_starts=args.steps // 5,
    train_freq=2,
    gradient_steps=1,
    seed=0,
    verbose=1,
)
model.learn(args.steps)
# A step costs 1 until the pattern matches: minus the number of bits is an episode that has failed
returns, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
print(f"mean return {returns:.1f}")
