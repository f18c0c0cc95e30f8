"""Export rows for other programs: Parquet (by pyarrow, the extra `parquet`), CSV and numpy's .npy.

Columns keep the names and types of the file. A Parquet file has unit and meaning of each column in the metadata of its
field, and in its own metadata, under `larpixdaq`, what `larpixdaq info --json` says of the file with the rows. A CSV
file has a line of names. An .npy file is one array of the rows' dtype, which numpy can map (`np.load(mmap_mode="r")`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ConfigError, FileError
from larpixdaq.hdf5 import columns, run_report
from larpixdaq.hdf5.new_file import check_room, new_file
from larpixdaq.hdf5.reader import PIECE_ROWS
from larpixdaq.hdf5.row_reader import Selection
from larpixdaq.hdf5.run_reader import Run

#: Rows of a group of a Parquet file: programs read whole groups.
GROUP_ROWS: Final = 16 * PIECE_ROWS
#: Columns of times, which are stored byte by byte, as HDF5's shuffle does; other columns have few values, and are
#: stored by a dictionary.
_TIMES: Final = ("timestamp", "receipt_timestamp")
#: Rows that become text at once.
_TEXT_ROWS: Final = 4096
#: Room for the digits of the number of rows in the head of an .npy file.
_NPY_ROWS: Final = 10**19


class ExportReport(NamedTuple):
    path: Path
    rows: int
    bytes: int


def export(run: Run, path: Path, form: str, selection: Selection, names: Sequence[str] = ()) -> ExportReport:
    """Write the selected rows to a new file. `form`: one of FORMATS. `names`: only these columns.

    FileError for an unknown column, for a damaged file, and if the new file exists or cannot be written. ConfigError
    without pyarrow.
    """
    present, source = run.dtype.names or (), run.files[0]
    for name in names:
        if name not in present:
            raise FileError(f"{source}: /packets has no column {name}, only {', '.join(present)}")
    for name in names or present:
        if run.dtype[name].shape or run.dtype[name].kind not in "iufS":
            raise FileError(
                f"{source}: column {name} of /packets has values {run.dtype[name]}, expected numbers or texts"
            )
    dtype = np.dtype([(name, run.dtype[name].str) for name in names or present])  # without h5py's metadata
    write = FORMATS[form]
    pieces = run.selected(selection, names or None)
    with contextlib.closing(pieces), new_file(path) as part:
        rows = write(run, part, dtype, _with_room(path.parent, pieces))
    return ExportReport(path, rows, path.stat().st_size)


def _with_room(directory: Path, pieces: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for rows in pieces:
        check_room(directory)
        yield rows


def _write_parquet(run: Run, path: Path, dtype: np.dtype[Any], pieces: Iterable[NDArray[Any]]) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            'Parquet needs pyarrow, which is not installed: pip install "larpix-daq[parquet]"; CSV and npy need nothing'
        ) from None
    fields = [pa.field(name, _arrow_type(pa, dtype[name]), False, _meaning(name)) for name in dtype.names or ()]
    schema = pa.schema(fields, {"larpixdaq": json.dumps(_facts(run))})
    times = [name for name in dtype.names or () if name in _TIMES]
    options: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [name for name in dtype.names or () if name not in times],
        "column_encoding": dict.fromkeys(times, "BYTE_STREAM_SPLIT"),
        "write_statistics": times,
    }
    rows = 0
    try:
        with pq.ParquetWriter(path, schema, **options) as writer:
            waiting: list[Any] = []
            for piece in chain(pieces, [None]):
                if piece is not None and len(piece):
                    waiting.append(pa.RecordBatch.from_arrays(_arrow_arrays(pa, piece, fields), schema=schema))
                    rows += len(piece)
                if waiting and (piece is None or sum(map(len, waiting)) >= GROUP_ROWS):
                    writer.write_table(pa.Table.from_batches(waiting), row_group_size=GROUP_ROWS)
                    waiting = []
    except pa.ArrowException as error:
        raise FileError(f"cannot write {path}: {' '.join(str(error).split())[:300]}") from None
    return rows


def _facts(run: Run) -> dict[str, Any]:
    (path,) = run.files
    try:
        return run_report.file_info(path)
    except FileError:  # files of other programs may have no times
        return {"path": str(path), "version": run.version, "rows": run.rows}


def _arrow_type(pa: Any, dtype: np.dtype[Any]) -> Any:
    return pa.dictionary(pa.int32(), pa.string()) if dtype.kind == "S" else pa.from_numpy_dtype(dtype.newbyteorder("="))


def _arrow_arrays(pa: Any, rows: NDArray[Any], fields: Sequence[Any]) -> list[Any]:
    arrays = []
    for field in fields:
        values = rows[field.name]
        if values.dtype.kind == "S":
            texts, which = np.unique(values, return_inverse=True)
            names = [text.decode("utf-8", "replace") for text in texts.tolist()]
            arrays.append(
                pa.DictionaryArray.from_arrays(which.reshape(-1).astype(np.int32), pa.array(names, pa.string()))
            )
        else:
            arrays.append(pa.array(np.ascontiguousarray(values, values.dtype.newbyteorder("="))))
    return arrays


def _meaning(name: str) -> dict[str, str]:
    unit, meaning = columns.PACKETS.get(name, ("", ""))
    return {key: value for key, value in (("unit", unit), ("meaning", meaning)) if value}


def _write_csv(run: Run, path: Path, dtype: np.dtype[Any], pieces: Iterable[NDArray[Any]]) -> int:
    names = dtype.names or ()
    texts = [name for name in names if dtype[name].kind == "S"]
    line = ",".join(["%s"] * len(names)) + "\n"
    count = 0
    with open(path, "w", encoding="utf-8", newline="") as out:
        out.write(",".join(names) + "\n")
        for piece in pieces:
            count += len(piece)
            for first in range(0, len(piece), _TEXT_ROWS):
                rows = piece[first : first + _TEXT_ROWS]
                lists = [
                    [_csv_text(text) for text in rows[name].tolist()] if name in texts else rows[name].tolist()
                    for name in names
                ]
                out.write(line * len(rows) % tuple(chain.from_iterable(zip(*lists, strict=True))))
    return count


def _csv_text(text: bytes) -> str:
    decoded = text.decode("utf-8", "replace")
    if decoded.isprintable() and not set(decoded) & set('",'):
        return decoded
    return '"' + decoded.replace('"', '""') + '"'


def _write_npy(run: Run, path: Path, dtype: np.dtype[Any], pieces: Iterable[NDArray[Any]]) -> int:
    size = len(_npy_head(dtype, _NPY_ROWS, 0))
    count = 0
    with open(path, "wb") as out:
        out.write(bytes(size))
        for piece in pieces:
            rows = np.empty(len(piece), dtype)
            for name in dtype.names or ():
                rows[name] = piece[name]
            out.write(rows.view(np.uint8).data if len(rows) else b"")
            count += len(rows)
        out.seek(0)
        out.write(_npy_head(dtype, count, size))
    return count


def _npy_head(dtype: np.dtype[Any], rows: int, size: int) -> bytes:
    """Return the head of an .npy file (format 1.0), `size` bytes, or as many as it needs, a multiple of 64."""
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    text = repr(described).encode("ascii")
    size = size or -(-(len(text) + 11) // 64) * 64
    return b"\x93NUMPY\x01\x00" + (size - 10).to_bytes(2, "little") + text.ljust(size - 11) + b"\n"


#: Formats, which are also the endings of the files, with the functions that write them.
FORMATS: Final[dict[str, Callable[[Run, Path, np.dtype[Any], Iterable[NDArray[Any]]], int]]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "npy": _write_npy,
}
