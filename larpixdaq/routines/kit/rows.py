"""What routines look for in rows as they are recorded (schema.py), of any generation of chips."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.schema import PacketType

_DATA_V3: Final = 1


def kinds(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """The packet type of each."""
    found: NDArray[np.uint8] = rows["type" if "type" in (rows.dtype.names or ()) else "packet_type"]
    return found


def of_chips(rows: NDArray[Any]) -> NDArray[Any]:
    """Those that chips have sent."""
    found: NDArray[Any] = rows[(kinds(rows) < PacketType.TIMESTAMP) & (rows["direction"] == 1)]
    return found


def is_hit(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of those that chips have sent are data."""
    data = _DATA_V3 if "reset_sample_flag" in (rows.dtype.names or ()) else PacketType.DATA
    found: NDArray[np.bool_] = kinds(rows) == data
    return found


def is_answer(rows: NDArray[Any], register: int) -> NDArray[np.bool_]:
    """Which of those that chips have sent say what this register holds."""
    address = rows["register" if "register" in (rows.dtype.names or ()) else "register_address"]
    found: NDArray[np.bool_] = (kinds(rows) == PacketType.CONFIG_READ) & (address == register)
    return found
