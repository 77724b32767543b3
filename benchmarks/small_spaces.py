"""
Small tasks with nothing to solve but one question: is the right action found? Each step shows which action is right, and only
this action is rewarded.

    python -m benchmarks.small_spaces --agents actor,greedy --seeds 1 --out runs/small-spaces
    python -m benchmarks.small_spaces --tasks IdentityEnv,IdentityEnvBox --agents greedy,dqn --seeds 5 --out runs/identity

``bandit-*`` have 16 states, which are shown as one-hot vectors, and 16 actions. ``IdentityEnv*`` are the environments that
Stable-Baselines3 tests its algorithms with. Everything has 128 units.

The table ``<out>/small-spaces.csv`` has a row for every evaluation, and ``<out>/small-spaces.png`` shows for the first task
whether the encoder tells right actions from wrong ones, whether the policy follows the values, and how many actions are tried.
"""

import argparse
import itertools
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise

from sb3_mrq import DRQ, MRQ
from sb3_mrq.action_spaces import CategoricalActions, make_actions
from sb3_mrq.compare.versions import processor

#: rollouts whose actions are counted
RECENT = 1000
UNITS = dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, z_sa_dim=128)


class Bandit(gym.Env):
    """
    The observation is the one-hot number of the right action. Episodes have 100 steps.

    :param action_space: a discrete space
    """

    def __init__(self, action_space: spaces.Space):
        self.action_space = action_space
        self.all_actions = all_actions(action_space)
        self.observation_space = spaces.Box(0, 1, (len(self.all_actions),), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(np.array_equal(np.ravel(action), self.all_actions[self.state]))
        self.n_steps += 1
        return self._observe(), reward, False, self.n_steps >= 100, {}

    def _observe(self) -> np.ndarray:
        self.state = int(self.np_random.integers(len(self.all_actions)))
        return np.eye(len(self.all_actions), dtype=np.float32)[self.state]


def all_actions(space: spaces.Space) -> np.ndarray:
    """
    :param space: a discrete space
    :return: all of its actions, (n, dimensions)
    """
    actions = make_actions(space)
    assert isinstance(actions, CategoricalActions)
    return actions.decode(actions.list_all(th.device("cpu"))).numpy()


#: environment, discount factor, random steps and further steps
TASKS: dict[str, tuple[Callable[[], gym.Env], float, int, int]] = {
    "bandit-Discrete": (lambda: Bandit(spaces.Discrete(16)), 0.5, 1000, 3000),
    "bandit-MultiDiscrete": (lambda: Bandit(spaces.MultiDiscrete([4, 4])), 0.5, 1000, 3000),
    "bandit-MultiBinary": (lambda: Bandit(spaces.MultiBinary(4)), 0.5, 1000, 3000),
    "IdentityEnv": (lambda: IdentityEnv(4), 0.4, 500, 2000),
    "IdentityEnvMultiDiscrete": (lambda: IdentityEnvMultiDiscrete(4), 0.4, 500, 2000),
    "IdentityEnvMultiBinary": (lambda: IdentityEnvMultiBinary(4), 0.4, 500, 2000),
    "IdentityEnvBox": (lambda: IdentityEnvBox(eps=0.5), 0.95, 500, 2000),
}


class RandomFloor(MRQ):
    """One action in twenty is random, also with an actor."""

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        if np.random.random() < 0.05:
            action = np.array([self.action_space.sample()])
            return action, action
        return super()._sample_action(*args, **kwargs)


#: algorithm and its arguments
AGENTS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "actor": (MRQ, dict(discrete_policy="actor")),
    "actor-5-percent-random": (RandomFloor, dict(discrete_policy="actor")),
    "actor-faster-encoder": (MRQ, dict(discrete_policy="actor", encoder_learning_rate=1e-3)),
    "actor-stronger-penalty": (MRQ, dict(discrete_policy="actor", pre_activation_weight=1e-2)),
    "greedy": (MRQ, dict(discrete_policy="greedy")),
    "greedy-rewards-first": (MRQ, dict(discrete_policy="greedy", reward_loss_weight=1.0, dynamics_loss_weight=0.1)),
    "greedy-no-noise": (MRQ, dict(discrete_policy="greedy", exploration_noise=0.0)),
    "drq": (DRQ, dict(discrete_policy="greedy")),
    "dqn": (DQN, dict(learning_rate=1e-3, train_freq=1, target_update_interval=250, exploration_fraction=0.5)),
    "td3": (TD3, dict(learning_rate=1e-3, action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)))),
    "a2c": (A2C, {}),
}


def make_agent(name: str, task: str, seed: int) -> BaseAlgorithm:
    """
    :param name: one of ``AGENTS``
    :param task: one of ``TASKS``
    :param seed: seed
    :return: an untrained agent
    """
    algorithm, arguments = AGENTS[name]
    make_env, gamma, learning_starts, _ = TASKS[task]
    env = make_env()
    env.action_space.seed(seed)
    if issubclass(algorithm, MRQ):
        arguments = dict(
            compile_updates=False, precision="float32", policy_kwargs=UNITS, learning_starts=learning_starts, **arguments
        )
    elif algorithm is not A2C:
        arguments = dict(learning_starts=learning_starts, policy_kwargs=dict(net_arch=[128, 128]), **arguments)
    return algorithm("MlpPolicy", env, gamma=gamma, seed=seed, device="cpu", **arguments)


class Measure(BaseCallback):
    """
    Evaluate at a fixed interval, and count the actions tried.

    :param env: environment to evaluate in
    :param every: steps between two evaluations
    """

    def __init__(self, env: gym.Env, every: int):
        super().__init__()
        self.env = env
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.recent: deque[tuple[bytes, bytes]] = deque(maxlen=RECENT)

    def _on_step(self) -> bool:
        self.recent.append((self.model._last_obs.tobytes(), self.locals["actions"].tobytes()))  # type: ignore[union-attr]
        if self.num_timesteps % self.every == 0:
            self.rows.append({"step": self.num_timesteps, **self.measure()})
        return True

    def measure(self) -> dict[str, float]:
        """
        :return: return of an episode of 100 steps; of MR.Q and DR.Q on a bandit, also the numbers of the figure
        """
        numbers = {"return": float(evaluate_policy(self.model, self.env, 10, warn=False)[0])}
        if isinstance(self.model, MRQ) and isinstance(self.env, Bandit):
            actions, n = self.env.all_actions, len(self.env.all_actions)
            policy = self.model.policy
            states = np.repeat(np.eye(n, dtype=np.float32), n, axis=0)
            vectors = np.tile(actions, (n, 1)).reshape(n * n, *self.env.action_space.shape)
            q = self.model.q_values(states, vectors).mean(axis=1).reshape(n, n)
            with th.no_grad():
                z_s = policy.encoder.state(policy.preprocess(th.as_tensor(states)))
                logits = policy.encoder.predictor(policy.encoder.state_action(z_s, policy.action_vectors(vectors)))[2]
                rewards = (logits.double().softmax(dim=1) @ policy.encoder.predictor.bins.double()).view(n, n).numpy()
            chosen = self.model.predict(np.eye(n, dtype=np.float32), deterministic=True)[0].reshape(n, -1)
            right = np.eye(n, dtype=bool)
            tried = len(set(self.recent)) / len({state for state, _ in self.recent})
            numbers |= {
                "values_right": float((q.argmax(axis=1) == np.arange(n)).mean()),
                "policy_right": float((chosen == actions).all(axis=1).mean()),
                "policy_follows_values": float((chosen == actions[q.argmax(axis=1)]).all(axis=1).mean()),
                "reward_of_right": float(rewards[right].mean()),
                "reward_of_wrong": float(rewards[~right].mean()),
                "actions_tried": tried,
            }
        return numbers


def run(name: str, task: str, seed: int) -> list[dict[str, Any]]:
    """
    :param name: one of ``AGENTS``
    :param task: one of ``TASKS``
    :param seed: seed
    :return: rows of the table, none if the agent does not support the space
    """
    make_env, _, learning_starts, steps = TASKS[task]
    try:
        model = make_agent(name, task, seed)
    except AssertionError as error:  # how the algorithms of SB3 refuse a space
        print(f"{task}, {name}: {error}")
        return []
    env = make_env()
    env.action_space.seed(seed + 1000)
    measure = Measure(env, max(50, steps // 12))
    start = time.perf_counter()
    model.learn(learning_starts + steps, callback=measure, log_interval=None)  # type: ignore[arg-type]
    final = {"step": learning_starts + steps, **measure.measure()}
    print(f"{task}, {name}, seed {seed}: {final['return']:.0f} of 100, {time.perf_counter() - start:.0f} s", flush=True)
    rows = [*(row for row in measure.rows if row["step"] < final["step"]), final]
    return [{"task": task, "agent": name, "seed": seed, **row} for row in rows]


def draw(table: pd.DataFrame, path: Path) -> None:
    """
    :param table: the table
    :param path: file of the figure
    """
    of_task = table[(table["task"] == table["task"].iloc[0]) & table["values_right"].notna()]
    panels = (
        ("Does the encoder tell them apart?", {"reward_of_right": "-", "reward_of_wrong": ":"}, "predicted reward"),
        ("Does the policy follow the values?", {"policy_right": "-", "values_right": ":"}, "share of states right"),
        ("Are other actions tried?", {"actions_tried": "-"}, f"different actions in a state, last {RECENT:,} steps"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, columns, label) in zip(axes, panels, strict=True):
        for k, (name, frame) in enumerate(of_task.groupby("agent", sort=False)):
            for column, style in columns.items():
                mean = frame.groupby("step")[column].mean()
                what = "" if len(columns) == 1 else f", {column.replace('_', ' ')}"
                axis.plot(mean.index, mean, style, color=f"C{k}", label=f"{name}{what}")
        axis.set_title(title)
        axis.set_xlabel("environment steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylim(-0.2, 1.1)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="bandit-Discrete", help=f"of {', '.join(TASKS)} (default: %(default)s)")
    parser.add_argument("--agents", default="actor,greedy", help=f"of {', '.join(AGENTS)} (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/small-spaces"), help="folder for table and figure")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "small-spaces.csv"
    rows: list[dict[str, Any]] = []
    for task, name, seed in itertools.product(args.tasks.split(","), args.agents.split(","), range(args.seeds)):
        rows += run(name, task, seed)
        table = pd.DataFrame(rows)
        path.write_text(f"# torch {th.__version__}, {th.get_num_threads()} threads of {processor()}\n")
        table.to_csv(path, mode="a", index=False, float_format="%.4g")
    if "values_right" in table:
        draw(table, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
