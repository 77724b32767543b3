"""
Evaluation during training: before the first step, at a fixed interval and at the end, with the returns in a CSV file.
"""

import math
import time
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_mrq import MRQ
from sb3_mrq.compare.runs import EVALUATIONS, Run
from sb3_mrq.compare.versions import machine, versions
from sb3_mrq.diagnostics.episodes import no_side_effects
from sb3_mrq.persist.files import atomic_file

#: columns of a table of evaluations
COLUMNS = ("task", "algorithm", "seed", "step", "return", "return_std", "length", "seconds", "versions", "machine")


class EvaluationCallback(BaseCallback):
    """
    Evaluate before the first step, every ``eval_freq`` steps and at the end, and append a row to a CSV file each time. A
    resumed run continues its file after the evaluations up to its checkpoint.

    Each evaluation has its own seed, derived from the seed of the run, so that all algorithms, and resumed runs, are
    evaluated on the same episodes.

    :param env: evaluation environments
    :param run: the run, whose folder the file is in
    :param random_actions: probability of a random action
    """

    def __init__(self, env: VecEnv, run: Run, random_actions: float = 0.0):
        super().__init__()
        self.env = env
        self.run = run
        self.path = run.folder / EVALUATIONS
        self.random_actions = random_actions
        self.versions = versions()

    def predict(self, observation: Any, *others: Any, **kwargs: Any) -> tuple[np.ndarray, Any]:
        """The model's ``predict``, with some random actions. The paper samples from MR.Q's discrete policies."""
        deterministic = not isinstance(self.model, MRQ) or isinstance(self.model.action_space, spaces.Box)
        actions, state = self.model.predict(observation, *others, **kwargs | {"deterministic": deterministic})
        for i in np.flatnonzero(self.random.random(self.env.num_envs) < self.random_actions):
            actions[i] = self.env.action_space.sample()
        return actions, state

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        rows = pd.DataFrame(columns=COLUMNS)
        if self.num_timesteps > 0:
            # From the checkpoint
            self.start -= self.model.training_seconds  # type: ignore[attr-defined]
            rows = pd.read_csv(self.path, dtype=str)
            rows = rows[rows["step"].astype(int) <= self.num_timesteps]
        # Never a partial file, even if the process is killed here
        with atomic_file(self.path) as file:
            rows.to_csv(file, index=False)
        self.n_evaluations = len(rows)
        self.next_evaluation = self._after(int(rows["step"].iloc[-1])) if len(rows) else 0
        self._evaluate_if_due()

    def _after(self, step: int) -> float:
        freq, steps = self.run.eval_freq, self.run.steps
        return min((step // freq + 1) * freq, steps) if step < steps else math.inf

    def _evaluate_if_due(self) -> None:
        if self.num_timesteps < self.next_evaluation:
            return
        started = time.monotonic()
        trained, evaluated = unwrap_vec_normalize(self.training_env), unwrap_vec_normalize(self.env)
        if trained is not None and evaluated is not None and hasattr(trained, "obs_rms"):  # missing with norm_obs=False
            evaluated.obs_rms = deepcopy(trained.obs_rms)
        seed = int(np.random.SeedSequence([self.run.seed, self.n_evaluations]).generate_state(1)[0] >> 1)
        self.env.seed(seed)
        self.env.action_space.seed(seed)
        self.random = np.random.default_rng(seed)
        with no_side_effects(self.model):
            returns, lengths = evaluate_policy(self, self.env, self.run.eval_episodes, return_episode_rewards=True)
        # Several environments may be some steps further, but algorithms are compared at the same step
        step = int(self.next_evaluation)
        row = [self.run.task, self.run.algorithm, self.run.seed, step, f"{np.mean(returns):.2f}", f"{np.std(returns):.2f}"]
        row += [f"{np.mean(lengths):.1f}", f"{started - self.start:.1f}", self.versions, machine(self.model)]
        pd.DataFrame([row]).to_csv(self.path, mode="a", header=False, index=False)
        self.next_evaluation = self._after(step)
        self.n_evaluations += 1
        # Evaluations do not count as training time
        self.start += time.monotonic() - started

    def _on_step(self) -> bool:
        # Saved with the model
        self.model.training_seconds = time.monotonic() - self.start  # type: ignore[attr-defined]
        self._evaluate_if_due()
        return True
