"""First readout of chips that have just got power and their network."""

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
    """Writes and reads back the whole configuration of all chips, with the global THRESHOLD, and measures their rate.

    The rate is that of natural triggers in SECONDS (s), with periodic, external and cross triggers off. Before it, call
    load_board(file), power() and configure_network().

    Result: "ok"; "chips", their number; "different" {chip: {register: [expected, found]}}, found None without an
    answer; "rate_hz", the rate of all channels together in Hz.
    """
    if not 0 <= threshold <= 255 or not seconds > 0:
        raise ValueError(f"threshold, seconds: expected 0 to 255 and more than 0, found {threshold} and {seconds:g}")
    selected = Chips(controller)
    selected.set(threshold=threshold)
    send_info(f"{len(selected)} chips are written", 0, 2)
    selected.write()
    send_info("reading back", 1, 2)
    different = selected.different()
    with selected.untriggered():
        measured = rates(controller, selected.keys, selected.channels, seconds)
    result = {"ok": not different, "chips": len(selected), "different": different}
    return controller, {**result, "rate_hz": round(float(measured.hz.sum()), 3)}


registration = {"quickstart": Routine("quickstart", _quickstart)}
