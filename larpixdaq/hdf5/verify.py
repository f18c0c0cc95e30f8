"""Verify files and runs: structure, checksums, sequences, ledger and parity, from the files alone.

The blocks of a file cover /packets exactly, and their rows have the CRC-32 of /run/blocks. The ledger balances, and
agrees with the rows. The parity of every word is computed again from its row. Parts of one run are judged together
(run_report.py), because some findings about one part are answered by another part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq._native import hdf5_chunks, word_codec
from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import layout, ledger, names, run_report
from larpixdaq.hdf5.ledger import describe_group, describe_origin
from larpixdaq.hdf5.raw_file import verify_raw
from larpixdaq.hdf5.reader import PIECE_ROWS, DataFile
from larpixdaq.hdf5.recordings import chip_generation, copy_columns
from larpixdaq.hdf5.row_reader import in_order
from larpixdaq.hdf5.run_report import RunReport
from larpixdaq.protocol.packed_rows import new_tally
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.runtime.record_file import crc32

#: Maximum findings that are listed; more are only counted.
MOST_FINDINGS: Final = 100
#: Counters of the ledger that are also counted from the rows.
_TALLIED = hdf5_chunks.TALLY[:6]
#: Layouts in which the words of each chip generation are encoded again.
_LAYOUTS: Final = {
    schema.Asic.V1: schema.PACKETS_1_0,
    schema.Asic.V2: schema.PACKETS_2_4_CLOCK64,
    schema.Asic.V3: schema.PACKETS_3_0,
}
#: Columns that are no part of a word, or only of words in the mode fifo diagnostics.
_NOT_NEEDED: Final = frozenset(
    {
        *("chip_key", "io_group", "io_channel", "direction", "receipt_timestamp", "counter"),
        *("fifo_diagnostics_enabled", "local_fifo_events", "shared_fifo_events"),
    }
)
#: Bits of a timestamp in a word; any other field takes all bits of its column in our layouts.
_TIMESTAMP_BITS: Final = 32
GOOD: Final = (RunCondition.COMPLETE, RunCondition.SUSPECT, RunCondition.ABORTED, RunCondition.CONTINUED)


class VerifyReport(NamedTuple):
    """Result for one file."""

    path: Path
    condition: str  # empty without a ledger
    rows: int
    findings: list[str]  # faults, one line each
    notes: list[str]  # facts that are no fault
    open: list[str]  # findings that other parts may answer: ends or blocks that did not come
    run: tuple[int, str] | None  # number and storage; None without a ledger
    unit: str = "rows"  # what `rows` counts: rows, or words of a raw file

    @property
    def ok(self) -> bool:
        return not self.findings


class FileOutcome(NamedTuple):
    """Result for several files and their runs."""

    files: list[VerifyReport]
    runs: list[RunReport]

    @property
    def ok(self) -> bool:
        return all(file.ok for file in self.files) and all(is_good(run) for run in self.runs)


def verify(path: Path | str) -> VerifyReport:
    """Verify one file. Nothing is raised: that a file cannot be read is a finding too."""
    path = Path(path)
    findings = Findings()
    notes: list[str] = []
    condition, rows, run = "", 0, None
    if path.name.endswith(names.RAW):
        return _verify_raw(path)
    try:
        with DataFile(path) as file:
            rows = file.rows
            if file.own:
                texts = file.texts()
                if layout.CONVERTED not in texts:
                    run = file.run, (texts.get("storage") or [""])[-1]
                condition = _verify_own(file, findings, notes)
            else:
                _verify_foreign(file, findings, notes)
    except FileError as error:
        findings.add(str(error))
    return VerifyReport(path, condition, rows, findings.lines(), notes, findings.open(), run)


def _verify_raw(path: Path) -> VerifyReport:
    """Verify a raw file, by the packet file from which it was made."""
    try:
        words, findings, notes = verify_raw(path)
    except FileError as error:
        words, findings, notes = 0, [str(error)], []
    return VerifyReport(path, "", words, findings, notes, [], None, "words")


def is_good(run: RunReport) -> bool:
    """Whether the files of a run have no fault: also when it was aborted, or data were lost before the producer.

    A run that continues in parts that were not given is good as far as it goes.
    """
    return run.condition in GOOD


def verify_all(paths: Iterable[Path]) -> FileOutcome:
    """Verify files, and all files of runs in directories.

    A run in a directory must have all its parts; a run given by files is judged as far as they go. All directories are
    judged together, because a storage may have lost its name to another one, which continued in another directory.
    FileError when a directory cannot be read.
    """
    reports: dict[Path, VerifyReport] = {}
    listed: dict[Path, bool] = {}  # file -> whether a directory had it
    for path in map(Path, paths):
        if os.path.isdir(path):
            files = [file for _, ending, file in names.run_files(path) if ending != names.JOURNAL]
            if not files:
                finding = f"{path} is not a file, and holds no file of a run"
                reports[path] = VerifyReport(path, "", 0, [finding], [], [], None)
            listed |= {file: True for file in files if file not in listed}
        else:
            listed[path] = False
    reports |= {path: verify(path) for path in listed}
    groups: dict[tuple[int, str], list[Path]] = {}
    for path in listed:
        name = names.parse(path.name)  # has run and storage of a file that cannot be read
        run_key = reports[path].run or (None if name is None else (name.run, name.storage))
        if run_key is not None:
            groups.setdefault(run_key, []).append(path)
    runs = []
    for (run, _), files in groups.items():
        whole = all(listed[path] for path in files)
        if len(files) == 1 and not whole:
            runs.append(_judge_part(run, reports[files[0]]))
            continue
        runs.append(run_report.judge_run(run, files, whole=whole))
        for path in files:
            report = reports[path]
            reports[path] = report._replace(findings=[line for line in report.findings if line not in report.open])
    return FileOutcome(list(reports.values()), runs)


def _judge_part(run: int, report: VerifyReport) -> RunReport:
    """Judge a run by one of its parts alone."""
    try:
        with DataFile(report.path) as file:
            reasons = file.texts().get("reason", [])
    except FileError as error:
        reasons = [str(error)]
    condition = report.condition or RunCondition.INTERRUPTED
    return RunReport(run, [report.path], condition, report.rows, [], reasons, [], [])


class Findings:
    """Lines about faults; the first MOST_FINDINGS are kept, the others counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open: list[str] = []
        self._more = 0
        self._more_open = 0  # of these, open ones

    def add(self, line: str) -> None:
        if len(self._lines) < MOST_FINDINGS:
            self._lines.append(line)
        else:
            self._more += 1

    def add_open(self, line: str) -> None:
        """Add a finding that another part may answer."""
        if len(self._lines) < MOST_FINDINGS:
            self._open.append(line)
        else:
            self._more_open += 1
        self.add(line)

    def lines(self) -> list[str]:
        return [*self._lines, *self._rest()]

    def open(self) -> list[str]:
        """Return the findings that another part may answer."""
        return [*self._open, *(self._rest() if self._more == self._more_open else [])]

    def _rest(self) -> list[str]:
        return [f"and {self._more} more"] if self._more else []


def _verify_own(file: DataFile, findings: Findings, notes: list[str]) -> str:
    """Verify a file of larpix-daq, and return its condition."""
    info = file.run_info()
    condition = str(info["condition"])
    _check_structure(file, info, findings)
    if condition == RunCondition.RUNNING:
        findings.add("condition RUNNING: the file is still being written, or its writer died")
    else:
        check_seal(file, info, findings)
        texts = file.texts()
        if condition in (RunCondition.INCOMPLETE, RunCondition.INTERRUPTED):
            findings.add_open(f"condition {condition}: {'; '.join(texts.get('reason', [])) or 'no reason is given'}")
        elif condition == RunCondition.CONTINUED:
            notes.append(f"condition {condition}: the run continues in {texts.get('next part', ['the next file'])[-1]}")
        elif condition in (RunCondition.ABORTED, RunCondition.SUSPECT):
            notes.append(f"condition {condition}")
        elif condition != RunCondition.COMPLETE:
            findings.add(f"unknown condition {condition!r}")
        notes += [f"made from {line}" for line in texts.get(layout.MADE_FROM, [])]
        if only := texts.get(layout.ONLY_GROUPS):
            notes.append(f"has only the rows of io_group {only[-1]}, and INFO messages: verified as far as these go")
        if layout.UNREAD in texts:
            notes.append(f"{texts[layout.UNREAD][-1]} chunks came packed, and had not been unpacked when it was closed")
    parity = ParityCheck(file)
    ledger_check = LedgerCheck(file, info, findings)
    _check_blocks(file, ledger_check, parity, findings.add)
    ledger_check.close(continued=condition == RunCondition.CONTINUED)
    _check_verdicts(file, condition, findings, notes)
    if parity.unchecked_reason:
        notes.append(f"parity was not checked: {parity.unchecked_reason}")
    parity.close(findings.add, notes.append)
    return condition


def _check_verdicts(file: DataFile, condition: str, findings: Findings, notes: list[str]) -> None:
    """Note losses before the producer; they are a finding only when the condition is COMPLETE in spite of them."""
    losses = run_report.verdict_lines(file)
    if losses and condition == RunCondition.COMPLETE:
        findings.add(f"condition COMPLETE, although /ledger/verdicts says: {losses[0]}")
    notes += losses[:MOST_FINDINGS]


def _check_structure(file: DataFile, info: dict[str, Any], findings: Findings) -> None:
    if file.layout is None:
        findings.add(f"/packets: the columns are not those of layout {file.version}: {file.dtype}")
    elif file.layout.code != info["layout"]:
        findings.add(f"/run/info says layout {info['layout']}, the columns are those of {file.layout.code}")
    if (found := file.attribute("packets", "packet_types")) != layout.PACKET_TYPES:
        findings.add(f"attribute packet_types of /packets: unexpected text {str(found)[:80]!r}")
    texts = file.texts()
    asic = (texts.get("asic_version") or [""])[0]
    for group, expected in (("_header", asic), ("configs", layout.configs_name(asic))):
        if (found := file.attribute(group, "asic_version")) != expected:
            findings.add(f"attribute asic_version of /{group}: expected {expected!r}, found {str(found)[:40]!r}")
    if file.table("configs", 0, 0).dtype != layout.configs_dtype(asic):
        findings.add(f"/configs: the columns are not those of ASIC version {asic!r}")
    for name in layout.TABLES:
        file.length(name)  # FileError when the table is absent or has other columns


def check_seal(file: DataFile, info: dict[str, Any], findings: Findings) -> None:
    """Compare every table with its checksum of the close, and the totals with the numbers of rows."""
    sums = {bytes(row["name"]).decode("utf-8", "replace"): row for row in file.table("run/checksums")}
    for name in layout.CHECKED:
        row = sums.get(name)
        if row is None and name in layout.ADDED_TABLES and not file.length(name):
            continue
        if row is None:
            findings.add(f"/run/checksums has no line for {name}")
            continue
        found = file.length(name), file.crc32(name)
        if found != (int(row["rows"]), int(row["crc32"])):
            findings.add(
                f"/{name}: expected {row['rows']} rows with CRC-32 {row['crc32']:08x},"
                f" found {found[0]} with {found[1]:08x}"
            )
    if info["rows"] != file.rows:
        findings.add(f"/run/info says {info['rows']} rows, /packets has {file.rows}")
    if info["blocks"] != file.length("run/blocks"):
        findings.add(f"/run/info says {info['blocks']} blocks, /run/blocks has {file.length('run/blocks')}")
    messages = file.table("messages")["index"]
    if not np.array_equal(messages, np.arange(len(messages))):
        findings.add("/messages: the column index is not the index of the row")


def _verify_foreign(file: DataFile, findings: Findings, notes: list[str]) -> None:
    """Verify what a file of another program allows: packet types and parity."""
    parity = ParityCheck(file)
    checked = "structure and parity were checked"
    if parity.unchecked_reason:
        checked = f"structure was checked, parity was not: {parity.unchecked_reason}"
    made_from = file.made_from()
    notes += [f"made from {line}" for line in made_from]
    what = "made of files" if made_from else "the file was"
    notes.append(f"no ledger: {what} not written by larpix-daq; only {checked}")
    column = schema.type_column(file.dtype)

    def check(first: int) -> tuple[int, ParityCounts]:
        rows = file.packets(first, first + PIECE_ROWS)
        return int(np.count_nonzero(rows[column] > schema.PacketType.TRIGGER)), parity.count(rows, first)

    for first, (odd, counts) in in_order(check, range(0, file.rows, PIECE_ROWS)):
        if odd:
            findings.add(f"/packets, rows from {first}: {odd} with an unknown packet type")
        parity.add(counts)
    parity.close(findings.add, notes.append)


def _check_blocks(
    file: DataFile, ledger_check: LedgerCheck, parity: ParityCheck, finding: Callable[[str], None]
) -> None:
    """Read all rows once, block by block.

    Stops at the first impossible line of /run/blocks, because the blocks of all later rows are unknown.
    """
    row = 0
    counter = -1
    messages = file.length("messages")

    def possible() -> Iterator[NDArray[Any]]:
        nonlocal row
        for group in block_groups(file):
            stop = row
            for block in group:
                if int(block["first_row"]) != stop or int(block["rows"]) > constants.BLOCK_ROWS:
                    refusal.append(
                        f"/run/blocks: block {block['sequence']} of {block['rows']} rows is at row"
                        f" {block['first_row']}, expected row {stop}; what follows is not checked"
                    )
                    return
                stop += int(block["rows"])
            if stop > file.rows:
                refusal.append(
                    f"/run/blocks reaches to row {stop}, /packets has {file.rows}; what follows is not checked"
                )
                return
            row = stop
            yield group

    refusal: list[str] = []
    for group, checked in in_order(lambda group: _check_group(file, group, parity), possible()):
        if isinstance(checked, FileError):
            finding(str(checked))
            for block in group:
                ledger_check.block(block)
            continue
        first = int(group["first_row"][0])
        counter = _check_messages(checked.counters, counter, messages, first, finding)
        parity.add(checked.parity)
        for block, crc in zip(group, checked.crcs, strict=True):
            if crc != block["crc32"]:
                finding(
                    f"/packets, rows {block['first_row']} to {block['first_row'] + block['rows']}: expected CRC-32"
                    f" {block['crc32']:08x}, found {crc:08x}"
                )
            ledger_check.block(block)
        for (producer, epoch), tally in checked.tallies.items():
            ledger_check.count(producer, epoch, tally)
    if refusal:
        finding(refusal[0])
    elif row != file.rows:
        finding(f"/run/blocks covers {row} rows, /packets has {file.rows}")


class _CheckedGroup(NamedTuple):
    """What the rows of some blocks are."""

    crcs: list[int]  # CRC-32 of each block
    tallies: dict[tuple[int, int], NDArray[np.uint64]]  # (producer, epoch) -> counts of rows
    parity: ParityCounts
    counters: NDArray[Any]  # numbers of the lines in rows of messages


def _check_group(file: DataFile, group: NDArray[Any], parity: ParityCheck) -> _CheckedGroup | FileError:
    """Read the rows of blocks that follow each other, and check what needs no other rows. In any thread."""
    first, stop = int(group["first_row"][0]), int(group["first_row"][-1]) + int(group["rows"][-1])
    try:
        rows = file.packets(first, stop)
    except FileError as error:
        return error
    data = rows.view(np.uint8).reshape(-1, file.dtype.itemsize)
    crcs, tallies = [], {}
    for block in group:
        start = int(block["first_row"]) - first
        part = data[start : start + int(block["rows"])].reshape(-1)
        crcs.append(crc32(part))
        if file.layout is not None:
            key = int(block["producer"]), int(block["epoch"])
            if key not in tallies:
                tallies[key] = new_tally()
            hdf5_chunks.tally(part, file.layout.code, tallies[key])
    if file.layout is None:
        return _CheckedGroup(crcs, {}, ParityCounts(), np.zeros(0, np.int64))
    counters = rows["counter"][schema.types_of(rows) == schema.PacketType.MESSAGE].astype(np.int64)
    return _CheckedGroup(crcs, tallies, parity.count(rows, first), counters)


def damaged_chunks(path: Path, rest: Callable[[float], bool]) -> list[str] | None:
    """Unpack the blocks of a finished file that are chunks of their own; one line for each that is damaged.

    `rest` is called after each of them with the seconds that it took. When it returns True, None is returned at once.
    FileError when the file or its blocks cannot be read.
    """
    findings = Findings()
    with DataFile(path, own=True) as file:
        for group in block_groups(file):
            for block in group[(group["rows"] == schema.CHUNK_ROWS) & (group["first_row"] % schema.CHUNK_ROWS == 0)]:
                began = time.monotonic()
                try:
                    if crc32(file.chunk(int(block["first_row"]))) != block["crc32"]:
                        rows = f"/packets, rows {block['first_row']} to {block['first_row'] + block['rows']},"
                        findings.add(f"{path}: {rows} are not the rows that were sent")
                except FileError as error:
                    findings.add(str(error))
                if rest(time.monotonic() - began):
                    return None
    return findings.lines()


def block_groups(file: DataFile) -> Iterator[NDArray[Any]]:
    """Read /run/blocks in groups of about PIECE_ROWS rows of /packets."""
    for start in range(0, file.length("run/blocks"), 8192):
        blocks = file.table("run/blocks", start, start + 8192)
        pieces = np.cumsum(blocks["rows"].astype(np.uint64)) // PIECE_ROWS
        yield from np.split(blocks, np.flatnonzero(np.diff(pieces)) + 1)


def _check_messages(
    counters: NDArray[Any], last: int, messages: int, first: int, finding: Callable[[str], None]
) -> int:
    """Check that rows of messages refer to lines of /messages, in order. Returns the last counter."""
    if not len(counters):
        return last
    if counters.max() >= messages:
        finding(f"/packets, rows from {first}: message {counters.max()} of {messages} in /messages")
    if np.any(np.diff(counters, prepend=last) < 0):
        finding(f"/packets, rows from {first}: messages are not in the order of /messages")
    return int(counters[-1])


class _OriginCheck:
    """State of one origin while its blocks are read."""

    def __init__(self, first: int) -> None:
        self.expected = first  # next sequence
        self.continued = first > 0  # it began in an earlier part of the run
        self.lost = False
        self.ended = False
        self.tally = new_tally()


class LedgerCheck:
    """Compares the blocks of each origin with /run/positions, /run/missing, /run/ends and the ledger."""

    def __init__(self, file: DataFile, info: dict[str, Any], findings: Findings) -> None:
        self._file = file
        self._finding, self._open_finding = findings.add, findings.add_open
        self._closed = info["condition"] != RunCondition.RUNNING
        self._positions = {origin: (row["first"], row["next"]) for origin, row in file.rows_by_origin("run/positions")}
        self._checks: dict[BlockOrigin, _OriginCheck] = {}
        self._missing = {
            (origin, row["first"], row["next"]): row["rows"] for origin, row in file.rows_by_origin("run/missing")
        }

    def _check(self, origin: BlockOrigin) -> _OriginCheck:
        if origin not in self._checks:
            self._checks[origin] = _OriginCheck(self._positions.get(origin, (0, 0))[0])
        return self._checks[origin]

    def block(self, row: Any) -> None:
        """Check the sequence of a block, by its row of /run/blocks."""
        origin = self._file.origin(row)
        check = self._check(origin)
        self._advance(origin, check, int(row["sequence"]))
        check.expected += 1

    def count(self, producer: int, epoch: int, tally: NDArray[np.uint64]) -> None:
        """Add the counts of rows of an origin, as of hdf5_chunks.tally()."""
        self._check(self._file.origin({"producer": producer, "epoch": epoch})).tally += tally

    def _advance(self, origin: BlockOrigin, check: _OriginCheck, sequence: int) -> None:
        expected, check.expected = check.expected, sequence
        if sequence != expected:
            check.lost = True
            if (origin, expected, sequence) not in self._missing:
                self._finding(f"{describe_origin(origin)}: sequence {sequence} follows where {expected} should")

    def close(self, *, continued: bool) -> None:
        """Check the ends, the positions and the ledger after all blocks.

        `continued`: the run continues in a later part, which has the end records that are absent here.
        """
        for (origin, first, stop), rows in self._missing.items():
            self._open_finding(
                f"{describe_origin(origin)}: blocks {first} to {stop - 1} missing ({rows} rows, by the next header)"
            )
        for origin, row in self._file.rows_by_origin("run/ends"):
            check = self._check(origin)
            if check.ended:
                self._finding(f"{describe_origin(origin)}: ends twice")
            check.ended = True
            self._advance(origin, check, row["next"])
        for origin, check in self._checks.items():
            if not (check.ended or continued):
                self._open_finding(f"{describe_origin(origin)}: no end record, totals unknown")
            recorded, position = self._positions.get(origin, (0, 0))[1], check.expected + check.ended
            if self._closed and recorded != position:
                self._finding(
                    f"{describe_origin(origin)}: /run/positions says that {recorded} comes next, by its blocks that is"
                    f" {position}"
                )
        self._check_ledger()

    def _check_ledger(self) -> None:
        listed = set()
        for origin, row in self._file.rows_by_origin("ledger/counts"):
            group = row["io_group"]
            where = describe_group(origin, group)
            if (origin, group) in listed:
                self._finding(f"{where}: listed twice in the ledger")
            listed.add((origin, group))
            self._check_line(where, self._check(origin), group, row)
        for origin, check in self._checks.items():
            for group in np.flatnonzero(ledger.stored_rows(check.tally)).tolist():
                if (origin, group) not in listed:
                    self._finding(f"{describe_group(origin, group)}: has rows, but no line in the ledger")
        for origin, row in self._file.rows_by_origin("ledger/outside"):
            for line in ledger.input_imbalances(row):
                self._finding(f"{describe_group(origin, row['io_group'])}, outside of runs: {line}")

    def _check_line(self, where: str, check: _OriginCheck, group: int, counts: dict[str, Any]) -> None:
        """Check one row of /ledger/counts against the equations and the rows of the file."""
        tally = dict(zip(hdf5_chunks.TALLY, check.tally[group].tolist(), strict=True))
        stored = int(ledger.stored_rows(check.tally)[group])
        if counts["stored"] != stored:
            self._finding(f"{where}: the ledger says {counts['stored']} rows are stored, the file has {stored}")
        if tally["other_rows"]:
            self._finding(f"{where}: {tally['other_rows']} rows of an unknown packet type")
        if counts["how"] == ledger.OPEN:
            return
        for line in ledger.input_imbalances(counts):
            self._finding(f"{where}: {line}")
        if problem := constants.unusable(counts):
            self._finding(f"{where}: {problem}")
        if check.continued:
            return  # the rows of earlier parts are in other files
        if problem := ledger.row_imbalance(counts, stored):
            self._open_finding(f"{where}: {problem}")
        if counts["owed"]:
            self._finding(f"{where}: {counts['owed']} rows are still pending")
        if counts["dropped"]:
            self._finding(f"{where}: {counts['dropped']} rows dropped, because ring and spool were full")
        whole = not (counts["owed"] or counts["dropped"] or check.lost)
        for name in _TALLIED:
            if tally[name] > counts[name] or (whole and tally[name] != counts[name]):
                self._finding(f"{where}: the ledger says {counts[name]} {name}, the file has {tally[name]}")


class ParityCounts(NamedTuple):
    """What the parity of the words in some rows is."""

    wrong: int = 0  # rows whose column valid_parity contradicts their word
    first: int = -1  # the first of them
    bad: int = 0  # words with wrong parity
    words: int = 0
    unchecked: int = 0  # words that are not whole in their rows

    def plus(self, other: ParityCounts) -> ParityCounts:
        """Return the sum; `other` is of later rows."""
        sums = (one + more for one, more in zip(self, other, strict=True))
        return ParityCounts(*sums)._replace(first=other.first if self.first < 0 else self.first)


class ParityCheck:
    """Checks the parity of all words of a file, whose rows are counted in any thread, and added in order.

    `unchecked_reason`: why its columns do not allow that; empty when they do.
    """

    def __init__(self, file: DataFile) -> None:
        self._asic = chip_generation(file.dtype.names or (), file.version)
        self._dtype = file.layout.dtype if file.layout else _LAYOUTS[self._asic]
        self._own_layout = file.layout is not None
        #: Writers before 2.3 filled only the columns that the packet type uses: the whole word of data packets alone.
        self._data_only = not self._own_layout and file.version in ("2.0", "2.1", "2.2")
        #: Layout 2.3 of larpix-control has 8 of the 12 bits of this column, which fifo diagnostics words need.
        self._whole_events = self._own_layout or _holds(file.dtype, schema.PACKETS_2_4, "shared_fifo_events")
        self.unchecked_reason = "" if self._own_layout else _missing_columns(file.dtype, self._dtype)
        self._counts = ParityCounts()

    def add(self, counts: ParityCounts) -> None:
        self._counts = self._counts.plus(counts)

    def count(self, rows: NDArray[Any], first: int) -> ParityCounts:
        """Check rows of the file, from row `first` on."""
        counts = ParityCounts()
        if self.unchecked_reason:
            return counts
        if not self._own_layout:
            given, rows = rows, np.zeros(len(rows), self._dtype)
            copy_columns(given, rows)
        if self._asic != schema.Asic.V2:
            return self._check(rows, self._asic, first)
        modes = rows["fifo_diagnostics_enabled"] != 0
        # A chip's mode changes rarely, so that stretches of one mode, almost always a single one, need no copies.
        ends = [*(np.flatnonzero(modes[1:] != modes[:-1]) + 1), len(rows)]
        start = 0
        for end in ends:
            asic = schema.Asic.V2_DIAGNOSTICS if end > start and modes[start] else schema.Asic.V2
            counts = counts.plus(self._check(rows[start:end], asic, first + start))
            start = end
        return counts

    def _check(self, rows: NDArray[Any], asic: schema.Asic, first: int) -> ParityCounts:
        types = schema.types_of(rows)
        is_word = types <= schema.PacketType.CONFIG_READ
        if asic == schema.Asic.V2_DIAGNOSTICS and not self._whole_events:
            return ParityCounts(unchecked=int(np.count_nonzero(is_word)))
        words = word_codec.encode(rows, asic=asic)
        valid = word_codec.parity(words, asic=asic) == words
        recorded = rows["valid_parity"] == 1
        unchecked = 0
        if self._data_only:
            data = types == schema.PacketType.DATA
            unchecked = int(np.count_nonzero(is_word & ~data))
            valid, is_word = valid[data[is_word]], is_word & data
        if len(valid) < len(rows):
            recorded = recorded[is_word]
        wrong = np.flatnonzero(valid != recorded)
        place = first + int(np.flatnonzero(is_word)[wrong[0]]) if len(wrong) else -1
        return ParityCounts(len(wrong), place, int(np.count_nonzero(~valid)), len(valid), unchecked)

    def close(self, finding: Callable[[str], None], note: Callable[[str], None]) -> None:
        counts = self._counts
        if counts.wrong:
            finding(f"{counts.wrong} rows, the first is {counts.first}: valid_parity is not what their bits say")
        if counts.bad:
            note(f"{counts.bad} of {counts.words} words have wrong parity")
        if counts.unchecked:
            note(f"parity of {counts.unchecked} words was not checked: the columns do not hold all of their bits")


def _missing_columns(given: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    """Say why rows of these columns do not hold whole words; empty when they do."""
    for name in wanted.names or ():
        if name in _NOT_NEEDED:
            continue
        if name not in (given.names or ()):
            return f"/packets has no column {name}"
        if not _holds(given, wanted, name):
            return f"column {name} of /packets has {8 * given[name].itemsize} bits, too few for its field"
    return ""


def _holds(given: np.dtype[Any], wanted: np.dtype[Any], name: str) -> bool:
    """Whether a column exists and holds all bits of its field."""
    bits = _TIMESTAMP_BITS if name == "timestamp" else 8 * wanted[name].itemsize
    return name in (given.names or ()) and 8 * given[name].itemsize >= bits
