"""Recover a part whose writer died: all acknowledged blocks come into a finished file.

The superblock is repaired, rows after the last block of /run/blocks are cut, blocks that only the journal has are
added, and the file is closed like any other. The journal stays until the file has its final name, and everything is
written in the order of a writer, so that a recovery that is killed can be repeated.

/run/blocks and /run/ends are written last, so they define the content of the part. Rows of other tables that belong to
neither were being written when the writer died.

Data that cannot be read whole are never removed. A damaged journal is kept as NAME.h5.journal.damaged; a part that must
be cut at a damaged place is copied to NAME.h5.part.damaged before it is changed; and the finished file says so in the
text `damaged`.

A recovery reads every row once, which takes minutes for hundreds of millions. The positions of the origins are known
before (run_report.py). So prepare() does only the quick steps, and a storage continues while recover() does the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq._native import hdf5_chunks
from larpixdaq.constants import MIN_FREE, RunCondition
from larpixdaq.errors import FileError, ProtocolError, cause
from larpixdaq.hdf5 import journal, layout, ledger, names, repair, tables, verify, writer
from larpixdaq.hdf5.journal import Contents, Journal, JournalRecord
from larpixdaq.hdf5.ledger import Account
from larpixdaq.hdf5.reader import DataFile, text
from larpixdaq.hdf5.run_report import positions_of_file
from larpixdaq.hdf5.tables import RunInfo, Tables
from larpixdaq.hdf5.verify import block_groups
from larpixdaq.hdf5.writer import RunFile, UnfinishedPart
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import Block, BlockOrigin, End
from larpixdaq.runtime.file_access import DAMAGED, check_regular, damaged_path
from larpixdaq.runtime.record_file import crc32

#: Maximum damaged stretches of a journal that are listed one by one.
_STRETCHES: Final = 20
#: Texts that a close writes, and that recovery writes again after an incomplete close.
_CLOSING_TEXTS: Final = ("reason", "recovered", "damaged")


class RecoveryReport(NamedTuple):
    """Result of a recovery."""

    part: Path
    path: Path | None  # finished file; None when nothing had been acknowledged, so that part and journal were removed
    run: int
    rows: int
    condition: str
    reasons: list[str]
    from_journal: int  # blocks and ends that only the journal had
    cut: int  # rows of no block
    damaged: list[str]  # unreadable data, and where they are kept, in one line each
    was_closed: bool = False  # its writer had closed it, and only the final name was missing

    @property
    def text(self) -> str:
        """Summary in one line."""
        if self.path is None:
            return f"{self.part.name}: nothing had been stored in it, so it was removed"
        if self.was_closed:
            done = f"{self.path.name}: its writer had closed it, {self.rows} rows, {self.condition}"
        else:
            cut = f", {self.cut} rows cut that belong to no block" if self.cut else ""
            done = (
                f"{self.path.name}: recovered, {self.rows} rows, {self.condition} ({self.from_journal} blocks from the"
                f" journal{cut})"
            )
        more = f"; and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"{done}; DAMAGED: {self.damaged[0]}{more}" if self.damaged else done


def recover(part: Path, is_cancelled: Callable[[], bool] = lambda: False) -> RecoveryReport:
    """Finish NAME.h5.part. `part` may also be its journal, and either file may be absent.

    `is_cancelled` is called repeatedly while the rows are read; FileError when it returns True. FileLocked, with
    nothing changed, when another process writes or recovers the part. FileError in one line when the recovery fails:
    then nothing is lost, and at most the superblock has been repaired.
    """
    with _lock_part(Path(part)) as locked:
        return _recover(locked, is_cancelled)


def prepare(part: Path) -> RecoveryReport | None:
    """Make a part readable, so that it and its journal show the positions; None: recover() must do the rest.

    A part without blocks, or with its final name, is recovered here: if it is removed, the next part takes its number.
    Errors as of recover().
    """
    with _lock_part(Path(part)) as locked:
        ready = not locked.final.exists() and _repair(locked.part)
        if ready and (locked.contents.records or positions_of_file(locked.part, locked.name.run)):
            return None
        return _recover(locked, lambda: False)


class _LockedPart(NamedTuple):
    """A part that is locked for its recovery."""

    part: Path
    final: Path
    name: names.FileName
    journal: Journal
    contents: Contents  # of the journal
    no_journal: bool  # it was removed by hand, since a writer makes it before the part

    @property
    def damage(self) -> list[str]:
        """Damaged stretches of the journal, and kept copies of journal and part, in one line each."""
        damaged, kept = self.contents.damaged, self.journal.kept_path
        lines = [f"the journal has no whole block in its bytes {first} to {stop}" for first, stop in damaged]
        if len(lines) > _STRETCHES:
            lines[_STRETCHES:] = [f"and in {len(lines) - _STRETCHES} more places"]
        if kept is not None:
            lines[0] += f" (kept as {kept.name})"
        if (copy := _copy_of(self.part)).exists():
            lines.append(f"the part was not whole (kept as {copy.name})")
        return lines


@contextlib.contextmanager
def _lock_part(part: Path) -> Iterator[_LockedPart]:
    """Lock the journal of a part, and read it. `part` may also be the journal."""
    name = names.parse(part.name)
    if name is None or name.ending == names.FINISHED:
        raise FileError(f"{part}: not the name of a part (….h5.part) or of its journal")
    stem = part.name.removesuffix(name.ending)
    part, journal_path = part.with_name(stem + names.PART), part.with_name(stem + names.JOURNAL)
    if not os.path.lexists(part) and not os.path.lexists(journal_path):
        raise FileError(f"{part}: there is no such file")
    check_regular(part)
    no_journal = not os.path.lexists(journal_path)
    locked_journal = Journal(journal_path, recovery=True)
    try:
        contents = journal.read(journal_path)
        if contents.damaged:
            locked_journal.kept_path = damaged_path(journal_path)
        yield _LockedPart(part, part.with_name(stem + names.FINISHED), name, locked_journal, contents, no_journal)
    finally:
        locked_journal.close()


def _recover(locked: _LockedPart, is_cancelled: Callable[[], bool]) -> RecoveryReport:
    part, final, name = locked.part, locked.final, locked.name
    if final.exists():
        if not part.exists() or part.samefile(final):  # killed after the link, or after the rename
            return _clean_up(locked)
        if final.stat().st_size or not final.is_file():
            raise FileError(f"cannot recover {part}: {final.name} exists")
        final.unlink()  # a writer without hard links takes the name with an empty file; it died before the rename
    if part.exists() and part.stat().st_size and repair.read_superblock(part) is None:
        part.rename(damaged_path(part))  # neither an HDF5 file nor the beginning of one
    state = read_unfinished_part(part, is_cancelled) if _repair(part) else None
    if (
        state is not None
        and not state.sealed
        # Rows of no block are in the journal. Where that is damaged or absent, these rows may be all that is left.
        and (state.lost or (state.cut > 0 and (locked.no_journal or locked.contents.damaged)))
        and not _copy_of(part).exists()
    ):
        _keep_copy(part)
    damage = locked.damage
    if state is not None:
        damage += state.lost + state.damaged
    if not locked.contents.records and not damage and (state is None or not state.accounts):
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        locked.journal.close(remove=True)
        return RecoveryReport(part, None, name.run, 0, "", [], 0, 0, [])
    if state is None:
        _create_part(locked)
        state = read_unfinished_part(part)
        assert state is not None
    if state.info["run"] != name.run:
        raise FileError(f"cannot recover {part}: it holds run {state.info['run']}")
    if state.sealed:
        writer.publish_file(part, final)
        return _report_closed(locked, damage)
    return _finish(locked, state._replace(damaged=damage))


def _copy_of(part: Path) -> Path:
    return part.with_name(part.name + DAMAGED)


def _keep_copy(part: Path) -> None:
    """Copy a part to NAME.h5.part.damaged, completely or not at all."""
    copy = part.with_name(part.name + ".copy")
    try:
        if (free := shutil.disk_usage(part.parent).free) < (size := part.stat().st_size) + MIN_FREE:
            raise FileError(
                f"{part}: is damaged, and left as it is: a copy to be kept takes {size} bytes, {free} are free"
            )
        copy.unlink(missing_ok=True)
        shutil.copyfile(part, copy)
        writer.sync_path(copy)
        copy.rename(_copy_of(part))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{part}: is damaged, and left as it is: it cannot be copied: {error.strerror}") from None


def _clean_up(locked: _LockedPart) -> RecoveryReport:
    """Remove part and journal after the file got its final name. FileError when the journal has other blocks."""
    positions = positions_of_file(locked.final, locked.name.run)
    for record in locked.contents.records:
        if record.frame.following > positions.get(record.frame.origin, 0):
            raise FileError(f"cannot recover {locked.journal.path}: it holds blocks that {locked.final.name} does not")
    with contextlib.suppress(FileNotFoundError):
        locked.part.unlink()
    return _report_closed(locked, locked.damage)


def _report_closed(locked: _LockedPart, damage: list[str]) -> RecoveryReport:
    """Remove the journal, and report a file that its writer had closed."""
    locked.journal.close(remove=True)
    with DataFile(locked.final) as file:
        info, texts = file.run_info(), file.texts()
    damage = list(dict.fromkeys(texts.get("damaged", []) + damage))
    reasons = texts.get("reason", [])
    paths_and_run = locked.part, locked.final, locked.name.run
    return RecoveryReport(*paths_and_run, info["rows"], info["condition"], reasons, 0, 0, damage, was_closed=True)


def _repair(part: Path) -> bool:
    """Repair the superblock. False when there is no file, or its writer died while it made the file: it has no rows."""
    superblock = repair.read_superblock(part) if part.exists() else None
    if superblock is None or superblock.flags == repair.WRITING:
        return False
    repair.repair_superblock(part)
    return True


def _create_part(locked: _LockedPart) -> None:
    """Create a part for the blocks of the journal. The texts of the run are lost with its writer."""
    part, name = locked.part, locked.name
    code = next((record.frame.layout for record in locked.contents.records if isinstance(record.frame, Block)), 2)
    row_layout = schema.layout(code)
    info = RunInfo(name.run, "", "", "", name.started_ns, row_layout, "", name.storage)
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    file = layout.create(part, row_layout, "")
    try:
        with file:
            tables.describe_run(file, Tables(file, file.flush), info, name.part, {}, tables.NO_CONFIGURATIONS)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"cannot write {part}: {cause(error)}") from None


def _finish(locked: _LockedPart, state: UnfinishedPart) -> RecoveryReport:
    part = locked.part
    file = RunFile.resume(part, locked.journal, tables.make_run_info(state.info, state.texts), state)
    try:
        added = _add_records(file, locked.contents.records)
        # Rows that readers could see before their batch was full came again from the journal.
        cut = max(0, state.cut - (file.rows - state.rows))
        summary = f"{int(time.time())}: its writer died; {added} blocks from the journal, {cut} rows of no block cut"
        report = file.close(texts={"recovered": summary})
    except (ProtocolError, ValueError) as error:
        raise FileError(f"cannot recover {part}: {error}") from None
    finally:
        file.abandon()
    closed = report.path, file.info.run, report.rows, report.condition, report.reasons
    return RecoveryReport(part, *closed, added, cut, state.damaged)


def _add_records(file: RunFile, records: Iterable[JournalRecord]) -> int:
    """Add the blocks and ends that the file does not have, and return their number."""
    added = 0
    for record in records:
        frame = record.frame
        if frame.following <= file.next(frame.origin):
            continue
        if isinstance(frame, End):
            file.end(frame)
        else:
            file.add(frame, np.frombuffer(record.rows, file.info.layout.dtype))
        added += 1
    return added


def read_unfinished_part(path: Path, is_cancelled: Callable[[], bool] = lambda: False) -> UnfinishedPart | None:
    """Read a part whose writer did not close it; None when it was not complete enough to take a block.

    FileError when it cannot be read, or when `is_cancelled` returns True while its rows are read.
    """
    with DataFile(path, own=True, unfinished=True) as file:
        info = file.run_info()
        if not info["opened_ns"]:
            if rows := file.rows or file.length("run/blocks"):
                raise FileError(f"{path}: /run/info is empty, but the file has {rows} rows")
            return None
        if file.layout is None or file.layout.code != info["layout"]:
            raise FileError(f"{path}: /run/info says layout {info['layout']}, the columns are {file.dtype}")
        return _PartReader(file, info).read(is_cancelled)


class _PartReader:
    """Reads the blocks of a part in order, checks their rows, and finds the rows of all tables that belong to them."""

    def __init__(self, file: DataFile, info: dict[str, Any]) -> None:
        self._file = file
        self._info = info
        self._start_positions = {origin: row["first"] for origin, row in file.rows_by_origin("run/positions")}
        self._accounts: dict[BlockOrigin, Account] = {}
        self._missing: list[tuple[int, ...]] = []
        self._damaged: list[str] = []
        self._lost: list[str] = []
        self._doubtful: list[Any] = []  # blocks after the last good one, whose rows differ from their CRC-32
        self._row = 0  # row after the last good block
        self._blocks = 0  # up to the last good one
        self._messages = 0  # rows of /messages

    def read(self, is_cancelled: Callable[[], bool]) -> UnfinishedPart:
        for group in block_groups(self._file):
            if is_cancelled():
                raise FileError(f"{self._file.path}: recovery was interrupted; the next start begins it again")
            if not self._read_group(group):
                break
        self._report_cut_blocks()
        lengths = {"run/blocks": self._blocks, "run/ends": self._read_ends(), "messages": self._messages}
        lengths["ledger/counts"] = self._read_counts()
        for name in ("ledger/outside", "ledger/unknown", "ledger/verdicts"):
            lengths[name] = len(self._leading(name, self._ended))
        gaps = self._leading("ledger/gaps", lambda row: int(row["sequence"]) < self._account(row).next)
        for row in gaps:
            self._account(row).drop([(int(row["io_group"]), int(row["rows"]))])
        configs = self._leading("run/configs", lambda row: int(row["sequence"]) < self._account(row).next)
        asic = self._file.attribute("_header", "asic_version")
        lengths["run/configs"] = len(configs)
        lengths["configs"] = int(tables.fitting_configurations(configs, asic).sum())
        jumps = self._leading("run/missing", lambda row: int(row["next"]) < self._account(row).next)
        lengths["ledger/gaps"], lengths["run/missing"] = len(gaps), len(jumps)
        recorded = {tuple(row.tolist()[:4]) for row in jumps}
        texts = [text(row["name"]) in _CLOSING_TEXTS for row in self._file.table("run/texts")]
        lengths["run/texts"] = texts.index(True) if True in texts else len(texts)
        lengths |= {name: self._file.length(name) for name in layout.TABLES if name not in lengths}
        findings = verify.Findings()
        verify.check_seal(self._file, self._info, findings)
        return UnfinishedPart(
            info=self._info,
            texts=self._file.texts(),
            sealed=not findings.lines() and self._info["condition"] != RunCondition.RUNNING,
            start_positions=self._start_positions,
            accounts={
                origin: account for origin, account in self._accounts.items() if account.next > account.first_sequence
            },
            producers=self._file.producers,
            rows=self._row,
            cut=self._file.rows - self._row,
            lengths=lengths,
            missing=[row for row in self._missing if row[:4] not in recorded],
            damaged=self._damaged,
            lost=self._lost,
        )

    def _account(self, row: Any) -> Account:
        origin = self._file.origin(row)
        if origin not in self._accounts:
            self._accounts[origin] = Account(origin, int(row["producer"]), self._start_positions.get(origin, 0))
        return self._accounts[origin]

    # Blocks

    def _read_group(self, group: NDArray[Any]) -> bool:
        """Read some blocks with their rows; False when a line of /run/blocks is impossible, so that reading ends."""
        first = stop = self._row + sum(int(block["rows"]) for block in self._doubtful)
        sensible = []
        for block in group:
            known = int(block["producer"]) < len(self._file.producers)
            if not known or int(block["first_row"]) != stop or int(block["rows"]) > constants.BLOCK_ROWS:
                break
            stop += int(block["rows"])
            sensible.append(block)
        data = self._rows(first, stop)
        for block in sensible:
            if int(block["sequence"]) < self._account(block).expected:
                return False
            start = int(block["first_row"])
            end = start + int(block["rows"])
            rows = self._rows(start, end) if data is None else data[start - first : end - first]
            if rows is None or len(rows) != block["rows"] or crc32(rows.view(np.uint8)) != block["crc32"]:
                self._doubtful.append(block)
            else:
                self._keep_damaged()
                self._add_block(block, rows)
        return len(sensible) == len(group)

    def _rows(self, start: int, stop: int) -> NDArray[Any] | None:
        try:
            return self._file.packets(start, stop)
        except FileError:
            return None

    def _add_block(self, block: Any, rows: NDArray[Any]) -> None:
        account = self._count_block(block)
        hdf5_chunks.tally(rows.view(np.uint8), int(self._info["layout"]), account.tally)
        messages = rows["counter"][schema.types_of(rows) == schema.PacketType.MESSAGE]
        if len(messages):  # files of before 2026-11-29 have one number in all rows of a message
            self._messages = int(messages[-1]) + int(np.count_nonzero(messages == messages[-1]))

    def _keep_damaged(self) -> None:
        """Keep the doubtful blocks where they are, because a good block follows, and report them as damaged."""
        for block in self._doubtful:
            self._count_block(block)
            last = int(block["first_row"]) + int(block["rows"])
            self._damaged.append(f"rows {block['first_row']} to {last} are not what block {block['sequence']} held")
        self._doubtful = []

    def _report_cut_blocks(self) -> None:
        """Report the blocks that are cut at the end. A writer that is killed leaves none."""
        for block in self._doubtful:
            last = int(block["first_row"]) + int(block["rows"])
            self._lost.append(
                f"rows {block['first_row']} to {last}, at the end, are not what block {block['sequence']} held"
            )
        rest = self._file.length("run/blocks") - self._blocks - len(self._doubtful)
        if rest:
            self._lost.append(f"the last {rest} rows of /run/blocks make no sense")

    def _count_block(self, block: Any) -> Account:
        account, rows = self._account(block), int(block["rows"])
        self._missing += account.add_block(int(block["sequence"]), int(block["first_packet"]), rows)
        self._row += rows
        self._blocks += 1
        return account

    # Tables that refer to blocks

    def _read_ends(self) -> int:
        """Add the end records to the accounts, and return their number. An end after blocks that are cut is cut too."""
        rows = self._file.table("run/ends")
        jumps = {row[:4] for row in self._file.table("run/missing").tolist()}
        for number, row in enumerate(rows):
            if int(row["producer"]) >= len(self._file.producers):
                return self._cut_ends(number, len(rows))
            account, following = self._account(row), int(row["next"])
            whole = (
                following == account.expected
                or (account.index, int(row["epoch"]), account.expected, following) in jumps
            )
            if account.end is not None or not whole:
                return self._cut_ends(number, len(rows))
            self._missing += account.skip_to(following)
            account.end = stream.End(
                account.origin.run,
                account.origin.producer,
                account.origin.epoch,
                following,
                text(row["how"]),
                int(row["first_ns"]),
                int(row["last_ns"]),
                counts=[],
                gaps=[],
                unknown=[],
                verdicts=self._verdicts(row),
            )
        return len(rows)

    def _cut_ends(self, kept: int, rows: int) -> int:
        self._lost.append(f"the last {rows - kept} rows of /run/ends do not fit the blocks")
        return kept

    def _verdicts(self, end: Any) -> list[stream.LossVerdict]:
        return [
            stream.LossVerdict(
                int(row["io_group"]),
                text(row["verdict"]),
                text(row["why"]),
                *row[["lost", "first_ns", "last_ns"]].tolist(),
            )
            for row in self._file.table("ledger/verdicts")
            if (row["producer"], row["epoch"]) == (end["producer"], end["epoch"])
        ]

    def _read_counts(self) -> int:
        """Add the totals to the end records, and return the number of their rows in /ledger/counts."""
        rows = self._leading("ledger/counts", lambda row: text(row["how"]) != ledger.OPEN and self._ended(row))
        for row in rows:
            account = self._account(row)
            assert account.end is not None
            account.end.counts.append([int(row["io_group"]), *(int(row[name]) for name in constants.COUNTS)])
        return len(rows)

    def _ended(self, row: Any) -> bool:
        return self._account(row).end is not None

    def _leading(self, name: str, belongs: Callable[[Any], bool]) -> NDArray[Any]:
        """Return the first rows of a table, up to one that belongs to no known block or end."""
        rows = self._file.table(name)
        for number, row in enumerate(rows):
            if int(row["producer"]) >= len(self._file.producers) or not belongs(row):
                return rows[:number]
        return rows
