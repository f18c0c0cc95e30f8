"""Names of files: run0000042_20261122T071251Z_000.h5, or with the name of a second storage before the part's number."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from larpixdaq.constants import RUN_DIGITS
from larpixdaq.errors import FileError
from larpixdaq.runtime.units import parse_utc_name, utc_name

PART: Final = ".h5.part"  # being written
JOURNAL: Final = ".h5.journal"  # blocks that wait for their chunk
FINISHED: Final = ".h5"
SIDECAR: Final = ".json"  # beside a finished file: its size and checksum

_RUN: Final = rf"run(\d{{{RUN_DIGITS}}})"
_WHOLE: Final = re.compile(_RUN + r"_(\d{8}T\d{6}Z)_(?:([A-Za-z0-9.-]+)_)?(\d{1,9})(\.h5|\.h5\.part|\.h5\.journal)")
_NAME: Final = re.compile(_RUN + r"_.*(\.h5|\.h5\.part|\.h5\.journal)")


def stem(run: int, started_ns: int, part: int, storage: str = "") -> str:
    """The name without its ending. `started_ns`: unix ns; `storage`: empty for the first or only one."""
    return f"run{run:0{RUN_DIGITS}d}_{utc_name(started_ns // 1_000_000_000)}_{_owner(storage)}{part:03d}"


def _owner(storage: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", storage) + "_" if storage else ""


class Name(NamedTuple):
    """What the name of a file says. `storage` is as label() makes it."""

    run: int
    started_ns: int
    storage: str
    part: int
    ending: str


def parse(name: str) -> Name | None:
    """None when it is not the name of a file of ours."""
    match = _WHOLE.fullmatch(name)
    if match is None:
        return None
    try:
        started = parse_utc_name(match[2])
    except ValueError:
        return None
    return Name(int(match[1]), started * 1_000_000_000, match[3] or "", int(match[4]), match[5])


def label(storage: str) -> str:
    """A storage's name as it stands in the names of its files."""
    return _owner(storage)[:-1]


def parts(directory: Path, storage: str | None = None, run: int | None = None) -> list[Path]:
    """NAME.h5.part of everything that is not closed, a part or a journal being there; of one storage, or of all.

    FileError when the directory cannot be read.
    """
    found = {}
    for _, ending, path in run_files(directory, run):
        name = parse(path.name)
        if name and ending != FINISHED and (storage is None or name.storage == label(storage)):
            found[path.name.removesuffix(ending)] = path.with_name(path.name.removesuffix(ending) + PART)
    return list(found.values())


def lock(storage: str = "") -> str:
    """The name of the file that a storage keeps locked in its directory."""
    return f".larpixdaq{'-' if storage else ''}{label(storage)}.lock"


def run_files(directory: Path, run: int | None = None) -> list[tuple[int, str, Path]]:
    """(run, ending, path) of everything in the directory that is named like a file of ours, sorted by name.

    FileError when the directory cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise FileError(f"cannot read the directory {directory}: {error.strerror}") from None
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match and (run is None or int(match[1]) == run):
            found.append((int(match[1]), match[2], directory / name))
    return found


def parts_of(directory: Path, storage: str = "", run: int | None = None) -> list[tuple[int, int, str, Path]]:
    """(run, part, ending, path) of this storage's files alone, in the order of runs and parts. FileError when the
    directory cannot be read."""
    found = [
        (name.run, name.part, name.ending, path)
        for _, _, path in run_files(directory, run)
        if (name := parse(path.name)) is not None and name.storage == label(storage)
    ]
    return sorted(found, key=lambda one: one[:2])


def highest_run(directory: Path) -> int:
    """The highest run number that a file in the directory is named by, finished or not; 0 when there is none."""
    return max((run for run, _, _ in run_files(directory)), default=0)
