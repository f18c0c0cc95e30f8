"""Summaries of files compared with counts by numpy: whole, sampled, in parts, growing, of other programs, damaged."""

import json

import h5py
import numpy as np
import pytest
from example_counts import examples
from file_builder import (
    CLOCK64,
    NS,
    V1,
    V2,
    V3,
    Feed,
    board,
    count,
    data_rows,
    random_rows,
    run_info,
    timed,
    two_boards,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_data import shared_data

from larpixdaq import schema
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import run_summary
from larpixdaq.hdf5.board_clocks import BoardClocks, Series
from larpixdaq.hdf5.chunk_writer import MOST
from larpixdaq.hdf5.run_summary import run_files, summarise
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream

START = NS / 1e9


@pytest.mark.parametrize("layout", [V1, V2, CLOCK64, V3], ids=lambda layout: layout.name)
def test_counts_are_those_of_the_rows(tmp_path, layout):
    report, rows = write(tmp_path, Feed(layout=layout), [30_000, 17, 12_345])
    summary = summarise(report.path)
    v1 = layout is V1
    assert (summary.rows, summary.rows_read, summary.seen) == (len(rows), len(rows), 1.0)
    assert (summary.run, summary.kind, summary.comment) == (42, "test", "cosmics")
    assert summary.condition == "COMPLETE"
    expected = count(rows)
    assert summary.io_groups["io_group"].tolist() == [1, 2]
    assert summary.io_groups["exact"].all()
    groups = schema.io_groups_of(rows)
    types = schema.types_of(rows)
    data = (types == (1 if layout is V3 else 0)) & (rows["direction"] == 1)
    full = rows["fifo_full"] if v1 else rows["local_fifo"] >> 1
    used = data & (rows["valid_parity"] == 1)
    if layout is V3:
        used &= rows["reset_sample_flag"] == 0
    adc = rows["adc_counts" if v1 else "dataword"]
    for i, line in enumerate(summary.io_groups):
        own = groups == line["io_group"]
        numbers = expected[line["io_group"]]
        assert line["packets"] == line["seen_packets"] == numbers["packets"]
        assert line["seen_bad_parity"] == numbers["bad_parity"]
        assert line["seen_data"] == np.count_nonzero(data & own)
        assert line["seen_local_full"] == np.count_nonzero(full[data & own])
        assert line["seen_sent"] == numbers["sent_rows"]
        assert line["seen_sync"] == np.count_nonzero(own & (types == 6))
        np.testing.assert_array_equal(
            summary.adc[i], np.bincount(adc[used & own], minlength=256 if layout in (V2, CLOCK64) else 1024)
        )
    assert summary.packets.sum() == np.count_nonzero(data)
    chips = np.zeros(len(rows), int)
    chips[data] = schema.chips_of(rows[data])
    channels = rows["channel" if v1 else "channel_id"]
    for chip in range(0, len(summary.chips), 37):
        io_group, io_channel, chip_id = summary.chips[chip].tolist()
        for channel in (0, 5, 63):
            own = data & (chips == (io_group << 16 | io_channel << 8 | chip_id)) & (channels == channel)
            assert summary.packets[chip, channel] == np.count_nonzero(own)
            if (own & used).any():
                assert summary.mean[chip, channel] == pytest.approx(adc[own & used].mean(), rel=1e-5)
                assert summary.std[chip, channel] == pytest.approx(adc[own & used].std(), rel=1e-3, abs=1e-2)


def test_rates_over_time(tmp_path):
    feeds = two_boards()
    file = RunFile(tmp_path, run_info())
    board(file, feeds, 4.0, 5000)
    board(file, feeds, 2.0, 20_000, first_s=6.0)  # after a pause of 2 s
    for feed in feeds.values():
        file.end(feed.end())
    summary = summarise(file.close().path)
    assert (summary.start, summary.end) == (pytest.approx(START), pytest.approx(START + 8.0))
    assert len(summary.edges) == 41  # bins of 0.2 s
    width = float(np.diff(summary.edges)[0])
    np.testing.assert_allclose(summary.rates.sum(axis=0) * width, summary.io_groups["packets"], rtol=1e-6)
    middle = (summary.edges[:-1] + summary.edges[1:]) / 2 - START
    for i, group in enumerate((1, 2)):
        rates = summary.rates[:, i]
        np.testing.assert_allclose(rates[middle < 4], 5000 * group, rtol=0.01)
        np.testing.assert_array_equal(rates[(middle > 4) & (middle < 6)], 0)
        np.testing.assert_allclose(rates[middle > 6], 20_000 * group, rtol=0.01)
    assert summary.channel_rates().sum() == pytest.approx((4 * 5000 + 2 * 20_000) * 3 / 8)


def test_a_sample_is_even_and_says_its_fraction(tmp_path):
    feeds = two_boards()
    file = RunFile(tmp_path, run_info())
    board(file, feeds, 10.0, 30_000)
    board(file, feeds, 2.0, 60_000, first_s=10.0)
    for feed in feeds.values():
        file.end(feed.end())
    path = file.close().path
    whole, sample = summarise(path), summarise(path, rows=200_000)
    assert whole.rows == sample.rows == 1_260_000
    assert sample.rows_read < 0.25 * whole.rows
    assert sample.seen == sample.rows_read / sample.rows
    # The ledger has the exact numbers.
    assert sample.io_groups["exact"].all()
    np.testing.assert_array_equal(sample.io_groups["packets"], whole.io_groups["packets"])
    assert (sample.io_groups["seen_packets"] < whole.io_groups["seen_packets"]).all()
    # Each io_group and each time has its share.
    share = sample.io_groups["seen_packets"] / whole.io_groups["seen_packets"]
    np.testing.assert_allclose(share, sample.seen, rtol=0.25)
    assert len(sample.edges) <= len(whole.edges)
    middle = (sample.edges[:-1] + sample.edges[1:]) / 2 - START
    for i, group in enumerate((1, 2)):
        np.testing.assert_allclose(sample.rates[middle < 9.5, i], 30_000 * group, rtol=0.05)
        np.testing.assert_allclose(sample.rates[middle > 10.5, i], 60_000 * group, rtol=0.05)
    rates = whole.channel_rates()
    np.testing.assert_allclose(sample.channel_rates().sum(), rates.sum(), rtol=1e-9)
    np.testing.assert_allclose(sample.channel_rates(), rates, rtol=0.4)
    again = summarise(path, rows=200_000)
    np.testing.assert_array_equal(again.packets, sample.packets)  # always the same rows


def test_parts_of_a_run(tmp_path):
    feed, rng = Feed(), np.random.default_rng(3)
    first = RunFile(tmp_path, run_info())
    first.add(*timed(*feed.info("Beginning run"), 0, 0.001))
    first.add(*timed(*feed.block(random_rows(rng, 16_384)), 0, 1))
    first.add(*timed(*feed.block(random_rows(rng, 16_000)), 1, 2))
    positions = first.positions()
    one = first.close(continued=True, texts={"next part": "run0000042_20261122T071251Z_001.h5"}).path
    second = RunFile(tmp_path, run_info(), 1, positions)
    second.add(*timed(*feed.block(random_rows(rng, 7000)), 2, 3))
    growing = summarise([one, second.path])
    assert growing.condition == "RUNNING"
    second.end(feed.end())
    two = second.close().path
    assert run_files(two) == [one, two]
    summary = summarise([two, one])
    assert (summary.condition, summary.reasons, summary.notes) == ("COMPLETE", [], [])
    assert [one.name, two.name] == [path.rsplit("/", 1)[1] for path in summary.files]
    assert summary.seconds == pytest.approx(3.0)
    numbers = count(np.concatenate(feed.rows))
    for line in summary.io_groups:
        assert line["packets"] == numbers[line["io_group"]]["packets"]
    # The counts of the ledger are those of the run, and a sample of all parts may use them.
    sample = summarise([one, two], rows=1)
    assert sample.rows_read < sample.rows
    assert sample.io_groups["exact"].all()
    np.testing.assert_array_equal(sample.io_groups["packets"], summary.io_groups["packets"])
    alone = summarise(two, rows=1)
    assert alone.notes == ["only part 1 of the run: others were not given"]
    assert not alone.io_groups["exact"].any() or alone.rows_read == alone.rows
    assert "the run continues in further parts, which were not given" in summarise(one).notes


def test_a_growing_file_is_running(tmp_path):
    file, feed = RunFile(tmp_path, run_info()), Feed()
    rng = np.random.default_rng(3)
    for i in range(MOST + 1):
        file.add(*timed(*feed.block(random_rows(rng, 16_384)), i, i + 1))
    growing = file.path
    summary = summarise(growing)
    assert summary.condition == "RUNNING"
    assert 0 < summary.rows_read == summary.rows < (MOST + 1) * 16_384
    assert summary.losses == []
    file.end(feed.end())
    file.close()
    assert not growing.exists()
    closed = summarise(growing)  # by the name that it had when somebody looked
    assert closed.condition == "COMPLETE"
    assert closed.rows == (MOST + 1) * 16_384


def test_a_part_of_a_dead_writer(tmp_path):
    file, feed = RunFile(tmp_path, run_info()), Feed()
    for i in range(MOST + 1):
        file.add(*timed(*feed.block(random_rows(np.random.default_rng(3), 16_384)), i, i + 1))
    file.abandon()
    summary = summarise(file.path)
    assert summary.condition == "INTERRUPTED"
    assert summary.reasons == [f"{file.path.name}: its storage died: larpixdaq recover finishes it"]
    assert summary.rows_read == summary.rows > 0


def test_copies_of_two_storages_are_not_added_up(tmp_path):
    paths = []
    for storage in ("first", "second"):
        file, feed = RunFile(tmp_path, run_info(storage=storage)), Feed()
        file.set_text("storage", storage)
        file.add(*feed.block(random_rows(np.random.default_rng(3), 100)))
        file.end(feed.end())
        paths.append(file.close().path)
    with pytest.raises(FileError, match="files of the storages first, second, which are copies"):
        summarise(paths)


def test_losses_by_place(tmp_path):
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    rows = random_rows(np.random.default_rng(5), 5000)
    file.add(*feed.block(rows, gaps=[stream.Gap(1, 70, NS, NS + 1)]))
    unknown = [stream.UnknownWord(1, 5, 1, b"0123456789abcdef")]
    dropped = {1: {"dropped": 70, "unknown_words": 3}}
    lost = [stream.LossVerdict(2, "lost", "messages were too large", 9, NS, NS)]
    file.end(feed.end(unknown=unknown, counts=dropped, verdicts=lost))
    summary = summarise(file.close().path)
    found = {(loss.place, loss.io_group): loss.number for loss in summary.losses}
    assert found == {("board and network", 2): 9, ("decoder", 1): 3, ("ring and spool", 1): 70}
    assert summary.unknown_words == {"unknown word type": 1}
    assert any("messages were too large" in line for line in summary.verdicts)
    assert summary.condition == "INCOMPLETE"
    assert summary.reasons


def test_a_run_without_packets(tmp_path):
    file, feed = RunFile(tmp_path, run_info()), Feed()
    file.add(*feed.info("Beginning run"))
    file.end(feed.end())
    summary = summarise(file.close().path)
    assert len(summary.io_groups) == len(summary.chips) == 0
    assert summary.rates.shape == (len(summary.edges) - 1, 0)
    json.dumps(summary.plain(channels=True), allow_nan=False)
    empty = RunFile(tmp_path, run_info(run=43)).close().path
    summary = summarise(empty)
    assert (summary.rows, summary.start, summary.seconds) == (0, None, None)
    json.dumps(summary.plain(channels=True), allow_nan=False)


def test_plain_values_have_a_bounded_number_of_points(tmp_path):
    feeds = two_boards()
    file = RunFile(tmp_path, run_info())
    board(file, feeds, 6.0, 3000)
    for feed in feeds.values():
        file.end(feed.end())
    summary = summarise(file.close().path)
    plain = summary.plain(points=7)
    text = json.dumps(plain, allow_nan=False)
    assert len(text) < 20_000
    assert len(plain["rates"][0]) == len(plain["edges"]) - 1 <= 7
    for line, rates in zip(plain["rates"], summary.rates.T, strict=True):
        widths = np.diff(plain["edges"])
        assert np.dot(line, widths) == pytest.approx(rates.sum() * np.diff(summary.edges)[0], rel=0.01)
    assert all(len(clock["points"]["x"]) <= 7 for clock in plain["clocks"])
    assert sum(plain["chip_packets"]) == sum(line["seen_data"] for line in plain["io_groups"])
    assert "packets" not in plain
    assert np.array_equal(summary.plain(channels=True)["packets"], summary.packets)
    histogram = plain["channel_rates"]
    assert sum(histogram["channels"]) + histogram["silent"] == summary.packets.size


# Files of other programs


def foreign(path, rows, version="2.4"):
    """Write a packet file as larpix-control does."""
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs.update({"version": version, "created": 0.0, "modified": 0.0})
        file.create_dataset("packets", data=rows, maxshape=(None,), chunks=(250,))
    return path


def with_headers(rows, every, seconds):
    """Put a type-4 row before each `every` rows, with these times in turn."""
    out = []
    for i in range(0, len(rows), every):
        header = np.zeros(1, rows.dtype)
        header["io_group"], header["packet_type"] = rows["io_group"][i], 4
        header["timestamp"] = seconds[i // every]
        out += [header, rows[i : i + every]]
    return np.concatenate(out)


def test_a_file_of_larpix_control(tmp_path):
    rows = data_rows(2000, 0, 20)
    rows["direction"] = 0  # as its conversions leave it
    rows = with_headers(rows, 100, [1_700_000_000 + i for i in range(20)])
    summary = summarise(foreign(tmp_path / "module.h5", rows))
    assert not summary.own
    assert (summary.run, summary.condition) == (None, "")
    assert summary.io_groups["packets"].tolist() == [2000]
    assert summary.seconds == 20.0
    np.testing.assert_allclose(summary.rates[:, 0], 100)
    assert summary.packets.sum() == 2000
    assert summary.clocks[0].steps == 1999


def test_columns_are_taken_by_name(tmp_path):
    """Layouts of old versions, and of forks, with columns absent, of other types, or in another order."""
    rows = data_rows(500, 0, 5)
    for names in (("packet_type", "parity", "timestamp"), ("io_group", *rows.dtype.names[1:12])):
        kinds = {"timestamp": "<i8", "dataword": "<f8"}
        dtype = np.dtype([(name, kinds.get(name, rows.dtype[name])) for name in reversed(names)])
        given = np.zeros(len(rows), dtype)
        for name in names:
            given[name] = rows[name]
        summary = summarise(foreign(tmp_path / f"{len(names)}.h5", given, "2.0"))
        assert summary.rows_read == 500
        assert summary.io_groups["seen_packets"].sum() == 500
        assert "500 of the 500 rows read have no known time" in summary.notes
        assert np.isnan(summary.channel_rates()).all()
    assert summary.adc.sum() == 500


def test_recorded_files_of_v1_chips(tmp_path):
    hits = json.loads(shared_data("v1_hits_2018.json").read_text())
    dtype = np.dtype(
        [(name, "u1" if name == "adc_counts" else schema.PACKETS_1_0[name]) for name in schema.PACKETS_1_0.names]
    )
    rows = np.zeros(len(hits), dtype)
    for i, (channel, chip, *_) in enumerate(hits):
        rows["chip_key"][i], rows["chipid"][i] = f"1-1-{chip}".encode(), chip
        rows["channel"][i] = channel
    rows["valid_parity"] = rows["direction"] = 1
    rows["timestamp"] = [hit[6] for hit in hits]
    rows["adc_counts"] = [min(hit[5], 255) for hit in hits]
    rows["chip_key"][7] = b"nonsense"
    summary = summarise(foreign(tmp_path / "2018.h5", rows, "1.0"))
    assert summary.packets.sum() == len(hits) - 1
    assert summary.packets.shape[1] == 128
    assert summary.clocks[0].source == "chips"


def test_a_recorded_pacman_run(tmp_path):
    pytest.importorskip("larpix")
    raw = shared_data("pacman_2020_messages.bin").read_bytes()
    from larpix_control import hdf5format, pacman_msg_format

    messages, place = [], 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "little")
        messages.append(raw[place + 4 : place + 4 + size])
        place += 4 + size
    packets = [packet for message in messages for packet in pacman_msg_format.parse(message, io_group=1)]
    hdf5format.to_file(str(tmp_path / "bern.h5"), packets, version="2.4", workers=1)
    summary = summarise(tmp_path / "bern.h5")
    line = summary.io_groups[0]
    with h5py.File(tmp_path / "bern.h5") as file:
        types = file["packets"]["packet_type"]
        bad = (types <= 3) & (file["packets"]["valid_parity"] == 0)
        received = (types == 0) | ((types <= 3) & (file["packets"]["receipt_timestamp"] > 0))
    assert line["seen_packets"] == np.count_nonzero(received)
    assert line["seen_bad_parity"] == np.count_nonzero(bad & received)
    assert summary.start is not None
    assert 1.6e9 < summary.start < 1.7e9


# Nonsense


def test_nonsense(tmp_path):
    good, _ = write(tmp_path, Feed(), [20_000, 5000])
    content = good.path.read_bytes()
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "text.h5").write_text("run 42")
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["temperature"] = np.arange(5.0)
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset("msgs", (0,), h5py.vlen_dtype("u1"))
    for name in ("empty", "text", "cut", "other", "raw", "absent"):
        with pytest.raises(FileError) as error:
            summarise(tmp_path / f"{name}.h5")
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FileError, match="at least one file"):
        summarise([])
    other, _ = write(tmp_path, Feed(run=43), [10])
    with pytest.raises(FileError, match="files of runs 42, 43: expected those of one run"):
        summarise([good.path, other.path])
    with pytest.raises(FileError, match="given twice"):
        summarise([good.path, good.path])


def test_a_damaged_chunk_is_told_and_the_rest_read(tmp_path):
    report, rows = write(tmp_path, Feed(), [16_384] * 4)
    with h5py.File(report.path) as file:
        chunk = file["packets"].id.get_chunk_info(1)
    content = bytearray(report.path.read_bytes())
    content[chunk.byte_offset + 100 : chunk.byte_offset + 200] = bytes(100)
    report.path.write_bytes(content)
    summary = summarise(report.path)
    assert summary.rows_read == len(rows) - 16_384
    assert [(loss.place, loss.number) for loss in summary.losses] == [("file", 16_384)]
    assert len([note for note in summary.notes if "cannot be read" in note]) == 1


@pytest.mark.parametrize(
    ("column", "value"), [("first_row", 0), ("producer", 9), ("rows", 2**32 - 1), ("first_ns", 2**63 + 5)]
)
def test_impossible_blocks(tmp_path, column, value):
    report, rows = write(tmp_path, Feed(), [5000] * 4)
    with h5py.File(report.path, "r+") as file:
        blocks = file["run/blocks"][:]
        blocks[column][2] = value
        file["run/blocks"][:] = blocks
    summary = summarise(report.path)
    assert summary.rows_read == len(rows)
    assert summary.io_groups["seen_packets"].sum() > 0
    assert np.isfinite(summary.edges).all()
    json.dumps(summary.plain(), allow_nan=False)
    if column != "first_ns":
        assert any("/run/blocks" in note for note in summary.notes)


def test_files_of_a_run(tmp_path):
    report, _ = write(tmp_path, Feed(), [10])
    assert run_files(report.path) == [report.path]
    assert run_files(tmp_path / "module.h5") == [tmp_path / "module.h5"]


# Clocks


def clock_of(rows, bits=31, times=None, pieces=(), **how):
    """Follow the clocks of rows, cut into pieces."""
    clocks = BoardClocks(bits)
    times = np.arange(len(rows)) / 100 if times is None else times
    packets = (schema.types_of(rows) <= 3) & (rows["direction"] == 1)
    for i, own in enumerate(np.split(np.arange(len(rows)), sorted(pieces))):
        clocks.add(rows[own], schema.io_groups_of(rows)[own], packets[own], times[own], i > 0)
    return clocks.result()


def board_rows(ticks, types=0, codes=0):
    """Return rows of a board with these ticks of its clock."""
    rows = np.zeros(len(ticks), schema.PACKETS_2_4)
    rows["io_group"], rows["direction"] = 1, 1
    rows["packet_type"], rows["trigger_type"] = types, codes
    words = rows["packet_type"] >= 6
    rows["timestamp"] = np.where(words, ticks, 0)
    rows["receipt_timestamp"] = np.where(words, 0, ticks)
    return rows


def test_backward_steps_rollovers_and_pauses():
    ticks = np.array([10, 20, 15, 30_000_030, 30_000_045]) + (1 << 32) - 30_000_050
    ticks = np.concatenate((ticks, [3, (1 << 32) - 1, 8]))
    (clock,) = clock_of(board_rows(ticks))
    assert (clock.steps, clock.backward, clock.largest_backward) == (7, 2, 5)
    assert (clock.rollovers, clock.resets) == (1, 0)
    assert clock.largest_gap == 30_000_015
    assert clock.histogram.sum() == 5


def test_resets_each_second():
    seconds = [np.arange(500, 10_000_000, 50_000) for _ in range(5)]
    ticks = np.concatenate(seconds)
    ticks[[199, 200]] = ticks[[200, 199]]  # a late row: 9,950,500 after 500
    rows = board_rows(ticks)
    resets = np.repeat(board_rows(np.array([10_000_000]), 6, 83), 4)
    rows = np.insert(rows, [200, 400, 600, 800], resets)
    (clock,) = clock_of(rows, times=np.arange(len(rows)) / 200)
    assert (clock.resets, clock.rollovers) == (4, 0)
    assert clock.period == 1.0
    words = clock.sync[83]
    assert (words.words, words.intervals.low, words.intervals.high, words.intervals.mean) == (4, 1.0, 1.0, 1.0)


def test_heartbeats():
    ticks = np.array([100_000_000, 200_000_000, 205_000_000, 300_000_100, (400_000_000) % (1 << 32)])
    rows = board_rows(ticks, [6, 6, 0, 6, 6], [72, 72, 0, 72, 72])
    (clock,) = clock_of(rows)
    words = clock.sync[72]
    assert (words.words, words.intervals.count) == (4, 3)
    assert words.intervals.high == pytest.approx(10.00001)
    # A heartbeat before rows that were not read gives no interval.
    clocks = BoardClocks(31)
    for part in (rows[:2], rows[3:]):
        clocks.add(part, schema.io_groups_of(part), schema.types_of(part) < 4, np.zeros(len(part)), False)
    assert clocks.result()[0].sync[72].intervals.count == 2


def test_offset_between_boards(tmp_path):
    file = RunFile(tmp_path, run_info())
    feeds = two_boards()
    for piece in range(200):
        begin = piece * 0.02
        for group, feed in feeds.items():
            rows = data_rows(100, begin, begin + 0.02, io_group=group, offset=(0, 0, 25_000)[group])
            file.add(*timed(*feed.block(rows), begin + 0.001, begin + 0.021))
    for feed in feeds.values():
        file.end(feed.end())
    first, second = summarise(file.close().path).clocks
    assert first.offset is not None
    assert second.offset is not None
    assert second.offset - first.offset == pytest.approx(0.0025, abs=1e-4)
    assert second.offset_error < 0.001


def test_boards_without_receipt_times_have_the_chips_clocks():
    rows = data_rows(1000, 0, 1)
    rows["receipt_timestamp"] = 0
    (clock,) = clock_of(rows)
    assert (clock.source, clock.steps, clock.offset) == ("chips", 999, None)


@settings(max_examples=examples(60))
@given(
    st.lists(st.tuples(st.integers(1, 2**32 - 1), st.sampled_from([0, 0, 0, 6, 7]), st.sampled_from([83, 72, 67, 1]))),
    st.sets(st.integers(0, 40)),
)
def test_clocks_do_not_depend_on_how_rows_are_cut(values, cuts):
    rows = board_rows(*(np.array([value[i] for value in values], np.int64) for i in range(3)))
    whole, cut = clock_of(rows), clock_of(rows, pieces=[place for place in cuts if place < len(rows)])
    assert len(whole) == len(cut)
    for one, other in zip(whole, cut, strict=True):
        # A row after a reset at the very edge is the only one whose neighbours are not known.
        assert (one.steps, one.rollovers) == (other.steps, other.rollovers)
        assert {code: (w.words, w.intervals.count) for code, w in one.sync.items()} == {
            code: (w.words, w.intervals.count) for code, w in other.sync.items()
        }


@given(st.lists(st.integers(1, 3000), max_size=30))
def test_series_keep_an_even_choice(sizes):
    series, x = Series(), 0
    for size in sizes:
        series.add(np.arange(x, x + size), np.arange(x, x + size))
        x += size
    kept, y = series.points()
    assert len(kept) <= 4096
    assert np.array_equal(kept, y)
    assert series.count == x
    if x > 1:
        assert len(np.unique(np.diff(kept))) <= 1
        assert (series.low, series.high, series.mean) == (0, x - 1, (x - 1) / 2)


def test_no_more_rows_than_asked_for(tmp_path, monkeypatch):
    report, rows = write(tmp_path, Feed(), [16_000] * 6)
    monkeypatch.setattr(run_summary, "_CHUNK_COST", 0)
    for most in (1, 17_000, 50_000, len(rows)):
        summary = summarise(report.path, rows=most)
        assert 0 < summary.rows_read <= max(most, 16_384) + 16_384
        assert summary.rows == len(rows)
        json.dumps(summary.plain(), allow_nan=False)
