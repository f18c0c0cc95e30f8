"""The tables of a file that is being written: rows behind rows, in an order that a reader may rely on at any moment."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import h5py
import numpy as np

from larpixdaq import blocks
from larpixdaq.files import layout
from larpixdaq.files.ledger import Account

NAME_BYTES: Final = layout.TEXTS["name"].itemsize


class Message(NamedTuple):
    """Where an INFO text goes: its first row in /messages, and its time, unix seconds."""

    first: int
    seconds: int


class Held(NamedTuple):
    """A block or an end that is not in the file yet; `start` to `stop` are its rows in /packets."""

    frame: blocks.Block | blocks.End
    account: Account
    start: int
    stop: int
    message: Message | None = None


class Tables:
    def __init__(self, file: h5py.File) -> None:
        self.blocks = 0
        self._file = file
        self._tables = {name: file[name] for name in layout.TABLES}

    def append(self, name: str, rows: Any) -> None:
        """Put rows, which become an array of the table's dtype, behind those that it has."""
        if len(rows):
            table = self._tables[name]
            first = table.shape[0]
            table.resize((first + len(rows),))
            table[first:] = np.asarray(rows, layout.TABLES[name][0])

    def text(self, name: str, text: str) -> None:
        now = time.time_ns()
        label = blocks.text_pieces(name, NAME_BYTES)[0]
        parts = blocks.text_pieces(text, layout.TEXT_BYTES)
        self.append("run/texts", [(label, i, part, now) for i, part in enumerate(parts)])

    def write(self, done: Iterable[Held], missing: list[tuple[int, ...]]) -> None:
        """What ended in a batch whose rows are in the file. What a block or an end refers to is there before it."""
        rows = []
        ends = []
        for held in done:
            frame, account = held.frame, held.account
            self.append("ledger/gaps", account.gaps(frame))
            if isinstance(frame, blocks.End):
                self.append("ledger/counts", account.counts())
                self.append("ledger/outside", account.outside())
                self.append("ledger/unknown", account.unknown())
                self.append("ledger/verdicts", account.verdicts())
                ends.append((account.index, frame.epoch, frame.next, frame.how.encode(), frame.first_ns, frame.last_ns))
                continue
            if held.message is not None:
                self._message(frame.text or "", held.message)
            place = (frame.sequence, held.start, frame.rows, frame.crc32)
            times = (frame.first_ns, frame.last_ns)
            rows.append((account.index, frame.epoch, *place, *times, frame.first_packet, frame.flags))
        self.append("run/missing", missing)
        self._file.flush()
        self.append("run/blocks", rows)
        self.append("run/ends", ends)
        self.blocks += len(rows)
        self._file.flush()

    def _message(self, text: str, message: Message) -> None:
        parts = blocks.text_pieces(text, layout.MESSAGE_BYTES)
        self.append("messages", [(part, message.seconds, message.first + i) for i, part in enumerate(parts)])

    def set_owed(self, account: Account, owed: int) -> None:
        """Bring the ledger of a source up to date at the close: one without an end, or one that still owes rows."""
        if account.end is None:
            self.append("ledger/counts", account.counts(owed))
        elif owed:
            table = self._tables["ledger/counts"]
            there = table[:]
            there[(there["producer"] == account.index) & (there["epoch"] == account.source.epoch)] = account.counts(
                owed
            )
            table[:] = there
