"""The judgement of a run over its parts, by its storage and by `larpixdaq verify`."""

import json

import h5py
import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info, write

from larpixdaq import cli, constants
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import writer
from larpixdaq.hdf5.recovery import recover
from larpixdaq.hdf5.run_report import judge_run, positions, survey_run
from larpixdaq.hdf5.verify import verify, verify_all
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream

REQUIRED = ("LArPix board",)


def rows(n):
    return random_rows(np.random.default_rng(n), n)


def name(part):
    return f"run0000042_20261122T071251Z_{part:03d}.h5"


class Run:
    """Parts of a run, one after another, with the blocks of one feed."""

    def __init__(self, directory, **info):
        self.directory = directory
        self.info = run_info(required_producers=REQUIRED, **info)
        self.feed = Feed()
        self.file = RunFile(directory, self.info)

    def add(self, *sizes, **changes):
        for size in sizes:
            self.file.add(*self.feed.block(rows(size), **changes))

    def rotate(self):
        following = RunFile(self.directory, self.info, self.file.part + 1, self.file.positions())
        report = self.file.close(continued=True, texts={"next part": following.final.name})
        self.file = following
        return report

    def die(self, journal=True):
        """Kill the storage, recover the part, and continue in the next part."""
        if journal:
            self.file.work(pressed=True)
        self.file.abandon()
        found = recover(self.file.path)
        self.file = RunFile(self.directory, self.info, self.file.part + 1, positions(self.directory, 42))
        return found

    def end(self, **changes):
        self.file.end(self.feed.end(**changes))
        return self.file.close()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_rotation(tmp_path, run):
    run.add(100, 200)
    first = run.rotate()
    assert (first.condition, first.reasons) == ("CONTINUED", [])
    run.add(300)
    run.rotate()
    run.rotate()  # a part without blocks
    run.add(400)
    assert run.end().condition == "COMPLETE"
    found = survey_run(tmp_path, 42)
    assert (found.condition, found.reasons, found.rows) == ("COMPLETE", [], 1000)
    assert [path.name for path in found.files] == [name(part) for part in range(4)]
    assert found.ends == [("LArPix board", 7, 4, "closed", 1000)]
    ((producer, epoch, counts),) = found.totals
    assert (producer, epoch, [line[0] for line in counts]) == ("LArPix board", 7, [1, 2])
    assert sum(constants.rows_made(line[1:]) for line in counts) == 1000
    assert sum(line[3] for line in found.stored) == 1000
    assert len(found.stored) == 2
    outcome = verify_all([tmp_path])
    assert outcome.ok
    assert [report.findings for report in outcome.files] == [[]] * 4
    (whole,) = outcome.runs
    assert whole == found
    with h5py.File(tmp_path / name(2)) as file:
        assert file["run/positions"][:][["first", "next"]].tolist() == [(3, 3)]


def test_a_part_alone_is_judged_by_itself(tmp_path, run):
    run.add(100)
    run.rotate()
    run.add(200)
    run.rotate()
    run.add(300)
    run.end()
    for part, condition in ((0, "CONTINUED"), (1, "CONTINUED"), (2, "COMPLETE")):
        outcome = verify_all([tmp_path / name(part)])
        assert outcome.ok
        assert [run_facts.condition for run_facts in outcome.runs] == [condition]
        notes = [note for note in outcome.files[0].notes if "parity" not in note]
        assert notes == ([f"condition CONTINUED: the run continues in {name(part + 1)}"] if part < 2 else [])
    some = verify_all([tmp_path / name(0), tmp_path / name(1)])
    assert some.ok
    assert [(run_facts.condition, run_facts.notes) for run_facts in some.runs] == [
        ("CONTINUED", ["producer 'LArPix board', epoch 7: continues in the next file"])
    ]
    assert verify_all([tmp_path / name(1), tmp_path / name(2)]).ok
    holes = verify_all([tmp_path / name(0), tmp_path / name(2)])
    assert not holes.ok
    assert holes.runs[0].reasons[0] == "part 1 of run 42 is not there"
    assert "producer 'LArPix board', epoch 7: blocks 1 to 1 are in no part" in holes.runs[0].reasons


def test_a_run_whose_storage_was_killed_twice(tmp_path, run):
    run.add(*[16_384] * 5, 3)
    assert run.die().condition == "INTERRUPTED"
    run.add(10)
    assert run.die().condition == "INTERRUPTED"
    run.add(20)
    run.end()
    (alone,) = verify_all([tmp_path / name(0)]).runs
    assert (alone.condition, verify(tmp_path / name(0)).ok) == ("INTERRUPTED", False)
    outcome = verify_all([tmp_path])
    assert outcome.ok
    assert (outcome.runs[0].condition, outcome.runs[0].reasons) == ("COMPLETE", [])
    assert verify_all(sorted(tmp_path.iterdir())).ok


def test_a_storage_killed_after_the_end_record(tmp_path, run):
    """The part has the end record, so the run is complete."""
    run.add(100)
    run.file.end(run.feed.end())
    run.file.work(pressed=True)
    run.file.abandon()
    assert recover(run.file.path).condition == "COMPLETE"
    assert survey_run(tmp_path, 42).condition == "COMPLETE"


def test_an_open_part_makes_the_run_interrupted(tmp_path, run):
    assert survey_run(tmp_path, 42).condition == "INTERRUPTED"
    run.add(100)
    run.rotate()
    found = survey_run(tmp_path, 42)
    assert found.condition == "INTERRUPTED"
    assert found.reasons == [
        f"{name(1)}.part is not closed",
        "producer 'LArPix board', epoch 7: no end record, totals unknown",
    ]
    outcome = verify_all([tmp_path])
    assert not outcome.ok
    assert [report.ok for report in outcome.files] == [True, False]
    assert outcome.files[1].findings[0].startswith("condition RUNNING")
    run.file.close()
    assert survey_run(tmp_path, 42).reasons == found.reasons[1:]
    assert not verify_all([tmp_path]).ok


def test_no_such_run(tmp_path):
    found = survey_run(tmp_path, 42)
    assert (found.condition, found.files) == ("INCOMPLETE", [])
    assert found.reasons == ["part 0 of run 42 is not there"]
    with pytest.raises(FileError, match="cannot read the directory"):
        survey_run(tmp_path / "there", 42)
    outcome = verify_all([tmp_path])
    assert not outcome.ok
    assert outcome.files[0].findings == [f"{tmp_path} is not a file, and holds no file of a run"]


def test_a_required_producer_may_come_in_any_part(tmp_path, run):
    run.rotate()
    run.add(100)
    run.rotate()
    assert run.file.close().condition == "COMPLETE"
    assert survey_run(tmp_path, 42).condition == "INTERRUPTED"
    feed = Feed(43)
    RunFile(tmp_path, run_info(run=43, required_producers=("Other",))).close()
    assert survey_run(tmp_path, 43).reasons == ["producer 'Other': no data came, totals unknown"]
    assert not feed.rows


def test_blocks_in_no_part_or_in_two_parts(tmp_path):
    """The second part begins after the end of the first part, the third before the end of the second."""
    feed = Feed()
    sent = [feed.block(rows(n)) for n in (10, 20, 30, 40, 50)]
    for part, (first, stop) in enumerate([(0, 2), (3, 5), (4, 5)]):
        file = RunFile(tmp_path, run_info(), part, {feed.origin: first})
        for block in sent[first:stop]:
            file.add(*block)
        if part == 2:
            file.end(feed.end())
        file.close(continued=part < 2)
    found = survey_run(tmp_path, 42)
    assert found.condition == "INCOMPLETE"
    who = "producer 'LArPix board', epoch 7"
    assert found.reasons[:2] == [f"{who}: blocks 2 to 2 are in no part", f"{who}: blocks 4 to 4 are in two parts"]
    assert "ledger (d)" in found.reasons[2]
    assert not verify_all([tmp_path]).ok


def test_blocks_missing_at_the_begin_of_a_part(tmp_path, run):
    """Parts 1 and 2 without part 0 have the position at which they begin."""
    run.add(10, 20)
    run.rotate()
    run.feed.block(rows(30))
    run.add(40)
    run.rotate()
    run.add(50)
    run.end()
    outcome = verify_all([tmp_path / name(1), tmp_path / name(2)])
    assert not outcome.ok
    assert outcome.runs[0].reasons == ["producer 'LArPix board', epoch 7: blocks 2 to 2 are in no part"]


def test_blocks_missing_after_the_last_part(tmp_path, run):
    run.add(10)
    run.rotate()
    run.feed.block(rows(20))
    assert run.end().condition == "INCOMPLETE"
    found = survey_run(tmp_path, 42)
    assert found.reasons[0] == "producer 'LArPix board', epoch 7: blocks 1 to 1 are in no part"
    assert found.condition == "INCOMPLETE"


def test_dropped_rows(tmp_path, run):
    run.add(100, gaps=[stream.Gap(1, 5, 1, 2)])
    assert run.rotate().condition == "INCOMPLETE"
    run.add(50)
    words = run.feed.end().counts[0][1 + constants.Count.WORD_ROWS]
    counts = {1: {"word_rows": words + 5, "words_in": words + 5, "word_bytes": 0, "bytes_in": 0, "dropped": 5}}
    run.end(counts=counts)
    found = survey_run(tmp_path, 42)
    assert found.condition == "INCOMPLETE"
    assert found.reasons == [
        "producer 'LArPix board', epoch 7, io_group 1: 5 rows dropped, because ring and spool were full"
    ]


def test_suspect_and_aborted_runs(tmp_path, run):
    run.add(100)
    run.rotate()
    doubt = stream.LossVerdict(2, "suspect", "board disconnected", 0, 1, 2)
    run.end(verdicts=[doubt, stream.LossVerdict(1, "complete", "", 0, 0, 0)])
    found = survey_run(tmp_path, 42)
    assert found.condition == "COMPLETE, suspect"
    assert found.reasons == ["producer 'LArPix board', epoch 7, io_group 2: suspect: board disconnected"]
    assert verify_all([tmp_path]).ok
    for path in tmp_path.iterdir():
        path.unlink()
    aborted = Run(tmp_path)
    aborted.add(10)
    aborted.rotate()
    aborted.file.close(aborted=True)
    assert survey_run(tmp_path, 42).condition == "ABORTED"


def test_pending_rows(tmp_path, run):
    run.add(100)
    words = run.feed.end().counts[0][1 + constants.Count.WORD_ROWS]
    run.file.end(run.feed.end(counts={1: {"word_rows": words + 7, "words_in": words + 7}}))
    with h5py.File(run.file.close().path, "r+") as file:
        table = file["ledger/counts"][:]
        table["owed"][0] = 7
        file["ledger/counts"][:] = table
    found = survey_run(tmp_path, 42)
    assert found.condition == "INTERRUPTED"
    assert found.reasons == ["producer 'LArPix board', epoch 7, io_group 1: 7 rows are still pending"]


def test_several_storages_are_several_runs(tmp_path):
    for storage in ("", "copy of mine"):
        run = Run(tmp_path, storage=storage)
        run.add(100)
        run.rotate()
        run.end()
    for label in ("", "copy of mine"):
        found = survey_run(tmp_path, 42, label)
        assert (found.condition, len(found.files), found.rows) == ("COMPLETE", 2, 100)
    outcome = verify_all([tmp_path])
    assert outcome.ok
    assert len(outcome.runs) == 2


def test_files_that_cannot_be_read(tmp_path, run):
    run.add(100)
    run.rotate()
    run.end()
    (tmp_path / name(1)).write_text("no HDF5")
    found = survey_run(tmp_path, 42)
    assert found.condition == "INTERRUPTED"
    assert "it is not an HDF5 file" in found.reasons[0]
    (tmp_path / "other.h5").write_text("neither")
    outcome = verify_all([tmp_path / name(0), tmp_path / name(1), tmp_path / "other.h5"])
    assert not outcome.ok
    assert len(outcome.files) == 3
    assert len(outcome.runs) == 1
    (alone,) = verify_all([tmp_path / name(1)]).runs
    assert (alone.condition, alone.rows) == ("INTERRUPTED", 0)


@pytest.mark.parametrize("copies", [0, 1, 3, 4])
def test_a_superseded_storage_and_its_successor(tmp_path, copies):
    """The successor does not know the files in the other directory; blocks in both directories count once."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    run = Run(here)
    run.add(100)
    run.rotate()
    run.add(50, 200)
    run.rotate()
    run.add(1, 300)
    sent = run.feed.rows[len(run.feed.rows) - copies :]
    run.file.set_text("superseded from", "[]")
    run.file.close(continued=True)
    other = RunFile(there, run.info)
    feed = Feed()
    feed.sequence, feed.rows = run.feed.sequence - copies, run.feed.rows[: len(run.feed.rows) - copies]
    feed.first_packet = sum(map(len, feed.rows))
    for run_facts in [*sent, rows(7)]:
        other.add(*feed.block(run_facts))
    following = RunFile(there, run.info, 1, other.positions())
    assert other.close(continued=True).condition == "INCOMPLETE"
    following.add(*feed.block(rows(30)))
    following.end(feed.end())
    following.close()
    assert survey_run(there, 42).condition == "INCOMPLETE"
    assert survey_run(here, 42).condition == "INTERRUPTED"
    assert not verify_all([there]).ok
    outcome = verify_all([there, here])
    assert outcome.ok, outcome
    (found,) = outcome.runs
    assert (found.condition, found.reasons, found.rows) == ("COMPLETE", [], 688)
    assert [path.parent for path in found.files] == [here, here, here, there, there]
    assert sum(line[3] for line in found.stored) == 688
    # A missing part is found, too.
    (here / name(0)).unlink()
    lacking = verify_all([here, there])
    assert not lacking.ok
    assert lacking.runs[0].reasons == ["part 0 of run 42 is not there"]


def test_two_files_of_one_part(tmp_path, run):
    run.add(100)
    path = run.end().path
    other = path.with_name(path.name.replace("071251", "071252"))
    other.write_bytes(path.read_bytes())
    assert "there are two parts 0 of it" in survey_run(tmp_path, 42).reasons
    assert (
        "producer 'LArPix board', epoch 7: blocks 0 to 0 are in two parts"
        in judge_run(42, [path, other], whole=False).reasons
    )


def test_positions_are_compared_with_the_blocks(tmp_path):
    report, _ = write(tmp_path, Feed(), [10])
    with h5py.File(report.path, "r+") as file:
        table = file["run/positions"][:]
        table["next"] += 1
        file["run/positions"][:] = table
        writer.seal_file(file)
    assert verify(report.path).findings == [
        "producer 'LArPix board', epoch 7: /run/positions says that 5 comes next, by its blocks that is 4"
    ]


def test_the_command(tmp_path, capsys, run):
    run.add(100)
    run.rotate()
    run.add(50)
    run.end()
    assert cli.main(["verify", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line for line in out.splitlines() if "parity" not in line]
    assert lines == [
        f"{tmp_path / name(0)}: good, 100 rows",
        f"  condition CONTINUED: the run continues in {name(1)}",
        f"{tmp_path / name(1)}: good, 50 rows",
        "run 42: COMPLETE, 150 rows in 2 files",
    ]
    (tmp_path / name(0)).unlink()
    assert cli.main(["verify", "--json", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["files"][str(tmp_path / name(1))]["ok"]
    (run_facts,) = found["runs"]
    assert (run_facts["run"], run_facts["condition"], run_facts["rows"]) == (42, "INCOMPLETE", 50)
    assert run_facts["files"] == [str(tmp_path / name(1))]
    assert run_facts["reasons"] == ["part 0 of run 42 is not there"]
