"""The file of a producer's ring: made, locked, taken over, replaced when its name was removed, and removed at the end.

The ring's memory is mapped over a reserved range of addresses, so that a new file can replace the old one under a
running producer. This is necessary because a file whose name was removed cannot get a name again (linkat() fails with
ENOENT once no link is left).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from larpixdaq._native.ring_buffer import SMALLEST, Reader, Ring, map_file
from larpixdaq.errors import FileError, RingError
from larpixdaq.runtime.file_access import (
    DAMAGED,
    has_no_locks,
    in_place,
    make_locked,
    no_locks_error,
    open_private,
    remove,
    rename_damaged,
    try_lock,
)
from larpixdaq.runtime.record_file import write_at

DEFAULT_DIRECTORY = Path("/dev/shm")
#: Seconds after which a file without its first bytes is no longer being made: its producer must have died.
TORN = 10.0
#: Bytes at the beginning of a ring that its producer writes before it writes the first 8 of them.
_BEGUN_BYTES = 120


def name_prefix(state_dir: Path, producer: str) -> str:
    """Return the beginning of the names of a producer's ring and spool files.

    It has a hash of the absolute state directory and the producer's name, so that a successor finds the files of its
    predecessors and no others.
    """
    return "larpixdaq-" + hashlib.sha256(f"{state_dir.resolve()}\0{producer}".encode()).hexdigest()[:16]


def ring_file_name(state_dir: Path, producer: str, epoch: int) -> str:
    """Return `larpixdaq-<hash>-<epoch>.ring`."""
    return f"{name_prefix(state_dir, producer)}-{epoch:016x}.ring"


def files_of_epochs(directory: Path, prefix: str, rest: str) -> list[tuple[int, Path]]:
    """List epoch and path of the files named `PREFIX-EPOCH` and a rest that matches a pattern, in order of their names.

    The list is empty when the directory cannot be read.
    """
    pattern = re.compile(re.escape(prefix) + "-([0-9a-f]{16})" + rest)
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [(int(match[1], 16), directory / name) for name in names if (match := pattern.fullmatch(name))]


def ring_files(directory: Path, state_dir: Path, producer: str) -> dict[int, Path]:
    """Return epoch -> ring file of this producer and its predecessors in the directory."""
    return dict(files_of_epochs(directory, name_prefix(state_dir, producer), r"\.ring"))


def damaged_files(directory: Path, prefix: str) -> list[Path]:
    """List the damaged files there (`NAME.damaged`) whose names begin with `prefix`."""
    return [path for _, path in files_of_epochs(directory, prefix, r".*" + re.escape(DAMAGED) + r"(\.\d+)?")]


def lock_abandoned(file: int, path: Path, begun: int = 0) -> bool:
    """Lock the file of a dead producer; False when another process holds it, or it is removed or not completely made.

    A file that was not completely made has only zeros behind its first `begun` bytes. It is removed TORN seconds after
    the last write. ValueError when its first bytes are missing and it has data all the same.
    """
    if not try_lock(file) or not in_place(file, path):
        return False
    if os.pread(file, 8, 0).strip(b"\0"):
        return True
    if time.time() - os.fstat(file).st_mtime > TORN:
        if not _is_zero(file, begun):
            raise ValueError("its first bytes are missing")
        remove(file, path)
    return False


def _is_zero(file: int, at: int) -> bool:
    """Whether the file has only zeros from byte `at` on."""
    while piece := os.pread(file, 1 << 20, at):
        if piece.strip(b"\0"):
            return False
        at += len(piece)
    return True


def open_reader(path: Path, producer: str, epoch: int) -> Reader:
    """Open the ring of a living producer for reading. It stays readable after its file was removed.

    RingError when there is no such ring on this host, or it belongs to another user: then the producer must send the
    rows.
    """
    try:
        # Another user may cut the file short while it is mapped: reading it would then end this process (SIGBUS).
        file = open_private(path, os.O_RDONLY)
        try:
            return Reader(mmap.mmap(file, 0, prot=mmap.PROT_READ), producer=producer, epoch=epoch)
        finally:
            os.close(file)
    except FileError as error:
        raise RingError(str(error)) from None
    except (OSError, ValueError) as error:
        raise RingError(f"{path}: {error}") from None


def _map_file(file: int, size: int) -> mmap.mmap:
    """Map a file over a range of addresses over which map_file() can map another file later."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    map_file(memory, file)
    return memory


class RingFile:
    """A ring and its file, locked by this process. make() makes a new one, adopt() takes over a dead producer's.

    close() removes the file; leave() keeps it for the next producer of this name, which delivers its blocks. `damaged`:
    not all of it could be read, so that close() renames it to `NAME.damaged`.
    """

    def __init__(self, path: Path, file: int, memory: mmap.mmap, ring: Ring, *, grows: bool) -> None:
        """`grows`: its producer is this process, which makes further blocks in it."""
        self.path = path
        self.ring = ring
        self.grows = grows
        self.damaged = False
        #: Why the file, after its name was removed, could not be replaced yet; empty when all is well.
        self.name_error = ""
        self.moving = False  # reserve() runs in a thread
        self.retry_at = 0.0  # monotonic time before which reserve() is not tried again
        self._file = file
        self._memory = memory

    @classmethod
    def make(cls, directory: Path, state_dir: Path, producer: str, epoch: int, size: int) -> RingFile:
        """Make an empty ring of `size` bytes. RingError when it cannot be made.

        The memory of the file is reserved, because on a full file system the first write to a page without memory would
        kill the process (SIGBUS).
        """
        if size < SMALLEST:
            raise RingError(f"--ring: expected at least {SMALLEST} bytes, found {size}")
        path = directory / ring_file_name(state_dir, producer, epoch)
        try:
            file = _make_file(path)
        except FileError as error:
            raise RingError(str(error)) from None
        except OSError as error:
            raise RingError(f"--ring-dir {directory}: cannot make the ring's file: {error.strerror}") from None
        try:
            os.posix_fallocate(file, 0, size)
            memory = _map_file(file, size)
        except BaseException as error:  # also a signal, because reserving takes up to a second
            free = os.statvfs(directory)
            remove(file, path)
            os.close(file)
            if not isinstance(error, OSError):
                raise
            raise RingError(
                f"the ring does not fit: {size} bytes asked for, {free.f_bavail * free.f_frsize} free in {directory} "
                f"({error.strerror}); make it smaller with --ring or put it elsewhere with --ring-dir"
            ) from None
        ring = Ring(memory, producer=producer, epoch=epoch, made_ns=time.time_ns())
        return cls(path, file, memory, ring, grows=True)

    @classmethod
    def adopt(cls, path: Path, producer: str, epoch: int) -> RingFile | None:
        """Take over a dead producer's ring; None when another process holds it, or it was not completely made.

        RingError when its content cannot be used; FileError when it cannot be opened or belongs to another user.
        """
        try:
            file = open_private(path, os.O_RDWR)
        except FileNotFoundError:
            return None  # its producer or another successor has delivered all blocks
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        try:
            if not lock_abandoned(file, path, _BEGUN_BYTES):
                os.close(file)
                return None
            size = os.fstat(file).st_size
            if size < SMALLEST:
                raise ValueError(f"ring: expected at least {SMALLEST} bytes, found {size}")
            memory = _map_file(file, size)
            ring = Ring(memory, producer=producer, epoch=epoch, attach=True)
        except (OSError, ValueError) as error:
            os.close(file)
            if isinstance(error, OSError):
                raise FileError(f"{path}: {error.strerror}") from None
            raise RingError(str(error)) from None
        return cls(path, file, memory, ring, grows=False)

    def shrink(self) -> None:
        """Give memory without blocks back to the system, if the file system can. No block may be made any more."""
        for start, size in self.ring.unused_ranges():
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                with contextlib.suppress(OSError):
                    self._memory.madvise(mmap.MADV_REMOVE, first, last - first)

    @property
    def held(self) -> bool:
        """Whether this process has the file locked: neither close() nor leave() was called."""
        return self._file >= 0

    # Replacement of a file whose name was removed

    def in_place(self) -> bool:
        """Whether the file still has its name, so that a successor would find it."""
        return in_place(self._file, self.path)

    def reserve(self, path: Path | None = None) -> Reserved:
        """Make a new, locked file for move_to(), and copy all closed blocks into it. OSError when it cannot be made.

        `path`: by default that of the removed file. May run in another thread, because 512 MiB take 0.5 s.
        """
        path = path or self.path
        file = _make_file(path)
        try:
            os.ftruncate(file, len(self._memory))
            pieces = [(0, len(self._memory))] if self.grows else self.ring.used_ranges()
            free = os.statvfs(path.parent)
            # Checked first, because a failing posix_fallocate() fills the file system for a moment, also for others.
            if sum(size for _, size in pieces) > free.f_bavail * free.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for start, size in pieces:
                os.posix_fallocate(file, start, size)
            position = self.ring.position
            self._copy(file, self.ring.used_ranges()[1:])  # the header comes last: it makes this a ring
        except BaseException:
            remove(file, path)
            os.close(file)
            raise
        return Reserved(file, path, position)

    def _copy(self, file: int, pieces: Iterable[tuple[int, int]]) -> None:
        with memoryview(self._memory) as memory:
            for start, size in pieces:
                write_at(file, [memory[start : start + size]], start)

    def move_to(self, new: Reserved) -> int:
        """Copy the rest of the ring into the file from reserve() and continue in that. No other thread may write to the
        ring meanwhile.

        Returns the descriptor of the old file, which the caller closes, in a thread: that gives back its memory and
        takes 0.2 s for 512 MiB. OSError, with nothing changed, when the new file cannot be used.
        """
        try:
            self._copy(new.file, self.ring.used_ranges(new.position))
            map_file(self._memory, new.file)
        except BaseException:
            remove(new.file, new.path)
            os.close(new.file)
            raise
        old, self._file, self.path = self._file, new.file, new.path
        return old

    def close(self) -> None:
        """Remove and unlock the file. Its memory is given back when no process reads from it any more."""
        if self._file >= 0:
            if not self.damaged:
                remove(self._file, self.path)
            elif self.in_place():
                rename_damaged(self.path, "not all of it could be read")
            self.leave()

    def leave(self) -> None:
        """Unlock the file and keep it for the next producer of this name."""
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # explicitly, because a forked process may have the descriptor too
            os.close(self._file)
            self._file = -1


class Reserved(NamedTuple):
    """A file that a ring can move to. It has the ring's blocks before `position`."""

    file: int
    path: Path
    position: int


def _make_file(path: Path) -> int:
    """Make a new, locked file. OSError when it cannot be made; FileError if its file system has no locks."""
    try:
        return make_locked(path)
    except OSError as error:
        if has_no_locks(error):
            raise no_locks_error(path.parent, error, "--ring-dir") from None
        raise
