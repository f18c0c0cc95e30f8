"""All blocks of a file in turn: their rows cover /packets exactly, and have the CRC that /run/blocks says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import checksum, schema
from larpixdaq.errors import FileError
from larpixdaq.files.books import Books
from larpixdaq.files.parity import ParityCheck
from larpixdaq.files.reader import DataFile

#: Rows that are read at once.
_PIECE: Final = 4 * schema.CHUNK_ROWS


def walk(
    file: DataFile, info: dict[str, Any], books: Books, parity: ParityCheck, finding: Callable[[str], None]
) -> None:
    """Read everything once. Stops where /run/blocks stops making sense: what follows could not be told apart."""
    row = 0
    counter = -1
    messages = file.length("messages")
    known = file.layout is not None
    for group in groups(file):
        first = row
        for block in group:
            if int(block["first_row"]) != row or int(block["rows"]) > schema.BLOCK_ROWS:
                finding(
                    f"/run/blocks: block {block['sequence']} of {block['rows']} rows is at row"
                    f" {block['first_row']}, expected row {row}; what follows is not checked"
                )
                return
            row += int(block["rows"])
        if row > file.rows:
            finding(f"/run/blocks reaches to row {row}, /packets has {file.rows}; what follows is not checked")
            return
        try:
            rows = file.packets(first, row)
        except FileError as error:
            finding(str(error))
            rows = None
        if rows is not None and known:
            counter = _counters(rows, counter, messages, first, finding)
            parity.add(rows, first)
        data = rows.view(np.uint8).reshape(-1, file.dtype.itemsize) if rows is not None else None
        for block in group:
            _block(block, data, first, books, known, finding)
    if row != file.rows:
        finding(f"/run/blocks covers {row} rows, /packets has {file.rows}")


def _block(
    block: Any,
    data: NDArray[np.uint8] | None,
    first: int,
    books: Books,
    known: bool,
    finding: Callable[[str], None],
) -> None:
    mine = None
    if data is not None:
        start = int(block["first_row"]) - first
        mine = data[start : start + int(block["rows"])].reshape(-1)
        crc = checksum.crc32(mine)
        if crc != block["crc32"]:
            finding(
                f"/packets, rows {block['first_row']} to {block['first_row'] + block['rows']}: expected CRC-32"
                f" {block['crc32']:08x}, found {crc:08x}"
            )
    books.block(block, mine if known else None, finding)


def groups(file: DataFile) -> Iterator[NDArray[Any]]:
    """/run/blocks in groups of about _PIECE rows."""
    for start in range(0, file.length("run/blocks"), 8192):
        blocks = file.table("run/blocks", start, start + 8192)
        pieces = np.cumsum(blocks["rows"].astype(np.uint64)) // _PIECE
        yield from np.split(blocks, np.flatnonzero(np.diff(pieces)) + 1)


def _counters(rows: NDArray[Any], last: int, messages: int, first: int, finding: Callable[[str], None]) -> int:
    """Rows of messages name existing texts, in order; returns the last counter."""
    counters = rows["counter"][schema.types_of(rows) == schema.PacketType.MESSAGE].astype(np.int64)
    if not len(counters):
        return last
    if counters.max() >= messages:
        finding(f"/packets, rows from {first}: message {counters.max()} of {messages} in /messages")
    if np.any(np.diff(counters, prepend=last) < 0):
        finding(f"/packets, rows from {first}: messages are not in the order of /messages")
    return int(counters[-1])
