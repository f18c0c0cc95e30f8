"""Pack rows into HDF5 chunks with byte shuffle and deflate, undo the shuffle, and count rows by kind."""

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

def unshuffle(planes: NDArray[np.uint8], itemsize: int, rows: NDArray[np.uint8]) -> None:
    """Undo the byte shuffle: write the rows of `itemsize` bytes whose bytes are in `planes`, one plane after the other.

    Both have the same length. Releases the GIL.
    """
