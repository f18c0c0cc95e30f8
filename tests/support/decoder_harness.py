"""Messages made by hand with struct, decoders run to the end, the ledger's equations: shared by the kernels' tests.

PACMAN messages for the tests: larpix-control's packets, what boards send and must not send, decoded in one go.
"""

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


def named(counts: np.ndarray) -> dict[str, int]:
    """The counters that are not zero."""
    return {name: value for name, value in zip(constants.COUNTS, counts.tolist(), strict=True) if value}


def drain(
    decoder: Any, dtype: np.dtype, lengths: Iterable[int] = (4096,), check: Any = lambda made: None
) -> list[np.ndarray]:
    """Decode until the input is used up, in calls with arrays of these lengths in turn; `check` after each."""
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
    """Messages one behind the other, with a byte in between that belongs to none."""
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
    """Feed messages in groups of these sizes (then all the rest); the ledger must hold after every call."""
    counts = new_counts()
    decoder.start(counts)
    parts = [np.zeros(0, dtype)]
    made = 0

    def check(more: int) -> None:
        nonlocal made
        made += more
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


def newer(words: Sequence[bytes], nanoseconds: int = 1_600_000_000_123_456_789, n_bytes: int | None = None) -> bytes:
    body = b"".join(words)
    return struct.pack("<cBBBIQ8x", b"D", 2, 1, 0, len(body) if n_bytes is None else n_bytes, nanoseconds) + body


def newer_data(word: int, channel: int = 1, receipt: int = 0, letter: bytes = b"D") -> bytes:
    return struct.pack("<cBH4xQQ", letter, 2, channel, receipt, word)


def odd(word: int, width: int = 64) -> int:
    """The word with the parity bit set so that the parity is odd: counted here bit by bit, as nowhere else."""
    low = word & ((1 << (width - 1)) - 1)
    return low | (0 if low.bit_count() % 2 else 1 << (width - 1))


V2 = schema.PACKETS_2_4
CLOCK64 = schema.PACKETS_2_4_CLOCK64
LAYOUTS = [(Asic.V1, schema.PACKETS_1_0), (Asic.V2, V2), (Asic.V2, CLOCK64), (Asic.V3, schema.PACKETS_3_0)]


def decode(messages: list[bytes], dtype: np.dtype = V2, asic: Asic = Asic.V2, **options: object) -> tuple:
    decoder = decoders.PacmanDecoder(GROUP, asic, **options)
    rows, counts = run_messages(decoder, messages, dtype)
    return rows, named(counts), decoder.take_unknown()


def columns(row: np.void, *names: str) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in names)


def random_word(draw: st.DrawFn) -> bytes:
    letter = draw(st.sampled_from([b"D", b"D", b"D", b"T", b"S", b"P", b"\x00", b"C", b"E"]))
    return letter + draw(st.binary(min_size=15, max_size=15))


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """What a board sends, and what it must not send."""
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
            message = newer(words, draw(st.integers(0, 2**64 - 1)))
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
    """larpix-control's packets of every kind that a PACMAN sends."""
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
