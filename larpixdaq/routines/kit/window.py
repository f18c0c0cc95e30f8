"""A piece of the recorded stream between two answers of chips: what a measurement counts, however late it comes.

Whatever stands before a chip's answer in the stream was sent before it, and what stands behind it after. So a chip of
each board is asked for a register when a measurement begins, and again when it ends: what was on its way when registers
were written is not counted, and what comes late is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Register that is asked for, and seconds within which a chip answers, on a machine that is busy.
_REGISTER: Final = 0
_PATIENCE: Final = 2.0
#: Chips of a board that are tried.
_TRIES: Final = 5
#: Seconds between two looks at what has come.
_LOOK: Final = 0.01
_READ: Final = 3

_BEFORE, _WITHIN, _BEHIND = range(3)


class Window:
    """Iterate over it for rows as they are recorded (schema.py), of boards whose chips these are, for some seconds; how
    many it were is `seconds` then. The Controller's io listens already, to everything."""

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
            self._chips.setdefault(int(chip.partition("-")[0]), []).append(chip)
        self._state = dict.fromkeys(self._chips, _WITHIN)
        self._asked: dict[int, str] = {}

    def __iter__(self) -> Iterator[NDArray[Any]]:
        self._find()
        marks = {group: chip for group, chip in self._io.marks.items() if chip and group in self._chips}
        self._state |= dict.fromkeys(self._chips, _WITHIN) | dict.fromkeys(marks, _BEFORE)
        began = yield from self._mark(marks)
        for group in [group for group, state in self._state.items() if state == _BEFORE]:
            self._state[group] = _WITHIN  # it does not answer any more: another one next time
            del self._io.marks[group], marks[group]
        if self._act is not None:
            self._act()
        while (left := began + self.seconds - time.monotonic()) > 0:
            time.sleep(min(_LOOK, left))
            yield from self._come()
        self.seconds = (yield from self._mark(marks)) - began

    def _find(self) -> None:
        """A chip that answers, of each board that has none yet; "" where there is none among the first."""
        for attempt in range(_TRIES):
            wanted = {
                group: chips[attempt]
                for group, chips in self._chips.items()
                if self._io.marks.get(group) not in ("", *chips) and attempt < len(chips)
            }
            if not wanted:
                break
            self._state |= dict.fromkeys(wanted, _BEFORE)
            for _ in self._mark(wanted):
                pass
            for group, chip in wanted.items():
                if self._state[group] == _WITHIN:
                    self._io.marks[group] = chip
        for group, chips in self._chips.items():
            if self._io.marks.get(group) not in chips:
                self._io.marks[group] = ""

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
            yield self._cut(rows)

    def _cut(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Those within the window."""
        groups, index = rows["io_group"], np.arange(len(rows))
        read = (rows["packet_type"] == _READ) & (rows["direction"] == 1) & (rows["register_address"] == _REGISTER)
        keep = np.zeros(len(rows), np.bool_)
        for group, state in self._state.items():
            mine = groups == group
            at = self._answer(rows, read & mine, group)
            if at is None:
                keep |= mine & (state == _WITHIN)
            elif state == _BEFORE:
                keep |= mine & (index > at)
                self._state[group] = _WITHIN
            else:
                keep |= mine & (index < at) & (state == _WITHIN)
                self._state[group] = _BEHIND
        return rows[keep]

    def _answer(self, rows: NDArray[Any], read: NDArray[np.bool_], group: int) -> int | None:
        """Where the chip that was asked has answered."""
        if group not in self._asked or not read.any():
            return None
        _, io_channel, chip_id = map(int, self._asked[group].split("-"))
        (at,) = np.nonzero(read & (rows["io_channel"] == io_channel) & (rows["chip_id"] == chip_id))
        if not len(at):
            return None
        del self._asked[group]
        return int(at[0])
