"""Decode words of every chip generation into rows and back (layouts: larpixdaq.schema).

Every column is filled from the bits of the word, whatever its packet type, as in LArPix+HDF5 2.3 and 2.4, so that
encode() returns the word bit for bit. `parity` is the bit of the word, `valid_parity` whether the parity is odd.
Special columns:

- v1 (1.0): `chip_key` is "io_group-io_channel-chip_id". `adc_counts` has all 10 bits, also the lowest, which
  larpix-control clears. `counter` is the counter of a test packet; `register` and `value` belong to configuration
  packets.
- v2 in fifo-diagnostics mode (2.4): `fifo_diagnostics_enabled` is 1, `timestamp` has 16 bits, and `counter` has bit 46,
  which has no column.
- v3 (3.0): `timestamp` has 28 bits. The highest is also `first_packet`; the chip's configuration (mark_first_packet)
  decides which of the two it is. `local_fifo` and `shared_fifo` are bits 59..58 and 61..60, or together the running
  tally, also by configuration. `local_fifo_events`, `shared_fifo_events`, `counter` and `fifo_diagnostics_enabled` are
  0.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def decode(
    words: NDArray[np.uint64],
    rows: NDArray[Any],
    *,
    asic: int,
    io_group: int = 0,
    io_channel: int = 0,
    receipt: int = 0,
    direction: int = 1,
) -> int:
    """Decode `words`, shape (N,), into `rows`. Returns the number of rows.

    Each word of types 0 to 3 (v3: 1 to 3) makes a row with every column filled; v3 words of type 0 make none. The upper
    10 bits of v1 words are ignored. `receipt` becomes `receipt_timestamp`, which layout 1.0 does not have. `rows` has
    the layout's dtype (`schema.layout_of(asic)`, for v2 also that of 2.4-clock64) and at least N entries; otherwise
    ValueError.
    """

def encode(rows: NDArray[Any], *, asic: int) -> NDArray[np.uint64]:
    """Return the words, shape (M,), of the M rows with packet_type 0 to 3, bit for bit as before decoding (v1: 54
    bits).

    Rows of older files, with only the columns of their packet type filled, also give their words. A number that is too
    wide for its field is cut to its lower bits.
    """

def parity(words: NDArray[np.uint64], *, asic: int) -> NDArray[np.uint64]:
    """Return the words with the parity bit (v1: bit 53, otherwise bit 63) set so that the parity is odd."""
