"""Split and merge: the same rows, ledger, verdicts and texts, and verify judges the new parts like any others."""

import numpy as np
import pytest
from example_counts import examples
from file_builder import CLOCK64, NS, V1, V2, V3, Feed, random_rows, run_info, timed, write
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix_control import hdf5format, packets_v2

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import names
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.repartition import Borders, copy_rows, group_by_run, repartition
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.verify import verify, verify_all
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.reports import Comment
from larpixdaq.protocol.stream import SENT, Configurations
from larpixdaq.schema import LAYOUTS

COUNTS_OF_RUN = ("condition", "rows", "reasons", "ledger", "verdicts", "gaps", "messages", "chips", "missing_blocks")


def rows_of(*paths):
    return np.concatenate([np.concatenate([*file.pieces()]) for path in paths for file in [DataFile(path)]])


def without_counters(rows):
    rows = rows.copy()
    rows["counter"][rows["type" if "type" in rows.dtype.names else "packet_type"] == 5] = 0
    return rows


def configured(feed, sequence_text="Configuration"):
    """A block with configurations of three chips."""
    rng = np.random.default_rng(feed.sequence)
    chips = np.array([(1, 1, 11), (1, 1, 12), (2, 5, 30)], np.uint8)
    known = np.full((3, stream.REGISTERS), SENT, np.uint8)
    sent, read = rng.integers(0, 255, (2, 3, stream.REGISTERS), dtype=np.uint8)
    block, rows = feed.info(sequence_text)
    import msgspec

    return msgspec.structs.replace(block, configs=Configurations("2", chips, sent, read, known).pack()), rows


def rich_run(directory, *, parts=1, layout=V2, how="closed", second=None):
    """A run of two producers in several parts, with gaps, verdicts, unknown words, missing blocks, texts."""
    rng = np.random.default_rng(7)
    feeds = [Feed(producer="a", epoch=1, layout=layout), Feed(producer="b", epoch=2, layout=layout)]
    paths, positions, configurations = [], {}, None
    for part in range(parts):
        more = {"configurations": configurations} if configurations is not None else {}
        info = run_info(layout, begun_ns=NS, connected=(stream.ConnectedBoard("a", 1, "PACMAN", "tcp://x", "host"),))
        file = RunFile(directory, info, part, positions, **more)
        if part == 0:
            file.add(*feeds[0].info("Beginning run"))
            file.add(*configured(feeds[0]))
            file.set_text("power_up", "a report\nof two lines")
        file.add_comment(Comment(part + 1, NS + part, "Ann", "op", f"comment {part}"))
        for n in range(12):
            feed = feeds[n % 2]
            gaps = [stream.Gap(1, 3, NS + 5, NS + 9)] if n == 5 and part == 0 else []
            block, rows = feed.block(random_rows(rng, 700 + 31 * n, layout), gaps=gaps)
            file.add(*timed(block, rows, part * 12 + n, part * 12 + n + 1))
        file.add(*feeds[1].info("a longer text, " * 12 + f"é in part {part}"))
        positions, configurations = file.positions(), file.configurations()
        if part < parts - 1:
            paths.append(file.close(continued=True, texts={"next part": "next"}).path)
            continue
        for feed in feeds:
            file.end(
                feed.end(
                    how,
                    counts={1: {"dropped": 3}} if feed is feeds[1] else {},
                    verdicts=[stream.LossVerdict(1, "suspect", "heartbeats missing", 4, NS, NS + 1)],
                    unknown=[stream.UnknownWord(1, 5, 1, b"0123456789abcdef")],
                )
            )
        paths.append(file.close(ended_ns=NS + 12 * parts * 10**9).path)
    return paths


def facts(path):
    found = file_info(path)
    for line in found["ledger"]:
        line.pop("stored")
    return {name: found[name] for name in COUNTS_OF_RUN}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_split_and_merged_again_a_file_is_the_same(tmp_path, layout):
    (tmp_path / "run").mkdir()
    (tmp_path / "split").mkdir()
    (tmp_path / "merged").mkdir()
    (source,) = rich_run(tmp_path / "run", layout=layout)
    before = verify(source)
    pieces = repartition([source], tmp_path / "split", Borders(rows=3000), "split")
    assert [names.parse(piece.path.name).part for piece in pieces] == list(range(len(pieces)))
    assert len(pieces) >= 4
    assert all(piece.rows <= 3000 for piece in pieces)
    assert np.array_equal(
        without_counters(rows_of(*[piece.path for piece in pieces])), without_counters(rows_of(source))
    )
    for piece in pieces[:-1]:
        report = verify(piece.path)
        if not any("3 rows dropped" in line for line in report.findings):
            assert report.ok, report.findings
            assert report.condition == "CONTINUED"
        assert any("made from" in note and source.name in note for note in report.notes)
    whole = verify_all([tmp_path / "split"])
    assert whole.runs[0].rows == before.rows
    assert list(whole.runs[0].reasons) == list(verify_all([tmp_path / "run"]).runs[0].reasons)
    merged = repartition([piece.path for piece in pieces], tmp_path / "merged", Borders(), "merge")
    assert len(merged) == 1
    assert np.array_equal(rows_of(merged[0].path), rows_of(source))
    assert facts(merged[0].path) == facts(source)
    after = verify(merged[0].path)
    assert after.findings == before.findings
    names_of_times = ("opened_ns", "begun_ns", "ended_ns", "live_ns", "started_ns", "duplicate_blocks")
    infos = [DataFile(path).run_info() for path in (source, merged[0].path)]
    assert [infos[0][name] for name in names_of_times] == [infos[1][name] for name in names_of_times]
    texts = [DataFile(path).texts() for path in (source, merged[0].path)]
    for name in ("power_up", "e-log", "kind", "comment", "operator", "version larpixdaq"):
        assert texts[0][name] == texts[1][name], name
    assert not list(tmp_path.rglob("*.journal")) + list(tmp_path.rglob("*.part"))


def test_three_parts_of_a_run_become_one_and_live_times_add_up(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "split").mkdir()
    paths = rich_run(tmp_path / "run", parts=3)
    live = sum(DataFile(path).run_info()["live_ns"] for path in paths)
    (merged,) = repartition(paths, tmp_path / "merged", Borders(), "merge")
    assert merged.rows == sum(DataFile(path).rows for path in paths)
    assert DataFile(merged.path).run_info()["live_ns"] == live
    report = verify(merged.path)
    run = verify_all([tmp_path / "run"]).runs[0]
    assert report.condition == run.condition
    assert sorted(DataFile(merged.path).texts()["reason"]) == sorted(run.reasons)
    assert len(file_info(merged.path)["comments"]) == 3
    pieces = repartition(paths, tmp_path / "split", Borders(seconds=5), "split")
    assert sum(DataFile(piece.path).run_info()["live_ns"] for piece in pieces) == live
    assert verify_all([tmp_path / "split"]).runs[0].rows == merged.rows


def test_parts_from_the_middle_of_a_run(tmp_path):
    """They say by themselves that they are not all, and verify says good as far as they go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "new").mkdir()
    paths = rich_run(tmp_path / "run", parts=4)
    (merged,) = repartition(paths[1:3], tmp_path / "new", Borders(), "merge")
    assert names.parse(merged.path.name).part == 1
    report = verify(merged.path)
    assert (report.ok, report.condition) == (True, "CONTINUED")
    assert len(DataFile(merged.path).table("run/configs")) == 3  # those of the first part


def test_one_board(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "new").mkdir()
    report, rows = write(tmp_path / "run", Feed(), [1000, 2000, 0, 16_384])
    for group in (1, 2):
        (tmp_path / f"{group}").mkdir()
        (piece,) = repartition([report.path], tmp_path / f"{group}", Borders(), "split", group)
        expected = rows[(rows["io_group"] == group) | (rows["packet_type"] == 5)]
        assert np.array_equal(without_counters(rows_of(piece.path)), without_counters(expected))
        found = verify(piece.path)
        assert found.ok, found.findings
        assert any(f"only the rows of io_group {group}" in note for note in found.notes)
        assert {line["io_group"] for line in file_info(piece.path)["ledger"]} == {0, group}


@settings(max_examples=examples(15), deadline=None)
@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=8),
    limits=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    layout=st.sampled_from([V1, V2, CLOCK64, V3]),
)
def test_any_borders(tmp_path_factory, sizes, limits, layout):
    folder = tmp_path_factory.mktemp("any")
    report, rows = write(folder, Feed(layout=layout), sizes)
    paths = [report.path]
    for number, limit in enumerate(limits):
        new = folder / str(number)
        new.mkdir()
        paths = [piece.path for piece in repartition(paths, new, Borders(rows=limit), "split")]
        outcome = verify_all([new])
        assert outcome.ok, outcome
        assert np.array_equal(without_counters(rows_of(*paths)), without_counters(rows))


def test_parts_that_do_not_belong_together(tmp_path):
    for name in ("one", "other", "new"):
        (tmp_path / name).mkdir()
    paths = rich_run(tmp_path / "one", parts=3)
    other = write(tmp_path / "other", Feed(run=43), [100])[0].path
    for paths_given, text in (
        ([paths[0], paths[2]], "parts 0 and 2 of run 42 follow each other"),
        ([paths[0], other], "is of run 43"),
        ([paths[0], paths[0]], "parts 0 and 0 of run 42 follow each other"),
    ):
        with pytest.raises(FileError, match=text):
            repartition(paths_given, tmp_path / "new", Borders(), "merge")
    assert group_by_run([paths[2], other, paths[0]]) == [[paths[0], paths[2]], [other]]
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_left_or_overwritten_when_it_fails(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "new").mkdir()
    (path,) = rich_run(tmp_path / "run")
    third = names.stem(42, DataFile(path).run_info()["started_ns"], 2) + ".h5"
    (tmp_path / "new" / third).write_bytes(b"mine")
    with pytest.raises(FileError, match="exists"):
        repartition([path], tmp_path / "new", Borders(rows=1500), "split")
    assert [each.name for each in (tmp_path / "new").iterdir()] == [third]
    assert (tmp_path / "new" / third).read_bytes() == b"mine"
    # a damaged block
    data = bytearray(path.read_bytes())
    with DataFile(path) as file:
        place = file._packets.id.get_chunk_info(0).byte_offset
    data[place + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"verify|cannot be read"):
        repartition([path], tmp_path / "new", Borders(rows=1500), "split")
    assert [each.name for each in (tmp_path / "new").iterdir()] == [third]


@pytest.mark.parametrize("version", ["2.2", "2.4"])
def test_files_of_larpix_control(tmp_path, version):
    """Split, and merged again, larpix-control reads the same packets and messages."""
    from larpix.packet import MessagePacket

    words = np.random.default_rng(3).integers(0, 1 << 62, 40, dtype=np.uint64) & ~np.uint64(3)
    packets = packets_v2(words)
    for n in range(4):
        packets.insert(10 * n, MessagePacket(f"message {n}", 1_700_000_000 + n))
    source = tmp_path / "source.h5"
    hdf5format.to_file(str(source), packets, version=version, workers=1)
    total = DataFile(source).rows
    pieces = []
    for n, start in enumerate(range(0, total, 13)):
        piece = copy_rows([source], tmp_path / f"piece_{n}.h5", "split", start, start + 13)
        pieces.append(piece.path)
        report = verify(piece.path)
        assert report.ok, report.findings
        assert any("made from source.h5" in note for note in report.notes)
    merged = copy_rows(pieces, tmp_path / "merged.h5", "merge")
    assert merged.rows == total
    read = [hdf5format.from_file(str(path)) for path in (source, merged.path)]
    assert read[0]["packets"] == read[1]["packets"]
    assert np.array_equal(rows_of(source)["timestamp"], rows_of(merged.path)["timestamp"])
