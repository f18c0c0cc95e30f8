"""The writer of files: content, durability, names; files are read by plain h5py, larpix-control and h5dump."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from time import monotonic

import file_builder
import h5py
import msgspec
import numpy as np
import pytest
from example_counts import examples
from file_builder import CLOCK64, NS, V1, V2, V3, Feed, random_rows, run_info, words_to_rows, write
from file_builder import packed_rows as packed
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import until, wait_for_line

from larpixdaq import constants, schema
from larpixdaq._native import hdf5_chunks
from larpixdaq.errors import ChecksumError, FileError, ProtocolError
from larpixdaq.hdf5 import chunk_writer, layout, names, writer
from larpixdaq.hdf5.journal import read as read_journal
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recovery import recover
from larpixdaq.hdf5.run_report import file_info, positions
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import CHECKED_CHUNKS, WAIT, RunFile
from larpixdaq.protocol import stream

NAME = "run0000042_20261122T071251Z"
#: Rows of a full batch in these tests.
BATCH_ROWS = chunk_writer.LEAST * schema.CHUNK_ROWS


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_writer, "MOST", chunk_writer.LEAST)
        yield


POOL = {row_layout: random_rows(np.random.default_rng(3), 40_000, row_layout) for row_layout in schema.LAYOUTS}


steps = st.lists(
    st.one_of(
        st.integers(0, 30),
        st.integers(10_000, constants.BLOCK_ROWS),
        st.just(constants.BLOCK_ROWS),
        st.just("work"),
        st.text(st.characters(codec="utf-8"), max_size=150),
    ),
    max_size=20,
)


@settings(max_examples=examples(20))
@given(steps=steps, code=st.sampled_from([1, 2, 2, 3, 4]), most=st.sampled_from([4, 6, 12]), threads=st.integers(1, 2))
def test_any_blocks_and_any_journal_timing_give_the_same_file(tmp_path_factory, steps, code, most, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_writer, "MOST", most)
        write_steps(tmp_path_factory.mktemp("run"), steps, schema.layout(code), threads)


def write_steps(directory, steps, row_layout, threads):
    feed = Feed(layout=row_layout)
    file = RunFile(directory, run_info(row_layout), threads=threads)
    expected, texts, counters = [], [], []
    for step in steps:
        if step == "work":
            file.work(pressed=True)
            assert (file.due() or math.inf) > monotonic() + WAIT  # due for readers, at most
            assert file.durable.get(feed.origin, 0) == feed.sequence
        elif isinstance(step, str):
            file.add(*feed.info(step))
            counters.append(len(texts))
            row = feed.rows[-1].copy()
            row["counter"] = len(texts) + np.arange(len(row))
            expected.append(row)
            texts += stream.text_pieces(step, 64)
        else:
            start = (feed.first_packet * 7) % 20_000
            borrowed = POOL[row_layout][start : start + step].copy()
            block, given = feed.block(borrowed.copy())
            if step == schema.CHUNK_ROWS:
                file.add(block, None, packed(borrowed, row_layout))
            else:
                file.add(block, given)
            expected.append(borrowed)
            given = feed.rows[-1]
            given.view(np.uint8)[:] = 0xFF  # the sender uses the payload again
            feed.rows[-1] = borrowed
        assert file.rows == feed.first_packet
    file.end(feed.end())
    report = file.close()
    assert (report.condition, report.reasons, report.rows) == ("COMPLETE", [], feed.first_packet)
    assert file.durable[feed.origin] == feed.sequence + 1 if feed.sequence else True
    everything = np.concatenate([*expected, np.zeros(0, row_layout.dtype)])
    with h5py.File(report.path) as plain:
        assert np.array_equal(plain["packets"][:], everything)
        assert plain["messages"]["message"].tolist() == [text.rstrip(b"\0") for text in texts]
        assert plain["messages"]["index"].tolist() == list(range(len(texts)))
        table = plain["run/blocks"][:]
    assert table["sequence"].tolist() == list(range(feed.sequence))
    assert [zlib.crc32(rows.tobytes()) for rows in expected] == table["crc32"].tolist()
    checked = verify(report.path)
    assert checked.findings == []
    assert list(directory.iterdir()) == [report.path]


@pytest.mark.parametrize("journal", [False, True])
def test_a_packed_block_that_fills_a_chunk_is_written_as_it_came_unless_the_journal_needs_its_rows(tmp_path, journal):
    """In each place of a batch. Of CHECKED_CHUNKS blocks one is packed anew, and each that is unpacked for the journal,
    which does not get those that fill a batch."""
    rng = np.random.default_rng(5)
    feed = Feed()
    file = RunFile(tmp_path, run_info(V2))
    file.add(*feed.block(random_rows(rng, 5)))
    came = {}
    for size in (schema.CHUNK_ROWS, schema.CHUNK_ROWS - 5, *[schema.CHUNK_ROWS] * (CHECKED_CHUNKS + 2), 300):
        first, rows = feed.first_packet, random_rows(rng, size)
        came[first] = packed(rows)
        file.add(feed.block(rows)[0], None, came[first])
        if journal:
            file.work(pressed=True)
            assert file.durable[feed.origin] == feed.sequence
    if journal:  # the process dies: everything is in part and journal
        file.abandon()
        path = recover(file.path).path
    else:
        file.end(feed.end())
        report = file.close()
        path = report.path
    with h5py.File(path) as plain:
        starts = range(0, feed.first_packet, schema.CHUNK_ROWS)
        written = [plain["packets"].id.read_direct_chunk((first,))[1] for first in starts]
        assert np.array_equal(plain["packets"][:], np.concatenate(feed.rows))
    unchanged = [first in came and chunk == came[first].data for first, chunk in zip(starts, written, strict=True)]
    expected = [False] * 2 + [True] * (CHECKED_CHUNKS - 1) + [False, True, True, False]
    if journal:
        assert not any(
            was and (first + schema.CHUNK_ROWS) % BATCH_ROWS for first, was in zip(starts, unchanged, strict=True)
        )
        return
    assert unchanged == expected
    assert report.unread == sum(expected)
    found = verify(path)
    assert found.ok
    assert f"{report.unread} chunks came packed, and had not been unpacked when it was closed" in found.notes


def test_a_chunk_that_readers_have_seen_as_it_came_stays_unread(tmp_path, monkeypatch):
    """The journal needs its rows after it was written for readers of the growing file."""
    monkeypatch.setattr(writer, "SHOW_INTERVAL", 0.0)
    rng, feed = np.random.default_rng(6), Feed()
    file = RunFile(tmp_path, run_info(V2))
    for _ in range(3):
        rows = random_rows(rng, schema.CHUNK_ROWS)
        file.add(feed.block(rows)[0], None, packed(rows))
    file._show()
    file.work(pressed=True)
    assert file.durable[feed.origin] == 3
    file.end(feed.end())
    report = file.close()
    assert report.unread == 2
    assert verify(report.path).ok


@pytest.mark.parametrize("content", ["no rows", "other rows"])
def test_damaged_packed_rows_are_never_acknowledged(tmp_path, content):
    rng = np.random.default_rng(6)
    feed = Feed()
    file = RunFile(tmp_path, run_info(V2))
    rows = random_rows(rng, schema.CHUNK_ROWS)
    right = packed(rows)
    other = packed(random_rows(rng, schema.CHUNK_ROWS))
    block, _ = feed.block(rows)
    for wrong in (right._replace(data=other.data, crc32=other.crc32), right._replace(tally=other.tally + np.uint64(1))):
        with pytest.raises(ChecksumError):  # the first chunk is unpacked
            file.add(block, None, wrong)
    file.add(block, None, right)
    rows = random_rows(rng, schema.CHUNK_ROWS)
    right = packed(rows)
    block, _ = feed.block(rows)
    with pytest.raises(ChecksumError, match="packed rows are not those that were sent"):
        file.add(block, None, right._replace(data=other.data))
    with pytest.raises(ChecksumError, match="when it was packed"):  # the rows had been overwritten in the ring
        file.add(block, None, other)
    file.add(block, None, right)
    file.work(pressed=True)
    assert file.durable[feed.origin] == 2
    # Checksums that are right although the packed rows are not those of the block: the part ends, without a word for
    # them. In the journal they would make recovery fail.
    block, _ = feed.block(random_rows(rng, schema.CHUNK_ROWS))
    data = memoryview(bytes(1000)) if content == "no rows" else other.data
    wrong = right._replace(data=data, crc32=zlib.crc32(data), rows_crc32=block.crc32)
    file.add(block, None, wrong)
    with pytest.raises(FileError, match="packed rows: Error" if content == "no rows" else "expected CRC-32"):
        file.work(pressed=True)
    assert file.damaged_by == feed.origin.producer
    assert file.durable[feed.origin] == 2
    file.give_up()
    report = recover(file.path)
    assert report.rows == 2 * schema.CHUNK_ROWS


def test_a_packed_chunk_with_configurations_and_no_text_is_refused_and_the_part_goes_on(tmp_path):
    rng = np.random.default_rng(8)
    feed = Feed()
    file = RunFile(tmp_path, run_info(V2))
    for number in range(4):
        rows = random_rows(rng, schema.CHUNK_ROWS)
        block, _ = feed.block(rows)
        wrong = msgspec.structs.replace(block, configs=stream.Configs("2", bytes(3), b"nonsense"))
        with pytest.raises(ProtocolError, match=f"block {number} .*configurations belong to a text"):
            file.add(wrong, None, packed(rows))
        file.add(block, None, packed(rows))
    file.end(feed.end())
    assert file.close().condition == "COMPLETE"


def test_plain_h5py_reads_every_layout(tmp_path):
    for number, row_layout in enumerate(schema.LAYOUTS, 1):
        report, given = write(tmp_path, Feed(number, layout=row_layout), [5, 100])
        with h5py.File(report.path) as plain:
            packets = plain["packets"]
            assert packets.dtype == row_layout.dtype
            assert packets.chunks == (schema.CHUNK_ROWS,)
            assert packets.shuffle
            assert packets.compression == "gzip"
            assert packets.maxshape == (None,)
            assert plain["_header"].attrs["version"] == row_layout.version
            assert plain["_header"].attrs["modified"] >= plain["_header"].attrs["created"]
            assert plain["configs"].attrs["asic_version"] == run_info(row_layout).asic_version
            assert np.array_equal(packets[1:-1], given[1:-1])
            assert [packets[0]["counter"], packets[-1]["counter"]] == [0, 1]
            assert plain["messages"]["message"].tolist() == [b"Beginning run", b"Ending run"]
            assert plain["run/info"]["condition"][0] == b"COMPLETE"


def test_larpix_control_reads_2_4_packet_by_packet(tmp_path):
    from larpix import packet as lc
    from larpix.format import hdf5format

    feed = Feed()
    words = np.random.default_rng(5).integers(0, 1 << 63, 400, dtype=np.uint64)
    rows = words_to_rows(words, V2, 3)
    others = random_rows(np.random.default_rng(6), 200)
    others = others[others["packet_type"] > 3]
    file = RunFile(tmp_path, run_info())
    file.add(*feed.info("Beginning run"))
    file.add(*feed.block(rows))
    file.add(*feed.block(others))
    file.end(feed.end())
    path = file.close().path
    read = hdf5format.from_file(str(path), load_configs=True)
    assert (read["version"], read["configs"]) == ("2.4", [])
    message, *packets = read["packets"]
    assert isinstance(message, lc.MessagePacket)
    assert (message.message, message.timestamp) == ("Beginning run", 1_795_331_571)
    assert len(packets) == len(rows) + len(others)
    for word, row, packet in zip(words.tolist(), rows, packets, strict=False):
        assert (packet.io_group, packet.io_channel, packet.direction) == (3, 17, 1)
        # from_file fills only what the packet type uses, so the other bits are not compared.
        assert packet.packet_type == word & 3
        assert packet.chip_id == word >> 2 & 0xFF
        if word & 3 == 0:
            names = ("channel_id", "timestamp", "dataword", "trigger_type", "local_fifo", "shared_fifo", "first_packet")
            assert all(getattr(packet, name) == row[name] for name in names)
            assert packet.bytes() == (word.to_bytes(8, "little"))
        elif word & 3 > 1:
            assert packet.register_address == word >> 10 & 0xFF
            assert packet.register_data == word >> 18 & 0xFF
    kinds = {4: lc.TimestampPacket, 6: lc.SyncPacket, 7: lc.TriggerPacket}
    for row, packet in zip(others, packets[len(rows) :], strict=True):
        assert isinstance(packet, kinds[row["packet_type"]])
        assert packet.timestamp == row["timestamp"]


def test_larpix_control_reads_1_0(tmp_path):
    from larpix.format import hdf5format

    feed = Feed(layout=V1)
    words = np.random.default_rng(5).integers(0, 1 << 54, 300, dtype=np.uint64)
    rows = words_to_rows(words, V1, 1)
    file = RunFile(tmp_path, run_info(V1))
    file.add(*feed.info("Beginning run"))
    file.add(*feed.block(rows))
    file.end(feed.end())
    message, *packets = hdf5format.from_file(str(file.close().path))["packets"]
    assert message.message == "Beginning run"
    assert len(packets) == len(words)
    for word, packet in zip(words.tolist(), packets, strict=True):
        assert int(packet.packet_type.to01(), 2) == word & 3
        assert packet.chipid == word >> 2 & 0xFF
        if word & 3 == 0:
            assert packet.timestamp == word >> 17 & 0xFFFFFF
            assert packet.dataword == word >> 41 & 0x3FE  # its getter clears the lowest bit


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not on PATH (package hdf5-tools)")
def test_h5dump_reads_it(tmp_path):
    report, given = write(tmp_path, Feed(), [300, 70_000 - constants.BLOCK_ROWS * 4, *[constants.BLOCK_ROWS] * 4])
    command = ["h5dump", "-d", "/packets", "-s", "65530", "-c", "20", "-y", "-w", "0", str(report.path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    expected = [int(value) for row in given[65530:65550] for value in row.tolist()]
    assert [int(n) for n in re.findall(r"\d+", text.split("DATA {")[1])][: len(expected)] == expected
    subprocess.run(["h5dump", "-o", "/dev/null", str(report.path)], check=True, capture_output=True, timeout=60)


READER = """
import sys, zlib
from larpixdaq.hdf5.reader import DataFile
with DataFile(sys.argv[1]) as file:
    print("open", flush=True)
    for line in sys.stdin:
        file.refresh()
        good = [zlib.crc32(file.packets(b["first_row"], b["first_row"] + b["rows"]).tobytes()) == b["crc32"]
                for b in file.table("run/blocks")]
        print(file.rows, len(good), all(good), file.run_info()["condition"], flush=True)
"""


def test_a_growing_file_can_be_read(tmp_path):
    feed = Feed()
    rng = np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, file.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    try:
        assert wait_for_line(reader) == "open"  # before any row is there
        for _ in range(3):
            for _ in range(5):
                file.add(*feed.block(random_rows(rng, 15_000)))
            reader.stdin.write(b"\n")
            rows, complete, good, condition = wait_for_line(reader).split()
            assert int(rows) == file.rows // BATCH_ROWS * BATCH_ROWS
            assert int(complete) == int(rows) // 15_000
            assert (good, condition) == ("True", "RUNNING")
            with DataFile(file.path) as growing:
                assert growing.rows == int(rows)
    finally:
        reader.stdin.close()
        reader.wait(20)
        reader.stdout.close()
    assert verify(file.path).findings[0].startswith("condition RUNNING")
    file.end(feed.end())
    assert file.close().condition == "COMPLETE"


PLAIN_READER = """
import sys, zlib, h5py
with h5py.File(sys.argv[1], swmr=True) as file:
    packets, messages = file["packets"], file["messages"]
    for line in sys.stdin:
        packets.refresh()
        messages.refresh()
        rows = packets[:]
        named = rows["counter"][rows["packet_type"] == 5]
        print(len(rows), zlib.crc32(rows.tobytes()), len(named) == 0 or named.max() < len(messages), flush=True)
"""


def test_rows_can_be_read_within_five_seconds_at_any_rate(tmp_path, monkeypatch):
    """Plain h5py reads them in another process; a recovery finds the same rows."""
    clock = 1000.0
    monkeypatch.setattr(writer, "monotonic", lambda: clock)
    feed, pool = Feed(), random_rows(np.random.default_rng(1), 16_000)
    file = RunFile(tmp_path, run_info())
    reader = subprocess.Popen(
        [sys.executable, "-c", PLAIN_READER, file.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    forms = set()
    try:
        file.add(*feed.info("Beginning run, " * 10))
        for size in (1, *[300] * 70, *[6000] * 9, 16_000, 16_000, 5):
            file.add(*feed.block(pool[:size].copy()))
            assert file.due() is not None
            clock += 4.5
            file.work()
            file.work()
            assert file.due() is None
            reader.stdin.write(b"\n")
            rows, crc, named = wait_for_line(reader).split()
            given = np.concatenate(feed.rows)
            given["counter"][given["packet_type"] == 5] = np.arange(3)
            assert (int(rows), int(crc), named) == (len(given), zlib.crc32(given.tobytes()), "True")
            packets = file._file["packets"].id
            forms.add(packets.get_chunk_info(packets.get_num_chunks() - 1).filter_mask)
    finally:
        reader.stdin.close()
        reader.wait(20)
        reader.stdout.close()
    assert forms == {0, 0b11}
    (tmp_path / "killed").mkdir()
    for path in tmp_path.glob("*.h5.*"):
        (tmp_path / "killed" / path.name).write_bytes(path.read_bytes())
    found = recover(tmp_path / "killed" / file.path.name)
    assert (found.rows, found.cut) == (len(given), 0)
    file.end(feed.end())
    for path in (found.path, file.close().path):
        assert verify(path).rows == len(given)
        with h5py.File(path) as plain:
            assert np.array_equal(plain["packets"][:], given)
            kept = [plain["packets"].id.get_chunk_info(i) for i in range(plain["packets"].id.get_num_chunks())]
        assert {chunk.filter_mask for chunk in kept} == {0}
        # Old places of rewritten chunks take at most 41 bytes a row.
        assert path.stat().st_size < sum(chunk.size for chunk in kept) + 41 * len(given) + 200_000


WRITER = """
import sys, numpy as np
from pathlib import Path
from file_builder import Feed, random_rows, run_info
from larpixdaq.hdf5.writer import RunFile
feed = Feed()
pool = random_rows(np.random.default_rng(1), 20_000)
file = RunFile(Path(sys.argv[1]), run_info())
while True:
    file.add(*feed.block(pool[: 1 + 977 * feed.sequence % 9000].copy()))
    feed.rows.clear()
    file.work(pressed=feed.sequence % 3 == 0)
    print(file.durable.get(feed.origin, 0), flush=True)
"""


@pytest.mark.parametrize("lines", [3, 40, 90])
def test_durable_blocks_survive_kill_9(tmp_path, lines):
    environment = os.environ | {"PYTHONPATH": str(Path(file_builder.__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, bufsize=0, env=environment
    )
    try:
        for _ in range(lines):
            durable = int(wait_for_line(process))
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()
    pool = random_rows(np.random.default_rng(1), 20_000)
    (part,) = tmp_path.glob("*.part")
    found = {}
    with DataFile(part) as file:
        for row in file.table("run/blocks"):
            found[int(row["sequence"])] = file.packets(int(row["first_row"]), int(row["first_row"] + row["rows"]))
    for record in read_journal(part.with_suffix(".journal")).records:
        found[record.frame.sequence] = np.frombuffer(record.rows, V2.dtype)
    for sequence in range(durable):
        assert np.array_equal(found[sequence], pool[: 1 + 977 * sequence % 9000])
    assert list(positions(tmp_path).values()) == [max(found) + 1] * bool(found)


def test_blocks_wait_for_their_batch(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(writer, "monotonic", lambda: now)
    feed = Feed()
    rng = np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    assert file.due() is None
    file.add(*feed.block(random_rows(rng, 10)))
    now = 100.05
    file.add(*feed.block(random_rows(rng, 10)))
    assert file.due() == 100.1
    file.work()
    assert file.durable == {}
    now = 100.1
    file.work()
    assert file.durable == {feed.origin: 2}
    assert file.due() == 104.0  # rows are shown 4 s after the file was opened
    journal = file.path.with_suffix(".journal")
    assert [record.frame.sequence for record in read_journal(journal).records] == [0, 1]
    # Four full blocks fill the batch: blocks that end in it are in the file, the straddling block waits.
    for _ in range(4):
        file.add(*feed.block(random_rows(rng, constants.BLOCK_ROWS)))
    assert file.durable == {feed.origin: 5}
    assert journal.stat().st_size == 0
    assert file.due() == pytest.approx(100.2)
    file.work(pressed=True)
    (record,) = read_journal(journal).records
    assert record.frame.sequence == 5
    assert record.rows == feed.rows[5].tobytes()
    file.end(feed.end())
    now = 101.0
    file.work()
    assert file.durable == {feed.origin: 7}
    assert [type(record.frame).__name__ for record in read_journal(journal).records] == ["Block", "End"]
    assert file.close().condition == "COMPLETE"
    with pytest.raises(FileError, match="is closed"):
        file.work()


def test_a_block_that_becomes_due_meanwhile_waits_for_the_next_turn(tmp_path, monkeypatch):
    """Full chunks that are packed have no rows any more, which the journal would need."""
    monkeypatch.setattr(chunk_writer, "MOST", 12)
    ticks = itertools.count()
    now, step = 100.0, 0.0
    monkeypatch.setattr(writer, "monotonic", lambda: now + step * next(ticks))
    feed, rng = Feed(), np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    for _ in range(7):
        file.add(*feed.block(random_rows(rng, constants.BLOCK_ROWS)))
    until(lambda: file._batch._release_rows() or file._batch._chunks[0].rows is None, "the chunks to be packed")
    for moment in range(-5, 6):  # in microseconds, around the time at which the blocks are due
        ticks, now, step = itertools.count(), 100.0 + writer.WAIT + moment * 1e-6, 1e-6
        file.work()
        if file.durable:
            break
    assert file.durable == {feed.origin: 7}
    assert file.path.with_suffix(".journal").stat().st_size == 0
    file.end(feed.end())
    assert file.close().condition == "COMPLETE"


def test_full_chunks_of_blocks_that_have_waited_are_written_and_not_journaled(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_writer, "MOST", 12)
    now = 100.0
    monkeypatch.setattr(writer, "monotonic", lambda: now)
    feed, rng = Feed(), np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    journal = file.path.with_suffix(".journal")
    file.add(*feed.block(random_rows(rng, 10)))
    for _ in range(7):
        now += 0.001
        file.add(*feed.block(random_rows(rng, constants.BLOCK_ROWS)))
    file.work()
    assert (file.durable, file.due()) == ({}, 100.1)
    now = 100.101
    file.work()
    assert file.durable == {feed.origin: 7}  # the eighth ends in the next chunk
    assert (journal.stat().st_size, file.due()) == (0, pytest.approx(100.107))
    now = 100.11
    file.work()
    assert file.durable == {feed.origin: 8}
    assert [record.frame.sequence for record in read_journal(journal).records] == [7]
    for number in range(12):
        assert file.durable == {feed.origin: 8}, number
        file.add(*feed.block(random_rows(rng, constants.BLOCK_ROWS)))
    assert file.durable == {feed.origin: 19}  # at once
    assert journal.stat().st_size == 0
    found = recover(abandoned(file))
    assert (found.rows, found.cut) == (10 + 18 * constants.BLOCK_ROWS, constants.BLOCK_ROWS - 10)
    assert verify(found.path).findings == verify(found.path).open


def abandoned(file):
    file.abandon()
    return file.path


def test_chunks_that_are_not_packed_yet_stay_for_the_next_write(tmp_path, monkeypatch):
    """Unless fewer than LEAST chunks are packed. All blocks are in the file once, also those that the journal needs."""
    monkeypatch.setattr(chunk_writer, "MOST", 6)
    gate = threading.Event()

    class Gated:
        def __init__(self, *size):
            self.packer = hdf5_chunks.Packer(*size)
            self.calls = 0

        def pack(self, rows):
            self.calls += 1
            if self.calls > 4:
                assert gate.wait(20)
            return self.packer.pack(rows)

    monkeypatch.setattr(chunk_writer, "Packer", Gated)
    feed, rng = Feed(), np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    for _ in range(6):
        file.add(*feed.block(random_rows(rng, constants.BLOCK_ROWS)))
    assert file.durable == {feed.origin: 4}
    file.add(*feed.block(random_rows(rng, 7_000)))
    file.work(pressed=True)  # fewer than LEAST full chunks: the journal takes all
    assert file.durable == {feed.origin: 7}
    assert [record.rows for record in read_journal(file.path.with_suffix(".journal")).records] == [
        rows.tobytes() for rows in feed.rows[4:]
    ]
    gate.set()
    for _ in range(6):
        file.add(*feed.block(random_rows(rng, constants.BLOCK_ROWS)))
    assert file.durable[feed.origin] > 9
    file.end(feed.end())
    report = file.close()
    assert (report.condition, verify(report.path).findings) == ("COMPLETE", [])
    with h5py.File(report.path) as plain:
        assert np.array_equal(plain["packets"][:], np.concatenate(feed.rows))


def test_duplicates_are_dropped_and_missing_blocks_recorded(tmp_path):
    feed = Feed()
    rng = np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    sent = [feed.block(random_rows(rng, size)) for size in (10, 20, 30, 40, 50)]
    for i in (0, 0, 1, 3, 2, 3):
        file.add(*sent[i])
    assert file.rows == 70
    file.end(feed.end())
    file.end(feed.end())
    with pytest.raises(ProtocolError, match=r"block 5 .* comes after the end of its source"):
        file.add(*feed.block(random_rows(rng, 1)))
    report = file.close()
    info = file_info(report.path)
    assert (report.condition, info["missing_blocks"], info["duplicate_blocks"]) == ("INCOMPLETE", 2, 4)
    assert "2 blocks are missing" in report.reasons[0]
    with DataFile(report.path) as read:
        assert [tuple(row)[2:] for row in read.table("run/missing").tolist()] == [(2, 3, 30), (4, 5, 0)]
    findings = "\n".join(verify(report.path).findings)
    assert "blocks 2 to 2 missing (30 rows, by the next header)" in findings
    assert "ledger (d)" in findings
    assert "follows where" not in findings


def test_inconsistent_blocks_and_ends_are_refused(tmp_path):
    feed = Feed()
    rows = random_rows(np.random.default_rng(1), 10)
    block, _ = feed.block(rows)
    file = RunFile(tmp_path, run_info())
    replace = msgspec.structs.replace
    for bad, payload, line in [
        (
            replace(block, crc32=block.crc32 ^ 1),
            rows,
            "block 0 of run 42, producer 'LArPix board', epoch 7: expected CRC",
        ),
        (replace(block, layout=3), rows, "expected layout 2, found 3"),
        (replace(block, rows=9), rows, "expected 9 rows of layout 2.4, found shape"),
        (replace(block, run=43), rows, "this file holds run 42"),
        (replace(block, text="text"), rows, "has a text, but not rows of messages"),
        (block, np.zeros(10, V3.dtype), "expected 10 rows of layout 2.4"),
    ]:
        with pytest.raises(ProtocolError, match=re.escape(line)):
            file.add(bad, payload)
    end = feed.end()
    for bad, line in [
        (replace(end, run=1), "this file holds run 42"),
        (replace(end, counts=[end.counts[0], end.counts[0]]), "counted twice"),
        (replace(end, counts=[[256, *end.counts[0][1:]]]), "an io_group is counted twice, or is above 255"),
        (replace(end, outside=[[256, *end.counts[0][1:]]]), "an io_group is counted twice, or is above 255"),
    ]:
        with pytest.raises(ProtocolError, match=re.escape(line)):
            file.end(bad)
    assert (file.rows, file.due(), file.durable) == (0, None, {})
    file.add(block, rows)
    with pytest.raises(ProtocolError, match="block 0 of it has been taken already"):
        file.end(replace(end, next=0))
    file.end(end)
    assert file.close().condition == "COMPLETE"


def test_frames_with_impossible_fields_are_refused_on_arrival():
    feed = Feed()
    block, _ = feed.block(random_rows(np.random.default_rng(1), 10))
    end = feed.end()
    replace = msgspec.structs.replace
    for bad in (
        replace(block, producer="x" * 65),
        replace(block, rows=-1),
        replace(block, rows=16385),
        replace(block, sequence=-1),
        replace(block, gaps=[stream.Gap(1, -5, 0, 0)]),
        replace(end, how="somehow"),
        replace(end, counts=[[1, 2]]),
        replace(end, unknown=[stream.UnknownWord(1, 2, 3, b"x" * 25)]),
        replace(end, verdicts=[stream.LossVerdict(1, "fine", "", 0, 0, 0)]),
        replace(end, verdicts=[stream.LossVerdict(256, "lost", "", 0, 0, 0)]),
        replace(end, verdicts=[stream.LossVerdict(1, "lost", "", -1, 0, 0)]),
        replace(end, next=-1),
    ):
        with pytest.raises(ProtocolError, match="stream frame of kind"):
            stream.unpack_producer(stream.pack(bad), "a producer")


def test_the_ledger_is_in_the_file(tmp_path):
    feed = Feed()
    file = RunFile(tmp_path, run_info(required_producers=("LArPix board",)))
    rows = random_rows(np.random.default_rng(1), 500)
    file.add(*feed.block(rows, gaps=[stream.Gap(2, 7, NS, NS + 5)]))
    unknown = [stream.UnknownWord(1, 1000 + i, 1, bytes([i % 256] * 16)) for i in range(1200)]
    outside = [[5, *([3] * len(constants.COUNTS))]]
    file.end(feed.end(unknown=unknown, outside=outside, gaps=[stream.Gap(1, 1, NS, NS)]))
    report = file.close()
    with DataFile(report.path) as read:
        counts = read.table("ledger/counts")
        assert counts["io_group"].tolist() == [1, 2]
        assert counts["how"].tolist() == [b"closed"] * 2
        assert int(counts["stored"].sum()) == 500
        assert len(read.table("ledger/unknown")) == schema.UNKNOWN_KEPT
        assert read.table("ledger/unknown")[7]["raw"].tolist() == [7] * 16 + [0] * 8
        assert read.table("ledger/outside")["io_group"].tolist() == [5]
        assert read.table("ledger/gaps")[["sequence", "rows"]].tolist() == [(0, 7), (1, 1)]
        assert read.texts()["required producer"] == ["LArPix board"]
    summary = json.loads(json.dumps(file_info(report.path)))
    assert (summary["rows"], summary["condition"], summary["totals"]["stored"]) == (500, "COMPLETE", 500)
    assert summary["texts"]["comment"] == "cosmics"
    assert summary["gaps"] == {"rows": 8, "number": 2}


@pytest.mark.parametrize(
    ("case", "condition", "reason"),
    [
        ("whole", "COMPLETE", None),
        ("suspect", "COMPLETE, suspect", "io_group 1: suspect: board disconnected"),
        ("lost before us", "COMPLETE, suspect", "io_group 1: lost: 7 words did not come"),
        ("dropped", "INCOMPLETE", "5 rows dropped, because ring and spool were full"),
        ("lost", "INCOMPLETE", r"ledger \(d\): 65 rows were made, 60 are accounted for"),
        ("no end", "INTERRUPTED", "no end record"),
        ("silent", "INTERRUPTED", "producer 'Other': no data came"),
        ("aborted", "ABORTED", None),
        ("aborted there", "ABORTED", None),
    ],
)
def test_conditions(tmp_path, case, condition, reason):
    feed = Feed()
    rows = random_rows(np.random.default_rng(1), 60)
    rows["io_group"] = 1
    file = RunFile(tmp_path, run_info(required_producers=("Other",) if case == "silent" else ()))
    file.add(*feed.block(rows))
    words = feed.end().counts[0][1 + constants.Count.WORD_ROWS]
    counts = {"word_rows": words + 5, "words_in": words + 5} if case in ("dropped", "lost") else {}
    if case == "dropped":
        counts["dropped"] = 5
    verdicts = {
        "suspect": [stream.LossVerdict(1, "suspect", "board disconnected", 0, NS, NS + 1)],
        "lost before us": [stream.LossVerdict(1, "lost", "7 words did not come", 7, NS, NS + 1)],
    }.get(case, [stream.LossVerdict(1, "complete", "", 0, 0, 0)])
    if case != "no end":
        how = "aborted" if case == "aborted there" else "closed"
        file.end(feed.end(how, counts={1: counts}, verdicts=verdicts))
    report = file.close(aborted=case == "aborted")
    assert report.condition == condition
    assert re.search(reason, report.reasons[0]) if reason else not report.reasons
    with DataFile(report.path) as read:
        assert read.run_info()["condition"] == condition
        assert read.texts().get("reason", []) == report.reasons
        assert read.table("ledger/counts")["owed"].tolist() == [0]
    checked = verify(report.path)
    assert checked.ok == (condition in ("COMPLETE", "COMPLETE, suspect", "ABORTED"))
    listed = (
        []
        if case == "no end"
        else [(verdict.io_group, verdict.verdict, verdict.why, verdict.lost) for verdict in verdicts]
    )
    fields = ("io_group", "verdict", "why", "lost")
    assert [tuple(line[name] for name in fields) for line in file_info(report.path)["verdicts"]] == listed
    if listed and verdicts[0].why:
        assert any(verdicts[0].why in note for note in checked.notes)


def test_a_long_reason_of_a_verdict_is_cut(tmp_path):
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(random_rows(np.random.default_rng(1), 60)))
    file.end(feed.end(verdicts=[stream.LossVerdict(2, "suspect", "ä" * 1000, 0, 1, 2)]))
    report = file.close()
    assert report.condition == "COMPLETE, suspect"
    with DataFile(report.path) as read:
        assert read.table("ledger/verdicts")["why"].tolist() == ["ä".encode() * 128]
    assert verify(report.path).ok


def test_a_condition_that_contradicts_a_verdict_is_found(tmp_path):
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(random_rows(np.random.default_rng(1), 60)))
    file.end(feed.end(verdicts=[stream.LossVerdict(1, "suspect", "board disconnected", 0, 1, 2)]))
    report = file.close()
    with h5py.File(report.path, "r+") as changed:
        line = changed["run/info"][:]
        line["condition"] = b"COMPLETE"
        changed["run/info"][:] = line
    assert any("condition COMPLETE, although" in line for line in verify(report.path).findings)


def test_a_later_part_continues_at_the_positions(tmp_path):
    feed = Feed()
    rng = np.random.default_rng(1)
    first = RunFile(tmp_path, run_info())
    for _ in range(3):
        first.add(*feed.block(random_rows(rng, 100)))
    sent = feed.block(random_rows(rng, 100))
    first.add(*sent)
    first.work(pressed=True)
    assert positions(tmp_path) == {feed.origin: 4}
    first.close()
    second = RunFile(tmp_path, run_info(), 1, positions(tmp_path, 42))
    second.add(*sent)
    second.add(*feed.block(random_rows(rng, 100)))
    assert second.rows == 100
    assert second.path.name == f"{NAME}_001.h5.part"
    second.end(feed.end())
    report = second.close()
    info = file_info(report.path)
    assert (report.condition, info["missing_blocks"], info["duplicate_blocks"]) == ("COMPLETE", 0, 1)
    assert verify(report.path).findings == []
    assert positions(tmp_path, 42) == {feed.origin: 6}
    assert positions(tmp_path, 41) == {}


def test_positions_skip_unreadable_files(tmp_path):
    write(tmp_path, Feed(), [10])
    (tmp_path / "run0000043_20261122T071251Z_000.h5").write_text("no HDF5")
    (tmp_path / "run0000044_20261122T071251Z_000.h5.journal").write_bytes(b"garbage" * 10)
    (tmp_path / "run0000045_20261122T071251Z_000.h5.journal").touch()
    (tmp_path / "run0000046_20261122T071251Z_000.h5.part").mkdir()
    with h5py.File(tmp_path / "run0000047_20261122T071251Z_000.h5", "w") as other:
        other.create_group("_header").attrs["version"] = "2.4"
        other["packets"] = np.zeros(3, V2.dtype)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "run999999999999999999_x.h5").touch()  # numbers have seven digits
    warnings = []
    assert positions(tmp_path, warnings=warnings) == {stream.BlockOrigin(42, "LArPix board", 7): 4}
    assert len(warnings) == 4
    assert all("\n" not in line for line in warnings)
    assert names.highest_run(tmp_path) == 47
    assert names.highest_run(tmp_path / "run0000046_20261122T071251Z_000.h5.part") == 0
    with pytest.raises(FileError, match=r"cannot read the directory .*: No such file"):
        names.highest_run(tmp_path / "there")


def test_an_existing_file_is_never_overwritten(tmp_path):
    file = RunFile(tmp_path, run_info())
    assert file.path == tmp_path / f"{NAME}_000.h5.part"
    with pytest.raises(FileError, match=r"cannot create .*journal: File exists"):
        RunFile(tmp_path, run_info())
    second = RunFile(tmp_path, run_info(storage="Second storage"))
    assert second.path.name == f"{NAME}_Second-storage_000.h5.part"
    second.discard()
    final = tmp_path / f"{NAME}_000.h5"
    final.write_text("somebody else's")
    with pytest.raises(FileError, match=r"cannot rename .*: File exists"):
        file.close()
    assert final.read_text() == "somebody else's"
    assert {path.suffix for path in tmp_path.iterdir()} == {".h5", ".part", ".journal"}
    file.path.unlink()
    with pytest.raises(FileError, match="exists"):
        RunFile(tmp_path, run_info())
    with pytest.raises(FileError, match=r"cannot create .*No such file or directory"):
        RunFile(tmp_path / "there", run_info())


def test_a_cancelled_run_leaves_nothing(tmp_path):
    file = RunFile(tmp_path, run_info())
    file.discard()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileError, match="is removed"):
        file.discard()
    file = RunFile(tmp_path, run_info())
    file.add(*Feed().block(random_rows(np.random.default_rng(1), 1)))
    with pytest.raises(FileError, match="is not removed: it holds 1 rows"):
        file.discard()
    file.abandon()
    file.abandon()
    assert {path.suffix for path in tmp_path.iterdir()} == {".part", ".journal"}


def test_a_full_disk_stops_the_file_with_one_line(tmp_path, monkeypatch):
    file = RunFile(tmp_path, run_info())
    feed = Feed()
    file.add(*feed.block(random_rows(np.random.default_rng(1), 5)))
    file.work(pressed=True)

    def full(**how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file._batch, "write", full)
    for _ in range(4):
        file.add(*feed.block(random_rows(np.random.default_rng(1), 16_000)))
    fifth = feed.block(random_rows(np.random.default_rng(1), 16_000))
    with pytest.raises(FileError, match=r"\.part cannot be written any more: .*No space left"):
        file.add(*fifth)
    with pytest.raises(FileError, match="cannot be written any more"):
        file.add(*feed.block(random_rows(np.random.default_rng(1), 5)))
    assert file.durable == {feed.origin: 1}
    assert [record.frame.sequence for record in read_journal(file.path.with_suffix(".journal")).records] == [0]
    file.abandon()


def test_a_file_that_cannot_be_created_leaves_nothing(tmp_path, monkeypatch):
    """HDF5 creates the file and then cannot write to it: an empty part would make the run incomplete for ever."""
    make = h5py.File

    def fails(path, *args, **more):
        make(path, *args, **more).close()
        os.truncate(path, 0)
        raise OSError(5, "Unable to create file (file write failed: time = now\n, errno = 5)")

    with monkeypatch.context() as broken:
        broken.setattr(h5py, "File", fails)
        with pytest.raises(FileError) as caught:
            RunFile(tmp_path, run_info())
    path = tmp_path / "run0000042_20261122T071251Z_000.h5.part"
    assert str(caught.value) == f"cannot create {path}: Input/output error"
    assert list(tmp_path.iterdir()) == []
    path.write_text("somebody's")
    with pytest.raises(FileError, match="File exists"):
        RunFile(tmp_path, run_info())
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


BOARD = stream.ConnectedBoard("LArPix board", 1, "PACMAN", "tcp://pacman.local:5556", "daq1", "0x37e 0x37e 0x37e 0x37e")


def test_begin_end_and_live_time_of_run(tmp_path):
    feed, file = Feed(), RunFile(tmp_path, run_info(connected=(BOARD,)))
    file.begin(NS + 100)
    gaps = [stream.Gap(1, 5, NS + 200, NS + 300), stream.Gap(2, 1, NS + 250, NS + 400), stream.Gap(1, 1, NS, NS + 110)]
    end = {group: {"dropped": rows, "info_rows": rows} for group, rows in ((1, 6), (2, 1))}
    file.add(*feed.block(POOL[V2][:10].copy(), gaps=gaps))
    file.set_sources([BOARD, msgspec.structs.replace(BOARD, producer="second", firmware="")])
    file.end(feed.end(counts=end))
    report = file.close(ended_ns=NS + 1000)
    with h5py.File(report.path) as plain:
        (row,) = plain["run/info"][:][["begun_ns", "ended_ns", "live_ns"]].tolist()
        assert [line["address"] for line in plain["run/sources"]] == [b"tcp://pacman.local:5556"] * 2
    assert row == (NS + 100, NS + 1000, 900 - 10 - 200)
    with DataFile(report.path) as read:
        assert read.connected() == [BOARD, msgspec.structs.replace(BOARD, producer="second", firmware="")]
    summary = file_info(report.path)
    assert (summary["live_s"], summary["connected"][0]["kind"]) == (690e-9, "PACMAN")


def test_the_live_times_of_parts_of_a_rotation_add_up(tmp_path):
    feed, info_of_run = Feed(), run_info(started_ns=time.time_ns(), begun_ns=time.time_ns())

    def block():
        header, rows = feed.block(POOL[V2][:10].copy())
        now = time.time_ns()
        return msgspec.structs.replace(header, first_ns=now, last_ns=now), rows

    first = RunFile(tmp_path, info_of_run)
    first.add(*block())
    second = RunFile(tmp_path, info_of_run, 1, first.positions())
    second.add(*block())  # a block from before the rotation
    second.rotated_in_ns = switched = time.time_ns()
    first.seal(continued=True, rotated_out_ns=switched)
    parts = [first.publish()]
    second.end(feed.end())
    ended = time.time_ns() + 10**9
    parts.append(second.close(ended_ns=ended).path)
    rows = []
    for path in parts:
        with DataFile(path) as read:
            rows.append(read.run_info())
    assert [row["ended_ns"] for row in rows] == [0, ended]
    assert [row["live_ns"] for row in rows] == [switched - rows[0]["opened_ns"], ended - switched]


def test_texts_of_any_length(tmp_path):
    long = "żółw " * 300
    file = RunFile(tmp_path, run_info(comment=long))
    file.set_text("comment", "short")
    file.set_text("chip configuration", '{"1-1-11": [0, 1]}\0' * 100)
    with DataFile(file.path) as read:
        assert read.texts()["comment"] == [long, "short"]
    feed = Feed()
    file.add(*feed.info(long))
    file.add(*feed.info(""))
    file.end(feed.end())
    report = file.close()
    assert verify(report.path).findings == []
    with DataFile(report.path) as read:
        pieces = read.table("messages")["message"].tolist()
        assert b"".join(pieces[:-1]).decode() == long[: len(b"".join(pieces[:-1]).decode())]
        assert all(len(piece.decode()) for piece in pieces[:-1])
        assert read.packets()["counter"].tolist() == list(range(len(pieces)))
        assert read.texts()["chip configuration"] == ['{"1-1-11": [0, 1]}\ufffd' * 100]
    assert file_info(report.path)["texts"]["comment"] == "short"


def test_larpix_control_reads_every_line_of_a_message(tmp_path):
    hdf5format = pytest.importorskip("larpix.format.hdf5format")
    text = "".join(chr(ord("a") + i % 26) for i in range(150))
    file, feed = RunFile(tmp_path, run_info()), Feed()
    for message in (text, "short"):
        file.add(*feed.info(message))
    file.end(feed.end())
    found = hdf5format.from_file(str(file.close().path))["packets"]
    assert [packet.message for packet in found] == [text[:64], text[64:128], text[128:], "short"]


def test_wide_clock_and_v3_are_kept(tmp_path):
    for number, row_layout in enumerate((CLOCK64, V3)):
        feed = Feed(number, layout=row_layout)
        rows = random_rows(np.random.default_rng(1), 10, row_layout)
        rows["receipt_timestamp"] = (1 << 63) + 5
        file = RunFile(tmp_path, run_info(row_layout, number))
        file.add(*feed.block(rows))
        file.end(feed.end())
        with DataFile(file.close().path) as read:
            assert read.layout is row_layout
            assert np.array_equal(read.packets(), rows)


def test_other_files_are_refused(tmp_path):
    def refused(name, line):
        with pytest.raises(FileError, match=line) as caught:
            DataFile(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not verify(tmp_path / name).ok

    refused("absent.h5", "there is no such file")
    (tmp_path / "folder.h5").mkdir()
    refused("folder.h5", "is not a file")
    (tmp_path / "text.h5").write_text("no HDF5 here")
    refused("text.h5", r"cannot open .*text.h5: .*not an HDF5 file")
    (tmp_path / "empty.h5").touch()
    refused("empty.h5", r"cannot open .*empty.h5")
    report, _ = write(tmp_path, Feed(), [1000])
    whole = report.path.read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    refused("cut.h5", r"cannot open .*cut.h5: .*truncated")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_group("things")
    refused("other.h5", "has no /_header")
    with h5py.File(tmp_path / "other.h5", "a") as other:
        other.create_group("_header").attrs["version"] = "2.4"
    refused("other.h5", "has no /packets")
    with h5py.File(tmp_path / "other.h5", "a") as other:
        other["packets"] = np.zeros(3)
    refused("other.h5", "has no column with packet types")


def test_the_live_times_of_a_storage_that_lags_add_up():
    """Parts that are closed long after their data, because the spool is delivered, do not count the time between."""
    second = 10**9

    def live(opened, rotated_in, rotated_out, blocks, ended):
        table = np.zeros(len(blocks), layout.TABLES["run/blocks"][0])
        table["first_ns"], table["last_ns"] = np.transpose(blocks) * second
        info = {"begun_ns": 100 * second, "opened_ns": opened * second, "ended_ns": ended * second}
        file = {"run/blocks": table, "ledger/gaps": np.zeros(0, layout.GAPS)}
        return (
            writer.live_ns(file, info, rotated_in_ns=rotated_in * second, rotated_out_ns=rotated_out * second) // second
        )

    late = live(700, 0, 720, [(100, 110), (390, 400)], 0), live(720, 720, 0, [(400, 410), (690, 700)], 700)
    assert sum(late) == 600
    at_once = live(90, 0, 401, [(100, 110), (390, 400)], 0), live(401, 401, 0, [(400, 410), (690, 700)], 700)
    assert at_once == (301, 299)
