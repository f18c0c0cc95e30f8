"""What became of the words that a board sent, from the files alone: stored, counted as lost, or unaccounted for.

Nothing here asks a process, and the rows are counted with plain h5py and numpy.
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
#: Kinds of rows, and the producer's counters of them.
WORDS, TIMES, INFOS, SENT = range(4)
MADE = ("word_rows", "time_rows", "info_rows", "sent_rows")
_PIECE = 1 << 18
#: Findings about one part that are of no account when the other parts have what is wanting, or it is counted as lost:
#: that is seen below.
_ELSEWHERE = re.compile(
    "^condition |totals unknown$|: blocks .* missing |ledger .d.: |dropped, because ring and spool were full$|"
    ": most of the data could not be used: "
)


@dataclass
class Gap:
    """Marked in the file: something of this io_group is, or may be, missing."""

    io_group: int
    what: str
    seconds: float
    lost: int = 0


@dataclass
class Tally:
    stored: dict[int, int] = field(default_factory=dict)  # words per io_group, each block once
    counted: dict[int, int] = field(
        default_factory=dict
    )  # words that were made into rows, or could not be, and are lost
    doubled: int = 0  # blocks that stand in the files twice without a mark that says so
    excused: int = 0  # blocks that stand in a part that says who superseded it
    gaps: list[Gap] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what is wrong with ledger or files
    notes: list[str] = field(default_factory=list)
    parts: int = 0
    rows: int = 0

    def unaccounted(self, sent: dict[int, int]) -> dict[int, int]:
        return {group: n - self.stored.get(group, 0) - self.counted.get(group, 0) for group, n in sent.items()}


class _Books:
    """What the parts say together."""

    def __init__(self) -> None:
        self.rows = np.zeros((256, 4), np.int64)  # [io_group, kind], each block once
        self.seen: set[tuple[str, int, int]] = set()  # producer, epoch, sequence
        self.sources: set[Source] = set()
        self.ends: dict[Source, dict[int, dict[str, int]]] = defaultdict(dict)
        self.next: dict[Source, int] = {}
        self.missing: Counter[Source] = Counter()  # rows of blocks that never came


def tally(parts: list[Path], processes: int = 1) -> Tally:
    """Of the parts of one run of one storage, in order; their rows are read by so many processes."""
    found, books = Tally(parts=len(parts)), _Books()
    finished = [path for path in sorted(parts, key=_superseded) if path.name.endswith(names.FINISHED)]
    found.problems += [f"{path.name} was left behind" for path in parts if path not in finished]
    for path, (findings, kinds) in zip(finished, _readings(finished, processes), strict=True):
        for finding in findings:
            (found.notes if _ELSEWHERE.search(finding) else found.problems).append(f"{path.name}: {finding}")
        books.rows += kinds
        with h5py.File(path, "r") as file:
            _part(file, path.name, found, books)
    _settle(found, books)
    return found


def _readings(parts: list[Path], processes: int) -> Iterator[tuple[list[str], NDArray[np.int64]]]:
    if processes == 1:
        yield from map(_reading, parts)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_reading, parts)


def _reading(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """What `verify` finds in a part, and its rows by io_group and kind."""
    kinds = np.zeros((256, 4), np.int64)
    with h5py.File(path, "r") as file:
        rows = file["packets"]
        for start in range(0, len(rows), _PIECE):
            kinds += _kinds(rows[start : start + _PIECE])
    return verify(path).findings, kinds


def parts_of(directories: list[Path], run: int, label: str = "") -> list[Path]:
    """The files of a run, finished or left behind, of the storage with this label, in the order of their parts."""
    found = []
    for directory in directories:
        for _, ending, path in names.run_files(directory, run):
            stem = path.name.removesuffix(ending).split("_", 2)[2]
            if stem.rpartition("_")[0] == label:
                found.append((stem, path))
    return [path for _, path in sorted(found)]


def _superseded(path: Path) -> bool:
    """Whether the part says that another storage of its name went on: what both have counts there."""
    try:
        with h5py.File(path, "r") as file:
            return any(text.startswith(b"superseded") for text in file["run/texts"]["name"])
    except (OSError, KeyError):
        return False  # that is told where it is read


def _part(file: Any, name: str, found: Tally, books: _Books) -> None:
    producers = [text.decode() for text in file["run/producers"]["name"]]
    blocks = file["run/blocks"][:]
    again = np.zeros(len(blocks), bool)
    for at, (producer, epoch, sequence) in enumerate(blocks[["producer", "epoch", "sequence"]].tolist()):
        key = producers[producer], epoch, sequence
        again[at] = key in books.seen
        books.seen.add(key)
        books.sources.add(key[:2])
    doubled = int(again.sum())
    if _superseded(Path(file.filename)):
        found.excused += doubled
    else:
        found.doubled += doubled
    rows = file["packets"]
    found.rows += len(rows)
    for block in blocks[again]:
        first = int(block["first_row"])
        books.rows -= _kinds(rows[first : first + int(block["rows"])])
    for line in file["run/missing"][:]:
        source = producers[line["producer"]], int(line["epoch"])
        books.missing[source] += int(line["rows"])
        found.notes.append(f"{name}: blocks {line['first']} to {line['next'] - 1} of {source[0]} are missing")
    for line in file["run/ends"][:]:
        books.next[producers[line["producer"]], int(line["epoch"])] = int(line["next"])
    for line in file["ledger/counts"][:]:
        if line["how"] != b"open":
            counts = {column: int(line[column]) for column in COUNTS}
            books.ends[producers[line["producer"]], int(line["epoch"])][int(line["io_group"])] = counts
    for line in file["ledger/verdicts"][:]:
        if line["verdict"] != b"complete":
            what = f"{line['verdict'].decode()}: {line['why'].decode()}"
            found.gaps.append(Gap(int(line["io_group"]), what, _seconds(line), int(line["lost"])))


def _seconds(line: Any) -> float:
    return (int(line["last_ns"]) - int(line["first_ns"])) / 1e9


def _kinds(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Rows by io_group and kind."""
    kind = rows["packet_type"].astype(np.intp)
    key = rows["io_group"].astype(np.intp) << 4 | kind << 1 | (rows["direction"] != 0)
    counts = np.bincount(key, minlength=4096).reshape(256, 8, 2)
    found = np.zeros((256, 4), np.int64)
    found[:, WORDS] = counts[:, :4, 1].sum(axis=1) + counts[:, 6:, :].sum(axis=(1, 2))
    found[:, TIMES] = counts[:, 4].sum(axis=1)
    found[:, INFOS] = counts[:, 5].sum(axis=1)
    found[:, SENT] = counts[:, :4, 0].sum(axis=1)
    return found


def _settle(found: Tally, books: _Books) -> None:
    """The equations of the ledger over all parts, and what follows from them."""
    made = np.zeros((256, 4), np.int64)
    dropped = np.zeros(256, np.int64)
    refused: Counter[int] = Counter()
    for source in sorted(books.sources | books.ends.keys()):
        if source not in books.ends:
            found.problems.append(f"the totals of {source[0]}, epoch {source[1]:x}, are unknown")
            continue
        for io_group, counts in books.ends[source].items():
            found.problems += [f"{source[0]}, io_group {io_group}: {line}" for line in input_imbalances(counts)]
            made[io_group] += [counts[name] for name in MADE]
            dropped[io_group] += counts["dropped"]
            refused[io_group] += counts["unknown_words"] + counts["rejected_words"]
        there = sum(key[:2] == source for key in books.seen)
        if there == books.next[source]:
            books.missing[source] = 0  # what one part lacks, another has
        else:
            found.problems.append(f"{source[0]}, epoch {source[1]:x}: {there} of {books.next[source]} blocks are there")
    lacking = made - books.rows
    total = int(lacking.sum())
    if total != int(dropped.sum()) + sum(books.missing.values()):
        found.problems.append(
            f"ledger (d), all parts: {made.sum()} rows were made, {books.rows.sum()} are stored, {dropped.sum()} were "
            f"dropped, {sum(books.missing.values())} are missing"
        )
    for io_group in range(256):
        if books.rows[io_group, WORDS]:
            found.stored[io_group] = int(books.rows[io_group, WORDS])
        counted = max(0, int(lacking[io_group, WORDS])) + refused[io_group]
        if counted:
            found.counted[io_group] = counted
