"""
Command line: all scripts of rl-zoo3 with ``mrq`` and ``drq`` as additional algorithms, and ``diagnose``.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
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
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager

from sb3_mrq.envs import rendering
from sb3_mrq.persist.checkpoints import INFO, MODEL, newest_with_model
from sb3_mrq.zoo.configuration import ALGORITHMS, ConfigurationError, closest
from sb3_mrq.zoo.exp_manager import CHECKPOINTS

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
}

USAGE = f"""usage: sb3-mrq <script> [arguments]

Scripts of rl-zoo3: {", ".join(name for name in SCRIPTS if name != "diagnose")}.
Script of this package: diagnose, a report on what a trained model has learned.
Each takes its own arguments: sb3-mrq <script> --help. The algorithms of this package are --algo mrq and --algo drq.
"""

# Extra of this package that installs a module
EXTRAS = {
    "Box2D": "box2d",
    "ale_py": "atari",
    "cv2": "atari",
    "dm_control": "dmc",
    "huggingface_hub": "zoo",
    "matplotlib": "zoo",
    "moviepy": "zoo",
    "mujoco": "mujoco",
    "optuna": "zoo",
    "pandas": "zoo",
    "pytablewriter": "zoo",
    "rliable": "zoo",
    "scipy": "zoo",
    "seaborn": "zoo",
    "sklearn": "zoo",
    "shimmy": "dmc",
}


def _install_command(module: str) -> str:
    return f'{module} is not installed. Install it with: pip install "sb3-mrq[{EXTRAS[module]}]"'


def _known_options(arguments: list[str]) -> argparse.Namespace:
    """
    :param arguments: arguments of a script that takes a task
    :return: the options used here, None if missing; errors are left to the script
    """
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--algo", "--env", "--eval-freq", "--eval-episodes"):
        parser.add_argument(name)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    return parser.parse_known_args(arguments)[0]


def _check_task(env_id: str) -> None:
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


def _evaluation_arguments(options: argparse.Namespace) -> list[str]:
    """
    :param options: options of ``train`` for ``mrq``
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
        if argument not in ("-i", option) or not folder.is_dir():
            continue
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
    Patch ``benchmark`` and ``record_training``, so that the scripts they start support ``mrq``, and so that they find the
    folders of task ids with a slash.
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


def _supply_generate_metadata() -> None:
    """
    Provide the function ``generate_metadata`` for ``push_to_hub``, which huggingface_sb3 3.2 has renamed.
    """
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):

        def generate_metadata(*args: Any) -> dict[str, Any]:
            return hub._generate_metadata(*args).to_dict()

        hub.generate_metadata = generate_metadata  # type: ignore[attr-defined]


def run(script: str, arguments: list[str]) -> None:
    """
    Run a script in this process.

    :param script: name of the script, see ``SCRIPTS``
    :param arguments: arguments of the script
    :raises ConfigurationError: for an unknown task
    """
    if script in ("plot_train", "all_plots", "plot_from_file"):
        arguments = _folder_names(arguments)
    else:
        options = _known_options(arguments)
        for package in options.gym_packages:
            importlib.import_module(package)
        if options.env is not None:
            _check_task(options.env)
            if script != "train" and "mujoco" in str(gym.registry.get(options.env)):
                rendering.choose_backend()
        if script == "train" and options.algo in ALGORITHMS:
            arguments = [*_newest_checkpoint(arguments), *_evaluation_arguments(options)]

    if script == "push_to_hub":
        _supply_generate_metadata()
    module, _, function = SCRIPTS[script].partition(":")
    sys.argv = [f"sb3-mrq {script}", *arguments]
    if function:
        getattr(importlib.import_module(module), function)()
    else:
        with _patched_subprocesses(), _ffmpeg():
            runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """
    Run the script named on the command line.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    script, *rest = arguments
    if script not in SCRIPTS:
        sys.exit(f"sb3-mrq: error: there is no script {script}.{closest(script, SCRIPTS)}\n\n{USAGE}")
    try:
        run(script, rest)
    except (ConfigurationError, gym.error.DependencyNotInstalled) as error:
        sys.exit(f"sb3-mrq {script}: error: {error}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRAS:
            raise
        sys.exit(f"sb3-mrq {script}: error: {_install_command(error.name.split('.')[0])}")
