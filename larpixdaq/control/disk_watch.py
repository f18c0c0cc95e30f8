"""Warnings about disks of storages that will soon be full, and about storages that do not write."""

from __future__ import annotations

import logging
from typing import Final

from larpixdaq.control.registry import MAX_COMPONENTS, Component
from larpixdaq.protocol.reports import StorageStatus
from larpixdaq.runtime.units import duration, size

_log = logging.getLogger("larpixdaq.core")

#: Seconds until the disk is full at the present rate; the core warns once below each.
WARNING_LIMITS: Final = (3600, 600, 60)


def time_to_full(status: StorageStatus) -> str:
    """Return `disk full in 12 min at 18 MB/s`, or "" when the disk does not fill."""
    if status.seconds_left is None or status.seconds_left < 0:
        return ""
    return f"disk full in {duration(status.seconds_left)} at {size(status.bytes_per_second)}/s"


def _level(status: StorageStatus) -> int:
    """Return the number of WARNING_LIMITS above the time until the disk is full."""
    left = status.seconds_left
    return 0 if left is None or left < 0 else sum(left < limit for limit in WARNING_LIMITS)


def warnings(storages: list[Component]) -> list[str]:
    """Return a sentence for each storage whose disk will be full within an hour, whose command for finished files has
    failed, or that cannot write now."""
    reported = [(storage.name, status) for storage in storages if (status := storage.read_status(StorageStatus))]
    return [
        *(f"{name}: {time_to_full(status)}" for name, status in reported if _level(status)),
        *(f"{name}: {status.on_close}" for name, status in reported if status.on_close),
        *(f"{name} is not writing: {status.paused}" for name, status in reported if status.paused),
    ]


class DiskWatch:
    """Logs each limit of WARNING_LIMITS that a disk falls below, and when a storage stops or starts to write."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[str, int]] = {}  # by storage: why it is paused, and its _level()

    def take(self, name: str, status: StorageStatus) -> None:
        """Take the status in a storage's heartbeat."""
        paused, level = status.paused, _level(status)
        known_paused, known_level = self._logged.get(name, ("", 0))
        if paused != known_paused:
            if paused:
                _log.error("%s is not writing: %s", name, paused)
            else:
                _log.warning("%s is writing again", name)
        if level > known_level:
            _log.warning("%s: %s", name, time_to_full(status))
        while len(self._logged) > MAX_COMPONENTS:
            del self._logged[next(iter(self._logged))]
        # The level only rises until it is 0 again, so that a time around a limit is logged once.
        self._logged[name] = (paused, level if not level else max(level, known_level))
