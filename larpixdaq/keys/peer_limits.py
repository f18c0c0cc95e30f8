"""Limits of what one key may do, so that it cannot keep others from their work, and a record of those reached."""

from __future__ import annotations

import logging
import time
from typing import Final

import msgspec

from larpixdaq.runtime.timing import Throttle

_log = logging.getLogger("larpixdaq.keys")
#: Open connections of one key at a socket: of a key that was invited, fewer where the process may have few descriptors;
#: and of the core's own user, who has them all with components and Operators.
OPEN: Final = 64
OPEN_OWNER: Final = 512
#: Seconds between two lines in the log about the same limit of the same peer.
_LINE_INTERVAL: Final = 60.0
#: Maximum number of entries in a status; the oldest are dropped.
_ENTRIES: Final = 50
#: So that all keys together have no limit of their own.
_UNSHARED: Final = 1 << 20


def connection_rates() -> tuple[Throttle, Throttle]:
    """Return the limits of new connections a second: of keys that were invited, and of the core's own user."""
    return Throttle(10, 100, shares=_UNSHARED), Throttle(200, 1000, shares=_UNSHARED)


def registration_rates() -> tuple[Throttle, Throttle]:
    """Return the limits of registrations a second at the core: of keys that were invited, and of the core's own
    user."""
    return Throttle(10, 100, shares=_UNSHARED), Throttle(200, 1000, shares=_UNSHARED)


def request_rate() -> Throttle:
    """Return the limit of an Operator's requests a second, which no program reaches that waits for its results."""
    return Throttle(2000, 10_000, shares=_UNSHARED)


class LimitReached(msgspec.Struct):
    """A limit that a peer has reached: how often, and when last (unix s)."""

    peer: str
    limit: str
    count: int = 0
    last: float = 0.0


class PeerLimits:
    """The limits that peers of a process have reached since its start, for log and status."""

    def __init__(self, what: str) -> None:
        """`what`: the process or socket, in the log."""
        self._what = what
        self._entries: dict[tuple[str, str], LimitReached] = {}
        self._line_at: dict[tuple[str, str], float] = {}
        self._any_line_at = 0.0
        #: The sum of all counts.
        self.total = 0

    def reached(self, peer: str, limit: str, count: int = 1) -> None:
        """Count that something of a peer was refused because of a limit.

        Logs the limit at most once a minute, and at most one line a second.
        """
        key = peer, limit
        entry = self._entries.pop(key, None) or LimitReached(peer, limit)
        self._entries[key] = entry  # the last one reached is the last of the dict
        entry.count += count
        entry.last = time.time()
        self.total += count
        now = time.monotonic()
        if now >= max(self._any_line_at, self._line_at.get(key, 0.0)):
            self._any_line_at, self._line_at[key] = now + 1.0, now + _LINE_INTERVAL
            _log.warning("%s: %s has reached a limit: %s (%d times so far)", self._what, peer, limit, entry.count)
        while len(self._entries) > _ENTRIES:
            oldest = next(iter(self._entries))
            del self._entries[oldest]
            self._line_at.pop(oldest, None)

    def report(self) -> list[LimitReached]:
        """Return a copy of the entries, the last one reached at the end."""
        return [msgspec.structs.replace(entry) for entry in self._entries.values()]
