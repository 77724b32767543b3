"""
Train MR.Q on a task and write to one folder: the model, its evaluation, the learning curve (CSV and PNG), a video, and a
report of what the model has learned.

    python examples/train.py
    python examples/train.py --env HalfCheetah-v5 --steps 1000000 --seed 1
    python examples/train.py --env dmc/walker-walk-v0
    python examples/train.py --env ALE/Pong-v5

Needs the extra ``train``, and for such tasks ``mujoco``, ``dmc`` or ``atari``.

Without arguments it trains small networks on a small task, which is solved within minutes. Other tasks get the default
hyperparameters and the number of steps in hyperparams/mrq.yml.
"""

import argparse
import json
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame looks for a display even if it draws to an array

import gymnasium as gym
import matplotlib
import pandas as pd
import yaml
from gymnasium.wrappers import RecordVideo
from matplotlib import pyplot as plt
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.results_plotter import X_TIMESTEPS, ts2xy
from stable_baselines3.common.vec_env import VecEnv

import sb3_mrq.envs
from sb3_mrq import MRQ
from sb3_mrq.diagnostics import diagnose

HYPERPARAMS = Path(__file__).resolve().parents[1] / "hyperparams" / "mrq.yml"
N_EVALUATIONS = 20  # during training
N_EVAL_EPISODES = 10  # of each evaluation, in as many parallel environments; twice as many after training
MAX_EVAL_STEPS = 100_000  # in all, for the memory of the diagnosis: only some Atari games last longer
VIDEO_FRAMES = 500

# A small task: small networks solve it in fewer steps than the default 10,000 random ones.
DEMO_ENV = "Pendulum-v1"
DEMO_STEPS = 4000
DEMO_HYPERPARAMS: dict[str, Any] = {
    "learning_starts": 1000,
    "policy_kwargs": {
        "net_arch": {"encoder": [128, 128], "qf": [128, 128, 128], "pi": [128, 128]},
        "z_s_dim": 128,
        "z_a_dim": 64,
        "z_sa_dim": 128,
    },
}
DEMO_REWARD_THRESHOLD = -200.0  # Gymnasium names none for this task


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default=DEMO_ENV, help="id of the task (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"steps of training (default: {DEMO_STEPS} for {DEMO_ENV}, else see above)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder to write to (default: runs/<env>-<seed>-<time>)")
    return parser.parse_args()


def choose_steps(env_id: str) -> int:
    """Number of training steps for a task."""
    if env_id == DEMO_ENV:
        return DEMO_STEPS
    hyperparams = yaml.safe_load(HYPERPARAMS.read_text())
    section = "atari" if env_id.startswith("ALE/") else env_id
    return int(hyperparams.get(section, hyperparams["default"])["n_timesteps"])


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The task, with the paper's preprocessing if it is an Atari game."""
    env = gym.make(env_id, render_mode=render_mode)
    return sb3_mrq.envs.AtariWrapper(env) if env_id.startswith("ALE/") else env


def choose_policy(observation_space: gym.Space) -> str:
    if isinstance(observation_space, gym.spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


def evaluate(model: MRQ, env: VecEnv, env_id: str, folder: Path) -> None:
    """Play episodes without exploration. Write their returns and lengths, and a report of what the model has learned."""
    diagnosis = diagnose(model, env, 2 * N_EVAL_EPISODES, max_steps=MAX_EVAL_STEPS)
    returns, mean, std = diagnosis.episode_returns, diagnosis.episode_returns.mean(), diagnosis.episode_returns.std()
    evaluation = {
        "env": env_id,
        "steps": model.num_timesteps,
        "mean_return": mean,
        "std_return": std,
        "returns": returns.tolist(),
        "lengths": diagnosis.episode_lengths.tolist(),
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    diagnosis.report(folder / "diagnosis")
    threshold = DEMO_REWARD_THRESHOLD if env_id == DEMO_ENV else gym.spec(env_id).reward_threshold
    verdict = "" if threshold is None else f" ({'solved' if mean >= threshold else 'not solved'}: {threshold:g} is asked for)"
    cut_off = ", cut off" if diagnosis.episode_lengths.sum() >= MAX_EVAL_STEPS else ""
    print(
        f"{env_id} after {model.num_timesteps} steps: {mean:.1f} +/- {std:.1f} over {len(returns)} episodes{cut_off}{verdict}"
    )


def plot(evaluations: pd.DataFrame, folder: Path, title: str) -> None:
    """Draw the returns of the training episodes and of the evaluations over the steps of training."""
    plt.figure(figsize=(8, 5))
    plt.plot(*ts2xy(load_results(str(folder)), X_TIMESTEPS), ".", color="0.6", label="training episodes, with exploration")
    if not evaluations.empty:
        mean, std = evaluations.mean(axis=1), evaluations.std(axis=1, ddof=0)
        plt.plot(mean.index, mean, "o-", color="C0", label=f"evaluation, mean of {evaluations.shape[1]} episodes")
        plt.fill_between(mean.index, mean - std, mean + std, color="C0", alpha=0.2, label="its standard deviation")
    plt.title(title)
    plt.xlabel("environment steps")
    plt.ylabel("return of an episode")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.tight_layout()
    plt.savefig(folder / "learning_curve.png", dpi=150)


def film(model: MRQ, env_id: str, folder: Path, seed: int) -> None:
    """Record the first steps of the trained policy, over several episodes if they are short."""
    env = RecordVideo(
        make_env(env_id, render_mode="rgb_array"),
        str(folder),
        step_trigger=lambda step: step == 0,
        video_length=VIDEO_FRAMES,
        name_prefix="video",
    )
    obs, _ = env.reset(seed=seed)
    for _ in range(VIDEO_FRAMES):
        action, _ = model.predict(obs, deterministic=True)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()


def main() -> None:
    args = parse_args()
    steps = args.steps or choose_steps(args.env)
    folder = args.out or Path("runs") / f"{args.env.replace('/', '-')}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.absolute()  # the environment may change the working directory
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    # Nobody can act on these: tqdm's bar works, and the folder of a run holds its video
    for message in ("rich is experimental", ".*Overwriting existing videos"):
        warnings.filterwarnings("ignore", message)

    env = Monitor(make_env(args.env), str(folder / "monitor.csv"))
    eval_env = make_vec_env(partial(make_env, args.env), n_envs=N_EVAL_EPISODES, seed=args.seed + 1)

    hyperparams = DEMO_HYPERPARAMS if args.env == DEMO_ENV else {}
    model = MRQ(choose_policy(env.observation_space), env, seed=args.seed, verbose=1, **hyperparams)
    model.set_logger(configure(str(folder), ["csv"]))
    eval_callback = EvalCallback(
        eval_env, n_eval_episodes=N_EVAL_EPISODES, eval_freq=max(steps // N_EVALUATIONS, 1), log_path=str(folder)
    )
    model.learn(steps, callback=eval_callback, log_interval=1, progress_bar=True)
    env.close()

    model.save(folder / "model")
    evaluations = pd.DataFrame(
        eval_callback.evaluations_results, index=pd.Index(eval_callback.evaluations_timesteps, name="steps")
    ).add_prefix("episode_")
    evaluations.to_csv(folder / "evaluations.csv")
    plot(evaluations, folder, f"MR.Q on {args.env}, seed {args.seed}")
    try:
        film(model, args.env, folder, args.seed)
    except Exception as error:  # without a display each renderer raises its own
        print(f"No video: {args.env} cannot be rendered here ({error!r}).")
    evaluate(model, eval_env, args.env, folder)
    print(f"Everything is in {folder}")


if __name__ == "__main__":
    main()
