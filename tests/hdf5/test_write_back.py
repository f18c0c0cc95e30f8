"""Requests to the kernel to write new bytes of a growing file and to drop old ones; the writer never waits."""

import os
import threading

import pytest

from larpixdaq.hdf5.chunk_writer import KEPT, WINDOW, WriteBack


class Kernel:
    """Takes the requests, (first, last) of each; blocks while `goes` is clear."""

    def __init__(self, monkeypatch):
        self.advices = []
        self.goes = threading.Event()
        self.goes.set()
        monkeypatch.setattr(os, "posix_fadvise", self.advise)

    def advise(self, file, first, length, advice):
        assert (os.fstat(file).st_size, advice) == (1, os.POSIX_FADV_DONTNEED)
        assert self.goes.wait(20)
        self.advices.append((first, first + length))


@pytest.fixture
def kernel(monkeypatch):
    return Kernel(monkeypatch)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "growing"
    path.write_bytes(b"0")
    return path


def await_request(growing):
    growing._thread.join(20)
    assert not growing._thread.is_alive()


def test_every_byte_is_written_and_dropped_once(kernel, file):
    growing = WriteBack(file)
    steps = 2 * KEPT // WINDOW
    for step in range(1, steps + 1):
        growing.advance(step * WINDOW)
        await_request(growing)
    windows = [(n * WINDOW, (n + 1) * WINDOW) for n in range(steps)]
    expected = []
    for n, window in enumerate(windows):
        expected.append(window)
        if (n + 1) * WINDOW > KEPT:
            expected.append(windows[n - KEPT // WINDOW])
    assert kernel.advices == expected


def test_a_blocked_disk_does_not_block_the_writer(kernel, file):
    growing = WriteBack(file)
    kernel.goes.clear()
    for step in range(1, 6):
        growing.advance(step * WINDOW)
    kernel.goes.set()
    await_request(growing)
    growing.advance(6 * WINDOW)
    await_request(growing)
    assert kernel.advices == [(0, WINDOW), (WINDOW, 6 * WINDOW)]


def test_a_removed_file_is_no_error(kernel, tmp_path):
    growing = WriteBack(tmp_path / "gone")
    growing.advance(WINDOW)
    await_request(growing)
    assert kernel.advices == []
