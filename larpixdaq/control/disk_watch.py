"""How long a storage's disk will last, and who is told when it will not."""

from __future__ import annotations

import logging
from typing import Any, Final

from larpixdaq.control.registry import MOST_COMPONENTS, Component
from larpixdaq.runtime.units import duration, size

_log = logging.getLogger("larpixdaq.core")

#: A disk that is full sooner than this (s), at the rate at which it fills, is worth a warning; then again at each.
SOON: Final = (3600, 600, 60)


def time_to_full(status: dict[str, Any]) -> str:
    """`disk full in 12 min at 18 MB/s`, from a storage's status; "" when it fills at no rate."""
    left, rate = status.get("seconds_left"), status.get("bytes_per_second")
    if not isinstance(left, int | float) or left < 0:
        return ""
    return f"disk full in {duration(left)}" + (f" at {size(rate)}/s" if isinstance(rate, int | float) else "")


def _level(status: dict[str, Any]) -> int:
    """How many of SOON it has come to."""
    left = status.get("seconds_left")
    return sum(left < limit for limit in SOON) if isinstance(left, int | float) else 0


def warnings(storages: list[Component]) -> list[str]:
    """A sentence for each storage whose disk will not last for an hour, that cannot write now, or whose command for
    finished files has failed."""
    found = [f"{one.name}: {time_to_full(one.status)}" for one in storages if _level(one.status)]
    found += [f"{one.name}: {one.status['on_close']}" for one in storages if one.status.get("on_close")]
    return found + [
        f"{one.name} is not writing: {one.status['paused']}" for one in storages if one.status.get("paused")
    ]


class SpaceWatch:
    """Tells the log when a disk begins to run out, as often as it gets worse, not at each heartbeat."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, int]] = {}  # by storage: why it is paused, how near its disk is to full

    def take(self, component: Component) -> None:
        """A storage's heartbeat."""
        paused, level = str(component.status.get("paused") or ""), _level(component.status)
        before_paused, before_level = self._told.get(component.name, ("", 0))
        if paused != before_paused:
            if paused:
                _log.error("%s is not writing: %s", component.name, paused)
            else:
                _log.warning("%s is writing again", component.name)
        if level > before_level:
            _log.warning("%s: %s", component.name, time_to_full(component.status))
        # Up to the next limit and back again is no news.
        while len(self._told) > MOST_COMPONENTS:
            del self._told[next(iter(self._told))]
        self._told[component.name] = (paused, level if not level else max(level, before_level))
