"""diff: equal content whatever the file, and every difference with its place."""

import json

import h5py
import numpy as np
import pytest
from example_counts import examples
from file_builder import CLOCK64, V2, Feed, random_rows, run_info, write
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix_control import hdf5format, packets_v2

from larpixdaq import cli
from larpixdaq.hdf5.comparison import compare
from larpixdaq.hdf5.repartition import Borders, repartition
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.schema import PACKETS_2_4, PACKETS_2_4_CLOCK64


def copies(directory, order):
    """A run of two producers, whose blocks a storage wrote in this order."""
    directory.mkdir()
    feeds = [Feed(producer=name, epoch=epoch) for name, epoch in (("a", 1), ("b", 2))]
    blocks = [
        [
            feed.info(f"Beginning {n}"),
            *(feed.block(random_rows(np.random.default_rng(10 * n + k), 300)) for k in range(4)),
        ]
        for n, feed in enumerate(feeds)
    ]
    file = RunFile(directory, run_info())
    for which in order:
        file.add(*blocks[which].pop(0))
    for feed in feeds:
        file.end(feed.end())
    return file.close().path


def changed(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def test_copies_of_two_storages(tmp_path):
    one, other = copies(tmp_path / "one", [0, 1] * 5), copies(tmp_path / "other", [1, 1, 0, 0, 0, 1, 1, 0, 1, 0])
    found = compare(one, other)
    assert (found.same, found.differences, found.rows) == (True, [], (2402, 2402))

    def change(file):
        rows = file["packets"][:]
        rows["dataword"][[700, 701]] ^= 1
        file["packets"][:] = rows
        blocks = file["run/blocks"][:]
        blocks["crc32"][3:] += 1
        file["run/blocks"][:] = blocks

    changed(other, change)
    found = compare(one, other)
    assert found.different_rows == 2
    assert "block " in found.differences[0]
    assert ": dataword " in found.differences[0]
    (tmp_path / "split").mkdir()
    pieces = repartition([one], tmp_path / "split", Borders(rows=700), "split")
    found = compare(one, pieces[0].path)
    assert any(line.startswith("only in") and "blocks " in line for line in found.differences)


def test_rows_of_other_programs(tmp_path):
    rng = np.random.default_rng(1)
    rows = random_rows(rng, 3000)
    wide = np.zeros(len(rows), PACKETS_2_4_CLOCK64)
    for name in rows.dtype.names:
        wide[name] = rows[name]
    paths = [tmp_path / f"{n}.h5" for n in range(2)]
    for path, given_rows in zip(paths, (rows, wide), strict=True):
        with h5py.File(path, "w") as file:
            file.create_group("_header").attrs["version"] = "2.4"
            file["packets"] = given_rows
    found = compare(*paths)
    assert (found.same, found.different_rows) == (True, 0)
    assert any("receipt_timestamp uint32 and uint64" in note for note in found.notes)

    def change(file):
        changed_rows = file["packets"][:]
        changed_rows["chip_id"][1234] += 1
        changed_rows["timestamp"][2000:2009] += 1
        del file["packets"]
        file["packets"] = changed_rows[:2990]

    changed(paths[1], change)
    found = compare(*paths)
    assert found.different_rows == 10
    assert "3000 rows in 0.h5, 2990 in 1.h5" in found.differences
    assert any(line.startswith(f"row 1234: chip_id {rows['chip_id'][1234]} and ") for line in found.differences)
    assert "5 more rows differ" in found.differences


def test_a_file_and_its_conversion_by_larpix_control(tmp_path):
    words = np.random.default_rng(3).integers(0, 1 << 62, 50, dtype=np.uint64) & ~np.uint64(3)
    for name in ("a.h5", "b.h5"):
        hdf5format.to_file(str(tmp_path / name), packets_v2(words), version="2.4", workers=1)
    assert compare(tmp_path / "a.h5", tmp_path / "b.h5").same


@settings(max_examples=examples(30), deadline=None)
@given(
    places=st.sets(st.integers(0, 1999), max_size=6),
    column=st.sampled_from(PACKETS_2_4.names),
    layout=st.sampled_from([V2, CLOCK64]),
)
def test_any_changed_rows_are_found(tmp_path_factory, places, column, layout):
    folder = tmp_path_factory.mktemp("changed")
    rows = random_rows(np.random.default_rng(1), 2000, layout)
    other = rows.copy()
    other[column][sorted(places)] ^= 1
    for name, given_rows in (("a.h5", rows), ("b.h5", other)):
        with h5py.File(folder / name, "w") as file:
            file.create_group("_header").attrs["version"] = "2.4"
            file["packets"] = given_rows
    found = compare(folder / "a.h5", folder / "b.h5")
    assert (found.different_rows, found.same) == (len(places), not places)


def test_the_command(tmp_path, capsys):
    one, other = copies(tmp_path / "one", [0, 1] * 5), copies(tmp_path / "other", [1, 0] * 5)
    assert cli.main(["diff", str(one), str(other)]) == 0
    assert "same content, 2402 rows" in capsys.readouterr().out
    assert cli.main(["diff", str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    write(tmp_path / "other", Feed(run=43), [10])
    assert cli.main(["diff", "--json", str(tmp_path / "one"), str(tmp_path / "other")]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["ok"]
    assert [pair["same"] for pair in found["pairs"]] == [True]
    assert len(found["alone"]) == 1


@pytest.mark.parametrize("name", ["comment", "operator"])
def test_other_texts_of_a_run(tmp_path, name):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    paths = []
    for folder, value in (("one", "as before"), ("other", "another")):
        file = RunFile(tmp_path / folder, run_info(**{name: value}))
        feed = Feed()
        file.add(*feed.info("x"))
        file.end(feed.end())
        paths.append(file.close().path)
    assert compare(*paths).differences == [f"{name} 'as before' and 'another'"]
