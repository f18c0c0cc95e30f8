"""The spool: blocks come back in order, and of a damaged file every complete record."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_counts import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import LIMIT

from larpixdaq.buffer import spool as module
from larpixdaq.buffer.crash_recovery import Predecessors
from larpixdaq.buffer.spool import LOST, Spool, SpoolDirectory, SpoolFile, SpoolHeader, SpoolRecord
from larpixdaq.errors import FileError
from larpixdaq.readout import delivery
from larpixdaq.runtime.event_loop import Worker

NAME = "LArPix board"


def header(start: int = 0, run: int = 1, first: int = 0) -> SpoolHeader:
    return SpoolHeader(NAME, 5, run, first, start, 2, 1, ["storage"])


def record(index: int, size: int = 100) -> SpoolRecord:
    return SpoolRecord(b"header of %d" % index, bytes([index % 251]) * size)


def write_file(path: Path, sizes: list[int], start: int = 0) -> SpoolFile:
    file = SpoolFile(path, header(start))
    offsets, file.size = file.append([record(start + i, size) for i, size in enumerate(sizes)])
    file.offsets.extend(offsets)
    return file


def read_file(file: SpoolFile) -> list[SpoolRecord]:
    found: list[SpoolRecord] = []
    while len(found) < len(file.offsets):
        found += file.read(file.header.start + len(found), file.next, 1000)
    return found


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("spool")
    yield worker
    assert worker.close(LIMIT)


def fetch(spool: Spool, index: int) -> SpoolRecord:
    while (found := spool.get(index)) is None:
        assert spool.directory.worker.drain(LIMIT), "the worker hangs"
    return found


# Files


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=30), start=st.integers(0, 2**40))
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_successor_reads_the_blocks_of_a_file(tmp_path: Path, sizes: list[int], start: int) -> None:
    path = tmp_path / f"{os.urandom(8).hex()}.spool"
    file = write_file(path, sizes, start)
    assert path.stat().st_mode & 0o777 == 0o600
    expected = [record(start + i, size) for i, size in enumerate(sizes)]
    assert read_file(file) == expected
    assert SpoolFile.adopt(path, NAME, 5) is None  # it is locked
    file.leave()
    again = SpoolFile.adopt(path, NAME, 5)
    assert again is not None
    assert (again.header, again.size, list(again.offsets)) == (file.header, file.size, list(file.offsets))
    assert read_file(again) == expected
    again.remove()
    assert not path.exists()


@given(
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=10),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_complete_records_of_a_damaged_file_are_read(
    tmp_path: Path, sizes: list[int], cut: float, flips: list[tuple[float, int]]
) -> None:
    """A file is cut and bytes are flipped behind its header: complete records are read, others are LOST."""
    path = tmp_path / f"{os.urandom(8).hex()}.spool"
    file = write_file(path, sizes)
    begin, offsets, size = file.offsets[0], [*file.offsets, file.size], file.size
    file.leave()
    data = bytearray(path.read_bytes())
    end = begin + int((size - begin) * cut)
    touched = {end}
    for where, value in flips:
        at = begin + int((size - begin) * where)
        data[at] ^= value
        touched.add(at)
    # Two flips of the same byte may cancel, and then its record is complete.
    path.write_bytes(data[:end])
    again = SpoolFile.adopt(path, NAME, 5)
    assert again is not None
    found = read_file(again)
    expected = [record(i, n) for i, n in enumerate(sizes)]
    original = write_file(path.with_suffix(".other"), sizes)
    whole = [
        offsets[i + 1] <= end and data[offsets[i] : offsets[i + 1]] == original_bytes(original, offsets, i)
        for i in range(len(sizes))
    ]
    original.remove()
    for i, (is_whole, one) in enumerate(zip(whole, found, strict=False)):
        assert one == (expected[i] if is_whole else LOST)
    assert not any(whole[len(found) :])
    again.remove()


def test_a_damaged_length_loses_no_other_record(tmp_path: Path) -> None:
    """Also when by its length it ends in a later record."""
    file = write_file(tmp_path / "a", [1000] * 5)
    file.leave()
    data = bytearray(file.path.read_bytes())
    data[file.offsets[1] + 9] ^= 6  # its payload is 1,536 bytes longer
    file.path.write_bytes(data)
    again = SpoolFile.adopt(file.path, NAME, 5)
    assert again is not None
    assert read_file(again) == [LOST if i == 1 else record(i, 1000) for i in range(5)]
    again.remove()


def original_bytes(file: SpoolFile, offsets: list[int], index: int) -> bytes:
    return file.path.read_bytes()[offsets[index] : offsets[index + 1]]


@pytest.mark.parametrize("data", [b"x" * 100, *(b"LPXSPOL\x01" + more for more in (b"", bytes(50), b"\xff" * 50))])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        SpoolFile.adopt(path, NAME, 5)
    file = write_file(tmp_path / "another's", [1])
    file.leave()
    with pytest.raises(ValueError, match="header"):
        SpoolFile.adopt(file.path, "another board", 5)
    with pytest.raises(ValueError, match="header"):
        SpoolFile.adopt(file.path, NAME, 6)


@pytest.mark.parametrize("damage", ["a record", "the last record's end", "its beginning", "nothing"])
def test_only_a_completely_read_file_is_removed(tmp_path: Path, worker: Worker, damage: str) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    directory = SpoolDirectory(folder, "x", 1 << 30, worker)
    path = directory.file(5, 0)
    file = write_file(path, [1000, 1000, 1000])
    size, middle = file.size, file.offsets[1]
    file.leave()
    data = bytearray(path.read_bytes())
    if damage == "a record":
        data[middle + 500] ^= 1
    elif damage == "the last record's end":
        data = data[: size - 10]
    elif damage == "its beginning":
        data[:8] = bytes(8)
    path.write_bytes(data)
    if damage == "its beginning":
        os.utime(path, (0, 0))
    found = [file for left in Predecessors(NAME, tmp_path, tmp_path, directory, 0).take_over(()) for file in left.files]
    spool = Spool(directory, found)
    for index in range(spool.head):
        fetch(spool, index)
    spool.free_to(spool.head)
    assert worker.drain(LIMIT)
    kept = [] if damage == "nothing" else [path.with_name(path.name + ".damaged")]
    assert list(folder.iterdir()) == kept
    assert all(one.read_bytes() == data for one in kept)


def test_a_directory_where_every_user_may_remove_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool").chmod(0o777)
    with pytest.raises(FileError, match=r"--spool-dir .*: every user may remove files there \(mode 777\)"):
        delivery._check_spool_directory(tmp_path / "spool")


# The spool of one epoch


def fill(spool: Spool, start: int, sizes: list[int], run: int = 1, first: int = 0) -> None:
    spool.write(header(start, run, first), [record(start + i, size) for i, size in enumerate(sizes)])
    assert spool.directory.worker.drain(LIMIT)


@given(
    batches=st.lists(st.lists(st.integers(0, 400_000), min_size=1, max_size=6), min_size=1, max_size=12),
    frees=st.lists(st.floats(0, 1), max_size=12),
)
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_come_in_order_and_files_are_removed_when_their_blocks_are_free(
    tmp_path: Path, batches: list[list[int]], frees: list[float]
) -> None:
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    worker = Worker("spool")
    directory = SpoolDirectory(folder, "x", 16 << 20, worker)
    spool = Spool(directory)
    sizes: list[int] = []
    freed = 0
    for batch, share in zip(batches, [*frees, *[0.0] * len(batches)], strict=False):
        fill(spool, len(sizes), batch)
        sizes += batch
        freed += int(share * (len(sizes) - freed))
        spool.free_to(freed)
        assert worker.drain(LIMIT)
        assert spool.head == len(sizes)
        assert directory.bytes == sum(path.stat().st_size for path in folder.iterdir())
        for index in range(freed, len(sizes)):
            assert fetch(spool, index) == record(index, sizes[index])
    spool.free_to(spool.head)
    assert worker.close(LIMIT)
    assert list(folder.iterdir()) == []
    assert directory.bytes == 0


def test_each_run_has_files_of_its_own(tmp_path: Path, worker: Worker) -> None:
    spool = Spool(SpoolDirectory(tmp_path, "x", 1 << 30, worker))
    fill(spool, 0, [10, 10])
    fill(spool, 2, [10])
    fill(spool, 3, [10], run=2, first=3)
    assert [(file.header.run, file.header.start, file.next) for file in spool.files] == [(1, 0, 3), (2, 3, 4)]


def test_an_unreadable_block_is_lost_and_logged_once(
    tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(SpoolDirectory(tmp_path, "x", 1 << 30, worker))
    fill(spool, 0, [1000, 1000, 1000])
    with open(spool.files[0].path, "r+b") as file:
        file.seek(spool.files[0].offsets[1] + 500)
        file.write(b"damage")
    assert [fetch(spool, index) for index in (0, 1, 2)] == [record(0, 1000), LOST, record(2, 1000)]
    assert fetch(spool, 1) is LOST
    assert spool.get(77) is LOST
    assert len([one for one in caplog.records if "block 1 is damaged" in one.message]) == 1


def test_a_full_disk_is_logged_once_and_tried_again(
    tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    spool = Spool(SpoolDirectory(tmp_path, "x", 1 << 30, worker))
    fill(spool, 0, [1000])
    size = spool.files[0].path.stat().st_size
    real = os.pwritev

    def full(fd: int, views: list[Any], at: int) -> int:
        if at > size + 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, [views[0][:100]], at)

    monkeypatch.setattr(os, "pwritev", full)
    for _ in range(2):
        fill(spool, 1, [1000, 1000])
        assert (spool.head, spool.files[0].path.stat().st_size, spool.directory.bytes) == (1, size, size)
    assert not spool.can_write()
    monkeypatch.setattr(os, "pwritev", real)
    monkeypatch.setattr(module, "RETRY_INTERVAL", 0.0)
    spool.directory._retry_at = 0.0
    assert spool.can_write()
    fill(spool, 1, [1000, 1000])
    assert spool.head == 3
    assert [fetch(spool, index) for index in range(3)] == [record(index, 1000) for index in range(3)]
    messages = [one.message for one in caplog.records]
    assert len(messages) == 2, messages
    assert "No space left" in messages[0]
    assert "works again" in messages[1]


def test_after_a_failed_write_there_is_no_file(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "nowhere").touch()  # a file, because a missing directory would be made
    spool = Spool(SpoolDirectory(tmp_path / "nowhere", "x", 1 << 30, worker))
    fill(spool, 0, [1000])
    assert (spool.head, spool.directory.bytes, len(spool.files)) == (0, 0, 0)


def test_the_limit_holds_and_is_logged_once(tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    directory = SpoolDirectory(tmp_path, "x", 3_000_000, worker)
    spool = Spool(directory)
    index = 0
    while directory.has_room(400_000):
        fill(spool, index, [400_000])
        index += 1
    assert not directory.has_room(400_000)
    assert 2_500_000 < directory.bytes <= 3_000_000 + 1000
    messages = [one.message for one in caplog.records]
    assert messages == [f"the spool in {tmp_path} is full (--spool-limit, 3000000 bytes)"]
    spool.free_to(index)
    assert directory.has_room(400_000)


def test_the_worker_continues_after_an_exception(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    found: list[Any] = []

    def wrong() -> None:
        raise ValueError("a mistake")

    worker.submit(wrong, found.append)
    worker.submit(lambda: 3, found.append)
    assert worker.drain(LIMIT)
    assert isinstance(found[0], OSError)
    assert found[1] == 3
    assert "a mistake" in caplog.text
