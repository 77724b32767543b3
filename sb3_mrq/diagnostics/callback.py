"""
Diagnosis during training.
"""

import importlib.util

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure
from stable_baselines3.common.type_aliases import GymEnv

from sb3_mrq.arguments import check_argument
from sb3_mrq.diagnostics import measures
from sb3_mrq.diagnostics.diagnosis import Diagnosis, diagnose
from sb3_mrq.diagnostics.episodes import wrap_env
from sb3_mrq.hyperparameters import COUNT, STEPS
from sb3_mrq.mrq import MRQ

# Numbers printed to stdout; the other outputs get all of them
_ON_SCREEN = (
    "episodes/mean_return",
    "model/reward_r2_1",
    "model/embedding_r2_1",
    "probe/z_sa_r2",
    "probe/raw_r2",
    "returns/bias",
    "z_s/effective_rank",
    "z_s/flags",
    "z_sa/effective_rank",
    "z_sa/flags",
)


class DiagnosticsCallback(BaseCallback):
    """
    Callback for diagnosing the model periodically. It logs numbers (``diagnostics/...``) and, to TensorBoard, figures.

    Diagnoses are made between rollouts and training and do not affect training: weights, replay buffer and random numbers are
    bit-identical.

    :param eval_env: The environment for the diagnosis, not the training environment
    :param freq: Number of timesteps between two diagnoses. The first one comes after the first update at the earliest.
    :param n_episodes: Number of episodes per diagnosis
    :param seed: Seed of the environment, so that every diagnosis starts from the same states; None to leave it unseeded
    :param figures: Whether to draw figures, which takes about a second
    :param max_steps: Maximum number of transitions per diagnosis
    :param verbose: Verbosity level: 0 for no output, 1 for printing flags
    :raises ValueError: at the start of training, if the environment does not match the model or is the training environment
    :raises ImportError: at the start of training, if scikit-learn is not installed, or matplotlib if figures are drawn
    """

    def __init__(
        self,
        eval_env: GymEnv,
        freq: int,
        n_episodes: int = 10,
        seed: int | None = 0,
        figures: bool = True,
        max_steps: int = 20_000,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        for name, value, requirement in (
            ("freq", freq, STEPS),
            ("n_episodes", n_episodes, COUNT),
            ("max_steps", max_steps, STEPS),
        ):
            check_argument(name, value, requirement)
        self.eval_env = eval_env
        self.freq = freq
        self.n_episodes = n_episodes
        self.seed = seed
        self.draw_figures = figures
        self.max_steps = max_steps
        self.last_diagnosis: Diagnosis | None = None

    def _init_callback(self) -> None:
        if not isinstance(self.model, MRQ):
            raise ValueError(f"DiagnosticsCallback supports the algorithm MRQ, not {type(self.model).__name__}.")
        measures.check_sklearn()
        if self.draw_figures and importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                'Figures need matplotlib. Install it with: pip install "sb3-mrq[train]", or set figures=False in '
                "DiagnosticsCallback."
            )
        self.eval_env = wrap_env(self.model, self.eval_env)
        if self.eval_env.unwrapped is self.training_env.unwrapped:
            raise ValueError(
                "DiagnosticsCallback needs an environment of its own, but eval_env is the training environment. Create a "
                "second one."
            )

    def _on_training_start(self) -> None:
        self._last_step = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, MRQ)
        if self.num_timesteps - self._last_step < self.freq or self.model._n_updates == 0:
            return
        self._last_step = self.num_timesteps
        diagnosis = diagnose(self.model, self.eval_env, self.n_episodes, self.seed, max_steps=self.max_steps)
        self.last_diagnosis = diagnosis
        for name, value in diagnosis.numbers().items():
            self.logger.record(f"diagnostics/{name}", value, exclude=None if name in _ON_SCREEN else "stdout")
        if self.draw_figures:
            for name, figure in diagnosis.figures().items():
                self.logger.record(f"diagnostics/{name}", Figure(figure, close=True), exclude=("stdout", "log", "json", "csv"))
        if self.verbose > 0:
            for flag in diagnosis.flags:
                print(f"Step {self.num_timesteps}: {flag}")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
