"""Words of a discovery to the boards of many tiles, and the chips' answers, which come as rows of the stream."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError
from larpixdaq.hardware.discovered_tile import Tile
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.schema import PacketType, io_groups_of, registers_of

#: Words of a message to a board, which must answer it in time beside other boards.
_BATCH: Final = 512
#: Times that words are sent again to a board that has not accepted them.
_RESENT: Final = 2
#: Seconds to wait for answers after those of the root chips, which are asked last, have come.
_GRACE: Final = 0.05
#: Seconds without any answer until missing answers of root chips are given up.
_SILENCE: Final = 0.4
#: Exchanges in a row without an answer of any root, after which a tile is given up.
_SILENCES: Final = 3
#: Reason to give up a tile whose chips have lost their power, or whose board was restarted.
NO_ROOTS: Final = "its root chips have stopped to answer"
#: io_group, io_channel, chip_id, address of a register.
Key = tuple[int, int, int, int]


class LinkRegisters:
    """The registers with which chips of one generation open their UARTs, as words (address, value).

    `id`, `up`, `down`: addresses. `mark`: address of a register that is read last, to see when all answers have come.
    """

    def __init__(self, registers: ChipRegisters) -> None:
        names = registers.addresses
        named = [
            next((name for name in pair if name in names), "")
            for pair in (
                ("enable_piso_upstream", "enable_miso_upstream"),
                ("enable_piso_downstream", "enable_miso_downstream"),
                ("enable_posi", "enable_mosi"),
            )
        ]
        if "chip_id" not in names or not all(named):
            raise RequestError(f"discover_network: the network registers of {registers.chips} are not known")
        #: As larpix-control sets them for a link: the others have other values at power-up.
        always: dict[str, Any] = {}
        if registers.version == 2:
            always["enable_miso_differential"] = [1] * 4
        lines = {"i_tx_diff": 0, "tx_slices": 15} | registers.lines
        always |= {
            f"{name}{uart}": value for name, value in lines.items() for uart in range(4) if f"{name}{uart}" in names
        }
        closed = registers.defaults[None, :].copy()
        changed = registers.change(closed, always | {named[0]: [0] * 4, named[1]: [0] * 4}).tolist()
        self.id, self.up, self.down, self.mark = (names[name][0] for name in ("chip_id", *named))
        self._base = {address: int(closed[0, address]) for address in (self.up, self.down)}
        #: Words that a chip gets before its UARTs are opened.
        self.first = [(at, int(closed[0, at])) for at in changed if at != self.down]
        self._bit = []
        for uart in range(4):
            row = closed.copy()
            enabled = [int(uart == other) for other in range(4)]
            registers.change(row, {named[0]: enabled, named[1]: enabled})
            self._bit.append({at: int(row[0, at]) ^ base for at, base in self._base.items()})

    def value(self, address: int, uarts: Iterable[int]) -> int:
        """Return the value of `up` or `down` that opens these UARTs and no others."""
        value = self._base[address]
        for uart in uarts:
            value |= self._bit[uart][address]
        return value


class Answers:
    """Answers of one exchange. `good`: values by key. `bad`: number of wrong answers by (io_group, io_channel, id).

    Wrong are bad parity, another value than the id in the register of the id, and registers that were not read.
    `others`: keys of ids for which a chip of another id has answered.
    """

    def __init__(self) -> None:
        self.good: dict[Key, list[int]] = {}
        self.bad: Counter[tuple[int, ...]] = Counter()
        self.others: dict[Key, None] = {}

    def right(self, key: Key) -> int:
        """Return the number of answers with the id in the register of the id."""
        return self.good.get(key, []).count(key[2])


class DiscoveryExchange:
    """Queues words for the boards, sends them, and collects the answers. `links`: registers of the chips' UARTs."""

    def __init__(self, link: ProducerPipe, registers: ChipRegisters, links: LinkRegisters) -> None:
        self._link, self._registers, self._links = link, registers, links
        #: By io_group: io_channel, packet type, chip_id, address and value of each word to send, one after the other.
        self._queue: dict[int, list[int]] = {}

    def listen(self, what: int) -> None:
        """Select the rows to get, as ProducerPipe.listen() does."""
        self._link.listen(what)

    def write(self, tile: Tile, io_channel: int, chip_id: int, address: int, value: int) -> None:
        """Queue a word that writes a register."""
        word = (io_channel, PacketType.CONFIG_WRITE, chip_id, address, value)
        self._queue.setdefault(tile.io_group, []).extend(word)

    def read(self, tile: Tile, io_channel: int, chip_id: int, address: int, times: int) -> None:
        """Queue words that read a register."""
        word = (io_channel, PacketType.CONFIG_READ, chip_id, address, 0)
        self._queue.setdefault(tile.io_group, []).extend(word * times)

    def exchange(self, asked: list[Tile], tiles: list[Tile], *, marks: bool = True) -> Answers:
        """Send the queued words in their order, and collect the answers.

        With `marks` each root of `asked` is asked at the end, because all answers have come when the roots have
        answered. `tiles` get the errors of their boards.
        """
        marked: set[Key] = set()
        for tile in asked if marks else ():
            for root in tile.roots:
                self.read(tile, root.io_channel, root.chip_id, self._links.mark, 2)
                marked.add((tile.io_group, root.io_channel, root.chip_id, self._links.mark))
            if not tile.roots:
                marked.add((tile.io_group, 0, 0, 0))  # never comes: wait for silence
        queue, self._queue = self._queue, {}
        errors: dict[int, str] = {}
        for _ in range(1 + _RESENT):  # a board may be busy with an order of 2 s
            errors = self._send(queue)
            queue = {io_group: queue[io_group] for io_group in errors}
        for tile in tiles:
            tile.error = tile.error or errors.get(tile.io_group, "")
        marked = {key for key in marked if key[0] not in errors}
        answers = Answers()
        end = time.monotonic() + _SILENCE
        all_marks = False
        while time.monotonic() < end:
            self._link.wait(end)
            arrived = self._take(answers)
            if all_marks:
                continue
            if marks and marked <= answers.good.keys():
                all_marks = True
                end = time.monotonic() + _GRACE
            elif arrived:
                end = time.monotonic() + _SILENCE
        for tile in asked if marks else ():
            keys = {(tile.io_group, root.io_channel, root.chip_id, self._links.mark) for root in tile.roots}
            tile.silences = 0 if not keys or keys & answers.good.keys() else tile.silences + 1
            if tile.silences == _SILENCES:
                tile.error = tile.error or NO_ROOTS
        return answers

    def _send(self, queue: dict[int, list[int]]) -> dict[int, str]:
        """Send words to the boards, in parallel. Returns errors by io_group."""
        numbers = []
        for io_group, content in queue.items():
            columns = np.array(content, np.int64).reshape(-1, 5).T
            made = self._words(*columns[1:])
            for start in range(0, len(made), _BATCH):
                part = slice(start, start + _BATCH)
                number = self._link.send_words(io_group, columns[0, part].astype(np.uint8), made[part])
                numbers.append((io_group, number))
        errors: dict[int, str] = {}
        for io_group, number in numbers:
            try:
                self._link.await_answer(number)
            except BoardError as error:
                errors.setdefault(io_group, str(error))
        return errors

    def _words(self, kinds: Any, chip_ids: Any, addresses: Any, values: Any) -> NDArray[np.uint64]:
        """Return configuration words of both kinds in their order. The arguments have shape (N,)."""
        made = np.zeros(len(kinds), np.uint64)
        for kind in (PacketType.CONFIG_WRITE, PacketType.CONFIG_READ):
            at = np.flatnonzero(kinds == kind)
            made[at] = self._registers.words(kind, chip_ids[at], addresses[at], values[at])
        return made

    def _take(self, answers: Answers) -> bool:
        """Take the rows that have come. Returns whether there were any."""
        arrived = False
        for rows in self._link.rows():
            arrived = True
            addresses, values = registers_of(rows)
            columns = (io_groups_of(rows), rows["io_channel"], rows["chip_id"], addresses, values, rows["valid_parity"])
            for group, channel, chip_id, address, value, valid in zip(
                *(column.tolist() for column in columns), strict=True
            ):
                key = group, channel, chip_id, address
                right = valid and (value == chip_id if address == self._links.id else address == self._links.mark)
                if not right:
                    answers.bad[key[:3]] += 1
                if valid:
                    answers.good.setdefault(key, []).append(value)
                    if not right and address == self._links.id:
                        answers.others[key] = None
        return arrived
