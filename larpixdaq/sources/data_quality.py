"""What became of data before they reached us: verdicts per io_group, from what boards and connections give away.

Boards do not number what they send. What they or the network dropped shows only in other things: a connection that was
away, a header that counts more words than came, a clock that jumps, a FIFO that says that it is full. The decoders
gather these (schema.NOTICES, ext/loss_evidence.pxd), Presence watches the connection; FINDINGS says what follows.

The offset of a board's clock from the host's, and its drift, from the times in the headers of its messages.

A header was written before its message had reached us, so the clock is ahead of ours by at least their difference, and
by no more than the difference from our last look at an empty socket, plus a second where whole seconds are written.
The second bound does not know of messages that the network held up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.protocol.stream import VERDICTS, LossVerdict
from larpixdaq.schema import NOTICES

COMPLETE, SUSPECT, LOST = VERDICTS
#: Seconds between two warnings about the same finding in the same io_group.
WARN_AGAIN: Final = 10.0
#: A board that is found within so many ns of the run's beginning was there.
GRACE_NS: Final = 10**9
#: And one that is lost for good so many ns before the run is told to end, or whose last messages come then: people
#: switch boards off and end runs in either order, and what a board has sent may wait in queues for long.
END_GRACE_NS: Final = 2 * 10**9
#: That time begins when all that the board has sent is stored, or so many ns after its last message: runs are ended
#: when the storages have caught up.
BACKLOG_NS: Final = 30 * 10**9
#: Times that a board was away which are told one by one; the last of them goes on to the end of all that follow.
MOST_GAPS: Final = 20
#: Readings of the last minute say what the offset is now.
_KEPT: Final = 60
#: Seconds between two minutes from which a drift is worked out, at least.
_APART: Final = 120.0
#: A reading that misses the ones before by so much (seconds) is that of a clock that was set.
_SET: Final = 0.5
#: Readings one after the other that are so much too late before the clock is taken to be set: messages may be held up.
_LATE: Final = 20


class Finding(NamedTuple):
    verdict: str
    text: str  # of {events} and {amount}, see schema.NOTICES
    lost: str = ""  # which of them says how many packets are lost at least
    setup: bool = False  # the producer's options contradict what the boards send: worth knowing before a run


#: What each of schema.NOTICES means. "lost": it is certain that something was sent and is not here.
FINDINGS: Final = {
    # The header is written when the words are complete: those that do not follow it were cut off on the way.
    "short": Finding(LOST, "{amount} words missing in {events} board messages, by their headers", "amount"),
    # No board sends a message that large. It was dropped before it was looked at: at least one packet for each.
    "oversized": Finding(LOST, "{events} board messages dropped as too large ({amount} bytes in all)", "events"),
    # Bytes came that make no sense: words may have been among them. The ledger has the numbers, and the unknown words.
    "trailing": Finding(SUSPECT, "{amount} bytes behind the last word of {events} board messages"),
    "rejected": Finding(SUSPECT, "{events} invalid board messages ({amount} bytes in all)"),
    "unknown": Finding(SUSPECT, "{amount} words could not be decoded"),
    "resync": Finding(SUSPECT, "{amount} bytes outside of frames"),
    # A full FIFO drops what comes next, and does not say how much. v3 chips with enable_tally count in the same bits.
    "full": Finding(SUSPECT, "{amount} packets with the flag that a FIFO of their chip was full"),
    # Sent twice by the board, or an older one in place of a newer: both are stored, and something may be missing.
    "doubled": Finding(SUSPECT, "{events} board messages ({amount} words) appear to be duplicates"),
    # A clock that goes back is that of a board that has started again: what it had not sent is gone.
    "back": Finding(SUSPECT, "the board's time went back {events} times, by {amount} s in all: has it restarted?"),
    # Messages that followed each other here were sent seconds apart, and no silence lay between them: others did.
    "ahead": Finding(SUSPECT, "the board's time jumped ahead {events} times, by {amount} s in all"),
    # Heartbeats come at equal ticks of the board's clock; where some are not here, other words may be missing too.
    "heartbeats": Finding(SUSPECT, "{amount} heartbeats missing in {events} gaps"),
    # Each reset of the clock tells how long ago the one before was; that one has not come.
    "resets": Finding(SUSPECT, "SYNC words of clock resets missing in {events} gaps"),
    # More than a board's queue holds had been held up, and behind it time is missing: it may have dropped the rest.
    "holes": Finding(SUSPECT, "{seconds:.2f} s of board time missing in {events} gaps, after delayed delivery"),
    # The lower half is stored, as a clock of 32 bits would say it: the turns of 429 s are not in the rows.
    "cut": Finding(
        SUSPECT,
        "the receipt timestamps of {amount} packets have more than 32 bits, and only the lower 32 are stored: start "
        "the producer with --pacman-format 1.0 (an IO class: with --clock64)",
        setup=True,
    ),
    # Stored with the wrong bits of the clock, and sync and trigger words with none.
    "clock64": Finding(
        SUSPECT,
        "at least {amount} words come from firmware with a 64-bit clock, and times are stored wrongly: start the "
        "producer with --clock64",
        setup=True,
    ),
    "clock32": Finding(
        SUSPECT,
        "{amount} sync and trigger words come from firmware with a 32-bit clock, and all times are stored wrongly: "
        "start the producer without --clock64",
        setup=True,
    ),
    # Their columns are filled from other bits than the chips meant.
    "as_v1": Finding(SUSPECT, "the packets look like those of v1 chips: start the producer with --asic 1", setup=True),
    "as_v2": Finding(
        SUSPECT, "the packets are of type 0, data of v2 or v1 chips: start the producer with --asic 2 or 1", setup=True
    ),
    "as_v3": Finding(
        SUSPECT, "the packets are of type 1, data of v3 chips: start the producer with --asic 3", setup=True
    ),
    "parity": Finding(
        SUSPECT,
        "more than a quarter of the packets have wrong parity, in {events} samples of 64: the chips are of another "
        "generation than --asic says, or the line is bad",
        setup=True,
    ),
}

assert sorted(FINDINGS) == sorted(NOTICES)

_SETUP: Final = np.array([FINDINGS[name].setup for name in NOTICES])


def verdicts(io_group: int, noticed: NDArray[Any], others: Iterable[LossVerdict] = ()) -> list[LossVerdict]:
    """The lines about one io_group: `others` (of its connection), then what its decoder noticed (dtype schema.NOTICE,
    one for each of NOTICES). One line "complete" when there is nothing to say."""
    found = list(others)
    for name, notice in zip(NOTICES, noticed, strict=True):
        if notice["events"]:
            finding = FINDINGS[name]
            numbers = {"events": int(notice["events"]), "amount": int(notice["amount"])}
            seconds = numbers["amount"] / 1e6  # of those that count microseconds
            found.append(
                LossVerdict(
                    io_group,
                    finding.verdict,
                    finding.text.format(**numbers, seconds=seconds),
                    numbers.get(finding.lost, 0),
                    int(notice["first_ns"]),
                    int(notice["last_ns"]),
                )
            )
    return found or [LossVerdict(io_group, COMPLETE, "", 0, 0, 0)]


def setup_findings(io_group: int, noticed: NDArray[Any]) -> list[LossVerdict]:
    """Those lines of verdicts() that contradict the producer's options, [] when there are none."""
    if not noticed["events"][_SETUP].any():
        return []
    wrong = noticed.copy()
    wrong[~_SETUP] = 0
    return [line for line in verdicts(io_group, wrong) if line.verdict != COMPLETE]


def added(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """What several decoders noticed about one io_group, as if it had been one."""
    total: NDArray[Any] | None = None
    for part in parts:
        if total is None:
            total = part.copy()
            continue
        new, old = part["events"] > 0, total["events"] > 0
        total["first_ns"] = np.where(new & old, np.minimum(part["first_ns"], total["first_ns"]), total["first_ns"])
        total["first_ns"] = np.where(new & ~old, part["first_ns"], total["first_ns"])
        total["last_ns"] = np.maximum(part["last_ns"], total["last_ns"])
        total["events"] += part["events"]
        total["amount"] += part["amount"]
    if total is None:
        raise ValueError("no decoder, so nothing was noticed")
    return total


class ConnectionState(Enum):
    ABSENT = 0  # no connection since the run began
    THERE = 1
    LOST = 2  # the connection is gone
    BACK = 3  # there is one again, no message yet


class Presence:
    """Whether a board was there. Times are unix ns.

    It was away from the last message before its connection was lost to the first one after, or to now: a board that
    publishes keeps nothing for those who are away, so that all that it sent meanwhile is gone. One that is connected
    and silent has nothing against it: no message is no sign. Only when it says nothing in a whole run that is longer
    than it ever is silent (`silence`, ns: boards send heartbeats, which can be switched off; 0: it may be silent) is
    that told. Beginning and end of a run are not sharper than GRACE_NS and END_GRACE_NS.
    """

    def __init__(self, silence: int = 0) -> None:
        self._silence = silence
        self._state = ConnectionState.ABSENT
        self._since = 0  # the run began
        self._heard = 0  # the last message; 0: none in this run
        self._away = 0  # from when on, unless it is THERE
        self._lost = 0  # when that was noticed
        self._gaps: list[tuple[int, int]] = []
        self._number = 0
        self._backlog = 0, -1, 0  # last message, blocks that were made by then (-1: unknown), when they were stored
        #: Since when there has been no connection, whatever runs begin and end; 0: there is one.
        self.away_ns = 0

    def expect(self, now: int) -> None:
        """From now on there ought to be a connection."""
        self.away_ns = now

    def start(self, now: int) -> None:
        """A run begins; whether the board is connected stays as it is."""
        self._state = (
            ConnectionState.THERE
            if self._state in (ConnectionState.THERE, ConnectionState.BACK)
            else ConnectionState.ABSENT
        )
        self._since = self._away = now
        self._heard = self._number = 0
        self._backlog = 0, -1, 0
        self._gaps.clear()

    def connected(self, now: int) -> None:
        self.away_ns = 0
        if self._state is ConnectionState.ABSENT:
            self._there(now)
        elif self._state is ConnectionState.LOST:
            self._state = ConnectionState.BACK

    def heard(self, now: int) -> None:
        self._heard = now
        if self._state is ConnectionState.ABSENT:
            self.away_ns = 0
        if self._state is ConnectionState.LOST:  # it was on its way when the connection was lost
            self._away = now
        elif self._state is not ConnectionState.THERE:
            self._there(now)

    def lost(self, now: int, since: int = 0) -> None:
        """The connection is gone. `since`: messages went on coming, so this is noticed late; it was there then."""
        self._lost = now
        self.away_ns = self.away_ns or now
        if self._state is ConnectionState.THERE:
            self._away = since or self._heard or self._since
        if self._state is not ConnectionState.ABSENT:
            self._state = ConnectionState.LOST

    def delivered(self, made: int, stored: int, now: int) -> None:
        """Of all boards' blocks so many were made by now, and so many are stored."""
        heard, behind, done = self._backlog
        if self._heard > heard:
            heard, behind, done = self._heard, -1, 0
        elif behind < 0:
            behind = made  # the block that was open when the message came is closed by now
        if not done and 0 <= behind <= stored:
            done = now
        self._backlog = heard, behind, done

    def _done(self, now: int) -> int:
        """Since when nothing of a board that is lost has been under way."""
        last = max(self._lost, self._heard)
        heard, _, done = self._backlog
        if heard == self._heard and heard:
            last = max(last, done or min(now, heard + BACKLOG_NS))
        return last

    def _there(self, now: int) -> None:
        if self._state is ConnectionState.BACK or now - self._since > GRACE_NS:
            self._number += 1
            if len(self._gaps) == MOST_GAPS:
                self._gaps[-1] = self._gaps[-1][0], now
            else:
                self._gaps.append((self._away, now))
        self._state = ConnectionState.THERE

    def findings(self, io_group: int, now: int) -> list[LossVerdict]:
        """One line for each time that the board was away since start(). `now`: or when the run was told to end."""
        found: list[LossVerdict] = []
        for first, last in self._gaps:
            more = self._number - MOST_GAPS if len(found) == MOST_GAPS - 1 else 0
            found.append(
                _gap(io_group, f"board disconnected{f', and {more} times more' if more > 0 else ''}", first, last)
            )
        if self._state is ConnectionState.BACK:
            found.append(_gap(io_group, "board disconnected, silent since it reconnected", self._away, now))
        elif self._state is ConnectionState.LOST and now - self._done(now) > END_GRACE_NS:
            found.append(_gap(io_group, "board disconnected, did not reconnect", self._away, now))
        elif self._state is ConnectionState.ABSENT:
            found.append(_gap(io_group, "board never connected", self._away, now))
        elif not self._heard and self._silence and now - self._since > self._silence:
            found.append(_gap(io_group, "board connected but silent, without any heartbeat", self._since, now))
        return found


def _gap(io_group: int, text: str, first: int, last: int) -> LossVerdict:
    return LossVerdict(io_group, SUSPECT, f"{text}: {(last - first) / 1e9:.1f} s", 0, first, last)


class Watch:
    """The worst verdict of each io_group of a run so far, and warnings when something new speaks against one."""

    def __init__(self, again: float = WARN_AGAIN) -> None:
        self.worst: dict[int, str] = {}
        self._again = again
        self._told: dict[tuple[int, str], tuple[float, set[LossVerdict]]] = {}

    def start(self) -> None:
        self.worst.clear()
        self._told.clear()

    def look(self, found: Iterable[LossVerdict], now: float) -> list[str]:
        """Warnings, each one line: a finding of a kind that is new in its io_group, or has grown and was last told
        `again` seconds ago. `now`: monotonic seconds."""
        lines = []
        worst: dict[int, str] = {}
        for one in found:
            worst[one.io_group] = max(worst.get(one.io_group, COMPLETE), one.verdict, key=VERDICTS.index)
            kind = one.io_group, _kind(one)
            at, told = self._told.get(kind, (-math.inf, set()))
            if one.verdict == COMPLETE or one in told or now < at + self._again:
                continue
            self._told[kind] = now, told | {one}
            lines.append(f"io_group {one.io_group} is {one.verdict}: {one.why}")
        self.worst = worst
        return lines


def _kind(one: LossVerdict) -> str:
    """Sentences that differ in their numbers only are of one kind."""
    return "".join(letter for letter in one.why if not letter.isdigit())


class ClockReading(NamedTuple):
    """Seconds that the board's clock is ahead of the host's, and parts per million by which it runs faster, each with
    half of the interval in which it lies; `drift` None: not known yet."""

    offset: float
    offset_uncertainty: float
    drift: float | None = None
    drift_uncertainty: float = 0.0

    def __str__(self) -> str:
        digits = max(0, min(6, 1 - math.floor(math.log10(max(self.offset_uncertainty, 1e-6)))))
        text = f"clock {self.offset:+.{digits}f} ± {self.offset_uncertainty:.2g} s from the host's"
        if self.drift is None:
            return text
        return f"{text}, drift {self.drift:+.1f} ± {self.drift_uncertainty:.2g} ppm"

    def beyond(self, limit: float) -> bool:
        """Whether the offset is larger than so many seconds for certain."""
        return abs(self.offset) - self.offset_uncertainty > limit


class BoardClock:
    """One board's clock; times are monotonic seconds."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, float, float]] = deque(maxlen=_KEPT)  # time, bounds of the offset (seconds)
        self._first: tuple[float, float, float] | None = None  # the same of the first minute
        self._late = 0  # readings one after the other that say that the clock was set back

    def take(self, now: float, bounds: tuple[float, float] | None) -> None:
        """Take what a decoder's clock_bounds() says, once a second."""
        if bounds is None:
            return
        low, high = bounds[0] / 1e9, bounds[1] / 1e9
        known = self._bounds()
        self._late = self._late + 1 if known is not None and high < known[0] - _SET else 0
        if known is not None and (low > known[1] + _SET or self._late >= _LATE):
            self._readings.clear()
            self._first, self._late = None, 0
        self._readings.append((now, low, high))
        if self._first is None and now - self._readings[0][0] >= _KEPT / 2:
            self._first = (now, *self._interval())

    def reading(self) -> ClockReading | None:
        """What is known by now; None before the first header."""
        if not self._readings:
            return None
        low, high = self._interval()
        offset, uncertainty = (low + high) / 2, (high - low) / 2
        now = self._readings[-1][0]
        if self._first is None or now - self._first[0] < _APART:
            return ClockReading(offset, uncertainty)
        then, first_low, first_high = self._first
        passed = (now - then) / 1e6
        drift = (offset - (first_low + first_high) / 2) / passed
        return ClockReading(offset, uncertainty, drift, (uncertainty + (first_high - first_low) / 2) / passed)

    def _bounds(self) -> tuple[float, float] | None:
        return self._interval() if self._readings else None

    def _interval(self) -> tuple[float, float]:
        """In which the offset lies, by the last minute. An upper bound below a lower one is that of a message that was
        held up."""
        low = max(one[1] for one in self._readings)
        highs = [one[2] for one in self._readings]
        # All of them held up: by about as much as the bounds miss each other.
        high = min((one for one in highs if one >= low), default=min(2 * low - max(highs), low + 1.0))
        return (low, high) if high < math.inf else (low, low + 1.0)
