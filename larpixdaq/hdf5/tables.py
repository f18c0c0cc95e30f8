"""Write the tables of a file, and what a file says of its run and its chips when it is opened.

Rows are only appended, in an order that readers and recovery rely on at every moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import journal, layout, names
from larpixdaq.hdf5.ledger import Account
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import SENT, Block, BlockOrigin, ConnectedBoard, unpack_configurations

_NAME_BYTES: Final = layout.TEXTS["name"].itemsize
#: Registers of a chip, for the generations whose configurations larpix-control stores in files.
_REGISTERS: Final = {"2": 237, "2b": 256, "lightpix-1": 239}
#: Columns that identify a chip.
_CHIP_COLUMNS: Final = ["producer", "asic", "io_group", "io_channel", "chip_id"]
_VERSION: Final = "version "
#: Versions of the software that writes files.
VERSIONS: Final = {"h5py": h5py.version.version, "HDF5": h5py.version.hdf5_version}


class InfoMessage(NamedTuple):
    """Place of an INFO text."""

    first: int  # its first row in /messages
    seconds: int  # unix seconds


class WaitingFrame(NamedTuple):
    """A block or an end record that is not in the tables yet; `start` to `stop` are its rows in /packets."""

    frame: stream.Block | stream.End
    account: Account
    start: int
    stop: int
    came: float  # monotonic time
    message: InfoMessage | None = None


class Tables:
    """The tables of an open file, to which rows are appended.

    `flush` makes all rows written so far durable, before any that are written later.
    """

    def __init__(self, file: h5py.File, flush: Callable[[], None]) -> None:
        self.blocks = 0  # rows of /run/blocks
        self._flush = flush
        self._tables = {name: file[name] for name in (*layout.TABLES, "configs") if name in file}
        self._dtypes = {name: dtype for name, (dtype, _) in layout.TABLES.items()} | {"configs": file["configs"].dtype}
        self._h5_types = {name: h5py.h5t.py_create(dtype) for name, dtype in self._dtypes.items()}
        self._asic = file["_header"].attrs["asic_version"]
        self.producers: dict[str, int] = {}  # name -> index in /run/producers
        self._boards: set[stream.ConnectedBoard] = set()  # those in /run/sources

    def resume(self, lengths: Mapping[str, int], producers: Iterable[str]) -> None:
        """Cut each table to its length, and continue behind. `producers`: the names in /run/producers."""
        for name, rows in lengths.items():
            if name in self._tables and self._tables[name].shape[0] > rows:
                self._tables[name].resize((rows,))
        self.blocks = lengths["run/blocks"]
        self.producers = {name: index for index, name in enumerate(producers)}

    def append(self, name: str, rows: Any) -> None:
        """Append rows, which are converted to the table's dtype. A table that an older file lacks gets none."""
        if len(rows) and name in self._tables:
            table, h5_type = self._tables[name].id, self._h5_types[name]
            array = np.asarray(rows, self._dtypes[name])
            (first,) = table.shape
            # HDF5's own calls, because those of h5py took a fifth of the time of a storage at its limit.
            table.set_extent((first + len(array),))
            space = table.get_space()
            space.select_hyperslab((first,), array.shape)
            table.write(h5py.h5s.create_simple(array.shape), space, array, h5_type)

    def add_producer(self, name: str) -> None:
        """Add a producer to /run/producers, unless it is there."""
        if name not in self.producers:
            self.append("run/producers", [(name.encode("utf-8", "replace"),)])
            self.producers[name] = len(self.producers)

    def add_sources(self, boards: Iterable[stream.ConnectedBoard]) -> None:
        """Add boards to /run/sources, unless they are there."""
        for board in boards:
            if board not in self._boards:
                self._boards.add(board)
                self.add_producer(board.producer)
                dtype = self._dtypes["run/sources"]
                texts = (
                    stream.text_pieces(getattr(board, name), dtype[name].itemsize)[0]
                    for name in ("kind", "address", "host", "firmware")
                )
                self.append("run/sources", [(self.producers[board.producer], board.io_group, *texts)])

    def add_text(self, name: str, text: str) -> None:
        """Add a text to /run/texts."""
        now = time.time_ns()
        label = stream.text_pieces(name, _NAME_BYTES)[0]
        parts = stream.text_pieces(text, schema.TEXT_BYTES)
        self.append("run/texts", [(label, i, part, now) for i, part in enumerate(parts)])

    def write(self, frames: Iterable[WaitingFrame], missing: list[tuple[int, ...]]) -> None:
        """Add the blocks and end records of a batch whose rows are in /packets, and rows for /run/missing.

        A block or end comes after all rows that it refers to. So the rows of complete blocks and ends are the first
        ones of every table, and recovery cuts the others.
        """
        self.append("run/missing", missing)
        rows: list[tuple[int, ...]] = []
        for entry in frames:
            frame, account = entry.frame, entry.account
            if isinstance(frame, stream.End):
                self._write_blocks(rows)
                rows = []
                self._write_end(frame, account)
                continue
            if frame.gaps:
                self.append("ledger/gaps", account.gaps(frame))
            self.add_message(entry)
            if frame.configs is not None:
                self.add_configs(configuration_rows(frame, account.index))
            position = (frame.sequence, entry.start, frame.rows, frame.crc32)
            times = (frame.first_ns, frame.last_ns)
            rows.append((account.index, frame.epoch, *position, *times, frame.first_packet, frame.flags))
        self._write_blocks(rows)

    def _write_blocks(self, rows: list[tuple[int, ...]]) -> None:
        self._flush()
        if rows:
            self.append("run/blocks", rows)
            self.blocks += len(rows)
            self._flush()

    def _write_end(self, end: stream.End, account: Account) -> None:
        self.append("ledger/gaps", account.gaps(end))
        self.append("ledger/counts", account.counts())
        self.append("ledger/outside", account.outside(end))
        self.append("ledger/unknown", account.unknown(end))
        self.append("ledger/verdicts", account.verdicts(end))
        self._flush()
        row = (account.index, end.epoch, end.next, end.how.encode(), end.first_ns, end.last_ns)
        self.append("run/ends", [row])
        self._flush()

    def set_positions(self, positions: Mapping[BlockOrigin, tuple[int, int]]) -> None:
        """Write all of /run/positions: (first, next) of each origin.

        The origins of earlier parts come first, in the same order each time, so that a kill meanwhile changes only
        `next` in their rows.
        """
        rows = [(self.producers[origin.producer], origin.epoch, *values) for origin, values in positions.items()]
        table = self._tables["run/positions"]
        table.resize((len(rows),))
        if rows:
            table[:] = np.array(rows, layout.POSITIONS)

    def carry(self, carried: CarriedConfigurations) -> None:
        """Add configurations of earlier parts, whose producers this file has."""
        rows = carried.rows.copy()
        rows["producer"] = [self.producers[carried.producers[index]] for index in rows["producer"].tolist()]
        self.add_configs(rows)

    def add_configs(self, rows: NDArray[Any]) -> None:
        """Add rows to /run/configs, and those that fit also to /configs, in the form of larpix-control."""
        self.append("run/configs", rows)
        fitting = rows[fitting_configurations(rows, self._asic)]
        self.append("configs", _larpix_control_rows(fitting, self._dtypes["configs"]))

    def add_message(self, entry: WaitingFrame) -> None:
        """Add the text of an INFO message to /messages, unless it is there."""
        if entry.message is None or entry.message.first < self._tables["messages"].shape[0]:
            return
        assert isinstance(entry.frame, stream.Block)
        parts = stream.text_pieces(entry.frame.text or "", schema.MESSAGE_BYTES)
        first, seconds = entry.message
        self.append("messages", [(part, seconds, first + i) for i, part in enumerate(parts)])


class RunInfo(NamedTuple):
    """Description of a run, as far as it is known when a file is opened."""

    run: int
    kind: str
    comment: str
    operator: str
    started_ns: int  # unix ns
    layout: schema.RowLayout
    asic_version: str
    storage: str = ""  # the storage's name, empty for the first or only one
    versions: Mapping[str, str] = {}
    required_producers: tuple[str, ...] = ()
    connected: tuple[ConnectedBoard, ...] = ()
    begun_ns: int = 0  # when RUN began, unix ns by the core's clock; 0: not yet
    shifter: str = ""


def describe_run(
    file: Any,
    tables: Tables,
    info: RunInfo,
    part: int,
    start_positions: Mapping[BlockOrigin, int],
    configurations: CarriedConfigurations,
) -> None:
    """Write the description of the run into a new file.

    `start_positions`: positions after the earlier parts; `configurations`: those of the earlier parts.
    /run/info is written last, so that a file whose row of it is still empty has taken no block.
    """
    for origin in start_positions:
        tables.add_producer(origin.producer)
    tables.add_text("layout", info.layout.name)
    write_run_texts(tables, info)
    tables.carry(configurations.select(start_positions))
    file.flush()
    tables.set_positions({origin: (position, position) for origin, position in start_positions.items()})
    row = np.zeros(1, layout.INFO)
    row["run"], row["part"], row["layout"] = info.run, part, info.layout.code
    row["condition"] = RunCondition.RUNNING
    row["started_ns"], row["begun_ns"], row["opened_ns"] = info.started_ns, info.begun_ns, time.time_ns()
    file.flush()
    file["run/info"][:] = row
    file.flush()


def write_run_texts(tables: Tables, info: RunInfo) -> None:
    """Write the texts of a run (comment, operator, versions, …) into /run/texts, and its boards into /run/sources."""
    for name in ("kind", "comment", "operator", "shifter", "storage", "asic_version"):
        tables.add_text(name, getattr(info, name))
    for name, version in info.versions.items():
        tables.add_text(_VERSION + name, version)
    for name in info.required_producers:
        tables.add_text("required producer", name)
    tables.add_sources(info.connected)


def read_run_info(path: Path) -> RunInfo:
    """Read the description of the run from a part; FileError when it cannot be read."""
    with DataFile(path, unfinished=True) as file:
        try:
            return make_run_info(file.run_info(), file.texts())._replace(connected=tuple(file.connected()))
        except ValueError as error:
            raise FileError(f"{path}: /run/info: {error}") from None


def make_run_info(row: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> RunInfo:
    """Make the description of a run from the row of /run/info and from /run/texts; ValueError for an unknown layout."""

    def newest(name: str) -> str:
        return texts.get(name, [""])[-1]

    return RunInfo(
        run=row["run"],
        kind=newest("kind"),
        comment=newest("comment"),
        operator=newest("operator"),
        shifter=newest("shifter"),
        started_ns=row["started_ns"],
        layout=schema.layout(row["layout"]),
        asic_version=newest("asic_version"),
        storage=newest("storage"),
        versions={name.removeprefix(_VERSION): text[-1] for name, text in texts.items() if name.startswith(_VERSION)},
        required_producers=tuple(dict.fromkeys(texts.get("required producer", []))),
        begun_ns=row["begun_ns"],
    )


class CarriedConfigurations(NamedTuple):
    """Configurations of the chips at the end of a part, for the next part."""

    rows: NDArray[Any]  # of /run/configs, one a chip
    producers: list[str]  # as in /run/producers

    def select(self, origins: Iterable[BlockOrigin]) -> CarriedConfigurations:
        """Return the configurations that these origins have sent."""
        senders = {(origin.producer, origin.epoch) for origin in origins}
        kept = [(self.producers[index], epoch) in senders for index, epoch in self.rows[["producer", "epoch"]].tolist()]
        return self._replace(rows=self.rows[np.array(kept, bool)])


NO_CONFIGURATIONS: Final = CarriedConfigurations(np.zeros(0, layout.CONFIGS), [])


def configuration_rows(block: Block, producer: int) -> NDArray[Any]:
    """Make the rows of /run/configs for a block with configurations. ProtocolError when these are damaged."""
    assert block.configs is not None
    configurations = unpack_configurations(block.configs)
    rows = np.zeros(len(configurations.chips), layout.CONFIGS)
    rows["producer"], rows["epoch"], rows["sequence"] = producer, block.epoch, block.sequence
    rows["time_ns"], rows["asic"] = block.first_ns, configurations.asic.encode("utf-8", "replace")
    rows["io_group"], rows["io_channel"], rows["chip_id"] = configurations.chips.T
    rows["sent"], rows["read"], rows["known"] = configurations.sent, configurations.read, configurations.known
    rows["different"] = configurations.different.sum(axis=1)
    return rows


def newest_configurations(table: NDArray[Any]) -> NDArray[Any]:
    """Select the last row of each chip, in the order of the table."""
    _, last = np.unique(table[_CHIP_COLUMNS][::-1], return_index=True)
    return table[np.sort(len(table) - 1 - last)]


def fitting_configurations(table: NDArray[Any], asic: str) -> NDArray[np.bool_]:
    """Determine which rows of /run/configs have a row in /configs too, shape (N,).

    These are chips of the generation `asic`, the only one that /configs can have, with all registers known.
    """
    known = table["known"][:, : _REGISTERS.get(asic, 0)]
    fits: NDArray[np.bool_] = (table["asic"] == asic.encode()) & (asic in _REGISTERS) & (known != 0).all(axis=1)
    return fits


def _larpix_control_rows(table: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Make the rows of /configs for rows of /run/configs.

    A register has the value that was sent, as in larpix-control's own files; if none was sent, the value that was read.
    """
    rows = np.zeros(len(table), dtype)
    rows["timestamp"] = table["time_ns"] // 10**9
    for name in ("io_group", "io_channel", "chip_id"):
        rows[name] = table[name]
    registers = np.where(table["known"] & SENT != 0, table["sent"], table["read"])
    rows["registers"] = registers[:, : dtype["registers"].shape[0]]
    return rows


def configurations_of_part(path: Path) -> CarriedConfigurations:
    """Read the newest configurations from a part, closed or not, and its journal; FileError when it cannot be read."""
    with DataFile(path, unfinished=True) as file:
        producers, tables = list(file.producers), [file.table("run/configs")]
    name = names.parse(path.name)
    assert name is not None
    journal_path = path.with_name(path.name.removesuffix(name.ending) + names.JOURNAL)
    for record in journal.read(journal_path).records if journal_path.exists() else ():
        if isinstance(record.frame, Block) and record.frame.configs is not None:
            if record.frame.producer not in producers:
                producers.append(record.frame.producer)
            tables.append(configuration_rows(record.frame, producers.index(record.frame.producer)))
    table = np.concatenate(tables)
    if len(table) and int(table["producer"].max()) >= len(producers):
        raise FileError(f"{path}: /run/configs names producer {table['producer'].max()} of {len(producers)}")
    return CarriedConfigurations(newest_configurations(table), producers)
