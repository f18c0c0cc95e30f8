"""Read recorded files: raw files and packet files (HDF5), and logs of board messages.

A raw file of larpix-control (`rawhdf5format` 0.0) has board messages byte for byte, each with its io_group: `/msgs` is
one variable-length u1 array a message, `/msg_headers` one compound {io_groups u1}.

A packet file (LArPix+HDF5 0.0 to 3.0) has rows. Its version label does not determine its columns, so they are taken by
name from the file's own dtype, and converted to the columns of our layouts. Absent columns are 0; columns that share
bits of the word become consistent when the words are decoded again.

A message log has board messages one after another, each behind its length (u32 little-endian).
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

from larpixdaq._native import word_codec
from larpixdaq._native.decoders import count_words, split_log
from larpixdaq._native.global_heap import HeapReader
from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import ConfigError, FileError, cause
from larpixdaq.hdf5 import layout as own_layout
from larpixdaq.hdf5 import reader
from larpixdaq.protocol.stream import REGISTERS, SENT
from larpixdaq.runtime.record_file import zlib_library
from larpixdaq.schema import ASICS, LAYOUTS, SPAN, TEXT_BYTES, Asic, PacketType, RowLayout, layout_of

#: Bytes of messages that a piece of a raw file aims at, and maximum messages of a piece.
_PIECE_BYTES: Final = 8 << 20
_PIECE_MESSAGES: Final = 16_384
#: The same where HDF5 reads the messages. Lengths are not known before a piece is read: one of the longest messages
#: (1 MB) after short ones takes 512 MB for a moment.
_SLOW_PIECE_MESSAGES: Final = 512
#: Maximum bytes of a message of a raw file. No board sends as many, but another program may store anything.
_MOST_BYTES: Final = 64 << 20
#: A message in /msgs, as it is in the file: bytes, address of a global heap collection, and number in there.
REFERENCE: Final = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
#: Attributes of a recording's file that describe_file() tells.
_ATTRIBUTES: Final = ("created", "run", "subrun", "data_stream", "software", "io_version", "asic_version")
#: Rows of a piece of a packet file: a few megabytes.
_PIECE_ROWS: Final = 65_536
#: Bytes of a log that are read at once.
_READ_BYTES: Final = 1 << 20
#: Rows that are searched for received words, which show whether directions were recorded.
_DIRECTION_ROWS: Final = 1 << 20
#: Maximum value of a word's field, where its column could hold more.
_MAX_VALUES: Final = {
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
#: Kinds of columns that are no numbers.
_KINDS: Final = {"chip_key": "S"}
_TIMESTAMP_BITS: Final = {Asic.V1: 24, Asic.V2: 32, Asic.V2_DIAGNOSTICS: 16, Asic.V3: 28}
#: Maximum seconds of a type-4 row that a board message can carry (64 bits of nanoseconds).
_LAST_SECOND: Final = (2**64 - 1) // 10**9
#: larpix-control writes counter 0 into all message rows of these versions, and appends their texts in order.
_WITHOUT_COUNTER: Final = ("2.3", "2.4")
#: Maximum bytes of a board message: 65,535 words of 24 bytes and a header.
MAX_MESSAGE: Final = 24 + 24 * 65_535
#: First bytes of PACMAN messages: data, request, reply, text.
_TYPES: Final = b"D?!S"
_NO_BYTES: Final = np.empty(0, np.uint8)
_NO_SPANS: Final = np.empty(0, SPAN)
PacketPiece = tuple[NDArray[Any], NDArray[np.uint8], int, list[tuple[int, str, int]]]


def open_recording(path: Path) -> RawFile | PacketFile | None:
    """Open a recording of either kind; None for a file that is not HDF5.

    FileError in one line for an HDF5 file that is damaged or of another kind.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # HDF5 would wait for the writer of a pipe
        raise FileError(f"{path}: is not a file")
    try:
        if not h5py.is_hdf5(path):
            return None
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


class Contents:
    """What the pieces of a recording have had so far, counted before anything is decoded."""

    def __init__(self) -> None:
        self.fraction = 0.0  # of the recording
        self.messages = 0  # board messages; in a packet file its rows of type 4
        self.bytes = 0  # of messages
        #: Words of messages whose header agrees with their length; in a packet file its rows of types 0 to 3, 6 and 7.
        self.words = 0
        self.unclear = 0  # messages whose header does not
        self.info = 0  # rows of INFO messages of a packet file
        self.left_out = 0  # rows of a packet file that no word can look like

    def add(self, data: NDArray[np.uint8], spans: NDArray[Any], fraction: float) -> None:
        words, unclear = count_words(data, spans)
        self.messages += len(spans)
        self.bytes += int(spans["length"].sum(dtype=np.int64))
        self.words += words
        self.unclear += unclear
        self.fraction = fraction

    def add_rows(self, kinds: NDArray[Any], fraction: float) -> None:
        messages, info = (int(np.count_nonzero(kinds == kind)) for kind in (PacketType.TIMESTAMP, PacketType.MESSAGE))
        self.messages += messages
        self.info += info
        self.words += len(kinds) - messages - info
        self.fraction = fraction


def _version_number(version: str) -> tuple[int, ...] | None:
    """Return the parts of a version as numbers; None for another text."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 10 for part in parts) else None


def _describe_file(file: h5py.File, *groups: str, names: Collection[str] = _ATTRIBUTES) -> dict[str, str]:
    """Return attributes of a recording's file as texts. What is not there or cannot be read is left out."""
    found = {}
    for group in groups:
        for name in names:
            with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
                value = file[group].attrs[name]
                if isinstance(value, str | int | float | np.integer | np.floating):
                    found[name] = str(value)[:TEXT_BYTES]
    return found


class RawFile:
    """Raw file, open for reading until close(). FileError in one line when it is damaged or has other columns."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.hdf5 = file
        self.contents = Contents()
        self._version = _describe_file(file, "meta", names=("version",)).get("version", "0.0")
        self._only_group: int | None = None  # when all messages have this io_group
        messages = file["msgs"]
        if h5py.check_vlen_dtype(messages.dtype) != np.uint8:
            raise FileError(f"{path}: raw file without /msgs of bytes")
        self._messages = messages
        headers = file.get("msg_headers")
        self._headers = headers if headers is not None and headers.dtype.names == ("io_groups",) else None
        self.messages = len(messages)
        #: Messages at the end without an io_group, because the writer was killed between the two writes.
        self.left_out = 0
        if self._headers is not None and len(self._headers) < self.messages:
            if not file.swmr_mode:
                raise FileError(f"{path}: {self.messages} messages, but io_groups of only {len(self._headers)}")
            self.left_out = self.messages - len(self._headers)
            self.messages -= self.left_out

    def io_groups(self, default: int) -> tuple[int, ...]:
        """Return the io_groups of the messages; `default` is that of a file without io_groups."""
        found = np.zeros(IO_GROUPS, np.int64)
        for start in range(0, self.messages, 1 << 20):
            some = self._groups(start, min(start + (1 << 20), self.messages), default)
            found += np.bincount(some, minlength=IO_GROUPS)
        groups = tuple(np.flatnonzero(found).tolist()) or (default,)
        self._only_group = groups[0] if len(groups) == 1 else None
        return groups

    @property
    def version(self) -> str:
        return f"raw file (rawhdf5format {self._version})"

    @property
    def version_number(self) -> tuple[int, ...] | None:
        return _version_number(self._version)

    def description(self) -> dict[str, str]:
        """Return the attributes of the file that tell of its origin."""
        return _describe_file(self.hdf5, "meta")

    def pieces(self, default: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]]:
        """Read all messages in pieces, each the bytes, spans (dtype schema.SPAN) and io_groups of some messages.

        The references in /msgs and their global heaps are read directly, which is twenty times as fast for one-word
        messages. From the first message that cannot be read so, HDF5 reads them, and says what is wrong.
        """
        self.contents = Contents()
        start = 0
        for data, lengths in self._direct_pieces():
            yield self._piece(data, lengths, start, default)
            start += len(lengths)
        count = 1 if start else 64
        while start < self.messages:
            end = min(start + count, self.messages)
            messages = _read(self.path, "messages", self._messages, start, end)
            lengths = np.fromiter(map(len, messages), np.uint32, end - start)
            data = np.concatenate([*messages, _NO_BYTES], dtype=np.uint8)
            yield self._piece(data, lengths, start, default)
            start = end
            count = int(np.clip(count * _PIECE_BYTES // max(len(data), 1), 1, _SLOW_PIECE_MESSAGES))

    def _piece(
        self, data: NDArray[np.uint8], lengths: NDArray[np.uint32], start: int, default: int
    ) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
        spans = np.empty(len(lengths), SPAN)
        spans["length"] = lengths
        spans["start"] = np.cumsum(lengths) - lengths
        end = start + len(lengths)
        groups = self._groups(start, end, default)
        self.contents.add(data, spans, end / self.messages)
        return data, spans, groups

    def _direct_pieces(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint32]]]:
        """Yield the bytes and lengths of messages, up to the first one that HDF5 must read."""
        heaps = self._heaps()
        if heaps is None:
            return
        waiting = np.empty(0, REFERENCE)
        fetched, unusual = 0, False
        while True:
            parts, count, size = [waiting], len(waiting), int(waiting["length"].sum())
            while not unusual and fetched < self.messages and count < _PIECE_MESSAGES and size < _PIECE_BYTES:
                references = self._references(fetched)
                if references is None:
                    unusual = True
                    break
                parts.append(references)
                fetched += len(references)
                count += len(references)
                size += int(references["length"].sum())
            # Without their columns, which numpy would compare for each part.
            waiting = np.concatenate([part.view((np.void, REFERENCE.itemsize)) for part in parts]).view(REFERENCE)
            if not len(waiting):
                return
            ends = np.cumsum(waiting["length"], dtype=np.int64)
            count = min(max(1, int(np.searchsorted(ends, _PIECE_BYTES, "right"))), _PIECE_MESSAGES)
            if ends[count - 1] > _PIECE_BYTES + _MOST_BYTES:
                place = fetched - len(waiting) + count - 1
                raise FileError(
                    f"{self.path}: message {place} has {ends[count - 1]} bytes, expected at most {_MOST_BYTES}"
                )
            data = np.empty(int(ends[count - 1]), np.uint8)
            references, waiting = waiting[:count], waiting[count:]
            read = heaps.read(references, data)
            yield data[: int(ends[read - 1]) if read else 0], references["length"][:read]
            if read < count:
                return

    def _heaps(self) -> HeapReader | None:
        """Return the reader of global heaps; None for a file with other sizes, chunks or filters than usual."""
        try:
            properties = self._messages.id.get_create_plist()
            self._filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
            usual = (
                self.hdf5.driver == "sec2"
                and self.hdf5.id.get_create_plist().get_sizes() == (8, 8)
                and self._messages.chunks is not None
                and self._filters in ([], [h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])
            )
            return HeapReader(self.hdf5.id.get_vfd_handle(), self.hdf5.userblock_size) if usual else None
        except (OSError, RuntimeError, ValueError, AttributeError):
            return None

    def _references(self, start: int) -> NDArray[Any] | None:
        """Read the references of one chunk of /msgs, from message `start` on; None if HDF5 must read them."""
        rows = self._messages.chunks[0]
        size = rows * REFERENCE.itemsize
        try:
            skipped, data = self._messages.id.read_direct_chunk((start,))
            if self._filters:
                data = zlib_library.decompressobj().decompress(data, size + 1)
        except (OSError, RuntimeError, ValueError, zlib_library.error):
            return None
        if skipped or len(data) != size:
            return None
        if self._filters[:1] == [h5py.h5z.FILTER_SHUFFLE]:
            data = np.frombuffer(data, np.uint8).reshape(REFERENCE.itemsize, rows).T.tobytes()
        return np.frombuffer(data, REFERENCE)[: self.messages - start]

    def _groups(self, start: int, end: int, default: int) -> NDArray[np.uint8]:
        if self._headers is None or self._only_group is not None:
            return np.full(end - start, default if self._only_group is None else self._only_group, np.uint8)
        return np.ascontiguousarray(_read(self.path, "io_groups", self._headers, start, end)["io_groups"], np.uint8)

    def close(self) -> None:
        self.hdf5.close()


class PacketFile:
    """Packet file, open for reading until close(). FileError in one line when it is damaged or has other columns."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        packets = file["packets" if "packets" in file else "raw_packet"]  # version 0.0 has the latter
        names = set(packets.dtype.names or ())
        self._type = "type" if "chip_key" in names else "packet_type"
        known = {name for layout in LAYOUTS for name in layout.dtype.names or ()} & names
        if (
            not {self._type, "timestamp", "parity"} <= known
            or packets.dtype[self._type].kind not in "iu"
            or any(packets.dtype[name].kind not in _KINDS.get(name, "uif") for name in known)  # "V": also arrays
        ):
            raise FileError(f"{path}: packet file without /packets of known columns")
        self._packets = packets
        self.contents = Contents()
        #: Whether larpix-daq wrote the file.
        self.own = "run" in file
        #: INFO rows without a text in /messages, among the rows that pieces() has read.
        self.textless = 0
        self.rows = len(packets)
        header = file.get("_header")
        self._version = str(header.attrs.get("version", "")) if header is not None else ""
        self.asic = chip_generation(names, self._version)
        #: Columns that the layout of these chips does not have.
        self.unknown_columns = sorted(names - set(layout_of(self.asic).dtype.names or ()))
        #: Whether receipt timestamps have 64 bits.
        self.wide = "receipt_timestamp" in names and packets.dtype["receipt_timestamp"].itemsize > 4
        self._directions = self._has_directions()

    def check(self, asic: Asic, layout: RowLayout) -> None:
        """ConfigError, naming the missing option, when the packets are of other chips or of a wider clock."""
        if self.asic != (Asic.V2 if asic == Asic.V2_DIAGNOSTICS else asic):
            option = next(name for name, code in ASICS.items() if code == self.asic)
            raise ConfigError(f"{self.path}: packets of v{option} chips ({self.version}): give --asic {option}")
        if self.wide and asic != Asic.V1 and layout.dtype["receipt_timestamp"].itemsize == 4:
            raise ConfigError(f"{self.path}: receipt timestamps of 64 bits: give --clock64")
        diagnostics = self.diagnostics()
        if diagnostics is not None and diagnostics != (asic == Asic.V2_DIAGNOSTICS):
            advice = (
                "packets not in fifo diagnostics mode: leave out"
                if asic == Asic.V2_DIAGNOSTICS
                else "packets in fifo diagnostics mode: give"
            )
            raise ConfigError(f"{self.path}: {advice} --fifo-diagnostics")

    @property
    def version(self) -> str:
        return f"LArPix+HDF5 {self._version}".rstrip()

    @property
    def version_number(self) -> tuple[int, ...] | None:
        return _version_number(self._version)

    def diagnostics(self) -> bool | None:
        """Return whether the chips were in the mode fifo diagnostics, by the first rows; None if they do not tell."""
        if "fifo_diagnostics_enabled" not in self._packets.dtype.names:
            return None
        rows = self._read_piece(0)
        found = rows["fifo_diagnostics_enabled"][rows["packet_type"] < PacketType.TIMESTAMP]
        # The majority decides, so that a damaged row does not.
        return bool(found.mean() > 0.5) if len(found) else None

    def description(self) -> dict[str, str]:
        """Return the attributes of the file that tell of its origin."""
        return _describe_file(self._file, "meta", "_header")

    def configurations(self) -> tuple[str, NDArray[Any]]:
        """Return the chip configurations in /configs: the chip generation as --asic names it, and rows of /run/configs.

        Their values count as sent. FileError when they are damaged, or have more registers than any chip.
        """
        if "configs" not in self._file:
            return "", np.zeros(0, own_layout.CONFIGS)
        reader.check_dataset(self.path, "configs", self._file["configs"])
        given = _read(self.path, "configurations", self._file["configs"], 0, len(self._file["configs"]))
        columns = {"timestamp", "io_group", "io_channel", "chip_id", "registers"}
        registers = given["registers"] if columns <= set(given.dtype.names or ()) else np.zeros((0, 0))
        if registers.dtype.kind not in "ui" or registers.ndim != 2 or registers.shape[1] > REGISTERS:
            raise FileError(f"{self.path}: /configs has other columns than expected: {given.dtype}")
        name = _describe_file(self._file, "configs").get("asic_version", "")
        asic = next((ours for ours, theirs in own_layout.NAMES.items() if theirs == name), name)[:16]
        rows = np.zeros(len(given), own_layout.CONFIGS)
        copy_columns(given, rows)
        _copy(given["timestamp"], rows["time_ns"])
        rows["time_ns"] = np.minimum(rows["time_ns"], _LAST_SECOND) * 10**9
        rows["asic"] = asic.encode("utf-8", "replace")
        rows["sent"][:, : registers.shape[1]] = registers
        rows["known"][:, : registers.shape[1]] = SENT
        return asic, rows

    @property
    def has_diagnostics(self) -> bool:
        """Whether the first packets are decoded in the mode fifo diagnostics."""
        if "fifo_diagnostics_enabled" not in self._packets.dtype.names:
            return False
        rows = self._read_piece(0)
        diagnostics = rows["fifo_diagnostics_enabled"][rows["packet_type"] < PacketType.TIMESTAMP]
        return bool(len(diagnostics) and diagnostics.mean() > 0.5)

    def io_groups(self, default: int) -> tuple[int, ...]:
        """Return the io_groups of the first rows; `default` is that of rows without an io_group."""
        rows = self._read_piece(0)
        rows = rows[rows[self._type] != PacketType.MESSAGE]
        if self.asic == Asic.V1:
            groups = key_groups(rows["chip_key"], default)
        else:
            groups = np.empty(len(rows) if "io_group" in (rows.dtype.names or ()) else 0, np.uint8)
            if len(groups):
                groups = groups[_copy(rows["io_group"], groups)]
        return tuple(np.unique(groups).tolist()) or (default,)

    def pieces(self, layout: RowLayout, asic: Asic, default: int) -> Iterator[PacketPiece]:
        """Read all rows in pieces of this layout, with the rows of type 5 replaced by their texts.

        A piece is the rows; their io_groups; the number of rows left out because no word can look like them; and the
        INFO texts, each (number of rows of the piece before it, text, unix seconds). `default` is the io_group of rows
        without one (layout 1.0). Rows of types 0 to 3 have direction 0 when they were sent; in files without directions
        all count as received.
        """
        lines = MessageTexts(self._file, self._version)
        self.contents = Contents()
        first = 0
        for given in self._read_pieces():
            kinds = given[self._type]
            self.contents.add_rows(kinds, (first + len(given)) / max(1, self.rows))
            rows, fits = self._normalise(given, layout, asic)
            info = rows[self._type] == PacketType.MESSAGE
            unfit = len(rows) - int((fits | info).sum())
            self.contents.left_out += unfit
            fits &= ~info
            texts: list[tuple[int, str, int]] = []
            if info.any():
                positions, seconds = np.cumsum(fits)[info], rows["timestamp"][info]
                found = lines.lookup(rows["counter"][info], first + np.flatnonzero(info))
                texts = [(int(positions[i]), text, int(seconds[i])) for i, text in found]
                self.textless = lines.missing
            first += len(given)
            groups = key_groups(rows["chip_key"], default) if asic == Asic.V1 else rows["io_group"]
            if fits.all():
                yield rows, np.ascontiguousarray(groups), 0, texts
            else:
                yield rows[fits], groups[fits], unfit, texts

    def _read_pieces(self) -> Iterator[NDArray[Any]]:
        """Read all rows unchanged, in pieces that keep the rows of one INFO text together."""
        carried = np.empty(0, self._packets.dtype)
        for start in range(0, self.rows, _PIECE_ROWS):  # whole chunks, so that a damaged one costs no other rows
            try:
                given = self._read_piece(start)
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

    def _read_piece(self, start: int) -> NDArray[Any]:
        return _read(self.path, "rows", self._packets, start, min(start + _PIECE_ROWS, self.rows))

    def _has_directions(self) -> bool:
        """Whether the column `direction` is filled: larpix-control's conversions leave it 0 for all rows."""
        if "direction" not in self._packets.dtype.names:
            return False
        if "run" in self._file:
            return True
        data = PacketType.TEST if self.asic == Asic.V3 else PacketType.DATA
        for start in range(0, min(self.rows, _DIRECTION_ROWS), _PIECE_ROWS):
            rows = self._read_piece(start)
            received = rows[self._type] == data
            if "receipt_timestamp" in self._packets.dtype.names:
                received |= (rows[self._type] < PacketType.TIMESTAMP) & (rows["receipt_timestamp"] > 0)
            if received.any():
                return bool(rows["direction"][received].any())
        return True

    def _normalise(self, given: NDArray[Any], layout: RowLayout, asic: Asic) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Convert rows to a layout. Returns the rows, and which of them a word can look like, shape (N,)."""
        rows = np.zeros(len(given), layout.dtype)
        fits = copy_columns(given, rows)
        kind = rows[self._type]
        words = kind < PacketType.TIMESTAMP
        if asic == Asic.V2 and "first_packet" not in (given.dtype.names or ()):
            self._find_first_packet(rows, words, given)
        fits &= ~(words & (rows["timestamp"] >= np.uint64(1 << _TIMESTAMP_BITS[asic])))
        for name in set(_MAX_VALUES) & set(layout.dtype.names or ()):
            fits &= ~(words & (rows[name] > _MAX_VALUES[name]))
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
        """Fill the column `first_packet`, which files before 2.1 do not have.

        larpix-control 3.0 has it as the highest bit of the timestamp. 3.1 left it out: there it is the only unknown bit
        of a data word, so that the recorded parity determines it.
        """
        rows["first_packet"][words] = (rows["timestamp"][words] >> np.uint64(31)) & np.uint64(1)
        rows["timestamp"][words] &= np.uint64(2**31 - 1)
        if "valid_parity" in (given.dtype.names or ()):
            data = np.flatnonzero(words & (rows["packet_type"] == PacketType.DATA) & (rows["first_packet"] == 0))
            encoded = word_codec.encode(rows[data], asic=Asic.V2)
            valid = word_codec.parity(encoded, asic=Asic.V2) == encoded
            rows["first_packet"][data] = valid != (rows["valid_parity"][data] == 1)


class MessageLog:
    """Log of board messages, open for reading until close(). FileError when it does not begin like a log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.contents = Contents()
        self._file: BinaryIO = path.open("rb")
        head = self._file.read(5)
        self._file.seek(0)
        length = int.from_bytes(head[:4], "little")
        if len(head) < 5 or not 8 <= length <= MAX_MESSAGE or head[4] not in _TYPES:
            self._file.close()
            raise FileError(f"{path}: neither a raw file, nor a packet file, nor a log of board messages")

    def pieces(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], int, str]]:
        """Read all messages in pieces: bytes, spans (dtype schema.SPAN), number of bytes in no message, and the reason.

        The reason is empty when all bytes are in messages. A message that the end of the file cuts off is returned as
        far as it goes. After an impossible length the next message cannot be found, so that the rest is in no message.
        """
        self.contents = Contents()
        size = max(1, os.fstat(self._file.fileno()).st_size)
        pending = b""
        place = self._file.seek(0)  # of `pending` in the file
        while data := self._file.read(_READ_BYTES):
            pending += data
            spans, used = split_log(pending)
            if len(spans):
                self.contents.add(np.frombuffer(pending, np.uint8), spans, (place + used) / size)
                yield np.frombuffer(pending, np.uint8), spans, 0, ""
            pending = pending[used:]
            place += used
            length = int.from_bytes(pending[:4], "little")
            if len(pending) >= 4 and length > MAX_MESSAGE:
                text = f"{self.path}: at byte {place}: a message of {length} bytes; what follows is left out"
                lost = self._file.seek(0, os.SEEK_END) - place
                self.contents.bytes += lost
                yield _NO_BYTES, _NO_SPANS, lost, text
                return
        if pending:
            spans = np.array([(4, len(pending) - 4)], SPAN) if len(pending) > 4 else _NO_SPANS
            text = f"{self.path}: ends inside a message, at byte {place + len(pending)}"
            self.contents.add(np.frombuffer(pending, np.uint8), spans, 1.0)
            self.contents.bytes += 0 if len(spans) else len(pending)
            yield np.frombuffer(pending, np.uint8), spans, 0 if len(spans) else len(pending), text

    version = "log of board messages"
    version_number: tuple[int, ...] | None = None

    def description(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._file.close()


class MessageTexts:
    """Texts of the INFO messages of one packet file, whose rows must be looked up in order.

    In files of larpix-daq each message is a block, whose rows are the lines of its text in /messages. (In files of
    before 2026-11-29 all rows of a message have the number of its first line.) In other files each row is a message.
    """

    def __init__(self, file: h5py.File, version: str) -> None:
        self.missing = 0
        self._in_order = "run" not in file and version in _WITHOUT_COUNTER
        self._looked_up = 0  # rows of type 5
        self._lines: list[bytes] = []
        self._block_starts: NDArray[np.int64] | None = None  # first rows of the blocks
        self._end = 0  # row after the last block; a growing file may have rows of further blocks from here on
        # Where /messages is absent or damaged, every text is counted as missing.
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            self._lines = [bytes(line) for line in file["messages"]["message"]]
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            blocks = file["run/blocks"][:]
            self._block_starts = blocks["first_row"].astype(np.int64)
            self._end = int(blocks["first_row"][-1:].sum() + blocks["rows"][-1:].sum())

    def lookup(self, counters: NDArray[Any], positions: NDArray[np.intp]) -> list[tuple[int, str]]:
        """Return the texts of some rows of type 5, each with the index of its first row among these rows.

        `counters`: their column `counter`; `positions`: their row numbers in the file. The text of a message that
        /messages does not have is empty, and its rows are counted in `missing`.
        """
        numbers = counters.astype(np.int64)
        if self._in_order:
            numbers = np.arange(self._looked_up, self._looked_up + len(counters))
        self._looked_up += len(counters)
        first = np.ones(len(numbers), np.bool_)
        if self._block_starts is not None:
            first = np.isin(positions, self._block_starts) | (positions >= self._end) & (
                np.diff(numbers, prepend=-1) != 0
            )
            first[:1] = True
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=len(numbers))
        return [(int(i), self._text(int(numbers[i]), int(rows))) for i, rows in zip(starts, lengths, strict=True)]

    def _text(self, number: int, rows: int) -> str:
        lines = self._lines[number : number + rows]
        self.missing += rows - len(lines)
        return b"".join(lines).decode("utf-8", "replace")


def _read(path: Path, name: str, dataset: Any, start: int, end: int) -> NDArray[Any]:
    """Read entries `start` to `end` of a dataset. FileError, with their `name`, when they are damaged."""
    try:
        rows: NDArray[Any] = dataset[start:end]
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"{path}: {name} {start} to {end} cannot be read: {cause(error)}") from None
    return rows


def chip_generation(names: Collection[str], version: str) -> Asic:
    """Determine the chips from the column names and the version of a file."""
    if "chip_key" in names:
        return Asic.V1
    return Asic.V3 if "reset_sample_flag" in names or version.startswith("3") else Asic.V2


def copy_columns(given: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Copy the columns that both tables have, whatever their types, into `rows`.

    Returns False, shape (N,), for each row with a value that does not fit; the value becomes 0.
    """
    fits = np.ones(len(given), np.bool_)
    for name in rows.dtype.names or ():
        if name in (given.dtype.names or ()):
            fits &= _copy(given[name], rows[name])
    return fits


def _copy(given: NDArray[Any], column: NDArray[Any]) -> NDArray[np.bool_]:
    if column.dtype.kind == "S":
        column[:] = given.astype(column.dtype)
        return np.ones(len(given), np.bool_)
    if given.dtype.kind not in "uif":
        return np.zeros(len(given), np.bool_)
    fits = (given >= 0) & (given <= np.iinfo(column.dtype).max)  # False for NaN
    column[:] = np.where(fits, given, 0)
    return np.asarray(fits)


def key_groups(keys: NDArray[np.bytes_], default: int) -> NDArray[np.uint8]:
    """Extract the io_groups of chip keys "io_group-io_channel-chip_id"; `default` for other texts."""
    names, which = np.unique(keys, return_inverse=True)
    groups = np.full(len(names), default, np.uint8)
    for i, name in enumerate(names.tolist()):
        group = name.split(b"-")[0]
        if name.count(b"-") == 2 and group.isdigit() and len(group) < 4 and int(group) < IO_GROUPS:
            groups[i] = int(group)
    return groups[which.reshape(-1)]
