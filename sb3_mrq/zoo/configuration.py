"""
Configuration files of rl-zoo3 for ``mrq``: where the default one is, and checks that name what is wrong and where.
"""

import difflib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import sb3_mrq
from sb3_mrq import MRQ

# What rl-zoo3 takes out of a section before the rest goes to the constructor
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
# Arguments of the constructor that rl-zoo3 gives itself
GIVEN_BY_ZOO = frozenset({"self", "env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model"})
HYPERPARAMETERS = frozenset(inspect.signature(MRQ.__init__).parameters) - GIVEN_BY_ZOO


class ConfigurationError(ValueError):
    """A configuration that cannot be used, with a message for its author."""


def default_configuration() -> Path:
    """
    :return: the configuration of ``mrq`` that comes with the package
    """
    package = Path(sb3_mrq.__file__).parent
    # Beside the package in a copy of the repository, inside it where it was installed from a wheel
    folders = [package / "hyperparams", package.parent / "hyperparams"]
    return next((path for path in (folder / "mrq.yml" for folder in folders) if path.is_file()), folders[0] / "mrq.yml")


def closest(name: str, names: Iterable[str]) -> str:
    """
    :param name: a name that does not exist
    :param names: those that do
    :return: a question to append to an error message, empty where none is similar
    """
    matches = difflib.get_close_matches(name, [str(candidate) for candidate in names], n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def check_configuration_file(path: Path) -> None:
    """
    Check what can be checked of a configuration file without knowing the task: that it is a mapping from names to sections,
    and that all names in each section are known.

    :param path: YAML file
    :raises ConfigurationError: with file and line
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
            f"{path}, line 1: there are no sections, of the form 'CartPole-v1:' and indented lines below."
        )
    for section, body in root.value:
        if not isinstance(body, yaml.MappingNode):
            line = section.start_mark.line + 1
            raise ConfigurationError(f"{path}, line {line}: section {section.value} holds no 'name: value' lines.")
        for key, _ in body.value:
            # Of a merge (<<) each section that is merged is checked by itself
            if key.tag != "tag:yaml.org,2002:merge":
                check_hyperparameter_names([str(key.value)], f"{path}, line {key.start_mark.line + 1}")


def check_hyperparameter_names(names: Iterable[str], where: str) -> None:
    """
    :param names: keys of a section
    :param where: where they come from, for the message
    :raises ConfigurationError: for a name that neither MRQ nor rl-zoo3 has
    """
    known = HYPERPARAMETERS | ZOO_KEYS
    for name in names:
        if name in GIVEN_BY_ZOO:
            raise ConfigurationError(f"{where}: {name} is not set here, but on the command line.")
        if name not in known:
            raise ConfigurationError(f"{where}: MRQ has no hyperparameter {name}.{closest(name, known)}")


def check_section(hyperparams: dict[str, Any], where: str) -> None:
    """
    :param hyperparams: what a run will use
    :param where: where they come from, for the message
    :raises ConfigurationError: for an unknown name, or if what every run needs is missing
    """
    check_hyperparameter_names(hyperparams, where)
    for name in ("policy", "n_timesteps"):
        if name not in hyperparams:
            raise ConfigurationError(f"{where}: {name} is missing.")
