"""Decoding and encoding of words of every chip generation: bit by bit, by larpix-control, and literal words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoder_harness import odd_parity
from hypothesis import given
from hypothesis import strategies as st
from larpix_control import Packet_v1, Packet_v2, TimestampPacket, packets_v2, read_back, rows_2_4

from larpixdaq import schema
from larpixdaq._native import word_codec
from larpixdaq.schema import Asic

LAYOUTS = [(asic, schema.layout_of(asic).dtype) for asic in Asic] + [
    (Asic.V2, schema.PACKETS_2_4_CLOCK64),
    (Asic.V2_DIAGNOSTICS, schema.PACKETS_2_4_CLOCK64),
]
#: Columns and their bits (lowest, width) in the word, from the data sheets. Words have 64 bits, v1 words 54.
FIELDS: dict[Asic, dict[str, tuple[int, int]]] = {
    Asic.V1: {
        "type": (0, 2), "chipid": (2, 8), "channel": (10, 7), "timestamp": (17, 24), "adc_counts": (41, 10),
        "fifo_half": (51, 1), "fifo_full": (52, 1), "parity": (53, 1), "register": (10, 8), "value": (18, 8),
    },
    Asic.V2: {
        "packet_type": (0, 2), "chip_id": (2, 8), "channel_id": (10, 6), "timestamp": (16, 31), "first_packet": (47, 1),
        "dataword": (48, 8), "trigger_type": (56, 2), "local_fifo": (58, 2), "shared_fifo": (60, 2),
        "downstream_marker": (62, 1), "parity": (63, 1), "register_address": (10, 8), "register_data": (18, 8),
    },
    Asic.V2_DIAGNOSTICS: {
        "packet_type": (0, 2), "chip_id": (2, 8), "channel_id": (10, 6), "timestamp": (16, 16),
        "shared_fifo_events": (32, 12), "local_fifo_events": (44, 2), "counter": (46, 1), "first_packet": (47, 1),
        "dataword": (48, 8), "trigger_type": (56, 2), "local_fifo": (58, 2), "shared_fifo": (60, 2),
        "downstream_marker": (62, 1), "parity": (63, 1), "register_address": (10, 8), "register_data": (18, 8),
    },
    Asic.V3: {
        "packet_type": (0, 2), "chip_id": (2, 8), "channel_id": (10, 6), "timestamp": (16, 28), "first_packet": (43, 1),
        "reset_sample_flag": (44, 1), "cds_flag": (45, 1), "dataword": (46, 10), "trigger_type": (56, 2),
        "local_fifo": (58, 2), "shared_fifo": (60, 2), "downstream_marker": (62, 1), "parity": (63, 1),
        "register_address": (10, 8), "register_data": (18, 8),
    },
}  # fmt: skip

words_of_any_kind = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40)


def decoded(words: Any, asic: Asic, dtype: np.dtype | None = None, **numbers: int) -> np.ndarray:
    words = np.asarray(words, np.uint64)
    rows = np.zeros(len(words), dtype or schema.layout_of(asic).dtype)
    rows.view("u1")[:] = 0xEE  # shows columns that are not filled
    return rows[: word_codec.decode(words, rows, asic=asic, **numbers)]


def sendable(words: np.ndarray, asic: Asic) -> np.ndarray:
    """Return the words that encode() restores: v1 words have 54 bits, v3 has no type 0."""
    if asic == Asic.V1:
        return words & np.uint64((1 << 54) - 1)
    return words[words & np.uint64(3) != 0] if asic == Asic.V3 else words


@pytest.mark.parametrize(("asic", "dtype"), LAYOUTS)
@given(words_of_any_kind)
def test_columns_have_their_bits_and_encode_to_the_same_word(asic: Asic, dtype: np.dtype, words: list[int]) -> None:
    array = np.array(words, np.uint64)
    rows = decoded(array, asic, dtype, io_group=3, io_channel=17, direction=1)
    kept = sendable(array, asic)
    assert len(rows) == len(kept)
    assert (word_codec.encode(rows, asic=asic) == kept).all()
    width = 54 if asic == Asic.V1 else 64
    for row, word in zip(rows, kept.tolist(), strict=True):
        for name, (low, bits) in FIELDS[asic].items():
            assert row[name] == word >> low & (1 << bits) - 1, name
        assert row["valid_parity"] == word.bit_count() % 2
        assert row["direction"] == 1
        if asic == Asic.V1:
            assert row["chip_key"] == b"3-17-%d" % (word >> 2 & 255)
            assert row["counter"] == (word >> 10 & 15) << 12 | word >> 41 & 0xFFF
        else:
            assert (row["io_group"], row["io_channel"]) == (3, 17)
            assert row["fifo_diagnostics_enabled"] == (asic == Asic.V2_DIAGNOSTICS)
        assert (odd_parity(word, width) == word) == row["valid_parity"]


@pytest.mark.parametrize(("asic", "dtype"), LAYOUTS)
def test_columns_without_bits_are_0(asic: Asic, dtype: np.dtype) -> None:
    (row,) = decoded([1], asic, dtype, io_group=0, direction=0)
    filled = {"type", "packet_type", "chip_key", "valid_parity", "fifo_diagnostics_enabled"}
    assert {name: row[name] for name in dtype.names if name not in filled and row[name]} == {}


@pytest.mark.parametrize("asic", Asic)
@given(st.data())
def test_columns_survive_encoding_and_decoding(asic: Asic, data: st.DataObject) -> None:
    """All columns of all packet types of all generations, with any value."""
    kind_name = "type" if asic == Asic.V1 else "packet_type"
    kind = data.draw(st.integers(1 if asic == Asic.V3 else 0, 3))
    configuration = {"register", "value", "register_address", "register_data"}
    row = np.zeros(1, schema.layout_of(asic).dtype)
    names = [name for name in FIELDS[asic] if name in configuration or kind < 2]
    names = [name for name in names if not (name in configuration and kind < 2)]
    for name in [*names, "parity"]:
        row[name] = data.draw(st.integers(0, (1 << FIELDS[asic][name][1]) - 1), label=name)
    row[kind_name] = kind
    if asic == Asic.V1 and kind == 1:
        row[["channel", "adc_counts", "fifo_half", "fifo_full"]] = (0, 0, 0, 0)
        row["counter"] = data.draw(st.integers(0, 0xFFFF))
        names = ["timestamp", "counter"]
    if asic == Asic.V3 and kind == 1:
        row["timestamp"] = row["timestamp"] & (1 << 27) - 1 | row["first_packet"].astype("u8") << np.uint64(27)
    (copy,) = decoded(word_codec.encode(row, asic=asic), asic)
    assert {name: copy[name] for name in [*names, kind_name]} == {name: row[0][name] for name in [*names, kind_name]}


@pytest.mark.parametrize("asic", Asic)
@given(words_of_any_kind)
def test_parity_sets_only_the_parity_bit(asic: Asic, words: list[int]) -> None:
    width = 54 if asic == Asic.V1 else 64
    made = word_codec.parity(np.array(words, np.uint64), asic=asic)
    assert made.tolist() == [odd_parity(word & (1 << width) - 1, width) for word in words]


def test_larpix_control_writes_the_same_v2_rows(tmp_path: Path) -> None:
    """All columns and packet types; direction 0, because larpix-control sets no direction on packets from a board."""
    words = np.random.default_rng(2).integers(0, 2**64, 1500, dtype=np.uint64)
    rows = decoded(words, Asic.V2, io_group=2, io_channel=5, receipt=4_000_000_000, direction=0)
    theirs = packets_v2(words)
    for packet in theirs:
        packet.io_group, packet.io_channel, packet.receipt_timestamp = 2, 5, 4_000_000_000
    assert (rows_2_4(tmp_path / "theirs.h5", theirs) == rows).all()
    assert {*rows["packet_type"].tolist()} == {0, 1, 2, 3}


def test_larpix_control_writes_the_same_diagnostics_rows(tmp_path: Path) -> None:
    """All columns but `counter`, which has bit 46 here; larpix-control drops this bit."""
    words = np.random.default_rng(3).integers(0, 2**64, 1500, dtype=np.uint64)
    rows = decoded(words, Asic.V2_DIAGNOSTICS, direction=0)
    theirs = rows_2_4(tmp_path / "theirs.h5", packets_v2(words, diagnostics=True))
    assert (rows["counter"] == (words >> np.uint64(46) & np.uint64(1))).all()
    assert not theirs["counter"].any()
    rows["counter"] = 0
    assert (rows == theirs).all()


def test_larpix_control_reads_v2_rows_as_the_same_packets(tmp_path: Path) -> None:
    words = np.random.default_rng(4).integers(0, 2**64, 400, dtype=np.uint64)
    words = words[words & np.uint64(3) == 0]  # for other types it reads only their columns
    read = read_back(tmp_path / "ours.h5", decoded(words, Asic.V2, io_group=1, io_channel=4), "2.4")
    assert [packet.bytes() for packet in read] == [word.to_bytes(8, "little") for word in words.tolist()]
    assert all(packet.direction == 1 and packet.io_channel == 4 for packet in read)


def test_larpix_control_decodes_v1_packets_to_the_same_columns() -> None:
    """But its `dataword` clears the lowest ADC bit (FORMATS.md section 1), which `adc_counts` keeps."""
    words = np.random.default_rng(5).integers(0, 2**54, 1500, dtype=np.uint64)
    rows = decoded(words, Asic.V1, io_group=1, io_channel=2)
    columns = {"fifo_half", "fifo_full", "channel", "timestamp", "counter", "register", "value"}
    for row, word in zip(rows, words.tolist(), strict=True):
        packet = Packet_v1(word.to_bytes(7, "little"))
        packet.io_channel, packet.io_group = 2, 1
        theirs = packet.export()
        for name in columns | {"chip_key", "type", "chipid", "parity", "valid_parity"}:
            if name in theirs:
                assert theirs[name] == (row[name].decode() if name == "chip_key" else row[name]), name
        if "adc_counts" in theirs:
            assert theirs["adc_counts"] == row["adc_counts"] & 0x3FE


def test_rows_with_only_the_columns_of_their_type_are_encoded() -> None:
    """larpix-control wrote such rows of v1 chips, and of v2 chips before LArPix+HDF5 2.3."""
    v1 = np.zeros(2, schema.PACKETS_1_0)
    v1["type"], v1["chipid"], v1["register"], v1["value"] = (2, 1), (3, 5), (10, 0), (20, 0)
    v1["counter"], v1["parity"] = (0, 32838), (0, 0)
    assert word_codec.encode(v1, asic=Asic.V1).tolist() == [0x0000000050280E, 0x008C0000002015]
    v2 = np.zeros(1, schema.PACKETS_2_4)
    v2["packet_type"], v2["chip_id"], v2["register_address"], v2["register_data"], v2["parity"] = 2, 2, 64, 25, 1
    assert word_codec.encode(v2, asic=Asic.V2).tobytes().hex() == "0a00650000000080"


LITERAL: list[tuple[Asic, str, dict[str, int]]] = [
    (Asic.V1, "d81ff4e8a65501 00", {"type": 0, "chipid": 246, "channel": 7, "timestamp": 13857914, "adc_counts": 170}),
    (Asic.V1, "15200000008c00 00", {"type": 1, "chipid": 5, "counter": 32838}),
    (Asic.V1, "0e285000000000 00", {"type": 2, "chipid": 3, "register": 10, "value": 20}),
    (Asic.V1, "03000000000020 00", {"type": 3, "chipid": 0, "register": 0, "valid_parity": 1}),
    (Asic.V1, "90010000000000 80", {"type": 0, "chipid": 100}),
    (Asic.V2, "5004bc5e5a8023c0", {
        "packet_type": 0, "chip_id": 20, "channel_id": 1, "timestamp": 5922492, "first_packet": 1, "dataword": 35,
        "trigger_type": 0, "downstream_marker": 1, "parity": 1, "valid_parity": 1, "register_address": 1,
        "register_data": 175,
    }),
    (Asic.V2, "081415cd5b079140", {
        "chip_id": 2, "channel_id": 5, "timestamp": 123456789, "dataword": 145, "first_packet": 0,
        "downstream_marker": 1, "parity": 0, "valid_parity": 1,
    }),
    (Asic.V2, "0a00650000000080", {"packet_type": 2, "chip_id": 2, "register_address": 64, "register_data": 25}),
    (Asic.V2, "2f00000000000000", {"packet_type": 3, "chip_id": 11, "register_address": 0, "register_data": 0}),
    (Asic.V2, "0000000002100000", {"timestamp": 268566528 & 0x7FFFFFFF}),
    (Asic.V2_DIAGNOSTICS, "0000000002100000", {"local_fifo_events": 1, "shared_fifo_events": 2}),
    (Asic.V2_DIAGNOSTICS, "0000efbebc2a0000", {
        "timestamp": 0xBEEF, "shared_fifo_events": 0xABC, "local_fifo_events": 2, "fifo_diagnostics_enabled": 1,
    }),
    (Asic.V3, "2ef4051c39412582", {
        "packet_type": 2, "chip_id": 11, "register_address": 125, "register_data": 1, "downstream_marker": 0,
        "parity": 1, "valid_parity": 1, "local_fifo": 0, "shared_fifo": 0,
    }),
    (Asic.V3, "2fe82d1c39412542", {
        "packet_type": 3, "chip_id": 11, "register_address": 122, "register_data": 11, "downstream_marker": 1,
        "parity": 0, "valid_parity": 1,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("asic", "wire", "expected"), LITERAL)
def test_literal_words(asic: Asic, wire: str, expected: dict[str, int]) -> None:
    """Published and recorded words (FORMATS.md, sections 1 to 3)."""
    word = np.frombuffer(bytes.fromhex(wire), np.uint64)
    (row,) = decoded(word, asic)
    assert {name: int(row[name]) for name in expected} == expected
    assert word_codec.encode(np.array([row]), asic=asic)[0] == word[0] & np.uint64(
        (1 << (54 if asic == Asic.V1 else 64)) - 1
    )


def test_v1_time_rows_keep_their_io_group_and_larpix_control_reads_them(tmp_path: Path) -> None:
    """larpix-control itself leaves the chip key of such a row empty."""
    rows = np.zeros(1, schema.PACKETS_1_0)
    rows["chip_key"], rows["type"], rows["timestamp"] = b"3-0-0", 4, 1_600_000_000
    (packet,) = read_back(tmp_path / "ours.h5", rows, "1.0")
    assert isinstance(packet, TimestampPacket)
    assert packet.timestamp == 1_600_000_000


def test_rows_of_other_types_are_left_out_of_encoding() -> None:
    rows = decoded([0x50, 0x51, 0x52, 0x53], Asic.V2)
    rows["packet_type"][[0, 2]] = (4, 6)
    assert word_codec.encode(rows, asic=Asic.V2).tolist() == [0x51, 0x53]


def test_too_large_receipt_timestamps_are_an_error() -> None:
    assert decoded([0], Asic.V2, receipt=2**32 - 1)["receipt_timestamp"][0] == 2**32 - 1
    for dtype, asic in ((schema.PACKETS_2_4_CLOCK64, Asic.V2), (schema.PACKETS_3_0, Asic.V3)):
        assert decoded([1], asic, dtype, receipt=2**64 - 1)["receipt_timestamp"][0] == 2**64 - 1
        with pytest.raises(ValueError, match="does not fit"):
            decoded([1], asic, dtype, receipt=2**64)
    with pytest.raises(ValueError, match="receipt: 4294967296 does not fit"):
        decoded([0], Asic.V2, receipt=2**32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros(1, schema.PACKETS_2_4), "expected at least 2, one for each word, found 1"),
        (np.zeros(2, schema.PACKETS_3_0), "expected one dimension and 36 or 40 bytes a row .* found 1 and 43"),
        (np.zeros((2, 2), schema.PACKETS_2_4), "found 2 and 36"),
        (np.zeros(4, schema.PACKETS_2_4)[::2], "expected contiguous rows"),
        (np.zeros(2, [("a", "u4", 9)]), "expected contiguous rows of its layout"),
        (np.zeros(2, [(n, "<i8" if n == "timestamp" else schema.PACKETS_2_4[n]) for n in schema.PACKETS_2_4.names]),
         "Buffer dtype mismatch"),
        (np.frombuffer(bytes(72), schema.PACKETS_2_4), "read-only"),
    ],
)  # fmt: skip
def test_wrong_rows_raise_value_error(rows: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_codec.decode(np.zeros(2, np.uint64), rows, asic=Asic.V2)


def test_wrong_arguments_raise_value_error() -> None:
    for number, message in (
        ({"asic": 5}, "asic: expected a code of schema.Asic, 1 to 4, found 5"),
        ({"asic": 2, "io_group": 256}, "io_group: expected 0 to 255, found 256"),
        ({"asic": 2, "io_channel": -1}, "io_channel: expected 0 to 255, found -1"),
        ({"asic": 2, "direction": 2}, "direction: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            word_codec.decode(np.zeros(1, np.uint64), np.zeros(1, schema.PACKETS_2_4), **number)
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        word_codec.decode(np.zeros(1, "i4"), np.zeros(1, schema.PACKETS_2_4), asic=2)


def test_no_words_make_no_rows() -> None:
    for asic in Asic:
        none = np.zeros(0, np.uint64)
        rows = np.zeros(0, schema.layout_of(asic).dtype)
        assert word_codec.decode(none, rows, asic=asic) == 0
        assert len(word_codec.encode(rows, asic=asic)) == len(word_codec.parity(none, asic=asic)) == 0


def test_read_only_rows_can_be_encoded() -> None:
    rows = decoded([0x50], Asic.V2)
    rows.flags.writeable = False
    assert word_codec.encode(rows, asic=Asic.V2).tolist() == [0x50]


def test_a_packet_of_larpix_control_has_the_expected_word() -> None:
    packet = Packet_v2()
    packet.chip_id, packet.channel_id, packet.timestamp, packet.dataword = 20, 1, 5922492, 35
    packet.first_packet = packet.downstream_marker = 1
    packet.assign_parity()
    assert packet.bytes().hex() == "5004bc5e5a8023c0"
