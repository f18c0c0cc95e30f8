"""Takeover: the next producer of a name delivers a dead producer's blocks, all, once, with totals that balance."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import kill_ring_writer
import numpy as np
import pytest
from emulated_board import emulator
from example_counts import examples
from processes import LIMIT, until
from system import System, rows_of, system

from larpixdaq._native.ring_buffer import BLOCK, END, OVERHEAD, SMALLEST, Ring
from larpixdaq.buffer.crash_recovery import Predecessors
from larpixdaq.buffer.ring_file import TORN, RingFile, name_prefix, ring_file_name
from larpixdaq.buffer.spool import SpoolDirectory, SpoolFile, SpoolHeader, SpoolRecord
from larpixdaq.constants import Count
from larpixdaq.errors import RingError
from larpixdaq.hdf5.run_report import survey_run
from larpixdaq.hdf5.verify import verify
from larpixdaq.operator import Operator
from larpixdaq.protocol.stream import unpack_producer
from larpixdaq.runtime.event_loop import Worker

NAME = "LArPix board"


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as made:
        yield made


@pytest.fixture
def predecessors(tmp_path: Path) -> Iterator[Predecessors]:
    worker = Worker("spool")
    yield Predecessors(NAME, tmp_path, tmp_path, SpoolDirectory(tmp_path / "spool", "larpixdaq", 0, worker), 0)
    assert worker.close(LIMIT)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """All published rows are there, once; counters and rows agree exactly."""
    seed = int.from_bytes(os.urandom(4), "little")
    command = [sys.executable, kill_ring_writer.__file__, str(tmp_path), str(seed), str(examples(150))]
    done = subprocess.run(command, capture_output=True, timeout=100, check=False, text=True)
    assert done.returncode == 0, done.stderr


def leave(folder: Path, epoch: int, *, closed: bool = False) -> Path:
    """Leave the ring of a producer that died in run 1, with three rows in an open or closed block."""
    ring_file = RingFile.make(folder, folder, NAME, epoch, SMALLEST)
    recorder = kill_ring_writer.BlockBuilder(ring_file.ring, NAME, epoch, kill_ring_writer.LAYOUT, [1])
    recorder.begin(1, ["storage"])
    rows = recorder.rows()
    assert rows is not None
    rows[:3] = np.zeros(3, kill_ring_writer.LAYOUT.dtype)
    recorder.publish(3)
    if closed:
        recorder.close_block()
    ring_file.leave()
    return ring_file.path


def test_a_message_that_was_freed_before_the_kill_is_counted(tmp_path: Path, predecessors: Predecessors) -> None:
    """No data came after it, so that no checkpoint has counted it."""
    ring_file = RingFile.make(tmp_path, tmp_path, NAME, 9, SMALLEST)
    recorder = kill_ring_writer.BlockBuilder(ring_file.ring, NAME, 9, kill_ring_writer.LAYOUT, [1])
    recorder.begin(1, ["storage"])
    assert recorder.info("Beginning run")
    ring_file.ring.free_to(1)
    ring_file.leave()
    (left,) = predecessors.take_over(())
    assert [(line[0], line[1 + Count.INFO_ROWS]) for line in left.ends[1].counts] == [(0, 1)]
    assert left.ring_file is not None
    left.ring_file.close()


def test_a_ring_of_a_living_producer_is_left_alone(tmp_path: Path, predecessors: Predecessors) -> None:
    ring_file = RingFile.make(tmp_path, tmp_path, NAME, 1, SMALLEST)
    assert predecessors.take_over(()) == []
    assert predecessors.take_over({1}) == []
    ring_file.leave()
    (left,) = predecessors.take_over(())
    assert left.epoch == 1
    assert predecessors.take_over(()) == []  # we hold it now
    assert left.ring_file is not None
    left.ring_file.close()


def test_a_taken_over_ring_gives_back_the_memory_that_it_does_not_need(
    tmp_path: Path, predecessors: Predecessors
) -> None:
    path = leave(tmp_path, 9)
    before = path.stat().st_blocks
    (left,) = predecessors.take_over(())
    assert left.ring_file is not None
    assert (before - path.stat().st_blocks) * 512 > 7 << 20
    ring = left.ring_file.ring
    assert [ring.kind(index) for index in range(ring.tail, ring.head)] == [BLOCK, END]
    assert len(ring.payload(0)) == 3 * 36
    assert unpack_producer(ring.packed_header(1), "ring") == left.ends[1]
    left.ring_file.leave()
    (again,) = predecessors.take_over(())
    assert again.ends == left.ends
    assert again.ring_file is not None
    again.ring_file.close()


def test_rings_of_other_producers_and_state_directories_are_left_alone(
    tmp_path: Path, predecessors: Predecessors
) -> None:
    RingFile.make(tmp_path, tmp_path, "another board", 1, SMALLEST).leave()
    RingFile.make(tmp_path, tmp_path / "other state", NAME, 1, SMALLEST).leave()
    assert predecessors.take_over(()) == []


def test_a_ring_that_was_not_completely_made_is_removed_when_it_is_old(
    tmp_path: Path, predecessors: Predecessors
) -> None:
    path = tmp_path / ring_file_name(tmp_path, NAME, 3)
    path.write_bytes(bytes(SMALLEST))
    assert predecessors.take_over(()) == []
    assert path.exists()  # a producer may be making it
    then = path.stat().st_mtime - 2 * TORN
    os.utime(path, (then, then))
    assert predecessors.take_over(()) == []
    assert not path.exists()


def test_a_ring_without_its_first_bytes_is_kept(tmp_path: Path, predecessors: Predecessors) -> None:
    """A ring that was not completely made is all zeros; this ring is not."""
    path = leave(tmp_path, 3)
    with open(path, "r+b") as file:
        file.write(bytes(8))
    before = path.read_bytes()
    assert predecessors.take_over(()) == []  # a producer may be making it
    assert path.exists()
    os.utime(path, (0, 0))
    assert predecessors.take_over(()) == []
    (kept,) = tmp_path.glob("*.ring*")
    assert kept == path.with_name(path.name + ".damaged")
    assert kept.read_bytes() == before
    assert predecessors.kept_aside == [kept]


def test_a_ring_with_damaged_rows_is_delivered_and_kept(
    tmp_path: Path, predecessors: Predecessors, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(tmp_path, 3, closed=True)
    path.with_name(path.name + ".damaged").write_bytes(b"kept before")
    with open(path, "r+b") as file:
        file.seek(OVERHEAD + 40)
        file.write(b"damage")
    (left,) = predecessors.take_over(())
    assert left.ring_file is not None
    assert left.ring_file.ring.head == 2
    left.ring_file.close()
    assert not path.exists()
    assert b"damage" in path.with_name(path.name + ".damaged.2").read_bytes()
    assert path.with_name(path.name + ".damaged").read_bytes() == b"kept before"
    assert [one.message.removeprefix(f"{path}: ") for one in caplog.records] == [
        "block 0 is damaged",
        f"not all of it could be read; it is kept as {path.name}.damaged.2",
    ]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("owner", "expected a file of user {other}, found one of user {me}"),
        ("mode", "expected mode 600, found 666: others may write to it"),
        ("link", "is a symbolic link, expected a regular file"),
        ("pipe", "is not a regular file"),
    ],
)
@pytest.mark.parametrize("kind", ["ring", "spool"])
def test_files_that_another_user_may_have_made_are_not_taken_over(
    tmp_path: Path,
    predecessors: Predecessors,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    what: str,
    message: str,
) -> None:
    path = leave(tmp_path, 3)
    if kind == "spool":
        path.unlink()
        path = tmp_path / "spool" / "larpixdaq-0000000000000003-000000.spool"
        path.parent.mkdir()
        file = SpoolFile(path, SpoolHeader(NAME, 3, 1, 0, 0, 2, 1, ["storage"]))
        file.append([SpoolRecord(b"header", b"rows")])
        file.leave()
    if what == "owner":
        me = path.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    elif what == "mode":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere") if what == "link" else os.mkfifo(path)
    for _ in range(2):
        assert predecessors.take_over(()) == []
    message = message.format(me=path.lstat().st_uid, other=os.geteuid())
    assert [one.message for one in caplog.records] == [f"not taken over: {path}: {message}"]
    assert os.path.lexists(path)


def test_a_ring_that_cannot_be_removed_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring_file = RingFile.make(tmp_path, tmp_path, NAME, 1, SMALLEST)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    ring_file.close()
    assert [one.message for one in caplog.records] == [f"{ring_file.path}: cannot be removed: Operation not permitted"]
    ring_file.path.rename(tmp_path / "elsewhere")
    ring_file.path.write_bytes(b"another's")
    ring_file.close()
    assert ring_file.path.read_bytes() == b"another's"


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"nonsense"),
        (7, b"\x01"),  # of another version
        (8, b"\xff\xff\xff\xff"),
        (16, b"\xff" * 8),  # size
        (32, b"\xff" * 8),  # epoch
        (40, b"somebody"),
        (104 + 16, b"\xff" * 8),  # head
        (104 + 24, b"\x07"),  # tail above the head
    ],
)
def test_a_file_that_cannot_be_a_ring_is_kept_as_damaged(
    tmp_path: Path, predecessors: Predecessors, caplog: pytest.LogCaptureFixture, offset: int, data: bytes
) -> None:
    path = leave(tmp_path, 9)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    before = path.read_bytes()
    assert predecessors.take_over(()) == []
    assert len(caplog.records) == 1
    assert path.name in caplog.records[0].message
    assert not path.exists()
    assert path.with_name(path.name + ".damaged").read_bytes() == before
    assert predecessors.take_over(()) == []
    assert len(caplog.records) == 1


def test_impossible_counters_are_left_out(
    tmp_path: Path, predecessors: Predecessors, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows are delivered, with an end record that a storage takes; the file is kept."""
    ring_file = RingFile.make(tmp_path, tmp_path, NAME, 9, SMALLEST)
    recorder = kill_ring_writer.BlockBuilder(ring_file.ring, NAME, 9, kill_ring_writer.LAYOUT, [1])
    recorder.begin(1, ["storage"])
    rows = recorder.rows()
    assert rows is not None
    rows[:3] = np.zeros(3, kill_ring_writer.LAYOUT.dtype)
    ring_file.ring.counts[1, 3] = 2**60
    ring_file.ring.mark_alive(2**64 - 1)
    recorder.publish(3)
    ring_file.leave()
    (left,) = predecessors.take_over(())
    assert left.ring_file is not None
    assert left.ring_file.damaged
    assert [record.message for record in caplog.records] == [
        f"{ring_file.path}: its counters are damaged, and left out"
    ]
    assert [ring_file.ring.kind(index) for index in range(2)] == [BLOCK, END]
    end = unpack_producer(left.ring_file.ring.packed_header(1), "ring")
    assert (end, end.counts) == (left.ends[1], [])
    left.ring_file.close()


def test_a_cut_file_is_no_ring(tmp_path: Path) -> None:
    path = leave(tmp_path, 9)
    os.truncate(path, SMALLEST - 4096)
    with pytest.raises(RingError, match="at least"):
        RingFile.adopt(path, NAME, 9)


def test_flipped_bytes_of_the_header_do_no_harm(tmp_path: Path) -> None:
    """With any values in its tables a ring is refused in one line, or read within its memory."""
    path = leave(tmp_path, 9)
    good = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for _ in range(300):
        bad = bytearray(good)
        for at in rng.integers(0, 90_000, 1 + rng.integers(3)).tolist():
            bad[at] = int(rng.integers(256))
        with_header = memoryview(bad)
        try:
            ring = Ring(with_header, producer=NAME, epoch=9, attach=True)
        except ValueError:
            continue
        ring.runs()
        for index in range(ring.tail, ring.head):
            assert len(ring.payload(index)) + len(ring.packed_header(index)) <= len(bad)
        if ring.open_rows:
            assert len(ring.open_payload()) == ring.open_rows * 36


def test_a_producer_killed_in_a_run_loses_no_published_row(line: System) -> None:
    rate = ("--rate", "100000", "--words-per-message", "100", "--wait-for-subscriber")
    ring_dir = line.folder / "rings"
    ring_dir.mkdir()
    with emulator("--io-groups", "1", *rate) as board:
        source = ("--pacman", f"1=127.0.0.1:{board.ready['1']['data']}", "--ring-dir", ring_dir)
        operator = line.start(*source)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        until(lambda: line.status_of(operator, "storage").get("rows", 0) > 20_000, "rows in the storage")
        epoch = producer(operator)["epoch"]
        line.processes["producer"].kill()
        (left,) = ring_dir.iterdir()
        line.launch_producer(*source)
        until(lambda: producer(operator)["epoch"] != epoch, "the new one to be registered")
        until(lambda: producer(operator).get("state") == "RUN", "it to be in the run")
        until(lambda: producer(operator)["packets"] > 20_000, "packets")
        until(lambda: not left.exists(), "the old epoch to be delivered")
        until(lambda: producer(operator)["inherited"] == 0, "the producer to report it")  # in its next heartbeat
        ended = operator.end_run().result(2 * LIMIT)
        board.stop()
        board.finish()
    assert ended["condition"] == "COMPLETE, suspect", ended
    assert ended["rows"] == ended["stored"]
    rows: list[int] = []
    for path in map(Path, ended["files"]):
        report = verify(path)
        assert report.ok, report.findings
        rows.append(len(rows_of(path)))
        with h5py.File(path, "r") as file:
            how = [one.decode() for one in file["run/ends"]["how"]]
    assert sum(rows) == ended["rows"]
    assert sorted(how) == ["closed", "recovered"]
    assert line.processes["producer"].stop() == 0
    assert list(ring_dir.iterdir()) == []


def check(ended: dict[str, Any], condition: str) -> int:
    """Check that all parts of the run are good and complete; return the number of rows received from the board."""
    assert ended["condition"] == condition, ended
    assert ended["rows"] == ended["stored"]
    paths = [Path(path) for path in ended["files"]]
    assert survey_run(paths[0].parent, ended["run"]).condition == condition
    for path in paths:
        report = verify(path)
        assert report.ok or report.condition == "INTERRUPTED", report.findings  # the run continues in the next part
    rows = [rows_of(path) for path in paths]
    assert sum(map(len, rows)) == ended["rows"]
    return sum(int(np.count_nonzero(part["direction"] == 1)) for part in rows)


def producer(operator: Operator) -> dict[str, Any]:
    """The producer's status, with its epoch; empty while there is no producer."""
    found = [one for one in operator.components().result(LIMIT) if one["kind"] == "producer"]
    return {"epoch": found[0]["info"]["epoch"], **found[0]["status"]} if found else {}


def take_run(line: System, *source: object) -> Operator:
    operator = line.start(*source, "--ring", "64MiB")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    return operator


BOARD = (
    "--io-groups",
    "1",
    "--words-per-message",
    "500",
    "--wait-for-subscriber",
    "--wait-for-go",
    "--lossless",
    "--rate",
)


def test_blocks_for_a_stopped_storage_wait_on_disk(line: System) -> None:
    # A quarter of the ring is left for blocks that come while the disk hangs: 2 s, when other tests sync.
    with emulator(*BOARD, "200000", "--count", "1900000") as board:
        operator = take_run(line, "--pacman", f"1=127.0.0.1:{board.ready['1']['data']}")
        board.go()
        until(lambda: line.status_of(operator, "storage").get("rows", 0) > 20_000, "rows in the storage")
        storage = line.processes["offline_storage"].popen
        storage.send_signal(signal.SIGSTOP)
        until(lambda: producer(operator)["spooled_bytes"] > 8 << 20, "8 MiB in the spool")
        storage.send_signal(signal.SIGCONT)
        sent = board.finish()
        until(lambda: producer(operator)["spooled_bytes"] == 0, "the spool to be empty", 2 * LIMIT)
        ended = operator.end_run().result(2 * LIMIT)
    assert producer(operator)["dropped"] == 0
    assert check(ended, "COMPLETE") == sent["sent"]["1"]["words"]
    assert list((line.folder / "state" / "spool").iterdir()) == []


def test_blocks_that_are_pending_at_the_end_are_delivered_by_the_next_producer(line: System) -> None:
    ring_dir = line.folder / "rings"
    ring_dir.mkdir()
    with emulator(*BOARD, "300000") as board:
        source = ("--pacman", f"1=127.0.0.1:{board.ready['1']['data']}", "--ring-dir", ring_dir)
        operator = take_run(line, *source)
        board.go()
        until(lambda: line.status_of(operator, "storage").get("rows", 0) > 20_000, "rows in the storage")
        line.processes["offline_storage"].kill()
        until(lambda: producer(operator)["spooled_blocks"] > 20, "20 blocks in the spool")
        first = line.processes.pop("producer")
        assert first.stop() == 0
        assert "are not stored yet: they are kept, the next start under this name delivers them" in first.stderr
        assert len(list(ring_dir.iterdir())) == 1
        line.launch_storage()
        line.launch_producer(*source)
        until(lambda: producer(operator).get("state") == "RUN", "the producer to be in the run again")
        until(lambda: producer(operator)["packets"] > 1000, "packets")
        until(lambda: producer(operator)["inherited"] == 0, "all to be delivered")
        ended = operator.end_run().result(2 * LIMIT)
        board.stop()
        board.finish()
    check(ended, "ABORTED")
    assert len(list(ring_dir.iterdir())) == 1


def test_a_stopped_producer_whose_name_is_taken_leaves_its_ring(line: System) -> None:
    """The new producer is in the run already; the old producer's blocks come after the old one has ended."""
    ring_dir = line.folder / "rings"
    ring_dir.mkdir()
    source = ("--fake", "20000", "--ring-dir", ring_dir)
    operator = take_run(line, *source)
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 5000, "rows in the storage")
    old = line.processes.pop("producer")
    old.popen.send_signal(signal.SIGSTOP)
    (before,) = ring_dir.iterdir()
    epoch = producer(operator)["epoch"]
    line.launch_producer(*source)
    until(lambda: len(list(ring_dir.iterdir())) == 2, "the second ring")
    until(lambda: producer(operator)["epoch"] != epoch, "the new one to be registered")
    until(lambda: producer(operator).get("state") == "RUN", "it to be in the run")
    assert before.exists()  # its producer still has it locked
    old.popen.send_signal(signal.SIGCONT)
    assert old.wait() == 1
    assert "another component has taken this name" in old.stderr
    until(lambda: not before.exists(), "the old ring to be delivered", 2 * LIMIT)
    ended = operator.end_run().result(2 * LIMIT)
    check(ended, "COMPLETE, suspect")


def test_an_epoch_is_not_taken_over_while_one_of_its_files_cannot_be_opened(tmp_path):
    """A known epoch is not taken over a second time, and a storage with its later blocks drops the earlier ones."""
    ring = leave(tmp_path, 5)
    worker = Worker("spool")
    spool = SpoolDirectory(tmp_path / "spool", name_prefix(tmp_path, NAME), 1 << 30, worker)
    file = SpoolFile(spool.file(5, 0), SpoolHeader(NAME, 5, 1, 0, 0, 2, 1, ["s"]))
    file.append([SpoolRecord(b"h", b"p")])
    file.leave()
    predecessors = Predecessors(NAME, tmp_path, tmp_path, spool, 0)
    for path in (ring, file.path):
        path.chmod(0o666)
        assert predecessors.take_over(set()) == []
        path.chmod(0o600)
    (left,) = predecessors.take_over(set())
    assert (left.epoch, left.ring_file is not None, len(left.files)) == (5, True, 1)
    left.ring_file.leave()
    left.files[0].leave()
    worker.close(1)
