"""Compare the content of two files: rows, messages, configurations and, of files of larpix-daq, runs and ledger.

Two files of the same run, as two storages write them, may have the blocks of several producers in another order, and
other borders of parts. So their blocks are compared, by origin and sequence, each by its rows. Rows of any other two
files are compared in their order, column by column by name, whatever the types of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import COUNTS
from larpixdaq.errors import FileError
from larpixdaq.hdf5.layout import E_LOG
from larpixdaq.hdf5.ledger import describe_group, describe_origin
from larpixdaq.hdf5.reader import PIECE_ROWS, DataFile, comments, text
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.schema import PacketType, type_column, types_of

#: Maximum lines of differences, and of examples of each kind.
_MOST: Final = 100
_EXAMPLES: Final = 5
#: Texts and columns of a run that are about the file, and not about the data.
_TEXTS: Final = ("kind", "comment", "operator", "shifter", "asic_version")


class Comparison(NamedTuple):
    """`differences`: one line each, none if the content is the same. `notes`: facts that are no difference."""

    one: Path
    other: Path
    rows: tuple[int, int]
    different_rows: int
    differences: list[str]
    notes: list[str]

    @property
    def same(self) -> bool:
        return not self.differences


def compare(one: Path, other: Path) -> Comparison:
    """Compare two files. FileError if one of them cannot be read."""
    with DataFile(one) as first, DataFile(other) as second:
        lines, notes = _Lines(), list[str]()
        common = _columns(first, second, lines, notes)
        same_run = first.own and second.own and first.run == second.run
        if first.own != second.own:
            notes.append(
                f"{(other if first.own else one).name} has no run and no ledger: only rows, messages and "
                "configurations were compared"
            )
        if first.own and second.own:
            _compare_runs(first, second, lines)
        if same_run:
            different = _compare_blocks(first, second, common, lines)
        else:
            different = _compare_rows(first, second, common, lines)
        _compare_messages(first, second, lines)
        _compare_configs(first, second, lines, notes)
        return Comparison(one, other, (first.rows, second.rows), different, lines.all(), notes)


class _Lines:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = 0

    def add(self, line: str) -> None:
        if len(self._lines) < _MOST:
            self._lines.append(line)
        else:
            self._more += 1

    def all(self) -> list[str]:
        return self._lines + ([f"and {self._more} more"] if self._more else [])


def _columns(one: DataFile, other: DataFile, lines: _Lines, notes: list[str]) -> list[str]:
    """Return the columns that both files have, and note the others."""
    mine, theirs = one.dtype.names or (), other.dtype.names or ()
    common = [name for name in mine if name in theirs]
    if type_column(one.dtype) != type_column(other.dtype):
        raise FileError(
            f"{one.path} has layout {one.version}, {other.path} has {other.version}: rows of v1 and of later "
            "chips have other columns"
        )
    for file, names, rest in ((one, mine, theirs), (other, theirs, mine)):
        only = [name for name in names if name not in rest]
        if only:
            lines.add(f"columns of {file.path.name} only: {', '.join(only)}")
    kinds = [
        f"{name} {one.dtype[name]} and {other.dtype[name]}" for name in common if one.dtype[name] != other.dtype[name]
    ]
    if kinds:
        notes.append(f"columns of other types, compared by value: {'; '.join(kinds)}")
    if one.version != other.version:
        notes.append(f"LArPix+HDF5 {one.version} and {other.version}")
    return common


def different(one: NDArray[Any], other: NDArray[Any], common: Sequence[str]) -> NDArray[np.bool_]:
    """Return which rows differ in a common column, shape (N,). The numbers of messages are no part of their rows."""
    if one.dtype == other.dtype and len(common) == len(one.dtype.names or ()):
        size = one.dtype.itemsize
        bytes_differ: NDArray[np.bool_] = (
            np.ascontiguousarray(one).view(np.uint8).reshape(-1, size)
            != np.ascontiguousarray(other).view(np.uint8).reshape(-1, size)
        ).any(axis=1)
        places = np.flatnonzero(bytes_differ)
    else:
        places = np.arange(len(one))
    result = np.zeros(len(one), np.bool_)
    if not len(places):
        return result
    mine, theirs = one[places], other[places]
    texts = (types_of(mine) == PacketType.MESSAGE) & (types_of(theirs) == PacketType.MESSAGE)
    for name in common:
        unequal = mine[name] != theirs[name]
        if unequal.ndim > 1:
            unequal = unequal.reshape(len(unequal), -1).any(axis=1)
        result[places] |= unequal & ~texts if name == "counter" else unequal
    return result


def _compare_rows(one: DataFile, other: DataFile, common: Sequence[str], lines: _Lines) -> int:
    if one.rows != other.rows:
        lines.add(f"{one.rows} rows in {one.path.name}, {other.rows} in {other.path.name}")
    total = shown = 0
    for start in range(0, min(one.rows, other.rows), PIECE_ROWS):
        stop = min(start + PIECE_ROWS, one.rows, other.rows)
        mine, theirs = one.packets(start, stop), other.packets(start, stop)
        places = np.flatnonzero(different(mine, theirs, common))
        for place in places[: _EXAMPLES - shown].tolist():
            lines.add(f"row {start + place}: {_changes(mine[place], theirs[place], common)}")
            shown += 1
        total += len(places)
    if total > shown:
        lines.add(f"{total - shown} more rows differ")
    return total


def _changes(mine: Any, theirs: Any, common: Sequence[str]) -> str:
    """Name the columns in which two rows differ, with both values."""
    changes = [
        f"{name} {_value(mine[name])} and {_value(theirs[name])}"
        for name in common
        if np.any(mine[name] != theirs[name])
    ]
    more = f", and {len(changes) - 6} more columns" if len(changes) > 6 else ""
    return ", ".join(changes[:6]) + more


def _value(value: Any) -> str:
    return text(value) if isinstance(value, bytes) else str(value.tolist())[:40]


def _compare_blocks(one: DataFile, other: DataFile, common: Sequence[str], lines: _Lines) -> int:
    """Compare the blocks of two files of a run."""
    tables = one.table("run/blocks"), other.table("run/blocks")
    indices = [
        {(one_of.origin(row), int(row["sequence"])): number for number, row in enumerate(table)}
        for one_of, table in zip((one, other), tables, strict=True)
    ]
    for file, mine, theirs in ((one, indices[0], indices[1]), (other, indices[1], indices[0])):
        for line in _stretches([key for key in mine if key not in theirs]):
            lines.add(f"only in {file.path.name}: {line}")
    total = shown = 0
    for key, number in indices[0].items():
        if key not in indices[1]:
            continue
        blocks = tables[0][number], tables[1][indices[1][key]]
        if blocks[0]["crc32"] == blocks[1]["crc32"] and blocks[0]["rows"] == blocks[1]["rows"]:
            continue
        found = [
            file.packets(int(block["first_row"]), int(block["first_row"]) + int(block["rows"]))
            for file, block in zip((one, other), blocks, strict=True)
        ]
        where = f"block {key[1]} of {describe_origin(key[0])}"
        if len(found[0]) != len(found[1]):
            lines.add(f"{where}: {len(found[0])} and {len(found[1])} rows")
            total += abs(len(found[0]) - len(found[1]))
            continue
        places = np.flatnonzero(different(found[0], found[1], common))
        for place in places[: max(0, _EXAMPLES - shown)].tolist():
            rows = [int(block["first_row"]) + place for block in blocks]
            lines.add(f"{where}, rows {rows[0]} and {rows[1]}: {_changes(found[0][place], found[1][place], common)}")
            shown += 1
        total += len(places)
    if total > shown:
        lines.add(f"{total - shown} more rows differ")
    return total


def _stretches(keys: Sequence[tuple[BlockOrigin, int]]) -> list[str]:
    """Describe blocks, consecutive ones together."""
    found: list[list[Any]] = []
    for origin, sequence in sorted(keys):
        if found and found[-1][0] == origin and found[-1][2] + 1 == sequence:
            found[-1][2] = sequence
        else:
            found.append([origin, sequence, sequence])
    return [f"blocks {first} to {last} of {describe_origin(origin)}" for origin, first, last in found]


def _compare_runs(one: DataFile, other: DataFile, lines: _Lines) -> None:
    """Compare what two files say of their runs, and their ledgers."""
    infos, texts = (one.run_info(), other.run_info()), (one.texts(), other.texts())
    for name in ("run", "condition", "layout", "started_ns"):
        if infos[0][name] != infos[1][name]:
            lines.add(f"{name} {infos[0][name]} and {infos[1][name]}")
    for name in _TEXTS:
        mine, theirs = ((found.get(name) or [""])[-1] for found in texts)
        if mine != theirs:
            lines.add(f"{name} {mine[:80]!r} and {theirs[:80]!r}")
    logs = [set(comments({E_LOG: found.get(E_LOG, [])})) for found in texts]
    if logs[0] != logs[1]:
        lines.add(
            f"e-log: {len(logs[0] - logs[1])} comments only in {one.path.name}, {len(logs[1] - logs[0])} only in "
            f"{other.path.name}"
        )
    if infos[0]["run"] != infos[1]["run"]:
        return
    ledgers = [
        {(origin, row["io_group"]): row for origin, row in file.rows_by_origin("ledger/counts")}
        for file in (one, other)
    ]
    for key in dict.fromkeys([*ledgers[0], *ledgers[1]]):
        where = describe_group(*key)
        if key not in ledgers[0] or key not in ledgers[1]:
            lines.add(f"ledger of {where}: only in {(one if key in ledgers[0] else other).path.name}")
            continue
        found, other_found = ledgers[0][key], ledgers[1][key]
        unequal = [
            f"{name} {found[name]} and {other_found[name]}"
            for name in (*COUNTS, "owed", "how")
            if found[name] != other_found[name]
        ]
        if unequal:
            lines.add(f"ledger of {where}: {', '.join(unequal)}")
    verdicts = [
        {
            (origin, row["io_group"], row["verdict"], row["why"])
            for origin, row in file.rows_by_origin("ledger/verdicts")
        }
        for file in (one, other)
    ]
    for origin, io_group, verdict, why in sorted(verdicts[0] ^ verdicts[1]):
        which = one if (origin, io_group, verdict, why) in verdicts[0] else other
        lines.add(
            f"only in {which.path.name}: {describe_group(origin, io_group)}: {verdict}{f': {why}' if why else ''}"
        )


def _compare_messages(one: DataFile, other: DataFile, lines: _Lines) -> None:
    texts = []
    for file in (one, other):
        table = file.foreign_table("messages")
        has_texts = table is not None and "message" in (table.dtype.names or ())
        texts.append([bytes(line) for line in table["message"].tolist()] if has_texts and table is not None else [])
    if sorted(texts[0]) == sorted(texts[1]):
        return
    for file, mine, theirs in ((one, texts[0], texts[1]), (other, texts[1], texts[0])):
        only = sorted(set(mine) - set(theirs))
        lines.add(
            f"{len(mine)} lines of messages in {file.path.name}, {len(only)} only there: "
            + "; ".join(text(line)[:60] for line in only[:3])
        )


def _compare_configs(one: DataFile, other: DataFile, lines: _Lines, notes: list[str]) -> None:
    """Compare the newest registers of each chip in /configs."""
    newest = []
    for file in (one, other):
        table = file.foreign_table("configs")
        names = ("io_group", "io_channel", "chip_id", "registers")
        if table is None or any(name not in (table.dtype.names or ()) for name in names):
            notes.append(f"{file.path.name} has no configurations of chips that can be compared")
            return
        newest.append({tuple(row[name] for name in names[:3]): row["registers"] for row in table})
    for key in dict.fromkeys([*newest[0], *newest[1]]):
        chip = "-".join(str(int(part)) for part in key)
        if key not in newest[0] or key not in newest[1]:
            lines.add(f"configuration of chip {chip}: only in {(one if key in newest[0] else other).path.name}")
        elif len(newest[0][key]) != len(newest[1][key]):
            lines.add(f"configuration of chip {chip}: {len(newest[0][key])} and {len(newest[1][key])} registers")
        elif len(places := np.flatnonzero(newest[0][key] != newest[1][key])):
            place = int(places[0])
            lines.add(
                f"configuration of chip {chip}: {len(places)} registers differ, the first is {place}: "
                f"{newest[0][key][place]} and {newest[1][key][place]}"
            )
