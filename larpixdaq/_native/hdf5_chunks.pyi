"""What a chunk of the file needs: the byte shuffle and the deflate that HDF5's filters undo, and the count of its rows
by kind."""

from typing import final

import numpy as np
from numpy.typing import NDArray

TALLY: tuple[str, ...]

def tally(rows: NDArray[np.uint8], layout: int, counts: NDArray[np.uint64]) -> None:
    """Add rows, given as bytes of this layout code, to `counts`, shape (256, len(TALLY)): one line per io_group."""

@final
class Packer:
    """Shuffles and deflates chunks of `rows` rows (1 or more) of `itemsize` bytes: as HDF5's two filters would, in the
    zlib format. One thread at a time."""

    def __new__(cls, rows: int, itemsize: int) -> Packer: ...
    def pack(self, chunk: NDArray[np.uint8]) -> bytes:
        """The bytes of the chunk's rows, shuffled and deflated. The GIL is given away meanwhile."""
