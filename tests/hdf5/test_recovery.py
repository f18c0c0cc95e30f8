"""Recovery makes a finished file with all acknowledged blocks from the files of a killed writer."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
from example_counts import examples
from file_builder import NS, Feed, random_rows, run_info
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT, until, wait_for_line

from larpixdaq import cli, constants, schema
from larpixdaq._native import hdf5_chunks
from larpixdaq.errors import FileError, FileLocked
from larpixdaq.hdf5 import chunk_writer, layout, names, repair, writer
from larpixdaq.hdf5 import journal as journal_file
from larpixdaq.hdf5.journal import Journal
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recovery import recover
from larpixdaq.hdf5.run_report import positions
from larpixdaq.hdf5.tables import read_run_info
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import ConnectedBoard

NAME = "run0000042_20261122T071251Z_000"
#: Rows of a full batch in these tests.
BATCH_ROWS = chunk_writer.LEAST * schema.CHUNK_ROWS
POOL = {row_layout: random_rows(np.random.default_rng(3), 40_000, row_layout) for row_layout in schema.LAYOUTS}


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_writer, "MOST", chunk_writer.LEAST)
        yield


def killed(file):
    """Leave part and journal as a killed writer does, with the lock free; return the part."""
    file.abandon()
    return file.path


def endings(directory):
    return sorted(path.name.partition(".")[2] for path in directory.iterdir())


def fill(directory, sizes, row_layout=schema.LAYOUTS[1], *, journal=True, **info):
    """Open a part and add blocks of these sizes between INFO messages, all of them durable with `journal`."""
    feed = Feed(info.get("run", 42), layout=row_layout)
    file = RunFile(directory, run_info(row_layout, **info))
    file.add(*feed.info("Beginning run"))
    for size in sizes:
        file.add(*feed.block(POOL[row_layout][:size].copy()))
    file.add(*feed.info("żółw " * 40))
    if journal:
        file.work(pressed=True)
    return file, feed


def same_rows(path, feed):
    """Whether the file has the rows of the feed; the counter of INFO rows is not compared."""
    with h5py.File(path) as plain:
        found = plain["packets"][:]
    given = np.concatenate(feed.rows)
    messages = given["type" if "type" in given.dtype.names else "packet_type"] == 5
    given["counter"][messages] = found["counter"][messages]
    return np.array_equal(found, given)


@pytest.mark.parametrize("row_layout", schema.LAYOUTS, ids=lambda row_layout: row_layout.name)
@pytest.mark.parametrize("sizes", [[], [5], [16_384] * 3, [15_000] * 5, [16_384] * 4, [16_383, 3, *[16_384] * 4]])
@pytest.mark.parametrize("end", [True, False], ids=["ended", "not ended"])
def test_part_and_journal_become_one_file(tmp_path, row_layout, sizes, end):
    file, feed = fill(tmp_path, sizes, row_layout)
    if end:
        file.end(feed.end())
        file.work(pressed=True)
    part = killed(file)
    before = positions(tmp_path)
    found = recover(part)
    assert (found.path, found.rows) == (tmp_path / f"{NAME}.h5", feed.first_packet)
    assert list(tmp_path.iterdir()) == [found.path]
    assert found.condition == ("COMPLETE" if end else "INTERRUPTED")
    assert same_rows(found.path, feed)
    assert positions(tmp_path) == before
    checked = verify(found.path)
    assert [line for line in checked.findings if line not in checked.open] == []
    assert checked.ok == end
    with DataFile(found.path) as read:
        assert read.texts()["recovered"][0].split(": ")[1].startswith("its writer died")
        assert read.texts()["comment"] == ["cosmics"]
        assert read.table("messages")["message"][0] == b"Beginning run"
        assert read.table("run/positions")[["first", "next"]].tolist() == [(0, feed.sequence + end)]


steps = st.lists(
    st.one_of(st.integers(0, 30), st.integers(8000, constants.BLOCK_ROWS), st.sampled_from(["work", "info"]))
)


@settings(max_examples=examples(25))
@given(steps=steps, data=st.data())
def test_a_writer_killed_at_any_moment(tmp_path_factory, steps, data):
    """The journal may be torn: all blocks of its whole records are in the file."""
    directory = tmp_path_factory.mktemp("run")
    file, feed = fill(directory, [100])
    for step in steps:
        if step == "work":
            file.work(pressed=True)
        elif step == "info":
            file.add(*feed.info("text"))
        else:
            file.add(*feed.block(POOL[feed.layout][:step].copy()))
    part = killed(file)
    journal = part.with_name(f"{NAME}.h5.journal")
    whole = journal.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    journal.write_bytes(whole[:cut] + data.draw(st.binary(max_size=30)))
    contents = journal_file.read(journal)
    expected = {record.frame.sequence for record in contents.records}
    with DataFile(part) as growing:
        expected |= set(growing.table("run/blocks")["sequence"].tolist())
    found = recover(part)
    assert bool(found.damaged) == bool(contents.damaged)
    if not expected and not contents.damaged:
        assert (found.path, list(directory.iterdir())) == (None, [])
        return
    with DataFile(found.path) as read:
        table = read.table("run/blocks")
        assert table["sequence"].tolist() == sorted(expected)
        for row in table:
            rows = read.packets(int(row["first_row"]), int(row["first_row"] + row["rows"]))
            given = feed.rows[row["sequence"]].copy()
            given["counter"] = rows["counter"]
            assert np.array_equal(rows, given)
    checked = verify(found.path)
    assert [line for line in checked.findings if line not in checked.open] == []


def test_a_part_that_is_being_written_is_not_changed(tmp_path):
    file, _ = fill(tmp_path, [10])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    for path in before:
        with pytest.raises(FileLocked, match=r"journal is locked: another process writes or recovers this part"):
            recover(path)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    killed(file)
    assert recover(file.path).from_journal == 3


def test_two_recoveries_exclude_each_other(tmp_path):
    file, _ = fill(tmp_path, [10])
    part = killed(file)
    other = Journal(part.with_name(f"{NAME}.h5.journal"), recovery=True)
    with pytest.raises(FileLocked):
        recover(part)
    with pytest.raises(FileError, match="it is being recovered"):
        other.append([(b"header", [])])
    other.close()
    assert recover(part).rows


# Missing and foreign files


def test_a_part_without_its_journal(tmp_path):
    file, feed = fill(tmp_path, [16_384] * 5, journal=False)
    part = killed(file)
    part.with_name(f"{NAME}.h5.journal").unlink()
    found = recover(part)
    assert found.rows == 3 * 16_384 + 1
    assert found.cut == BATCH_ROWS - found.rows
    assert positions(tmp_path) == {feed.origin: 4}


@pytest.mark.parametrize("content", [None, b"", b"no HDF5", repair.SIGNATURE], ids=["missing", "0", "text", "torn"])
def test_the_journal_alone_makes_a_part(tmp_path, content):
    file, feed = fill(tmp_path, [10, 20], storage="copy")
    part = killed(file)
    part.unlink()
    if content is not None:
        part.write_bytes(content)
    found = recover(part)
    assert (found.rows, found.from_journal) == (feed.first_packet, 4)
    assert same_rows(found.path, feed)
    kept = part.with_name(part.name + ".damaged")
    assert kept.exists() == bool(content)
    if content:
        assert kept.read_bytes() == content
        assert found.damaged == [f"the part was not whole (kept as {kept.name})"]
    else:
        assert found.damaged == []
    checked = verify(found.path)
    assert checked.findings == checked.open
    with DataFile(found.path) as read:
        assert (read.run_info()["run"], read.run_info()["started_ns"]) == (42, NS // 10**9 * 10**9)
        assert read.texts()["storage"] == ["copy"]


def test_a_writer_that_died_while_it_created_the_file(tmp_path):
    """Its superblock exists, with the flags of a file that is not written in order."""
    part = tmp_path / f"{NAME}.h5.part"
    for content in (b"", None):
        Journal(tmp_path / f"{NAME}.h5.journal").close()
        if content is None:
            with h5py.File(part, "w", libver=("v110", "v110")) as made:
                made.create_group("_header")
                made.flush()
                content = part.read_bytes()
            assert repair.read_superblock(part).flags == 0
        part.write_bytes(content)
        if content[:8] == repair.SIGNATURE and len(content) > repair.SIZE:
            assert content[11] == repair.WRITING
        found = recover(part)
        assert (found.path, list(tmp_path.iterdir())) == (None, [])
        assert found.text == f"{NAME}.h5.part: nothing had been stored in it, so it was removed"


def test_a_part_without_blocks_is_removed(tmp_path):
    file = RunFile(tmp_path, run_info())
    assert recover(killed(file)).path is None
    assert list(tmp_path.iterdir()) == []
    journal = tmp_path / f"{NAME}.h5.journal"
    journal.touch()
    assert recover(journal).path is None
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path):
    for name in ("run0000042_20261122T071251Z_000.h5", "a.h5.part", "run0000042_99999999T999999Z_000.h5.part"):
        (tmp_path / name).touch()
        with pytest.raises(FileError, match="not the name of a part"):
            recover(tmp_path / name)
    with pytest.raises(FileError, match="there is no such file"):
        recover(tmp_path / f"{NAME}.h5.part")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("content", ["other", "cut"])
def test_a_part_that_cannot_be_recovered_stays(tmp_path, content):
    file, _ = fill(tmp_path, [16_384] * 5)
    part = killed(file)
    if content == "cut":
        part.write_bytes(part.read_bytes()[:2000])
    else:
        with h5py.File(part, "w") as other:
            other["packets"] = np.zeros(3)
    before = {path: path.read_bytes()[repair.SIZE :] for path in tmp_path.iterdir()}
    for _ in range(2):
        with pytest.raises(FileError) as caught:
            recover(part)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes()[repair.SIZE :] for path in tmp_path.iterdir()} == before


# The close


@pytest.fixture
def sealed(tmp_path):
    """Seal a part without its final name; return the file and the feed."""
    file, feed = fill(tmp_path, [16_384] * 5)
    file.end(feed.end())
    file.seal(aborted=True)
    return file, feed


def test_a_closed_part_gets_its_final_name(tmp_path, sealed):
    file, feed = sealed
    part = killed(file)
    found = recover(part)
    assert found.was_closed
    assert (found.condition, found.rows) == ("ABORTED", feed.first_packet)
    assert list(tmp_path.iterdir()) == [found.path]
    assert verify(found.path).ok
    with DataFile(found.path) as read:
        assert "recovered" not in read.texts()


def test_killed_in_the_close_after_the_checksums(tmp_path, monkeypatch):
    """The close has written everything except the superblock."""
    file, feed = fill(tmp_path, [100])
    file.end(feed.end())
    monkeypatch.setattr(h5py.File, "close", lambda self: None)
    file.seal(aborted=True)
    monkeypatch.undo()
    killed(file)
    assert repair.read_superblock(file.path).flags
    assert recover(file.path).condition == "ABORTED"


@pytest.mark.parametrize("step", ["set_positions", "text", "table_crc32"])
def test_killed_in_the_close_before_the_checksums(tmp_path, monkeypatch, step):
    """Recovery writes the texts of the close only once."""
    file, feed = fill(tmp_path, [100], required_producers=("Other",))
    file.end(feed.end())

    def fail(*args):
        file._file.flush()
        raise OSError(errno.EIO, "Input/output error")

    if step == "table_crc32":
        monkeypatch.setattr(writer.layout, step, fail)
    elif step == "text":
        monkeypatch.setattr(writer, "seal_file", fail)
    else:
        monkeypatch.setattr(file._tables, step, fail)
    with pytest.raises(FileError):
        file.close()
    monkeypatch.undo()
    killed(file)
    found = recover(file.path)
    assert found.condition == "INTERRUPTED"
    assert "producer 'Other': no data came, totals unknown" in found.reasons
    with DataFile(found.path) as read:
        assert read.texts()["reason"] == found.reasons
        assert len(read.texts()["recovered"]) == 1
        assert len(read.table("run/positions")) == 1
    checked = verify(found.path)
    assert checked.findings == checked.open


def test_killed_between_link_and_unlink(tmp_path, sealed):
    file, _ = sealed
    final = tmp_path / f"{NAME}.h5"
    os.link(file.path, final)
    killed(file)
    before = final.stat().st_mtime_ns
    found = recover(file.path)
    assert (found.path, found.was_closed, found.condition) == (final, True, "ABORTED")
    assert list(tmp_path.iterdir()) == [final]
    assert final.stat().st_mtime_ns == before


def test_killed_before_the_journal_is_removed(tmp_path, sealed):
    file, feed = sealed
    journal = tmp_path / f"{NAME}.h5.journal"
    file.publish()
    feed.sequence += 1  # after its end record
    block = feed.block(POOL[feed.layout][:10].copy())
    with contextlib.closing(Journal(journal)) as other:
        other.append([(stream.pack(msgspec.structs.replace(block[0], sequence=1)), [block[1].view(np.uint8)])])
    assert recover(journal).path == file.path
    assert list(tmp_path.iterdir()) == [file.path]
    with contextlib.closing(Journal(journal)) as other:
        other.append([(stream.pack(block[0]), [block[1].view(np.uint8)])])
    with pytest.raises(FileError, match=r"it holds blocks that run0000042_.*h5 does not"):
        recover(journal)
    assert endings(tmp_path) == ["h5", "h5.journal"]


def test_a_name_that_is_taken(tmp_path):
    file, _ = fill(tmp_path, [10])
    part = killed(file)
    final = tmp_path / f"{NAME}.h5"
    final.write_text("somebody else's")
    for _ in range(2):
        with pytest.raises(FileError, match=r"cannot recover .*part: run.*h5 exists"):
            recover(part)
    assert final.read_text() == "somebody else's"
    assert endings(tmp_path) == ["h5", "h5.journal", "h5.part"]
    final.write_bytes(b"")  # as on a file system without hard links
    assert recover(part).path == final
    assert verify(final).rows == 16


# Rows without a block


def test_rows_of_tables_whose_block_did_not_come(tmp_path, monkeypatch):
    """The writer was killed after it had written a batch except its rows of /run/blocks and /run/ends."""
    feed, second = Feed(), Feed(producer="second")
    file = RunFile(tmp_path, run_info())
    gap = [stream.Gap(1, 3, 4, 5)]
    file.add(*feed.info("one"))
    file.add(*feed.block(POOL[feed.layout][:10].copy(), gaps=gap))
    file.end(feed.end(unknown=[stream.UnknownWord(1, 5, 1, b"1234")], outside=[[1] + [0] * 22]))
    file._write_batch(file._batch.write_all())
    jumped = feed_of_two(second)
    file.add(*second.info("two"))
    jumped()
    file.add(*second.block(POOL[feed.layout][:20].copy(), gaps=gap))
    file.end(
        second.end(
            unknown=[stream.UnknownWord(1, 5, 1, b"1234")],
            outside=[[1] + [0] * 22],
            gaps=gap,
            verdicts=[stream.LossVerdict(1, "suspect", "why", 0, 1, 2)],
        )
    )
    append = file._tables.append

    def none_of_these(name, rows):
        if name not in ("run/blocks", "run/ends"):
            append(name, rows)

    monkeypatch.setattr(file._tables, "append", none_of_these)
    file._write_batch(file._batch.write_all())
    with DataFile(file.path) as growing:
        lengths = {name: growing.length(name) for name in ("messages", "run/missing", "ledger/gaps", "ledger/verdicts")}
        assert lengths == {"messages": 2, "run/missing": 1, "ledger/gaps": 3, "ledger/verdicts": 1}
    found = recover(killed(file))
    assert (found.rows, found.cut, found.condition) == (11, 21, "COMPLETE")
    assert verify(found.path).findings == []
    with DataFile(found.path) as read:
        assert [read.length(name) for name in ("messages", "run/missing", "ledger/gaps")] == [1, 0, 1]
        assert [read.length(f"ledger/{name}") for name in ("unknown", "outside", "verdicts")] == [1, 1, 0]


def feed_of_two(feed):
    """Leave out one block of a feed."""

    def jump():
        feed.block(POOL[feed.layout][:7].copy())

    return jump


def test_verdicts_survive_a_recovery(tmp_path):
    file, feed = fill(tmp_path, [16_384] * 4)
    file.end(feed.end(verdicts=[stream.LossVerdict(1, "suspect", "board disconnected", 0, 1, 2)]))
    file._write_batch(file._batch.write_all())
    found = recover(killed(file))
    assert found.condition == "COMPLETE, suspect"
    assert found.reasons == ["producer 'LArPix board', epoch 7, io_group 1: suspect: board disconnected"]
    assert verify(found.path).findings == []


def test_missing_blocks_are_recorded(tmp_path):
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    sent = [feed.block(POOL[feed.layout][:n].copy()) for n in (10, 20, 30, 40, 50)]
    for number in (0, 2):
        file.add(*sent[number])
    file._write_batch(file._batch.write_all())
    for number in (2, 4):
        file.add(*sent[number])
    file.work(pressed=True)
    found = recover(killed(file))
    assert (found.rows, found.condition) == (90, "INTERRUPTED")
    assert "producer 'LArPix board', epoch 7: 2 blocks are missing" in found.reasons
    with DataFile(found.path) as read:
        assert read.table("run/missing")[["first", "next", "rows"]].tolist() == [(1, 2, 20), (3, 4, 40)]


def damage(path, sequence):
    """Change a row, so that the CRC-32 of its block is wrong."""
    with DataFile(path) as growing:
        row = growing.table("run/blocks")[sequence]
    repair.repair_superblock(path)
    with h5py.File(path, "r+") as file:
        file["packets"][int(row["first_row"])] = file["packets"][int(row["first_row"]) + 1]


def test_damaged_rows_are_reported_or_cut(tmp_path):
    """Damaged rows between good blocks stay and are reported; at the end they are cut, and the part is copied."""
    file, feed = fill(tmp_path, [16_000] * 5, journal=False)
    file.end(feed.end())
    part = killed(file)
    damage(part, 2)
    found = recover(part)
    assert (found.rows, found.condition) == (64_001, "INTERRUPTED")
    assert found.damaged == ["rows 16001 to 32001 are not what block 2 held"] == found.reasons[1:]
    assert sum("expected CRC-32" in line for line in verify(found.path).findings) == 1
    found.path.unlink()
    file, feed = fill(tmp_path, [16_000] * 5, journal=False)
    part = killed(file)
    damage(part, 4)
    before = part.read_bytes()
    found = recover(part)
    assert (found.rows, found.cut) == (48_001, BATCH_ROWS - 48_001)
    kept = tmp_path / f"{NAME}.h5.part.damaged"
    assert kept.read_bytes() == before
    assert found.damaged == [
        f"the part was not whole (kept as {kept.name})",
        "rows 48001 to 64001, at the end, are not what block 4 held",
    ]
    checked = verify(found.path)
    assert checked.findings == checked.open


@pytest.mark.parametrize("room", [True, False])
def test_an_unreadable_chunk(tmp_path, monkeypatch, room):
    """Later blocks come from the journal, and a copy of the part is kept; without room for it nothing is changed."""
    file, feed = fill(tmp_path, [16_000] * 5)
    part = killed(file)
    with DataFile(part) as growing:
        chunk = growing._packets.id.get_chunk_info(3)
    with open(part, "r+b") as changed:
        changed.seek(chunk.byte_offset + chunk.size // 2)
        changed.write(b"\0" * 100)
    before = part.read_bytes()
    if not room:
        monkeypatch.setattr("larpixdaq.hdf5.recovery.MIN_FREE", 1 << 62)
        with pytest.raises(FileError, match="is damaged, and left as it is: a copy to be kept takes"):
            recover(part)
        assert part.read_bytes()[repair.SIZE :] == before[repair.SIZE :]
        return
    found = recover(part)
    assert [found.rows, found.from_journal] == [48_001 + 16_000 + len(feed.rows[-1]), 2]
    assert found.damaged[1:] == ["rows 48001 to 64001, at the end, are not what block 4 held"]
    kept = tmp_path / f"{NAME}.h5.part.damaged"
    assert kept.read_bytes()[repair.SIZE :] == before[repair.SIZE :]
    with DataFile(found.path) as read:
        assert read.table("run/missing")[["first", "next", "rows"]].tolist() == [(4, 5, 16_000)]
        assert read.texts()["damaged"] == found.damaged


def test_a_damaged_journal_costs_only_the_damaged_block(tmp_path, capsys):
    """Later blocks are stored, the missing block is counted, the journal is kept, and the exit status is 1."""
    file, feed = fill(tmp_path, [10_000] * 3)
    journal = killed(file).with_name(f"{NAME}.h5.journal")
    whole = bytearray(journal.read_bytes())
    whole[100_000] ^= 1
    journal.write_bytes(whole)
    assert positions(tmp_path) == {feed.origin: feed.sequence}
    status, (line,) = answer(capsys, "recover", tmp_path)
    assert (status, "recovered, 20006 rows, INTERRUPTED" in line, "DAMAGED: the journal" in line) == (1, True, True)
    kept = tmp_path / f"{NAME}.h5.journal.damaged"
    assert kept.read_bytes() == whole
    assert endings(tmp_path) == ["h5", "h5.journal.damaged"]
    with DataFile(tmp_path / f"{NAME}.h5") as read:
        assert read.table("run/missing")[["first", "next", "rows"]].tolist() == [(1, 2, 10_000)]
        (text,) = read.texts()["damaged"]
        assert f"(kept as {kept.name})" in text
        assert text in read.texts()["reason"]
    assert answer(capsys, "recover", tmp_path) == (0, ["nothing to recover"])


def test_files_with_nothing_but_damage_are_kept(tmp_path):
    """A journal whose only record is damaged, and a part without its beginning, do not count as empty."""
    file = RunFile(tmp_path, run_info())
    file.add(*Feed().block(POOL[schema.LAYOUTS[1]][:50].copy()))
    file.work(pressed=True)
    part = killed(file)
    for content in ("journal", "part"):
        path = part if content == "part" else part.with_name(f"{NAME}.h5.journal")
        damaged = b"\xff" * 20 + path.read_bytes()[20:]
        path.write_bytes(damaged)
        found = recover(part)
        assert (found.rows, found.condition, len(found.damaged)) == (0, "INCOMPLETE", 1)
        assert (tmp_path / f"{path.name}.damaged").read_bytes() == damaged
        assert "condition INCOMPLETE" in verify(found.path).findings[0]
        for path in tmp_path.iterdir():
            path.unlink()
        file, _ = fill(tmp_path, [16_384] * 5, journal=False)
        part = killed(file)


def test_a_part_without_run_info_is_not_changed(tmp_path):
    """A power cut may leave rows without /run/info."""
    part = killed(fill(tmp_path, [16_384] * 5)[0])
    repair.repair_superblock(part)
    with h5py.File(part, "r+") as file:
        file["run/info"][:] = 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileError, match="/run/info is empty, but the file has 65536 rows"):
        recover(part)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ending", [names.PART, names.JOURNAL, names.FINISHED])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_only_regular_files_are_recovered(tmp_path, ending, kind):
    """Opening a pipe would never return, and a link may lead to a file of another user."""
    (tmp_path / "data").mkdir()
    part = killed(fill(tmp_path / "data", [10])[0])
    path = part.with_name(NAME + ending)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes() if path.exists() else b"other")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    before = other.read_bytes()
    with pytest.raises(FileError):
        recover(part)
    assert other.read_bytes() == before
    assert endings(part.parent) == sorted({"h5.part", "h5.journal", ending[1:]})


def test_a_chunk_is_never_written_in_place(tmp_path, monkeypatch):
    """HDF5 writes a chunk of the same size to the same place, where a kill would tear rows that exist nowhere else."""
    part = killed(fill(tmp_path, [16_384] * 4, journal=False)[0])
    with DataFile(part) as growing:
        chunk = growing._packets.id.get_chunk_info(3)
    sizes = []

    class Padding:
        def __init__(self, *size):
            self.packer = hdf5_chunks.Packer(*size)

        def pack(self, chunk_rows):
            packed = self.packer.pack(chunk_rows)
            sizes.append(len(packed))
            return packed + b"\0" * (chunk.size - len(packed))

    monkeypatch.setattr(chunk_writer, "Packer", Padding)
    found = recover(part)
    assert sizes
    assert sizes[-1] < chunk.size
    with h5py.File(found.path) as plain:
        new = plain["packets"].id.get_chunk_info(plain["packets"].id.get_num_chunks() - 1)
        assert (new.size, new.byte_offset != chunk.byte_offset) == (chunk.size + 1, True)
    checked = verify(found.path)
    assert checked.findings == checked.open


def test_a_later_part_keeps_its_start_positions(tmp_path):
    """This includes origins without blocks in this part."""
    feed, quiet = Feed(), Feed(producer="quiet")
    known = {feed.origin: 3, quiet.origin: 9}
    feed.sequence, feed.first_packet = 3, 500
    file = RunFile(tmp_path, run_info(required_producers=("LArPix board", "quiet")), 1, known)
    file.add(*feed.block(POOL[feed.layout][:10].copy()))
    file.work(pressed=True)
    found = recover(killed(file))
    assert found.reasons == ["producer 'LArPix board', epoch 7: no end record, totals unknown"]
    with DataFile(found.path) as read:
        assert read.table("run/positions")[["first", "next"]].tolist() == [(3, 4), (9, 9)]
        assert read.producers == ["LArPix board", "quiet"]
    assert verify(found.path).open == verify(found.path).findings


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    file, feed = fill(tmp_path, [16_384] * 5)
    part = killed(file)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("larpixdaq.hdf5.chunk_writer.Batch.write", full)
        with pytest.raises(FileError, match="No space left on device"):
            recover(part)
    assert endings(tmp_path) == ["h5.journal", "h5.part"]
    assert recover(part).rows == feed.first_packet
    assert verify(tmp_path / f"{NAME}.h5").rows == feed.first_packet


# The command


def answer(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out.splitlines()


def test_the_command_recover(tmp_path, capsys):
    assert answer(capsys, "recover", tmp_path) == (0, ["nothing to recover"])
    dead = killed(fill(tmp_path, [10])[0])
    living, _ = fill(tmp_path, [10], run=43)
    empty = killed(RunFile(tmp_path, run_info(run=44)))
    status, lines = answer(capsys, "recover", tmp_path)
    assert status == 0
    assert lines[0].startswith(f"{NAME}.h5: recovered, 16 rows, INTERRUPTED (3 blocks from the journal)")
    assert "skipped: " in lines[1]
    assert "locked" in lines[1]
    assert lines[2] == f"{empty.name}: nothing had been stored in it, so it was removed"
    status, (line,) = answer(capsys, "recover", living.path)
    assert (status, line.startswith("skipped: ")) == (1, True)
    killed(living)
    status, (line,) = answer(capsys, "recover", "--json", tmp_path, dead)
    found = json.loads(line)
    assert status == 1
    assert not found["ok"]
    assert found["parts"][str(dead)]["text"] == f"{dead}: there is no such file"
    assert found["parts"][str(living.path)]["condition"] == "INTERRUPTED"
    assert not names.unfinished_parts(tmp_path)


def test_the_command_names_a_damaged_part(tmp_path, capsys):
    part = killed(fill(tmp_path, [10])[0])
    with open(part, "r+b") as file:
        file.seek(30)
        file.write(b"\x55")
    status, (line,) = answer(capsys, "recover", tmp_path)
    assert status == 1
    assert line.startswith(f"{part}: superblock: expected checksum ")


# Killed at random


@pytest.mark.timeout(300)
def test_killed_writers_and_recoveries_lose_nothing(tmp_path):
    """A short form of `python tests/faults/kill_file_writer.py --kills 500`, in a process that has no threads."""
    script = Path(__file__).parents[1] / "faults" / "kill_file_writer.py"
    kills = examples(15)
    process = subprocess.Popen(
        [sys.executable, script, "--kills", str(kills), "--seed", "7"],
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    with process:
        found = json.loads(wait_for_line(process, 280))
    assert (found["failures"], found["blocks_lost"], found["blocks_doubled"]) == ([], 0, 0)
    assert found["kills"] == kills
    assert found["rows_stored"] >= found["rows_acknowledged"] > 0
    assert len(found["kills_by"]) > kills // 5


@pytest.mark.parametrize("journal", ["removed", "damaged"])
def test_rows_that_only_readers_of_the_part_have_seen_are_kept(tmp_path, journal):
    """They are in the journal too; without the journal they may be all that is left of acknowledged blocks."""
    feed, rng = Feed(), np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    for _ in range(3):
        file.add(*feed.block(random_rows(rng, 1000)))
    file.work(pressed=True)
    file._show()
    part, beside = file.path, file._journal.path
    file.abandon()
    if journal == "removed":
        beside.unlink()
    else:
        data = bytearray(beside.read_bytes())
        data[40_000] ^= 1
        beside.write_bytes(data)
    found = recover(part)
    assert found.damaged
    kept = part.with_name(part.name + ".damaged")
    with h5py.File(kept, swmr=True) as copy:
        assert len(copy["packets"]) == 3000


def test_numbers_out_of_range_in_a_part_are_damage(tmp_path):
    connected = (ConnectedBoard("LArPix board", 1, "PACMAN", "tcp://127.0.0.1:1", "host"),)
    for name, column in (("run/sources", "producer"), ("run/info", "layout")):
        folder = tmp_path / column
        folder.mkdir()
        file = RunFile(folder, run_info(connected=connected))
        file.add(*Feed().block(random_rows(np.random.default_rng(1), 10)))
        path = file.close().path
        with h5py.File(path, "r+") as damaged:
            table = damaged[name][:]
            table[column] = 9
            damaged[name][:] = table
        with pytest.raises(FileError):
            read_run_info(path)


def test_a_part_is_opened_for_recovery_when_another_thread_has_read_it(tmp_path):
    """HDF5 opens no file for writing that the same process has open for reading."""
    path = tmp_path / "part.h5"
    layout.create(path, schema.layout(2), "2").close()
    reader = h5py.File(path, "r")
    threading.Timer(0.1, reader.close).start()
    layout.reopen(path).close()
    assert not reader


READER = """
import sys, h5py
with h5py.File(sys.argv[1], "r", swmr=True) as file:
    print(file["packets"].shape[0], flush=True)
    sys.stdin.readline()
"""


def test_a_reader_of_another_process_does_not_hinder_a_recovery(tmp_path):
    """Plain h5py keeps HDF5's lock on the part while it reads."""
    file, feed = RunFile(tmp_path, run_info()), Feed()
    file.add(*feed.block(random_rows(np.random.default_rng(1), 1000)))
    until(lambda: file.work() or file.durable, "the block to be durable")
    command = [sys.executable, "-c", READER, str(file.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as reader:
        assert wait_for_line(reader) == "0"
        file.abandon()
        assert recover(file.path).rows == 1000
        reader.communicate(b"\n", timeout=LIMIT)
