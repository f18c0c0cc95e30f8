"""A wall clock that can be stepped, for processes that are started with its `env`; see wall_clock.c."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from disk import compiled


class Clock:
    def __init__(self, folder: Path) -> None:
        control = folder / "clock.control"
        control.write_bytes(bytes(8))
        with open(control, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)
        self.env = {"LD_PRELOAD": str(compiled(folder, "wall_clock")), "LARPIXDAQ_CLOCK_CONTROL": str(control)}

    def step(self, seconds: int) -> None:
        """Set the wall clock `seconds` ahead of the true time."""
        struct.pack_into("q", self._map, 0, seconds)

    def close(self) -> None:
        self._map.close()
