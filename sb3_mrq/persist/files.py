"""
Atomic writing of files, and synchronisation with the disk.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

# Prefix of names of incomplete files and folders
TEMPORARY = ".tmp-"


def sync_folder(folder: Path) -> None:
    """
    Wait until the entries of a folder are on the disk.

    :param folder: the folder
    """
    if os.name == "nt":  # folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support this for folders
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
    Write a file under a temporary name in the same folder, and rename it when it is complete and on the disk. After an error,
    an existing file is unchanged. Each call has its own temporary name, so several processes may write the same file, and the
    last one to finish wins. A killed process leaves its temporary file behind.

    :param path: the file; a symbolic link is followed
    :return: context manager that returns the file object to write to
    """
    # The link itself would be replaced
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
