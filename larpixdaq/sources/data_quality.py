"""Quality of the data before they reach the producer: verdicts on losses per io_group, and the boards' clocks.

Boards do not number their messages. Losses in a board or in the network show only by their traces: a lost connection, a
header that counts more words than its message has, a clock that jumps, the flag of a full FIFO. The decoders collect
such traces (schema.NOTICES, ext/loss_evidence.pxd), Presence follows the connection, and FINDINGS gives the verdicts.

BoardClock measures the offset of a board's clock from the host's, and its drift, by the times in message headers. The
board writes a header before the host receives it, so the offset is at least (header - receipt). It is at most (header -
last look at the empty socket), plus 1 s for headers with whole seconds. The upper bound is wrong for messages that the
network has delayed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.protocol.stream import VERDICTS, LossVerdict
from larpixdaq.schema import NOTICES

COMPLETE, SUSPECT, LOST = VERDICTS
#: Minimum seconds between two warnings about the same finding in the same io_group.
WARNING_INTERVAL: Final = 10.0
#: A board that connects at most so many ns after the beginning of a run counts as connected from the beginning.
GRACE_NS: Final = 10**9
#: A board that is lost at most so many ns before the request of end_run has lost no data, because people switch boards
#: off and end runs in either order. Messages may wait in queues for long.
END_GRACE_NS: Final = 2 * 10**9
#: The time of END_GRACE_NS begins when all messages of the board are stored, at most so many ns after its last message,
#: because people end a run when the storages have caught up.
BACKLOG_NS: Final = 30 * 10**9
#: Maximum number of disconnections with a line each; the last line lasts to the end of all later ones.
MOST_GAPS: Final = 20
#: Number of readings, one a second, that give the present offset.
_READINGS: Final = 60
#: Minimum seconds between the two offsets that give a drift.
_DRIFT_SPAN: Final = 120.0
#: Seconds by which a reading must miss the previous ones to show that the clock was set.
_CLOCK_STEP: Final = 0.5
#: Number of consecutive readings too late by _CLOCK_STEP that show that the clock was set back. Fewer of them may come
#: from delayed messages.
_STEP_READINGS: Final = 20


class Finding(NamedTuple):
    verdict: str
    text: str  # with {events}, {amount} and {seconds} of schema.NOTICES
    lost: str = ""  # "events" or "amount": the minimum number of lost packets
    setup: bool = False  # the data contradict the producer's options, which is worth a warning before a run


#: The meaning of each of schema.NOTICES. LOST: data were certainly sent and have not arrived.
FINDINGS: Final = {
    # The board writes the header when the words are complete, so the missing words were cut off on the way.
    "short": Finding(LOST, "{amount} words missing in {events} board messages, by their headers", "amount"),
    # No board sends a message of this size. It was dropped unread, with at least one packet.
    "oversized": Finding(LOST, "{events} board messages dropped as too large ({amount} bytes in all)", "events"),
    # The invalid bytes may have been words. The ledger has their numbers, and the unknown words.
    "trailing": Finding(SUSPECT, "{amount} bytes behind the last word of {events} board messages"),
    "rejected": Finding(SUSPECT, "{events} invalid board messages ({amount} bytes in all)"),
    "unknown": Finding(SUSPECT, "{amount} words could not be decoded"),
    "resync": Finding(SUSPECT, "{amount} bytes outside of frames"),
    # A full FIFO drops the next packets without counting them. v3 chips with enable_tally count in the same bits.
    "full": Finding(SUSPECT, "{amount} packets with the flag that a FIFO of their chip was full"),
    # The board has sent a message twice, or an old one in place of a new one, which is then missing. Both are stored.
    "doubled": Finding(SUSPECT, "{events} board messages ({amount} words) appear to be duplicates"),
    # The clock goes back when the board restarts, and the data that it had not sent are lost.
    "back": Finding(SUSPECT, "the board's time went back {events} times, by {amount} s in all: has it restarted?"),
    # Two messages arrived without a silence between them, but were sent seconds apart: messages between them are lost.
    "ahead": Finding(SUSPECT, "the board's time jumped ahead {events} times, by {amount} s in all"),
    # Heartbeats come at equal ticks of the board's clock. Where some are missing, other words may be missing too.
    "heartbeats": Finding(SUSPECT, "{amount} heartbeats missing in {events} gaps"),
    # The SYNC word of a clock reset has the time since the previous reset, whose own SYNC word has not arrived.
    "resets": Finding(SUSPECT, "SYNC words of clock resets missing in {events} gaps"),
    # More messages were delayed than a board's queue holds, and board time is missing after them: the board may have
    # dropped messages.
    "holes": Finding(SUSPECT, "{seconds:.2f} s of board time missing in {events} gaps, after delayed delivery"),
    # Only the lower half of the clock is stored, which rolls over every 429 s.
    "cut": Finding(
        SUSPECT,
        "the receipt timestamps of {amount} packets have more than 32 bits, and only the lower 32 are stored: start "
        "the producer with --pacman-format 1.0 (an IO class: with --clock64)",
        setup=True,
    ),
    # Packets are stored with the wrong bits of the clock, sync and trigger words with none of them.
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
    # The columns of the rows come from the wrong bits.
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
    """Return the verdicts on one io_group: `others` (about its connection), then the findings of its decoder.

    `noticed`: dtype schema.NOTICE, one for each of NOTICES. Without any finding there is one line "complete"."""
    lines = list(others)
    for name, notice in zip(NOTICES, noticed, strict=True):
        if notice["events"]:
            finding = FINDINGS[name]
            numbers = {"events": int(notice["events"]), "amount": int(notice["amount"])}
            seconds = numbers["amount"] / 1e6  # of notices that count microseconds
            lines.append(
                LossVerdict(
                    io_group,
                    finding.verdict,
                    finding.text.format(**numbers, seconds=seconds),
                    numbers.get(finding.lost, 0),
                    int(notice["first_ns"]),
                    int(notice["last_ns"]),
                )
            )
    return lines or [LossVerdict(io_group, COMPLETE, "", 0, 0, 0)]


def setup_findings(io_group: int, noticed: NDArray[Any]) -> list[LossVerdict]:
    """Return the lines of verdicts() that contradict the producer's options."""
    if not noticed["events"][_SETUP].any():
        return []
    wrong = noticed.copy()
    wrong[~_SETUP] = 0
    return [line for line in verdicts(io_group, wrong) if line.verdict != COMPLETE]


def sum_notices(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Add up the notices of several decoders of one io_group."""
    table = np.stack(parts)
    total: NDArray[Any] = table[0].copy()
    total["events"], total["amount"] = table["events"].sum(axis=0), table["amount"].sum(axis=0)
    total["last_ns"] = table["last_ns"].max(axis=0)
    never = np.iinfo(table["first_ns"].dtype).max
    first = np.where(table["events"] > 0, table["first_ns"], never).min(axis=0)
    total["first_ns"] = np.where(total["events"] > 0, first, 0)
    return total


class ConnectionState(Enum):
    ABSENT = 0  # no connection since the beginning of the run
    CONNECTED = 1
    LOST = 2
    RECONNECTED = 3  # without any message yet


class Presence:
    """Connection of a board in a run: the times in which its messages were lost. Times are unix ns.

    A gap lasts from the last message before the loss of the connection to the first message after it, or to now. All
    messages of this time are lost, because a board that publishes keeps none. A silent board with a connection loses
    nothing, but a whole run without a message is reported when it is longer than `silence`: the time (ns) within which
    the board sends at least a heartbeat; 0: it may be silent, because heartbeats can be switched off. The beginning and
    the end of a run are known to GRACE_NS and END_GRACE_NS.
    """

    def __init__(self, silence: int = 0) -> None:
        self._silence = silence
        self._state = ConnectionState.ABSENT
        self._run_began = 0
        self._last_message = 0  # 0: none in this run
        self._gap_began = 0  # unless it is CONNECTED
        self._loss_noticed = 0
        self._gaps: list[tuple[int, int]] = []
        self._gap_count = 0
        self._backlog = 0, -1, 0  # last message, number of blocks made until then (-1: unknown), time of their storage
        #: Time of the loss of the connection, in or outside of runs; 0: connected.
        self.away_ns = 0

    def start(self, now: int) -> None:
        """Begin a run. The state of the connection stays as it is."""
        connected = self._state in (ConnectionState.CONNECTED, ConnectionState.RECONNECTED)
        self._state = ConnectionState.CONNECTED if connected else ConnectionState.ABSENT
        self._run_began = self._gap_began = now
        self._last_message = self._gap_count = 0
        self._backlog = 0, -1, 0
        self._gaps.clear()

    def connected(self, now: int) -> None:
        self.away_ns = 0
        if self._state is ConnectionState.ABSENT:
            self._set_connected(now)
        elif self._state is ConnectionState.LOST:
            self._state = ConnectionState.RECONNECTED

    def heard(self, now: int) -> None:
        self._last_message = now
        if self._state is ConnectionState.ABSENT:
            self.away_ns = 0
        if self._state is ConnectionState.LOST:  # the message was on its way when the connection was lost
            self._gap_began = now
        elif self._state is not ConnectionState.CONNECTED:
            self._set_connected(now)

    def lost(self, now: int, since: int = 0) -> None:
        """Note the loss of the connection, or that there has been none yet.

        `since`: the last time at which it existed, if the loss is noticed late.
        """
        self._loss_noticed = now
        self.away_ns = self.away_ns or now
        if self._state is ConnectionState.CONNECTED:
            self._gap_began = since or self._last_message or self._run_began
        if self._state is not ConnectionState.ABSENT:
            self._state = ConnectionState.LOST

    def delivered(self, made: int, stored: int, now: int) -> None:
        """Note the number of blocks made, and of blocks stored, from all boards until now."""
        message, blocks, stored_at = self._backlog
        if self._last_message > message:
            message, blocks, stored_at = self._last_message, -1, 0
        elif blocks < 0:
            blocks = made  # the block that was open when the message came is closed now
        if not stored_at and 0 <= blocks <= stored:
            stored_at = now
        self._backlog = message, blocks, stored_at

    def _all_stored(self, now: int) -> int:
        """Return the time from which no message of a lost board has been on its way."""
        last = max(self._loss_noticed, self._last_message)
        message, _, stored_at = self._backlog
        if message == self._last_message and message:
            last = max(last, stored_at or min(now, message + BACKLOG_NS))
        return last

    def _set_connected(self, now: int) -> None:
        if self._state is ConnectionState.RECONNECTED or now - self._run_began > GRACE_NS:
            self._gap_count += 1
            if len(self._gaps) == MOST_GAPS:
                self._gaps[-1] = self._gaps[-1][0], now
            else:
                self._gaps.append((self._gap_began, now))
        self._state = ConnectionState.CONNECTED

    def findings(self, io_group: int, now: int) -> list[LossVerdict]:
        """Return a line for each gap since start(). `now`: or the time at which end_run was requested."""
        gaps = [("board disconnected", *gap) for gap in self._gaps]
        if self._gap_count > MOST_GAPS:
            gaps[-1] = (f"board disconnected, and {self._gap_count - MOST_GAPS} times more", *self._gaps[-1])
        if self._state is ConnectionState.RECONNECTED:
            gaps.append(("board disconnected, silent since it reconnected", self._gap_began, now))
        elif self._state is ConnectionState.LOST and now - self._all_stored(now) > END_GRACE_NS:
            gaps.append(("board disconnected, did not reconnect", self._gap_began, now))
        elif self._state is ConnectionState.ABSENT:
            gaps.append(("board never connected", self._gap_began, now))
        elif not self._last_message and self._silence and now - self._run_began > self._silence:
            gaps.append(("board connected but silent, without any heartbeat", self._run_began, now))
        return [
            LossVerdict(io_group, SUSPECT, f"{text}: {(last - first) / 1e9:.1f} s", 0, first, last)
            for text, first, last in gaps
        ]


class Watch:
    """The worst verdict on each io_group in a run so far, and warnings about new findings."""

    def __init__(self, interval: float = WARNING_INTERVAL) -> None:
        """`interval`: minimum seconds between two warnings about the same kind of finding in an io_group."""
        self.worst: dict[int, str] = {}
        self._interval = interval
        self._warned: dict[tuple[int, str], tuple[float, set[LossVerdict]]] = {}

    def start(self) -> None:
        self.worst.clear()
        self._warned.clear()

    def update(self, verdicts: Iterable[LossVerdict], now: float) -> list[str]:
        """Take the present verdicts and return the warnings, one line each. `now`: monotonic seconds.

        A warning is a finding of a kind that is new in its io_group, or has changed since the last warning."""
        lines = []
        worst: dict[int, str] = {}
        for line in verdicts:
            worst[line.io_group] = max(worst.get(line.io_group, COMPLETE), line.verdict, key=VERDICTS.index)
            kind = line.io_group, _kind(line)
            at, warned = self._warned.get(kind, (-math.inf, set()))
            if line.verdict == COMPLETE or line in warned or now < at + self._interval:
                continue
            self._warned[kind] = now, warned | {line}
            lines.append(f"io_group {line.io_group} is {line.verdict}: {line.why}")
        self.worst = worst
        return lines


def _kind(line: LossVerdict) -> str:
    """Return the text without its numbers: findings that differ only in them are of one kind."""
    return "".join(letter for letter in line.why if not letter.isdigit())


class ClockReading(NamedTuple):
    """Offset of the board's clock from the host's, in seconds, and its drift in ppm; positive: ahead, faster.

    Uncertainties are half of the interval in which the value lies. `drift` None: not known yet."""

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

    def exceeds(self, limit: float) -> bool:
        """Return whether the offset is certainly larger than `limit` seconds."""
        return abs(self.offset) - self.offset_uncertainty > limit


class BoardClock:
    """Clock of one board; times are monotonic seconds."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, float, float]] = deque(maxlen=_READINGS)  # time, bounds of the offset
        self._first: tuple[float, float, float] | None = None  # the same from the readings of the first minute
        self._late = 0  # number of consecutive readings that show a clock set back

    def take(self, now: float, bounds: tuple[float, float] | None) -> None:
        """Take the clock_bounds() of the board's decoder, once a second."""
        if bounds is None:
            return
        low, high = bounds[0] / 1e9, bounds[1] / 1e9
        known = self._interval() if self._readings else None
        self._late = self._late + 1 if known is not None and high < known[0] - _CLOCK_STEP else 0
        if known is not None and (low > known[1] + _CLOCK_STEP or self._late >= _STEP_READINGS):
            self._readings.clear()
            self._first, self._late = None, 0
        self._readings.append((now, low, high))
        if self._first is None and now - self._readings[0][0] >= _READINGS / 2:
            self._first = (now, *self._interval())

    def reading(self) -> ClockReading | None:
        """Return the present offset and drift; None before the first header."""
        if not self._readings:
            return None
        low, high = self._interval()
        offset, uncertainty = (low + high) / 2, (high - low) / 2
        now = self._readings[-1][0]
        if self._first is None or now - self._first[0] < _DRIFT_SPAN:
            return ClockReading(offset, uncertainty)
        then, first_low, first_high = self._first
        passed = (now - then) / 1e6
        drift = (offset - (first_low + first_high) / 2) / passed
        return ClockReading(offset, uncertainty, drift, (uncertainty + (first_high - first_low) / 2) / passed)

    def _interval(self) -> tuple[float, float]:
        """Return the bounds of the offset from the last minute. An upper bound below a lower one comes from a delayed
        message."""
        low = max(reading[1] for reading in self._readings)
        highs = [reading[2] for reading in self._readings]
        # If all messages were delayed, then by about the distance of the bounds.
        high = min((high for high in highs if high >= low), default=min(2 * low - max(highs), low + 1.0))
        return (low, high) if high < math.inf else (low, low + 1.0)
