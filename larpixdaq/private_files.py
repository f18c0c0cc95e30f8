"""Files of this user alone, in directories where others may write: opened and checked, kept aside, removed.

Nothing that another user can have made or changed is opened, and no symbolic link is followed. A file that could not
be read whole is renamed, never removed.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Final

from larpixdaq.errors import FileError
from larpixdaq.regular_file import open_regular

log = logging.getLogger(__name__)

#: Ending of the name under which a damaged file is kept.
DAMAGED: Final = ".damaged"


def open_private(path: Path, flags: int) -> int:
    """Open a file, or with O_CREAT make it with mode 600.

    OSError as os.open() raises it; FileError for a symbolic link, for what is no regular file, for a file of another
    user, and for one that others may write to.
    """
    file = open_regular(path, flags, 0o600)
    try:
        found = os.fstat(file)
        if found.st_uid != os.geteuid():
            raise FileError(f"{path}: expected a file of user {os.geteuid()}, found one of user {found.st_uid}")
        if found.st_mode & 0o022:
            mode = stat.S_IMODE(found.st_mode)
            raise FileError(f"{path}: expected mode 600, found {mode:o}: others may write to it")
    except BaseException:
        os.close(file)
        raise
    return file


def in_place(file: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except OSError:
        return False


def copy_content(file: int, new: int) -> None:
    """Copy all of an open file into another one, which is empty. OSError when it does not fit."""
    size, done = os.fstat(file).st_size, 0
    while done < size and (n := os.sendfile(new, file, done, size - done)):
        done += n


def remove(file: int, path: Path) -> None:
    """Remove the name of an open file, if it has it still. A failure is a line in the log."""
    if in_place(file, path):
        try:
            path.unlink()
        except OSError as error:
            log.error("%s: cannot be removed: %s", path, error.strerror)


def aside(path: Path) -> Path:
    """A free name beside a damaged file under which it is kept: NAME.damaged, NAME.damaged.2, …"""
    kept = path.with_name(path.name + DAMAGED)
    number = 1
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}{DAMAGED}.{number}")
    return kept


def keep_aside(path: Path, why: str) -> None:
    """Rename a file that could not be read whole, so that it is not used again; the log says which file, and why."""
    kept = aside(path)
    log.error("%s: %s; it is kept as %s", path, why, kept.name)
    try:
        os.rename(path, kept)
    except OSError as error:
        log.error("%s: cannot be renamed: %s", path, error.strerror)
