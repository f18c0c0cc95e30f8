"""How long a storage's disk will last, and who is told when it will not."""

from __future__ import annotations

import logging
from typing import Final

from larpixdaq.control.registry import MAX_COMPONENTS, Component
from larpixdaq.protocol.reports import StorageStatus
from larpixdaq.runtime.units import duration, size

_log = logging.getLogger("larpixdaq.core")

#: A disk that is full sooner than this (s), at the rate at which it fills, is worth a warning; then again at each.
WARNING_LIMITS: Final = (3600, 600, 60)


def time_to_full(status: StorageStatus) -> str:
    """Return `disk full in 12 min at 18 MB/s`, or "" when the disk does not fill."""
    if status.seconds_left is None or status.seconds_left < 0:
        return ""
    return f"disk full in {duration(status.seconds_left)} at {size(status.bytes_per_second)}/s"


def _level(status: StorageStatus) -> int:
    """Return the number of limits in WARNING_LIMITS that the time to full is below."""
    left = status.seconds_left
    return 0 if left is None or left < 0 else sum(left < limit for limit in WARNING_LIMITS)


def warnings(storages: list[Component]) -> list[str]:
    """Return a sentence for each storage whose disk will be full within an hour, that cannot write now, or whose
    command for finished files has failed."""
    found = [(one.name, status) for one in storages if (status := one.read_status(StorageStatus)) is not None]
    return [
        *(f"{name}: {time_to_full(status)}" for name, status in found if _level(status)),
        *(f"{name}: {status.on_close}" for name, status in found if status.on_close),
        *(f"{name} is not writing: {status.paused}" for name, status in found if status.paused),
    ]


class DiskWatch:
    """Tells the log when a disk begins to run out, as often as it gets worse, not at each heartbeat."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[str, int]] = {}  # by storage: why it is paused, how near its disk is to full

    def take(self, name: str, status: StorageStatus) -> None:
        """Take the status in a storage's heartbeat."""
        paused, level = status.paused, _level(status)
        before_paused, before_level = self._logged.get(name, ("", 0))
        if paused != before_paused:
            if paused:
                _log.error("%s is not writing: %s", name, paused)
            else:
                _log.warning("%s is writing again", name)
        if level > before_level:
            _log.warning("%s: %s", name, time_to_full(status))
        # Up to the next limit and back again is no news.
        while len(self._logged) > MAX_COMPONENTS:
            del self._logged[next(iter(self._logged))]
        self._logged[name] = (paused, level if not level else max(level, before_level))
