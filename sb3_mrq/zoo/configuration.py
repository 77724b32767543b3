"""
Configuration files of rl-zoo3 for ``mrq`` and ``drq``: location of the default file, and validation with file and line in
the messages.
"""

import difflib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import sb3_mrq
from sb3_mrq import DRQ, MRQ
from sb3_mrq.arguments import FOREIGN_ARGUMENTS

# Keys that rl-zoo3 removes before passing a section to the constructor
ZOO_KEYS = frozenset(
    {
        "callback",
        "env_kwargs",
        "env_wrapper",
        "frame_stack",
        "monitor_kwargs",
        "n_envs",
        "n_timesteps",
        "noise_std",
        "noise_type",
        "normalize",
        "vec_env_wrapper",
    }
)
# Arguments of the constructor that rl-zoo3 sets itself
GIVEN_BY_ZOO = frozenset({"self", "env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model"})
# By the names that rl-zoo3 gives them
ALGORITHMS: dict[str, type[MRQ]] = {"mrq": MRQ, "drq": DRQ}
FOREIGN = FOREIGN_ARGUMENTS["MRQ"]
# The same for both
HYPERPARAMETERS = frozenset(inspect.signature(MRQ.__init__).parameters) - GIVEN_BY_ZOO


class ConfigurationError(ValueError):
    """Invalid configuration or command line, with a message for the user."""


def default_configuration(algo: str) -> Path:
    """
    :param algo: ``mrq`` or ``drq``
    :return: path of its default configuration
    """
    package = Path(sb3_mrq.__file__).parent
    # Next to the package in the repository, inside it when installed from a wheel
    folders = [package / "hyperparams", package.parent / "hyperparams"]
    paths = [folder / f"{algo}.yml" for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def closest(name: str, names: Iterable[str]) -> str:
    """
    :param name: an unknown name
    :param names: the known names
    :return: suggestion to append to an error message, empty if no name is similar
    """
    matches = difflib.get_close_matches(name, [str(candidate) for candidate in names], n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def check_configuration_file(path: Path, candidates: tuple[str, ...]) -> None:
    """
    Validate a configuration file: it must map names to sections, and all names in the section that is used and in ``default``
    must be known. Other sections may be for other algorithms.

    :param path: YAML file
    :param candidates: names of sections, of which the first that is there is used
    :raises ConfigurationError: if the file is invalid, with file and line
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{path}{where}: {error.problem or error.context}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}.") from error

    if not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(
            f"{path}, line 1: there are no sections. A section is a line such as 'CartPole-v1:' with indented lines below it."
        )
    names = [key.value for key, _ in root.value]
    used = next((name for name in candidates if name in names), None)
    if used is None:
        raise ConfigurationError(f"{path} has no section {' or '.join(candidates)}.")
    for key, body in root.value:
        if key.value not in (used, "default"):
            continue
        if not isinstance(body, yaml.MappingNode):
            line = key.start_mark.line + 1
            raise ConfigurationError(f"{path}, line {line}: section {key.value} holds no 'name: value' lines.")
        _check_names(path, body)


def _check_names(path: Path, body: yaml.MappingNode) -> None:
    """Check the names in a section and in those that it merges by ``<<``."""
    for key, value in body.value:
        if key.tag != "tag:yaml.org,2002:merge":
            check_hyperparameter_names([str(key.value)], f"{path}, line {key.start_mark.line + 1}")
            continue
        for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(merged, yaml.MappingNode):
                _check_names(path, merged)


def check_hyperparameter_names(names: Iterable[str], where: str) -> None:
    """
    :param names: keys of a section
    :param where: their origin, for the message
    :raises ConfigurationError: for a name that is unknown to MRQ and rl-zoo3
    """
    known = HYPERPARAMETERS | ZOO_KEYS
    for name in names:
        if name in GIVEN_BY_ZOO:
            raise ConfigurationError(f"{where}: {name} is not set here, but on the command line.")
        if name not in known:
            hint = f" {FOREIGN[name]}" if name in FOREIGN else closest(name, known)
            raise ConfigurationError(f"{where}: MRQ has no hyperparameter {name}.{hint}")


def check_section(hyperparams: dict[str, Any], where: str) -> None:
    """
    :param hyperparams: hyperparameters of a run
    :param where: their origin, for the message
    :raises ConfigurationError: for an unknown name, if a required one is missing, or for a value that rl-zoo3 cannot use
    """
    check_hyperparameter_names(hyperparams, where)
    for name in ("policy", "n_timesteps"):
        if name not in hyperparams:
            raise ConfigurationError(f"{where}: {name} is missing.")
    n_timesteps, n_envs = hyperparams["n_timesteps"], hyperparams.get("n_envs", 1)
    try:
        int(n_timesteps)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"n_timesteps is {n_timesteps!r}, but must be a number. YAML reads 1e6 as text: write 1000000 or 1.0e+6."
        ) from None
    if not isinstance(n_envs, int) or n_envs < 1:
        raise ConfigurationError(f"n_envs is {n_envs!r}, but must be an integer of at least 1.")
