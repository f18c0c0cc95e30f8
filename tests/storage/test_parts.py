"""Parts of a run as files: their positions, the close, and what durable means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import chunk_writer, names
from larpixdaq.hdf5.journal import Journal
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.verify import verify
from larpixdaq.hdf5.writer import RunFile


def rows(n: int) -> Any:
    return random_rows(np.random.default_rng(n), n)


def test_the_next_part_continues_at_the_positions(tmp_path: Path) -> None:
    feed, ended, strange = Feed(), Feed(producer="second"), Feed(run=43)
    first = RunFile(tmp_path, run_info(), 0, {strange.origin: 5})
    assert first.positions() == {}
    first.add(*feed.block(rows(10)))
    first.add(*ended.block(rows(20)))
    first.end(ended.end())
    assert first.positions() == {feed.origin: 1, ended.origin: 2}
    second = RunFile(tmp_path, run_info(required_producers=("LArPix board", "second")), 1, first.positions())
    assert second.positions() == first.positions()
    assert first.seal(continued=True).condition == "CONTINUED"
    first.publish()
    second.add(*feed.block(rows(30)))
    second.end(feed.end())
    assert second.positions() == {feed.origin: 3, ended.origin: 2}
    report = second.close()
    assert report.condition == "COMPLETE"
    assert [file_info(path)["missing_blocks"] for path in sorted(tmp_path.iterdir())] == [0, 0]


def test_a_sealed_part_is_whole_and_locked_until_it_is_published(tmp_path: Path) -> None:
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(rows(10)))
    file.end(feed.end())
    report = file.seal()
    assert {path.suffix for path in tmp_path.iterdir()} == {".part", ".journal"}
    (journal,) = tmp_path.glob("*.journal")
    assert journal.stat().st_size == 0
    with pytest.raises(FileError, match="is closed"):
        file.add(*feed.block(rows(10)))
    final = file.publish()
    assert list(tmp_path.iterdir()) == [final]
    assert report.bytes == final.stat().st_size
    assert verify(final).ok


def test_an_abandoned_file_is_never_written_again(tmp_path: Path) -> None:
    """HDF5 must not write its cache into a file that another process may have recovered meanwhile."""
    feed = Feed()
    file = RunFile(tmp_path, run_info())
    file.add(*feed.block(rows(10)))
    file._file["run/info"][0] = np.zeros(1, file._file["run/info"].dtype)[0]  # in the cache, not flushed
    before = file.path.read_bytes()
    times = os.stat(file.path).st_mtime_ns
    file.abandon()
    assert file.path.read_bytes() == before
    assert os.stat(file.path).st_mtime_ns == times
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_is_open(fd)]
    assert not [name for name in open_files if "memfd:larpixdaq" in name or str(tmp_path) in name]


def fd_is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_with_fsync_the_disk_has_a_block_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is synced before the acknowledgement, and the file before the journal is emptied."""
    done: list[str] = []

    def name_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}").rpartition(".")[2]

    def spy(module: Any, name: str, describe: Any) -> None:
        real = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            done.append(describe(*args))
            return real(*args, **more)

        monkeypatch.setattr(module, name, call)

    spy(os, "fsync", lambda fd: f"sync {name_of(fd)}")
    spy(os, "fdatasync", lambda fd: f"sync {name_of(fd)}")
    spy(Journal, "append", lambda *args: "append")
    spy(Journal, "clear", lambda *args: "clear")
    spy(RunFile, "_acknowledge", lambda *args: "durable")
    feed = Feed()
    file = RunFile(tmp_path, run_info(), fsync=True)
    assert done == ["sync part", f"sync {tmp_path}"]
    done.clear()
    file.add(*feed.block(rows(10)))
    file.work(pressed=True)
    assert done == ["append", "sync journal", "durable"]
    done.clear()
    for _ in range(chunk_writer.MOST):
        file.add(*feed.block(rows(16384)))
    assert done == ["sync part", "sync part", "clear", "durable"]
    file.end(feed.end())
    assert file.close().condition == "COMPLETE"


def test_parts_of_other_storages_are_not_listed(tmp_path: Path) -> None:
    for name in ("run0000002_20261122T071251Z_000.h5", "run0000001_20261122T071251Z_001.h5.part",
                 "run0000001_20261122T071251Z_001.h5.journal", "run0000001_20261122T071251Z_copy_000.h5",
                 "run0000001_20261122T071251Z_000.h5", "run0000001_20261122T071251Z_000.json"):  # fmt: skip
        (tmp_path / name).touch()
    assert [entry[:3] for entry in names.files_of_storage(tmp_path)] == [
        (1, 0, ".h5"), (1, 1, ".h5.journal"), (1, 1, ".h5.part"), (2, 0, ".h5")
    ]  # fmt: skip
    assert [entry[:3] for entry in names.files_of_storage(tmp_path, "copy", 1)] == [(1, 0, ".h5")]
