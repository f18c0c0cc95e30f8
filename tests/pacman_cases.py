"""PACMAN messages for the tests: larpix-control's packets, what boards send and must not send, decoded in one go."""

import numpy as np
from hypothesis import strategies as st
from second import Packet_v2, SyncPacket, TriggerPacket
from wiring import GROUP, legacy, named, newer, run_messages

from larpixdaq import schema
from larpixdaq._native import frames
from larpixdaq.schema import Asic

V2 = schema.PACKETS_2_4
CLOCK64 = schema.PACKETS_2_4_CLOCK64
LAYOUTS = [(Asic.V1, schema.PACKETS_1_0), (Asic.V2, V2), (Asic.V2, CLOCK64), (Asic.V3, schema.PACKETS_3_0)]


def decode(messages: list[bytes], dtype: np.dtype = V2, asic: Asic = Asic.V2, **options: object) -> tuple:
    decoder = frames.PacmanDecoder(GROUP, asic, **options)
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
