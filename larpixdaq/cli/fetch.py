"""Command `larpixdaq fetch`: write the files of a past run from the streams at the brokers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import select
import time
from pathlib import Path
from typing import Any, Final, cast

from larpixdaq import config, schema
from larpixdaq.cli.system import plain_console
from larpixdaq.constants import LAST_RUN
from larpixdaq.control.node import Call
from larpixdaq.errors import BrokerError, FileError, FileLocked, UsageError, printable
from larpixdaq.hdf5.run_report import RunReport, survey_run
from larpixdaq.hdf5.verify import is_good
from larpixdaq.offline_storage import DEFAULT_NAME, default_threads
from larpixdaq.protocol.stream import Block, FromProducer
from larpixdaq.runtime.file_access import add_lock_dir_argument, lock_directory
from larpixdaq.runtime.units import parse_whole
from larpixdaq.storage.directory_lock import Lock
from larpixdaq.storage.service import StorageService
from larpixdaq.stream import jetstream
from larpixdaq.stream.downlink import Downlink, producers_of_run
from larpixdaq.version import VERSION

#: Seconds without a message after which the command gives up.
PATIENCE: Final = 30.0
#: Seconds between two looks at what was written.
_INTERVAL: Final = 0.05
#: Maximum frames between two such looks.
_FRAMES: Final = 64


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "fetch",
        help="write the files of a past run from the streams at the brokers",
        description="Writes the files of a run from the streams of its producers at the brokers, as an offline storage "
        "does, without core and producers. Data of the run that the directory has already are not written again, so "
        "that the same command goes on after an interruption. Exit status 1 when the run is not complete.",
    )
    parser.add_argument(
        "run", type=lambda text: parse_whole(text, 1, LAST_RUN), metavar="RUN", help="number of the run"
    )
    jetstream.add_arguments(parser, "from whose streams the data are read")
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory for the files (default: the current one)",
    )  # fmt: skip
    add_lock_dir_argument(parser)
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=fetch)


def fetch(options: argparse.Namespace) -> int:
    brokers = jetstream.brokers_of(options)
    if brokers is None:
        raise UsageError("fetch: expected --stream nats://HOST,..., the brokers that have the run")
    directory: Path = options.output_dir.absolute()
    if not directory.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    lock_directory.use(options.lock_dir, options.state_dir)
    with contextlib.ExitStack() as stack:
        lock = Lock(directory, "")
        if (busy := lock.take()) is not None:
            raise FileLocked(f"{directory}: another process writes files here ({busy} is locked)")
        stack.callback(lock.release)
        producers = asyncio.run(producers_of_run(brokers, "larpixdaq fetch", options.run))
        if not producers:
            raise BrokerError(f"run {options.run}: the brokers have no messages of it")
        found = survey_run(directory, options.run, "")
        if not (is_good(found) and {end.producer for end in found.ends}.issuperset(producers)):
            found = _write(options.run, producers, directory, brokers)
    _show(found, producers, as_json=options.json)
    return 0 if is_good(found) else 1


def _write(run: int, producers: list[str], directory: Path, brokers: jetstream.Brokers) -> RunReport:
    """Write what the brokers have of a run. BrokerError when they send no more."""
    downlink = Downlink("larpixdaq fetch", "run", brokers, run=run)
    service = StorageService(directory, DEFAULT_NAME, "", threads=default_threads())
    try:
        service.resume()
        downlink.connect(producers)
        heard, prepared = time.monotonic(), False
        while not downlink.is_complete:
            if not downlink.queued:
                select.select([downlink.fileno(), service.finisher.fileno()], [], [], _INTERVAL)
            for _ in range(_FRAMES):
                received = downlink.next()
                if received is None:
                    break
                heard = time.monotonic()
                if not prepared:
                    _prepare(service, run, producers, received[1])
                    prepared = True
                service.receive(*received)
                service.report_to(downlink)
            service.work()
            service.report_to(downlink)
            if service.paused:
                raise FileError(service.paused)
            if time.monotonic() > heard + PATIENCE:
                raise BrokerError(f"run {run}: no data for {PATIENCE:g} s{_because(downlink.problem)}")
    finally:
        downlink.close()
        service.close()
    return survey_run(directory, run, "")


def _because(problem: str) -> str:
    return f": {problem}" if problem else ""


def _prepare(service: StorageService, run: int, producers: list[str], first: FromProducer) -> None:
    """Open the run's file, with what its first frame says of it."""
    block = first if isinstance(first, Block) else None
    service.prepare_run(
        cast(Call, None),  # which is for later answers
        run,
        kind="",
        comment="",
        operator="",
        started_ns=time.time_ns() if block is None else block.first_ns,
        layout=schema.LAYOUTS[1].code if block is None else block.layout,
        asic_version="",
        producers=producers,
        versions={"larpix-daq": VERSION},
    )


def _show(found: RunReport, producers: list[str], *, as_json: bool) -> None:
    if as_json:
        facts = {
            "run": found.run, "condition": found.condition, "rows": found.rows, "producers": producers,
            "files": [str(path) for path in found.files], "reasons": found.reasons,
        }  # fmt: skip
        print(json.dumps(facts))
        return
    console = plain_console()
    console.print(printable(f"run {found.run}: {found.condition}, {found.rows} rows of {', '.join(producers)}"))
    for line in [*map(str, found.files), *found.reasons]:
        console.print(printable(f"  {line}"))
