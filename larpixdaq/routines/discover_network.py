"""Discovery of networks as a routine: as the action of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from larpixdaq.errors import RequestError
from larpixdaq.routines import Routine


def _discover_network(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    file: str | None = None,
    tiles: int | list[int] | None = None,
    io_group: int | list[int] | None = None,
    shape: str | dict[str, Any] | None = None,
    exclude: str | list[str] | None = None,
    reset: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """Finds the chips of tiles and a network that leads round dead chips and broken links, and writes a board file.

    FILE: name of the new board file, .json, on the producer's machine (None: named by the time), with a picture of the
    tiles beside it, .html. TILES: numbers from 0 (None: those that are on). SHAPE: "10x10", "10x16", "5x5", or a
    dictionary with rows, columns, roots, ... EXCLUDE: keys of chips that are not to be used. With RESET the boards'
    chips are reset before and after it; then configure_network() brings up what was found.

    Result: "ok" (no fault), "file", "picture", "chips" and "missing" (numbers), "faults" (one line each), "state" (of
    the chips), "seconds", "tiles": [{"io_group", "tile", "roots", "missing", "network", "broken", "one_way", ...}].
    """
    if not hasattr(controller.io, "discover_network"):
        raise RequestError("discover_network: needs the io of a producer's routine")
    found: dict[str, Any]
    controller, found = controller.io.discover_network(file, tiles, io_group, shape, exclude, reset, progress=send_info)
    return controller, found


registration = {"discover_network": Routine("discover_network", _discover_network)}
