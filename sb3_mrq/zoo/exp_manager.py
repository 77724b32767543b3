"""
rl-zoo3's experiment manager, with what ``mrq`` needs beyond other algorithms.
"""

import argparse
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mrq import MRQ
from sb3_mrq.zoo.configuration import (
    ConfigurationError,
    check_configuration_file,
    check_hyperparameter_names,
    check_section,
    default_configuration,
)


class MRQExperimentManager(ExperimentManager):
    """
    Experiment manager of rl-zoo3, which it replaces for all algorithms. For ``mrq`` it

    - reads the configuration of this package where none is given,
    - refuses unknown hyperparameters and corrupt configurations with a message that says where they are,
    - makes schedules of ``encoder_learning_rate`` too,
    - collects no random transitions again when it continues with a replay buffer.

    :param args: arguments of the command line, which are saved with the model
    :param algo: name of the algorithm
    :param env_id: id of the task
    :param log_folder: where the runs are
    :param others: further arguments of rl-zoo3's class
    :param config: configuration file or module, None for the default one
    :param kwargs: further arguments of rl-zoo3's class
    """

    def __init__(
        self,
        args: argparse.Namespace,
        algo: str,
        env_id: str,
        log_folder: str,
        *others: Any,
        config: str | None = None,
        **kwargs: Any,
    ):
        if algo == "mrq":
            config = config or str(default_configuration())
        super().__init__(args, algo, env_id, log_folder, *others, config=config, **kwargs)  # type: ignore[misc]

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo != "mrq":
            return super().read_hyperparameters()
        if self.config.endswith((".yml", ".yaml")):
            check_configuration_file(Path(self.config))
        if self.custom_hyperparams is not None:
            # The names in the file are checked with their lines
            check_hyperparameter_names(self.custom_hyperparams, "command line")
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        check_section(hyperparams, self.config)
        return hyperparams, saved_hyperparams

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        hyperparams = ExperimentManager._preprocess_schedules(hyperparams)
        value = hyperparams.get("encoder_learning_rate")
        if isinstance(value, str):
            kind, _, initial_value = value.rpartition("_")
            try:
                # Without a decimal point, YAML takes 1e-4 for text
                rate = float(initial_value)
            except ValueError:
                rate = -1.0
            if kind not in ("", "lin") or not rate >= 0:
                raise ConfigurationError(f"encoder_learning_rate is {value}, but must be a number, or lin_1e-4 and the like.")
            hyperparams["encoder_learning_rate"] = SimpleLinearSchedule(rate) if kind else rate
        return hyperparams

    def learn(self, model: BaseAlgorithm) -> None:
        if not isinstance(model, MRQ):
            super().learn(model)
            return
        # Steps are counted from 0 again where training continues, but a replay buffer that came along stands for the warm-up
        assert model.replay_buffer is not None
        learning_starts = model.learning_starts
        model.learning_starts = max(learning_starts - model.replay_buffer.size(), 0)
        try:
            super().learn(model)
        finally:
            model.learning_starts = learning_starts
