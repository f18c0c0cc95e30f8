"""Damaged, foreign and malicious files: each command reports the error in one line, and soon."""

import contextlib
import json
import os

import h5py
import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info, write

from larpixdaq import cli, open_run
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import chunk_writer, layout, names, repair
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recordings import open_recording
from larpixdaq.hdf5.recovery import prepare, recover
from larpixdaq.hdf5.run_report import file_info, positions, survey_run
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.storage.directory_lock import Lock

TABLES = ("packets", "configs", "messages", "run/info", "run/checksums", "run/texts", "run/blocks", "ledger/gaps")
NAME = "run0000042_20261122T071251Z_000"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good"), Feed(), [1000, 300])[0].path.read_bytes()


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A part whose writer was killed; its journal is empty."""
    file, feed = RunFile(tmp_path_factory.mktemp("part"), run_info()), Feed()
    for size in [16_384] * 4:
        file.add(*feed.block(random_rows(np.random.default_rng(1), size)))
    file.abandon()
    repair.repair_superblock(file.path)
    return file.path.read_bytes()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A part with a batch of blocks, whose writer was killed."""
    file, feed = RunFile(tmp_path_factory.mktemp("stored"), run_info()), Feed()
    rows = random_rows(np.random.default_rng(1), 16_384)
    for _ in range(chunk_writer.MOST):
        file.add(*feed.block(rows))
    file.abandon()
    repair.repair_superblock(file.path)
    return file.path.read_bytes()


def read_all(path):
    with open_run(path) as run:
        for _ in run.chunks(io_group=1):
            pass
        assert (run.ledger, run.verdicts, run.sources, run.e_log, list(run.messages()), list(run.blocks())) is not None


def judged(path):
    """Collect the errors of all functions that read a file, one line each."""
    lines = verify(path).findings
    for look in (file_info, lambda path: DataFile(path).close(), open_recording, read_all):
        try:
            if (found := look(path)) is not None and hasattr(found, "close"):
                found.close()
        except FileError as error:
            lines.append(str(error))
    survey_run(path.parent, 42)
    positions(path.parent, warnings=lines)
    assert all(line and "\n" not in line for line in lines)
    return lines


def changed(path, content, change):
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replaced(file, name, **how):
    del file[name]
    file.create_dataset(name, **how)


def absurd(file, name):
    """Announce 2^45 rows; the two tables of fixed length are replaced by new tables without data."""
    if file[name].maxshape == (None,):
        file[name].resize((1 << 45,))
    else:
        replaced(file, name, shape=(1 << 45,), dtype=file[name].dtype, chunks=(64,))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_absurd_extent(tmp_path, good, part, name):
    path = changed(tmp_path / f"{NAME}.h5", good, lambda file: absurd(file, name))
    assert f"/{name} announces {1 << 45} rows, the file has room for " in "\n".join(judged(path))
    path.unlink()
    if name == "configs":
        return  # recovery cuts its further rows without reading them
    path = changed(tmp_path / f"{NAME}.h5.part", part, lambda file: absurd(file, name))
    for finish in (prepare, recover):
        before = path.read_bytes()
        if finish is recover:
            with pytest.raises(FileError, match=f"/{name} announces"):
                recover(path)
        else:
            with contextlib.suppress(FileError):
                prepare(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", [name for name in TABLES if name not in ("run/info", "run/checksums")])
def test_rows_for_which_a_full_disk_had_no_room(tmp_path, stored, name):
    """Their number reached the file, they did not. All blocks before them are recovered."""
    path = changed(tmp_path / f"{NAME}.h5.part", stored, lambda file: None)
    expected = recover(path)
    assert expected.rows >= chunk_writer.LEAST * 16_384
    whole = judged(tmp_path / f"{NAME}.h5")
    for left in tmp_path.iterdir():
        left.unlink()

    def announce(file):
        space = file[name].id.get_num_chunks() * file[name].chunks[0]
        file[name].resize((space + 300,))

    path = changed(tmp_path / f"{NAME}.h5.part", stored, announce)
    assert prepare(path) is None
    found = recover(path)
    assert found.rows == expected.rows
    if name == "run/blocks":  # those that had room, and are empty, may have been blocks: a copy of the part is kept
        assert "rows of /run/blocks make no sense" in found.damaged[1]
    else:
        assert found._replace(cut=0) == expected._replace(cut=0)
        assert judged(tmp_path / f"{NAME}.h5") == whole


def outside(file, name, other):
    del file[name]
    file[name] = h5py.ExternalLink(str(other), "/packets")


def external(file, name, other):
    replaced(file, name, shape=(100,), dtype=layout.MESSAGES, external=[(str(other), 0, 100 * 76)])


def virtual(file, name, other):
    there = h5py.VirtualLayout((100,), layout.MESSAGES)
    there[:] = h5py.VirtualSource(str(other), "packets", (100,))
    del file[name]
    file.create_virtual_dataset(name, there)


@pytest.mark.parametrize("name", ["packets", "run/blocks", "ledger", "later"])
@pytest.mark.parametrize("how", [outside, external, virtual])
def test_data_in_other_files_are_damage(tmp_path, good, name, how):
    """Also when the other file is a pipe, for which HDF5 would wait."""
    os.mkfifo(tmp_path / "other")

    def change(file):
        if name == "later":
            file[name] = 1
        how(file, name, tmp_path / "other")

    path = changed(tmp_path / f"{NAME}.h5", good, change)
    if name == "later" and how is not outside:
        assert judged(path) == []  # no function reads it
    else:
        assert ("has no /ledger/" if name == "ledger" and how is not outside else "in this one") in judged(path)[0]


@pytest.mark.parametrize("name", ["packets", "configs", "run/info", "run/blocks"])
def test_other_objects_in_place_of_a_table(tmp_path, good, name):
    """The table is absent, or a group, a number, rows of arrays, a dataset of two dimensions."""
    array = np.dtype([("packet_type", "u1", (3,)), ("type", "u1", (3,)), ("timestamp", "u1", (2, 2)), ("parity", "u1")])
    plain = np.dtype([("packet_type", "u1"), ("timestamp", "u1", (2, 2)), ("parity", "u1"), ("counter", "S3")])
    for make in (
        lambda file: None,
        lambda file: file.create_group(name),
        lambda file: file.create_dataset(name, data=3),
        lambda file: file.create_dataset(name, dtype="u1", shape=None),
        lambda file: file.create_dataset(name, data=np.ones(5, array)),
        lambda file: file.create_dataset(name, data=np.ones(5, plain)),
        lambda file: file.create_dataset(name, data=np.ones((5, 2))),
        lambda file: file.create_dataset(name, data=["a"] * 5, dtype=h5py.string_dtype()),
    ):

        def change(file, make=make):
            del file[name]
            make(file)

        path = changed(tmp_path / f"{NAME}.h5", good, change)
        assert judged(path) or name in layout.ADDED_TABLES


def test_a_foreign_file_with_rows_of_arrays(tmp_path):
    for columns in (
        [("packet_type", "u1", (2,)), ("timestamp", "u8")],
        [("packet_type", "u1"), ("timestamp", "u8", 9)],
    ):
        dtype = np.dtype([*columns, ("parity", "u1"), ("io_group", "u1")])
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_group("_header").attrs["version"] = "2.4"
            file["packets"] = np.ones(5, dtype)
        report = verify(tmp_path / "a.h5")
        assert len(report.findings) == (dtype["packet_type"].shape != ())
        with pytest.raises(FileError, match="packet file without /packets of known columns"):
            open_recording(tmp_path / "a.h5")


@pytest.mark.parametrize("column", ["chip_key", "receipt_timestamp", "fifo_diagnostics_enabled", "direction"])
def test_a_foreign_file_with_columns_of_other_kinds(tmp_path, column):
    kind = "<f4" if column == "chip_key" else "S3"
    other = "type" if column == "chip_key" else "packet_type"
    dtype = np.dtype([(other, "u1"), ("timestamp", "u8"), ("parity", "u1"), (column, kind)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("_header").attrs["version"] = "1.0"
        file["packets"] = np.ones(5, dtype)
    with pytest.raises(FileError, match="packet file without /packets of known columns"):
        open_recording(tmp_path / "a.h5")


def test_a_foreign_file_with_impossible_io_groups(tmp_path):
    dtype = np.dtype([("packet_type", "u1"), ("timestamp", "u8"), ("parity", "u1"), ("io_group", "<f8")])
    rows = np.ones(5, dtype)
    rows["io_group"] = [2, -1, 256, np.nan, 3]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("_header").attrs["version"] = "2.4"
        file["packets"] = rows
    with contextlib.closing(open_recording(tmp_path / "a.h5")) as recording:
        assert recording.io_groups(1) == (2, 3)


def test_truncated_files(tmp_path, good, part):
    for size in [*range(0, 3000, 97), *range(3000, len(good), 4999)]:
        path = tmp_path / f"{NAME}.h5"
        path.write_bytes(good[:size])
        assert judged(path)
        path.unlink()
    path = tmp_path / f"{NAME}.h5.part"
    for size in [*range(1, 3000, 397), *range(3000, len(part), 39_999)]:
        path.write_bytes(part[:size])
        with contextlib.suppress(FileError):
            assert recover(path).damaged
        assert part[:size][repair.SIZE :] in [one.read_bytes()[repair.SIZE :] for one in tmp_path.iterdir()]
        for left in tmp_path.iterdir():
            left.unlink()


@pytest.mark.timeout(60)  # HDF5's own way takes two minutes for each
def test_a_damaged_part_of_a_dead_writer_is_found_at_once(tmp_path, part):
    """Its superblock still says that it is being written."""
    path = tmp_path / f"{NAME}.h5.part"
    flags = repair.SIGNATURE + b"\x03\x08\x08\x05" + bytes(8) + b"\xff" * 8 + part[28:44]
    whole = flags + repair.lookup3(flags).to_bytes(4, "little") + part[repair.SIZE :]
    path.write_bytes(whole)
    assert "condition RUNNING" in verify(path).findings[0]
    for place in (500, 2000):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "incorrect metadata checksum" in verify(path).findings[0]


def test_pipes_and_links(tmp_path, good, capsys):
    """A pipe under the name of a run's file; links to a file in another and in the same directory."""
    data = tmp_path / "data"
    data.mkdir()
    for ending in (names.FINISHED, names.PART, names.JOURNAL):
        os.mkfifo(data / f"{NAME}{ending}")
    assert cli.main(["verify", "--json", str(data)]) == 1
    assert cli.main(["recover", "--json", str(data)]) == 1
    assert cli.main(["info", str(data / f"{NAME}.h5")]) == 1
    lock = Lock(data, "")
    assert lock.take() is None  # a storage that starts here waits for none of them
    lock.release()
    for ending in (names.PART, names.JOURNAL):
        (data / f"{NAME}{ending}").unlink()
    (data / f"{NAME}.h5").unlink()
    (tmp_path / "other").write_bytes(good)
    (data / f"{NAME}.h5").symlink_to(tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["verify", "--json", str(data)]) == 1
    facts = json.loads(capsys.readouterr().out)["files"][str(data / f"{NAME}.h5")]
    assert facts["findings"] == [
        f"{data / f'{NAME}.h5'}: is a link out of its directory, to {tmp_path / 'other'}: name that file instead"
    ]
    assert cli.main(["info", str(data / f"{NAME}.h5")]) == 1
    (data / f"{NAME}.h5").unlink()
    (data / f"{NAME}.h5").write_bytes(good)
    (data / "latest.h5").symlink_to(f"{NAME}.h5")
    assert cli.main(["info", str(data / "latest.h5")]) == 0


def test_control_characters_in_texts_are_escaped(tmp_path, capsys):
    file, feed = (
        RunFile(tmp_path, run_info(comment="\x1b[2J\nrun 42: good", operator="\x9b31m", storage="a\u202eb")),
        Feed(),
    )
    file.add(*feed.info("\x1b]0;title\x07"))
    path = file.close().path
    for command in (["info", path], ["verify", path], ["recover", tmp_path / "\x1b[31m\udcff"]):
        cli.main([*map(str, command)])
    found = capsys.readouterr()
    assert all(line.isprintable() for line in (found.out + found.err).splitlines())
    assert "comment          \\x1b[2J\\nrun 42: good" in found.out
    assert "\\x1b[31m\\udcff" in found.out
