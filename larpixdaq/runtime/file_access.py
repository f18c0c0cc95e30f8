"""Files in directories where others may write: opened and checked, locked, kept aside, removed.

Only regular files are opened, never a link, a pipe or a device; of private files only those that no other user can have
made or changed. A file that could not be read whole is renamed, never removed.

A lock (flock) is held by one process at a time. Some file systems have no locks: NFS without lockd, Lustre mounted
without flock, some FUSE. There a file in a lock directory is locked in place of the file itself. Its name is a hash of
the path, so that processes of one host that share the lock directory exclude each other.
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

from larpixdaq import config
from larpixdaq.errors import FileError

log = logging.getLogger(__name__)
#: Ending of the name under which a damaged file is kept.
DAMAGED: Final = ".damaged"
#: What flock() fails with where there are no locks. 524 is ENOTSUPP, which some file systems of the kernel let out.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524})


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


def has_no_locks(error: OSError) -> bool:
    """Whether flock() failed because the file system has no locks."""
    return error.errno in _NO_LOCKS


def no_locks(directory: Path, error: OSError, option: str) -> FileError:
    """The error of a directory that must have locks; `option` names a directory in its place."""
    return FileError(
        f"{directory}: its file system cannot lock files ({error.strerror}): name a directory on a local disk with "
        f"{option}"
    )


def try_lock(file: int, *, wait: bool = False) -> bool:
    """Lock an open file; False when another process holds the lock. OSError where files cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


class LockedFile:
    """An open file whose lock this process holds; `file` is its descriptor, -1 after close()."""

    def __init__(self, file: int, path: Path) -> None:
        self.file = file
        self.path = path
        #: The file in a lock directory that is locked too, and removed with the lock.
        self.substitute: LockedFile | None = None

    def in_place(self) -> bool:
        """Whether the file still has its name."""
        return in_place(self.file, self.path)

    def release_substitute(self) -> None:
        """Give back the lock in the lock directory; the file itself stays locked. Harmless when repeated."""
        if self.substitute is not None:
            self.substitute.close(remove_name=True)

    def close(self, *, remove_name: bool = False) -> None:
        """Give the lock back and close the file. Harmless when repeated."""
        if self.file >= 0:
            if remove_name:
                remove(self.file, self.path)
            self.release_substitute()
            os.close(self.file)
            self.file = -1


def _locked(file: int, path: Path, acquire: Callable[[LockedFile], bool]) -> LockedFile | None:
    """Lock an open file by `acquire`; the file is closed, and this returns None, when another process has the lock."""
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
    """Repeat the attempt while the last holder has removed the file after it was opened here."""
    while (found := attempt()) is not None and not found.in_place():
        found.close()
    return found


def open_locked(path: Path, *, wait: bool = False) -> LockedFile | None:
    """Open or make a private file and lock it; None when another process holds the lock. OSError when it cannot be."""
    flags = os.O_RDWR | os.O_CREAT
    return _until_in_place(lambda: _locked(open_private(path, flags), path, lambda one: try_lock(one.file, wait=wait)))


def make_locked(path: Path) -> int:
    """Make a private file and lock it; its descriptor. OSError when it cannot be made or locked: then there is none."""
    file = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        try_lock(file, wait=True)  # a successor that looks for files holds the lock for a moment at most
    except OSError:
        remove(file, path)
        os.close(file)
        raise
    return file


def can_lock(path: Path) -> bool:
    """Whether the file system of this file has locks; True when that cannot be known."""
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


class LockDirectory:
    """Where this process locks files whose own file system has no locks.

    `--lock-dir`: there in any case, on the file itself too where that is possible. Without it the state directory, with
    a warning.
    """

    def __init__(self) -> None:
        self._named: Path | None = None
        self._state_dir: str | None = None
        self._warned = False

    def use(self, lock_dir: Path | None, state_dir: str | None = None) -> None:
        """FileError when `lock_dir` is no directory to write in."""
        if lock_dir is not None and not (lock_dir.is_dir() and os.access(lock_dir, os.W_OK | os.X_OK)):
            raise FileError(f"--lock-dir {lock_dir}: not a directory that can be written to")
        self._named, self._state_dir, self._warned = lock_dir, state_dir, False

    def open(
        self, path: Path, flags: int, *, opener: Callable[[Path, int], int] = open_private, wait: bool = False
    ) -> LockedFile | None:
        """Open a file and lock it; None when another process holds the lock.

        OSError as `opener` raises it; FileError where there are no locks, and a new file (O_EXCL) is removed then.
        """
        try:
            return _until_in_place(lambda: self.lock(opener(path, flags), path, wait=wait))
        except FileError:
            if flags & os.O_EXCL:
                path.unlink(missing_ok=True)
            raise

    def lock(self, file: int, path: Path, *, wait: bool = False) -> LockedFile | None:
        """Lock an open file; it is closed when there are no locks (FileError), or another process has it (None)."""
        return _locked(file, path, lambda one: self._acquire(one, wait))

    def _acquire(self, one: LockedFile, wait: bool) -> bool:
        missing: OSError | None = None
        try:
            if not try_lock(one.file, wait=wait):
                return False
        except OSError as error:
            if not has_no_locks(error):
                raise FileError(f"cannot lock {one.path}: {error.strerror}") from None
            missing = error
        if missing is None and self._named is None:
            return True
        directory = self._named or config.state_dir(self._state_dir)
        whole = one.path.parent.resolve() / one.path.name
        place = directory / f"larpixdaq-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]}.lock"
        try:
            one.substitute = open_locked(place, wait=wait)
        except OSError as error:
            raise FileError(
                f"cannot lock {one.path} ({missing.strerror if missing else 'as --lock-dir asks'}), nor a file in "
                f"{directory} in its place ({error.strerror or error}): name a directory on a local disk with "
                "--lock-dir"
            ) from None
        if one.substitute is not None and self._named is None and not self._warned:
            self._warned = True
            log.warning(
                "%s: its file system cannot lock files (%s): its locks are in %s, which processes of other machines, "
                "and those with another state directory, do not see; --lock-dir names another place",
                one.path.parent, missing.strerror if missing else "", directory,
            )  # fmt: skip
        return one.substitute is not None


#: Of this process; main() sets it.
lock_directory: Final = LockDirectory()


def add_lock_dir_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lock-dir", type=Path, metavar="DIR",
        help="where files are locked whose own file system has no locks (NFS without lockd, Lustre without flock): a "
        "directory on a local disk; the same for every process that uses these files (default: the files themselves, "
        "then the state directory, with a warning)",
    )  # fmt: skip
