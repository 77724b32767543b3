"""
Time an update against the matrix products it cannot do without, and sampling from a large buffer against a small one.

    python -m benchmarks.speed --out benchmarks/results/speed.json

The sizes are those of HalfCheetah: 17 observations, 6 actions, batch 256. Every ratio is of two figures of the same run.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.learning import processor
from sb3_mrq import MRQ
from sb3_mrq.buffers import SubtrajectoryReplayBuffer

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (17,), np.float32)
ACTIONS = spaces.Box(-1, 1, (6,), np.float32)
EPISODE_LENGTH = 1000


class NoiseEnv(gym.Env):
    """Spaces of HalfCheetah, observations and rewards of nothing."""

    observation_space = OBSERVATIONS
    action_space = ACTIONS

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observe(), float(self.np_random.normal()), False, self.steps >= EPISODE_LENGTH, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=OBSERVATIONS.shape).astype(np.float32)


def fastest(function: Callable[[], Any], seconds: float = 3.0, at_least: int = 5) -> float:
    """
    :param function: what to time
    :param seconds: for how long to repeat it
    :param at_least: how often to do so at least
    :return: seconds of the fastest call
    """
    function()
    end = time.perf_counter() + seconds
    times: list[float] = []
    while time.perf_counter() < end or len(times) < at_least:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate() -> float:
    """
    :return: floating-point operations a second of 256 x 512 x 512 products in float32
    """
    a, b = th.randn(256, 512), th.randn(512, 512)

    def products() -> None:
        for _ in range(20):
            a @ b

    return 20 * 2 * 256 * 512 * 512 / fastest(products, seconds=2.0)


def time_updates() -> dict[str, float]:
    """
    :return: milliseconds and floors of the two updates, and their ratio
    """
    model = MRQ("MlpPolicy", NoiseEnv(), learning_starts=500, seed=0, device="cpu")
    model.learn(501, log_interval=None)  # type: ignore[arg-type]
    assert model.replay_buffer is not None
    subtrajectories = model.replay_buffer.sample(model.batch_size)
    n_step = model.replay_buffer.sample_n_step(model.batch_size)
    updates = {
        "encoder": lambda: model._update_encoder(subtrajectories),
        "value_and_policy": lambda: model._update_value_and_policy(n_step),
    }
    rate = matmul_rate()
    figures = {"matmul_gflops": rate / 1e9}
    total = floor = 0.0
    for name, update in updates.items():
        with FlopCounterMode(display=False) as counter:
            update()
        figures[f"{name}_gflop"] = counter.get_total_flops() / 1e9
        figures[f"{name}_ms"] = 1e3 * fastest(update)
        total += figures[f"{name}_ms"]
        floor += 1e3 * counter.get_total_flops() / rate
    figures["update_ms"] = total
    figures["floor_ms"] = floor
    figures["update_to_floor"] = total / floor
    return figures


def full_buffer(size: int, n_envs: int = 10) -> SubtrajectoryReplayBuffer:
    """
    :param size: number of places
    :param n_envs: number of environments
    :return: a buffer with a transition, or a final observation, in each
    """
    buffer = SubtrajectoryReplayBuffer(size, OBSERVATIONS, ACTIONS, device="cpu", n_envs=n_envs)
    random = np.random.default_rng(0)
    obs = random.normal(size=(n_envs, *OBSERVATIONS.shape)).astype(np.float32)
    step = 0
    while not buffer.full:
        step += 1
        next_obs = random.normal(size=obs.shape).astype(np.float32)
        done = np.full(n_envs, step % EPISODE_LENGTH == 0)
        buffer.add(
            obs,
            next_obs,
            random.uniform(-1, 1, (n_envs, *ACTIONS.shape)),
            random.normal(size=n_envs),
            done,
            [{"TimeLimit.truncated": True}] * n_envs,
        )
        obs = random.normal(size=obs.shape).astype(np.float32) if done[0] else next_obs
    return buffer


def time_sampling(small: int, large: int) -> dict[str, float]:
    """
    :param small: places of the small buffer
    :param large: places of the large one
    :return: milliseconds for the two batches of a training step from either, and their ratio
    """
    buffers = [full_buffer(size) for size in (small, large)]
    # Turn by turn, so that both see the same machine
    times: list[list[float]] = [[], []]
    for _ in range(400):
        for index, buffer in enumerate(buffers):
            start = time.perf_counter()
            buffer.sample(256)
            buffer.sample_n_step(256)
            times[index].append(time.perf_counter() - start)
    small_ms, large_ms = (1e3 * float(np.median(values)) for values in times)
    return {"small_ms": small_ms, "large_ms": large_ms, "large_to_small": large_ms / small_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--large", type=int, default=1_000_000, help="places of the large buffer (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()
    if args.threads:
        th.set_num_threads(args.threads)
    figures = {
        "command": f"python -m benchmarks.speed {shlex.join(sys.argv[1:])}",
        "machine": f"{processor()}, {th.get_num_threads()} threads of torch",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
        "update": time_updates(),
        "sampling": time_sampling(10_000, args.large),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
