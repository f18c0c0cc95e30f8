"""The StorageService without core and producer: files, acknowledgements, recovery, failing disks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from file_builder import NS, Feed, packed_rows, random_rows
from processes import LIMIT, until

from larpixdaq import schema
from larpixdaq.errors import FileError, StateError
from larpixdaq.hdf5.chunk_writer import LEAST
from larpixdaq.hdf5.reader import count_words
from larpixdaq.hdf5.recovery import recover
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.verify import verify, verify_all
from larpixdaq.protocol.packed_rows import PackedRows
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.runtime import file_access
from larpixdaq.storage import finisher, open_run
from larpixdaq.storage import sidecar as sidecars
from larpixdaq.storage.limits import Space, parse_limit
from larpixdaq.storage.service import StorageService
from larpixdaq.storage.sidecar import NameTemplate

RUN = 42


class Answered:
    """Takes the place of a call, and keeps its answer."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error = ""

    def result(self, value: Any) -> None:
        self.value = msgspec.to_builtins(value)

    def fail(self, error: str, code: str = "") -> None:
        self.error = error


class Acknowledgements:
    """Takes the place of the stream's thread."""

    queued = 0

    def __init__(self) -> None:
        self.next: dict[BlockOrigin, int] = {}
        self.resubscribed_at: list[dict[BlockOrigin, int]] = []

    def acknowledge(self, source: BlockOrigin, following: int) -> None:
        self.next[source] = following

    def resubscribe(self, *, send_rows: bool = False) -> None:
        self.resubscribed_at.append(dict(self.next))

    def close(self) -> None: ...


class Rig:
    def __init__(self, directory: Path, **options: Any) -> None:
        self.storage = StorageService(directory, "Offline storage", "", **options)
        self.storage.resume()
        self.stream = Acknowledgements()

    def prepare(self, comment: str = "cosmics") -> Any:
        producers = ["LArPix board"]
        return self.storage.prepare_run(Answered(), RUN, "test", comment, "me", NS, 2, "2", producers, {})

    def take(self, *frames: Any) -> None:
        for frame in frames:
            header, rows = frame if isinstance(frame, tuple) else (frame, None)
            self.storage.receive("LArPix board", header, None if rows is None else memoryview(rows.view(np.uint8)))
            self.storage.report_to(self.stream)

    def work(self) -> None:
        self.storage.work()
        self.storage.report_to(self.stream)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        def turn() -> Any:
            self.work()
            return condition()

        return until(turn, what)

    def end(self, following: int | None) -> Answered:
        call = Answered()
        producers = [{"name": "LArPix board", "epoch": 7, "next": following}]
        self.storage.end_run(call, RUN, "closed", producers)
        self.until(lambda: call.value or call.error, "the answer to end_run")
        return call


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(tmp_path, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.storage.close()


def rows(n: int) -> Any:
    return random_rows(np.random.default_rng(n), n)


def kill(rig: Rig) -> None:
    """Leave part and journal as a killed storage does, unlocked."""
    for run in rig.storage._runs.values():
        assert run.file is not None
        run.file.abandon()
    rig.storage._runs.clear()


def test_all_blocks_are_acknowledged_at_the_close(rigs: Callable[..., Rig]) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.info("Beginning run"), feed.block(rows(1000)), feed.info("Ending run"), feed.end())
    call = rig.end(3)
    assert call.value["condition"] == "COMPLETE", call.error
    assert rig.stream.next == {feed.origin: 4}  # the end counts as a sequence
    # Blocks that a new subscription repeats are dropped.
    rig.take(Feed(RUN).block(rows(1000)), feed.end())
    assert not rig.storage._runs
    assert rig.storage.duplicates == 2


@pytest.mark.parametrize("times", [1, 2])
def test_rows_with_a_wrong_checksum_are_requested_again_once(rigs: Callable[..., Rig], times: int) -> None:
    """The producer may overwrite its ring while it is read: no such row gets into the file."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    frames = [feed.block(rows(n)) for n in (10, 2000, 300, 30)]
    rig.take(frames[0])
    for time in range(3):  # two wrong blocks in a row; later blocks are sent again with them
        bad = {1: 0, 2: 1}
        for at, (header, right) in enumerate(frames[1:], start=1):
            wrong = at in bad and (times == 2 or time <= bad[at])
            before = len(rig.stream.resubscribed_at)
            rig.take((header, right[::-1].copy() if wrong else right))
            if len(rig.stream.resubscribed_at) > before:
                break
    assert len(rig.stream.resubscribed_at) == 2
    rig.take(feed.end())
    ended = rig.end(4).value
    assert ended["condition"] == ("COMPLETE" if times == 1 else "INCOMPLETE")
    assert ended["rows"] == (2340 if times == 1 else 40)
    found = verify(Path(ended["files"][0]))
    assert found.ok == (times == 1), found.findings
    if times == 2:
        assert any("missing" in line for line in found.findings), found.findings


def test_packed_rows_are_unpacked_for_a_while_after_damaged_ones(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checksums that are right although the packed rows are not those of the block: a mistake of the producer."""
    caplog.set_level("INFO")
    monkeypatch.setattr(open_run, "RETRY_DELAY", 0.05)
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(schema.CHUNK_ROWS)) for _ in range(4)]
    right = [packed_rows(made) for _, made in blocks]
    nonsense = memoryview(bytes(1000))
    wrong = [packed._replace(data=nonsense, crc32=zlib.crc32(nonsense)) for packed in right]

    def take(number: int, packed: PackedRows) -> None:
        rig.storage.receive("LArPix board", blocks[number][0], None, packed)
        rig.storage.report_to(rig.stream)

    take(0, right[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "the first block")
    take(1, wrong[1])  # not unpacked before the journal needs it
    run = rig.storage._runs[RUN]
    rig.until(lambda: run.failure, "the damaged chunk to be found")
    assert "packed rows of LArPix board are unpacked before they are stored for 60 s" in caplog.text
    rig.until(lambda: run.file is not None, "the next part")
    take(1, right[1])
    before = len(rig.stream.resubscribed_at)
    take(2, wrong[2])
    assert len(rig.stream.resubscribed_at) == before + 1, "it is found at once, and requested again"
    assert "as they come again" not in caplog.text
    rig.storage._mistrusted["LArPix board"] = 0.0  # monotonic
    take(2, right[2])
    take(3, right[3])
    assert "packed rows of LArPix board are stored as they come again" in caplog.text
    rig.take(feed.end())
    ended = rig.end(4).value
    assert (ended["condition"], ended["rows"]) == ("COMPLETE", 4 * schema.CHUNK_ROWS)
    assert len(ended["files"]) == 2


@pytest.mark.parametrize("content", ["no rows", "no end", "other rows", "right"])
def test_packed_chunks_without_time_to_unpack_them_are_unpacked_after_the_close(
    rigs: Callable[..., Rig], content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged ones, which their producer has freed, are in log, status and sidecar, and verify finds them too."""
    caplog.set_level("INFO")
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    made = [rows(schema.CHUNK_ROWS), random_rows(np.random.default_rng(9), schema.CHUNK_ROWS)]
    for number in range(LEAST):
        block, rows_of = feed.block(made[0])
        packed = packed_rows(rows_of)
        if number == 2 and content != "right":  # with checksums that are right: a mistake of the producer
            wrong = {"no rows": bytes(1000), "no end": packed.data[:-4], "other rows": packed_rows(made[1]).data}
            data = memoryview(wrong[content])
            packed = packed._replace(data=data, crc32=zlib.crc32(data))
        rig.storage.receive("LArPix board", block, None, packed)
    rig.take(feed.end())
    call = rig.end(feed.sequence)
    assert call.value["condition"] == "COMPLETE"
    path = Path(call.value["files"][0])
    what = "chunks are good" if content == "right" else "rows 32768 to 49152, "
    rig.until(lambda: f"{what}" in caplog.text, "the check")
    sidecar = path.with_suffix(".json")
    if content == "right":
        assert rig.storage.status().not_recovered == []
        rig.until(sidecar.exists, "the sidecar")
        assert "damaged" not in json.loads(sidecar.read_text())
        return
    (line,) = rig.storage.status().not_recovered
    assert "rows 32768 to 49152, " + ("are not the rows that" if content == "other rows" else "cannot be read") in line
    rig.until(lambda: sidecar.exists() and "damaged" in json.loads(sidecar.read_text()), "the sidecar")
    assert json.loads(sidecar.read_text())["damaged"] == [line]
    assert not verify(path).ok


def test_packed_chunks_that_are_not_unpacked_at_the_end_of_the_process_are_named(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finisher, "CHECK_REST", (1e6, 1e6))
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    for _ in range(LEAST):
        block, rows_of = feed.block(rows(schema.CHUNK_ROWS))
        rig.storage.receive("LArPix board", block, None, packed_rows(rows_of))
    rig.take(feed.end())
    (file,) = rig.end(feed.sequence).value["files"]
    rig.storage.close()
    assert f"{Path(file).name}: not all of its packed chunks were unpacked: larpixdaq verify does it" in caplog.text


@pytest.mark.parametrize("early", [False, True], ids=["prepared first", "blocks first"])
def test_a_restarted_storage_continues_in_the_next_part(rigs: Callable[..., Rig], early: bool) -> None:
    """Positions count part and journal; no block there is requested again or reported as missing."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(*[feed.block(rows(n)) for n in (10, 20, 30)])
    rig.until(lambda: rig.stream.next == {feed.origin: 3}, "three blocks in the journal")
    kill(rig)
    again = rigs()
    assert {(p.run, p.producer, p.epoch, p.next) for p in again.storage.positions()} == {(*feed.origin, 3)}
    further = [feed.block(rows(n)) for n in (40, 50)]
    if early:
        again.take(further[0])
    answer = again.prepare("cosmics, second part")
    with pytest.raises(StateError, match="open already"):
        again.prepare()
    again.take(*further[early:], feed.end())
    ended = again.end(5).value
    assert ended["condition"] == "COMPLETE", ended
    assert ended["rows"] == 150
    first, path = ended["files"]
    assert first.endswith("_000.h5")
    assert path.endswith("_001.h5")
    assert answer.file == path + ".part"
    assert verify(Path(path)).ok
    about = file_info(path)
    assert (about["part"], about["rows"]) == (1, 90)
    assert about["missing_blocks"] == 0
    assert about["required_producers"] == ["LArPix board"]


@pytest.mark.parametrize("hurt", [1, 2])
def test_a_restart_with_a_damaged_journal(
    rigs: Callable[..., Rig], tmp_path: Path, caplog: pytest.LogCaptureFixture, hurt: int
) -> None:
    """The run continues, the missing block is counted, also when it is the last, and the journal is kept."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(*[feed.block(rows(1000 + n)) for n in range(3)])
    rig.until(lambda: rig.stream.next == {feed.origin: 3}, "three blocks in the journal")
    kill(rig)
    (journal,) = tmp_path.glob("*.journal")
    content = bytearray(journal.read_bytes())
    content[len(content) * hurt // 3 + 500] ^= 1
    journal.write_bytes(content)
    again = rigs()
    again.prepare()
    again.take(feed.block(rows(40)), feed.end())
    ended = again.end(4).value
    assert (ended["condition"], ended["rows"]) == ("INCOMPLETE", 2040 + 3 - hurt)
    assert any("the journal has no whole block in its bytes" in reason for reason in ended["reasons"])
    assert any(f"blocks {hurt} to {hurt} are in no part" in reason for reason in ended["reasons"])
    assert [entry.levelname for entry in caplog.records if "DAMAGED: the journal" in entry.message] == ["ERROR"]
    assert (tmp_path / f"{journal.name}.damaged").read_bytes() == content


def test_a_part_that_is_locked_at_the_start_is_recovered_afterwards(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    """Another process, a recovery by hand or a reader, had the lock for a moment."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(1000)))
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    kill(rig)
    (journal,) = tmp_path.glob("*.journal")
    with open(journal) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        again = rigs()
    assert {(p.run, p.producer, p.epoch, p.next) for p in again.storage.positions()} == {(*feed.origin, 1)}
    again.until(lambda: list(tmp_path.glob("*_000.h5")), "the recovered part")


def test_an_empty_part_leaves_no_gap_in_the_part_numbers(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    """The next storage removes it before the next part gets its number."""
    rig, feed = rigs(limits=parse_limit("60rows")), Feed(RUN)
    rig.prepare()
    rig.take(*[feed.block(rows(n)) for n in (10, 50)])
    rig.until(lambda: rig.stream.next == {feed.origin: 2}, "two blocks")
    rig.storage._rotate(rig.storage._runs[RUN])
    rig.until(lambda: list(tmp_path.glob("*_000.h5")), "the first part's final name")
    assert list(tmp_path.glob("*_001.h5.part"))
    kill(rig)
    again = rigs()
    again.prepare()
    again.take(feed.block(rows(30)), feed.end())
    ended = again.end(3).value
    assert (ended["condition"], ended["rows"]) == ("COMPLETE", 90), ended
    assert [Path(path).name[-7:] for path in ended["files"]] == ["_000.h5", "_001.h5"]


def test_a_run_continues_while_its_previous_part_is_recovered(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery reads every row; only the verdict on the run waits for it."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(*[feed.block(rows(n)) for n in (10, 20, 30)])
    rig.until(lambda: rig.stream.next == {feed.origin: 3}, "three blocks in the journal")
    part = rig.storage._runs[RUN].file.path
    kill(rig)
    go_on = threading.Event()

    def slow(path: Path, give_up: Callable[[], bool]) -> Any:
        assert go_on.wait(LIMIT)
        return recover(path, give_up)

    monkeypatch.setattr(finisher, "recover", slow)
    again = rigs()
    assert {(p.run, p.producer, p.epoch, p.next) for p in again.storage.positions()} == {(*feed.origin, 3)}
    again.prepare()
    again.take(feed.block(rows(40)))
    again.until(lambda: again.stream.next == {feed.origin: 4}, "a block in the next part")
    assert again.storage.status().recovering == [part.name]
    again.take(feed.end())
    call = Answered()
    again.storage.end_run(call, RUN, "closed", [{"name": "LArPix board", "epoch": 7, "next": 4}])
    (last,) = again.until(lambda: list(tmp_path.glob("*_001.h5")), "the next part to have its name")
    assert verify(last).ok
    assert part.exists()
    assert call.value is None
    go_on.set()
    ended = again.until(lambda: call.value, "the answer to end_run")
    assert (ended["condition"], ended["rows"], len(ended["files"])) == ("COMPLETE", 100, 2)
    assert again.storage.status().recovering == []
    assert not part.exists()


def test_a_long_recovery_delays_neither_verdict_nor_end(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is judged by the finished parts; the next storage repeats the recovery."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(*[feed.block(rows(16_000)) for _ in range(5)])
    rig.until(lambda: rig.stream.next == {feed.origin: 5}, "more than a batch")
    kill(rig)
    begun = threading.Event()

    def long(path: Path, give_up: Callable[[], bool]) -> Any:
        begun.set()
        until(give_up, "to be given up")
        return recover(path, give_up)

    with monkeypatch.context() as slow:
        slow.setattr(finisher, "recover", long)
        slow.setattr("larpixdaq.storage.service.RECOVERY_LIMIT", 0.1)
        again = rigs()
        again.prepare()
        again.take(feed.end())
        ended = again.end(5).value
        assert (ended["condition"], ended["rows"]) == ("INTERRUPTED", 0)
        assert "_000.h5.part is not closed" in ended["reasons"][0]
        assert begun.is_set()
        again.storage.close()
    assert "recovery was interrupted" in caplog.text
    third = rigs()
    call = Answered()
    third.storage.report_run(call, RUN)
    third.until(lambda: call.value, "the report")
    assert (call.value["condition"], call.value["rows"]) == ("COMPLETE", 80_000)
    assert not list(tmp_path.glob("*.part"))


def test_blocks_are_requested_again_after_a_disk_failure(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_run, "RETRY_DELAY", 0.05)
    rig, feed = rigs(), Feed(RUN)
    first, second = feed.block(rows(10)), feed.block(rows(20))
    with monkeypatch.context() as broken:

        def full(*args: Any, **more: Any) -> Any:
            raise FileError("cannot create it: No space left on device")

        broken.setattr(open_run, "RunFile", full)
        rig.take(first, second)
        assert rig.stream.next == {}
    rig.until(lambda: rig.stream.resubscribed_at, "the next try")
    rig.take(first, second, feed.end())
    rig.until(lambda: rig.stream.next == {feed.origin: 3}, "all of it to be durable")
    rig.until(lambda: not rig.storage._runs, "the part to be closed 1 s after the end")
    (path,) = rig.until(lambda: list(tmp_path.glob("*.h5")), "its final name")
    assert file_info(path)["condition"] == "COMPLETE"


def test_a_run_continues_after_its_file_fails(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The part is recovered, and the next part has the same metadata; end_run reports both."""
    monkeypatch.setattr(open_run, "RETRY_DELAY", 0.05)
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20, 30)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    tries = []

    def full(*args: Any, **more: Any) -> Any:
        tries.append(args)
        raise FileError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(rig.storage._runs[RUN].file._journal, "append", full)
        broken.setattr(open_run, "RunFile", full)
        rig.take(blocks[1])
        rig.until(lambda: not rig.storage._runs[RUN].file, "the failure")
        assert "No space left" in rig.storage.status().paused
        rig.take(blocks[2])  # ignored
        rig.until(lambda: len(tries) > 3, "further tries")
        assert rig.stream.resubscribed_at == []
    rig.until(lambda: rig.stream.resubscribed_at == [{feed.origin: 1}], "the further part")
    assert rig.storage.status().paused == ""
    rig.take(*blocks[1:], feed.end())
    ended = rig.end(3).value
    assert ended["condition"] == "COMPLETE"
    assert ended["rows"] == 60
    assert [Path(path).name[-7:] for path in ended["files"]] == ["_000.h5", "_001.h5"]
    assert [dict(file_info(path)["texts"])["comment"] for path in ended["files"]] == ["cosmics"] * 2
    assert rig.stream.next == {feed.origin: 4}
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    assert not list(tmp_path.glob("*.part"))


def test_end_run_does_not_wait_for_a_failing_disk(rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("larpixdaq.storage.service.END_LIMIT", 0.1)
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")

    def broken(*args: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rig.storage._runs[RUN].file._journal, "append", broken)
    rig.take(blocks[1])
    rig.until(lambda: not rig.storage._runs[RUN].file, "the failure")
    ended = rig.end(2).value
    assert ended["condition"] == "INTERRUPTED"
    assert ended["rows"] == 10
    rig.take(blocks[1], feed.end())  # requested again, and the disk works now
    rig.until(lambda: rig.stream.next == {feed.origin: 3}, "the rest in a further part")
    rig.until(lambda: not rig.storage._runs, "that to be closed")
    call = Answered()
    rig.storage.report_run(call, RUN)
    rig.until(lambda: call.value, "the report")
    assert (call.value["condition"], call.value["rows"]) == ("COMPLETE", 30)
    assert dict(file_info(call.value["files"][1])["texts"])["comment"] == "cosmics"


def test_rotation_loses_nothing_and_doubles_nothing(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    rig, feed, second = rigs(limits=parse_limit("100rows")), Feed(RUN), Feed(RUN, "second")
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (40, 60, 1, 99, 150, 10)]
    early = second.block(rows(5))
    rig.take(blocks[0], early, second.end(), *blocks[1:], second.end(), early, feed.end())
    ended = rig.end(6).value
    assert ended["condition"] == "COMPLETE", ended
    assert ended["rows"] == 365
    files = [Path(path) for path in ended["files"]]
    assert [file_info(path)["rows"] for path in files] == [45, 61, 99, 150, 10]
    assert [file_info(path)["condition"] for path in files] == [*["CONTINUED"] * 4, "COMPLETE"]
    assert [file_info(path)["missing_blocks"] for path in files] == [0] * 5
    texts = [dict(file_info(path)["texts"]) for path in files]
    assert [text.get("previous part") for text in texts] == [None, *[path.name for path in files[:-1]]]
    assert [text.get("next part") for text in texts] == [*[path.name for path in files[1:]], None]
    assert rig.stream.next == {feed.origin: 7, second.origin: 2}
    stored = {(producer, epoch): 0 for producer, epoch, _, _ in ended["stored"]}
    for producer, epoch, _, count in ended["stored"]:
        stored[producer, epoch] += count
    assert stored == {("LArPix board", 7): 360, ("second", 7): 5}


def test_a_part_is_rotated_in_time_without_new_blocks(rigs: Callable[..., Rig]) -> None:
    rig, feed = rigs(limits=parse_limit("0.05s")), Feed(RUN)
    rig.prepare()
    first = rig.storage._runs[RUN].file
    assert first is not None
    rig.take(feed.block(rows(10)))
    rig.until(lambda: first.path.name.endswith("_000.h5"), "the first part to be closed")
    following = rig.storage._runs[RUN].file
    rig.until(lambda: rig.storage.due() is None, "nothing more to do")  # an empty part stays
    assert rig.storage._runs[RUN].file is following
    assert rig.storage.status().rows == 10
    rig.take(feed.end())
    assert rig.end(1).value["condition"] == "COMPLETE"


@pytest.mark.parametrize("removed", ["part", "journal", "part, noticed at the end"])
def test_a_removed_part_is_written_again(
    rigs: Callable[..., Rig], tmp_path: Path, caplog: pytest.LogCaptureFixture, removed: str
) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    (path,) = tmp_path.glob(f"*.{removed.partition(',')[0]}")
    path.unlink()
    if "end" not in removed:
        rig.until(lambda: len(list(tmp_path.glob("*.h5"))) == 1, "the part to be written anew and closed")
        assert "was removed; it has been replaced" in caplog.text
    rig.take(blocks[1], feed.end())
    ended = rig.end(2).value
    assert (ended["condition"], ended["rows"]) == ("COMPLETE", 30)
    files = [Path(path) for path in ended["files"]]
    assert [file_info(path)["rows"] for path in files] == ([30] if "end" in removed else [10, 20])
    assert all(verify(path).ok for path in files)


def test_a_removed_part_is_written_again_when_the_disk_has_space(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.end())
    (path,) = tmp_path.glob("*.part")
    path.unlink()
    copies, copy = [], file_access.copy_content

    def full_at_first(*args: Any) -> Any:
        copies.append(args)
        if len(copies) == 1:
            raise OSError(28, "No space left on device")
        return copy(*args)

    monkeypatch.setattr("larpixdaq.hdf5.writer.copy_content", full_at_first)
    rig.end(1)
    rig.storage.close()
    assert rig.storage.finisher.lost == []
    final = path.with_suffix("")
    assert verify(final).ok
    assert file_info(final)["rows"] == 10


def test_a_removed_part_that_cannot_be_written_again_is_reported(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.end())
    (path,) = tmp_path.glob("*.part")
    path.unlink()

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("larpixdaq.hdf5.writer.copy_content", full)
    monkeypatch.setattr("larpixdaq.storage.service.RECOVERY_LIMIT", 0.1)
    rig.end(1)
    assert f"{path} was removed, and cannot be written anew: No space left on device" in caplog.text
    assert not path.exists()


def test_a_failed_rotation_continues_in_the_old_part(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, feed = rigs(limits=parse_limit("10rows")), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)))
    with monkeypatch.context() as broken:

        def full(*args: Any, **more: Any) -> Any:
            raise FileError("No space left on device")

        broken.setattr(open_run, "RunFile", full)
        rig.take(feed.block(rows(10)), feed.block(rows(10)))
    rig.take(feed.block(rows(10)), feed.end())
    assert rig.end(4).value["condition"] == "COMPLETE"
    (path,) = tmp_path.glob("*.h5")
    assert file_info(path)["rows"] == 40


def test_a_rotation_whose_old_part_fails_continues_at_the_durable_position(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_run, "RETRY_DELAY", 0.05)
    rig, feed = rigs(limits=parse_limit("10rows")), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (4, 6, 10)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    with monkeypatch.context() as broken:

        def bad(*args: Any, **more: Any) -> Any:
            raise OSError(5, "Input/output error")

        broken.setattr("larpixdaq.hdf5.writer.seal_file", bad)
        rig.take(blocks[1], blocks[2])
        assert rig.storage._runs[RUN].file is None
    rig.until(lambda: rig.stream.resubscribed_at, "a further part")
    assert set(rig.stream.next.items()) <= {(feed.origin, 1), (feed.origin, 2)}
    rig.take(*blocks[rig.stream.next[feed.origin] :], feed.end())
    ended = rig.end(3).value
    assert (ended["condition"], ended["rows"]) == ("COMPLETE", 20)


class Disk:
    """Takes the place of os.statvfs."""

    f_frsize = 1 << 20

    def __init__(self) -> None:
        self.f_bavail = 10_000

    def __call__(self, path: Any) -> Disk:
        return self


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr("larpixdaq.storage.limits.os.statvfs", disk)
    monkeypatch.setattr("larpixdaq.storage.limits.CHECK_INTERVAL", 0.0)
    return disk


def test_writing_pauses_while_the_disk_is_full(
    rigs: Callable[..., Rig], disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20, 30)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    disk.f_bavail = 63
    before = {path: path.read_bytes() for path in rig.storage.directory.iterdir()}
    rig.take(blocks[1])
    for _ in range(10):
        rig.work()
    assert "63 MiB left, 64 are reserved" in rig.storage.status().paused
    assert {path: path.read_bytes() for path in rig.storage.directory.iterdir()} == before
    disk.f_bavail = 70  # not yet enough
    rig.take(blocks[2])
    rig.work()
    assert rig.stream.resubscribed_at == []
    disk.f_bavail = 80
    rig.take(blocks[2])  # comes before the pause ends, and the block before it is missing
    rig.work()
    assert rig.stream.resubscribed_at == [{feed.origin: 1}]
    assert rig.storage.status().paused == ""
    rig.take(*blocks[1:], feed.end())
    assert rig.end(3).value["condition"] == "COMPLETE"
    assert [record.levelname for record in caplog.records if record.levelno > 20] == ["ERROR", "WARNING"]


def test_blocks_after_a_pause_do_not_follow_a_gap(rigs: Callable[..., Rig], disk: Disk) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20, 30)]
    rig.take(blocks[0])
    disk.f_bavail = 63
    rig.take(blocks[1])
    disk.f_bavail = 80
    rig.take(blocks[2])
    rig.work()
    assert len(rig.stream.resubscribed_at) == 1
    rig.take(*blocks[1:], feed.end())
    assert rig.end(3).value["condition"] == "COMPLETE"


def test_a_run_that_ends_on_a_full_disk_is_completed_later(rigs: Callable[..., Rig], disk: Disk) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    disk.f_bavail = 63
    rig.take(blocks[1], feed.end())
    ended = rig.end(2).value
    assert (ended["condition"], ended["rows"]) == ("INTERRUPTED", 10)
    assert Path(ended["files"][0]).suffix == ".h5"
    rig.take(blocks[1])
    assert not rig.storage._runs
    disk.f_bavail = 100
    rig.work()
    assert rig.stream.resubscribed_at == [{feed.origin: 1}]
    rig.take(blocks[1], feed.end())
    rig.until(lambda: not rig.storage._runs, "the further part to be closed")
    call = Answered()
    rig.storage.report_run(call, RUN)
    rig.until(lambda: call.value, "the report")
    assert (call.value["condition"], call.value["rows"]) == ("COMPLETE", 30)


def test_status_has_rate_and_time_left(rigs: Callable[..., Rig], disk: Disk) -> None:
    now = [1000.0]
    space = Space(rigs().storage.directory, lambda: now[0])
    assert (space.free(), space.seconds_left(), space.bytes_per_second()) == (10_000 << 20, None, 0)
    for second in range(30):
        space.add_sample(second * (2 << 20))
        now[0] += 1
    assert space.bytes_per_second() == 2 << 20
    assert space.seconds_left() == (10_000 - 64) // 2
    assert rigs().storage.status().seconds_left is None


def test_the_time_left_is_not_known_at_the_begin_of_a_run(rigs: Callable[..., Rig], disk: Disk) -> None:
    now = [1000.0]
    space = Space(rigs().storage.directory, lambda: now[0])
    space.free()

    def grow(total: int, seconds: int, step: int) -> set[int | None]:
        found = set()
        for second in range(seconds):
            now[0] += 1
            space.add_sample(total + second * step)
            found.add(space.seconds_left())
        return found

    expected = (10_000 - 64) // 2
    assert grow(0, 20, 0) == {None}
    assert grow(50_000, 4, 0) == {None}  # a new file without rows
    assert grow(2 << 20, 10, 2 << 20) == {None}
    assert grow(22 << 20, 20, 2 << 20) == {expected}
    assert None in grow(60 << 20, 20, 0)  # after the run
    assert grow(61 << 20, 14, 2 << 20) == {None}  # the next one


def test_a_superseded_storage_marks_its_part(rigs: Callable[..., Rig]) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)))
    rig.until(lambda: rig.stream.next == {feed.origin: 1}, "a block in the journal")
    rig.take(feed.block(rows(20)))
    rig.storage.supersede()
    rig.storage.close()
    (path,) = rig.storage.directory.glob("*.h5")
    assert json.loads(dict(file_info(path)["texts"])["superseded from"]) == [["LArPix board", 7, 1]]
    assert file_info(path)["condition"] == "CONTINUED"


def sidecar(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text())


def test_a_finished_file_has_its_checksum_beside_it(rigs: Callable[..., Rig]) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.end())
    (path,) = map(Path, rig.end(1).value["files"])
    line = rig.until(lambda: [entry for entry in rig.storage.status().finished if entry.sha256], "the checksum")[0]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = sidecar(path)
    assert found.pop("metadata")["core.runs_subruns"] == [420001]
    assert found == {
        "file": path.name, "bytes": path.stat().st_size, "sha256": digest, "run": RUN, "part": 0, "rows": 10,
        "condition": "COMPLETE", "comments": [], "name": path.name, "size": path.stat().st_size,
        "checksums": {"sha256": digest, "adler32": f"{zlib.adler32(path.read_bytes()):08x}"},
    }  # fmt: skip
    assert msgspec.to_builtins(line) == {
        "run": RUN, "file": str(path), "bytes": path.stat().st_size, "sha256": digest, "condition": "COMPLETE"
    }  # fmt: skip
    rig.storage.close()
    path.with_suffix(".json").unlink()  # as if it had been killed in between
    rigs().storage.close()
    assert sidecar(path)["sha256"] == digest
    for number, damaged in enumerate(("", '{"file": "a.h5"}', "[" * 50_000)):
        path.with_suffix(".json").write_text(damaged)
        rigs().storage.close()
        assert sidecar(path)["sha256"] == digest
        kept = f"{path.stem}.json.damaged" + (f".{number + 1}" if number else "")
        assert path.with_name(kept).read_text() == damaged


def test_a_command_runs_on_each_finished_file(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'a').write(repr((sys.argv[2:], sys.stdin.read())))"
    output = tmp_path / "told"
    rig, feed = rigs(on_close=(sys.executable, "-c", script, str(output), "two words; $HOME")), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.end())
    (path,) = rig.end(1).value["files"]
    rig.until(lambda: output.exists() and output.read_text(), "the command")
    assert output.read_text() == repr((["two words; $HOME", path], ""))
    rig.storage.close()
    assert rig.storage.status().on_close == ""


@pytest.mark.parametrize(
    ("command", "trouble"),
    [
        ((sys.executable, "-c", "import sys; print('a'); sys.exit('no tape')"), "status 1: no tape"),
        (("/nonexistent/copy",), "No such file or directory"),
        ((sys.executable, "-c", "while True: pass"), "did not end within 0.2 s and was killed"),
    ],
)
def test_a_failed_command_is_an_alarm_only(
    command: tuple[str, ...], trouble: str, rigs: Callable[..., Rig],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if "0.2 s" in trouble:  # the others have the time that they need to start
        monkeypatch.setattr("larpixdaq.storage.finisher.COMMAND_LIMIT", 0.2)
    rig, feed = rigs(on_close=command), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.end())
    assert rig.end(1).value["condition"] == "COMPLETE"
    rig.until(lambda: trouble in rig.storage.status().on_close, "the alarm")
    assert [record.levelname for record in caplog.records if trouble in record.message] == ["ERROR"]


def test_each_finished_file_has_a_raw_file_and_a_second_name(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    """The command runs on packet files and raw files. What a killed storage has not made, the next one makes."""
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
    output = tmp_path / "told"
    options = {
        "raw": True,
        "template": NameTemplate("packet-{tag}-{run}"),
        "on_close": (sys.executable, "-c", script, str(output)),
    }
    rig, feed = rigs(limits=parse_limit("10rows"), **options), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.block(rows(10)), feed.end())
    assert rig.end(2).value["condition"] == "COMPLETE"

    def told() -> list[str]:
        return output.read_text().splitlines() if output.exists() else []

    rig.until(lambda: len(told()) == 4, "the commands")
    assert rig.storage.status().on_close == ""
    packets, raws = sorted(tmp_path.glob("run*_00?.h5")), sorted(tmp_path.glob("run*.raw.h5"))
    assert sorted(told()) == sorted(map(str, [*packets, *raws]))
    assert len(packets) == len(raws) == 2
    for path, raw, name in zip(packets, raws, ("packet-test-0000042", "packet-test-0000042-2"), strict=True):
        assert (tmp_path / f"{name}.h5").samefile(path)
        assert (tmp_path / f"{name.replace('packet', 'raw')}.raw.h5").samefile(raw)
        assert sidecar(raw)["words"] == sum(count_words(path).values())
        assert sidecar(tmp_path / f"{name}.h5") == sidecar(path)
    assert verify_all([tmp_path]).ok
    rig.storage.close()
    before = {path.name for path in tmp_path.iterdir()}
    output.unlink()
    raws[1].unlink()
    raws[0].with_suffix(".json").unlink()
    assert rigs(**options).until(lambda: len(told()) == 2, "the commands") is True
    assert sorted(told()) == sorted(map(str, raws))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_raw_file_that_cannot_be_made_is_an_alarm_only(
    rigs: Callable[..., Rig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig, feed = rigs(raw=True), Feed(RUN)
    rig.prepare()
    (tmp_path / "run0000042_20261122T071251Z_000.raw.h5").write_text("precious")
    rig.take(feed.block(rows(10)), feed.end())
    assert rig.end(1).value["condition"] == "COMPLETE"
    rig.until(lambda: rig.storage.status().on_close, "the alarm")
    status = rig.storage.status()
    assert status.on_close.startswith("--raw: run0000042_20261122T071251Z_000.h5: ended with status 1: ")
    assert status.on_close.endswith("is no raw file")
    assert status.on_close_failed == 1
    assert [record.levelname for record in caplog.records if "--raw" in record.message] == ["ERROR"]
    assert (tmp_path / "run0000042_20261122T071251Z_000.raw.h5").read_text() == "precious"


def test_the_end_does_not_wait_for_a_raw_file(
    rigs: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process goes on without the storage. Of files that wait, the next storage has raw files made."""
    hangs = tmp_path / "python"
    hangs.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    hangs.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr("larpixdaq.storage.finisher.LAST_RAW", 0.1)
        patched.setattr(sys, "executable", str(hangs))
        rig, feed = rigs(raw=True, limits=parse_limit("10rows")), Feed(RUN)
        rig.prepare()
        rig.take(feed.block(rows(10)), feed.block(rows(10)), feed.end())
        assert rig.end(2).value["condition"] == "COMPLETE"
        pid = int(rig.until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the process"))
        rig.until(lambda: os.getpriority(os.PRIO_PROCESS, pid) >= finisher.RAW_NICE, "its low priority")
        rig.storage.close()
    named = [record.message.split()[0] for record in caplog.records if "was not waited for" in record.message]
    assert named == [f"run0000042_20261122T071251Z_00{part}.raw.h5" for part in (0, 1)]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not rig.storage.finisher._raws._thread.is_alive(), "the end of its thread")
    rigs(raw=True).until(lambda: len(list(tmp_path.glob("*.raw.json"))) == 2, "both raw files")


def test_the_time_to_a_full_disk_counts_raw_files(rigs: Callable[..., Rig]) -> None:
    assert rigs().storage.finisher.with_raw(1000) == 1000
    made = rigs(raw=True).storage.finisher
    assert (made.with_raw(None), made.with_raw(1000)) == (None, 200)
    made.raw_from_bytes, made.raw_bytes = 10, 30
    assert made.with_raw(1000) == 250


def test_the_end_does_not_wait_for_a_hanging_command(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("larpixdaq.storage.finisher.LAST_COMMANDS", 0.1)
    hangs = (sys.executable, "-c", "import sys; sys.stdin.close(); import signal; signal.pause()")
    rig, feed = rigs(on_close=hangs, limits=parse_limit("10rows")), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.block(rows(10)), feed.end())
    assert rig.end(2).value["condition"] == "COMPLETE"
    running = rig.until(lambda: rig.storage.finisher._running, "the command")
    rig.storage.close()
    running.kill()
    until(lambda: not rig.storage.finisher._commands._thread.is_alive(), "the end of the commands")
    first, second = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert f"still runs for run0000042_20261122T071251Z_000.h5 (process {running.pid})" in first
    assert "was not run for run0000042_20261122T071251Z_001.h5" in second


def test_the_end_does_not_wait_for_a_long_checksum(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    goes_on = threading.Event()

    def long(path: Path) -> Any:
        goes_on.wait(LIMIT)
        raise OSError("too late")

    with monkeypatch.context() as patched:
        patched.setattr("larpixdaq.storage.finisher.LAST_SUMS", 0.1)
        patched.setattr("larpixdaq.storage.sidecar.digests", long)
        rig, feed = rigs(), Feed(RUN)
        rig.prepare()
        rig.take(feed.block(rows(10)), feed.end())
        assert rig.end(1).value["condition"] == "COMPLETE"
        rig.storage.close()
        assert "checksums are not ready after 0.1 s" in caplog.text
        assert not list(tmp_path.glob("*.json"))
        goes_on.set()
    rigs().until(lambda: list(tmp_path.glob("*.json")), "the checksum")


def test_a_command_that_was_not_run_is_named(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()

    def late(path: Path) -> Any:
        assert goes_on.wait(LIMIT)
        return digests(path)

    digests = sidecars.digests
    monkeypatch.setattr(finisher, "LAST_SUMS", 0.0)
    monkeypatch.setattr(sidecars, "digests", late)
    rig, feed = rigs(on_close=(sys.executable, "-c", "")), Feed(RUN)
    rig.prepare()
    rig.take(feed.block(rows(10)), feed.end())
    assert rig.end(1).value["condition"] == "COMPLETE"
    closing = rig.storage.finisher

    def wait(limit: float) -> bool:
        goes_on.set()
        until(lambda: closing._summing._results, "the checksum")
        return True

    monkeypatch.setattr(closing._commands, "drain", wait)
    rig.storage.close()
    assert "was not run for run0000042_20261122T071251Z_000.h5" in caplog.text


def test_the_number_of_unannounced_runs_is_limited(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A producer that names another run in each block does not open a file for each."""
    monkeypatch.setattr("larpixdaq.storage.service.MOST_UNANNOUNCED", 2)
    monkeypatch.setattr("larpixdaq.storage.service.UNANNOUNCED_CLOSE", -1.0)
    rig = rigs()
    feeds = [Feed(run) for run in range(1, 6)]
    rig.take(*(feed.block(rows(10)) for feed in feeds))
    assert sorted(rig.storage._runs) == [1, 2]
    assert sum("its blocks stay with" in record.message for record in caplog.records) == 1
    rig.prepare()  # of the run that is announced
    rig.take(Feed(RUN).block(rows(10)))
    assert sorted(rig.storage._runs) == [1, 2, RUN]
    asked = len(rig.stream.resubscribed_at)
    rig.take(feeds[0].end())
    rig.until(lambda: 1 not in rig.storage._runs, "the first to be closed")
    assert len(rig.stream.resubscribed_at) == asked + 1  # for the refused blocks
    again = Feed(3)
    rig.take(again.block(rows(10)))
    assert 3 in rig.storage._runs


def test_a_cancelled_run_with_an_end_record_leaves_nothing(rigs: Callable[..., Rig], tmp_path: Path) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.end("aborted"))
    rig.storage.cancel_run(Answered(), RUN)
    assert list(tmp_path.iterdir()) == []
