"""
Returns that are normalised to 0 and 1. They are fixed, so that scores do not depend on the algorithms of a comparison.
"""

#: returns of random actions and of TD3 after 1 M steps in version 4 of the Gym tasks, as in the paper
GYM = {
    "Ant": (-70.3, 3942.0),
    "HalfCheetah": (-289.4, 10574.0),
    "Hopper": (18.8, 3226.0),
    "Humanoid": (120.4, 5165.0),
    "Walker2d": (2.8, 3946.0),
}

_ATARI = """
    Alien 227.8 7127.7; Amidar 5.8 1719.5; Assault 222.4 742; Asterix 210 8503.3; Asteroids 719.1 47388.7; Atlantis 12850
    29028.1; BankHeist 14.2 753.1; BattleZone 2360 37187.5; BeamRider 363.9 16926.5; Berzerk 123.7 2630.4; Bowling 23.1
    160.7; Boxing 0.1 12.1; Breakout 1.7 30.5; Centipede 2090.9 12017; ChopperCommand 811 7387.8; CrazyClimber 10780.5
    35829.4; Defender 2874.5 18688.9; DemonAttack 152.1 1971; DoubleDunk -18.6 -16.4; Enduro 0 860.5; FishingDerby -91.7
    -38.7; Freeway 0 29.6; Frostbite 65.2 4334.7; Gopher 257.6 2412.5; Gravitar 173 3351.4; Hero 1027 30826.4; IceHockey
    -11.2 0.9; Jamesbond 29 302.8; Kangaroo 52 3035; Krull 1598 2665.5; KungFuMaster 258.5 22736.3; MontezumaRevenge 0
    4753.3; MsPacman 307.3 6951.6; NameThisGame 2292.3 8049; Phoenix 761.4 7242.6; Pitfall -229.4 6463.7; Pong -20.7 14.6;
    PrivateEye 24.9 69571.3; Qbert 163.9 13455; Riverraid 1338.5 17118; RoadRunner 11.5 7845; Robotank 2.2 11.9; Seaquest
    68.4 42054.7; Skiing -17098.1 -4336.9; Solaris 1236.3 12326.7; SpaceInvaders 148 1668.7; StarGunner 664 10250; Surround
    -10 6.5; Tennis -23.8 -8.3; TimePilot 3568 5229.2; Tutankham 11.4 167.6; UpNDown 533.4 11693.2; Venture 0 1187.5;
    VideoPinball 16256.9 17667.9; WizardOfWor 563.5 4756.5; YarsRevenge 3092.9 54576.9; Zaxxon 32.5 9173.3
"""
#: returns of random and of human play, for human-normalised scores (Mnih et al., 2015; Wang et al., 2016)
ATARI = {name: (float(low), float(high)) for name, low, high in map(str.split, _ATARI.split(";"))}

#: CartPole has at most 500 steps, each with a reward of 1, and Acrobot at most 500 of -1. -100 on Acrobot and 200 on
#: LunarLander are gymnasium's thresholds of solved tasks. LunarLander has no lowest return: -200 centres the range at 0.
OTHERS = {"CartPole-v1": (0.0, 500.0), "Acrobot-v1": (-500.0, -100.0), "LunarLander-v3": (-200.0, 200.0)}

#: description of the scales
IN_WORDS = (
    "0 to 1000 in the DeepMind Control suite, random play to human play on Atari (human-normalised scores), random actions to "
    "TD3 after a million steps in Gym locomotion, "
    + ", ".join(f"{low:.0f} to {high:.0f} on {task}" for task, (low, high) in OTHERS.items())
)


def scale_of(task: str) -> tuple[float, float] | None:
    """
    :param task: a task
    :return: returns that are normalised to 0 and 1, None for tasks without a scale
    """
    suite, _, name = task.rpartition("/")
    if suite in ("dmc", "dmc-visual"):
        return 0.0, 1000.0
    name, _, number = name.rpartition("-v")
    if suite == "ALE":
        return ATARI.get(name)
    return GYM.get(name) if number in ("4", "5") and not suite else OTHERS.get(task)
