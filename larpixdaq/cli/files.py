"""Commands `larpixdaq verify`, `recover`, `raw` and `info`: check files, finish parts, make raw files, show files."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.control.run_list import board_line, listed
from larpixdaq.errors import FileError, FileLocked, LarpixDaqError, printable
from larpixdaq.hdf5 import names, raw_file, recovery, run_report
from larpixdaq.hdf5 import verify as verification
from larpixdaq.hdf5.salvage import salvage
from larpixdaq.runtime.file_access import add_lock_dir_argument, lock_directory
from larpixdaq.runtime.units import size, utc
from larpixdaq.storage.sidecar import finish_raw


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check files and runs: structure, ledger, sequence, parity, checksums",
        description="Checks each file: structure, ledger equations, sequence of the blocks, parity, checksums. Checks "
        "each run, too, over all its parts in a directory, or over the given parts. Exit status 1, with the reasons, "
        "when anything is wrong.",
    )
    parser.add_argument("paths", nargs="+", type=_path, metavar="PATH", help="a file, or a directory of runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=verify)
    parser = commands.add_parser(
        "recover",
        help="finish files whose storage died",
        description="Makes a finished file of each part (….h5.part) whose storage died, with everything that the "
        "storage had acknowledged. Parts that are being written are left alone. Data that cannot be read whole are "
        "kept beside the file, as NAME.damaged. A storage does the same for its own parts when it starts. Of any other "
        "raw or packet file that was cut, damaged, or not closed by its writer, all that can be read is copied into a "
        "new file NAME.recovered.h5. Exit status 1 when anything could not be recovered.",
    )
    parser.add_argument(
        "paths", nargs="+", type=_path, metavar="PATH", help="a part, its journal, another file, or a directory"
    )
    parser.add_argument(
        "-o",
        "--output-dir",
        type=_path,
        metavar="DIR",
        help="directory for NAME.recovered.h5, which exists; no file is overwritten (default: that of the file)",
    )
    add_lock_dir_argument(parser)
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=recover)
    parser = commands.add_parser(
        "raw",
        help="make raw files of finished files",
        description="Makes a raw file (NAME.raw.h5) beside each finished file: its board messages, in the raw layout "
        "of larpix-control, with a sidecar file. Raw files that exist are kept. Exit status 1 when any could not be "
        "made. A storage with --raw does the same when it closes a file.",
    )
    parser.add_argument("paths", nargs="+", type=_path, metavar="PATH", help="a finished file, or a directory of runs")
    add_lock_dir_argument(parser)
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=raw)
    parser = commands.add_parser("info", help="what is in files", description="Shows what is in files.")
    parser.add_argument("files", nargs="+", type=_path, metavar="FILE")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text; of several files a list, `files`"
    )
    parser.set_defaults(function=info)


def _path(text: str) -> Path:
    if not text:  # an unset variable of a shell is not the current folder
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def verify(options: argparse.Namespace) -> int:
    console = plain_console(quiet=options.json)
    outcome = verification.verify_all(options.paths)
    for report in outcome.files:
        _show(console, f"{report.path}: {'good' if report.ok else 'BAD'}, {report.rows} {report.unit}")
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
    """Print one line, which may have texts of files, without control characters."""
    console.print(printable(line))


def _file_facts(outcome: verification.FileOutcome) -> dict[str, Any]:
    keys = ("ok", "rows", "findings", "notes")
    return {str(report.path): {key: getattr(report, key) for key in keys} for report in outcome.files}


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
    console = plain_console(quiet=options.json)
    lock_directory.use(options.lock_dir, options.state_dir)
    ok = True
    outcomes: dict[str, Any] = {}
    for path, in_directory in _parts(options.paths).items():
        facts: dict[str, Any] = {"ok": True, "file": None, "rows": 0, "condition": "", "reasons": [], "damaged": []}
        try:
            if not in_directory and not _is_part(path):
                found = salvage(path, options.output_dir)
                facts |= {"ok": not found.left_out, "file": found.new and str(found.new), "rows": found.rows}
                facts |= {"damaged": found.left_out, "text": found.text}
                ok = ok and not found.left_out
                outcomes[str(path)] = facts
                _show(console, found.text)
                continue
            result = recovery.recover(path)
            facts |= {"file": result.path and str(result.path), "rows": result.rows}
            facts |= {"condition": result.condition, "reasons": result.reasons}
            facts |= {"ok": not result.damaged, "damaged": result.damaged}
            text = result.text
        except FileLocked as error:  # no failure in a directory, where a storage may be writing a part
            facts["ok"], text = in_directory, f"skipped: {error}"
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
    """Return the parts to recover, and whether each is from a directory instead of the command line."""
    parts: dict[Path, bool] = {}
    for path in paths:
        if os.path.isdir(path):
            parts = dict.fromkeys(names.unfinished_parts(path), True) | parts
        else:
            parts[path] = False
    return parts


def _is_part(path: Path) -> bool:
    """Return whether a path has the name of a part, or of its journal."""
    name = names.parse(path.name)
    return name is not None and name.ending != names.FINISHED


def raw(options: argparse.Namespace) -> int:
    console = plain_console(quiet=options.json)
    lock_directory.use(options.lock_dir, options.state_dir)
    files: dict[Path, None] = {}
    for path in options.paths:
        found = names.run_files(path) if os.path.isdir(path) else [(0, "", path)]
        files |= {file: None for _, ending, file in found if not ending or names.is_packet_file(file.name)}
    ok = True
    outcomes: dict[str, Any] = {}
    for file in files:
        try:
            report = finish_raw(file)
        except LarpixDaqError as error:
            ok = False
            outcomes[str(file)] = {"ok": False, "text": str(error)}
            _show(console, str(error))
            continue
        facts = {"file": str(report.path), "messages": report.messages, "words": report.words, "bytes": report.bytes}
        text = f"{report.path}: {report.messages} messages with {report.words} words, {size(report.bytes)}"
        text += "" if report.made else ", was there already"
        outcomes[str(file)] = {"ok": True, **facts, "text": text}
        _show(console, text)
    if options.json:
        print(json.dumps({"ok": ok, "files": outcomes}))
    elif not outcomes:
        console.print("no finished file")
    return 0 if ok else 1


def info(options: argparse.Namespace) -> int:
    console = plain_console(quiet=options.json)
    found: list[dict[str, Any]] = []
    several, ok = len(options.files) > 1, True
    for path in options.files:
        try:
            facts = run_report.file_info(path) | {"raw": _raw_facts(path)}
        except FileError as error:
            if not several:
                raise
            ok = False
            found.append({"path": str(path), "error": str(error)})
            _show(console, str(error))
            continue
        found.append(facts)
        if several and len(found) > 1:
            console.print()
        for name, text in _info_lines(facts):
            _show(console, f"{name:<16} {text}".rstrip())
    if options.json:
        print(json.dumps({"ok": ok, "files": found} if several else found[0]))
    return 0 if ok else 1


def _raw_facts(packets: Path) -> dict[str, Any] | None:
    """Return the number of messages and words in the raw file of a packet file; None without a raw file."""
    path = raw_file.raw_path(packets)
    try:
        with raw_file.read_raw(path) as found:
            return {"file": path.name} | {name: int(found.ledger[name].sum()) for name in ("messages", "words")}
    except FileError:
        return None


def _info_lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts as name and text; further lines of a name have an empty name."""
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
    if facts["run"]:  # not known of most converted recordings
        yield "run", f"{facts['run']}{f' ({kind})' if kind else ''}, part {facts['part']}"
    yield "condition", facts["condition"]
    yield from listed("", facts["reasons"])
    if facts["started_ns"]:
        yield "started", facts["started"]
    yield "closed", facts["closed"] or "not yet"
    if facts["begun"]:
        yield "begun", facts["begun"]
        yield "ended", facts["ended"] or "not in this part"
        yield "live", f"{facts['live_s']:.1f} s in this part"
    yield from listed("connected", [board_line(board) for board in facts["connected"]])
    for name in ("comment", "operator", "shifter"):
        if value := texts.pop(name, ""):
            yield name, value
    yield from listed("e-log", [_comment_text(comment) for comment in facts["comments"]])
    if totals := _counts_text(facts["totals"]):
        yield "totals", totals
    yield from listed("ledger", [_counts_text(line) for line in facts["ledger"]])
    yield from listed("data quality", [_verdict_text(line) for line in facts["verdicts"]])
    gaps = facts["gaps"]
    if gaps["number"]:
        yield "gaps", f"{gaps['rows']} rows dropped in {gaps['number']} gaps"
    if (chips := facts["chips"])["number"]:
        yield "chips", "{number}, registers: {sent} sent, {read} read back, {different} different".format(**chips)
    yield "blocks", f"{facts['blocks']}, {facts['missing_blocks']} missing, {facts['duplicate_blocks']} duplicates"
    if facts["raw"]:
        yield "raw file", "{file}: {messages} messages with {words} words".format(**facts["raw"])
    if facts["unknown_words_kept"]:
        yield "unknown words", f"{facts['unknown_words_kept']} kept in /ledger/unknown"
    yield from listed("producers", facts["producers"])
    yield from listed("INFO messages", facts["messages"])
    yield from ((name, value) for name, value in texts.items() if value and name != "layout")


def _comment_text(comment: dict[str, Any]) -> str:
    shifter = f"{comment['by']}, " if comment["by"] else ""
    return f"{utc(comment['time_ns'] / 1e9)}, {shifter}{comment['operator']}: {comment['text']}"


def _verdict_text(line: dict[str, Any]) -> str:
    """Text of the verdict on the data of one io_group before they reached the producer."""
    text = f"{line['producer']}, io_group {line['io_group']}: {line['verdict']}"
    if not line["why"]:
        return text
    lost = f", at least {line['lost']} packets" if line["lost"] else ""
    return f"{text}: {line['why']} ({utc(line['first_ns'] / 1e9)} to {utc(line['last_ns'] / 1e9)}{lost})"


def _counts_text(counts: dict[str, Any]) -> str:
    """Text of counts: producer and io_group, then all counts that are not 0."""
    where = ""
    if "io_group" in counts:
        where = f"{counts['producer']}, io_group {counts['io_group']}, {counts['how']}: "
    numbers = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in counts.items()
        if value and name not in ("producer", "epoch", "io_group", "how")
    ]
    return where + ", ".join(numbers)
