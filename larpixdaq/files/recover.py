"""Recovery of a part whose writer died: everything that was acknowledged, in a finished file.

The superblock is put right, rows beyond the last block of /run/blocks are cut, what only the journal holds is added,
and the file is closed like any other. Until it has its final name the journal stays, and what is written is written in
the order in which writers write: whoever is killed in a recovery leaves what a killed writer leaves, and it can be
repeated.

It reads every row once, which takes a while when there are hundreds of millions. Where the sources will stand then is
known before (positions.py): prepare() does what is quick, so that a storage goes on at once and recovers meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from larpixdaq import schema
from larpixdaq.blocks import Block, End
from larpixdaq.errors import FileError, ProtocolError, cause
from larpixdaq.files import closing, layout, names, opening, resume, superblock
from larpixdaq.files.journal import Journal, Record, records
from larpixdaq.files.opening import RunInfo
from larpixdaq.files.positions import of_file
from larpixdaq.files.reader import DataFile
from larpixdaq.files.resume import State
from larpixdaq.files.tables import Tables
from larpixdaq.files.writer import RunFile


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
    closed_before: bool = False  # it only lacked its final name

    @property
    def text(self) -> str:
        """What was done, in one line."""
        if self.path is None:
            return f"{self.part.name}: nothing had been stored in it, so it was removed"
        if self.closed_before:
            return f"{self.path.name}: its writer had closed it, {self.rows} rows, {self.condition}"
        return (
            f"{self.path.name}: recovered, {self.rows} rows, {self.condition} ({self.from_journal} blocks from the"
            f" journal, {self.cut} rows of no block cut)"
        )


def recover(part: Path, give_up: Callable[[], bool] = lambda: False) -> Recovered:
    """Finish NAME.h5.part; `part` may also be its journal, and either may be missing. `give_up` is asked now and then
    while the rows are read: FileError when it says so.

    FileLocked, with nothing touched, when another process writes or recovers it. FileError in one line when it cannot
    be done; all that was there is there then, at most the superblock has been put right.
    """
    with _taken(Path(part)) as (found, final, journal, name):
        return _recover(found, final, journal, name, give_up)


def prepare(part: Path) -> Recovered | None:
    """Make it readable, so that it says with its journal where the sources stand; None: recover() has the rest to do.

    A part for which little is to be done is recovered here: the next part's number must not leave a gap where one was
    in which nothing had been stored. Errors as of recover().
    """
    with _taken(Path(part)) as (found, final, journal, name):
        if final.exists() or not _repair(found) or not (any(records(journal.path)) or of_file(found, name.run)):
            return _recover(found, final, journal, name, lambda: False)
        return None


@contextlib.contextmanager
def _taken(part: Path) -> Iterator[tuple[Path, Path, Journal, names.Name]]:
    """The part, its final name, and its journal, which is locked meanwhile."""
    name = names.parse(part.name)
    if name is None or name.ending == names.FINISHED:
        raise FileError(f"{part}: not the name of a part (….h5.part) or of its journal")
    stem = part.name.removesuffix(name.ending)
    part, beside = part.with_name(stem + names.PART), part.with_name(stem + names.JOURNAL)
    if not part.exists() and not beside.exists():
        raise FileError(f"{part}: there is no such file")
    journal = Journal(beside, recovery=True)
    try:
        yield part, part.with_name(stem + names.FINISHED), journal, name
    finally:
        journal.close()


def _recover(part: Path, final: Path, journal: Journal, name: names.Name, give_up: Callable[[], bool]) -> Recovered:
    kept = list(records(journal.path))
    if final.exists():
        if not part.exists() or part.samefile(final):  # killed behind the link, or behind the rename
            return _clean_up(part, final, journal, kept, name.run)
        if final.stat().st_size:
            raise FileError(f"cannot recover {part}: {final.name} exists")
        final.unlink()  # where there are no hard links, the name was taken, and the rename did not come
    state = resume.read(part, give_up) if _repair(part) else None
    if not kept and (state is None or not state.accounts):
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        journal.close(remove=True)
        return Recovered(part, None, name.run, 0, "", [], 0, 0)
    if state is None:
        _begin(part, name, kept)
        state = resume.read(part)
        assert state is not None
    if state.info["run"] != name.run:
        raise FileError(f"cannot recover {part}: it holds run {state.info['run']}")
    if state.sealed:
        closing.publish(part, final)
        return _closed(part, final, journal, name.run)
    return _finish(part, journal, kept, state)


def _clean_up(part: Path, final: Path, journal: Journal, kept: list[Record], run: int) -> Recovered:
    """The file has its final name: the part's name and the journal go, if the file has all that is in there."""
    there = of_file(final, run)
    for record in kept:
        if _following(record.frame) > there.get(record.frame.source, 0):
            raise FileError(f"cannot recover {journal.path}: it holds blocks that {final.name} does not")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    return _closed(part, final, journal, run)


def _closed(part: Path, final: Path, journal: Journal, run: int) -> Recovered:
    journal.close(remove=True)
    with DataFile(final) as file:
        info = file.run_info()
        reasons = file.texts().get("reason", [])
    return Recovered(part, final, run, info["rows"], info["condition"], reasons, 0, 0, closed_before=True)


def _repair(part: Path) -> bool:
    """Put the superblock right. False when there is no file, or its writer died while it made it: nothing can have been
    stored in it."""
    first = superblock.read(part) if part.exists() else None
    if first is None or first.flags == superblock.WRITING:
        return False
    superblock.repair(part)
    return True


def _begin(part: Path, name: names.Name, kept: list[Record]) -> None:
    """A fresh part for what is in the journal; what else is known of the run died with its writer."""
    code = next((record.frame.layout for record in kept if isinstance(record.frame, Block)), 2)
    try:
        one = schema.layout(code)
    except ValueError as error:
        raise FileError(f"cannot recover {part}: {error}") from None
    info = RunInfo(name.run, "", "", "", name.started_ns, one, "", name.storage)
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    file = layout.create(part, one, "")
    try:
        with file:
            opening.describe(file, Tables(file, file.flush), info, name.part, {})
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"cannot write {part}: {cause(error)}") from None


def _finish(part: Path, journal: Journal, kept: list[Record], state: State) -> Recovered:
    file = RunFile.resume(part, journal, opening.told(state.info, state.texts), state)
    try:
        added = _add(file, kept)
        told = f"{int(time.time())}: its writer died; {added} blocks from the journal, {state.cut} rows of no block cut"
        report = file.close(owed=state.owed, texts={"recovered": told})
    except (ProtocolError, ValueError) as error:
        raise FileError(f"cannot recover {part}: {error}") from None
    finally:
        file.abandon()
    return Recovered(part, report.path, file.info.run, report.rows, report.condition, report.reasons, added, state.cut)


def _add(file: RunFile, kept: Iterable[Record]) -> int:
    """Add the records whose identity is not there yet; how many."""
    added = 0
    for record in kept:
        frame = record.frame
        if _following(frame) <= file.next(frame.source):
            continue
        if isinstance(frame, End):
            file.end(frame)
        else:
            file.add(frame, np.frombuffer(record.rows, file.info.layout.dtype))
        added += 1
    return added


def _following(frame: Block | End) -> int:
    return (frame.sequence if isinstance(frame, Block) else frame.next) + 1
