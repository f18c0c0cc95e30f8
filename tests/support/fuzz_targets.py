"""Fuzz targets: each gives any bytes to one part of larpix-daq, and checks what that part makes of them.

A fault is an exception that the part does not document, a result that contradicts another way to the same result, or a
report of a sanitizer. bench/fuzz.py searches for faults; tests/kernels/test_corpus.py repeats the inputs in
tests/corpus. The first bytes of an input choose options, and numbers are cut to their ranges: any input is good.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import h5py
import msgspec
import numpy as np
from file_builder import Feed, random_rows, run_info
from zmq.utils import z85

from larpixdaq import constants, metrics, open_run, schema
from larpixdaq._native import board_emulator, decoders, hdf5_chunks, monitor_counters, word_codec
from larpixdaq._native.ring_buffer import END, SMALLEST
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.crash_recovery import Predecessors
from larpixdaq.buffer.ring_file import RingFile, open_reader, ring_file_name
from larpixdaq.buffer.spool import SpoolDirectory, SpoolHeader
from larpixdaq.control import snapshots
from larpixdaq.control.log_shipping import unpack_record
from larpixdaq.emulators import network
from larpixdaq.emulators.board_registers import BoardRegisters, ServerCrashError
from larpixdaq.emulators.chips import SUPPLIES, TICKS_PER_BIT, EmulatedChips
from larpixdaq.emulators.command_server import CommandServer
from larpixdaq.emulators.noise import Channels, Noise
from larpixdaq.emulators.revisions import REVISIONS
from larpixdaq.emulators.serial_board import SerialBoard
from larpixdaq.emulators.tile import EmulatedTile
from larpixdaq.errors import ConfigError, FileError, LarpixDaqError, ProtocolError, RequestError, RingError
from larpixdaq.hardware.chip_state import ChipState
from larpixdaq.hardware.power import no_progress
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.hardware.snapshots import SnapshotActions
from larpixdaq.hdf5 import journal, layout, names
from larpixdaq.hdf5.comparison import compare
from larpixdaq.hdf5.export import export
from larpixdaq.hdf5.hot_channels import dead_channels, hot_channels
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recordings import MessageLog, PacketFile, open_recording
from larpixdaq.hdf5.recovery import prepare, recover
from larpixdaq.hdf5.repartition import Borders, copy_rows, repartition
from larpixdaq.hdf5.row_reader import Selection
from larpixdaq.hdf5.run_report import file_info, positions, survey_run
from larpixdaq.hdf5.run_summary import summarise
from larpixdaq.hdf5.salvage import salvage
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.keys import credentials
from larpixdaq.keys.curve import KeyPair
from larpixdaq.protocol import control, hardware, io_class, packed_rows, stream
from larpixdaq.runtime import record_file
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.schema import Asic
from larpixdaq.sources.raw_check import check_raw
from larpixdaq.web import open_page, page

ROWS = [
    (Asic.V1, schema.PACKETS_1_0),
    (Asic.V2, schema.PACKETS_2_4),
    (Asic.V2, schema.PACKETS_2_4_CLOCK64),
    (Asic.V2_DIAGNOSTICS, schema.PACKETS_2_4),
    (Asic.V3, schema.PACKETS_3_0),
]
FORMATS = ["auto", "legacy", "1.0"]
NAME = "LArPix board"
STEM = names.stem(42, 1_795_331_571_000_000_000, 0)
#: Bytes of a line of a template, to which edits refer.
LINE = 64


class Input:
    """The bytes of an input, from which a target takes its options; zeros after the end."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def take(self, size: int) -> bytes:
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "little")

    def choose(self, things: Any) -> Any:
        return things[self.number() % len(things)]

    def piece(self) -> bytes:
        return self.take(self.number(2))


def exact(data: bytes) -> Any:
    """Copy bytes into memory of exactly their size, so that a sanitizer sees each access beyond."""
    return array("B", data)


def fill(decoder: Any, dtype: np.dtype, lengths: list[int]) -> list[np.ndarray]:
    """Decode the whole input, in calls with arrays of these lengths in turn."""
    parts = []
    while True:
        for length in lengths:
            rows = np.zeros(length, dtype)
            made = decoder.decode(rows)
            assert 0 <= made <= length
            parts.append(rows[:made])
            if made < length:
                return parts


def check_ledger(counts: np.ndarray, rows: int) -> None:
    """Check the ledger's equations, as source_driver does, but for one io_group and in a tenth of the time."""
    c = dict(zip(constants.COUNTS, counts.tolist(), strict=True))
    taken = sum(c[f"{kind}_bytes"] for kind in ("header", "word", "trailing", "rejected", "resync"))
    assert c["pending_before"] + c["bytes_in"] == taken + c["pending_after"]
    assert c["words_in"] == c["word_rows"] + c["unknown_words"] + c["rejected_words"]
    assert rows == c["word_rows"] + c["time_rows"]
    assert c["bad_parity"] <= c["packets"] <= c["word_rows"]


class Decoded(NamedTuple):
    """Rows and counters of a decoder, and the words without row."""

    rows: np.ndarray
    counts: np.ndarray
    unknown: np.ndarray

    @classmethod
    def of(cls, decoder: Any, feeds: list[tuple[Any, ...]], dtype: np.dtype, lengths: list[int], heard: int) -> Decoded:
        counts = np.zeros(len(constants.COUNTS), np.uint64)
        decoder.start(counts)
        parts, n = [np.zeros(0, dtype)], 0
        for number, feed in enumerate(feeds):
            if heard:
                decoder.heard((heard + number * (heard >> 32)) % 2**64, number * 0.01, number * 0.01 + 0.02)
            decoder.feed(*feed)
            parts += fill(decoder, dtype, lengths)
            n = sum(map(len, parts))
            check_ledger(counts, n)
        decoder.clock_bounds()
        assert len(decoder.noticed()) == len(schema.NOTICES)
        return cls(np.concatenate(parts), counts, decoder.take_unknown())

    def same(self, other: Decoded) -> bool:
        return all(a.tobytes() == b.tobytes() for a, b in zip(self, other, strict=True))


def messages_of(log: bytes) -> list[bytes]:
    """Split a log of board messages; the bytes of an incomplete message are the last message."""
    spans, used = decoders.split_log(exact(log))
    messages = [log[start : start + length] for start, length in spans.tolist()]
    return [*messages, log[used + 4 :]] if len(log) > used + 4 else messages


def whole_and_single(make: Callable[[], Any], log: bytes, dtype: np.dtype, lengths: list[int], heard: int) -> Decoded:
    """Decode messages all at once, and each by itself: both must give the same."""
    messages = messages_of(log)
    buffer = exact(b"".join(messages))
    spans = np.zeros(len(messages), schema.SPAN)
    spans["length"] = [len(message) for message in messages]
    spans["start"] = np.cumsum(spans["length"]) - spans["length"]
    whole = Decoded.of(make(), [(buffer, spans)], dtype, [4096], heard)
    first = np.zeros(1, schema.SPAN)
    feeds = []
    for message in messages:
        first["length"] = len(message)
        feeds.append((exact(message), first.copy()))
    assert whole.same(Decoded.of(make(), feeds, dtype, lengths, heard))
    return whole


# Decoders


def pacman(data: bytes) -> None:
    given = Input(data)
    asic, dtype = given.choose(ROWS)
    options = {"format": given.choose(FORMATS), "clock64": bool(given.number() & 1)}
    lengths, heard = [given.number() + 1, given.number() + 1], given.number(8)
    whole_and_single(lambda: decoders.PacmanDecoder(7, asic, **options), given.left, dtype, lengths, heard)


def bern(data: bytes) -> None:
    given = Input(data)
    asic, dtype = given.choose(ROWS)
    lengths, heard = [given.number() + 1, given.number() + 1], given.number(8)
    whole_and_single(lambda: decoders.BernDecoder(7, asic), given.left, dtype, lengths, heard)


def serial(data: bytes) -> None:
    """Decode a stream all at once, and cut into pieces. Flushes and new seconds in one more way, which may differ."""
    given = Input(data)
    asic, dtype = given.choose(ROWS)
    rule = given.choose(["strict", "larpix-control"])
    size, lengths, heard = given.number() + 1, [given.number() + 1, given.number() + 1], given.number(8)
    line = given.left

    def make() -> Any:
        return decoders.SerialDecoder(7, asic, rule=rule)

    whole = Decoded.of(make(), [(exact(line), 5)], dtype, [4096], 0)
    pieces = [(exact(line[at : at + size]), 5) for at in range(0, len(line), size)] or [(exact(b""), 5)]
    assert whole.same(Decoded.of(make(), pieces, dtype, lengths, heard))
    decoder, counts, rows = make(), np.zeros(len(constants.COUNTS), np.uint64), 0
    decoder.start(counts)
    for number, (piece, _) in enumerate(pieces):
        decoder.feed(piece, number)
        if number % 2:
            decoder.flush()
        rows += sum(map(len, fill(decoder, dtype, lengths)))
        check_ledger(counts, rows)


def log_of(messages: list[bytes]) -> bytes:
    return b"".join(len(message).to_bytes(4, "little") + message for message in messages)


def emulated_messages(asic: Asic, n: int = 40, **options: Any) -> list[bytes]:
    board = board_emulator.PacmanBoard(asic, rate=5000.0, seed=3, seconds=1_700_000_000, tick=2**31 - 20_000, **options)
    made = board.fill(n, 3)
    return [bytes(board.buffer[start : start + length]) for start, length in board.spans[:made].tolist()]


def decoder_seeds() -> dict[str, Iterator[bytes]]:
    options = bytes([2, 40]) + (1_700_000_000 << 32).to_bytes(8, "little")

    def of_pacman() -> Iterator[bytes]:
        yield bytes(13) + log_of([b"", b"", b"D"])  # an empty first message
        for number, (asic, _) in enumerate(ROWS):
            messages = emulated_messages(asic, odd=0.2, fifo_full=0.1, pps=number % 2 == 0)
            yield bytes([number, number % 2, 0]) + options + log_of([*messages, messages[-1], messages[0][:-5]])
            rows = random_rows(np.random.default_rng(number), 30, schema.layout_of(asic))
            for form in ("legacy", "1.0"):
                with contextlib.suppress(ValueError):
                    buffer, spans = decoders.encode_pacman(rows, asic=asic, format=form, seconds=1_700_000_000)
                    made = [bytes(buffer[start : start + length]) for start, length in spans.tolist()]
                    yield bytes([number, 0, 0]) + options + log_of(made)
        clock = b"D" + (1_700_000_000).to_bytes(4, "little") + b"\0\2\0"
        yield bytes([2, 1, 1]) + options + log_of([clock + b"D\1" + b"\3" * 14 + b"SH" + bytes(6) + b"\1" * 8])

    def of_bern() -> Iterator[bytes]:
        words = b"".join(bytes([number, 17 * number % 256, 3, 4, 5, 6, 7, 0x40]) for number in range(9))
        second = (1_700_000_000).to_bytes(8, "little")
        sent = [b"T\0" + bytes(4) + second, b"D\4" + bytes(4) + words, b"D\4" + bytes(4) + words + b"!"]
        sent += [b"H\0" + bytes(4), b"T\0" + bytes(4) + second + b"\0"]
        for number in range(len(ROWS)):
            yield bytes([number]) + options + log_of([*(b"\1\0" + message for message in sent), b"\2\0D\0", b""])

    def of_serial() -> Iterator[bytes]:
        for number, (asic, _) in enumerate(ROWS):
            board = board_emulator.PacmanBoard(asic, rate=5000.0, odd=0.2)
            words = np.zeros(12, np.uint64)
            board.packets(words)
            line = decoders.encode_serial(words)
            yield bytes([number, number % 2, 6]) + options + line[:33] + b"s?sq" + line[33:] + b"sss" + line[:7]

    return {"pacman": of_pacman(), "bern": of_bern(), "serial": of_serial()}


# Encoders and the word codec


def words(data: bytes) -> None:
    given = Input(data)
    sent, receipt, channel = given.number() & 1, given.number(4), given.number()
    n = len(given.left) // 8
    words = np.frombuffer(exact(given.left[: 8 * n]), np.uint64)
    for asic, dtype in ROWS:
        rows = np.zeros(n, dtype)
        made = word_codec.decode(
            words, rows, asic=asic, io_group=7, io_channel=channel, receipt=receipt, direction=sent
        )
        expected = words & np.uint64(2**54 - 1) if asic == Asic.V1 else words
        expected = expected[(words & np.uint64(3)) > 0] if asic == Asic.V3 else expected
        assert word_codec.encode(rows[:made], asic=asic).tolist() == expected.tolist()
        right = word_codec.parity(words, asic=asic)
        rows = np.zeros(n, dtype)
        made = word_codec.decode(right, rows, asic=asic)
        assert (rows["valid_parity"][:made] == 1).all()
        decoder = decoders.SerialDecoder(7, asic, rule="larpix-control")
        framed = Decoded.of(decoder, [(exact(decoders.encode_serial(words)), 0)], dtype, [4096], 0)
        assert word_codec.encode(framed.rows, asic=asic).tolist() == expected.tolist()


@cache
def counters() -> Any:
    return monitor_counters.PacketCounters(1 << 20)  # with a page for some channels only


def rows(data: bytes) -> None:
    """Encode any rows as words and as messages, count them, and pack them."""
    given = Input(data)
    asic, dtype = given.choose(ROWS)
    options = {"format": given.choose(FORMATS[1:]), "clock64": bool(given.number() & 1)}
    seconds = given.number(5)
    n = len(given.left) // dtype.itemsize
    content = exact(given.left[: n * dtype.itemsize])
    rows = np.frombuffer(content, dtype)
    assert len(word_codec.encode(rows, asic=asic)) == np.count_nonzero(schema.types_of(rows) < 4)
    tallies = np.zeros((256, len(hdf5_chunks.TALLY)), np.uint64)
    (code,) = (each.code for each in schema.LAYOUTS if each.dtype == dtype)
    hdf5_chunks.tally(np.frombuffer(content, np.uint8), code, tallies)
    tallied = dict(zip(hdf5_chunks.TALLY, tallies.sum(0).tolist(), strict=True))
    kinds = ("word_rows", "time_rows", "info_rows", "sent_rows", "other_rows")
    assert sum(tallied[kind] for kind in kinds) == n
    counters().reset()
    counters().count(rows)
    counters().chips()
    counted, (histogram, _) = counters().channels(), counters().histogram()
    assert histogram.sum() <= counted.sum() <= n
    assert counters().types().sum() + counters().unplaced >= n
    if n:
        packed = hdf5_chunks.Packer(n, dtype.itemsize).pack(np.frombuffer(content, np.uint8))
        planes = np.frombuffer(content, np.uint8).reshape(n, dtype.itemsize).T
        assert zlib.decompress(packed) == planes.tobytes()
    try:
        buffer, spans = decoders.encode_pacman(rows, asic=asic, seconds=seconds, **options)
    except ValueError:  # a row that does not fit
        return
    first = Decoded.of(decoders.PacmanDecoder(7, asic, **options), [(buffer, spans)], dtype, [4096], 0)
    if len(first.unknown) or (options["clock64"] and dtype == schema.PACKETS_2_4):
        return
    again, more = decoders.encode_pacman(first.rows, asic=asic, seconds=seconds, **options)
    assert (again, more.tobytes()) == (buffer, spans.tobytes())


def chunks(data: bytes) -> None:
    """Pack chunks whose planes have runs, few values, or random bytes."""
    given = Input(data)
    n, itemsize = given.number(2) % 3000 + 1, given.number() % 48 + 1
    planes = np.zeros((itemsize, n), np.uint8)
    for number, plane in enumerate(planes):
        kind, seed = given.number(), given.number()
        content = np.frombuffer(given.take(kind >> 2), np.uint8)
        if kind & 3 == 0 and len(content) > 1:  # pairs of a value and a length
            runs = np.repeat(content[::2][: len(content) // 2], content[1::2])
            plane[: min(n, len(runs))] = runs[:n]
        elif kind & 3 == 1 and len(content):
            plane[:] = np.resize(content, n)
        elif kind & 3 == 2:  # codes of many lengths
            plane[:] = np.minimum(np.random.default_rng([seed, number]).geometric(0.02 + seed / 300, n), 255)
        elif kind & 3 == 3:
            plane[:] = np.random.default_rng([seed, number]).integers(0, 256, n)
    chunk = exact(np.ascontiguousarray(planes.T).tobytes())
    packer = hdf5_chunks.Packer(n, itemsize)
    packed = packer.pack(np.frombuffer(chunk, np.uint8))
    assert zlib.decompress(packed) == planes.tobytes()
    assert packer.pack(np.frombuffer(chunk, np.uint8)) == packed


def emulated_tile(asic: str, registers: BoardRegisters | None, **options: Any) -> EmulatedTile:
    wiring = network.Wiring([(1, 1), (1, 2), (1, 3)]) if asic == "1" else network.tile_wiring(3)
    chips = EmulatedChips(wiring, asic, powered=True)
    noise = Noise(chips, Channels(3, chips.map.channels, [1]), [2])
    return EmulatedTile(noise, seconds=1_700_000_000, tick=70_000_000, registers=registers, **options)


def board_commands(data: bytes) -> None:
    """Requests to an emulated PACMAN with chips."""
    given = Input(data)
    asic, revision = given.choose(["2", "2b", "lightpix-1", "3"]), given.choose(sorted(REVISIONS))
    registers = BoardRegisters(REVISIONS[revision])
    registers.switch_on(1, SUPPLIES[asic].usual, TICKS_PER_BIT[asic])
    tile = emulated_tile(asic, registers)
    registers.clock = lambda: tile.receipt
    server = CommandServer(registers, tile.transmit)
    for request in messages_of(given.left):
        try:
            reply = server.answer(request)
        except ServerCrashError:
            return
        assert len(reply) % 16 == 8
        assert reply[8:9] == b"E" or len(reply) == len(request)
    while tile.fill(5000):
        board_emulator.count_words(tile.buffer, tile.spans)


def serial_commands(data: bytes) -> None:
    """Bytes to an emulated serial board with chips."""
    given = Input(data)
    asic, size = given.choose(["1", "2", "2b", "3"]), given.number() + 1
    tile = emulated_tile(asic, None, heartbeat=0, carries=1000)
    board = SerialBoard(tile, None)  # type: ignore[arg-type]  # nothing is sent
    for at in range(0, len(given.left), size):
        board.receive(given.left[at : at + size])
    decoders.encode_serial(tile.take_packets())


def encoder_seeds() -> dict[str, Iterator[bytes]]:
    def request(*words: bytes) -> bytes:
        return b"?" + bytes(5) + len(words).to_bytes(2, "little") + b"".join(words)

    def register(kind: bytes, address: int, value: int = 0) -> bytes:
        return kind + bytes(3) + address.to_bytes(4, "little") + bytes(4) + value.to_bytes(4, "little")

    def chip_word(kind: int, chip: int, address: int, value: int, io_channel: int = 1) -> bytes:
        bare = np.array([kind | chip << 2 | address << 10 | value << 18 | 0x89504E47 << 26], np.uint64)
        return b"D" + bytes([io_channel]) + bytes(6) + word_codec.parity(bare, asic=Asic.V3).tobytes()

    def of_words() -> Iterator[bytes]:
        for asic, _ in ROWS:
            made = np.zeros(20, np.uint64)
            board_emulator.PacmanBoard(asic, rate=5000.0, odd=0.3).packets(made)
            yield bytes([1, 1, 2, 3, 4, 9]) + made.tobytes()

    def of_rows() -> Iterator[bytes]:
        for number, (asic, dtype) in enumerate(ROWS):
            board = emulated_messages(asic, odd=0.3)
            made = Decoded.of(
                decoders.PacmanDecoder(7, asic), [(exact(m), np.array([(0, len(m))], schema.SPAN)) for m in board],
                dtype, [4096], 0,
            )  # fmt: skip
            for form in (0, 1):
                yield bytes([number, form, 0, 1, 2, 3, 4, 0]) + made.rows.tobytes()
            plain = random_rows(np.random.default_rng(number), 40, schema.layout_of(asic))
            if plain.dtype == dtype:
                yield bytes([number, 1, 0, 1, 2, 3, 4, 0]) + plain.tobytes()

    def of_chunks() -> Iterator[bytes]:
        yield b"\xff\x01\x08" + bytes([36, 0]) + b"\1\xff" * 4 + bytes([33, 0]) + b"abcdefgh" + bytes([2, 9, 3, 7] * 3)
        yield b"\xb8\x0b\x20" + bytes(range(250)) * 3

    def of_board() -> Iterator[bytes]:
        for asic in range(4):
            for revision in range(len(REVISIONS)):
                words = [chip_word(2, 1, 64, 9), chip_word(3, 1, 64, 0), chip_word(2, 255, 124, 3, 255)]
                registers = [register(b"R", address) for address in (0, 0x10, 0x1004, 0x24010, 0x24030)]
                registers += [register(b"W", 0x10, 0x301), register(b"W", 0x1010, 6), register(b"W", 0x3010, 5)]
                requests = [request(b"P" + bytes(15), *registers), request(*words), request(*words)[:-3], b"?"]
                yield bytes([asic, revision]) + log_of([*requests, request(register(b"Q", 0))])

    def of_serial() -> Iterator[bytes]:
        for asic in range(4):
            frames = [b"s" + chip_word(kind, 1, 32, 9)[8:] + b"q" for kind in (2, 3, 0, 2)]
            frames += [b"c" + bytes([number, 4]) + bytes(6) + b"q" for number in (0, 1, 2, 6)]
            yield bytes([asic, 13]) + b"".join(frames) + b"sc" + frames[0]

    return {
        "words": of_words(),
        "rows": of_rows(),
        "chunks": of_chunks(),
        "board_commands": of_board(),
        "serial_commands": of_serial(),
    }


# Readers of files


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="larpixdaq-fuzz-")


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Give an empty folder, whose files are removed afterwards."""
    path = Path(_folder().name)
    try:
        yield path
    finally:
        for file in path.iterdir():
            file.unlink()


def one_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)


@contextlib.contextmanager
def documented(*kinds: type[LarpixDaqError]) -> Iterator[None]:
    """Take the documented errors, which have one line."""
    try:
        yield
    except kinds as error:
        one_line(error)


class Template:
    """A file that is changed by the edits in an input, each (line u16, offset u8, size u8, bytes of this size).

    A line has LINE bytes; those without content have no number. Size 0 cuts the file there. Edits end with a line
    0xFFFF, or with the input.
    """

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        whole = np.frombuffer(content.ljust(-(-self.size // LINE) * LINE, b"\0"), np.uint8).reshape(-1, LINE)
        self._lines = np.flatnonzero(whole.any(1))
        ends = np.flatnonzero(np.diff(self._lines, append=1 << 60) > 1)
        starts = np.concatenate(([0], ends[:-1] + 1))
        self._pieces = [
            (int(self._lines[a]) * LINE, content[self._lines[a] * LINE : (self._lines[b] + 1) * LINE])
            for a, b in zip(starts, ends, strict=True)
        ]

    def write(self, path: Path, given: Input) -> None:
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.truncate(self.size)
            for start, piece in self._pieces:
                file.seek(start)
                file.write(piece)
            while given.left and (line := given.number(2)) != 0xFFFF:
                place = int(self._lines[line % len(self._lines)]) * LINE + given.number() % LINE
                size = given.number()
                if size:
                    file.seek(place)
                    file.write(given.take(size))
                else:
                    file.truncate(place)


@cache
def worker() -> Worker:
    return Worker("spool")


def take_over(path: Path) -> None:
    """Take over the files of a dead producer, and read all that they hold."""
    spool = SpoolDirectory(path, "larpixdaq", 1 << 30, worker())
    for left in Predecessors(NAME, path, path, spool, 0).take_over(()):
        for file in left.files:
            at = file.header.start
            while at < file.next:
                at += len(file.read(at, min(file.next, at + 100), 1 << 20))
            file.leave()
        if left.ring_file is None:
            continue
        ring = left.ring_file.ring
        for index in range(ring.tail, ring.head):
            frame = stream.unpack_producer(ring.packed_header(index), "the ring")
            rows = ring.payload(index)
            assert (ring.kind(index) == END) == isinstance(frame, stream.End)
            assert isinstance(frame, stream.End) or record_file.crc32(rows) == frame.crc32 or left.ring_file.damaged
        assert not ring.run_open
        ring.used_ranges()
        ring.unused_ranges()
        if ring.head > ring.tail:
            ring.free_to(ring.head)
        left.ring_file.leave()


@cache
def ring_template() -> Template:
    """The ring of a producer that died in its second run, with an open block."""
    with folder() as path:
        ring_file = RingFile.make(path, path, NAME, 7, SMALLEST)
        row_layout = schema.layout(2)
        builder = BlockBuilder(ring_file.ring, NAME, 7, row_layout, [1, 2], clock=lambda: 0.0, wall=lambda: 1 << 60)
        for run in (1, 2):
            builder.begin(run, ["storage", "second"])
            builder.info(f"Beginning run {run}")
            for n in (5, 3):
                free = builder.rows()
                assert free is not None
                free[:n] = random_rows(np.random.default_rng(n), n, row_layout)
                ring_file.ring.counts[1, constants.Count.PACKETS] += np.uint64(n)
                builder.publish(n)
                if n == 5:
                    builder.close_block()
            if run == 1:
                builder.end("closed", [], [])
        ring_file.leave()
        return Template(ring_file.path.read_bytes())


def ring(data: bytes) -> None:
    """The ring of a dead producer: taken over, and read as a consumer reads that of a living one."""
    with folder() as path:
        file = path / ring_file_name(path, NAME, 7)
        ring_template().write(file, Input(data))
        with documented(RingError, FileError):
            reader = open_reader(file, NAME, 7)
            for index in (0, 1, 2, 5, 65_536, 2**64 - 1):
                view, copy = reader.view(index), reader.read(index)
                assert view is None or copy is None or bytes(view) == copy
        take_over(path)


def spool(data: bytes) -> None:
    """A spool file: its header, then records and other bytes."""
    given = Input(data)
    flags = given.number()
    header = SpoolHeader(NAME, 7, 1, 0, given.number(), 2, 5, ["storage"])
    packed = given.piece() if flags & 1 else msgspec.msgpack.encode(header)
    parts = [b"LPXSPOL\x01" + len(packed).to_bytes(4, "little") + record_file.crc32(packed).to_bytes(4, "little")]
    parts.append(packed)
    records = record_file.RecordFormat(b"LDS1", indexed=True)
    index = header.start
    while given.left:
        kind = given.number()
        if kind & 1:
            parts.append(given.piece())
            continue
        pieces = given.piece(), [given.piece()]
        parts += records.pack(*pieces, (index + (kind >> 1)) % 2**64)
        index += 1 + (kind >> 1)
    with folder() as path:
        file = path / f"larpixdaq-{7:016x}-000000.spool"
        file.touch(0o600)
        file.write_bytes(b"".join(parts))
        take_over(path)


def write_run(path: Path) -> tuple[bytes, list[tuple[bytes, Any]]]:
    """Write a file in which every table has rows. Returns its content, and further records of its journal."""
    file = RunFile(path, run_info())
    first, second, third = Feed(), Feed(producer="second", epoch=9), Feed(producer="third", epoch=5)
    chips = np.arange(6, dtype=np.uint8).reshape(2, 3)
    arrays = (np.arange(2 * 256, dtype=np.uint8).reshape(2, 256) for _ in range(3))
    configurations = stream.Configurations("2", chips, *arrays)
    info, info_rows = first.info(configurations.text())
    file.add(msgspec.structs.replace(info, configs=configurations.pack()), info_rows)
    file.add(*first.info("Beginning run"))
    file.set_sources([stream.ConnectedBoard("second", 1, "PACMAN", "127.0.0.1", "here")])
    rng = np.random.default_rng(1)
    file.add(*first.block(random_rows(rng, 300), gaps=[stream.Gap(1, 5, 10, 20)]))
    second.sequence, second.first_packet = 2, 10  # its first blocks are missing
    file.add(*second.block(random_rows(rng, 20)))
    file.add(*first.info("Ending run"))
    file.end(second.end())
    unknown = [stream.UnknownWord(1, 5, 1, b"unknown word")]
    verdicts = [stream.LossVerdict(1, "suspect", "for a test", 1, 2, 3), stream.LossVerdict(2, "complete", "", 0, 0, 0)]
    outside = [[1, *range(len(constants.COUNTS))]]
    file.end(first.end(unknown=unknown, verdicts=verdicts, outside=outside, counts={1: {"dropped": 5}}))
    content = file.close().path.read_bytes()
    frames = [third.block(random_rows(rng, 9)), third.info("an INFO message"), (third.end("recovered"), [])]
    return content, [(stream.pack(frame), np.asarray(rows).tobytes()) for frame, rows in frames]


@cache
def finished_template() -> Template:
    with folder() as path:
        return Template(write_run(path)[0])


@cache
def unfinished_templates() -> tuple[Template, Template]:
    """A part and its journal."""
    with folder() as path:
        content, further = write_run(path)
        part = path / "part"
        part.write_bytes(content)
        with h5py.File(part, "r+") as file:
            info = file["run/info"][:]
            info["condition"] = constants.RunCondition.RUNNING.encode()
            file["run/info"][:] = info
        records = record_file.RecordFormat(b"LDJ1")
        packed = b"".join(bytes(piece) for header, rows in further for piece in records.pack(header, [rows]))
        return Template(part.read_bytes()), Template(packed)


def inspect(path: Path) -> None:
    """Read a file in every way, and its directory."""
    for line in verify(path).findings:
        assert line
        assert "\n" not in line
    with documented(FileError):
        file_info(path)
    with documented(FileError), DataFile(path) as file:
        for name in ("configs", "run/info", *layout.TABLES):
            with documented(FileError):
                file.table(name)
        for _ in file.pieces():
            pass
    read_run(path)
    for rows in (100, 1 << 30):
        with documented(FileError):
            summary = summarise(path, rows=rows)
            json.dumps(summary.plain(channels=len(summary.chips) < 100), allow_nan=False)
            with documented(ConfigError):
                hot_channels(summary)
                dead_channels(summary)
    replay(path)
    warnings: list[str] = []
    positions(path.parent, warnings=warnings)
    assert all(line and "\n" not in line for line in warnings)
    survey_run(path.parent, 42)


def read_run(path: Path) -> None:
    """Read the run of a file in every way."""
    with documented(FileError), open_run(path) as run:
        known = ("info", "condition", "reasons", "sources", "e_log", "texts", "configurations", "ledger", "verdicts")
        for name in known:
            with documented(FileError):
                getattr(run, name)
        for listed in (run.messages, run.blocks, run.gaps, run.configuration_changes, run.chunks):
            with documented(FileError):
                for _ in listed():
                    pass
        for selection in ({"chip": "1-17-3", "columns": "row"}, {"begin": 1_795_331_571}, {"packet_type": [0, 5]}):
            with documented(FileError):
                assert len(run.read(start=-1000, **selection)) <= 1000
        run.refresh()


def use_tools(path: Path) -> None:
    """Let each tool read a file, and write others of it, of which nothing is left when it fails."""
    with documented(FileError):
        compare(path, path)
    for line in check_raw(path).findings:
        assert line
        assert "\n" not in line
    new = path.parent / "new"

    def copy(directory: Path) -> None:
        copy_rows([path], directory / "x.h5", "split", 3, 200)

    def divide(directory: Path) -> None:
        repartition([path], directory, Borders(rows=300), "split")

    def write(directory: Path) -> None:
        with open_run(path, parts=False) as run:
            export(run, directory / "x.csv", "csv", Selection(types=(0, 4), channels=(1, 2)))

    for tool in (lambda directory: salvage(path, directory), copy, divide, write):
        new.mkdir()
        try:
            with documented(FileError):
                try:
                    tool(new)
                except FileError:
                    assert list(new.iterdir()) == []
                    raise
        finally:
            shutil.rmtree(new)


def replay(path: Path) -> None:
    """Read a file as a recording."""
    with documented(FileError, ConfigError):
        recording = open_recording(path)
        if recording is None:
            return
        with contextlib.closing(recording):
            recording.io_groups(1)
            if isinstance(recording, PacketFile):
                row_layout = schema.layout_of(recording.asic)
                with documented(ConfigError):
                    recording.check(recording.asic, row_layout)
                for rows, groups, unfit, _ in recording.pieces(row_layout, recording.asic, 1):
                    assert len(rows) == len(groups)
                    assert unfit >= 0
                    with contextlib.suppress(ValueError):
                        decoders.encode_pacman(rows, asic=recording.asic, format="1.0")
            else:
                for buffer, spans, groups in recording.pieces(1):
                    assert len(spans) == len(groups)
                    decoder = decoders.PacmanDecoder(1, Asic.V2)
                    Decoded.of(decoder, [(buffer, spans)], schema.PACKETS_2_4, [4096], 0)


def finished(data: bytes) -> None:
    """A finished file of larpix-daq. The first byte: whether its checksums are made to fit."""
    given = Input(data)
    fits = given.number() & 1
    with folder() as path:
        file = path / f"{STEM}.h5"
        finished_template().write(file, given)
        if fits:
            with contextlib.suppress(OSError, RuntimeError, ValueError, KeyError), h5py.File(file, "r+") as opened:
                sums = opened["run/checksums"]
                sums[:] = np.array(
                    [(name, len(opened[name]), layout.table_crc32(opened[name])) for name in layout.CHECKED], sums.dtype
                )
        inspect(file)
        use_tools(file)


def unfinished(data: bytes) -> None:
    """The part of a dead writer and its journal, recovered."""
    given = Input(data)
    part, journal_file = unfinished_templates()
    with folder() as path:
        file = path / f"{STEM}.h5.part"
        part.write(file, given)
        if given.left[:1] != b"-":  # "-": without journal
            journal_file.write(file.with_suffix(".journal"), given)
        warnings: list[str] = []
        positions(path, warnings=warnings)
        read_run(file)
        with documented(FileError):
            prepare(file)
        recover_and_verify(file)


def recover_and_verify(file: Path) -> None:
    with documented(FileError):
        report = recover(file)
        assert "\n" not in report.text
        if report.path is not None:
            assert all(line and "\n" not in line for line in verify(report.path).findings)


def journal_records(data: bytes) -> None:
    """A journal without its part: records, and other bytes between them. The first byte: whether it is recovered."""
    given = Input(data)
    whole = given.number() & 1
    records = record_file.RecordFormat(b"LDJ1")
    parts: list[Any] = []
    while given.left:
        if given.number() & 1:
            parts.append(given.piece())
        else:
            header = given.piece()
            parts += records.pack(header, [given.piece()])
    with folder() as path:
        file = path / f"{STEM}.h5.journal"
        file.write_bytes(b"".join(parts))
        with documented(FileError):
            contents = journal.read(file)
            assert all(0 <= first < stop <= file.stat().st_size for first, stop in contents.damaged)
        if whole:
            recover_and_verify(file)


def recording(data: bytes) -> None:
    """A packet file of another program: any rows of known columns, in types that may differ, with any version."""
    given = Input(data)
    _, dtype = given.choose(ROWS)
    version = given.choose(["0.0", "1.0", "2.0", "2.1", "2.3", "2.4", "3.0", "x"])
    missing, other = given.number(4), given.choose([None, "<u4", "<i8", "<f8", "S3", "u1"])
    changed, messages = given.number(), given.piece()
    columns = [(name, dtype[name]) for number, name in enumerate(dtype.names) if not missing >> number & 1]
    if columns and other:
        columns[changed % len(columns)] = columns[changed % len(columns)][0], np.dtype(other)
    kinds = np.dtype(columns) if columns else np.dtype([("nothing", "u1")])
    n = len(given.left) // kinds.itemsize
    with folder() as path:
        file = path / "recording.h5"
        with h5py.File(file, "w") as made:
            made.create_group("_header").attrs["version"] = version
            made["packets"] = np.frombuffer(given.left[: n * kinds.itemsize], kinds)
            made["messages"] = np.frombuffer(messages[: len(messages) // 76 * 76], layout.MESSAGES)
        inspect(file)
        use_tools(file)


def raw_recording(data: bytes) -> None:
    """Board messages, in a raw file of larpix-control and in a log."""
    messages = messages_of(data[1:])
    with folder() as path:
        file = path / "raw.h5"
        with h5py.File(file, "w") as made:
            kind = h5py.vlen_dtype(np.uint8)
            made.create_dataset("msgs", (len(messages),), kind)[:] = [np.frombuffer(m, np.uint8) for m in messages]
            made["msg_headers"] = np.array([(len(m) % 256,) for m in messages], [("io_groups", "u1")])
        replay(file)
        use_tools(file)
        file = path / "log"
        file.write_bytes(data[1:])
        with documented(FileError):
            log = MessageLog(file)
            with contextlib.closing(log):
                used = 0
                for buffer, spans, left_out, _ in log.pieces():
                    decoder = decoders.PacmanDecoder(1, Asic.V2)
                    Decoded.of(decoder, [(buffer, spans)], schema.PACKETS_2_4, [4096], 0)
                    used += int(spans["length"].sum()) + 4 * len(spans) + left_out
                assert used == len(data) - 1


@cache
def snapshot_actions() -> SnapshotActions:
    """The actions of a producer that knows two chips."""
    setup = hardware.Setup([hardware.BoardInfo(1, "pacman", "board")], "2b", int(Asic.V2), 2)
    chips = ChipState(ChipRegisters("2b"), ProducerPipe(None, setup))  # type: ignore[arg-type]
    chips.find(["1-1-11", "1-2-12"])
    return SnapshotActions(chips, no_progress)


def chip_snapshots(data: bytes) -> None:
    """A chip's file of a laboratory, a snapshot's file, a list of disabled channels, and a snapshot in a request."""
    actions = snapshot_actions()
    packed = [zlib.compress(data, 1), data]
    with folder() as path:
        file = path / "one.json"
        file.write_bytes(data)
        for place in (file, path):
            with documented(ConfigError, RequestError):
                found = snapshots.read(place)
                packed.append(snapshots.pack(found))
                assert snapshots.unpack(packed[-1]) == found
            file = file.rename(path / "config_1-1-11.json")
        with documented(ConfigError, RequestError):
            actions.disable_channels(snapshots.read_disabled(file) | {"1-9-9": []})
    for content in packed:
        with documented(RequestError):
            assert actions.compare_snapshot(content)["chips"] <= 2
            assert actions.compare_snapshot(content, content)["same"]


def reader_seeds() -> dict[str, Iterator[bytes]]:
    feed = Feed()
    rows = random_rows(np.random.default_rng(1), 4)
    frames = [feed.info("Beginning run"), feed.block(rows), (feed.end(), rows[:0])]
    records = [(stream.pack(frame), payload.tobytes()) for frame, payload in frames]
    pieces = [part for record in records for part in record]

    def piece(data: bytes) -> bytes:
        return len(data).to_bytes(2, "little") + data

    def of_edits(lead: bytes) -> Iterator[bytes]:
        yield lead
        for line in (0, 3, 40, 150):
            yield lead + line.to_bytes(2, "little") + bytes([8, 8]) + b"\xff" * 8
        yield lead + bytes([90, 0, 0, 0])

    def of_spool() -> Iterator[bytes]:
        yield bytes(2) + b"".join(b"\0" + piece(header) + piece(payload) for header, payload in records)
        yield bytes([0, 3]) + b"\0" + piece(pieces[0]) + piece(pieces[1]) + b"\1" + piece(b"LDS1!") + b"\4" + piece(b"")
        yield b"\1\0" + piece(b"\x98") + b"\0"

    def of_journal() -> Iterator[bytes]:
        yield b"\1" + b"".join(b"\0" + piece(header) + piece(payload) for header, payload in records)
        yield b"\0" + b"\0" + piece(pieces[2]) + piece(pieces[3]) + b"\1" + piece(b"LDJ1" + bytes(7))

    def of_recording() -> Iterator[bytes]:
        for number, (asic, dtype) in enumerate(ROWS):
            made = random_rows(np.random.default_rng(number), 20, schema.layout_of(asic))
            if made.dtype == dtype:
                options = bytes([number, 5, 0, 0, 0, 0, number % 3, 5])
                yield options + piece(b"text".ljust(76, b"\0")) + made.tobytes()

    def of_raw() -> Iterator[bytes]:
        yield b"\0" + log_of(emulated_messages(Asic.V2, 12))
        yield b"\0" + log_of([b"D" * 9, b"", b"S"]) + b"\xff" * 9

    def of_snapshots() -> Iterator[bytes]:
        registers = {"threshold_global": 40, "channel_mask": [1] * 64, "enable_posi": [0, 1, 0, 0]}
        meta = {"CHIP_KEY": "1-1-11", "ASIC_ID": "1-1-11", "ASIC_VERSION": "2b"}
        yield json.dumps(registers | {"meta": meta}).encode()
        yield json.dumps({"csa_gain": True, "RESERVED": 0, "register 237": 1, **meta, "description": "x"}).encode()
        yield json.dumps({"1-1-12": [6, 7], "1-1-11": [63], "meta": {}}).encode()
        chips = {"1-1-11": {"wanted": registers}, "1-1-12": {"wanted": {}, "file": "config_1-1-12.json"}}
        yield json.dumps({"larpixdaq_snapshot": 1, "asic": "2b", "time": "x", "chips": chips}).encode()

    return {
        "chip_snapshots": of_snapshots(),
        "ring": of_edits(b""),
        "spool": of_spool(),
        "journal": of_journal(),
        "finished": of_edits(b"\1"),
        "unfinished": of_edits(b""),
        "recording": of_recording(),
        "raw_recording": of_raw(),
    }


# Frames between processes


def stream_frames(data: bytes) -> None:
    for unpack in (stream.unpack_consumer, stream.unpack_producer):
        with documented(ProtocolError):
            frame = unpack(data, "a stranger")
            assert unpack(stream.pack(frame), "a stranger") == frame
            if isinstance(frame, stream.Block) and frame.configs:
                configurations = stream.unpack_configurations(frame.configs)
                configurations.text()
                configurations.differences()
                assert len(list(configurations.pieces())) == 1


def packed_blocks(data: bytes) -> None:
    """A block's packed rows and their description, changed, or made to fit what zlib finds in the rows.

    ISA-L also reads some data that zlib, the library of HDF5, refuses. So rows that were unpacked are packed anew.
    """
    given = Input(data)
    row_layout = given.choose(schema.LAYOUTS)
    rows, fits = given.number(2) % (constants.BLOCK_ROWS + 1), given.number() & 1
    description, packed = given.piece(), exact(given.left)
    size = rows * row_layout.dtype.itemsize
    unpacker, planes = zlib.decompressobj(), None
    with contextlib.suppress(zlib.error):
        planes = unpacker.decompress(packed, size + 1)
    readable = planes is not None and len(planes) == size and unpacker.eof and not unpacker.unused_data
    if readable and fits:
        content = content_of(planes, row_layout)
        counts = packed_rows.new_tally()
        hdf5_chunks.tally(np.frombuffer(content, np.uint8), row_layout.code, counts)
        tallied = [[group, *counts[group].tolist()] for group in np.flatnonzero(counts.any(axis=1)).tolist()]
        description = msgspec.msgpack.encode([zlib.crc32(packed), zlib.crc32(content), tallied])
    try:
        block = packed_rows.PackedRows.parse(memoryview(packed), memoryview(description), rows)
        assert block.is_intact() == (zlib.crc32(packed) == block.crc32)
        found = block.unpack(rows, row_layout)
    except ProtocolError as error:
        one_line(error)
        found = None
    assert found is not None or not (readable and fits and len(packed) <= size), "right rows are refused"
    assert found is None or not readable or found.tobytes() == content_of(planes, row_layout)


def content_of(planes: Any, row_layout: schema.RowLayout) -> bytes:
    """The rows whose bytes are in these planes."""
    size = row_layout.dtype.itemsize
    return np.frombuffer(planes, np.uint8).reshape(size, len(planes) // size).T.tobytes()


def control_frames(data: bytes) -> None:
    control.probe(data)
    for unpack in (lambda given: control.unpack_client(given, "a stranger"), control.unpack_core):
        try:
            message = unpack(data)
        except ProtocolError:  # its text may have lines of the message; those who show it escape them
            continue
        if isinstance(message, control.Answer):
            with contextlib.suppress(ProtocolError):
                control.content(message)
        with contextlib.suppress(ProtocolError):  # too large now
            unpack(control.pack(message))


def other_frames(data: bytes) -> None:
    """Frames of child processes and of the log, and tokens of invitations."""
    given = Input(data)
    kind = given.number()
    if kind & 3 == 0:
        inbox = hardware.Inbox(requests=bool(kind & 4))
        size = given.number() + 1
        with contextlib.suppress(ProtocolError):
            for at in range(0, len(given.left), size):
                for message in inbox.take(given.left[at : at + size]):
                    hardware.pack(message)
    elif kind & 3 == 1:
        decoder: Any = io_class.requests if kind & 4 else io_class.answers
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            io_class.pack(decoder.decode(given.left))
    elif kind & 3 == 2:
        with contextlib.suppress(ProtocolError):
            unpack_record(given.left)
    else:
        with documented(ConfigError):
            credentials.read_token(given.left.decode("utf-8", "replace"))


def web_frames(data: bytes) -> None:
    """Frames of a page, and results as it gets them."""
    given = Input(data)
    if given.number() & 1:
        try:
            frame = open_page.read_frame(given.left.decode("utf-8", "replace"))
        except ProtocolError as error:
            one_line(error)
            return
        assert open_page.read_frame(msgspec.json.encode(frame).decode()) == frame
        if isinstance(frame, open_page.Ask):
            with contextlib.suppress(ProtocolError):
                control.pack(control.ActionRequest(action=frame.action, params=frame.params))
    else:
        answer = control.Answer(kind="result", value=msgspec.Raw(given.left))
        with contextlib.suppress(ProtocolError):
            read_json(page.to_json(control.content(answer)))


def read_json(text: bytes) -> Any:
    """Read JSON, in which NaN and infinity are errors, as they are in a browser."""

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    return json.loads(text.decode(), parse_constant=refuse)


class _Connection(io.BytesIO):
    """Stands in for the socket of a request; `sent` is the answer."""

    sent = b""

    def makefile(self, *_: Any) -> io.BytesIO:
        return self

    def settimeout(self, _: float) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        self.sent += data


def http_requests(data: bytes) -> None:
    """Requests for metrics: each gets one answer, and only one with the token and a name of the server gets metrics."""
    server = SimpleNamespace(
        names=frozenset({"localhost"}),
        token=b"0123456789abcdef",
        exporter=SimpleNamespace(text=lambda openmetrics: b"metrics"),
    )
    connection = _Connection(data)
    metrics._Handler(connection, ("a stranger", 1), server)  # type: ignore[arg-type]
    head, _, body = connection.sent.partition(b"\r\n\r\n")
    if connection.sent.startswith(b"HTTP/1.0 "):
        assert b"Content-Length: %d\r\n" % len(body) in head
        assert head.count(b"HTTP/1.0") == 1
        head = head[:12]
    assert (body == b"metrics" or connection.sent == b"metrics") == (head == b"HTTP/1.0 200"), connection.sent
    if b"0123456789abcdef" not in data or b"host:" not in data.lower():
        assert b"metrics" not in (body, connection.sent)


def frame_seeds() -> dict[str, Iterator[bytes]]:
    def of_stream() -> Iterator[bytes]:
        feed = Feed()
        block, _ = feed.block(random_rows(np.random.default_rng(1), 3), gaps=[stream.Gap(1, 5, 10, 20)])
        chips = np.zeros((1, 3), np.uint8)
        values = np.ones((1, 256), np.uint8)
        packed = stream.Configurations("2", chips, values, values, values).pack()
        yield stream.pack(block)
        yield stream.pack(msgspec.structs.replace(block, text="some text", configs=packed))
        unknown = [stream.UnknownWord(1, 5, 1, b"unknown word")]
        yield stream.pack(feed.end(unknown=unknown, verdicts=[stream.LossVerdict(1, "suspect", "why", 1, 2, 3)]))
        yield stream.pack(stream.Welcome("producer", 7, 42, 2, "/dev/shm/ring"))
        yield stream.pack(stream.Refused("silent"))
        yield stream.pack(stream.Hello(1, "storage", "session", "all", [stream.Position(1, "producer", 7, 5)]))
        yield from map(stream.pack, [stream.Ack(1, 7, 5), stream.Credit(9), stream.Bye(), stream.Maps(7)])

    def of_packed() -> Iterator[bytes]:
        for number, row_layout in enumerate(schema.LAYOUTS):
            for n in (1, packed_rows.MIN_ROWS):
                made = random_rows(np.random.default_rng(n), n, row_layout)
                parts = packed_rows.RowPacker().pack(1, 0, made.view(np.uint8).data, row_layout, lambda: True)
                assert parts is not None
                packed, description = parts
                lead = bytes([number]) + n.to_bytes(2, "little") + bytes([n & 1])
                yield lead + len(description).to_bytes(2, "little") + description + packed
            plain = zlib.compress(np.zeros((5, row_layout.dtype.itemsize), np.uint8).tobytes())
            yield bytes([number, 5, 0, 1, 0, 0]) + plain
        yield bytes([0, 0, 0, 1, 0, 0]) + zlib.compress(b"")

    def of_control() -> Iterator[bytes]:
        key = "x" * 40
        yield control.pack(
            control.Register(name="producer", kind="producer", instance="i", actions=["a"], info={"a": 1})
        )
        yield control.pack(control.Open(name="somebody", instance="i"))
        yield control.pack(control.Heartbeat(progress=5, run=42, status={"a": [1, {"b": 2.5}]}))
        yield control.pack(control.ActionRequest(action="prepare_run", params={"array": np.arange(6).reshape(2, 3)}))
        structured = np.zeros(2, [("a", "u1"), ("b", "<f4", (2,))])
        yield control.pack(control.Answer(kind="result", value=control.packed({"rows": structured, "n": 1})))
        yield control.pack(control.Welcome(state="RUN", run=5, producers={"p": control.Endpoint("tcp://a:1", key)}))
        yield control.pack(control.Join(public=key))

    def of_others() -> Iterator[bytes]:
        yield b"\4\x20" + hardware.pack(hardware.Action(1, "write_registers", {"chips": ["1-1-11"], "x": 1.5}, 5.0))
        yield b"\0\xff" + hardware.pack(hardware.SendWords(1, 1, b"\1", bytes(8))) + hardware.pack(hardware.Listen(2))
        yield b"\5" + io_class.pack(io_class.Send(1, 1, b"\1", bytes(8)))
        yield b"\1" + io_class.pack(io_class.Data(b"\1", b"\0\0\0\0"))
        yield b"\2" + msgspec.msgpack.encode([1.5, 20, "producer", "text"])
        pair = KeyPair(*(z85.encode(bytes([number] * 32)).decode() for number in (1, 2)))
        yield b"\3" + credentials.make_token("tcp://127.0.0.1:9010", pair.public, pair).encode()

    def of_http() -> Iterator[bytes]:
        host = b"Host: localhost:5581\r\n"
        token = b"Authorization: Bearer 0123456789abcdef\r\n"
        yield b"GET /metrics HTTP/1.1\r\n" + host + token + b"Accept: application/openmetrics-text\r\n\r\n"
        yield b"GET /metrics?a=b HTTP/1.0\r\nHost: [::1]\r\n" + token + b"\r\n"
        yield b"GET / HTTP/1.1\r\n" + host + host + b"\r\n"
        yield b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nabcde"
        yield b"GET /metrics\r\n"

    def of_web() -> Iterator[bytes]:
        yield b'\1{"type":"request","id":"1","action":"comment","params":{"text":"a","run":null},"kind":"producer"}'
        yield b'\1{"type":"watch","pixels":"rate","histogram":{"io_group":1},"packets":{"count":5,"types":[0,1]}}'
        table = np.zeros(2, [("a", "u1"), ("b", "<f4"), ("c", "<u8"), ("d", "S3")])
        table["b"], table["c"] = np.nan, 2**63
        yield b"\0" + bytes(control.packed({"rows": table, 1: [1.5, None, b"\xff"], "text": "</script>"}))
        yield b"\0" + bytes(control.packed(np.arange(6, dtype="<i8").reshape(2, 3)))

    return {
        "stream_frames": of_stream(),
        "packed_blocks": of_packed(),
        "control_frames": of_control(),
        "other_frames": of_others(),
        "http_requests": of_http(),
        "web_frames": of_web(),
    }


TARGETS: dict[str, dict[str, Callable[[bytes], None]]] = {
    "decoders": {"pacman": pacman, "bern": bern, "serial": serial},
    "encoders": {
        "words": words,
        "rows": rows,
        "chunks": chunks,
        "board_commands": board_commands,
        "serial_commands": serial_commands,
    },
    "readers": {
        "ring": ring,
        "spool": spool,
        "journal": journal_records,
        "finished": finished,
        "unfinished": unfinished,
        "recording": recording,
        "raw_recording": raw_recording,
        "chip_snapshots": chip_snapshots,
    },
    "frames": {
        "stream_frames": stream_frames,
        "packed_blocks": packed_blocks,
        "control_frames": control_frames,
        "other_frames": other_frames,
        "http_requests": http_requests,
        "web_frames": web_frames,
    },
}
#: Target -> inputs that belong to it, from which a search begins.
SEEDS = {"decoders": decoder_seeds, "encoders": encoder_seeds, "readers": reader_seeds, "frames": frame_seeds}
