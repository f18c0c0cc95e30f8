"""Export: other programs read the same values; nothing half-written is left, and no file is overwritten."""

import csv
import importlib
import json
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest
from example_counts import examples
from file_builder import V1, V2, Feed, random_rows, write
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import cli, open_run, schema
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.hdf5.export import FORMATS, GROUP_ROWS, export
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.row_reader import Selection

EVERYTHING = Selection()


@pytest.fixture(scope="module", params=schema.LAYOUTS, ids=lambda layout: layout.name)
def made(request, tmp_path_factory):
    report, _ = write(tmp_path_factory.mktemp("export"), Feed(layout=request.param), [1000, 16_384, 700])
    with h5py.File(report.path) as file:
        return report.path, file["packets"][:]


def exported(path, target, form, selection=EVERYTHING, names=()):
    with open_run(path, parts=False) as run:
        return export(run, target, form, selection, names)


def test_numpy_reads_an_npy_file(made, tmp_path):
    path, rows = made
    report = exported(path, tmp_path / "x.npy", "npy")
    found = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert report.rows == len(rows)
    assert found.dtype == rows.dtype
    assert np.array_equal(found, rows)


def test_a_csv_file(made, tmp_path):
    path, rows = made
    exported(path, tmp_path / "x.csv", "csv")
    with open(tmp_path / "x.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == list(rows.dtype.names)
    assert len(lines) == len(rows) + 1
    for line, row in zip(lines[1::97], rows[::97].tolist(), strict=True):
        assert line == [value.decode() if isinstance(value, bytes) else str(value) for value in row]


def test_pyarrow_and_pandas_read_a_parquet_file(made, tmp_path):
    parquet, pandas = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pandas")
    path, rows = made
    exported(path, tmp_path / "x.parquet", "parquet")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == list(rows.dtype.names)
    frame = pandas.read_parquet(tmp_path / "x.parquet")
    for name in rows.dtype.names:
        if rows.dtype[name].kind == "S":
            assert frame[name].astype(str).tolist() == [text.decode() for text in rows[name].tolist()]
        else:
            assert frame[name].dtype == rows.dtype[name]
            assert np.array_equal(frame[name].to_numpy(), rows[name]), name
    field = table.schema.field("timestamp")
    assert field.metadata[b"unit"] == b"ticks of the chip's clock"
    facts = json.loads(table.schema.metadata[b"larpixdaq"])
    assert (facts["run"], facts["condition"], facts["rows"]) == (42, "COMPLETE", len(rows))


def test_groups_of_rows(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("larpixdaq.hdf5.export.GROUP_ROWS", 65_536)
    assert GROUP_ROWS > 65_536
    report, _ = write(tmp_path, Feed(), [16_384] * 9)
    exported(report.path, tmp_path / "x.parquet", "parquet")
    with parquet.ParquetFile(tmp_path / "x.parquet") as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sum(sizes) == report.rows
    assert sizes[:-1] == [65_536] * (len(sizes) - 1)


CHOICES = st.builds(
    lambda *fields: Selection(*fields),  # builds() would also draw what is not given
    st.sampled_from([None, (0,), (4, 6), (5,)]),
    st.sampled_from([None, (1,), (2,), (0, 9)]),
    st.sampled_from([None, (17,), (3,)]),
    st.sampled_from([None, ((1, 17, 11), (2, 17, 200))]),
    st.sampled_from([None, (3,), tuple(range(40))]),
    st.integers(-500, 500),
    st.none() | st.integers(-2000, 20_000),
)


@settings(max_examples=examples(40), deadline=None)
@given(selection=CHOICES, layout=st.sampled_from([V1, V2]))
def test_any_selection(tmp_path_factory, selection, layout):
    """Compared with a selection row by row."""
    folder = tmp_path_factory.mktemp("selection")
    report, _ = write(folder, Feed(layout=layout), [900, 300])
    with h5py.File(report.path) as file:
        rows = file["packets"][:]
    wanted = []
    for row in rows[slice(selection.start, selection.stop)]:
        if layout is V1:
            parts = [int(part) for part in row["chip_key"].decode().split("-")] if row["chip_key"] else [0, 0, 0]
            key, kind, channel = (parts[0], parts[1], int(row["chipid"])), row["type"], row["channel"]
        else:
            key = tuple(int(row[name]) for name in ("io_group", "io_channel", "chip_id"))
            kind, channel = row["packet_type"], row["channel_id"]
        fits = (not selection.types or kind in selection.types) and (
            not selection.io_groups or key[0] in selection.io_groups
        )
        if selection.io_channels or selection.chips or selection.channels:
            fits = fits and kind <= 3
        fits = fits and (not selection.io_channels or key[1] in selection.io_channels)
        fits = fits and (not selection.chips or key in selection.chips)
        fits = fits and (not selection.channels or channel in selection.channels)
        if fits:
            wanted.append(row)
    exported(report.path, folder / "x.npy", "npy", selection)
    found = np.load(folder / "x.npy")
    assert found.tolist() == [row.tolist() for row in wanted]


def test_some_columns(tmp_path):
    report, _rows = write(tmp_path, Feed(), [100])
    exported(report.path, tmp_path / "x.npy", "npy", names=("dataword", "chip_id"))
    assert np.load(tmp_path / "x.npy").dtype.names == ("dataword", "chip_id")
    with pytest.raises(FileError, match="has no column adc, only io_group"):
        exported(report.path, tmp_path / "y.npy", "npy", names=("adc",))


def test_no_file_is_overwritten_and_nothing_is_left(tmp_path):
    report, _ = write(tmp_path, Feed(), [16_384] * 3)
    (tmp_path / "x.csv").write_text("mine")
    with pytest.raises(FileError, match="File exists; no file is overwritten"):
        exported(report.path, tmp_path / "x.csv", "csv")
    assert (tmp_path / "x.csv").read_text() == "mine"
    (tmp_path / "out").mkdir()
    data = bytearray(report.path.read_bytes())
    with DataFile(report.path) as file:
        place = file._packets.id.get_chunk_info(2).byte_offset
    data[place + 1000] ^= 255
    report.path.write_bytes(data)
    for form in FORMATS:
        with pytest.raises((FileError, ConfigError)):
            exported(report.path, tmp_path / "out" / f"x.{form}", form)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it."""
    report, _ = write(tmp_path, Feed(), [16_384] * 3)
    (tmp_path / "out").mkdir()
    forms = ["csv", "npy", *(["parquet"] if importlib.util.find_spec("pyarrow") else [])]
    for form in forms:
        result = subprocess.run(
            [sys.executable, "-m", "larpixdaq", "export", "--format", form, "-o", tmp_path / "out", report.path],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 1, (form, result)
        assert "cannot write" in result.stdout
        assert "File too large" in result.stdout, form
        assert list((tmp_path / "out").iterdir()) == []


def test_the_commands(tmp_path, capsys):
    report, rows = write(tmp_path, Feed(), [1000])
    (tmp_path / "out").mkdir()
    assert cli.main(["export", "--format", "npy", "-o", str(tmp_path / "out"), "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["files"][str(report.path)]["rows"] == len(rows)
    assert cli.main(["export", "--format", "npy", "-o", str(tmp_path / "out"), str(report.path)]) == 1
    assert "no file is overwritten" in capsys.readouterr().out
    assert cli.main(["export", "--format", "npy", str(report.path), "--types", "data", "--chips", "1-17-11"]) == 0
    name = report.path.name.replace(".h5", ".npy")
    chosen = np.load(tmp_path / name)
    assert set(chosen["chip_id"]) <= {11}


def test_random_rows_are_what_this_file_takes_them_for():
    assert set(random_rows(np.random.default_rng(1), 3000)["packet_type"]) >= {0, 1, 2, 3, 4, 6, 7}
