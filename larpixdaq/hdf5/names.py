"""File names of runs: run0000042_20261122T071251Z_000.h5 is part 0 of run 42, prepared at that UTC time.

A storage with a label has it before the part number: run0000042_20261122T071251Z_copy_000.h5.
"""

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
RAW: Final = ".raw.h5"  # raw file, made from a finished file
RAW_PART: Final = ".raw.part"  # raw file that is being made
RAW_LOCK: Final = ".raw.lock"  # empty, locked while a raw file is made

_RUN: Final = rf"run(\d{{{RUN_DIGITS}}})"
_FILE_NAME: Final = re.compile(_RUN + r"_(\d{8}T\d{6}Z)_(?:([A-Za-z0-9.-]+)_)?(\d{1,9})(\.h5|\.h5\.part|\.h5\.journal)")
#: Names of any form that claim a run number.
_RUN_FILE: Final = re.compile(_RUN + r"_.*(\.h5|\.h5\.part|\.h5\.journal)")


class FileName(NamedTuple):
    """Fields of a file name. `storage` is the label that label() makes of the storage's name."""

    run: int
    started_ns: int  # unix ns, whole seconds
    storage: str
    part: int
    ending: str


def parse(name: str) -> FileName | None:
    """Split a file name into its fields; None when it has another form."""
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        return None
    try:
        started = parse_utc_name(match[2])
    except ValueError:
        return None
    return FileName(int(match[1]), started * 1_000_000_000, match[3] or "", int(match[4]), match[5])


def stem(run: int, started_ns: int, part: int, storage: str = "") -> str:
    """Make the file name without its ending. `started_ns`: unix ns; `storage`: empty for the first or only storage."""
    time = utc_name(started_ns // 1_000_000_000)
    return f"run{run:0{RUN_DIGITS}d}_{time}_{label(storage)}{'_' if storage else ''}{part:03d}"


def is_packet_file(name: str) -> bool:
    """Return whether a name is that of a finished file of a run, and not of a raw file."""
    found = parse(name)
    return found is not None and found.ending == FINISHED


def claims_run(name: str) -> bool:
    """Return whether a name begins like those of run files, from which run numbers are read."""
    return re.match(_RUN + "_", name) is not None


def label(storage: str) -> str:
    """Make the form of a storage's name that its file names contain."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", storage)


def lock_name(storage: str = "") -> str:
    """Make the name of the file that a storage keeps locked in its directory."""
    return f".larpixdaq{'-' if storage else ''}{label(storage)}.lock"


def run_files(directory: Path, run: int | None = None) -> list[tuple[int, str, Path]]:
    """List (run, ending, path) of all files in the directory that are named by a run, or by this run, sorted by name.

    FileError when the directory cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise FileError(f"cannot read the directory {directory}: {error.strerror}") from None
    files = []
    for name in names:
        match = _RUN_FILE.fullmatch(name)
        if match and (run is None or int(match[1]) == run):
            files.append((int(match[1]), match[2], directory / name))
    return files


def files_of_storage(directory: Path, storage: str = "", run: int | None = None) -> list[tuple[int, int, str, Path]]:
    """List (run, part, ending, path) of the files of one storage, in the order of runs and parts.

    FileError when the directory cannot be read.
    """
    files = [
        (name.run, name.part, name.ending, path)
        for _, _, path in run_files(directory, run)
        if (name := parse(path.name)) is not None and name.storage == label(storage)
    ]
    return sorted(files, key=lambda file: file[:2])


def unfinished_parts(directory: Path, storage: str | None = None) -> list[Path]:
    """List NAME.h5.part for every part or journal in the directory, of one storage or of all (None).

    The part itself may be absent where only its journal exists. FileError when the directory cannot be read.
    """
    parts = dict.fromkeys(
        path.with_name(path.name.removesuffix(ending) + PART)
        for _, ending, path in run_files(directory)
        if (name := parse(path.name)) and ending != FINISHED and (storage is None or name.storage == label(storage))
    )
    return list(parts)


def highest_run(directory: Path) -> int:
    """Return the highest run number among the file names in the directory; 0 when there is none."""
    return max((run for run, _, _ in run_files(directory)), default=0)
