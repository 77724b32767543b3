"""
The DeepMind Control suite (Tassa et al. 2018, arXiv 1801.00690), through shimmy, with the paper's preprocessing.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import FrameStackObservation, HumanRendering

from sb3_mrq.envs import rendering
from sb3_mrq.envs.wrappers import ActionRepeat, FlattenObservation, ReshapeObservation

rendering.choose_backend()
try:
    from dm_control import suite
    from dm_control.rl.control import PhysicsError
    from shimmy.dm_control_compatibility import DmControlCompatibilityV0
except ModuleNotFoundError as error:
    on_python = " on Python 3.12 or older, which dm_control needs" if sys.version_info >= (3, 13) else ""
    raise DependencyNotInstalled(
        f'The DeepMind Control suite is not installed: run `pip install "sb3-mrq[dmc]"`{on_python}.'
    ) from error
except (ImportError, AttributeError, RuntimeError) as error:
    # Raised by dm_control and PyOpenGL if the library named by MUJOCO_GL does not work
    raise rendering.rendering_error() from error

ACTION_REPEAT = 2
IMAGE_SIZE = 84
STACK_SIZE = 3
# Height and width of rendered frames, within the off-screen buffer of every model of the suite
FRAME_SIZE = 480


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Suppress MuJoCo's messages, logged by dm_control, about deprecated features in the suite's own models."""

    def is_not_deprecation(record: logging.LogRecord) -> bool:
        return "deprecated" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_not_deprecation)
    try:
        yield
    finally:
        logger.removeFilter(is_not_deprecation)


class DMControlEnv(DmControlCompatibilityV0):
    """
    A task of the DeepMind Control suite. Episodes never terminate and are only truncated by ``TimeLimit``. If the simulation
    diverges and dm_control raises an exception, the episode is truncated with the previous observation, no reward, and the
    message in ``info["physics_error"]``.

    Pickle and deepcopy preserve the whole state, including the random generator.

    As in shimmy, ``np_random`` is a ``RandomState``, from which dm_control draws. Seeds are taken modulo ``2**32``.

    :param domain: name of the domain, such as ``walker``
    :param task: name of the task, such as ``walk``
    :param render_mode: ``rgb_array`` to render uint8 images (480, 480, 3), or None
    """

    def __init__(self, domain: str, task: str, render_mode: str | None = None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None, 'human' or 'rgb_array', not {render_mode!r}.")
        with _without_deprecations():
            env = suite.load(domain, task, task_kwargs={"time_limit": float("inf")})
        # shimmy's metadata is shared by the class and has a wrong frame rate. "human" is for HumanRendering.
        self.metadata = {"render_modes": ["human", "rgb_array"]}
        super().__init__(env, render_mode)
        self.metadata["render_fps"] = 1 / env.control_timestep()
        # float64 in dm_control, but models act in float32, and Stable-Baselines3 warns about other types
        low, high = (np.asarray(bound, dtype=np.float32) for bound in (env.action_spec().minimum, env.action_spec().maximum))
        self.action_space: spaces.Box = spaces.Box(low, high)
        self.camera = 2 if domain == "quadruped" else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _keep(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # A copy: dm_control may overwrite its arrays in the next step
        self._last_obs = {key: np.array(value) for key, value in obs.items()}
        return obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        # rl-zoo3 adds to the seed, which may exceed the limit
        obs, info = super().reset(seed=None if seed is None else seed % 2**32, options=options)
        return self._keep(obs), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        try:
            obs, reward, _, _, info = super().step(action)
        except PhysicsError as error:
            if not np.isfinite(action).all():
                raise
            gym.logger.warn(f"The simulation diverged, so the episode is truncated: {error}")
            return self._last_obs, 0.0, False, True, {"physics_error": str(error)}
        return self._keep(obs), float(reward), False, False, info

    def pixels(self, size: int) -> np.ndarray:
        """
        :param size: height and width
        :return: image of the task's camera, uint8 (size, size, 3)
        :raises RuntimeError: if MuJoCo cannot render here
        """
        self.check_rendering()
        return self._env.physics.render(size, size, camera_id=self.camera)

    def check_rendering(self) -> None:
        """
        :raises RuntimeError: if MuJoCo cannot render here
        """
        try:
            _ = self._env.physics.contexts  # created on first access
        except Exception as error:  # its type depends on backend and cause
            raise rendering.rendering_error() from error

    def render(self) -> np.ndarray | None:
        return self.pixels(FRAME_SIZE) if self.render_mode == "rgb_array" else None


class PixelObservation(gym.ObservationWrapper, RecordConstructorArgs):
    """
    Replace observations of the state by images of the camera. Each observation is rendered once.

    :param env: a :class:`DMControlEnv`, with or without wrappers
    :param size: height and width of the uint8 images (3, size, size)
    :raises RuntimeError: if MuJoCo cannot render here
    """

    def __init__(self, env: gym.Env, size: int):
        RecordConstructorArgs.__init__(self, size=size)
        gym.ObservationWrapper.__init__(self, env)
        self.size = size
        self.observation_space = spaces.Box(0, 255, (3, size, size), dtype=np.uint8)
        self._task.check_rendering()

    @property
    def _task(self) -> Any:
        return self.unwrapped

    def observation(self, observation: Any) -> np.ndarray:
        return self._task.pixels(self.size).transpose(2, 0, 1)


def _make(domain: str, task: str, render_mode: str | None) -> gym.Env:
    # HumanRendering implements "human". It works with any backend, and shows one frame per agent step.
    return ActionRepeat(DMControlEnv(domain, task, "rgb_array" if render_mode == "human" else render_mode), ACTION_REPEAT)


def _wrap_human_rendering(env: gym.Env, render_mode: str | None) -> gym.Env:
    return HumanRendering(env) if render_mode == "human" else env


def make_dmc(domain: str, task: str, render_mode: str | None = None) -> gym.Env:
    """
    :param domain: name of the domain, such as ``walker``
    :param task: name of the task, such as ``walk``
    :param render_mode: None, ``human`` or ``rgb_array``
    :return: the task with flat observations of the state, float64 (n,), and an action repeat of 2
    """
    return _wrap_human_rendering(FlattenObservation(_make(domain, task, render_mode)), render_mode)


def make_dmc_visual(domain: str, task: str, render_mode: str | None = None) -> gym.Env:
    """
    :param domain: name of the domain, such as ``walker``
    :param task: name of the task, such as ``walk``
    :param render_mode: None, ``human`` or ``rgb_array``; observations are rendered with any of them
    :return: the task with stacks of the last 3 images, oldest first, uint8 (9, 84, 84), and an action repeat of 2
    :raises RuntimeError: if MuJoCo cannot render here
    """
    env = FrameStackObservation(PixelObservation(_make(domain, task, render_mode), IMAGE_SIZE), STACK_SIZE)
    return _wrap_human_rendering(ReshapeObservation(env, (3 * STACK_SIZE, IMAGE_SIZE, IMAGE_SIZE)), render_mode)
