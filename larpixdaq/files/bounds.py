"""Bounds of an HDF5 file: its data lie in the file itself, and no dataset announces more than the file has room for.

A damaged or foreign file may announce 2^45 rows, which HDF5 reads as zeros for days, or name another file, which HDF5
opens, be it a pipe that nobody writes to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import h5py

from larpixdaq.errors import FileError

#: Maximum bytes of one chunk: reading a single row inflates all of it.
_CHUNK_BYTES: Final = 256 << 20
_UNWRITTEN_BYTES: Final = 4096
_INSIDE: Final = (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT)


def check_links(path: Path, file: h5py.File) -> None:
    """FileError when a link of the file names another file. No link is followed."""

    def outside(name: bytes, link: Any) -> bytes | None:
        return None if link.type in _INSIDE else name

    found = file.id.links.visit(outside, info=True)
    if found is not None:
        name = found.decode("utf-8", "replace")
        raise FileError(f"{path}: /{name} is a link to another file, expected all data in this one")


def check_dataset(path: Path, name: str, dataset: Any) -> None:
    """FileError when it is no table (one dimension), or its rows are not all in this file."""
    where = f"{path}: /{name}"
    if not isinstance(dataset, h5py.Dataset):
        raise FileError(f"{where} is a group, expected a table")
    if dataset.shape is None or len(dataset.shape) != 1:
        raise FileError(f"{where} has the shape {dataset.shape}, expected a table")
    if dataset.is_virtual or dataset.external:
        raise FileError(f"{where} has its rows in another file, expected all data in this one")
    size = dataset.dtype.itemsize
    if dataset.chunks is not None and dataset.chunks[0] * size > _CHUNK_BYTES:
        raise FileError(
            f"{where} has chunks of {dataset.chunks[0]} rows of {size} bytes, at most {_CHUNK_BYTES} bytes are read"
        )
    if (rows := dataset.shape[0]) > (held := room(dataset)):
        raise FileError(f"{where} announces {rows} rows, the file has room for {held}")


def room(dataset: Any) -> int:
    """Rows that a dataset has space for in the file."""
    if dataset.chunks is None:
        # A table of fixed length gets its space when it is first written. Until then a few rows read as zeros.
        return max(int(dataset.id.get_storage_size()), _UNWRITTEN_BYTES) // int(dataset.dtype.itemsize)
    return int(dataset.id.get_num_chunks() * dataset.chunks[0])
