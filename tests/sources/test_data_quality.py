"""Notices of decoders and the findings from them: each finding, no false alarms, and independence of the batches."""

import math
import struct
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from decoder_harness import data_word, drain, legacy, message_1_0, new_counts, odd_parity, spans_of, word_1_0
from decoder_harness import messages as any_messages
from file_builder import Feed, run_info
from hypothesis import given
from hypothesis import strategies as st
from recorded_data import shared_data
from source_driver import Driver

from larpixdaq import schema
from larpixdaq._native import board_emulator, decoders
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import LossVerdict
from larpixdaq.schema import Asic
from larpixdaq.sources.data_quality import GRACE_NS, MOST_GAPS, Presence, Watch, setup_findings, sum_notices, verdicts
from larpixdaq.sources.replay import ReplaySource

S = 10**9
HIT = odd_parity(0x1234_5678 << 16 | 20 << 2)
WORD = data_word(HIT, receipt=77)


class Board:
    """Decoder with the times of arrival of its messages: `heard` has (seconds, message)."""

    def __init__(self, decoder: decoders.PacmanDecoder | decoders.BernDecoder | None = None) -> None:
        self.decoder = decoder or decoders.PacmanDecoder(1, Asic.V2)
        self.decoder.start(new_counts())
        self._read = 0.0

    def hear(self, heard: Sequence[tuple[float, bytes]], cuts: Sequence[int] = ()) -> dict[str, tuple[int, int]]:
        """Feed batches that end at `cuts`, each read when its last message has arrived. Returns noticed()."""
        for start, stop in pairwise([0, *sorted(cuts), len(heard)]):
            if start < stop:
                now = heard[stop - 1][0]
                self.decoder.heard(int(now * S), self._read, now)
                self.decoder.feed(*spans_of([message for _, message in heard[start:stop]]))
                drain(self.decoder, schema.PACKETS_2_4, [7, 100])
                self._read = now
        return self.noticed()

    def noticed(self) -> dict[str, tuple[int, int]]:
        return events(self.decoder)

    def times(self, name: str) -> tuple[int, int]:
        notice = self.decoder.noticed()[schema.NOTICES.index(name)]
        return int(notice["first_ns"]), int(notice["last_ns"])


def events(decoder: decoders.PacmanDecoder | decoders.BernDecoder) -> dict[str, tuple[int, int]]:
    """Return events and amount of the decoder's notices by name."""
    return {
        name: (int(notice["events"]), int(notice["amount"]))
        for name, notice in zip(schema.NOTICES, decoder.noticed(), strict=True)
        if notice["events"]
    }


def sync(kind: str, ticks: int) -> bytes:
    return struct.pack("<2cxxI8x", b"S", kind.encode(), ticks & 0xFFFFFFFF)


def hits(n: int, seconds: int = 1_600_000_000, start: float = 0.0) -> list[tuple[float, bytes]]:
    """Different messages with one hit each, in one second."""
    return [(start + i / 1e4, legacy([data_word(odd_parity(HIT ^ i << 48), receipt=i)], seconds)) for i in range(n)]


def test_ordinary_messages_give_no_notice() -> None:
    heard = hits(50) + hits(50, 1_600_000_001, 1.0) + [(2.0, legacy([])), (2.0, legacy([]))]
    assert Board().hear(heard) == {}


def test_words_missing_by_the_header() -> None:
    board = Board()
    assert board.hear([(1, legacy([]))]) == {}  # shows the format
    cut = legacy([WORD] * 3)[:-20]  # one word and a half
    assert board.hear([(1, legacy([WORD], count=4)), (2, cut)], [1]) == {"short": (2, 5), "trailing": (1, 12)}
    lost, more = verdicts(1, board.decoder.noticed())
    assert lost == LossVerdict(1, "lost", "5 words missing in 2 board messages, by their headers", 5, S, 2 * S)
    assert (more.verdict, more.lost) == ("suspect", 0)
    new = Board(decoders.PacmanDecoder(1, Asic.V2, format="1.0"))
    assert new.hear([(3, message_1_0([word_1_0(HIT)] * 2, n_bytes=72))]) == {"short": (1, 1)}


def test_invalid_bytes_and_words() -> None:
    board = Board()
    found = board.hear(
        [(1, legacy([])), (1, b"Z" * 30), (1, legacy([b"X" + bytes(15), WORD])), (1, legacy([WORD]) + b"abc")]
    )
    assert found == {"rejected": (1, 30), "unknown": (1, 1), "trailing": (1, 3)}
    assert {one.verdict for one in verdicts(1, board.decoder.noticed())} == {"suspect"}


def test_a_clock_that_goes_back() -> None:
    board = Board()
    heard = hits(3, 1000) + hits(3, 999, 1.0) + hits(3, 1000, 2.0) + hits(3, 990, 3.0) + hits(3, 7, 4.0)
    assert board.hear(heard, [3, 6, 9, 12]) == {"back": (2, 10 + 983)}
    assert board.times("back")[1] == int(heard[-1][0] * S)


@pytest.mark.parametrize(
    ("pause", "jump", "suspect"), [(0.1, 2, 0), (0.1, 4, 1), (60, 60, 0), (60, 62, 0), (60, 70, 1)]
)
def test_a_clock_that_jumps_ahead(pause: float, jump: int, suspect: int) -> None:
    """A silence explains a later time; without a silence, messages are lost in between."""
    heard = hits(3, 1000) + hits(3, 1000 + jump, pause)
    board = Board()
    # the board is read every 0.1 s, also during a silence
    board.hear(heard[:3])
    board._read = max(board._read, pause - 0.1)
    assert board.hear(heard[3:]) == ({"ahead": (1, jump)} if suspect else {})


@pytest.mark.parametrize(("jump", "width"), [(50, 50.0), (5000, 0.1)])
def test_the_time_of_messages_lost_in_a_jump(jump: int, width: float) -> None:
    """After a stall, messages from before and after it arrive together; a longer jump shows a clock that was set."""
    board = Board()
    board._read = 99.9
    board.hear(hits(3, 1000, 100.0))
    assert board.hear(hits(3, 1000 + jump, 100.1)) == {"ahead": (1, jump)}
    first_ns, last_ns = board.times("ahead")
    assert (last_ns - first_ns) / S == pytest.approx(width, abs=0.001)


def test_messages_without_times_of_arrival_show_no_jump() -> None:
    board = Board()
    board.decoder.heard(S)
    board.decoder.feed(*spans_of([m for _, m in hits(3, 1000) + hits(3, 2000)]))
    drain(board.decoder, schema.PACKETS_2_4)
    assert board.noticed() == {}


@pytest.mark.parametrize("cuts", [[], [1], [2], [1, 2, 3]])
def test_duplicate_messages(cuts: list[int]) -> None:
    one, two, three = (message for _, message in hits(3))
    long = legacy([data_word(odd_parity(HIT ^ i << 40), receipt=i) for i in range(40)])
    board = Board()
    assert board.hear([(i, m) for i, m in enumerate([one, one, two, long, long, long, three, one])], cuts) == {
        "doubled": (3, 81)
    }


def stream(n: int, at: float, ticks: int, width: float) -> list[tuple[float, bytes]]:
    """Hits at 40,000/s, from `ticks` of the board's clock, which arrive from `at` on within `width` seconds."""
    return [
        (at + width * i / n, legacy([data_word(odd_parity(HIT ^ i << 48), receipt=(ticks + 250 * i) & 0xFFFFFFFF)]))
        for i in range(n)
    ]


@pytest.mark.parametrize("ticks", [1000, 2**32 - 52_000])
@pytest.mark.parametrize(
    ("held", "hole", "width", "found"),
    [
        (300, 0.03, 0.004, True),  # a queue of 100 messages was full, and 30 ms are missing behind it
        (300, 40.0, 0.004, True),
        (90, 0.03, 0.004, False),  # the queue was not full
        (300, 0.009, 0.004, False),  # too short to tell
        (300, 0.03, 0.2, False),  # they took longer than the hole to arrive: they were sent late
        (300, 300.0, 0.004, False),  # the clock was set
    ],
)
def test_a_hole_in_delayed_data(ticks: int, held: int, hole: float, width: float, found: bool) -> None:
    board = Board()
    assert board.hear(stream(120, 1.0, ticks, 120 * 25e-6), range(10, 120, 10)) == {}
    # The connection stalls for 0.2 s. Then all waiting messages arrive, the first one before the others.
    rest = stream(held, 1.2, ticks + 250 * 120, width)
    later = stream(200, 1.2 + width, ticks + 250 * (120 + held) + int(hole * 1e7), width)
    cuts = [1, *range(20, held + 200, 20)]
    amount = int(hole * 1e6) + 25
    assert board.hear(rest + later, cuts) == ({"holes": (1, amount)} if found and held >= 100 else {})


def test_a_pause_of_the_board_is_no_hole() -> None:
    """The board has no data for 1 s, and the next messages arrive without a delay."""
    board = Board()
    heard = stream(300, 1.0, 0, 300 * 25e-6) + stream(300, 2.0, 10_000_000, 0.001)
    assert board.hear(heard, [*range(10, 300, 10), 301, *range(310, 600, 10)]) == {}


def test_long_messages_are_no_holes() -> None:
    """A late board sends long messages, in which the words follow each other without a hole."""
    board = Board()
    heard = stream(300, 1.0, 0, 300 * 25e-6)
    words = [data_word(odd_parity(HIT ^ i << 48), receipt=250 * (300 + i)) for i in range(2000)]  # 50 ms
    heard += [(2.0 + i * 1e-6, legacy(words[i : i + 1000])) for i in (0, 1000)]
    assert board.hear(heard, [*range(10, 300, 10), 301]) == {}


WIDE = 0x0012_3456_789A_BCDE
CLOCK64_WORDS = [
    b"D\x05" + WIDE.to_bytes(8, "little")[2:] + HIT.to_bytes(8, "little"),
    b"SH" + bytes(6) + WIDE.to_bytes(8, "little"),
    b"T\x02" + bytes(6) + WIDE.to_bytes(8, "little"),
]
LEGACY_WORDS = [WORD, sync("H", 500), b"T\x02\0\0" + (500).to_bytes(12, "little")]


@pytest.mark.parametrize("place", range(3))
def test_firmware_with_another_clock_than_the_option(place: int) -> None:
    """One word of any kind is enough, but a legacy data word may also come from a young 64-bit clock."""

    def noticed(word: bytes, *, clock64: bool) -> set[str]:
        decoder = decoders.PacmanDecoder(1, Asic.V2, clock64=clock64)
        decoder.start(new_counts())
        decoder.feed(*spans_of([legacy([word])]))
        drain(decoder, schema.layout_of(Asic.V2, clock64=clock64).dtype)
        return set(events(decoder))

    assert noticed(CLOCK64_WORDS[place], clock64=False) == {"clock64"}
    assert noticed(CLOCK64_WORDS[place], clock64=True) == set()
    assert noticed(LEGACY_WORDS[place], clock64=False) == set()
    assert noticed(LEGACY_WORDS[place], clock64=True) == ({"clock32"} if place else set())


def test_times_of_format_1_0_above_32_bits_in_a_layout_of_32() -> None:
    board = Board()
    first, second = (
        message_1_0([word_1_0(HIT, receipt=2**32 * i + 5), word_1_0(HIT, receipt=7)][::-1]) for i in (0, 1)
    )
    assert board.hear([(1, first), (2, second)], [1]) == {"cut": (1, 1)}
    (line,) = setup_findings(1, board.decoder.noticed())
    assert line.verdict == "suspect"
    assert "--pacman-format 1.0" in line.why
    assert verdicts(1, board.decoder.noticed()) == [line]


def chip_words(generation: Asic, n: int) -> list[int]:
    """Different data words of chips of this generation, with right parity."""
    random = np.random.default_rng(3)
    low = random.integers(0, 2**62, n, dtype=np.uint64).tolist()
    if generation == Asic.V1:
        return [odd_parity(word & (1 << 53) - 1 & ~3, 54) for word in low]
    return [odd_parity(word & ~3 | (generation == Asic.V3)) for word in low]


@pytest.mark.parametrize("asic", [Asic.V1, Asic.V2, Asic.V3])
@pytest.mark.parametrize("chips", [Asic.V1, Asic.V2, Asic.V3])
def test_chips_of_another_generation(asic: Asic, chips: Asic) -> None:
    """Found in 64 batches from any board, and never when --asic is right."""
    words = chip_words(chips, 64)
    dtype = schema.layout_of(asic).dtype
    found: list[decoders.PacmanDecoder | decoders.BernDecoder | decoders.SerialDecoder] = []
    for decoder, feed in (
        (decoders.PacmanDecoder(1, asic), [legacy([data_word(word)]) for word in words]),
        (decoders.PacmanDecoder(1, asic, format="1.0"), [message_1_0([word_1_0(word)]) for word in words]),
        (decoders.BernDecoder(1, asic), [b"\1\0D\1" + bytes(4) + word.to_bytes(8, "little") for word in words]),
    ):
        decoder.start(new_counts())
        for message in feed:
            decoder.feed(*spans_of([message]))
            drain(decoder, dtype)
        found.append(decoder)
    line = decoders.SerialDecoder(1, asic)
    line.start(new_counts())
    for word in words:
        line.feed(decoders.encode_serial(np.array([word], np.uint64)), 1)
        line.flush()
        drain(line, dtype)
    found.append(line)
    wanted = {
        (Asic.V1, Asic.V2): "wrong parity",
        (Asic.V1, Asic.V3): "wrong parity",
        (Asic.V2, Asic.V1): "--asic 1",
        (Asic.V2, Asic.V3): "--asic 3",
        (Asic.V3, Asic.V1): "--asic 2 or 1",
        (Asic.V3, Asic.V2): "--asic 2 or 1",
    }
    for decoder in found:
        texts = " ".join(finding.why for finding in setup_findings(1, decoder.noticed()))
        assert wanted[asic, chips] in texts if asic != chips else not texts, (decoder, texts)


def test_messages_that_may_be_equal_are_no_duplicates() -> None:
    """Answers to the same configuration read, SYNC words of a clock that is reset each second, headers alone."""
    answer = legacy([data_word(odd_parity(3 | 11 << 2), receipt=5)])
    pps = legacy([sync("S", 10_000_000)])
    other = legacy([data_word(odd_parity(HIT ^ 1 << 40), receipt=77)])
    heard = [answer, answer, pps, pps, legacy([WORD]), other, legacy([]), legacy([]), legacy([WORD, WORD])]
    assert Board().hear([(i, m) for i, m in enumerate(heard)]) == {}


@pytest.mark.parametrize(
    ("asic", "word", "full"),
    [
        (Asic.V2, HIT | 1 << 58 | 1 << 60, False),  # half full
        (Asic.V2, HIT | 1 << 59, True),
        (Asic.V2, HIT | 1 << 61, True),
        (Asic.V2_DIAGNOSTICS, HIT | 1 << 59, True),
        (Asic.V2, HIT | 1 << 59 | 3, False),  # an answer of the configuration
        (Asic.V3, HIT | 1 << 59 | 1, True),
        (Asic.V1, 1 << 51, False),
        (Asic.V1, 1 << 52, True),
        (Asic.V1, 1 << 52 | 1, False),  # a test packet: part of its counter
    ],
)
def test_full_fifos(asic: Asic, word: int, full: bool) -> None:
    width = 54 if asic == Asic.V1 else 64
    good, bad = odd_parity(word, width), odd_parity(word, width) ^ 1 << (width - 1)
    dtype = schema.layout_of(asic).dtype
    wanted = {"full": (2, 2)} if full else {}
    pacman = Board(decoders.PacmanDecoder(1, asic))
    pacman.decoder.feed(*spans_of([legacy([data_word(good), data_word(bad), data_word(good)])]))
    drain(pacman.decoder, dtype)
    assert pacman.noticed() == wanted
    bern = Board(decoders.BernDecoder(1, asic))
    bern.decoder.feed(*spans_of([b"\1\0D\1" + bytes(4) + struct.pack("<3Q", good, bad, good)]))
    drain(bern.decoder, dtype)
    assert bern.noticed() == wanted
    line = decoders.SerialDecoder(1, asic)
    line.start(new_counts())
    line.feed(decoders.encode_serial(np.array([good, bad, good], np.uint64)), 1)
    drain(line, dtype)
    assert bool(line.noticed()[schema.NOTICES.index("full")]["amount"] == 2) == full


@pytest.mark.parametrize("period", [100_000_000, 7_654_321])
def test_heartbeats(period: int) -> None:
    """Heartbeats have equal intervals, also at the clock's roll-over; missing ones are counted."""
    beats = [i for i in range(120) if i not in (40, 41, 42, 90)]
    heard = [(float(i), legacy([sync("H", i * period)], 1000 + i)) for i in beats]
    board = Board()
    assert board.hear(heard, range(len(heard))) == {"heartbeats": (2, 4)}
    assert board.times("heartbeats") == (39 * S, 91 * S)


def test_heartbeats_of_a_clock_that_restarts_or_gets_another_period() -> None:
    ticks = [1, 2, 3, 0.5, 1.5, 2.5, 2.8, 3.1, 3.4, 3.7]
    assert Board().hear([(float(i), legacy([sync("H", int(t * 1e8))], 1000 + i)) for i, t in enumerate(ticks)]) == {}


def pulses(missing: Sequence[int], phase: float, n: int = 60) -> list[tuple[float, bytes]]:
    """SYNC words each second, a heartbeat each ten; the headers' seconds begin `phase` after them."""
    heard = []
    for i in range(n):
        at = 1000 + i + phase + (0.002 if i % 2 else -0.002)
        words = [sync("S", 10_000_000)] + ([sync("H", 5)] if i % 10 == 0 else [])
        if i not in missing:
            heard += [(at, legacy([word], int(at))) for word in words]
    return heard


@pytest.mark.parametrize("phase", [0.0, 0.3, 0.999])
def test_clocks_that_are_reset_each_second(phase: float) -> None:
    """No alarm although the second of the headers may stay the same for two resets; a missing reset is noticed."""

    def hear(heard: list[tuple[float, bytes]]) -> dict[str, tuple[int, int]]:
        board = Board()
        for at, message in heard:
            board._read = max(board._read, at - 0.2)  # the board is read often
            board.hear([(at, message)])
        return board.noticed()

    assert hear(pulses([], phase)) == {}
    assert hear(pulses([33], phase)) == {"resets": (1, 1)}
    assert hear(pulses([33, 34, 35], phase))["resets"] == (1, 1)


@pytest.mark.parametrize("pps", [False, True])
def test_an_emulated_board_is_complete_and_skipped_heartbeats_are_found(pps: bool) -> None:
    board = board_emulator.PacmanBoard(Asic.V2, rate=200, seed=3, seconds=1000, tick=2**31, pps=pps, words=100_000)
    count = board.fill(100_000)  # 500 s: two roll-overs, 50 heartbeats
    whole = [bytes(board.buffer[s["start"] : s["start"] + s["length"]]) for s in board.spans[:count]]
    heard = [(float(struct.unpack_from("<I", m, 1)[0]), m) for m in whole]
    assert Board().hear(heard, range(0, count, 100)) == {}
    beats = [i for i, m in enumerate(whole) if b"SH" in (m[8:10], m[24:26])]
    assert len(beats) == 50
    gone = set(beats[10:13]) | set(beats[30:31])
    assert Board().hear([h for i, h in enumerate(heard) if i not in gone])["heartbeats"] == (2, 4)


def test_recorded_messages_are_complete() -> None:
    """Nearly all have one word, with up to 133 s between two of them; their times of arrival are not known."""
    data = shared_data("pacman_2020_messages.bin").read_bytes()
    spans, _ = decoders.split_log(data)
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    decoder.start(new_counts())
    decoder.feed(data, spans)
    drain(decoder, schema.PACKETS_2_4)
    assert verdicts(1, decoder.noticed()) == [LossVerdict(1, "complete", "", 0, 0, 0)]


def replayed(*files: Path) -> list[LossVerdict]:
    with closing(ReplaySource([(1, file) for file in files], asic=Asic.V2, speed=math.inf)) as source:
        source.open()
        Driver(source).run_to_end()
        return source.evidence(S)


def test_recorded_files_one_after_another(tmp_path: Path) -> None:
    """A jump between two files is no loss; losses within a file are found."""

    def log(name: str, messages: list[bytes]) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(len(message).to_bytes(4, "little") + message for message in messages))
        return path

    one = log("one", [message for _, message in hits(3, 2000) + hits(3, 9000)])
    assert replayed(one, one) == [LossVerdict(1, "complete", "", 0, 0, 0)]
    two = log("two", [legacy([WORD], 2000), legacy([WORD], 2000), legacy([data_word(HIT)], 1000)])
    with two.open("ab") as file:
        file.write(b"\xff\xff\xff\xff and no message any more")
    lines = [(line.verdict, line.why) for line in replayed(two)]
    assert lines == [
        ("suspect", "1 invalid board messages (28 bytes in all)"),
        ("suspect", "1 board messages (1 words) appear to be duplicates"),
        ("suspect", "the board's time went back 1 times, by 1000 s in all: has it restarted?"),
    ]


def test_a_recorded_packet_file(tmp_path: Path) -> None:
    """Its messages are encoded again as it is read, so that only notices about words count."""
    beats = [sync("H", i * 100_000_000) for i in (1, 2, 3, 5)]
    full = data_word(odd_parity(HIT | 1 << 59))
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    decoder.start(new_counts())
    decoder.feed(*spans_of([legacy([word], 2000 - i) for i, word in enumerate([*beats, full, WORD, WORD])]))
    rows = np.concatenate(drain(decoder, schema.PACKETS_2_4))
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(rows))
    file.end(feed.end())
    lines = [(line.verdict, line.why) for line in replayed(file.close().path)]
    assert lines == [
        ("suspect", "1 packets with the flag that a FIFO of their chip was full"),
        ("suspect", "1 heartbeats missing in 1 gaps"),
    ]


@given(any_messages(), st.lists(st.integers(0, 9)), st.data())
def test_notices_do_not_depend_on_the_batches(messages: list[bytes], again: list[int], data: st.DataObject) -> None:
    """Messages of every kind, some of them twice, at one time: all batches give the same notices.

    Exceptions are the notices from one word of each batch."""
    sampled = {"clock64", "as_v1", "as_v2", "as_v3", "parity"}
    sent = [m for i, m in enumerate(messages) for _ in range(2 if i in again else 1)]
    heard = [(1.0, message) for message in sent]
    cuts = data.draw(st.lists(st.integers(0, len(sent))))
    one, many = Board(), Board()
    one._read = many._read = 1.0
    found, other = many.hear(heard, cuts), one.hear(heard)
    assert {name: found[name] for name in found.keys() - sampled} == {
        name: other[name] for name in other.keys() - sampled
    }


def test_start_forgets_notices_but_not_the_last_messages() -> None:
    board = Board()
    board.hear([(1, legacy([WORD], 1000)), (1, b"nonsense")])
    board.decoder.start(new_counts())
    assert board.noticed() == {}
    assert board.hear([(2, legacy([WORD], 900))]) == {"back": (1, 100)}
    board.decoder.forget()
    assert board.hear([(2, legacy([WORD], 800))]) == {"back": (1, 100)}


def test_notices_of_a_source() -> None:
    decoder = decoders.PacmanDecoder(1, Asic.V2)
    decoder.heard(5)
    decoder.note(schema.NOTICES.index("oversized"), 3, 70)
    assert verdicts(4, decoder.noticed()) == [
        LossVerdict(4, "lost", "3 board messages dropped as too large (70 bytes in all)", 3, 5, 5)
    ]
    with pytest.raises(ValueError, match="expected 0 to"):
        decoder.note(len(schema.NOTICES), 1, 1)
    twice = sum_notices([decoder.noticed(), np.zeros(len(schema.NOTICES), schema.NOTICE), decoder.noticed()])
    assert twice[schema.NOTICES.index("oversized")].tolist() == (6, 140, 5, 5)


# Presence


def gaps(presence: Presence, now: float) -> list[tuple[str, float, float]]:
    return [
        (one.why.partition(":")[0], one.first_ns / S, one.last_ns / S) for one in presence.findings(1, int(now * S))
    ]


def present(silence: float = 0) -> Presence:
    """A board that was connected before the run began, at second 10."""
    presence = Presence(int(silence * S))
    presence.start(1 * S)
    presence.connected(5 * S)
    presence.start(10 * S)
    return presence


def test_a_connected_board() -> None:
    presence = present()
    assert gaps(presence, 1000) == []
    presence.heard(20 * S)
    assert gaps(presence, 1000) == []


def test_a_board_that_is_lost_and_connected_again() -> None:
    presence = present()
    presence.heard(20 * S)
    presence.lost(22 * S)
    assert gaps(presence, 24) == []  # it may have been switched off because the run is over
    assert gaps(presence, 25) == [("board disconnected, did not reconnect", 20, 25)]
    presence.heard(21 * S)  # a message that was on its way
    presence.connected(26 * S)
    assert gaps(presence, 27) == [("board disconnected, silent since it reconnected", 21, 27)]
    presence.lost(27 * S)
    presence.connected(27 * S)
    presence.heard(28 * S)
    presence.heard(29 * S)
    assert gaps(presence, 1000) == [("board disconnected", 21, 28)]
    presence.start(2000 * S)
    assert gaps(presence, 3000) == []


def test_a_loss_that_is_noticed_late() -> None:
    presence = present()
    presence.heard(20 * S)
    presence.lost(23 * S, 22 * S)
    presence.connected(23 * S)
    presence.heard(23 * S)
    assert gaps(presence, 1000) == [("board disconnected", 22, 23)]


def test_a_board_that_never_connects() -> None:
    presence = Presence()
    presence.start(10 * S)
    assert gaps(presence, 11) == [("board never connected", 10, 11)]
    presence.connected(10 * S + GRACE_NS)
    assert gaps(presence, 100) == []
    late = Presence()
    late.start(10 * S)
    late.connected(15 * S)
    assert gaps(late, 100) == [("board disconnected", 10, 15)]


def test_messages_of_a_lost_board_may_wait_in_queues() -> None:
    """The connection is lost long before the last message is read; the run ends soon after."""
    presence = present()
    presence.heard(20 * S)
    presence.lost(21 * S)
    for second in range(22, 40):
        presence.heard(second * S)
    assert gaps(presence, 40) == []
    assert gaps(presence, 42) == [("board disconnected, did not reconnect", 39, 42)]
    # blocks 0 to 7 have rows of the board, and wait for a storage
    presence.delivered(7, 2, 40 * S)
    presence.delivered(8, 2, 41 * S)
    assert gaps(presence, 44) == []
    presence.delivered(9, 7, 45 * S)
    presence.delivered(9, 8, 46 * S)
    assert gaps(presence, 47) == []
    assert gaps(presence, 49) == [("board disconnected, did not reconnect", 39, 49)]


def test_a_backlog_excuses_a_board_for_a_while() -> None:
    presence = present()
    presence.heard(20 * S)
    presence.lost(21 * S)
    presence.delivered(7, 2, 22 * S)
    assert gaps(presence, 50) == []
    assert gaps(presence, 60) == [("board disconnected, did not reconnect", 20, 60)]


def test_a_board_that_is_silent_for_too_long() -> None:
    presence = present(silence=15)
    assert gaps(presence, 24) == []
    assert gaps(presence, 26) == [("board connected but silent, without any heartbeat", 10, 26)]


def test_a_board_that_is_lost_again_and_again() -> None:
    presence = present()
    for i in range(3 * MOST_GAPS):
        presence.heard((20 + 2 * i) * S)
        presence.lost((21 + 2 * i) * S)
        presence.connected((21 + 2 * i) * S)
    presence.heard(1000 * S)
    found = gaps(presence, 2000)
    assert len(found) == MOST_GAPS
    assert found[-1] == (f"board disconnected, and {2 * MOST_GAPS} times more", 20 + 2 * (MOST_GAPS - 1), 1000)


# Warnings


def test_warnings_come_once_and_again_when_a_finding_has_grown() -> None:
    watch = Watch()
    fine = LossVerdict(2, "complete", "", 0, 0, 0)

    def look(words: int, now: float) -> list[str]:
        return watch.update(
            [LossVerdict(1, "lost", f"{words} words", words, 1, 2), LossVerdict(1, "suspect", "x", 0, 1, 2), fine], now
        )

    assert look(1, 0) == ["io_group 1 is lost: 1 words", "io_group 1 is suspect: x"]
    assert watch.worst == {1: "lost", 2: "complete"}
    assert look(2, 1) == []
    assert look(2, 10) == ["io_group 1 is lost: 2 words"]
    assert look(2, 100) == []
    watch.start()
    assert watch.worst == {}
    assert look(2, 101) == ["io_group 1 is lost: 2 words", "io_group 1 is suspect: x"]


def test_infinite_times_of_arrival_are_allowed() -> None:
    decoder = decoders.BernDecoder(1, Asic.V2)
    decoder.heard(1, -math.inf, math.inf)
    assert not decoder.noticed()["events"].any()
