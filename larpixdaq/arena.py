"""The file that a producer's ring lives in: made, reserved, locked, taken over, unlinked."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import stat
import time
from pathlib import Path

from larpixdaq._native.ring import SMALLEST, Reader, Ring
from larpixdaq.errors import RingError

DEFAULT_DIRECTORY = Path("/dev/shm")
#: A file without its first bytes is being made; after so long (seconds) its maker must have died.
TORN = 10.0


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


def take(file: int, path: Path) -> bool:
    """Lock a file that a dead producer has left; False when it is somebody's, or gone, or not made to its end.

    What was only begun holds nothing: it is removed when it has been so for TORN seconds.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    found = os.fstat(file)
    if not found.st_nlink:
        return False
    if os.pread(file, 8, 0).strip(b"\0"):
        return True
    if time.time() - found.st_mtime > TORN:
        path.unlink(missing_ok=True)
    return False


def reader(path: Path, producer: str, epoch: int) -> Reader:
    """The ring of a living producer on this host and of this user, to be read; it stays readable when it is unlinked.

    RingError when it is not there, or not that: a consumer elsewhere, or of another user, gets the rows sent.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise RingError(f"{path}: {error}") from None
    try:
        found = os.fstat(file)
        # Another user's file might be cut short under our eyes, and reading it would then end this process.
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise RingError(f"{path}: no regular file of this user")
        return Reader(mmap.mmap(file, 0, prot=mmap.PROT_READ), producer=producer, epoch=epoch)
    except (OSError, ValueError) as error:
        raise RingError(f"{path}: {error}") from None
    finally:
        os.close(file)


class Arena:
    """A ring in a file of its own, locked by us for as long as we live. Made by make() or, a dead producer's, adopt().

    `close()` unlinks it, `leave()` does not: whoever comes next under this name delivers what is in it.
    """

    def __init__(self, path: Path, file: int, memory: mmap.mmap, ring: Ring) -> None:
        self.path = path
        self.ring = ring
        self._file = file
        self._memory = memory

    @classmethod
    def make(cls, directory: Path, state_dir: Path, producer: str, epoch: int, size: int) -> Arena:
        """RingError when it cannot be made.

        Its pages are reserved: a memory-mapped file on a full file system would kill the process with SIGBUS at the
        first write to a page that is not there.
        """
        if size < SMALLEST:
            raise RingError(f"--ring: expected at least {SMALLEST} bytes, found {size}")
        path = directory / arena_name(state_dir, producer, epoch)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RingError(f"--ring-dir {directory}: cannot make the ring's file: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # a predecessor that looks for arenas holds it for a moment at most
            os.posix_fallocate(file, 0, size)
            memory = mmap.mmap(file, size)
        except OSError as error:
            free = os.statvfs(directory)
            path.unlink(missing_ok=True)
            os.close(file)
            raise RingError(
                f"the ring does not fit: {size} bytes asked for, {free.f_bavail * free.f_frsize} free in {directory} "
                f"({error.strerror}); make it smaller with --ring or put it elsewhere with --ring-dir"
            ) from None
        return cls(path, file, memory, Ring(memory, producer=producer, epoch=epoch, made_ns=time.time_ns()))

    @classmethod
    def adopt(cls, path: Path, producer: str, epoch: int) -> Arena | None:
        """The arena that a dead producer left; None while somebody holds it, or has only begun to make it.

        RingError, in one line, when it cannot be used.
        """
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None  # its producer, or another successor, was done with it
        except OSError as error:
            raise RingError(f"{path}: {error.strerror}") from None
        try:
            if not take(file, path):
                os.close(file)
                return None
            memory = mmap.mmap(file, 0)
            ring = Ring(memory, producer=producer, epoch=epoch, attach=True)
        except (OSError, ValueError) as error:
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)
            raise RingError(f"{path}: {error}") from None
        return cls(path, file, memory, ring)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def shrink(self) -> None:
        """Give back the memory that holds no block, where the file system can; no block may be made any more."""
        for start, size in self.ring.unused():
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                with contextlib.suppress(OSError):
                    self._memory.madvise(mmap.MADV_REMOVE, first, last - first)

    def close(self) -> None:
        """Unlink and unlock. The memory itself goes when nobody reads from it any more."""
        if self._file >= 0:
            self.path.unlink(missing_ok=True)
            self.leave()

    def leave(self) -> None:
        """Unlock only."""
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # the memory map has a descriptor of its own, of the same lock
            os.close(self._file)
            self._file = -1


_UNITS = {"b": 1, "kb": 1000, "kib": 1 << 10, "mb": 10**6, "mib": 1 << 20, "gb": 10**9, "gib": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes in "512MiB", "8GiB", "64MB" or "1048576"; ArgumentTypeError, a usage error, when it is none of that."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]?i?b)?\s*", text.lower())
    if match is None or (match[2] or "b") not in _UNITS:
        raise argparse.ArgumentTypeError(f"size {text!r}: expected a number and one of B, kB, KiB, MB, MiB, GB, GiB")
    return int(float(match[1]) * _UNITS[match[2] or "b"])


def parse_duration(text: str) -> float:
    """Seconds in "60s", "5min", "2h" or "90"; ArgumentTypeError, a usage error, when it is none of that."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(s|min|h)?\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"time {text!r}: expected a number and one of s, min, h")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2] or "s"]
