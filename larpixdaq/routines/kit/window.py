"""A piece of the recorded stream between two answers of chips: what a measurement counts, however late it comes.

Whatever stands before a chip's answer among what its io_channel sent was sent before it, and what stands behind it
after. So a chip of each io_channel is asked for a register when a measurement begins, and again when it ends: what was
on its way when registers were written is not counted, and what comes late is. Of an io_channel on which none of the
first chips answers all is counted that comes meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines.kit.rows import is_answer, of_chips
from larpixdaq.schema import chips_of

#: Register that is asked for, and seconds within which a chip answers, on a machine that is busy.
_REGISTER: Final = 0
_PATIENCE: Final = 2.0
#: Chips of an io_channel that are tried.
_TRIES: Final = 5
#: Seconds between two looks at what has come.
_LOOK: Final = 0.01

_BEFORE, _WITHIN, _BEHIND = range(3)


class Window:
    """Iterate over it for rows (schema.py) that chips sent on the io_channels of these, for some seconds; how many it
    were is `seconds` then. The Controller's io listens already, to everything."""

    def __init__(
        self, controller: Any, chips: Sequence[str], seconds: float, act: Callable[[], None] | None = None
    ) -> None:
        """`act` is called when the window has begun."""
        self.seconds = seconds
        self._act = act
        self._controller = controller
        self._io = controller.io
        self._chips: dict[int, list[str]] = {}
        for chip in chips:
            self._chips.setdefault(_number(chip) >> 8, []).append(chip)
        self._state = dict.fromkeys(self._chips, _WITHIN)
        self._asked: dict[int, str] = {}

    def __iter__(self) -> Iterator[NDArray[Any]]:
        self._find()
        marks = {line: chip for line, chip in self._io.marks.items() if chip and line in self._chips}
        self._state |= dict.fromkeys(self._chips, _WITHIN) | dict.fromkeys(marks, _BEFORE)
        began = yield from self._mark(marks)
        for line in [line for line, state in self._state.items() if state == _BEFORE]:
            self._state[line] = _WITHIN  # it does not answer any more: another one next time
            del self._io.marks[line], marks[line]
        if self._act is not None:
            self._act()
        while (left := began + self.seconds - time.monotonic()) > 0:
            time.sleep(min(_LOOK, left))
            yield from self._come()
        self.seconds = (yield from self._mark(marks)) - began

    def _find(self) -> None:
        """A chip that answers, of each io_channel that has none yet; "" where there is none among the first."""
        for attempt in range(_TRIES):
            wanted = {
                line: chips[attempt]
                for line, chips in self._chips.items()
                if self._io.marks.get(line) not in ("", *chips) and attempt < len(chips)
            }
            if not wanted:
                break
            self._state |= dict.fromkeys(wanted, _BEFORE)
            for _ in self._mark(wanted):
                pass
            for line, chip in wanted.items():
                if self._state[line] == _WITHIN:
                    self._io.marks[line] = chip
        for line, chips in self._chips.items():
            if self._io.marks.get(line) not in chips:
                self._io.marks[line] = ""

    def _mark(self, chips: dict[int, str]) -> Any:
        """Ask these chips, and wait for their answers; when they were asked (monotonic seconds)."""
        packets: list[Any] = []
        for chip in chips.values():
            packets += self._controller[chip].get_configuration_read_packets([_REGISTER])
        self._controller.send(packets)
        moment = time.monotonic()
        self._asked = dict(chips)
        while self._asked and time.monotonic() < moment + _PATIENCE:
            time.sleep(_LOOK)
            yield from self._come()
        self._asked.clear()
        return moment

    def _come(self) -> Iterator[NDArray[Any]]:
        for rows in self._io.take_rows():
            yield self._cut(of_chips(rows))

    def _cut(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Those within the window."""
        chips, index = chips_of(rows), np.arange(len(rows))
        answers = is_answer(rows, _REGISTER)
        keep = np.zeros(len(rows), np.bool_)
        for line, state in self._state.items():
            mine = chips >> 8 == line
            at = self._answer(chips, answers, line)
            if at is None:
                keep |= mine & (state == _WITHIN)
            elif state == _BEFORE:
                keep |= mine & (index > at)
                self._state[line] = _WITHIN
            else:
                keep |= mine & (index < at) & (state == _WITHIN)
                self._state[line] = _BEHIND
        return rows[keep]

    def _answer(self, chips: NDArray[Any], answers: NDArray[np.bool_], line: int) -> int | None:
        """Where the chip that was asked has answered."""
        if line not in self._asked or not answers.any():
            return None
        (at,) = np.nonzero(answers & (chips == _number(self._asked[line])))
        if not len(at):
            return None
        del self._asked[line]
        return int(at[0])


def _number(chip: str) -> int:
    """As chips_of() has it."""
    io_group, io_channel, chip_id = map(int, chip.split("-"))
    return io_group << 16 | io_channel << 8 | chip_id
