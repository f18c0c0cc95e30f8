"""Layout of a file: its datasets, their dtypes, and the creation of an empty file.

All datasets exist before SWMR begins, so that the file can be read while it grows; later only their rows change. Texts
in datasets have fixed lengths, because SWMR forbids others. The attributes `version`, `packet_types` and `asic_version`
are variable-length strings, because larpix-control reads no others.

Each dataset has an attribute `columns` with unit and meaning of each of its columns (columns.py, docs/files.md).

    /_header          attributes version, created, modified, asic_version, software (as in files of larpix-control)
    /meta             attributes created, modified, run, subrun, data_stream, for file catalogues (metadata.py)
    /packets          rows, layout 1.0, 2.4 or 3.0; chunks shuffled and deflated
    /messages         texts of INFO messages: a row of type 5 has the index of its first row here in `counter`
    /configs          chip configurations in the form of larpix-control: sent values of registers, else read values
    /run/info         one row: number, part, condition, totals; when RUN began and ended, and its live time
    /run/texts        comment, operator, kind, versions, ...: the newest text of a name counts, except of the e-log;
                      `piece` 0 begins a text
    /run/producers    names of producers; `producer` in the other tables is the index into this table
    /run/sources      boards, or files, that the producers read; the newest row of a producer and io_group counts
    /run/blocks       one row per block: its origin, the place of its rows, their CRC-32 as stored
    /run/ends         one row per end record
    /run/configs      one row per chip and change of its configuration: sent and read values of its registers
    /run/positions    position of each origin when this part was opened (first), and when it was closed (next)
    /run/missing      blocks that never came
    /run/checksums    rows and CRC-32 of every dataset but /packets (whose blocks have their own), written at the close
    /ledger/counts    one row per producer, epoch and io_group; `how`: as in its end record; `open` without end record
    /ledger/outside   the same for run 0: data that came outside of runs
    /ledger/gaps      rows that found no room at the producer, before the block `sequence`
    /ledger/verdicts  verdicts on the data of each io_group before they reached the producer, with the reason
    /ledger/unknown   words that could not become rows, unchanged
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from larpixdaq import constants, schema
from larpixdaq.constants import UNKNOWN_BYTES
from larpixdaq.errors import FileError, cause
from larpixdaq.hdf5 import columns
from larpixdaq.protocol.stream import REGISTERS
from larpixdaq.runtime.file_access import can_lock
from larpixdaq.runtime.record_file import crc32
from larpixdaq.schema import MESSAGE_BYTES, TEXT_BYTES
from larpixdaq.version import VERSION

#: HDF5 1.14 and Debian's h5dump cannot read newer formats, and older formats have no SWMR.
LIBVER: Final = ("v110", "v110")
#: Bits of HDF5's filter mask: a chunk that is neither shuffled nor deflated.
NO_FILTERS: Final = 0b11
#: Attempts to open a file that this process reads, at intervals of 10 ms.
_READER_WAIT: Final = 100
_SOURCE: Final = [("producer", "<u2"), ("epoch", "<u8")]
_COUNTS: Final = [("io_group", "u1"), ("how", "S16"), ("owed", "<u8")] + [(name, "<u8") for name in constants.COUNTS]
MESSAGES: Final = np.dtype([("message", f"S{MESSAGE_BYTES}"), ("timestamp", "<u8"), ("index", "<u4")])
INFO: Final = np.dtype(
    [
        ("run", "<u8"),
        ("part", "<u4"),
        ("layout", "<u4"),
        ("condition", "S32"),
        ("started_ns", "<u8"),
        ("opened_ns", "<u8"),
        ("closed_ns", "<u8"),
        ("rows", "<u8"),
        ("blocks", "<u8"),
        ("duplicate_blocks", "<u8"),
        ("missing_blocks", "<u8"),
        ("begun_ns", "<u8"),
        ("ended_ns", "<u8"),
        ("live_ns", "<u8"),
    ]
)
#: Columns of /run/info that files from before 2026-11-29 do not have.
ADDED_INFO_COLUMNS: Final = ("begun_ns", "ended_ns", "live_ns")
OLD_INFO: Final = np.dtype([(name, INFO[name]) for name in INFO.names or () if name not in ADDED_INFO_COLUMNS])
SOURCES: Final = np.dtype(
    [
        ("producer", "<u2"),
        ("io_group", "u1"),
        ("kind", "S16"),
        ("address", "S256"),
        ("host", "S64"),
        ("firmware", "S64"),
    ]
)
#: Name of the texts that are comments of the e-log, in JSON: protocol.reports.Comment.
E_LOG: Final = "e-log"
#: Name of the text with the recording from which a file was converted. Such a file belongs to no run of a storage.
CONVERTED: Final = "converted from"
#: Name of the text with the number of chunks that came packed, and were written without being unpacked.
UNREAD: Final = "unread chunks"
#: Names of the texts that say of which rows of which files a part was made, and which boards it has (repartition.py).
MADE_FROM: Final = "made from"
ONLY_GROUPS: Final = "only io_groups"
TEXTS: Final = np.dtype([("name", "S64"), ("piece", "<u4"), ("text", f"S{TEXT_BYTES}"), ("written_ns", "<u8")])
#: 256 bytes hold any constants.Name.
PRODUCERS: Final = np.dtype([("name", "S256")])
BLOCKS: Final = np.dtype(
    [
        *_SOURCE,
        ("sequence", "<u8"),
        ("first_row", "<u8"),
        ("rows", "<u4"),
        ("crc32", "<u4"),
        ("first_ns", "<u8"),
        ("last_ns", "<u8"),
        ("first_packet", "<u8"),
        ("flags", "<u4"),
    ]
)
ENDS: Final = np.dtype([*_SOURCE, ("next", "<u8"), ("how", "S16"), ("first_ns", "<u8"), ("last_ns", "<u8")])
POSITIONS: Final = np.dtype([*_SOURCE, ("first", "<u8"), ("next", "<u8")])
MISSING: Final = np.dtype([*_SOURCE, ("first", "<u8"), ("next", "<u8"), ("rows", "<u8")])
#: `known`, `sent` and `read` as in protocol/stream.py; producer, epoch and sequence of the block that brought them.
CONFIGS: Final = np.dtype(
    [
        *_SOURCE,
        ("sequence", "<u8"),
        ("time_ns", "<u8"),
        ("asic", "S16"),
        ("io_group", "u1"),
        ("io_channel", "u1"),
        ("chip_id", "u1"),
        ("different", "<u2"),
        ("sent", "u1", (REGISTERS,)),
        ("read", "u1", (REGISTERS,)),
        ("known", "u1", (REGISTERS,)),
    ]
)
CHECKSUMS: Final = np.dtype([("name", "S32"), ("rows", "<u8"), ("crc32", "<u4")])
COUNTS: Final = np.dtype(_SOURCE + _COUNTS)
GAPS: Final = np.dtype(
    [*_SOURCE, ("sequence", "<u8"), ("io_group", "u1"), ("rows", "<u8"), ("first_ns", "<u8"), ("last_ns", "<u8")]
)
VERDICTS: Final = np.dtype(
    [
        *_SOURCE,
        ("io_group", "u1"),
        ("verdict", "S16"),
        ("why", f"S{TEXT_BYTES}"),
        ("lost", "<u8"),
        ("first_ns", "<u8"),
        ("last_ns", "<u8"),
    ]
)
UNKNOWN: Final = np.dtype(
    [
        *_SOURCE,
        ("io_group", "u1"),
        ("seconds", "<u8"),
        ("reason", "u1"),
        ("size", "u1"),
        ("raw", "u1", (UNKNOWN_BYTES,)),
    ]
)
#: Dataset -> dtype and rows of a chunk. There are no filters, because these datasets are small, and a filtered chunk
#: that is written anew while it fills up leaves its old place in the file unused.
TABLES: Final = {
    "messages": (MESSAGES, 64),
    "run/texts": (TEXTS, 32),
    "run/producers": (PRODUCERS, 8),
    "run/sources": (SOURCES, 8),
    "run/blocks": (BLOCKS, 512),
    "run/ends": (ENDS, 16),
    "run/positions": (POSITIONS, 16),
    "run/missing": (MISSING, 16),
    "run/configs": (CONFIGS, 16),
    "ledger/counts": (COUNTS, 16),
    "ledger/outside": (COUNTS, 16),
    "ledger/gaps": (GAPS, 16),
    "ledger/verdicts": (VERDICTS, 16),
    "ledger/unknown": (UNKNOWN, 64),
}
#: Tables that files from before 2026-11-29 do not have.
ADDED_TABLES: Final = ("run/configs", "run/sources")
#: Datasets with a row in /run/checksums.
CHECKED: Final = (*TABLES, "configs", "run/info")
_TYPE_NAMES: Final = ("data", "test", "config write", "config read", "timestamp", "message", "sync", "trigger")
PACKET_TYPES: Final = "\n" + "\n".join(f"{code}: '{name}'," for code, name in enumerate(_TYPE_NAMES)) + "\n"
#: Registers of a chip in /configs, where these are not 239 as in all files that larpix-control can write.
_REGISTERS: Final = {"2b": 256}
#: Names of chip generations in larpix-control, where they differ from those of --asic.
NAMES: Final = {"lightpix-1": "lightpix-v1.0"}


def configs_name(asic_version: str) -> str:
    """Return the attribute asic_version of /configs for a chip generation as --asic names it."""
    return NAMES.get(asic_version, asic_version)


def configs_dtype(asic_version: str) -> np.dtype[Any]:
    registers = _REGISTERS.get(asic_version, 239)
    return np.dtype(
        [
            ("timestamp", "<u8"),
            ("io_group", "u1"),
            ("io_channel", "u1"),
            ("chip_id", "u1"),
            ("registers", "u1", (registers,)),
        ]
    )


def open_file(path: Path, mode: str, **options: Any) -> h5py.File:
    """Call h5py.File() with HDF5's own lock, or without it where the file system has no locks.

    HDF5's "best-effort" alone is not enough, because it recognises only one of the errors (ENOSYS).
    """
    try:
        return h5py.File(path, mode, locking="best-effort", **options)
    except FileExistsError:
        raise
    except OSError:
        if can_lock(path):
            raise
        if mode == "x":
            path.unlink(missing_ok=True)  # HDF5 created it before the lock failed
        return h5py.File(path, mode, locking=False, **options)


def create(path: Path, layout: schema.RowLayout, asic_version: str, meta: Mapping[str, Any] | None = None) -> h5py.File:
    """Create a file with all datasets, ready to be written and read at the same time. `meta`: attributes of /meta.

    FileError when the file exists already or cannot be created.
    """
    file, created = None, False
    try:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        created = True
        file = open_file(path, "x", libver=LIBVER)
        _fill(file, layout, asic_version, meta or {})
    except (OSError, RuntimeError, ValueError) as error:  # h5py raises all three when a disk fails
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            if file is not None:
                file.close()
        with contextlib.suppress(OSError):
            if created:  # there is an empty file even when HDF5 could not write the superblock
                path.unlink(missing_ok=True)
        raise FileError(f"cannot create {path}: {cause(error)}") from None
    return file


def reopen(path: Path) -> h5py.File:
    """Open a file whose superblock has been repaired for writing, in the same order as its first writer (SWMR).

    A recovery that is killed then leaves a file that can be recovered again. Waits up to 1 s while another thread of
    this process reads the file: a storage reads the configurations of a part that has failed, for the next one.
    FileError when it cannot be opened.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_file_locking(True, True)

    def open_swmr() -> h5py.File:
        # Not mode "r+" and then swmr_mode, because a kill in between would leave the flags of an incomplete file.
        for _ in range(_READER_WAIT):
            try:
                return h5py.File(h5py.h5f.open(os.fsencode(path), flags, fapl=access))
            except OSError as error:
                if "already open" not in str(error):
                    raise
            time.sleep(0.01)
        return h5py.File(h5py.h5f.open(os.fsencode(path), flags, fapl=access))

    flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
    try:
        try:
            return open_swmr()
        except OSError as error:
            # A reader of another process holds HDF5's lock, but it cannot write. The journal's lock keeps writers away.
            if error.errno != errno.EAGAIN and can_lock(path):
                raise
            access.set_file_locking(False, False)
            return open_swmr()
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"cannot open {path}: {cause(error)}") from None


def _fill(file: h5py.File, layout: schema.RowLayout, asic_version: str, meta: Mapping[str, Any]) -> None:
    now = time.time()
    header = file.create_group("_header")
    header.attrs["version"] = layout.version
    header.attrs["created"] = now
    header.attrs["modified"] = now
    header.attrs["asic_version"] = asic_version
    header.attrs["software"] = f"larpix-daq {VERSION}"
    file.create_group("meta").attrs.update({"created": now, "modified": now, **meta})
    packets = file.create_dataset(
        "packets",
        shape=(0,),
        maxshape=(None,),
        dtype=layout.dtype,
        chunks=(schema.CHUNK_ROWS,),
        shuffle=True,
        compression="gzip",
        compression_opts=1,
    )
    packets.attrs["packet_types"] = PACKET_TYPES
    for name, (dtype, rows) in TABLES.items():
        file.create_dataset(name, shape=(0,), maxshape=(None,), dtype=dtype, chunks=(rows,))
    configs = file.create_dataset(
        "configs", shape=(0,), maxshape=(None,), dtype=configs_dtype(asic_version), chunks=(64,)
    )
    configs.attrs["asic_version"] = configs_name(asic_version)
    file.create_dataset("run/info", shape=(1,), dtype=INFO)
    file.create_dataset("run/checksums", shape=(len(CHECKED),), dtype=CHECKSUMS)
    for name in ("packets", "run/checksums", *CHECKED):
        file[name].attrs["columns"] = columns.attribute(name, file[name].dtype)
    file.flush()
    file.swmr_mode = True


def table_crc32(table: Any) -> int:
    """Compute the CRC-32 of all bytes of a dataset, read in pieces."""
    value = 0
    for first in range(0, table.shape[0], 8192):
        value = crc32(np.ascontiguousarray(table[first : first + 8192]).view(np.uint8), value)
    return value
