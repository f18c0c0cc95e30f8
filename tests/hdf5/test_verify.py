"""verify finds the faults of files: every changed byte is found, or does not change the content."""

import random

import h5py
import numpy as np
import pytest
from byte_flipper import Flipper
from example_counts import examples
from file_builder import V1, V2, V3, Feed, random_rows, run_info, words_to_rows, write
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from larpixdaq import constants, schema
from larpixdaq._native import word_codec
from larpixdaq.hdf5 import layout, writer
from larpixdaq.hdf5.chunk_writer import LEAST, MOST
from larpixdaq.hdf5.run_report import file_info, survey_run
from larpixdaq.hdf5.verify import MOST_FINDINGS, verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    feed = Feed()
    rng = np.random.default_rng(1)
    file = RunFile(directory, run_info())
    for size in (5000, 12, 13_000):
        file.add(*feed.block(random_rows(rng, size), gaps=[stream.Gap(1, 1, 2, 3)]))
    file.add(*feed.info("Ending run"))
    unknown = [stream.UnknownWord(1, 5, 1, b"0123456789abcdef")]
    file.end(feed.end(unknown=unknown, outside=[[1] + [0] * len(constants.COUNTS)]))
    path = file.close().path
    assert verify(path).findings == []
    return path


@pytest.fixture(scope="module")
def flipper(good):
    with Flipper(good) as flipper:
        yield flipper


def found(flipper, place, change):
    """Whether verify finds a changed byte; an error when a change of the content is not found."""
    verdict = flipper.flip(place, change)
    assert all(line and "\n" not in line for line in verdict["findings"])
    assert verdict["findings"] or verdict["same"], f"byte {place} ^ {change} matters and was not found"
    return bool(verdict["findings"])


# Places are not shrunk, because all bytes are alike, and each that hangs takes the time limit.
@settings(max_examples=examples(100), phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_any_flipped_byte_is_found_or_does_not_matter(flipper, data):
    place = data.draw(st.integers(0, flipper.size - 1))
    found(flipper, place, data.draw(st.integers(1, 255)))


def test_flipped_bytes_of_the_structure_are_found_or_do_not_matter(flipper):
    """The superblock and the first groups, and a sample of all."""
    places = [*range(0, 600, 4), *random.Random(1).sample(range(flipper.size), 100)]
    assert sum(found(flipper, place, 0x10) for place in places) > len(places) // 3


def test_flipped_bytes_of_the_global_heap_are_found_or_do_not_matter(flipper):
    """Wrong numbers and lengths of objects make the HDF5 library (2.0) loop for ever."""
    heap = flipper.whole.index(b"GCOL")
    places = [heap + 8, heap + 9, heap + 15]
    at = heap + 16
    while flipper.whole[at]:
        places += [at, at + 8, at + 9, at + 15]
        at += 16 + (flipper.whole[at + 8] + 7) // 8 * 8
    for place in [*places, at, at + 8, at + 9, at + 15]:
        for change in {0x01, 0x80, flipper.whole[place]} - {0}:
            found(flipper, place, change)


def test_a_flipped_byte_in_any_table_is_found(good, tmp_path):
    """Change one byte in each table."""
    whole = good.read_bytes()
    with h5py.File(good) as file:
        places = {"run/info": file["run/info"].id.get_offset(), "run/checksums": file["run/checksums"].id.get_offset()}
        for name in layout.TABLES:
            if file[name].shape[0]:
                places[name] = file[name].id.get_chunk_info(0).byte_offset
    assert set(places) >= {"messages", "run/blocks", "run/ends", "ledger/counts", "ledger/gaps", "ledger/unknown"}
    for name, place in places.items():
        for offset in (0, 3, 11):
            changed = bytearray(whole)
            changed[place + offset] ^= 1
            (tmp_path / "flipped.h5").write_bytes(changed)
            assert not verify(tmp_path / "flipped.h5").ok, (name, offset)


@pytest.mark.parametrize("row_layout", schema.LAYOUTS, ids=lambda row_layout: row_layout.name)
def test_good_files_of_every_layout(tmp_path, row_layout):
    report, given = write(tmp_path, Feed(layout=row_layout), [1000, 16_000, 0, 16_384, 16_384, 16_384, 5000])
    checked = verify(report.path)
    assert (checked.findings, checked.condition, checked.rows) == ([], "COMPLETE", len(given))
    kinds = given["type" if row_layout is V1 else "packet_type"]
    packets = np.count_nonzero((kinds <= 3) & (given["direction"] == 1))
    assert file_info(report.path)["totals"]["packets"] == packets  # verify has compared it with the rows
    assert any("words have wrong parity" in note for note in checked.notes)


def tampered(tmp_path, change):
    """Verify a good file after `change(file)`, sealed again as if the writer had written it."""
    report, _ = write(tmp_path, Feed(), [1000, 500, 300])
    with h5py.File(report.path, "r+") as file:
        change(file)
        writer.seal_file(file)
    return verify(report.path)


def edit(name, column, row, value):
    def change(file):
        rows = file[name][:]
        rows[column][row] = value
        file[name][:] = rows

    return change


def drop_last(name):
    return lambda file: file[name].resize((file[name].shape[0] - 1,))


COUNTS = "ledger/counts"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (edit("run/blocks", "crc32", 1, 5), "/packets, rows 1 to 1001: expected CRC-32 00000005, found "),
        (edit("run/blocks", "first_row", 2, 900), "block 2 of 500 rows is at row 900, expected row 1001"),
        (edit("run/blocks", "rows", 1, 4_000_000_000), "block 1 of 4000000000 rows is at row 1, expected row 1"),
        (edit("run/blocks", "rows", 4, 700), "/run/blocks reaches to row 2501, /packets has 1802"),
        (edit("run/blocks", "rows", 4, 0), "/run/blocks covers 1801 rows, /packets has 1802"),
        (edit("run/blocks", "sequence", 2, 7), "sequence 7 follows where 2 should"),
        (edit("run/blocks", "producer", 2, 9), "names producer 9 of 1"),
        (edit("run/ends", "next", 0, 8), "sequence 8 follows where 5 should"),
        (drop_last("run/ends"), "no end record, totals unknown"),
        (drop_last("run/blocks"), "/run/info says 5 blocks, /run/blocks has 4"),
        (drop_last("packets"), "/run/info says 1802 rows, /packets has 1801"),
        (drop_last(COUNTS), "has rows, but no line in the ledger"),
        (edit(COUNTS, "io_group", 2, 1), "listed twice in the ledger"),
        (edit(COUNTS, "stored", 1, 5), "the ledger says 5 rows are stored, the file has "),
        (edit(COUNTS, "bytes_in", 1, 5), "ledger (a): 5 bytes came in, "),
        (edit(COUNTS, "words_in", 1, 5), "ledger (b): 5 words came in, "),
        (edit(COUNTS, "word_rows", 1, 5), "ledger (d): "),
        (edit(COUNTS, "packets", 1, 5), "the ledger says 5 packets, the file has "),
        (edit(COUNTS, "bad_parity", 2, 0), "the ledger says 0 bad_parity, the file has "),
        (edit(COUNTS, "owed", 1, 3), "3 rows are still pending"),
        (edit("messages", "index", 1, 5), "the column index is not the index of the row"),
        (drop_last("messages"), "message 1 of 1 in /messages"),
        (edit("run/info", "condition", 0, b"PERFECT"), "unknown condition 'PERFECT'"),
        (edit("run/info", "layout", 0, 3), "/run/info says layout 3, the columns are those of 2"),
        (lambda file: file["configs"].attrs.modify("asic_version", "3"), "of /configs: expected '2', found '3'"),
        (lambda file: file["packets"].attrs.modify("packet_types", "none"), "unexpected text 'none'"),
        (lambda file: file["_header"].attrs.modify("version", "2.3"), "are not those of layout 2.3"),
    ],
)
def test_errors_of_a_writer_are_found(tmp_path, change, line):
    report = tampered(tmp_path, change)
    assert line in "\n".join(report.findings)


def test_wrong_valid_parity_is_found(tmp_path):
    for number, row_layout in enumerate(schema.LAYOUTS):
        feed = Feed(number, layout=row_layout)
        rows = random_rows(np.random.default_rng(1), 100, row_layout)
        place = np.flatnonzero(rows["type" if row_layout is V1 else "packet_type"] <= 3)[7]
        rows["valid_parity"][place] ^= 1
        file = RunFile(tmp_path, run_info(row_layout, number))
        file.add(*feed.block(rows))
        file.end(feed.end())
        (line,) = verify(file.close().path).findings
        assert line == f"1 rows, the first is {place}: valid_parity is not what their bits say"


def test_fifo_diagnostics_rows_have_their_own_parity(tmp_path):
    words = np.random.default_rng(1).integers(0, 1 << 63, 300, dtype=np.uint64) & ~np.uint64(3)
    rows = np.zeros(300, V2.dtype)
    assert word_codec.decode(words, rows, asic=schema.Asic.V2_DIAGNOSTICS, io_group=1) == 300
    mixed = np.concatenate([rows, words_to_rows(words, V2, 1), rows])
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(mixed))
    file.end(feed.end())
    assert verify(file.close().path).findings == []


def test_an_unfinished_or_incomplete_file_fails(tmp_path):
    feed = Feed()
    rng = np.random.default_rng(1)
    file = RunFile(tmp_path, run_info())
    for _ in range(MOST + 1):
        file.add(*feed.block(random_rows(rng, 16_000)))
    report = verify(file.path)
    assert report.condition == "RUNNING"
    assert report.rows >= LEAST * 16_384  # in whole chunks; how many depends on the packing thread
    covered = report.rows // 16_000 * 16_000
    assert any(f"/run/blocks covers {covered} rows, /packets has {report.rows}" in line for line in report.findings)
    closed = verify(file.close().path)
    assert "condition INTERRUPTED: producer 'LArPix board', epoch 7: no end record" in closed.findings[0]


def test_files_of_larpix_control_have_no_ledger(tmp_path):
    hdf5format = pytest.importorskip("larpix.format.hdf5format")
    from larpix import packet as lc

    words = np.random.default_rng(5).integers(0, 1 << 63, 50, dtype=np.uint64)
    made = [lc.Packet_v2(word.to_bytes(8, "little")) for word in words.tolist()]
    for packet in made:
        packet.io_group, packet.io_channel, packet.direction = 1, 2, 1
    hdf5format.to_file(str(tmp_path / "theirs.h5"), made, workers=1)
    report = verify(tmp_path / "theirs.h5")
    assert report.findings == []
    assert report.ok
    assert (report.rows, report.condition) == (50, "")
    assert report.notes[0].startswith("no ledger: the file was not written by larpix-daq")
    summary = file_info(tmp_path / "theirs.h5")
    assert (summary["own"], summary["layout"], summary["rows"]) == (False, "2.4", 50)
    old = [lc.Packet_v1() for _ in range(3)]
    for packet in old:
        packet.chip_key = "1-1-5"
    hdf5format.to_file(str(tmp_path / "old.h5"), old, version="1.0", workers=1)
    report = verify(tmp_path / "old.h5")
    assert report.findings == []
    assert report.notes == [
        "no ledger: the file was not written by larpix-daq; only structure was checked, parity was not: column"
        " adc_counts of /packets has 8 bits, too few for its field"
    ]


OLD_COLUMNS = [name for name in schema.PACKETS_2_4.names if name not in ("first_packet", "receipt_timestamp")]


@pytest.mark.parametrize(
    ("version", "columns"),
    [
        # The recorded file of 2020 is of the first kind, the others are of forks and of other machines.
        ("2.3", {**dict.fromkeys(schema.PACKETS_2_4.names), "shared_fifo_events": "u1"}),
        ("2.4", {**dict.fromkeys(schema.PACKETS_2_4.names), "more": "<f4"}),
        ("2.4", dict.fromkeys(schema.PACKETS_2_4.names, ">")),
        ("2.1", dict.fromkeys((*OLD_COLUMNS, "first_packet"))),
    ],
    ids=["narrow column", "further column", "big-endian", "2.1"],
)
def test_parity_is_checked_in_files_of_other_columns(tmp_path, version, columns):
    rows = random_rows(np.random.default_rng(6), 3000)
    words = (rows["packet_type"] <= 3) & ((version != "2.1") | (rows["packet_type"] == 0))
    wrong = np.count_nonzero(words & (rows["valid_parity"] == 0))
    types = {name: schema.PACKETS_2_4[name] if name in rows.dtype.names else "<f4" for name in columns}
    types = {name: kind.newbyteorder(">") if columns[name] == ">" else columns[name] or kind
             for name, kind in types.items()}  # fmt: skip
    given = np.zeros(len(rows), list(types.items()))
    for name in set(columns) & set(rows.dtype.names):
        given[name] = rows[name]

    def checked(given):
        path = tmp_path / "theirs.h5"
        with h5py.File(path, "w") as file:
            file.create_group("_header").attrs["version"] = version
            file["packets"] = given
        return verify(path)

    report = checked(given)
    assert report.findings == []
    assert "only structure and parity were checked" in report.notes[0]
    assert f"{wrong} of {np.count_nonzero(words)} words have wrong parity" in report.notes
    flipped = np.flatnonzero(words)[5]
    given["dataword"][flipped] ^= 1
    assert checked(given).findings == [f"1 rows, the first is {flipped}: valid_parity is not what their bits say"]


def test_a_missing_column_for_parity_is_named(tmp_path):
    rows = random_rows(np.random.default_rng(6), 100)
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file.create_group("_header").attrs["version"] = "2.0"
        file["packets"] = rows[OLD_COLUMNS].astype([(name, rows.dtype[name]) for name in OLD_COLUMNS])
    report = verify(tmp_path / "theirs.h5")
    assert report.findings == []
    assert report.notes == [
        "no ledger: the file was not written by larpix-daq; only structure was checked, parity was not: /packets has no"
        " column first_packet"
    ]


@pytest.mark.parametrize("asic", schema.ASICS)
def test_good_files_of_every_chip_generation(tmp_path, asic):
    feed = Feed(layout=schema.layout_of(schema.ASICS[asic]))
    file = RunFile(tmp_path, run_info(feed.layout, asic_version=asic))
    file.end(feed.end())
    assert verify(file.close().path).findings == []


def test_the_number_of_findings_is_limited(tmp_path):
    feed = Feed(layout=V3)
    file = RunFile(tmp_path, run_info(V3))
    for _ in range(300):
        file.add(*feed.block(random_rows(np.random.default_rng(1), 1, V3)))
    file.end(feed.end())
    path = file.close().path
    with h5py.File(path, "r+") as changed:
        table = changed["run/blocks"][:]
        table["crc32"] += 1
        changed["run/blocks"][:] = table
    findings = verify(path).findings
    assert len(findings) == MOST_FINDINGS + 1
    assert findings[-1].startswith("and 201 more")


@pytest.mark.parametrize(
    ("wrong", "condition"),
    [
        ({"words_in": 1500, "word_bytes": 36_000, "rejected_words": 1500, "bytes_in": 36_008}, "INCOMPLETE"),
        ({"rejected_bytes": 30_000, "rejected_messages": 100, "bytes_in": 30_008}, "INCOMPLETE"),
        (
            {"words_in": 1500, "word_bytes": 36_000, "word_rows": 1000, "unknown_words": 500, "bytes_in": 36_008},
            "COMPLETE",
        ),
        ({"rejected_bytes": 200, "rejected_messages": 1, "bytes_in": 208}, "COMPLETE"),  # noise on a line
        ({"trailing_bytes": 30_000, "bytes_in": 30_008}, "INCOMPLETE"),
        ({"resync_bytes": 30_000, "bytes_in": 30_008}, "INCOMPLETE"),
    ],
)
def test_a_run_of_mostly_rejected_data_is_not_good(tmp_path, wrong, condition):
    feed = Feed()
    words = wrong.get("word_rows", 0)
    file = RunFile(tmp_path, run_info())
    rows = words_to_rows(np.full(words, 1 << 63, np.uint64), V2, 3)
    time_row = np.zeros(1, V2.dtype)
    time_row["packet_type"], time_row["io_group"] = 4, 3
    file.add(*feed.block(np.concatenate([time_row, rows])))
    counts = dict.fromkeys(("words_in", "word_bytes"), 0) | wrong
    file.end(feed.end(counts={3: counts | {"packets": words, "bad_parity": 0}}))
    report = file.close()
    assert report.condition == survey_run(tmp_path, 42).condition == condition
    found = verify(report.path)
    assert found.ok == (condition == "COMPLETE"), found.findings
    assert any("most of the data could not be used" in line for line in found.findings) != found.ok
