"""Command `larpixdaq convert`: convert recordings of other programs and ages into files of the current layout."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from larpixdaq import config
from larpixdaq.cli.progress import ProgressLine, time_left
from larpixdaq.cli.system import plain_console
from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import FileError, printable
from larpixdaq.runtime.file_access import add_lock_dir_argument, lock_directory
from larpixdaq.runtime.units import parse_whole, size
from larpixdaq.schema import ASICS
from larpixdaq.storage.conversion import Options, Progress, Report, target_of
from larpixdaq.storage.convert import Job, convert_all, recordings_in


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert recordings of other programs and ages into files of the current layout",
        description="Converts raw files (rawhdf5), logs of PACMAN messages (u32 length + message) and packet files of "
        "any version into files of the current layout, NAME.converted.h5, each completely or not at all. What exists "
        "is never overwritten, and a recording that is converted already is not converted again, so that the same "
        "command goes on after an interruption. Exit status 1 when any recording could not be converted.",
    )
    parser.add_argument(
        "paths", nargs="+", type=_path, metavar="PATH", help="a recording, or a directory of them (*.h5, *.hdf5)"
    )
    parser.add_argument(
        "-o", "--output-dir", type=_path, metavar="DIR",
        help="directory of the new files (default: beside each recording)",
    )  # fmt: skip
    parser.add_argument(
        "--asic", choices=list(ASICS),
        help="generation of the chips, which messages do not tell (default: that of a packet file's columns, else 2; a "
        "recording that contradicts it is not converted)",
    )  # fmt: skip
    parser.add_argument(
        "--fifo-diagnostics", action="store_true",
        help="the fifo diagnostics mode of the chips was on (v2 chips; messages do not show it, packet files do)",
    )  # fmt: skip
    parser.add_argument(
        "--clock64", action="store_const", const=True, help="PACMAN firmware with 64-bit timestamps (DUNE timing)"
    )
    parser.add_argument(
        "--io-group", type=_io_group, default=1, metavar="N",
        help="io_group of recordings that have none, such as logs (default: %(default)d)",
    )  # fmt: skip
    parser.add_argument(
        "--damaged", action="store_true",
        help="convert damaged recordings as far as they can be read; the new file says what is missing, its condition "
        "is INCOMPLETE, and the exit status is 1",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="read each new file and check it, before it gets its name"
    )
    parser.add_argument(
        "-j", "--jobs", type=_jobs, metavar="N",
        help="recordings that are converted at the same time (default: the number of processors)",
    )  # fmt: skip
    add_lock_dir_argument(parser)
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=convert)


def _path(text: str) -> Path:
    if not text:  # an unset variable of a shell is not the current folder
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def _io_group(text: str) -> int:
    return parse_whole(text, 0, IO_GROUPS - 1)


def _jobs(text: str) -> int:
    return parse_whole(text, 1, 1024)


def convert(options: argparse.Namespace) -> int:
    console = plain_console(quiet=options.json)
    lock_directory.use(options.lock_dir, options.state_dir)
    if options.output_dir is not None and not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: there is no such directory")
    jobs, listed, refused = _jobs_of(options.paths, options.output_dir)
    cores = len(os.sched_getaffinity(0))
    processes = min(options.jobs or cores, len(jobs))
    how = Options(
        asic=options.asic,
        clock64=options.clock64,
        diagnostics=options.fifo_diagnostics,
        io_group=options.io_group,
        damaged=options.damaged,
        verify=options.verify,
        threads=max(1, min(4, cores // max(1, processes) - (processes == 1))),
        lock_dir=None if options.lock_dir is None else str(options.lock_dir),
        state_dir=options.state_dir,
    )
    shown = _ShownProgress(jobs)
    ok = not refused
    outcomes: dict[str, Any] = {}
    for source, text in refused.items():
        outcomes[source] = {"ok": False, "text": text}
        console.print(printable(text))
    with contextlib.closing(convert_all(jobs, how, processes, shown.take)) as reports:
        for report in reports:
            shown.finish(report)
            facts = msgspec.to_builtins(report)
            facts.pop("type")
            if report.skipped:
                report.ok = facts["ok"] = report.source in listed
            ok = ok and report.ok
            outcomes[facts.pop("source")] = facts
            shown.clear()
            console.print(printable(report.text))
    if options.json:
        print(json.dumps({"ok": ok, "files": outcomes}))
    elif not outcomes:
        console.print("no recording")
    return 0 if ok else 1


def _jobs_of(paths: list[Path], directory: Path | None) -> tuple[list[Job], set[str], dict[str, str]]:
    """Return what to convert; which of these were found in a directory, not named; and which would get the same new
    file as another recording, each with a line about it. FileError when a directory cannot be read.
    """
    sources: dict[Path, bool] = {}
    for path in paths:
        if path.is_dir():
            sources = dict.fromkeys(recordings_in(path), True) | sources
        else:
            sources[path] = False
    targets: dict[Path, Path] = {}
    jobs: list[Job] = []
    refused: dict[str, str] = {}
    for source in sources:
        target = target_of(source, directory)
        if (other := targets.setdefault(target, source)) is not source:
            refused[str(source)] = f"{source}: not converted, because {other} gets the name {target} too"
        else:
            jobs.append(Job(str(source), None if directory is None else str(directory)))
    return jobs, {str(source) for source, found in sources.items() if found}, refused


class _ShownProgress:
    """One line on stderr: bytes of all recordings so far, rate and time left."""

    def __init__(self, jobs: list[Job]) -> None:
        self._line = ProgressLine()
        self.clear = self._line.clear
        self._sizes = {job.source: _size(job.source) for job in jobs}
        self._fractions = dict.fromkeys(self._sizes, 0.0)
        self._words = dict.fromkeys(self._sizes, 0)
        self._found: set[str] = set()  # recordings that were converted already, or were refused: no work
        self._finished = 0
        self._began = time.monotonic()

    def take(self, job: Job, progress: Progress) -> None:
        self._fractions[job.source], self._words[job.source] = progress.fraction, progress.words
        self._line.show(self._text)

    def finish(self, report: Report) -> None:
        self._finished += 1
        self._fractions[report.source] = 1.0
        if report.made:
            self._words[report.source] = report.words
        else:
            self._found.add(report.source)

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        counted = [source for source in self._sizes if source not in self._found]
        total = sum(self._sizes[source] for source in counted)
        done = sum(self._sizes[source] * self._fractions[source] for source in counted)
        words = sum(self._words[source] for source in counted)
        return (
            f"{100 * done / max(1, total):.0f} % of {size(total)}, {self._finished} of {len(self._sizes)} recordings, "
            f"{size(done / seconds)}/s, {words / seconds / 1e6:.2f} M words/s"
            f"{time_left(seconds, done, total)}"
        )


def _size(source: str) -> int:
    try:
        return os.stat(source).st_size
    except OSError:
        return 0
