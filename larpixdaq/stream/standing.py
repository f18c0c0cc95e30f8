"""Whether a process is still who it was: one that has stood still may have been taken for dead, and another of its name
started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

#: More than this between two turns of a loop, in seconds, and we may have been taken for dead: the core says `lost`
#: after 1 s without a heartbeat.
STOOD_STILL: Final = 0.8
#: A core that is unheard for so long (seconds) is not there, and nobody can register with it in our name.
NO_CORE: Final = 2.0


class Heard(Protocol):
    """What is needed of a Node: times (monotonic) of the last message from the core, and of the newest heartbeat of
    ours that it has answered."""

    @property
    def heard(self) -> float: ...
    @property
    def confirmed(self) -> float: ...


class Standing:
    """Notices when a loop has stood still, and says when it may act again. To be asked before each act, and often."""

    def __init__(self, core: Heard, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        #: For how long we stood still the last time, in seconds.
        self.stood = 0.0
        self._last: float | None = None
        self._since: float | None = None  # when we were back from standing still; None: all is well

    def good(self) -> bool:
        """Whether we may act: yes, until we stand still, and then when the core has answered what we sent after it."""
        now = self._clock()
        stood, self._last = now - (now if self._last is None else self._last), now
        if stood > STOOD_STILL:
            self._since = now
            self.stood = stood
        if self._since is None:
            return True
        if self._core.confirmed > self._since or now - max(self._since, self._core.heard) > NO_CORE:
            self._since = None
        return self._since is None
