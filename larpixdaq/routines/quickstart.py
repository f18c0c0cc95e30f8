"""From a board that has just got power to chips that can be read out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates

#: Seconds that a chip's registers take to come back.
_PER_CHIP = 0.05


def _quickstart(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    threshold: int = 255,
    seconds: float = 1.0,
) -> tuple[Any, dict[str, Any]]:
    """Writes the whole configuration of all chips that the board file names, with this global THRESHOLD, reads it back,
    and counts for SECONDS what comes.

    The network has to be there: load_board(file), power() and configure_network() come first. The result: "ok",
    "chips", the "different" registers by chip (expected, found), and "rate_hz" of all channels together.
    """
    if not 0 <= threshold <= 255 or not seconds > 0:
        raise ValueError(f"threshold, seconds: expected 0 to 255 and more than 0, found {threshold} and {seconds:g}")
    mine = Chips(controller)
    mine.set(threshold=threshold)
    for number, key in enumerate(mine.keys):
        send_info(f"chip {key} is written", number, len(mine))
        controller.write_configuration(key)
    send_info("reading back", len(mine), len(mine))
    _, found = controller.verify_configuration(mine.keys, timeout=1 + _PER_CHIP * len(mine))
    different = {
        str(key): {str(register): list(values) for register, values in registers.items()}
        for key, registers in found.items()
    }
    counts, listened = rates(controller, mine.keys, mine.channels, seconds)
    result = {"ok": not different, "chips": len(mine), "different": different}
    return controller, {**result, "rate_hz": round(float(counts.sum() / listened), 3)}


registration = {"quickstart": Routine("quickstart", _quickstart, ["threshold", "seconds"])}
