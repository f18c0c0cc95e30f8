"""Comments of the e-log in files and sidecars: in the open part, in the sidecars of closed ones, and nowhere twice."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from example_counts import examples
from file_builder import NS, Feed, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import until

from larpixdaq.cli import main
from larpixdaq.errors import FileError
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.reports import Comment
from larpixdaq.storage.limits import Limits
from larpixdaq.storage.service import StorageService

RUN = 42
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=400)


class Answer:
    value: Any = None
    error = ""

    def result(self, value: Any) -> None:
        self.value = msgspec.to_builtins(value)

    def fail(self, error: str, code: str = "") -> None:
        self.error = error


class Storage:
    """A StorageService, and the blocks that it takes."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        self.service = StorageService(directory, "Offline storage", "", **options)
        self.service.resume()
        self.feed = Feed(RUN)

    def prepare(self) -> None:
        producers = ["LArPix board"]
        self.service.prepare_run(Answer(), RUN, "test", "cosmics", "me", NS, 2, "2", producers, {}, shifter="Ada Ω")  # type: ignore[arg-type]

    def take(self, rows: int) -> None:
        header, content = self.feed.block(random_rows(np.random.default_rng(rows), rows))
        self.service.receive("LArPix board", header, memoryview(content.view(np.uint8)))
        self.service.work()

    def _await(self, answer: Answer) -> Any:
        def answered() -> Any:
            self.service.work()
            return answer.error or answer.value is not None

        until(answered, "an answer")
        assert not answer.error
        return answer.value

    def comment(self, *comments: Comment) -> int:
        """Returns the number of sidecars with the comments."""
        answer = Answer()
        self.service.add_comments(answer, RUN, msgspec.to_builtins(comments))  # type: ignore[arg-type]
        return int(self._await(answer)["sidecars"])

    def end(self) -> Any:
        end = self.feed.end()
        self.service.receive("LArPix board", end, None)
        answer = Answer()
        producers = [{"name": "LArPix board", "epoch": self.feed.origin.epoch, "next": end.next}]
        self.service.end_run(answer, RUN, "closed", producers)  # type: ignore[arg-type]
        return self._await(answer)

    def sidecars(self, number: int) -> list[Any]:
        """Wait for this number of sidecars; returns the texts in each."""

        def found() -> Any:
            self.service.work()
            paths = sorted(self.directory.glob("*.json"))
            return paths if len(paths) == number else None

        contents = [json.loads(path.read_text()) for path in until(found, f"{number} sidecars")]
        assert all(len(content["sha256"]) == 64 for content in contents)
        return [[comment["text"] for comment in content["comments"]] for content in contents]


@contextmanager
def storage(directory: Path, **options: Any) -> Iterator[Storage]:
    made = Storage(directory, **options)
    with closing(made.service):
        yield made


def note(number: int, text: str, by: str = "") -> Comment:
    return Comment(number, NS + number, by, "me@daq1", text)


def texts(path: Path) -> list[str]:
    return [comment["text"] for comment in file_info(path)["comments"]]


def test_comments_before_and_after_the_end_of_a_run_of_two_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with storage(tmp_path, limits=Limits(rows=1000)) as line:
        line.prepare()
        assert line.comment(note(1, "one", "Ada")) == 0
        assert line.comment(note(1, "one", "Ada")) == 0  # repeated, as after a restart of the core
        line.take(900)
        line.take(900)  # the second part
        assert line.sidecars(1) == [["one"]]
        assert line.comment(note(2, "two")) == 1
        files = [Path(file) for file in line.end()["files"]]
        assert [texts(path) for path in files] == [["one"], ["two"]]
        assert line.sidecars(2) == [["one", "two"], ["two"]]
        assert line.comment(note(3, "three\x1b"), note(4, "four")) == 2
        assert line.comment(note(4, "four")) == 2
        assert line.sidecars(2) == [["one", "two", "three\x1b", "four"], ["two", "three\x1b", "four"]]
        files[0].with_suffix(".json").write_text("no JSON")
        answer = Answer()
        line.service.add_comments(answer, RUN, msgspec.to_builtins([note(5, "five")]))  # type: ignore[arg-type]
        until(lambda: line.service.work() or answer.error, "the refusal")
        assert f"{files[0].with_suffix('.json')} is damaged" in answer.error
    assert all(verify(path).findings == [] for path in files)
    assert not list(tmp_path.glob("*.new"))
    assert main(["info", str(files[0])]) == 0
    out = capsys.readouterr().out
    assert "shifter          Ada Ω\n" in out
    assert "UTC, Ada, me@daq1: one\n" in out
    assert "e-log " in out


def test_comments_wait_for_the_next_part_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storage(tmp_path) as line:
        line.prepare()
        line.take(100)
        broken = True

        def add_comment(self: RunFile, comment: Comment) -> None:
            if broken:
                self.failed = "cannot be written any more: made up"
                raise FileError(f"{self.path} {self.failed}")
            original(self, comment)

        original = RunFile.add_comment
        monkeypatch.setattr(RunFile, "add_comment", add_comment)
        monkeypatch.setattr("larpixdaq.storage.open_run.RETRY_DELAY", 0.0)
        line.comment(note(1, "one"))
        broken = False
        run = line.service._runs[RUN]
        run.retry_at = 0.0
        until(lambda: line.service.work() or run.file, "the next part")
        line.comment(note(2, "two"))
        assert run.file is not None
        assert texts(run.file.path) == ["one", "two"]


def test_a_recovered_part_keeps_its_comments(tmp_path: Path) -> None:
    line = Storage(tmp_path)
    line.prepare()
    line.take(100)
    until(lambda: line.service.work() or line.service.positions(), "the block in the journal")
    line.comment(note(1, "one"))
    run = line.service._runs.pop(RUN)
    assert run.file is not None
    run.file.abandon()  # as a killed storage leaves it
    line.service.close()
    with storage(tmp_path) as successor:
        answer = Answer()  # to a comment that comes before the part is recovered
        successor.service.add_comments(answer, RUN, msgspec.to_builtins([note(2, "two")]))  # type: ignore[arg-type]
        assert successor.sidecars(1) == [["one", "two"]]
        assert texts(next(tmp_path.glob("*.h5"))) == ["one"]
        assert successor.comment(note(3, "three")) == 1
        assert successor.sidecars(1) == [["one", "two", "three"]]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.integers(0, 4))
@settings(max_examples=examples(10), deadline=None)
def test_texts_come_out_of_file_and_sidecar_as_they_went_in(entries: list[tuple[str, str]], before: int) -> None:
    comments = [note(number, text, by) for number, (text, by) in enumerate(entries)]
    with tempfile.TemporaryDirectory() as folder, storage(Path(folder)) as line:
        line.prepare()
        line.take(10)
        line.comment(*comments[:before])
        (file,) = line.end()["files"]
        line.sidecars(1)
        line.comment(*comments[before:])
        assert file_info(Path(file))["comments"] == msgspec.to_builtins(comments[:before])
        content = json.loads(Path(file).with_suffix(".json").read_text())
        assert content["comments"] == msgspec.to_builtins(comments)
