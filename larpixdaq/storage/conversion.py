"""Convert one recording into a file of the current layout: a raw file, a log of board messages, a packet file.

A recording goes through the decoders of live boards, as in a replay (sources/replay.py), into blocks of a RunFile. So a
converted file has a ledger that balances, and `larpixdaq verify` checks it like any other. /run/texts says what it was
made from (layout.CONVERTED), with size, time and SHA-256 of the recording.

A file is written as NAME.converted.h5.part and gets its name when it is complete and on the disk. What a killed
conversion has left is removed when the same recording is converted again. Nothing is overwritten.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import hdf5_chunks, word_codec
from larpixdaq._native.decoders import PacmanDecoder
from larpixdaq.buffer.block_builder import info_rows
from larpixdaq.constants import BLOCK_ROWS, COUNTS, IO_GROUPS, LAST_RUN, Count, RunCondition, unusable
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.hdf5 import layout, names, verify
from larpixdaq.hdf5.journal import Journal
from larpixdaq.hdf5.new_file import check_room
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recordings import MessageLog, PacketFile, RawFile, open_recording
from larpixdaq.hdf5.tables import VERSIONS, CarriedConfigurations, RunInfo
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import Block, BlockOrigin, ConnectedBoard, End, LossVerdict, UnknownWord
from larpixdaq.runtime.file_access import check_link
from larpixdaq.runtime.record_file import crc32
from larpixdaq.runtime.units import utc
from larpixdaq.schema import ASICS, NOTICES, PACKETS_2_4_CLOCK64, SPAN, Asic, PacketType, RowLayout, types_of
from larpixdaq.sources.replay import Recording, ReplaySource
from larpixdaq.version import VERSION

#: Ending of a converted file, behind the name of its recording without its own ending.
ENDING: Final = ".converted.h5"
#: Endings of recordings that are left out of that name, and by which recordings in a directory are found.
RECORDINGS: Final = (".h5", ".hdf5")
PRODUCER: Final = "larpixdaq convert"
#: Seconds between two reports of progress, looks at the disk, and looks for wrong options.
_INTERVAL: Final = 0.2
#: Bytes of a recording that are read at once for its checksum.
_DIGEST_BYTES: Final = 1 << 20
_LAST_NS: Final = 2**63 - 1
#: The options that contradict what a decoder notices (schema.NOTICES).
_ADVICE: Final = {
    "as_v1": ("packets like those of v1 chips", "--asic 1"),
    "as_v3": ("packets of type 1, data of v3 chips", "--asic 3"),
    "clock64": ("words from firmware with a 64-bit clock", "--clock64"),
    "cut": ("receipt timestamps of more than 32 bits", "--clock64"),
}
#: The newest version of each kind of file.
_NEWEST: Final[dict[type, tuple[int, int]]] = {RawFile: (0, 0), PacketFile: (3, 0)}
#: Messages and rows at the beginning of a recording that show the generation of its chips; fewest words that show it.
_TRIAL: Final = 4096
_FEWEST_V3: Final = 8
_FEWEST_V1: Final = 64
_ASIC_NAMES: Final = {Asic.V1: "1", Asic.V2: "2", Asic.V2_DIAGNOSTICS: "2", Asic.V3: "3"}


class Options(msgspec.Struct, frozen=True):
    """How recordings are converted. `asic`, `clock64`: None: by the recording, and v2 and no where it does not tell."""

    asic: str | None = None
    clock64: bool | None = None
    diagnostics: bool = False
    io_group: int = 1  # of recordings without io_groups
    damaged: bool = False  # convert what can be read of damaged recordings
    verify: bool = False  # read the new file, and check it, before it gets its name
    threads: int = 1  # those that pack chunks
    lock_dir: str | None = None
    state_dir: str | None = None


class Progress(msgspec.Struct, tag=1):
    fraction: float
    words: int


class Report(msgspec.Struct, tag=2):
    """What became of one recording. `ok`: the new file has all of it."""

    source: str
    text: str
    ok: bool = False
    file: str | None = None
    skipped: bool = False  # a file of the current layout, found in a directory
    made: bool = False  # now, and not found
    words: int = 0  # in the new file, as the next four
    rows: int = 0
    messages: int = 0
    bytes: int = 0
    condition: str = ""
    notes: list[str] = []


class Chips(NamedTuple):
    """What must be known of a recording before its rows can be made."""

    asic: Asic
    name: str  # of the generation, as --asic and /configs have it
    clock64: bool
    chosen: bool  # by the user


def target_of(source: Path, directory: Path | None = None) -> Path:
    """Return the path of the converted file of a recording."""
    ending = next((ending for ending in RECORDINGS if source.name.lower().endswith(ending)), "")
    return (directory or source.parent) / (source.name[: len(source.name) - len(ending)] + ENDING)


def convert(
    source: Path, directory: Path | None, options: Options, report: Callable[[Progress], None] = lambda _: None
) -> Report:
    """Convert one recording, completely or not at all. `directory`: that of the new file, None: that of the recording.

    `report` is called about every _INTERVAL seconds. ConfigError when an option is missing, or FileError, in one line,
    when the recording cannot be converted. A recording that was converted into this place already is not read again.
    """
    check_link(source)
    status = _status(source)
    if source.name.endswith(names.PART):
        raise FileError(f"{source}: is the unfinished file of a storage: larpixdaq recover finishes it")
    final = target_of(source, directory)
    if not final.parent.is_dir():
        raise FileError(f"{final.parent}: there is no such directory")
    if os.path.lexists(final):
        return _existing(source, status, final)
    recording = open_recording(source) or MessageLog(source)
    try:
        if isinstance(recording, PacketFile) and recording.own:
            raise OwnFile(f"{source}: has the current layout already, because larpix-daq wrote it")
        _check_version(recording)
        chips = _chips(recording, options)
        if isinstance(recording, PacketFile):
            asic_name, configurations = recording.configurations()
            chips = chips._replace(name=asic_name or chips.name)
        else:
            configurations = None
        description = {"format": recording.version, **recording.description()}
    finally:
        recording.close()
    remove_unfinished(final)
    with _Conversion(source, final, status, chips, description, options, report) as conversion:
        return conversion.run(configurations)


class OwnFile(FileError):
    """A file that needs no conversion."""


def _status(source: Path) -> os.stat_result:
    try:
        status = source.stat()
    except OSError as error:
        raise FileError(f"cannot open {source}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{source}: is not a file")
    return status


def _existing(source: Path, status: os.stat_result, final: Path) -> Report:
    """Report the finished file of an earlier conversion. FileError when another file has the name."""
    with DataFile(final) as file:
        texts = {name: values[-1] for name, values in file.texts().items()} if file.own else {}
        if layout.CONVERTED not in texts:
            raise FileError(f"{final}: exists, and is no converted file; it is not overwritten")
        same = texts.get("source bytes") == str(status.st_size)
        if same and texts.get("source modified ns") != str(status.st_mtime_ns):
            digest = _Digest(source)
            digest.start()
            same = digest.result() == texts.get("source sha256")
        if not same:
            raise FileError(
                f"{final}: exists, and was made from {texts[layout.CONVERTED]} of {texts.get('source bytes')} bytes,"
                f" not from {source} of {status.st_size} bytes as it is now; it is not overwritten"
            )
        info, counts = file.run_info(), file.table("ledger/counts")
        words, messages = (
            int(sum(counts[name].sum() for name in kinds)) for kinds in (("word_rows", "sent_rows"), ("time_rows",))
        )
        return Report(
            str(source),
            f"{final}: was there already, {words} words, {info['rows']} rows, {info['condition']}",
            ok=info["condition"] in verify.GOOD,
            file=str(final),
            words=words,
            rows=int(info["rows"]),
            messages=messages,
            bytes=final.stat().st_size,
            condition=str(info["condition"]),
        )


def _check_version(recording: Recording) -> None:
    """FileError when a file has a version that did not exist when this program was written."""
    version = recording.version_number
    if version is not None and version > (newest := _NEWEST[type(recording)]):
        expected = ".".join(map(str, newest))
        raise FileError(f"{recording.path}: {recording.version}, the newest that is known is {expected}")


def _chips(recording: Recording, options: Options) -> Chips:
    """Determine the chips and the clock of a recording."""
    asic = ASICS[options.asic] if options.asic is not None else Asic.V2
    diagnostics = options.diagnostics
    clock64 = bool(options.clock64)
    if isinstance(recording, PacketFile):
        if options.asic is not None and asic != recording.asic:
            found = _ASIC_NAMES[recording.asic]
            raise ConfigError(f"{recording.path}: has packets of v{found} chips, asked for was --asic {options.asic}")
        asic, diagnostics, clock64 = recording.asic, bool(recording.diagnostics()), recording.wide or clock64
    elif options.asic is None and (name := _generation(recording)):
        found, option = _ADVICE[name]
        raise ConfigError(f"{recording.path}: has {found}: give {option} (or --asic 2, to convert it as it is)")
    if diagnostics and asic == Asic.V2:
        asic = Asic.V2_DIAGNOSTICS
    return Chips(asic, options.asic or _ASIC_NAMES[asic], clock64, options.asic is not None)


def _generation(recording: RawFile | MessageLog) -> str:
    """Return the option without which the first words of a recording would be taken for those of v2 chips, or ""."""
    pieces: Iterator[tuple[Any, ...]] = recording.pieces(1) if isinstance(recording, RawFile) else recording.pieces()
    data, spans, *_ = next(pieces, (np.zeros(0, np.uint8), np.zeros(0, SPAN)))
    decoder = PacmanDecoder(1, int(Asic.V2))
    decoder.start(np.zeros(len(Count), np.uint64))
    decoder.feed(data, spans[:_TRIAL])
    rows = np.zeros(_TRIAL, PACKETS_2_4_CLOCK64)
    rows = rows[: decoder.decode(rows)]
    words = word_codec.encode(rows[types_of(rows) < PacketType.TIMESTAMP], asic=int(Asic.V2))
    zeros, ones = (int(np.count_nonzero(words & np.uint64(3) == kind)) for kind in (0, 1))
    if ones >= _FEWEST_V3 and ones > len(words) / 2 and ones > 8 * zeros:
        return "as_v3"
    # A v1 word has 54 bits, a v2 word has its parity in bit 63.
    return "as_v1" if zeros >= _FEWEST_V1 and zeros > len(words) / 2 and not (words >> np.uint64(54)).any() else ""


def remove_unfinished(final: Path) -> None:
    """Remove what a killed conversion has left. FileLocked when another process makes this file."""
    stem = final.name.removesuffix(names.FINISHED)
    part, journal_path = final.with_name(stem + names.PART), final.with_name(stem + names.JOURNAL)
    if os.path.lexists(part) or os.path.lexists(journal_path):
        journal = Journal(journal_path, recovery=True)
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"cannot remove {part}: {error.strerror}") from None
        finally:
            journal.close(remove=True)


class _Source(ReplaySource):
    """A replay of one recording that also tells which option it contradicts."""

    @property
    def recording(self) -> Recording:
        return self.recordings[0]

    def contradiction(self) -> str:
        """Return what was found in the messages so far, and the missing option; "" if nothing contradicts the options.

        The decoders take a sample of each piece that they decode, so that it takes a million words to be found.
        """
        for io_group in self.io_groups:
            noticed = self._noticed(io_group)
            for name, (found, option) in _ADVICE.items():
                if noticed["events"][NOTICES.index(name)]:
                    return f"io_group {io_group} has {found}: give {option}"
        return ""


class _Digest(threading.Thread):
    """SHA-256 of a file, computed in a thread while the file is converted."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="digest", daemon=True)
        self._path = path
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self.stopped = False

    def run(self) -> None:
        buffer = bytearray(_DIGEST_BYTES)
        try:
            with open(self._path, "rb", buffering=0) as file:
                while not self.stopped and (n := file.readinto(buffer)):
                    self._digest.update(memoryview(buffer)[:n])
        except OSError as error:
            self._error = error

    def result(self) -> str:
        """Wait for the end of the file; return the hexadecimal digits. FileError when it cannot be read."""
        self.join()
        if self._error is not None:
            raise FileError(f"cannot read {self._path}: {self._error.strerror}")
        return self._digest.hexdigest()


class _Conversion:
    """The conversion of one recording. The new file is removed when the context ends before the file has its name."""

    def __init__(
        self,
        source: Path,
        final: Path,
        status: os.stat_result,
        chips: Chips,
        description: dict[str, str],
        options: Options,
        report: Callable[[Progress], None],
    ) -> None:
        self._source_path, self._final = source, final
        self._status = status
        self._chips, self._description = chips, description
        self._options = options
        self._report = report
        self._next = 0.0
        self._problems: list[str] = []  # data that are not in the new file, one line each
        #: Facts that are no fault, one line each.
        self._notes: list[str] = []
        self._file: RunFile | None = None
        self._digest = _Digest(source)
        self._source = _Source([(options.io_group, source)], asic=chips.asic, clock64=chips.clock64, speed=float("inf"))

    def __enter__(self) -> _Conversion:
        return self

    def __exit__(self, *error: object) -> None:
        self._digest.stopped = True
        self._source.close()
        if self._file is not None:
            self._file.remove()

    def run(self, configurations: NDArray[Any] | None) -> Report:
        self._source.open()
        counts = np.zeros((IO_GROUPS, len(Count)), np.uint64)
        self._source.start(counts)
        file = self._open_file(configurations)
        recording = self._source.recording
        if isinstance(recording, PacketFile) and (columns := ", ".join(recording.unknown_columns)):
            self._notes.append(f"{self._source_path}: no place for the columns {columns}, which are left out")
        self._digest.start()
        blocks = _Blocks(file, self._origin, self._source.layout, counts)
        while self._source.read():
            for text, seconds in self._source.texts():
                blocks.add_text(text, seconds)
            blocks.fill(self._source)
            self._take_problems()
            if time.monotonic() >= self._next:
                self._look()
        self._take_problems()
        self._look()
        return self._finish(blocks, counts)

    def _open_file(self, configurations: NDArray[Any] | None) -> RunFile:
        """Create the new file. Configurations of the chips become those with which the file begins."""
        run, part = _run_of(self._description)
        self._origin = BlockOrigin(run, PRODUCER, secrets.randbits(63))
        carried, positions = CarriedConfigurations(np.zeros(0, layout.CONFIGS), []), {}
        if configurations is not None and len(configurations):
            configurations["epoch"] = self._origin.epoch
            carried, positions = CarriedConfigurations(configurations, [PRODUCER]), {self._origin: 0}
        created = _number(self._description.get("created", ""))
        info = RunInfo(
            run,
            self._description.get("data_stream", ""),
            "",
            "",
            int(created * 1e9) if 0 < created < _LAST_NS / 1e9 else 0,
            self._source.layout,
            self._chips.name,
            versions={"larpix-daq convert": VERSION, "numpy": np.__version__, "Python": platform.python_version()}
            | VERSIONS,
        )
        self._file = RunFile(
            self._final.parent,
            info,
            part,
            positions,
            threads=self._options.threads,
            configurations=carried,
            stem=self._final.name.removesuffix(names.FINISHED),
        )
        return self._file

    def _take_problems(self) -> None:
        """Note data that cannot be read. FileError unless damaged recordings are to be converted."""
        for line in self._source.problems():
            if isinstance(self._source.recording, PacketFile) and line.endswith("without a text in /messages"):
                self._notes.append(line)
            else:
                self._add_problem(line)

    def _add_problem(self, line: str) -> None:
        if not self._options.damaged:
            self._check_unchanged()  # which may be the reason
            line = line.removesuffix("; the rest of this file is left out").removesuffix("; what follows is left out")
            raise FileError(f"{line}: not converted (--damaged converts what can be read)")
        self._problems.append(line)

    def _look(self) -> None:
        """Report progress, and look for wrong options and at the disk."""
        self._next = time.monotonic() + _INTERVAL
        contents = self._source.recording.contents
        self._report(Progress(contents.fraction, contents.words))
        check_room(self._final.parent)
        chosen = self._chips.chosen or self._options.clock64 is not None
        if not (chosen or isinstance(self._source.recording, PacketFile)) and (found := self._source.contradiction()):
            raise ConfigError(f"{self._source_path}: {found} (or --asic 2, to convert it as it is)")

    def _finish(self, blocks: _Blocks, counts: NDArray[np.uint64]) -> Report:
        """End the file, compare the counts of both sides, and give the file its name."""
        file = self._file
        assert file is not None
        groups = np.flatnonzero(counts[:, : Count.INFO_ROWS].any(axis=1) | (counts[:, Count.SENT_ROWS] > 0)).tolist()
        for group in groups:
            if why := unusable(dict(zip(COUNTS, counts[group].tolist(), strict=True))):
                self._add_problem(f"{self._source_path}: io_group {group}: {why}")
        self._source.io_groups = tuple(groups)
        blocks.end(self._source)
        boards = [
            ConnectedBoard(PRODUCER, group, "recording", str(self._source_path.absolute())[:256], platform.node()[:256])
            for group in groups
        ]
        file.set_sources(boards)
        for line in self._problems:
            file.note_damage(line)
        rows = dict(zip(hdf5_chunks.TALLY, file.tally().tolist(), strict=True))
        text = self._compare(rows, file.rows, counts)
        digest = self._digest.result()
        self._check_unchanged()
        facts = self._provenance(digest, text)
        closed = file.seal(texts=facts)
        if self._options.verify:
            checked = verify.verify(file.path)
            if faults := [line for line in checked.findings if line not in checked.open]:
                raise FileError(f"{file.path}: was not written rightly: {faults[0]}")
        file.publish()
        self._file = None
        lines = [*self._problems, *self._notes]
        shown = [text, *lines] if closed.condition == RunCondition.COMPLETE else [text, closed.condition, *lines]
        return Report(
            str(self._source_path),
            f"{self._final}: {'; '.join(shown)}",
            ok=not self._problems,
            file=str(self._final),
            made=True,
            words=rows["word_rows"] + rows["sent_rows"],
            rows=closed.rows,
            messages=rows["time_rows"],
            bytes=self._final.stat().st_size,
            condition=closed.condition,
            notes=[*lines, *(line for line in closed.reasons if line not in lines)],
        )

    def _compare(self, rows: dict[str, int], stored_rows: int, counts: NDArray[np.uint64]) -> str:
        """Compare what was in the recording, what was decoded, and what is in the new file. FileError if they differ.

        Returns one line with the numbers.
        """
        total = dict(zip(COUNTS, counts.sum(axis=0).tolist(), strict=True))
        contents = self._source.recording.contents
        refused = total["unknown_words"] + total["rejected_words"]
        pairs = [
            ("rows in the new file", stored_rows, "rows were counted", sum(rows[name] for name in _ROW_KINDS)),
            *((f"{name} in the new file", rows[name], "were decoded", total[name]) for name in _ROW_KINDS),
        ]
        if isinstance(self._source.recording, PacketFile):
            stored = rows["word_rows"] + rows["sent_rows"] + rows["time_rows"]
            given = contents.words + contents.messages - contents.left_out
            pairs.append(("rows of words and messages in the new file", stored, "in the recording", given))
            text = f"{contents.words} words of {contents.words + contents.messages + contents.info} rows"
        else:
            pairs.append(("bytes decoded", total["bytes_in"], "in the recording", contents.bytes))
            words = total["words_in"] if contents.unclear else contents.words
            pairs.append(("words decoded", total["words_in"], "in the recording", words))
            pairs.append(("words in the new file or refused", rows["word_rows"] + refused, "decoded", words))
            if total["words_in"] < contents.words:
                pairs.append(("words decoded", total["words_in"], "in the recording", contents.words))
            text = f"{words} words of {contents.messages} messages"
        for what, found, other, expected in pairs:
            if found != expected:
                raise FileError(f"{self._source_path}: {found} {what}, {expected} {other}: not converted")
        stored = rows["word_rows"] + rows["sent_rows"]
        text += f", {stored} in the new file, {stored_rows} rows"
        if refused:
            text += f"; {refused} words could not be decoded"
        if total["rejected_messages"]:
            text += f"; {total['rejected_messages']} messages could not be decoded"
        return text

    def _check_unchanged(self) -> None:
        now, then = _status(self._source_path), self._status
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (then.st_ino, then.st_size, then.st_mtime_ns):
            raise FileError(
                f"{self._source_path}: was written to while it was converted ({then.st_size} bytes before, now"
                f" {now.st_size}): convert it when it is finished"
            )

    def _provenance(self, digest: str, counted: str) -> dict[str, str]:
        """Return the texts that say what the file was made from, and how."""
        facts = {
            layout.CONVERTED: str(self._source_path.absolute()),
            "source bytes": str(self._status.st_size),
            "source modified": utc(self._status.st_mtime),
            "source modified ns": str(self._status.st_mtime_ns),
            "source sha256": digest,
            **{f"source {name}": value for name, value in self._description.items()},
            "converter": f"larpix-daq {VERSION}",
            "converted as": f"--asic {self._chips.name}"
            + (" --fifo-diagnostics" if self._chips.asic == Asic.V2_DIAGNOSTICS else "")
            + (" --clock64" if self._chips.clock64 else ""),
            "counted": counted,
        }
        return facts | ({"notes": "; ".join(self._notes)} if self._notes else {})


#: Kinds of rows that have counters of the same names in the ledger.
_ROW_KINDS: Final = ("word_rows", "time_rows", "info_rows", "sent_rows")


class _Blocks:
    """Makes the blocks of a recording, of as many rows as a chunk of the file has unless a text comes between.

    The times of a block are those of the headers in it, in unix ns; those of a block without any are the last known.
    """

    def __init__(self, file: RunFile, origin: BlockOrigin, row_layout: RowLayout, counts: NDArray[np.uint64]) -> None:
        self._file = file
        self._origin = origin
        self._layout = row_layout
        self._counts = counts
        self._rows = np.zeros(BLOCK_ROWS, row_layout.dtype)
        self._used = 0
        self._sequence = 0
        self._written = 0  # rows of the blocks so far
        self._first_ns = self._now_ns = 0

    def fill(self, source: ReplaySource) -> None:
        """Decode the source's batch to its end."""
        while True:
            room = self._rows[self._used : BLOCK_ROWS - self._written % BLOCK_ROWS]
            made = source.decode(room)
            self._used += made
            if made < len(room):
                return
            self._close_block()

    def add_text(self, text: str, seconds: int) -> None:
        """Add an INFO message, in a block of its own."""
        self._close_block()
        rows = info_rows(text, self._layout, seconds)
        self._counts[0, Count.INFO_ROWS] += np.uint64(len(rows))
        self._add(rows, text)

    def _close_block(self) -> None:
        if self._used:
            rows, self._used = self._rows[: self._used], 0
            headers = np.flatnonzero(types_of(rows) == PacketType.TIMESTAMP)
            if len(headers):
                first, last = (min(int(rows["timestamp"][at]) * 10**9, _LAST_NS) for at in headers[[0, -1]])
                begin = self._now_ns if headers[0] and self._now_ns else first
                self._first_ns = self._first_ns or begin
                self._now_ns = last
                self._add(rows, None, begin)
            else:
                self._add(rows, None)

    def _add(self, rows: NDArray[Any], text: str | None, begin_ns: int = 0) -> None:
        first_ns = min(begin_ns or self._now_ns, self._now_ns)
        crc = crc32(rows.view(np.uint8))
        header = (*self._origin, self._sequence, self._written, len(rows), self._layout.code, 0)
        self._file.add(Block(*header, first_ns, self._now_ns, crc, [], [], text), rows)
        self._sequence += 1
        self._written += len(rows)

    def end(self, source: ReplaySource) -> None:
        """Add the end record, with the totals and with what was noticed in the recording."""
        self._close_block()
        counts = [[group, *self._counts[group].tolist()] for group in np.flatnonzero(self._counts.any(axis=1)).tolist()]
        unknown = [
            UnknownWord(int(w["io_group"]), int(w["seconds"]), int(w["reason"]), w["raw"][: w["size"]].tobytes())
            for w in source.take_unknown()
        ]
        # The decoders know when they were fed, which says nothing of a recording.
        verdicts = [
            LossVerdict(line.io_group, line.verdict, line.why, line.lost, self._first_ns, self._now_ns)
            if line.why
            else line
            for line in source.evidence(time.time_ns())
        ]
        times = self._first_ns, max(self._first_ns, self._now_ns)
        self._file.end(End(*self._origin, self._sequence, "closed", *times, counts, [], unknown, [], verdicts))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _run_of(description: dict[str, str]) -> tuple[int, int]:
    """Return the run and part that a recording's attributes name, else 0."""
    run, subrun = (int(value) if (value := description.get(name, "")).isdecimal() else 0 for name in ("run", "subrun"))
    if not 0 < run <= LAST_RUN:
        return 0, 0
    part = subrun - 10_000 * run - 1
    return run, part if 0 <= part < 9_999 else 0
