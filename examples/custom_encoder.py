"""
Your own encoder: any features extractor of Stable-Baselines3. MR.Q's encoder loss trains it with the encoder's optimiser. It
has a target copy, as the rest of the encoder has.

    python examples/custom_encoder.py

Needs no extra.
"""

import argparse

import gymnasium as gym
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_mrq import MRQ


class FourierFeatures(BaseFeaturesExtractor):
    """
    Sines and cosines of random combinations of the observation, then a layer.

    :param observation_space: vectors
    :param n_frequencies: number of combinations
    :param features_dim: size of the output
    """

    def __init__(self, observation_space: gym.spaces.Box, n_frequencies: int = 64, features_dim: int = 256):
        super().__init__(observation_space, features_dim)
        # A buffer: saved and copied to the target, but not trained
        self.register_buffer("frequencies", th.randn(observation_space.shape[0], n_frequencies))
        self.layer = nn.Sequential(nn.Linear(2 * n_frequencies, features_dim), nn.LayerNorm(features_dim), nn.ELU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: (B, D)
        :return: (B, features_dim)
        """
        angles = observations @ self.frequencies
        return self.layer(th.cat([angles.sin(), angles.cos()], dim=1))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=15_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps

model = MRQ(
    "MlpPolicy",
    "Pendulum-v1",
    seed=0,
    learning_starts=min(10_000, steps // 2),
    policy_kwargs=dict(features_extractor_class=FourierFeatures, features_extractor_kwargs=dict(n_frequencies=32)),
    verbose=1,
)
model.learn(steps)
print(model.policy.encoder.state.features_extractor)
