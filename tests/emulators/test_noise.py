"""What emulated chips see: rates follow thresholds, trims and masks, and values follow what the seed gave."""

from __future__ import annotations

import json

import numpy as np
import pytest
from emulated_board import emulator
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_bench import SECOND, Bench
from processes import until

from larpixdaq import constants, schema
from larpixdaq._native import word_codec as native_packets
from larpixdaq._native.decoders import PacmanDecoder
from larpixdaq.emulators import network
from larpixdaq.emulators.board_registers import BoardRegisters
from larpixdaq.emulators.chips import SUPPLIES, TICKS_PER_BIT, EmulatedChips
from larpixdaq.emulators.noise import CROSS, EXTERNAL, HOT, MAX_RATE, NATURAL, PERIODIC, Channels, Noise
from larpixdaq.emulators.revisions import REVISIONS
from larpixdaq.emulators.tile import WORD, EmulatedTile, make_messages, make_packets


@pytest.fixture
def bench():
    made = Bench()
    made.noise.update()
    return made


def test_v2_chips_are_silent_at_power_up(bench):
    assert not bench.noise.busy
    bench.set("channel_mask", 0)
    assert bench.hits().size < 100


def test_rates_fall_with_the_threshold(bench):
    """Rates fall smoothly around the threshold given by the seed, and the number of hits follows the rates."""
    bench.set("channel_mask", 0)
    bench.set("enable_periodic_reset", 1)
    rates = []
    for threshold in range(110, 60, -1):
        bench.set("threshold_global", threshold)
        rates.append(bench.noise.rates.copy())
    rates = np.array(rates)
    assert (np.diff(rates, axis=0) >= 0).all()
    assert rates.max() == MAX_RATE
    bench.set("threshold_global", 92)
    expected = bench.noise.rates.sum()
    assert bench.hits(5.0).size == pytest.approx(5 * expected, abs=5 * (5 * expected) ** 0.5)
    # the same rates from the true properties
    met = (bench.seen.pedestal - bench.seen.offset) / (1800 / 256)
    above = (92 - met) * 1800 / 256 + 16 * 1.45
    assert np.allclose(bench.noise.rates, MAX_RATE * np.exp(-(np.maximum(above / bench.seen.noise, 0) ** 2) / 2))


def test_trims_masks_and_disabled_channels(bench):
    bench.set("threshold_global", 92)
    bench.set("channel_mask", 0)
    before = bench.noise.rates.copy()
    bench.set("pixel_trim_dac", [31] * 32 + [0] * 32)
    assert (bench.noise.rates[:, :32] <= before[:, :32]).all()
    assert (bench.noise.rates[:, 32:] > before[:, 32:]).all()
    bench.set("pixel_trim_dac", 0)
    bench.set("channel_mask", [1, 0] * 32)
    bench.set("csa_enable", [1] * 63 + [0], slice(0, 1))
    hits = bench.hits()
    assert set(hits["channel"].tolist()) == set(range(1, 64, 2))
    assert 63 not in hits["channel"][hits["chip"] == 0]
    bench.chips.power(0)
    bench.noise.update()
    assert not bench.noise.busy


def test_values_are_pedestal_and_noise(bench):
    bench.set("channel_mask", 0)
    bench.set("enable_periodic_reset", 1)
    bench.set("threshold_global", 80)
    hits = bench.hits(0.2)
    assert set(hits["trigger"].tolist()) == {NATURAL}
    assert (np.diff(hits["tick"]) >= 0).all()
    scale = 256 / (142 * 1800 / 256)
    adc = hits["adc"][(hits["chip"] == 3) & (hits["channel"] == 5)]
    assert len(adc) == pytest.approx(0.2 * MAX_RATE, rel=0.1)
    assert adc.mean() + 0.5 == pytest.approx((bench.seen.pedestal[3, 5] - 77 * 1800 / 256) * scale, abs=0.1)
    assert adc.std() == pytest.approx(np.hypot(bench.seen.noise[3, 5] * scale, 0.29), rel=0.1)
    # other references, other counts
    bench.set("vref_dac", 148)
    assert bench.hits(0.1)["adc"].mean() == pytest.approx(2 * hits["adc"].mean(), rel=0.05)


def test_leakage(bench):
    """Without resets channels drift up to the threshold, faster with more leakage. Resets prevent this."""
    bench.set("channel_mask", 0)
    bench.set("threshold_global", 100)
    above = 100 * 1800 / 256 + 16 * 1.45 + bench.seen.offset - bench.seen.pedestal
    assert np.allclose(bench.noise.rates, bench.seen.leakage / above, rtol=1e-3, atol=1e-3)
    hits = bench.hits(10.0)
    assert 1000 < hits.size < 2000
    bench.set("enable_periodic_reset", 1)
    assert bench.hits(10.0).size == 0


def test_forced_triggers(bench):
    """Periodic and external triggers sample pedestals of unmasked channels, cross triggers those of other channels."""
    bench.set("enable_hit_veto", 0)
    bench.set("periodic_trigger_mask", [0] * 4 + [1] * 60)
    bench.set("periodic_trigger_cycles", 100_000)
    assert bench.hits().size == 0
    bench.set("enable_periodic_trigger", 1, slice(0, 2))
    hits = bench.hits()
    assert len(hits) == 2 * 4 * 100
    assert set(hits["trigger"].tolist()) == {PERIODIC}
    assert (hits["tick"] % 100_000 == 0).all()
    cut = [bench.noise.hits(a, b, 10**6)[0] for a, b in ((0, 12_345), (12_345, 700_000), (700_000, 700_001))]
    assert sum(map(len, cut)) == 2 * 4 * 7
    bench.set("external_trigger_mask", [1] * 63 + [0])
    external = bench.noise.external(5)
    assert external["channel"].tolist() == [63] * 10
    assert set(external["trigger"].tolist()) == {EXTERNAL}
    bench.set("enable_periodic_trigger", 0)
    bench.set("channel_mask", [0] + [1] * 63)
    bench.set("threshold_global", 60)
    bench.set("cross_trigger_mask", [0] * 3 + [1] * 61)
    bench.set("enable_cross_trigger", 1, slice(4, 5))
    hits = bench.hits(0.1)
    crossed = hits[hits["trigger"] == CROSS]
    assert set(crossed["chip"].tolist()) == {4}
    assert set(crossed["channel"].tolist()) == {1, 2}
    assert len(crossed) == 2 * np.count_nonzero(hits["chip"][hits["trigger"] == NATURAL] == 4)


def test_the_height_of_test_pulses_follows_the_step(bench):
    bench.set("channel_mask", 0)
    bench.set("threshold_global", 110)
    bench.set("csa_testpulse_enable", [0, 0] + [1] * 62)
    assert bench.noise.pulse(2, 5, 99).size == 0
    means = [bench.noise.pulse(2, step, 99)["adc"].mean() for step in (60, 100)]
    assert means[1] - means[0] == pytest.approx(40, abs=3)
    hits = bench.noise.pulse(2, 100, 99)
    assert hits["channel"].tolist() == [0, 1]
    assert set(hits["tick"].tolist()) == {99}


def test_a_falling_dac_causes_test_pulses(bench):
    steps = []
    bench.chips.on_pulse = lambda chip, step: steps.append((chip, step))
    address = bench.map.address("csa_testpulse_dac")
    words = [2 | 1 << 2 | address << 10 | value << 18 for value in (200, 180, 180, 220, 120)]
    bench.chips.send(np.array(words, np.uint64), np.full(5, 1, np.uint8))
    (root,) = {chip for channel, chip, _ in network.tile_wiring(10).entries if channel == 1}
    assert steps == [(root, 20), (root, 100)]


def test_the_lines_limit_the_rate_of_packets(bench):
    bench.set("channel_mask", 0)
    bench.set("threshold_global", 0)
    hits, _, lost = bench.noise.hits(0, SECOND, 1000)
    assert len(hits) == 1000
    assert lost == pytest.approx(640 * MAX_RATE, rel=0.01)


# --- packets and messages


@pytest.mark.parametrize("asic", ["1", "2", "3"])
def test_packets_decode_to_their_fields(asic):
    random = np.random.default_rng(3)
    n = 1000
    channels = 32 if asic == "1" else 64
    values = [random.integers(0, top, n) for top in (256, channels, 1 << 24, 1024 if asic in "13" else 256, 4)]
    words = make_packets(asic, *values, full=True, first=asic != "3")  # v3 has the mark in the timestamp
    generation = schema.ASICS[asic]
    rows = np.zeros(n, schema.layout_of(generation).dtype)
    assert native_packets.decode(words, rows, asic=generation) == n
    assert rows["valid_parity"].all()
    names = ["chipid", "channel", "timestamp", "adc_counts"] if asic == "1" else ["chip_id", "channel_id", "timestamp"]
    chip, channel, tick, adc, trigger = values
    expected = [chip, channel, tick // 2 if asic == "1" else tick, adc]
    for name, value in zip([*names, *(["dataword"] if asic != "1" else [])], expected, strict=True):
        assert (rows[name] == value).all(), name
    if asic == "1":
        assert rows["fifo_full"].all()
    else:
        assert (rows["trigger_type"] == trigger).all()
        assert (rows["local_fifo"] == 2).all()
        assert rows["downstream_marker"].all()


@settings(max_examples=examples(100))
@given(
    pauses=st.lists(st.sampled_from([0, 1, 200, 201, 50_000]), min_size=1, max_size=50),
    per_message=st.sampled_from([0, 1, 7]),
)
def test_messages(pauses, per_message):
    words = np.zeros(len(pauses), WORD)
    words["head"], words["packet"] = np.arange(len(pauses)), 7
    words["tick"] = np.cumsum(pauses)
    buffer, spans = make_messages(words, per_message, 200, 1000)
    found = []
    for start, length in spans.tolist():
        message = buffer[start : start + length].tobytes()
        assert message[:1] == b"D"
        count = int.from_bytes(message[6:8], "little")
        assert length == 8 + 16 * count
        part = np.frombuffer(message, [("head", "<u8"), ("packet", "<u8")], offset=8)
        assert (part["packet"] == 7).all()
        found += part["head"].tolist()
        assert count <= (per_message or count)
    assert found == list(range(len(pauses)))
    if not per_message:
        assert len(spans) == 1 + sum(pause > 200 for pause in pauses[1:])


# --- a board's words


@pytest.mark.parametrize("asic", ["2", "2b", "3"])
@pytest.mark.parametrize("pps", [False, True])
def test_words_of_a_board(asic, pps):
    """Noise, heartbeats and triggers are sorted by the board's clock, and come from chips with a path to the board."""
    chips = EmulatedChips(network.tile_wiring(4), asic, powered=True)
    noise = Noise(chips, Channels(4, 64, [1]), [2])
    registers = BoardRegisters(REVISIONS["5"])
    registers.switch_on(1, SUPPLIES[asic].usual, TICKS_PER_BIT[asic])
    tile = EmulatedTile(noise, seconds=1_700_000_000, tick=7 * SECOND, pps=pps, registers=registers)
    field = chips.map.fields
    chips.registers[:, chips.map.address("chip_id")] = [11, 12, 13, 14]
    chips.registers[:2, chips.map.address("enable_piso_downstream")] = 15
    chips.registers[:, field["channel_mask"].low // 8 : field["channel_mask"].high // 8] = 0
    chips.registers[:, field["csa_enable"].low // 8 : field["csa_enable"].high // 8] = 255  # v3: off at power-up
    chips.registers[:, chips.map.address("threshold_global")] = 60
    chips.registers[:, chips.map.address("external_trigger_mask")] = 0
    chips.registers[:, chips.map.address("enable_hit_veto")] &= ~(1 << field["enable_hit_veto"].low % 8) & 0xFF
    registers.write(0x1018, 10_000_000)  # a heartbeat each 0.1 s
    registers.write(0x2018, 5_000_000)
    registers.write(0x2010, 1)
    generation = schema.ASICS[asic]
    decoder = PacmanDecoder(1, int(generation))
    counts = np.zeros(len(constants.COUNTS), np.uint64)
    decoder.start(counts)
    found = []

    def take():
        messages = tile.fill(5_000)
        if messages:
            decoder.feed(tile.buffer, tile.spans)
            rows = np.zeros(40_000, schema.layout_of(generation).dtype)
            found.append(rows[: decoder.decode(rows)])
        return messages

    def turn():
        if tile.queued_words():
            take()
        return sum(map(len, found)) > 100_000 and found[-1]["receipt_timestamp"].any()

    until(turn, "noise")
    while take():  # words that still wait
        pass
    rows = np.concatenate(found)
    kind = rows["packet_type"]
    hits = rows[kind == (1 if asic == "3" else 0)]
    assert len(hits) + np.isin(kind, [4, 6, 7]).sum() == len(rows)
    assert set(hits["chip_id"].tolist()) == {11, 12}
    assert set(hits["io_channel"].tolist()) == {1}
    assert set(hits["trigger_type"].tolist()) == {0, 1}
    assert hits["valid_parity"].all()
    resets = np.count_nonzero(rows["trigger_type"][kind == 6] == ord("S"))
    back = np.diff(hits["receipt_timestamp"].astype(np.int64)) < 0
    assert np.count_nonzero(back) == resets if pps else not back.any()
    bits = 27 if asic == "3" else 31  # without the mark of the first packet of a burst
    late = hits["receipt_timestamp"].astype(np.int64) - (hits["timestamp"].astype(np.int64) & (1 << bits) - 1)
    assert set(late.tolist()) <= {290, 290 - SECOND, 290 - (1 << bits), 290 + (1 << bits)} | {290 - (1 << 32)}
    assert hits["first_packet"].all()
    heartbeats = rows["timestamp"][(kind == 6) & (rows["trigger_type"] == ord("H"))]
    assert len(heartbeats) >= 1
    assert (heartbeats % 1_000_000 == 0).all()
    assert (rows["timestamp"][kind == 7] % 500_000 == 0).all()
    assert tile.full == np.count_nonzero(hits["local_fifo"] & 2)


def test_the_uart_clock_sets_the_rate_of_an_io_channel():
    chips = EmulatedChips(network.tile_wiring(4), "2b", powered=True)
    registers = BoardRegisters(REVISIONS["5"])
    registers.switch_on(1, SUPPLIES["2b"].usual, TICKS_PER_BIT["2b"])
    tile = EmulatedTile(Noise(chips, Channels(4, 64, [1]), [2]), seconds=0, tick=0, heartbeat=0, registers=registers)
    field, field_clock = (chips.map.fields[name] for name in ("channel_mask", "clk_ctrl"))
    chips.registers[:, chips.map.address("enable_piso_downstream")] = 15
    chips.registers[:, field.low // 8 : field.high // 8] = 0
    chips.registers[:, chips.map.address("threshold_global")] = 60
    # io_channel 2 and its chips: 16 ticks for each bit instead of 2
    chips.registers[chips.exit_channels(np.arange(4)) == 2, field_clock.low // 8] |= 0b11 << field_clock.low % 8
    registers.write(0x4010, 16)
    until(lambda: tile.queued_words() > 20_000, "hits")
    tile.fill(1_000_000)
    words = tile.buffer[8:].reshape(-1, 16) if len(tile.spans) == 1 else np.zeros((0, 16), np.uint8)
    counts = np.bincount(words[words[:, 0] == ord("D"), 1], minlength=3)
    assert counts[2] == pytest.approx(counts[1] / 8, rel=0.1)
    assert tile.crowded > 20 * counts.sum()


# --- the truth


def test_the_truth_is_written(tmp_path):
    path = tmp_path / "truth.json"
    options = ["--hot-channels", "2", "--dead-channels", "1-1-11-7", "--stuck-bits", "3", "--io-groups", "2"]
    with emulator("--chips", "12", "--truth", str(path), "--seed", "5", *options) as board:
        truth = json.loads(path.read_text())
        assert truth["planted"] == board.planted
        assert {name: len(found) for name, found in truth["planted"].items()} == {
            "stuck_bits": 3,
            "hot_channels": 2,
            "dead_channels": 1,
        }
        assert len(truth["channels"]) == 24
        noise = {f"{key}-{n}": value for key, c in truth["channels"].items() for n, value in enumerate(c["noise"])}
        assert sorted(noise, key=noise.__getitem__)[-2:] == sorted(board.planted["hot_channels"], key=noise.get)
        assert max(noise.values()) > HOT * min(noise.values())
    with emulator("--chips", "12", "--truth", str(path), "--seed", "5", *options):
        assert json.loads(path.read_text()) == truth


def test_rolling_triggers_and_resets_take_one_channel_at_a_time(bench):
    bench.set("enable_hit_veto", 0)
    bench.set("threshold_global", 255)
    bench.set("periodic_trigger_mask", [0] * 4 + [1] * 60)
    bench.set("periodic_trigger_cycles", 1_000)
    bench.set("enable_rolling_periodic_trigger", 1, slice(0, 1))
    bench.set("csa_enable", 1)
    bench.set("enable_periodic_trigger", 1, slice(0, 2))
    bench.set("enable_periodic_reset", 1)
    found = bench.hits(0.64)
    found = found[found["trigger"] == PERIODIC]
    assert np.bincount(found["chip"], minlength=2).tolist() == [4 * 100, 4 * 6_400]
    rolling = found[found["chip"] == 0]
    assert (rolling["tick"] // 1_000 % 64 == rolling["channel"]).all()
    bench.seen.leakage[:] = 1_000.0
    bench.set("threshold_global", 100)  # about 86 mV above the pedestals
    bench.set("channel_mask", 0)
    bench.set("periodic_reset_cycles", SECOND // 500)  # 2 mV of leakage between resets of all channels
    assert bench.noise.rates.max() < 1
    bench.set("enable_rolling_periodic_reset", 1)  # 128 mV
    assert bench.noise.rates.min() > 5
