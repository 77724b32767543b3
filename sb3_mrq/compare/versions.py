"""
What results depend on besides settings and seed: versions of packages, and the machine.
"""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mrq import MRQ

PACKAGES = ("sb3-mrq", "stable-baselines3", "torch", "gymnasium", "numpy", "rl-zoo3", "mujoco", "dm-control", "ale-py")


def processor() -> str:
    """
    :return: name of the processor, empty if unknown
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit(repository: Path) -> str | None:
    """
    :param repository: a folder
    :return: commit of its git repository, with "-dirty" if files were changed since; None if it is not the top of one
    """
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True) if (repository / ".git").exists() else None
    except OSError:  # there is no git
        return None
    return described.stdout.strip() or None if described else None


def versions() -> str:
    """
    :return: versions of Python and of the installed packages that results depend on
    """
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            revision = commit(Path(__file__).parents[2]) if name == "sb3-mrq" else None
            found.append(f"{name} {version(name)}" + (f" ({revision})" if revision else ""))
        except PackageNotFoundError:
            pass
    return ", ".join(found)


def machine(model: BaseAlgorithm) -> str:
    """
    :param model: a model
    :return: architecture, threads, processor, device, and the precision of MR.Q
    """
    gpu = f", {th.cuda.get_device_name()}" if model.device.type == "cuda" else ""
    precision = f", {model.learner.hyperparameters.precision}" if isinstance(model, MRQ) else ""
    return f"{platform.machine()}, {th.get_num_threads()} threads of {processor()}, {model.device}{gpu}{precision}"
