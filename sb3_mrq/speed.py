"""
The script ``speed``: how fast a task trains on this machine, in each precision.
"""

import argparse
import os
import time
from typing import NamedTuple

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import get_device

from sb3_mrq.accelerate.precision import fast_precisions
from sb3_mrq.arguments import Number, check_argument
from sb3_mrq.drq import DRQ
from sb3_mrq.mrq import MRQ
from sb3_mrq.progress import duration, milliseconds
from sb3_mrq.vec_env import make_env

ALGORITHMS: dict[str, type[MRQ]] = {"mrq": MRQ, "drq": DRQ}
# Steps of the run that is planned, for which the automatic choice is made, and for which hours are given
PLANNED_STEPS = 1_000_000
RANDOM_STEPS = 300
# Shorter bursts than the default 250 leave the ratio of encoder updates to training steps as it is
INTERVAL = 25
# Bursts after which everything is compiled and captured
WARM_UP_BURSTS = 2


class Speed(NamedTuple):
    """
    :param seconds_per_step: time of a timestep, with training and simulation
    :param updates: "compiled", "captured" or "plain"
    :param automatic: whether the precision is the one of ``precision="auto"``
    :param buffer_bytes: memory of the full replay buffer
    """

    seconds_per_step: float
    updates: str
    automatic: bool
    buffer_bytes: int


class Stopwatch(BaseCallback):
    """
    Times whole cycles of a burst of encoder updates and the training steps after it, and ends training after them.

    :param seconds: time to measure, at least one cycle
    """

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        # Time and timesteps after each burst
        self.bursts: list[tuple[float, int]] = []

    def _on_rollout_start(self) -> None:
        if self.model._n_updates > len(self.bursts) * INTERVAL:
            self.bursts.append((time.perf_counter(), self.num_timesteps))

    def _on_step(self) -> bool:
        timed = self.bursts[WARM_UP_BURSTS - 1 :]
        return len(timed) < 2 or timed[-1][0] - timed[0][0] < self.seconds

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a timestep."""
        (start, first), (end, last) = self.bursts[WARM_UP_BURSTS - 1], self.bursts[-1]
        return (end - start) / (last - first)


def make_task(env_id: str) -> gym.Env:
    """
    :param env_id: id of a task
    :return: its environment, with the paper's preprocessing for Atari games
    :raises ValueError: if there is no such task
    """
    try:
        env: gym.Env = make_env(env_id)
    except (gym.error.UnregisteredEnv, gym.error.NamespaceNotFound) as error:
        raise ValueError(f"{error}") from None
    if env_id.startswith("ALE/"):
        from sb3_mrq.envs import AtariWrapper

        env = AtariWrapper(env)
    return env


def policy_for(space: spaces.Space) -> str:
    """
    :param space: observation space
    :return: name of the policy for it
    """
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def measure(algo: str, env_id: str, device: th.device, precision: str, seconds: float) -> Speed:
    """
    :param algo: ``mrq`` or ``drq``
    :param env_id: id of a task
    :param device: device of the networks
    :param precision: precision of the updates
    :param seconds: time to measure, after the warm-up
    :return: the speed of training with default hyperparameters, compiled or captured as ``compile_updates="auto"`` chooses
    """
    env = make_task(env_id)
    model = ALGORITHMS[algo](
        policy_for(env.observation_space),
        env,
        learning_starts=RANDOM_STEPS,
        target_update_interval=INTERVAL,
        precision=precision,
        device=device,
        seed=0,
    )
    stopwatch = Stopwatch(seconds)
    model.learn(PLANNED_STEPS, stopwatch, log_interval=None)  # type: ignore[arg-type]
    env.close()
    assert model.replay_buffer is not None
    return Speed(
        stopwatch.seconds_per_step,
        "captured" if model.updates.captured else "compiled" if model.updates.compiled else "plain",
        precision == model.automatic_precision,
        sum(array.nbytes for array in model.replay_buffer.arrays().values()),
    )


def speed_script(arguments: list[str]) -> None:
    """
    Measure and print the speeds requested on the command line.

    :param arguments: arguments of the command line
    :raises ValueError: for an unknown task or device
    """
    parser = argparse.ArgumentParser("sb3-mrq speed", description="How fast a task trains on this machine, in each precision.")
    parser.add_argument("--env", help="environment ID (default: %(default)s)", default="Pendulum-v1")
    parser.add_argument("--algo", help="RL Algorithm (default: %(default)s)", choices=list(ALGORITHMS), default="mrq")
    parser.add_argument("--device", help="PyTorch device to be use (ex: cpu, cuda...)", default="auto")
    parser.add_argument("--seconds", help="time to measure each precision (default: %(default)s)", default=20.0, type=float)
    args = parser.parse_args(arguments)
    check_argument("seconds", args.seconds, Number(least=0))
    try:
        device = get_device(args.device)
        th.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"The device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    # Errors of the task come first
    make_task(args.env).close()

    where = th.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {th.get_num_threads()}"
    print(f"{args.algo} on {args.env}, default hyperparameters, {device.type} ({where}). Compiling may take some minutes.")
    if hasattr(os, "getloadavg"):
        print(
            f"Other programs slow this down: the load average is {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors now."
        )
    print(f"\n{'precision':12}{'updates':12}{'steps a second':>16}{'per step':>12}{'1 M steps':>16}", flush=True)
    automatic, size = "", 0
    for precision in fast_precisions(device):
        speed = measure(args.algo, args.env, device, precision, args.seconds)
        whole = duration(PLANNED_STEPS * speed.seconds_per_step)
        chosen = "  automatic choice" if speed.automatic else ""
        numbers = f"{1 / speed.seconds_per_step:16.1f}{milliseconds(speed.seconds_per_step):>12}{whole:>16}"
        print(f"{precision:12}{speed.updates:12}{numbers}{chosen}", flush=True)
        automatic, size = f"{precision}, {speed.updates}" if speed.automatic else automatic, speed.buffer_bytes
    print(f"\nThe automatic choice is {automatic}. A full replay buffer takes {size / 1e9:.2g} GB.")
