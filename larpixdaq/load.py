"""How busy this process is: what `status` shows of it."""

from __future__ import annotations

import time

#: Shares are those of spans of at least so long (seconds).
SPAN = 1.0


class Load:
    """Processor time over time. To be asked in the main loop's thread, as often as one likes."""

    def __init__(self) -> None:
        self._before = self._now()
        self._shares = {"loop": 0.0, "process": 0.0}

    def shares(self) -> dict[str, float]:
        """Of the last span: `loop`, the share of one core that the main loop has used, 1 when it has no time left;
        `process`, the cores that all threads have used together."""
        if time.monotonic() - self._before[0] < SPAN:
            return self._shares
        now = self._now()
        span, loop, process = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        self._shares = {"loop": round(loop / span, 3), "process": round(process / span, 3)}
        return self._shares

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), time.thread_time(), time.process_time()


def words(shares: dict[str, float]) -> str:
    """ "CPU 8 %, can take at least 13 times this rate": as far as the main loop goes, if there are cores for it."""
    loop, process = shares["loop"], shares["process"]
    if loop < 0.05:
        return f"CPU {process:.0%}"
    if loop > 0.95:
        return f"CPU {process:.0%}, at its limit"
    times = f"{1 / loop:.1f}" if loop > 0.1 else f"{int(1 / loop)}"
    return f"CPU {process:.0%}, can take at least {times} times this rate"
