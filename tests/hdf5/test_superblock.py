"""Repair of the superblock of a file whose writer died; nothing else is changed."""

import os
import re

import h5py
import numpy as np
import pytest
from file_builder import Feed, random_rows, run_info

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import repair
from larpixdaq.hdf5.chunk_writer import LEAST, MOST
from larpixdaq.hdf5.writer import RunFile


def test_lookup3_of_its_authors_examples():
    assert repair.lookup3(b"") == 0xDEADBEEF
    assert repair.lookup3(b"Four score and seven years ago") == 0x17770551


def test_lookup3_of_what_hdf5_writes(tmp_path):
    """The checksum follows each object header of version 2; here those of groups, of several lengths."""
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        for length in range(1, 60):
            file.create_group(str(length), track_order=length % 2 == 0).attrs["a"] = np.bytes_("x" * length)
    data = (tmp_path / "a.h5").read_bytes()
    checked = set()
    for found in re.finditer(rb"OHDR\x02(.)", data, re.S):
        flags = found[1][0]
        at = found.end() + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        end = at + width + int.from_bytes(data[at : at + width], "little")
        assert repair.lookup3(data[found.start() : end]) == int.from_bytes(data[end : end + 4], "little")
        checked.add(end - found.start())
    assert len(checked) > 2


@pytest.fixture
def left(tmp_path):
    """Make the part of a killed writer, which is longer than its superblock says."""
    file = RunFile(tmp_path, run_info())
    feed = Feed()
    for _ in range(MOST + 1):
        file.add(*feed.block(random_rows(np.random.default_rng(1), 16_384)))
    copy = tmp_path / "left.h5"
    copy.write_bytes(file.path.read_bytes())
    file.abandon()
    return copy


def test_a_repaired_file_opens_without_swmr(left):
    before = left.read_bytes()
    assert repair.read_superblock(left).flags == repair.WRITING | repair.SWMR
    with pytest.raises(OSError, match="already open for write"):
        h5py.File(left)
    repair.repair_superblock(left)
    found = repair.read_superblock(left)
    assert (found.flags, found.end) == (0, left.stat().st_size)
    assert left.read_bytes()[repair.SIZE :] == before[repair.SIZE :]
    with h5py.File(left) as file:
        assert file["packets"].shape[0] >= LEAST * 16_384
    repaired = left.read_bytes()
    repair.repair_superblock(left)
    assert left.read_bytes() == repaired


def test_every_flipped_byte_of_a_superblock_is_found(left):
    whole = left.read_bytes()
    for place in range(repair.SIZE):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        left.write_bytes(changed)
        with pytest.raises(FileError) as caught:
            repair.repair_superblock(left)
        assert "\n" not in str(caught.value)
        assert str(left) in str(caught.value)
        assert left.read_bytes() == changed


def sealed(**fields):
    """Make a superblock with a correct checksum."""
    good = repair.Superblock(repair.SIGNATURE, 3, 8, 8, 5, 0, (1 << 64) - 1, 4096, 48, 0)
    data = repair._FIELDS.pack(*good._replace(**fields))[:-4]
    return data + repair.lookup3(data).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"version": 1}, "expected version 2 or 3 with offsets and lengths of 8 bytes, found version 1"),
        ({"offset_bytes": 4}, "found version 3 with 4 and 8"),
        ({"base": 512}, "expected base address 0, found 512"),
        ({"root": 4096}, "its root group is at 4096, the file has 4096 bytes"),
        ({"extension": 40}, "its extension is at 40"),
    ],
)
def test_unknown_superblocks_are_not_changed(tmp_path, fields, line):
    path = tmp_path / "a.h5"
    path.write_bytes(sealed(**fields).ljust(4096, b"\0"))
    before = os.stat(path).st_mtime_ns
    with pytest.raises(FileError, match=line):
        repair.repair_superblock(path)
    assert os.stat(path).st_mtime_ns == before


def test_no_hdf5_file(tmp_path):
    for content in (b"", b"text", repair.SIGNATURE):
        (tmp_path / "a").write_bytes(content)
        assert repair.read_superblock(tmp_path / "a") is None
        with pytest.raises(FileError, match="it is not an HDF5 file"):
            repair.repair_superblock(tmp_path / "a")
    with pytest.raises(FileError, match=r"cannot read .*: No such file"):
        repair.read_superblock(tmp_path / "b")
