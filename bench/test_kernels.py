"""Measure the compiled kernels, the same work in larpix-control and h5py, and a plain copy of the same bytes.

    pytest bench --benchmark-columns=median,iqr,rounds --benchmark-group-by=group

A round has WORDS words or rows, unless extra_info gives another number: words/s = words / median.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from larpixdaq import constants, schema
from larpixdaq._native import board_emulator, decoders, hdf5_chunks, monitor_counters, word_codec
from larpixdaq.hdf5.tables import RunInfo
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import Block
from larpixdaq.runtime.record_file import crc32
from larpixdaq.schema import Asic

WORDS = 200_000
PEER_WORDS = 5_000  # larpix-control makes an object for each word

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def messages(words: int, per_message: int) -> tuple[np.ndarray, np.ndarray]:
    board = board_emulator.PacmanBoard(Asic.V2, rate=1e6, seed=1, words=max(words, 65_535))
    n = board.fill(words, per_message)
    return np.array(board.buffer), np.array(board.spans[:n])


def rows(n: int) -> np.ndarray:
    """Return realistic rows: random chips and channels, sorted timestamps."""
    buffer, spans = messages(n, 1000)
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    decoder.start(np.zeros(len(constants.COUNTS), np.uint64))
    decoder.feed(buffer, spans)
    made = np.zeros(2 * n, schema.PACKETS_2_4)
    return made[: decoder.decode(made)]


def drain(decoder, out: np.ndarray) -> int:
    made = 0
    while True:
        n = decoder.decode(out)
        made += n
        if n < len(out):
            return made


def pacman_decoding(words: int, per_message: int) -> Callable[[], None]:
    """Return a call that decodes messages with `words` words in total."""
    buffer, spans = messages(words, per_message)
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    decoder.start(np.zeros(len(constants.COUNTS), np.uint64))
    out = np.zeros(constants.BLOCK_ROWS, schema.PACKETS_2_4)

    def run() -> None:
        decoder.feed(buffer, spans)
        assert drain(decoder, out) == words + len(spans)

    return run


def serial_decoding(words: int, garbage: float) -> Callable[[], None]:
    """Return a call that decodes a serial stream. `garbage`: fraction of the words that a wrong byte follows."""
    data = serial_bytes(words, garbage)
    decoder = decoders.SerialDecoder(1, Asic.V2)
    decoder.start(np.zeros(len(constants.COUNTS), np.uint64))
    out = np.zeros(constants.BLOCK_ROWS, schema.PACKETS_2_4)

    def run() -> None:
        decoder.feed(data, 0)
        assert drain(decoder, out) > 0.9 * words

    return run


@pytest.mark.parametrize("per_message", [1, 1000])
def test_pacman_to_rows(benchmark, per_message: int) -> None:
    benchmark.group = f"PACMAN, {per_message} words a message"
    benchmark(pacman_decoding(WORDS, per_message))


@pytest.mark.parametrize("per_message", [1, 1000])
def test_pacman_peer_larpix_control_parse(benchmark, per_message: int) -> None:
    from larpix.format.pacman_msg_format import parse

    benchmark.group = f"PACMAN, {per_message} words a message"
    benchmark.extra_info["words"] = PEER_WORDS
    buffer, spans = messages(PEER_WORDS, per_message)
    raw = [buffer[s["start"] : s["start"] + s["length"]].tobytes() for s in spans]
    packets = benchmark.pedantic(lambda: [parse(message, io_group=1) for message in raw], rounds=3)
    assert sum(map(len, packets)) == PEER_WORDS + len(spans)


def test_pacman_limit_copy(benchmark) -> None:
    """Copy rows of 36 bytes, in blocks that fit the cache: the limit by memory."""
    benchmark.group = "PACMAN, 1000 words a message"
    source = np.ones(constants.BLOCK_ROWS * 36, np.uint8)
    out = np.zeros_like(source)

    def run() -> None:
        for _ in range(-(-WORDS // constants.BLOCK_ROWS)):
            np.copyto(out, source)

    benchmark(run)


@pytest.mark.parametrize("garbage", [0.0, 0.01])
def test_serial_to_rows(benchmark, garbage: float) -> None:
    benchmark.group = f"serial, {garbage:.0%} garbage"
    benchmark(serial_decoding(WORDS, garbage))


@pytest.mark.parametrize("garbage", [0.0, 0.01])
def test_serial_peer_larpix_control(benchmark, garbage: float) -> None:
    from larpix.io.serialport import SerialPort

    benchmark.group = f"serial, {garbage:.0%} garbage"
    benchmark.extra_info["words"] = PEER_WORDS
    data = serial_bytes(PEER_WORDS, garbage)
    packets, _ = benchmark.pedantic(lambda: SerialPort._parse_input(data), rounds=3)
    assert len(packets) >= 0.9 * PEER_WORDS


def serial_bytes(words: int, garbage: float) -> bytes:
    sent = word_codec.encode(rows(words), asic=Asic.V2)[:words]
    frames = np.frombuffer(decoders.encode_serial(sent), np.uint8).reshape(-1, 10)
    random = np.random.default_rng(1)
    pieces = (f.tobytes() + (bytes([random.integers(256)]) if random.random() < garbage else b"") for f in frames)
    return b"".join(pieces)


def test_counting(benchmark) -> None:
    benchmark.group = "counting"
    counted = rows(WORDS)
    counter = monitor_counters.PacketCounters()
    benchmark(counter.count, counted)
    assert counter.rows % len(counted) == 0


def test_chunks_to_deflate(benchmark) -> None:
    """Shuffle and deflate full chunks like the storage."""
    benchmark.group = "chunks"
    raw = rows(3 * schema.CHUNK_ROWS)[: 3 * schema.CHUNK_ROWS].view(np.uint8)
    size = schema.CHUNK_ROWS * schema.PACKETS_2_4.itemsize
    packer = hdf5_chunks.Packer(schema.CHUNK_ROWS, schema.PACKETS_2_4.itemsize)

    def run() -> int:
        return sum(len(packer.pack(raw[start : start + size])) for start in range(0, 3 * size, size))

    packed = benchmark(run)
    benchmark.extra_info["ratio"] = round(3 * size / packed, 2)
    benchmark.extra_info["words"] = 3 * schema.CHUNK_ROWS


def test_chunks_peer_h5py_gzip(benchmark, tmp_path) -> None:
    import h5py

    benchmark.group = "chunks"
    benchmark.extra_info["words"] = schema.CHUNK_ROWS
    written = rows(schema.CHUNK_ROWS)[: schema.CHUNK_ROWS]
    names = (str(tmp_path / f"{i}.h5") for i in itertools.count())

    def run() -> None:
        with h5py.File(next(names), "w") as file:
            file.create_dataset(
                "packets",
                data=written,
                chunks=(schema.CHUNK_ROWS,),
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )

    benchmark.pedantic(run, rounds=3)


def parsed(words: int) -> tuple[list[bytes], list]:
    """Return messages of one word, and larpix-control's packets for them."""
    from larpix.format.pacman_msg_format import parse

    buffer, spans = messages(words, 1)
    raw = [buffer[s["start"] : s["start"] + s["length"]].tobytes() for s in spans]
    return raw, [packet for message in raw for packet in parse(message, io_group=1)]


def test_chunks_peer_larpix_control_to_file(benchmark, tmp_path) -> None:
    from larpix.format.hdf5format import to_file

    benchmark.group = "chunks"
    _, packets = parsed(PEER_WORDS)
    benchmark.extra_info["words"] = len(packets)
    names = (str(tmp_path / f"{i}.h5") for i in itertools.count())
    benchmark.pedantic(lambda: to_file(next(names), packet_list=packets), rounds=3)


def test_whole_peer_larpix_control_raw_route(benchmark, tmp_path) -> None:
    """Write raw messages to a file, read and parse them, and write packets, like the script of larpix-control."""
    from larpix.format.hdf5format import to_file
    from larpix.format.pacman_msg_format import parse
    from larpix.format.rawhdf5format import from_rawfile, to_rawfile

    benchmark.group = "from messages to a file"
    raw, expected = parsed(PEER_WORDS)
    benchmark.extra_info["words"] = PEER_WORDS
    names = (str(tmp_path / f"{i}.h5") for i in itertools.count())

    def run() -> int:
        name = next(names)
        to_rawfile(name, msgs=raw, msg_headers={"io_groups": [1] * len(raw)})
        read = from_rawfile(name)
        made = [
            packet
            for io_group, message in zip(read["msg_headers"]["io_groups"], read["msgs"], strict=True)
            for packet in parse(message, io_group=io_group)
        ]
        to_file(next(names), packet_list=made)
        return len(made)

    assert benchmark.pedantic(run, rounds=3) == len(expected)


def test_whole_larpix_daq(benchmark, tmp_path) -> None:
    """Decode the same messages into a file of larpix-daq with journal, ledger and checksums."""
    benchmark.group = "from messages to a file"
    buffer, spans = messages(WORDS, 1)
    benchmark.extra_info["words"] = WORDS
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    counts = np.zeros(len(constants.COUNTS), np.uint64)
    out = np.zeros(constants.BLOCK_ROWS, schema.PACKETS_2_4)
    runs = itertools.count(1)

    def run() -> None:
        info = RunInfo(
            run=next(runs), kind="bench", comment="", operator="", started_ns=0, layout=schema.layout(2),
            asic_version="2",
        )  # fmt: skip
        file = RunFile(tmp_path, info)
        decoder.start(counts)
        decoder.feed(buffer, spans)
        sequence, first = 0, 0
        while n := decoder.decode(out):
            crc = crc32(out[:n].view(np.uint8))
            file.add(Block(info.run, "board", 1, sequence, first, n, 2, 0, 0, 0, crc, [], []), out[:n])
            sequence, first = sequence + 1, first + n
            if n < len(out):
                break
        file.close()

    benchmark.pedantic(run, rounds=5)
