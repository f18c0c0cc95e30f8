"""From a board that has just got power to chips that can be read out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates


def _quickstart(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    threshold: int = 255,
    seconds: float = 1.0,
) -> tuple[Any, dict[str, Any]]:
    """Writes the whole configuration of all chips that the board file names, with this global THRESHOLD, reads it back,
    and counts for SECONDS how often channels trigger themselves, with other triggers off.

    The network has to be there: load_board(file), power() and configure_network() come first. The result: "ok",
    "chips", the "different" registers by chip {register: [expected, found]} (None: no answer), and "rate_hz" of all
    channels together.
    """
    if not 0 <= threshold <= 255 or not seconds > 0:
        raise ValueError(f"threshold, seconds: expected 0 to 255 and more than 0, found {threshold} and {seconds:g}")
    mine = Chips(controller)
    mine.set(threshold=threshold)
    send_info(f"{len(mine)} chips are written", 0, 2)
    mine.write()
    send_info("reading back", 1, 2)
    different = mine.different()
    with mine.untriggered():
        counted = rates(controller, mine.keys, mine.channels, seconds)
    result = {"ok": not different, "chips": len(mine), "different": different}
    return controller, {**result, "rate_hz": round(float(counted.hz.sum()), 3)}


registration = {"quickstart": Routine("quickstart", _quickstart, ["threshold", "seconds"])}
