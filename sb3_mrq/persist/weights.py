"""
Weights in the safetensors format, for sharing. Unlike pickles, these files run no code when they are loaded.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch as th
from safetensors import SafetensorError, safe_open
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_mrq.persist.files import atomic_file
from sb3_mrq.persist.models import check_saved_model
from sb3_mrq.persist.spaces import describe_space, show_space

FORMAT = "sb3-mrq weights 1"
# Names of the reward scales in files of version 0.1, which do not hold them as buffers of the critics
REWARD_SCALES = {"reward_scale": "critic.reward_scale", "target_reward_scale": "critic_target.reward_scale"}


def _target(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.safetensors")


def save_weights(model: OffPolicyAlgorithm, path: str | Path) -> None:
    """
    Save the weights of all networks, including targets, and the reward scales, but no optimisers, hyperparameters or replay
    buffer. An existing file is replaced only when the new one is complete.

    :param model: the model
    :param path: path of the file; ``.safetensors`` is added if it has no suffix
    """
    parameters = model.get_parameters()
    # Copies, as safetensors rejects tensors that share memory
    tensors = {
        name: value.detach().cpu().clone(memory_format=th.contiguous_format) for name, value in parameters["policy"].items()
    }
    metadata = {
        "format": FORMAT,
        "observation_space": json.dumps(describe_space(model.observation_space)),
        "action_space": json.dumps(describe_space(model.action_space)),
    }
    data = safetensors.torch.save(tensors, metadata)
    with atomic_file(_target(path)) as file:
        file.write(data)


def load_weights(model: OffPolicyAlgorithm, path: str | Path) -> None:
    """
    Load weights from a file into a model of the same architecture. Optimisers and hyperparameters do not change.

    :param model: the model
    :param path: path of the file, with or without the suffix ``.safetensors``
    :raises FileNotFoundError: if the file does not exist
    :raises ValueError: if the file holds no weights, or weights for other spaces or another architecture; the model does not
        change
    """
    path = path if Path(path).is_file() else _target(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not contain weights of MR.Q in the format of this version of sb3-mrq.")
    for name in ("observation_space", "action_space"):
        found, expected = json.loads(metadata[name]), describe_space(getattr(model, name))
        if found != expected:
            raise ValueError(
                f"The weights in {path} are for another {name.replace('_', ' ')}: {show_space(found)}, but the model has "
                f"{show_space(expected)}."
            )
    present = model.policy.state_dict()
    scales = json.loads(metadata.get("reward_scales", "{}"))
    for name, key in REWARD_SCALES.items():
        if key not in weights:
            weights[key] = th.tensor(float(scales[name])) if name in scales else present[key]
    for name in sorted(weights.keys() | present.keys()):
        shape, expected_shape = (tuple(values[name].shape) if name in values else "none" for values in (weights, present))
        if shape != expected_shape:
            raise ValueError(
                f"The weights in {path} are for another architecture: {name} has the shape {shape}, not {expected_shape}. "
                "Create the model with the policy and policy_kwargs that the weights were trained with."
            )
    parameters: dict[str, Any] = {"policy": weights}
    model.set_parameters(parameters, exact_match=False)


def restore_old_reward_scales(model: Any) -> None:
    """
    Move reward scales from attributes of the model, where files of version 0.1 hold them, to the critics.

    :param model: an ``MRQ``
    """
    for name, key in REWARD_SCALES.items():
        if name in model.__dict__:
            model.policy.get_buffer(key).fill_(model.__dict__.pop(name))


def add_reward_scales(model: Any, given: str | dict[str, Any], device: th.device | str) -> dict[str, Any]:
    """
    :param model: an ``MRQ``
    :param given: parameters for the model, or a file of them
    :param device: device on which to load them
    :return: the parameters; missing reward scales of the policy are taken from ``reward_scales`` or the model
    """
    if not isinstance(given, dict):
        check_saved_model(given, model.algorithm_name)
        given = load_from_zip_file(given, device=device, load_data=False)[1]
    parameters: dict[str, Any] = dict(given)
    scales = parameters.pop("reward_scales", {})
    if "policy" in parameters:
        present: dict[str, Any] = {key: model.policy.get_buffer(key) for key in REWARD_SCALES.values()}
        present |= {key: th.tensor(float(scales[name])) for name, key in REWARD_SCALES.items() if name in scales}
        parameters["policy"] = present | parameters["policy"]
    return parameters
