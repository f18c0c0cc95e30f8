"""The end of a file: what it says about itself, its seal, and its final name."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from larpixdaq.blocks import Source
from larpixdaq.errors import FileError
from larpixdaq.files import layout, ledger
from larpixdaq.files.ledger import Account
from larpixdaq.private_files import copy_content
from larpixdaq.regular_file import open_regular


def verdict(
    accounts: Sequence[Account],
    owed: Mapping[Source, int],
    required: Sequence[str],
    *,
    aborted: bool,
    continued: bool = False,
    before: Collection[Source] = (),
    damaged: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The condition of a run as this part of it says, and in one line each why it is not COMPLETE.

    What producers suspect to be lost before it reached them is told in any case, but alone it makes a run no worse than
    `COMPLETE, suspect`.

    continued: the run goes on in another part, where those may end that have not; before: sources of earlier parts;
    damaged: what recovery found, in lines.
    """
    waiting: list[str] = []
    missing, doubts = list(damaged), list[str]()
    for account in accounts:
        some_waiting, some_missing = account.complaints(owed.get(account.source, 0))
        waiting += some_waiting
        missing += some_missing
        doubts += account.doubts()
    known = {account.source for account in accounts}
    names = {source.producer for source in (*known, *before)}
    waiting += [f"producer {name!r}: no data came, totals unknown" for name in required if name not in names]
    waiting += [
        f"producer {source.producer!r}, epoch {source.epoch:x}: no data came, {rows} rows pending"
        for source, rows in owed.items()
        if source not in known
    ]
    if continued:
        waiting = []
    reasons = waiting + missing + doubts
    if aborted or any(account.how == "aborted" for account in accounts):
        return layout.ABORTED, reasons
    if waiting:
        return layout.INTERRUPTED, reasons
    if missing:
        return layout.INCOMPLETE, reasons
    if continued:
        return layout.CONTINUED, reasons
    return (layout.SUSPECT if doubts else layout.COMPLETE), reasons


def stored(accounts: Sequence[Account]) -> list[tuple[str, int, int, int]]:
    """(producer, epoch, io_group, rows) of all that this file holds."""
    return [
        (account.source.producer, account.source.epoch, int(group), int(rows[group]))
        for account in accounts
        for rows in (ledger.stored(account.tally),)
        for group in np.flatnonzero(rows)
    ]


#: A storage that rotates so long after the last row (ns) lags behind its producers.
_LAG_NS = 2 * 10**9


def live_ns(file: Any, info: Any, *, from_ns: int, until_ns: int) -> int:
    """For how long RUN was recorded in this part, ns: without the times in which rows found no room at a producer.

    `info`: the row of /run/info with all times. `from_ns`, `until_ns`: when a rotation opened this part, and when one
    opened the next; 0: none did. A part that no rotation opened begins when it was opened, or with its first block when
    that had come before; one that no rotation closed ends with RUN or with its last block.
    """
    table = file["run/blocks"]
    if not info["begun_ns"] or not table.shape[0]:
        return 0
    first, last = int(table[0]["first_ns"]), int(table[-1]["last_ns"])
    # A storage that lags behind its producers rotates between data of long before: their times count then.
    start = from_ns if from_ns and from_ns - first < _LAG_NS else min(first, int(info["opened_ns"]))
    start = max(start, int(info["begun_ns"]))
    stop = int(info["ended_ns"]) or (until_ns if until_ns and until_ns - last < _LAG_NS else last)
    gaps = np.sort(file["ledger/gaps"][:], order="first_ns")
    live, at = max(0, stop - start), start
    for begin, end in gaps[["first_ns", "last_ns"]].tolist():
        begin, end = max(begin, at), min(end, stop)
        if end > begin:
            live, at = live - (end - begin), end
    return live


def seal(file: Any) -> None:
    """Write /run/checksums and the time of the last change, and close the file."""
    names = [name for name in layout.CHECKED if name in file]
    sums = np.zeros(len(names), layout.CHECKSUMS)
    file.flush()
    for row, name in zip(sums, names, strict=True):
        row["name"], row["rows"], row["crc32"] = name.encode(), file[name].shape[0], layout.table_crc32(file[name])
    file["run/checksums"][:] = sums
    file["_header"].attrs.modify("modified", np.float64(time.time()))
    file.flush()
    file.close()


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a directory's entries."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_anew(file: int, part: Path) -> None:
    """Give an open file the name again that somebody has removed, by a copy. FileError when that cannot be."""
    try:
        new = open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            copy_content(file, new)
        except OSError:
            os.unlink(part)
            raise
        finally:
            os.close(new)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{part} was removed, and cannot be written anew: {reason}") from None


def publish(part: Path, final: Path) -> None:
    """Sync the file and give it its final name, never over another file; FileError when the name is taken."""
    try:
        sync(part)
        try:
            os.link(part, final)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            # A file system without hard links: take the name with an empty file, which the rename then replaces.
            os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            os.rename(part, final)
        else:
            sync(final.parent)
            os.unlink(part)
        sync(final.parent)
    except OSError as error:
        raise FileError(f"cannot rename {part} to {final.name}: {error.strerror}") from None
