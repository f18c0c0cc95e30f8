"""`larpixdaq verify`, `recover` and `info`: what files are worth, how to finish them, and what is in them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from larpixdaq import config
from larpixdaq.errors import FileLocked, LarpixDaqError, printable
from larpixdaq.hdf5 import names
from larpixdaq.hdf5 import recovery as file_recover
from larpixdaq.hdf5 import run_report as file_info
from larpixdaq.hdf5 import verify as verification
from larpixdaq.runtime.file_access import add_lock_dir_argument, lock_directory
from larpixdaq.runtime.units import size, utc


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check files and runs: structure, ledger, sequence, parity, checksums",
        description="Checks each file: structure, ledger equations, sequence of the blocks, parity, checksums. And "
        "each run: over all its parts in a directory, or those that are given. Exit status 1, with the reasons, when "
        "anything is wrong.",
    )
    parser.add_argument("paths", nargs="+", type=_path, metavar="PATH", help="a file, or a directory of runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=verify)
    parser = commands.add_parser(
        "recover",
        help="finish files whose storage died",
        description="Finishes each part (….h5.part) whose storage died: everything that it had acknowledged is in a "
        "finished file then. Parts that are being written are left alone. What cannot be read whole is kept beside the "
        "file, as NAME.damaged. Exit status 1 when anything could not be recovered. "
        "A storage does the same for its own parts when it starts.",
    )
    parser.add_argument("paths", nargs="+", type=_path, metavar="PATH", help="a part, its journal, or a directory")
    add_lock_dir_argument(parser)
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=recover)
    parser = commands.add_parser("info", help="what is in a file", description="Shows what is in a file.")
    parser.add_argument("file", type=_path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=info)


def _path(text: str) -> Path:
    if not text:  # an unset variable of a shell is not the current folder
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def verify(options: argparse.Namespace) -> int:
    console = Console(quiet=options.json, highlight=False, soft_wrap=True)
    outcome = verification.verify_all(options.paths)
    for report in outcome.files:
        _show(console, f"{report.path}: {'good' if report.ok else 'BAD'}, {report.rows} rows")
        for line in report.findings + report.notes:
            _show(console, f"  {line}")
    for run in outcome.runs:
        if len(run.files) > 1 or not verification.is_good(run):
            _show(console, f"run {run.run}: {run.condition}, {run.rows} rows in {len(run.files)} files")
            for line in run.reasons + run.notes:
                _show(console, f"  {line}")
    if options.json:
        print(json.dumps({"ok": outcome.ok, "files": _file_facts(outcome), "runs": _run_facts(outcome)}))
    return 0 if outcome.ok else 1


def _show(console: Console, line: str) -> None:
    """Print one line, which may hold texts of files."""
    console.print(escape(printable(line)))


def _file_facts(outcome: verification.FileOutcome) -> dict[str, Any]:
    names = ("ok", "rows", "findings", "notes")
    return {str(report.path): {name: getattr(report, name) for name in names} for report in outcome.files}


def _run_facts(outcome: verification.FileOutcome) -> list[dict[str, Any]]:
    return [
        {
            "run": run.run,
            "condition": run.condition,
            "rows": run.rows,
            "files": [str(path) for path in run.files],
            "reasons": run.reasons,
        }
        for run in outcome.runs
    ]


def recover(options: argparse.Namespace) -> int:
    console = Console(quiet=options.json, highlight=False, soft_wrap=True)
    lock_directory.use(options.lock_dir, options.state_dir)
    ok = True
    outcomes: dict[str, Any] = {}
    for path, searched in _parts(options.paths).items():
        facts: dict[str, Any] = {"ok": True, "file": None, "rows": 0, "condition": "", "reasons": [], "damaged": []}
        try:
            found = file_recover.recover(path)
            facts |= {"file": found.path and str(found.path), "rows": found.rows}
            facts |= {"condition": found.condition, "reasons": found.reasons}
            facts |= {"ok": not found.damaged, "damaged": found.damaged}
            text = found.text
        except FileLocked as error:  # in a directory, that is a storage at work
            facts["ok"], text = searched, f"skipped: {error}"
        except LarpixDaqError as error:
            facts["ok"], text = False, str(error)
        ok = ok and facts["ok"]
        outcomes[str(path)] = facts | {"text": text}
        _show(console, text)
    if options.json:
        print(json.dumps({"ok": ok, "parts": outcomes}))
    elif not outcomes:
        console.print("nothing to recover")
    return 0 if ok else 1


def _parts(paths: list[Path]) -> dict[Path, bool]:
    """The parts to recover; the value tells those that were found in a directory."""
    found: dict[Path, bool] = {}
    for path in paths:
        if path.is_dir():
            found = dict.fromkeys(names.unfinished_parts(path), True) | found
        else:
            found[path] = False
    return found


def info(options: argparse.Namespace) -> int:
    facts = file_info.file_info(options.file)
    if options.json:
        print(json.dumps(facts))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for name, text in _in_words(facts):
        _show(console, f"{name:<16} {text}".rstrip())
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
    if facts["begun"]:
        yield "begun", facts["begun"]
        yield "ended", facts["ended"] or "not in this part"
        yield "live", f"{facts['live_s']:.1f} s in this part"
    yield from _listed("connected", [_board(one) for one in facts["connected"]])
    for name in ("comment", "operator"):
        if value := texts.pop(name, ""):
            yield name, value
    if totals := _without_zeros(facts["totals"]):
        yield "totals", totals
    yield from _listed("ledger", [_without_zeros(line) for line in facts["ledger"]])
    yield from _listed("data quality", [_verdict(line) for line in facts["verdicts"]])
    gaps = facts["gaps"]
    if gaps["number"]:
        yield "gaps", f"{gaps['rows']} rows dropped in {gaps['number']} gaps"
    if (chips := facts["chips"])["number"]:
        yield "chips", "{number}, registers: {sent} sent, {read} read back, {different} different".format(**chips)
    missing, twice = facts["missing_blocks"], facts["duplicate_blocks"]
    yield "blocks", f"{facts['blocks']}, {missing} missing, {twice} duplicates"
    if facts["unknown_words_kept"]:
        yield "unknown words", f"{facts['unknown_words_kept']} kept in /ledger/unknown"
    yield from _listed("producers", facts["producers"])
    yield from _listed("INFO messages", facts["messages"])
    yield from ((name, value) for name, value in texts.items() if value and name != "layout")


def _board(one: dict[str, Any]) -> str:
    address = f" {one['address']}" if one["address"] else ""
    firmware = f", firmware {one['firmware']}" if one["firmware"] else ""
    return f"{one['producer']}, io_group {one['io_group']}: {one['kind']}{address}, read on {one['host']}{firmware}"


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
