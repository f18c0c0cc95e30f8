"""Replay of recorded files of every kind: raw files, message logs, packet files of all ages."""

import json
import math
import warnings

import h5py
import larpix
import numpy as np
import pytest
from decoder_harness import message_1_0, word_1_0
from example_counts import examples
from file_builder import Feed, run_info
from file_builder import random_rows as own_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix.format import hdf5format, pacman_msg_format, rawhdf5format
from larpix.packet import Packet_v1, Packet_v2, SyncPacket, TimestampPacket, TriggerPacket
from recorded_data import shared_data
from source_driver import assert_same_rows, close_sources, open_driver

from larpixdaq._native import word_codec
from larpixdaq._native.decoders import PacmanDecoder
from larpixdaq.constants import COUNTS
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.hdf5.layout import MESSAGES
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.schema import (
    CHUNK_ROWS,
    PACKETS_1_0,
    PACKETS_2_4,
    PACKETS_2_4_CLOCK64,
    PACKETS_3_0,
    SPAN,
    Asic,
    layout_of,
)
from larpixdaq.sources import replay
from larpixdaq.sources.replay import Clock, ReplaySource, message_times

__all__ = ["close_sources"]  # a fixture


def driver(*files, asic=Asic.V2, step=1000, speed=math.inf, **options):
    named = [file if isinstance(file, tuple) else (1, file) for file in files]
    return open_driver(ReplaySource(named, asic=asic, speed=speed, **options), step)


def log(path, messages):
    path.write_bytes(b"".join(len(message).to_bytes(4, "little") + message for message in messages))
    return path


def message(seconds, *words):
    return b"D" + seconds.to_bytes(4, "little") + b"\0" + len(words).to_bytes(2, "little") + b"".join(words)


def data_word(io_channel, receipt, word=0x0000_0000_0000_0001):
    return bytes((0x44, io_channel)) + receipt.to_bytes(4, "little") + b"\0\0" + word.to_bytes(8, "little")


def decoded(messages, groups, asic=Asic.V2):
    """Decode messages one at a time, with a decoder for each io_group."""
    decoders = {group: PacmanDecoder(int(group), int(asic)) for group in set(groups)}
    for decoder in decoders.values():
        decoder.start(np.zeros(len(COUNTS), np.uint64))
    found = [np.zeros(0, layout_of(asic).dtype)]
    for raw, group in zip(messages, groups, strict=True):
        rows = np.zeros(len(raw) // 16 + 2, layout_of(asic).dtype)
        decoders[group].feed(raw, np.array([(0, len(raw))], SPAN))
        found.append(rows[: decoders[group].decode(rows)])
    return np.concatenate(found)


def recorded_messages():
    data = shared_data("pacman_2020_messages.bin").read_bytes()
    messages, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        messages.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return messages


def write_packets(path, rows, version="2.4", texts=()):
    with h5py.File(path, "w") as file:
        if texts:
            lines = [(text.encode(), 0, i) for i, text in enumerate(texts)]
            file["messages"] = np.array(lines, MESSAGES)
        file.create_group("_header").attrs["version"] = version
        file.create_dataset("packets", data=rows, chunks=(1000,), maxshape=(None,))
    return path


def random_rows(seed, count, asic=Asic.V2, groups=(1, 2), layout=None):
    """Plausible rows of all types and io_groups in any order, as in our own files."""
    random = np.random.default_rng(seed)
    dtype = (layout or layout_of(asic)).dtype
    words = random.integers(0, 2**64, count, np.uint64, endpoint=False)
    if asic == Asic.V3:
        words |= np.uint64(1)
    rows = np.zeros(count, dtype)
    word_codec.decode(words, rows, asic=int(asic))
    kind = "type" if asic == Asic.V1 else "packet_type"
    choice = random.integers(0, 12, count)
    for i in range(count):
        group = int(random.choice(groups))
        if asic != Asic.V1:
            rows[i]["io_group"], rows[i]["io_channel"] = group, random.integers(256)
            rows[i]["receipt_timestamp"] = random.integers(
                2 ** (8 * dtype["receipt_timestamp"].itemsize), dtype=np.uint64
            )
        else:
            rows[i]["chip_key"] = b"%d-%d-%d" % (group, random.integers(256), rows[i]["chipid"])
        if choice[i] == 0:
            rows[i]["direction"] = 0 if rows[i][kind] > 1 else 1
        elif choice[i] in (1, 2, 3, 4):
            rows[i] = np.zeros((), dtype)
            if asic == Asic.V1:
                rows[i]["chip_key"] = b"%d-0-0" % group
            else:
                rows[i]["io_group"] = group
            rows[i]["timestamp"] = random.integers(2**32)
            if choice[i] == 1:
                rows[i][kind] = 4
            elif choice[i] == 2:
                rows[i][kind] = 5
                rows[i]["counter"] = random.integers(100)
                rows[i]["chip_key" if asic == Asic.V1 else "io_group"] = b"" if asic == Asic.V1 else 0
            else:
                rows[i][kind] = 6 if choice[i] == 3 else 7
                rows[i]["direction"] = 1
                details = ("register", "value") if asic == Asic.V1 else ("trigger_type", "dataword")
                for name in details:
                    rows[i][name] = random.integers(256)
                rows[i]["counter"] = random.integers(2**32) if choice[i] == 3 else 0
    return rows


# Message logs and raw files


def test_recorded_messages_make_the_rows_of_larpix_control(tmp_path):
    messages = recorded_messages()
    parsed = [packet for raw in messages for packet in pacman_msg_format.parse(raw, io_group=1)]
    hdf5format.to_file(tmp_path / "theirs.h5", parsed, workers=1)
    with h5py.File(tmp_path / "theirs.h5") as file:
        expected = file["packets"][:]
    driven = driver(shared_data("pacman_2020_messages.bin"), step=97)
    found = driven.run_to_end()
    # larpix-control leaves direction 0 in files that it converts
    assert_same_rows(found, expected, but=("direction",))
    assert driven.count("messages", 1) == len(messages) == 1200
    assert driven.count("bytes_in", 1) == sum(map(len, messages))
    assert driven.source.io_groups == (1,)
    assert driven.source.problems() == []


def test_published_messages_of_two_boards_in_a_raw_file(tmp_path):
    recorded = json.loads(shared_data("vectors.json").read_text())["tpc12_2023_03_15"]
    messages = [bytes.fromhex(raw) for raw in recorded["msgs"]]
    path = tmp_path / "raw.h5"
    rawhdf5format.to_rawfile(str(path), msgs=messages, msg_headers={"io_groups": recorded["io_groups"]})
    driven = driver(path)
    assert_same_rows(driven.run_to_end(), decoded(messages, recorded["io_groups"]))
    assert driven.source.io_groups == (1, 2)
    assert driven.count("messages", 2) == recorded["io_groups"].count(2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A raw file of three boards whose messages are short, long, empty, cut off or nonsense."""
    random = np.random.default_rng(1)
    messages, groups = [], []
    for i in range(600):
        words = [
            bytes(random.choice([0x44, 0x44, 0x44, 0x53, 0x54, 0x58], 1).astype(np.uint8)) + random.bytes(15)
            for _ in range(random.choice([0, 1, 1, 1, 2, 40]))
        ]
        raw = message(1_700_000_000 + i // 50, *words)
        match random.integers(12):
            case 0:
                raw = raw[: random.integers(len(raw))]
            case 1:
                raw += random.bytes(random.integers(40))
            case 2:
                raw = b"?" + raw[1:]
        messages.append(raw)
        groups.append(int(random.choice([1, 1, 7, 255])))
    path = tmp_path_factory.mktemp("raw") / "mixed.h5"
    rawhdf5format.to_rawfile(str(path), msgs=messages, msg_headers={"io_groups": groups})
    return path, messages, groups


@settings(max_examples=examples(10))
@given(step=st.integers(1, 300))
def test_rows_and_counts_of_messages_do_not_depend_on_the_room_given(mixed, step):
    path, messages, groups = mixed
    expected = decoded(messages, groups)
    driven = driver(path, step=step)
    found = driven.run_to_end()
    whole = driver(path, step=20_000)
    whole.run_to_end()
    np.testing.assert_array_equal(driven.counts, whole.counts)
    assert driven.count("bytes_in") == sum(map(len, messages))
    for group in set(groups):
        assert_same_rows(found[found["io_group"] == group], expected[expected["io_group"] == group])
    assert driven.source.io_groups == (1, 7, 255)


def test_the_order_of_messages_of_many_boards_is_kept(tmp_path):
    messages = [message(i, *[data_word(j % 256, i + j) for j in range(i % 5)]) for i in range(500)]
    groups = [1 + i * i % 7 for i in range(500)]
    path = tmp_path / "raw.h5"
    rawhdf5format.to_rawfile(str(path), msgs=messages, msg_headers={"io_groups": groups})
    for step in (3, 50, 5000):
        assert_same_rows(driver(path, step=step).run_to_end(), decoded(messages, groups))


def test_unknown_words_of_all_boards_are_kept(tmp_path):
    messages = [message(5, b"X" + bytes(15)), message(6, b"Y" + bytes(15))]
    driven = driver((3, log(tmp_path / "a.bin", messages)), (9, log(tmp_path / "b.bin", messages)))
    driven.run_to_end()
    unknown = driven.source.take_unknown()
    assert sorted(zip(unknown["io_group"].tolist(), unknown["seconds"].tolist(), strict=True)) == [
        (3, 5),
        (3, 6),
        (9, 5),
        (9, 6),
    ]
    assert len(driven.source.take_unknown()) == 0
    assert driven.source.io_groups == (3, 9)


def test_a_log_that_was_cut(tmp_path):
    whole = log(tmp_path / "whole.bin", [message(1, data_word(1, 1)), message(2, data_word(2, 2), data_word(3, 3))])
    data = whole.read_bytes()
    cut = tmp_path / "cut.bin"
    for size in range(5, len(data)):
        cut.write_bytes(data[:size])
        driven = driver(cut)
        driven.run_to_end()
        between = size == 28
        assert driven.source.problems() == ([] if between else [f"{cut}: ends inside a message, at byte {size}"])
        first = min(size - 4, 24)
        assert driven.count("bytes_in") == first + (size - 28 if size <= 32 else size - 32) * (size > 28)


def test_garbage_in_a_log_is_counted_and_reported(tmp_path):
    path = log(tmp_path / "log.bin", [message(1, data_word(1, 1))])
    with path.open("ab") as file:
        file.write(b"\xff\xff\xff\x7f" + bytes(5_000_000))
    driven = driver(path, log(tmp_path / "next.bin", [message(2)]))
    assert driven.run_to_end()["packet_type"].tolist() == [4, 1, 4]
    assert driven.source.problems() == [f"{path}: at byte 28: a message of 2147483647 bytes; what follows is left out"]
    assert driven.count("rejected_bytes", 1) == 5_000_004
    assert driven.count("rejected_messages", 1) == 1


# Packet files


def their_packets(seed, version):
    """Packets of larpix-control of all types that a file of this version can hold."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(400):
        if version == "1.0":
            packet = Packet_v1(random.bytes(7)[:6] + bytes([random.integers(64)]))
            packet.chip_key = larpix.Key(int(random.integers(1, 4)), 1, packet.chip_id)
        else:
            packet = Packet_v2(random.bytes(8))
            if packet.packet_type != Packet_v2.DATA_PACKET and version < "2.3":
                bare = Packet_v2()  # only the fields of its type, because older files keep no other bits
                names = ["packet_type", "chip_id", "downstream_marker"]
                if packet.packet_type != Packet_v2.TEST_PACKET:
                    names += ["register_address", "register_data"]
                for name in names:
                    setattr(bare, name, getattr(packet, name))
                bare.assign_parity()
                packet = bare
            packet.io_group, packet.io_channel = int(random.integers(1, 4)), int(random.integers(1, 33))
            packet.receipt_timestamp = int(random.integers(2**32))
        packet.direction = int(random.integers(2)) if packet.bytes()[0] & 2 else 1
        made.append(packet)
        if version != "1.0":
            if i % 7 == 0:
                made.append(TimestampPacket(timestamp=int(random.integers(2**32))))
                made[-1].io_group = int(random.integers(1, 4))
            if i % 50 == 0 and version >= "2.2":
                made.append(SyncPacket(sync_type=b"S", clk_source=1, timestamp=int(random.integers(2**32)), io_group=2))
                made.append(TriggerPacket(trigger_type=b"\x02", timestamp=int(random.integers(2**32)), io_group=3))
    return made


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2", "2.3", "2.4"])
def test_packet_files_of_larpix_control(tmp_path, version):
    made = their_packets(5, version)
    path = tmp_path / "packets.h5"
    hdf5format.to_file(str(path), made, version=version, workers=1)
    driven = driver(path, step=61)
    found = driven.run_to_end()
    assert driven.source.problems() == []
    assert len(found) == len(made)
    words = [packet for packet in made if isinstance(packet, Packet_v2)]
    rows = found[found["packet_type"] < 4]
    assert word_codec.encode(rows, asic=int(Asic.V2)).tobytes() == b"".join(packet.bytes() for packet in words)
    for name in ("io_group", "io_channel", "direction", "receipt_timestamp"):
        assert rows[name].tolist() == [getattr(packet, name) for packet in words], name
    with h5py.File(path) as file:
        theirs = file["packets"][:]
    np.testing.assert_array_equal(
        found["timestamp"][found["packet_type"] > 3], theirs["timestamp"][theirs["packet_type"] > 3]
    )
    if version in ("2.3", "2.4"):
        assert_same_rows(found, theirs, but=("direction",))
    assert driven.count("sent_rows") == sum(packet.direction == 0 for packet in words)
    assert driven.count("packets") == sum(packet.direction == 1 for packet in words)
    assert driven.source.io_groups == tuple(np.unique(theirs["io_group"]))


def test_packet_files_of_v1_chips_of_larpix_control(tmp_path):
    made = [packet for packet in their_packets(6, "1.0") if packet.bytes()[0] & 3 or packet.dataword < 256]
    path = tmp_path / "packets.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hdf5format.to_file(str(path), made, version="1.0", workers=1)
    driven = driver(path, asic=Asic.V1, step=61)
    found = driven.run_to_end()
    assert driven.source.problems() == []
    words = word_codec.encode(found, asic=int(Asic.V1))
    expected = np.array([int.from_bytes(packet.bytes(), "little") for packet in made], np.uint64)
    kinds = expected & np.uint64(3)
    # their files lack the lowest bit of the ADC value, and of test and configuration words what those do not use
    np.testing.assert_array_equal(words[kinds == 0] & ~np.uint64(1 << 41), expected[kinds == 0] & ~np.uint64(1 << 41))
    configuration = np.uint64(1 << 53 | (1 << 26) - 1)
    np.testing.assert_array_equal(words[kinds > 1] & configuration, expected[kinds > 1] & configuration)
    assert [key.decode() for key in found["chip_key"]] == [str(packet.chip_key) for packet in made]


@pytest.mark.parametrize(
    ("asic", "layout", "clock64"),
    [
        (Asic.V1, layout_of(Asic.V1), False),
        (Asic.V2, layout_of(Asic.V2), False),
        (Asic.V2, layout_of(Asic.V2, clock64=True), True),
        (Asic.V2_DIAGNOSTICS, layout_of(Asic.V2), False),
        (Asic.V3, layout_of(Asic.V3), False),
    ],
)
@settings(max_examples=examples(8))
@given(data=st.data())
def test_files_of_our_own_come_out_identical_however_they_are_cut(tmp_path_factory, asic, layout, clock64, data):
    rows = random_rows(data.draw(st.integers(0, 1000)), 300, asic, (1, 2, 200), layout)
    texts = [f"text {i}" for i in range(100)]
    path = write_packets(tmp_path_factory.mktemp("own") / "own.h5", rows, layout.version, texts)
    kinds = rows["type" if asic == Asic.V1 else "packet_type"]
    driven = driver(path, asic=asic, clock64=clock64, step=data.draw(st.integers(1, 310)))
    assert_same_rows(driven.run_to_end(), rows[kinds != 5])
    info = np.flatnonzero(kinds == 5)
    numbers = range(len(info)) if layout.version == "2.4" else rows["counter"][info]  # larpix-control's 2.4: all are 0
    before = info - np.arange(len(info))
    assert driven.texts == [(at, texts[number]) for at, number in zip(before, numbers, strict=True)]
    whole = driver(path, asic=asic, clock64=clock64, step=1000)
    whole.run_to_end()
    np.testing.assert_array_equal(driven.counts, whole.counts)
    assert driven.count("time_rows") == driven.count("messages") == (kinds == 4).sum()
    assert driven.count("info_rows") == 0  # the recorder counts them
    assert driven.count("sent_rows") == ((kinds < 4) & (rows["direction"] == 0)).sum()
    assert driven.count("word_rows") == driven.count("words_in")
    assert driven.source.problems() == []


COLUMNS = [name for name in PACKETS_2_4.names if name not in ("first_packet", "receipt_timestamp", "direction")]


@pytest.mark.parametrize(
    ("columns", "types", "size"),
    [
        ([*COLUMNS], {"shared_fifo_events": "u1"}, 29),
        ([*COLUMNS, "direction"], {"shared_fifo_events": "u1"}, 30),
        ([*COLUMNS, "direction"], {}, 31),
        ([*COLUMNS[:9], "first_packet", *COLUMNS[9:], "direction"], {"shared_fifo_events": "u1"}, 31),
        ([*COLUMNS, "direction", "receipt_timestamp", "first_packet"], {"shared_fifo_events": "u1"}, 35),
        (list(PACKETS_2_4.names), {}, 36),
        (list(PACKETS_2_4.names), {"receipt_timestamp": "<u8"}, 40),
    ],
)
def test_older_rows_are_taken_by_their_names(tmp_path, columns, types, size):
    rows = random_rows(9, 500, layout=layout_of(Asic.V2, clock64=True))
    rows["receipt_timestamp"] &= np.uint64(2**32 - 1 if size < 40 else 2**64 - 1)
    dtype = np.dtype([(name, types.get(name, PACKETS_2_4[name])) for name in columns])
    assert dtype.itemsize == size
    old = np.zeros(len(rows), dtype)
    for name in columns:
        old[name] = rows[name]
    words = rows["packet_type"] < 4
    if "first_packet" not in columns:
        old["timestamp"][words] += rows["first_packet"][words].astype(np.uint64) << np.uint64(31)
    path = write_packets(tmp_path / "old.h5", old, "2.3")
    found = driver(path, clock64=size == 40).run_to_end()
    absent = {"receipt_timestamp", "direction"} - set(columns)
    assert_same_rows(found, rows[rows["packet_type"] != 5], but=absent)
    words = found["packet_type"] < 4
    if "direction" in absent:
        assert (found["direction"][words] == 1).all()


@pytest.mark.parametrize("change", [{"dataword": "<f8"}, {"receipt_timestamp": "<u4"}])
def test_v3_files_of_other_programs(tmp_path, change):
    rows = random_rows(3, 200, Asic.V3)
    rows["receipt_timestamp"] &= np.uint64(2**32 - 1)
    dtype = np.dtype([(name, change.get(name, PACKETS_3_0[name])) for name in PACKETS_3_0.names])
    path = write_packets(tmp_path / "v3.h5", rows.astype(dtype), "3.0")
    assert_same_rows(driver(path, asic=Asic.V3).run_to_end(), rows[rows["packet_type"] != 5])


def test_files_that_record_no_directions_hold_received_words(tmp_path):
    made = [packet for raw in recorded_messages()[:50] for packet in pacman_msg_format.parse(raw, io_group=1)]
    hdf5format.to_file(str(tmp_path / "converted.h5"), made, workers=1)
    driven = driver(tmp_path / "converted.h5")
    found = driven.run_to_end()
    np.testing.assert_array_equal(found["direction"], found["packet_type"] != 4)
    assert driven.count("sent_rows") == 0


def test_impossible_rows_are_left_out_and_reported(tmp_path):
    rows = random_rows(4, 100)
    rows = rows[(rows["packet_type"] < 4) & (rows["direction"] == 1)][:50]
    bad = rows.copy()
    bad[3]["packet_type"] = 99
    bad[5]["timestamp"] = 1 << 40
    bad[7]["channel_id"] = 64
    bad[9]["packet_type"], bad[9]["timestamp"] = 4, 2**64 - 1
    bad[11]["packet_type"], bad[11]["counter"] = 7, 1
    bad[13]["fifo_diagnostics_enabled"] = 1
    path = write_packets(tmp_path / "bad.h5", np.concatenate((rows.repeat(1400), bad)))
    driven = driver(path)
    assert_same_rows(driven.run_to_end()[len(rows) * 1400 :], np.delete(rows, [3, 5, 7, 9, 11, 13]))
    assert driven.source.problems() == [f"{path}: 6 rows left out: no packet can look like them"]


def test_a_first_packet_bit_that_was_not_recorded_follows_from_the_parity(tmp_path):
    """Version 2.0 as larpix-control 3.1.1 wrote it has 31 bits of timestamp, and no column first_packet."""
    rows = random_rows(9, 500)
    rows = rows[rows["packet_type"] == 0]
    rows["direction"] = 1
    assert set(rows["first_packet"]) == set(rows["valid_parity"]) == {0, 1}
    columns = [*COLUMNS, "direction"]
    old = rows[columns].astype([(name, PACKETS_2_4[name]) for name in columns])
    path = write_packets(tmp_path / "old.h5", old, "2.0")
    assert_same_rows(driver(path).run_to_end(), rows, but={"receipt_timestamp"})


def test_version_0_0(tmp_path):
    words = np.random.default_rng(2).integers(0, 1 << 53, 50, np.uint64) & ~np.uint64(0b1100000011 << 41 | 0b11)
    made = [Packet_v1(word.to_bytes(7, "little")) for word in word_codec.parity(words, asic=Asic.V1).tolist()]
    for packet in made:
        packet.chip_key = f"2-3-{packet.chipid}"
    hdf5format.to_file(str(tmp_path / "old.h5"), made, version="0.0", workers=1)
    found = driver(tmp_path / "old.h5", asic=Asic.V1).run_to_end()
    np.testing.assert_array_equal(word_codec.encode(found, asic=Asic.V1), word_codec.parity(words, asic=Asic.V1))
    assert found["chip_key"].tolist() == [f"2-3-{packet.chipid}".encode() for packet in made]
    assert found["direction"].all()
    with pytest.raises(ConfigError, match=r"packets of v1 chips \(LArPix\+HDF5 0\.0\): give --asic 1"):
        driver(tmp_path / "old.h5")


# Files whose writer was killed


def test_a_raw_file_whose_writer_was_killed(tmp_path):
    messages = [message(7, data_word(1, i)) for i in range(5)]
    with h5py.File(tmp_path / "raw.h5", "w", libver="latest") as file:
        bytes_kind = h5py.vlen_dtype(np.uint8)
        sent = file.create_dataset("msgs", shape=(0,), maxshape=(None,), dtype=bytes_kind, chunks=(1024,))
        heads = file.create_dataset("msg_headers", (0,), [("io_groups", "u1")], maxshape=(None,), chunks=(1024,))
        file.swmr_mode = True
        sent.resize((5,))
        sent[:] = [np.frombuffer(one, np.uint8) for one in messages]
        heads.resize((4,))
        heads[:] = 3
        file.flush()
        (tmp_path / "killed.h5").write_bytes((tmp_path / "raw.h5").read_bytes())
    driven = driver(tmp_path / "killed.h5")
    assert_same_rows(driven.run_to_end(), decoded(messages[:4], [3] * 4))
    assert driven.source.problems() == [
        f"{tmp_path / 'killed.h5'}: the last 1 messages have no io_group and are left out"
    ]


def test_a_part_whose_writer_was_killed(tmp_path):
    feed, rng = Feed(), np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    for _ in range(5):
        file.add(*feed.block(own_rows(rng, 16_000)))
    file.work(pressed=True)
    (tmp_path / "killed").mkdir()
    for path in tmp_path.glob("*.h5.*"):
        (tmp_path / "killed" / path.name).write_bytes(path.read_bytes())
    part = tmp_path / "killed" / file.path.name
    driven = driver(part)
    assert_same_rows(driven.run_to_end(), np.concatenate(feed.rows)[: 4 * CHUNK_ROWS])
    assert driven.source.problems() == [
        f"{part}: not finished: blocks in its journal are not played (larpixdaq recover)"
    ]
    file.abandon()


# Files that cannot be played


@pytest.mark.parametrize(
    ("make", "options", "kind", "words"),
    [
        (lambda path: None, {}, FileError, "No such file"),
        (lambda path: path.mkdir(), {}, FileError, "Is a directory"),
        (lambda path: path.write_bytes(b""), {}, FileError, "neither a raw file, nor a packet file, nor a log"),
        (lambda path: path.write_bytes(b"This is a text.\n"), {}, FileError, "neither a raw file, nor a packet file"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500)), {}, FileError, "HDF5 file that cannot be"),
        (lambda path: h5py.File(path, "w").close(), {}, FileError, "HDF5 file with neither /msgs (raw) nor /packets"),
        (lambda path: write_packets(path, np.zeros(3, "u4")), {}, FileError, "packet file without /packets of known"),
        (lambda path: write_packets(path, np.zeros(3, PACKETS_1_0)), {}, ConfigError, "packets of v1 chips"),
        (lambda path: write_packets(path, np.zeros(3, PACKETS_3_0), "3.0"), {}, ConfigError, "give --asic 3"),
        (lambda path: write_packets(path, np.zeros(3, PACKETS_2_4)), {"asic": Asic.V3}, ConfigError, "give --asic 2"),
        (lambda path: write_packets(path, np.zeros(3, PACKETS_2_4_CLOCK64)), {}, ConfigError, "give --clock64"),
        (
            lambda path: write_packets(path, np.zeros(3, PACKETS_2_4)),
            {"asic": Asic.V2_DIAGNOSTICS},
            ConfigError,
            "leave out --fifo-diagnostics",
        ),
        (
            lambda path: write_packets(path, random_rows(1, 50, Asic.V2_DIAGNOSTICS)),
            {},
            ConfigError,
            "give --fifo-diagnostics",
        ),
    ],
)
def test_a_file_that_cannot_be_played_is_an_error_in_one_line(tmp_path, make, options, kind, words):
    path = tmp_path / "file"
    make(path)
    with pytest.raises(kind) as caught:
        driver(path, **options)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_played_up_to_the_damage(tmp_path):
    rows = random_rows(8, 2000).repeat(100)
    path = tmp_path / "damaged.h5"
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs["version"] = "2.4"
        packets_set = file.create_dataset("packets", data=rows, chunks=(65_536,), compression="gzip")
        chunk = packets_set.id.get_chunk_info(2)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\0" * 1000)
    driven = driver(path, log(tmp_path / "next.bin", [message(7)]), step=16_384)
    found = driven.run_to_end()
    rows = rows[: 2 * 65_536]
    assert_same_rows(found[:-1], rows[rows["packet_type"] != 5])
    assert found[-1]["timestamp"] == 7
    (problem,) = driven.source.problems()
    assert problem.startswith(f"{path}: rows 131072 to 196608 cannot be read")
    assert problem.endswith("the rest of this file is left out")


# Speed


def test_times_of_recorded_messages():
    raw = [
        message(100, data_word(1, 5_000_000)),
        message(100, data_word(1, 7_500_000)),
        message(101),
        b"D",
        message(105),
    ]
    raw += [message(105, data_word(1, 1_000_000)), message(105, data_word(1, 2_000_000)), message(90), message(10_000)]
    raw += [message(10_001)]
    newer = b"D\0\1\0" + (24).to_bytes(4, "little") + (10_003_500_000_000).to_bytes(8, "little") + bytes(8)
    raw += [newer + b"D\0\1\0\0\0\0\0" + (77).to_bytes(8, "little") + bytes(8)]
    data = np.frombuffer(b"".join(raw), np.uint8)
    lengths = np.array([len(each) for each in raw])
    spans = np.zeros(len(raw), SPAN)
    spans["length"], spans["start"] = lengths, np.cumsum(lengths) - lengths
    seconds, ticks = message_times(data, spans)
    assert seconds.tolist() == [100, 100, 101, -1, 105, 105, 105, 90, 10_000, 10_001, 10_003]
    assert ticks.tolist() == [5_000_000, 7_500_000, -1, -1, -1, 1_000_000, 2_000_000, -1, -1, -1, 77]
    expected = [0, 0.25, 1, 1, 5, 5, 5.1, 5.1, 5.1, 6, 8]
    groups = np.ones(len(raw), np.uint8)
    np.testing.assert_allclose(Clock().times(groups, seconds, ticks), expected)
    clock = Clock()
    pieces = [clock.times(groups[i : i + 1], seconds[i : i + 1], ticks[i : i + 1]) for i in range(len(raw))]
    np.testing.assert_allclose(np.concatenate(pieces), expected)


def test_boards_whose_clocks_differ_are_played_side_by_side():
    seconds = np.array([100, 500, 101, 501, 102, 502, 503, 504])
    groups = np.array([1, 2, 1, 2, 1, 2, 2, 2])
    times = Clock().times(groups, seconds, np.full(8, -1))
    np.testing.assert_allclose(times, [0, 0, 1, 1, 2, 2, 3, 4])


@settings(max_examples=examples(30))
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 2**62), st.integers(-1, 2**62)), min_size=1, max_size=30))
def test_times_of_any_headers_never_decrease(values):
    groups, seconds, ticks = (np.array(column, np.int64) for column in zip(*values, strict=True))
    times = Clock().times(groups, seconds, ticks)
    assert np.isfinite(times).all()
    assert (np.diff(times) >= 0).all()
    assert times[-1] <= len(values) * (replay.LONGEST_PAUSE + 1)


class Now:
    """Stands in for the module time: monotonic() returns `now`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize("speed", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["log", "packets"])
def test_a_replay_keeps_the_recorded_times(tmp_path, monkeypatch, speed, kind):
    clock = Now()
    monkeypatch.setattr(replay, "time", clock)
    raw = [message(100 + i // 10, data_word(1, i * 1_000_000)) for i in range(40)]  # ten a second, for four seconds
    path = log(tmp_path / "log.bin", raw)
    if kind == "packets":
        path = write_packets(tmp_path / "rows.h5", driver(path).run_to_end())
    driven = driver(path, speed=speed)
    came = []
    while not driven.source.finished:
        due = driven.source.due()
        assert due is not None
        assert due <= clock.now + 1.01 / speed, "never longer than to the next message"
        clock.now = max(clock.now, due)
        while driven.take():
            pass
        came += [clock.now - 1000.0] * (len(driven.rows) - len(came))
    assert driven.source.due() is None
    expected = np.repeat(np.arange(40) / 10 / speed, 2)
    if kind == "packets":
        expected[0::2] = np.floor(expected[0::2] * speed) / speed  # a header's row has whole seconds only
        expected = np.maximum.accumulate(expected)
    np.testing.assert_allclose(came, expected, atol=0.0021)


def test_a_new_run_continues_at_the_end_of_the_last_one(tmp_path, monkeypatch):
    clock = Now()
    monkeypatch.setattr(replay, "time", clock)
    driven = driver(log(tmp_path / "log.bin", [message(100 + i) for i in range(5)]), speed=1.0)
    assert driven.take()
    assert not driven.take()
    clock.now += 500
    driven.source.start(driven.counts)
    assert driven.take()
    assert driven.rows["timestamp"].tolist() == [100, 101]
    assert not driven.take()
    assert driven.source.due() == pytest.approx(clock.now + 1)


def test_a_log_of_format_1_0_gets_the_wide_layout(tmp_path):
    """Its clock has 64 bits, as its messages show; a log that is read as legacy messages keeps the narrow layout."""
    path = tmp_path / "log"
    messages = [message_1_0([word_1_0(0x51, receipt=1 << 40)])]
    log(path, messages)
    driven = driver((1, path))
    driven.run_to_end()
    assert driven.source.layout.name == "2.4-clock64"
    assert driven.rows["receipt_timestamp"].tolist() == [0, 1 << 40]
    wrong = driver((1, path), format="legacy")
    assert wrong.source.layout.name == "2.4"
