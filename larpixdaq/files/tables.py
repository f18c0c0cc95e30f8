"""The tables of a file that is being written: rows behind rows, in an order that a reader may rely on at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq import blocks
from larpixdaq.files import configs, layout
from larpixdaq.files.configs import Carried
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


def storable(producer: str) -> bool:
    """Whether /run/producers has room for a name."""
    name = producer.encode("utf-8", "replace")
    return 0 < len(name) <= layout.PRODUCERS["name"].itemsize and b"\0" not in name


class Tables:
    def __init__(self, file: h5py.File, flush: Callable[[], None]) -> None:
        """`flush` makes what has been written so far durable, before anything that is written after it."""
        self.blocks = 0
        self._flush = flush
        self._tables = {name: file[name] for name in (*layout.TABLES, "configs") if name in file}
        self._dtypes = {name: dtype for name, (dtype, _) in layout.TABLES.items()} | {"configs": file["configs"].dtype}
        self._kinds = {name: h5py.h5t.py_create(dtype) for name, dtype in self._dtypes.items()}
        self._asic = file["_header"].attrs["asic_version"]
        self.producers: dict[str, int] = {}  # name -> index in /run/producers
        self._sources: set[blocks.ConnectedBoard] = set()  # those in /run/sources

    def resume(self, lengths: Mapping[str, int], producers: Iterable[str]) -> None:
        """Go on with tables that have rows: of each the first so many; `producers` are those of /run/producers."""
        for name, rows in lengths.items():
            if name in self._tables and self._tables[name].shape[0] > rows:
                self._tables[name].resize((rows,))
        self.blocks = lengths["run/blocks"]
        self.producers = {name: index for index, name in enumerate(producers)}

    def append(self, name: str, rows: Any) -> None:
        """Put rows, which become an array of the table's dtype, behind those that it has."""
        if len(rows) and name in self._tables:
            table, kind = self._tables[name].id, self._kinds[name]
            array = np.asarray(rows, self._dtypes[name])
            (first,) = table.shape
            # By HDF5's own calls: what h5py does around them took a fifth of the time of a storage at its limit.
            table.set_extent((first + len(array),))
            place = table.get_space()
            place.select_hyperslab((first,), array.shape)
            table.write(h5py.h5s.create_simple(array.shape), place, array, kind)

    def add_producer(self, name: str) -> None:
        """Give a producer, whose name is storable, its place in /run/producers."""
        if name not in self.producers:
            self.append("run/producers", [(name.encode("utf-8", "replace"),)])
            self.producers[name] = len(self.producers)

    def sources(self, boards: Iterable[blocks.ConnectedBoard]) -> None:
        """What the producers read, where that is news."""
        for one in boards:
            if one not in self._sources and storable(one.producer):
                self._sources.add(one)
                self.add_producer(one.producer)
                kinds = self._dtypes["run/sources"]
                texts = (
                    blocks.text_pieces(getattr(one, name), kinds[name].itemsize)[0]
                    for name in ("kind", "address", "host", "firmware")
                )
                self.append("run/sources", [(self.producers[one.producer], one.io_group, *texts)])

    def text(self, name: str, text: str) -> None:
        now = time.time_ns()
        label = blocks.text_pieces(name, NAME_BYTES)[0]
        parts = blocks.text_pieces(text, layout.TEXT_BYTES)
        self.append("run/texts", [(label, i, part, now) for i, part in enumerate(parts)])

    def write(self, done: Iterable[Held], missing: list[tuple[int, ...]]) -> None:
        """What ended in a batch whose rows are in the file. What a block or an end refers to is there before it, and
        whatever is there at all is, in each table, the first so many rows: recovery cuts what is behind those."""
        self.append("run/missing", missing)
        rows: list[tuple[int, ...]] = []
        for held in done:
            frame, account = held.frame, held.account
            if isinstance(frame, blocks.End):
                self._write_blocks(rows)
                rows = []
                self._write_end(frame, account)
                continue
            self.append("ledger/gaps", account.gaps(frame))
            self.message(held)
            if frame.configs is not None:
                self.configs(configs.rows(frame, account.index))
            place = (frame.sequence, held.start, frame.rows, frame.crc32)
            times = (frame.first_ns, frame.last_ns)
            rows.append((account.index, frame.epoch, *place, *times, frame.first_packet, frame.flags))
        self._write_blocks(rows)

    def _write_blocks(self, rows: list[tuple[int, ...]]) -> None:
        self._flush()
        if rows:
            self.append("run/blocks", rows)
            self.blocks += len(rows)
            self._flush()

    def _write_end(self, end: blocks.End, account: Account) -> None:
        self.append("ledger/gaps", account.gaps(end))
        self.append("ledger/counts", account.counts())
        self.append("ledger/outside", account.outside())
        self.append("ledger/unknown", account.unknown())
        self.append("ledger/verdicts", account.verdicts())
        self._flush()
        row = (account.index, end.epoch, end.next, end.how.encode(), end.first_ns, end.last_ns)
        self.append("run/ends", [row])
        self._flush()

    def set_positions(self, rows: list[tuple[int, ...]]) -> None:
        """The whole of /run/positions. Each source keeps its place: who is killed meanwhile has changed `next` only."""
        table = self._tables["run/positions"]
        table.resize((len(rows),))
        if rows:
            table[:] = np.array(rows, layout.POSITIONS)

    def carry(self, known: Carried) -> None:
        """Configurations that earlier parts have, of sources that this one knows of."""
        rows = known.rows.copy()
        rows["producer"] = [self.producers[known.producers[index]] for index in rows["producer"].tolist()]
        self.configs(rows)

    def configs(self, rows: NDArray[Any]) -> None:
        """Configurations of chips, as /run/configs has them; those that fit also as larpix-control has them."""
        self.append("run/configs", rows)
        self.append(
            "configs", configs.as_larpix_control(rows[configs.fitting(rows, self._asic)], self._dtypes["configs"])
        )

    def message(self, held: Held) -> None:
        """The text of an INFO message, if the block is one and its text is not there yet."""
        if held.message is None or held.message.first < self._tables["messages"].shape[0]:
            return
        assert isinstance(held.frame, blocks.Block)
        parts = blocks.text_pieces(held.frame.text or "", layout.MESSAGE_BYTES)
        first, seconds = held.message
        self.append("messages", [(part, seconds, first + i) for i, part in enumerate(parts)])

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
