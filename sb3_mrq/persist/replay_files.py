"""
Files of replay buffers: a JSON header and plain arrays, with a version and checksums. Reading a file runs no code.

A file consists of, with all numbers little-endian:

- 8 magic bytes, and the version of the format, 4 bytes,
- the length of the header, 8 bytes, its CRC-32, 4 bytes, and the header, a JSON object with the arguments of the buffer, its
  scalar state, and name, dtype and shape of each array,
- the arrays in that order, in chunks of ``CHUNK`` bytes. Each chunk is followed by a CRC-32 of the header and all chunks so
far.
  Arrays with an entry for each slot only contain the slots that have been used.
"""

import contextlib
import io
import json
import os
import pathlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from stable_baselines3.common.save_util import open_path

from sb3_mrq.buffers import BufferState, SubtrajectoryReplayBuffer
from sb3_mrq.persist.files import atomic_file
from sb3_mrq.persist.spaces import describe_space, show_space

MAGIC = b"\x93MRQBUF\n"
VERSION = 1
CHUNK = 4 << 20
# Version, length of the header, checksum of the header
PREAMBLE = struct.Struct("<IQI")
CHECKSUM = struct.Struct("<I")
MAX_HEADER = 1 << 28

Path = str | pathlib.Path | io.BufferedIOBase


class ReplayFileError(ValueError):
    """
    A file is damaged, or is not a replay buffer.
    """


def buffer_mismatch_error(name: str, found: Any, expected: Any) -> ValueError:
    """
    :param name: name of the property in which a buffer does not match the model
    :param found: value of the buffer
    :param expected: value of the model
    :return: the error to raise
    """
    return ValueError(
        f"The replay buffer was made for another {name}: {found}, but the model has {expected}. Use the same {name} as when "
        "the buffer was saved, or start with an empty buffer."
    )


def _segments(state: BufferState, written: np.ndarray, slots_per_env: int) -> Iterator[memoryview]:
    """
    :param state: arrays of a buffer
    :param written: number of used slots of each environment
    :param slots_per_env: number of slots of each environment
    :return: memory of the arrays, in the order of the file
    """
    for array in state.environments.values():
        yield array.reshape(-1).view(np.uint8).data
    for array in state.slots.values():
        for env, n in enumerate(written):
            rows = array[env * slots_per_env : env * slots_per_env + n]
            if rows.size:
                yield rows.reshape(-1).view(np.uint8).data


def _chunks(state: BufferState, written: np.ndarray, slots_per_env: int) -> Iterator[memoryview]:
    for memory in _segments(state, written, slots_per_env):
        for first in range(0, len(memory), CHUNK):
            yield memory[first : first + CHUNK]


def _array_list(state: BufferState) -> list[list[Any]]:
    arrays = [*state.environments.items(), *state.slots.items()]
    return [[name, array.dtype.str, list(array.shape)] for name, array in arrays]


def write_replay_buffer(file: BinaryIO, buffer: SubtrajectoryReplayBuffer) -> None:
    """
    :param file: binary file, written from its current position
    :param buffer: the buffer to write
    """
    state = buffer.get_state()
    header = {
        "buffer_size": buffer.buffer_size,
        "n_envs": buffer.n_envs,
        "horizon": buffer.horizon,
        "n_steps": buffer.n_steps,
        "observation_space": describe_space(buffer.observation_space),
        "action_space": describe_space(buffer.action_space),
        "numbers": state.numbers,
        "written": state.written.tolist(),
        "arrays": _array_list(state),
    }
    text = json.dumps(header).encode()
    checksum = zlib.crc32(text)
    file.write(MAGIC + PREAMBLE.pack(VERSION, len(text), checksum) + text)
    for chunk in _chunks(state, state.written, buffer.buffer_size):
        checksum = zlib.crc32(chunk, checksum)
        file.write(chunk)
        file.write(CHECKSUM.pack(checksum))


def _read(file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) < n:
        raise ReplayFileError("The file is truncated: it ends within the header.")
    return data


def _read_into(file: Any, memory: memoryview) -> int:
    """
    :return: number of bytes read, less than the size of the memory at the end of the file
    """
    n = 0
    while n < len(memory):
        more = file.readinto(memory[n:])
        if not more:
            break
        n += more
    return n


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """
    :return: the header, and its checksum
    :raises ReplayFileError: if there is no valid header
    """
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        if magic[:1] == b"\x80":
            raise ReplayFileError(
                "The file is a pickle. Loading a pickle runs the code in it, so replay buffers of MR.Q are not pickles: save "
                "the buffer with MRQ.save_replay_buffer."
            )
        if magic[:2] == b"PK":
            raise ReplayFileError("The file is a zip file, such as a saved model.")
        if MAGIC.startswith(magic):
            raise ReplayFileError(f"The file is truncated: it has only {len(magic)} bytes.")
        raise ReplayFileError("The file does not begin like a replay buffer of MR.Q.")
    version, length, checksum = PREAMBLE.unpack(_read(file, PREAMBLE.size))
    if version != VERSION:
        raise ReplayFileError(
            f"The file has the format version {version}, but this version of sb3-mrq only supports {VERSION}, or the file is "
            "damaged."
        )
    if length > MAX_HEADER:
        raise ReplayFileError(f"The file is damaged: its header would have {length} bytes.")
    text = _read(file, length)
    if zlib.crc32(text) != checksum:
        raise ReplayFileError("The file is damaged: the checksum of the header is wrong.")
    return json.loads(text), checksum


def _size_of_arrays(header: dict[str, Any], n_per_environment: int) -> int:
    """
    :return: number of bytes after the header, including checksums
    """
    total = 0
    for i, (_, dtype, shape) in enumerate(header["arrays"]):
        row = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
        for n in [shape[0]] if i < n_per_environment else header["written"]:
            total += n * row + -(-n * row // CHUNK) * CHECKSUM.size
    return total


def _bytes_left(file: BinaryIO) -> int | None:
    if not file.seekable():
        return None
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    return end - here


def _fill(file: BinaryIO, header: dict[str, Any], checksum: int, state: BufferState, exact: bool) -> None:
    """
    Read the arrays that follow the header.

    :param exact: whether the file must end after them
    :raises ReplayFileError: if they are missing or damaged
    """
    for found, expected in zip(header["arrays"], _array_list(state), strict=False):
        if found != expected:
            raise ReplayFileError(f"The file has the array {found} instead of {expected} (name, dtype and shape).")
    if len(header["arrays"]) != len(state.environments) + len(state.slots):
        raise ReplayFileError(
            f"The file has {len(header['arrays'])} arrays instead of {len(state.environments) + len(state.slots)}."
        )
    written = header["written"]
    if len(written) != header["n_envs"] or not all(0 <= n <= header["buffer_size"] for n in written):
        raise ReplayFileError(
            f"The file has {written} used slots, but {header['n_envs']} environments with {header['buffer_size']} slots each."
        )

    size, n_left = _size_of_arrays(header, len(state.environments)), _bytes_left(file)
    if n_left is not None and n_left < size:
        raise ReplayFileError(f"The file is truncated: only {n_left} of {size} bytes follow the header.")
    if exact and n_left is not None and n_left > size:
        raise ReplayFileError(f"The file is damaged: it has {n_left - size} additional bytes at the end.")
    stored = bytearray(CHECKSUM.size)
    n_read = 0
    for chunk in _chunks(state, written, header["buffer_size"]):
        n = _read_into(file, chunk)
        checksum = zlib.crc32(chunk, checksum)
        n += _read_into(file, memoryview(stored))
        if n < len(chunk) + CHECKSUM.size:
            raise ReplayFileError(f"The file is truncated: only {n_read + n} of {size} bytes follow the header.")
        if CHECKSUM.unpack(stored)[0] != checksum:
            raise ReplayFileError(
                f"The file is damaged: a checksum is wrong, {n_read} to {n_read + n} bytes after the header."
            )
        n_read += n


def _has_ages(header: dict[str, Any]) -> bool:
    return any(name == "stored_at" for name, *_ in header["arrays"])


def describe_replay_buffer(path: str | pathlib.Path) -> tuple[int, bool]:
    """
    :param path: path of the file of a replay buffer, with or without the suffix ``.pkl``
    :return: number of environments whose transitions it holds, and whether it holds the ages of transitions
    :raises ReplayFileError: if the file is damaged or not a replay buffer
    """
    with open_path(path, "r", suffix="pkl") as file:
        try:
            header, _ = _read_header(file)
            return int(header["n_envs"]), _has_ages(header)
        except ReplayFileError as error:
            raise ReplayFileError(f"{path} cannot be loaded as a replay buffer. {error}") from error


def read_replay_buffer(file: BinaryIO, like: SubtrajectoryReplayBuffer, exact: bool = False) -> SubtrajectoryReplayBuffer:
    """
    :param file: binary file, read from its current position
    :param like: a buffer for the same environments, which does not change
    :param exact: whether the file must end after the buffer
    :return: a new buffer with size and contents from the file, otherwise like the given one
    :raises ReplayFileError: if the file is damaged or not a replay buffer
    :raises ValueError: if the buffer is for other environments
    """
    header, checksum = _read_header(file)
    try:
        for name, found, expected in (
            ("number of environments", header["n_envs"], like.n_envs),
            ("horizon", header["horizon"], like.horizon),
            ("n_steps", header["n_steps"], like.n_steps),
            *(
                (name.replace("_", " "), header[name], describe_space(getattr(like, name)))
                for name in ("observation_space", "action_space")
            ),
        ):
            if found != expected:
                values = (show_space(value) if isinstance(value, dict) else value for value in (found, expected))
                raise buffer_mismatch_error(name, *values)
        has_ages = _has_ages(header)
        if header["numbers"]["storages"] and has_ages != like.fades:
            raise ValueError(
                f"The replay buffer was saved {'with' if has_ages else 'without'} the ages of its transitions, but the model "
                f"has replay_fade={like.fade} and replay_fade_min={like.fade_min}. Set replay_fade as in the run that saved "
                "the buffer, or start with an empty buffer."
            )
        buffer = like.empty_copy(header["buffer_size"])
    except (KeyError, TypeError) as error:
        raise ReplayFileError(f"The header of the file is invalid: {error!r}.") from error
    try:
        buffer.set_state(header["numbers"], lambda state: _fill(file, header, checksum, state, exact))
    except ReplayFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayFileError(f"The contents of the file are inconsistent: {error}") from error
    return buffer


def _target(path: str | pathlib.Path) -> pathlib.Path:
    """
    :param path: path given by the user
    :return: path of the file to write, as in SB3, in an existing folder
    """
    path = pathlib.Path(path)
    if path.suffix == "":
        path = path.with_name(f"{path.name}.pkl")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        path = path.with_name(f"{path.name}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=4)
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_replay_buffer(path: Path, buffer: SubtrajectoryReplayBuffer) -> None:
    """
    :param path: path of the file, or a file object. ``.pkl`` is added to a path without a suffix, as in SB3. An existing file
        at this path is replaced only when the new one is complete.
    :param buffer: the buffer to save
    """
    if isinstance(path, (str, pathlib.Path)):
        with atomic_file(_target(path)) as file:
            write_replay_buffer(file, buffer)
    else:
        write_replay_buffer(open_path(path, "w"), buffer)


def load_replay_buffer(path: Path, like: SubtrajectoryReplayBuffer, verbose: int = 0) -> SubtrajectoryReplayBuffer:
    """
    :param path: path of the file, with or without the suffix ``.pkl``, or a file object
    :param like: a buffer for the same environments, which does not change
    :param verbose: Verbosity level
    :return: a new buffer with size and contents from the file, otherwise like the given one
    :raises ReplayFileError: if the file is damaged or not a replay buffer
    :raises ValueError: if the buffer is for other environments
    """
    is_path = isinstance(path, (str, pathlib.Path))
    file = open_path(path, "r", verbose=verbose, suffix="pkl")
    with file if is_path else contextlib.nullcontext(file):
        try:
            return read_replay_buffer(file, like, exact=is_path)
        except ReplayFileError as error:
            name = path if is_path else "The file"
            raise ReplayFileError(f"{name} cannot be loaded as a replay buffer. {error}") from error
