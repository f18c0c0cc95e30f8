"""Recorded HDF5 files of either kind, told by what is in them."""

from __future__ import annotations

from pathlib import Path

import h5py

from larpixdaq.errors import FileError, cause
from larpixdaq.files import bounds, heap, layout, names, superblock
from larpixdaq.files.packets import PacketFile
from larpixdaq.files.raw import RawFile
from larpixdaq.files.reader import LeftPart, may_be_written


def open_recording(path: Path) -> RawFile | PacketFile | None:
    """None when it is not HDF5; FileError in one line when it is, but damaged or of no known kind."""
    if path.exists() and not path.is_file() and not path.is_dir():  # HDF5 would wait for a pipe's other end
        raise FileError(f"{path}: is not a file")
    try:
        if not h5py.is_hdf5(path):
            return None
        heap.check(path)
        # One whose writer lives, or died, as readers of growing files do.
        growing = superblock.is_growing(path)
        if growing and path.name.endswith(names.PART) and not may_be_written(path):
            first = superblock.read(path)
            assert first is not None
            file = h5py.File(LeftPart(path, first), "r")  # as DataFile does it, and for its reason
        else:
            file = layout.open_file(path, "r", swmr=growing)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: HDF5 file that cannot be opened: {cause(error)}") from None
    try:
        bounds.check_links(path, file)
        for name in {"msgs", "msg_headers", "packets", "raw_packet", "messages"} & set(file):
            bounds.check_dataset(path, name, file[name])
        if "msgs" in file:
            return RawFile(path, file)
        if "packets" in file or "raw_packet" in file:
            return PacketFile(path, file)
        raise FileError(f"{path}: HDF5 file with neither /msgs (raw) nor /packets")
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        file.close()
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: damaged HDF5 file: {cause(error)}") from None
