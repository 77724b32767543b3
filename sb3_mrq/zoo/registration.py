"""
Registration of ``mrq`` and ``drq`` as algorithms of rl-zoo3.
"""

import sys

import rl_zoo3.exp_manager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

import sb3_mrq.envs  # noqa: F401 registers the benchmark tasks
from sb3_mrq.buffers import HerSubtrajectoryReplayBuffer
from sb3_mrq.zoo.configuration import ALGORITHMS
from sb3_mrq.zoo.exp_manager import MRQExperimentManager
from sb3_mrq.zoo.hyperparams_opt import convert_mrq_params, sample_mrq_params


def register() -> None:
    """
    Register MRQ and DRQ as the algorithms ``mrq`` and ``drq`` of rl-zoo3: classes, default configurations, hyperparameter
    search, and the benchmark tasks of :mod:`sb3_mrq.envs`. Other algorithms are not affected, and repeated calls have no
    effect.
    """
    for name, algorithm in ALGORITHMS.items():
        ALGOS[name] = algorithm
        HYPERPARAMS_SAMPLER[name] = sample_mrq_params
        HYPERPARAMS_CONVERTER[name] = convert_mrq_params
    # rl-zoo3 evaluates the names of classes in its module
    rl_zoo3.exp_manager.HerSubtrajectoryReplayBuffer = HerSubtrajectoryReplayBuffer  # type: ignore[attr-defined]
    # Modules of rl-zoo3 that are already imported have their own reference to the class
    for name, module in list(sys.modules.items()):
        if name.startswith("rl_zoo3.") and hasattr(module, "ExperimentManager"):
            module.ExperimentManager = MRQExperimentManager  # type: ignore[attr-defined]
