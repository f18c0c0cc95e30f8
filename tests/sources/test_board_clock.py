"""Offset and drift of a board's clock from message headers, also from delayed ones."""

import math
import struct

import numpy as np
import pytest
from decoder_harness import drain, legacy, message_1_0, new_counts, spans_of, word_1_0

from larpixdaq import schema
from larpixdaq._native import decoders
from larpixdaq.schema import Asic
from larpixdaq.sources.data_quality import BoardClock, ClockReading

S = 10**9
NOW = 1_795_331_571


def pacman(seconds: float) -> bytes:
    return legacy([], int(seconds))


def pacman_1_0(seconds: float) -> bytes:
    return message_1_0([word_1_0(1)], int(seconds * S))


def bern(seconds: float) -> bytes:
    return b"\1\0T\0" + bytes(4) + struct.pack("<Q", int(seconds))


KINDS = {
    "legacy": (decoders.PacmanDecoder, pacman),
    "1.0": (decoders.PacmanDecoder, pacman_1_0),
    "Bern": (decoders.BernDecoder, bern),
}


def hear(
    kind: str, offset: float, *, seconds: float, period: float, drift: float = 0.0, delays=lambda i: 0.0
) -> BoardClock:
    """Measure a clock that is `offset` s ahead and `drift` ppm fast, with a message each `period` s.

    The host reads the board each 10 ms, and the clock once a second."""
    make, message = KINDS[kind]
    decoder = make(1, Asic.V2)
    decoder.start(new_counts())
    clock = BoardClock()
    asked = 0.0
    for i in range(int(seconds / period)):
        at = i * period + 0.0037
        heard = at + 0.0002 + delays(i)
        decoder.heard(int((NOW + heard) * S), heard - 0.01, heard)
        decoder.feed(*spans_of([message(NOW + at + offset + at * drift * 1e-6)]))
        drain(decoder, schema.PACKETS_2_4)
        if heard >= asked:
            asked = heard + 1
            clock.take(heard, decoder.clock_bounds())
    return clock


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 0.4, -7 * 3600.0, 1.7, -1_795_000_000.0])
def test_offset_and_its_uncertainty(kind: str, offset: float) -> None:
    """Whole seconds are enough when messages arrive while the second changes."""
    found = hear(kind, offset, seconds=4, period=0.05).reading()
    assert found is not None
    assert abs(found.offset - offset) <= found.offset_uncertainty + 0.001
    assert found.offset_uncertainty < (0.01 if kind == "1.0" else 0.04)
    assert found.exceeds(1.0) == (abs(offset) > 1)


def test_one_header_gives_the_offset_to_a_second() -> None:
    found = hear("legacy", 0.0, seconds=0.05, period=0.05).reading()
    assert found is not None
    assert abs(found.offset) <= found.offset_uncertainty <= 0.51
    assert not found.exceeds(0.1)
    assert BoardClock().reading() is None


def test_delayed_messages_do_not_change_the_offset() -> None:
    found = hear("legacy", 0.4, seconds=10, period=0.05, delays=lambda i: 2.0 if i % 40 > 30 else 0.0).reading()
    assert found is not None
    assert found.offset == pytest.approx(0.4, abs=0.05)


def test_drift() -> None:
    found = hear("1.0", 0.2, seconds=200, period=0.5, drift=30).reading()
    assert found is not None
    assert found.drift is not None
    assert abs(found.drift - 30) <= found.drift_uncertainty < 100
    assert hear("1.0", 0.2, seconds=100, period=0.5).reading().drift is None


def test_readings_as_text() -> None:
    assert str(ClockReading(-25200.0123, 0.018)) == "clock -25200.012 ± 0.018 s from the host's"
    assert str(ClockReading(0.4, 0.5, 3.21, 1.5)) == "clock +0.40 ± 0.5 s from the host's, drift +3.2 ± 1.5 ppm"
    assert str(ClockReading(0.0, 0.0)) == "clock +0.000000 ± 0 s from the host's"


def test_a_clock_that_was_set() -> None:
    """Earlier readings are forgotten."""
    clock = BoardClock()
    for second in range(50):
        clock.take(second, (-0.1 * S, 0.1 * S))
    clock.take(50, (3599 * S, 3601 * S))
    assert clock.reading() == (3600, 1, None, 0)


def test_recorded_messages_have_no_host_time() -> None:
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    decoder.start(new_counts())
    assert decoder.clock_bounds() is None
    decoder.heard(NOW * S)
    decoder.feed(*spans_of([pacman(NOW + 5)]))
    drain(decoder, schema.PACKETS_2_4)
    low, high = decoder.clock_bounds()
    assert np.isclose(low, 5 * S)
    assert math.isinf(high)


def test_delayed_messages_alone_widen_the_bounds() -> None:
    """Each upper bound lies below a lower one, and the uncertainty is at least their distance."""
    clock = BoardClock()
    for now in range(5):
        clock.take(now, (-0.0002 * S, -0.0008 * S))
    reading = clock.reading()
    assert reading is not None
    assert reading.offset - reading.offset_uncertainty <= 0.0 <= reading.offset + reading.offset_uncertainty
    assert 0.0 < reading.offset_uncertainty < 0.001


def test_messages_delayed_for_some_seconds_do_not_look_like_a_clock_that_was_set() -> None:
    clock = BoardClock()
    for now in range(10):
        clock.take(now, (-0.001 * S, 0.01 * S))
    for now in range(10, 14):  # messages that the network has delayed for 2 s
        clock.take(now, (-2.0 * S, -1.98 * S))
        reading = clock.reading()
        assert reading is not None
        assert not reading.exceeds(1.0)
    for now in range(14, 40):  # a clock that stays late was set
        clock.take(now, (-2.0 * S, -1.98 * S))
    reading = clock.reading()
    assert reading is not None
    assert reading.exceeds(1.0)
