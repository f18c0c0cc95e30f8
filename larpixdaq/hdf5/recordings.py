"""Recorded HDF5 files of either kind, told by what is in them.

Raw files of larpix-control (`rawhdf5format` 0.0): board messages byte for byte, each with its io_group.

`/msgs` has one variable-length u1 array a message, `/msg_headers` one compound {io_groups u1}.

Rows of packet files of any age (LArPix+HDF5 0.0 to 3.0) as rows of our layouts.

The version label of a file does not determine its columns, so they are taken by name from the file's own dtype.
Whatever is absent is 0; columns that share bits of the word are made to agree when the words are decoded again.

The INFO texts of packet files: which of /messages a row of type 5 stands for.

Message logs: board messages one after another, each behind its length (u32 little-endian).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import word_codec as words_of
from larpixdaq._native.decoders import split_log
from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import ConfigError, FileError, cause
from larpixdaq.hdf5 import reader, repair
from larpixdaq.schema import ASICS, LAYOUTS, SPAN, Asic, PacketType, RowLayout

#: Bytes of messages that a piece aims at, and messages of a piece at most: nothing tells the lengths beforehand, so a
#: piece of the longest messages (1 MB) behind short ones takes 512 MB for a moment.
_PIECE_BYTES: Final = 8 << 20
_PIECE_MESSAGES: Final = 512
#: Rows of a piece: a few megabytes.
_PIECE: Final = 65_536
#: Rows that are looked through for words that a board sent, which tell whether directions were recorded.
_LOOK: Final = 1 << 20
#: The largest value that a word's field can hold, of columns that could hold more.
_WIDTHS: Final = {
    "downstream_marker": 1,
    "parity": 1,
    "channel_id": 63,
    "trigger_type": 3,
    "local_fifo": 3,
    "shared_fifo": 3,
    "local_fifo_events": 3,
    "shared_fifo_events": 4095,
    "first_packet": 1,
    "reset_sample_flag": 1,
    "cds_flag": 1,
    # Layout 1.0
    "channel": 127,
    "adc_counts": 1023,
    "fifo_half": 1,
    "fifo_full": 1,
}
_TIMESTAMP_BITS: Final = {Asic.V1: 24, Asic.V2: 32, Asic.V2_DIAGNOSTICS: 16, Asic.V3: 28}
#: Seconds of a type-4 row beyond which no board message can carry them (64 bits of nanoseconds).
_LAST_SECOND: Final = (2**64 - 1) // 10**9
Piece = tuple[NDArray[Any], NDArray[np.uint8], int, list[tuple[int, str, int]]]
#: larpix-control writes counter 0 into all message rows of these versions, and appends their texts in order.
_WITHOUT_COUNTER: Final = ("2.3", "2.4")
#: No board sends a longer message: 65,535 words of 24 bytes and a header.
MAX_MESSAGE: Final = 24 + 24 * 65_535
_READ: Final = 1 << 20
#: First bytes of PACMAN messages: data, request, reply, text.
_TYPES: Final = b"D?!S"
_NOTHING: Final = np.empty(0, np.uint8)
_NO_SPANS: Final = np.empty(0, SPAN)


def open_recording(path: Path) -> RawFile | PacketFile | None:
    """None when it is not HDF5; FileError in one line when it is, but damaged or of no known kind."""
    if path.exists() and not path.is_file() and not path.is_dir():  # HDF5 would wait for a pipe's other end
        raise FileError(f"{path}: is not a file")
    try:
        if not h5py.is_hdf5(path):
            return None
        repair.check_heaps(path)
        file = reader.open_hdf5(path)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: HDF5 file that cannot be opened: {cause(error)}") from None
    try:
        reader.check_links(path, file)
        for name in {"msgs", "msg_headers", "packets", "raw_packet", "messages"} & set(file):
            reader.check_dataset(path, name, file[name])
        if "msgs" in file:
            return RawFile(path, file)
        if "packets" in file or "raw_packet" in file:
            return PacketFile(path, file)
        raise FileError(f"{path}: HDF5 file with neither /msgs (raw) nor /packets")
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        file.close()
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: damaged HDF5 file: {cause(error)}") from None


class RawFile:
    """Open for reading until close(). FileError in one line for a file that is none, or is damaged."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        messages = file.get("msgs")
        kind = h5py.check_vlen_dtype(messages.dtype) if isinstance(messages, h5py.Dataset) else None
        if kind != np.uint8 or messages.ndim != 1:
            raise FileError(f"{path}: raw file without /msgs of bytes")
        self._messages = messages
        headers = file.get("msg_headers")
        self._headers = headers if isinstance(headers, h5py.Dataset) and headers.dtype.names == ("io_groups",) else None
        self.messages = len(messages)
        #: Messages at the end whose io_group is not there: of a file whose writer was killed between the two.
        self.left_out = 0
        if self._headers is not None and len(self._headers) < self.messages:
            if not file.swmr_mode:
                raise FileError(f"{path}: {self.messages} messages, but io_groups of only {len(self._headers)}")
            self.left_out = self.messages - len(self._headers)
            self.messages -= self.left_out

    def io_groups(self, default: int) -> tuple[int, ...]:
        """The io_groups of the messages; `default` is that of a file that does not say."""
        found: set[int] = set()
        for start in range(0, self.messages, 1 << 20):
            found.update(np.unique(self._groups(start, min(start + (1 << 20), self.messages), default)).tolist())
        return tuple(sorted(found)) or (default,)

    def pieces(self, default: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]]:
        """Bytes, spans (dtype schema.SPAN) and io_groups of some messages after the other."""
        at, count = 0, 64
        while at < self.messages:
            end = min(at + count, self.messages)
            try:
                messages = self._messages[at:end]
            except (OSError, RuntimeError, ValueError) as error:
                raise FileError(f"{self.path}: messages {at} to {end} cannot be read: {cause(error)}") from None
            lengths = np.fromiter(map(len, messages), np.uint32, end - at)
            spans = np.empty(end - at, SPAN)
            spans["length"] = lengths
            spans["start"] = np.cumsum(lengths) - lengths
            buffer = np.concatenate([*messages, np.empty(0, np.uint8)], dtype=np.uint8)
            yield buffer, spans, self._groups(at, end, default)
            at = end
            count = int(np.clip(count * _PIECE_BYTES // max(len(buffer), 1), 1, _PIECE_MESSAGES))

    def _groups(self, start: int, end: int, default: int) -> NDArray[np.uint8]:
        if self._headers is None:
            return np.full(end - start, default, np.uint8)
        try:
            groups = self._headers[start:end]["io_groups"]
        except (OSError, RuntimeError, ValueError) as error:
            raise FileError(f"{self.path}: io_groups {start} to {end} cannot be read: {cause(error)}") from None
        return np.ascontiguousarray(groups, np.uint8)

    def close(self) -> None:
        self._file.close()


class PacketFile:
    """Open for reading until close(). FileError in one line for a file that is none, or is damaged."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        packets = file.get("packets", file.get("raw_packet"))  # version 0.0 has the latter
        table = isinstance(packets, h5py.Dataset) and packets.ndim == 1
        names = set(packets.dtype.names or () if table else ())
        self._type = "type" if "chip_key" in names else "packet_type"
        known = {name for one in LAYOUTS for name in one.dtype.names or ()} & names
        if (
            not {self._type, "timestamp", "parity"} <= known
            or packets.dtype[self._type].kind not in "iu"
            or any(packets.dtype[name].shape for name in known)
        ):
            raise FileError(f"{path}: packet file without /packets of known columns")
        self._packets = packets
        #: INFO rows, of those that pieces() has passed, whose text is not in /messages.
        self.textless = 0
        self.rows = len(packets)
        header = file.get("_header")
        self.version = str(header.attrs.get("version", "")) if header is not None else ""
        self.asic = generation(names, self.version)
        self._wide = "receipt_timestamp" in names and packets.dtype["receipt_timestamp"].itemsize > 4
        self._directions = self._has_directions()

    def check(self, asic: Asic, layout: RowLayout) -> None:
        """ConfigError, naming the option, when the file's packets are of other chips than these, or of a wider
        clock."""
        if self.asic != (Asic.V2 if asic == Asic.V2_DIAGNOSTICS else asic):
            option = next(name for name, code in ASICS.items() if code == self.asic)
            raise ConfigError(
                f"{self.path}: packets of v{option} chips (LArPix+HDF5 {self.version}): give --asic {option}"
            )
        if self._wide and asic != Asic.V1 and layout.dtype["receipt_timestamp"].itemsize == 4:
            raise ConfigError(f"{self.path}: receipt timestamps of 64 bits: give --clock64")
        if "fifo_diagnostics_enabled" in self._packets.dtype.names:
            rows = self._read(0, min(_PIECE, self.rows))
            diagnostics = rows["fifo_diagnostics_enabled"][rows["packet_type"] < PacketType.TIMESTAMP]
            # Most of them: a damaged row must not decide.
            if len(diagnostics) and (diagnostics.mean() > 0.5) != (asic == Asic.V2_DIAGNOSTICS):
                advice = (
                    "packets not in fifo diagnostics mode: leave out"
                    if asic == Asic.V2_DIAGNOSTICS
                    else "packets in fifo diagnostics mode: give"
                )
                raise ConfigError(f"{self.path}: {advice} --fifo-diagnostics")

    def io_groups(self, default: int) -> tuple[int, ...]:
        """The io_groups among the first rows; `default` is that of rows that name none."""
        rows = self._read(0, min(_PIECE, self.rows))
        rows = rows[rows[self._type] != PacketType.MESSAGE]
        if self.asic == Asic.V1:
            groups = _key_groups(rows["chip_key"], default)
        else:
            groups = rows["io_group"] if "io_group" in (rows.dtype.names or ()) else np.empty(0, np.uint8)
        return tuple(np.unique(groups).tolist()) or (default,)

    def pieces(self, layout: RowLayout, asic: Asic, default: int) -> Iterator[Piece]:
        """Rows of this layout, but none of type 5; their io_groups; how many rows were left out because no word can
        look like them; and the INFO texts, each with the number of those rows that come before it and its time (unix
        seconds).

        `default` is the io_group of rows that name none (layout 1.0). Rows of types 0 to 3 have direction 0 when they
        were sent; of files that do not record directions all count as received.
        """
        texts = MessageTexts(self._file, self.version)
        first = 0
        for given in self._given():
            rows, fits = self._normalise(given, layout, asic)
            info = rows[self._type] == PacketType.MESSAGE
            unfit = len(rows) - int((fits | info).sum())
            fits &= ~info
            told: list[tuple[int, str, int]] = []
            if info.any():
                before, seconds = np.cumsum(fits)[info], rows["timestamp"][info]
                found = texts.of(rows["counter"][info], first + np.flatnonzero(info))
                told = [(int(before[i]), text, int(seconds[i])) for i, text in found]
                self.textless = texts.missing
            first += len(given)
            groups = _key_groups(rows["chip_key"], default) if asic == Asic.V1 else rows["io_group"]
            if fits.all():
                yield rows, np.ascontiguousarray(groups), 0, told
            else:
                yield rows[fits], groups[fits], unfit, told

    def _given(self) -> Iterator[NDArray[Any]]:
        """All rows as they are, in pieces in which the rows of one INFO text stay together."""
        carried = self._read(0, 0)
        for start in range(0, self.rows, _PIECE):  # where chunks begin: a damaged one then costs no rows of others
            try:
                given = self._read(start, min(start + _PIECE, self.rows))
            except FileError:
                yield carried
                raise
            given = np.concatenate((carried, given)) if len(carried) else given
            others = np.flatnonzero(given[self._type] != PacketType.MESSAGE)
            end = others[-1] + 1 if len(others) else 0
            carried, given = given[end:], given[:end]
            yield given
        yield carried

    def close(self) -> None:
        self._file.close()

    def _read(self, start: int, end: int) -> NDArray[Any]:
        try:
            rows: NDArray[Any] = self._packets[start:end]
        except (OSError, RuntimeError, ValueError) as error:
            raise FileError(f"{self.path}: rows {start} to {end} cannot be read: {cause(error)}") from None
        return rows

    def _has_directions(self) -> bool:
        """larpix-control's conversions leave direction 0 everywhere, also in data words and in what a board has
        received."""
        if "direction" not in self._packets.dtype.names:
            return False
        if "run" in self._file:
            return True
        data = PacketType.TEST if self.asic == Asic.V3 else PacketType.DATA
        for start in range(0, min(self.rows, _LOOK), _PIECE):
            rows = self._read(start, min(start + _PIECE, self.rows))
            received = rows[self._type] == data
            if "receipt_timestamp" in self._packets.dtype.names:
                received |= (rows[self._type] < PacketType.TIMESTAMP) & (rows["receipt_timestamp"] > 0)
            if received.any():
                return bool(rows["direction"][received].any())
        return True

    def _normalise(self, given: NDArray[Any], layout: RowLayout, asic: Asic) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        rows = np.zeros(len(given), layout.dtype)
        fits = copy_columns(given, rows)
        kind = rows[self._type]
        words = kind < PacketType.TIMESTAMP
        if asic == Asic.V2 and "first_packet" not in (given.dtype.names or ()):
            self._find_first_packet(rows, words, given)
        fits &= ~(words & (rows["timestamp"] >= np.uint64(1 << _TIMESTAMP_BITS[asic])))
        for name in set(_WIDTHS) & set(layout.dtype.names or ()):
            fits &= ~(words & (rows[name] > _WIDTHS[name]))
        if asic == Asic.V3:
            fits &= kind != PacketType.DATA
        fits &= (kind != PacketType.TIMESTAMP) | (rows["timestamp"] <= _LAST_SECOND)
        fits &= (kind != PacketType.TRIGGER) | (rows["counter"] == 0)
        if asic == Asic.V1:
            fits &= (kind != PacketType.TEST) | (rows["counter"] < 1 << 16)
        else:
            fits &= ~words | (rows["fifo_diagnostics_enabled"] == (asic == Asic.V2_DIAGNOSTICS))
            fits &= (kind < PacketType.SYNC) | (rows["dataword"] <= 255)
        received = words & (rows["direction"] != 0) if self._directions else words
        rows["direction"] = received | (kind >= PacketType.SYNC)
        return rows, fits & (kind <= PacketType.TRIGGER)

    @staticmethod
    def _find_first_packet(rows: NDArray[Any], words: NDArray[np.bool_], given: NDArray[Any]) -> None:
        """Fill a column that files before 2.1 do not have.

        larpix-control 3.0 has it as the timestamp's highest bit, 3.1 left it out: there it is the one bit of a data
        word that is not known, and what was recorded of the parity says which it was.
        """
        rows["first_packet"][words] = (rows["timestamp"][words] >> np.uint64(31)) & np.uint64(1)
        rows["timestamp"][words] &= np.uint64(2**31 - 1)
        if "valid_parity" in (given.dtype.names or ()):
            data = np.flatnonzero(words & (rows["packet_type"] == PacketType.DATA) & (rows["first_packet"] == 0))
            found = words_of.encode(rows[data], asic=Asic.V2)
            valid = words_of.parity(found, asic=Asic.V2) == found
            rows["first_packet"][data] = valid != (rows["valid_parity"][data] == 1)


def generation(names: Collection[str], version: str) -> Asic:
    """Which chips the rows with these columns are of, in a file of this version."""
    if "chip_key" in names:
        return Asic.V1
    return Asic.V3 if "reset_sample_flag" in names or version.startswith("3") else Asic.V2


def copy_columns(given: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Fill the columns of `rows` that the given rows have too, whatever their types; False, shape (N,), for each row
    with a value that does not fit (it is 0 then)."""
    fits = np.ones(len(given), np.bool_)
    for name in rows.dtype.names or ():
        if name in (given.dtype.names or ()):
            fits &= _copy(given[name], rows[name])
    return fits


def _copy(given: NDArray[Any], column: NDArray[Any]) -> NDArray[np.bool_]:
    """Into a column of another type; False where the value does not fit (it is 0 then)."""
    if column.dtype.kind == "S":
        column[:] = given.astype(column.dtype)
        return np.ones(len(given), np.bool_)
    if given.dtype.kind not in "uif":
        return np.zeros(len(given), np.bool_)
    fits = (given >= 0) & (given <= np.iinfo(column.dtype).max)  # not a number is neither
    column[:] = np.where(fits, given, 0)
    return np.asarray(fits)


def _key_groups(keys: NDArray[np.bytes_], default: int) -> NDArray[np.uint8]:
    """The io_groups of chip keys "io_group-io_channel-chip_id"."""
    names, which = np.unique(keys, return_inverse=True)
    groups = np.full(len(names), default, np.uint8)
    for i, name in enumerate(names.tolist()):
        group = name.split(b"-")[0]
        if name.count(b"-") == 2 and group.isdigit() and len(group) < 4 and int(group) < IO_GROUPS:
            groups[i] = int(group)
    return groups[which.reshape(-1)]


class MessageTexts:
    """Of one file, whose rows are to be passed in order.

    In files of our own each message is a block, whose rows are the lines of its text in /messages. (Those written
    before 2026-11-29 have the number of the first line in all of them.) In other files each row is a message.
    """

    def __init__(self, file: h5py.File, version: str) -> None:
        self.missing = 0
        self._in_order = "run" not in file and version in _WITHOUT_COUNTER
        self._passed = 0
        self._lines: list[bytes] = []
        self._begins: NDArray[np.int64] | None = None  # rows at which blocks begin
        self._end = 0  # row behind the last block; a file that grows may have rows of further blocks from there on
        # Without /messages, or with others than these, every text is missing, and that is counted.
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            self._lines = [bytes(line) for line in file["messages"]["message"]]
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            blocks = file["run/blocks"][:]
            self._begins = blocks["first_row"].astype(np.int64)
            self._end = int(blocks["first_row"][-1:].sum() + blocks["rows"][-1:].sum())

    def of(self, counters: NDArray[Any], places: NDArray[np.intp]) -> list[tuple[int, str]]:
        """The texts of these rows of type 5, given by their column `counter` and their place in the file: index among
        these rows, and text.

        A message whose text is not there is counted in `missing`, row by row, and stands as an empty text.
        """
        numbers = counters.astype(np.int64)
        if self._in_order:
            numbers = np.arange(self._passed, self._passed + len(counters))
        self._passed += len(counters)
        first = np.ones(len(numbers), np.bool_)
        if self._begins is not None:
            first = np.isin(places, self._begins) | (places >= self._end) & (np.diff(numbers, prepend=-1) != 0)
            first[:1] = True
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=len(numbers))
        return [(int(at), self._text(int(numbers[at]), int(rows))) for at, rows in zip(starts, lengths, strict=True)]

    def _text(self, number: int, rows: int) -> str:
        lines = self._lines[number : number + rows]
        self.missing += rows - len(lines)
        return b"".join(lines).decode("utf-8", "replace")


class MessageLog:
    """Open for reading until close(); FileError when the beginning does not look like a log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        head = self._file.read(5)
        self._file.seek(0)
        length = int.from_bytes(head[:4], "little")
        if len(head) < 5 or not 8 <= length <= MAX_MESSAGE or head[4] not in _TYPES:
            self._file.close()
            raise FileError(f"{path}: neither a raw file, nor a packet file, nor a log of board messages")

    def pieces(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], int, str]]:
        """Bytes, spans (dtype schema.SPAN) of the messages in them, how many bytes are in no message, and what is wrong
        then.

        A message that the file's end cuts off is given as far as it goes. After a length that no message has there is
        no telling where the next one begins: all that follows is in no message.
        """
        pending = b""
        place = self._file.seek(0)  # of `pending` in the file
        while data := self._file.read(_READ):
            pending += data
            spans, used = split_log(pending)
            if len(spans):
                yield np.frombuffer(pending, np.uint8), spans, 0, ""
            pending = pending[used:]
            place += used
            length = int.from_bytes(pending[:4], "little")
            if len(pending) >= 4 and length > MAX_MESSAGE:
                text = f"{self.path}: at byte {place}: a message of {length} bytes; what follows is left out"
                yield _NOTHING, _NO_SPANS, self._file.seek(0, os.SEEK_END) - place, text
                return
        if pending:
            spans = np.array([(4, len(pending) - 4)], SPAN) if len(pending) > 4 else _NO_SPANS
            text = f"{self.path}: ends inside a message, at byte {place + len(pending)}"
            yield np.frombuffer(pending, np.uint8), spans, 0 if len(spans) else len(pending), text

    def close(self) -> None:
        self._file.close()
