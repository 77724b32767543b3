"""
Wrappers that gymnasium lacks or that it cannot pickle.
"""

from collections.abc import Callable
from typing import Any, SupportsFloat

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs


class ActionRepeat(gym.Wrapper, RecordConstructorArgs):
    """
    Repeat each action and sum the rewards. The observation is taken after the last repetition.

    :param env: the environment
    :param n_repeats: number of repetitions, fewer if the episode ends earlier
    """

    def __init__(self, env: gym.Env, n_repeats: int):
        RecordConstructorArgs.__init__(self, n_repeats=n_repeats)
        gym.Wrapper.__init__(self, env)
        if n_repeats < 1:
            raise ValueError(f"n_repeats must be at least 1, not {n_repeats}.")
        self.n_repeats = n_repeats
        if "render_fps" in env.metadata:
            self.metadata = {**env.metadata, "render_fps": env.metadata["render_fps"] / n_repeats}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.n_repeats):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class _PickledByArguments(RecordConstructorArgs):
    """Pickles by constructor arguments, as gymnasium's observation wrappers hold a lambda, which cannot be pickled."""

    env: gym.Env

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.env, *self._saved_kwargs.values())


class FlattenObservation(_PickledByArguments, gym.wrappers.FlattenObservation):
    """Picklable version of gymnasium's wrapper."""


class ReshapeObservation(_PickledByArguments, gym.wrappers.ReshapeObservation):
    """Picklable version of gymnasium's wrapper."""
