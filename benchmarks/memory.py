"""
Measure the memory of a full replay buffer, and its growth when further transitions are added.

    python -m benchmarks.memory HalfCheetah-v5
    python -m benchmarks.memory ALE/Pong-v5 --out benchmarks/results/memory-pong.json

A few episodes of random actions are recorded and added repeatedly. Linux only, as it reads ``/proc``.
"""

import argparse
import json
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.envs import AtariWrapper


def resident() -> int:
    """
    :return: resident memory of this process, in bytes
    """
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def record(env: gym.Env, n_steps: int) -> list[tuple[Any, ...]]:
    """
    :param env: the environment
    :param n_steps: minimum number of transitions; the last episode is completed
    :return: observation, action, reward, terminated, truncated and next observation of each transition
    """
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    transitions: list[tuple[Any, ...]] = []
    done = False
    while len(transitions) < n_steps or not done:
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        transitions.append((np.asarray(obs), action, reward, terminated, truncated, np.asarray(next_obs)))
        obs = env.reset()[0] if done else next_obs
    return transitions


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", type=int, default=1_000_000, help="capacity of the buffer (default: %(default)s)")
    parser.add_argument(
        "--further", type=int, default=200_000, help="transitions added to the full buffer (default: %(default)s)"
    )
    parser.add_argument("--recorded", type=int, default=5_000, help="transitions to record (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args(arguments)

    env = gym.make(args.task)
    if args.task.startswith("ALE/"):
        env = AtariWrapper(env)
    transitions = record(env, args.recorded)
    before = resident()
    buffer = SubtrajectoryReplayBuffer(args.size, env.observation_space, env.action_space, device="cpu")
    added = 0
    full_at = 0
    resident_at_full = 0
    while not full_at or added < full_at + args.further:
        obs, action, reward, terminated, truncated, next_obs = transitions[added % len(transitions)]
        done = np.array([terminated or truncated])
        info = {"TimeLimit.truncated": truncated and not terminated}
        buffer.add(obs[None], next_obs[None], np.array([action]), np.array([reward]), done, [info])
        added += 1
        if buffer.full and not full_at:
            full_at, resident_at_full = added, resident()
    figures = {
        "command": f"python -m benchmarks.memory {shlex.join(sys.argv[1:] if arguments is None else arguments)}",
        "versions": {"python": platform.python_version(), "numpy": version("numpy"), "gymnasium": version("gymnasium")},
        "transitions": buffer.size(),
        "buffer_gb": (resident_at_full - before) / 1e9,
        "growth_gb": (resident() - resident_at_full) / 1e9,
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
