"""Files whose names are removed while their producer lives: their content gets a new file, or there is an alarm."""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from fake_core import producer_status
from processes import LIMIT, until
from stream_harness import LAYOUT, Line, Reader, make_consumer
from stream_harness import until as turn_until
from system import System, rows_of, system

from larpixdaq import constants
from larpixdaq._native.ring_buffer import SMALLEST, map_file
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.control.display import status_lines
from larpixdaq.readout.delivery import Delivery
from larpixdaq.stream.publisher import stream_router

NAME = "LArPix board"


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as made:
        yield made


class PendingProducer:
    """A Delivery whose blocks no storage takes."""

    def __init__(self, folder: Path, epoch: int, **changed: Any) -> None:
        options = {"name": NAME, "spool_dir": folder / "spool", "spool_limit": 1 << 30, "ring": SMALLEST + (32 << 20)}
        options |= {"ring_dir": folder / "rings", "forget_after": 60.0}
        options["ring_dir"].mkdir(exist_ok=True)
        self._context = zmq.Context()
        socket = stream_router(self._context)
        socket.bind("tcp://127.0.0.1:0")
        options |= changed
        self.delivery = Delivery(argparse.Namespace(**options), folder, epoch, socket, spill=True, listening_ns=0)
        self.recorder = BlockBuilder(self.delivery.ring, NAME, epoch, LAYOUT, [1])
        self.path = self.delivery.ring_file.path

    def write(self, blocks: int, rows: int = 100) -> None:
        if self.recorder.run is None:
            self.recorder.begin(1, ["storage"])
            self.delivery.publisher.begin(1, LAYOUT.code, ["storage"])
        for _ in range(blocks):
            room = self.recorder.rows()
            assert room is not None
            room[:rows] = np.zeros(rows, LAYOUT.dtype)
            self.recorder.publish(rows)
            self.recorder.close_block()

    def turn(self, condition: Callable[[], Any]) -> None:
        def done() -> Any:
            self.delivery.work()
            return condition()

        until(done, "the delivery")

    def status(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self.delivery.status())

    def close(self) -> None:
        self.delivery.close()
        self._context.destroy(linger=0)


@pytest.fixture
def make_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., PendingProducer]]:
    monkeypatch.setattr("larpixdaq.readout.delivery.DELIVER_LIMIT", 0.0)
    made: list[PendingProducer] = []

    def make(epoch: int, **changed: Any) -> PendingProducer:
        made.append(PendingProducer(tmp_path, epoch, **changed))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_ring_whose_file_is_removed_in_a_run_survives_its_producer(line: System) -> None:
    """logind removes it at the last log-out. The producer is killed afterwards."""
    ring_dir = line.folder / "rings"
    ring_dir.mkdir()
    operator = line.start("--fake", "20000", "--ring-dir", ring_dir, "--ring", "16MiB")
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 2000, "rows in the storage")
    line.processes["offline_storage"].kill()
    (ring,) = ring_dir.iterdir()
    ring.unlink()
    until(ring.exists, "the ring's new file")
    line.await_status(operator, "producer", "made_anew", 1)
    until(lambda: line.status_of(operator, "producer")["owed_blocks"] > 5, "pending blocks")
    line.processes["producer"].kill()
    line.launch_storage()
    line.restart("producer")
    until(lambda: not ring.exists(), "the ring to be delivered")
    until(lambda: line.status_of(operator, "producer").get("state") == "RUN", "the new producer to be in the run")
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE, suspect", ended
    assert ended["rows"] == ended["stored"] == sum(len(rows_of(path)) for path in ended["files"])


def test_a_consumer_continues_in_the_ring_s_new_file(tmp_path: Path) -> None:
    line = Line(folder=tmp_path)
    consumer = make_consumer()

    def maps() -> bool:
        return [one.maps for one in line.publisher.subscribers.values()] == [True]

    try:
        consumer.connect({"board": line.endpoint})
        reader = Reader(consumer)
        line.begin()
        line.write(100)
        turn_until(line, reader.has(lambda r: len(r.blocks) == 1), "the first block")
        turn_until(line, maps, "the consumer to read the ring itself")
        assert line.ring_file is not None
        line.ring_file.path.unlink()
        for _ in range(3):
            line.write(100)
        new = line.ring_file.reserve()
        line.write(100)
        os.close(line.ring_file.move_to(new))
        line.publisher.ring_moved()
        for _ in range(3):
            line.write(100)
        # A block that was being acknowledged may come twice.
        turn_until(line, reader.has(lambda r: sorted(set(r.stamps)) == list(range(800))), "all blocks")
        turn_until(line, maps, "the consumer to read the new file")
        assert line.ring_file.in_place()
    finally:
        consumer.close()
        line.close()


def test_the_ring_s_new_file_holds_all_of_it(tmp_path: Path) -> None:
    """A successor finds blocks before and after the wrap of the ring, and the open block."""
    ring_file = RingFile.make(tmp_path, tmp_path, NAME, 9, SMALLEST)
    recorder = BlockBuilder(ring_file.ring, NAME, 9, LAYOUT, [1])
    recorder.begin(1, ["storage"])
    stamp = 0

    def write(n: int) -> None:
        nonlocal stamp
        rows = recorder.rows()
        assert rows is not None
        n = min(n, len(rows))
        rows[:n] = np.zeros(n, LAYOUT.dtype)
        rows["timestamp"][:n] = np.arange(stamp, stamp + n)
        recorder.publish(n)
        stamp += n

    for index in range(17):  # the last ones wrap to the beginning of the ring
        write(constants.BLOCK_ROWS)
        recorder.close_block()
        if index > 3:
            ring_file.ring.free_to(ring_file.ring.tail + 1)
    write(5)
    ring_file.path.unlink()
    new = ring_file.reserve()
    write(constants.BLOCK_ROWS)
    recorder.close_block()
    write(5)
    before = [bytes(ring_file.ring.payload(index)) for index in range(ring_file.ring.tail, ring_file.ring.head)]
    assert len(ring_file.ring.used_ranges()) == 3
    assert sum(size for _, size in (*ring_file.ring.used_ranges(), *ring_file.ring.unused_ranges())) == SMALLEST
    os.close(ring_file.move_to(new))
    assert [bytes(ring_file.ring.payload(index)) for index in range(ring_file.ring.tail, ring_file.ring.head)] == before
    write(7)
    ring_file.leave()
    again = RingFile.adopt(ring_file.path, NAME, 9)
    assert again is not None
    assert [bytes(again.ring.payload(index)) for index in range(again.ring.tail, again.ring.head)] == before
    rows = np.frombuffer(again.ring.open_payload(), LAYOUT.dtype)
    assert rows["timestamp"].tolist() == list(range(stamp - 12, stamp))
    again.close()


def test_only_mapped_memory_is_replaced(tmp_path: Path) -> None:
    """Also not memory of a whole page that something else has."""
    with mmap.mmap(-1, SMALLEST) as owner, open(tmp_path / "file", "w+b") as file:
        for memory in (bytearray(SMALLEST), memoryview(owner), np.frombuffer(owner, np.uint8)):
            with pytest.raises(ValueError, match=r"expected the memory of an mmap\.mmap, found"):
                map_file(memory, file.fileno())
        del memory


def test_a_ring_without_a_new_file_is_reported_and_kept_in_the_spool_directory_at_the_end(
    tmp_path: Path, make_pending: Callable[..., PendingProducer], caplog: pytest.LogCaptureFixture
) -> None:
    first = make_pending(1)
    first.write(20)
    shutil.rmtree(tmp_path / "rings")
    first.turn(lambda: first.status()["nameless"])
    assert first.status()["nameless"] == [f"{first.path}: No such file or directory"]
    first.turn(lambda: not first.delivery.ring_file.moving)
    assert len([one for one in caplog.records if "the ring's file was removed" in one.message]) == 1
    first.close()
    assert first.delivery.failure == ""
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [first.path.name]
    second = make_pending(2)
    assert second.status()["inherited"] == 21  # with its end record


def test_a_ring_without_room_for_a_second_file_is_reported(
    make_pending: Callable[..., PendingProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt does not fill the file system. At the end the pending blocks alone are kept, under the same name."""
    first = make_pending(1)
    first.write(20)
    first.path.unlink()
    statvfs = os.statvfs(first.path.parent)
    free = (*statvfs[:4], SMALLEST // statvfs.f_frsize, *statvfs[5:])
    with monkeypatch.context() as full:
        full.setattr(os, "statvfs", lambda path: os.statvfs_result(free))
        first.turn(lambda: first.status()["nameless"])
        assert first.status()["nameless"] == [f"{first.path}: No space left on device"]
        assert not first.path.exists()
        first.close()
    assert first.delivery.failure == ""
    assert make_pending(2).status()["inherited"] == 21


def test_blocks_that_can_be_kept_nowhere_are_an_error(
    tmp_path: Path, make_pending: Callable[..., PendingProducer]
) -> None:
    first = make_pending(1, spool_dir=tmp_path / "disk" / "spool")
    first.write(20)
    shutil.rmtree(tmp_path / "rings")
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "disk").touch()
    first.close()
    assert f"{first.path} was removed, and what it holds could not be kept in" in first.delivery.failure


def test_removed_files_of_spool_and_predecessors_are_written_anew(
    tmp_path: Path, make_pending: Callable[..., PendingProducer]
) -> None:
    first = make_pending(1, ring=SMALLEST)
    first.write(11, constants.BLOCK_ROWS)
    first.turn(lambda: first.status()["spooled_blocks"])
    pending = first.status()["owed_blocks"]
    (spooled,) = (tmp_path / "spool").iterdir()
    spooled.unlink()
    first.turn(spooled.exists)
    first.close()
    second = make_pending(2)
    assert second.status()["inherited"] == pending + 1
    first.path.unlink()
    spooled.unlink()
    second.turn(lambda: first.path.exists() and spooled.exists())
    assert first.path.stat().st_blocks * 512 < SMALLEST  # pages without blocks take no memory
    shutil.rmtree(tmp_path / "spool")
    second.close()
    third = make_pending(3)
    assert third.status()["inherited"] == pending + 1


def test_status_names_removed_and_damaged_files() -> None:
    facts = producer_status(
        nameless=["/dev/shm/a.ring: No space left on device"], kept_aside=["/spool/b.spool.damaged"]
    )
    component = {"name": "board", "kind": "producer", "alive": True, "stuck": False, "info": {}, "status": facts}
    found = status_lines({"state": "RUN", "components": [component]})
    assert found[1].startswith("FILE REMOVED: board: /dev/shm/a.ring: No space left on device; ")
    assert found[2].startswith("DAMAGED FILE KEPT: board: /spool/b.spool.damaged could not be read whole")
