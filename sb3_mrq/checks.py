"""
What environments must give to be learned from: numbers, in the shape of the space, in a range that leaves room to compute.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

# Largest absolute values that float32 leaves room to compute with: layer normalisation squares sums over an observation, and
# a return is a sum of rewards
LARGEST_OBSERVATION = 1e18
LARGEST_REWARD = 1e30


class BadValueError(ValueError):
    """
    An environment gave something that cannot be learned from.

    :param fault: what it gave, as a clause
    :param step: of the model, at which that was, None if it is not known
    """

    def __init__(self, fault: str, step: int | None = None):
        super().__init__(fault, step)
        self.fault = fault
        self.step = step

    def __str__(self) -> str:
        remedy = "Nothing can be learned from that: fix the environment or clip what it gives."
        if self.step is None:
            return f"{self.fault}. {remedy}"
        return f"{self.fault} at step {self.step}. {remedy} The replay buffer holds the transitions before this step."


class NonFiniteError(BadValueError):
    """
    An observation or reward is infinite or not a number, or so large that what is computed from it would be.
    """


class DivergedError(ValueError):
    """
    What the networks compute is not finite any more.

    :param what: is not finite, as a clause
    """

    def __init__(self, what: str):
        super().__init__(
            f"Training has diverged: {what}. Go on from an earlier checkpoint, with lower learning rates or smaller "
            "observations and rewards."
        )


def subspaces_of(space: spaces.Space) -> dict[Any, spaces.Space]:
    """
    :param space: an observation space
    :return: its parts if it is a Dict, else itself under None
    """
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {None: space}


def _where(key: Any) -> str:
    return "" if key is None else f" under {key!r}"


def check_type(value: np.ndarray, name: str, key: Any = None) -> None:
    """
    :param value: of all environments, (n_envs, ...)
    :param name: what it is
    :param key: of an observation that is a dict
    :raises BadValueError: if these are not numbers
    """
    if value.dtype.kind not in "biuf":
        raise BadValueError(f"The environments gave {name}s of the type {value.dtype}{_where(key)}, which are not numbers")


def check_range(value: np.ndarray, name: str, largest: float, key: Any = None) -> None:
    """
    :param value: of all environments, (n_envs, ...)
    :param name: what it is
    :param largest: largest absolute value
    :param key: of an observation that is a dict
    :raises NonFiniteError: if a number is infinite, not a number, or larger
    """
    if value.dtype.kind == "b" or not value.size:
        return
    is_float = value.dtype.kind == "f"
    # As a number of the same type: 1e30 is not quite the float32 of that name
    bound = min(largest, float((np.finfo if is_float else np.iinfo)(value.dtype).max))
    if not is_float and bound < largest:
        return
    # Neither is true of what is not a number
    if value.max() <= bound and value.min() >= -bound:
        return
    index = tuple(np.argwhere(~((value >= -bound) & (value <= bound)))[0])
    beyond = f" (the largest allowed is {largest:g})" if np.isfinite(value[index]) else ""
    raise NonFiniteError(f"Environment {index[0]} gave the {name} {value[index]}{_where(key)}{beyond}")


class ObservationChecks:
    """
    The checks of the observations of a space.

    :param space: the observation space
    :param n_envs: number of environments
    """

    def __init__(self, space: spaces.Space, n_envs: int):
        self._parts = []
        for key, part in subspaces_of(space).items():
            shape = (n_envs, *part.shape)  # type: ignore[misc]
            # Discrete ones may stand in a column
            self._parts.append((key, part, shape, (n_envs, *get_obs_shape(part))))

    def check_form(self, obs: np.ndarray | dict[str, np.ndarray], name: str = "observation") -> None:
        """
        :param obs: of all environments, (n_envs, ...) or a dict of these
        :param name: what the observations are
        :raises BadValueError: if the shape is not that of the space, or if they are not numbers
        """
        for key, _, shape, column in self._parts:
            value = obs[key] if isinstance(obs, dict) else obs
            if value.shape not in (shape, column):
                raise BadValueError(f"The environments gave {name}s of the shape {value.shape}{_where(key)}, not {shape}")
            check_type(value, name, key)

    def check(self, obs: np.ndarray | dict[str, np.ndarray], name: str = "observation") -> None:
        """
        :param obs: of all environments, (n_envs, ...) or a dict of these
        :param name: what the observations are
        :raises NonFiniteError: if a number is infinite, not a number, or too large
        :raises BadValueError: if the shape is not that of the space, or an integer stands for no value of the space
        """
        self.check_form(obs, name)
        for key, part, *_ in self._parts:
            value = obs[key] if isinstance(obs, dict) else obs
            check_range(value, name, LARGEST_OBSERVATION, key)
            if isinstance(part, (spaces.Discrete, spaces.MultiDiscrete)):
                # Out of range they would be the index of another value, or of none
                size = part.n if isinstance(part, spaces.Discrete) else part.nvec
                fine = (value >= part.start) & (value < part.start + size)
                if not fine.all():
                    index = tuple(np.argwhere(~fine)[0])
                    given = f"{value[index]}{_where(key)}"
                    raise BadValueError(f"Environment {index[0]} gave the {name} {given}, which is not in {part}")


def check_vec_normalize(env: VecNormalize | None) -> None:
    """
    :param env: the ``VecNormalize`` of the environments, if there is one
    :raises ValueError: if the statistics of ``VecNormalize`` would make all that it normalises not a number
    """
    if env is None or not env.training:
        return
    statistics = [env.ret_rms] if env.norm_reward else []
    if env.norm_obs:
        statistics += list(env.obs_rms.values()) if isinstance(env.obs_rms, dict) else [env.obs_rms]
    if not all(np.isfinite(value).all() for rms in statistics for value in (rms.mean, rms.var)):
        raise ValueError(
            "The running statistics of VecNormalize are not finite, as an observation or a reward was not: continue with "
            "statistics that were saved before (VecNormalize.load), or with a new VecNormalize, through set_env."
        )


def count_env_steps(env: VecEnv) -> list[int] | None:
    """
    :param env: the environments
    :return: steps of each environment since it was made, whoever took them; None if no ``Monitor`` counts them
    """
    try:
        return env.get_attr("total_steps") if all(env.env_is_wrapped(Monitor)) else None
    except Exception:  # a dead worker, say, which is reported by the next step
        return None


def explain_dead_worker(env: VecEnv | None, error: BaseException, step: int) -> None:
    """
    :param env: the environments
    :param error: raised by one of them
    :param step: of the model
    :raises RuntimeError: if it comes from a pipe to a process that has ended, of which it says nothing
    """
    if env is None or not isinstance(error, (EOFError, ConnectionError)):
        return
    processes = getattr(env.unwrapped, "processes", [])
    for process in processes:
        process.join(timeout=0.1)  # its pipe is closed a moment before it has ended
    dead = [i for i, process in enumerate(processes) if not process.is_alive()]
    if dead:
        raise RuntimeError(
            f"The process of environment {dead[0]} ended at step {step}, with exit code "
            f"{processes[dead[0]].exitcode}: see its output, or run the environment in a DummyVecEnv, for the reason. The "
            "replay buffer holds the transitions before it; continue with new environments through set_env."
        ) from error
