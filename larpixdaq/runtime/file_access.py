"""Access to files in directories where other users may write (open, check, lock, rename, remove), the state directory.

Only regular files are opened, never a link, a pipe or a device. Private files are opened only if no other user can have
made or changed them. A file that could not be read whole is renamed, never removed.

One process at a time holds a lock (flock). Some file systems have no locks: NFS without lockd, Lustre mounted without
flock, some FUSE. There a file in a lock directory is locked instead of the file itself. Its name is a hash of the path,
so that processes of one host with the same lock directory exclude each other.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from larpixdaq.errors import FileError, is_text

log = logging.getLogger(__name__)
#: Ending of the name to which a damaged file is renamed.
DAMAGED: Final = ".damaged"
#: Errors of flock() on file systems without locks. 524 is ENOTSUPP, which some file systems return.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524})


def open_private(path: Path, flags: int, *, secret: bool = False) -> int:
    """Open a private file, or make it with mode 600 if flags contain O_CREAT. Returns its descriptor.

    Raises FileError for a symbolic link, for a file that is not regular, belongs to another user or can be written by
    other users, or, with `secret`, read by them; other OSErrors as os.open() does.
    """
    file = open_regular(path, flags, 0o600)
    try:
        status = os.fstat(file)
        if status.st_uid != os.geteuid():
            raise FileError(f"{path}: expected a file of user {os.geteuid()}, found one of user {status.st_uid}")
        if status.st_mode & (0o077 if secret else 0o022):
            mode = stat.S_IMODE(status.st_mode)
            why = "others may have read the keys in it" if secret else "others may write to it"
            raise FileError(f"{path}: expected mode 600, found {mode:o}: {why}")
    except BaseException:
        os.close(file)
        raise
    return file


def in_place(file: int, path: Path) -> bool:
    """Return whether the path still names this open file."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except OSError:
        return False


def copy_content(file: int, new: int) -> None:
    """Copy the whole content of an open file into an empty file. Raises OSError if it does not fit."""
    size, done = os.fstat(file).st_size, 0
    while done < size and (n := os.sendfile(new, file, done, size - done)):
        done += n


def remove(file: int, path: Path) -> None:
    """Remove the path of an open file, if the path still names this file. Logs a failure."""
    if in_place(file, path):
        try:
            path.unlink()
        except OSError as error:
            log.error("%s: cannot be removed: %s", path, error.strerror)


def damaged_path(path: Path) -> Path:
    """Return a free path to which a damaged file can be renamed: NAME.damaged, NAME.damaged.2, …"""
    kept = path.with_name(path.name + DAMAGED)
    number = 1
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}{DAMAGED}.{number}")
    return kept


def rename_damaged(path: Path, why: str) -> None:
    """Rename a file that could not be read whole, so that it is not used again. Logs its name and the reason."""
    kept = damaged_path(path)
    log.error("%s: %s; it is kept as %s", path, why, kept.name)
    try:
        os.rename(path, kept)
    except OSError as error:
        log.error("%s: cannot be renamed: %s", path, error.strerror)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """Open a regular file and return its descriptor. Does not follow a link, and does not wait at a pipe.

    Raises FileError if the path is a link or not a regular file; other OSErrors as os.open() does. `mode`: permissions
    of a file that is made.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(f"{path}: is a symbolic link, expected a regular file") from None
        if error.errno == errno.ENXIO:  # a socket, or a pipe without a reader
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
    """Raise FileError if the path exists and is not a regular file that can be read."""
    try:
        os.close(open_regular(path))
    except (FileError, FileNotFoundError):
        if os.path.lexists(path):
            raise
    except OSError as error:
        raise FileError(f"cannot open {path}: {error.strerror}") from None


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises FileError."""
    try:
        fd = open_regular(path)
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size > limit:
                raise FileError(f"{path}: has {size} bytes, expected at most {limit}")
            return file.read(size)  # not `limit`, which would be allocated first
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def check_link(path: Path) -> None:
    """Raise FileError if the path is a link out of its directory, because another user may have made the link."""
    if os.path.islink(path):
        target = path.resolve()
        if target.parent != path.parent.resolve():
            raise FileError(f"{path}: is a link out of its directory, to {target}: name that file instead")


def has_no_locks(error: OSError) -> bool:
    """Return whether flock() failed because the file system has no locks."""
    return error.errno in _NO_LOCKS


def no_locks_error(directory: Path, error: OSError, option: str) -> FileError:
    """Return the error for a directory without locks. `option`: the option that names another directory."""
    return FileError(
        f"{directory}: its file system cannot lock files ({error.strerror}): name a directory on a local disk with "
        f"{option}"
    )


def try_lock(file: int, *, wait: bool = False) -> bool:
    """Lock an open file. Returns False if another process holds the lock. Raises OSError if it cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


class LockedFile:
    """Open file whose lock this process holds. `file`: its descriptor, -1 after close()."""

    def __init__(self, file: int, path: Path) -> None:
        self.file = file
        self.path = path
        #: File in a lock directory that is locked instead or too, and removed at the end.
        self.substitute: LockedFile | None = None

    def in_place(self) -> bool:
        """Return whether `path` still names this file."""
        return in_place(self.file, self.path)

    def release_substitute(self) -> None:
        """Release the lock in the lock directory, not that of the file itself. May be repeated."""
        if self.substitute is not None:
            self.substitute.close(remove_name=True)

    def close(self, *, remove_name: bool = False) -> None:
        """Release the locks and close the file. May be repeated."""
        if self.file >= 0:
            if remove_name:
                remove(self.file, self.path)
            self.release_substitute()
            os.close(self.file)
            self.file = -1


def _locked(file: int, path: Path, acquire: Callable[[LockedFile], bool]) -> LockedFile | None:
    """Lock an open file by `acquire`. Closes the file and returns None if another process holds the lock."""
    locked = LockedFile(file, path)
    try:
        if acquire(locked):
            return locked
    except BaseException:
        locked.close()
        raise
    locked.close()
    return None


def _until_in_place(attempt: Callable[[], LockedFile | None]) -> LockedFile | None:
    """Repeat the attempt as long as another process has removed the file between opening and locking."""
    while (locked := attempt()) is not None and not locked.in_place():
        locked.close()
    return locked


def open_locked(path: Path, *, wait: bool = False) -> LockedFile | None:
    """Open or make a private file and lock it. Returns None if another process holds the lock. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT
    return _until_in_place(lambda: _locked(open_private(path, flags), path, lambda new: try_lock(new.file, wait=wait)))


def make_locked(path: Path) -> int:
    """Make a private file and lock it. Returns its descriptor. Raises OSError, and then leaves no file."""
    file = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        try_lock(file, wait=True)  # a successor that looks for files may hold the lock for a moment
    except OSError:
        remove(file, path)
        os.close(file)
        raise
    return file


def can_lock(path: Path) -> bool:
    """Return whether the file system of this file has locks; True if that cannot be found out."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return not has_no_locks(error)
    finally:
        os.close(file)
    return True


def state_dir(text: str | None = None) -> Path:
    """Return the state directory (default $XDG_STATE_HOME/larpixdaq), and make it if needed. Raises FileError."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(text) if text else Path(base) / "larpixdaq"
    path = path.absolute()
    if not is_text(str(path)):
        raise FileError(f"state directory {str(path)!r}: expected UTF-8, since other processes read it")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"state directory {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileError(f"state directory {path}: not writable")
    return path


class LockDirectory:
    """Directory in which this process locks files whose own file system has no locks.

    With --lock-dir all files are locked in that directory, and also themselves where that is possible. Without it files
    that cannot be locked themselves are locked in the state directory, with a warning.
    """

    def __init__(self) -> None:
        self._named: Path | None = None
        self._state_dir: str | None = None
        self._warned = False

    def use(self, lock_dir: Path | None, state_dir: str | None = None) -> None:
        """Set the directories. Raises FileError if `lock_dir` is no directory that can be written to."""
        if lock_dir is not None and not (lock_dir.is_dir() and os.access(lock_dir, os.W_OK | os.X_OK)):
            raise FileError(f"--lock-dir {lock_dir}: not a directory that can be written to")
        self._named, self._state_dir, self._warned = lock_dir, state_dir, False

    def arguments(self) -> list[str]:
        """Return the options with which another program locks files as this process does."""
        named = [f"--lock-dir={self._named}"] if self._named is not None else []
        return [*named, *([f"--state-dir={self._state_dir}"] if self._state_dir is not None else [])]

    def open(
        self, path: Path, flags: int, *, opener: Callable[[Path, int], int] = open_private, wait: bool = False
    ) -> LockedFile | None:
        """Open a file and lock it. Returns None if another process holds the lock.

        Raises OSError as `opener` does, and FileError if there are no locks; then a new file (O_EXCL) is removed.
        """
        try:
            return _until_in_place(lambda: self.lock(opener(path, flags), path, wait=wait))
        except FileError:
            if flags & os.O_EXCL:
                path.unlink(missing_ok=True)
            raise

    def lock(self, file: int, path: Path, *, wait: bool = False) -> LockedFile | None:
        """Lock an open file. Closes it if another process holds the lock (None) or there are no locks (FileError)."""
        return _locked(file, path, lambda new: self._acquire(new, wait))

    def _acquire(self, locked: LockedFile, wait: bool) -> bool:
        no_locks: OSError | None = None
        try:
            if not try_lock(locked.file, wait=wait):
                return False
        except OSError as error:
            if not has_no_locks(error):
                raise FileError(f"cannot lock {locked.path}: {error.strerror}") from None
            no_locks = error
        if no_locks is None and self._named is None:
            return True
        directory = self._named or state_dir(self._state_dir)
        real_path = locked.path.parent.resolve() / locked.path.name
        lock_path = directory / f"larpixdaq-{hashlib.sha256(os.fsencode(real_path)).hexdigest()[:16]}.lock"
        try:
            locked.substitute = open_locked(lock_path, wait=wait)
        except OSError as error:
            raise FileError(
                f"cannot lock {locked.path} ({no_locks.strerror if no_locks else 'as --lock-dir asks'}), nor a file in "
                f"{directory} in its place ({error.strerror or error}): name a directory on a local disk with "
                "--lock-dir"
            ) from None
        if locked.substitute is not None and self._named is None and not self._warned:
            self._warned = True
            log.warning(
                "%s: its file system cannot lock files (%s): its locks are in %s, which processes of other machines, "
                "and those with another state directory, do not see; --lock-dir names another place",
                locked.path.parent, no_locks.strerror if no_locks else "", directory,
            )  # fmt: skip
        return locked.substitute is not None


#: The lock directory of this process. main() of each program sets it.
lock_directory: Final = LockDirectory()


def add_lock_dir_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock-dir", type=Path, metavar="DIR",
        help="directory on a local disk for the locks of files whose file system has no locks (NFS without lockd, "
        "Lustre without flock); the same for every process that uses these files (default: the files themselves, then "
        "the state directory, with a warning)",
    )  # fmt: skip
