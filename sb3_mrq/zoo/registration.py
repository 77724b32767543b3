"""
Registration of ``mrq`` as an algorithm of rl-zoo3.
"""

import sys

from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

import sb3_mrq.envs  # noqa: F401 registers the benchmark tasks
from sb3_mrq import MRQ
from sb3_mrq.zoo.exp_manager import MRQExperimentManager
from sb3_mrq.zoo.hyperparams_opt import convert_mrq_params, sample_mrq_params

ALGO = "mrq"


def register() -> None:
    """
    Register MRQ as the algorithm ``mrq`` of rl-zoo3: class, default configuration, hyperparameter search, and the benchmark
    tasks of :mod:`sb3_mrq.envs`. Other algorithms are not affected, and repeated calls have no effect.
    """
    ALGOS[ALGO] = MRQ
    HYPERPARAMS_SAMPLER[ALGO] = sample_mrq_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_mrq_params
    # Modules of rl-zoo3 that are already imported have their own reference to the class
    for name, module in list(sys.modules.items()):
        if name.startswith("rl_zoo3.") and hasattr(module, "ExperimentManager"):
            module.ExperimentManager = MRQExperimentManager  # type: ignore[attr-defined]
