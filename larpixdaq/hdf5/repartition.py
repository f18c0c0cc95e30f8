"""Split and merge finished files: the blocks of a run in parts with other borders, as a storage would write them.

Blocks, end records, gaps, verdicts, configurations and texts are read from the parts of a run and given to RunFile, so
that the ledger of each new part follows from its own rows, and `verify` judges the new parts like any others. The text
`made from` in /run/texts names the files, and the rows of them, of which a part was made. Pieces end with a block.

One board can be split off, too. Blocks keep their numbers and have the rows of this board only, and the ledger its
lines only. The text `only io_groups` says so.

Files of other programs have no blocks and no ledger. Their rows are copied with the tables beside them, and the
attribute `made_from` of /_header names the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError, LarpixDaqError
from larpixdaq.hdf5 import layout, ledger, names, tables, writer
from larpixdaq.hdf5.new_file import RowWriter, check_room, new_file
from larpixdaq.hdf5.reader import DataFile, text
from larpixdaq.hdf5.recordings import key_groups
from larpixdaq.hdf5.run_report import SUPERSEDED
from larpixdaq.hdf5.tables import CarriedConfigurations, RunInfo
from larpixdaq.hdf5.verify import block_groups
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import Block, BlockOrigin, Configurations, End
from larpixdaq.runtime.record_file import crc32
from larpixdaq.schema import PacketType, types_of
from larpixdaq.version import VERSION

#: Texts that belong to a part and its borders, or that RunFile writes by itself.
_OF_THE_PART: Final = ("layout", "reason", "next part", "damaged", layout.UNREAD)
#: Errors of tables with impossible content, which nobody has verified.
_IMPOSSIBLE: Final = (LarpixDaqError, ValueError, LookupError, OverflowError)
#: Versions of larpix-control's layout whose rows of messages refer to /messages by their order.
_WITHOUT_COUNTER: Final = ("2.3", "2.4")


class Borders(NamedTuple):
    """Where a new part begins: after this number of rows, or seconds of data; None: nowhere."""

    rows: int | None = None
    seconds: float | None = None


class NewPart(NamedTuple):
    """A new file. `condition`: empty for a file of another program."""

    path: Path
    rows: int
    condition: str
    made_from: list[str]


def group_by_run(paths: Sequence[Path]) -> list[list[Path]]:
    """Group files of larpix-daq by run and storage, in the order of their parts; each other file is its own group."""
    groups: dict[Any, list[tuple[int, Path]]] = {}
    for path in paths:
        with DataFile(path) as file:
            key: Any = path
            part = 0
            if file.own:
                key, part = (file.run, (file.texts().get("storage") or [""])[-1]), int(file.run_info()["part"])
        groups.setdefault(key, []).append((part, path))
    return [[path for _, path in sorted(group, key=lambda each: each[0])] for group in groups.values()]


def is_own(path: Path) -> bool:
    """Whether larpix-daq wrote a file. FileError if it cannot be read."""
    with DataFile(path) as file:
        return bool(file.own)


def repartition(
    paths: Sequence[Path],
    directory: Path,
    borders: Borders,
    tool: str,
    io_group: int | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> list[NewPart]:
    """Write the blocks of consecutive parts of one run into new parts in another directory, all of them or none.

    `tool`: the name of the command, for the texts. `io_group`: only rows of this board, and INFO messages. `report` is
    called with the number of rows of each block that was read.
    FileError if the parts do not belong together, are not finished or damaged, or the new ones cannot be written.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: there is no such directory")
    new: _Repartition | None = None
    with contextlib.ExitStack() as stack:
        try:
            parts = [_OldPart(stack.enter_context(DataFile(path, own=True))) for path in paths]
            _check_parts(parts)
            new = _Repartition(parts, directory, borders, tool, io_group)
            new.write(report)
            return new.publish()
        except BaseException as error:
            if new is not None:
                new.remove()
            if isinstance(error, FileError) or not isinstance(error, _IMPOSSIBLE):
                raise
            raise FileError(f"{paths[0]}: {' '.join(str(error).split())[:300]} (larpixdaq verify)") from None


class _OldPart:
    """A part that is read. `first_ns`, `last_ns`: the times of its first and last block, 0 without blocks."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.path = file.path
        self.info = file.run_info()
        self.texts = file.texts()
        if self.info["condition"] == RunCondition.RUNNING:
            raise FileError(f"{file.path}: is not finished (larpixdaq recover finishes what a dead storage has left)")
        if SUPERSEDED in self.texts:
            raise FileError(f"{file.path}: its storage was replaced by another one, which may have the same blocks")
        if file.layout is None or file.layout.code != self.info["layout"]:
            raise FileError(f"{file.path}: /packets has other columns than /run/info says (larpixdaq verify)")
        self.layout = file.layout
        self.positions = {origin: (row["first"], row["next"]) for origin, row in file.rows_by_origin("run/positions")}
        self.gaps = self._by_frame("ledger/gaps", "sequence")
        self.configs = file.table("run/configs")
        blocks = file.length("run/blocks")
        self.first_ns = int(file.table("run/blocks", 0, 1)["first_ns"][0]) if blocks else 0
        self.last_ns = int(file.table("run/blocks", blocks - 1, blocks)["last_ns"][0]) if blocks else 0
        self._lines = [text(line["message"]) for line in file.table("messages")]

    def _by_frame(self, name: str, column: str) -> dict[tuple[BlockOrigin, int], list[dict[str, Any]]]:
        found: dict[tuple[BlockOrigin, int], list[dict[str, Any]]] = {}
        for origin, row in self.file.rows_by_origin(name):
            found.setdefault((origin, row[column]), []).append(row)
        return found

    def blocks(self) -> Iterator[tuple[Block, NDArray[Any]]]:
        """Read all blocks with their rows. FileError if a block is not whole."""
        file, expected = self.file, 0
        for group in block_groups(file):
            first = int(group[0]["first_row"]) if len(group) else 0
            stop = first + int(group["rows"].astype(np.int64).sum())
            data = file.packets(first, stop) if first == expected and stop <= file.rows else file.packets(0, 0)
            for row in group:
                begin, end = int(row["first_row"]) - first, int(row["first_row"]) - first + int(row["rows"])
                rows = data[begin:end] if begin >= 0 else data[:0]
                if (
                    row["first_row"] != expected
                    or len(rows) != row["rows"]
                    or crc32(rows.view(np.uint8)) != row["crc32"]
                ):
                    raise FileError(
                        f"{self.path}: rows {expected} to {expected + int(row['rows'])} are not those of block "
                        f"{row['sequence']} (larpixdaq verify)"
                    )
                expected += len(rows)
                yield self._block(row, rows), rows
        if expected != file.rows:
            raise FileError(f"{self.path}: the blocks have {expected} rows of {file.rows} (larpixdaq verify)")

    def _block(self, row: Any, rows: NDArray[Any]) -> Block:
        origin, sequence = self.file.origin(row), int(row["sequence"])
        is_text = len(rows) > 0 and int(types_of(rows)[0]) == PacketType.MESSAGE
        first = int(rows["counter"][0]) if is_text else 0
        return Block(
            *origin,
            sequence=sequence,
            first_packet=int(row["first_packet"]),
            rows=len(rows),
            layout=self.layout.code,
            flags=int(row["flags"]),
            first_ns=int(row["first_ns"]),
            last_ns=int(row["last_ns"]),
            crc32=int(row["crc32"]),
            totals=[],
            gaps=self._gaps(origin, sequence),
            text="".join(self._lines[first : first + len(rows)]) if is_text else None,
            configs=self._configs(row, sequence) if is_text else None,
        )

    def _gaps(self, origin: BlockOrigin, sequence: int) -> list[stream.Gap]:
        rows = self.gaps.get((origin, sequence), [])
        return [stream.Gap(row["io_group"], row["rows"], row["first_ns"], row["last_ns"]) for row in rows]

    def _configs(self, block: Any, sequence: int) -> stream.Configs | None:
        table = self.configs
        mine = (table["producer"] == block["producer"]) & (table["epoch"] == block["epoch"])
        rows = table[mine & (table["sequence"] == sequence)]
        if not len(rows):
            return None
        chips = np.stack([rows[name] for name in ("io_group", "io_channel", "chip_id")], axis=1)
        arrays = (np.ascontiguousarray(rows[name]) for name in ("sent", "read", "known"))
        return Configurations(text(rows[0]["asic"]), np.ascontiguousarray(chips, np.uint8), *arrays).pack()

    def carried(self) -> CarriedConfigurations:
        """Return the configurations of earlier parts, which are of no block of this part."""
        firsts = [self.positions.get(self.file.origin(row), (0, 0))[0] for row in self.configs]
        earlier = self.configs[
            np.array([row["sequence"] < first for row, first in zip(self.configs, firsts, strict=True)], bool)
        ]
        return CarriedConfigurations(earlier, list(self.file.producers))

    def ends(self) -> Iterator[End]:
        """Read all end records, with their totals and verdicts."""
        file = self.file
        counts, outside, unknown, verdicts = (
            [(file.origin(row), row) for row in file.table(f"ledger/{name}")]
            for name in ("counts", "outside", "unknown", "verdicts")
        )
        for origin, end in file.rows_by_origin("run/ends"):
            yield End(
                *origin,
                next=end["next"],
                how=end["how"],
                first_ns=end["first_ns"],
                last_ns=end["last_ns"],
                counts=[_counters(row) for key, row in counts if key == origin and text(row["how"]) != ledger.OPEN],
                gaps=self._gaps(origin, end["next"]),
                unknown=[
                    stream.UnknownWord(
                        int(row["io_group"]),
                        int(row["seconds"]),
                        int(row["reason"]),
                        row["raw"][: int(row["size"])].tobytes(),
                    )
                    for key, row in unknown
                    if key == origin
                ],
                outside=[_counters(row) for key, row in outside if key == origin],
                verdicts=[
                    stream.LossVerdict(
                        int(row["io_group"]),
                        text(row["verdict"]),
                        text(row["why"]),
                        *(int(row[name]) for name in ("lost", "first_ns", "last_ns")),
                    )
                    for key, row in verdicts
                    if key == origin
                ],
            )


def _counters(row: Any) -> list[int]:
    return [int(row["io_group"]), *(int(row[name]) for name in constants.COUNTS)]


def _check_parts(parts: Sequence[_OldPart]) -> None:
    """FileError unless these are consecutive parts of one run, written by one storage."""
    first = parts[0]
    for previous, part in pairwise(parts):
        if (
            part.file.run != first.file.run
            or part.texts.get("storage", [""])[-1] != first.texts.get("storage", [""])[-1]
        ):
            raise FileError(f"{part.path}: is of run {part.file.run}, {first.path.name} of run {first.file.run}")
        if part.layout != first.layout or part.texts.get("asic_version") != first.texts.get("asic_version"):
            raise FileError(f"{part.path}: has layout {part.layout.name}, {first.path.name} has {first.layout.name}")
        if part.info["part"] != previous.info["part"] + 1:
            found = f"parts {previous.info['part']} and {part.info['part']}"
            raise FileError(f"{part.path}: {found} of run {part.file.run} follow each other, expected all between, too")
        for origin, (begin, _) in part.positions.items():
            end = previous.positions.get(origin, (0, 0))[1]
            if begin != end:
                where = f"{ledger.describe_origin(origin)}: begins at block {begin}"
                raise FileError(f"{part.path}: {where}, {previous.path.name} ends before block {end}")


class _Stretch(NamedTuple):
    """Rows of an old part that are in one new part; `end_ns`: where the new part ends in it, 0: with the old one."""

    part: _OldPart
    start: int
    stop: int
    end_ns: int


class _Repartition:
    def __init__(
        self, parts: list[_OldPart], directory: Path, borders: Borders, tool: str, io_group: int | None
    ) -> None:
        self._parts = parts
        self._directory = directory
        self._borders = borders
        self._tool = tool
        self._io_group = io_group
        self._number = int(parts[0].info["part"])
        self._info = _run_info(parts, io_group)
        self._file: RunFile | None = None
        self._sealed: list[tuple[RunFile, NewPart]] = []
        self._published: list[Path] = []
        self._positions: Mapping[BlockOrigin, int] = {
            origin: first for origin, (first, _) in parts[0].positions.items() if first
        }
        self._configurations = parts[0].carried()
        self._stretches: list[_Stretch] = []
        self._live_left = {id(part): int(part.info["live_ns"]) for part in parts}
        self._made: dict[BlockOrigin, int] = {}  # rows of the board so far
        self._first_ns = 0  # of the new part

    def write(self, report: Callable[[int], None]) -> None:
        """Write all new parts, without their final names."""
        for part in self._parts:
            self._take_texts(part)
            row = 0
            for block, rows in part.blocks():
                if self._is_full(block, len(rows)):
                    self._end_stretch(part, row, block.first_ns)
                    self._seal(part, last=False)
                    self._begin_stretch(part, row)
                if not self._current.rows:
                    self._first_ns = block.first_ns
                    check_room(self._directory)
                row += len(rows)
                self._current.add(*self._of_board(block, rows))
                report(len(rows))
            for end in part.ends():
                self._current.end(self._end_of_board(end))
            self._end_stretch(part, row, 0)
        self._seal(self._parts[-1], last=True)
        given, made = sum(part.file.rows for part in self._parts), sum(part.rows for _, part in self._sealed)
        if self._io_group is None and given != made:  # the same block twice
            raise FileError(f"{self._parts[0].path}: the blocks have {made} different rows of {given}")

    @property
    def _current(self) -> RunFile:
        """The new part that is being written, which is opened when it is needed."""
        if self._file is None:
            self._file = RunFile(
                self._directory, self._info, self._number, self._positions, configurations=self._configurations
            )
        return self._file

    def _is_full(self, block: Block, rows: int) -> bool:
        file = self._file
        if file is None or not file.rows:
            return False
        if self._borders.rows is not None and file.rows + rows > self._borders.rows:
            return True
        seconds = self._borders.seconds
        return seconds is not None and block.first_ns - self._first_ns >= seconds * 1e9

    def _take_texts(self, part: _OldPart) -> None:
        """Copy the texts of an old part into the new part with its first rows, and begin its stretch there."""
        self._begin_stretch(part, 0)
        known = {"kind", "comment", "operator", "shifter", "storage", "asic_version", "required producer"}
        for name, values in part.texts.items():
            if name not in known and name not in _OF_THE_PART and not name.startswith("version "):
                for value in values:
                    self._current.set_text(name, value)

    def _begin_stretch(self, part: _OldPart, row: int) -> None:
        self._stretches.append(_Stretch(part, row, row, 0))

    def _end_stretch(self, part: _OldPart, row: int, end_ns: int) -> None:
        self._stretches[-1] = self._stretches[-1]._replace(stop=row, end_ns=end_ns)

    def _seal(self, part: _OldPart, *, last: bool) -> None:
        """Write the totals of the new part, which stays locked until all are complete."""
        file, stretches = self._current, self._stretches
        sources = [
            f"{each.part.path.name}: rows {each.start} to {each.stop} of {each.part.file.rows}" for each in stretches
        ]
        for line in sources:
            file.set_text(layout.MADE_FROM, f"{line}, by larpixdaq {self._tool} {VERSION}")
        if self._io_group is not None:
            file.set_text(layout.ONLY_GROUPS, str(self._io_group))
        condition = part.info["condition"]
        continued = not last or condition == RunCondition.CONTINUED
        following = part.texts.get("next part", [""])[-1] if last else self._name(self._number + 1)
        opened, closed = stretches[0], stretches[-1]
        inside = int(opened.start > 0)
        known = {
            "opened_ns": self._first_ns if inside else int(opened.part.info["opened_ns"]),
            "closed_ns": closed.end_ns or int(closed.part.info["closed_ns"]),
            "begun_ns": int(self._info.begun_ns) if self._begun(closed) else 0,
            "ended_ns": 0 if closed.end_ns else int(closed.part.info["ended_ns"]),
            "live_ns": sum(self._live_ns(each) for each in stretches),
            "duplicate_blocks": sum(int(each.part.info["duplicate_blocks"]) for each in stretches if not each.end_ns),
        }
        next_positions, configurations = file.positions(), file.configurations()
        report = file.seal(
            aborted=last and condition == RunCondition.ABORTED,
            continued=continued,
            texts={"next part": following} if continued and following else {},
            damaged=[
                f"{each.part.path.name}: {line}" for each in stretches for line in each.part.texts.get("damaged", [])
            ],
            known=known,
        )
        self._sealed.append((file, NewPart(file.final, report.rows, report.condition, sources)))
        self._file, self._stretches = None, []
        self._positions, self._configurations = next_positions, configurations
        self._number += 1

    def _name(self, number: int) -> str:
        return names.stem(self._info.run, self._info.started_ns, number, self._info.storage) + names.FINISHED

    def _begun(self, stretch: _Stretch) -> bool:
        begun = int(self._info.begun_ns)
        return bool(begun) and (not stretch.end_ns or begun < stretch.end_ns)

    def _live_ns(self, stretch: _Stretch) -> int:
        """Return the live time of a stretch. Those of all stretches of an old part add up to the live time of that."""
        left, info = self._live_left[id(stretch.part)], stretch.part.info
        if stretch.end_ns and left:
            first = self._first_ns if stretch.start else min(stretch.part.first_ns, int(info["opened_ns"]))
            gaps = stretch.part.file.table("ledger/gaps")
            left = min(left, writer.live_between(max(first, int(info["begun_ns"])), stretch.end_ns, gaps))
        self._live_left[id(stretch.part)] -= left
        return left

    # One board

    def _of_board(self, block: Block, rows: NDArray[Any]) -> tuple[Block, NDArray[Any]]:
        """Return a block with the rows of the wanted board only."""
        if self._io_group is None:
            return block, rows
        if block.text is None:
            rows = rows[boards_of(rows) == self._io_group]
        first = self._made.get(block.origin, 0)
        self._made[block.origin] = first + len(rows)
        gaps = [gap for gap in block.gaps if gap.io_group in (0, self._io_group)]
        changed = msgspec.structs.replace(
            block, rows=len(rows), first_packet=first, crc32=crc32(rows.view(np.uint8)), gaps=gaps
        )
        return changed, rows

    def _end_of_board(self, end: End) -> End:
        if self._io_group is None:
            return end
        kept = 0, self._io_group
        return msgspec.structs.replace(
            end,
            counts=[line for line in end.counts if line[0] in kept],
            outside=[line for line in end.outside if line[0] in kept],
            gaps=[gap for gap in end.gaps if gap.io_group in kept],
            unknown=[word for word in end.unknown if word.io_group in kept],
            verdicts=[verdict for verdict in end.verdicts if verdict.io_group in kept],
        )

    # All parts together

    def publish(self) -> list[NewPart]:
        """Give all new parts their names."""
        for file, part in self._sealed:
            file.publish()
            self._published.append(part.path)
        return [part for _, part in self._sealed]

    def remove(self) -> None:
        """Remove all new parts, because one of them failed."""
        files = [file for file, _ in self._sealed if file.final not in self._published]
        for file in [*files, *([self._file] if self._file is not None else [])]:
            file.abandon()
            stem = file.final.name.removesuffix(names.FINISHED)
            for ending in (names.PART, names.JOURNAL):
                file.final.with_name(stem + ending).unlink(missing_ok=True)
        for path in self._published:
            path.unlink(missing_ok=True)


def _run_info(parts: Sequence[_OldPart], io_group: int | None) -> RunInfo:
    """Return the description of the run, by the newest texts."""
    last = parts[-1]
    try:
        info = tables.make_run_info(last.info, last.texts)
    except ValueError as error:
        raise FileError(f"{last.path}: /run/info: {error}") from None
    connected = {(board.producer, board.io_group): board for part in parts for board in part.file.connected()}
    boards = tuple(board for board in connected.values() if io_group in (None, board.io_group))
    required = dict.fromkeys(name for part in parts for name in part.texts.get("required producer", []))
    return info._replace(connected=boards, required_producers=tuple(required), layout=last.layout)


# Files of other programs


def copy_rows(
    paths: Sequence[Path],
    target: Path,
    tool: str,
    start: int = 0,
    stop: int | None = None,
    io_group: int | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> NewPart:
    """Write the rows of files of another program into a new file, with their tables: rows `start` to `stop` of one
    file, or all rows of several files with the same columns. `io_group`: only rows of this board, and messages.
    `report` is called with each number of rows that were read.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(DataFile(path)) for path in paths]
        first = files[0]
        for file in files:
            if file.own:
                raise FileError(f"{file.path}: larpix-daq wrote it, and not {first.path.name}")
            if (file.version, file.dtype) != (first.version, first.dtype):
                raise FileError(f"{file.path}: has other columns than {first.path.name}, or another version")
        sources = []
        with new_file(target) as part, h5py.File(part, "w", libver=layout.LIBVER, locking=False) as new:
            _copy_tables(files, new)
            rows, messages = RowWriter(new, "packets", first.dtype), _Messages(first.version)
            for file in files:
                begin, end = (
                    (start, file.rows if stop is None else min(stop, file.rows)) if len(files) == 1 else (0, file.rows)
                )
                messages.begin(file, begin)
                for at in range(begin - begin % _PIECE, end, _PIECE):
                    piece = file.packets(max(begin, at), min(at + _PIECE, end))
                    report(len(piece))
                    if io_group is not None:
                        piece = piece[_board_rows(piece, io_group)]
                    rows.add(messages.take(piece))
                sources.append(f"{file.path.name}: rows {begin} to {end} of {file.rows}")
            packets = rows.finish()
            first.copy_attributes("packets", packets)
            messages.write(new)
            new.require_group("_header").attrs["made_from"] = [
                f"{line}, by larpixdaq {tool} {VERSION}" for line in sources
            ]
        return NewPart(target, rows.rows, "", sources)


_PIECE: Final = 4 * schema.CHUNK_ROWS


def boards_of(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the io_group of each row, shape (N,). FileError if the rows have none."""
    present = rows.dtype.names or ()
    if "io_group" not in present and "chip_key" not in present:
        raise FileError("/packets has no column io_group, by which rows are selected")
    return np.asarray(rows["io_group"] if "io_group" in present else key_groups(rows["chip_key"], 0))


def _board_rows(rows: NDArray[Any], io_group: int) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = (boards_of(rows) == io_group) | (types_of(rows) == PacketType.MESSAGE)
    return mask


def _copy_tables(files: Sequence[DataFile], new: h5py.File) -> None:
    """Copy the groups with attributes, and the configurations of all files."""
    first = files[0]
    for name in ("_header", "meta"):
        first.copy_attributes(name, new.create_group(name), missing=True)
    tables_ = [table for file in files if (table := file.foreign_table("configs")) is not None]
    if not tables_:
        return
    if any(table.dtype != tables_[0].dtype for table in tables_):
        raise FileError(f"{files[-1].path}: /configs has other columns than {first.path.name}")
    configs = new.create_dataset("configs", data=np.concatenate(tables_), maxshape=(None,), chunks=(64,))
    first.copy_attributes("configs", configs)


class _Messages:
    """The texts of the messages of several files, and the rows that refer to them."""

    def __init__(self, version: str) -> None:
        self._in_order = version in _WITHOUT_COUNTER
        self._tables: list[NDArray[Any]] = []
        self._before = 0  # texts of earlier files
        self._left = 0  # texts of this file that no row has used, if rows use them in order

    def begin(self, file: DataFile, left_out: int) -> None:
        """Begin a file, of which the first `left_out` rows are not taken."""
        self._end()
        table = file.foreign_table("messages")
        if table is None:
            return
        if self._in_order:
            skipped = (file.packets(at, min(at + _PIECE, left_out)) for at in range(0, left_out, _PIECE))
            table = table[sum(map(_messages_in, skipped)) :]
        self._tables.append(table)
        self._left = len(table)

    def take(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return rows whose counters refer to the joined table."""
        self._left = max(0, self._left - _messages_in(rows))
        if self._before and not self._in_order and "counter" in (rows.dtype.names or ()):
            rows = rows.copy()
            rows["counter"][types_of(rows) == PacketType.MESSAGE] += np.array(self._before, rows.dtype["counter"])
        return rows

    def _end(self) -> None:
        if self._tables:
            if self._in_order and self._left:
                self._tables[-1] = self._tables[-1][: -self._left]
            self._before = sum(map(len, self._tables))
            self._left = 0

    def write(self, new: h5py.File) -> None:
        self._end()
        if self._tables:
            table = np.concatenate(self._tables)
            if "index" in (table.dtype.names or ()):
                table["index"] = np.arange(len(table))
            new.create_dataset("messages", data=table, maxshape=(None,), chunks=(64,))


def _messages_in(rows: NDArray[Any]) -> int:
    return int(np.count_nonzero(types_of(rows) == PacketType.MESSAGE))
