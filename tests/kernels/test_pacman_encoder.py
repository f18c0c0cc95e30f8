"""Encoding of rows as PACMAN messages, and splitting of message logs."""

import struct

import numpy as np
import pytest
from decoder_harness import CLOCK64, GROUP, LAYOUTS, V2, decode, messages, new_counts, nonzero_counts, random_packets
from hypothesis import given
from hypothesis import strategies as st
from larpix_control import pacman_msg_format

from larpixdaq._native import decoders
from larpixdaq.schema import Asic


def test_decoding_and_encoding_restores_messages_of_larpix_control() -> None:
    sent = [pacman_msg_format.format(random_packets(seed, 25), msg_type="DATA") for seed in range(8)]
    rows, *_ = decode(sent)
    buffer, spans = decoders.encode_pacman(rows, asic=Asic.V2)
    made = [bytes(buffer[start : start + length]) for start, length in spans.tolist()]
    assert made == sent


def fits_legacy(rows: np.ndarray, clock64: bool) -> bool:
    """Whether legacy messages can hold all columns of these rows."""
    v1 = "type" in rows.dtype.names
    kind, source = rows["type" if v1 else "packet_type"], rows["value" if v1 else "dataword"]
    board = (kind == 6) | (kind == 7)
    wide = (kind == 4) & (rows["timestamp"] >= 2**32) | board & (rows["counter"] > 0) | board & (source > (kind == 6))
    if not clock64:
        wide |= board & (rows["timestamp"] >= 2**32)
    if not v1:
        receipt = rows["receipt_timestamp"].astype("u8")
        wide |= (kind < 4) & ((receipt & 0xFFFF > 0) if clock64 else (receipt >= 2**32))
    return not wide.any()


@pytest.mark.parametrize(("asic", "dtype"), LAYOUTS)
@pytest.mark.parametrize("format", ["legacy", "1.0"])
@given(messages(), st.booleans())
def test_rows_encode_to_messages_that_make_the_same_rows(
    format: str, asic: Asic, dtype: np.dtype, given_messages: list[bytes], clock64: bool
) -> None:
    """Format 1.0 can hold all received rows. Legacy cannot, and then raises an error."""
    rows, *_ = decode(given_messages, dtype, asic, clock64=clock64)

    def encode() -> tuple[bytearray, np.ndarray]:
        return decoders.encode_pacman(rows, asic=asic, format=format, clock64=clock64)

    if format == "legacy" and not fits_legacy(rows, clock64):
        with pytest.raises(ValueError, match="as a PACMAN word of format legacy"):
            encode()
        return
    buffer, spans = encode()
    decoder = decoders.PacmanDecoder(GROUP, asic, format=format, clock64=clock64)
    counts = new_counts()
    decoder.start(counts)
    decoder.feed(buffer, spans)
    decoded = np.zeros(len(rows) + 1, dtype)
    assert decoder.decode(decoded) == len(rows)
    assert (decoded[:-1] == rows).all()
    assert "wrong_counts" not in nonzero_counts(counts)


def test_encode_leaves_out_sent_packets_and_info_messages() -> None:
    rows = np.zeros(6, V2)
    rows["packet_type"] = [0, 5, 4, 0, 0, 6]
    rows["direction"] = [1, 0, 0, 0, 1, 1]
    rows["timestamp"] = [1, 2, 77, 4, 5, 6]
    buffer, spans = decoders.encode_pacman(rows, asic=Asic.V2, seconds=70)
    decoded, *_ = decode([bytes(buffer[start : start + length]) for start, length in spans.tolist()])
    assert decoded["packet_type"].tolist() == [4, 0, 4, 0, 6]
    assert decoded["timestamp"].tolist() == [70, 1, 77, 5, 6]


def test_words_after_a_full_legacy_message_go_into_another() -> None:
    rows = np.zeros(65_537, V2)
    rows["direction"] = 1
    rows["packet_type"][0], rows["timestamp"][0] = 4, 99
    buffer, spans = decoders.encode_pacman(rows, asic=Asic.V2)
    assert spans["length"].tolist() == [8 + 16 * 65_535, 24]
    assert len(buffer) == spans["length"].sum()
    assert decoders.encode_pacman(rows, asic=Asic.V2, format="1.0")[1]["length"].tolist() == [24 + 24 * 65_536]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"packet_type": 4, "timestamp": 2**32}, {}, "row 0 of 1 .* format legacy: its time does not fit the header"),
        ({"packet_type": 4, "timestamp": 2**63}, {"format": "1.0"}, "format 1.0: its time does not fit the header"),
        ({"receipt_timestamp": 2**32}, {}, "its receipt_timestamp does not fit the word"),
        ({"receipt_timestamp": 0x10001}, {"clock64": True}, "its receipt_timestamp does not fit the word"),
        ({"packet_type": 6, "timestamp": 2**32}, {}, "its timestamp does not fit the word"),
        ({"packet_type": 6, "counter": 1}, {}, "its dataword or counter has no place in the word"),
        ({"packet_type": 7, "dataword": 1}, {}, "its dataword or counter has no place in the word"),
        ({"packet_type": 7, "counter": 1}, {"format": "1.0"}, "its dataword or counter has no place in the word"),
        ({}, {"format": "2.0"}, "format: expected legacy or 1.0, found '2.0'"),
    ],
)
def test_columns_without_room_in_a_message_are_an_error(change: dict, options: dict, message: str) -> None:
    rows = np.zeros(1, CLOCK64)
    rows["direction"] = 1
    for name, value in change.items():
        rows[name] = value
    with pytest.raises(ValueError, match=message):
        decoders.encode_pacman(rows, asic=Asic.V2, **options)


def test_no_rows_make_no_messages() -> None:
    buffer, spans = decoders.encode_pacman(np.zeros(0, V2), asic=Asic.V2)
    assert (len(buffer), len(spans)) == (0, 0)


@given(st.lists(st.binary(max_size=30), max_size=8), st.data())
def test_split_log_finds_the_complete_messages(given_messages: list[bytes], data: st.DataObject) -> None:
    log = b"".join(struct.pack("<I", len(message)) + message for message in given_messages)
    log = log[: data.draw(st.integers(0, len(log)))]
    spans, used = decoders.split_log(log)
    complete = [log[start : start + length] for start, length in spans.tolist()]
    assert complete == given_messages[: len(complete)]
    assert used == sum(4 + len(message) for message in complete)
    assert len(complete) == len(given_messages) or len(log) - used < 4 + len(given_messages[len(complete)])
