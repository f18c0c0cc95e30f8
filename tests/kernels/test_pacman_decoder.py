"""The PACMAN decoder: literal words, larpix-control's messages, wrong messages, any grouping, the ledger."""

import numpy as np
import pytest
from decoder_harness import (
    CLOCK64,
    GROUP,
    LAYOUTS,
    V2,
    columns,
    data_word,
    decode,
    legacy,
    message_1_0,
    messages,
    new_counts,
    nonzero_counts,
    odd_parity,
    random_packets,
    run_messages,
    spans_of,
    word_1_0,
)
from hypothesis import given
from hypothesis import strategies as st
from larpix_control import Packet_v2, SyncPacket, TriggerPacket, pacman_msg_format

from larpixdaq import constants, schema
from larpixdaq._native import decoders, word_codec
from larpixdaq.schema import Asic

D = bytes.fromhex("4411e2695a0000005004bc5e5a8023c0")
TRIG = bytes.fromhex("54020000186a5a000000000000000000")
SYNC = bytes.fromhex("53530000809698000000000000000000")
HEARTBEAT = bytes.fromhex("534800004a11aa540000000000000000")
SWITCH = bytes.fromhex("53430100070000000000000000000000")


def test_literal_legacy_words() -> None:
    rows, counts, unknown = decode([legacy([D, TRIG, SYNC, HEARTBEAT, SWITCH])])
    assert rows["packet_type"].tolist() == [4, 0, 7, 6, 6, 6]
    assert rows["direction"].tolist() == [0, 1, 1, 1, 1, 1]
    assert (rows["io_group"] == GROUP).all()
    assert rows["timestamp"].tolist() == [1_600_000_000, 5922492, 5925400, 10_000_000, 1420431690, 7]
    assert rows["trigger_type"].tolist() == [0, 0, 2, ord("S"), ord("H"), ord("C")]
    assert rows["dataword"].tolist() == [0, 35, 0, 0, 0, 1]
    assert columns(rows[1], "io_channel", "chip_id", "receipt_timestamp") == (17, 20, 5925346)
    assert (len(unknown), counts) == (0, {
        "messages": 1, "bytes_in": 88, "header_bytes": 8, "words_in": 5, "word_bytes": 80, "word_rows": 5, "packets": 1,
        "time_rows": 1,
    })  # fmt: skip


def test_time_rows_have_only_time_and_io_group() -> None:
    for asic, dtype in LAYOUTS:
        rows, counts, _ = decode([legacy([])], dtype, asic)
        wanted = np.zeros(1, dtype)
        wanted["timestamp"] = 1_600_000_000
        wanted["type" if asic == Asic.V1 else "packet_type"] = 4
        wanted["chip_key" if asic == Asic.V1 else "io_group"] = b"7-0-0" if asic == Asic.V1 else GROUP
        assert (rows == wanted).all()
        assert counts == {"messages": 1, "bytes_in": 8, "header_bytes": 8, "time_rows": 1}


def test_message_from_the_tests_of_another_program() -> None:
    rows, *_ = decode([bytes.fromhex("44b0443f610001004401d01f250200002f00400000000040")])
    assert columns(rows[0], "packet_type", "timestamp") == (4, 1631536304)
    assert columns(rows[1], "packet_type", "io_channel", "receipt_timestamp", "chip_id") == (3, 1, 35987408, 11)


def test_literal_words_of_format_1_0() -> None:
    message = bytes.fromhex(
        "4402010060000000080706050403020100000000000000004402110000000000907856341200000050 04bc5e5a8023c0"
        "5302530100000000809698000000000078563412000000005402020300000000186a5a0000000000 0000000000000000"
        "5702000000000000100000 00cdab00000000000000000000"
    )
    for dtype in (V2, CLOCK64):
        rows, counts, unknown = decode([message], dtype)
        assert rows["timestamp"][0] == 0x0102030405060708 // 10**9
        clock = 0x1234567890 if dtype is CLOCK64 else 0x34567890  # of 37 bits; layout 2.4 gets the lower 32
        assert rows["packet_type"].tolist() == [4, 0, 6, 7]
        assert columns(rows[1], "io_channel", "receipt_timestamp", "chip_id") == (17, clock, 20)
        assert [word["reason"] for word in unknown] == [1]
        assert (unknown["seconds"] == 0x0102030405060708 // 10**9).all()
        assert "rejected_words" not in counts
        sync, trigger = rows[-2:]
        assert columns(sync, "trigger_type", "dataword", "counter", "timestamp") == (
            ord("S"),
            1,
            0x12345678,
            10_000_000,
        )
        assert columns(trigger, "trigger_type", "dataword", "counter", "timestamp") == (2, 3, 0, 5925400)
        assert unknown[-1]["raw"].tobytes() == message[-24:]
        assert unknown[-1]["size"] == 24


def test_configuration_words_of_format_1_0_are_packets() -> None:
    rows, *_ = decode([message_1_0([word_1_0(0x2F, 3, 9, b"C")])], CLOCK64)
    assert columns(rows[1], "packet_type", "io_channel", "chip_id", "receipt_timestamp") == (3, 3, 11, 9)


def test_io_channels_above_255_are_rejected_words() -> None:
    words = [word_1_0(0x50, 255), word_1_0(0x50, 256), word_1_0(0x50, 0xFFFF, letter=b"C")]
    rows, counts, unknown = decode([message_1_0(words)], CLOCK64)
    assert rows["io_channel"].tolist() == [0, 255]
    assert counts["rejected_words"] == 2
    assert unknown["reason"].tolist() == [2, 2]
    assert unknown["raw"].tobytes() == b"".join(words[1:])


def test_v3_words_without_a_valid_type_are_unknown() -> None:
    rows, counts, unknown = decode([legacy([data_word(4), data_word(5)])], schema.PACKETS_3_0, Asic.V3)
    assert rows["packet_type"].tolist() == [4, 1]
    assert counts["unknown_words"] == 1
    assert [tuple(word)[:4] for word in unknown] == [(1_600_000_000, GROUP, 3, 16)]
    assert unknown[0]["raw"].tobytes() == data_word(4) + bytes(8)


def test_64_bit_clock() -> None:
    """D words have bits 63..16 of the clock in bytes 2 to 7, S and T words have the whole clock in bytes 8 to 15."""
    clock = 0xFEDC_BA98_7654_3210
    data = b"D\x05" + clock.to_bytes(8, "little")[2:] + (0x50).to_bytes(8, "little")
    heartbeat = b"SH" + bytes(6) + clock.to_bytes(8, "little")
    trigger = b"T\x02" + bytes(6) + clock.to_bytes(8, "little")
    for asic, dtype in ((Asic.V2, CLOCK64), (Asic.V3, schema.PACKETS_3_0)):
        word = data[:8] + bytes([data[8] | (asic == Asic.V3)]) + data[9:]
        rows, *_ = decode([legacy([word, heartbeat, trigger])], dtype, asic, clock64=True)
        assert rows["receipt_timestamp"].tolist() == [0, clock >> 16 << 16, 0, 0]
        assert rows["timestamp"].tolist()[2:] == [clock, clock]
    rows, counts, unknown = decode([legacy([data, heartbeat])], V2, clock64=True)
    assert rows["timestamp"].tolist() == [1_600_000_000, clock]
    assert (counts["rejected_words"], unknown["reason"].tolist()) == (1, [4])


@given(st.lists(st.tuples(st.sampled_from(b"DDDDDDSTP"), st.binary(min_size=15, max_size=15)), max_size=20))
def test_words_of_one_message_are_decoded_as_in_messages_of_one_word(words: list[tuple[int, bytes]]) -> None:
    """Pairs of data words have a kernel of their own."""
    each = [bytes([letter]) + rest for letter, rest in words]
    rows, counts, unknown = decode([legacy(each)])
    single, single_counts, single_unknown = decode([legacy([word]) for word in each])
    assert rows[1:].tobytes() == single[single["packet_type"] != 4].tobytes()
    assert unknown.tobytes() == single_unknown.tobytes()
    for name in ("words_in", "word_rows", "packets", "bad_parity", "unknown_words"):
        assert counts.get(name) == single_counts.get(name)


def test_v1_chips_behind_a_pacman() -> None:
    """No known board has them. Layout 1.0 has the columns of sync and trigger words in `register` and `value`."""
    word = 0x0155A6E8F41FD8
    rows, *_ = decode([legacy([data_word(word | 0xFF << 56, 9), SWITCH, TRIG])], schema.PACKETS_1_0, Asic.V1)
    assert rows["type"].tolist() == [4, 0, 6, 7]
    assert rows["chip_key"].tolist() == [b"7-0-0", b"7-9-246", b"7-0-0", b"7-0-0"]
    assert rows["register"].tolist()[2:] == [ord("C"), 2]
    assert rows["value"].tolist()[2:] == [1, 0]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"D",
        legacy([D])[:7],
        b"?" + legacy([D])[1:],
        b"S" + message_1_0([])[1:],
        legacy([D, D])[:-1],  # fits neither format, and the board has sent no other message
        legacy([D]) + b"x",
        message_1_0([word_1_0(1)])[:-1],
    ],
)
def test_messages_of_no_known_format_are_rejected_whole(message: bytes) -> None:
    rows, counts, _ = decode([message])
    assert len(rows) == 0
    expected = {"bytes_in": len(message), "rejected_bytes": len(message), "rejected_messages": 1}
    assert counts == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize(
    ("message", "words", "trailing"),
    [
        (legacy([D, D])[:-1], 1, 15),
        (legacy([D, D, D], count=2), 2, 16),
        (legacy([D], count=3), 1, 0),
        (legacy([D]) + b"x", 1, 1),
        (legacy([], count=1), 0, 0),
        (legacy([], count=0) + bytes(16), 0, 16),
    ],
)
def test_wrong_legacy_counts(message: bytes, words: int, trailing: int) -> None:
    """The format is fixed, or known from an earlier consistent message."""
    decoded = [decode([message], format="legacy"), decode([legacy([]), message])]
    for (rows, counts, _), earlier in zip(decoded, (0, 1), strict=True):
        assert rows["packet_type"].tolist() == [4] * (1 + earlier) + [0] * words
        assert counts["wrong_counts"] == 1
        assert counts.get("trailing_bytes", 0) == trailing
        assert counts["messages"] == 1 + earlier


@pytest.mark.parametrize(
    ("message", "words", "trailing"),
    [
        (message_1_0([word_1_0(1), word_1_0(2)])[:-1], 1, 23),
        (message_1_0([word_1_0(1), word_1_0(2)], n_bytes=24), 1, 24),
        (message_1_0([word_1_0(1)], n_bytes=48), 1, 0),
        (message_1_0([word_1_0(1)], n_bytes=25) + b"x", 1, 1),
        (message_1_0([word_1_0(1)], n_bytes=2**32 - 1), 1, 0),
    ],
)
def test_wrong_counts_of_format_1_0(message: bytes, words: int, trailing: int) -> None:
    decoded = [decode([message], CLOCK64, format="1.0"), decode([message_1_0([]), message], CLOCK64)]
    for (rows, counts, _), earlier in zip(decoded, (0, 1), strict=True):
        assert len(rows) == 1 + earlier + words
        assert counts["wrong_counts"] == 1
        assert counts.get("trailing_bytes", 0) == trailing


def test_no_message_fits_both_formats() -> None:
    """The legacy count is the upper half of the byte count of format 1.0."""
    for count in range(65_536):
        for low in (0, 8, 65_535):
            assert 8 + 16 * count != 24 + low + 65_536 * count


def test_formats_can_change_from_message_to_message() -> None:
    rows, counts, _ = decode([legacy([D]), message_1_0([word_1_0(1)]), legacy([D])], CLOCK64)
    assert rows["packet_type"].tolist() == [4, 0, 4, 1, 4, 0]
    assert "wrong_counts" not in counts


def test_fixed_format_with_messages_of_the_other_format() -> None:
    assert decode([legacy([D])], CLOCK64, format="1.0")[1]["rejected_messages"] == 1
    rows, counts, _ = decode([message_1_0([word_1_0(1)])], format="legacy")
    assert counts["wrong_counts"] == 1  # every header of format 1.0 is a possible legacy header
    assert len(rows) == 1


@pytest.mark.parametrize(("asic", "dtype"), [*LAYOUTS, (Asic.V2_DIAGNOSTICS, V2)])
@given(messages(), st.sampled_from(["auto", "legacy", "1.0"]), st.booleans(), st.data())
def test_rows_and_counts_do_not_depend_on_grouping(
    asic: Asic, dtype: np.dtype, given_messages: list[bytes], format: str, clock64: bool, data: st.DataObject
) -> None:
    """The kept words do not either. run_messages() checks the ledger after every call."""
    options = {"format": format, "clock64": clock64}
    single, grouped = (decoders.PacmanDecoder(GROUP, asic, **options) for _ in range(2))
    rows, counts = run_messages(single, given_messages, dtype)
    groups = data.draw(st.lists(st.integers(0, 3), max_size=6))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    grouped_rows, grouped_counts = run_messages(grouped, given_messages, dtype, groups=groups, lengths=lengths)
    assert (rows == grouped_rows).all()
    assert (counts == grouped_counts).all()
    assert (single.take_unknown() == grouped.take_unknown()).all()
    assert counts[constants.Count.BYTES_IN] == sum(map(len, given_messages))


def test_messages_of_larpix_control_decode_to_its_packets() -> None:
    packets_sent = [random_packets(seed, 1 if seed % 2 else 40) for seed in range(30)]
    messages_sent = [pacman_msg_format.format(sent, msg_type="DATA") for sent in packets_sent]
    rows, counts, _ = decode(messages_sent)
    assert counts["messages"] == 30
    theirs = [packet for message in messages_sent for packet in pacman_msg_format.parse(message, io_group=GROUP)]
    assert len(theirs) == len(rows)
    for packet, row in zip(theirs, rows, strict=True):
        assert packet.packet_type == row["packet_type"]
        assert packet.io_group == row["io_group"]
        assert packet.timestamp == row["timestamp"]
        if isinstance(packet, Packet_v2):
            assert packet.bytes() == word_codec.encode(np.array([row]), asic=Asic.V2).tobytes()
            assert (packet.io_channel, packet.receipt_timestamp) == columns(row, "io_channel", "receipt_timestamp")
        elif isinstance(packet, SyncPacket):
            assert (packet.sync_type[0], packet.clk_source) == columns(row, "trigger_type", "dataword")
        elif isinstance(packet, TriggerPacket):
            assert packet.trigger_type[0] == row["trigger_type"]


def test_number_of_kept_unknown_words_is_limited() -> None:
    decoder = decoders.PacmanDecoder(GROUP, Asic.V2)
    bad = legacy([b"X" + bytes(15)] * 600)
    _, counts = run_messages(decoder, [bad, bad], V2)
    assert nonzero_counts(counts)["unknown_words"] == 1200
    assert len(decoder.take_unknown()) == schema.UNKNOWN_KEPT
    assert len(decoder.take_unknown()) == 0
    counts = new_counts()
    decoder.feed(*spans_of([bad]))
    assert decoder.decode(np.zeros(10, V2)) == 1
    assert len(decoder.take_unknown()) == 0  # the limit since start() is reached
    run_messages(decoder, [bad], V2)
    assert len(decoder.take_unknown()) == 600


def test_start_in_the_middle_of_a_message() -> None:
    """The new counters get the rest of the message. Equation (a) holds for both."""
    decoder = decoders.PacmanDecoder(GROUP, Asic.V2)
    first, second = new_counts(), new_counts()
    decoder.start(first)
    decoder.feed(*spans_of([legacy([D, D, b"X" * 16, D])]))
    assert decoder.decode(np.zeros(2, V2)) == 2
    decoder.start(second)
    assert decoder.decode(np.zeros(9, V2)) == 2
    assert nonzero_counts(first) == {
        "messages": 1, "bytes_in": 24, "header_bytes": 8, "words_in": 1, "word_bytes": 16, "word_rows": 1, "packets": 1,
        "time_rows": 1,
    }  # fmt: skip
    assert nonzero_counts(second) == {
        "bytes_in": 48, "words_in": 3, "word_bytes": 48, "word_rows": 2, "packets": 2, "unknown_words": 1,
    }  # fmt: skip


def test_bad_parity_is_counted_and_stored() -> None:
    good = odd_parity(0x1234 << 2)
    rows, counts, _ = decode([legacy([data_word(good), data_word(good ^ 1 << 20)])])
    assert rows["valid_parity"].tolist() == [0, 1, 0]
    assert counts["bad_parity"] == 1


def test_wrong_calls_raise_value_error() -> None:
    for wrong, message in (
        ((256, 2), "io_group: expected 0 to 255, found 256"),
        ((1, 9), "asic: expected a code of schema.Asic"),
    ):
        with pytest.raises(ValueError, match=message):
            decoders.PacmanDecoder(*wrong)
    with pytest.raises(ValueError, match=r"format: expected one of auto, legacy, 1\.0, found '3'"):
        decoders.PacmanDecoder(1, 2, format="3")
    decoder = decoders.PacmanDecoder(3, 2)
    assert decoder.io_group == 3
    with pytest.raises(ValueError, match=r"start\(\) names the counters"):
        decoder.decode(np.zeros(1, V2))
    decoder.start(new_counts())
    spans = np.zeros(2, schema.SPAN)
    spans[1] = (4, 5)
    with pytest.raises(ValueError, match="span 1: bytes 4 to 9 of a buffer of 8"):
        decoder.feed(bytes(8), spans)
    spans[1] = (2**32 - 1, 2**32 - 1)
    with pytest.raises(ValueError, match="span 1: bytes 4294967295 to 8589934590 of a buffer of 8"):
        decoder.feed(bytes(8), spans)
    decoder.feed(*spans_of([legacy([D])]))
    with pytest.raises(ValueError, match="decoder of io_group 3: fed before its input was used up"):
        decoder.feed(*spans_of([legacy([D])]))
    with pytest.raises(ValueError, match="rows for asic 2"):
        decoder.decode(np.zeros(1, schema.PACKETS_1_0))
    assert decoder.decode(np.zeros(0, V2)) == 0  # the rows are full, so there may be more
    assert decoder.decode(np.zeros(3, V2)) == 2


def test_used_up_input_is_released() -> None:
    decoder = decoders.PacmanDecoder(1, 2)
    decoder.start(new_counts())
    buffer = bytearray(legacy([D]))
    decoder.feed(buffer, np.array([(0, len(buffer))], schema.SPAN))
    with pytest.raises(BufferError):
        buffer.clear()
    decoder.decode(np.zeros(9, V2))
    buffer.clear()
