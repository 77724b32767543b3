"""
Checkpoints: folders with the complete state of training.

A checkpoint gets its name only when it is complete and on the disk. Before that, and while it is deleted, its name begins with
``.tmp-``. The next checkpoint deletes leftover folders of this kind.
"""

import base64
import contextlib
import errno
import gc
import io
import json
import pickle
import random
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_mrq.checks import DivergedError
from sb3_mrq.persist.files import TEMPORARY, sync_file, sync_folder
from sb3_mrq.persist.replay_files import ReplayFileError

VERSION = 1
INFO = "checkpoint.json"
MODEL = "model.zip"
# Names that rl-zoo3 expects in the folder of a model
REPLAY_BUFFER = "replay_buffer.pkl"
VEC_NORMALIZE = "vecnormalize.pkl"
NAME = re.compile(r"(?P<prefix>.+)_(?P<number>\d{6,})_(?P<num_timesteps>\d+)_steps")


class CheckpointError(OSError):
    """
    A checkpoint could not be written.
    """


class DamagedCheckpointError(ValueError):
    """
    A checkpoint is incomplete or has changed since it was written.
    """


class Checkpoint(NamedTuple):
    """
    A checkpoint, from its name.

    :param path: path of its folder
    :param number: consecutive number from 1, over all runs with this prefix in the folder
    :param num_timesteps: number of timesteps of the model
    """

    path: Path
    number: int
    num_timesteps: int


def get_generators(model: Any) -> dict[str, Any]:
    """
    :param model: the model
    :return: states of all random generators that training uses, in JSON types
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    states = {
        "python": [version, list(words), gauss],
        "numpy": numpy_state | {"state": {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}},
        "torch": _encode(th.get_rng_state()),
        "action_space": model.action_space.np_random.bit_generator.state,
    }
    if model.device.type == "cuda":
        states["cuda"] = [_encode(state) for state in th.cuda.get_rng_state_all()]
    return states


def set_generators(model: Any, states: dict[str, Any]) -> None:
    """
    :param model: the model
    :param states: result of ``get_generators``
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(states["numpy"] | {"state": states["numpy"]["state"] | {"key": key}})
    th.set_rng_state(_decode(states["torch"]))
    model.action_space.np_random.bit_generator.state = states["action_space"]
    # The number of devices may differ between machines
    if model.device.type == "cuda":
        for i, state in enumerate(states.get("cuda", [])[: th.cuda.device_count()]):
            th.cuda.set_rng_state(_decode(state), i)


def _encode(state: th.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> th.Tensor:
    return th.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())


def list_checkpoints(folder: str | Path, name_prefix: str = "mrq") -> list[Checkpoint]:
    """
    :param folder: folder of checkpoints
    :param name_prefix: common prefix of their names
    :return: the complete checkpoints, newest first
    """
    found = []
    for path in Path(folder).iterdir():
        match = NAME.fullmatch(path.name)
        if match and match["prefix"] == name_prefix and path.is_dir():
            found.append(Checkpoint(path, int(match["number"]), int(match["num_timesteps"])))
    return sorted(found, key=lambda checkpoint: checkpoint.number, reverse=True)


def newest_with_model(folder: str | Path, name_prefix: str = "mrq") -> Path | None:
    """
    :param folder: folder of checkpoints
    :param name_prefix: common prefix of their names
    :return: path of the newest checkpoint with a file of the model, None if there is none
    """
    paths = (checkpoint.path for checkpoint in list_checkpoints(folder, name_prefix))
    return next((path for path in paths if (path / MODEL).is_file()), None)


def write_checkpoint(model: Any, folder: str | Path, name_prefix: str = "mrq", keep_last: int | None = None) -> Path:
    """
    Write model, replay buffer, statistics of ``VecNormalize`` and random generators as one unit.

    :param model: a :class:`~sb3_mrq.off_policy_algorithm.ResumableOffPolicyAlgorithm`, not during an update or a step of the
        environment
    :param folder: an existing folder for checkpoints of one run at a time
    :param name_prefix: common prefix of the names of checkpoints
    :param keep_last: how many checkpoints of this run to keep, None for all
    :return: path of the checkpoint
    :raises CheckpointError: if the checkpoint cannot be written; existing checkpoints do not change
    :raises DivergedError: if a weight is not finite
    """
    if not all(th.isfinite(parameter).all() for parameter in model.policy.parameters()):
        raise DivergedError("weights are not finite")
    folder = Path(folder)
    temporary = None
    try:
        _delete_leftovers(folder, name_prefix)
        number = max((checkpoint.number for checkpoint in list_checkpoints(folder, name_prefix)), default=0) + 1
        path = folder / f"{name_prefix}_{number:06d}_{model.num_timesteps}_steps"
        # A damaged checkpoint with this name no longer exists
        model.damaged_checkpoints = [name for name in model.damaged_checkpoints if name != path.name]
        temporary = folder / f"{TEMPORARY}{path.name}"
        temporary.mkdir()
        _write_files(model, temporary)
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            error.errno or errno.EIO,
            f"The checkpoint could not be written to {folder}: {error.strerror or error}. "
            f"{_describe_remaining(folder, name_prefix)}",
        ) from error
    if keep_last is not None:
        _delete_old(folder, name_prefix, model, keep_last)
    return path


def _write_files(model: Any, folder: Path) -> None:
    if model.run_id is None:
        model.run_id = uuid4().hex
    # Saved to memory first, as torch hides the reason of errors in writing to a file
    content = io.BytesIO()
    model.save(content)
    (folder / MODEL).write_bytes(content.getbuffer())
    # Already synchronised with the disk
    model.save_replay_buffer(folder / REPLAY_BUFFER)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        vec_normalize.save(str(folder / VEC_NORMALIZE))
    info = {
        "version": VERSION,
        "run_id": model.run_id,
        "num_timesteps": model.num_timesteps,
        **model.get_checkpoint_info(),
        "generators": get_generators(model),
        "files": {path.name: _describe_file(path) for path in sorted(folder.iterdir())},
    }
    (folder / INFO).write_text(json.dumps({"crc32": _checksum(info), "info": info}))
    for path in folder.iterdir():
        sync_file(path)


def _describe_file(path: Path) -> dict[str, int]:
    size = {"size": path.stat().st_size}
    # The file of the replay buffer may be large, and contains checksums
    return size if path.name == REPLAY_BUFFER else {**size, "crc32": zlib.crc32(path.read_bytes())}


def _checksum(info: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def _delete_leftovers(folder: Path, name_prefix: str) -> None:
    """Delete temporary folders of interrupted saves and deletions."""
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name.removeprefix(TEMPORARY))
        if path.name.startswith(TEMPORARY) and match and match["prefix"] == name_prefix:
            shutil.rmtree(path, ignore_errors=True)


def _delete_old(folder: Path, name_prefix: str, model: Any, keep_last: int) -> None:
    paths = [checkpoint.path for checkpoint in list_checkpoints(folder, name_prefix) if _is_of_run(checkpoint.path, model)]
    # Damaged checkpoints are not counted
    usable = [path for path in paths if path.name not in model.damaged_checkpoints]
    if len(usable) < keep_last:
        return
    for path in paths[paths.index(usable[keep_last - 1]) + 1 :]:
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        try:
            # Renamed first, so that a partly deleted checkpoint does not look complete
            path.rename(temporary)
        except OSError as error:
            warnings.warn(f"The old checkpoint {path} could not be deleted: {error}", stacklevel=4)
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_of_run(path: Path, model: Any) -> bool:
    # Checkpoints of other runs are not deleted
    with contextlib.suppress(DamagedCheckpointError, OSError):
        return _read_info(path)["run_id"] == model.run_id
    return False


def _describe_remaining(folder: Path, name_prefix: str) -> str:
    try:
        remaining = list_checkpoints(folder, name_prefix)
    except OSError:
        return "The folder cannot be read."
    if not remaining:
        return "The folder contains no complete checkpoint."
    return f"The newest complete checkpoint is {remaining[0].path.name}, at step {remaining[0].num_timesteps}."


def _read_info(path: Path) -> dict[str, Any]:
    """
    :raises DamagedCheckpointError: if the information is missing or damaged
    """
    try:
        content = json.loads((path / INFO).read_text())
        info = content["info"]
        intact = _checksum(info) == content["crc32"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpointError(f"The file {path / INFO} cannot be read: {error}.") from error
    if not intact:
        raise DamagedCheckpointError(f"The file {path / INFO} is damaged: its checksum is wrong.")
    return info


def _check_files(path: Path) -> dict[str, Any]:
    """
    :param path: a checkpoint
    :return: its information
    :raises DamagedCheckpointError: if a file is missing or damaged; the contents of the replay buffer are checked on loading
    :raises ValueError: if the version is not supported
    """
    info = _read_info(path)
    if info["version"] != VERSION:
        raise ValueError(f"{path} has the version {info['version']}, but this version of sb3-mrq only supports {VERSION}.")
    for name, description in info["files"].items():
        try:
            found = _describe_file(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"The file {path / name} cannot be read: {error}.") from error
        if found != description:
            raise DamagedCheckpointError(f"The file {path / name} is damaged: its size or checksum is wrong.")
    return info


def resume(
    model_class: type[Any],
    folder: str | Path,
    env: Any,
    device: th.device | str = "auto",
    name_prefix: str = "mrq",
    **kwargs: Any,
) -> Any:
    """
    See :meth:`sb3_mrq.off_policy_algorithm.ResumableOffPolicyAlgorithm.resume`.
    """
    if env is None:
        raise ValueError(
            "A run is resumed in an environment, but env is None: pass an environment or a registered id. To use the model "
            "without one, load the model.zip of a checkpoint."
        )
    folder = Path(folder)
    if folder.name == MODEL:
        folder = folder.parent
    paths = [folder] if (folder / INFO).exists() else []
    if not paths and folder.is_dir():
        paths = [c.path for c in list_checkpoints(folder, name_prefix)]
    if not paths:
        raise FileNotFoundError(errno.ENOENT, f"There is no complete checkpoint {name_prefix}_..._steps", str(folder))
    damaged: list[str] = []
    for path in paths:
        try:
            model = _resume_from(model_class, path, _check_files(path), env, device, **kwargs)
        except (DamagedCheckpointError, ReplayFileError) as error:
            # Only the message, as the error refers to a partly filled replay buffer
            failure = str(error)
            warnings.warn(f"The checkpoint {path} is damaged, going back to the previous one. {failure}", stacklevel=3)
        else:
            model.damaged_checkpoints = damaged
            return model
        damaged.append(path.name)
        # Frees the replay buffer before another one is loaded
        gc.collect()
    raise DamagedCheckpointError(f"No checkpoint in {folder} can be used. The error of the last one is: {failure}")


def _resume_from(
    model_class: type[Any], path: Path, info: dict[str, Any], env: Any, device: th.device | str, **kwargs: Any
) -> Any:
    statistics, training = None, False
    if VEC_NORMALIZE in info["files"]:
        with (path / VEC_NORMALIZE).open("rb") as file:
            statistics = pickle.load(file)
        training = statistics.training
        if not isinstance(env, VecEnv):
            env = model_class._wrap_env(env)
        if unwrap_vec_normalize(env) is None:
            # VecNormalize replaces the spaces of the environment by its own, so they are compared here
            if statistics.action_space != env.action_space:
                raise ValueError(f"Action spaces do not match: {statistics.action_space} != {env.action_space}.")
            try:
                statistics.set_venv(env)
            except AssertionError as error:
                raise ValueError(f"The environment does not match the run in {path}: {error}") from error
            env = statistics
    elif isinstance(env, VecEnv) and unwrap_vec_normalize(env) is not None:
        raise ValueError(f"The environment is wrapped in VecNormalize, but the environment of the run in {path} was not.")
    model = model_class.load(path / MODEL, env=env, device=device, **kwargs)
    try:
        model.load_replay_buffer(path / REPLAY_BUFFER)
    except OSError as error:
        raise DamagedCheckpointError(f"The file {path / REPLAY_BUFFER} cannot be read: {error}.") from error
    model.run_id = info["run_id"]

    assert model.env is not None and model.replay_buffer is not None
    size = model.replay_buffer.buffer_size * model.n_envs
    if "buffer_size" in kwargs and kwargs["buffer_size"] // model.n_envs != model.replay_buffer.buffer_size:
        warnings.warn(
            f"The replay buffer keeps its {size} slots. buffer_size={kwargs['buffer_size']} has no effect.", stacklevel=4
        )
        model.buffer_size = size
    # Loading has seeded the environment as at the beginning of the run, which would repeat the first episodes
    entropy = None if model.seed is None else [model.seed, model.num_timesteps]
    model.env.seed(int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1))
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        assert statistics is not None
        own = {"observation_space", "action_space", "num_envs", "render_mode", "old_obs", "old_reward", "venv", "training"}
        vec_normalize.__dict__.update({name: value for name, value in vars(statistics).items() if name not in own})
        # The statistics already include the observation of the reset
        vec_normalize.training = False
    model._last_obs = model.env.reset()
    model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
    if vec_normalize is not None:
        vec_normalize.training = training
        model._last_original_obs = vec_normalize.get_original_obs()

    model.on_resume(info)
    model.resumed_generators = info["generators"]
    set_generators(model, info["generators"])
    return model
