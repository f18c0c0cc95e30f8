"""How many words of the boards a file holds: what a count made elsewhere, such as an emulated board's, is compared
with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from larpixdaq.files.reader import DataFile
from larpixdaq.schema import PacketType, io_groups_of, types_of

_ALWAYS = (PacketType.SYNC, PacketType.TRIGGER)


def count_words(path: Path) -> dict[int, int]:
    """Rows of types 0 to 3 with direction 1, and of types 6 and 7, per io_group; straight from the rows of the file."""
    counts: dict[int, int] = {}
    with DataFile(path) as file:
        for rows in file.pieces():
            kinds = types_of(rows)
            words = ((kinds <= PacketType.CONFIG_READ) & (rows["direction"] == 1)) | np.isin(kinds, _ALWAYS)
            for io_group, n in enumerate(np.bincount(io_groups_of(rows[words])).tolist()):
                if n:
                    counts[io_group] = counts.get(io_group, 0) + n
    return counts
