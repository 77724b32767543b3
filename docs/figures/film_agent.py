"""
Film a trained agent on a MuJoCo task of Gymnasium: the animation of the README.

    python docs/figures/film_agent.py MODEL.zip --algo drq --env HalfCheetah-v4  # extra mujoco
"""

import argparse
import os
import sys
from pathlib import Path

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported

import gymnasium as gym
from PIL import Image

from sb3_mrq import DRQ, MRQ

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="file of the trained model")
parser.add_argument("--algo", choices=["mrq", "drq"], default="mrq", help="its algorithm (default: %(default)s)")
parser.add_argument("--env", default="HalfCheetah-v5", help="id of the task (default: %(default)s)")
parser.add_argument("--steps", type=int, default=100, help="number of frames (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path(__file__).with_name("agent.gif"), help="file (default: %(default)s)")
args = parser.parse_args()

env = gym.make(args.env, render_mode="rgb_array", width=400, height=220, camera_name="track")
model = {"mrq": MRQ, "drq": DRQ}[args.algo].load(args.model, device="cpu")
frames, total = [], 0.0
obs, _ = env.reset(seed=0)
for _ in range(args.steps):
    action, _ = model.predict(obs, deterministic=True)
    obs, reward, terminated, truncated, _ = env.step(action)
    frames.append(Image.fromarray(env.render()))
    total += float(reward)
    if terminated or truncated:
        break
milliseconds = 1000 // env.metadata["render_fps"]
env.close()

# One palette for all frames and no dithering: parts that do not move take little space
palette = frames[-1].quantize(64)
frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
print(f"{args.out}: {len(frames)} frames, {args.out.stat().st_size / 1e6:.2f} MB, return {total:.0f}")
