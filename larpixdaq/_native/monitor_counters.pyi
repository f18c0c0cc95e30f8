"""What the rows of a run are: counts per chip and channel, ADC histograms, parity and FIFO flags."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

#: io_group, io_channel, chip_id u1; packets, data, bad_parity, local_half, local_full, shared_half, shared_full u8.
CHIPS: np.dtype[Any]

@final
class PacketCounters:
    """Counters over all rows since the last reset(). For one thread at a time: RuntimeError otherwise.

    "Packets" are rows of types 0 to 3 with direction 1. FIFO flags are those of data packets (v1 has one FIFO, counted
    as the local one). Histograms hold data packets with valid parity (v3: without the reset samples); a bin stops at
    2^32 - 1.
    """

    def __new__(cls, histogram_bytes: int = 536870912) -> PacketCounters:
        """Channels get a histogram of their own (v2: 1 KiB, v1 and v3: 4 KiB, at the first data packet) up to this
        limit; those that come later share one per chip."""

    @property
    def rows(self) -> int:
        """Rows counted."""

    @property
    def bins(self) -> int:
        """ADC values of the chips: 256 (v2) or 1024 (v1, v3); 0 before the first count()."""

    @property
    def unplaced(self) -> int:
        """Rows that belong to no chip: impossible type, direction, channel, ADC value or chip_key, or more than 262,144
        chips. Those with a possible type and key are in types() all the same."""

    def count(self, rows: NDArray[Any]) -> None:
        """Count rows, shape (N,), of any layout of larpixdaq.schema; the GIL is released.

        ValueError: not a layout, or chips with other channels or ADC values than those counted since the last reset().
        """

    def reset(self) -> None:
        """Forget everything and give the memory back."""

    def types(self) -> NDArray[np.uint64]:
        """Rows by [io_group, direction, packet_type], shape (256, 2, 8)."""

    def chips(self) -> NDArray[Any]:
        """The chips seen, shape (n,), dtype CHIPS, in the order of first sight (so entry i stays the same chip)."""

    def channels(self) -> NDArray[np.uint64]:
        """Packets by [chip as in chips(), channel_id], shape (n, 64), v1 (n, 128)."""

    def histogram(
        self, io_group: int = -1, io_channel: int = -1, chip_id: int = -1, channel_id: int = -1
    ) -> tuple[NDArray[np.uint64], int]:
        """Data packets by ADC value, shape (bins,), of what is asked for; -1 means all.

        The second value: channels that were asked for by channel_id but share a histogram with others, and so are not
        in it.
        """
