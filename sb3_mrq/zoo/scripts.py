"""
All scripts of rl-zoo3 with ``mrq`` and ``drq`` as additional algorithms, and ``diagnose``, ``compare`` and ``report``.
"""

import argparse
import contextlib
import glob
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3.utils
import torch as th
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import StoreDict
from stable_baselines3.common.utils import get_device

from sb3_mrq.envs import rendering
from sb3_mrq.persist.checkpoints import INFO, MODEL, newest_with_model
from sb3_mrq.zoo.configuration import ALGORITHMS, ConfigurationError, closest
from sb3_mrq.zoo.exp_manager import CHECKPOINTS, MRQExperimentManager
from sb3_mrq.zoo.hub import patched_hub

# Module of each script, with the function to call unless it only runs as a program
SCRIPTS = {
    "train": "rl_zoo3.train:train",
    "enjoy": "rl_zoo3.enjoy:enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "plot_train": "rl_zoo3.plots:plot_train",
    "all_plots": "rl_zoo3.plots:all_plots",
    "plot_from_file": "rl_zoo3.plots:plot_from_file",
    "benchmark": "rl_zoo3.benchmark",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "load_from_hub": "rl_zoo3.load_from_hub",
    "diagnose": "sb3_mrq.zoo.diagnose:diagnose_script",
    "compare": "sb3_mrq.compare.command:compare_script",
    "report": "sb3_mrq.compare.report:report_script",
}
PLOTS = ("plot_train", "all_plots", "plot_from_file")
# Scripts that run a trained model from the folder -f
WATCH = ("enjoy", "record_video", "record_training", "push_to_hub")


def _known_options(arguments: list[str]) -> argparse.Namespace:
    """
    :param arguments: arguments of a script that takes a task
    :return: the options used here, None if missing; errors are left to the script
    """
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--algo", "--env", "--eval-freq", "--eval-episodes", "--device"):
        parser.add_argument(name)
    parser.add_argument("-f", "--folder", default="rl-trained-agents")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    return parser.parse_known_args(arguments)[0]


def _take_dataset(arguments: list[str]) -> list[str]:
    """
    :param arguments: arguments of ``train``
    :return: the arguments without ``--dataset`` and ``--offline-steps``, which rl-zoo3 does not know
    :raises ConfigurationError: if they do not make sense
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset")
    parser.add_argument("--offline-steps")
    options, others = parser.parse_known_args(arguments)
    if (options.dataset is None) != (options.offline_steps is None):
        raise ConfigurationError("Training from data takes both --dataset PATH and --offline-steps N.")
    if options.dataset is None:
        return arguments
    if not options.offline_steps.isdigit() or int(options.offline_steps) == 0:
        raise ConfigurationError(f"--offline-steps is {options.offline_steps}, but must be a number of steps.")
    # Environments may change the working directory; what is no file is the id of a Minari dataset
    files = [path for path in (options.dataset, f"{options.dataset}.pkl") if os.path.isfile(path)]
    MRQExperimentManager.dataset = os.path.abspath(files[0]) if files else options.dataset
    MRQExperimentManager.offline_steps = int(options.offline_steps)
    return others


def check_task(env_id: str) -> None:
    """
    :param env_id: id of a task
    :raises ConfigurationError: if it is not registered, with the closest id
    """
    if env_id in gym.registry:
        return
    if ":" in env_id:
        package, _, name = env_id.partition(":")
        raise ConfigurationError(
            f"rl-zoo3 does not accept a module in the id of a task, as in {env_id}: use --gym-packages {package} --env {name}."
        )
    raise ConfigurationError(f"There is no task {env_id}.{closest(env_id, gym.registry)}")


def _check_device(device: str) -> None:
    """
    :param device: name of a device of PyTorch
    :raises ConfigurationError: if there is no such device
    """
    try:
        th.empty(0, device=get_device(device))
    except (AssertionError, RuntimeError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise ConfigurationError(f"The device {device} cannot be used: {reason}. Give another one with --device.") from error


def _check_trained(algo: str, env_id: str, folder: str) -> None:
    """
    Otherwise ``enjoy`` looks for a model in a repository of the Hugging Face Hub that has none.

    :param algo: ``mrq`` or ``drq``
    :param env_id: id of a task
    :param folder: folder of models, as given by ``-f``
    :raises ConfigurationError: if there is no model of the algorithm for the task
    """
    name = EnvironmentName(env_id)
    runs = Path(folder) / algo
    # With --exp-id -1, models lie in the folder of the algorithm itself
    if not any(runs.glob(f"{glob.escape(name)}_*")) and not any(runs.glob("*.zip")):
        raise ConfigurationError(
            f"There is no model of {algo} for {env_id} in the folder {folder}. Name the log folder of sb3-mrq train with -f: "
            "its default is logs."
        )


def _check_results(script: str, arguments: list[str]) -> None:
    """
    :param script: ``plot_train`` or ``all_plots``
    :param arguments: arguments of the script
    :raises ConfigurationError: if nothing would be plotted
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-a", "--algos", "--algo", nargs="+")
    parser.add_argument("-e", "--env", nargs="+")
    parser.add_argument("-f", "--exp-folders", "--exp-folder", nargs="+")
    options = parser.parse_known_args(arguments)[0]
    if None in (options.algos, options.env, options.exp_folders):
        raise ConfigurationError(
            "The algorithms (-a), tasks (-e) and log folders (-f) are needed: -a mrq -e Pendulum-v1 -f logs."
        )
    file = "*monitor.csv" if script == "plot_train" else "evaluations.npz"
    patterns = [f"{algo.lower()}/*{glob.escape(env)}*/{file}" for algo in options.algos for env in options.env]
    if not any(any(Path(folder).glob(pattern)) for folder in options.exp_folders for pattern in patterns):
        kind = "training" if script == "plot_train" else "evaluations"
        raise ConfigurationError(
            f"There are no results of {kind} for {', '.join(options.algos)} on {', '.join(options.env)} in "
            f"{', '.join(options.exp_folders)}. Name the log folder of sb3-mrq train with -f."
        )


def _evaluation_arguments(options: argparse.Namespace) -> list[str]:
    """
    :param options: options of ``train`` for ``mrq`` or ``drq``
    :return: interval and number of episodes of the paper's evaluations, unless given in the options
    """
    arguments = []
    if options.eval_freq is None:
        is_atari = options.env in gym.registry and ExperimentManager.is_atari(options.env)
        arguments += ["--eval-freq", "100000" if is_atari else "5000"]
    if options.eval_episodes is None:
        arguments += ["--eval-episodes", "10"]
    return arguments


def _newest_checkpoint(arguments: list[str]) -> list[str]:
    """
    Replace a folder given as ``--trained-agent``, of a run or of checkpoints, by the model of its newest checkpoint.

    :param arguments: arguments of ``train``
    :return: the changed arguments
    :raises ConfigurationError: for a folder without checkpoints
    """
    option = "--trained-agent"
    arguments = [
        part
        for argument in arguments
        for part in (argument.split("=", 1) if argument.startswith(f"{option}=") else [argument])
    ]
    for i, argument in enumerate(arguments[:-1]):
        folder = Path(arguments[i + 1])
        if argument not in ("-i", option) or folder.is_file():
            continue
        if not folder.is_dir():
            raise ConfigurationError(f"There is no file or folder {folder} of a trained agent.")
        if (folder / CHECKPOINTS).is_dir():
            folder = folder / CHECKPOINTS
        if not (folder / INFO).exists():
            newest = newest_with_model(folder)
            if newest is None:
                raise ConfigurationError(
                    f"There is no complete checkpoint in {folder}. A resumed run writes its checkpoints to the folder it was "
                    "resumed from."
                )
            folder = newest
        arguments[i + 1] = str(folder / MODEL)
    return arguments


def _folder_names(arguments: list[str]) -> list[str]:
    """
    Convert ids such as ``dmc/walker-walk-v0`` to the folder names of rl-zoo3, in which the plotting scripts look for tasks.

    :param arguments: arguments of a plotting script
    :return: the changed arguments
    """
    return [EnvironmentName(argument) if argument in gym.registry else argument for argument in arguments]


def _our_command(command: list[str]) -> list[str]:
    """
    :param command: command with which a script of rl-zoo3 starts another one
    :return: the corresponding command of this package
    """
    command = [getattr(argument, "gym_id", argument) for argument in command]
    here = [sys.executable, "-m", "sb3_mrq.zoo"]
    for theirs, script in ((["python", "enjoy.py"], "enjoy"), (["python", "-m", "rl_zoo3.record_video"], "record_video")):
        if command[: len(theirs)] == theirs:
            return [*here, script, *command[len(theirs) :]]
    return command


@contextlib.contextmanager
def _patched_subprocesses() -> Iterator[None]:
    """
    Patch ``benchmark`` and ``record_training``, so that the scripts they start support both algorithms, and so that they find
    the folders of task ids with a slash.
    """
    call, get_trained_models = subprocess.call, rl_zoo3.utils.get_trained_models

    def our_call(command: list[str], **kwargs: Any) -> int:
        return call(_our_command(command), **kwargs)

    def models_by_folder(log_folder: str) -> dict[str, tuple[str, str]]:
        return {name: (algo, EnvironmentName(env)) for name, (algo, env) in get_trained_models(log_folder).items()}

    subprocess.call = our_call  # type: ignore[assignment]
    rl_zoo3.utils.get_trained_models = models_by_folder
    try:
        yield
    finally:
        subprocess.call, rl_zoo3.utils.get_trained_models = call, get_trained_models


@contextlib.contextmanager
def _ffmpeg() -> Iterator[None]:
    """
    Provide ``ffmpeg`` for ``record_training`` if the system lacks it, from imageio-ffmpeg and with the fonts of matplotlib.
    """
    if shutil.which("ffmpeg") is not None or importlib.util.find_spec("imageio_ffmpeg") is None:
        yield
        return
    import imageio_ffmpeg
    import matplotlib

    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
        os.environ["PATH"] = f"{folder}{os.pathsep}{before['PATH']}"
        fonts = Path(folder) / "fonts.conf"
        fonts.write_text(
            f"<fontconfig><dir>{Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'}</dir>"
            "<alias><family>Sans</family><prefer><family>DejaVu Sans</family></prefer></alias></fontconfig>"
        )
        os.environ.setdefault("FONTCONFIG_FILE", str(fonts))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _text_without_quotes() -> Iterator[None]:
    """
    Accept text without inner quotes, as in ``precision:float32``, in ``-params``, ``--env-kwargs`` and ``--eval-env-kwargs``.
    rl-zoo3 evaluates it as Python code.
    """
    evaluate = StoreDict.__call__

    def store(self: Any, parser: Any, namespace: Any, values: list[str], option_string: str | None = None) -> None:
        settings: dict[str, Any] = {}
        for argument in values:
            name, _, text = argument.partition(":")
            if not text:
                raise ConfigurationError(f"{option_string} {argument} sets nothing: write {name}:VALUE.")
            try:
                evaluate(self, parser, namespace, [argument], option_string)
                settings.update(getattr(namespace, self.dest))
            except Exception as error:
                if set(text) & set("()[]{}'\""):
                    raise ConfigurationError(f"{option_string} {argument} is not valid in Python: {error}.") from error
                settings[name] = text
        setattr(namespace, self.dest, settings)

    StoreDict.__call__ = store  # type: ignore[method-assign]
    try:
        yield
    finally:
        StoreDict.__call__ = evaluate  # type: ignore[method-assign]


def _plot(script: str, arguments: list[str]) -> None:
    """
    Run a plotting script, with a warning if nobody will see its figures. rl-zoo3's ``plot_train`` has no ``-o FILE``, which is
    added here.

    :param script: name of the script
    :param arguments: arguments of the script
    :raises ConfigurationError: if nothing would be plotted, or if the file cannot be written
    """
    plot = getattr(importlib.import_module("rl_zoo3.plots"), script)
    from matplotlib import pyplot as plt

    arguments = _folder_names(arguments)
    if script != "plot_from_file":
        _check_results(script, arguments)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-o", "--output")
    options, others = parser.parse_known_args(arguments)
    if script != "all_plots" and options.output is None and plt.get_backend().lower() == "agg":
        print("There is no display, so no figure will be shown. Write it to a file with -o FILE.", file=sys.stderr)
    if script != "plot_train" or options.output is None:
        sys.argv[1:] = arguments
        plot()
        return
    sys.argv[1:] = others
    plt.switch_backend("agg")
    plot()
    try:
        plt.savefig(options.output)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The figure cannot be written to {options.output}: {error}.") from error
    finally:
        plt.close()


def _prepare(script: str, arguments: list[str]) -> list[str]:
    """
    Check the arguments of a script that takes a task, and register the environments in ``--gym-packages``.

    :param script: name of the script
    :param arguments: arguments of the script
    :return: the arguments, with those that this package adds
    :raises ConfigurationError: for mistakes in them
    """
    options = _known_options(arguments)
    for package in options.gym_packages:
        importlib.import_module(package)
    if options.algo is None and script in ("train", *WATCH):
        print("No --algo is given: mrq is used.")
        options.algo = "mrq"
        arguments = ["--algo", "mrq", *arguments]
    if options.env is not None:
        check_task(options.env)
        if script != "train" and "mujoco" in str(gym.registry.get(options.env)):
            rendering.choose_backend()
    if options.device is not None:
        _check_device(options.device)
    if options.algo in ALGORITHMS and script == "train":
        return [*_newest_checkpoint(_take_dataset(arguments)), *_evaluation_arguments(options)]
    if options.algo in ALGORITHMS and script in WATCH:
        _check_trained(options.algo, options.env or "CartPole-v1", options.folder)
    return arguments


def run(script: str, arguments: list[str]) -> None:
    """
    Run a script in this process.

    :param script: name of the script, see ``SCRIPTS``
    :param arguments: arguments of the script
    :raises ConfigurationError: for an unknown script or task, and other mistakes in the arguments
    """
    if script not in SCRIPTS:
        raise ConfigurationError(
            f"There is no script {script}.{closest(script, SCRIPTS)} The scripts are {', '.join(SCRIPTS)}."
        )
    sys.argv = [f"sb3-mrq {script}", *arguments]
    wants_help = not {"-h", "--help"}.isdisjoint(arguments)
    if script in PLOTS and not wants_help:
        _plot(script, arguments)
        return
    if not wants_help:
        sys.argv[1:] = _prepare(script, arguments)
    module, _, function = SCRIPTS[script].partition(":")
    with _text_without_quotes():
        if function:
            getattr(importlib.import_module(module), function)()
        else:
            hub = patched_hub(sys.argv[1:]) if script == "push_to_hub" else contextlib.nullcontext()
            with _patched_subprocesses(), _ffmpeg(), hub:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
