"""Answers of the monitor compared with the data of a simulated producer; skipped blocks must not make them wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from simulated_blocks import START_NS, Clock, Producer

from larpixdaq import constants, schema
from larpixdaq.errors import FormatError, ProtocolError, RequestError
from larpixdaq.monitor.monitor import KEPT_ROWS, Monitor
from larpixdaq.protocol.control import packed
from larpixdaq.protocol.stream import Block, End, Totals


def data_rows(n: int, seed: int = 0, layout: schema.RowLayout = schema.LAYOUTS[1], groups: int = 2) -> NDArray[Any]:
    """Return received data packets of a few chips and `groups` io_groups, some with bad parity or FIFO flags."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(n, layout.dtype)
    rows["direction"] = 1
    rows["valid_parity"] = rng.random(n) < 0.9
    rows["timestamp"] = np.arange(n)
    if layout.code == 1:
        group, channel = rng.integers(1, groups + 1, n), rng.integers(1, 3, n)
        rows["chipid"] = rng.integers(11, 14, n)
        keys = zip(group, channel, rows["chipid"], strict=True)
        rows["chip_key"] = [b"%d-%d-%d" % key for key in keys]
        rows["channel"], rows["adc_counts"] = rng.integers(0, 128, n), rng.integers(0, 1024, n)
        return rows
    rows["io_group"], rows["io_channel"] = rng.integers(1, groups + 1, n), rng.integers(1, 3, n)
    rows["chip_id"], rows["channel_id"] = rng.integers(11, 14, n), rng.integers(0, 64, n)
    rows["dataword"] = rng.integers(30, 50, n)
    rows["local_fifo"] = rng.choice([0, 0, 1, 3], n)
    rows["packet_type"] = 1 if layout.code == 4 else 0
    return rows


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steady(
    monitor: Monitor, clock: Clock, producer: Producer, seconds: float, rate: int, seen: int = 1
) -> NDArray[Any]:
    """Send blocks of 20 ms at `rate` rows/s, every `seen`-th of them to the monitor. Returns all rows."""
    n = round(seconds / 0.02)
    start = (producer.last_ns - START_NS) / 1e9
    blocks = [data_rows(rate // 50, seed=producer.sequence + i) for i in range(n)]
    for i, rows in enumerate(blocks):
        header, rows = producer.block(rows, start + 0.02 * i, start + 0.02 * (i + 1))
        clock.now += 0.02
        if i % seen == 0:
            monitor.block(header, rows)
    return np.concatenate(blocks)


def test_producers_on_hosts_with_different_clocks(clock: Clock) -> None:
    monitor, first, second = Monitor(clock), Producer(), Producer(name="Second board")
    steady(monitor, clock, first, 2.0, 5000)
    second.last_ns += 3600 * 10**9  # an hour ahead: another host, or a clock that was stepped
    steady(monitor, clock, second, 2.0, 5000)
    answer = monitor.packet_rate()
    assert answer["seconds"] == pytest.approx(4.0, abs=0.1)
    assert answer["mean_rate"] == pytest.approx(5000, rel=0.05)
    assert answer["rate"] == pytest.approx(5000, rel=0.01)


@pytest.mark.parametrize("seen", [1, 3])
def test_rates_are_exact_with_skipped_blocks(clock: Clock, seen: int) -> None:
    monitor, producer = Monitor(clock), Producer()
    monitor.start(7, "physics", "cosmics")
    rows = steady(monitor, clock, producer, 2.02, 5000, seen)
    monitor.block(*producer.block(data_rows(100), 2.02, 2.04))
    rows = np.concatenate([rows, data_rows(100)])
    answer = monitor.packet_rate()
    assert answer["run"] == 7
    assert answer["packets"] == len(rows)
    assert answer["rate"] == pytest.approx(5000, rel=1e-6)
    assert answer["mean_rate"] == pytest.approx(5000, rel=1e-6)
    assert answer["seconds"] == pytest.approx(2.04)
    assert answer["seen"] == pytest.approx(1 / seen, rel=0.05)
    groups = answer["io_groups"]
    assert groups["io_group"].tolist() == [1, 2]
    assert groups["packets"].tolist() == [(rows["io_group"] == g).sum() for g in (1, 2)]
    assert groups["bad_parity"].tolist() == [
        ((rows["io_group"] == g) & (rows["valid_parity"] == 0)).sum() for g in (1, 2)
    ]
    np.testing.assert_allclose(groups["mean_rate"], groups["packets"] / 2.04)
    np.testing.assert_allclose(groups["seen"], groups["seen_packets"] / groups["packets"])
    for table, keys in (("io_channels", 2), ("chips", 3), ("channels", 4)):
        names = list(answer[table].dtype.names[:keys])
        assert answer[table][names].tolist() == sorted(set(answer[table][names].tolist()))
        for column in ("rate", "mean_rate", "seen_packets"):
            sums = [answer[table][column][answer[table]["io_group"] == g].sum() for g in (1, 2)]
            np.testing.assert_allclose(sums, groups[column], err_msg=f"{table} {column}")
    assert "channels" not in monitor.packet_rate(channels=False)
    info = monitor.run_info()
    assert info["seen_rows"] + info["skipped_rows"] == len(rows)
    assert info["producers"][0]["skipped_blocks"] == (0 if seen == 1 else 101 - 34)
    assert (info["kind"], info["comment"], info["layout"]) == ("physics", "cosmics", "2.4")
    if seen == 1:
        chips = answer["chips"]
        for chip in chips:
            chip_rows = rows[(rows["io_group"] == chip["io_group"]) & (rows["io_channel"] == chip["io_channel"])]
            chip_rows = chip_rows[chip_rows["chip_id"] == chip["chip_id"]]
            assert chip["seen_packets"] == len(chip_rows)
            assert chip["seen_bad_parity"] == (chip_rows["valid_parity"] == 0).sum()
            assert chip["seen_local_half"] == (chip_rows["local_fifo"] > 0).sum()
            assert chip["seen_local_full"] == (chip_rows["local_fifo"] == 3).sum()


def test_the_rate_is_that_of_the_last_second_and_falls_to_zero(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    steady(monitor, clock, producer, 5, 1000)
    steady(monitor, clock, producer, 1, 10_000)
    answer = monitor.packet_rate()
    assert answer["rate"] == pytest.approx(10_000, rel=1e-6)
    assert answer["mean_rate"] == pytest.approx(15_000 / 6, rel=1e-6)
    before = answer["rate"]
    for _ in range(12):
        clock.now += 0.1
        now = monitor.packet_rate()["rate"]
        assert now <= before
        before = now
    assert before == 0
    assert monitor.packet_rate()["chips"]["rate"].sum() == 0
    assert monitor.packet_rate()["mean_rate"] == pytest.approx(15_000 / 7.1, rel=1e-6)
    # after a pause only new packets count in the present rate
    clock.now += 60
    producer.last_ns += 61_200_000_000
    steady(monitor, clock, producer, 0.2, 1000)
    assert monitor.packet_rate()["rate"] == pytest.approx(200, rel=1e-6)
    monitor.end(producer.end())
    clock.now += 100
    assert monitor.packet_rate()["rate"] == 0
    assert monitor.packet_rate()["seconds"] == pytest.approx(67.4)


def test_the_rate_of_a_silent_chip_falls_at_once(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    for i in range(300):
        rows = np.repeat(data_rows(1, groups=1), 20)
        rows["chip_id"][10:] = 99
        if i >= 150:
            rows["chip_id"] = 99
        clock.now += 0.02
        monitor.block(*producer.block(rows, i * 0.02, (i + 1) * 0.02))
    quiet, loud = monitor.packet_rate()["chips"]
    assert (quiet["rate"], loud["chip_id"]) == (0, 99)
    assert loud["rate"] == pytest.approx(1000)
    assert quiet["mean_rate"] == pytest.approx(250)


def test_the_first_packet_of_a_run_has_a_finite_rate(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    assert monitor.packet_rate()["rate"] == 0
    monitor.block(*producer.block(data_rows(1), 0, 0))
    for _ in range(20):
        answer = monitor.packet_rate()
        assert answer["rate"] <= 10
        assert answer["mean_rate"] <= 10
        clock.now += 0.01


def test_joining_during_a_run(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    for i in range(100):
        producer.block(data_rows(100), i * 0.02, (i + 1) * 0.02)
    steady(monitor, clock, producer, 1.0, 5000)
    answer = monitor.packet_rate()
    assert answer["packets"] == 100 * 100 + 5000
    assert answer["rate"] == pytest.approx(5000, rel=1e-6)
    assert answer["mean_rate"] == pytest.approx(5000, rel=1e-6)
    assert monitor.run_info()["skipped_rows"] == 100 * 100
    assert answer["seen"] == pytest.approx(1 / 3)
    assert monitor.rows() == (5000, 5000)


def test_sums_over_several_producers_and_a_restarted_producer(clock: Clock) -> None:
    monitor = Monitor(clock)
    first, second, restarted = Producer(), Producer(name="Second board"), Producer(epoch=2)
    for i in range(120):
        clock.now += 0.02
        monitor.block(*(first if i < 50 else restarted).block(data_rows(20, i), i * 0.02, (i + 1) * 0.02))
        monitor.block(*second.block(data_rows(30, i), i * 0.02, (i + 1) * 0.02))
    answer = monitor.packet_rate()
    assert answer["packets"] == 6000
    assert answer["rate"] == pytest.approx(2500, rel=1e-6)
    assert answer["mean_rate"] == pytest.approx(2500)
    assert [(p["name"], p["epoch"]) for p in monitor.run_info()["producers"]] == [
        ("LArPix board", 1),
        ("Second board", 1),
        ("LArPix board", 2),
    ]


@settings(max_examples=examples(50))
@given(
    sizes=st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=20),
    code=st.sampled_from([known.code for known in schema.LAYOUTS]),
    ended=st.booleans(),
)
def test_seen_and_skipped_rows_add_up_to_all_rows(sizes: list[tuple[int, bool]], code: int, ended: bool) -> None:
    layout = schema.layout(code)
    monitor, producer = Monitor(Clock()), Producer(layout=layout)
    monitor.start(7)
    kept: list[NDArray[Any]] = []
    known = 0
    for i, (size, seen) in enumerate(sizes):
        block = producer.block(data_rows(size, i, layout), i, i + 0.5)
        if seen:
            monitor.block(*block)
            kept.append(block[1])
            known = producer.rows
    if ended:
        monitor.end(producer.end())
        known = producer.rows
    info = monitor.run_info()
    rows = np.concatenate([np.zeros(0, layout.dtype), *kept])
    assert info["seen_rows"] == len(rows)
    assert info["seen_rows"] + info["skipped_rows"] == known
    assert info["rows_by_type"]["data"] == len(rows)
    if ended or (sizes and sizes[-1][1]):
        assert monitor.packet_rate()["packets"] == producer.rows
    histogram = monitor.adc_histogram()
    good = rows[rows["valid_parity"] == 1]
    adc = good["adc_counts" if code == 1 else "dataword"].astype(float)
    assert histogram["entries"] == len(good)
    if len(good):
        assert histogram["mean"] == pytest.approx(adc.mean())
        assert histogram["std"] == pytest.approx(adc.std(), abs=1e-9)
    if len(rows):
        np.testing.assert_array_equal(monitor.packets(count=50), rows[-50:])


def test_histogram_of_selected_chips_and_channels(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    rows = data_rows(2000)
    monitor.block(*producer.block(rows, 0, 0.01))
    good = rows[rows["valid_parity"] == 1]
    chip_rows = good[(good["io_group"] == 2) & (good["chip_id"] == 12)]
    answer = monitor.adc_histogram(io_group=2, chip=12)
    np.testing.assert_array_equal(answer["counts"], np.bincount(chip_rows["dataword"], minlength=256))
    assert (answer["io_group"], answer["io_channel"], answer["chip"], answer["channel"]) == (2, None, 12, None)
    assert answer["merged_channels"] == 0
    assert monitor.adc_histogram(io_group=9)["mean"] is None
    assert monitor.adc_histogram(channel=3)["entries"] == (good["channel_id"] == 3).sum()


def test_the_last_packets(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    assert len(monitor.packets()) == 0
    everything = []
    for i, size in enumerate([3, 5000, 1, 16_384, 700, 700, 16_000, 5]):
        everything.append(data_rows(size, i))
        monitor.block(*producer.block(everything[-1], i, i))
    rows = np.concatenate(everything)
    np.testing.assert_array_equal(monitor.packets(), rows[-100:])
    np.testing.assert_array_equal(monitor.packets(count=KEPT_ROWS), rows[-KEPT_ROWS:])
    monitor.block(*producer.info("Ending run", 9))
    assert monitor.packets(1)["packet_type"].tolist() == [5]
    np.testing.assert_array_equal(monitor.packets(10, types=[0]), rows[-10:])
    shown = monitor.packets(2, text=True).split("\n")
    assert len(shown) == 3
    assert "data" in shown[1]
    assert "message" in shown[2]


def test_messages_with_time_and_producer(clock: Clock) -> None:
    monitor = Monitor(clock)
    producer, second = Producer(), Producer(name="Second board")
    monitor.block(*producer.info("Beginning run", 0))
    monitor.block(*second.info("Beginning run", 1.5))
    monitor.block(*producer.info("Ending run", 60, recorded=1_600_000_000))
    found = monitor.messages()
    assert [message["text"] for message in found] == ["Beginning run", "Beginning run", "Ending run"]
    assert found[2]["time"] == 1_600_000_000
    assert found[1] == {
        "time": START_NS / 1e9 + 1.5,
        "utc": "2023-11-14T22:13:21Z",
        "producer": "Second board",
        "run": 7,
        "text": "Beginning run",
    }
    assert monitor.messages(1) == found[-1:]


def test_a_new_run_starts_at_zero_and_ignores_old_blocks(clock: Clock) -> None:
    monitor, old = Monitor(clock), Producer(run=7)
    monitor.start(7)
    monitor.block(*old.block(data_rows(100), 0, 1))
    late = old.block(data_rows(50), 1, 2)
    # blocks of the next run may arrive before prepare_run
    new = Producer(run=8, layout=schema.LAYOUTS[3])
    monitor.block(*new.block(data_rows(10, layout=schema.LAYOUTS[3]), 2, 3))
    monitor.start(8, "test", "after the break")
    monitor.block(*late)
    monitor.end(old.end())
    info = monitor.run_info()
    assert (info["run"], info["comment"], info["seen_rows"], info["late_blocks"]) == (8, "after the break", 10, 2)
    assert info["layout"] == "3.0"
    assert info["rows_by_type"]["data"] == 10
    monitor.start(9)
    assert monitor.run_info()["seen_rows"] == 0
    assert monitor.packet_rate()["packets"] == 0
    assert len(monitor.adc_histogram()["counts"]) == 0


def test_a_repeated_block_is_not_counted(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    block = producer.block(data_rows(100), 0, 1)
    monitor.block(*block)
    monitor.block(*block)
    info = monitor.run_info()
    assert info["seen_rows"] == 100
    assert info["producers"][0]["repeated_blocks"] == 1


def test_rates_after_the_host_clock_was_set_back(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    steady(monitor, clock, producer, 2.0, 1000)
    for _ in range(2):
        producer.last_ns -= 3600 * 10**9
        steady(monitor, clock, producer, 2.0, 1000)
    answer = monitor.packet_rate()
    assert answer["packets"] == 6000
    assert answer["rate"] == pytest.approx(1000, rel=1e-6)
    assert answer["mean_rate"] == pytest.approx(1000, rel=0.02)


def test_rates_with_a_host_clock_that_stands_still(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    for i in range(1000):
        monitor.block(*producer.block(data_rows(3, i), 1, 1))
    answer = monitor.packet_rate()
    assert answer["packets"] == 3000
    assert answer["rate"] <= 30_000


def test_the_end_record_counts_unseen_rows(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    for i in range(10):
        producer.block(data_rows(100), i, i + 1)
    monitor.end(producer.end("aborted"))
    answer = monitor.packet_rate()
    assert (answer["packets"], answer["seen"]) == (1000, 0)
    assert answer["mean_rate"] == pytest.approx(100)
    assert monitor.run_info()["producers"][0]["ended"] == "aborted"
    assert monitor.status().skipped_rows == 1000


def test_invalid_blocks_are_refused_and_not_counted(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    header, rows = producer.block(data_rows(10), 0, 1)
    with pytest.raises(FormatError, match="10 rows of 36 bytes announced, 359 bytes found"):
        monitor.block(header, rows.tobytes()[:-1])
    monitor.block(header, rows.tobytes())
    np.testing.assert_array_equal(monitor.packets(), rows)
    with pytest.raises(FormatError, match="10 rows of 36 bytes announced, 180 bytes found"):
        monitor.block(header, rows[:5])
    second = Producer(layout=schema.LAYOUTS[3], name="Second board")
    with pytest.raises(FormatError, match=r"3 rows of layout 3\.0, expected 3 of 2\.4"):
        monitor.block(*second.block(data_rows(3, layout=schema.LAYOUTS[3]), 0, 1))
    wrong = Producer(name="Third board")
    wrong.counts[300] = dict.fromkeys(constants.COUNTS, 0)
    with pytest.raises(ProtocolError, match="totals of run 7 from Third board: impossible"):
        monitor.block(*wrong.block(data_rows(3), 0, 1))
    with pytest.raises(ProtocolError, match="2 counts, not"):
        monitor.end(End(7, "Third board", 1, 0, "closed", 0, 0, [[1, 2, 3]], [], []))
    assert [producer["name"] for producer in monitor.run_info()["producers"]] == ["LArPix board"]
    assert monitor.run_info()["seen_rows"] == 10
    assert monitor.packet_rate()["seconds"] < 10


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda monitor: monitor.packets(0), "packets: count: expected a whole number from 1 to 16384, found 0"),
        (lambda monitor: monitor.packets("x"), "packets: count: expected a whole number from 1 to 16384, found 'x'"),
        (lambda monitor: monitor.packets(types=["data"]), "packets: types: expected .*, found 'data'"),
        (lambda monitor: monitor.packets(types=0), "packets: types: expected a list of packet types, found 0"),
        (lambda monitor: monitor.messages(True), "messages: count: expected .*, found True"),
        (lambda monitor: monitor.adc_histogram(chip=256), "adc_histogram: chip: expected .* 0 to 255, found 256"),
        (lambda monitor: monitor.pixel(1, 1, None, 5), "pixel: chip: expected .* 0 to 255, found None"),
        (
            lambda monitor: monitor.pixel_map("adc"),
            "expected rate, mean_adc or packets, found 'adc'",
        ),
        (lambda monitor: monitor.pixel_map([1]), "pixel_map: quantity: expected .*, found \\[1\\]"),
    ],
)
def test_invalid_parameters_of_requests(ask: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        ask(Monitor())


def as_value(code: int, scale: dict[str, float]) -> float:
    return scale["low"] * (scale["high"] / scale["low"]) ** ((code - 1) / 254)


@pytest.mark.parametrize("seen", [1, 3])
@pytest.mark.parametrize("code", [1, 2, 4])
def test_summary_agrees_with_the_other_answers(clock: Clock, code: int, seen: int) -> None:
    layout = schema.layout(code)
    monitor, producer = Monitor(clock), Producer(layout=layout)
    monitor.start(7, "physics")
    assert monitor.summary()["channel_rates"]["silent"] == 0
    monitor.block(*producer.info("Beginning run", 0))
    for i in range(100):
        clock.now += 0.02
        rows = data_rows(300, i, layout, groups=1 if code == 1 else 2)
        block = producer.block(rows, 0.02 * i, 0.02 * (i + 1))
        if i % seen == 0:
            monitor.block(*block)
    summary, rates = monitor.summary(), monitor.packet_rate()
    for name in ("run", "rate", "mean_rate", "packets", "seconds", "seen"):
        assert summary[name] == rates[name]
    np.testing.assert_array_equal(summary["io_groups"], rates["io_groups"])
    for name in ("seen_packets", "seen_data", "seen_bad_parity", "seen_local_half", "seen_local_full"):
        for group in summary["io_groups"]:
            assert group[name] == rates["chips"][name][rates["chips"]["io_group"] == group["io_group"]].sum()
    assert (summary["kind"], summary["layout"], summary["messages"]) == ("physics", layout.name, 1)
    assert summary["rows_by_type"] == monitor.run_info()["rows_by_type"]
    histogram = summary["channel_rates"]
    edges = histogram["edges"] * 0.9999
    present = rates["channels"]["rate"]
    assert histogram["silent"] == (present == 0).sum()
    np.testing.assert_array_equal(histogram["channels"], np.histogram(present[present > 0], edges)[0])
    assert histogram["edges"][0] == pytest.approx(0.1)
    assert (summary["hottest"], summary["dead_channels"], summary["dead"]) == (None, None, [])


@pytest.mark.parametrize("code", [1, 2, 4])
def test_a_pixel_map_has_the_numbers_of_each_channel(clock: Clock, code: int) -> None:
    layout = schema.layout(code)
    monitor, producer = Monitor(clock), Producer(layout=layout)
    empty = monitor.pixel_map()
    assert (len(empty["chips"]), empty["values"].size) == (0, 0)
    for i in range(150):
        clock.now += 0.02
        rows = data_rows(400, i, layout, groups=1 if code == 1 else 2)
        if i < 75:
            rows = rows[rows["chipid" if code == 1 else "chip_id"] != 12]
        if code != 1:  # answers to configuration reads are no data
            rows["packet_type"][rows["chip_id"] == 13] = 3
        first = monitor.pixel_map()["chips"] if i == 70 else None
        monitor.block(*producer.block(rows, 0.02 * i, 0.02 * (i + 1)))
        if first is not None:
            early = first
    found = {quantity: monitor.pixel_map(quantity) for quantity in ("rate", "packets", "mean_adc")}
    chips = found["rate"]["chips"]
    assert chips[: len(early)].tolist() == early.tolist()
    assert len(chips) > len(early)
    channels = 128 if code == 1 else 64
    assert {answer["values"].shape for answer in found.values()} == {(len(chips), channels)}
    for at, chip in enumerate(chips.tolist()):
        for channel in (0, 17, channels - 1):
            pixel = monitor.pixel(*chip, channel)
            codes = {quantity: int(answer["values"][at, channel]) for quantity, answer in found.items()}
            assert bool(codes["rate"]) == bool(pixel["rate"])
            assert bool(codes["packets"]) == bool(pixel["seen_packets"])
            assert bool(codes["mean_adc"]) == (pixel["mean_adc"] is not None)
            if codes["rate"]:
                assert as_value(codes["rate"], found["rate"]["scale"]) == pytest.approx(pixel["rate"], rel=0.04)
            if codes["packets"]:
                value = as_value(codes["packets"], found["packets"]["scale"])
                assert value == pytest.approx(pixel["seen_packets"], rel=0.05)
            if codes["mean_adc"]:
                step = found["mean_adc"]["scale"]["step"]
                assert step == (1 if code == 2 else 4)
                assert codes["mean_adc"] * step == pytest.approx(max(pixel["mean_adc"], step), abs=0.501 * step)
    assert monitor.pixel_map(chips=False)["chips_known"] == len(chips)
    assert "chips" not in monitor.pixel_map(chips=False)


def test_the_numbers_of_a_channel(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    rows = steady(monitor, clock, producer, 2.0, 5000)
    here = rows[(rows["io_group"] == 2) & (rows["io_channel"] == 1) & (rows["chip_id"] == 12)]
    here = here[here["channel_id"] == 5]
    table = monitor.packet_rate()["channels"]
    (listed,) = [each for each in table if each.tolist()[:4] == (2, 1, 12, 5)]
    pixel = monitor.pixel(2, 1, 12, 5)
    good = here[here["valid_parity"] == 1]["dataword"]
    assert pixel["seen_packets"] == len(here)
    assert pixel["rate"] == pytest.approx(listed["rate"], rel=1e-6)
    assert pixel["mean_rate"] == pytest.approx(len(here) / 2.0)
    assert (pixel["mean_adc"], pixel["std"]) == (pytest.approx(good.mean()), pytest.approx(good.std()))
    assert (pixel["run"], pixel["seen"], pixel["channel"]) == (7, 1.0, 5)
    for unknown in ((2, 1, 99, 5), (9, 1, 12, 5), (2, 1, 12, 200)):
        pixel = monitor.pixel(*unknown)
        assert (pixel["seen_packets"], pixel["rate"], pixel["mean_rate"], pixel["mean_adc"]) == (0, 0.0, 0.0, None)
    clock.now += 10
    assert monitor.pixel(2, 1, 12, 5)["rate"] == 0
    assert not monitor.pixel_map()["values"].any()
    assert monitor.summary()["channel_rates"]["silent"] == len(table)


def test_packets_outside_the_scale_have_the_last_code(clock: Clock) -> None:
    monitor, producer = Monitor(clock), Producer()
    rows = np.repeat(data_rows(1), 300_000)
    for i in range(2):
        clock.now += 0.1
        monitor.block(*producer.block(rows, 0.1 * i, 0.1 * (i + 1)))
    assert monitor.pixel_map()["values"].max() == 255
    edges, channels = (monitor.summary()["channel_rates"][name] for name in ("edges", "channels"))
    assert channels[-1] == channels.sum() == 1
    assert edges[-1] < 2e6


@settings(max_examples=examples(50))
@given(seed=st.integers(0, 2**32 - 1), code=st.sampled_from([known.code for known in schema.LAYOUTS]))
def test_rows_of_any_content_have_answers_that_can_be_sent(seed: int, code: int) -> None:
    """A replayed file, or a board gone wrong, may have anything in its columns."""
    layout, random = schema.layout(code), np.random.default_rng(seed)
    clock = Clock()
    monitor = Monitor(clock)
    for sequence in range(5):
        rows = np.frombuffer(random.bytes(60 * layout.dtype.itemsize), layout.dtype).copy()
        rows[schema.type_column(rows.dtype)] = random.choice([0, 1, 3, 6, 7, 9], len(rows))
        rows["direction"] = random.choice([0, 1, 1, 2], len(rows))
        if code == 1:
            rows["chip_key"][::2] = b"1-2-3"
        clock.now += 0.5
        at = START_NS + sequence * 500_000_000
        totals = [Totals(group, 60 * (sequence + 1), 60 * (sequence + 1), 0, 0, 0) for group in (1, 255)]
        monitor.block(Block(7, "p", 1, sequence, 60 * sequence, 60, code, 0, at, at, 0, totals, []), rows)
    for answer in (monitor.summary(), monitor.packet_rate(), monitor.pixel(1, 2, 3, 4), monitor.packets(text=True)):
        assert len(bytes(packed(answer)))
    for quantity in ("rate", "packets", "mean_adc"):
        assert len(bytes(packed(monitor.pixel_map(quantity))))
