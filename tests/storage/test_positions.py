"""Files that a storage opens at its start, and blocks of runs that were closed long ago."""

import contextlib
import logging

import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info, write

from larpixdaq.hdf5 import run_report as module
from larpixdaq.hdf5.names import run_files
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.run_report import continuable_runs, positions
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.storage.service import StorageService


def test_runs_that_may_continue(tmp_path):
    assert continuable_runs(tmp_path) == []
    for run in (1, 3, 5):
        write(tmp_path, Feed(run), [10])
    assert continuable_runs(tmp_path) == [5]
    (tmp_path / "run0000002_20261122T071251Z_000.h5.journal").touch()
    (tmp_path / "run0000003_20261122T071251Z_001.h5.part").touch()
    assert continuable_runs(tmp_path) == [2, 3, 5]
    (tmp_path / "run0000007_20261122T071251Z_000.h5.part").touch()
    assert continuable_runs(tmp_path) == [2, 3, 7]


@pytest.fixture
def storage(tmp_path):
    with contextlib.closing(StorageService(tmp_path, "Offline storage", "")) as storage:
        yield storage


def test_blocks_of_a_closed_run_are_not_stored_twice(tmp_path, storage):
    old, new = Feed(41), Feed(42)
    file = RunFile(tmp_path, run_info(run=41))
    sent = [old.block(random_rows(np.random.default_rng(1), 10)) for _ in range(3)]
    for block in sent:
        file.add(*block)
    file.close()
    write(tmp_path, new, [10])
    for block, rows in sent:
        storage.receive("LArPix board", block, memoryview(rows.view(np.uint8)))
    assert storage.duplicates == 3
    assert len(run_files(tmp_path)) == 2
    assert [(place.run, place.next) for place in storage.positions()] == [(41, 3)]
    # Its other blocks are stored still.
    block, rows = old.block(random_rows(np.random.default_rng(1), 10))
    storage.receive("LArPix board", block, memoryview(rows.view(np.uint8)))
    storage.receive("LArPix board", old.end(), None)
    storage.close()
    assert list(positions(tmp_path, 41).values()) == [5]
    assert [path.name[-7:] for run, _, path in run_files(tmp_path) if run == 41] == ["_000.h5", "_001.h5"]


def test_a_closed_run_is_not_opened_at_the_start(tmp_path, storage, monkeypatch):
    opened = []

    def open_file(path, **options):
        opened.append(path.name[:10])
        return DataFile(path, **options)

    monkeypatch.setattr(module, "DataFile", open_file)
    for run in (1, 2, 3):
        write(tmp_path, Feed(run), [10])
    file = RunFile(tmp_path, run_info(run=2), 1)
    storage.resume()
    file.abandon()
    assert opened == ["run0000002", "run0000002", "run0000003"]


def test_unreadable_files_are_logged(tmp_path, storage, caplog):
    (tmp_path / "run0000001_20261122T071251Z_000.h5").write_text("no HDF5")
    with caplog.at_level(logging.WARNING, "larpixdaq"):
        storage._read_positions(1)
    (line,) = caplog.messages
    assert line.startswith(
        f"the content of this file is unknown: cannot open {tmp_path}/run0000001_20261122T071251Z_000.h5: "
    )
