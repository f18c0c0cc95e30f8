"""Messages of a stream on JetStream: frames come out as they went in, and malformed bytes are a ProtocolError."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq.constants import LAST_RUN
from larpixdaq.errors import ProtocolError
from larpixdaq.protocol import stream_messages
from larpixdaq.protocol.stream import Block, End, Welcome, pack
from larpixdaq.protocol.stream_messages import (
    MAX_ORIGINS,
    PIECE_HEADER,
    Identity,
    Unpacker,
    cut,
    encode,
    pack_positions,
    unpack_positions,
)

PRODUCER = "board"
EPOCHS = st.integers(0, 2**64 - 1)
RUNS = st.integers(1, LAST_RUN)
SEQUENCES = st.integers(0, 2**48 - 1)


def block(sequence: int, run: int = 7, epoch: int = 5, producer: str = PRODUCER, text: str | None = None) -> Block:
    return Block(run, producer, epoch, sequence, 0, 3, 2, 0, 1, 2, 0, [], [], text)


def end(following: int, run: int = 7, epoch: int = 5) -> End:
    return End(run, PRODUCER, epoch, following, "closed", 1, 2, [], [], [])


@st.composite
def frames(draw: st.DrawFn) -> list[tuple[bytes, ...]]:
    """Frames of one origin, with gaps in their sequences, and perhaps an end record at last."""
    run, epoch, sequence = draw(RUNS), draw(EPOCHS), draw(st.integers(0, 2**40))
    found: list[tuple[bytes, ...]] = []
    for gap in draw(st.lists(st.integers(0, 3), min_size=1, max_size=8)):
        sequence += gap
        parts = draw(st.lists(st.binary(max_size=300), max_size=2))
        found.append((pack(block(sequence, run, epoch, text=draw(st.text(max_size=5)))), *parts))
        sequence += 1
    if draw(st.booleans()):
        found.append((pack(end(sequence, run, epoch)),))
    return found


def unpacked(message: bytes, unpacker: Unpacker | None = None) -> list[tuple[bytes, ...]]:
    return [(pack(frame), *map(bytes, parts)) for frame, parts in (unpacker or Unpacker(PRODUCER)).unpack(message)]


@settings(max_examples=examples(200))
@given(frames())
def test_frames_come_out_as_they_went_in(found: list[tuple[bytes, ...]]) -> None:
    assert unpacked(b"".join(map(encode, found))) == found


@settings(max_examples=examples(100))
@given(st.data())
def test_a_large_frame_is_joined_whatever_came_before(data: st.DataObject) -> None:
    unpacker = Unpacker(PRODUCER)
    for found in data.draw(st.lists(frames(), min_size=1, max_size=4)):
        frame = encode(found[0])
        most = data.draw(st.integers(PIECE_HEADER + 1, PIECE_HEADER + len(frame)))
        messages = [message for _, message in cut(frame, most)]
        assert all(len(message) <= most for message in messages)
        if data.draw(st.booleans()):  # an attempt that is interrupted
            for message in messages[: data.draw(st.integers(0, len(messages) - 1))]:
                assert not unpacker.unpack(message)
        if data.draw(st.booleans()):  # another message after that
            assert unpacked(b"".join(map(encode, found)), unpacker) == found
        for message in messages[:-1]:
            assert not unpacker.unpack(message)
            assert unpacker.joining
        assert unpacked(messages[-1], unpacker) == found[:1]
        assert not unpacker.joining


@settings(max_examples=examples(100))
@given(st.data())
def test_a_missing_or_repeated_piece_is_refused(data: st.DataObject) -> None:
    frame = encode((pack(block(3)), data.draw(st.binary(min_size=100, max_size=300))))
    messages = [message for _, message in cut(frame, PIECE_HEADER + 20)]
    i = data.draw(st.integers(1, len(messages) - 1))
    wrong = messages[:i] + (messages[i - 1 :] if i > 1 and data.draw(st.booleans()) else messages[i + 1 :])
    unpacker = Unpacker(PRODUCER)
    results = []
    for message in wrong:
        try:
            results.append(unpacker.unpack(message))
        except ProtocolError:
            results.append([])
    assert not any(results)  # never another frame than the one that was sent
    assert unpacked(encode((pack(block(4)),)), unpacker) == [(pack(block(4)),)]


@settings(max_examples=examples(400))
@given(st.data())
def test_other_bytes_are_refused(data: st.DataObject) -> None:
    message = bytearray(b"".join(map(encode, data.draw(frames()))))
    kind = data.draw(st.sampled_from(["bytes", "flip", "cut", "more"]))
    if kind == "bytes":
        message = bytearray(data.draw(st.binary(max_size=100)))
    elif kind == "flip":
        message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del message[data.draw(st.integers(0, len(message) - 1)) :]
    else:
        message += data.draw(st.binary(min_size=1, max_size=20))
    with contextlib.suppress(ProtocolError):
        # A flipped bit of the rows, or frames that were cut off: their checksums and positions tell it.
        assert all(frame.producer == PRODUCER for frame, _ in Unpacker(PRODUCER).unpack(bytes(message)))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", "is empty"),
        (encode((pack(Welcome(PRODUCER, 5, None, 0)),)), "expected blocks and end records only"),
        (encode((pack(block(1, producer="other")),)), "a frame of other"),
        (encode((pack(end(1)), b"x")), "an end record of 2 parts, expected 1"),
        (encode((pack(block(2)),)) + encode((pack(block(1)),)), "sequence 1 of run 7 after 2 of run 7"),
        (encode((pack(block(2)),)) + encode((pack(block(3, run=8)),)), "sequence 3 of run 8 after 2 of run 7"),
        (b"\4" + bytes(16), "1 to 3 parts, found 4"),
        (b"\0" + bytes(8), "have no data"),
        (b"\0" + bytes(4) + b"\xff\xff\xff\xff" + b"x", "found bytes 0 to 1 of 4294967295"),
    ],
)
def test_the_error_says_what_is_wrong(message: bytes, expected: str) -> None:
    with pytest.raises(ProtocolError, match=expected):
        Unpacker(PRODUCER).unpack(message)


@settings(max_examples=examples(200))
@given(RUNS, EPOCHS, SEQUENCES, st.integers(0, 100), st.sampled_from(["", "0", "a7"]), st.integers(0, 2**32))
def test_an_id_is_parsed_again(run: int, epoch: int, first: int, n: int, attempt: str, offset: int) -> None:
    identity = Identity(run, epoch, first, first + n, attempt, offset if attempt else 0)
    if n == 0 and not attempt:
        with pytest.raises(ProtocolError):
            Identity.parse(str(identity))
    else:
        assert Identity.parse(str(identity)) == identity


@settings(max_examples=examples(200))
@given(st.one_of(st.text(max_size=60), st.from_regex(r"[0-9a-g]+(-[0-9a-f]+){2,5}(\.[0-9]+)?", fullmatch=True)))
def test_other_texts_are_no_ids_nor_positions(text: str) -> None:
    with contextlib.suppress(ProtocolError):
        identity = Identity.parse(text)
        assert Identity.parse(str(identity)) == identity
    with contextlib.suppress(ProtocolError):
        positions = unpack_positions(text)
        assert unpack_positions(pack_positions(positions)) == positions


@settings(max_examples=examples(100))
@given(st.dictionaries(st.tuples(RUNS, EPOCHS), SEQUENCES, max_size=MAX_ORIGINS + 4))
def test_the_newest_positions_are_told(positions: dict[tuple[int, int], int]) -> None:
    newest: dict[Any, int] = dict(list(positions.items())[-MAX_ORIGINS:])
    assert unpack_positions(pack_positions(positions)) == newest
    assert list(unpack_positions(pack_positions(positions))) == list(newest)


def test_the_largest_frame_is_limited() -> None:
    header = b"\0" + (0).to_bytes(4, "little") + (stream_messages.MAX_FRAME + 1).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match=f"of {stream_messages.MAX_FRAME + 1}"):
        Unpacker(PRODUCER).unpack(header + b"x")
