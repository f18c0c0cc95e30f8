"""Shared by the benchmarks: options, a system of processes, processor time, and results in documents."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/faults"))

from system import System, system

#: Maximum seconds for a step of a run, and to store the rest of the ring.
STEP = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


def argument_parser(description: str | None, *, json: bool = True) -> argparse.ArgumentParser:
    """Return a parser, with the option --json unless a benchmark prints only one kind of result."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


@contextlib.contextmanager
def temporary_system(directory: Path | None = None) -> Iterator[System]:
    """Give a system of processes a temporary folder, in `directory` if given."""
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=directory) as folder, system(Path(folder)) as line:
        yield line


def begin_run(line: System, *producer_options: str) -> Any:
    """Start the processes of a line and begin a run. Returns the Operator."""
    operator = line.start(*producer_options)
    operator.prepare_run(kind="bench").result(STEP)
    operator.begin_run().result(STEP)
    return operator


def processor_seconds(pid: int) -> float:
    """Return user and system time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def machine() -> str:
    """Return a description of this machine."""
    release = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} cores, {platform.machine()}, Linux {release}, Python {platform.python_version()}"


def with_source(text: str, command: str) -> str:
    """Return the text followed by command, date and machine."""
    return f"{text}\n\n`{command}`, {time.strftime('%Y-%m-%d', time.gmtime())}, {machine()}."


def update(document: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- NAME -->` and `<!-- end of NAME -->`. SystemExit when the document has no such marks."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, opening, rest = document.read_text().partition(begin)
    _, closing, after = rest.partition(end)
    if not (opening and closing):
        raise SystemExit(f"{document}: has no marks {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
