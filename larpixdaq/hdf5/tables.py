"""The tables of a file that is being written: rows behind rows, in an order that a reader may rely on at any moment.

The beginning of a file: what is known of its run, and what it says about itself before any row comes.

Configurations of chips as a file has them.
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
from larpixdaq.hdf5 import layout, names
from larpixdaq.hdf5.journal import records
from larpixdaq.hdf5.ledger import Account
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import SENT, Block, BlockOrigin, ConnectedBoard, unpack_configurations

NAME_BYTES: Final = layout.TEXTS["name"].itemsize
#: Registers of a chip, of those generations of which larpix-control has configurations in files.
REGISTERS_OF: Final = {"2": 237, "2b": 256, "lightpix-1": 239}
#: Columns that say which chip a row is of.
CHIP: Final = ["producer", "asic", "io_group", "io_channel", "chip_id"]
_VERSION: Final = "version "
#: Of the software that writes files.
VERSIONS: Final = {"h5py": h5py.version.version, "HDF5": h5py.version.hdf5_version}


class InfoMessage(NamedTuple):
    """Where an INFO text goes: its first row in /messages, and its time, unix seconds."""

    first: int
    seconds: int


class Held(NamedTuple):
    """A block or an end that is not in the file yet; `start` to `stop` are its rows in /packets."""

    frame: stream.Block | stream.End
    account: Account
    start: int
    stop: int
    message: InfoMessage | None = None


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
        self._sources: set[stream.ConnectedBoard] = set()  # those in /run/sources

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

    def sources(self, boards: Iterable[stream.ConnectedBoard]) -> None:
        """What the producers read, where that is news."""
        for one in boards:
            if one not in self._sources and storable(one.producer):
                self._sources.add(one)
                self.add_producer(one.producer)
                kinds = self._dtypes["run/sources"]
                texts = (
                    stream.text_pieces(getattr(one, name), kinds[name].itemsize)[0]
                    for name in ("kind", "address", "host", "firmware")
                )
                self.append("run/sources", [(self.producers[one.producer], one.io_group, *texts)])

    def text(self, name: str, text: str) -> None:
        now = time.time_ns()
        label = stream.text_pieces(name, NAME_BYTES)[0]
        parts = stream.text_pieces(text, schema.TEXT_BYTES)
        self.append("run/texts", [(label, i, part, now) for i, part in enumerate(parts)])

    def write(self, done: Iterable[Held], missing: list[tuple[int, ...]]) -> None:
        """What ended in a batch whose rows are in the file. What a block or an end refers to is there before it, and
        whatever is there at all is, in each table, the first so many rows: recovery cuts what is behind those."""
        self.append("run/missing", missing)
        rows: list[tuple[int, ...]] = []
        for held in done:
            frame, account = held.frame, held.account
            if isinstance(frame, stream.End):
                self._write_blocks(rows)
                rows = []
                self._write_end(frame, account)
                continue
            self.append("ledger/gaps", account.gaps(frame))
            self.message(held)
            if frame.configs is not None:
                self.configs(configuration_rows(frame, account.index))
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

    def _write_end(self, end: stream.End, account: Account) -> None:
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

    def carry(self, known: CarriedConfigurations) -> None:
        """Configurations that earlier parts have, of sources that this one knows of."""
        rows = known.rows.copy()
        rows["producer"] = [self.producers[known.producers[index]] for index in rows["producer"].tolist()]
        self.configs(rows)

    def configs(self, rows: NDArray[Any]) -> None:
        """Configurations of chips, as /run/configs has them; those that fit also as larpix-control has them."""
        self.append("run/configs", rows)
        self.append(
            "configs",
            configurations_as_larpix_control(rows[fitting_configurations(rows, self._asic)], self._dtypes["configs"]),
        )

    def message(self, held: Held) -> None:
        """The text of an INFO message, if the block is one and its text is not there yet."""
        if held.message is None or held.message.first < self._tables["messages"].shape[0]:
            return
        assert isinstance(held.frame, stream.Block)
        parts = stream.text_pieces(held.frame.text or "", schema.MESSAGE_BYTES)
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


class CarriedConfigurations(NamedTuple):
    """What is known of the chips where a part ends: rows of its /run/configs, one a chip, and its /run/producers."""

    rows: NDArray[Any]
    producers: list[str]

    def of(self, sources: Iterable[BlockOrigin]) -> CarriedConfigurations:
        """Those that these sources have told."""
        known = [(source.producer, source.epoch) for source in sources]
        told = [(self.producers[index], epoch) in known for index, epoch in self.rows[["producer", "epoch"]].tolist()]
        return self._replace(rows=self.rows[np.array(told, bool)])


NO_CONFIGURATIONS: Final = CarriedConfigurations(np.zeros(0, layout.CONFIGS), [])


def configuration_rows(block: Block, producer: int) -> NDArray[Any]:
    """The rows of /run/configs that a block with configurations brings; ProtocolError when it has none."""
    assert block.configs is not None
    found = unpack_configurations(block.configs)
    made = np.zeros(len(found.chips), layout.CONFIGS)
    made["producer"], made["epoch"], made["sequence"] = producer, block.epoch, block.sequence
    made["time_ns"], made["asic"] = block.first_ns, found.asic.encode("utf-8", "replace")
    made["io_group"], made["io_channel"], made["chip_id"] = found.chips.T
    made["sent"], made["read"], made["known"] = found.sent, found.read, found.known
    made["different"] = found.different.sum(axis=1)
    return made


def newest_configurations(table: NDArray[Any]) -> NDArray[Any]:
    """Of each chip the last row, in the order in which these came."""
    _, last = np.unique(table[CHIP][::-1], return_index=True)
    return table[np.sort(len(table) - 1 - last)]


def fitting_configurations(table: NDArray[Any], asic: str) -> NDArray[np.bool_]:
    """Which rows of /run/configs have one in /configs: chips of the generation `asic`, the only one that it can have,
    all of whose registers are known. Shape (N,)."""
    known = table["known"][:, : REGISTERS_OF.get(asic, 0)]
    fits: NDArray[np.bool_] = (table["asic"] == asic.encode()) & (asic in REGISTERS_OF) & (known != 0).all(axis=1)
    return fits


def configurations_as_larpix_control(table: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows of /configs for such of /run/configs. What a register was told counts, as in larpix-control's own files, or
    what it said when it was not told."""
    made = np.zeros(len(table), dtype)
    made["timestamp"] = table["time_ns"] // 10**9
    for name in ("io_group", "io_channel", "chip_id"):
        made[name] = table[name]
    registers = np.where(table["known"] & SENT != 0, table["sent"], table["read"])
    made["registers"] = registers[:, : dtype["registers"].shape[0]]
    return made


def configurations_of_part(path: Path) -> CarriedConfigurations:
    """Of a part, closed or not, and its journal; FileError when it cannot be read."""
    with DataFile(path) as file:
        producers, tables = file.producers(), [file.table("run/configs")]
    name = names.parse(path.name)
    assert name is not None
    journal = path.with_name(path.name.removesuffix(name.ending) + names.JOURNAL)
    for record in records(journal) if journal.exists() else ():
        if isinstance(record.frame, Block) and record.frame.configs is not None:
            if record.frame.producer not in producers:
                producers.append(record.frame.producer)
            tables.append(configuration_rows(record.frame, producers.index(record.frame.producer)))
    table = np.concatenate(tables)
    if len(table) and int(table["producer"].max()) >= len(producers):
        raise FileError(f"{path}: /run/configs names producer {table['producer'].max()} of {len(producers)}")
    return CarriedConfigurations(newest_configurations(table), producers)


class RunInfo(NamedTuple):
    """What is known of a run when its file is opened."""

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


def describe_run(
    file: Any,
    tables: Tables,
    info: RunInfo,
    part: int,
    known: Mapping[BlockOrigin, int],
    configurations: CarriedConfigurations = NO_CONFIGURATIONS,
) -> None:
    """Fill in what a new file knows; `known` is where the run's sources stand after the parts before, `configurations`
    what these have said of the chips.

    /run/info comes last, when the rest is written: a file whose row of it is still empty has taken no block.
    """
    places: list[tuple[int, ...]] = []
    for source, place in known.items():
        tables.add_producer(source.producer)
        places.append((tables.producers[source.producer], source.epoch, place, place))
    tables.text("layout", info.layout.name)
    tell_run(tables, info)
    tables.carry(configurations.of(known))
    file.flush()
    tables.set_positions(places)
    row = np.zeros(1, layout.INFO)
    row["run"], row["part"], row["layout"] = info.run, part, info.layout.code
    row["condition"] = RunCondition.RUNNING
    row["started_ns"], row["begun_ns"], row["opened_ns"] = info.started_ns, info.begun_ns, time.time_ns()
    file.flush()
    file["run/info"][:] = row
    file.flush()


def tell_run(tables: Tables, info: RunInfo) -> None:
    """What people want to know of the run, into /run/texts."""
    for name in ("kind", "comment", "operator", "storage", "asic_version"):
        tables.text(name, getattr(info, name))
    for name, version in info.versions.items():
        tables.text(_VERSION + name, version)
    for name in info.required_producers:
        tables.text("required producer", name)
    tables.sources(info.connected)


def info_of(path: Path) -> RunInfo:
    """What a part says of its run; FileError when it cannot be read."""
    with DataFile(path) as file:
        try:
            return told_of_run(file.run_info(), file.texts())._replace(connected=tuple(file.connected()))
        except ValueError as error:
            raise FileError(f"{path}: /run/info: {error}") from None


def told_of_run(row: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> RunInfo:
    """What a part says of its run in its row of /run/info, and in /run/texts."""

    def newest(name: str) -> str:
        return texts.get(name, [""])[-1]

    return RunInfo(
        run=row["run"],
        kind=newest("kind"),
        comment=newest("comment"),
        operator=newest("operator"),
        started_ns=row["started_ns"],
        layout=schema.layout(row["layout"]),
        asic_version=newest("asic_version"),
        storage=newest("storage"),
        versions={name.removeprefix(_VERSION): found[-1] for name, found in texts.items() if name.startswith(_VERSION)},
        required_producers=tuple(dict.fromkeys(texts.get("required producer", []))),
        begun_ns=row["begun_ns"],
    )
