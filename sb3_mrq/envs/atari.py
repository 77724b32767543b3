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
    Preprocess an Atari game: every action is repeated 4 times, a frame is the maximum of the last 2 raw ones, grey, resized to
    84x84 by area, and the last 4 frames are stacked, oldest first. Rewards are not clipped, and episodes neither begin with
    random no-ops nor end with a life.

    The emulator's own frame skip is turned off, whatever it was. Everything else is left to the environment: ``ALE/*-v5`` has
    sticky actions with a probability of 0.25, the minimal set of actions, and at most 108,000 raw frames, 27,000 steps, in an
    episode. A ``Monitor`` inside of this wrapper counts raw frames as steps. As in gymnasium's ``AtariPreprocessing``, an
    observation with which an episode ends misses the raw frame of that end.

    :param env: an environment of ale-py, with or without wrappers; its observations become uint8 (4, 84, 84)
    :raises TypeError: if that is not what it is
    """

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        emulator: Any = env.unwrapped
        if not hasattr(emulator, "ale") or not hasattr(emulator, "_frameskip"):
            raise TypeError(f"AtariWrapper is for the Atari environments of ale-py, such as ALE/Pong-v5, not for {env}")
        if getattr(emulator, "_obs_type", None) == "ram":
            raise TypeError(f"AtariWrapper needs an environment with images as observations, not {env} with obs_type='ram'")
        if env.observation_space.shape != emulator.observation_space.shape:
            raise TypeError(f"AtariWrapper takes the frames of the emulator, but {env} has changed them already")
        emulator._frameskip = 1
        if hasattr(emulator, "_ezpickle_kwargs"):
            emulator._ezpickle_kwargs["frameskip"] = 1  # a pickled emulator is made again with these
        self._inner_spec = env.spec
        try:
            env = AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
        except DependencyNotInstalled as error:
            raise DependencyNotInstalled(f"OpenCV is not installed: {_INSTALL}") from error
        gym.Wrapper.__init__(self, FrameStackObservation(env, 4))
        self.metadata = env.metadata | {"render_fps": 15}  # of 60 raw frames a second

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """Specification of the environment with this wrapper, but without the two inside, which it makes itself."""
        if self._cached_spec is None and self._inner_spec is not None:
            self._cached_spec = deepcopy(self._inner_spec)
            self._cached_spec.additional_wrappers += (self.wrapper_spec(),)
        return self._cached_spec


def AtariEnvNotInstalled(**kwargs: Any) -> NoReturn:
    """
    Stands for the Atari games where ale-py is not installed, "AtariEnv" being what rl-zoo3 tells them by.

    :param kwargs: ignored
    :raises DependencyNotInstalled: always
    """
    raise DependencyNotInstalled(f"The Atari games are not installed: {_INSTALL}")
