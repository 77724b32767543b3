"""
What makes ``mrq`` an algorithm of rl-zoo3, which has no hook for that.
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
    Make MRQ the algorithm ``mrq`` of rl-zoo3: its class, its default configuration, its hyperparameter search, and the
    benchmark tasks of :mod:`sb3_mrq.envs`. The other algorithms stay as they are. Doing it again changes nothing.
    """
    ALGOS[ALGO] = MRQ
    HYPERPARAMS_SAMPLER[ALGO] = sample_mrq_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_mrq_params
    # The scripts of rl-zoo3 import the class by name; some may have done so already
    for name, module in list(sys.modules.items()):
        if name.startswith("rl_zoo3.") and hasattr(module, "ExperimentManager"):
            module.ExperimentManager = MRQExperimentManager  # type: ignore[attr-defined]
