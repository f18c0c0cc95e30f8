"""Words of every chip generation to rows and back (layouts: larpixdaq.schema).

Every column is filled from the bits of the word, whatever its packet type, as in LArPix+HDF5 2.3 and 2.4, so that a
word can be had back bit for bit. `parity` is the word's own bit, `valid_parity` tells whether the parity is odd.
Where that says too little:

- v1 (1.0): `chip_key` is "io_group-io_channel-chip_id"; `adc_counts` has all 10 bits, also the lowest, which
  larpix-control clears; `counter` is the counter of a test packet, `register` and `value` belong to configuration
  packets.
- v2 in fifo-diagnostics mode (2.4): `fifo_diagnostics_enabled` is 1, `timestamp` has 16 bits, `counter` holds bit 46,
  for which the layout has no column.
- v3 (3.0): `timestamp` has 28 bits; the highest of them is also `first_packet`, and is one or the other by the chip's
  configuration (mark_first_packet). `local_fifo` and `shared_fifo` are bits 59..58 and 61..60, or, together, the
  running tally, again by configuration. `local_fifo_events`, `shared_fifo_events`, `counter` and
  `fifo_diagnostics_enabled` are 0.
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
    """Fill `rows` from `words`, shape (N,); return the number of rows made.

    Every word of types 0 to 3 (v3: 1 to 3) makes one row with every column of the layout filled; a word whose packet
    type the chip cannot send makes none. Of a v1 word the lower 54 bits count. `receipt` goes to `receipt_timestamp`
    (layout 1.0 has none). `rows` has the layout's dtype (`schema.layout_of(asic)`, for v2 with or without clock64)
    and at least N entries; otherwise ValueError.
    """

def encode(rows: NDArray[Any], *, asic: int) -> NDArray[np.uint64]:
    """The words, shape (M,), of the M rows with packet_type 0 to 3, bit for bit as they were decoded (v1: 54 bits).

    Rows of older files, which fill only the columns that their packet type uses, give their words too. A number that is
    too wide for its field is cut to it.
    """

def parity(words: NDArray[np.uint64], *, asic: int) -> NDArray[np.uint64]:
    """The same words with the parity bit set so that the parity is odd (v1: bit 53, else bit 63)."""
