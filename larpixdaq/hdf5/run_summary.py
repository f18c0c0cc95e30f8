"""Summary of the files of one run for pictures: rates, ADC values, channels, time stamps, SYNC words and data quality.

A file of 10^9 rows is not read whole. The rows read are whole chunks, one from each of equal stretches of all rows, so
that they are an even sample of the run and of its io_groups; `seen` says what fraction they are. Numbers that the file
has beside its rows are exact: the ledger's counts, and the rows over time in /run/blocks.

Files of other programs have neither. Their rows have the whole seconds of the board messages' headers as times.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.monitor_counters import PacketCounters
from larpixdaq.constants import COUNTS, IO_GROUPS, RunCondition
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import names
from larpixdaq.hdf5.board_clocks import BoardClocks, Clock
from larpixdaq.hdf5.ledger import OPEN, rows_made
from larpixdaq.hdf5.reader import DataFile, may_be_written
from larpixdaq.hdf5.recordings import chip_generation, copy_columns
from larpixdaq.hdf5.row_reader import in_order
from larpixdaq.hdf5.run_report import judge_run, verdict_lines
from larpixdaq.schema import Asic, PacketType

#: Maximum number of rows that are read, unless the caller gives another one: some seconds of work.
ROWS: Final = 20_000_000
#: Maximum number of bins in time, and their minimum width in seconds.
BINS: Final = 240
_MIN_WIDTH: Final = 0.2
#: Equal stretches of rows for which the channels with packets are noted.
STRETCHES: Final = 64
#: Minimum rows of a unit of the sample, and rows that are counted at once.
_UNIT_ROWS: Final = 4096
_SLICE_ROWS: Final = 65_536
#: Rows in whose time one chunk is opened.
_CHUNK_COST: Final = 200
#: Rows of /run/blocks that are read at once.
_PAGE: Final = 65_536
#: Seconds from the start of the run in which times of blocks are believed: a year.
_CREDIBLE: Final = 366 * 86_400.0
#: Maximum number of lines about damaged places.
_MAX_NOTES: Final = 20
_MAX_ADC: Final = {Asic.V1: 1024, Asic.V2: 256, Asic.V2_DIAGNOSTICS: 256, Asic.V3: 1024}
#: Bits of the chips' time stamps, without the highest of v3, which marks the first packet of a burst.
_CHIP_BITS: Final = {Asic.V1: 24, Asic.V2: 31, Asic.V2_DIAGNOSTICS: 16, Asic.V3: 27}
#: Layout to which rows of other programs are converted.
_LAYOUTS: Final = {Asic.V1: schema.LAYOUTS[0], Asic.V2: schema.LAYOUTS[2], Asic.V3: schema.LAYOUTS[3]}
_SEEN: Final = (
    *("packets", "data", "bad_parity", "local_half", "local_full", "shared_half", "shared_full"),
    *("config", "sent", "sync", "trigger"),
)
#: Counts of an io_group. `packets`: of types 0 to 3 from the board, in these files, exact if `exact`, else scaled up
#: from the rows read; `seen_…`: in the rows read, the FIFO flags of data packets.
IO_GROUP: Final = np.dtype(
    [("io_group", "u1"), ("packets", "<u8"), ("exact", "?"), *((f"seen_{name}", "<u8") for name in _SEEN)]
)
CHIP: Final = np.dtype([("io_group", "u1"), ("io_channel", "u1"), ("chip_id", "u1")])
#: Counters of the ledger that say what did not become rows of the file, with their unit and place.
_LEDGER_PLACES: Final = (
    ("rejected_messages", "board messages", "decoder"),
    ("rejected_words", "words", "decoder"),
    ("unknown_words", "words", "decoder"),
    ("trailing_bytes", "bytes", "decoder"),
    ("resync_bytes", "bytes", "decoder"),
    ("dropped", "rows", "ring and spool"),
    ("owed", "rows", "pending at the producer"),
)


class Loss(NamedTuple):
    """A number of the ledger that is not 0: what did not become rows of the file, and where.

    `io_group`: None if it is not known. `number` is exact, except that of the place "board and network", which is the
    least number.
    """

    place: str
    what: str
    unit: str
    io_group: int | None
    number: int


@dataclass(kw_only=True)
class RunSummary:
    """What summarise() found.

    Times are unix seconds by the clock of the producers' hosts; in files of other programs (`own` is False) by the
    boards' message headers, in whole seconds. Arrays with a line for each io_group are in the order of `io_groups`,
    those with a line for each chip in the order of `chips`.
    """

    files: list[str]
    own: bool  # larpix-daq wrote them
    version: str  # of LArPix+HDF5
    run: int | None = None
    kind: str = ""
    comment: str = ""
    condition: str = ""  # RunCondition; RUNNING while the file grows; empty for files of other programs
    reasons: list[str] = field(default_factory=list)  # why the condition is not COMPLETE
    notes: list[str] = field(default_factory=list)  # what could not be read, or is not known
    rows: int = 0  # in the files
    rows_read: int = 0
    #: Time of the first and of the last row; None where it is not known.
    start: float | None = None
    end: float | None = None
    #: Begin and end of RUN, by the core's clock; None: not in these files.
    begun: float | None = None
    ended: float | None = None
    #: Dtype IO_GROUP, sorted.
    io_groups: NDArray[Any] = field(default_factory=lambda: np.zeros(0, IO_GROUP))
    #: Edges of the bins in time, shape (n + 1,), and packets/s, fraction of packets with bad parity, and fraction of
    #: data packets with the flag of a full FIFO in each bin, shape (n, io_groups); NaN where nothing was read.
    edges: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    rates: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    bad_parity: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    fifo_full: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    #: Data packets read with valid parity (v3: no reset samples) by ADC value, shape (io_groups, 256), v1 and v3: 1024.
    adc: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 256), np.uint64))
    #: Dtype CHIP, sorted, and of each channel, shape (chips, 64), v1: 128: data packets read, mean and standard
    #: deviation of their ADC values (NaN without packets), and one bit for each stretch with packets.
    chips: NDArray[Any] = field(default_factory=lambda: np.zeros(0, CHIP))
    packets: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 64), np.uint64))
    mean: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 64), np.float32))
    std: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 64), np.float32))
    active: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 64), np.uint64))
    #: Of each stretch: time of its first row read (NaN: not known), and data packets read by io_group.
    stretch_times: NDArray[np.float64] = field(default_factory=lambda: np.full(STRETCHES, np.nan))
    stretch_data: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((STRETCHES, 0), np.uint64))
    clocks: list[Clock] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    #: Kept words that could not become rows: number by reason.
    unknown_words: dict[str, int] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)  # on the time before the producer, other than "complete"

    @property
    def seen(self) -> float:
        """Fraction of the rows that was read; 1 without rows."""
        return self.rows_read / self.rows if self.rows else 1.0

    @property
    def seconds(self) -> float | None:
        """Seconds from the first row to the last; None where the times are not known."""
        return None if self.start is None or self.end is None else self.end - self.start

    def channel_rates(self) -> NDArray[np.float64]:
        """Return the mean rate of each channel's data packets (packets/s), shape (chips, channels).

        NaN where the times of the rows are not known.
        """
        if not self.seconds:
            return np.full(self.packets.shape, np.nan)
        scale = np.zeros(IO_GROUPS)
        groups = self.io_groups
        read = groups["seen_packets"] > 0
        scale[groups["io_group"][read]] = groups["packets"][read] / groups["seen_packets"][read] / self.seconds
        return np.asarray(self.packets * scale[self.chips["io_group"]][:, None], np.float64)

    def plain(self, points: int = 1000, *, channels: bool = False) -> dict[str, Any]:
        """Return the summary as a dict of plain values for JSON: NaN is None, arrays are lists.

        Series have at most `points` points. `channels`: also the arrays with an entry for each channel, which may be
        400,000; otherwise `chip_packets`, their sums for each chip.
        """
        answer: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("files", "own", "version", "run", "kind", "comment", "condition", "reasons", "notes", "rows"),
                *("rows_read", "seen", "start", "end", "seconds", "begun", "ended", "unknown_words", "verdicts"),
            )
        }
        answer["io_groups"] = _table(self.io_groups)
        answer["losses"] = [loss._asdict() for loss in self.losses]
        every = max(1, -(-(len(self.edges) - 1) // max(1, points)))
        answer["edges"] = self.edges[:-1:every].tolist() + self.edges[-1:].tolist()
        for name in ("rates", "bad_parity", "fifo_full"):
            answer[name] = [_listed(line) for line in _averaged(getattr(self, name), every).T]
        answer["adc"] = self.adc.tolist()
        answer["chips"] = _table(self.chips)
        answer["chip_packets"] = self.packets.sum(axis=1, dtype=np.uint64).tolist()
        if channels:
            answer["packets"] = self.packets.tolist()
            answer["mean"] = [_listed(line) for line in self.mean]
            answer["std"] = [_listed(line) for line in self.std]
        rates = self.channel_rates()
        answer["channel_rates"] = rate_histogram(rates)
        answer["clocks"] = [_plain_clock(clock, points) for clock in self.clocks]
        return answer


def rate_histogram(rates: NDArray[np.float64]) -> dict[str, Any]:
    """Return the number of channels by rate: `edges` (packets/s, five bins a decade), `channels`, and `silent`."""
    known = rates[np.isfinite(rates)]
    active = known[known > 0]
    if not len(active):
        return {"edges": [], "channels": [], "silent": len(known)}
    low, high = (
        math.floor(5 * math.log10(float(np.min(active)))),
        math.floor(5 * math.log10(float(np.max(active)))) + 1,
    )
    edges = 10.0 ** (np.arange(low, high + 1) / 5)
    edges[0], edges[-1] = min(edges[0], np.min(active)), max(edges[-1], np.max(active))
    counts, _ = np.histogram(active, edges)
    return {"edges": edges.tolist(), "channels": counts.tolist(), "silent": len(known) - len(active)}


def _plain_clock(clock: Clock, points: int) -> dict[str, Any]:
    plain = {
        name: getattr(clock, name)
        for name in (
            *("io_group", "source", "steps", "backward", "largest_backward", "resets", "rollovers", "largest_gap"),
            *("period", "offset", "offset_error"),
        )
    }
    plain["histogram"] = clock.histogram.tolist()
    plain["points"] = _plain_points(*clock.points.points(), points)
    plain["deviation"] = None if clock.deviation is None else _plain_points(*clock.deviation, points)
    plain["sync"] = [
        {
            "kind": words.kind,
            "words": words.words,
            "known": words.intervals.count,
            "low": words.intervals.low if words.intervals.count else None,
            "high": words.intervals.high if words.intervals.count else None,
            "mean": words.intervals.mean,
            "intervals": _plain_points(*words.intervals.points(), points),
        }
        for words in clock.sync.values()
    ]
    return plain


def _plain_points(x: NDArray[Any], y: NDArray[Any], points: int) -> dict[str, list[float | None]]:
    every = max(1, -(-len(x) // max(1, points)))
    return {"x": _listed(x[::every]), "y": _listed(y[::every])}


def _table(rows: NDArray[Any]) -> list[dict[str, Any]]:
    names = rows.dtype.names or ()
    return [dict(zip(names, row, strict=True)) for row in rows.tolist()]


def _listed(values: NDArray[Any]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _averaged(values: NDArray[np.float64], every: int) -> NDArray[np.float64]:
    """Return the mean of each `every` lines, without NaN; the last mean may be of fewer."""
    if every == 1 or not len(values):
        return values
    starts = np.arange(0, len(values), every)
    known = np.isfinite(values)
    numbers = np.add.reduceat(known, starts, axis=0, dtype=np.float64)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    means = np.full(sums.shape, np.nan)
    np.divide(sums, numbers, out=means, where=numbers > 0)
    return means


def run_files(path: Path | str) -> list[Path]:
    """List all parts of the run to which a file belongs, in order: those of the same storage in the same directory.

    A file with another name is alone. FileError when the directory cannot be read.
    """
    path = Path(path)
    name = names.parse(path.name)
    if name is None:
        return [path]
    files = names.files_of_storage(path.parent, name.storage, name.run)
    return [file for *_, ending, file in files if ending != names.JOURNAL] or [path]


def summarise(paths: Path | str | Sequence[Path | str], *, rows: int = ROWS, bins: int = BINS) -> RunSummary:
    """Summarise one file, or the parts of one run, finished or growing.

    `rows`: maximum number of rows that are read; `bins`: maximum number of bins in time. FileError when a file cannot
    be read, or the files are not those of one run. Damaged places inside of a file are among the `notes`.
    """
    listed = [paths] if isinstance(paths, Path | str) else list(paths)
    if not listed:
        raise FileError("summary of a run: expected at least one file")
    parts = [_read_part(Path(path)) for path in listed]
    _check_one_run(parts)
    parts.sort(key=lambda part: (part.number, part.path.name))
    summary = RunSummary(files=[str(part.path) for part in parts], own=parts[0].own, version=parts[0].version)
    summary.rows = sum(part.rows for part in parts)
    _describe_run(summary, parts)
    _Reading(summary, parts, max(1, rows), max(1, bins)).read()
    return summary


class _Part(NamedTuple):
    """What a file has beside its rows."""

    path: Path
    own: bool
    version: str
    dtype: np.dtype[Any]
    number: int
    rows: int
    unit: int  # rows of a unit of the sample
    cost: int  # rows in whose time a unit is read
    info: dict[str, Any]
    texts: dict[str, list[str]]
    counts: list[dict[str, Any]]
    producers: list[str]
    missing: int  # rows of blocks that never arrived
    verdicts: list[str]
    lost: list[tuple[int, int]]  # io_group and packets of verdicts
    unknown: dict[str, int]
    span: tuple[int, int] | None  # unix ns of the first and last row
    notes: list[str]


def _open(path: Path) -> DataFile:
    """Open a file; a part that was finished meanwhile under its new name."""
    finished = path.with_name(path.name.removesuffix(names.PART) + names.FINISHED)
    if path.name.endswith(names.PART) and not path.exists() and finished.exists():
        path = finished
    return DataFile(path)


def _read_part(path: Path) -> _Part:
    with _open(path) as file:
        chunk = file.chunk_rows or schema.CHUNK_ROWS
        unit = chunk * max(1, -(-_UNIT_ROWS // chunk))
        notes: list[str] = []
        info: dict[str, Any] = {}
        texts: dict[str, list[str]] = {}
        counts: list[dict[str, Any]] = []
        unknown: dict[str, int] = {}
        missing, verdicts, lost = 0, [], []
        if file.own:
            info, texts = file.run_info(), file.texts()
            counts = [line | {"producer": origin.producer} for origin, line in file.rows_by_origin("ledger/counts")]
            missing = int(file.table("run/missing")["rows"].sum())
            verdicts = verdict_lines(file)
            table = file.table("ledger/verdicts")
            lost = [(int(row["io_group"]), int(row["lost"])) for row in table[table["lost"] > 0]]
            reasons, numbers = np.unique(file.table("ledger/unknown")["reason"], return_counts=True)
            for reason, number in zip(reasons.tolist(), numbers.tolist(), strict=True):
                unknown[schema.REASONS.get(reason, f"reason {reason}")] = number
        part = _Part(
            path=file.path,
            own=file.own,
            version=file.version,
            dtype=file.dtype,
            number=int(info.get("part", 0)),
            rows=file.rows,
            unit=unit,
            cost=unit + _CHUNK_COST * (unit // chunk),
            info=info,
            texts=texts,
            counts=counts,
            producers=file.producers if file.own else [],
            missing=missing,
            verdicts=verdicts,
            lost=lost,
            unknown=unknown,
            span=None,
            notes=notes,
        )
        return part._replace(span=_span(file, part))


def _span(file: DataFile, part: _Part) -> tuple[int, int] | None:
    """Return the times (unix ns) of the first and the last row, as far as they are known. Adds to the part's notes."""
    low, high = [], []
    covered = 0
    if part.own:
        start = int(part.info["started_ns"])
        try:
            for _, blocks in block_pages(file, part.rows):
                covered = int(blocks.first[-1] + blocks.number[-1])
                believed = np.abs(blocks.first_ns - start) < _CREDIBLE * 1e9
                if believed.any():
                    low.append(int(np.min(blocks.first_ns[believed])))
                    high.append(int(np.max(blocks.last_ns[believed])))
        except FileError as error:
            part.notes.append(str(error))
    if covered < part.rows:
        # Rows of a growing file that are in no block yet, and all rows of other programs: first and last board message.
        for begin, end in ((covered, covered + part.unit), (max(covered, part.rows - part.unit), part.rows)):
            try:
                rows = file.packets(begin, min(end, part.rows))
            except FileError:
                continue  # told when the row is counted
            rows, _ = _converted(rows, chip_generation(part.dtype.names or (), part.version), part.own)
            seconds = rows["timestamp"][schema.types_of(rows) == PacketType.TIMESTAMP].astype(np.float64)
            seconds = seconds[(seconds > 0) & (seconds < 1 << 33)]
            if len(seconds):
                low.append(int(seconds.min()) * 10**9)
                high.append((int(seconds.max()) + 1) * 10**9)
    return (min(low), max(high)) if low else None


class _Blocks(NamedTuple):
    """Blocks of a part: first row and number of rows, times (unix ns), producers. Each of shape (n,)."""

    first: NDArray[np.int64]
    number: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    last_ns: NDArray[np.int64]
    producer: NDArray[np.intp]


def block_pages(file: DataFile, rows: int, place: int = 0) -> Iterator[tuple[int, _Blocks]]:
    """Read /run/blocks in pages from row `place` of it on, as far as there are `rows` rows: place and blocks of each.

    FileError if a block overlaps with another one, or has no producer.
    """
    expected = 0
    for start in range(place, file.length("run/blocks"), _PAGE):
        table = file.table("run/blocks", start, start + _PAGE)
        table = table[(table["rows"] > 0) & (table["first_row"] < rows)]
        if not len(table):
            continue
        first, count = table["first_row"].astype(np.int64), table["rows"].astype(np.int64)
        ends = np.concatenate(([expected], first + count))
        if (first < ends[:-1]).any() or int(table["producer"].max()) >= len(file.producers):
            raise FileError(f"{file.path}: /run/blocks: blocks overlap, or have no producer; times are not known")
        expected = int(ends[-1])
        first_ns = table["first_ns"].astype(np.int64)
        last_ns = np.maximum(table["last_ns"].astype(np.int64), first_ns)
        producer = table["producer"].astype(np.intp)
        yield start, _Blocks(first, np.minimum(count, rows - first), first_ns, last_ns, producer)


def _check_one_run(parts: list[_Part]) -> None:
    """FileError if the parts are of several runs, or some of another program, or of other columns."""
    first = parts[0]
    runs = sorted({int(part.info["run"]) for part in parts if part.own})
    if len(runs) > 1:
        raise FileError(f"files of runs {', '.join(map(str, runs))}: expected those of one run")
    storages = sorted({(part.texts.get("storage") or [""])[-1] for part in parts if part.own})
    if len(storages) > 1:
        raise FileError(f"files of the storages {', '.join(storages)}, which are copies: expected those of one")
    for part in parts[1:]:
        if not part.own or not first.own:
            other = first if part.own else part
            raise FileError(f"{other.path}: not written by larpix-daq, so it can only be looked at alone")
        if part.path == first.path or part.dtype != first.dtype:
            what = "given twice" if part.path == first.path else f"has other columns than {first.path}"
            raise FileError(f"{part.path}: {what}")


def _describe_run(summary: RunSummary, parts: list[_Part]) -> None:
    """Fill in the run, its condition, and what the ledger says."""
    summary.notes += [note for part in parts for note in part.notes]
    if not summary.own:
        return
    info = parts[0].info
    texts = parts[-1].texts
    summary.run = int(info["run"])
    summary.kind, summary.comment = ((texts.get(name) or [""])[-1] for name in ("kind", "comment"))
    begun = [int(part.info["begun_ns"]) for part in parts if part.info["begun_ns"]]
    summary.begun = min(begun) / 1e9 if begun else None
    summary.ended = int(parts[-1].info["ended_ns"]) / 1e9 or None
    conditions = [part.info["condition"] for part in parts]
    open_parts = [part.path for part in parts if part.info["condition"] == RunCondition.RUNNING]
    dead = [path for path in open_parts if not (path.name.endswith(names.PART) and may_be_written(path))]
    if dead:
        summary.condition = RunCondition.INTERRUPTED
        summary.reasons = [f"{path.name}: its storage died: larpixdaq recover finishes it" for path in dead]
    elif open_parts:
        summary.condition = RunCondition.RUNNING
    elif len(parts) == 1:
        summary.condition = conditions[0]
        summary.reasons = texts.get("reason", [])
    else:
        report = judge_run(summary.run, [part.path for part in parts], whole=False)
        summary.condition, summary.reasons = str(report.condition), report.reasons
    numbers = [part.number for part in parts]
    if len(set(numbers)) < len(numbers):
        summary.notes.append("several parts have the same number: blocks that are in two of them are counted twice")
    elif numbers != list(range(len(numbers))):
        summary.notes.append(f"only part {', '.join(map(str, numbers))} of the run: others were not given")
    if summary.condition == RunCondition.CONTINUED:
        summary.notes.append("the run continues in further parts, which were not given")
    summary.verdicts = list(dict.fromkeys(line for part in parts for line in part.verdicts))
    for part in parts:
        for reason, number in part.unknown.items():
            summary.unknown_words[reason] = summary.unknown_words.get(reason, 0) + number
    summary.losses = _losses(parts)


def _losses(parts: list[_Part]) -> list[Loss]:
    counts = _ledger(parts)
    losses = [
        Loss(place, name.replace("_", " "), unit, group, int(line[name]))
        for name, unit, place in _LEDGER_PLACES
        for group, line in sorted(counts.items())
        if line[name]
    ]
    if missing := sum(part.missing for part in parts):
        losses.append(Loss("between producer and storage", "missing blocks", "rows", None, missing))
    lost: dict[int, int] = {}
    for group, number in dict.fromkeys(pair for part in parts for pair in part.lost):
        lost[group] = lost.get(group, 0) + number
    return [Loss("board and network", "lost", "packets", group, lost[group]) for group in sorted(lost)] + losses


def _ledger(parts: list[_Part]) -> dict[int, dict[str, int]]:
    """Add up the counters of each io_group: those of the end record of an origin, or else of its parts.

    `stored` is the sum of all parts. `open`: number of lines without end record that were added.
    """
    lines = [line for part in parts for line in part.counts]
    ended = {_origin(line) for line in lines if line["how"] != OPEN}
    sums: dict[int, dict[str, int]] = {}
    for line in lines:
        total = sums.setdefault(line["io_group"], dict.fromkeys(("open", "owed", *COUNTS), 0))
        total["stored"] += int(line["stored"])
        if line["how"] == OPEN and _origin(line) in ended:
            continue
        total["open"] += line["how"] == OPEN
        for name in ("owed", *COUNTS):
            total[name] += int(line[name]) if name != "stored" else 0
    return sums


def _holds_all(line: dict[str, int]) -> bool:
    """Whether all rows that these counters of an io_group know are stored in the files that they are from."""
    if line["dropped"] or line["owed"]:
        return False
    return bool(line["open"]) or rows_made(line) == line["stored"]


def _origin(line: dict[str, Any]) -> tuple[str, int, int]:
    return line["producer"], line["epoch"], line["io_group"]


class _Reading:
    """Reads the rows of all parts, or a sample, and fills in a summary."""

    def __init__(self, summary: RunSummary, parts: list[_Part], budget: int, bins: int) -> None:
        self._summary = summary
        self._parts = parts
        self._asic = chip_generation(parts[0].dtype.names or (), parts[0].version)
        self._counters = PacketCounters(0)
        self._clocks = BoardClocks(_CHIP_BITS[self._asic])
        self._producers = {name: i for i, name in enumerate(dict.fromkeys(n for p in parts for n in p.producers))}
        total = sum(part.rows / part.unit * part.cost for part in parts)
        self._fraction = min(1.0, budget / total) if total else 1.0
        self._units = [_chosen_units(part, self._fraction) for part in parts]
        self._set_bins(bins)
        self._chip_of = np.zeros(1 << 24, np.int32)  # chip, as of schema.chips_of() -> 1 + index; only used pages exist
        self._sums = np.zeros((3, 0))  # number of ADC values, their sum and that of their squares, by chip and channel
        self._waiting: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []
        self._before = np.zeros((0, 64), np.uint32)
        self._active = np.zeros((0, 64), np.uint64)
        self._stretch = 0
        self._stretch_data = np.zeros((STRETCHES, IO_GROUPS), np.uint64)
        self._notes = 0
        self._unreadable = self._impossible = self._untimed = 0

    def _set_bins(self, bins: int) -> None:
        summary = self._summary
        spans = [part.span for part in self._parts if part.span is not None]
        self._base = min((low for low, _ in spans), default=0)  # unix ns
        self._length = (max((high for _, high in spans), default=0) - self._base) / 1e9  # seconds
        producers = max(1, len(self._producers))
        if not spans or not sum(part.rows for part in self._parts):
            self._width, n = 1.0, 0
        else:
            width = _MIN_WIDTH if summary.own else 1.0
            most = bins if self._fraction == 1.0 else min(bins, max(1, sum(map(len, self._units)) // 2))
            n = int(min(max(self._length / width, 1), most))
            self._length = max(self._length, 1e-3)
            self._width = self._length / n
            summary.start, summary.end = self._base / 1e9, self._base / 1e9 + self._length
            summary.edges = np.linspace(summary.start, summary.end, n + 1)
        self._rows = np.zeros((producers, n))  # all rows in blocks, by producer and bin
        self._rows_read = np.zeros((producers, n))
        # Packets, those with bad parity, data packets, and those with a full FIFO, by producer and io_group, and bin.
        self._pairs: dict[int, int] = {}
        self._counted = np.zeros((4, 0, n))

    def read(self) -> None:
        before = 0
        for part, units in zip(self._parts, self._units, strict=True):
            with _open(part.path) as file:
                times = _RowTimes(file, part, self._base, [self._producers[name] for name in part.producers])
                times.count_rows(self._rows, self._width)
                joined = False
                last = -1
                for (start, stop), rows in in_order(partial(_read_unit, file), units):
                    joined = joined and start == last
                    last = stop
                    if isinstance(rows, FileError):
                        self._unreadable += stop - start
                        self._note(str(rows))
                        joined = False
                        continue
                    self._summary.rows_read += len(rows)
                    for first in range(0, len(rows), _SLICE_ROWS):
                        piece = rows[first : first + _SLICE_ROWS]
                        self._take(piece, start + first, times, before + start + first, joined)
                        joined = True
            before += part.rows
        self._finish()

    def _note(self, line: str) -> None:
        self._notes += 1
        if self._notes <= _MAX_NOTES:
            self._summary.notes.append(line)

    def _take(self, given: NDArray[Any], first: int, times: _RowTimes, row: int, joined: bool) -> None:
        """Count rows that begin at row `first` of their file, and at `row` of all files."""
        rows, impossible = _converted(given, self._asic, self._summary.own)
        self._impossible += impossible
        seconds, producers = times.at(first, rows)
        chips = _chips(rows)
        groups = np.maximum(chips >> 16, 0)
        packets = (schema.types_of(rows) <= PacketType.CONFIG_READ) & (rows["direction"] == 1) & (chips >= 0)
        self._clocks.add(rows, groups, packets, seconds + self._base / 1e9, joined)
        self._count_in_time(rows, groups, packets, seconds, producers)
        total, start = self._summary.rows, 0
        while start < len(rows):
            stretch = (row + start) * STRETCHES // total
            stop = min(len(rows), -(-(stretch + 1) * total // STRETCHES) - row)
            own = slice(start, stop)
            self._count_channels(rows[own], chips[own], packets[own], stretch, seconds[own])
            start = stop

    def _count_in_time(
        self,
        rows: NDArray[Any],
        groups: NDArray[np.intp],
        packets: NDArray[np.bool_],
        seconds: NDArray[np.float64],
        producers: NDArray[np.intp],
    ) -> None:
        n = self._rows.shape[1]
        if not n:
            self._untimed += len(rows)
            return
        known = np.isfinite(seconds)
        bins = np.zeros(len(rows), np.intp)
        bins[known] = np.floor(seconds[known] / self._width).astype(np.intp)
        known &= (bins >= 0) & (bins <= n)
        bins = np.minimum(bins, n - 1)
        self._untimed += len(rows) - int(np.count_nonzero(known))
        counted = np.bincount((producers * n + bins)[known], minlength=self._rows_read.size)
        self._rows_read += counted.reshape(self._rows_read.shape)
        v1 = "type" in (rows.dtype.names or ())
        data = schema.types_of(rows) == (PacketType.TEST if self._asic == Asic.V3 else PacketType.DATA)
        full = rows["fifo_full"] if v1 else (rows["local_fifo"] | rows["shared_fifo"]) & 2
        chosen = np.flatnonzero(packets & known)
        codes = producers[chosen] * IO_GROUPS + groups[chosen]
        pairs = self._pair_indices(codes) * n + bins[chosen]
        size = self._counted[0].size
        bad = rows["valid_parity"][chosen] == 0
        is_data = data[chosen]
        for i, mask in enumerate((None, bad, is_data, is_data & (full[chosen] != 0))):
            counts = np.bincount(pairs if mask is None else pairs[mask], minlength=size)
            self._counted[i] += counts.reshape(self._counted[i].shape)

    def _pair_indices(self, codes: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the index of each producer * 256 + io_group in `_counted`, which grows with new ones."""
        found, inverse = np.unique(codes, return_inverse=True)
        for code in found.tolist():
            self._pairs.setdefault(code, len(self._pairs))
        if (new := len(self._pairs) - self._counted.shape[1]) > 0:
            added = np.zeros((len(self._counted), new, self._counted.shape[2]))
            self._counted = np.concatenate((self._counted, added), axis=1)
        return np.array([self._pairs[code] for code in found.tolist()], np.intp)[inverse]

    def _count_channels(
        self,
        rows: NDArray[Any],
        chips: NDArray[np.intp],
        packets: NDArray[np.bool_],
        stretch: int,
        seconds: NDArray[np.float64],
    ) -> None:
        if stretch != self._stretch:
            self._end_stretch()
            self._stretch = stretch
        times = self._summary.stretch_times
        if math.isnan(times[stretch]) and np.isfinite(seconds).any():
            times[stretch] = self._base / 1e9 + float(seconds[np.isfinite(seconds)][0])
        self._counters.count(rows)
        v1 = "type" in (rows.dtype.names or ())
        data = schema.types_of(rows) == (PacketType.TEST if self._asic == Asic.V3 else PacketType.DATA)
        data &= packets
        self._stretch_data[stretch] += np.bincount(chips[data] >> 16, minlength=IO_GROUPS).astype(np.uint64)
        chosen = data & (rows["valid_parity"] != 0)
        if self._asic == Asic.V3:
            chosen &= rows["reset_sample_flag"] == 0
        rows, keys = rows[chosen], chips[chosen]
        channels = rows["channel" if v1 else "channel_id"].astype(np.intp)
        values = rows["adc_counts" if v1 else "dataword"].astype(np.float64)
        n_channels = 128 if v1 else 64
        placed = (channels < n_channels) & (values < _MAX_ADC[self._asic])
        if not placed.all():
            keys, channels, values = keys[placed], channels[placed], values[placed]
        index = self._chip_of[keys]
        if (index == 0).any():
            all_chips = schema.chips_of(self._counters.chips())
            self._chip_of[all_chips] = np.arange(1, len(all_chips) + 1)
            index = self._chip_of[keys]
            found = index > 0  # there are more chips than the counters take
            index, channels, values = index[found], channels[found], values[found]
        self._waiting.append(((index - 1) * n_channels + channels, values))
        if sum(len(values) for _, values in self._waiting) >= 4 * _SLICE_ROWS:
            self._add_sums()

    def _add_sums(self) -> None:
        if not self._waiting:
            return
        index, values = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        size = int(index.max()) + 1 if len(index) else 0
        if size > self._sums.shape[1]:
            self._sums = np.concatenate((self._sums, np.zeros((3, size - self._sums.shape[1]))), axis=1)
        for line, weights in zip(self._sums, (None, values, values * values), strict=True):
            line[:size] += np.bincount(index, weights, size)

    def _end_stretch(self) -> None:
        """Note which channels had packets in the stretch that ends."""
        data = self._counters.data()
        if data.shape != self._before.shape:
            before, active = np.zeros(data.shape, np.uint32), np.zeros(data.shape, np.uint64)
            if self._before.size:
                before[: len(self._before)], active[: len(self._active)] = self._before, self._active
            self._before, self._active = before, active
        self._active[data != self._before] |= np.uint64(1 << self._stretch)
        self._before = data

    def _finish(self) -> None:
        summary = self._summary
        self._end_stretch()
        self._add_sums()
        numbers = self._find_io_groups()
        self._find_rates(numbers)
        bins = self._counters.bins
        summary.adc = np.zeros((len(numbers), _MAX_ADC[self._asic]), np.uint64)
        if bins:
            for i, number in enumerate(numbers):
                summary.adc[i] = self._counters.histogram(number)[0]
        self._find_channels()
        summary.stretch_data = self._stretch_data[:, numbers]
        summary.clocks = self._clocks.result()
        if self._notes > _MAX_NOTES:
            summary.notes.append(f"and {self._notes - _MAX_NOTES} more places that cannot be read")
        if self._unreadable:
            summary.losses.append(Loss("file", "rows that cannot be read", "rows", None, self._unreadable))
        if self._impossible:
            summary.notes.append(f"{self._impossible} of the rows read have values that no packet can have")
        if self._counters.unplaced:
            summary.notes.append(f"{self._counters.unplaced} of the rows read are from no possible chip or channel")
        if self._untimed:
            summary.notes.append(f"{self._untimed} of the {summary.rows_read} rows read have no known time")

    def _find_io_groups(self) -> list[int]:
        summary = self._summary
        types = self._counters.types()
        chips = self._counters.chips()
        received = types[:, 1, :4].sum(axis=1)
        ledger = _ledger(self._parts) if summary.own else {}
        boards = types[:, :, PacketType.SYNC] + types[:, :, PacketType.TRIGGER]
        present = set(np.flatnonzero(received + boards.sum(axis=1) + types[:, 0, :4].sum(axis=1)).tolist())
        present |= {group for group, line in ledger.items() if line["packets"]}
        numbers = sorted(present)
        table = summary.io_groups = np.zeros(len(numbers), IO_GROUP)
        table["io_group"] = numbers
        table["seen_packets"] = received[numbers]
        data_type = PacketType.TEST if self._asic == Asic.V3 else PacketType.DATA
        table["seen_data"] = types[numbers, 1, data_type]
        table["seen_config"] = types[numbers, 1, 2] + types[numbers, 1, 3]
        table["seen_sent"] = types[numbers, 0, :4].sum(axis=1)
        table["seen_sync"] = types[numbers, :, PacketType.SYNC].sum(axis=1)
        table["seen_trigger"] = types[numbers, :, PacketType.TRIGGER].sum(axis=1)
        for name in ("bad_parity", "local_half", "local_full", "shared_half", "shared_full"):
            sums = np.bincount(chips["io_group"], chips[name], IO_GROUPS)
            table[f"seen_{name}"] = sums[numbers].astype(np.uint64)
        whole = summary.rows_read == summary.rows
        scale = 1.0 / summary.seen if summary.rows_read else 1.0
        stored = sum(line["stored"] for line in ledger.values()) == summary.rows
        for i, number in enumerate(numbers):
            line = ledger.get(number)
            table["packets"][i] = round(int(table["seen_packets"][i]) * scale)
            table["exact"][i] = whole
            if not whole and stored and line is not None and _holds_all(line):
                table["packets"][i], table["exact"][i] = line["packets"], True
        return numbers

    def _find_rates(self, numbers: list[int]) -> None:
        summary = self._summary
        n = self._rows.shape[1]
        shape = n, len(numbers)
        summary.rates, summary.bad_parity, summary.fifo_full = (np.full(shape, np.nan) for _ in range(3))
        if not n:
            return
        known = self._rows.any(axis=1)  # producers with blocks; rows without blocks count as they were read
        packets = np.zeros(shape)
        parts = np.zeros((3, *shape))
        column = {number: i for i, number in enumerate(numbers)}
        blind = np.zeros(n, np.bool_)
        for code, index in self._pairs.items():
            producer, group = divmod(code, IO_GROUPS)
            counts = self._counted[0, index]
            read, made = self._rows_read[producer], self._rows[producer]
            parts[:, :, column[group]] += self._counted[1:, index]
            if self._fraction == 1.0:
                packets[:, column[group]] += counts
            elif known[producer]:
                seen = read > 0
                share = np.interp(np.arange(n), np.flatnonzero(seen), counts[seen] / read[seen]) if seen.any() else 0.0
                packets[:, column[group]] += share * made
            else:
                packets[:, column[group]] += counts / summary.seen
                blind |= read == 0
        summary.rates = packets / self._width
        if self._fraction < 1.0:
            made = np.flatnonzero(self._rows.any(axis=0))
            if len(made) and made[-1] < n - 1:  # /run/blocks of a growing file ends before its rows
                blind[made[-1] :] = True
            summary.rates[blind] = np.nan
        counted = np.zeros(shape)
        for code, index in self._pairs.items():
            counted[:, column[code % IO_GROUPS]] += self._counted[0, index]
        np.divide(parts[0], counted, out=summary.bad_parity, where=counted > 0)
        np.divide(parts[2], parts[1], out=summary.fifo_full, where=parts[1] > 0)

    def _find_channels(self) -> None:
        summary = self._summary
        chips = self._counters.chips()
        table = np.zeros(len(chips), CHIP)
        for name in CHIP.names or ():
            table[name] = chips[name]
        order = np.argsort(table, order=CHIP.names, kind="stable")
        channels = 128 if self._asic == Asic.V1 else 64
        shape = len(chips), channels
        summary.chips = table[order]
        summary.packets = self._counters.data().astype(np.uint64).reshape(shape)[order]
        summary.active = self._active.reshape(shape)[order]
        sums = np.zeros((3, len(chips) * channels))
        sums[:, : self._sums.shape[1]] = self._sums
        numbers, totals, squares = sums.reshape(3, *shape)[:, order]
        means, variances = (np.full(shape, np.nan) for _ in range(2))
        np.divide(totals, numbers, out=means, where=numbers > 0)
        np.divide(squares, numbers, out=variances, where=numbers > 0)
        summary.mean = means.astype(np.float32)
        summary.std = np.sqrt(np.maximum(variances - means * means, 0.0)).astype(np.float32)


class _RowTimes:
    """Times and producers of the rows of one part: from /run/blocks, or else from the times of board messages."""

    def __init__(self, file: DataFile, part: _Part, base: int, producers: list[int]) -> None:
        """`base`: unix ns from which times count. `producers`: index of each of the part's producers."""
        self._file = file
        self._part = part
        self._base = base
        self._producers = np.array(producers, np.intp)
        self._pages: list[tuple[int, int]] = []  # first row of a page of blocks, and its place in the table
        self._page: tuple[int, _Blocks] | None = None  # the last page used
        self._second = math.nan  # of the last row with a board message's time, and the row after it
        self._next_row = -1

    def count_rows(self, rows: NDArray[np.float64], width: float) -> None:
        """Add the numbers of rows to `rows`, by producer and bin of `width` seconds."""
        if not self._part.own:
            return
        found = np.zeros_like(rows)
        n = rows.shape[1]
        try:
            for place, blocks in block_pages(self._file, self._part.rows):
                self._pages.append((int(blocks.first[0]), place))
                if n:
                    self._add(found, blocks, width, n)
        except FileError:  # told by _span()
            self._pages.clear()
            return
        rows += found

    def _add(self, found: NDArray[np.float64], blocks: _Blocks, width: float, n: int) -> None:
        """Spread the rows of each block evenly over its time."""
        first, last = ((ns - self._base) / 1e9 / width for ns in (blocks.first_ns, blocks.last_ns))
        inside = (last >= 0) & (first <= n)
        first, last = np.clip(first[inside], 0, n), np.clip(last[inside], 0, n)
        count, producer = blocks.number[inside].astype(np.float64), self._producers[blocks.producer[inside]] * n
        bins = np.minimum(first.astype(np.intp), n - 1)
        while len(bins):
            end = np.minimum(bins + 1.0, last)
            span = last - first
            share = np.where(span > 0, (end - np.maximum(bins, first)) / np.where(span > 0, span, 1.0), 1.0)
            found += np.bincount(producer + bins, count * share, found.size).reshape(found.shape)
            more = last > bins + 1
            first, last, count = first[more], last[more], count[more]
            producer, bins = producer[more], bins[more] + 1

    def at(self, start: int, rows: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Return the times (s after the base, NaN if not known) of rows from `start` on, and their producers."""
        seconds = np.full(len(rows), np.nan)
        producers = np.zeros(len(rows), np.intp)
        end = start + len(rows)
        index = max(0, bisect_right(self._pages, (start, 1 << 62)) - 1)
        for first_row, place in self._pages[index:]:
            if first_row >= end:
                break
            self._at_blocks(self._blocks(place), start, end, seconds, producers)
        unknown = np.isnan(seconds)
        if unknown.any():
            seconds[unknown] = self._message_times(rows, start)[unknown]
        return seconds, producers

    def _blocks(self, place: int) -> _Blocks:
        if self._page is None or self._page[0] != place:
            self._page = next(block_pages(self._file, self._part.rows, place))
        return self._page[1]

    def _at_blocks(
        self, blocks: _Blocks, start: int, end: int, seconds: NDArray[np.float64], producers: NDArray[np.intp]
    ) -> None:
        low = max(0, int(np.searchsorted(blocks.first, start, "right")) - 1)
        own = slice(low, int(np.searchsorted(blocks.first, end, "left")))
        first, count = blocks.first[own], blocks.number[own]
        begin = np.clip(first, start, end)
        numbers = np.clip(first + count, start, end) - begin
        which = np.repeat(np.arange(len(numbers)), numbers)
        rows = np.arange(len(which)) + np.repeat(begin - (np.cumsum(numbers) - numbers), numbers)
        fractions = (rows - first[which] + 0.5) / count[which]
        first_ns, length = blocks.first_ns[own], blocks.last_ns[own] - blocks.first_ns[own]
        seconds[rows - start] = ((first_ns - self._base) / 1e9)[which] + fractions * (length / 1e9)[which]
        producers[rows - start] = self._producers[blocks.producer[own]][which]

    def _message_times(self, rows: NDArray[Any], start: int) -> NDArray[np.float64]:
        """Return the times of rows by the board message to which they belong, spread evenly over each second."""
        stamped = schema.types_of(rows) == PacketType.TIMESTAMP
        before = self._second if start == self._next_row else math.nan
        last = np.maximum.accumulate(np.where(stamped, np.arange(len(rows)), -1))
        if stamped.any():
            values = rows["timestamp"].astype(np.float64)
            whole = np.where(last >= 0, values[last], values[np.argmax(stamped)] if math.isnan(before) else before)
        else:
            whole = np.full(len(rows), before)
        self._second, self._next_row = float(whole[-1]), start + len(rows)
        found, which, counts = np.unique(whole, return_inverse=True, return_counts=True)
        ranks = np.empty(len(rows))
        ranks[np.argsort(which, kind="stable")] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        found[~((found > 0) & (found < 1 << 33))] = np.nan
        return np.asarray(found[which] - self._base / 1e9 + (ranks + 0.5) / counts[which], np.float64)


def _read_unit(file: DataFile, unit: tuple[int, int]) -> NDArray[Any] | FileError:
    try:
        return file.packets(*unit)
    except FileError as error:
        return error


def _chosen_units(part: _Part, fraction: float) -> list[tuple[int, int]]:
    """Return the first row, and the row after the last, of the units to read: one of each of equal stretches."""
    units = np.arange(-(-part.rows // part.unit))
    if fraction < 1.0 and len(units):
        wanted = min(len(units), max(1, round(len(units) * fraction)))
        edges = np.linspace(0, len(units), wanted + 1)
        # Always the same units of a file. A place by chance in each stretch, so that no rhythm of the data is followed.
        places = np.random.default_rng(part.number).random(wanted)
        units = np.unique((edges[:-1] + places * np.diff(edges)).astype(np.intp))
    return [(start, min(start + part.unit, part.rows)) for start in (units * part.unit).tolist()]


def _converted(given: NDArray[Any], asic: Asic, own: bool) -> tuple[NDArray[Any], int]:
    """Return rows in a layout of schema.LAYOUTS, and the number of those with values that no packet can have.

    `own`: larpix-daq wrote them, so that their column `direction` is filled.
    """
    if any(given.dtype == layout.dtype for layout in schema.LAYOUTS) and (own or given["direction"].any()):
        return np.ascontiguousarray(given), 0
    rows = np.zeros(len(given), _LAYOUTS[asic].dtype)
    impossible = int(np.count_nonzero(~copy_columns(given, rows)))
    # Conversions of larpix-control leave the direction 0; nobody sends data packets to chips.
    types = schema.types_of(rows)
    received = types == (PacketType.TEST if asic == Asic.V3 else PacketType.DATA)
    if asic == Asic.V1:
        received |= "direction" not in (given.dtype.names or ()) and types <= PacketType.CONFIG_READ
    else:
        received |= (types <= PacketType.CONFIG_READ) & (rows["receipt_timestamp"] > 0)
    rows["direction"][received] = 1
    return rows, impossible


def _chips(rows: NDArray[Any]) -> NDArray[np.intp]:
    """Return io_group << 16 | io_channel << 8 | chip_id, as of schema.chips_of(), -1 for impossible chip_keys."""
    if "io_group" in (rows.dtype.names or ()):
        return schema.chips_of(rows)
    texts, inverse = np.unique(rows["chip_key"], return_inverse=True)
    places = np.full(len(texts), -1, np.intp)
    for i, text in enumerate(texts.tolist()):
        parts = text.split(b"-")
        if len(parts) > 2 and all(part.isdigit() and len(part) < 4 and int(part) < 256 for part in parts[:2]):
            places[i] = int(parts[0]) << 16 | int(parts[1]) << 8
    places = places[inverse.reshape(-1)]
    return np.asarray(np.where(places < 0, -1, places | rows["chipid"]), np.intp)
