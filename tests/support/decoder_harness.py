"""PACMAN messages made with struct, hypothesis and larpix-control, and functions that run decoders over them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from hypothesis import strategies as st
from larpix_control import Packet_v2, SyncPacket, TriggerPacket
from source_driver import check_ledger

from larpixdaq import constants, schema
from larpixdaq._native import decoders
from larpixdaq.schema import Asic

GROUP = 7


def new_counts() -> np.ndarray:
    return np.zeros(len(constants.COUNTS), np.uint64)


def nonzero_counts(counts: np.ndarray) -> dict[str, int]:
    """Return the counters that are not zero, by name."""
    return {name: value for name, value in zip(constants.COUNTS, counts.tolist(), strict=True) if value}


def drain(
    decoder: Any, dtype: np.dtype, lengths: Iterable[int] = (4096,), check: Any = lambda made: None
) -> list[np.ndarray]:
    """Decode the whole input, in calls with arrays of these lengths in turn, and call `check(rows made)` after each."""
    parts = []
    for length in cycle(lengths):
        rows = np.zeros(length, dtype)
        made = decoder.decode(rows)
        parts.append(rows[:made])
        check(made)
        if made < length:
            return parts
    raise AssertionError("no lengths")


def spans_of(messages: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    """Join messages, with an unused byte after each. Returns the bytes and the spans of the messages."""
    spans = np.zeros(len(messages), schema.SPAN)
    buffer = bytearray()
    for span, message in zip(spans, messages, strict=True):
        span["start"], span["length"] = len(buffer), len(message)
        buffer += message + b"\xee"
    return bytes(buffer), spans


def run_messages(
    decoder: Any,
    messages: Sequence[bytes],
    dtype: np.dtype,
    *,
    groups: Iterable[int] = (),
    lengths: Iterable[int] = (4096,),
) -> tuple[np.ndarray, np.ndarray]:
    """Feed messages in groups of these sizes, then the rest, and check the ledger after every call of the decoder."""
    counts = new_counts()
    decoder.start(counts)
    parts = [np.zeros(0, dtype)]
    made = 0

    def check(n: int) -> None:
        nonlocal made
        made += n
        check_ledger(counts, made)

    at = 0
    for size in [*groups, len(messages)]:
        decoder.feed(*spans_of(messages[at : at + size]))
        at += size
        parts += drain(decoder, dtype, lengths, check)
    return np.concatenate(parts), counts


def legacy(words: Sequence[bytes], seconds: int = 1_600_000_000, count: int | None = None) -> bytes:
    header = struct.pack("<cIxH", b"D", seconds, len(words) if count is None else count)
    return header + b"".join(words)


def data_word(word: int, channel: int = 1, receipt: int = 0) -> bytes:
    return struct.pack("<cBI2xQ", b"D", channel, receipt, word)


def message_1_0(
    words: Sequence[bytes], nanoseconds: int = 1_600_000_000_123_456_789, n_bytes: int | None = None
) -> bytes:
    body = b"".join(words)
    return struct.pack("<cBBBIQ8x", b"D", 2, 1, 0, len(body) if n_bytes is None else n_bytes, nanoseconds) + body


def word_1_0(word: int, channel: int = 1, receipt: int = 0, letter: bytes = b"D") -> bytes:
    return struct.pack("<cBH4xQQ", letter, 2, channel, receipt, word)


def odd_parity(word: int, width: int = 64) -> int:
    """Set the highest bit of a word so that its parity is odd. Independent of the kernels: it counts bits in Python."""
    low = word & ((1 << (width - 1)) - 1)
    return low | (0 if low.bit_count() % 2 else 1 << (width - 1))


V2 = schema.PACKETS_2_4
CLOCK64 = schema.PACKETS_2_4_CLOCK64
LAYOUTS = [(Asic.V1, schema.PACKETS_1_0), (Asic.V2, V2), (Asic.V2, CLOCK64), (Asic.V3, schema.PACKETS_3_0)]


def decode(messages: list[bytes], dtype: np.dtype = V2, asic: Asic = Asic.V2, **options: object) -> tuple:
    decoder = decoders.PacmanDecoder(GROUP, asic, **options)
    rows, counts = run_messages(decoder, messages, dtype)
    return rows, nonzero_counts(counts), decoder.take_unknown()


def columns(row: np.void, *names: str) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in names)


def random_word(draw: st.DrawFn) -> bytes:
    letter = draw(st.sampled_from([b"D", b"D", b"D", b"T", b"S", b"P", b"\x00", b"C", b"E"]))
    return letter + draw(st.binary(min_size=15, max_size=15))


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """Draw messages as a board sends them, and invalid ones: cut, too long, or random bytes."""
    made = []
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["legacy", "legacy", "1.0", "cut", "long", "garbage"]))
        if kind == "garbage":
            made.append(draw(st.binary(max_size=60)) if draw(st.booleans()) else b"D" + draw(st.binary(max_size=60)))
            continue
        if kind == "1.0":
            words = [
                random_word(draw) + draw(st.sampled_from([bytes(8), b"\xff" * 8]))
                for _ in range(draw(st.integers(0, 5)))
            ]
            message = message_1_0(words, draw(st.integers(0, 2**64 - 1)))
        else:
            message = legacy(
                [random_word(draw) for _ in range(draw(st.integers(0, 5)))], draw(st.integers(0, 2**32 - 1))
            )
        if kind == "cut":
            message = message[: draw(st.integers(0, len(message)))]
        if kind == "long":
            message += draw(st.binary(max_size=40))
        made.append(message)
    return made


def random_packets(seed: int, n: int) -> list:
    """Return larpix-control packets of every kind that a PACMAN sends."""
    numbers = np.random.default_rng(seed)
    made = []
    for word, kind in zip(
        numbers.integers(0, 2**64, n, dtype=np.uint64).tolist(), numbers.integers(0, 6, n), strict=True
    ):
        if kind == 4:
            made.append(SyncPacket(b"SHC"[word % 3 : word % 3 + 1], word >> 8 & 1, word >> 32, GROUP))
        elif kind == 5:
            made.append(TriggerPacket(bytes([word & 255]), word >> 32, GROUP))
        else:
            packet = Packet_v2(word.to_bytes(8, "little"))
            packet.io_channel, packet.receipt_timestamp, packet.direction = word & 63, word >> 11 & 0xFFFFFFFF, 1
            made.append(packet)
    return made
