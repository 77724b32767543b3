"""
Resume after a crash: stop this script in any way, including `kill -9`, and start it again. It continues from the newest
checkpoint, with its replay buffer, optimisers and random generators.

    python examples/resume_after_crash.py
    python examples/resume_after_crash.py --crash-at 12000

Needs no extra.
"""

import argparse
import os
import signal
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mrq import MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback

FOLDER = Path("crash_checkpoints")


class Crash(BaseCallback):
    """
    Kills this process.

    :param step: number of steps after which to kill it
    """

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            print(f"killed after {self.step} steps", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return True


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=15_000, help="steps of the environment (default: %(default)s)")
parser.add_argument("--crash-at", type=int, help="kill this process after this many steps")
args = parser.parse_args()

env = gym.make("Pendulum-v1")
# The last two are kept: if the newest is damaged, the one before it is used
checkpoints = ResumableCheckpointCallback(save_freq=max(args.steps // 10, 1), save_path=FOLDER, keep_last=2)
callbacks: list[BaseCallback] = [checkpoints]
if args.crash_at is not None:
    callbacks.append(Crash(args.crash_at))

try:
    model = MRQ.resume(FOLDER, env)
except FileNotFoundError:  # the first start, or it was killed before the first checkpoint
    model = MRQ("MlpPolicy", env, seed=0, learning_starts=min(10_000, args.steps // 2))
    model.learn(args.steps, callback=callbacks)
else:
    print(f"resumed after {model.num_timesteps} steps, {model.remaining_timesteps} to go")
    model.learn(model.remaining_timesteps, callback=callbacks, reset_num_timesteps=False)
print(f"finished after {model.num_timesteps} steps, {model.replay_buffer.size()} transitions in the replay buffer")
