"""Read the variable-length bytes of an HDF5 file from its global heaps."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

@final
class HeapReader:
    """Copies objects out of the global heaps of an open HDF5 file, many times as fast as HDF5 for short ones.

    Not for several threads at a time.
    """

    def __new__(cls, file: int, base: int = 0) -> HeapReader:
        """`file`: descriptor of the open file. `base`: address of the file's byte 0 of HDF5 (the length of a user
        block). Addresses and lengths of the file have 8 bytes."""
    def read(self, references: NDArray[Any], out: NDArray[np.uint8]) -> int:
        """Copy objects into `out`, one after another. Returns the number of objects that were copied.

        `references`: as in the file, dtype recordings.REFERENCE. The number is below theirs when the next object is
        damaged: its collection is not at its address, has no object of its number or another length, or is not whole in
        the file; or when it does not fit into `out`. Releases the GIL.
        """
