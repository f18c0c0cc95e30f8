"""Writes and reads registers of many chips: all boards in parallel, many words a message, with retries.

A chip answers a read word with one word, at the speed of its line. Therefore a board gets the next words when all but
one batch of the previous words are answered, so that neither its queues nor ours can overflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.protocol import hardware
from larpixdaq.schema import Asic, ChipIndex, PacketType, chips_of, registers_of

#: Words of a message to a board, and maximum unanswered words when the next message goes out.
BATCH: Final = 2_048
#: Seconds after the last answer of a board until missing answers are asked for again.
SILENCE: Final = 0.5
#: Maximum number of times that a missing answer is asked for again.
RETRIES: Final = 3
#: Seconds between progress reports.
_REPORT: Final = 0.25

#: Takes the number of chips that are done, and the number of all chips.
Progress = Callable[[int, int], None]


class RegisterAnswers:
    """The chips' answers to reads of the registers in `mask`. Arrays of shape (chips, registers)."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self.mask = mask
        self.values = np.zeros(mask.shape, np.uint8)
        self.counts = np.zeros(mask.shape, np.uint16)  # number of answers of each register
        self.conflicts = np.zeros(mask.shape, bool)  # a later answer had another value than the first
        self.asked_again = 0  # register reads that were repeated
        self.bad_parity = 0  # answers with wrong parity, which are ignored
        self.without_magic = 0  # answers without the magic word of their generation, which are ignored
        self.strange = 0  # answers of other chips or registers
        self.errors: dict[int, str] = {}  # of boards that did not accept words, by io_group

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Registers that were asked for and not answered."""
        return self.mask & ~(self.counts > 0)

    @property
    def silent(self) -> NDArray[np.bool_]:
        """Chips that have not answered at all, shape (chips,)."""
        silent: NDArray[np.bool_] = (self.missing == self.mask).all(axis=1)
        return silent

    def complete(self) -> int:
        """Return the number of chips that have answered all registers."""
        return int(np.count_nonzero(self.mask.any(axis=1) & ~self.missing.any(axis=1)))


@dataclass
class _Queue:
    """The words for one board, and how many of them are sent and answered."""

    chips: NDArray[np.intp]
    addresses: NDArray[np.intp]
    sent: int = 0
    answered: int = 0
    last_answer: float = 0.0
    commands: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.error) or (self.sent == len(self.chips) == self.answered and not self.commands)


def interleave(io_channels: NDArray[Any]) -> NDArray[np.intp]:
    """Return an order in which the io_channels take turns. The order within an io_channel stays."""
    by_channel = np.argsort(io_channels, kind="stable")
    _, counts = np.unique(io_channels, return_counts=True)
    position = np.empty(len(io_channels), np.intp)
    position[by_channel] = np.arange(len(io_channels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.lexsort((io_channels, position))


class RegisterExchange:
    """Writes and reads registers of chips. `chip_keys`, shape (chips, 3), dtype u1: io_group, io_channel, chip_id."""

    def __init__(self, link: ProducerPipe, registers: ChipRegisters, chip_keys: NDArray[np.uint8]) -> None:
        self._link = link
        self._registers = registers
        self._chip_keys = chip_keys
        self._places = ChipIndex()
        self._places.add(chip_keys)

    def write(self, values: NDArray[np.uint8], mask: NDArray[np.bool_], progress: Progress) -> list[str]:
        """Write the registers marked in `mask`; `values` and `mask` have shape (chips, registers).

        Returns the errors of boards. Chips do not answer writes.
        """
        queues = self._queues(mask)
        total = int(mask.any(axis=1).sum())
        report = _Reports(progress, total)

        def done() -> int:
            return total * sum(queue.answered for queue in queues.values()) // max(1, int(mask.sum()))

        while not all(queue.done for queue in queues.values()):
            for io_group, queue in queues.items():
                while not queue.error and queue.sent < len(queue.chips) and len(queue.commands) < 2:
                    part = slice(queue.sent, queue.sent + BATCH)
                    chips, addresses = queue.chips[part], queue.addresses[part]
                    self._send(io_group, queue, chips, addresses, PacketType.CONFIG_WRITE, values[chips, addresses])
                    queue.answered = queue.sent
            self._link.wait(time.monotonic() + SILENCE)
            for queue in queues.values():
                self._remove_ended(queue)
            report(done)
        report(lambda: total, last=True)
        return [queue.error for queue in queues.values() if queue.error]

    def read(self, mask: NDArray[np.bool_], progress: Progress) -> RegisterAnswers:
        """Read the registers marked in `mask`, shape (chips, registers)."""
        answers = RegisterAnswers(mask)
        report = _Reports(progress, int(mask.any(axis=1).sum()))
        # One register of each chip shows which chips are silent: waiting for all their registers would take minutes.
        first = np.zeros(mask.shape, bool)
        first[np.arange(len(mask)), mask.argmax(axis=1)] = True
        self._link.listen(hardware.CONFIG_ANSWERS)
        try:
            self._rounds(first, answers, report)
            self._rounds(~answers.silent[:, None], answers, report)
        finally:
            self._link.listen(hardware.NO_ROWS)
        report(answers.complete, last=True)
        return answers

    def _rounds(self, part: NDArray[np.bool_], answers: RegisterAnswers, report: _Reports) -> None:
        """Read the missing registers in `part`, with RETRIES repetitions."""
        for attempt in range(1 + RETRIES):
            usable = ~np.isin(self._chip_keys[:, 0], list(answers.errors))
            missing = answers.missing & part & usable[:, None]
            if not missing.any():
                break
            if attempt:
                answers.asked_again += int(missing.sum())
            queues = self._queues(missing)
            self._round(queues, answers, report)
            answers.errors |= {io_group: queue.error for io_group, queue in queues.items() if queue.error}

    def _round(self, queues: dict[int, _Queue], answers: RegisterAnswers, report: _Reports) -> None:
        now = time.monotonic()
        for queue in queues.values():
            queue.last_answer = now
        while not all(queue.done for queue in queues.values()):
            for io_group, queue in queues.items():
                while not queue.error and queue.sent < len(queue.chips) and queue.sent - queue.answered <= BATCH:
                    part = slice(queue.sent, queue.sent + BATCH)
                    self._send(io_group, queue, queue.chips[part], queue.addresses[part], PacketType.CONFIG_READ, 0)
            self._link.wait(min(queue.last_answer for queue in queues.values() if not queue.done) + SILENCE)
            now = time.monotonic()
            for queue in queues.values():
                if self._remove_ended(queue):
                    queue.last_answer = now
            for rows in self._link.rows():
                for io_group, n in self._record(rows, answers).items():
                    if io_group in queues:
                        queue = queues[io_group]
                        queue.answered = min(queue.sent, queue.answered + n)
                        queue.last_answer = now
            for queue in queues.values():
                if not queue.commands and now - queue.last_answer >= SILENCE:
                    queue.answered = queue.sent  # the next round asks for missing answers
                    queue.last_answer = now
            report(answers.complete)

    def _queues(self, mask: NDArray[np.bool_]) -> dict[int, _Queue]:
        chips, addresses = np.nonzero(mask)
        groups = self._chip_keys[chips, 0]
        queues = {}
        for io_group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == io_group)
            at = at[interleave(self._chip_keys[chips[at], 1])]
            queues[io_group] = _Queue(chips[at], addresses[at])
        return queues

    def _send(self, io_group: int, queue: _Queue, chips: Any, addresses: Any, kind: PacketType, values: Any) -> None:
        made = self._registers.words(kind, self._chip_keys[chips, 2], addresses, values)
        queue.commands.append(self._link.send_words(io_group, self._chip_keys[chips, 1], made))
        queue.sent += len(chips)

    def _remove_ended(self, queue: _Queue) -> bool:
        """Remove the commands that are done. Returns True if there were any."""
        count = len(queue.commands)
        try:
            queue.commands = [number for number in queue.commands if not self._link.poll(number)]
        except BoardError as error:
            queue.error = str(error)
            queue.commands = []
        return len(queue.commands) != count

    def _record(self, rows: NDArray[Any], answers: RegisterAnswers) -> dict[int, int]:
        """Record answers. Returns by io_group the number of registers with their first answer."""
        good: NDArray[np.bool_] = rows["valid_parity"] == 1
        chips = self._places.find(chips_of(rows))
        addresses, values = registers_of(rows)
        answers.bad_parity += int((~good).sum())
        magic = self._registers.have_magic(rows, Asic(self._link.setup.generation))
        answers.without_magic += int((good & ~magic).sum())
        good &= magic
        valid = good & (chips >= 0) & (addresses < answers.mask.shape[1])
        valid[valid] = answers.mask[chips[valid], addresses[valid]]
        answers.strange += int((good & ~valid).sum())
        chips, addresses, values = chips[valid], addresses[valid], values[valid]
        flat = chips.astype(np.intp) * answers.mask.shape[1] + addresses.astype(np.intp)
        _, first = np.unique(flat, return_index=True)
        new = np.zeros(len(flat), bool)
        new[first] = answers.counts.ravel()[flat[first]] == 0
        answers.values.ravel()[flat[new]] = values[new]
        different = answers.values.ravel()[flat] != values
        answers.conflicts.ravel()[flat[different]] = True
        np.add.at(answers.counts.ravel(), flat, 1)
        groups = np.bincount(self._chip_keys[chips[new], 0], minlength=1)
        return {io_group: n for io_group, n in enumerate(groups.tolist()) if n}


class _Reports:
    """Reports progress, at most every _REPORT seconds."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._next = time.monotonic() + _REPORT

    def __call__(self, done: Callable[[], int], last: bool = False) -> None:
        now = time.monotonic()
        if not last and now < self._next:
            return
        self._next = now + _REPORT
        self._progress(done(), self._total)
