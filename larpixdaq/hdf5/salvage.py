"""Recover files that no storage of ours has left: of writers that died, cut by a copy or a full disk, torn at the end.

Every row, or board message, that lies in the file and can be read goes into a new file of the same kind,
NAME.recovered.h5. The old file stays as it is. What was left out is named, by its place, in the report and in the
attribute `left_out` of the new file. A file of larpix-daq becomes one without /run and /ledger, because these speak of
rows that may not be there; its parts (….h5.part) are finished by recovery.py instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.errors import FileError, cause
from larpixdaq.hdf5 import layout
from larpixdaq.hdf5.chunk_reader import DAMAGED, ChunkReader, ForeignFile, RawMessages
from larpixdaq.hdf5.new_file import RowWriter, check_room, new_file
from larpixdaq.hdf5.raw_file import MessageWriter
from larpixdaq.hdf5.reader import check_dataset
from larpixdaq.version import VERSION

#: Ending of the name of a recovered file.
RECOVERED: Final = ".recovered.h5"
#: Maximum lines about what was left out; more are only counted.
_MOST_LINES: Final = 100
#: Maximum bytes of a table beside the rows.
_TABLE_BYTES: Final = 256 << 20


class SalvageReport(NamedTuple):
    """Result for one file. `new`: None if all of the file can be read. `unit`: rows or messages."""

    path: Path
    new: Path | None
    rows: int
    unit: str
    left_out: list[str]  # one line each

    @property
    def text(self) -> str:
        """Summary in one line."""
        if self.new is None:
            return f"{self.path.name}: is closed and all of its {self.rows} {self.unit} can be read, nothing to recover"
        more = f"; and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
        lost = f"; LEFT OUT: {self.left_out[0]}{more}" if self.left_out else ", nothing left out"
        return f"{self.new.name}: {self.rows} {self.unit} of {self.path.name}{lost}"


class _LeftOut:
    """Lines about what is left out."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = 0

    def add(self, line: str) -> None:
        if len(self._lines) < _MOST_LINES:
            self._lines.append(line)
        else:
            self._more += 1

    def lines(self) -> list[str]:
        return self._lines + ([f"and {self._more} more"] if self._more else [])


def recovered_path(path: Path, directory: Path | None = None) -> Path:
    """Return the path of the new file for a file, in its directory or in another one."""
    stem = path.name
    for ending in (".part", ".h5", ".hdf5"):
        stem = stem.removesuffix(ending)
    return (directory or path.parent) / f"{stem}{RECOVERED}"


def salvage(path: Path, directory: Path | None = None) -> SalvageReport:
    """Copy all that can be read of a file into a new file, in the same directory or in another one.

    Nothing is made of a closed file that can be read whole. FileError if nothing of the file can be read, if it is
    neither a packet file nor a raw file, if it is being written, or if the new file exists or cannot be written.
    """
    new = recovered_path(path, directory)
    with ForeignFile(path) as file:
        names = file.guard("/", lambda: set(file.hdf5))
        kind = next((name for name in ("msgs", "packets", "raw_packet") if name in names), None)
        if kind is None:
            raise FileError(f"{path}: HDF5 file with neither /msgs (raw) nor /packets")
        if not file.why and (rows := _whole_rows(file, kind)) is not None:
            return SalvageReport(path, None, rows, "messages" if kind == "msgs" else "rows", [])
        left_out = _LeftOut()
        with new_file(new) as part:
            copy = _copy_messages if kind == "msgs" else _copy_packets
            rows, unit = copy(file, kind, part, left_out)
            file.check_unchanged()
            if not rows:
                lines = left_out.lines()
                raise FileError(f"{path}: none of its {unit} can be read{': ' + lines[0] if lines else ''}")
    return SalvageReport(path, new, rows, unit, left_out.lines())


def _whole_rows(file: ForeignFile, kind: str) -> int | None:
    """Return the number of rows or messages of a file that can be read whole; None for any other."""
    problems: list[str] = []
    if kind == "msgs":
        messages = RawMessages(file)
        found = sum(len(spans) for _, spans, _ in messages.pieces(1, problems.append))
        return found if not problems and found == messages.messages == (messages.headers or found) else None
    table = ChunkReader(file, kind)
    for _, _, rows in table.pieces():
        if isinstance(rows, str):
            return None
    _tables(file, left_out := _LeftOut())
    return None if left_out.lines() else table.announced


def _describe(file: ForeignFile, new: h5py.File, group: str, left_out: _LeftOut) -> None:
    """Note in the new file what it was made from."""
    lines = left_out.lines()
    attributes = new.require_group(group).attrs
    why = f", which {file.why}" if file.why else ""
    attributes["made_from"] = f"{file.path.name} ({file.size} bytes{why}), by larpixdaq recover {VERSION}"
    attributes["left_out"] = lines or ["nothing"]


def _copy_attributes(file: ForeignFile, name: str, target: Any, left_out: _LeftOut) -> None:
    """Copy the attributes of an object, each as far as it can be read."""
    try:
        if name not in file.hdf5:
            return
        given = file.hdf5[name].attrs
        for key in given:
            try:
                target.attrs[key] = given[key]
            except DAMAGED as error:
                left_out.add(f"attribute {key!s:.60} of /{name} cannot be read: {cause(error)}")
    except DAMAGED as error:
        left_out.add(f"attributes of /{name} cannot be read: {cause(error)}")


def _tables(file: ForeignFile, left_out: _LeftOut) -> dict[str, NDArray[Any]]:
    """Read the tables beside the rows, as far as they can be read."""
    found: dict[str, NDArray[Any]] = {}
    for name in ("messages", "configs"):
        try:
            if name not in file.hdf5:
                continue
            dataset = file.hdf5[name]
            check_dataset(file.path, name, dataset)
            if dataset.shape[0] * dataset.dtype.itemsize > _TABLE_BYTES:
                raise ValueError(f"it has {dataset.shape[0]} rows")
            found[name] = dataset[:]
        except DAMAGED as error:
            left_out.add(f"/{name} cannot be read: {cause(error)}")
    return found


def _copy_packets(file: ForeignFile, kind: str, part: Path, left_out: _LeftOut) -> tuple[int, str]:
    table = ChunkReader(file, kind)
    with h5py.File(part, "w", libver=layout.LIBVER, locking=False) as new:
        for name in ("_header", "meta"):
            _copy_attributes(file, name, new.create_group(name), left_out)
        rows = RowWriter(new, kind, table.dtype)
        zeros = 0  # rows of zeros since the last other row
        for first, stop, found in table.pieces():
            if isinstance(found, str):
                left_out.add(f"rows {first} to {stop} {found}")
                continue
            used = np.flatnonzero(found.view(np.uint8).reshape(len(found), -1).any(axis=1))
            if len(used):
                if zeros:
                    rows.add(np.zeros(zeros, table.dtype))
                rows.add(found[: used[-1] + 1])
                zeros = len(found) - int(used[-1]) - 1
            else:
                zeros += len(found)
            if zeros > schema.CHUNK_ROWS * 64:
                left_out.add(f"{zeros} rows up to row {stop} have only zeros")
                zeros = 0
        if zeros:
            left_out.add(f"the last {zeros} rows have only zeros")
        _copy_attributes(file, kind, rows.finish(), left_out)
        for name, given in _tables(file, left_out).items():
            _copy_attributes(file, name, new.create_dataset(name, data=given, maxshape=(None,), chunks=(64,)), left_out)
        _describe(file, new, "_header", left_out)
    return rows.rows, "rows"


def _copy_messages(file: ForeignFile, kind: str, part: Path, left_out: _LeftOut) -> tuple[int, str]:
    messages = RawMessages(file)
    part.unlink()  # the writer makes its file itself
    writer = MessageWriter(part)
    try:
        for data, spans, groups in messages.pieces(1, left_out.add):
            check_room(part.parent)
            writer.add(data, spans, groups)
        if messages.headers is not None and messages.headers < messages.messages:
            left_out.add(f"/msg_headers ends before message {messages.headers} of {messages.messages}")
        meta = writer.file.create_group("meta")
        _copy_attributes(file, "meta", meta, left_out)
        _describe(file, writer.file, "meta", left_out)
    finally:
        writer.close()
    return writer.messages, "messages"
