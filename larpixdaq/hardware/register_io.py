"""Registers of many chips written and read: all boards side by side, many words a message, what is missing asked again.

Chips answer a read word with one word, at the speed of their line. So a board gets the next words when all but one
batch of those before are answered; neither its queues nor ours can run over, however many registers are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters, words
from larpixdaq.protocol import hardware
from larpixdaq.schema import ChipIndex, PacketType, chips_of, registers_of

#: Words of one message to a board; so many more may be unanswered when the next goes out.
BATCH: Final = 2_048
#: A chip that has not answered so long after the last news of its board (seconds) is asked again,
SILENCE: Final = 0.5
#: so many times.
RETRIES: Final = 3
#: Seconds between two reports of progress.
_REPORT: Final = 0.25

#: How many of how many chips are done.
Progress = Callable[[int, int], None]


@dataclass
class RegisterAnswers:
    """What chips answered. Arrays of shape (chips, registers)."""

    values: NDArray[np.uint8]
    answers: NDArray[np.uint16]  # how many came for each register
    conflicts: NDArray[np.bool_]  # a later answer said something else than the first
    asked_again: int = 0  # registers that were asked more than once
    bad_parity: int = 0  # answers with wrong parity, which count for nothing
    strange: int = 0  # answers that nobody had asked for
    errors: list[str] = field(default_factory=list)  # boards that did not take what was sent


@dataclass
class _Queue:
    """What one board is still to be asked, and how far that is."""

    chips: NDArray[np.intp]
    addresses: NDArray[np.intp]
    sent: int = 0
    answered: int = 0
    heard: float = 0.0
    commands: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.error) or (self.sent == len(self.chips) == self.answered and not self.commands)


def spread(io_channels: NDArray[Any]) -> NDArray[np.intp]:
    """An order in which the io_channels take turns; within each of them the order stays."""
    by_channel = np.argsort(io_channels, kind="stable")
    _, counts = np.unique(io_channels, return_counts=True)
    place = np.empty(len(io_channels), np.intp)
    place[by_channel] = np.arange(len(io_channels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.lexsort((io_channels, place))


class RegisterExchange:
    """`parts`, shape (chips, 3), dtype u1: io_group, io_channel, chip_id of each chip."""

    def __init__(self, link: ProducerPipe, registers: ChipRegisters, parts: NDArray[np.uint8]) -> None:
        self._link = link
        self._asic = registers.generation
        self._parts = parts
        self._places = ChipIndex()
        self._places.add(parts)

    def write(self, values: NDArray[np.uint8], which: NDArray[np.bool_], progress: Progress) -> list[str]:
        """Write the registers that `which` marks, both (chips, registers); returns what boards failed with.

        A write is not answered by the chip.
        """
        queues = self._queues(which)
        total = int(which.any(axis=1).sum())
        report = _Reports(progress, total)
        while not all(queue.done for queue in queues.values()):
            for io_group, queue in queues.items():
                while not queue.error and queue.sent < len(queue.chips) and len(queue.commands) < 2:
                    part = slice(queue.sent, queue.sent + BATCH)
                    chips, addresses = queue.chips[part], queue.addresses[part]
                    self._send(io_group, queue, chips, addresses, PacketType.CONFIG_WRITE, values[chips, addresses])
                    queue.answered = queue.sent
            self._link.wait(time.monotonic() + SILENCE)
            for queue in queues.values():
                self._settle(queue)
            done = sum(queue.answered for queue in queues.values())
            report(total * done // max(1, int(which.sum())))
        report(total, last=True)
        return [queue.error for queue in queues.values() if queue.error]

    def read(self, which: NDArray[np.bool_], progress: Progress) -> RegisterAnswers:
        """Read the registers that `which` marks, (chips, registers)."""
        shape = which.shape
        found = RegisterAnswers(np.zeros(shape, np.uint8), np.zeros(shape, np.uint16), np.zeros(shape, bool))
        left = which.sum(axis=1)
        report = _Reports(progress, int((left > 0).sum()))
        # Chips that answer nothing are found out by one register each: to wait for all of theirs would take minutes.
        first = np.zeros(shape, bool)
        first[np.arange(shape[0]), which.argmax(axis=1)] = True
        self._link.listen(hardware.CONFIG_ANSWERS)
        try:
            broken = self._rounds(first & which, which, found, report, set())
            heard = np.any(found.answers, axis=1)
            self._rounds(np.logical_and(which, heard[:, None]), which, found, report, broken)
        finally:
            self._link.listen(hardware.NO_ROWS)
        whole = np.all((found.answers > 0) | ~which, axis=1)
        report(int(np.count_nonzero(whole & (left > 0))), last=True)
        return found

    def _rounds(
        self,
        part: NDArray[np.bool_],
        which: NDArray[np.bool_],
        found: RegisterAnswers,
        report: _Reports,
        broken: set[int],
    ) -> set[int]:
        """Ask for a part of what is wanted until it is there, RETRIES times more; the io_groups whose board failed."""
        for attempt in range(1 + RETRIES):
            usable = ~np.isin(self._parts[:, 0], list(broken))
            missing = np.logical_and(part & (found.answers == 0), usable[:, None])
            if not missing.any():
                break
            if attempt:
                found.asked_again += int(missing.sum())
            queues = self._queues(missing)
            self._round(queues, which, found, report)
            for io_group, queue in queues.items():
                if queue.error:
                    broken = broken | {io_group}
                    found.errors.append(queue.error)
        return broken

    def _round(
        self, queues: dict[int, _Queue], which: NDArray[np.bool_], found: RegisterAnswers, report: _Reports
    ) -> None:
        now = time.monotonic()
        for queue in queues.values():
            queue.heard = now
        while not all(queue.done for queue in queues.values()):
            for io_group, queue in queues.items():
                while not queue.error and queue.sent < len(queue.chips) and queue.sent - queue.answered <= BATCH:
                    part = slice(queue.sent, queue.sent + BATCH)
                    self._send(io_group, queue, queue.chips[part], queue.addresses[part], PacketType.CONFIG_READ, 0)
            self._link.wait(min(queue.heard for queue in queues.values() if not queue.done) + SILENCE)
            now = time.monotonic()
            for queue in queues.values():
                if self._settle(queue):
                    queue.heard = now
            for rows in self._link.rows():
                for io_group, n in self._take(rows, which, found).items():
                    if io_group in queues:
                        queue = queues[io_group]
                        queue.answered = min(queue.sent, queue.answered + n)
                        queue.heard = now
            for queue in queues.values():
                if not queue.commands and now - queue.heard >= SILENCE:
                    queue.answered = queue.sent  # what is missing is asked for in the next round
                    queue.heard = now
            report(lambda: int((((found.answers > 0) | ~which).all(axis=1) & which.any(axis=1)).sum()))

    def _queues(self, which: NDArray[np.bool_]) -> dict[int, _Queue]:
        chips, addresses = np.nonzero(which)
        groups = self._parts[chips, 0]
        queues = {}
        for io_group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == io_group)
            at = at[spread(self._parts[chips[at], 1])]
            queues[io_group] = _Queue(chips[at], addresses[at])
        return queues

    def _send(self, io_group: int, queue: _Queue, chips: Any, addresses: Any, kind: PacketType, values: Any) -> None:
        made = words(self._asic, kind, self._parts[chips, 2], addresses, values)
        queue.commands.append(self._link.words(io_group, self._parts[chips, 1], made))
        queue.sent += len(chips)

    def _settle(self, queue: _Queue) -> bool:
        """Take note of commands that are done; True when any was."""
        before = len(queue.commands)
        try:
            queue.commands = [number for number in queue.commands if not self._link.poll(number)]
        except BoardError as error:
            queue.error = str(error)
            queue.commands = []
        return len(queue.commands) != before

    def _take(self, rows: NDArray[Any], which: NDArray[np.bool_], found: RegisterAnswers) -> dict[int, int]:
        """Sort answers in; how many registers of each io_group have their first one now."""
        good: NDArray[np.bool_] = rows["valid_parity"] == 1
        chips = self._places.find(chips_of(rows))
        addresses, values = registers_of(rows)
        found.bad_parity += int((~good).sum())
        known = good & (chips >= 0) & (addresses < which.shape[1])
        known[known] = which[chips[known], addresses[known]]
        found.strange += int((good & ~known).sum())
        chips, addresses, values = chips[known], addresses[known], values[known]
        flat = chips.astype(np.intp) * which.shape[1] + addresses.astype(np.intp)
        _, first = np.unique(flat, return_index=True)
        new = np.zeros(len(flat), bool)
        new[first] = found.answers.ravel()[flat[first]] == 0
        found.values.ravel()[flat[new]] = values[new]
        other = found.values.ravel()[flat] != values
        found.conflicts.ravel()[flat[other]] = True
        np.add.at(found.answers.ravel(), flat, 1)
        groups = np.bincount(self._parts[chips[new], 0], minlength=1)
        return {io_group: n for io_group, n in enumerate(groups.tolist()) if n}


class _Reports:
    """Progress, not more often than people can read."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._next = time.monotonic() + _REPORT

    def __call__(self, done: int | Callable[[], int], last: bool = False) -> None:
        now = time.monotonic()
        if not last and now < self._next:
            return
        self._next = now + _REPORT
        self._progress(done if isinstance(done, int) else done(), self._total)
