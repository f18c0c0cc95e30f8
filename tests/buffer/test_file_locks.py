"""Directories whose file system has no locks: locks in another directory, or an error that names the option."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from disk import Disk
from processes import LIMIT, Process, until
from system import System, system

from larpixdaq._native.ring_buffer import SMALLEST
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.control.catalogue import Catalogue
from larpixdaq.errors import FileError, FileLocked, RingError
from larpixdaq.hdf5.journal import Journal
from larpixdaq.readout import delivery
from larpixdaq.runtime.file_access import lock_directory
from larpixdaq.storage.directory_lock import Lock, is_locked

ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as made:
        yield made


@pytest.fixture
def unlockable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, int], None]]:
    """Lets flock() fail with an error number for the files in a directory."""
    real = fcntl.flock
    refused: dict[Path, int] = {}

    def flock(file: int, operation: int) -> None:
        number = refused.get(Path(os.readlink(f"/proc/self/fd/{file}")).parent)
        if number is not None:
            raise OSError(number, os.strerror(number))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    lock_directory.use(None)
    yield refused.__setitem__
    lock_directory.use(None)


def test_a_storage_takes_a_run_in_a_directory_without_locks(line: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one storage writes, and recover leaves its part alone; a second storage continues when the first is dead."""
    home = line.folder / "home"
    with closing(Disk(line.folder, line.data)) as faulty:
        faulty.without_locks(524)
        monkeypatch.setenv("XDG_STATE_HOME", str(home))
        line.env["offline_storage"] = faulty.env
        operator = line.start("--fake", "2000")
        first = line.processes["offline_storage"]
        assert f"{line.data}: its file system cannot lock files" in first.stderr
        assert "--lock-dir names another place" in first.stderr
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        until(lambda: line.status_of(operator, "storage").get("rows", 0) > 1000, "rows in the storage")
        second = line.launch_storage()
        until(lambda: "is locked" in second.stderr, "the second storage to wait")
        recover = ("recover", line.data, "--state-dir", home / "larpixdaq")
        with Process("larpixdaq.cli", *recover, directory=line.folder / "said", env=faulty.env) as process:
            assert process.wait() == 0, process.stderr
            assert "is locked: another process writes or recovers this part" in process.stdout
        first.kill()
        until(lambda: list(line.data.glob("*_001.h5.part")), "the second part")
        ended = operator.end_run().result(2 * LIMIT)
        assert ended["condition"] == "COMPLETE", ended
        assert ended["rows"] == ended["stored"]
        assert second.stop() == 0
    assert [path.name for path in (home / "larpixdaq").iterdir()] == ["connections"]


@pytest.mark.parametrize("number", ERRORS)
def test_without_file_locks_the_state_directory_has_the_locks(
    tmp_path: Path, unlockable: Callable[[Path, int], None], number: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    state = tmp_path / "home" / "larpixdaq"
    unlockable(tmp_path, number)
    first, second = Lock(tmp_path, ""), Lock(tmp_path, "")
    assert first.take() is None
    assert second.take() == first.path
    assert Lock(tmp_path, "copy").take() is None
    journal = Journal(tmp_path / "run0000001_20261122T071251Z_000.h5.journal")
    with pytest.raises(FileLocked):
        Journal(journal.path, recovery=True)
    assert is_locked(journal.path)
    journal.close()
    assert not is_locked(journal.path)
    first.release()
    assert second.take() is None
    second.release()
    assert len([one for one in caplog.records if "--lock-dir names another place" in one.message]) == 1
    assert len(list(state.iterdir())) == 1  # that of the copy, which is still locked


def test_the_option_names_the_lock_directory(tmp_path: Path, unlockable: Callable[[Path, int], None]) -> None:
    """The files themselves are locked too, where that is possible, which excludes processes without the option."""
    (tmp_path / "data").mkdir()
    (tmp_path / "locks").mkdir()
    named = Lock(tmp_path / "data", "")
    lock_directory.use(tmp_path / "locks")
    assert named.take() is None
    lock_directory.use(None)
    assert Lock(tmp_path / "data", "").take() == named.path
    lock_directory.use(tmp_path / "locks")
    unlockable(tmp_path / "data", errno.EOPNOTSUPP)
    assert Lock(tmp_path / "data", "").take() == named.path
    named.release()
    assert list((tmp_path / "locks").iterdir()) == []
    with pytest.raises(FileError, match=r"--lock-dir .*: not a directory that can be written to"):
        lock_directory.use(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [0, errno.EOPNOTSUPP])
def test_a_removed_lock_is_made_anew(
    tmp_path: Path, unlockable: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("larpixdaq.storage.directory_lock._INTERVAL", 0.0)
    if number:
        unlockable(tmp_path, number)
    first, second = Lock(tmp_path, ""), Lock(tmp_path, "")
    assert first.take() is None
    first.path.unlink()
    first.keep()
    assert second.take() == first.path
    first.keep()
    first.release()
    assert second.take() is None
    second.path.unlink()
    assert first.take() is (first.path if number else None)
    second.keep()  # logs that another storage has it
    second.release()
    first.release()


def test_without_any_locks_the_error_names_the_option(tmp_path: Path, unlockable: Callable[[Path, int], None]) -> None:
    unlockable(tmp_path, errno.ENOLCK)
    unlockable(tmp_path / "home" / "larpixdaq", errno.ENOLCK)
    path = tmp_path / "run0000001_20261122T071251Z_000.h5.journal"
    for take in (Lock(tmp_path, "").take, lambda: Journal(path)):
        with pytest.raises(FileError, match=r"cannot lock .* \(No locks available\), nor .* with --lock-dir$"):
            take()
    assert not path.exists()


@pytest.mark.parametrize("number", ERRORS)
def test_core_ring_and_spool_name_the_option_of_their_directory(
    tmp_path: Path, unlockable: Callable[[Path, int], None], number: int
) -> None:
    unlockable(tmp_path, number)
    words = "cannot lock files .*: name a directory on a local disk with "
    with pytest.raises(FileError, match=words + "--state-dir"):
        Catalogue(tmp_path)
    with pytest.raises(RingError, match=words + "--ring-dir"):
        RingFile.make(tmp_path, tmp_path, "p", 1, SMALLEST)
    with pytest.raises(FileError, match=words + "--spool-dir"):
        delivery._check_spool_directory(tmp_path)
    assert list(tmp_path.glob("*.ring")) == []
