"""
rl-zoo3's experiment manager, with what ``mrq`` needs beyond other algorithms.
"""

import argparse
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_mrq import MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.persist.checkpoints import NAME, VEC_NORMALIZE, newest_with_model
from sb3_mrq.zoo.configuration import (
    ConfigurationError,
    check_configuration_file,
    check_hyperparameter_names,
    check_section,
    default_configuration,
)

# Folder of checkpoints in that of a run
CHECKPOINTS = "checkpoints"


def _is_checkpoint_callback(callback: Any) -> bool:
    """
    :param callback: as in a configuration: the path of a class, or a mapping from that to arguments
    :return: whether it is a :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback`
    """
    name = next(iter(callback)) if isinstance(callback, dict) else callback
    return name == f"{ResumableCheckpointCallback.__module__}.{ResumableCheckpointCallback.__name__}"


class _Resumed:
    """
    A model for rl-zoo3 to call ``learn`` of, which goes on where the model is.

    :param model: the model
    :param n_timesteps: number of steps asked for on the command line, over all of the run; none if not positive
    """

    def __init__(self, model: MRQ, n_timesteps: int):
        self.model = model
        self.n_timesteps = n_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def learn(self, _: int, **kwargs: Any) -> None:
        """
        :param _: steps as rl-zoo3 counts them, from 0
        :param kwargs: further arguments of ``MRQ.learn``
        """
        n_timesteps = self.n_timesteps - self.model.num_timesteps if self.n_timesteps > 0 else self.model.remaining_timesteps
        self.model.learn(max(n_timesteps, 0), reset_num_timesteps=False, **kwargs)


class MRQExperimentManager(ExperimentManager):
    """
    Experiment manager of rl-zoo3, which it replaces for all algorithms. For ``mrq`` it

    - reads the configuration of this package where none is given,
    - refuses unknown hyperparameters and corrupt configurations with a message that says where they are,
    - makes schedules of ``encoder_learning_rate`` too,
    - puts the checkpoints of a :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback` into the folder of the run,
    - resumes a run from one of these, where that is given as the agent to continue with,
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
        self._resumed: MRQ | None = None
        # On the command line; none if not positive
        self._n_timesteps_given = self.n_timesteps

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
        names = ("learning_rate", "encoder_learning_rate")
        given = {name: hyperparams.pop(name) for name in names if isinstance(hyperparams.get(name), str)}
        hyperparams = ExperimentManager._preprocess_schedules(hyperparams)
        for name, value in given.items():
            kind, _, initial_value = value.rpartition("_")
            try:
                # Without a decimal point, YAML takes 1e-4 for text
                rate = float(initial_value)
            except ValueError:
                rate = -1.0
            if kind not in ("", "lin") or not rate >= 0:
                raise ConfigurationError(f"{name} is {value}, but must be a number, or lin_1e-4 and the like.")
            hyperparams[name] = SimpleLinearSchedule(rate) if kind else rate
        return hyperparams

    def create_callbacks(self) -> None:
        for callback in list(self.callbacks):
            if isinstance(callback, ResumableCheckpointCallback) and callback.save_path is None:
                callback.save_path = Path(self.save_path) / CHECKPOINTS
        super().create_callbacks()

    def hyperparameters_optimization(self) -> None:
        # Nothing is resumed of a trial
        specified = self.specified_callbacks if isinstance(self.specified_callbacks, list) else [self.specified_callbacks]
        if any(map(_is_checkpoint_callback, specified)):
            self.specified_callbacks = [callback for callback in specified if not _is_checkpoint_callback(callback)]
        super().hyperparameters_optimization()

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        checkpoint = Path(self.trained_agent).parent
        name = NAME.fullmatch(checkpoint.name)
        if self.algo != "mrq" or name is None:
            return super()._load_pretrained_agent(hyperparams, env)
        print(f"Resuming from the checkpoint {checkpoint}")
        if (checkpoint / VEC_NORMALIZE).exists() and not self.normalize:
            # Evaluations, and whoever loads the model from the folder of the run, would not normalise
            raise ConfigurationError(f"The run of {checkpoint} normalised: give it 'normalize: true' as it had.")
        source, prefix = checkpoint, name["prefix"]
        if checkpoint == newest_with_model(checkpoint.parent, prefix):
            # From the newest one the run goes on where it was: in the same folder, and from the one before it if it is damaged
            source = checkpoint.parent
            default = Path(self.save_path) / CHECKPOINTS
            for callback in self.callbacks:
                if isinstance(callback, ResumableCheckpointCallback) and callback.save_path == default:
                    callback.save_path = source
        # As rl-zoo3 does; but the seed stays, from which those of the environments are made
        kwargs = {name: value for name, value in hyperparams.items() if name not in ("policy", "policy_kwargs")}
        self._resumed = MRQ.resume(
            source,
            env,
            self.device,
            prefix,
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            **kwargs,
        )
        return self._resumed

    def learn(self, model: BaseAlgorithm) -> None:
        if not isinstance(model, MRQ):
            super().learn(model)
            return
        if model is self._resumed:
            self._learn(model, _Resumed(model, self._n_timesteps_given))
            return
        # Steps are counted from 0 again where training continues, but a replay buffer that came along stands for the warm-up
        assert model.replay_buffer is not None
        learning_starts = model.learning_starts
        model.learning_starts = max(learning_starts - model.replay_buffer.size(), 0)
        try:
            self._learn(model, model)
        finally:
            model.learning_starts = learning_starts

    def _learn(self, model: MRQ, learner: Any) -> None:
        """
        :param model: the model
        :param learner: the same, or what stands in for it
        """
        try:
            super().learn(learner)
        except ConnectionError:
            # From closing environments whose processes Ctrl-C has ended too
            if not model.is_stopping:
                raise
