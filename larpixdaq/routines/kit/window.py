"""One measurement: what chips sent between two answers, which mark its begin and its end, however late they come.

Rows before a chip's answer were sent on its io_channel before that answer, and rows behind it after. So one chip of
each io_channel is asked for registers when a measurement begins, and again when it ends: rows that were on their way
when registers were written are not counted, and rows that come late are. A measurement without both marks on each of
its io_channels says so, and is worth nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines.kit.rows import is_answer, of_chips
from larpixdaq.schema import chips_of

#: Registers that one mark asks for. Any of their answers marks, because answers get lost.
_READS: Final = 3
#: Marks until the same registers are asked for again, so that a late answer is not taken for that of a later mark. v1
#: chips have 63 registers.
_MARKS: Final = 21
#: Seconds within which a chip answers what its board has sent.
_ANSWER: Final = 0.002
#: Of the boards' clocks a second.
TICKS: Final = 10_000_000
#: Seconds between two looks at what has come.
_LOOK: Final = 0.01


class Window:
    """One attempt at a measurement. Iterate over it for the rows (schema.py) that chips sent on the io_channels of
    `chips` meanwhile; after that the attributes are valid. The Controller's io listens already, to everything.

    `unmarked`: (io_group, io_channel) of those without a mark; the rows are worth nothing then. `seconds`: between the
    marks, less the share of the rows that was left out. `left_out`: rows between the marks that nobody could look at.
    """

    def __init__(
        self,
        controller: Any,
        chips: Sequence[str],
        seconds: float,
        patience: float,
        act: Callable[[], None] | None = None,
    ) -> None:
        """`patience`: seconds within which answers have to come. `act` is called after the begin."""
        self.seconds = seconds
        self.left_out = 0
        self.unmarked: list[tuple[int, int]] = []
        self._io = controller.io
        self._patience = patience
        self._act = act
        self._chips: dict[int, list[str]] = {_number(chip) >> 8: [] for chip in chips}
        for chip in dict.fromkeys([*chips, *map(str, controller.chips)]):
            if _number(chip) >> 8 in self._chips:
                self._chips[_number(chip) >> 8].append(chip)
        self._within = np.zeros(1 << 16, np.bool_)  # by io_group << 8 | io_channel
        self._asked: dict[int, set[int]] = {}  # by the same, chips whose answer is a mark
        self._registers: list[int] = []
        self._stamps: dict[int, tuple[int, ...]] = dict.fromkeys(self._chips, ())  # of the last two marks
        self._rows = 0

    def __iter__(self) -> Iterator[NDArray[Any]]:
        marks: dict[int, str] = self._io.marks
        unknown = {line: chips for line, chips in self._chips.items() if marks.get(line) not in chips}
        if unknown:
            for _ in self._mark(unknown, begin=True):
                pass
            self._within[:] = False
            if self._asked:
                return
        mine = {line: [marks[line]] for line in self._chips}
        began = yield from self._mark(mine, begin=True)
        if self._asked:
            return
        rows, left_out = self._rows, self._io.left_out
        if self._act is not None:
            self._act()
        while (left := began[1] + self.seconds - time.monotonic()) > 0:
            time.sleep(min(_LOOK, left))
            yield from self._come()
        ended = yield from self._mark(mine, begin=False)
        rows, self.left_out = self._rows - rows, self._io.left_out - left_out
        self.seconds = elapsed(began, ended, self._stamps) * (rows / (rows + self.left_out) if rows else 1.0)

    def _mark(self, chips: dict[int, list[str]], *, begin: bool) -> Any:
        """Ask these chips, by io_channel, and wait for an answer on each io_channel. Returns the moments (monotonic
        seconds) between which they were asked; `unmarked` and `_asked` are then those without an answer."""
        self._io.marked = (self._io.marked + 1) % _MARKS
        self._registers = list(range(self._io.marked * _READS, (self._io.marked + 1) * _READS))
        self._asked = {line: {_number(chip) for chip in each} for line, each in chips.items()}
        self._begin = begin
        before = time.monotonic()
        self._io.request_registers([chip for each in chips.values() for chip in each], self._registers)
        after = time.monotonic()
        late = False
        while self._asked and not late:
            late = time.monotonic() > after + self._patience  # once more then: this process may have stood still
            time.sleep(_LOOK)
            yield from self._come()
        for line in self._asked:
            self._io.marks.pop(line, None)
        self.unmarked = [(line >> 8, line & 0xFF) for line in self._asked]
        return before, after

    def _come(self) -> Iterator[NDArray[Any]]:
        pieces = self._io.take_rows()
        if pieces:
            rows = np.concatenate(pieces)
            self._rows += len(rows)
            yield self._cut(of_chips(rows))

    def _cut(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Those within the window."""
        chips = chips_of(rows)
        lines = chips >> 8
        keep: NDArray[np.bool_] = self._within[lines]
        for at in np.flatnonzero(is_answer(rows, self._registers)).tolist() if self._asked else ():
            chip, line = int(chips[at]), int(lines[at])
            if chip in self._asked.get(line, ()):
                del self._asked[line]
                self._io.marks[line] = "-".join(map(str, (chip >> 16, chip >> 8 & 0xFF, chip & 0xFF)))
                if "receipt_timestamp" in (rows.dtype.names or ()):
                    self._stamps[line] = *self._stamps[line][-1:], int(rows["receipt_timestamp"][at])
                self._within[line] = self._begin
                keep[at:][lines[at:] == line] = self._begin
                keep[at] = False
        return rows[keep]


def elapsed(began: tuple[float, float], ended: tuple[float, float], stamps: Mapping[int, tuple[int, ...]]) -> float:
    """Seconds between two marks, each made between two moments of this computer's clock.

    How long asking takes, on a computer that is busy, does not count if the boards' clocks say better: `stamps` are
    the receipt timestamps of both answers on each io_channel, in ticks that start anew every second, or after 2^32. A
    board that says what cannot be, or has no clock, is not believed.
    """
    shortest, longest = ended[0] - began[1], ended[1] - began[0]
    middle = (shortest + longest) / 2
    found = []
    for first, last in (pair for pair in stamps.values() if len(pair) == 2):
        ticks = last - first
        seconds = (ticks / TICKS, (ticks + (1 << 32)) / TICKS, ticks / TICKS + round(middle - ticks / TICKS))
        nearest = min(seconds, key=lambda each: abs(each - middle))
        if shortest - _ANSWER <= nearest <= longest + _ANSWER:
            found.append(nearest)
    return statistics.median(found) if found else middle


def _number(chip: str) -> int:
    """As chips_of() has it."""
    io_group, io_channel, chip_id = map(int, chip.split("-"))
    return io_group << 16 | io_channel << 8 | chip_id
