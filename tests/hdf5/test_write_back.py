"""Advice to the kernel about a growing file: write what came, forget what is far behind; and nobody waits for it."""

import os
import threading

import pytest

from larpixdaq.hdf5.chunk_writer import KEPT, WINDOW, WriteBack


class Kernel:
    """Takes the advice, (first, last) of each; stands still while it is told to."""

    def __init__(self, monkeypatch):
        self.told = []
        self.goes = threading.Event()
        self.goes.set()
        monkeypatch.setattr(os, "posix_fadvise", self.advise)

    def advise(self, file, first, length, advice):
        assert (os.fstat(file).st_size, advice) == (1, os.POSIX_FADV_DONTNEED)
        assert self.goes.wait(20)
        self.told.append((first, first + length))


@pytest.fixture
def kernel(monkeypatch):
    return Kernel(monkeypatch)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "growing"
    path.write_bytes(b"0")
    return path


def told(growing):
    growing._thread.join(20)
    assert not growing._thread.is_alive()


def test_all_is_written_once_and_forgotten_once(kernel, file):
    growing = WriteBack(file)
    steps = 2 * KEPT // WINDOW
    for step in range(1, steps + 1):
        growing.advance(step * WINDOW)
        told(growing)
    windows = [(n * WINDOW, (n + 1) * WINDOW) for n in range(steps)]
    expected = []
    for n, window in enumerate(windows):
        expected.append(window)
        if (n + 1) * WINDOW > KEPT:
            expected.append(windows[n - KEPT // WINDOW])
    assert kernel.told == expected


def test_a_disk_that_stands_still_holds_up_nobody(kernel, file):
    growing = WriteBack(file)
    kernel.goes.clear()
    for step in range(1, 6):
        growing.advance(step * WINDOW)
    kernel.goes.set()
    told(growing)
    growing.advance(6 * WINDOW)
    told(growing)
    assert kernel.told == [(0, WINDOW), (WINDOW, 6 * WINDOW)]


def test_a_file_that_is_gone_is_no_error(kernel, tmp_path):
    growing = WriteBack(tmp_path / "gone")
    growing.advance(WINDOW)
    told(growing)
    assert kernel.told == []
