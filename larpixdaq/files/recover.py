"""Recovery of a part whose writer died: everything that was acknowledged, in a finished file.

The superblock is put right, rows beyond the last block of /run/blocks are cut, what only the journal holds is added,
and the file is closed like any other. Until it has its final name the journal stays, and what is written is written in
the order in which writers write: whoever is killed in a recovery leaves what a killed writer leaves, and it can be
repeated.

What cannot be read whole is never removed: a damaged journal keeps its bytes under the name NAME.h5.journal.damaged, a
part that has to be cut at a damaged place is copied to NAME.h5.part.damaged before anything is changed, and the
finished file says so in the text `damaged`.

It reads every row once, which takes a while when there are hundreds of millions. Where the sources will stand then is
known before (positions.py): prepare() does what is quick, so that a storage goes on at once and recovers meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from larpixdaq import schema
from larpixdaq.blocks import Block, End
from larpixdaq.errors import FileError, ProtocolError, cause
from larpixdaq.files import closing, journal, layout, names, opening, resume, superblock
from larpixdaq.files.journal import Contents, Journal, Record
from larpixdaq.files.opening import RunInfo
from larpixdaq.files.positions import of_file
from larpixdaq.files.reader import DataFile
from larpixdaq.files.resume import State
from larpixdaq.files.tables import Tables
from larpixdaq.files.writer import RunFile
from larpixdaq.private_files import DAMAGED, aside
from larpixdaq.regular_file import check_regular
from larpixdaq.states import MIN_FREE

#: Maximum stretches of a damaged journal that are named one by one.
_STRETCHES: Final = 20


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
        if ready and (taken.contents.records or of_file(taken.part, taken.name.run)):
            return None
        return _recover(taken, lambda: False)


class _Taken(NamedTuple):
    """A part that is locked for its recovery."""

    part: Path
    final: Path
    name: names.Name
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
    if part.exists() and part.stat().st_size and superblock.read(part) is None:
        part.rename(aside(part))  # no HDF5 file, and none that its writer had only begun
    state = resume.read(part, give_up) if _repair(part) else None
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
        state = resume.read(part)
        assert state is not None
    if state.info["run"] != name.run:
        raise FileError(f"cannot recover {part}: it holds run {state.info['run']}")
    if state.sealed:
        closing.publish(part, final)
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
        closing.sync(unfinished)
        unfinished.rename(_copy_of(part))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{part}: is damaged, and left as it is: it cannot be copied: {error.strerror}") from None


def _clean_up(taken: _Taken) -> Recovered:
    """The file has its final name: the part's name and the journal go, if the file has all that is in there."""
    there = of_file(taken.final, taken.name.run)
    for record in taken.contents.records:
        if _following(record.frame) > there.get(record.frame.source, 0):
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
    first = superblock.read(part) if part.exists() else None
    if first is None or first.flags == superblock.WRITING:
        return False
    superblock.repair(part)
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
            opening.describe(file, Tables(file, file.flush), info, name.part, {})
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"cannot write {part}: {cause(error)}") from None


def _finish(taken: _Taken, state: State) -> Recovered:
    part = taken.part
    file = RunFile.resume(part, taken.journal, opening.told(state.info, state.texts), state)
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
