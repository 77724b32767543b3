"""
Files and folders that are there whole or not at all, whatever ends the process meanwhile.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What is being written has a name that begins with this, until it is complete
TEMPORARY = ".tmp-"


def sync_folder(folder: Path) -> None:
    """
    Wait until the names in a folder are on the disk.

    :param folder: the folder
    """
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do that for folders
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """
    Wait until a file is on the disk.

    :param path: the file
    """
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """
    Write a file under a temporary name in the same folder, and give it its own name once it is complete and on the disk. After
    an error whatever had that name before is still there. What a killed process leaves behind is written over the next time.

    :param path: the file
    :return: context manager that gives the file to write to
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
