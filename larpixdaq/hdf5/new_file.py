"""Files that tools make of other files: complete or not there, never over another file, never on a disk's last room.

A tool writes to a hidden name beside the final one, and the file gets its name when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.hdf5_chunks import Packer
from larpixdaq.constants import MIN_FREE
from larpixdaq.errors import FileError, cause
from larpixdaq.hdf5.writer import publish_file
from larpixdaq.runtime.file_access import open_regular

#: Bytes that stay free on the disk: these files can be made again, the data that a storage writes cannot.
KEEP_FREE: Final = 4 * MIN_FREE


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the name of an empty file beside `path` to write to. At the end it gets the name `path`, or it is removed.

    FileError if there is a file of this name, and for errors of the disk and of h5py.
    """
    check_new(path)
    check_room(path.parent)
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        os.close(open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"cannot make {path}: {error.strerror}") from None
    try:
        yield part
        publish_file(part, path)
    except FileError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # h5py raises all three when a disk fails
        raise FileError(f"cannot write {path}: {cause(error)}") from None
    finally:
        part.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """FileError if there is a file of this name, or no directory for it."""
    if os.path.lexists(path):
        raise FileError(f"{path}: {os.strerror(errno.EEXIST)}; no file is overwritten")
    if not path.parent.is_dir():
        raise FileError(f"cannot make {path}: there is no directory {path.parent}")


def check_room(directory: Path) -> None:
    """FileError if the disk has less than KEEP_FREE left."""
    try:
        found = os.statvfs(directory)
    except OSError as error:
        raise FileError(f"cannot write to {directory}: {error.strerror}") from None
    if (free := found.f_bavail * found.f_frsize) < KEEP_FREE:
        raise FileError(f"{directory} has {free >> 20} MiB left, files made of others leave {KEEP_FREE >> 20} MiB")


class RowWriter:
    """Appends rows to a new dataset of a file, in shuffled and deflated chunks."""

    def __init__(self, file: h5py.File, name: str, dtype: np.dtype[Any]) -> None:
        self._dataset = file.create_dataset(
            name,
            shape=(0,),
            maxshape=(None,),
            dtype=dtype,
            chunks=(schema.CHUNK_ROWS,),
            shuffle=True,
            compression="gzip",
            compression_opts=1,
        )
        self._directory = Path(file.filename).parent
        self._packer = Packer(schema.CHUNK_ROWS, dtype.itemsize)
        self._waiting: list[NDArray[Any]] = []
        self._waiting_rows = 0
        self._chunks = 0  # that are in the file
        self.rows = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Append rows, shape (N,), of the dataset's dtype."""
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        self.rows += len(rows)
        if self._waiting_rows >= 4 * schema.CHUNK_ROWS:
            self._write(self._waiting_rows // schema.CHUNK_ROWS * schema.CHUNK_ROWS)

    def finish(self) -> Any:
        """Write all rows. Returns the dataset."""
        self._write(self._waiting_rows)
        return self._dataset

    def _write(self, count: int) -> None:
        check_room(self._directory)
        rows = np.concatenate([np.zeros(0, self._dataset.dtype), *self._waiting])
        self._waiting, self._waiting_rows = [rows[count:].copy()], len(rows) - count
        padded = np.zeros(-(-count // schema.CHUNK_ROWS) * schema.CHUNK_ROWS, rows.dtype)
        padded[:count] = rows[:count]
        self._dataset.resize((self._chunks * schema.CHUNK_ROWS + count,))
        for chunk in padded.reshape(-1, schema.CHUNK_ROWS):
            packed = self._packer.pack(chunk.view(np.uint8).reshape(-1))
            self._dataset.id.write_direct_chunk((self._chunks * schema.CHUNK_ROWS,), packed)
            self._chunks += 1
