"""
Atari games (Bellemare et al. 2013, arXiv 1207.4708) as recommended by Machado et al. (2018, arXiv 1709.06009).
"""

from copy import deepcopy
from typing import Any, NoReturn

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

_INSTALL = 'run `pip install "sb3-mrq[atari]"`'


class AtariWrapper(gym.Wrapper, RecordConstructorArgs):
    """
    Preprocessing of an Atari game. Every action is repeated 4 times. A frame is the maximum of the last 2 raw frames, in
    greyscale, resized to 84x84 by area interpolation. The last 4 frames are stacked, oldest first. Rewards are not clipped,
    and episodes neither begin with random no-ops nor end with the loss of a life.

    The emulator's own frame skip is turned off. Everything else is left to the environment: ``ALE/*-v5`` has sticky actions
    with a probability of 0.25, the minimal action set, and episodes of at most 108,000 raw frames, 27,000 steps. A ``Monitor``
    inside this wrapper counts raw frames as steps. As in gymnasium's ``AtariPreprocessing``, the last observation of an
    episode does not include its last raw frame.

    :param env: an environment of ale-py, with or without wrappers; its observations become uint8 (4, 84, 84)
    :raises TypeError: if it is not an environment of ale-py with unmodified images
    """

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        emulator: Any = env.unwrapped
        if not hasattr(emulator, "ale") or not hasattr(emulator, "_frameskip"):
            raise TypeError(f"AtariWrapper is for the Atari environments of ale-py, such as ALE/Pong-v5, not for {env}.")
        if getattr(emulator, "_obs_type", None) == "ram":
            raise TypeError(f"AtariWrapper needs image observations, but {env} has obs_type='ram'. Use obs_type='rgb'.")
        if env.observation_space.shape != emulator.observation_space.shape:
            raise TypeError(
                f"AtariWrapper needs the frames of the emulator, but {env} changes them. Apply AtariWrapper before it."
            )
        emulator._frameskip = 1
        if hasattr(emulator, "_ezpickle_kwargs"):
            emulator._ezpickle_kwargs["frameskip"] = 1  # a pickled emulator is recreated from these
        self._inner_spec = env.spec
        try:
            env = AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
        except DependencyNotInstalled as error:
            raise DependencyNotInstalled(f"OpenCV is not installed: {_INSTALL}.") from error
        gym.Wrapper.__init__(self, FrameStackObservation(env, 4))
        self.metadata = env.metadata | {"render_fps": 15}  # 60 raw frames per second

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """Specification of the environment with this wrapper, without the two inner wrappers that it creates."""
        if self._cached_spec is None and self._inner_spec is not None:
            self._cached_spec = deepcopy(self._inner_spec)
            self._cached_spec.additional_wrappers += (self.wrapper_spec(),)
        return self._cached_spec


def AtariEnvNotInstalled(**kwargs: Any) -> NoReturn:
    """
    Entry point of the Atari games if ale-py is not installed. rl-zoo3 recognises them by "AtariEnv".

    :param kwargs: ignored
    :raises DependencyNotInstalled: always
    """
    raise DependencyNotInstalled(f"The Atari games are not installed: {_INSTALL}.")
