"""The file that a producer's ring lives in: made, reserved, locked, taken over, made anew, removed.

The ring's memory is mapped over a reserved range of addresses, so that another file can take its place under a running
producer: a file whose name was removed cannot get a name again (linkat() fails with ENOENT once no link is left).
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

from larpixdaq._native.ring_buffer import SMALLEST, Reader, Ring, place
from larpixdaq.errors import FileError, RingError
from larpixdaq.runtime.file_access import (
    DAMAGED,
    has_no_locks,
    in_place,
    keep_aside,
    make_locked,
    no_locks,
    open_private,
    remove,
    try_lock,
)

DEFAULT_DIRECTORY = Path("/dev/shm")
#: A file without its first bytes is being made; after so long (seconds) its maker must have died.
TORN = 10.0
#: Bytes at a ring's beginning that its maker fills before the first 8 of them.
_BEGUN = 120


def key(state_dir: Path, producer: str) -> str:
    """What the names of a producer's arenas and spool files begin with.

    A hash of the absolute state directory and the producer's name, so that a successor finds its predecessors' and
    nobody else's.
    """
    return "larpixdaq-" + hashlib.sha256(f"{state_dir.resolve()}\0{producer}".encode()).hexdigest()[:16]


def arena_name(state_dir: Path, producer: str, epoch: int) -> str:
    """`larpixdaq-<hash>-<epoch>.ring`."""
    return f"{key(state_dir, producer)}-{epoch:016x}.ring"


def arenas(directory: Path, state_dir: Path, producer: str) -> dict[int, Path]:
    """Epoch -> arena of everything that this producer and its predecessors have left in the directory."""
    pattern = re.compile(re.escape(key(state_dir, producer)) + r"-([0-9a-f]{16})\.ring")
    try:
        names = os.listdir(directory)
    except OSError:
        return {}
    return {int(match[1], 16): directory / name for name in names if (match := pattern.fullmatch(name))}


def kept_aside(directory: Path, prefix: str) -> list[Path]:
    """Files that were kept aside there because they could not be read whole, of names that begin with `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"-[0-9a-f]{16}.*" + re.escape(DAMAGED) + r"(\.\d+)?")
    try:
        return [directory / name for name in sorted(os.listdir(directory)) if pattern.fullmatch(name)]
    except OSError:
        return []


def take(file: int, path: Path, begun: int = 0) -> bool:
    """Lock a file that a dead producer has left; False when it is somebody's, or gone, or not made to its end.

    What was only begun holds nothing but zeros behind `begun` bytes: it is removed when it has been so for TORN
    seconds. ValueError when it lacks its first bytes and holds something all the same.
    """
    if not try_lock(file) or not in_place(file, path):
        return False
    if os.pread(file, 8, 0).strip(b"\0"):
        return True
    if time.time() - os.fstat(file).st_mtime > TORN:
        if not _zeros(file, begun):
            raise ValueError("its first bytes are missing")
        remove(file, path)
    return False


def _zeros(file: int, at: int) -> bool:
    """Whether the file holds zeros alone from there on."""
    while piece := os.pread(file, 1 << 20, at):
        if piece.strip(b"\0"):
            return False
        at += len(piece)
    return True


def reader(path: Path, producer: str, epoch: int) -> Reader:
    """The ring of a living producer on this host and of this user, to be read; it stays readable when it is unlinked.

    RingError when it is not there, or not that: a consumer elsewhere, or of another user, gets the rows sent.
    """
    file = -1
    try:
        # Another user's file might be cut short under our eyes, and reading it would then end this process.
        file = open_private(path, os.O_RDONLY)
        return Reader(mmap.mmap(file, 0, prot=mmap.PROT_READ), producer=producer, epoch=epoch)
    except FileError as error:
        raise RingError(str(error)) from None
    except (OSError, ValueError) as error:
        raise RingError(f"{path}: {error}") from None
    finally:
        if file >= 0:
            os.close(file)


def _mapped(file: int, size: int) -> mmap.mmap:
    """The file's memory, in which another file can take its place."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place(memory, file)
    return memory


class RingFile:
    """A ring in a file of its own, locked by us for as long as we live. Made by make() or, a dead producer's, adopt().

    `close()` unlinks it, `leave()` does not: whoever comes next under this name delivers what is in it. `damaged`: not
    all of it could be read, so that close() keeps it aside.
    """

    def __init__(self, path: Path, file: int, memory: mmap.mmap, ring: Ring, *, grows: bool) -> None:
        """`grows`: blocks are made in it still."""
        self.path = path
        self.ring = ring
        self.grows = grows
        self.damaged = False
        #: Why the file that somebody has removed has no successor yet; empty when all is well.
        self.nameless = ""
        self.moving = False  # a new file is being reserved
        self.again_at = 0.0  # monotonic: not before that again, after it could not be
        self._file = file
        self._memory = memory

    @classmethod
    def make(cls, directory: Path, state_dir: Path, producer: str, epoch: int, size: int) -> RingFile:
        """RingError when it cannot be made.

        Its pages are reserved: a memory-mapped file on a full file system would kill the process with SIGBUS at the
        first write to a page that is not there.
        """
        if size < SMALLEST:
            raise RingError(f"--ring: expected at least {SMALLEST} bytes, found {size}")
        path = directory / arena_name(state_dir, producer, epoch)
        try:
            file = _new(path)
        except FileError as error:
            raise RingError(str(error)) from None
        except OSError as error:
            raise RingError(f"--ring-dir {directory}: cannot make the ring's file: {error.strerror}") from None
        try:
            os.posix_fallocate(file, 0, size)
            memory = _mapped(file, size)
        except BaseException as error:  # a signal too: to reserve the file takes a while
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
        """The arena that a dead producer left; None while somebody holds it, or has only begun to make it.

        RingError, in one line, when what it holds cannot be used; FileError when it cannot be opened, or is not ours.
        """
        try:
            file = open_private(path, os.O_RDWR)
        except FileNotFoundError:
            return None  # its producer, or another successor, was done with it
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        try:
            if not take(file, path, _BEGUN):
                os.close(file)
                return None
            size = os.fstat(file).st_size
            if size < SMALLEST:
                raise ValueError(f"ring: expected at least {SMALLEST} bytes, found {size}")
            memory = _mapped(file, size)
            ring = Ring(memory, producer=producer, epoch=epoch, attach=True)
        except (OSError, ValueError) as error:
            os.close(file)
            if isinstance(error, OSError):
                raise FileError(f"{path}: {error.strerror}") from None
            raise RingError(str(error)) from None
        return cls(path, file, memory, ring, grows=False)

    def shrink(self) -> None:
        """Give back the memory that holds no block, where the file system can; no block may be made any more."""
        for start, size in self.ring.unused():
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                with contextlib.suppress(OSError):
                    self._memory.madvise(mmap.MADV_REMOVE, first, last - first)

    @property
    def held(self) -> bool:
        """Neither closed nor left yet."""
        return self._file >= 0

    # a file whose name somebody has removed

    def in_place(self) -> bool:
        """Whether a successor would find the file under its name."""
        return in_place(self._file, self.path)

    def reserve(self, path: Path | None = None) -> Reserved:
        """A new, locked file for move_to(), by default under the name of the one that lost it, with all blocks that are
        closed by now. OSError when it cannot be made. May be done in another thread: 512 MiB take 0.5 s."""
        path = path or self.path
        file = _new(path)
        try:
            os.ftruncate(file, len(self._memory))
            pieces = [(0, len(self._memory))] if self.grows else self.ring.used()
            free = os.statvfs(path.parent)
            # Asked before: to reserve what is not there fills the file system for a moment, under the hands of others.
            if sum(size for _, size in pieces) > free.f_bavail * free.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for start, size in pieces:
                os.posix_fallocate(file, start, size)
            position = self.ring.position
            self._copy(file, self.ring.used()[1:])  # not the header: it changes, and makes it a ring
        except BaseException:
            remove(file, path)
            os.close(file)
            raise
        return Reserved(file, path, position)

    def _copy(self, file: int, pieces: Iterable[tuple[int, int]]) -> None:
        with memoryview(self._memory) as memory:
            for start, size in pieces:
                done = 0
                while done < size:
                    done += os.pwrite(file, memory[start + done : start + size], start + done)

    def move_to(self, new: Reserved) -> int:
        """Go on in a file from reserve(), which has all that this one has then. Nobody may write to the ring meanwhile.

        The descriptor of the old file, to be closed: that gives its memory back, which takes 0.2 s for 512 MiB.
        OSError, with nothing changed, when the new file cannot be used.
        """
        try:
            self._copy(new.file, self.ring.used(new.position))
            place(self._memory, new.file)
        except BaseException:
            remove(new.file, new.path)
            os.close(new.file)
            raise
        old, self._file, self.path = self._file, new.file, new.path
        return old

    def close(self) -> None:
        """Unlink and unlock. The memory itself goes when nobody reads from it any more."""
        if self._file >= 0:
            if not self.damaged:
                remove(self._file, self.path)
            elif self.in_place():
                keep_aside(self.path, "not all of it could be read")
            self.leave()

    def leave(self) -> None:
        """Unlock only."""
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a process that was forked off has this descriptor too
            os.close(self._file)
            self._file = -1


class Reserved(NamedTuple):
    """A file that a ring can move to. `position`: it has the ring's blocks before there."""

    file: int
    path: Path
    position: int


def _new(path: Path) -> int:
    """A new file, locked. OSError when it cannot be made; FileError where there are no locks."""
    try:
        return make_locked(path)
    except OSError as error:
        if has_no_locks(error):
            raise no_locks(path.parent, error, "--ring-dir") from None
        raise
