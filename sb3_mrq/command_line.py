"""
The command ``sb3-mrq``: usage, version, and errors in one line. The scripts are in :mod:`sb3_mrq.zoo`, which needs rl-zoo3.
"""

import linecache
import sys
import traceback
from types import FrameType

import gymnasium as gym

import sb3_mrq

USAGE = """usage: sb3-mrq <script> [arguments]
       sb3-mrq --help | --version

Scripts of rl-zoo3: train, enjoy, record_video, record_training, plot_train, all_plots, plot_from_file, benchmark, push_to_hub,
load_from_hub.
Scripts of this package: diagnose, a report on what a trained model has learned; compare, which trains algorithms on the same
tasks and reports on them; report, which makes that report again; speed, how fast a task trains here.
Each takes its own arguments: sb3-mrq <script> --help. The algorithms of this package are mrq, the default,
and drq (--algo drq).
plot_train takes -o FILE too, and writes its figure there.
"""

# Extra of this package that installs a module
EXTRAS = {
    "Box2D": "box2d",
    "ale_py": "atari",
    "cv2": "atari",
    "dm_control": "dmc",
    "huggingface_hub": "zoo",
    "huggingface_sb3": "zoo",
    "matplotlib": "zoo",
    "moviepy": "zoo",
    "mujoco": "mujoco",
    "optuna": "zoo",
    "pandas": "zoo",
    "pytablewriter": "zoo",
    "ray": "ray",
    "rl_zoo3": "zoo",
    "rliable": "zoo",
    "sb3_contrib": "zoo",
    "scipy": "zoo",
    "seaborn": "zoo",
    "sklearn": "zoo",
    "shimmy": "dmc",
    "tqdm": "compare",
}

# Packages that read the arguments and files of the user, and raise errors about them
READERS = ("sb3_mrq", "rl_zoo3", "stable_baselines3", "huggingface_hub", "huggingface_sb3")


def _package(frame: FrameType) -> str:
    """
    :param frame: a frame of a traceback
    :return: the top-level package of its code, also where ``runpy`` executes it as ``__main__``
    """
    spec = frame.f_globals.get("__spec__")
    name = frame.f_globals.get("__name__", "") if spec is None else spec.name
    return name.partition(".")[0]


def is_expected(error: Exception) -> bool:
    """
    Tell errors that are raised on purpose, for the user, from bugs. An error of the first kind comes from a package that reads
    arguments and files, and is one of these:

    - it is raised by a ``raise`` or ``assert`` statement with a message,
    - the system refused a file or found no module,
    - it lies in text of the user that is evaluated as Python code.

    A common base class would not do, as these packages share none. Other errors that Python, NumPy or torch raise there are
    bugs. Environments, callbacks and other code of the user keep their traceback.

    :param error: error of a script
    :return: whether its message tells the user all there is to know
    """
    calls = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, ModuleNotFoundError) or (isinstance(error, OSError) and error.filename is not None):
        # The standard library raises them for its caller
        calls = [call for call in calls if _package(call[0]) not in sys.stdlib_module_names]
        return bool(calls) and _package(calls[-1][0]) in READERS
    frame, line = calls[-1]
    if isinstance(error, SyntaxError) or frame.f_code.co_filename == "<string>":
        return _package(frame) in READERS
    statement = linecache.getline(frame.f_code.co_filename, line).split(maxsplit=1)
    return _package(frame) in READERS and statement[:1] in (["raise"], ["assert"]) and bool(str(error))


def _message(error: Exception) -> str | None:
    """
    :param error: error of a script
    :return: one line for the user, None if it is a bug
    """
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        module = error.name.partition(".")[0]
        if module in EXTRAS:
            return f'{module} is not installed. Install it with: pip install "sb3-mrq[{EXTRAS[module]}]"'
    if isinstance(error, gym.error.DependencyNotInstalled) or is_expected(error):
        text = (
            f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename is not None else str(error)
        )
        return " ".join(text.split())
    return None


def main() -> None:
    """
    Run the script named on the command line.
    """
    script, *arguments = sys.argv[1:] or [""]
    if script in ("", "-h", "--help"):
        print(USAGE)
        sys.exit(0 if script else 2)
    if script == "--version":
        print(f"sb3-mrq {sb3_mrq.__version__}")
        return
    try:
        # These, help and version do without rl-zoo3
        if script == "speed":
            from sb3_mrq.speed import speed_script

            speed_script(arguments)
            return
        from sb3_mrq.zoo.scripts import run

        run(script, arguments)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"sb3-mrq {script}: error: {message}", file=sys.stderr)
        sys.exit(2)
