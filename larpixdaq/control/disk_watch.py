"""Warnings of prepare_run about disks of storages that will soon be full, and about storages that do not write.

During runs alarms tell the same (alarms.py).
"""

from __future__ import annotations

from typing import Final

from larpixdaq.control.registry import Component
from larpixdaq.protocol.reports import StorageStatus
from larpixdaq.runtime.units import duration, size

#: Seconds until the disk is full at the present rate, below which prepare_run warns.
WARNING_LIMIT: Final = 3600


def time_to_full(status: StorageStatus) -> str:
    """Return `disk full in 12 min at 18 MB/s`, or "" when the disk does not fill."""
    if status.seconds_left is None or status.seconds_left < 0:
        return ""
    return f"disk full in {duration(status.seconds_left)} at {size(status.bytes_per_second)}/s"


def warnings(storages: list[Component]) -> list[str]:
    """Return a sentence for each storage whose disk will be full within an hour, whose command for finished files has
    failed, or that cannot write now."""
    reported = [(storage.name, status) for storage in storages if (status := storage.read_status(StorageStatus))]
    return [
        *(
            f"{name}: {time_to_full(status)}"
            for name, status in reported
            if status.seconds_left is not None and 0 <= status.seconds_left < WARNING_LIMIT
        ),
        *(f"{name}: {status.on_close}" for name, status in reported if status.on_close),
        *(f"{name} is not writing: {status.paused}" for name, status in reported if status.paused),
    ]
