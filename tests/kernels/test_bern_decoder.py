"""The Bern decoder: literal messages, larpix-control's messages, wrong messages, any grouping."""

import struct

import numpy as np
import pytest
from decoder_harness import GROUP, new_counts, nonzero_counts, run_messages
from hypothesis import given
from hypothesis import strategies as st
from larpix_control import message_format, packets_v2

from larpixdaq import constants, schema
from larpixdaq._native import decoders, word_codec
from larpixdaq.schema import Asic

LAYOUTS = [(asic, schema.layout_of(asic).dtype) for asic in Asic]


def data(words: list[int], channel: int = 2, trailing: bytes = b"") -> bytes:
    return b"\x01\x00D" + bytes([channel, 9, 9, 9, 9]) + b"".join(struct.pack("<Q", word) for word in words) + trailing


def time(seconds: int, trailing: bytes = b"") -> bytes:
    return b"\x01\x00T" + bytes(5) + struct.pack("<Q", seconds) + trailing


HEARTBEAT = b"\x01\x00HHB\0\0\0"


def decode(messages: list[bytes], asic: Asic = Asic.V2) -> tuple:
    decoder = decoders.BernDecoder(GROUP, asic)
    rows, counts = run_messages(decoder, messages, schema.layout_of(asic).dtype)
    return rows, nonzero_counts(counts), decoder.take_unknown()


def test_literal_messages() -> None:
    rows, counts, _ = decode([bytes.fromhex("01004404000000000101010101010101"), HEARTBEAT, time(1_600_000_000)])
    assert rows["packet_type"].tolist() == [1, 4]
    assert rows["io_channel"].tolist() == [4, 0]
    assert rows["timestamp"].tolist() == [0x01010101, 1_600_000_000]
    assert rows["direction"].tolist() == [1, 0]
    assert (rows["io_group"] == GROUP).all()
    assert counts == {
        "messages": 3, "bytes_in": 40, "header_bytes": 32, "words_in": 1, "word_bytes": 8, "word_rows": 1, "packets": 1,
        "bad_parity": 1, "time_rows": 1,
    }  # fmt: skip


def test_v1_words_have_54_bits() -> None:
    """Older boards set bit 63 to mark valid words."""
    rows, *_ = decode([bytes.fromhex("01004401000000000400000000000080")], Asic.V1)
    assert rows["chip_key"].tolist() == [b"7-1-1"]
    assert word_codec.encode(rows, asic=Asic.V1).tolist() == [4]
    assert rows["valid_parity"].tolist() == [1]


def test_time_messages_may_have_17_bytes() -> None:
    """larpix-control's encoder sends 17 bytes, and its decoder reads 56 bits of the time. Here all 64 bits count."""
    rows, counts, _ = decode([time(2**60), time(5, b"\0")])
    assert rows["timestamp"].tolist() == [2**60, 5]
    assert (counts["header_bytes"], counts["trailing_bytes"]) == (32, 1)


def test_unknown_words_have_the_time_of_the_last_t_message() -> None:
    rows, counts, unknown = decode([data([4]), time(50), data([8, 5])], Asic.V3)
    assert rows["packet_type"].tolist() == [4, 1]
    assert counts["unknown_words"] == 2
    assert [tuple(word)[:4] for word in unknown] == [(0, GROUP, 3, 8), (50, GROUP, 3, 8)]


def test_bytes_after_the_last_word_are_trailing_bytes() -> None:
    """larpix-control drops the whole message in this case (FORMATS.md section 7)."""
    rows, counts, _ = decode([data([1], trailing=b"abc"), HEARTBEAT + b"xy"])
    assert len(rows) == 1
    assert counts["trailing_bytes"] == 5


@pytest.mark.parametrize(
    "message",
    [b"", b"\x01\x00D", HEARTBEAT[:7], b"\x02" + data([1])[1:], b"\x01\x01" + data([1])[2:], b"\x01\x00X" + bytes(5),
     time(1)[:-1], time(1, b"ab")],
)  # fmt: skip
def test_other_messages_are_rejected_whole(message: bytes) -> None:
    rows, counts, _ = decode([message])
    assert len(rows) == 0
    assert counts.pop("rejected_messages") == 1
    assert counts == ({"bytes_in": len(message), "rejected_bytes": len(message)} if message else {})


def test_messages_of_larpix_control() -> None:
    words = np.random.default_rng(1).integers(0, 2**64, 200, dtype=np.uint64)
    sent = packets_v2(words)
    for i, packet in enumerate(sent):
        packet.io_channel = 1 + i % 4
    rows, *_ = decode(message_format.dataserver_message_encode(sent))
    assert (word_codec.encode(rows, asic=Asic.V2) == words).all()
    assert rows["io_channel"].tolist() == [1 + i % 4 for i in range(200)]


messages_of_a_board = st.lists(
    st.one_of(
        st.builds(data, st.lists(st.integers(0, 2**64 - 1), max_size=5), st.integers(0, 255), st.binary(max_size=9)),
        st.builds(time, st.integers(0, 2**64 - 1), st.binary(max_size=2)),
        st.just(HEARTBEAT),
        st.binary(max_size=30),
        st.binary(max_size=30).map(lambda rest: b"\x01\x00" + rest),
    ),
    max_size=8,
)


@pytest.mark.parametrize(("asic", "dtype"), LAYOUTS)
@given(
    messages_of_a_board, st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(1, 4), min_size=1, max_size=4)
)
def test_rows_and_counts_do_not_depend_on_grouping(
    asic: Asic, dtype: np.dtype, messages: list[bytes], groups: list[int], lengths: list[int]
) -> None:
    single, grouped = decoders.BernDecoder(GROUP, asic), decoders.BernDecoder(GROUP, asic)
    rows, counts = run_messages(single, messages, dtype)
    grouped_rows, grouped_counts = run_messages(grouped, messages, dtype, groups=groups, lengths=lengths)
    assert (rows == grouped_rows).all()
    assert (counts == grouped_counts).all()
    assert (single.take_unknown() == grouped.take_unknown()).all()
    assert counts[constants.Count.BYTES_IN] == sum(map(len, messages))


def test_wrong_calls_raise_value_error() -> None:
    with pytest.raises(ValueError, match="io_group: expected 0 to 255, found -1"):
        decoders.BernDecoder(-1, Asic.V2)
    decoder = decoders.BernDecoder(1, Asic.V2)
    with pytest.raises(ValueError, match=r"start\(\) names the counters"):
        decoder.decode(np.zeros(1, schema.PACKETS_2_4))
    decoder.start(new_counts())
    assert decoder.decode(np.zeros(1, schema.PACKETS_2_4)) == 0
