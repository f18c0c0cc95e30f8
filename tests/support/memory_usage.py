"""Memory and file descriptors of the processes of a System, sampled over time."""

from __future__ import annotations

import os
import re
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from system import System

#: Seconds between two samples.
EVERY = 1.0
MIB = 1 << 20
_ANON = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


@dataclass
class Use:
    """Samples of all processes of one key, one process after another. The ring is shared memory and not included."""

    times: list[float] = field(default_factory=list)  # seconds since the start
    memory: list[int] = field(default_factory=list)  # private resident memory, bytes
    descriptors: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return minimum, median, maximum, slope and growth of memory (MiB) and descriptors.

        `slope`: per hour, of a straight line through all samples except the first tenth. `growth`: median of the last
        quarter minus median of the second quarter.
        """
        summary: dict[str, float] = {"samples": len(self.times)}
        for name, values in (("mib", [n / MIB for n in self.memory]), ("fds", list(map(float, self.descriptors)))):
            low, middle, high = min(values), statistics.median(values), max(values)
            quarter, settled = len(values) // 4, len(values) // 10
            second, last = values[quarter : 2 * quarter] or values, values[3 * quarter :]
            hours = np.array(self.times[settled:]) / 3600
            slope = float(np.polyfit(hours, values[settled:], 1)[0]) if len(set(hours)) > 2 else 0.0
            summary |= {f"{name}_min": low, f"{name}_median": middle, f"{name}_max": high}
            summary |= {f"{name}_slope": slope, f"{name}_growth": statistics.median(last) - statistics.median(second)}
        return {name: round(value, 2) for name, value in summary.items()}


class Memory:
    """Samples the processes of a System with these keys, in a thread, until close()."""

    def __init__(self, line: System, keys: Sequence[str]) -> None:
        self._keys = keys
        self.uses: dict[str, Use] = {}
        self._line = line
        self._began = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory")
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(EVERY):
            for key in self._keys:
                place = Path(f"/proc/{self._line.processes[key].popen.pid}")
                try:
                    resident = _ANON.search((place / "status").read_text())
                    descriptors = len(os.listdir(place / "fd"))
                except OSError:
                    continue  # the process was just killed
                if resident is None:
                    continue  # a zombie
                use = self.uses.setdefault(key, Use())
                use.times.append(time.monotonic() - self._began)
                use.memory.append(int(resident[1]) * 1024)
                use.descriptors.append(descriptors)
