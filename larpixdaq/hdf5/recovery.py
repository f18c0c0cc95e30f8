"""Recovery of a part whose writer died: everything that was acknowledged, in a finished file.

The superblock is put right, rows beyond the last block of /run/blocks are cut, what only the journal holds is added,
and the file is closed like any other. Until it has its final name the journal stays, and what is written is written in
the order in which writers write: whoever is killed in a recovery leaves what a killed writer leaves, and it can be
repeated.

What cannot be read whole is never removed: a damaged journal keeps its bytes under the name NAME.h5.journal.damaged, a
part that has to be cut at a damaged place is copied to NAME.h5.part.damaged before anything is changed, and the
finished file says so in the text `damaged`.

It reads every row once, which takes a while when there are hundreds of millions. Where the sources will stand then is
known before (run_report.py): prepare() does what is quick, so that a storage goes on at once and recovers meanwhile.

What a part holds that its writer did not close: read in the order in which it was written, up to where it ends.

/run/blocks and /run/ends say what is there, since they are written last. Rows that other tables have beyond what these
two speak of were being written when the writer died.
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
from larpixdaq.runtime.file_access import DAMAGED, aside, check_regular
from larpixdaq.runtime.record_file import crc32

#: Maximum stretches of a damaged journal that are named one by one.
_STRETCHES: Final = 20
#: Texts that a close writes, and that are written anew when it did not come to its end.
CLOSING: Final = ("reason", "recovered", "damaged")


class Recovered(NamedTuple):
    """`path` is the finished file, None when nothing had been acknowledged: part and journal are gone then."""

    part: Path
    path: Path | None
    run: int
    rows: int
    condition: str
    reasons: list[str]
    from_journal: int  # blocks and ends that only the journal had
    cut: int  # rows of no block
    damaged: list[str]  # what could not be read whole, and where it is kept, in one line each
    closed_before: bool = False  # it only lacked its final name

    @property
    def text(self) -> str:
        """What was done, in one line."""
        if self.path is None:
            return f"{self.part.name}: nothing had been stored in it, so it was removed"
        if self.closed_before:
            done = f"{self.path.name}: its writer had closed it, {self.rows} rows, {self.condition}"
        else:
            cut = f", {self.cut} rows cut that belong to no block" if self.cut else ""
            done = (
                f"{self.path.name}: recovered, {self.rows} rows, {self.condition} ({self.from_journal} blocks from the"
                f" journal{cut})"
            )
        more = f"; and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"{done}; DAMAGED: {self.damaged[0]}{more}" if self.damaged else done


def recover(part: Path, give_up: Callable[[], bool] = lambda: False) -> Recovered:
    """Finish NAME.h5.part; `part` may also be its journal, and either may be missing. `give_up` is asked now and then
    while the rows are read: FileError when it says so.

    FileLocked, with nothing touched, when another process writes or recovers it. FileError in one line when it cannot
    be done; all that was there is there then, at most the superblock has been put right.
    """
    with _taken(Path(part)) as taken:
        return _recover(taken, give_up)


def prepare(part: Path) -> Recovered | None:
    """Make it readable, so that it says with its journal where the sources stand; None: recover() has the rest to do.

    A part for which little is to be done is recovered here: the next part's number must not leave a gap where one was
    in which nothing had been stored. Errors as of recover().
    """
    with _taken(Path(part)) as taken:
        ready = not taken.final.exists() and _repair(taken.part)
        if ready and (taken.contents.records or positions_of_file(taken.part, taken.name.run)):
            return None
        return _recover(taken, lambda: False)


class _Taken(NamedTuple):
    """A part that is locked for its recovery."""

    part: Path
    final: Path
    name: names.FileName
    journal: Journal
    contents: Contents  # of the journal
    no_journal: bool  # somebody has removed it: a writer makes it before the part

    @property
    def damage(self) -> list[str]:
        """Where the journal is damaged, and what earlier attempts have kept aside, in one line each."""
        damaged, kept = self.contents.damaged, self.journal.aside
        lines = [f"the journal has no whole block in its bytes {first} to {stop}" for first, stop in damaged]
        if len(lines) > _STRETCHES:
            lines[_STRETCHES:] = [f"and in {len(lines) - _STRETCHES} more places"]
        if kept is not None:
            lines[0] += f" (kept as {kept.name})"
        if (copy := _copy_of(self.part)).exists():
            lines.append(f"the part was not whole (kept as {copy.name})")
        return lines


@contextlib.contextmanager
def _taken(part: Path) -> Iterator[_Taken]:
    """The part, its final name, and its journal, which is locked meanwhile."""
    name = names.parse(part.name)
    if name is None or name.ending == names.FINISHED:
        raise FileError(f"{part}: not the name of a part (….h5.part) or of its journal")
    stem = part.name.removesuffix(name.ending)
    part, beside = part.with_name(stem + names.PART), part.with_name(stem + names.JOURNAL)
    if not os.path.lexists(part) and not os.path.lexists(beside):
        raise FileError(f"{part}: there is no such file")
    check_regular(part)
    no_journal = not os.path.lexists(beside)
    locked = Journal(beside, recovery=True)
    try:
        contents = journal.read(beside)
        if contents.damaged:
            locked.aside = aside(beside)
        yield _Taken(part, part.with_name(stem + names.FINISHED), name, locked, contents, no_journal)
    finally:
        locked.close()


def _recover(taken: _Taken, give_up: Callable[[], bool]) -> Recovered:
    part, final, name = taken.part, taken.final, taken.name
    if final.exists():
        if not part.exists() or part.samefile(final):  # killed behind the link, or behind the rename
            return _clean_up(taken)
        if final.stat().st_size or not final.is_file():
            raise FileError(f"cannot recover {part}: {final.name} exists")
        final.unlink()  # where there are no hard links, the name was taken, and the rename did not come
    if part.exists() and part.stat().st_size and repair.read_superblock(part) is None:
        part.rename(aside(part))  # no HDF5 file, and none that its writer had only begun
    state = read_unfinished_part(part, give_up) if _repair(part) else None
    damage = taken.damage
    if state is not None:
        damage += state.lost + state.damaged
    # Rows of no block are the journal's. Where it cannot say what they are, they may be all that is left.
    unknown = (
        state is not None and not state.sealed and state.cut > 0 and (taken.no_journal or bool(taken.contents.damaged))
    )
    if state is not None and (state.lost or unknown) and not state.sealed and not _copy_of(part).exists():
        _keep_copy(part)
        damage = taken.damage + state.lost + state.damaged
    if not taken.contents.records and not damage and (state is None or not state.accounts):
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        taken.journal.close(remove=True)
        return Recovered(part, None, name.run, 0, "", [], 0, 0, [])
    if state is None:
        _begin(taken)
        state = read_unfinished_part(part)
        assert state is not None
    if state.info["run"] != name.run:
        raise FileError(f"cannot recover {part}: it holds run {state.info['run']}")
    if state.sealed:
        writer.publish_file(part, final)
        return _closed(taken, damage)
    return _finish(taken, state._replace(damaged=damage))


def _copy_of(part: Path) -> Path:
    return part.with_name(part.name + DAMAGED)


def _keep_copy(part: Path) -> None:
    """Copy a part, whole or not at all, to the name that says that it is damaged."""
    unfinished = part.with_name(part.name + ".copy")
    try:
        if (free := shutil.disk_usage(part.parent).free) < (size := part.stat().st_size) + MIN_FREE:
            raise FileError(
                f"{part}: is damaged, and left as it is: a copy to be kept takes {size} bytes, {free} are free"
            )
        unfinished.unlink(missing_ok=True)
        shutil.copyfile(part, unfinished)
        writer.sync_path(unfinished)
        unfinished.rename(_copy_of(part))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{part}: is damaged, and left as it is: it cannot be copied: {error.strerror}") from None


def _clean_up(taken: _Taken) -> Recovered:
    """The file has its final name: the part's name and the journal go, if the file has all that is in there."""
    there = positions_of_file(taken.final, taken.name.run)
    for record in taken.contents.records:
        if record.frame.following > there.get(record.frame.source, 0):
            raise FileError(f"cannot recover {taken.journal.path}: it holds blocks that {taken.final.name} does not")
    with contextlib.suppress(FileNotFoundError):
        taken.part.unlink()
    return _closed(taken, taken.damage)


def _closed(taken: _Taken, damage: list[str]) -> Recovered:
    taken.journal.close(remove=True)
    with DataFile(taken.final) as file:
        info, texts = file.run_info(), file.texts()
    damage = list(dict.fromkeys(texts.get("damaged", []) + damage))
    reasons = texts.get("reason", [])
    where = taken.part, taken.final, taken.name.run
    return Recovered(*where, info["rows"], info["condition"], reasons, 0, 0, damage, closed_before=True)


def _repair(part: Path) -> bool:
    """Put the superblock right. False when there is no file, or its writer died while it made it: nothing can have been
    stored in it."""
    first = repair.read_superblock(part) if part.exists() else None
    if first is None or first.flags == repair.WRITING:
        return False
    repair.repair_superblock(part)
    return True


def _begin(taken: _Taken) -> None:
    """A fresh part for what is in the journal; what else is known of the run died with its writer."""
    part, name = taken.part, taken.name
    code = next((record.frame.layout for record in taken.contents.records if isinstance(record.frame, Block)), 2)
    one = schema.layout(code)
    info = RunInfo(name.run, "", "", "", name.started_ns, one, "", name.storage)
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    file = layout.create(part, one, "")
    try:
        with file:
            tables.describe_run(file, Tables(file, file.flush), info, name.part, {}, tables.NO_CONFIGURATIONS)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"cannot write {part}: {cause(error)}") from None


def _finish(taken: _Taken, state: UnfinishedPart) -> Recovered:
    part = taken.part
    file = RunFile.resume(part, taken.journal, tables.make_run_info(state.info, state.texts), state)
    try:
        added = _add(file, taken.contents.records)
        # Rows that were shown to readers before their batch was full are the journal's.
        cut = max(0, state.cut - (file.rows - state.rows))
        told = f"{int(time.time())}: its writer died; {added} blocks from the journal, {cut} rows of no block cut"
        report = file.close(owed=state.owed, texts={"recovered": told})
    except (ProtocolError, ValueError) as error:
        raise FileError(f"cannot recover {part}: {error}") from None
    finally:
        file.abandon()
    done = report.path, file.info.run, report.rows, report.condition, report.reasons
    return Recovered(part, *done, added, cut, state.damaged)


def _add(file: RunFile, kept: Iterable[JournalRecord]) -> int:
    """Add the records whose identity is not there yet; how many."""
    added = 0
    for record in kept:
        frame = record.frame
        if frame.following <= file.next(frame.source):
            continue
        if isinstance(frame, End):
            file.end(frame)
        else:
            file.add(frame, np.frombuffer(record.rows, file.info.layout.dtype))
        added += 1
    return added


def read_unfinished_part(path: Path, give_up: Callable[[], bool] = lambda: False) -> UnfinishedPart | None:
    """None when it had not come so far that it could take a block. FileError when it cannot be read, or when `give_up`,
    which is asked while its rows are, says so."""
    with DataFile(path) as file:
        if not file.own:
            raise FileError(f"{path}: has no /run, so it is none of ours")
        info = file.run_info()
        if not info["opened_ns"]:
            if found := file.rows or file.length("run/blocks"):
                raise FileError(f"{path}: /run/info is empty, expected what run its {found} rows belong to")
            return None
        if file.layout is None or file.layout.code != info["layout"]:
            raise FileError(f"{path}: /run/info says layout {info['layout']}, the columns are {file.dtype}")
        return _Reading(file, info).state(give_up)


class _Reading:
    def __init__(self, file: DataFile, info: dict[str, Any]) -> None:
        self._file = file
        self._info = info
        self._run = int(info["run"])
        self._producers = file.producers()
        self._known = {self._whose(row): int(row["first"]) for row in file.table("run/positions")}
        self._accounts: dict[BlockOrigin, Account] = {}
        self._missing: list[tuple[int, ...]] = []
        self._damaged: list[str] = []
        self._lost: list[str] = []
        self._doubtful: list[Any] = []  # blocks at the end whose rows are not what was written
        self._row = 0  # behind the last good block
        self._blocks = 0  # good ones, and what lies between them
        self._messages = 0

    def state(self, give_up: Callable[[], bool]) -> UnfinishedPart:
        for group in block_groups(self._file):
            if give_up():
                raise FileError(f"{self._file.path}: not recovered to its end: that begins anew at the next start")
            if not self._group(group):
                break
        self._cut_blocks()
        lengths = {"run/blocks": self._blocks, "run/ends": self._ends(), "messages": self._messages}
        lengths["ledger/counts"], owed = self._counts()
        for name in ("ledger/outside", "ledger/unknown", "ledger/verdicts"):
            lengths[name] = len(self._leading(name, self._ended))
        gaps = self._leading("ledger/gaps", lambda row: int(row["sequence"]) < self._account(row).next)
        for row in gaps:
            self._account(row).drop([(int(row["io_group"]), int(row["rows"]))])
        told = self._leading("run/configs", lambda row: int(row["sequence"]) < self._account(row).next)
        lengths["run/configs"] = len(told)
        lengths["configs"] = int(
            tables.fitting_configurations(told, self._file.attribute("_header", "asic_version")).sum()
        )
        jumps = self._leading("run/missing", lambda row: int(row["next"]) < self._account(row).next)
        lengths["ledger/gaps"], lengths["run/missing"] = len(gaps), len(jumps)
        there = {tuple(row.tolist()[:4]) for row in jumps}
        texts = [text(row["name"]) in CLOSING for row in self._file.table("run/texts")]
        lengths["run/texts"] = texts.index(True) if True in texts else len(texts)
        findings = verify.Findings()
        verify.check_seal(self._file, self._info, findings)
        return UnfinishedPart(
            info=self._info,
            texts=self._file.texts(),
            sealed=not findings.lines() and self._info["condition"] != RunCondition.RUNNING,
            known=self._known,
            accounts={source: account for source, account in self._accounts.items() if account.next > account.begun_at},
            producers=self._producers,
            rows=self._row,
            cut=self._file.rows - self._row,
            messages=self._messages,
            lengths=lengths,
            missing=[row for row in self._missing if row[:4] not in there],
            owed=owed,
            damaged=self._damaged,
            lost=self._lost,
        )

    def _whose(self, row: Any) -> BlockOrigin:
        return self._file.origin(row, self._producers, self._run)

    def _account(self, row: Any) -> Account:
        source = self._whose(row)
        if source not in self._accounts:
            self._accounts[source] = Account(source, int(row["producer"]), self._known.get(source, 0))
        return self._accounts[source]

    # Blocks

    def _group(self, group: NDArray[Any]) -> bool:
        """Some blocks with their rows; False when what follows makes no sense."""
        first = stop = self._row + sum(int(block["rows"]) for block in self._doubtful)
        sensible = []
        for block in group:
            known = int(block["producer"]) < len(self._producers)
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
                self._settle()
                self._good(block, rows)
        return len(sensible) == len(group)

    def _rows(self, start: int, stop: int) -> NDArray[Any] | None:
        try:
            return self._file.packets(start, stop)
        except FileError:
            return None

    def _good(self, block: Any, rows: NDArray[Any]) -> None:
        account = self._take(block)
        hdf5_chunks.tally(rows.view(np.uint8), int(self._info["layout"]), account.tally)
        messages = rows["counter"][schema.types_of(rows) == schema.PacketType.MESSAGE]
        if len(messages):  # files of before 2026-11-29 have one number in all rows of a message
            self._messages = int(messages[-1]) + int(np.count_nonzero(messages == messages[-1]))

    def _settle(self) -> None:
        """A good block follows: those before it that are not are kept where they are, and named."""
        for block in self._doubtful:
            self._take(block)
            last = int(block["first_row"]) + int(block["rows"])
            self._damaged.append(f"rows {block['first_row']} to {last} are not what block {block['sequence']} held")
        self._doubtful = []

    def _cut_blocks(self) -> None:
        """Name the blocks at the end that do not become part of the file. A writer that is killed leaves none."""
        for block in self._doubtful:
            last = int(block["first_row"]) + int(block["rows"])
            self._lost.append(
                f"rows {block['first_row']} to {last}, at the end, are not what block {block['sequence']} held"
            )
        rest = self._file.length("run/blocks") - self._blocks - len(self._doubtful)
        if rest:
            self._lost.append(f"the last {rest} rows of /run/blocks make no sense")

    def _take(self, block: Any) -> Account:
        account = self._account(block)
        sequence = int(block["sequence"])
        if missing := account.skip(sequence, int(block["first_packet"])):
            self._missing.append(missing)
        account.take(sequence, int(block["first_packet"]) + int(block["rows"]))
        self._row += int(block["rows"])
        self._blocks += 1
        return account

    # What belongs to them

    def _ends(self) -> int:
        """Take the ends; how many belong to it. One that came before blocks that are lost now does not."""
        rows = self._file.table("run/ends")
        jumps = {row[:4] for row in self._file.table("run/missing").tolist()}
        for number, row in enumerate(rows):
            if int(row["producer"]) >= len(self._producers):
                return self._cut_ends(number, len(rows))
            account, following = self._account(row), int(row["next"])
            whole = (
                following == account.expected
                or (account.index, int(row["epoch"]), account.expected, following) in jumps
            )
            if account.end is not None or not whole:
                return self._cut_ends(number, len(rows))
            if missing := account.skip(following, None):
                self._missing.append(missing)
            account.end = stream.End(
                account.source.run,
                account.source.producer,
                account.source.epoch,
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

    def _counts(self) -> tuple[int, dict[BlockOrigin, int]]:
        """Give the ends their totals: how many rows of /ledger/counts that takes, and what is owed still."""
        rows = self._leading("ledger/counts", lambda row: text(row["how"]) != ledger.OPEN and self._ended(row))
        owed: dict[BlockOrigin, int] = {}
        for row in rows:
            account = self._account(row)
            assert account.end is not None
            account.end.counts.append([int(row["io_group"]), *(int(row[name]) for name in constants.COUNTS)])
            if row["owed"]:
                owed[account.source] = owed.get(account.source, 0) + int(row["owed"])
        return len(rows), owed

    def _ended(self, row: Any) -> bool:
        return self._account(row).end is not None

    def _leading(self, name: str, belongs: Callable[[Any], bool]) -> NDArray[Any]:
        """The rows of a table that belong to blocks and ends that are there: its first ones."""
        rows = self._file.table(name)
        for number, row in enumerate(rows):
            if int(row["producer"]) >= len(self._producers) or not belongs(row):
                return rows[:number]
        return rows
