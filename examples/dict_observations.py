"""
Observations that are a Dict of an image and a vector: MultiInputPolicy uses a CNN for each image and one MLP for the rest.

    python examples/dict_observations.py

Needs the extra ``train``.
"""

import argparse

import gymnasium as gym
from gymnasium.wrappers import AddRenderObservation, TransformObservation

from sb3_mrq import MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100_000, help="steps of the environment (default: %(default)s)")
steps = parser.parse_args().steps


def make_env() -> gym.Env:
    """Pendulum's state, and a picture of it in 64 x 64 pixels."""
    env = AddRenderObservation(gym.make("Pendulum-v1", render_mode="rgb_array"), render_only=False)
    pixels = env.observation_space["pixels"]
    smaller = gym.spaces.Box(0, 255, (64, 64, 3), pixels.dtype)
    space = gym.spaces.Dict({**env.observation_space.spaces, "pixels": smaller})

    def shrink(obs: dict) -> dict:
        picture = obs["pixels"]
        rows, columns = (range(0, size - size % 64, size // 64) for size in picture.shape[:2])
        return {**obs, "pixels": picture[list(rows)[:64]][:, list(columns)[:64]]}

    return TransformObservation(env, shrink, space)


model = MRQ("MultiInputPolicy", make_env(), seed=0, learning_starts=min(10_000, steps // 2), verbose=1)
model.learn(steps)
print(f"{model._n_updates} training steps, observations {model.observation_space}")
