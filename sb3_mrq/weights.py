"""
Weights alone, in the safetensors format, for sharing: no pickle, so that loading them runs no code.
"""

import json
from pathlib import Path

import safetensors.torch
import torch as th
from safetensors import SafetensorError, safe_open

from sb3_mrq.files import atomic_file
from sb3_mrq.mrq import MRQ, REWARD_SCALES
from sb3_mrq.replay_files import describe_space, space_from

FORMAT = "sb3-mrq weights 1"


def _target(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.safetensors")


def save_weights(model: MRQ, path: str | Path) -> None:
    """
    Save the weights of all networks, targets included, and the reward scales that are the units of the values, but no
    optimiser, hyperparameter or replay buffer.

    :param model: the model
    :param path: the file, to which ``.safetensors`` is added where it has no suffix. At any moment it is what was there
        before, or complete.
    """
    parameters = model.get_parameters()
    # Copies, since safetensors refuses tensors that share memory
    tensors = {
        name: value.detach().cpu().clone(memory_format=th.contiguous_format) for name, value in parameters["policy"].items()
    }
    metadata = {
        "format": FORMAT,
        "observation_space": json.dumps(describe_space(model.observation_space)),
        "action_space": json.dumps(describe_space(model.action_space)),
        REWARD_SCALES: json.dumps(parameters[REWARD_SCALES]),
    }
    data = safetensors.torch.save(tensors, metadata)
    with atomic_file(_target(path)) as file:
        file.write(data)


def load_weights(model: MRQ, path: str | Path) -> None:
    """
    Give a model the weights in a file. Its networks must be of the same architecture.

    :param model: the model, whose optimisers and hyperparameters stay as they are
    :param path: the file, with or without the suffix ``.safetensors``
    :raises ValueError: if it is no such file, or one for other spaces or another architecture; the model stays as it is then
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
        raise ValueError(f"{path} does not hold weights of MR.Q, or those of another version of sb3-mrq.")
    for name in ("observation_space", "action_space"):
        theirs, ours = space_from(json.loads(metadata[name])), space_from(describe_space(getattr(model, name)))
        if theirs != ours:
            raise ValueError(
                f"The weights in {path} are for another {name.replace('_', ' ')}: {theirs}, but the model has {ours}."
            )
    present = model.policy.state_dict()
    for name in sorted(weights.keys() | present.keys()):
        shape, expected = (tuple(values[name].shape) if name in values else "none" for values in (weights, present))
        if shape != expected:
            raise ValueError(
                f"The weights in {path} are for another architecture: {name} has the shape {shape}, not {expected}. Give the "
                "model the policy and policy_kwargs with which they were trained."
            )
    model.set_parameters({"policy": weights, REWARD_SCALES: json.loads(metadata.get(REWARD_SCALES, "{}"))}, exact_match=False)
