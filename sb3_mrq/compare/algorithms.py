"""
The algorithms of a comparison: variants, names in figures, and hyperparameters.
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import rl_zoo3
import yaml

from sb3_mrq.envs import AtariWrapper
from sb3_mrq.hyperparameters import PRECISIONS
from sb3_mrq.zoo.configuration import ALGORITHMS, ConfigurationError, check_hyperparameter_names, closest

#: names in figures and tables; all others are written in capitals
NAMES = {"mrq": "MR.Q", "drq": "DR.Q", "qrdqn": "QR-DQN", "crossq": "CrossQ"}

#: networks for classic control, a quarter of the default width, in float32
SMALL = (
    "policy_kwargs:dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, "
    "z_sa_dim=128)",
    "precision:float32",
)
MRQ_OPTIMIZERS = (
    "policy_kwargs:dict(net_arch=dict(encoder=[512, 512]), optimizer_kwargs=dict(weight_decay=1e-4))",
    "encoder_learning_rate:1e-4",
)
NO_ENCODER_LOSS = ("dynamics_loss_weight:0.0", "reward_loss_weight:0.0", "termination_loss_weight:0.0")

#: variants of the algorithm before the first hyphen: in words, and hyperparameters in the format of rl-zoo3's -params
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mrq-float32": ("float32", ("precision:float32",)),
    "mrq-bfloat16": ("bfloat16", ("precision:bfloat16",)),
    "mrq-greedy-small": ("greedy, small networks", ("discrete_policy:greedy", *SMALL)),
    "mrq-actor-small": ("actor, small networks", ("discrete_policy:actor", *SMALL)),
    "mrq-no-encoder-loss": ("no encoder losses", NO_ENCODER_LOSS),
    "mrq-1-step": ("1-step targets", ("n_steps:1",)),
    "mrq-uniform-replay": ("uniform replay", ("priority_alpha:0.0",)),
    "mrq-infonce-fade": ("InfoNCE and fading replay", ("infonce_loss_weight:0.1", "replay_fade:0.9999")),
    "drq-float32": ("float32", ("precision:float32",)),
    "drq-bfloat16": ("bfloat16", ("precision:bfloat16",)),
    "drq-no-infonce": ("no InfoNCE", ("infonce_loss_weight:0.0",)),
    "drq-no-fade": ("no fading replay", ("replay_fade:1.0",)),
    "drq-mrq-optimisation": ("MR.Q's optimisers", MRQ_OPTIMIZERS),
}


def base_of(name: str) -> str:
    """
    :param name: name of an algorithm or variant, also one of an earlier version
    :return: the algorithm of rl-zoo3
    """
    return re.split("[-:]", name)[0]


def resolve(name: str) -> tuple[str, list[str]]:
    """
    :param name: an algorithm, one of ``VARIANTS``, or either of them with hyperparameters, such as ``mrq:n_steps=1``
    :return: the algorithm of rl-zoo3, and hyperparameters in the format of its option ``-params``
    :raises ConfigurationError: if there is no such algorithm or hyperparameter
    """
    variant, *settings = name.split(":")
    algo, known = base_of(name), {*rl_zoo3.ALGOS, *VARIANTS}
    if variant not in known:
        raise ConfigurationError(f"There is no algorithm {variant}.{closest(variant, known)}")
    for setting in settings:
        if not re.fullmatch(r"\w+=.+", setting):
            raise ConfigurationError(f"{setting} in {name} sets nothing: write {variant}:NAME=VALUE.")
    if algo in ALGORITHMS:
        check_hyperparameter_names([setting.partition("=")[0] for setting in settings], name)
    return algo, [*VARIANTS.get(variant, ("", ()))[1], *(setting.replace("=", ":", 1) for setting in settings)]


def label(name: str) -> str:
    """
    :param name: name of an algorithm or variant
    :return: its name in figures
    """
    variant, *settings = name.split(":")
    words = VARIANTS[variant][0] if variant in VARIANTS else variant.partition("-")[2].replace("-", " ")
    return ", ".join(filter(None, [NAMES.get(base_of(name), base_of(name).upper()), words, *settings]))


def labels(results: pd.DataFrame) -> pd.Series:
    """
    :param results: results with the columns task and algorithm
    :return: names of the algorithms in figures. The precision is only in it if a task was run in several.
    """
    full = results["algorithm"].map(label)
    short = full.str.replace(rf", ({'|'.join(PRECISIONS)})$", "", regex=True)
    n_precisions = full.groupby([results["task"], short]).transform("nunique")
    return short.where(n_precisions.groupby(short).transform("max") == 1, full)


def zoo_section(algo: str, task: str) -> dict[str, Any] | None:
    """
    Hyperparameters that differ from what rl-zoo3 would choose: those for an older version of the task, or for HalfCheetah on
    the DeepMind Control suite. Atari games use rl-zoo3's hyperparameters with MR.Q's preprocessing, as rl-zoo3's wrappers
    would repeat what the games do themselves.

    :param algo: algorithm of rl-zoo3
    :param task: id of an environment
    :return: the section, None for rl-zoo3's choice
    """
    if algo in ALGORITHMS:
        return None
    sections = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    if task.startswith("ALE/"):
        section = sections.get(task, sections.get("atari"))
        wrappers = ("env_wrapper", "vec_env_wrapper", "frame_stack", "env_kwargs")
        kept = {name: value for name, value in (section or {}).items() if name not in wrappers}
        return None if section is None else {**kept, "env_wrapper": f"sb3_mrq.envs.{AtariWrapper.__name__}"}
    base, _, number = task.rpartition("-v")
    older = [f"{base}-v{n}" for n in range(int(number) - 1, -1, -1)] if number.isdigit() else []
    names = [task, *older, *(["HalfCheetah-v4"] if task.startswith("dmc/") else [])]
    found = next((name for name in names if name in sections), task)
    return None if found == task else sections[found]
