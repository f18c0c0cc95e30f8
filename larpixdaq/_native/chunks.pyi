"""What a chunk of the file needs: the byte shuffle that HDF5's filter undoes, and the count of its rows by kind."""

import numpy as np
from numpy.typing import NDArray

TALLY: tuple[str, ...]

def shuffle(source: NDArray[np.uint8], itemsize: int, out: NDArray[np.uint8]) -> None:
    """Write all first bytes of the items of `source`, then all second bytes, and so on, into `out`, as long."""

def tally(rows: NDArray[np.uint8], layout: int, counts: NDArray[np.uint64]) -> None:
    """Add rows, given as bytes of this layout code, to `counts`, shape (256, len(TALLY)): one line per io_group."""
