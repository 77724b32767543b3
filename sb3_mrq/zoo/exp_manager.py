"""
rl-zoo3's experiment manager with support for ``mrq`` and ``drq``.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_mrq import MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.datasets import load_minari
from sb3_mrq.persist.checkpoints import NAME, VEC_NORMALIZE, newest_with_model
from sb3_mrq.zoo.configuration import (
    ALGORITHMS,
    ConfigurationError,
    check_configuration_file,
    check_hyperparameter_names,
    check_section,
    default_configuration,
)

# Folder of checkpoints within the folder of a run
CHECKPOINTS = "checkpoints"


def _is_checkpoint_callback(callback: Any) -> bool:
    """
    :param callback: callback of a configuration: the path of a class, or a mapping from the path to arguments
    :return: whether it is a :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback`
    """
    name = next(iter(callback)) if isinstance(callback, dict) else callback
    return name == f"{ResumableCheckpointCallback.__module__}.{ResumableCheckpointCallback.__name__}"


class _Wrapper:
    """
    Wrapper of a model with another ``learn``.

    :param model: the model
    :param n_timesteps: timesteps from the command line, ignored if not positive
    """

    def __init__(self, model: MRQ, n_timesteps: int):
        self.model = model
        self.n_timesteps = n_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Resumed(_Wrapper):
    """
    Wrapper of a resumed model whose ``learn`` continues the run.

    :param model: the model
    :param n_timesteps: total timesteps of the run from the command line, ignored if not positive
    """

    def learn(self, _: int, **kwargs: Any) -> None:
        """
        :param _: total timesteps of rl-zoo3, ignored
        :param kwargs: further arguments of ``MRQ.learn``
        """
        n_timesteps = self.n_timesteps - self.model.num_timesteps if self.n_timesteps > 0 else self.model.remaining_timesteps
        self.model.learn(max(n_timesteps, 0), reset_num_timesteps=False, **kwargs)


class _WithDataset(_Wrapper):
    """
    Wrapper of a model whose ``learn`` starts with data and offline training.

    :param model: the model
    :param n_timesteps: number of environment steps from the command line, none if not positive
    :param dataset: file of a replay buffer, or id of a Minari dataset
    :param offline_steps: number of training steps before environment steps
    """

    def __init__(self, model: MRQ, n_timesteps: int, dataset: str, offline_steps: int):
        super().__init__(model, n_timesteps)
        self.dataset = dataset
        self.offline_steps = offline_steps

    def learn(self, _: int, callback: Any = None, progress_bar: bool = False, **kwargs: Any) -> None:
        """
        :param _: total timesteps of rl-zoo3, ignored
        :param callback: callbacks
        :param progress_bar: whether to display a progress bar
        :param kwargs: further arguments of ``MRQ.learn``
        """
        model = self.model
        if Path(self.dataset).is_file():
            model.load_replay_buffer(self.dataset)
        else:
            load_minari(self.dataset, model)
        model.train_offline(self.offline_steps, callback, progress_bar)
        if self.n_timesteps > 0:
            model.learning_starts = 0
            model.learn(self.n_timesteps, callback, reset_num_timesteps=False, progress_bar=progress_bar, **kwargs)


class MRQExperimentManager(ExperimentManager):
    """
    Experiment manager that replaces rl-zoo3's for all algorithms. For ``mrq`` and ``drq`` it

    - uses the configuration of this package by default,
    - rejects unknown hyperparameters and corrupt configurations, with their location in the message,
    - supports schedules of ``encoder_learning_rate``,
    - makes paths absolute, as environments may change the working directory,
    - writes the checkpoints of a :class:`~sb3_mrq.callbacks.ResumableCheckpointCallback` to the folder of the run,
    - resumes a run if ``--trained-agent`` is a checkpoint,
    - collects no further random transitions when training continues with a replay buffer,
    - trains offline from data, if the command line names some (class attributes ``dataset`` and ``offline_steps``).

    :param args: arguments of the command line, which are saved with the model
    :param algo: name of the algorithm
    :param env_id: id of the task
    :param log_folder: folder of the runs
    :param others: further arguments of rl-zoo3's class
    :param config: configuration file or module, None for the default one
    :param kwargs: further arguments of rl-zoo3's class
    """

    # From the command line, which rl-zoo3 cannot extend
    dataset: str | None = None
    offline_steps = 0

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
        if algo in ALGORITHMS:
            config = config or str(default_configuration(algo))
            log_folder = os.path.abspath(log_folder)
        super().__init__(args, algo, env_id, log_folder, *others, config=config, **kwargs)  # type: ignore[misc]
        self._start_folder = os.getcwd()
        if algo in ALGORITHMS:
            for name in ("trained_agent", "optimization_log_path", "storage"):
                path = getattr(self, name)
                # The storage may be a URL
                if path and "://" not in path:
                    setattr(self, name, os.path.abspath(path))
        self._resumed: MRQ | None = None
        # From the command line, ignored if not positive
        self._n_timesteps_given = self.n_timesteps

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo not in ALGORITHMS:
            return super().read_hyperparameters()
        if self.config.endswith((".yml", ".yaml")):
            # As rl-zoo3 chooses a section
            candidates = (self.env_name.gym_id, "atari" if self._is_atari else "default")
            check_configuration_file(Path(self.config), candidates)
        if self.custom_hyperparams is not None:
            # Names in the file are checked above, with their lines
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
                # Without a decimal point, YAML reads 1e-4 as a string
                rate = float(initial_value)
            except ValueError:
                rate = -1.0
            if kind not in ("", "lin") or not rate >= 0:
                raise ConfigurationError(f"{name} is {value}, but must be a number or a schedule such as lin_1e-4.")
            hyperparams[name] = SimpleLinearSchedule(rate) if kind else rate
        return hyperparams

    def create_log_folder(self) -> None:
        try:
            super().create_log_folder()
            if self.tensorboard_log is not None:
                Path(self.tensorboard_log).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"The folder {error.filename} cannot be made: {error.strerror}. Choose other log folders with -f and "
                "--tensorboard-log."
            ) from error

    def create_callbacks(self) -> None:
        for callback in list(self.callbacks):
            if isinstance(callback, ResumableCheckpointCallback) and callback.save_path is None:
                callback.save_path = Path(self.save_path) / CHECKPOINTS
        super().create_callbacks()

    def hyperparameters_optimization(self) -> None:
        # Trials are not resumed
        specified = self.specified_callbacks if isinstance(self.specified_callbacks, list) else [self.specified_callbacks]
        if any(map(_is_checkpoint_callback, specified)):
            self.specified_callbacks = [callback for callback in specified if not _is_checkpoint_callback(callback)]
        super().hyperparameters_optimization()

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        checkpoint = Path(self.trained_agent).parent
        name = NAME.fullmatch(checkpoint.name)
        if self.algo not in ALGORITHMS or name is None:
            return super()._load_pretrained_agent(hyperparams, env)
        print(f"Resuming from the checkpoint {checkpoint}")
        if (checkpoint / VEC_NORMALIZE).exists() and not self.normalize:
            # Otherwise the evaluation environments and the saved model would lack the normalisation
            raise ConfigurationError(f"The run of {checkpoint} used VecNormalize: set 'normalize: true', as in that run.")
        source, prefix = checkpoint, name["prefix"]
        if checkpoint == newest_with_model(checkpoint.parent, prefix):
            # The newest checkpoint continues in the same folder, and falls back to older ones if it is damaged
            source = checkpoint.parent
            default = Path(self.save_path) / CHECKPOINTS
            for callback in self.callbacks:
                if isinstance(callback, ResumableCheckpointCallback) and callback.save_path == default:
                    callback.save_path = source
        # As in rl-zoo3, but the seed is kept, as the environments derive theirs from it
        kwargs = {name: value for name, value in hyperparams.items() if name not in ("policy", "policy_kwargs")}
        self._resumed = ALGORITHMS[self.algo].resume(
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
        # Made after the environments
        model.start_folder = self._start_folder
        if model is self._resumed:
            self._learn(model, _Resumed(model, self._n_timesteps_given))
            return
        if self.dataset is not None:
            self._learn(model, _WithDataset(model, self._n_timesteps_given, self.dataset, self.offline_steps))
            return
        # Continued training counts steps from 0, but transitions in a loaded replay buffer replace the warm-up
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
        :param learner: the model or its wrapper
        """
        try:
            super().learn(learner)
        except ConnectionError:
            # Raised when closing environments whose processes were ended by Ctrl-C
            if not model.is_stopping:
                raise
