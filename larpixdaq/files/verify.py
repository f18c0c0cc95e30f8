"""Is a file what it says it is? Structure, checksums, sequences, ledger and parity, from the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from larpixdaq import blocks, schema
from larpixdaq.errors import FileError
from larpixdaq.files import layout
from larpixdaq.files.books import Books
from larpixdaq.files.parity import ParityCheck
from larpixdaq.files.reader import DataFile, plain
from larpixdaq.files.walk import walk

#: More findings than these are counted, not listed.
MOST_FINDINGS: Final = 100


class Report(NamedTuple):
    """`findings`: what is wrong, each one line; `notes`: what a reader should know though it is not wrong."""

    path: Path
    ok: bool
    condition: str  # empty without a ledger
    rows: int
    packets: int  # rows of types 0 to 3 with direction 1
    findings: list[str]
    notes: list[str]
    open: list[str]  # those findings that other parts may answer: ends or blocks that did not come
    run: tuple[int, str] | None  # number and storage; None without a ledger


class Findings:
    """Lines, of which only the first hundred are kept."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open: list[str] = []
        self._more = 0
        self._more_open = 0  # of these

    def add(self, line: str) -> None:
        if len(self._lines) < MOST_FINDINGS:
            self._lines.append(line)
        else:
            self._more += 1

    def add_open(self, line: str) -> None:
        """What other parts may answer."""
        if len(self._lines) < MOST_FINDINGS:
            self._open.append(line)
        else:
            self._more_open += 1
        self.add(line)

    def lines(self) -> list[str]:
        return [*self._lines, *self._rest()]

    def open(self) -> list[str]:
        """Those that other parts may answer."""
        return [*self._open, *(self._rest() if self._more == self._more_open else [])]

    def _rest(self) -> list[str]:
        return [f"and {self._more} more"] if self._more else []


def verify(path: Path | str) -> Report:
    """Check a file. What is wrong is in the report, also when the file cannot be read at all; nothing is raised."""
    path = Path(path)
    findings = Findings()
    notes: list[str] = []
    condition, rows, packets = "", 0, 0
    run = None
    try:
        with DataFile(path) as file:
            rows = file.rows
            if file.own:
                run = int(file.run_info()["run"]), (file.texts().get("storage") or [""])[-1]
                condition, packets = _own(file, findings, notes)
            else:
                packets = _foreign(file, findings, notes)
    except FileError as error:
        findings.add(str(error))
    lines = findings.lines()
    return Report(path, not lines, condition, rows, packets, lines, notes, findings.open(), run)


def _own(file: DataFile, findings: Findings, notes: list[str]) -> tuple[str, int]:
    info = file.run_info()
    condition = str(info["condition"])
    _structure(file, info, findings)
    if condition == layout.RUNNING:
        findings.add("condition RUNNING: the file is still being written, or its writer died")
    else:
        check_seal(file, info, findings)
        texts = file.texts()
        if condition in (layout.INCOMPLETE, layout.INTERRUPTED):
            findings.add_open(f"condition {condition}: {'; '.join(texts.get('reason', [])) or 'no reason is given'}")
        elif condition == layout.CONTINUED:
            notes.append(f"condition {condition}: the run continues in {texts.get('next part', ['the next file'])[-1]}")
        elif condition in (layout.ABORTED, layout.SUSPECT):
            notes.append(f"condition {condition}")
        elif condition != layout.COMPLETE:
            findings.add(f"unknown condition {condition!r}")
    parity = ParityCheck(file)
    books = Books(file, info)
    walk(file, info, books, parity, findings.add)
    books.close(findings.add, findings.add_open, continued=condition == layout.CONTINUED)
    _doubts(file, info, findings, notes)
    if parity.unchecked_reason:
        notes.append(f"parity was not checked: {parity.unchecked_reason}")
    parity.close(findings.add, notes.append)
    return condition, books.packets


def _doubts(file: DataFile, info: dict[str, Any], findings: Findings, notes: list[str]) -> None:
    """What the producers suspect: no fault of the file, unless its condition keeps quiet about it."""
    producers = file.producers()
    doubts = []
    for row in file.table("ledger/verdicts"):
        one = plain(row)
        if one["verdict"] != blocks.VERDICTS[0]:
            name = file.source(row, producers, int(info["run"])).producer
            doubts.append(f"{name}, io_group {one['io_group']}: {one['verdict']}: {one['why']}")
    if doubts and info["condition"] == layout.COMPLETE:
        findings.add(f"condition COMPLETE, although /ledger/verdicts says: {doubts[0]}")
    notes += doubts[:MOST_FINDINGS]


def _structure(file: DataFile, info: dict[str, Any], findings: Findings) -> None:
    if file.layout is None:
        findings.add(f"/packets: the columns are not those of layout {file.version}: {file.dtype}")
    elif file.layout.code != info["layout"]:
        findings.add(f"/run/info says layout {info['layout']}, the columns are those of {file.layout.code}")
    if (found := file.attribute("packets", "packet_types")) != layout.PACKET_TYPES:
        findings.add(f"attribute packet_types of /packets: unexpected text {str(found)[:80]!r}")
    texts = file.texts()
    named = (texts.get("asic_version") or [""])[0]
    for group, expected in (("_header", named), ("configs", layout.configs_name(named))):
        if (found := file.attribute(group, "asic_version")) != expected:
            findings.add(f"attribute asic_version of /{group}: expected {expected!r}, found {str(found)[:40]!r}")
    if file.table("configs", 0, 0).dtype != layout.configs_dtype(named):
        findings.add(f"/configs: the columns are not those of ASIC version {named!r}")
    for name, (dtype, _) in layout.TABLES.items():
        if file.table(name, 0, 0).dtype != dtype:
            findings.add(f"/{name}: unexpected columns")


def check_seal(file: DataFile, info: dict[str, Any], findings: Findings) -> None:
    """Every table against the checksum that was taken at the close, and the totals against what is there."""
    sums = {bytes(row["name"]).decode("utf-8", "replace"): row for row in file.table("run/checksums")}
    for name in layout.CHECKED:
        row = sums.get(name)
        if row is None and name in layout.LATER and not file.length(name):
            continue
        if row is None:
            findings.add(f"/run/checksums has no line for {name}")
            continue
        found = file.length(name), file.crc32(name)
        if found != (int(row["rows"]), int(row["crc32"])):
            findings.add(
                f"/{name}: expected {row['rows']} rows with CRC-32 {row['crc32']:08x},"
                f" found {found[0]} with {found[1]:08x}"
            )
    if info["rows"] != file.rows:
        findings.add(f"/run/info says {info['rows']} rows, /packets has {file.rows}")
    if info["blocks"] != file.length("run/blocks"):
        findings.add(f"/run/info says {info['blocks']} blocks, /run/blocks has {file.length('run/blocks')}")
    messages = file.table("messages")["index"]
    if not np.array_equal(messages, np.arange(len(messages))):
        findings.add("/messages: the column index is not the index of the row")


def _foreign(file: DataFile, findings: Findings, notes: list[str]) -> int:
    parity = ParityCheck(file)
    checked = "structure and parity were checked"
    if parity.unchecked_reason:
        checked = f"structure was checked, parity was not: {parity.unchecked_reason}"
    notes.append(f"no ledger: the file was not written by larpix-daq; only {checked}")
    packets = 0
    column = schema.type_column(file.dtype)
    for first in range(0, file.rows, 4 * schema.CHUNK_ROWS):
        rows = file.packets(first, first + 4 * schema.CHUNK_ROWS)
        packets += int(np.count_nonzero(rows[column] <= schema.PacketType.CONFIG_READ))
        if odd := int(np.count_nonzero(rows[column] > schema.PacketType.TRIGGER)):
            findings.add(f"/packets, rows from {first}: {odd} with an unknown packet type")
        parity.add(rows, first)
    parity.close(findings.add, notes.append)
    return packets
