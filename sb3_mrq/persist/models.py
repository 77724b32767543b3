"""
Checks of saved models before anything in the file is unpickled.
"""

import io
import json
import pathlib
import zipfile
from typing import Any

from stable_baselines3.common.save_util import open_path

# Attributes that no other algorithm saves
OWN_ATTRIBUTES = {"encoder_horizon", "encoder_learning_rate", "min_td_error"}


def read_attributes(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
    """
    :param path: path of a saved model, with or without ``.zip``, or a file object, whose position is restored
    :return: the attributes by name, each that is not plain JSON as a dict with its description. Empty if the file is not a
        saved model.
    """
    file = open_path(path, "r", suffix="zip")
    position = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            attributes = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        return {}
    finally:
        if file is path:
            file.seek(position)
        else:
            file.close()
    return attributes if isinstance(attributes, dict) else {}


def name_of_algorithm(attributes: dict[str, Any]) -> str:
    """
    :param attributes: attributes of a model
    :return: the name of its algorithm, or a description if it is unknown
    """
    if OWN_ATTRIBUTES & attributes.keys():
        # Models of 0.1 do not name it
        return attributes.get("algorithm", "MRQ")
    policy_class = attributes.get("policy_class")
    module = policy_class.get("__module__", "") if isinstance(policy_class, dict) else ""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if package in ("stable_baselines3", "sb3_contrib") and name not in ("", "common"):
        return name.upper()
    # On-policy algorithms share their policies
    return "PPO" if "clip_range" in attributes else "another algorithm"


def check_saved_model(path: str | pathlib.Path | io.BufferedIOBase, algorithm: str) -> None:
    """
    :param path: path of a saved model, with or without ``.zip``, or a file object
    :param algorithm: name of the algorithm that will load it
    :raises ValueError: if it is a model of another algorithm. Files that are not saved models are not checked.
    """
    attributes = read_attributes(path)
    if attributes and (found := name_of_algorithm(attributes)) != algorithm:
        name = path if isinstance(path, (str, pathlib.Path)) else "The file"
        raise ValueError(f"{name} holds a model of {found}, not of {algorithm}.")
