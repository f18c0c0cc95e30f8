"""Opens files that others may have put in place: never a link, a pipe or a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from larpixdaq.errors import FileError


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """Open a regular file and return its descriptor. Does not wait for a pipe's other end and does not follow a link.

    FileError when the path is a link, or names something else than a regular file; other OSErrors as os.open() has
    them. `mode`: permissions of a file that `flags` create.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(f"{path}: is a symbolic link, expected a regular file") from None
        if error.errno == errno.ENXIO:  # a socket, or a pipe that nobody reads
            raise FileError(f"{path}: is not a regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileError(f"{path}: is not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_regular(path: Path) -> None:
    """FileError when there is something else at this path than a regular file that can be read."""
    try:
        os.close(open_regular(path))
    except (FileError, FileNotFoundError):
        if os.path.lexists(path):
            raise
    except OSError as error:
        raise FileError(f"cannot open {path}: {error.strerror}") from None


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. FileError in one line when it cannot be read."""
    try:
        fd = open_regular(path)
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size > limit:
                raise FileError(f"{path}: has {size} bytes, expected at most {limit}")
            return file.read(limit)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def check_place(path: Path) -> None:
    """FileError when the path is a link that leads out of its directory, so that nobody reads a stranger's choice."""
    if path.is_symlink():
        target = path.resolve()
        if target.parent != path.parent.resolve():
            raise FileError(f"{path}: is a link out of its directory, to {target}: name that file instead")
