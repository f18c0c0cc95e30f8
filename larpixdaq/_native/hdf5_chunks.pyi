"""Pack rows into HDF5 chunks with byte shuffle and deflate, make rows of shuffled bytes, and count rows by kind."""

from typing import final

import numpy as np
from numpy.typing import NDArray

TALLY: tuple[str, ...]

def tally(rows: NDArray[np.uint8], layout: int, counts: NDArray[np.uint64]) -> None:
    """Add rows to `counts`, shape (256, len(TALLY)): one line per io_group.

    `rows`: the bytes of rows of the layout with this code (schema.LAYOUTS).
    """

@final
class Packer:
    """Shuffles and deflates chunks of up to `rows` rows (at least 1) of `itemsize` bytes, in the format of HDF5's two
    filters.

    Codes are kept for the next chunks, so that the result also depends on the chunks before. Not for several threads at
    a time.
    """

    def __new__(cls, rows: int, itemsize: int) -> Packer: ...
    def pack(self, chunk: NDArray[np.uint8]) -> bytes:
        """Return the chunk's rows shuffled and deflated (zlib format), from their bytes. Releases the GIL."""

def gather(
    planes: NDArray[np.uint8],
    rows: int,
    columns: NDArray[np.int32],
    out: NDArray[np.uint8],
    chosen: NDArray[np.uint8] | None = None,
) -> int:
    """Write rows whose bytes are in shuffled planes of `rows` bytes each; return the number of rows written.

    `columns`: the plane of each byte of a row of `out`, at most 4096. `chosen`: 1 for each row that is wanted, else 0;
    None: all rows. ValueError if `out` has no room for them. Releases the GIL.
    """
