"""Watches the boards of a producer in a run: connection, silence and identity.

Changes become INFO messages in the data. The core gets the same facts in the producer's status, for its alarms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from larpixdaq.sources.source import BoardStatus

#: Seconds between two looks at the boards.
INTERVAL: Final = 0.25
#: Seconds between two INFO messages about the same fact of a board, so that a flapping board does not fill the file.
_TEXT_INTERVAL: Final = 1.0
#: Seconds with packets, and minimum number of packets, before an io_group can be silent.
_SETTLE: Final = 5.0
_PACKETS: Final = 100
#: An io_group is silent after so many seconds, if that is so many times the mean distance of its packets, and so many
#: times its longest pause without alarm (spills, bursts of triggers). The chance that random packets pause for 30 mean
#: distances is 1e-13.
_SILENT: Final = 1.0
_DISTANCES: Final = 30.0
_PAUSES: Final = 3.0
#: Seconds between two looks after which the producer itself has paused, so that a pause says nothing about the board.
_PAUSED: Final = 1.0


class Silence:
    """Finds that an io_group which has sent packets has stopped. Times are time.monotonic()."""

    def __init__(self) -> None:
        self._packets = 0
        self._first = 0  # number of packets when the count began
        self._began = self._grown = self._looked = 0.0
        self._longest = 0.0
        #: Seconds since the last packet, while the io_group is silent.
        self.seconds: float | None = None

    def take(self, packets: int, now: float) -> None:
        """Take the number of packets in the run so far."""
        if not self._looked or now - self._looked > _PAUSED or packets < self._packets:
            self.reset(packets, now)
            return
        passed, self._looked = now - self._looked, now
        if packets > self._packets:
            if self.seconds is None:
                self._longest = max(self._longest, now - self._grown)
            self._packets, self._grown, self.seconds = packets, now, None
            return
        if self.seconds is not None:
            self.seconds += passed
            return
        pause, span, count = now - self._grown, self._grown - self._began, packets - self._first
        if span < _SETTLE or count < _PACKETS:
            return
        usual = self._longest if self._longest > _SILENT else 0.0
        if pause >= max(_SILENT, _DISTANCES * span / count, _PAUSES * usual):
            self.seconds = pause

    def reset(self, packets: int, now: float) -> None:
        """Begin to count anew, because the board was not left alone. Only packets end a silence."""
        if packets != self._packets:
            self.seconds = None
        self._packets = self._first = packets
        self._began = self._grown = self._looked = now
        self._longest = 0.0


class _Fact:
    """A state of a board that has a text for each change."""

    def __init__(self) -> None:
        self.told = ""
        self.due = 0.0


class BoardWatch:
    """The boards of one producer. `record` puts an INFO message into the run."""

    def __init__(self, io_groups: Iterable[int], record: Callable[[str], object]) -> None:
        self._record = record
        self._silences = {io_group: Silence() for io_group in io_groups}
        self._facts: dict[tuple[int, str], _Fact] = {}
        self._away: set[int] = set()
        self._identities: dict[int, str] = {}  # of the boards that were first seen in the run
        self._changed: dict[int, str] = {}

    def start(self) -> None:
        """Begin a run."""
        self._facts.clear()
        self._identities.clear()
        self._changed.clear()
        self._silences = {io_group: Silence() for io_group in self._silences}

    def silent(self, io_group: int) -> float | None:
        """Return the seconds since the last packet of a silent io_group; None while it is not silent."""
        return self._silences[io_group].seconds

    def changed(self, io_group: int) -> str | None:
        """Return how a board differs from the one with which the run began; "": not at all, None: not known."""
        return self._changed.get(io_group)

    def take(self, boards: Iterable[BoardStatus], packets: Mapping[int, int], now: float, *, alone: bool) -> list[int]:
        """Look at the boards in a run, and return the io_groups that have connected again. `now`: time.monotonic().

        `packets`: in this run, by io_group. `alone`: no command or routine works with the chips, and rows have room.
        """
        back = []
        for board in boards:
            group = board.io_group
            if board.away_ns:
                self._away.add(group)
            elif group in self._away:
                self._away.discard(group)
                back.append(group)
            reason = f": {board.problem}" if board.problem else ""
            away = f"board not connected{reason}" if board.away_ns else ""
            self._tell(group, "connection", away, "board connected again", now)
            silence = self._silences[group]
            look = silence.take if alone and not board.away_ns else silence.reset
            look(packets[group], now)
            text = "" if silence.seconds is None else "no packets any more"
            self._tell(group, "silence", text, "packets again", now)
        return back

    def take_identity(self, io_group: int, identity: str, now: float) -> None:
        """Note firmware and register map that a board has reported in a run."""
        first = self._identities.setdefault(io_group, identity)
        text = f"another board: {identity}; the run began with {first}" if identity != first else ""
        self._changed[io_group] = text
        self._tell(io_group, "identity", text, f"the first board again: {identity}", now)

    def _tell(self, io_group: int, fact: str, text: str, ended: str, now: float) -> None:
        """Record the text of a fact that is new, or `ended` when `text` is "" again."""
        known = self._facts.setdefault((io_group, fact), _Fact())
        if text == known.told or (bool(text) == bool(known.told) and fact != "identity") or now < known.due:
            return
        known.told, known.due = text, now + _TEXT_INTERVAL
        self._record(f"io_group {io_group}: {text or ended}")
