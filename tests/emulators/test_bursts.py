"""Bursts, vetoes and FIFO diagnostics of emulated chips, with larpix-control's packets as the second implementation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from emulated_board import emulator
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix_control import packets_v2
from noise_bench import SECOND, Bench
from processes import LIMIT, until
from system import rows_of, system

from larpixdaq.emulators.board_registers import BoardRegisters
from larpixdaq.emulators.noise import CONVERSION, CROSS, EXTERNAL, FIFO, NATURAL, PERIODIC, PULSE_STEP
from larpixdaq.emulators.revisions import REVISIONS
from larpixdaq.emulators.tile import EmulatedTile, WaitingWords

#: Nobody fires by itself.
HIGH = 255


@pytest.fixture
def bench():
    made = Bench(4)
    made.noise.update()
    return made


def tile_of(bench):
    """Return the tile of these chips, all of which reach the board, with ids from 11 on."""
    registers = BoardRegisters(REVISIONS["5"])
    registers.switch_on(1, (1.8, 1.2), 2)
    chips = bench.chips
    tile = EmulatedTile(bench.noise, seconds=0, tick=SECOND, heartbeat=0, registers=registers)
    chips.registers[:, chips.map.address("chip_id")] = [11, 12, 13, 14]
    chips.registers[:, chips.map.address("enable_piso_downstream")] = 15
    return tile


def test_the_hit_veto_drops_forced_samples_below_the_threshold(bench):
    """Of v2 chips, as labs switch it off for forced triggers; the periodic veto drops samples above the threshold."""
    bench.set("channel_mask", 0)
    bench.set("periodic_trigger_mask", 0)
    bench.set("external_trigger_mask", 0)
    bench.set("periodic_trigger_cycles", SECOND // 100)
    bench.set("enable_periodic_trigger", 1)
    assert bench.hits(0.1).size == bench.noise.external(5).size == 0, "vetoed at power-up"
    bench.set("enable_hit_veto", 0)
    assert np.bincount(bench.hits(0.1)["trigger"], minlength=4).tolist() == [0, 0, 0, 4 * 64 * 10]
    assert set(bench.noise.external(5)["trigger"].tolist()) == {EXTERNAL}
    bench.set("threshold_global", 60)  # all channels are above it
    assert set(bench.hits(0.1)["trigger"].tolist()) == {NATURAL}
    bench.set("enable_periodic_trigger_veto", 0)
    assert np.count_nonzero(bench.hits(0.1)["trigger"] == PERIODIC) == 4 * 64 * 10


def test_forced_samples_of_v3_chips_have_no_hit_veto():
    bench = Bench(4, "3")
    bench.set("csa_enable", 1)
    bench.set("periodic_trigger_mask", 0)
    bench.set("periodic_trigger_cycles", SECOND // 100)
    bench.set("enable_periodic_trigger", 1)
    assert bench.hits(0.1).size == 4 * 64 * 10


@pytest.mark.parametrize("asic", ["2", "2b", "3"])
def test_a_trigger_gives_a_burst(asic):
    """Samples at equal distances, of which the first is marked; all of a test pulse are high."""
    bench = Bench(4, asic)
    bench.set("csa_enable", 1)
    bench.set("channel_mask", [0] * 2 + [1] * 62)
    bench.set("csa_testpulse_enable", 0)
    bench.set("threshold_global", 110)
    bench.set("adc_burst_length", 5)
    bench.set("adc_hold_delay", 15)
    hits = bench.noise.pulse(2, 100, 1_000)
    hits = hits[np.lexsort((hits["tick"], hits["channel"]))].reshape(2, 5)
    assert (hits["tick"] == 1_000 + np.arange(5) * (15 + CONVERSION)).all()
    assert hits["first"].tolist() == [[True, False, False, False, False]] * 2
    level = (bench.seen.pedestal[2, :2] + 100 * PULSE_STEP)[:, None]
    low, scale = bench.noise._scale[2]
    assert (abs(hits["adc"] - (level - low) * scale) < 6 * bench.seen.noise.max() * scale + 1).all()
    assert len(set(hits["adc"][0].tolist())) > 1, "each sample has its own noise"
    bench.set("adc_burst_length", 1)
    assert len(bench.noise.pulse(2, 100, 1_000)) == 2


def test_bursts_of_self_triggers_keep_within_rates_and_limits(bench):
    bench.set("channel_mask", 0)
    bench.set("enable_periodic_reset", 1)
    bench.set("threshold_global", 60)
    bench.set("adc_burst_length", 255)
    assert np.allclose(bench.noise.rates, SECOND / 255 / CONVERSION), "a channel that converts takes no trigger"
    hits, _, excess = bench.noise.hits(0, SECOND // 100, 20_000)
    assert len(hits) <= 20_000
    assert len(hits) + excess == pytest.approx(4 * 64 * SECOND / CONVERSION / 100, rel=0.1)
    first = hits["first"]
    assert np.count_nonzero(first) * 255 == len(hits)
    bench.set("enable_cross_trigger", 1)
    bench.set("cross_trigger_mask", [0] + [1] * 63)
    bench.set("enable_hit_veto", 0)
    hits, _, _ = bench.noise.hits(0, SECOND // 1000, 10**6)
    crossed = np.count_nonzero(hits["trigger"] == CROSS)
    starts = np.count_nonzero(hits["first"] & (hits["trigger"] == NATURAL) & (hits["channel"] != 0))
    assert crossed == 255 * starts, "one for each self trigger, not one for each of its samples"


def test_bursts_of_all_channels_fill_the_fifo(bench):
    bench.set("external_trigger_mask", 0)
    bench.set("enable_hit_veto", 0)
    bench.set("adc_burst_length", 255)
    hits = bench.noise.external(5)
    assert np.bincount(hits["chip"]).tolist() == [FIFO] * 4
    assert hits["full"].all()
    assert bench.noise.crowded == 4 * (64 * 255 - FIFO)
    bench.set("external_trigger_mask", [0] * 4 + [1] * 60)
    assert not bench.noise.external(5)["full"].any()


def test_words_of_bursts_are_sent_in_the_order_of_the_clock(bench):
    """Bursts that last longer than a generation of hits, too."""
    tile = tile_of(bench)
    bench.set("external_trigger_mask", [0] * 8 + [1] * 56)
    bench.set("enable_hit_veto", 0)
    bench.set("adc_burst_length", 100)
    bench.set("adc_hold_delay", 1_000)
    tile._registers.write(0x2018, SECOND)  # ten a second
    tile._registers.write(0x2010, 1)
    found = []

    def turn():
        if tile.queued_words():
            tile.fill(10**6)
            words = tile.buffer.view("<u8")
            found.append([words[s // 8 + 1 : (s + n) // 8].reshape(-1, 2) for s, n in tile.spans.tolist()])
        return sum(len(words) for part in found for words in part) > 10_000

    until(turn, "bursts")
    words = np.concatenate([words for part in found for words in part])
    data = words[words[:, 0] & np.uint64(0xFF) == ord("D")]
    receipts = (data[:, 0] >> np.uint64(16) & np.uint64(0xFFFFFFFF)).astype(np.int64)
    assert (np.diff(receipts) >= 0).all()
    packets = packets_v2(data[:6_400, 1])
    assert all(packet.has_valid_parity() for packet in packets)
    assert sum(packet.first_packet for packet in packets) == 64


#: Ticks between words, chips that make them, and their io_channels.
words_made = st.lists(st.tuples(st.sampled_from([0, 0, 1, 50, 132, 1000]), st.integers(0, 3)), min_size=1, max_size=60)


@settings(max_examples=examples(200))
@given(made=words_made, cuts=st.lists(st.integers(1, 59), max_size=3))
def test_waiting_words_are_those_of_a_queue(made, cuts):
    """Against a queue that sends word after word; the words come in pieces of any size."""
    spacing = np.full(256, 132.0)
    spacing[2] = 66.0
    ticks = np.cumsum([pause for pause, _ in made])
    chips = np.array([chip for _, chip in made], np.int32)
    lines = np.array([1, 1, 2, 2])[chips]
    expected, leave, free = [], [], {1: 0.0, 2: 0.0}
    for tick, chip, line in zip(ticks.tolist(), chips.tolist(), lines.tolist(), strict=True):
        expected.append(sum(at > tick for at, other in leave if other == chip))
        free[line] = max(free[line], tick) + spacing[line]
        leave.append((free[line], chip))
    fifos, found = WaitingWords(), []
    bounds = sorted({0, len(made), *(cut for cut in cuts if cut < len(made))})
    for a, b in pairwise(bounds):
        found += fifos.count(chips[a:b], ticks[a:b], lines[a:b], spacing).tolist()
    assert found == expected


def test_diagnostics_words_say_how_many_words_wait(bench):
    """All channels of all chips are triggered at once: the first word of a chip finds none, the next one word, ..."""
    tile = tile_of(bench)
    bench.set("enable_fifo_diagnostics", 1, slice(0, 3))
    bench.set("external_trigger_mask", 0)
    bench.set("enable_hit_veto", 0)
    tick = 2 * SECOND + 12_345
    words = tile._hit_words(bench.noise.external(tick))
    packets = packets_v2(words["packet"], diagnostics=True)
    assert all(packet.has_valid_parity() for packet in packets)
    for chip_id in (11, 12, 13):
        own = [packet for packet in packets if packet.chip_id == chip_id]
        assert [packet.shared_fifo_events for packet in own] == list(range(64))
        assert {packet.local_fifo_events for packet in own} == {0}
        assert {packet.timestamp for packet in own} == {(tick - 290) % (1 << 16)}
    plain = [p for p in packets_v2(words["packet"]) if p.chip_id == 14]
    assert {packet.timestamp for packet in plain} == {tick - 290}, "this chip has not the mode"
    bench.set("adc_burst_length", 255)
    full = packets_v2(tile._hit_words(bench.noise.external(tick))["packet"], diagnostics=True)
    counts = {(p.shared_fifo_events, p.local_fifo_events, p.local_fifo) for p in full if p.chip_id == 11}
    assert counts == {(FIFO, 3, 2)}, "2,048 words of 16,320: its FIFO is full"


def test_diagnostics_are_shown_by_the_monitor(tmp_path):
    """Registers through the Operator, words on the wire, rows in the file, lines of the monitor."""
    network = tmp_path / "network.json"
    options = ("--chips", "4", "--asic", "2b", "--power-on", "--lossless", "--write-network", str(network))
    with emulator(*options) as board, system(tmp_path) as made:
        operator = made.start("--pacman", *board.addresses, "--asic", "2b", "--fifo-diagnostics")
        assert operator.load_board(str(network)).result(LIMIT)["chips"] == 4
        assert operator.configure_network().result(LIMIT)["ok"]
        settings_ = {"enable_fifo_diagnostics": 1, "enable_hit_veto": 0, "periodic_trigger_mask": [0] * 64}
        settings_ |= {"adc_burst_length": 2, "periodic_trigger_cycles": SECOND // 20}
        operator.send_configuration({"all": settings_}).result(LIMIT)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        operator.send_configuration({"all": {"enable_periodic_trigger": 1}}).result(LIMIT)

        def lines():
            return [line for line in operator.packets(text=True).result(LIMIT).splitlines() if "events" in line]

        shown = until(lines, "lines of packets")
        assert any("periodic trigger" in line and "local events 0  shared events 1" in line for line in shown), shown[
            :3
        ]
        operator.send_configuration({"all": {"enable_periodic_trigger": 0}}).result(LIMIT)
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE", ended
    rows = rows_of(ended["files"][0])
    rows = rows[(rows["packet_type"] == 0) & (rows["direction"] == 1)]
    assert rows["fifo_diagnostics_enabled"].all()
    assert (rows["timestamp"] < 1 << 16).all()
    first = rows[rows["first_packet"] == 1]
    assert 2 * len(first) == len(rows)
    assert set(first["shared_fifo_events"].tolist()) >= set(range(64))
    assert rows["shared_fifo_events"].max() < 128, "two words of each of 64 channels"
