"""What the io_channels of some chips carry while a routine counts, and whether that is as much as they can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines.kit.rows import is_hit
from larpixdaq.schema import chips_of

#: Of the packets that its line can carry, an io_channel that sends so many is full: chips send in bursts.
_FULL: Final = 0.8
#: The bit of a FIFO's flags that says so.
_FIFO_FULL: Final = 2


class Lines:
    """`names`: "io_group-io_channel" of these chips."""

    def __init__(self, io: Any, chips: Sequence[str]) -> None:
        parts = sorted({tuple(map(int, chip.split("-")[:2])) for chip in chips})
        self.names = ["-".join(map(str, part)) for part in parts]
        self._ids = np.array([io_group << 8 | io_channel for io_group, io_channel in parts])
        #: Packets a second, by place in `names`.
        self.carries: NDArray[np.float64] = np.array(io.carries(parts))
        self._packets = np.zeros(len(parts), np.int64)
        self._full = np.zeros(len(parts), np.bool_)

    def clear(self) -> None:
        """Forget what was looked at."""
        self._packets[:] = 0
        self._full[:] = False

    def look(self, rows: NDArray[Any]) -> None:
        """At what chips have sent."""
        ids = chips_of(rows) >> 8
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        ours = self._ids[place] == ids
        self._packets += np.bincount(place[ours], minlength=len(self._ids))
        self._full[place[ours & _says_full(rows)]] = True

    def saturated(self, seconds: float) -> list[str]:
        """Names of those that may have lost hits: in so many seconds they carried as much as they can, or chips said
        that a FIFO was full."""
        full = self._full | (self._packets > _FULL * self.carries * seconds)
        return [self.names[place] for place in np.flatnonzero(full).tolist()]


def _says_full(rows: NDArray[Any]) -> NDArray[np.bool_]:
    names = rows.dtype.names or ()
    if "fifo_full" in names:  # v1
        flag = rows["fifo_full"] > 0
    elif "reset_sample_flag" in names:  # v3, which may count packets in these bits
        return np.zeros(len(rows), np.bool_)
    else:
        flag = ((rows["local_fifo"] | rows["shared_fifo"]) & _FIFO_FULL) > 0
    said: NDArray[np.bool_] = flag & is_hit(rows)
    return said
