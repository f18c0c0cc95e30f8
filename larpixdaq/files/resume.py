"""What a part holds that its writer did not close: read in the order in which it was written, up to where it ends.

/run/blocks and /run/ends say what is there, since they are written last. Rows that other tables have beyond what these
two speak of were being written when the writer died.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import blocks, checksum, schema
from larpixdaq._native import chunks
from larpixdaq.blocks import Source
from larpixdaq.errors import FileError
from larpixdaq.files import configs, layout, ledger, verify
from larpixdaq.files.ledger import Account
from larpixdaq.files.reader import DataFile, text
from larpixdaq.files.walk import groups

#: Texts that a close writes, and that are written anew when it did not come to its end.
CLOSING: Final = ("reason", "recovered", "damaged")


class State(NamedTuple):
    info: dict[str, Any]  # the row of /run/info
    texts: dict[str, list[str]]
    sealed: bool  # it was closed, and lacks its final name only
    known: dict[Source, int]  # where sources stood when it was opened
    accounts: dict[Source, Account]
    producers: list[str]
    rows: int  # of /packets that belong to blocks
    cut: int  # further ones
    messages: int  # rows of /messages
    lengths: dict[str, int]  # of each table, the rows that belong to it
    missing: list[tuple[int, ...]]  # rows that /run/missing lacks
    owed: dict[Source, int]
    damaged: list[str]  # rows that are not what was written and stay where they are, in one line each
    lost: list[str]  # what is cut although its writer had come to its end with it, in one line each


def read(path: Path, give_up: Callable[[], bool] = lambda: False) -> State | None:
    """None when it had not come so far that it could take a block. FileError when it cannot be read, or when `give_up`,
    which is asked while its rows are, says so."""
    with DataFile(path) as file:
        if not file.own:
            raise FileError(f"{path}: has no /run, so it is none of ours")
        info = file.run_info()
        if not info["opened_ns"]:
            if found := file.rows or file.length("run/blocks"):
                raise FileError(f"{path}: /run/info is empty, expected what run its {found} rows belong to")
            return None
        if file.layout is None or file.layout.code != info["layout"]:
            raise FileError(f"{path}: /run/info says layout {info['layout']}, the columns are {file.dtype}")
        return _Reading(file, info).state(give_up)


class _Reading:
    def __init__(self, file: DataFile, info: dict[str, Any]) -> None:
        self._file = file
        self._info = info
        self._run = int(info["run"])
        self._producers = file.producers()
        self._known = {self._whose(row): int(row["first"]) for row in file.table("run/positions")}
        self._accounts: dict[Source, Account] = {}
        self._missing: list[tuple[int, ...]] = []
        self._damaged: list[str] = []
        self._lost: list[str] = []
        self._doubtful: list[Any] = []  # blocks at the end whose rows are not what was written
        self._row = 0  # behind the last good block
        self._blocks = 0  # good ones, and what lies between them
        self._messages = 0

    def state(self, give_up: Callable[[], bool]) -> State:
        for group in groups(self._file):
            if give_up():
                raise FileError(f"{self._file.path}: not recovered to its end: that begins anew at the next start")
            if not self._group(group):
                break
        self._cut_blocks()
        lengths = {"run/blocks": self._blocks, "run/ends": self._ends(), "messages": self._messages}
        lengths["ledger/counts"], owed = self._counts()
        for name in ("ledger/outside", "ledger/unknown", "ledger/verdicts"):
            lengths[name] = len(self._leading(name, self._ended))
        gaps = self._leading("ledger/gaps", lambda row: int(row["sequence"]) < self._account(row).next)
        for row in gaps:
            self._account(row).drop([(int(row["io_group"]), int(row["rows"]))])
        told = self._leading("run/configs", lambda row: int(row["sequence"]) < self._account(row).next)
        lengths["run/configs"] = len(told)
        lengths["configs"] = int(configs.fitting(told, self._file.attribute("_header", "asic_version")).sum())
        jumps = self._leading("run/missing", lambda row: int(row["next"]) < self._account(row).next)
        lengths["ledger/gaps"], lengths["run/missing"] = len(gaps), len(jumps)
        there = {tuple(row.tolist()[:4]) for row in jumps}
        texts = [text(row["name"]) in CLOSING for row in self._file.table("run/texts")]
        lengths["run/texts"] = texts.index(True) if True in texts else len(texts)
        findings = verify.Findings()
        verify.check_seal(self._file, self._info, findings)
        return State(
            info=self._info,
            texts=self._file.texts(),
            sealed=not findings.lines() and self._info["condition"] != layout.RUNNING,
            known=self._known,
            accounts={source: account for source, account in self._accounts.items() if account.next > account.begun_at},
            producers=self._producers,
            rows=self._row,
            cut=self._file.rows - self._row,
            messages=self._messages,
            lengths=lengths,
            missing=[row for row in self._missing if row[:4] not in there],
            owed=owed,
            damaged=self._damaged,
            lost=self._lost,
        )

    def _whose(self, row: Any) -> Source:
        return self._file.source(row, self._producers, self._run)

    def _account(self, row: Any) -> Account:
        source = self._whose(row)
        if source not in self._accounts:
            self._accounts[source] = Account(source, int(row["producer"]), self._known.get(source, 0))
        return self._accounts[source]

    # Blocks

    def _group(self, group: NDArray[Any]) -> bool:
        """Some blocks with their rows; False when what follows makes no sense."""
        first = stop = self._row + sum(int(block["rows"]) for block in self._doubtful)
        sensible = []
        for block in group:
            known = int(block["producer"]) < len(self._producers)
            if not known or int(block["first_row"]) != stop or int(block["rows"]) > schema.BLOCK_ROWS:
                break
            stop += int(block["rows"])
            sensible.append(block)
        data = self._rows(first, stop)
        for block in sensible:
            if int(block["sequence"]) < self._account(block).expected:
                return False
            start = int(block["first_row"])
            end = start + int(block["rows"])
            rows = self._rows(start, end) if data is None else data[start - first : end - first]
            if rows is None or len(rows) != block["rows"] or checksum.crc32(rows.view(np.uint8)) != block["crc32"]:
                self._doubtful.append(block)
            else:
                self._settle()
                self._good(block, rows)
        return len(sensible) == len(group)

    def _rows(self, start: int, stop: int) -> NDArray[Any] | None:
        try:
            return self._file.packets(start, stop)
        except FileError:
            return None

    def _good(self, block: Any, rows: NDArray[Any]) -> None:
        account = self._take(block)
        chunks.tally(rows.view(np.uint8), int(self._info["layout"]), account.tally)
        messages = rows["counter"][schema.types_of(rows) == schema.PacketType.MESSAGE]
        if len(messages):  # files of before 2026-11-29 have one number in all rows of a message
            self._messages = int(messages[-1]) + int(np.count_nonzero(messages == messages[-1]))

    def _settle(self) -> None:
        """A good block follows: those before it that are not are kept where they are, and named."""
        for block in self._doubtful:
            self._take(block)
            last = int(block["first_row"]) + int(block["rows"])
            self._damaged.append(f"rows {block['first_row']} to {last} are not what block {block['sequence']} held")
        self._doubtful = []

    def _cut_blocks(self) -> None:
        """Name the blocks at the end that do not become part of the file. A writer that is killed leaves none."""
        for block in self._doubtful:
            last = int(block["first_row"]) + int(block["rows"])
            self._lost.append(
                f"rows {block['first_row']} to {last}, at the end, are not what block {block['sequence']} held"
            )
        rest = self._file.length("run/blocks") - self._blocks - len(self._doubtful)
        if rest:
            self._lost.append(f"the last {rest} rows of /run/blocks make no sense")

    def _take(self, block: Any) -> Account:
        account = self._account(block)
        sequence = int(block["sequence"])
        if missing := account.skip(sequence, int(block["first_packet"])):
            self._missing.append(missing)
        account.take(sequence, int(block["first_packet"]) + int(block["rows"]))
        self._row += int(block["rows"])
        self._blocks += 1
        return account

    # What belongs to them

    def _ends(self) -> int:
        """Take the ends; how many belong to it. One that came before blocks that are lost now does not."""
        rows = self._file.table("run/ends")
        jumps = {row[:4] for row in self._file.table("run/missing").tolist()}
        for number, row in enumerate(rows):
            if int(row["producer"]) >= len(self._producers):
                return self._cut_ends(number, len(rows))
            account, following = self._account(row), int(row["next"])
            whole = (
                following == account.expected
                or (account.index, int(row["epoch"]), account.expected, following) in jumps
            )
            if account.end is not None or not whole:
                return self._cut_ends(number, len(rows))
            if missing := account.skip(following, None):
                self._missing.append(missing)
            account.end = blocks.End(
                account.source.run,
                account.source.producer,
                account.source.epoch,
                following,
                text(row["how"]),
                int(row["first_ns"]),
                int(row["last_ns"]),
                counts=[],
                gaps=[],
                unknown=[],
                verdicts=self._verdicts(row),
            )
        return len(rows)

    def _cut_ends(self, kept: int, rows: int) -> int:
        self._lost.append(f"the last {rows - kept} rows of /run/ends do not fit the blocks")
        return kept

    def _verdicts(self, end: Any) -> list[blocks.Verdict]:
        return [
            blocks.Verdict(
                int(row["io_group"]),
                text(row["verdict"]),
                text(row["why"]),
                *row[["lost", "first_ns", "last_ns"]].tolist(),
            )
            for row in self._file.table("ledger/verdicts")
            if (row["producer"], row["epoch"]) == (end["producer"], end["epoch"])
        ]

    def _counts(self) -> tuple[int, dict[Source, int]]:
        """Give the ends their totals: how many rows of /ledger/counts that takes, and what is owed still."""
        rows = self._leading("ledger/counts", lambda row: text(row["how"]) != ledger.OPEN and self._ended(row))
        owed: dict[Source, int] = {}
        for row in rows:
            account = self._account(row)
            assert account.end is not None
            account.end.counts.append([int(row["io_group"]), *(int(row[name]) for name in schema.COUNTS)])
            if row["owed"]:
                owed[account.source] = owed.get(account.source, 0) + int(row["owed"])
        return len(rows), owed

    def _ended(self, row: Any) -> bool:
        return self._account(row).end is not None

    def _leading(self, name: str, belongs: Callable[[Any], bool]) -> NDArray[Any]:
        """The rows of a table that belong to blocks and ends that are there: its first ones."""
        rows = self._file.table(name)
        for number, row in enumerate(rows):
            if int(row["producer"]) >= len(self._producers) or not belongs(row):
                return rows[:number]
        return rows
