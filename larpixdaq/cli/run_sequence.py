"""Command `larpixdaq run`: one run, or a sequence of runs, with a progress line; the exit status is their worth."""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import shutil
import sys
import time
from functools import partial
from operator import itemgetter
from typing import Any, Final, TextIO

import msgspec

from larpixdaq import config
from larpixdaq.constants import PRODUCER, RUN_DATA, STOP, STORAGE, RunCondition
from larpixdaq.control.catalogue import MAX_COMMENT, MAX_KIND, MAX_SHIFTER
from larpixdaq.errors import (
    ControlHeld,
    LarpixDaqError,
    NoCore,
    RequestTimeout,
    StateError,
    UsageError,
    printable,
)
from larpixdaq.operator import Operator, Request
from larpixdaq.protocol.reports import MonitorStatus, ProducerStatus, StorageStatus
from larpixdaq.runtime.event_loop import Signals, Stopped
from larpixdaq.runtime.units import duration, parse_positive_duration, parse_text, parse_whole, size, utc

#: Maximum seconds until the core has answered, and of prepare_run and of begin_run.
_ANSWER_LIMIT: Final = 5.0
_STEP_LIMIT: Final = 40.0
#: Maximum seconds until a run has ended, also after a restart of the core.
_END_LIMIT: Final = 120.0
#: Seconds between two looks at the run, and between two lines of progress in a file.
_LOOK: Final = 1.0
_LINE: Final = 10.0
#: Minimum seconds from the failure of a run to the next one.
_AFTER_FAILURE: Final = 10.0
#: Seconds after a signal in which others are copies of it: `timeout` sends it twice.
_COPIES: Final = 1.0


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="take one run or a sequence of runs, and wait for the end",
        description="Takes control, and takes one run or several, one after the other: prepare, begin, wait, end. "
        "Ctrl-C (or SIGTERM) ends the run in progress properly, and the sequence; a second one aborts it. Exits with 0 "
        "only if every run was as long as wanted and is COMPLETE. A run that fails does not end the sequence.",
    )
    parser.add_argument(
        "--duration",
        type=parse_positive_duration,
        required=True,
        metavar="TIME",
        help="length of each run: 30s, 10min, 2h",
    )
    # The core has these limits, too. Here they are for a sequence, which would otherwise be refused run by run.
    comment, kind, name = (partial(parse_text, most=most) for most in (MAX_COMMENT, MAX_KIND, MAX_SHIFTER))
    parser.add_argument("--comment", type=comment, default="", metavar="TEXT", help="comment of each run")
    parser.add_argument("--kind", type=kind, default="", help="kind of each run (default physics, or test)")
    parser.add_argument(
        "--by", type=name, metavar="NAME", help="shifter of each run (default: the one of `larpixdaq shifter`)"
    )
    parser.add_argument(
        "--count", type=partial(parse_whole, high=1_000_000), default=1, metavar="N", help="number of runs (default 1)"
    )
    parser.add_argument(
        "--every",
        type=parse_positive_duration,
        metavar="TIME",
        help="from the begin of one run to the begin of the next (default: one after the other)",
    )
    parser.add_argument("--take-control", action="store_true", help="take control from the Operator that holds it")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a run instead of text, as of `Operator.run_info`"
    )
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    if options.every is not None and options.every < options.duration:
        raise UsageError(f"--every {duration(options.every)} is shorter than --duration {duration(options.duration)}")
    with Signals() as signals, Operator(options.core, insecure=options.insecure) as operator:
        sequence = RunSequence(operator, options, signals)
        sequence.take_control()
        complete = sequence.take()
    if signals.received and not complete:
        raise Stopped(signals.received[0][1])
    return 0 if complete else 1


class _Abort(Exception):
    """A second signal has come."""


class RunSequence:
    """Takes the runs that the options of the command ask for."""

    def __init__(self, operator: Operator, options: argparse.Namespace, signals: Signals) -> None:
        self._operator, self._options, self._signals = operator, options, signals
        self._progress = ProgressLine(sys.stderr)

    @property
    def _stopped(self) -> bool:
        return bool(self._signals.received)

    @property
    def _aborted(self) -> bool:
        received = self._signals.received
        return len(received) > 1 and received[-1][0] - received[0][0] > _COPIES

    def take_control(self) -> None:
        """Check that a run can be taken, and take control if that is wanted. StateError or ControlHeld if not."""
        status = self._operator.status().result(_ANSWER_LIMIT)
        if status["state"] != STOP or status["run"] is not None:
            number = status["run"]["run"] if status["run"] is not None else "?"
            raise StateError(f"run {number} is in progress ({status['state']}): it must end first")
        if self._options.take_control:
            self._operator.take_control().result(_ANSWER_LIMIT)
        elif (holder := status["control"]) is not None:
            text = f"control is held by {holder['by']} since {utc(holder['since'])}: --take-control takes it"
            raise ControlHeld(text, holder["by"], holder["since"])

    def take(self) -> bool:
        """Take all runs. Returns whether every one was as long as wanted and is COMPLETE."""
        options = self._options
        start = time.monotonic()
        good: list[bool] = []
        for index in range(options.count):
            if options.every is not None:
                self._wait(start + index * options.every)
            if self._stopped:
                break
            good.append(self._take_one())
            if not good[-1] and index + 1 < options.count:
                self._wait(time.monotonic() + _AFTER_FAILURE)
        if options.count > 1 and not options.json:
            print(f"{sum(good)} of {options.count} runs are COMPLETE and as long as wanted")
        return len(good) == options.count and all(good)

    def _wait(self, until: float) -> None:
        """Wait until this time (monotonic), or for a signal."""
        shown = False
        while not self._stopped and (left := until - time.monotonic()) > 0:
            if left > _LOOK and (self._progress.terminal or not shown):
                self._progress.show(f"next run at {utc(time.time() + left)}")
                shown = True
            select.select([self._signals], [], [], min(left, _LOOK))

    def _take_one(self) -> bool:
        """Take one run. Returns whether it was as long as wanted and is COMPLETE."""
        options, highest = self._options, self._highest_run()
        number: int | None = None
        try:
            number = self._step(self._operator.prepare_run(options.comment, options.kind, options.by))
            if not self._stopped:
                self._step(self._operator.begin_run())
        except LarpixDaqError as error:
            self._say(f"the run could not be taken: {error}")
            if number is None and isinstance(error, NoCore | RequestTimeout):
                number = self._find_own(highest)
            if number is None:
                return False
            self._finish(number)
            return False
        whole = self._watch(number)
        info = self._finish(number)
        if not whole:
            self._say(f"run {number} was ended before its {duration(options.duration)}")
        return whole and info is not None and info["condition"] == RunCondition.COMPLETE

    def _step(self, request: Request) -> int:
        """Wait for prepare_run or begin_run, and print its warnings. Returns the number of the run."""
        value = request.result(_STEP_LIMIT)
        for warning in value["warnings"]:
            self._say(f"WARNING: {warning}")
        return int(value["run"])

    def _highest_run(self) -> int:
        """Return the number of the newest run; 0 if it is not known."""
        status = self._status() or {}
        return max((run["run"] for run in (status.get("run"), status.get("last_run")) if run), default=0)

    def _find_own(self, highest: int) -> int | None:
        """Return the run that this command has prepared without hearing of it, because the core was away: the one in
        progress, if it is newer than `highest` and has the comment of this command."""
        limit = time.monotonic() + _STEP_LIMIT
        while time.monotonic() < limit and not self._aborted:
            if (status := self._status()) is not None:
                found = status["run"]
                own = found is not None and found["run"] > highest and found["comment"] == self._options.comment
                return int(found["run"]) if own else None
            time.sleep(_LOOK)
        return None

    def _status(self) -> dict[str, Any] | None:
        """Return the core's status; None if the core does not answer."""
        with contextlib.suppress(LarpixDaqError):
            found: dict[str, Any] = self._ask(self._operator.status())
            return found
        return None

    def _ask(self, request: Request, limit: float = _ANSWER_LIMIT) -> Any:
        """Wait for a result. An error that comes later, such as after a restart of the core, is not printed."""
        request.outcome.mark_seen()
        return request.result(limit)

    def _watch(self, number: int) -> bool:
        """Show the progress of the run that has just begun. Returns whether it goes on after the wanted duration: False
        after a signal, and when somebody has ended the run."""
        begun = time.monotonic()
        until = begun + self._options.duration
        numbers = RunNumbers(number)
        while (left := until - time.monotonic()) > 0:
            if self._stopped:
                return False
            select.select([self._signals], [], [], min(left, _LOOK))
            status = self._status()
            clock = f"run {number}: {_clock(time.monotonic() - begun)} of {_clock(self._options.duration)}"
            if status is None:
                self._progress.show(f"{clock}, NO CORE is heard; the components go on")
            elif status["run"] is None or status["run"]["run"] != number:
                if not status["busy"] and self._is_over(number):
                    return False
            else:
                self._progress.show(f"{clock}, {numbers.text(status)}")
        return not self._stopped

    def _is_over(self, number: int) -> bool:
        """Return whether the catalogue says that the run is over. A core that was just restarted first has to hear of
        the run by its components."""
        with contextlib.suppress(LarpixDaqError):
            return bool(self._ask(self._operator.run_info(number))["condition"] != RunCondition.RUNNING)
        return False

    def _finish(self, number: int) -> dict[str, Any] | None:
        """End the run, if it is still in progress, and print its outcome. Returns it; None if the run goes on.

        Whatever happens to the core meanwhile: what counts is whether the run is in progress.
        """
        limit = time.monotonic() + _END_LIMIT
        problem = "no core answers"
        aborting = False
        while time.monotonic() < limit:
            try:
                status = self._ask(self._operator.status())
                if status["run"] is None or status["run"]["run"] != number:
                    info: dict[str, Any] = self._ask(self._operator.run_info(number))
                    if info["condition"] != RunCondition.RUNNING:
                        self._show_outcome(info)
                        return info
                    problem = "the core was restarted, and no component says that it is in the run"
                    time.sleep(0.1)
                elif self._aborted and not aborting:
                    aborting = True
                    self._progress.show(f"run {number} is being aborted")
                    self._ask(self._operator.abort_run(), _END_LIMIT)
                elif not status["busy"]:
                    self._progress.show(f"run {number} is being ended")
                    self._await(self._operator.end_run(), limit)
                else:
                    time.sleep(0.1)
            except _Abort:
                continue
            except ControlHeld as error:
                problem = str(error)
                break
            except LarpixDaqError as error:
                problem = str(error)
                time.sleep(0.5)
        self._say(f"run {number} GOES ON and must be ended: {problem}")
        return None

    def _await(self, request: Request, limit: float) -> None:
        """Wait for a result until this time (monotonic). _Abort if a second signal comes before it."""
        while True:
            try:
                self._ask(request, 0.1)
                return
            except RequestTimeout:
                if time.monotonic() > limit:
                    raise
            if self._aborted:
                raise _Abort

    def _show_outcome(self, info: dict[str, Any]) -> None:
        self._progress.clear()
        if self._options.json:
            info.pop("live", None)
            print(json.dumps(info), flush=True)
            return
        stored = "number of rows stored not known" if info["stored"] is None else f"{info['stored']} rows stored"
        made = "" if info["rows"] == info["stored"] else f", {info['rows']} were made"
        if info["rows"] is None:
            made = ", number of rows made not known"
        begun, stopped = info["begun_ns"], info["stopped_ns"]
        length = f", {duration((stopped - begun) / 1e9)}" if begun and stopped else ""
        print(f"run {info['run']}: {info['condition']}{length}, {stored}{made}")
        for line in [*info["reasons"], *(f"file: {file}" for file in info["files"])]:
            print(f"  {printable(line)}")
        sys.stdout.flush()

    def _say(self, text: str) -> None:
        self._progress.clear()
        with contextlib.suppress(OSError, ValueError):
            print(printable(f"larpixdaq: {text}"), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Return a duration to the second: 0:07, 12:30, 3:20:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunNumbers:
    """The numbers of a run in progress as text, out of each status of the core.

    A component that was lost or restarted counts anew: then the numbers of its processes are added up, and the sum is
    marked as a lower bound.
    """

    def __init__(self, run: int) -> None:
        self._run = run
        #: (packets, dropped rows) of each process of a producer, and bytes of each process of a storage, as last seen.
        self._producers: dict[tuple[str, int], tuple[int, int]] = {}
        self._storages: dict[tuple[str, int], int] = {}

    def text(self, status: dict[str, Any]) -> str:
        """Return the numbers as `48 packets/s, 6021 packets, 0 rows lost, file 1.2 MB, 77 GB free`; problems first."""
        run = status["run"]
        alive = {component["name"]: component for component in status["components"] if component["alive"]}
        producers = self._statuses(alive, run["producers"], PRODUCER, ProducerStatus)
        storages = self._statuses(alive, run["storages"], STORAGE, StorageStatus)
        for key, producer in producers.items():
            if self._run in (producer.run, producer.counted_run):
                self._producers[key] = producer.packets, producer.dropped
        for key, storage in storages.items():
            self._storages[key] = storage.bytes
        parts = [f"MISSING: {', '.join(run['missing'])}"] if run["missing"] else []
        parts += [f"NOT WRITING: {storage.paused}" for storage in storages.values() if storage.paused]
        for producer in producers.values():
            parts += [f"io_group {group} is {word}" for group, word in producer.verdicts.items() if word != "complete"]
        parts.append(self._rate(alive))
        packets = self._sum(alive, run["producers"], {key: counts[0] for key, counts in self._producers.items()})
        dropped = self._sum(alive, run["producers"], {key: counts[1] for key, counts in self._producers.items()})
        parts.append("packets not known" if packets is None else f"{packets[0]}{packets[1]} packets")
        parts.append("rows lost not known" if dropped is None else f"{dropped[0]}{dropped[1]} rows lost")
        written = [n for name in run["storages"] if (n := self._sum(alive, [name], self._storages)) is not None]
        largest = max(written, key=itemgetter(1), default=None)
        parts.append("file size not known" if largest is None else f"file {largest[0]}{size(largest[1])}")
        parts.append(_disk(list(storages.values())))
        return ", ".join(parts)

    def _sum(
        self, alive: dict[str, Any], names: list[str], counts: dict[tuple[str, int], int]
    ) -> tuple[str, int] | None:
        """Add up counts over all processes of these components. Returns "at least " or "" and the sum; None if one of
        the components has said nothing."""
        processes = [name for name, _ in counts if name in names]
        if not names or not set(names) <= set(processes):
            return None
        exact = len(processes) == len(names) and set(names) <= alive.keys()
        return "" if exact else "at least ", sum(count for (name, _), count in counts.items() if name in names)

    def _statuses(
        self, alive: dict[str, Any], names: list[str], kind: str, form: type[Any]
    ) -> dict[tuple[str, int], Any]:
        """Return the readable statuses of these components, by name and process."""
        found = {}
        for name in names:
            component = alive.get(name)
            if component is not None and component["kind"] == kind:
                with contextlib.suppress(msgspec.ValidationError, TypeError, ValueError):
                    found[name, component["info"].get("pid", 0)] = msgspec.convert(component["status"], form)
        return found

    def _rate(self, alive: dict[str, Any]) -> str:
        monitors = [name for name, component in alive.items() if component["kind"] == RUN_DATA]
        for monitor in self._statuses(alive, monitors, RUN_DATA, MonitorStatus).values():
            if monitor.run == self._run:
                return f"{monitor.rate:.5g} packets/s"
        return "rate not known (no monitor)"


def _disk(storages: list[StorageStatus]) -> str:
    """Return the time until the first disk is full, or its free space while the files do not grow."""
    left = [storage.seconds_left for storage in storages if storage.seconds_left is not None]
    free = [storage.free_bytes for storage in storages if storage.free_bytes is not None]
    if left:
        return f"disk full in {duration(min(left))}"
    return f"{size(min(free))} free" if free else "free space not known"


class ProgressLine:
    """A line that is rewritten in place on a terminal; otherwise a line every _LINE seconds. Never fails, because the
    run matters more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.terminal = stream.isatty()
        self._shown = False
        self._due = 0.0

    def show(self, text: str) -> None:
        now = time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            if self.terminal:
                shown, width = printable(text), shutil.get_terminal_size().columns - 1
                if len(shown) > width:  # between two parts, because half a number is a wrong number
                    shown = f"{shown[: width - 2].rpartition(', ')[0]}, …"
                self._stream.write(f"\r{shown[:width]}\x1b[K")
                self._shown = True
            elif now >= self._due:
                self._due = now + _LINE
                self._stream.write(f"{printable(text)}\n")
            self._stream.flush()

    def clear(self) -> None:
        """Remove the line from the terminal, before another text. The next line of progress is due at once."""
        self._due = 0.0
        if self._shown:
            self._shown = False
            with contextlib.suppress(OSError, ValueError):
                self._stream.write("\r\x1b[K")
                self._stream.flush()
