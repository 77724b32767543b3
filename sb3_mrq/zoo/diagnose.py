"""
The script ``diagnose``: a report on a model in a log folder of rl-zoo3's ``train``, or on any saved model.
"""

import argparse
import importlib
import os
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import create_test_env, get_saved_hyperparams
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import StoreDict, get_model_path
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_mrq.diagnostics import diagnose
from sb3_mrq.envs import AtariWrapper
from sb3_mrq.zoo.configuration import ALGORITHMS, ConfigurationError


def _absolute_path(text: str) -> Path:
    """Make a path independent of the working directory, which environments may change."""
    return Path(text).absolute()


def parse_arguments() -> argparse.Namespace:
    """
    :return: arguments of the command line, named as in rl-zoo3's ``enjoy`` if they select a model
    """
    parser = argparse.ArgumentParser(description="Report on what a trained model has learned: figures, numbers and one page.")
    parser.add_argument("--env", help="environment ID", type=EnvironmentName, required=True)
    parser.add_argument("--algo", help="RL Algorithm", choices=list(ALGORITHMS), default="mrq")
    parser.add_argument("-f", "--folder", help="Log folder (default: %(default)s)", default="logs", type=os.path.abspath)
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest, -1: no exp folder)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load best model instead of last model if available")
    parser.add_argument("--load-checkpoint", type=int, help="Load the checkpoint of this number of timesteps")
    parser.add_argument("--load-last-checkpoint", action="store_true", help="Load last checkpoint instead of last model")
    parser.add_argument("--model", type=_absolute_path, help="Saved model to load, instead of one in the log folder")
    parser.add_argument("--vec-normalize", type=_absolute_path, help="Saved VecNormalize statistics for --model")
    parser.add_argument(
        "-o", "--output", type=_absolute_path, help="Folder for the report (default: diagnosis, next to the model)"
    )
    parser.add_argument("-n", "--n-episodes", help="Number of episodes (default: %(default)s)", default=20, type=int)
    parser.add_argument(
        "--max-steps", help="Maximum number of steps in total (default: %(default)s)", default=20_000, type=int
    )
    parser.add_argument(
        "--exploration-noise", help="Standard deviation of noise on the actions (default: none)", default=0.0, type=float
    )
    parser.add_argument("--n-envs", help="number of environments", default=1, type=int)
    parser.add_argument("--seed", help="Random generator seed", default=0, type=int)
    parser.add_argument("--num-threads", help="Number of threads for PyTorch (-1 to use default)", default=-1, type=int)
    parser.add_argument("--device", help="PyTorch device to be use (ex: cpu, cuda...)", default="auto")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="Additional external Gym environment packages to import")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, help="Keyword arguments to pass to the env constructor")
    return parser.parse_args()


def _normalize(env: VecEnv, path: Path) -> VecEnv:
    """Normalise observations and rewards with the statistics in a file."""
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path} with statistics of VecNormalize.")
    try:
        normalized = VecNormalize.load(str(path), env)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ConfigurationError(f"{path} holds no statistics of VecNormalize: {error}.") from error
    normalized.training = False
    return normalized


def _from_folder(args: argparse.Namespace) -> tuple[Path, VecEnv]:
    """
    :param args: arguments of the command line
    :return: path of the selected model in the log folder, and its environment as in training
    :raises ConfigurationError: if there is no such model
    """
    try:
        _, model_path, log_path = get_model_path(
            args.exp_id,
            args.folder,
            args.algo,
            args.env,
            args.load_best,
            args.load_checkpoint,
            args.load_last_checkpoint,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigurationError(f"{error}. Train one with sb3-mrq train, or name a file with --model.") from error
    folder = Path(log_path) / args.env
    hyperparams, stats_path = get_saved_hyperparams(str(folder), test_mode=True)
    # As in enjoy: arguments of the configuration, replaced by those given to train, updated by those given now
    env_kwargs: dict[str, Any] = hyperparams.pop("env_kwargs", None) or {}
    if (folder / "args.yml").is_file():
        # It holds Python objects. Like the model, it was written by train, so it is trusted.
        given = yaml.load((folder / "args.yml").read_text(), Loader=yaml.UnsafeLoader)["env_kwargs"]
        env_kwargs = given if given is not None else env_kwargs
    env = create_test_env(
        args.env.gym_id,
        n_envs=args.n_envs,
        stats_path=stats_path,
        seed=args.seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs=env_kwargs | (args.env_kwargs or {}),
        vec_env_cls=ExperimentManager.default_vec_env_cls,
    )
    if stats_path is not None and hyperparams.get("normalize"):
        _restore_reward_normalization(env, folder / "vecnormalize.pkl")
    return Path(model_path), env


def _restore_reward_normalization(env: VecEnv, path: Path) -> None:
    """Restore the normalisation of rewards, which rl-zoo3 turns off, as values are in units of training rewards."""
    while not isinstance(env, VecNormalize):
        env = env.venv  # type: ignore[attr-defined]
    statistics = VecNormalize.load(str(path), env.venv)
    env.norm_reward = statistics.norm_reward


def _from_file(args: argparse.Namespace) -> tuple[Path, VecEnv]:
    """
    :param args: arguments of the command line
    :return: path of the model, and an environment, with the paper's preprocessing for Atari games
    :raises ConfigurationError: if the file does not exist
    """
    if not args.model.is_file():
        raise ConfigurationError(f"There is no model {args.model}.")
    is_atari = ExperimentManager.is_atari(args.env.gym_id)
    env: VecEnv = make_vec_env(
        lambda **kwargs: gym.make(args.env.gym_id, **kwargs),
        n_envs=args.n_envs,
        seed=args.seed,
        wrapper_class=AtariWrapper if is_atari else None,
        env_kwargs=args.env_kwargs or {},
    )
    return args.model, env if args.vec_normalize is None else _normalize(env, args.vec_normalize)


def diagnose_script() -> None:
    """
    Write the report requested on the command line.
    """
    args = parse_arguments()
    # Only needed at the end, but an error should come at the start
    importlib.import_module("matplotlib")
    for package in args.gym_packages:
        importlib.import_module(package)
    if args.n_envs < 1:
        raise ConfigurationError(f"n-envs is {args.n_envs}, but must be at least 1.")
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    path, env = _from_folder(args) if args.model is None else _from_file(args)
    print(f"Loading {path}")
    model = ALGORITHMS[args.algo].load(path, device=args.device)
    output = args.output or path.parent / "diagnosis"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The folder {output} cannot be made: {error.strerror}. Choose another one with -o."
        ) from error
    diagnosis = diagnose(
        model, env, args.n_episodes, args.seed, exploration_noise=args.exploration_noise, max_steps=args.max_steps
    )
    env.close()
    page = diagnosis.report(output)
    returns = diagnosis.episode_returns
    print(f"{len(returns)} Episodes\nMean reward: {returns.mean():.2f} +/- {returns.std():.2f}")
    for verdict in diagnosis.verdicts:
        print(verdict)
    print(f"Report: {page}")
