"""PacketCounters, compared with a slow count of the same rows in Python."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.monitor_counters import CHIPS, PacketCounters

LAYOUTS = {layout.name: layout for layout in schema.LAYOUTS}


def random_rows(layout: schema.RowLayout, n: int, seed: int, impossible: bool = True) -> NDArray[Any]:
    """Return rows of a few chips and all types, some with impossible types, directions, channels, values and keys."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(n, layout.dtype)
    edge = int(impossible)
    types = rng.choice(8 + edge, n, p=None if n == 0 else np.array([6, 3] + [1] * (6 + edge)) / (15 + edge))
    direction = rng.choice(2 + edge, n, p=np.array([2, 7, 1][: 2 + edge]) / (9 + edge))
    group, channel, chip = rng.integers(0, 3, n), rng.choice([0, 9, 10, 255], n), rng.choice([1, 2, 100, 255], n)
    rows["valid_parity"] = rng.random(n) < 0.8
    rows["direction"] = direction
    if layout.name == "1.0":
        keys = [b"%d-%d-%d" % key for key in zip(group, channel, chip, strict=True)]
        if impossible:
            bad = [b"", b"-", b"1", b"256-1-1", b"1-256-1", b"1-2", b"0001-1-1", b"a-1-1", b"1--1", b"1-\xff-1"]
            keys = [rng.choice(bad) if rng.random() < 0.1 else key for key in keys]
        rows["chip_key"] = keys
        rows["type"], rows["chipid"] = types, chip
        rows["channel"] = rng.integers(0, 128 + 2 * edge, n)
        rows["adc_counts"] = rng.choice([0, 1, 500, 1023, 1023 + edge, 65535 if edge else 0], n)
        rows["fifo_half"], rows["fifo_full"] = rng.integers(0, 2, n), rng.integers(0, 2, n)
        return rows
    rows["io_group"], rows["io_channel"], rows["chip_id"] = group, channel, chip
    rows["packet_type"] = types
    rows["channel_id"] = rng.integers(0, 64 + 2 * edge, n)
    rows["local_fifo"], rows["shared_fifo"] = rng.choice([0, 0, 1, 3], n), rng.choice([0, 0, 1, 3], n)
    rows["dataword"] = rng.integers(0, 256, n)
    if layout.name == "3.0":
        rows["dataword"] = rng.choice([0, 1, 500, 1023, 1023 + edge], n)
        rows["reset_sample_flag"] = rng.random(n) < 0.2
    return rows


def key_of(row: Any, layout: schema.RowLayout) -> tuple[int, int] | None:
    """Return (io_group, io_channel) of a row; None for a wrong chip_key of v1."""
    if layout.name != "1.0":
        return int(row["io_group"]), int(row["io_channel"])
    parts = row["chip_key"].split(b"-")
    if len(parts) < 3 or any(not 1 <= len(part) <= 3 or not part.isdigit() or int(part) > 255 for part in parts[:2]):
        return None
    return int(parts[0]), int(parts[1])


class Reference:
    """Slow count of rows."""

    def __init__(self, layout: schema.RowLayout, rows: NDArray[Any]) -> None:
        self.types: Counter[Any] = Counter()
        self.channels: Counter[Any] = Counter()
        self.chips: Counter[Any] = Counter()
        self.adc: Counter[Any] = Counter()
        self.unplaced = 0
        v1, v3 = layout.name == "1.0", layout.name == "3.0"
        for row in rows:
            kind, key = int(row["type" if v1 else "packet_type"]), key_of(row, layout)
            direction = int(row["direction"])
            if kind > 7 or direction > 1 or (kind < 4 and key is None):
                self.unplaced += 1
                continue
            self.types[key[0] if key else 0, direction, kind] += 1
            if kind > 3 or direction == 0:
                continue
            assert key is not None
            chip = (*key, int(row["chipid" if v1 else "chip_id"]))
            channel, adc = int(row["channel" if v1 else "channel_id"]), int(row["adc_counts" if v1 else "dataword"])
            if channel >= (128 if v1 else 64) or adc >= (1024 if v1 or v3 else 256):
                self.unplaced += 1
                continue
            data = kind == (1 if v3 else 0)
            self.channels[(*chip, channel)] += 1
            self.chips[chip, "packets"] += 1
            self.chips[chip, "data"] += data
            self.chips[chip, "bad_parity"] += not row["valid_parity"]
            local = row["fifo_half"] + 2 * row["fifo_full"] if v1 else int(row["local_fifo"])
            for name, value in (("local", local), ("shared", 0 if v1 else int(row["shared_fifo"]))):
                self.chips[chip, f"{name}_half"] += data and value & 1
                self.chips[chip, f"{name}_full"] += data and value >> 1
            if data and row["valid_parity"] and not (v3 and row["reset_sample_flag"]):
                self.adc[(*chip, channel), adc] += 1

    def histogram(self, bins: int, *wanted: int) -> NDArray[np.uint64]:
        counts = np.zeros(bins, np.uint64)
        for (key, adc), n in self.adc.items():
            if all(want in (-1, value) for want, value in zip(wanted, key, strict=True)):
                counts[adc] += np.uint64(n)
        return counts


def check(counters: PacketCounters, layout: schema.RowLayout, rows: NDArray[Any]) -> None:
    reference = Reference(layout, rows)
    assert counters.rows == len(rows)
    assert counters.unplaced == reference.unplaced
    types = counters.types()
    assert {tuple(at): int(types[tuple(at)]) for at in np.argwhere(types).tolist()} == dict(reference.types)
    chips, channels = counters.chips(), counters.channels()
    assert chips.dtype == CHIPS
    keys = [tuple(int(chip[name]) for name in ("io_group", "io_channel", "chip_id")) for chip in chips]
    assert len(set(keys)) == len(keys)
    counted = {(key, name): int(chip[name]) for key, chip in zip(keys, chips, strict=True) for name in CHIPS.names[3:]}
    assert counted == {
        (key, name): reference.chips[key, name] for key in {k for k, _ in reference.chips} for name in CHIPS.names[3:]
    }
    seen = {(*keys[i], j): int(channels[i, j]) for i, j in np.argwhere(channels).tolist()}
    assert seen == dict(reference.channels)
    data = counters.data()
    assert data.shape == channels.shape
    assert data.sum(axis=1).tolist() == chips["data"].tolist()
    np.testing.assert_array_equal(data + counters.others(), channels)
    assert [tuple(key) for key in counters.keys().tolist()] == keys
    assert counters.sync_rows == sum(n for (_, _, kind), n in reference.types.items() if kind == 6)
    flags = np.zeros((256, 5), np.uint64)
    for key, chip in zip(keys, chips, strict=True):
        flags[key[0]] += [chip[name] for name in CHIPS.names[5:]]
    np.testing.assert_array_equal(counters.flags(), flags)
    codes, numbers = counters.rates(data[: len(data) // 2], np.full(256, 2.0), 10.0, 50.0)
    since = data.astype(float)
    since[: len(data) // 2] = 0
    want = np.where(since > 0, 10.0 * (1 + np.log2(np.maximum(since, 1))) + 50.0, 0).astype(int)
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(numbers, np.bincount(want[data > 0], minlength=256))
    means = counters.mean_adc()
    step = counters.bins // 256
    for i, j in np.ndindex(means.shape):
        entries = {adc: n for (where, adc), n in reference.adc.items() if where == (*keys[i], j)}
        mean = sum(adc * n for adc, n in entries.items()) / sum(entries.values()) if entries else 0
        assert means[i, j] == (min(max(int(mean / step + 0.5), 1), 255) if entries else 0)
    for wanted in ((-1, -1, -1, -1), (1, -1, -1, -1), (1, 9, -1, -1), (-1, 9, 2, -1), (1, 9, 2, 7), (-1, -1, -1, 0)):
        counts, merged = counters.histogram(*wanted)
        assert merged == 0
        np.testing.assert_array_equal(counts, reference.histogram(counters.bins, *wanted))


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=examples(25))
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 300), max_size=4), reset=st.booleans())
def test_counts_equal_a_slow_count(name: str, seed: int, sizes: list[int], reset: bool) -> None:
    layout = LAYOUTS[name]
    rows = random_rows(layout, sum(sizes), seed)
    counters = PacketCounters()
    for attempt in range(1 + reset):
        if attempt:
            counters.reset()
        start = 0
        for size in sizes:
            counters.count(rows[start : start + size])
            start += size
        if counters.bins:
            check(counters, layout, rows)


def test_every_chip_and_channel_of_a_detector_has_its_own_count() -> None:
    layout = schema.LAYOUTS[1]
    rows = np.zeros(4 * 40 * 100 * 4, layout.dtype)
    rows["io_group"], rows["io_channel"], rows["chip_id"], rows["channel_id"] = (
        part.reshape(-1)
        for part in np.meshgrid([0, 1, 8, 255], np.arange(1, 41), np.arange(11, 111), [0, 1, 62, 63], indexing="ij")
    )
    rows["direction"] = rows["valid_parity"] = 1
    counters = PacketCounters()
    for _ in range(3):
        counters.count(np.random.default_rng(1).permutation(rows))
    chips, channels = counters.chips(), counters.channels()
    assert len(chips) == 4 * 40 * 100
    assert (chips["packets"] == 12).all()
    assert channels[:, [0, 1, 62, 63]].tolist() == [[3, 3, 3, 3]] * len(chips)
    assert channels.sum() == 3 * len(rows)
    counters.reset()
    assert counters.rows == counters.bins == len(counters.chips()) == counters.types().sum() == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_beyond_the_memory_limit_share_a_histogram(name: str) -> None:
    layout = LAYOUTS[name]
    rows = random_rows(layout, 500, 3, impossible=False)
    limited, free = PacketCounters(8192), PacketCounters()
    limited.count(rows)
    free.count(rows)
    own = 8192 // (4 * free.bins)
    total, merged = limited.histogram()
    np.testing.assert_array_equal(total, free.histogram()[0])
    assert merged == 0
    reference = Reference(layout, rows)
    by_channel = [limited.histogram(*key) for key in {key for key, _ in reference.adc}]
    assert sum(merged for _, merged in by_channel) == len(by_channel) - own
    assert sum(counts.any() for counts, _ in by_channel) == own
    np.testing.assert_array_equal(limited.channels(), free.channels())


def test_wrong_rows_raise_an_error() -> None:
    counters = PacketCounters()
    with pytest.raises(ValueError, match="rows of 8 bytes: no layout has them"):
        counters.count(np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        counters.count(np.zeros(3, np.dtype([("a", "<u4"), *((f"b{i}", "u1") for i in range(32))])))
    with pytest.raises(ValueError, match="ndarray is not C-contiguous"):
        counters.count(np.zeros(6, schema.PACKETS_2_4)[::2])
    with pytest.raises(TypeError):
        counters.count([1, 2, 3])  # type: ignore[arg-type]
    counters.count(np.zeros(3, schema.PACKETS_2_4))
    counters.count(np.zeros(3, schema.PACKETS_2_4_CLOCK64))
    with pytest.raises(ValueError, match="128 channels and 1024 ADC values, counted so far: 64 and 256"):
        counters.count(np.zeros(3, schema.PACKETS_1_0))
    assert counters.rows == 6
    none = np.zeros((0, 0), np.uint32)
    with pytest.raises(ValueError, match="per_packet: expected 256 io_groups, found 255"):
        counters.rates(none, np.zeros(255), 1.0, 0.0)
    for before in (np.zeros((1, 63), np.uint32), np.zeros((5, 64), np.uint32)):
        with pytest.raises(ValueError, match="before: expected at most 0 chips with 64 channels, found"):
            counters.rates(before, np.zeros(256), 1.0, 0.0)
    assert counters.rates(none, np.zeros(256), 1.0, 0.0)[0].shape == (0, 64)
    counters.reset()
    counters.count(np.zeros(3, schema.PACKETS_3_0))
    assert counters.bins == 1024
    with pytest.raises(ValueError, match="histogram_bytes"):
        PacketCounters(-1)


def test_rows_may_be_read_only() -> None:
    rows = np.frombuffer(random_rows(LAYOUTS["2.4"], 100, 0).tobytes(), schema.PACKETS_2_4)
    counters = PacketCounters()
    counters.count(rows)
    check(counters, LAYOUTS["2.4"], rows)


def test_a_second_thread_is_rejected_while_the_first_counts() -> None:
    counters = PacketCounters()
    rows = np.zeros(2_000_000, schema.PACKETS_2_4)
    counters.count(rows[:1])
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counters.count(rows)

    def look() -> None:
        while not stop.is_set():
            counters.chips()

    # The counting thread releases the GIL for milliseconds, so this thread meets it within a few attempts.
    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="another thread is counting"):
            look()
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
