"""
The 118 tasks of the MR.Q paper as gymnasium environments with the paper's preprocessing.

Importing this package registers

- ``dmc/<domain>-<task>-v0``, 28 tasks of the DeepMind Control suite with flat observations of the state,
- ``dmc-visual/<domain>-<task>-v0``, the same tasks with stacked images,
- ``ALE/<Game>-v5``, if ale-py is installed. They are not preprocessed: wrap them in :class:`AtariWrapper`.

Gym's locomotion tasks need no preprocessing. Only gymnasium and ale-py are imported before an environment is made.
``MRQ("MlpPolicy", "dmc/walker-walk-v0")`` and ``gym.make("sb3_mrq.envs:dmc/walker-walk-v0")`` import the package themselves,
the latter also in the processes of a ``SubprocVecEnv``.
"""

import gymnasium as gym

from sb3_mrq.envs.atari import AtariWrapper
from sb3_mrq.envs.wrappers import ActionRepeat
from sb3_mrq.vec_env import CopyObservation, GymnasiumVecEnv

__all__ = [
    "ATARI_GAMES",
    "BENCHMARK_TASKS",
    "DMC_TASKS",
    "DMC_VISUAL_TASKS",
    "GYM_LOCOMOTION",
    "ActionRepeat",
    "AtariWrapper",
    "CopyObservation",
    "GymnasiumVecEnv",
]

# Agent steps per episode of the DeepMind Control suite: 1000 control steps, with every action repeated twice
_DMC_EPISODE = 500

_DMC = [
    ("acrobot", "swingup"),
    ("ball_in_cup", "catch"),
    ("cartpole", "balance"),
    ("cartpole", "balance_sparse"),
    ("cartpole", "swingup"),
    ("cartpole", "swingup_sparse"),
    ("cheetah", "run"),
    ("dog", "run"),
    ("dog", "stand"),
    ("dog", "trot"),
    ("dog", "walk"),
    ("finger", "spin"),
    ("finger", "turn_easy"),
    ("finger", "turn_hard"),
    ("fish", "swim"),
    ("hopper", "hop"),
    ("hopper", "stand"),
    ("humanoid", "run"),
    ("humanoid", "stand"),
    ("humanoid", "walk"),
    ("pendulum", "swingup"),
    ("quadruped", "run"),
    ("quadruped", "walk"),
    ("reacher", "easy"),
    ("reacher", "hard"),
    ("walker", "run"),
    ("walker", "stand"),
    ("walker", "walk"),
]

_ATARI = """
    Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk Bowling Boxing Breakout
    Centipede ChopperCommand CrazyClimber Defender DemonAttack DoubleDunk Enduro FishingDerby Freeway Frostbite Gopher
    Gravitar Hero IceHockey Jamesbond Kangaroo Krull KungFuMaster MontezumaRevenge MsPacman NameThisGame Phoenix Pitfall
    Pong PrivateEye Qbert Riverraid RoadRunner Robotank Seaquest Skiing Solaris SpaceInvaders StarGunner Surround Tennis
    TimePilot Tutankham UpNDown Venture VideoPinball WizardOfWor YarsRevenge Zaxxon
""".split()

#: ids of Gym's 5 locomotion tasks
GYM_LOCOMOTION = ("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Walker2d-v5")
#: ids of the 28 tasks of the DeepMind Control suite with observations of the state
DMC_TASKS = tuple(f"dmc/{domain}-{task}-v0" for domain, task in _DMC)
#: ids of the same 28 tasks with pixel observations
DMC_VISUAL_TASKS = tuple(f"dmc-visual/{domain}-{task}-v0" for domain, task in _DMC)
#: ids of the 57 Atari games
ATARI_GAMES = tuple(f"ALE/{game}-v5" for game in _ATARI)
#: ids of all 118 tasks
BENCHMARK_TASKS = (*GYM_LOCOMOTION, *DMC_TASKS, *DMC_VISUAL_TASKS, *ATARI_GAMES)


def _register() -> None:
    """Register missing ids only, as gymnasium warns about duplicates."""
    for ids, entry_point in ((DMC_TASKS, "make_dmc"), (DMC_VISUAL_TASKS, "make_dmc_visual")):
        for env_id, (domain, task) in zip(ids, _DMC, strict=True):
            if env_id not in gym.registry:
                gym.register(
                    id=env_id,
                    # A string, so that a process without this package imported can make the environment from its spec
                    entry_point=f"sb3_mrq.envs.dm_control:{entry_point}",
                    kwargs={"domain": domain, "task": task},
                    max_episode_steps=_DMC_EPISODE,
                )
    try:
        import ale_py
    except ImportError:
        for env_id in ATARI_GAMES:
            if env_id not in gym.registry:
                gym.register(id=env_id, entry_point="sb3_mrq.envs.atari:AtariEnvNotInstalled")
    else:
        gym.register_envs(ale_py)


_register()
