"""What routines look for in rows as they are recorded (schema.py), of any generation of chips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.schema import PacketType, registers_of, types_of

_DATA_V3: Final = 1


def of_chips(rows: NDArray[Any]) -> NDArray[Any]:
    """Those that chips have sent."""
    found: NDArray[Any] = rows[(types_of(rows) < PacketType.TIMESTAMP) & (rows["direction"] == 1)]
    return found


def is_hit(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of those that chips have sent are data."""
    data = _DATA_V3 if "reset_sample_flag" in (rows.dtype.names or ()) else PacketType.DATA
    found: NDArray[np.bool_] = types_of(rows) == data
    return found


def is_answer(rows: NDArray[Any], registers: Sequence[int]) -> NDArray[np.bool_]:
    """Which of those that chips have sent say, with the right parity, what one of these registers holds."""
    address, _ = registers_of(rows)
    found: NDArray[np.bool_] = (types_of(rows) == PacketType.CONFIG_READ) & (rows["valid_parity"] == 1)
    return found & np.isin(address, registers)
