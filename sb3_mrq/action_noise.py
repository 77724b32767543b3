"""
Noise of exploration: action noise passed by the user, and noise on the values of a greedy policy.
"""

from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise

# Mean number of steps for which noise on values is kept. Random actions that change at every step cancel out: on Acrobot they
# never reach the goal, and in two of five episodes if each lasts four steps on average.
STEPS_HELD = 4


def hold_noise(noise: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """
    Noise on the values of all actions for a step of exploration, drawn from NumPy's global generator. Half of the time it is
    zero, else twice standard Gumbel noise. Each environment keeps its noise for ``STEPS_HELD`` steps on average.

    :param noise: noise of the previous step, None at first
    :param shape: numbers of environments and of actions
    :return: noise of this step, of this shape
    """
    n_envs = shape[0]
    new = 2 * np.random.gumbel(size=shape) * (np.random.random((n_envs, 1)) < 0.5)
    if noise is None or noise.shape != shape:
        return new
    return np.where(np.random.random((n_envs, 1)) < 1 / STEPS_HELD, new, noise)


def fit_noise(noise: np.ndarray, n_envs: int, action_shape: tuple[int, ...]) -> np.ndarray:
    """
    :param noise: noise of each environment, (n_envs, ...)
    :param n_envs: number of environments
    :param action_shape: shape of one action
    :return: the noise in the shape of the actions, broadcast if it has fewer numbers, (n_envs, *action_shape)
    :raises ValueError: if it does not fit
    """
    if noise.size == n_envs * np.prod(action_shape):
        return noise.reshape(n_envs, *action_shape)
    missing = 1 + len(action_shape) - noise.ndim
    return np.broadcast_to(noise.reshape(n_envs, *missing * [1], *noise.shape[1:]), (n_envs, *action_shape))


def _sample(action_noise: ActionNoise) -> np.ndarray:
    """Sample noise, with the environments as first axis: (n_envs, ...), or (1, ...) for one environment."""
    noise = np.asarray(action_noise())
    return noise if isinstance(action_noise, VectorizedActionNoise) else noise[None]


def sample_noise(action_noise: ActionNoise, n_envs: int, action_shape: tuple[int, ...]) -> np.ndarray:
    """
    :param action_noise: the noise, a ``VectorizedActionNoise`` if there are several environments
    :param n_envs: number of environments
    :param action_shape: shape of one action
    :return: noise in the shape of the actions, (n_envs, *action_shape)
    """
    return fit_noise(_sample(action_noise), n_envs, action_shape)


def check_action_noise(action_noise: Any, action_space: spaces.Space, n_envs: int) -> None:
    """
    :param action_noise: the noise, or None
    :param action_space: the action space
    :param n_envs: number of environments
    :raises ValueError: if this noise cannot be added to actions
    """
    if action_noise is None:
        return
    if not callable(action_noise):
        raise ValueError(
            f"action_noise is {action_noise!r}, but must be an ActionNoise such as NormalActionNoise, or None. The size of "
            "the built-in noise is exploration_noise."
        )
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"action_noise is for Box actions, not {action_space}: leave it out and set exploration_noise instead."
        )
    if isinstance(action_noise, VectorizedActionNoise):
        if action_noise.n_envs != n_envs:
            raise ValueError(
                f"action_noise is a VectorizedActionNoise for {action_noise.n_envs} environments, but there are {n_envs}: set "
                "action_noise to its base_noise, of which each environment gets a copy."
            )
    else:
        n_envs = 1
    remedy = f"Give it mean and sigma as arrays of one number, or of the shape of the actions, {action_space.shape}."
    generator = np.random.get_state()
    try:
        # A copy, as noise may have a state
        noise = _sample(deepcopy(action_noise))
    except Exception as error:
        raise ValueError(
            f"action_noise {action_noise} cannot be sampled: {type(error).__name__}: {error}. {remedy}"
        ) from error
    finally:
        np.random.set_state(generator)
    try:
        fit_noise(noise, n_envs, action_space.shape)
    except ValueError:
        raise ValueError(f"action_noise gives noise of the shape {noise.shape[1:]}, which does not fit. {remedy}") from None
