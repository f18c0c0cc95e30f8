"""Counts the words of boards that are stored, counted as lost, or unaccounted for, from the files of a run alone.

The rows are counted with plain h5py and numpy, independently of larpix-daq.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import COUNTS
from larpixdaq.hdf5 import names
from larpixdaq.hdf5.ledger import input_imbalances
from larpixdaq.hdf5.verify import verify

Source = tuple[str, int]  # producer, epoch
#: Kinds of rows, and their counters in the ledger.
WORDS, TIMES, INFOS, SENT = range(4)
MADE = ("word_rows", "time_rows", "info_rows", "sent_rows")
_PIECE = 1 << 18
#: Findings about one part that are no problem by themselves, because other parts may have the missing blocks, or the
#: ledger counts them. _balance() judges all parts together.
_OF_ONE_PART = re.compile(
    "^condition |totals unknown$|: blocks .* missing |ledger .d.: |dropped, because ring and spool were full$|"
    ": most of the data could not be used: "
)


@dataclass
class Gap:
    """A mark in the file that data of an io_group are, or may be, missing."""

    io_group: int
    what: str
    seconds: float
    lost: int = 0


@dataclass
class Tally:
    stored: dict[int, int] = field(default_factory=dict)  # words per io_group, each block once
    counted: dict[int, int] = field(default_factory=dict)  # words per io_group that the ledger counts as lost
    doubled: int = 0  # blocks that are in the files twice, without a mark
    superseded: int = 0  # blocks that are twice in the files, once in a part that is marked as superseded
    gaps: list[Gap] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # faults of ledger or files
    notes: list[str] = field(default_factory=list)
    parts: int = 0
    rows: int = 0

    def unaccounted(self, sent: dict[int, int]) -> dict[int, int]:
        return {group: n - self.stored.get(group, 0) - self.counted.get(group, 0) for group, n in sent.items()}


class _Totals:
    """Sums over all parts of a run."""

    def __init__(self) -> None:
        self.rows = np.zeros((256, 4), np.int64)  # [io_group, kind], each block once
        self.seen: set[tuple[str, int, int]] = set()  # producer, epoch, sequence
        self.sources: set[Source] = set()
        self.ends: dict[Source, dict[int, dict[str, int]]] = defaultdict(dict)
        self.next: dict[Source, int] = {}
        self.missing: Counter[Source] = Counter()  # rows of blocks that never arrived


def tally(parts: list[Path], processes: int = 1) -> Tally:
    """Count the words in the parts of one run of one storage, in order. `processes` processes read the rows."""
    found, totals = Tally(parts=len(parts)), _Totals()
    finished = [path for path in sorted(parts, key=_superseded) if path.name.endswith(names.FINISHED)]
    found.problems += [f"{path.name} is not finished" for path in parts if path not in finished]
    for path, (findings, kinds) in zip(finished, _readings(finished, processes), strict=True):
        for finding in findings:
            (found.notes if _OF_ONE_PART.search(finding) else found.problems).append(f"{path.name}: {finding}")
        totals.rows += kinds
        with h5py.File(path, "r") as file:
            _part(file, path.name, found, totals)
    _balance(found, totals)
    return found


def _readings(parts: list[Path], processes: int) -> Iterator[tuple[list[str], NDArray[np.int64]]]:
    if processes == 1:
        yield from map(_reading, parts)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_reading, parts)


def _reading(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Return the findings of `verify` in a part, and its number of rows by io_group and kind."""
    kinds = np.zeros((256, 4), np.int64)
    with h5py.File(path, "r") as file:
        rows = file["packets"]
        for start in range(0, len(rows), _PIECE):
            kinds += _kinds(rows[start : start + _PIECE])
    return verify(path).findings, kinds


def parts_of(directories: list[Path], run: int, label: str = "") -> list[Path]:
    """Return the finished and unfinished files of a run from the storage with this label, in the order of parts."""
    found = []
    for directory in directories:
        for _, ending, path in names.run_files(directory, run):
            stem = path.name.removesuffix(ending).split("_", 2)[2]
            if stem.rpartition("_")[0] == label:
                found.append((stem, path))
    return [path for _, path in sorted(found)]


def _superseded(path: Path) -> bool:
    """Return whether a part is marked as superseded by another storage; blocks in both count for the other one."""
    try:
        with h5py.File(path, "r") as file:
            return any(text.startswith(b"superseded") for text in file["run/texts"]["name"])
    except (OSError, KeyError):
        return False  # _part() reports the damage


def _part(file: Any, name: str, found: Tally, totals: _Totals) -> None:
    producers = [text.decode() for text in file["run/producers"]["name"]]
    blocks = file["run/blocks"][:]
    repeated = np.zeros(len(blocks), bool)
    for at, (producer, epoch, sequence) in enumerate(blocks[["producer", "epoch", "sequence"]].tolist()):
        key = producers[producer], epoch, sequence
        repeated[at] = key in totals.seen
        totals.seen.add(key)
        totals.sources.add(key[:2])
    doubled = int(repeated.sum())
    if _superseded(Path(file.filename)):
        found.superseded += doubled
    else:
        found.doubled += doubled
    rows = file["packets"]
    found.rows += len(rows)
    for block in blocks[repeated]:
        first = int(block["first_row"])
        totals.rows -= _kinds(rows[first : first + int(block["rows"])])
    for line in file["run/missing"][:]:
        source = producers[line["producer"]], int(line["epoch"])
        totals.missing[source] += int(line["rows"])
        found.notes.append(f"{name}: blocks {line['first']} to {line['next'] - 1} of {source[0]} are missing")
    for line in file["run/ends"][:]:
        totals.next[producers[line["producer"]], int(line["epoch"])] = int(line["next"])
    for line in file["ledger/counts"][:]:
        if line["how"] != b"open":
            counts = {column: int(line[column]) for column in COUNTS}
            totals.ends[producers[line["producer"]], int(line["epoch"])][int(line["io_group"])] = counts
    for line in file["ledger/verdicts"][:]:
        if line["verdict"] != b"complete":
            what = f"{line['verdict'].decode()}: {line['why'].decode()}"
            found.gaps.append(Gap(int(line["io_group"]), what, _seconds(line), int(line["lost"])))


def _seconds(line: Any) -> float:
    return (int(line["last_ns"]) - int(line["first_ns"])) / 1e9


def _kinds(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Count rows, shape (256, 4): io_group, kind."""
    kind = rows["packet_type"].astype(np.intp)
    key = rows["io_group"].astype(np.intp) << 4 | kind << 1 | (rows["direction"] != 0)
    counts = np.bincount(key, minlength=4096).reshape(256, 8, 2)
    found = np.zeros((256, 4), np.int64)
    found[:, WORDS] = counts[:, :4, 1].sum(axis=1) + counts[:, 6:, :].sum(axis=(1, 2))
    found[:, TIMES] = counts[:, 4].sum(axis=1)
    found[:, INFOS] = counts[:, 5].sum(axis=1)
    found[:, SENT] = counts[:, :4, 0].sum(axis=1)
    return found


def _balance(found: Tally, totals: _Totals) -> None:
    """Check the equations of the ledger over all parts, and fill in stored and counted words."""
    made = np.zeros((256, 4), np.int64)
    dropped = np.zeros(256, np.int64)
    refused: Counter[int] = Counter()
    for source in sorted(totals.sources | totals.ends.keys()):
        if source not in totals.ends:
            found.problems.append(f"the totals of {source[0]}, epoch {source[1]:x}, are unknown")
            continue
        for io_group, counts in totals.ends[source].items():
            found.problems += [f"{source[0]}, io_group {io_group}: {line}" for line in input_imbalances(counts)]
            made[io_group] += [counts[name] for name in MADE]
            dropped[io_group] += counts["dropped"]
            refused[io_group] += counts["unknown_words"] + counts["rejected_words"]
        present = sum(key[:2] == source for key in totals.seen)
        if present == totals.next[source]:
            totals.missing[source] = 0  # other parts have the blocks that one part lacks
        else:
            found.problems.append(f"{source[0]}, epoch {source[1]:x}: {present} of {totals.next[source]} blocks stored")
    missing = made - totals.rows
    total = int(missing.sum())
    if total != int(dropped.sum()) + sum(totals.missing.values()):
        found.problems.append(
            f"ledger (d), all parts: {made.sum()} rows were made, {totals.rows.sum()} are stored, {dropped.sum()} were "
            f"dropped, {sum(totals.missing.values())} are missing"
        )
    for io_group in range(256):
        if totals.rows[io_group, WORDS]:
            found.stored[io_group] = int(totals.rows[io_group, WORDS])
        counted = max(0, int(missing[io_group, WORDS])) + refused[io_group]
        if counted:
            found.counted[io_group] = counted
