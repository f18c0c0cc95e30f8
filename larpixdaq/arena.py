"""The file that a producer's ring lives in: made, reserved, locked, unlinked."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import mmap
import os
import re
from pathlib import Path

from larpixdaq._native.ring import SMALLEST, Ring
from larpixdaq.errors import RingError

DEFAULT_DIRECTORY = Path("/dev/shm")


def arena_name(state_dir: Path, producer: str, epoch: int) -> str:
    """`larpixdaq-<hash>-<epoch>.ring`; the hash is of the absolute state directory and the producer's name, so that a
    successor finds its predecessors' arenas and nobody else's."""
    key = hashlib.sha256(f"{state_dir.resolve()}\0{producer}".encode()).hexdigest()[:16]
    return f"larpixdaq-{key}-{epoch:016x}.ring"


class Arena:
    """A ring in a file of its own, `size` bytes, locked by us for as long as we live. `close()` unlinks it.

    Its pages are reserved when it is made: a memory-mapped file on a full file system would kill the process with
    SIGBUS at the first write to a page that is not there.
    """

    def __init__(self, directory: Path, state_dir: Path, producer: str, epoch: int, size: int) -> None:
        if size < SMALLEST:
            raise RingError(f"--ring: expected at least {SMALLEST} bytes, found {size}")
        self.path = directory / arena_name(state_dir, producer, epoch)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RingError(f"--ring-dir {directory}: cannot make the ring's file: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, size)
            memory = mmap.mmap(self._file, size)
        except OSError as error:
            free = os.statvfs(directory)
            self.close()
            raise RingError(
                f"the ring does not fit: {size} bytes asked for, {free.f_bavail * free.f_frsize} free in {directory} "
                f"({error.strerror}); make it smaller with --ring or put it elsewhere with --ring-dir"
            ) from None
        self.ring = Ring(memory, producer=producer, epoch=epoch)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlink and unlock. The memory itself goes when nobody reads from it any more."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


_UNITS = {"b": 1, "kb": 1000, "kib": 1 << 10, "mb": 10**6, "mib": 1 << 20, "gb": 10**9, "gib": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes in "512MiB", "8GiB", "64MB" or "1048576"; ArgumentTypeError, a usage error, when it is none of that."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]?i?b)?\s*", text.lower())
    if match is None or (match[2] or "b") not in _UNITS:
        raise argparse.ArgumentTypeError(f"size {text!r}: expected a number and one of B, kB, KiB, MB, MiB, GB, GiB")
    return int(float(match[1]) * _UNITS[match[2] or "b"])
