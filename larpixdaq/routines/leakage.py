"""How fast the channels fill up by themselves: their rates without periodic reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates


def _leakage(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    seconds: float = 10.0,
) -> tuple[Any, dict[str, Any]]:
    """Rates of each channel with periodic reset and without, SECONDS each.

    A channel that nobody resets fills up to its threshold and sends: the difference of the two rates, times the
    threshold's distance from the pedestal, is its leakage. CHIPS are chip keys, None all; the chips are in the end as
    they were before. The result: "chips", for each "with_reset", "without_reset" and "leakage", lists over its
    channels, in Hz; "saturated": io_channels that carried all they could, so that rates there are higher than was
    counted.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, found {seconds:g}")
    mine = Chips(controller, chips).unmasked()
    found = []
    with mine.restored(), mine.untriggered():
        for number, reset in enumerate((1, 0)):
            send_info(f"periodic reset {'on' if reset else 'off'}", number, 2)
            mine.set(periodic_reset=reset)
            found.append(rates(controller, mine.keys, mine.channels, seconds))
    on, off = (each.hz for each in found)
    listed = {
        key: {
            "with_reset": on[place].round(3).tolist(),
            "without_reset": off[place].round(3).tolist(),
            "leakage": (off[place] - on[place]).round(3).tolist(),
        }
        for place, key in enumerate(mine.keys)
    }
    return controller, {"chips": listed, "saturated": sorted({line for each in found for line in each.saturated})}


registration = {"leakage": Routine("leakage", _leakage, ["chips", "seconds"])}
