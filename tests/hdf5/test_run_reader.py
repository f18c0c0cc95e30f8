"""open_run(): selections against numpy on the whole, growing runs, parts, and files of other programs."""

import contextlib
import itertools
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import h5py
import numpy as np
import pytest
from example_counts import examples
from file_builder import CLOCK64, NS, V1, V2, V3, Feed, board, random_rows, run_info, timed, two_boards, write
from hypothesis import given, settings
from hypothesis import strategies as st
from run_writer import WriterProcess

import larpixdaq
from larpixdaq import open_run
from larpixdaq.errors import FileError, FormatError
from larpixdaq.hdf5.layout import NO_FILTERS
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.row_reader import Selection
from larpixdaq.hdf5.run_reader import follow_parts
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.reports import Comment
from larpixdaq.schema import PacketType

#: Chips of the rows with which runs are tested.
CHIPS = [(group, channel, chip) for group in (1, 2, 250) for channel in (1, 17) for chip in (11, 12, 200)]


def rows_of(layout, n, seed):
    """Return rows of all types with few chips and channels, so that selections find some."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, n, layout)
    chips = np.array(CHIPS)[rng.integers(0, len(CHIPS), n)]
    v1 = layout is V1
    kinds = rows["type" if v1 else "packet_type"]
    kinds[:] = rng.choice([0, 0, 0, 0, 1, 2, 3, 4, 6, 7], n)
    rows["channel" if v1 else "channel_id"] = rng.integers(0, 64, n)
    if v1:
        rows["chip_key"] = [b"%d-%d-%d" % tuple(chip) for chip in chips.tolist()]
    else:
        rows["io_group"], rows["io_channel"], rows["chip_id"] = chips.T
    return rows


def filled(file, feed, sizes, seed):
    for number, size in enumerate(sizes):
        file.add(*timed(*feed.block(rows_of(feed.layout, size, seed + number)), feed.sequence, feed.sequence + 0.5))


@pytest.fixture(scope="module", params=[V1, V2, CLOCK64, V3], ids=lambda layout: layout.name)
def parts(request, tmp_path_factory):
    """A run of three parts, and all of its rows."""
    folder, feed = tmp_path_factory.mktemp("run"), Feed(layout=request.param)
    file = RunFile(folder, run_info(feed.layout))
    for part, sizes in enumerate(([100, 16_384, 16_384, 7, 3000], [20_000 - 16_384, 1], [16_384, 16_384])):
        if part:
            previous, file = file, RunFile(folder, run_info(feed.layout), part, file.positions())
            previous.close(continued=True)
        filled(file, feed, sizes, 10 * part)
    file.end(feed.end())
    paths = sorted(folder.glob("*.h5"))
    last = file.close().path
    return last, np.concatenate([h5py.File(path)["packets"][:] for path in (*paths, last)])


def expected(rows, layout, io_group, chip, channel, kinds, io_channel=None):
    """Select with numpy alone."""
    v1 = layout is V1
    types = rows["type" if v1 else "packet_type"]
    keys = np.array([key.decode().split("-") for key in rows["chip_key"]], int) if v1 else None
    if keys is None:
        keys = np.stack([rows["io_group"], rows["io_channel"], rows["chip_id"]], axis=1).astype(int)
    mask = np.ones(len(rows), bool)
    if io_group is not None:
        mask &= np.isin(keys[:, 0], io_group)
    if io_channel is not None:
        mask &= np.isin(keys[:, 1], io_channel) & (types <= 3)
    if chip is not None:
        mask &= (keys[:, None, :] == np.array(chip).reshape(1, -1, 3)).all(axis=2).any(axis=1) & (types <= 3)
    if channel is not None:
        mask &= np.isin(rows["channel" if v1 else "channel_id"], channel) & (types <= 1)
    if kinds is not None:
        mask &= np.isin(types, kinds)
    return mask


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_selections_are_those_of_numpy_on_the_whole(parts, data):
    path, whole = parts
    layout = next(each for each in (V1, V2, CLOCK64, V3) if each.dtype == whole.dtype)
    io_group = data.draw(st.none() | st.lists(st.sampled_from([1, 2, 250, 3]), max_size=3), "io_group")
    io_channel = data.draw(st.none() | st.lists(st.sampled_from([1, 17, 3]), max_size=2), "io_channel")
    chip = data.draw(st.none() | st.lists(st.sampled_from([*CHIPS, (9, 9, 9)]), max_size=4), "chip")
    channel = data.draw(st.none() | st.lists(st.integers(0, 66), max_size=5), "channel")
    kinds = data.draw(st.none() | st.lists(st.integers(0, 8), max_size=4), "types")
    start, stop = (data.draw(st.integers(-len(whole) - 9, len(whole) + 9) | st.none()) for _ in range(2))
    columns = data.draw(st.none() | st.permutations([*whole.dtype.names, "row"]).flatmap(
        lambda every: st.integers(1, len(every)).map(lambda n: every[:n])
    ), "columns")  # fmt: skip
    size = data.draw(st.sampled_from([700, 16_384, 65_536, 10**6]), "rows")
    threads = data.draw(st.integers(1, 3), "threads")
    mask = expected(whole, layout, io_group, chip, channel, kinds, io_channel)
    first, last, _ = slice(start, stop).indices(len(whole))
    numbers = np.flatnonzero(mask)
    numbers = numbers[(numbers >= first) & (numbers < last)]
    with open_run(path) as run:
        found = list(
            run.chunks(
                columns, start=start or 0, stop=stop, io_group=io_group, io_channel=io_channel, chip=chip,
                channel=channel, packet_type=kinds, rows=size, threads=threads,
            )
        )  # fmt: skip
        assert all(0 < len(piece) <= size for piece in found)
        assert run.rows == len(run) == len(whole)
    joined = np.concatenate(found) if found else None
    assert (0 if joined is None else len(joined)) == len(numbers)
    for name in columns or whole.dtype.names:
        if joined is not None:
            wanted = numbers if name == "row" else whole[name][numbers]
            assert np.array_equal(joined[name], wanted), name
    if joined is not None and columns is None:
        assert joined.dtype == whole.dtype
        assert joined.tobytes() == whole[numbers].tobytes()


def test_single_values_names_and_columns(parts):
    path, whole = parts
    v1 = "chip_key" in whole.dtype.names
    types = whole["type" if v1 else "packet_type"]
    with open_run(str(path)) as run:
        assert np.array_equal(run.read(packet_type="config read"), whole[types == PacketType.CONFIG_READ])
        assert np.array_equal(run.read(packet_type=["data", 4]), whole[(types == 0) | (types == 4)])
        one = expected(whole, V1 if v1 else V2, None, (2, 17, 12), 5, None)
        assert np.array_equal(run.read(chip="2-17-12", channel=5), whole[one])
        assert np.array_equal(run.read(chip=(2, 17, 12), channel=np.int64(5)), whole[one])
        timestamps = run.read("timestamp", chip=["2-17-12"], channel=[5])
        assert (timestamps.dtype, timestamps.tolist()) == (np.dtype("<u8"), whole["timestamp"][one].tolist())
        board = np.flatnonzero(expected(whole, V1 if v1 else V2, 250, None, None, None))
        assert run.read("row", io_group=250).tolist() == board.tolist()
        assert len(run.read(io_group=[])) == 0
        assert len(run.read("timestamp", start=5, stop=5)) == 0
        assert np.array_equal(np.concatenate(list(run)), whole)
        assert np.array_equal(run.read(start=-10), whole[-10:])


def test_unsigned_numbers_of_rows(parts):
    """Those of tables."""
    path, whole = parts
    with DataFile(path) as file:
        rows = file.packets(np.uint64(5), np.uint64(20_000))
        assert np.array_equal(rows, file.packets()[5:20_000])
    with open_run(path) as run:
        assert np.array_equal(run.read(start=np.uint64(5), stop=np.uint64(20_000)), whole[5:20_000])


def test_what_is_known_beside_the_rows(tmp_path):
    feed = Feed()
    file = RunFile(tmp_path, run_info(connected=(stream.ConnectedBoard("LArPix board", 1, "PACMAN", "here", "daq1"),)))
    file.add(*feed.info("Beginning run"))
    file.add(*feed.block(random_rows(np.random.default_rng(1), 500), gaps=[stream.Gap(2, 9, NS, NS + 1)]))
    comment = Comment(3, NS, "Ann", "o1", "beam is back")
    file.add_comment(comment)
    following = RunFile(tmp_path, run_info(), 1, file.positions())
    file.close(continued=True)
    long = "Ending run, and more about it than fits into one line of 64 bytes in the table"
    following.add(*feed.info(long))
    lost = stream.LossVerdict(1, "suspect", "a board was away", 4, NS, NS + 5)
    following.end(feed.end(verdicts=[lost], counts={2: {"dropped": 9}}))
    following.close()
    with open_run(42, directory=tmp_path) as run:
        assert (run.number, run.condition, run.is_growing, run.missing_parts) == (42, "INCOMPLETE", False, [])
        assert run.reasons[0].endswith("9 rows dropped, because ring and spool were full")
        assert [path.name[-6:] for path in run.files] == ["000.h5", "001.h5"]
        assert (run.info.kind, run.info.comment, run.info.started_ns) == ("test", "cosmics", NS)
        assert run.info.connected == tuple(run.sources)
        assert [(board.io_group, board.address) for board in run.sources] == [(1, "here")]
        assert run.e_log == [comment]
        assert [(line.io_group, line.how) for line in run.ledger] == [(0, "closed"), (1, "closed"), (2, "closed")]
        counted = np.bincount(run.read("io_group"))
        assert [line.stored for line in run.ledger] == counted.tolist()
        (verdict,) = run.verdicts
        assert (verdict.producer, verdict.io_group, verdict.verdict, verdict.lost) == ("LArPix board", 1, "suspect", 4)
        assert [(gap.io_group, gap.rows, gap.sequence) for gap in run.gaps()] == [(2, 9, 1)]
        assert "".join(line.text for line in run.messages()) == "Beginning run" + long
        blocks = [(block.sequence, block.first_row, block.rows) for block in run.blocks()]
        assert blocks == [(0, 0, 1), (1, 1, 500), (2, 501, 2)]
        assert "2 files, finished" in repr(run)


def test_times_select_blocks(tmp_path):
    file, feeds = RunFile(tmp_path, run_info()), two_boards()
    board(file, feeds, 4, 20_000)
    path = file.path
    for end in (feed.end() for feed in feeds.values()):
        file.end(end)
    finished = file.close().path
    with h5py.File(finished) as plain:
        whole, blocks = plain["packets"][:], plain["run/blocks"][:]
    assert not path.exists()
    begin, end = NS / 1e9 + 1.001, NS / 1e9 + 1.499
    fits = (blocks["first_ns"] < end * 1e9) & (blocks["last_ns"] >= begin * 1e9)
    wanted = np.concatenate([np.arange(row, row + n) for row, n in blocks[["first_row", "rows"]][fits].tolist()])
    utc = datetime.fromtimestamp(end, timezone.utc)
    with open_run(finished) as run:
        assert run.read("row", begin=begin, end=end).tolist() == wanted.tolist()
        assert run.read("row", begin=begin, end=utc, io_group=2, rows=20_000).tolist() == [
            row for row in wanted.tolist() if whole["io_group"][row] == 2
        ]
        assert len(run.read(begin="2020-01-01", end="2020-01-02T10:00")) == 0
        assert len(run.read(begin="2020-01-01")) == len(whole)
        assert len(run.read(start=wanted[3], stop=wanted[5], begin=begin)) == 2


# Growing runs


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 1), st.integers(0, 99), st.integers(0, 3000) | st.just(16_384)),
        st.tuples(st.just("info"), st.integers(0, 1), st.sampled_from(["Beginning run", "żółw " * 40, ""])),
        st.tuples(st.just("work"), st.booleans()),
        st.tuples(st.just("rotate")),
        st.tuples(st.just("die"), st.booleans()),
    ),
    min_size=1,
    max_size=25,
)


@pytest.fixture(scope="module")
def writer():
    process = WriterProcess()
    yield process
    process.close()


def same(found, wanted):
    """Whether rows are the same; the storage numbers those of INFO messages."""
    columns = [name for name in V2.dtype.names if name != "counter"]
    return len(found) == len(wanted) and all(np.array_equal(found[name], wanted[name]) for name in columns)


@settings(max_examples=examples(25), deadline=None)
@given(steps=steps)
def test_a_growing_run_is_seen_to_its_last_acknowledged_row(writer, tmp_path_factory, steps):
    """After each step the reader has all acknowledged rows; those seen before are the same, at the same place."""
    folder = tmp_path_factory.mktemp("growing")
    writer("new", str(folder))
    with open_run(folder) as run:
        seen = run.read()
        for step in steps:
            acknowledged = writer(*step)
            run.refresh()
            assert run.is_growing
            found = run.read()
            assert same(found, acknowledged)
            assert np.array_equal(found[: len(seen)], seen)
            assert sum(block.rows for block in run.blocks()) == len(found)
            seen = found
        acknowledged = writer("end")
        writer("recover")
        run.refresh()
        assert not run.is_growing
        assert same(run.read(), acknowledged)
        assert np.array_equal(run.read(stop=len(seen)), seen)
        assert not [path for path in folder.iterdir() if path.suffix != ".h5"]
    with open_run(folder) as run:
        assert same(run.read(), acknowledged)


def test_rows_that_only_the_journal_has(writer, tmp_path):
    """They are selected like the others, by columns, boards and times; their texts are there too."""
    writer("new", str(tmp_path))
    for seed in range(5):
        writer("add", 0, seed, 16_384)
    writer("work", False)
    writer("add", 1, 5, 2000)
    writer("info", 0, "Beginning run")
    writer("add", 0, 6, 300)
    whole = writer("work", False)
    (part,) = tmp_path.glob("*.part")
    with h5py.File(part, swmr=True) as plain:
        assert plain["packets"].shape[0] == 5 * 16_384
    with open_run(part.with_suffix(".journal")) as run:
        assert (run.condition, run.rows) == ("RUNNING", len(whole))
        for io_group in (1, 2):
            kept = np.flatnonzero(whole["io_group"] == io_group)
            assert run.read("row", io_group=io_group).tolist() == kept.tolist()
        last = run.read(["row", "dataword"], start=5 * 16_384 - 10, stop=5 * 16_384 + 10)
        assert last["row"].tolist() == list(range(5 * 16_384 - 10, 5 * 16_384 + 10))
        assert last["dataword"].tolist() == whole["dataword"][last["row"]].tolist()
        late = run.read("row", begin=(NS + 6) / 1e9).tolist()
        assert late[-300:] == list(range(len(whole) - 300, len(whole)))
        assert [line.text for line in run.messages()] == ["Beginning run"]
        assert [block.producer for block in run.blocks()][-3:] == ["second", "LArPix board", "LArPix board"]
        writer("abandon")
        run.refresh()
        assert not run.is_growing
        assert same(run.read(), whole)
        writer("recover")
        run.refresh()
        assert same(run.read(), whole)
        assert run.condition == "INTERRUPTED"


def test_following_a_run_to_its_end(writer, tmp_path):
    writer("new", str(tmp_path))
    found, number = [], 0
    acknowledged = writer("info", 0, "Beginning run")
    with open_run(tmp_path) as run:
        following = run.follow("row", patience=0)
        for number in range(4):
            writer("add", 0, number, 200)
            acknowledged = writer("work", False)
            while sum(map(len, found)) < len(acknowledged):
                found.append(next(following))
            if number == 2:
                writer("rotate")
        writer("end")
        found += following
    assert np.concatenate(found).tolist() == list(range(len(acknowledged)))
    paths = sorted(tmp_path.glob("*.h5"))
    sizes = [open_run(path, parts=False).rows for path in paths]
    for path, start, expected in (
        (tmp_path, 0, [(0, 0, sizes[0]), (1, 0, sizes[1])]),
        (tmp_path, 7, [(0, 7, sizes[0] - 7), (1, 0, sizes[1])]),
        (tmp_path, -3, [(1, sizes[1] - 3, 3)]),
        (paths[1], 2, [(1, 2, sizes[1] - 2)]),
    ):
        pieces = [piece for piece in follow_parts(path, Selection(start=start)) if piece is not None]
        assert [(piece.part.number, piece.first, len(piece.rows)) for piece in pieces] == expected


@contextlib.contextmanager
def unreadable(journal):
    """Let this process be of a user who may not read a journal."""
    if os.geteuid():
        journal.chmod(0)
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_without_the_journal_the_rows_come_that_the_part_shows(writer):
    with tempfile.TemporaryDirectory() as name:  # the directories of pytest are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        writer("new", name)
        writer("add", 0, 9, 3000)  # so that a block has rows in two chunks
        for seed in range(5):
            writer("add", 0, seed, 16_384)
        writer("add", 1, 5, 2000)
        shown = writer("work", True)
        writer("add", 0, 6, 300)
        acknowledged = writer("work", False)
        with open_run(folder) as run:  # rows that the part shows early come from the journal, and once
            assert same(run.read(), acknowledged)
            assert same(run.read(begin="2020-01-01"), acknowledged)
            assert run.read("row", begin="2020-01-01").tolist() == list(range(len(acknowledged)))
        (journal,), (part,) = folder.glob("*.journal"), folder.glob("*.part")
        part.chmod(0o644)  # another test may have called a program that sets the umask
        with unreadable(journal):
            with open_run(folder) as run:
                assert run.condition == "RUNNING"
                assert same(run.read(), shown)
            following = follow_parts(folder)
            pieces = list(itertools.takewhile(bool, following))
            assert same(np.concatenate([piece.rows for piece in pieces]), shown)
            whole = writer("end")
            pieces += filter(None, following)
            assert same(np.concatenate([piece.rows for piece in pieces]), whole)


# Parts, names and copies


def test_parts_and_second_names(writer, tmp_path, monkeypatch):
    writer("new", str(tmp_path))
    for size in (100, 200, 300):
        writer("add", 0, size, size)
        writer("rotate")
    writer("end")
    files = sorted(tmp_path.glob("*.h5"))
    os.link(files[1], tmp_path / "packet-test.h5")
    monkeypatch.chdir(tmp_path)
    for source in (42, files[2], tmp_path, "packet-test.h5", np.int64(42)):
        with open_run(source) as run:
            assert (len(run), [path.name for path in run.files]) == (600, [path.name for path in files])
    with open_run(files[1], parts=False) as run:
        assert (len(run), run.condition) == (200, "CONTINUED")
    files[1].unlink()
    with pytest.raises(FileError, match=r"part 1 of 0 to 3 of this run is missing beside it: give missing_ok=True"):
        open_run(42)
    with open_run(42, missing_ok=True) as run:
        assert (len(run), run.missing_parts, run.condition) == (400, [1], "INCOMPLETE")
    with open_run("packet-test.h5") as run:
        assert len(run) == 200
    with pytest.raises(FileError, match=r"run 43: \. has no file of it$"):
        open_run(43)
    with pytest.raises(FileError, match=r"run 42: \. has no file of it of storage 'x', only of ''"):
        open_run(42, storage="x")


def test_the_better_copy_is_chosen(tmp_path):
    for label, size, ends in (("", 100, True), ("second copy", 200, True), ("third", 900, False)):
        feed = Feed()
        file = RunFile(tmp_path, run_info(storage=label))
        file.add(*feed.block(random_rows(np.random.default_rng(1), size)))
        if ends:
            file.end(feed.end())
        file.close()
    with open_run(42, directory=tmp_path) as run:
        assert (len(run), run.info.storage) == (200, "second copy")
    with open_run(42, directory=tmp_path, storage="") as run:
        assert len(run) == 100
    with open_run(next(tmp_path.glob("*third*"))) as run:
        assert len(run) == 900
    with open_run(tmp_path) as run:
        assert len(run) == 200


# Bad input


def test_impossible_arguments(parts):
    path, _ = parts
    with open_run(path) as run:
        for wanted, line in (
            ({"columns": ["chips"]}, "column 'chips': expected one of"),
            ({"columns": []}, "expected different names, at least one"),
            ({"columns": ["timestamp", "timestamp"]}, "expected different names"),
            ({"io_group": 256}, "io_group 256: expected a whole number from 0 to 255"),
            ({"io_group": "1"}, "io_group '1': expected a whole number"),
            ({"io_group": 1.5}, r"io_group 1.5: expected a number or several"),
            ({"chip": "1-2"}, "chip '1-2': expected a chip key"),
            ({"chip": [3]}, r"chip \(3,\): expected a chip key"),
            ({"chip": 7}, "chip 7: expected a key such as"),
            ({"channel": [True]}, "channel True: expected a whole number"),
            ({"packet_type": "dta"}, "type 'dta': expected 0 to 255, or one of data, test, config write"),
            ({"begin": "noon"}, "begin: time 'noon': expected a UTC time"),
            ({"end": [1]}, r"end \[1\]: expected unix seconds"),
            ({"rows": 0}, "rows 0, threads"),
        ):
            with pytest.raises(FormatError, match=line) as caught:
                run.chunks(**wanted)
            assert isinstance(caught.value, ValueError)
            assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match="run True"):
        open_run(True)


def test_files_that_cannot_be_read(tmp_path):
    good, _ = write(tmp_path, Feed(), [40_000 - 16_384 * 2, 16_384, 16_384])
    (tmp_path / "sub").mkdir()
    cases = {
        "empty.h5": b"",
        "text.h5": b"no file of ours" * 100,
        "cut.h5": good.path.read_bytes()[:5000],
        "run0000001_20261122T071251Z_000.h5": good.path.read_bytes(),
    }
    for name, content in cases.items():
        (tmp_path / "sub" / name).write_bytes(content)
    with h5py.File(tmp_path / "sub" / "other.h5", "w") as other:
        other["some"] = np.zeros(5)
    (tmp_path / "sub" / "run0000003_20261122T071251Z_000.h5.journal").write_bytes(b"")
    os.symlink(good.path, tmp_path / "sub" / "link.h5")
    for source, line in (
        ("empty.h5", "it is empty"),
        ("text.h5", "is not an HDF5 file"),
        ("cut.h5", "cannot open"),
        ("run0000001_20261122T071251Z_000.h5", "expected run 1, by its name, found run 42"),
        ("other.h5", "has no /_header"),
        ("link.h5", "is a link out of its directory"),
        ("run0000003_20261122T071251Z_000.h5.journal", "has no file of this run but run0000003.*, without rows"),
        ("absent.h5", "there is no such file"),
        ("run0000009_20261122T071251Z_000.h5", "there is no such file"),
        ("run0000042_20261122T071251Z_000.raw.h5", "has board messages, not rows: open the packet file run0000042"),
        (".", "has runs 1, 3, expected the files of one run"),
    ):
        with pytest.raises(FileError, match=line) as caught:
            open_run(tmp_path / "sub" / source)
        assert "\n" not in str(caught.value)


def test_damage_is_one_line_at_its_place(tmp_path):
    report, whole = write(tmp_path, Feed(), [16_383, 16_384, 16_384, 16_384])
    with h5py.File(report.path) as file:
        place = file["packets"].id.get_chunk_info_by_coord((16_384,)).byte_offset + 3000
    with report.path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(100))
    with open_run(report.path) as run:
        with pytest.raises(FileError, match=r"/packets, rows 0 to 65536, cannot be read: .*filter returned failure"):
            run.read()
        assert np.array_equal(run.read(start=0, stop=16_384)["timestamp"], whole["timestamp"][:16_384])
        assert np.array_equal(run.read(start=32_768)["timestamp"], whole["timestamp"][32_768:])


def test_a_byte_after_the_deflated_data_of_a_chunk_is_no_damage(tmp_path):
    """A writer adds one if the chunk would otherwise have the size of the chunk that it replaces."""
    report, _ = write(tmp_path, Feed(), [16_383, 16_384, 10])
    with h5py.File(report.path, "r+") as file:
        whole = file["packets"][:]
        _, data = file["packets"].id.read_direct_chunk((0,))
        file["packets"].id.write_direct_chunk((0,), data + b"\0")
        plain = np.zeros(16_384, whole.dtype)
        plain[:] = whole[16_384:32_768]
        file["packets"].id.write_direct_chunk((16_384,), plain.tobytes(), filter_mask=NO_FILTERS)
    with open_run(report.path) as run:
        assert np.array_equal(run.read(), whole)
        assert np.array_equal(run.read("dataword", io_group=1), whole["dataword"][whole["io_group"] == 1])
    assert verify(report.path).ok


# Files of other programs


@pytest.mark.parametrize("how", ["contiguous", "gzip", "shuffle", "small chunks", "lzf", "plain chunks"])
def test_files_of_other_programs_in_any_storage(tmp_path, how):
    rows = rows_of(V2, 40_000, 1)
    options = {
        "contiguous": {},
        "gzip": {"compression": "gzip", "chunks": (1000,)},
        "shuffle": {"compression": "gzip", "shuffle": True, "chunks": (4099,)},
        "small chunks": {"compression": "gzip", "chunks": (7,)},
        "lzf": {"compression": "lzf", "chunks": (1000,)},
        "plain chunks": {"chunks": (1000,)},
    }[how]
    if how == "small chunks":
        rows = rows[:3000]
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs.update({"version": "2.4", "created": 0.0, "modified": 0.0})
        file.create_dataset("packets", data=rows, **options)
    with open_run(path) as run:
        assert (run.own, run.number, run.info, run.condition, run.ledger) == (False, None, None, "", [])
        assert (list(run.messages()), list(run.blocks()), run.sources, run.e_log) == ([], [], [], [])
        assert np.array_equal(run.read(), rows)
        mask = expected(rows, V2, [1], [(1, 17, 12)], None, None)
        assert np.array_equal(run.read(io_group=1, chip="1-17-12"), rows[mask])
        assert run.read(["chip_id", "row"], chip="1-17-12")["row"].tolist() == np.flatnonzero(mask).tolist()
        with pytest.raises(FileError, match="has no /run/blocks, so that its rows cannot be selected by their time"):
            run.read(begin=0)


def test_a_column_by_which_to_select_must_exist(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs["version"] = "2.0"
        file["packets"] = np.zeros(10, [("packet_type", "<i4"), ("channel_id", "<i8"), ("chip_id", "<f4")])
    with open_run(path) as run:
        assert len(run.read(packet_type=0)) == len(run.read(channel=[0, 3])) == 10
        with pytest.raises(FileError, match="/packets has no column io_group, by which to select"):
            run.chunks(chip="1-2-3")


def test_larpix_control_reads_the_same(tmp_path):
    from larpix_control import hdf5format

    report, _ = write(tmp_path, Feed(), [2000])
    packets = hdf5format.from_file(str(report.path))["packets"]
    with open_run(report.path) as run:
        rows = run.read(packet_type="data")
    theirs = [packet for packet in packets if getattr(packet, "packet_type", None) == 0]
    assert [packet.timestamp for packet in theirs] == rows["timestamp"].tolist()
    assert [packet.channel_id for packet in theirs] == rows["channel_id"].tolist()
    assert [packet.dataword for packet in theirs] == rows["dataword"].tolist()


def test_the_package_stays_light():
    import subprocess
    import sys

    code = "import sys, larpixdaq; print([name for name in ('numpy', 'h5py', 'msgspec') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert found.strip() == "[]"
    with pytest.raises(AttributeError, match="module 'larpixdaq' has no attribute 'close_run'"):
        _ = larpixdaq.close_run
