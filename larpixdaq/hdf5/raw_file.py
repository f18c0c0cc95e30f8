"""Raw files: the board messages of one packet file, in the raw layout of larpix-control (rawhdf5format 0.0).

They are made from a finished packet file, and so have its guarantees: a killed storage recovers the packet file, and
the raw file is made after that, or again at any time. Each row of a received word has all bits of the word, its
io_channel and its receipt timestamp, and each board message has a row of type 4, so that PACMAN messages can be encoded
again. Everything that is encoded is decoded again, and compared with the rows.

    /msgs             one variable-length u1 array a message
    /msg_headers      io_groups of the messages
    /meta             attributes of larpix-control, those of metadata.py, the packet file, and NOTE
    /ledger/raw       messages, words and bytes of each producer and io_group

What rows do not have cannot be here. The ledger of the packet file counts it: words without a row, rejected messages,
and bytes after the words of a message. Unused bytes of headers and words are 0, and in layout 1.0 also the receipt
timestamps. Words before the first header of their io_group in this part (a rotation or a gap was in the middle of a
message) get a header with the time of their block; /ledger/raw counts such headers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import PacmanDecoder, encode_pacman
from larpixdaq.constants import MIN_FREE, Count, RunCondition
from larpixdaq.errors import FileError, cause
from larpixdaq.hdf5 import columns, layout, metadata, names
from larpixdaq.hdf5.reader import PIECE_ROWS, DataFile, check_dataset
from larpixdaq.hdf5.recordings import RawFile, key_groups, open_recording
from larpixdaq.hdf5.writer import publish_file
from larpixdaq.runtime.file_access import lock_directory, open_regular
from larpixdaq.schema import LAYOUTS, SPAN, Asic, PacketType, types_of
from larpixdaq.version import VERSION

#: Version of the raw layout, the only one that larpix-control has.
VERSION_RAW: Final = "0.0"
NOTE: Final = (
    "PACMAN messages, encoded again from the rows of the packet file: words, io_channels, receipt timestamps, borders "
    "and times of messages are those of the board; unused bytes are 0; words without a row, rejected messages and "
    "trailing bytes, which /ledger/counts of the packet file counts, are not here"
)
#: One row for each producer, epoch and io_group.
LEDGER: Final = np.dtype(
    [
        ("producer", layout.PRODUCERS["name"]),
        ("epoch", "<u8"),
        ("io_group", "u1"),
        ("messages", "<u8"),
        ("words", "<u8"),
        ("bytes", "<u8"),
        ("divided", "<u8"),
        ("made_headers", "<u8"),
    ]
)
#: References to messages in a chunk of /msgs.
_CHUNK: Final = 1024
#: Maximum words of a message, by the count in its legacy header.
_MOST_WORDS: Final = 65_535
#: Bytes that stay free on the disk: a raw file can be made again, the data that a storage writes cannot.
_KEEP_FREE: Final = 4 * MIN_FREE
_NO_MESSAGES: Final = (np.empty(0, np.uint8), np.empty(0, SPAN), np.empty(0, np.uint8))
#: A message of variable length in memory, as HDF5 takes it: length and address.
_REFERENCE: Final = np.dtype([("length", np.uintp), ("address", np.uintp)])


class MessageFormat(NamedTuple):
    name: str  # as encode_pacman() takes it
    clock64: bool
    io_version: str  # of larpix-control


LEGACY: Final = MessageFormat("legacy", False, "0.0")
LEGACY_CLOCK64: Final = MessageFormat("legacy", True, "0.0")
FORMAT_1_0: Final = MessageFormat("1.0", False, "1.0")
#: Layout code -> formats, of which the first one that holds all rows is taken. The rows do not say which format the
#: board had, but only firmware with a 64-bit clock sends times whose lower 16 bits are always zero.
#: Layout 3.0 without data words says nothing, and is taken for that of a 64-bit clock.
_FORMATS: Final = {
    1: (LEGACY, FORMAT_1_0),
    2: (LEGACY, FORMAT_1_0),
    3: (LEGACY_CLOCK64, FORMAT_1_0),
    4: (LEGACY_CLOCK64, LEGACY, FORMAT_1_0),
}


class RawReport(NamedTuple):
    """What a raw file holds. `made`: it was made now, and not found."""

    path: Path
    messages: int
    words: int
    bytes: int
    made: bool = True


class _Messages(NamedTuple):
    """Messages in the order of their headers: bytes, spans (dtype schema.SPAN) and the io_group of each."""

    data: NDArray[np.uint8]
    spans: NDArray[Any]
    io_groups: NDArray[np.uint8]


class _Stretch(NamedTuple):
    """Consecutive blocks of one origin, in one piece of the file."""

    origin: tuple[int, int]  # index of the producer, epoch
    start: int  # first row
    stop: int
    follows: bool  # no row is missing between the previous stretch of this origin and this one
    seconds: int  # unix time of the first block, by the producer's clock


class _MisfitError(Exception):
    """A row does not fit into messages of this format."""


class _OriginState:
    """`open`: rows of the last message, which may go on; `seconds`: time of the last header, by io_group."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.open: NDArray[Any] = np.zeros(0, dtype)
        self.seconds: dict[int, int] = {}


class MessageMaker:
    """Makes the messages of one packet file from its rows. `ledger`: rows of LEDGER, complete after messages()."""

    def __init__(self, file: DataFile, form: MessageFormat) -> None:
        if file.layout is None:
            raise FileError(f"{file.path}: /packets has columns of another program")
        self._file = file
        self._form = form
        self._dtype = file.dtype
        self._v1 = file.layout is LAYOUTS[0]
        self._asic = Asic.V1 if self._v1 else Asic.V3 if file.layout is LAYOUTS[3] else Asic.V2
        self._counts: dict[tuple[tuple[int, int], int], NDArray[np.uint64]] = {}
        self._decoders: dict[tuple[int, Asic], PacmanDecoder] = {}

    @property
    def ledger(self) -> NDArray[Any]:
        rows = np.zeros(len(self._counts), LEDGER)
        for row, (((producer, epoch), io_group), counts) in zip(rows, sorted(self._counts.items()), strict=True):
            row["producer"] = self._file.producers[producer].encode()
            row["epoch"], row["io_group"] = epoch, io_group
            row["messages"], row["words"], row["bytes"], row["divided"], row["made_headers"] = counts.tolist()
        return rows

    def messages(self) -> Iterator[_Messages]:
        """Make all messages, some at a time. _MisfitError if a row does not fit, FileError if rows are damaged."""
        states: dict[tuple[int, int], _OriginState] = {}
        for start, rows, stretches in self._pieces():
            for stretch in stretches:
                state = states.setdefault(stretch.origin, _OriginState(self._dtype))
                if not stretch.follows:
                    yield from self._close(stretch.origin, state)
                yield from self._take(stretch, state, rows[stretch.start - start : stretch.stop - start])
        for origin, state in states.items():
            yield from self._close(origin, state)

    def _pieces(self) -> Iterator[tuple[int, NDArray[Any], list[_Stretch]]]:
        """Read the rows, some chunks at a time: the first row, the rows, and the stretches that cover them."""
        file = self._file
        blocks = file.table("run/blocks")
        starts, counts = blocks["first_row"].astype(np.int64), blocks["rows"].astype(np.int64)
        stops = starts + counts
        if not np.array_equal(starts, np.cumsum(counts) - counts) or int(counts.sum()) != file.rows:
            raise FileError(f"{file.path}: the blocks do not cover the {file.rows} rows (larpixdaq verify)")
        lost = {(int(gap["producer"]), int(gap["epoch"]), int(gap["sequence"])) for gap in file.table("ledger/gaps")}
        lists = [blocks[name].tolist() for name in ("producer", "epoch", "sequence", "first_ns")]
        if max(lists[0], default=0) >= max(1, len(file.producers)):
            raise FileError(f"{file.path}: /run/blocks names a producer that /run/producers does not have")
        following: dict[tuple[int, int], int] = {}
        for start in range(0, file.rows, PIECE_ROWS):
            stop = min(start + PIECE_ROWS, file.rows)
            stretches: list[_Stretch] = []
            first, last = np.searchsorted(stops, start, "right"), np.searchsorted(starts, stop, "left")
            for i in range(int(first), int(last)):
                producer, epoch, sequence, first_ns = (values[i] for values in lists)
                origin = (producer, epoch)
                begin, end = max(start, int(starts[i])), min(stop, int(stops[i]))
                follows = begin > int(starts[i]) or (
                    following.get(origin) == sequence and (producer, epoch, sequence) not in lost
                )
                following[origin] = sequence + 1
                previous = stretches[-1] if stretches else None
                if previous is not None and follows and previous.origin == origin:
                    stretches[-1] = previous._replace(stop=end)
                else:
                    stretches.append(_Stretch(origin, begin, end, follows, first_ns // 10**9))
            yield start, file.packets(start, stop), stretches

    def _take(self, stretch: _Stretch, state: _OriginState, rows: NDArray[Any]) -> Iterator[_Messages]:
        """Make the messages of a stretch but for the last one, which may go on in the next stretch."""
        kinds = types_of(rows)
        received = (kinds < PacketType.TIMESTAMP) & (rows["direction"] == 1)
        board = (kinds == PacketType.TIMESTAMP) | (kinds == PacketType.SYNC) | (kinds == PacketType.TRIGGER)
        rows = np.concatenate((state.open, rows[received | board]))
        if not len(rows):
            return
        rows = self._with_headers(stretch, state, rows)
        last = int(np.flatnonzero(types_of(rows) == PacketType.TIMESTAMP)[-1])
        state.open = rows[last:].copy()
        if last:
            yield self._encode(stretch.origin, rows[:last])

    def _close(self, origin: tuple[int, int], state: _OriginState) -> Iterator[_Messages]:
        """Make the open message of an origin, after which rows are missing, or which is the last one."""
        if len(state.open):
            yield self._encode(origin, state.open)
        state.open = state.open[:0]
        state.seconds.clear()

    def _with_headers(self, stretch: _Stretch, state: _OriginState, rows: NDArray[Any]) -> NDArray[Any]:
        """Insert a row of type 4 before words without one: another io_group's rows, or none, are before them; or the
        message has as many words as its header can count."""
        header = types_of(rows) == PacketType.TIMESTAMP
        groups = self._groups(rows)
        begins = header.copy()
        begins[0] = True
        begins[1:] |= groups[1:] != groups[:-1]
        starts = np.flatnonzero(begins)
        words = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))  # before each row
        words -= header[np.repeat(starts, np.diff(starts, append=len(rows)))]
        missing = np.flatnonzero((begins & ~header) | ((words > 0) & (words % _MOST_WORDS == 0)))
        made = np.zeros(len(missing), self._dtype)
        made["type" if self._v1 else "packet_type"] = PacketType.TIMESTAMP
        for group in np.unique(groups).tolist():
            own = np.flatnonzero(groups[missing] == group)
            heads = np.flatnonzero(header & (groups == group))
            known = state.seconds.get(group)
            if len(own):
                before = np.searchsorted(heads, missing[own])
                first = known is None and before[0] == 0
                fallback = np.array([stretch.seconds if known is None else known], np.uint64)
                times = np.concatenate((fallback, rows["timestamp"][heads]))
                made["timestamp"][own] = times[before]
                counts = self._count(stretch.origin, group)
                counts[3] += np.uint64(len(own) - first)
                counts[4] += np.uint64(first)
                if known is None:
                    state.seconds[group] = stretch.seconds
            if len(heads):
                state.seconds[group] = int(rows["timestamp"][heads[-1]])
        if self._v1:
            made["chip_key"] = [f"{group}-0-0".encode() for group in groups[missing].tolist()]
        else:
            made["io_group"] = groups[missing]
        return np.insert(rows, missing, made) if len(missing) else rows

    def _groups(self, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the io_group of each row, shape (N,)."""
        if not self._v1:
            return np.ascontiguousarray(rows["io_group"])
        return key_groups(rows["chip_key"], 0)

    def _count(self, origin: tuple[int, int], group: int) -> NDArray[np.uint64]:
        return self._counts.setdefault((origin, group), np.zeros(5, np.uint64))

    def _encode(self, origin: tuple[int, int], rows: NDArray[Any]) -> _Messages:
        """Encode rows, the first of which is of type 4, as messages, one for each row of type 4."""
        groups = self._groups(rows)
        headers = types_of(rows) == PacketType.TIMESTAMP
        pieces: list[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.intp]]] = []
        for group in np.unique(groups).tolist():
            which = groups == group
            own = rows if which.all() else rows[which]
            data, spans = self._encode_group(group, own)
            pieces.append((data, spans, np.flatnonzero(which & headers)))
            words = len(own) - len(spans)
            self._count(origin, group)[:3] += np.array([len(spans), words, len(data)], np.uint64)
        sizes = np.array([len(data) for data, *_ in pieces], np.int64)
        spans = np.concatenate([spans for _, spans, _ in pieces])
        spans["start"] += np.repeat(np.cumsum(sizes) - sizes, [len(one) for _, one, _ in pieces]).astype(np.uint32)
        places = np.concatenate([places for *_, places in pieces])
        order = np.argsort(places)
        data = pieces[0][0] if len(pieces) == 1 else np.concatenate([data for data, *_ in pieces])
        return _Messages(data, spans[order], groups[places[order]])

    def _encode_group(self, group: int, rows: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Encode rows of one io_group, and prove it: the decoder of the board makes the same rows of the messages."""
        asic = self._asic
        if asic == Asic.V2 and rows["fifo_diagnostics_enabled"].any():
            asic = Asic.V2_DIAGNOSTICS
        form = self._form
        try:
            buffer, spans = encode_pacman(rows, asic=int(asic), format=form.name, clock64=form.clock64)
        except ValueError as error:
            raise _MisfitError(str(error)) from None
        decoder = self._decoders.get((group, asic))
        if decoder is None:
            decoder = PacmanDecoder(group, int(asic), format=form.name, clock64=form.clock64)
            decoder.start(np.zeros(len(Count), np.uint64))
            self._decoders[group, asic] = decoder
        data = np.frombuffer(buffer, np.uint8)
        decoder.feed(data, spans)
        again = np.empty(len(rows) + 1, rows.dtype)
        made = decoder.decode(again)
        if made != len(rows) or again[:made].tobytes() != rows.tobytes():
            raise FileError(
                f"{self._file.path}: rows of io_group {group} that no board message can have made (larpixdaq verify)"
            )
        return data, spans


class MessageWriter:
    """A raw file being written: /msgs and /msg_headers, and what else is put into `file`."""

    def __init__(self, path: Path) -> None:
        # Without HDF5's lock, which some file systems do not have: the lock of make_raw() keeps others away.
        self.file = h5py.File(path, "x", libver=layout.LIBVER, locking=False)
        options: dict[str, Any] = {"shape": (0,), "maxshape": (None,), "chunks": (_CHUNK,), "compression": "gzip"}
        self._messages = self.file.create_dataset("msgs", dtype=h5py.vlen_dtype(np.uint8), **options)
        self._headers = self.file.create_dataset("msg_headers", dtype=np.dtype([("io_groups", "u1")]), **options)
        self._memory_type = h5py.h5t.vlen_create(h5py.h5t.NATIVE_UINT8)
        self.messages = self.bytes = 0

    def add(self, data: NDArray[np.uint8], spans: NDArray[Any], io_groups: NDArray[np.uint8]) -> None:
        """Append messages: their bytes, spans (dtype schema.SPAN) and io_groups.

        By length and address of each, because an array of Python for each would be slow.
        """
        count = len(spans)
        references = np.empty(count, _REFERENCE)
        references["length"] = spans["length"]
        references["address"] = data.ctypes.data + spans["start"].astype(np.uintp)
        for dataset in (self._messages, self._headers):
            dataset.resize((self.messages + count,))
        place = self._messages.id.get_space()
        place.select_hyperslab((self.messages,), (count,))
        self._messages.id.write(h5py.h5s.create_simple((count,)), place, references, self._memory_type)
        self._headers["io_groups", self.messages :] = io_groups
        self.messages += count
        self.bytes += len(data)

    def finish(self, ledger: NDArray[Any], attributes: dict[str, Any]) -> None:
        table = self.file.create_dataset("ledger/raw", data=ledger)
        table.attrs["columns"] = columns.attribute("ledger/raw", LEDGER)
        self.file.create_group("meta").attrs.update(attributes)
        self.close()

    def close(self) -> None:
        self.file.close()


def raw_path(packets: Path) -> Path:
    """Return the path of the raw file of a packet file."""
    return packets.with_name(packets.name.removesuffix(names.FINISHED) + names.RAW)


def make_raw(packets: Path) -> RawReport:
    """Make the raw file of a finished packet file, beside it, completely or not at all. One that exists is kept, and
    one that another process is making is waited for.

    FileError if the packet file is not finished or damaged, if the disk has no room, or if a file of that name was not
    made from this packet file.
    """
    path = raw_path(packets)
    if not packets.name.endswith(names.FINISHED) or packets.name.endswith(names.RAW):
        raise FileError(f"{packets}: expected a finished packet file, NAME{names.FINISHED}")
    with DataFile(packets, own=True) as file:
        if file.run_info()["condition"] == RunCondition.RUNNING:
            raise FileError(f"{packets}: is not finished")
        stem = path.name.removesuffix(names.RAW)
        part = path.with_name(stem + names.RAW_PART)
        # Not the raw file itself, because HDF5 refuses to read a file that is locked.
        with _locked(path.with_name(stem + names.RAW_LOCK)):
            part.unlink(missing_ok=True)
            if os.path.lexists(path):
                return _existing(path, packets.name)
            try:
                report = _write(file, path, part)
                publish_file(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    return report


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a file that is made, hold it, and remove the file. FileError if it cannot be made."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        locked = lock_directory.open(
            path, flags, opener=lambda path, flags: open_regular(path, flags, 0o666), wait=True
        )
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"cannot make {path}: {error.strerror}") from None
    assert locked is not None
    try:
        yield
    finally:
        locked.close(remove_name=True)


def _existing(path: Path, packets: str) -> RawReport:
    with read_raw(path) as found:
        if found.packet_file != packets:
            raise FileError(f"{path}: exists, and was made from {found.packet_file}, not from {packets}")
        return _report(path, found.ledger)._replace(made=False)


def _report(path: Path, ledger: NDArray[Any]) -> RawReport:
    messages, words, size = (int(ledger[name].sum()) for name in ("messages", "words", "bytes"))
    return RawReport(path, messages, words, size)


class RawContent(NamedTuple):
    """An open raw file of larpix-daq."""

    file: RawFile
    packet_file: str
    form: MessageFormat
    attributes: dict[str, Any]  # of /meta
    ledger: NDArray[Any]


@contextlib.contextmanager
def read_raw(path: Path) -> Iterator[RawContent]:
    """Open a raw file of larpix-daq. FileError if it is another file or damaged."""
    try:
        file = open_recording(path)
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"{path}: {error.strerror or error}") from None
    if not isinstance(file, RawFile):
        if file is not None:
            file.close()
        raise FileError(f"{path}: is no raw file")
    with contextlib.closing(file):
        try:
            attributes = dict(file.hdf5["meta"].attrs)
            check_dataset(path, "ledger/raw", file.hdf5["ledger/raw"])
            ledger = file.hdf5["ledger/raw"][:]
            packets = attributes["packet_file"]
            version, clock64 = str(attributes["io_version"]), bool(attributes["clock64"])
        except FileError:
            raise
        except KeyError:
            raise FileError(f"{path}: raw file that larpix-daq did not write") from None
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise FileError(f"{path}: damaged raw file: {cause(error)}") from None
        if not isinstance(packets, str) or packets in ("", "..") or os.path.basename(packets) != packets:
            raise FileError(f"{path}: names {packets!r:.100} as its packet file, expected the name of a file")
        if ledger.dtype != LEDGER:
            raise FileError(f"{path}: /ledger/raw has other columns than expected: {ledger.dtype}")
        forms = {(form.io_version, form.clock64): form for form in (LEGACY, LEGACY_CLOCK64, FORMAT_1_0)}
        if (form := forms.get((version, clock64))) is None:
            raise FileError(f"{path}: messages of io_version {version}, expected one of larpix-daq")
        yield RawContent(file, packets, form, attributes, ledger)


def verify_raw(path: Path) -> tuple[int, list[str], list[str]]:
    """Compare a raw file with its packet file, message by message, or only with its own ledger without that file.

    Returns the number of words, the findings (faults, one line each) and notes. FileError if it cannot be read.
    """
    with read_raw(path) as raw:
        words = int(raw.ledger["words"].sum())
        facts = f"{raw.file.messages} messages with {words} words, from {raw.packet_file}"
        packets = path.with_name(raw.packet_file)
        if not packets.is_file():
            return words, _check_alone(raw), [f"{facts}, which is not here: only its own ledger was compared"]
        with DataFile(packets, own=True) as file:
            maker = MessageMaker(file, raw.form)
            try:
                place = _compare(raw.file, maker)
            except _MisfitError as error:
                raise FileError(f"{packets}: {error}") from None
        if place is not None:
            return words, [f"message {place} is not that of {packets.name}"], [facts]
        if not np.array_equal(maker.ledger, raw.ledger):
            return words, [f"/ledger/raw has other counts than the messages of {packets.name}"], [facts]
        return words, [], [facts]


def _compare(raw: RawFile, maker: MessageMaker) -> int | None:
    """Return the index of the first message that differs from those of the packet file; None if all are equal."""
    place = 0
    theirs = raw.pieces(0)
    data, spans, groups = _NO_MESSAGES
    for messages in maker.messages():
        start = 0
        while start < len(messages.spans):
            if not len(spans):
                data, spans, groups = next(theirs, _NO_MESSAGES)
                if not len(spans):
                    return place
            n = min(len(spans), len(messages.spans) - start)
            own = messages.spans[start : start + n]
            same = np.flatnonzero(
                (own["length"] != spans["length"][:n]) | (messages.io_groups[start : start + n] != groups[:n])
            )
            equal = int(same[0]) if len(same) else n
            ends = np.cumsum(own["length"][:equal].astype(np.int64))
            other = np.flatnonzero(_joined(messages.data, own[:equal]) != _joined(data, spans[:equal]))
            if len(other):
                return place + int(np.searchsorted(ends, other[0], "right"))
            if equal < n:
                return place + equal
            spans, groups = spans[n:], groups[n:]
            start, place = start + n, place + n
    return None if place == raw.messages else place


def _joined(data: NDArray[np.uint8], spans: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of messages, one after another, whatever their order in `data`."""
    starts, lengths = spans["start"].astype(np.int64), spans["length"].astype(np.int64)
    ends = np.cumsum(lengths)
    return data[np.repeat(starts - (ends - lengths), lengths) + np.arange(int(lengths.sum()))]


def _check_alone(raw: RawContent) -> list[str]:
    """Compare a raw file with its own ledger: messages, words and bytes of each io_group."""
    header, word = (24, 24) if raw.form is FORMAT_1_0 else (8, 16)
    found = np.zeros((256, 3), np.int64)
    for _, spans, groups in raw.file.pieces(0):
        lengths = spans["length"].astype(np.int64)
        for column, values in enumerate((np.ones_like(lengths), (lengths - header) // word, lengths)):
            found[:, column] += np.bincount(groups, values, minlength=256).astype(np.int64)
    lines = []
    for group in range(256):
        own = raw.ledger[raw.ledger["io_group"] == group]
        told = [int(own[name].sum()) for name in ("messages", "words", "bytes")]
        if told != found[group].tolist():
            lines.append(f"io_group {group}: messages, words, bytes {found[group].tolist()}, /ledger/raw has {told}")
    return lines


def _write(file: DataFile, path: Path, part: Path) -> RawReport:
    """Write the raw file in the first format that holds all rows."""
    assert file.layout is not None or file.rows == 0
    reason = ""
    for form in _FORMATS[file.layout.code if file.layout is not None else 2]:
        try:
            writer = MessageWriter(part)
            try:
                maker = MessageMaker(file, form)
                for messages in maker.messages():
                    _check_room(path.parent)
                    writer.add(*messages)
                ledger = maker.ledger
                writer.finish(ledger, _attributes(file, form))
            finally:
                writer.close()
        except _MisfitError as error:
            reason = str(error)
            part.unlink()
        except (OSError, RuntimeError, ValueError) as error:  # h5py raises all three when a disk fails
            raise error if isinstance(error, FileError) else FileError(f"cannot write {part}: {cause(error)}") from None
        else:
            return _report(path, ledger)
    raise FileError(f"{file.path}: {reason}")


def _check_room(directory: Path) -> None:
    found = os.statvfs(directory)
    if (free := found.f_bavail * found.f_frsize) < _KEEP_FREE:
        raise FileError(f"{directory} has {free >> 20} MiB left, a raw file leaves at least {_KEEP_FREE >> 20} MiB")


def _attributes(file: DataFile, form: MessageFormat) -> dict[str, Any]:
    info, texts = file.run_info(), file.texts()
    return {
        "version": VERSION_RAW,
        "io_version": form.io_version,
        "clock64": form.clock64,
        "created": info["opened_ns"] / 1e9,
        "modified": info["closed_ns"] / 1e9,
        **metadata.attributes(info["run"], info["part"], (texts.get("kind") or [""])[-1]),
        "condition": info["condition"],
        "packet_file": file.path.name,
        "software": f"larpix-daq {VERSION}",
        "made": time.time(),
        "note": NOTE,
    }
