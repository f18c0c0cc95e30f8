"""Count the rows of a run per chip and channel, with ADC histograms, parity and FIFO flags."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

#: io_group, io_channel, chip_id u1; packets, data, bad_parity, local_half, local_full, shared_half, shared_full u8.
CHIPS: np.dtype[Any]

@final
class PacketCounters:
    """Counters of all rows since the last reset(). RuntimeError when two threads use it at a time.

    "Packets" are rows of types 0 to 3 with direction 1. FIFO flags are those of data packets; the single FIFO of v1
    counts as the local FIFO. Histograms have data packets with valid parity (v3: without reset samples); a bin stops at
    2^32 - 1.
    """

    def __new__(cls, histogram_bytes: int = 536870912) -> PacketCounters:
        """`histogram_bytes`: limit of memory for histograms of single channels, v2 1 KiB each, v1 and v3 4 KiB each.

        Channels after the limit share one histogram per chip.
        """

    @property
    def rows(self) -> int:
        """Number of rows counted."""

    @property
    def bins(self) -> int:
        """Number of ADC values of the chips: 256 (v2) or 1024 (v1, v3); 0 before the first count()."""

    @property
    def unplaced(self) -> int:
        """Number of rows without a place in chips() and channels().

        Their type, direction, channel, ADC value or chip_key is impossible, or there are more than 262,144 chips. Rows
        with possible type, direction and chip_key are in types() nevertheless.
        """

    @property
    def sync_rows(self) -> int:
        """Number of rows of type 6, which are counted wherever they come from."""

    def count(self, rows: NDArray[Any]) -> None:
        """Count rows, shape (N,), of any layout of larpixdaq.schema. Releases the GIL.

        ValueError for another dtype, or chips with other numbers of channels or ADC values than since the last reset().
        """

    def reset(self) -> None:
        """Set all counters to 0 and free their memory."""

    def types(self) -> NDArray[np.uint64]:
        """Return the rows by [io_group, direction, packet_type], shape (256, 2, 8)."""

    def chips(self) -> NDArray[Any]:
        """Return the chips seen, shape (n,), dtype CHIPS, in order of first packets; entry i stays the same chip."""

    def keys(self) -> NDArray[np.uint8]:
        """Return io_group, io_channel and chip_id of the chips in chips(), shape (n, 3)."""

    def flags(self) -> NDArray[np.uint64]:
        """Return the sums of bad_parity, local_half, local_full, shared_half and shared_full over the chips of each
        io_group, shape (256, 5)."""

    def channels(self) -> NDArray[np.uint64]:
        """Return the packets by [chip as in chips(), channel_id], shape (n, 64), v1 (n, 128)."""

    def data(self) -> NDArray[np.uint32]:
        """Return the data packets, modulo 2^32, in the shape of channels(). Answers to configuration reads are none."""

    def others(self) -> NDArray[np.uint64]:
        """Return the packets of other types than data, in the shape of channels()."""

    def rates(
        self, before: NDArray[np.uint32], per_packet: NDArray[np.float64], slope: float, start: float
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return codes of the rates of data packets in the shape of channels(), and the number of channels by code.

        `before`: the result of an earlier data(); `per_packet`: by which the packets since then are multiplied, for
        each io_group, shape (256,). The code of a rate is log2(rate) * `slope` + `start`, rounded down, from 1 to 255;
        0 stands for 0. The numbers, shape (256,), have only channels that have ever had a data packet.
        """

    def mean_adc(self) -> NDArray[np.uint8]:
        """Return the mean ADC value of the histogram of each channel, in the shape of channels(); 0: no entries.

        Means are rounded, v1 and v3 to multiples of 4, which are divided by 4. Those below 1 are 1.
        """

    def histogram(
        self, io_group: int = -1, io_channel: int = -1, chip_id: int = -1, channel_id: int = -1
    ) -> tuple[NDArray[np.uint64], int]:
        """Return the data packets of the selected channels by ADC value, shape (bins,); -1 selects all.

        The second value is the number of channels selected by channel_id that are missing, because they share a
        histogram with others.
        """
