"""Reading a journal returns whole records only, and the places of damage."""

import errno
import fcntl
import os
import tracemalloc

import numpy as np
import pytest
from example_counts import examples
from file_builder import Feed, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq.errors import FileError
from larpixdaq.hdf5.journal import Journal, read
from larpixdaq.protocol import stream


def filled(path, sizes=(3, 0, 700)):
    """Make a journal with a block of each of these sizes and an end; return it and its records."""
    feed = Feed()
    journal = Journal(path)
    expected = []
    for size in sizes:
        block, rows = feed.block(random_rows(np.random.default_rng(size), size))
        data = rows.view(np.uint8)
        journal.append([(stream.pack(block), [data[:50], data[50:]])])
        expected.append((block, data.tobytes()))
    end = feed.end()
    journal.append([(stream.pack(end), [])])
    return journal, [*expected, (end, b"")]


def test_records_come_back(tmp_path):
    journal, expected = filled(tmp_path / "a")
    assert [tuple(record) for record in read(tmp_path / "a").records] == expected
    assert journal.size == os.stat(tmp_path / "a").st_size
    journal.clear()
    assert list(read(tmp_path / "a").records) == []
    block, rows = Feed().block(random_rows(np.random.default_rng(1), 5))
    journal.append([(stream.pack(block), [rows.view(np.uint8)])] * 1500)  # more than one writev
    assert sum(1 for _ in read(tmp_path / "a").records) == 1500
    journal.close(remove=True)
    journal.close()
    assert not (tmp_path / "a").exists()


@settings(max_examples=examples(40))
@given(data=st.data())
def test_a_torn_end_costs_only_its_own_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "a"
    journal, expected = filled(path)
    journal.close()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.binary(max_size=40))
    path.write_bytes(whole[:cut] + tail)
    found = [tuple(record) for record in read(path).records]
    assert found == expected[: len(found)]
    lengths = np.cumsum([16 + len(stream.pack(frame)) + len(rows) for frame, rows in expected])
    torn = whole[:cut] + tail  # the tail may equal the journal's bytes
    differ = (i for i, (was, now) in enumerate(zip(whole, torn, strict=False)) if was != now)
    kept = next(differ, min(len(whole), len(torn)))
    assert len(found) == np.count_nonzero(lengths <= kept)


def record_ends(expected):
    return np.cumsum([16 + len(stream.pack(frame)) + len(rows) for frame, rows in expected]).tolist()


def test_a_torn_end_is_no_damage(tmp_path):
    """A killed writer leaves the beginning of its journal, wherever that ends."""
    journal, expected = filled(tmp_path / "a", (3, 0, 7))
    journal.close()
    whole = (tmp_path / "a").read_bytes()
    ends = record_ends(expected)
    for cut in range(len(whole) + 1):
        (tmp_path / "a").write_bytes(whole[:cut])
        found = read(tmp_path / "a")
        assert (len(found.records), found.damaged) == (sum(end <= cut for end in ends), [])


@settings(max_examples=examples(200))
@given(data=st.data())
def test_a_flipped_byte_costs_only_its_own_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "a"
    journal, expected = filled(path, (3, 10))
    journal.close()
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    found = read(path)
    ends = [0, *record_ends(expected)]
    hit = next(i for i in range(len(expected)) if place < ends[i + 1])
    assert [tuple(record) for record in found.records] == [*expected[:hit], *expected[hit + 1 :]]
    assert found.damaged == [(ends[hit], ends[hit + 1])]


def test_only_regular_files_are_read(tmp_path):
    """Opening a pipe would never return, and a link may lead anywhere."""
    os.mkfifo(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "c")
    (tmp_path / "c").touch()
    with open(tmp_path / "large", "wb") as large:
        large.truncate(1 << 40)
    for name, line in (("a", "is not a regular file"), ("b", "is a symbolic link"), ("large", "expected at most")):
        with pytest.raises(FileError, match=line):
            read(tmp_path / name)
    for name, line in (("a", "is not a regular file"), ("b", "is a symbolic link")):
        with pytest.raises(FileError, match=line):
            Journal(tmp_path / name, recovery=True)


def test_a_journal_is_locked_while_it_is_open(tmp_path):
    journal = Journal(tmp_path / "a")
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o600
    with open(tmp_path / "a") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        journal.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_errors_are_one_line(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FileError, match=r"cannot create .*a: File exists"):
        Journal(tmp_path / "a")
    with pytest.raises(FileError, match=r"cannot create .*: No such file or directory"):
        Journal(tmp_path / "there" / "a")
    with pytest.raises(FileError, match=r"cannot read .*b: No such file"):
        list(read(tmp_path / "b").records)


def test_a_full_disk_leaves_earlier_records(tmp_path, monkeypatch):
    journal, expected = filled(tmp_path / "a")
    pwritev = os.pwritev

    def full(fd, parts, offset):
        pwritev(fd, [memoryview(parts[0])[:7]], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(FileError, match=r"cannot write .*a: No space left on device"):
        journal.append([(b"header", [b"rows"])])
    assert journal.size == os.stat(tmp_path / "a").st_size
    assert [tuple(record) for record in read(tmp_path / "a").records] == expected
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwritev(fd, [memoryview(parts[0])[:7]], offset))
    block, rows = Feed().block(random_rows(np.random.default_rng(1), 5))
    journal.append([(stream.pack(block), [rows.view(np.uint8)])])  # a kernel that writes 7 bytes at a time
    assert [tuple(record) for record in read(tmp_path / "a").records] == [*expected, (block, rows.tobytes())]
    journal.close()


def test_reading_takes_no_more_memory_than_the_file(tmp_path):
    journal, _ = filled(tmp_path / "a")
    tracemalloc.start()
    read(tmp_path / "a")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * journal.size
    journal.close()
