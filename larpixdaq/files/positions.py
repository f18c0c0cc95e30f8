"""Where a storage stands: what it has of each source, over all parts and journals in its directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from larpixdaq.blocks import Block, Position, Source
from larpixdaq.errors import FileError
from larpixdaq.files import journal, names
from larpixdaq.files.reader import DataFile


def unfinished(directory: Path, storage: str | None = None) -> list[int]:
    """The runs that may go on: those with a part or a journal, and the newest. FileError as of positions().

    storage: only the files of this one count; None: those of all.

    The others are closed: to open them all at every start would take a minute for 10,000 files. What a producer still
    holds of one of them has to be looked up when it comes.
    """
    files = _files(directory, storage)
    going = {run for run, ending, _ in files if ending != names.FINISHED}
    return sorted(going | {max((run for run, _, _ in files), default=0)} - {0})


def _files(directory: Path, storage: str | None, run: int | None = None) -> list[tuple[int, str, Path]]:
    if storage is None:
        return names.run_files(directory, run)
    return [(number, ending, path) for number, _, ending, path in names.parts_of(directory, storage, run)]


def positions(
    directory: Path, run: int | None = None, warnings: list[str] | None = None, storage: str | None = None
) -> list[Position]:
    """The next sequence of each source, of one run or of all, that no file in the directory holds.

    storage: only the files of this one count, since those of others are copies; None: those of all.

    A source whose end is there stands one behind the sequence that its end names. Files that cannot be read are left
    out, and a line about each goes to `warnings`. FileError when the directory itself cannot be read.
    """
    next_of: dict[Source, int] = {}
    for number, ending, path in _files(directory, storage, run):
        try:
            found = _journal(path) if ending == names.JOURNAL else of_file(path, number)
        except FileError as error:
            # What vanishes meanwhile are journal and part of a run that was just closed: the finished file has it all.
            if path.exists() and warnings is not None:
                warnings.append(str(error))
            continue
        for source, value in found.items():
            next_of[source] = max(value, next_of.get(source, 0))
    return [Position(source.run, source.producer, source.epoch, value) for source, value in next_of.items()]


def _journal(path: Path) -> dict[Source, int]:
    found: dict[Source, int] = {}
    contents = journal.read(path)
    for record in contents.records:
        frame = record.frame
        value = frame.sequence + 1 if isinstance(frame, Block) else frame.next + 1
        found[frame.source] = max(value, found.get(frame.source, 0))
    if not found and contents.damaged:
        raise FileError(f"{path}: holds no whole record")
    return found


def of_file(path: Path, number: int) -> dict[Source, int]:
    """The same of one file, which holds this run."""
    found: dict[Source, int] = {}
    with DataFile(path) as file:
        if not file.own:
            raise FileError(f"{path}: has no /run, so it is none of ours")
        producers = file.producers()
        for name, column in (("run/blocks", "sequence"), ("run/ends", "next")):
            for start in range(0, file.length(name), 65_536):
                rows = file.table(name, start, start + 65_536)
                for row in np.unique(rows[["producer", "epoch"]]):
                    mine = (rows["producer"] == row["producer"]) & (rows["epoch"] == row["epoch"])
                    source = file.source(row, producers, number)
                    found[source] = max(int(rows[column][mine].max()) + 1, found.get(source, 0))
    return found
