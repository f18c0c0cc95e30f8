"""A disk that hangs, fails, is slow or full, or has no locks, for processes that are started with its `env`.

The library faulty_disk.c, preloaded into the processes, does this.
"""

from __future__ import annotations

import errno
import mmap
import struct
import subprocess
from pathlib import Path

#: The fields of the structure in faulty_disk.c, 8 bytes each.
FIELDS = ("hang", "error", "failures", "rate", "room", "operations", "affected", "locks")


def compiled(folder: Path, name: str) -> Path:
    """Return the path of NAME.c as a library to preload. It is compiled into `folder` at the first use."""
    library = folder / f"{name}.so"
    if not library.exists():
        source = Path(__file__).with_name(f"{name}.c")
        command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True)
    return library


class Disk:
    """Controls the disk under `directory`, which works normally at first."""

    def __init__(self, folder: Path, directory: Path) -> None:
        control = folder / "disk.control"
        control.write_bytes(bytes(8 * len(FIELDS)))
        with open(control, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8 * len(FIELDS))
        self.env = {
            "LD_PRELOAD": str(compiled(folder, "faulty_disk")),
            "LARPIXDAQ_DISK_CONTROL": str(control),
            "LARPIXDAQ_DISK_DIRECTORY": str(directory),
        }
        self.heal()

    def hang(self) -> None:
        """Let every operation wait until heal()."""
        self._set("hang", 1)

    def fail(self, error: int = errno.EIO, times: int = -1) -> None:
        """Let the next `times` operations fail, by default all until heal()."""
        self._set("error", error)
        self._set("failures", times)

    def slow(self, rate: int) -> None:
        """Limit the rate to this number of bytes/s."""
        self._set("rate", rate)

    def full(self, room: int = 0) -> None:
        """Leave `room` bytes of free space until heal(). The file system reports this, too."""
        self._set("room", room)

    def without_locks(self, error: int = errno.EOPNOTSUPP) -> None:
        """Let flock() fail, as on NFS without lockd."""
        self._set("locks", error)

    def heal(self) -> None:
        for name in ("hang", "failures", "rate", "locks"):
            self._set(name, 0)
        self._set("room", -1)

    @property
    def operations(self) -> int:
        return self._get("operations")

    @property
    def affected(self) -> int:
        """Number of operations that were delayed or failed."""
        return self._get("affected")

    def close(self) -> None:
        self.heal()
        self._map.close()

    def _set(self, name: str, value: int) -> None:
        struct.pack_into("q", self._map, 8 * FIELDS.index(name), value)

    def _get(self, name: str) -> int:
        return int(struct.unpack_from("q", self._map, 8 * FIELDS.index(name))[0])
