"""Is a file what it says it is? Structure, checksums, sequences, ledger and parity, from the file alone.

All blocks of a file in turn: their rows cover /packets exactly, and have the CRC that /run/blocks says.

The ledger of a file, held against what its rows and blocks say.

The parity of every word, computed again from the row, against what the row says.

Several files checked together: what one part of a run cannot say alone, its other parts may.
"""

from __future__ import annotations

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
from larpixdaq.hdf5.ledger import describe_source
from larpixdaq.hdf5.reader import DataFile, row_dict
from larpixdaq.hdf5.recordings import chip_generation, copy_columns
from larpixdaq.hdf5.run_report import RunReport
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.runtime.record_file import crc32

#: More findings than these are counted, not listed.
MOST_FINDINGS: Final = 100
#: Rows that are read at once.
_PIECE: Final = 4 * schema.CHUNK_ROWS
#: Counters that a tally of the rows gives again.
_SAME = hdf5_chunks.TALLY[:6]
#: Layouts in which the words of each chip generation are put together again.
_LAYOUTS: Final = {
    schema.Asic.V1: schema.PACKETS_1_0,
    schema.Asic.V2: schema.PACKETS_2_4_CLOCK64,
    schema.Asic.V3: schema.PACKETS_3_0,
}
#: Columns that are no part of a word, or belong to words of fifo diagnostics only.
_NOT_NEEDED: Final = frozenset(
    {
        *("chip_key", "io_group", "io_channel", "direction", "receipt_timestamp", "counter"),
        *("fifo_diagnostics_enabled", "local_fifo_events", "shared_fifo_events"),
    }
)
#: Bits of a timestamp in a word; any other column needs the room that our layouts give it.
_TIMESTAMP_BITS: Final = 32
_GOOD = (RunCondition.COMPLETE, RunCondition.SUSPECT, RunCondition.ABORTED, RunCondition.CONTINUED)


class VerifyReport(NamedTuple):
    """`findings`: what is wrong, each one line; `notes`: what a reader should know though it is not wrong."""

    path: Path
    ok: bool
    condition: str  # empty without a ledger
    rows: int
    packets: int  # rows of types 0 to 3 with direction 1
    findings: list[str]
    notes: list[str]
    open: list[str]  # those findings that other parts may answer: ends or blocks that did not come
    run: tuple[int, str] | None  # number and storage; None without a ledger


class Findings:
    """Lines, of which only the first hundred are kept."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open: list[str] = []
        self._more = 0
        self._more_open = 0  # of these

    def add(self, line: str) -> None:
        if len(self._lines) < MOST_FINDINGS:
            self._lines.append(line)
        else:
            self._more += 1

    def add_open(self, line: str) -> None:
        """What other parts may answer."""
        if len(self._lines) < MOST_FINDINGS:
            self._open.append(line)
        else:
            self._more_open += 1
        self.add(line)

    def lines(self) -> list[str]:
        return [*self._lines, *self._rest()]

    def open(self) -> list[str]:
        """Those that other parts may answer."""
        return [*self._open, *(self._rest() if self._more == self._more_open else [])]

    def _rest(self) -> list[str]:
        return [f"and {self._more} more"] if self._more else []


def verify(path: Path | str) -> VerifyReport:
    """Check a file. What is wrong is in the report, also when the file cannot be read at all; nothing is raised."""
    path = Path(path)
    findings = Findings()
    notes: list[str] = []
    condition, rows, packets = "", 0, 0
    run = None
    try:
        with DataFile(path) as file:
            rows = file.rows
            if file.own:
                run = int(file.run_info()["run"]), (file.texts().get("storage") or [""])[-1]
                condition, packets = _own(file, findings, notes)
            else:
                packets = _foreign(file, findings, notes)
    except FileError as error:
        findings.add(str(error))
    lines = findings.lines()
    return VerifyReport(path, not lines, condition, rows, packets, lines, notes, findings.open(), run)


def _own(file: DataFile, findings: Findings, notes: list[str]) -> tuple[str, int]:
    info = file.run_info()
    condition = str(info["condition"])
    _structure(file, info, findings)
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
    parity = ParityCheck(file)
    books = LedgerCheck(file, info)
    walk_blocks(file, info, books, parity, findings.add)
    books.close(findings.add, findings.add_open, continued=condition == RunCondition.CONTINUED)
    _doubts(file, info, findings, notes)
    if parity.unchecked_reason:
        notes.append(f"parity was not checked: {parity.unchecked_reason}")
    parity.close(findings.add, notes.append)
    return condition, books.packets


def _doubts(file: DataFile, info: dict[str, Any], findings: Findings, notes: list[str]) -> None:
    """What the producers suspect: no fault of the file, unless its condition keeps quiet about it."""
    producers = file.producers()
    doubts = []
    for row in file.table("ledger/verdicts"):
        one = row_dict(row)
        if one["verdict"] != stream.VERDICTS[0]:
            name = file.origin(row, producers, int(info["run"])).producer
            doubts.append(f"{name}, io_group {one['io_group']}: {one['verdict']}: {one['why']}")
    if doubts and info["condition"] == RunCondition.COMPLETE:
        findings.add(f"condition COMPLETE, although /ledger/verdicts says: {doubts[0]}")
    notes += doubts[:MOST_FINDINGS]


def _structure(file: DataFile, info: dict[str, Any], findings: Findings) -> None:
    if file.layout is None:
        findings.add(f"/packets: the columns are not those of layout {file.version}: {file.dtype}")
    elif file.layout.code != info["layout"]:
        findings.add(f"/run/info says layout {info['layout']}, the columns are those of {file.layout.code}")
    if (found := file.attribute("packets", "packet_types")) != layout.PACKET_TYPES:
        findings.add(f"attribute packet_types of /packets: unexpected text {str(found)[:80]!r}")
    texts = file.texts()
    named = (texts.get("asic_version") or [""])[0]
    for group, expected in (("_header", named), ("configs", layout.configs_name(named))):
        if (found := file.attribute(group, "asic_version")) != expected:
            findings.add(f"attribute asic_version of /{group}: expected {expected!r}, found {str(found)[:40]!r}")
    if file.table("configs", 0, 0).dtype != layout.configs_dtype(named):
        findings.add(f"/configs: the columns are not those of ASIC version {named!r}")
    for name, (dtype, _) in layout.TABLES.items():
        if file.table(name, 0, 0).dtype != dtype:
            findings.add(f"/{name}: unexpected columns")


def check_seal(file: DataFile, info: dict[str, Any], findings: Findings) -> None:
    """Every table against the checksum that was taken at the close, and the totals against what is there."""
    sums = {bytes(row["name"]).decode("utf-8", "replace"): row for row in file.table("run/checksums")}
    for name in layout.CHECKED:
        row = sums.get(name)
        if row is None and name in layout.LATER and not file.length(name):
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


def _foreign(file: DataFile, findings: Findings, notes: list[str]) -> int:
    parity = ParityCheck(file)
    checked = "structure and parity were checked"
    if parity.unchecked_reason:
        checked = f"structure was checked, parity was not: {parity.unchecked_reason}"
    notes.append(f"no ledger: the file was not written by larpix-daq; only {checked}")
    packets = 0
    column = schema.type_column(file.dtype)
    for first in range(0, file.rows, 4 * schema.CHUNK_ROWS):
        rows = file.packets(first, first + 4 * schema.CHUNK_ROWS)
        packets += int(np.count_nonzero(rows[column] <= schema.PacketType.CONFIG_READ))
        if odd := int(np.count_nonzero(rows[column] > schema.PacketType.TRIGGER)):
            findings.add(f"/packets, rows from {first}: {odd} with an unknown packet type")
        parity.add(rows, first)
    parity.close(findings.add, notes.append)
    return packets


def walk_blocks(
    file: DataFile, info: dict[str, Any], books: LedgerCheck, parity: ParityCheck, finding: Callable[[str], None]
) -> None:
    """Read everything once. Stops where /run/blocks stops making sense: what follows could not be told apart."""
    row = 0
    counter = -1
    messages = file.length("messages")
    known = file.layout is not None
    for group in block_groups(file):
        first = row
        for block in group:
            if int(block["first_row"]) != row or int(block["rows"]) > constants.BLOCK_ROWS:
                finding(
                    f"/run/blocks: block {block['sequence']} of {block['rows']} rows is at row"
                    f" {block['first_row']}, expected row {row}; what follows is not checked"
                )
                return
            row += int(block["rows"])
        if row > file.rows:
            finding(f"/run/blocks reaches to row {row}, /packets has {file.rows}; what follows is not checked")
            return
        try:
            rows = file.packets(first, row)
        except FileError as error:
            finding(str(error))
            rows = None
        if rows is not None and known:
            counter = _counters(rows, counter, messages, first, finding)
            parity.add(rows, first)
        data = rows.view(np.uint8).reshape(-1, file.dtype.itemsize) if rows is not None else None
        for block in group:
            _block(block, data, first, books, known, finding)
    if row != file.rows:
        finding(f"/run/blocks covers {row} rows, /packets has {file.rows}")


def _block(
    block: Any,
    data: NDArray[np.uint8] | None,
    first: int,
    books: LedgerCheck,
    known: bool,
    finding: Callable[[str], None],
) -> None:
    mine = None
    if data is not None:
        start = int(block["first_row"]) - first
        mine = data[start : start + int(block["rows"])].reshape(-1)
        crc = crc32(mine)
        if crc != block["crc32"]:
            finding(
                f"/packets, rows {block['first_row']} to {block['first_row'] + block['rows']}: expected CRC-32"
                f" {block['crc32']:08x}, found {crc:08x}"
            )
    books.block(block, mine if known else None, finding)


def block_groups(file: DataFile) -> Iterator[NDArray[Any]]:
    """/run/blocks in groups of about _PIECE rows."""
    for start in range(0, file.length("run/blocks"), 8192):
        blocks = file.table("run/blocks", start, start + 8192)
        pieces = np.cumsum(blocks["rows"].astype(np.uint64)) // _PIECE
        yield from np.split(blocks, np.flatnonzero(np.diff(pieces)) + 1)


def _counters(rows: NDArray[Any], last: int, messages: int, first: int, finding: Callable[[str], None]) -> int:
    """Rows of messages name existing texts, in order; returns the last counter."""
    counters = rows["counter"][schema.types_of(rows) == schema.PacketType.MESSAGE].astype(np.int64)
    if not len(counters):
        return last
    if counters.max() >= messages:
        finding(f"/packets, rows from {first}: message {counters.max()} of {messages} in /messages")
    if np.any(np.diff(counters, prepend=last) < 0):
        finding(f"/packets, rows from {first}: messages are not in the order of /messages")
    return int(counters[-1])


class _Source:
    def __init__(self, first: int) -> None:
        self.expected = first  # the sequence that comes next
        self.late = first > 0  # begins in an earlier part of the run
        self.lost = False
        self.ended = False
        self.tally = ledger.new_tally()


class LedgerCheck:
    """What the blocks of each source add up to."""

    def __init__(self, file: DataFile, info: dict[str, Any]) -> None:
        self._file = file
        self._run = int(info["run"])
        self._closed = info["condition"] != RunCondition.RUNNING
        self._layout = file.layout.code if file.layout else 0
        self.producers = file.producers()
        self._places = {self._whose(row): (int(row["first"]), int(row["next"])) for row in file.table("run/positions")}
        self._sources: dict[BlockOrigin, _Source] = {}
        self._missing: dict[tuple[BlockOrigin, int, int], int] = {}
        for row in file.table("run/missing"):
            self._missing[self._whose(row), int(row["first"]), int(row["next"])] = int(row["rows"])

    def _whose(self, row: Any) -> BlockOrigin:
        return self._file.origin(row, self.producers, self._run)

    def _source(self, whose: BlockOrigin) -> _Source:
        if whose not in self._sources:
            self._sources[whose] = _Source(self._places.get(whose, (0, 0))[0])
        return self._sources[whose]

    @property
    def packets(self) -> int:
        column = hdf5_chunks.TALLY.index("packets")
        return sum(int(source.tally[:, column].sum()) for source in self._sources.values())

    def block(self, row: Any, rows: NDArray[np.uint8] | None, finding: Callable[[str], None]) -> None:
        """One row of /run/blocks and its rows as bytes; None when these cannot be read, or have unknown columns."""
        whose = self._whose(row)
        source = self._source(whose)
        self._reach(whose, source, int(row["sequence"]), finding)
        source.expected += 1
        if rows is not None:
            hdf5_chunks.tally(rows, self._layout, source.tally)

    def _reach(self, whose: BlockOrigin, source: _Source, sequence: int, finding: Callable[[str], None]) -> None:
        first, source.expected = source.expected, sequence
        if sequence != first:
            source.lost = True
            if (whose, first, sequence) not in self._missing:
                finding(f"{describe_source(whose)}: sequence {sequence} follows where {first} should")

    def close(self, finding: Callable[[str], None], lacking: Callable[[str], None], *, continued: bool) -> None:
        """`lacking` gets the lines about what is not here and may be in other parts; continued: the run goes on in one,
        where those end that have not."""
        for (whose, first, stop), rows in self._missing.items():
            lacking(f"{describe_source(whose)}: blocks {first} to {stop - 1} missing ({rows} rows, by the next header)")
        for row in self._file.table("run/ends"):
            whose = self._whose(row)
            source = self._source(whose)
            if source.ended:
                finding(f"{describe_source(whose)}: ends twice")
            source.ended = True
            self._reach(whose, source, int(row["next"]), finding)
        for whose, source in self._sources.items():
            if not (source.ended or continued):
                lacking(f"{describe_source(whose)}: no end record, totals unknown")
            place = self._places.get(whose, (0, 0))[1]
            if self._closed and place != source.expected + source.ended:
                finding(
                    f"{describe_source(whose)}: /run/positions says that {place} comes next, by its blocks that is"
                    f" {source.expected + source.ended}"
                )
        self._ledger(finding, lacking)

    def _ledger(self, finding: Callable[[str], None], lacking: Callable[[str], None]) -> None:
        seen = set()
        for row in self._file.table("ledger/counts"):
            whose, group = self._whose(row), int(row["io_group"])
            where = f"{describe_source(whose)}, io_group {group}"
            if (whose, group) in seen:
                finding(f"{where}: listed twice in the ledger")
            seen.add((whose, group))
            self._line(where, self._source(whose), group, row_dict(row), finding, lacking)
        for whose, source in self._sources.items():
            for index in np.flatnonzero(ledger.stored(source.tally)):
                if (whose, int(index)) not in seen:
                    finding(f"{describe_source(whose)}, io_group {index}: has rows, but no line in the ledger")
        for row in self._file.table("ledger/outside"):
            for line in ledger.unbalanced(row_dict(row)):
                finding(f"{describe_source(self._whose(row))}, io_group {row['io_group']}, outside of runs: {line}")

    def _line(
        self,
        where: str,
        source: _Source,
        group: int,
        counts: dict[str, Any],
        finding: Callable[[str], None],
        lacking: Callable[[str], None],
    ) -> None:
        tally = dict(zip(hdf5_chunks.TALLY, source.tally[group].tolist(), strict=True))
        stored = int(ledger.stored(source.tally)[group])
        if counts["stored"] != stored:
            finding(f"{where}: the ledger says {counts['stored']} rows are stored, the file has {stored}")
        if tally["other_rows"]:
            finding(f"{where}: {tally['other_rows']} rows of an unknown packet type")
        if counts["how"] == ledger.OPEN:
            return
        for line in ledger.unbalanced(counts):
            finding(f"{where}: {line}")
        if useless := constants.unusable(counts):
            finding(f"{where}: {useless}")
        if source.late:
            return  # the rows of earlier parts are in other files
        if unpaid := ledger.owing(counts, stored, counts["owed"]):
            lacking(f"{where}: {unpaid}")
        if counts["owed"]:
            finding(f"{where}: {counts['owed']} rows are still pending")
        if counts["dropped"]:
            finding(f"{where}: {counts['dropped']} rows dropped, because ring and spool were full")
        whole = not (counts["owed"] or counts["dropped"] or source.lost)
        for name in _SAME:
            if tally[name] > counts[name] or (whole and tally[name] != counts[name]):
                finding(f"{where}: the ledger says {counts[name]} {name}, the file has {tally[name]}")


class ParityCheck:
    """Checks the rows of a file, which come in order. `unchecked_reason` is empty when its columns allow that."""

    def __init__(self, file: DataFile) -> None:
        self._asic = chip_generation(file.dtype.names or (), file.version)
        self._dtype = file.layout.dtype if file.layout else _LAYOUTS[self._asic]
        self._own_layout = file.layout is not None
        #: Writers before 2.3 filled only the columns that the packet type uses: of data packets these are the word.
        self._data_only = not self._own_layout and file.version in ("2.0", "2.1", "2.2")
        #: Layout 2.3 of larpix-control has 8 bits for the 12 of this column, which is part of fifo diagnostics words.
        self._whole_events = self._own_layout or _holds(file.dtype, schema.PACKETS_2_4, "shared_fifo_events")
        self.unchecked_reason = "" if self._own_layout else _missing_columns(file.dtype, self._dtype)
        self._wrong = 0  # rows whose column is not what their word says
        self._first = -1
        self._bad = 0
        self._words = 0
        self._unchecked = 0  # words that their rows do not hold whole

    def add(self, rows: NDArray[Any], first: int) -> None:
        """Rows of the file, `first` being the index of the first of them."""
        if self.unchecked_reason:
            return
        if not self._own_layout:
            given, rows = rows, np.zeros(len(rows), self._dtype)
            copy_columns(given, rows)
        if self._asic != schema.Asic.V2:
            self._check(rows, self._asic, first)
            return
        modes = rows["fifo_diagnostics_enabled"] != 0
        # A chip's mode changes seldom: stretches of one mode, almost always a single one, need no copies.
        ends = [*(np.flatnonzero(modes[1:] != modes[:-1]) + 1), len(rows)]
        start = 0
        for end in ends:
            asic = schema.Asic.V2_DIAGNOSTICS if end > start and modes[start] else schema.Asic.V2
            self._check(rows[start:end], asic, first + start)
            start = end

    def _check(self, rows: NDArray[Any], asic: schema.Asic, first: int) -> None:
        places = np.flatnonzero(schema.types_of(rows) <= schema.PacketType.CONFIG_READ)
        words = word_codec.encode(rows, asic=asic)
        if asic == schema.Asic.V2_DIAGNOSTICS and not self._whole_events:
            self._unchecked += len(places)
            return
        if self._data_only:
            data = schema.types_of(rows)[places] == schema.PacketType.DATA
            self._unchecked += int(np.count_nonzero(~data))
            places, words = places[data], words[data]
        valid = word_codec.parity(words, asic=asic) == words
        wrong = places[valid != (rows["valid_parity"][places] == 1)]
        if len(wrong):
            self._first = first + int(wrong[0]) if self._first < 0 else self._first
            self._wrong += len(wrong)
        self._bad += int(np.count_nonzero(~valid))
        self._words += len(words)

    def close(self, finding: Callable[[str], None], note: Callable[[str], None]) -> None:
        if self._wrong:
            finding(f"{self._wrong} rows, the first is {self._first}: valid_parity is not what their bits say")
        if self._bad:
            note(f"{self._bad} of {self._words} words have wrong parity")
        if self._unchecked:
            note(f"parity of {self._unchecked} words was not checked: the columns do not hold all of their bits")


def _missing_columns(given: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    """Why rows of these columns do not hold whole words; empty when they do."""
    for name in wanted.names or ():
        if name in _NOT_NEEDED:
            continue
        if name not in (given.names or ()):
            return f"/packets has no column {name}"
        if not _holds(given, wanted, name):
            return f"column {name} of /packets has {8 * given[name].itemsize} bits, too few for its field"
    return ""


def _holds(given: np.dtype[Any], wanted: np.dtype[Any], name: str) -> bool:
    """Whether there is such a column, with room for all bits of its field."""
    bits = _TIMESTAMP_BITS if name == "timestamp" else 8 * wanted[name].itemsize
    return name in (given.names or ()) and 8 * given[name].itemsize >= bits


class FileOutcome(NamedTuple):
    files: list[VerifyReport]
    runs: list[RunReport]

    @property
    def ok(self) -> bool:
        return all(file.ok for file in self.files) and all(is_good(run) for run in self.runs)


def is_good(run: RunReport) -> bool:
    """COMPLETE, or as good as that: what the producers suspect, and that a run was aborted, is no fault of the files;
    and a run that goes on in parts that nobody asked for is good as far as it goes."""
    return run.condition in _GOOD


def verify_all(paths: Iterable[Path]) -> FileOutcome:
    """Check files, and all files of runs in directories. Of a run in a directory no part may be missing; of files, it
    is judged as far as they go. Directories are judged together: a storage may have lost its name to another one, which
    went on elsewhere. FileError when a directory cannot be read."""
    reports: dict[Path, VerifyReport] = {}
    given: dict[Path, bool] = {}  # whether it was found in a directory
    for path in map(Path, paths):
        if path.is_dir():
            found = [one for _, ending, one in names.run_files(path) if ending != names.JOURNAL]
            if not found:
                nothing = f"{path} is not a file, and holds no file of a run"
                reports[path] = VerifyReport(path, False, "", 0, 0, [nothing], [], [], None)
            given |= {one: True for one in found if one not in given}
        else:
            given[path] = False
    reports |= {path: verify(path) for path in given}
    groups: dict[tuple[int, str], list[Path]] = {}
    for path in given:
        if (whose := reports[path].run or _by_name(path)) is not None:
            groups.setdefault(whose, []).append(path)
    judged = []
    for (run, _), members in groups.items():
        whole = all(given[path] for path in members)
        if len(members) == 1 and not whole:
            judged.append(_alone(run, reports[members[0]]))
            continue
        judged.append(run_report.judge_run(run, members, whole=whole))
        for path in members:
            reports[path] = _without_open(reports[path])
    return FileOutcome(list(reports.values()), judged)


def _by_name(path: Path) -> tuple[int, str] | None:
    """Of a file that cannot be read, what its name says."""
    name = names.parse(path.name)
    return None if name is None else (name.run, name.storage)


def _without_open(report: VerifyReport) -> VerifyReport:
    findings = [line for line in report.findings if line not in report.open]
    return report._replace(findings=findings, ok=not findings)


def _alone(run: int, report: VerifyReport) -> RunReport:
    try:
        with DataFile(report.path) as file:
            reasons = file.texts().get("reason", [])
    except FileError as error:
        reasons = [str(error)]
    condition = report.condition or RunCondition.INTERRUPTED
    return RunReport(run, [report.path], condition, report.rows, [], reasons, [], [])
