"""The storage process's own part, without core and producer: which file a block goes to, and what is acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filling import NS, Feed, random_rows
from processes import until

from larpixdaq import storing
from larpixdaq.blocks import Source
from larpixdaq.errors import FileError, StateError
from larpixdaq.files.info import info
from larpixdaq.files.verify import verify
from larpixdaq.storing import Storing

RUN = 42


class Answered:
    """Takes the place of a call; what it was answered."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error = ""

    def result(self, value: Any) -> None:
        self.value = value

    def fail(self, error: str) -> None:
        self.error = error


class Acknowledgements:
    """Takes the place of the stream's thread."""

    queued = 0

    def __init__(self) -> None:
        self.next: dict[Source, int] = {}
        self.again_at: list[dict[Source, int]] = []

    def acknowledge(self, source: Source, following: int) -> None:
        self.next[source] = following

    def again(self) -> None:
        self.again_at.append(dict(self.next))

    def close(self) -> None: ...


class Rig:
    def __init__(self, directory: Path) -> None:
        self.storage = Storing(directory, "Offline storage", "")
        self.storage.resume()
        self.stream = self.storage.stream = Acknowledgements()

    def prepare(self, comment: str = "cosmics") -> Any:
        producers = [{"name": "LArPix board", "epoch": 7, "layout": 2}]
        return self.storage.prepare_run(Answered(), RUN, "test", comment, "me", NS, 2, "2", producers, {})

    def take(self, *frames: Any) -> None:
        for frame in frames:
            header, rows = frame if isinstance(frame, tuple) else (frame, None)
            self.storage.receive("LArPix board", header, None if rows is None else memoryview(rows.view(np.uint8)))

    def work(self) -> None:
        self.storage.work()

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
def rigs(tmp_path: Path) -> Iterator[Callable[[], Rig]]:
    made: list[Rig] = []

    def make() -> Rig:
        made.append(Rig(tmp_path))
        return made[-1]

    yield make
    for rig in made:
        rig.storage.close()


def rows(n: int) -> Any:
    return random_rows(np.random.default_rng(n), n)


def kill(rig: Rig) -> None:
    """What a killed storage leaves: part and journal, unlocked."""
    for run in rig.storage._runs.values():
        run.file.abandon()
    rig.storage._runs.clear()


def test_all_is_acknowledged_when_the_file_is_closed(rigs: Callable[[], Rig]) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.info("Beginning run"), feed.block(rows(1000)), feed.info("Ending run"), feed.end())
    call = rig.end(3)
    assert call.value["condition"] == "COMPLETE", call.error
    assert rig.stream.next == {feed.source: 4}  # the end counts as a sequence
    # What a new subscription brings again goes nowhere.
    rig.take(Feed(RUN).block(rows(1000)), feed.end())
    assert not rig.storage._runs
    assert rig.storage.duplicates == 2


@pytest.mark.parametrize("early", [False, True], ids=["prepared first", "blocks first"])
def test_a_storage_that_comes_back_goes_on_in_a_further_part(rigs: Callable[[], Rig], early: bool) -> None:
    """Positions count over part and journal; nothing that is there already is asked for, or called missing."""
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(*[feed.block(rows(n)) for n in (10, 20, 30)])
    rig.until(lambda: rig.stream.next == {feed.source: 3}, "three blocks in the journal")
    kill(rig)
    again = rigs()
    assert {(p.run, p.producer, p.epoch, p.next) for p in again.storage.where()} == {(*feed.source, 3)}
    further = [feed.block(rows(n)) for n in (40, 50)]
    if early:
        again.take(further[0])
    answer = again.prepare("cosmics, second part")
    with pytest.raises(StateError, match="open already"):
        again.prepare()
    again.take(*further[early:], feed.end())
    ended = again.end(5).value
    assert ended["condition"] == "COMPLETE", ended
    assert ended["rows"] == 90
    (path,) = ended["files"]
    assert path.endswith("_001.h5")
    assert answer["file"] == path + ".part"
    assert verify(Path(path)).ok
    about = info(path)
    assert about["part"] == 1
    assert about["missing_blocks"] == 0
    assert about["required_producers"] == ["LArPix board"]


def test_a_disk_that_fails_kills_nobody_and_its_blocks_are_asked_for_again(
    rigs: Callable[[], Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "AGAIN", 0.05)
    rig, feed = rigs(), Feed(RUN)
    first, second = feed.block(rows(10)), feed.block(rows(20))
    with monkeypatch.context() as broken:

        def full(*args: Any) -> Any:
            raise FileError("cannot create it: No space left on device")

        broken.setattr(storing, "RunFile", full)
        rig.take(first, second)
        assert rig.stream.next == {}
    rig.until(lambda: rig.stream.again_at, "the next try")
    rig.take(first, second, feed.end())
    rig.until(lambda: rig.stream.next == {feed.source: 3}, "all of it to be durable")
    rig.until(lambda: not rig.storage._runs, "the part to be closed 1 s after the end")
    (path,) = tmp_path.iterdir()
    assert info(path)["condition"] == "COMPLETE"


def test_a_file_that_fails_in_a_run_is_named_and_its_blocks_are_asked_for_again(
    rigs: Callable[[], Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "AGAIN", 0.05)
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    blocks = [feed.block(rows(n)) for n in (10, 20, 30)]
    rig.take(blocks[0])
    rig.until(lambda: rig.stream.next == {feed.source: 1}, "a block in the journal")

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rig.storage._runs[RUN].file._journal, "append", full)
    rig.take(blocks[1])
    rig.until(lambda: rig.storage._runs[RUN].failed, "the failure")
    rig.take(blocks[2], feed.end())
    assert "No space left" in rig.end(3).error
    assert {path.suffix for path in tmp_path.iterdir()} == {".part", ".journal"}
    rig.until(lambda: rig.stream.again_at == [{feed.source: 1}], "the next try")
    rig.take(*blocks[1:], feed.end())
    rig.until(lambda: not rig.storage._runs, "the further part to be closed")
    (path,) = tmp_path.glob("*_001.h5")
    assert info(path)["rows"] == 50
    assert rig.stream.next == {feed.source: 4}


def test_a_cancelled_run_leaves_nothing_although_an_end_came(rigs: Callable[[], Rig], tmp_path: Path) -> None:
    rig, feed = rigs(), Feed(RUN)
    rig.prepare()
    rig.take(feed.end("aborted"))
    rig.storage.cancel_run(Answered(), RUN)
    assert list(tmp_path.iterdir()) == []
