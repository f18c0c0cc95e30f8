"""Names of files: run0000042_20261122T071251Z_000.h5, or with the name of a second storage before the part's number."""

from __future__ import annotations

import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from larpixdaq.errors import FileError

PART: Final = ".h5.part"  # being written
JOURNAL: Final = ".h5.journal"  # blocks that wait for their chunk
FINISHED: Final = ".h5"
SIDECAR: Final = ".json"  # beside a finished file: its size and checksum

_NAME: Final = re.compile(r"run(\d{1,18})_.*(\.h5|\.h5\.part|\.h5\.journal)")


def stem(run: int, started_ns: int, part: int, storage: str = "") -> str:
    """The name without its ending. `started_ns`: unix ns; `storage`: empty for the first or only one."""
    time = datetime.fromtimestamp(started_ns // 1_000_000_000, timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return f"run{run:07d}_{time}_{_owner(storage)}{part:03d}"


def _owner(storage: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", storage) + "_" if storage else ""


def lock(storage: str = "") -> str:
    """The name of the file that a storage keeps locked in its directory."""
    return f".larpixdaq{'-' if storage else ''}{_owner(storage).removesuffix('_')}.lock"


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
    mine = re.compile(rf"run\d+_\d+T\d+Z_{re.escape(_owner(storage))}(\d+)")
    found = [
        (number, int(match[1]), ending, path)
        for number, ending, path in run_files(directory, run)
        if (match := mine.fullmatch(path.name.removesuffix(ending)))
    ]
    return sorted(found, key=lambda one: one[:2])


def next_part(directory: Path, run: int, storage: str = "") -> int:
    """The number of this storage's next part of the run, 0 for the first. FileError when the directory cannot be
    read."""
    return 1 + max((part for _, part, _, _ in parts_of(directory, storage, run)), default=-1)


def highest_run(directory: Path) -> int:
    """The highest run number that a file in the directory is named by, finished or not; 0 when there is none."""
    return max((run for run, _, _ in run_files(directory)), default=0)
