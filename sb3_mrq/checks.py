"""
Checks of what environments return: numbers, in the shape of the space, not too large for float32.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

# Largest absolute values that do not overflow float32 later: layer normalisation squares sums over an observation, and returns
# are sums of rewards
LARGEST_OBSERVATION = 1e18
LARGEST_REWARD = 1e30


class BadValueError(ValueError):
    """
    An environment returned an observation or a reward that cannot be used for training.

    :param fault: what the environment returned, as a sentence without a full stop
    :param step: number of timesteps of the model at that time, None if unknown
    """

    def __init__(self, fault: str, step: int | None = None):
        super().__init__(fault, step)
        self.fault = fault
        self.step = step

    def __str__(self) -> str:
        remedy = "Training cannot continue with this: fix the environment, or clip what it returns."
        if self.step is None:
            return f"{self.fault}. {remedy}"
        return f"{self.fault} at step {self.step}. {remedy} The replay buffer holds the transitions before this step."


class NonFiniteError(BadValueError):
    """
    An observation or a reward is infinite, NaN, or so large that computations with it would overflow.
    """


class DivergedError(ValueError):
    """
    Training has diverged: outputs or weights of the networks are not finite.

    :param what: what is not finite, as a clause
    """

    def __init__(self, what: str):
        super().__init__(
            f"Training has diverged: {what}. Continue from an earlier checkpoint, with lower learning rates or smaller "
            "observations and rewards."
        )


def subspaces_of(space: spaces.Space) -> dict[Any, spaces.Space]:
    """
    :param space: an observation space
    :return: the subspaces of a Dict by key, or a dict with the space itself under None
    """
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {None: space}


def _where(key: Any) -> str:
    return "" if key is None else f" under {key!r}"


def to_array(value: Any, name: str, key: Any = None) -> np.ndarray:
    """
    :param value: what the environments gave, (n_envs, ...): an array, a tensor, or a list of numbers, arrays or tensors
    :param name: what it is
    :param key: of an observation that is a dict
    :return: a copy as an array, which the environments cannot write to
    :raises BadValueError: if it cannot be an array of numbers
    """
    try:
        is_tensor = not isinstance(value, np.ndarray) and isinstance(value, th.Tensor)
        array = np.array(value.detach().cpu().numpy() if is_tensor else value)
        if array.dtype.kind in "biuf":
            return array
    except (TypeError, ValueError, RuntimeError):
        # Lists of different lengths, tensors of a type that NumPy lacks
        pass
    kind = value.dtype if isinstance(value, (np.ndarray, th.Tensor)) else type(value).__name__
    raise BadValueError(f"The environments gave {name}s of the type {kind}{_where(key)}, which are not arrays of numbers")


def copy_observation(obs: Any, space: spaces.Space) -> Any:
    """
    :param obs: of all environments, see ``to_array``, or a dict of these
    :param space: the observation space
    :return: a copy as arrays, which the environments cannot write to
    :raises BadValueError: if it cannot be that
    """
    if not isinstance(space, spaces.Dict):
        return to_array(obs, "observation")
    if not isinstance(obs, Mapping) or not space.spaces.keys() <= obs.keys():
        given = f"the keys {', '.join(map(repr, obs))}" if isinstance(obs, Mapping) else f"the type {type(obs).__name__}"
        raise BadValueError(f"The environments gave observations of {given}, not a dict with {', '.join(map(repr, space))}")
    return {key: to_array(obs[key], "observation", key) for key in space.spaces}


def copy_first_observation(obs: Any, space: spaces.Space, step: int) -> Any:
    """
    :param obs: what ``reset`` of the environments returned
    :param space: the observation space
    :param step: of the model
    :return: a copy as arrays, which the environments cannot write to
    :raises BadValueError: if it cannot be that
    :raises TypeError: if ``reset`` also returned infos
    """
    if isinstance(obs, tuple) and len(obs) == 2 and isinstance(obs[1], (dict, list)):
        raise TypeError(
            "The VecEnv returned a tuple (observations, infos) from reset, as environments of gymnasium do. A VecEnv of "
            "Stable-Baselines3 returns the observations alone, and keeps the infos in its attribute reset_infos."
        )
    try:
        return copy_observation(obs, space)
    except BadValueError as error:
        raise type(error)(error.fault, step) from None


def check_type(value: np.ndarray, name: str, key: Any = None) -> None:
    """
    :param value: observations or rewards of all environments, (n_envs, ...)
    :param name: name of the value, for the message
    :param key: key of the observation in a Dict
    :raises BadValueError: if the value is not numeric
    """
    if value.dtype.kind not in "biuf":
        raise BadValueError(f"The environments gave {name}s of the type {value.dtype}{_where(key)}, which are not numbers")


def check_range(value: np.ndarray, name: str, largest: float, key: Any = None) -> None:
    """
    :param value: observations or rewards of all environments, (n_envs, ...)
    :param name: name of the value, for the message
    :param largest: largest allowed absolute value
    :param key: key of the observation in a Dict
    :raises NonFiniteError: if a number is infinite, NaN or too large
    """
    if value.dtype.kind == "b" or not value.size:
        return
    is_float = value.dtype.kind == "f"
    # In the dtype of the value: 1e30 is not exactly a float32
    bound = min(largest, float((np.finfo if is_float else np.iinfo)(value.dtype).max))
    if not is_float and bound < largest:
        return
    # Both comparisons are false for NaN
    if value.max() <= bound and value.min() >= -bound:
        return
    index = tuple(np.argwhere(~((value >= -bound) & (value <= bound)))[0])
    beyond = f" (the largest allowed is {largest:g})" if np.isfinite(value[index]) else ""
    raise NonFiniteError(f"Environment {index[0]} gave the {name} {value[index]}{_where(key)}{beyond}")


def in_discrete_range(value: np.ndarray, space: spaces.Discrete | spaces.MultiDiscrete) -> np.ndarray:
    """
    :param value: numbers of the space, (..., *shape)
    :param space: the space
    :return: whether each number is in its range, bool of the same shape
    """
    size = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return (value >= space.start) & (value < space.start + size)


class ObservationChecks:
    """
    Checks of observations against their space.

    :param space: the observation space
    :param n_envs: number of environments
    """

    def __init__(self, space: spaces.Space, n_envs: int):
        self._parts = []
        for key, part in subspaces_of(space).items():
            shape = (n_envs, *part.shape)  # type: ignore[misc]
            # Discrete observations may have an additional axis of size 1
            self._parts.append((key, part, shape, (n_envs, *get_obs_shape(part))))

    def check_form(self, obs: np.ndarray | dict[str, np.ndarray], name: str = "observation") -> None:
        """
        Check shape and type only.

        :param obs: observations of all environments, (n_envs, ...) or a dict of these
        :param name: name of the observations, for the message
        :raises BadValueError: if the shape does not match the space, or if the observations are not numeric
        """
        for key, _, shape, column in self._parts:
            value = obs[key] if isinstance(obs, dict) else obs
            if value.shape not in (shape, column):
                raise BadValueError(f"The environments gave {name}s of the shape {value.shape}{_where(key)}, not {shape}")
            check_type(value, name, key)

    def check(self, obs: np.ndarray | dict[str, np.ndarray], name: str = "observation") -> None:
        """
        Check shape, type and values.

        :param obs: observations of all environments, (n_envs, ...) or a dict of these
        :param name: name of the observations, for the message
        :raises NonFiniteError: if a number is infinite, NaN or too large
        :raises BadValueError: if shape or type do not match the space, or if a discrete observation is not in the space
        """
        self.check_form(obs, name)
        for key, part, *_ in self._parts:
            value = obs[key] if isinstance(obs, dict) else obs
            check_range(value, name, LARGEST_OBSERVATION, key)
            if isinstance(part, (spaces.Discrete, spaces.MultiDiscrete)):
                # As an index of a one-hot vector, a value out of range would be another value, or an error
                valid = in_discrete_range(value, part)
                if not valid.all():
                    index = tuple(np.argwhere(~valid)[0])
                    given = f"{value[index]}{_where(key)}"
                    raise BadValueError(f"Environment {index[0]} gave the {name} {given}, which is not in {part}")


class FinalObservationChecks:
    """
    Warns if ``reset`` seems to write over the final observations: if the final observations of several episodes in a row are
    all different, and equal the first observations after them.
    """

    N_EPISODES = 3

    def __init__(self) -> None:
        # First observations that equal the final ones before them, None once it is known that these are copies, or not
        self._suspicious: set[bytes] | None = set()

    def compare(self, final_obs: Any, obs: Any, i: int) -> None:
        """
        :param final_obs: final observation of an episode, or a dict of parts
        :param obs: of all environments, with the first one of the next episode, (n_envs, ...) or a dict of these
        :param i: index of the environment
        """
        if self._suspicious is None:
            return
        pairs = [(obs[key][i], final_obs[key]) for key in obs] if isinstance(obs, dict) else [(obs[i], final_obs)]
        if any((first != np.asarray(final).astype(first.dtype).reshape(first.shape)).any() for first, final in pairs):
            self._suspicious = None
            return
        self._suspicious.add(b"".join(first.tobytes() for first, _ in pairs))
        if len(self._suspicious) == self.N_EPISODES:
            self._suspicious = None
            warnings.warn(
                f"The final observations of {self.N_EPISODES} episodes equal the first ones of the next episodes. The "
                "environment probably returns an array of its own, and its reset writes to that before the final observation "
                "is stored. Make copies inside of the VecEnv by the wrapper sb3_mrq.envs.CopyObservation, as in "
                "make_vec_env(env, wrapper_class=CopyObservation). If reset really goes on where the episode has ended, "
                "ignore this warning.",
                stacklevel=2,
            )


def check_vec_normalize(env: VecNormalize | None) -> None:
    """
    :param env: the ``VecNormalize`` of the environments, None if there is none
    :raises ValueError: if its running statistics are not finite, so that normalised values would be NaN
    """
    if env is None or not env.training:
        return
    statistics = [env.ret_rms] if env.norm_reward else []
    if env.norm_obs:
        statistics += list(env.obs_rms.values()) if isinstance(env.obs_rms, dict) else [env.obs_rms]
    if not all(np.isfinite(value).all() for rms in statistics for value in (rms.mean, rms.var)):
        raise ValueError(
            "The running statistics of VecNormalize are not finite, because an observation or a reward was not. Load "
            "statistics that were saved before (VecNormalize.load) or create a new VecNormalize, and pass it to set_env."
        )


def count_env_steps(env: VecEnv) -> list[int] | None:
    """
    :param env: the environments
    :return: number of steps of each environment since its creation, None if it is not wrapped in ``Monitor``
    """
    try:
        return env.get_attr("total_steps") if all(env.env_is_wrapped(Monitor)) else None
    except Exception:  # for example a dead worker process, which the next step reports
        return None


def explain_dead_worker(env: VecEnv | None, error: BaseException, step: int) -> None:
    """
    Raise an error that names the environment if its worker process has died. The error of the broken pipe does not.

    :param env: the environments
    :param error: error raised by one of them
    :param step: number of timesteps of the model
    :raises RuntimeError: if the process of an environment has died
    """
    if env is None or not isinstance(error, (EOFError, ConnectionError)):
        return
    processes = getattr(env.unwrapped, "processes", [])
    for process in processes:
        process.join(timeout=0.1)  # the pipe is closed shortly before the process ends
    dead = [i for i, process in enumerate(processes) if not process.is_alive()]
    if dead:
        raise RuntimeError(
            f"The process of environment {dead[0]} ended at step {step} with exit code {processes[dead[0]].exitcode}. To "
            "find the reason, see its output or run the environment in a DummyVecEnv. The replay buffer holds the transitions "
            "before this step. To continue, pass new environments to set_env."
        ) from error
