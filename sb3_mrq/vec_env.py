"""
Environments as Stable-Baselines3's ``VecEnv``: single ones whose observations are copied, and gymnasium's vectorised ones.
"""

import importlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_mrq.checks import copy_observation, to_array
from sb3_mrq.observations import map_observation

# Namespaces of the ids that importing sb3_mrq.envs registers
OWN_NAMESPACES = ("dmc/", "dmc-visual/", "ALE/")


def make_env(env: Any, verbose: int = 0) -> Any:
    """
    :param env: an environment, or an id; the ids of :mod:`sb3_mrq.envs` are registered first
    :param verbose: Verbosity level: 0 for no output, 1 for indicating if environment is created
    :return: the environment
    :raises gymnasium.error.UnregisteredEnv: if the id is not registered
    """
    if not isinstance(env, str) or not env.startswith(OWN_NAMESPACES):
        return maybe_make_env(env, verbose)
    # Not at the top: models in other environments need neither ale-py nor the registration
    importlib.import_module("sb3_mrq.envs")
    try:
        return maybe_make_env(env, verbose)
    except gym.error.UnregisteredEnv as error:
        raise type(error)(
            f"{error} The ids are listed in sb3_mrq.envs.BENCHMARK_TASKS. In gymnasium.make, make_vec_env and workers of "
            "SubprocVecEnv they need the name of the package: sb3_mrq.envs:dmc/walker-walk-v0."
        ) from None


class CopyObservation(gym.ObservationWrapper, RecordConstructorArgs):
    """
    Copy each observation. For environments that return an array of their own, such as ``self.state``, and write to it later:
    ``reset`` would overwrite the final observation of an episode before a ``VecEnv`` passes it on, and a
    ``FrameStackObservation`` would hold the same frame several times.

    :param env: the environment
    """

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)

    def observation(self, observation: Any) -> Any:
        return np.array(observation) if isinstance(observation, np.ndarray) else deepcopy(observation)


class CopyingDummyVecEnv(DummyVecEnv):
    """
    A ``DummyVecEnv`` that copies the observations of its environments, see :class:`CopyObservation`. ``envs`` are the
    environments as they were given, so that callbacks find the wrappers and attributes that they know.

    :param env_fns: functions that return the environments
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]):
        super().__init__(env_fns)
        self._copying: list[gym.Env] = [CopyObservation(env) for env in self.envs]

    def step_wait(self) -> VecEnvStepReturn:
        envs = self.envs
        self.envs = self._copying
        try:
            return super().step_wait()
        finally:
            self.envs = envs


def copy_observations_of(env: VecEnv) -> CopyingDummyVecEnv:
    """
    :param env: a ``DummyVecEnv`` of one environment, with or without wrappers
    :return: one that copies the observations of the same environment, without wrappers
    """
    single_env = env.unwrapped.envs[0]  # type: ignore[attr-defined]
    return CopyingDummyVecEnv([lambda: single_env])


class GymnasiumVecEnv(VecEnv):
    """
    A vectorised environment of gymnasium, as from ``gymnasium.make_vec``, as a ``VecEnv`` of Stable-Baselines3.

    At the end of an episode a ``VecEnv`` returns the first observation of the next one, and the final one in the infos.
    Environments with the autoreset mode SAME_STEP return both. With NEXT_STEP, those whose episodes have ended are reset at
    once, which ``SyncVectorEnv`` and ``AsyncVectorEnv`` can do, or any environment if there is only one.

    :param env: the vectorised environment
    :raises ValueError: if it does not reset its environments, or not those alone whose episodes have ended
    """

    def __init__(self, env: VectorEnv):
        self._resets_in_same_step = _resets_in_same_step(env)
        self.env: Any = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: np.ndarray | None = None

    def reset(self) -> Any:
        if any(options != self._options[0] for options in self._options):
            raise ValueError("The environments of gymnasium's VectorEnv take the same options: pass one dict to set_options.")
        obs, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = _split_infos(infos, self.num_envs)
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return copy_observation(obs, self.observation_space)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        given, rewards, terminations, truncations, given_infos = self.env.step(self._actions)
        obs: Any = copy_observation(given, self.observation_space)
        infos = _split_infos(given_infos, self.num_envs)
        terminated, truncated = (to_array(value, "done").astype(bool) for value in (terminations, truncations))
        dones = terminated | truncated
        ended = np.flatnonzero(dones)
        if self._resets_in_same_step:
            for i in ended:
                final_obs, final_info = infos[i].pop("final_obs", None), infos[i].pop("final_info", {})
                self.reset_infos[i] = infos[i]
                infos[i] = infos[i] | final_info | {"terminal_observation": final_obs}
        elif len(ended):
            for i in ended:
                infos[i]["terminal_observation"] = map_observation(lambda value, i=i: np.array(value[i]), obs)
            first, first_infos = self.env.reset(options=None if dones.all() else {"reset_mask": dones.copy()})
            first = copy_observation(first, self.observation_space)
            obs = map_observation(lambda value, other: _put(value, ended, other[ended]), obs, first)
            reset_infos = _split_infos(first_infos, self.num_envs)
            for i in ended:
                self.reset_infos[i] = reset_infos[i]
        for info, cut in zip(infos, truncated & ~terminated, strict=True):
            info["TimeLimit.truncated"] = bool(cut)
        return obs, to_array(rewards, "reward").astype(np.float32), dones, infos

    def close(self) -> None:
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self.env.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        if attr_name == "render_mode":
            values: Sequence[Any] = [self.env.render_mode] * self.num_envs
        elif isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
            values = self.env.unwrapped.get_attr(attr_name)
        else:
            values = [getattr(self.env.unwrapped, attr_name)] * self.num_envs
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._require_all(indices).set_attr(attr_name, [value] * self.num_envs)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        return list(self._require_all(indices).call(method_name, *method_args, **method_kwargs))

    def _require_all(self, indices: VecEnvIndices) -> Any:
        if list(self._get_indices(indices)) != list(range(self.num_envs)):
            raise NotImplementedError(
                f"{self.env} sets attributes and calls methods of all environments only, not of {indices}."
            )
        return self.env.unwrapped

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        if not isinstance(self.env.unwrapped, SyncVectorEnv):
            return [False for _ in self._get_indices(indices)]
        return [is_wrapped(self.env.unwrapped.envs[i], wrapper_class) for i in self._get_indices(indices)]


def from_vector_env(env: VectorEnv, verbose: int, monitor_wrapper: bool) -> VecEnv:
    """
    :param env: a vectorised environment of gymnasium
    :param verbose: Verbosity level: 0 for no output, 1 for indicating wrappers used
    :param monitor_wrapper: whether to count returns and lengths of episodes in a ``VecMonitor``
    :return: the same as a ``VecEnv``
    :raises ValueError: if it cannot be one, see :class:`GymnasiumVecEnv`
    """
    if verbose >= 1:
        print("Wrapping the env in a GymnasiumVecEnv.")
    vec_env = GymnasiumVecEnv(env)
    return VecMonitor(vec_env) if monitor_wrapper else vec_env


def _split_infos(infos: Any, n_envs: int) -> list[dict[str, Any]]:
    """
    :param infos: infos of all environments: arrays by key, the array of ``_key`` telling which environments have them
    :param n_envs: number of environments
    :return: the infos of each environment
    """
    if isinstance(infos, list):
        return infos  # of gymnasium's DictInfoToList
    split: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        if isinstance(values, dict):
            values = _split_infos(values, n_envs)
        elif not hasattr(values, "__len__") or len(values) != n_envs:
            values = [values] * n_envs
        for info, value, given in zip(split, values, infos.get(f"_{key}", [True] * n_envs), strict=True):
            if given:
                info[key] = value
    return split


def _put(value: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
    value[indices] = rows
    return value


def _resets_in_same_step(env: VectorEnv) -> bool:
    """
    :param env: a vectorised environment
    :return: whether it resets in the step with which an episode ends; if not, in the step after
    :raises ValueError: if it does neither, or if a ``VecEnv`` cannot be made of it
    """
    try:
        from gymnasium.vector import AutoresetMode
    except ImportError:
        raise ValueError(
            f"{env} is a VectorEnv, which needs gymnasium 1.1 or later, as earlier versions do not tell when environments are "
            f"reset. This is {gym.__version__}. Upgrade gymnasium, or use make_vec_env of Stable-Baselines3."
        ) from None
    mode = env.metadata.get("autoreset_mode")
    remedy = "Make it by gymnasium.make_vec(id, num_envs, vectorization_mode='sync' or 'async')."
    if mode in (AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value):
        return True
    if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.NEXT_STEP.value):
        raise ValueError(
            f"{env} has the autoreset mode {mode}, with which episodes do not end with a final observation and a reset. "
            f"NEXT_STEP and SAME_STEP can be used. {remedy}"
        )
    layers: list[Any] = [env]
    while isinstance(layers[-1], VectorWrapper):
        layers.append(layers[-1].env)
    base = layers[-1]
    if isinstance(base, AsyncVectorEnv) and not base.shared_memory:
        # After a reset that it was asked for, it resets again in the next step
        raise ValueError(f"{env} has the autoreset mode NEXT_STEP without shared memory: set shared_memory=True.")
    unable = [layer for layer in layers if isinstance(layer, (NormalizeObservation, NormalizeReward))]
    if not isinstance(base, (SyncVectorEnv, AsyncVectorEnv)):
        unable.append(base)
    if unable and env.num_envs > 1:
        raise ValueError(
            f"{unable[0]} has the autoreset mode NEXT_STEP and cannot reset only the environments whose episodes have ended, "
            f"as a VecEnv does. {remedy} Use VecNormalize in place of NormalizeObservation and NormalizeReward."
        )
    return False
