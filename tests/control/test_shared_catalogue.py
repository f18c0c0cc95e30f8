"""The catalogues of two cores with one bucket: numbers are drawn once, and the next core has the runs and comments."""

import itertools
import shutil
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import pytest
from example_counts import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY
from larpixdaq.constants import BEGINNING, ENDED, READY, RUN
from larpixdaq.control.catalogue import Author, Catalogue, Run
from larpixdaq.control.shared_catalogue import SharedCatalogue
from larpixdaq.errors import BrokerError, FileError, RequestError, RevisionConflict
from larpixdaq.stream.lease import Entry

AUTHOR = Author("Ada", "operator", "key")


class FakeBucket:
    """A bucket in memory. `fails`: "before" or "after": the next write fails, before or after it has an effect."""

    def __init__(self):
        self.entries = {}
        self.revisions = itertools.count(1)
        self.fails = ""
        self.away = False

    def get(self, keys, limit=1.0):
        if self.away:
            raise BrokerError("no broker")
        return [self.entries.get(key) for key in keys]

    def put(self, key, value, revision, limit=1.0):
        fails, self.fails = self.fails, ""
        if fails == "before" or self.away:
            raise BrokerError("no answer")
        known = self.entries.get(key)
        if revision != (known.revision if known is not None else 0):
            raise RevisionConflict("another process has written it")
        self.entries[key] = Entry(value, next(self.revisions))
        if fails == "after":
            raise BrokerError("no answer")
        return self.entries[key].revision

    def remove(self, key):
        self.entries.pop(key, None)


@pytest.fixture
def bucket(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    return FakeBucket()


def a_run(number, phase="PREPARING", time_ns=None):
    return Run(number, "test", "", "operator", time_ns or number * 1000, phase)


def draw(catalogue):
    """Draw and save a run, as prepare_run does."""
    run = a_run(catalogue.draw(catalogue.highest))
    catalogue.save(run, new=True)
    return run


def test_next_core_has_runs_and_comments(tmp_path, bucket):
    with closing(SharedCatalogue(tmp_path / "a", bucket)) as first:
        for _ in range(3):
            run = draw(first)
            run.phase = ENDED
            first.save(run)
            first.add_comment(run.run, f"comment on {run.run}", AUTHOR)
        run = draw(first)
        run.phase = RUN
        run.producers = {"board": [1]}
        first.save(run)
        # The first core is dead, its catalogue is still open.
        with closing(SharedCatalogue(tmp_path / "b", bucket)) as second:
            assert second.find() == run
            assert second.highest == 4
            assert [comment["text"] for comment in second.comments(2)] == ["comment on 2"]
            second.add_comment(4, "from the second", AUTHOR)
            assert draw(second).run == 5
            run.phase = ENDED
            first.save(run)  # written here, but not into the bucket
            with pytest.raises(FileError, match="another process"):
                first.draw(first.highest)
            with pytest.raises(RequestError, match="another process"):
                first.add_comment(4, "too late", AUTHOR)
            second.add_comment(4, "once more", AUTHOR)
            assert second.find(4).phase == RUN
    with closing(SharedCatalogue(tmp_path / "a", bucket)) as again:
        assert again.find(4).phase == RUN
        assert again.highest == 5
        assert [comment["text"] for comment in again.comments(4)] == ["from the second", "once more"]


def test_catalogue_from_before_the_brokers_continues_its_numbers(tmp_path, bucket):
    with closing(Catalogue(tmp_path)) as old:
        old.save(a_run(7, ENDED), new=True)
        old.add_comment(7, "old", AUTHOR)
    with closing(SharedCatalogue(tmp_path, bucket)) as catalogue:
        assert draw(catalogue).run == 8
    with closing(SharedCatalogue(tmp_path / "b", bucket)) as second:
        assert draw(second).run == 9
        assert second.find(7) is not None
        second.add_comment(7, "new", AUTHOR)  # by another number, because storages have the old one
        with second._errors():
            assert second._db.execute("SELECT rowid FROM comments").fetchall() == [(2,)]


def test_runs_of_another_detector_are_not_replaced(tmp_path, bucket):
    with closing(SharedCatalogue(tmp_path / "a", bucket)) as first:
        draw(first)
    with closing(Catalogue(tmp_path / "b")) as other:
        other.save(a_run(1, ENDED, 5), new=True)
    with pytest.raises(FileError, match=r"run 1 is another run .* --state-dir of its own$"):
        SharedCatalogue(tmp_path / "b", bucket)
    with closing(Catalogue(tmp_path / "b")) as other:
        assert other.find(1).prepared_ns == 5


def test_without_brokers_no_run_begins_and_a_run_goes_on(tmp_path, bucket):
    with closing(SharedCatalogue(tmp_path, bucket)) as catalogue:
        run = draw(catalogue)
        bucket.away = True
        with pytest.raises(FileError, match=r"^no run number: no answer"):
            catalogue.draw(catalogue.highest)
        run.phase = READY
        catalogue.save(run)
        run.phase = BEGINNING
        with pytest.raises(FileError, match="not known to the other cores"):
            catalogue.save(run)
        run.phase = RUN
        catalogue.save(run)
        with pytest.raises(RequestError, match="comment: not written"):
            catalogue.add_comment(1, "lost?", AUTHOR)
        assert catalogue.comments(1) == []
        bucket.away = False
        catalogue.keep()
        assert b'"RUN"' in bucket.entries["run.1"].value


HUGE = msgspec.json.encode(a_run(2, RUN, 2**63))


@pytest.mark.parametrize("value", [b"", b"{}", b"\xff", b'{"run": 2}', msgspec.json.encode(a_run(3)), HUGE])
def test_damaged_run_in_the_bucket_is_a_warning(tmp_path, bucket, value):
    bucket.put("run.highest", b"writer 2", 0)
    bucket.put("run.2", b"writer " + value, 0)
    bucket.put("comment.highest", b"writer 2", 0)
    bucket.put("comment.1", value, 0)
    bucket.put("comment.2", b'writer [1, %d, "", "", "", ""]' % 2**63, 0)
    with closing(SharedCatalogue(tmp_path, bucket)) as catalogue:
        assert len(catalogue.warnings) == 3
        assert draw(catalogue).run == 3
        catalogue.add_comment(3, "new", AUTHOR)
        assert "comment.3" in bucket.entries


def test_old_run_that_was_not_read_is_written_too(tmp_path, bucket):
    with closing(SharedCatalogue(tmp_path / "a", bucket)) as first:
        runs = [draw(first) for _ in range(102)]
    with closing(SharedCatalogue(tmp_path / "a", bucket)) as again:
        assert again.find(1) == runs[0]
        runs[0].comment = "judged again"
        runs[0].phase = ENDED
        again.save(runs[0])
        again.keep()
        newest = draw(again)
        assert f'"run":{newest.run}'.encode() in bucket.entries[f"run.{newest.run}"].value
        assert b"judged again" in bucket.entries["run.1"].value


def test_last_write_of_the_earlier_core_comes_while_the_next_one_takes_over(tmp_path, bucket):
    with closing(SharedCatalogue(tmp_path / "a", bucket)) as first:
        run = draw(first)
        run.phase = RUN
        write, bucket.put = bucket.put, None

        def put(key, *arguments):
            bucket.put = write
            first.save(run)
            return write(key, *arguments)

        bucket.put = put
        with closing(SharedCatalogue(tmp_path / "b", bucket)) as second:
            assert second.find(1) == run


def test_lost_answer_is_not_confused_with_the_write_of_another_core(tmp_path, bucket):
    with (
        closing(SharedCatalogue(tmp_path / "b", bucket)) as late,
        closing(SharedCatalogue(tmp_path / "a", bucket)) as now,
    ):
        assert now.draw(0) == 1
        bucket.fails = "before"
        for _ in range(2):
            with pytest.raises(FileError, match="no run number"):
                late.draw(0)


@pytest.mark.parametrize("value", [b"writer seven", b"writer -1", b"writer " + b"9" * 5000, b"7"])
def test_damaged_number_in_the_bucket_is_refused(tmp_path, bucket, value):
    bucket.put("run.highest", value, 0)
    with pytest.raises(FileError, match=r"run.highest in the bucket: expected a number, found b'[^']*'$"):
        SharedCatalogue(tmp_path, bucket)


class Model(RuleBasedStateMachine):
    """Two cores, of which the last one that was started is active, whatever the other still tries."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else None))
        self.bucket = FakeBucket()
        self.open = {}
        self.drawn = []
        self.active = self.state = None
        self.start("a")

    def start(self, name):
        if name in self.open:
            self.open.pop(name).close()
        self.bucket.fails = ""
        (self.folder / name).mkdir(exist_ok=True)
        self.open[name] = SharedCatalogue(self.folder / name, self.bucket)
        self.active = name
        if self.state is not None:
            found = self.open[name].find(self.state[0])
            assert found is not None
            assert (found.run, found.comment) == self.state

    @rule(name=st.sampled_from("ab"))
    def take_over(self, name):
        self.start(name)

    @rule(name=st.sampled_from("ab"), fails=st.sampled_from(["", "", "before", "after"]))
    def prepare(self, name, fails):
        if (catalogue := self.open.get(name)) is None:
            return
        self.bucket.fails = fails
        with suppress(FileError):
            number = catalogue.draw(catalogue.highest)
            assert name == self.active
            assert number not in self.drawn
            self.drawn.append(number)
            catalogue.save(a_run(number), new=True)
            self.state = number, ""

    @rule(name=st.sampled_from("ab"), text=st.text(max_size=3), fails=st.sampled_from(["", "before", "after"]))
    def change(self, name, text, fails):
        """Save a later state of the last run, and what is owed a second later."""
        if (catalogue := self.open.get(name)) is None or (run := catalogue.find()) is None:
            return
        run.comment, run.phase = text, RUN
        self.bucket.fails = fails
        catalogue.save(run)
        catalogue.keep()
        if name == self.active and self.state is not None:
            self.state = run.run, text

    @rule(name=st.sampled_from("ab"), fails=st.sampled_from(["", "before", "after"]))
    def comment(self, name, fails):
        if (catalogue := self.open.get(name)) is None or catalogue.find() is None:
            return
        self.bucket.fails = fails
        with suppress(RequestError):
            catalogue.add_comment(1, name, AUTHOR)
            assert name == self.active

    def teardown(self):
        for catalogue in self.open.values():
            catalogue.close()
        shutil.rmtree(self.folder)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=examples(50), stateful_step_count=25, deadline=None)
