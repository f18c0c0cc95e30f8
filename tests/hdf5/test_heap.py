"""Damaged global heaps are found before the HDF5 library reads them, because it would loop for ever."""

import re
import struct
import subprocess
import sys

import h5py
import numpy as np
import pytest
from byte_flipper import Flipper
from file_builder import V2, Feed, write

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import repair
from larpixdaq.hdf5.recordings import open_recording
from larpixdaq.hdf5.verify import verify


def collection(*objects, length=4096):
    """A collection of objects (number, length, data), which its free space fills up."""
    data = b"".join(struct.pack("<HHIQ", number, 1, 0, size) + text for number, size, text in objects)
    left = length - 16 - len(data)
    free = struct.pack("<HHIQ", 0, 0, 0, left).ljust(left, b"\0") if left >= 16 else bytes(left)
    return b"GCOL\x01\0\0\0" + struct.pack("<Q", length) + data + free


ONE = (1, 3, b"2.4\0\0\0\0\0")


@pytest.mark.parametrize(
    "good",
    [
        b"",
        b"GCOL\x01",
        bytes(70_000) + b"GCOL",
        collection(),
        collection(ONE, (2, 0, b""), (7, 8, b"abcdefgh")),
        collection((1, 4064, bytes(4064))),
        collection((1, 4057, bytes(4064))),
        collection((1, 4056, bytes(4056))),
        collection(ONE, (2, 100_000, bytes(100_000)), length=1 << 17),
        collection(ONE) + collection(ONE, ONE),
        collection()[:4095],
        b"GCOL\x01\0\0\0" + struct.pack("<Q", 64) + bytes(5000),
    ],
)
def test_heaps_that_the_library_reads_or_refuses_pass(tmp_path, good):
    for before in (0, 13, 2048):
        (tmp_path / "file").write_bytes(bytes(before) + good)
        repair.check_heaps(tmp_path / "file")


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (collection(ONE, (0, 0, b"")), "object 0 takes 0 bytes, expected 16 to 4056"),
        (collection(ONE, (0, 8, b"")), "object 0 takes 8 bytes, expected 16 to 4056"),
        (collection(ONE, (0, 5000, b"")), "object 0 takes 5000 bytes, expected 16 to 4056"),
        (collection(ONE, (2, 4041, b"")), "object 2 takes 4064 bytes, expected 16 to 4056"),
        (collection((1, (1 << 64) - 16, b"")), f"object 1 takes {1 << 64} bytes, expected 16 to 4080"),
        (collection((1, 0x103, ONE[2])), "object 0 takes 0 bytes"),
        (collection(ONE) + collection((0, 0, b"")), "object 0 takes 0 bytes"),
    ],
)
def test_heaps_that_would_hang_the_library_are_errors(tmp_path, bad, line):
    (tmp_path / "file").write_bytes(bytes(2048) + bad)
    with pytest.raises(FileError, match=rf"file: global heap at byte .*{re.escape(line)}"):
        repair.check_heaps(tmp_path / "file")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*: No such file or directory"):
        repair.check_heaps(tmp_path / "file")


def damage(path):
    """Make the free space of the global heap 0 bytes long."""
    whole = bytearray(path.read_bytes())
    at = whole.index(b"GCOL") + 16
    while whole[at]:
        at += 16 + (whole[at + 8] + 7) // 8 * 8
    whole[at + 8 : at + 16] = bytes(8)
    path.write_bytes(whole)


def test_every_reader_checks_the_heaps_first(tmp_path):
    report, _ = write(tmp_path, Feed(), [10])
    damage(report.path)
    (line,) = verify(report.path).findings
    assert re.fullmatch(rf"{report.path}: global heap at byte 2048: damaged: object 0 takes 0 bytes, .*", line)
    with pytest.raises(FileError, match="global heap at byte 2048: damaged"):
        open_recording(report.path)


def test_commands_report_a_damaged_heap_in_one_line(tmp_path):
    report, _ = write(tmp_path, Feed(), [10])
    damage(report.path)
    for command in ("verify", "info"):
        done = subprocess.run(
            [sys.executable, "-m", "larpixdaq", command, report.path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert "global heap at byte 2048: damaged: object 0 takes 0 bytes" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_rows_that_a_foreign_file_has_no_room_for(tmp_path):
    """Its dataset's shape has no checksum: 2^60 rows would be read as zeros for years."""
    for name, changes in (("chunked", {"chunks": (64,), "maxshape": (None,)}), ("contiguous", {})):
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            file.create_group("_header").attrs["version"] = "2.4"
            file.create_dataset("packets", data=np.zeros(50, V2.dtype), **changes)
        assert verify(path).findings == []
    with h5py.File(tmp_path / "chunked.h5", "r+") as file:
        file["packets"].resize((1 << 60,))
    (line,) = verify(tmp_path / "chunked.h5").findings
    assert line.endswith(f"/packets announces {1 << 60} rows, the file has room for 64")


def test_a_hung_process_fails_its_test_and_is_replaced(tmp_path):
    report, _ = write(tmp_path, Feed(), [10])
    with Flipper(report.path, limit=0.001) as flipper:
        with pytest.raises(AssertionError, match=r"byte 0 \^ 1: no verdict, status None: .* no line within 0.001 s"):
            flipper.flip(0, 1)
        flipper.limit = 20.0
        assert "cannot open" in flipper.flip(0, 1)["findings"][0]
