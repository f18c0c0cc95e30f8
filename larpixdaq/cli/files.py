"""`larpixdaq verify` and `larpixdaq info`: what a file is worth, and what is in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from larpixdaq.control.space import size
from larpixdaq.control.words import utc
from larpixdaq.errors import LarpixDaqError
from larpixdaq.files import info as file_info
from larpixdaq.files import verify as file_verify


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check files: structure, ledger, sequence, parity, checksums",
        description="Checks each file: structure, ledger equations, sequence of the blocks, parity, checksums. "
        "Exit status 1, with the reasons, when anything is wrong.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=verify)
    parser = commands.add_parser("info", help="what is in a file", description="Shows what is in a file.")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=info)


def verify(options: argparse.Namespace) -> int:
    console = Console(quiet=options.json, highlight=False, soft_wrap=True)
    outcomes: dict[str, Any] = {}
    for path in options.files:
        try:
            report = file_verify.verify(path)
            outcomes[str(path)] = {
                "ok": report.ok,
                "rows": report.rows,
                "findings": report.findings,
                "notes": report.notes,
            }
        except LarpixDaqError as error:
            outcomes[str(path)] = {"ok": False, "rows": 0, "findings": [str(error)], "notes": []}
    for name, outcome in outcomes.items():
        console.print(f"{name}: {'good' if outcome['ok'] else 'BAD'}, {outcome['rows']} rows")
        for line in outcome["findings"] + outcome["notes"]:
            console.print(f"  {line}")
    ok = all(outcome["ok"] for outcome in outcomes.values())
    if options.json:
        print(json.dumps({"ok": ok, "files": outcomes}))
    return 0 if ok else 1


def info(options: argparse.Namespace) -> int:
    facts = file_info.info(options.file)
    if options.json:
        print(json.dumps(facts))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for name, text in _in_words(facts):
        console.print(escape(f"{name:<16} {text}".rstrip()))
    return 0


def _in_words(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What info() found, for people: (name, text), further lines of one name under an empty name."""
    rows, stored = facts["rows"], facts["stored_bytes"]
    yield "file", f"{facts['path']}, {size(facts['bytes'])}"
    yield "layout", f"LArPix+HDF5 {facts['version']}"
    per_row = f", {stored / rows:.1f} bytes a row instead of {facts['row_bytes']}" if rows else ""
    yield "rows", f"{rows}{per_row}"
    if not facts["own"]:
        yield "created", facts["created"]
        yield "modified", facts["modified"]
        yield "written by", "another program: no run, no ledger"
        return
    texts = dict(facts["texts"])
    kind = texts.pop("kind", "")
    yield "run", f"{facts['run']}{f' ({kind})' if kind else ''}, part {facts['part']}"
    yield "condition", facts["condition"]
    yield from _listed("", facts["reasons"])
    yield "started", facts["started"]
    yield "closed", facts["closed"] or "not yet"
    for name in ("comment", "operator"):
        if value := texts.pop(name, ""):
            yield name, value
    if totals := _without_zeros(facts["totals"]):
        yield "totals", totals
    yield from _listed("ledger", [_without_zeros(line) for line in facts["ledger"]])
    yield from _listed("before us", [_verdict(line) for line in facts["verdicts"]])
    gaps = facts["gaps"]
    if gaps["number"]:
        yield "gaps", f"{gaps['rows']} rows dropped in {gaps['number']} gaps"
    missing, twice = facts["missing_blocks"], facts["duplicate_blocks"]
    yield "blocks", f"{facts['blocks']}, {missing} missing, {twice} came twice"
    if facts["unknown_words_kept"]:
        yield "unknown words", f"{facts['unknown_words_kept']} kept in /ledger/unknown"
    yield from _listed("producers", facts["producers"])
    yield from _listed("messages", facts["messages"])
    yield from ((name, value) for name, value in texts.items() if value and name != "layout")


def _listed(name: str, entries: list[str]) -> Iterator[tuple[str, str]]:
    for place, entry in enumerate(entries):
        yield "" if place else name, entry


def _verdict(line: dict[str, Any]) -> str:
    """What became of an io_group's data on their way to us."""
    text = f"{line['producer']}, io_group {line['io_group']}: {line['verdict']}"
    if not line["why"]:
        return text
    lost = f", at least {line['lost']} packets" if line["lost"] else ""
    return f"{text}: {line['why']} ({utc(line['first_ns'] / 1e9)} to {utc(line['last_ns'] / 1e9)}{lost})"


def _without_zeros(counts: dict[str, Any]) -> str:
    """Counts in words: where, then what is not zero."""
    where = ""
    if "io_group" in counts:
        where = f"{counts['producer']}, io_group {counts['io_group']}, {counts['how']}: "
    numbers = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in counts.items()
        if value and name not in ("producer", "epoch", "io_group", "how")
    ]
    return where + ", ".join(numbers)
