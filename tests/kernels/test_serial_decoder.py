"""The serial decoder: both rules compared with references, any pieces, flushing, seconds, the ledger."""

from collections.abc import Sequence

import numpy as np
import pytest
from decoder_harness import GROUP, drain, new_counts, nonzero_counts, odd_parity
from hypothesis import given
from hypothesis import strategies as st
from larpix_control import SerialPort
from source_driver import check_ledger

from larpixdaq import constants, schema
from larpixdaq._native import decoders, word_codec
from larpixdaq.schema import Asic

V2 = schema.PACKETS_2_4
#: Bytes, unix seconds, whether a silence follows.
Event = tuple[bytes, int, bool]


def frame(word: int) -> bytes:
    return b"s" + word.to_bytes(8, "little") + b"q"


GOOD, BAD = odd_parity(0x1234 << 2), odd_parity(0x1234 << 2) ^ 1 << 40


def run(
    events: Sequence[Event],
    *,
    rule: str = "strict",
    asic: Asic = Asic.V2,
    cuts: Sequence[int] = (),
    lengths: Sequence[int] = (4096,),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feed each event in pieces of sizes `cuts`, and check the ledger. Returns rows, counters and unknown words."""
    decoder = decoders.SerialDecoder(GROUP, asic, rule=rule)
    counts = new_counts()
    decoder.start(counts)
    dtype = schema.layout_of(asic).dtype
    parts = [np.zeros(0, dtype)]
    made = 0

    def check(more: int) -> None:
        nonlocal made
        made += more
        check_ledger(counts, made, serial=True)

    for stream, seconds, silence in events:
        at = 0
        for size in [*cuts, len(stream)]:
            decoder.feed(bytearray(stream[at : at + size]), seconds)
            check(0)
            at += size
            parts += drain(decoder, dtype, lengths, check)
        if silence:
            decoder.flush()
            parts += drain(decoder, dtype, lengths, check)
    return np.concatenate(parts), counts, decoder.take_unknown()


def words_of(rows: np.ndarray, asic: Asic = Asic.V2) -> list[int]:
    return word_codec.encode(rows, asic=asic).tolist()


def strict_rule(stream: bytes) -> tuple[list[int], int]:
    """Return the words of an unfinished stream and the number of skipped bytes, by FORMATS.md section 4."""
    words, i, skipped = [], 0, 0
    while i < len(stream):
        if stream[i : i + 1] != b"s":
            i, skipped = i + 1, skipped + 1
            continue
        if i + 10 > len(stream):
            break
        word = int.from_bytes(stream[i + 1 : i + 9], "little")
        framed = stream[i + 9 : i + 10] == b"q"
        if framed and word.bit_count() % 2 == 0:
            if i + 20 > len(stream):
                break
            framed = stream[i + 10 : i + 11] == b"s" and stream[i + 19 : i + 20] == b"q"
        if framed:
            words.append(word)
            i += 10
        else:
            i, skipped = i + 1, skipped + 1
    return words, skipped


awkward = st.lists(st.sampled_from([0x73, 0x71, 0x00, 0x01]), max_size=25).map(bytes)
pieces = st.one_of(
    st.integers(0, 2**64 - 1).map(lambda word: frame(odd_parity(word))),
    st.integers(0, 2**64 - 1).map(frame),
    awkward.map(lambda body: b"s" + (body + bytes(8))[:8] + b"q"),
    awkward,
    st.binary(max_size=12),
)
streams = st.lists(pieces, max_size=10).map(b"".join)
sizes = st.lists(st.integers(0, 12), max_size=10)
lengths = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(streams)
def test_strict_rule_finds_the_words_of_the_reference(stream: bytes) -> None:
    rows, counts, _ = run([(stream, 5, False)])
    words, skipped = strict_rule(stream)
    assert words_of(rows) == words
    assert counts[constants.Count.RESYNC_BYTES] == skipped


@given(streams, sizes)
def test_larpix_control_rule_finds_the_words_of_larpix_control(stream: bytes, cuts: list[int]) -> None:
    """larpix-control's parser gets the same pieces. It keeps up to 9 bytes of garbage, which count at once here."""
    rows, *_ = run([(stream, 5, False)], rule="larpix-control", cuts=cuts)
    theirs, leftover, at = [], b"", 0
    for size in [*cuts, len(stream)]:
        packets, leftover = SerialPort._parse_input(stream[at : at + size], leftover)
        at += size
        theirs += [int.from_bytes(packet.bytes(), "little") for packet in packets]
    assert words_of(rows) == theirs


@pytest.mark.parametrize("asic", Asic)
@pytest.mark.parametrize("rule", ["strict", "larpix-control"])
@given(st.lists(st.tuples(streams, st.integers(0, 2), st.booleans()), max_size=4), sizes, lengths)
def test_rows_and_counts_do_not_depend_on_pieces(
    rule: str, asic: Asic, events: list[Event], cuts: list[int], lengths: list[int]
) -> None:
    """flush() and changes of the second come at the same byte positions."""
    whole = run(events, rule=rule, asic=asic)
    cut = run(events, rule=rule, asic=asic, cuts=cuts, lengths=lengths)
    for from_whole, from_pieces in zip(whole, cut, strict=True):
        assert (from_whole == from_pieces).all()


def test_literal_frame_with_start_and_stop_bytes_inside() -> None:
    stream = bytes.fromhex("7370a071737173710071")
    rows, *_ = run([(stream, 9, True)])
    assert rows["packet_type"].tolist() == [4, 0]
    assert rows["timestamp"][0] == 9
    assert (rows["io_group"] == GROUP).all()
    assert rows["io_channel"].tolist() == [0, 1]
    assert words_of(rows) == [int.from_bytes(stream[1:9], "little")]


@pytest.mark.parametrize("lost", range(10))
def test_one_lost_byte_costs_one_frame(lost: int) -> None:
    cut = frame(GOOD)[:lost] + frame(GOOD)[lost + 1 :]
    rows, counts, _ = run([(frame(4) + cut + frame(8) + frame(GOOD), 9, True)])
    assert words_of(rows) == [4, 8, GOOD]
    assert nonzero_counts(counts)["resync_bytes"] == 9


def test_a_false_frame_that_larpix_control_accepts() -> None:
    """A frame is cut off after its start byte, and the next frame has a stop byte nine bytes after it."""
    true = b"s" + bytes([1, 2, 3, 4, 5, 6, 6, 0x71]) + b"q"
    stream = b"s" + true + frame(GOOD) * 2
    assert stream[9] == ord("q")
    theirs, _, _ = run([(stream, 1, True)], rule="larpix-control")
    ours, _, _ = run([(stream, 1, True)])
    word = int.from_bytes(true[1:9], "little")
    assert word not in words_of(theirs)
    assert words_of(ours) == [word, GOOD, GOOD]


def test_even_parity_waits_for_the_next_frame() -> None:
    decoder = decoders.SerialDecoder(GROUP, Asic.V2)
    decoder.start(new_counts())
    rows = np.zeros(9, V2)
    decoder.feed(frame(BAD) + frame(GOOD)[:9], 1)
    assert decoder.decode(rows) == 1  # the time
    decoder.feed(b"q", 1)
    assert decoder.decode(rows) == 2
    assert rows["valid_parity"].tolist()[:2] == [0, 1]


@pytest.mark.parametrize(
    ("following", "accepted"),
    [(b"", True), (b"s", True), (b"x", False), (b"s" + bytes(8), True), (b"sxxxxxxxxx", False)],
)
def test_flush_decides_by_the_bytes_that_have_arrived(following: bytes, accepted: bool) -> None:
    """A frame of even parity at the end of a burst is a wrong word, unless a following byte contradicts a frame."""
    rows, counts, _ = run([(frame(BAD) + following, 1, True)])
    assert words_of(rows) == [BAD] * accepted
    assert nonzero_counts(counts).get("bad_parity", 0) == accepted


def test_flush_keeps_an_incomplete_frame() -> None:
    rows, counts, _ = run([(frame(GOOD)[:7], 1, True), (frame(GOOD)[7:], 1, False)])
    assert words_of(rows) == [GOOD]
    assert "resync_bytes" not in nonzero_counts(counts)


def test_a_time_row_precedes_the_first_word_of_each_second() -> None:
    rows, *_ = run([(frame(GOOD), 1, False), (frame(GOOD)[:4], 1, False), (frame(GOOD)[4:], 2, False), (b"", 3, False)])
    assert rows["packet_type"].tolist() == [4, 0, 4, 0]
    assert rows["timestamp"][[0, 2]].tolist() == [1, 2]


def test_new_counters_begin_with_pending_bytes_and_a_time_row() -> None:
    decoder = decoders.SerialDecoder(GROUP, Asic.V2)
    first, second = new_counts(), new_counts()
    rows = np.zeros(9, V2)
    decoder.start(first)
    decoder.feed(frame(GOOD) + frame(GOOD)[:3], 7)
    assert decoder.decode(rows) == 2
    decoder.start(second)
    decoder.feed(frame(GOOD)[3:] + b"s", 7)
    assert decoder.decode(rows) == 2
    assert rows["packet_type"].tolist()[:2] == [4, 0]
    common = {"messages": 1, "words_in": 1, "word_bytes": 10, "word_rows": 1, "packets": 1, "time_rows": 1}
    assert nonzero_counts(first) == common | {"bytes_in": 13, "pending_after": 3}
    assert nonzero_counts(second) == common | {"bytes_in": 8, "pending_before": 3, "pending_after": 1}
    decoder.start(first)  # run 0 continues after a run
    decoder.feed(frame(GOOD)[1:], 7)
    assert decoder.decode(rows) == 2
    check_ledger(first, 4, serial=True)
    assert (nonzero_counts(first)["pending_before"], nonzero_counts(first)["pending_after"]) == (1, 3)


def test_start_before_the_input_is_used_up() -> None:
    decoder = decoders.SerialDecoder(GROUP, Asic.V2)
    first, second = new_counts(), new_counts()
    decoder.start(first)
    decoder.feed(frame(GOOD) * 3, 7)
    assert decoder.decode(np.zeros(2, V2)) == 2
    decoder.start(second)
    assert decoder.decode(np.zeros(5, V2)) == 2
    check_ledger(first, 2, serial=True)
    check_ledger(second, 2, serial=True)


def test_v1_frames() -> None:
    """Byte 8 is not part of a v1 word, and changes neither row nor parity."""
    word = 0x0155A6E8F41FD8
    stream = b"s" + word.to_bytes(7, "little") + b"\x80q"
    rows, *_ = run([(stream * 2, 3, False)], asic=Asic.V1)
    assert rows["chip_key"].tolist() == [b"7-0-0", b"7-1-246", b"7-1-246"]
    assert words_of(rows, Asic.V1) == [word, word]


def test_v3_words_of_type_0_are_unknown() -> None:
    rows, counts, unknown = run([(frame(4), 3, False)], asic=Asic.V3)
    assert rows["packet_type"].tolist() == [4]
    assert nonzero_counts(counts)["unknown_words"] == 1
    assert [tuple(word)[:4] for word in unknown] == [(3, GROUP, 3, 10)]
    assert unknown[0]["raw"].tobytes() == frame(4) + bytes(14)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_encode_serial_makes_frames(words: list[int]) -> None:
    stream = decoders.encode_serial(np.array(words, np.uint64))
    assert stream == b"".join(frame(word) for word in words)
    rows, *_ = run([(stream, 1, True)], rule="larpix-control")
    assert words_of(rows) == words


def test_a_long_stream() -> None:
    words = word_codec.parity(np.arange(50_000, dtype=np.uint64) << np.uint64(2), asic=Asic.V2)
    stream = decoders.encode_serial(words)
    rows, *_ = run([(stream, 1, False)], cuts=[4093] * 130)
    assert (word_codec.encode(rows, asic=Asic.V2) == words).all()


def test_wrong_calls_raise_an_error() -> None:
    with pytest.raises(ValueError, match="rule: expected strict or larpix-control, found 'none'"):
        decoders.SerialDecoder(1, 2, rule="none")
    decoder = decoders.SerialDecoder(1, 2)
    with pytest.raises(ValueError, match=r"start\(\) names the counters"):
        decoder.feed(b"s", 1)
    decoder.start(new_counts())
    decoder.feed(frame(GOOD), 1)
    with pytest.raises(ValueError, match="decoder of io_group 1: fed before its input was used up"):
        decoder.feed(b"s", 1)
    with pytest.raises(OverflowError):
        decoder.feed(b"s", -1)
