"""What a storage does with the stream: which file a block goes into, what is acknowledged, when a file is closed."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from larpixdaq import schema
from larpixdaq.blocks import Block, End, FromProducer, Position, Source
from larpixdaq.control.calls import Call
from larpixdaq.errors import FileError, LarpixDaqError, StateError
from larpixdaq.files.names import next_part
from larpixdaq.files.positions import positions, unfinished
from larpixdaq.files.writer import Report, RunFile, RunInfo
from larpixdaq.stream.publisher import WINDOW

log = logging.getLogger(__name__)

#: A part of a run that the core has not announced is closed so long after its last END (seconds).
UNANNOUNCED_CLOSE = 1.0
#: end_run waits so long for the producers' END records; the core's own limit is 30 s.
END_LIMIT = 25.0
#: What the disk did not take is asked for again after so long (seconds): it may have room by then.
AGAIN = 5.0


class Stream(Protocol):
    """What is needed of stream.Consumer."""

    def acknowledge(self, source: Source, following: int) -> None: ...
    def again(self) -> None: ...


class OpenRun:
    """One run that this storage writes: its open part, and who is awaited to end."""

    def __init__(self, file: RunFile, announced: bool) -> None:
        self.file = file
        self.announced = announced
        self.failed = ""  # why nothing can be written any more
        self.acknowledged: dict[Source, int] = {}
        self.unacknowledged = 0  # bytes of rows since the last acknowledgement
        self.ending: tuple[Call, list[Source], str, float] | None = None
        self.last_end: float | None = None


class Storing:
    """The runs that a storage writes, in `directory`; a block is acknowledged when file or journal hold it.

    Used from the process's loop alone, but for where(). `stream` takes the acknowledgements, as soon as there is one.
    """

    def __init__(self, directory: Path, name: str, label: str) -> None:
        """`label` goes into the names of the files; empty for the first or only storage."""
        self.directory = directory
        self.name = name
        self.label = label
        self.duplicates = 0
        self.stream: Stream | None = None
        self._runs: dict[int, OpenRun] = {}
        self._cancelled: set[int] = set()
        self._refused: dict[int, float] = {}  # run -> when (monotonic) its blocks are asked for again
        self._lock = threading.Lock()  # over _positions, which the stream's thread reads
        self._positions: dict[Source, int] = {}
        self._known: set[int] = set()  # runs whose files of before are in there

    # the loop

    def due(self) -> float | None:
        """When work() has something to do (monotonic seconds); None: not before something comes."""
        return min(filter(None, (None if run.failed else run.file.due() for run in self._runs.values())), default=None)

    def work(self) -> None:
        """Write what has waited long enough, acknowledge, close what is complete, ask again for what was refused."""
        for run in list(self._runs.values()):
            self._work(run)
        self._ask_again()

    def close(self) -> None:
        """Close what is open; the verdict in the file says what it is worth."""
        for run in list(self._runs.values()):
            self._close(run, aborted=False)

    # the stream

    def receive(self, producer: str, frame: FromProducer, payload: memoryview | None) -> None:
        if not isinstance(frame, Block | End):
            return
        if frame.run in self._cancelled:
            self._acknowledge(frame.source, (frame.sequence if isinstance(frame, Block) else frame.next) + 1)
            return
        if frame.run in self._refused:
            return  # what the disk does not take is not acknowledged: the producer keeps it
        try:
            run = self._runs.get(frame.run) or self._unannounced(frame)
        except FileError as error:
            self._refuse(frame.run, str(error))
            return
        if run is None or run.failed:
            return
        try:
            if isinstance(frame, Block):
                assert payload is not None
                rows = np.frombuffer(payload, schema.layout(frame.layout).dtype)
                run.file.add(frame, rows)
                run.unacknowledged += payload.nbytes
            else:
                run.file.end(frame)
                run.last_end = time.monotonic()
        except FileError as error:
            self._fail(run, error)
        except (LarpixDaqError, ValueError) as error:
            log.error("run %d, %s: %s", frame.run, producer, error)

    def _unannounced(self, frame: Block | End) -> OpenRun | None:
        """Blocks of a run that we did not prepare: they go into a further part. FileError when there can be none."""
        self._look_up(frame.run)
        if self._positions.get(frame.source, 0) > (frame.sequence if isinstance(frame, Block) else frame.next):
            self.duplicates += 1
            self._acknowledge(frame.source, self._positions[frame.source])
            return None
        code = frame.layout if isinstance(frame, Block) else 2
        info = RunInfo(
            run=frame.run, kind="", comment="", operator="", started_ns=time.time_ns(), layout=schema.layout(code),
            asic_version="", storage=self.label,
        )  # fmt: skip
        log.warning("run %d has no open file here: its blocks go into a further part", frame.run)
        return self._open(info, announced=False)

    def _open(self, info: RunInfo, *, announced: bool) -> OpenRun:
        """The run's next part, which goes on where those before it ended."""
        self._look_up(info.run)
        file = RunFile(self.directory, info, next_part(self.directory, info.run, self.label), self.where())
        run = self._runs[info.run] = OpenRun(file, announced)
        return run

    def _work(self, run: OpenRun) -> None:
        """Make durable what has to be, acknowledge it, and close the file when all is there."""
        if not run.failed:
            try:
                run.file.work(pressed=run.unacknowledged > WINDOW // 2)
            except FileError as error:
                self._fail(run, error)
        self._acknowledge_durable(run)
        if run.ending is not None:
            _, awaited, how, limit = run.ending
            if run.failed or all(source in run.file.ended for source in awaited) or time.monotonic() > limit:
                self._close(run, aborted=how == "aborted")
        elif not run.announced and (run.failed or _past(run.last_end)):
            self._close(run, aborted=False)

    def _fail(self, run: OpenRun, error: FileError) -> None:
        """The disk refuses: nothing more is written to this file; what was acknowledged is in it and its journal."""
        run.failed = str(error)
        log.error("run %d: %s", run.file.info.run, error)

    def _refuse(self, run: int, why: str) -> None:
        log.error("run %d: %s; what the disk did not take is asked for again in %g s", run, why, AGAIN)
        self._refused[run] = time.monotonic() + AGAIN

    def _ask_again(self) -> None:
        """What was refused goes into a further part, as soon as the disk lets us."""
        now = time.monotonic()
        due = [run for run, when in self._refused.items() if now >= when]
        for run in due:
            del self._refused[run]
        if due and self.stream is not None:
            self.stream.again()

    def _acknowledge_durable(self, run: OpenRun) -> None:
        for source, following in run.file.durable.items():
            if run.acknowledged.get(source) != following:
                run.acknowledged[source] = following
                run.unacknowledged = 0
                self._acknowledge(source, following)

    def _acknowledge(self, source: Source, following: int) -> None:
        with self._lock:
            following = self._positions[source] = max(following, self._positions.get(source, 0))
        if self.stream is not None:
            self.stream.acknowledge(source, following)

    def resume(self) -> None:
        """Where the runs stand that may go on; what is wrong with their files goes to the log, so after connect()."""
        for run in unfinished(self.directory):
            self._look_up(run)

    def _look_up(self, run: int) -> None:
        """Take over where the files of a run stand, once: it may have been closed here long ago."""
        if run in self._known:
            return
        unreadable: list[str] = []
        for found in positions(self.directory, run, unreadable):
            self._acknowledge(Source(found.run, found.producer, found.epoch), found.next)
        for line in unreadable:
            log.warning("what this file holds is not known: %s", line)
        self._known.add(run)

    def where(self) -> list[Position]:
        with self._lock:
            return [Position(*source, following) for source, following in self._positions.items()]

    def _close(self, run: OpenRun, *, aborted: bool) -> None:
        ending, run.ending = run.ending, None
        del self._runs[run.file.info.run]
        try:
            if run.failed:
                raise FileError(run.failed)
            report = run.file.close(aborted=aborted)
            self._acknowledge_durable(run)
        except FileError as error:
            run.file.give_up()
            self._refuse(run.file.info.run, str(error))
            if ending is not None:
                ending[0].fail(str(error))
            return
        log.info("%s: %d rows, %s", report.path.name, report.rows, report.condition)
        if ending is not None:
            ending[0].result(_answer(report))

    # actions

    def prepare_run(
        self, call: Call, run: int, kind: str, comment: str, operator: str, started_ns: int, layout: int,
        asic_version: str, producers: list[dict[str, Any]], versions: dict[str, str],
    ) -> Any:  # fmt: skip
        opened = self._runs.get(run)
        if opened is not None and opened.announced:
            raise StateError(f"{self.name}: run {run} is open already, as {opened.file.path.name}")
        info = RunInfo(
            run=run, kind=kind, comment=comment, operator=operator, started_ns=started_ns, layout=schema.layout(layout),
            asic_version=asic_version, storage=self.label, versions=versions,
            required_producers=tuple(producer["name"] for producer in producers),
        )  # fmt: skip
        if opened is None:
            opened = self._open(info, announced=True)
        else:  # its blocks were here before the news of it: we have come back in the middle of it
            opened.file.announce(info)
            opened.announced = True
        return {"file": str(opened.file.path), "free_bytes": self.free()}

    def begin_run(self, call: Call, run: int) -> Any:
        if run not in self._runs:
            raise StateError(f"{self.name}: run {run} was not prepared here")
        return {}

    def end_run(self, call: Call, run: int, how: str, producers: list[dict[str, Any]]) -> Any:
        if run not in self._runs:
            raise StateError(f"{self.name}: run {run} has no open file here")
        # An epoch whose totals nobody knows (its producer died) has no END to wait for.
        opened = self._runs[run]
        if opened.ending is not None:  # an abort overtakes an end that still drains
            opened.ending[0].fail(f"run {run} is ended anew ({how})", "state")
        awaited = [Source(run, p["name"], p["epoch"]) for p in producers if p["next"] is not None]
        opened.ending = (call, awaited, how, time.monotonic() + END_LIMIT)

    def cancel_run(self, call: Call, run: int) -> Any:
        """The run was given up before it began: its file goes, its blocks are let pass."""
        self._cancelled.add(run)
        opened = self._runs.pop(run, None)
        if opened is None:
            return {}
        try:
            if opened.file.rows:  # data came in READY: they are kept, as those of an aborted run
                opened.file.close(aborted=True)
            else:
                opened.file.discard()
        except (FileError, OSError) as error:
            opened.file.give_up()
            raise FileError(f"{opened.file.path.name} of cancelled run {run}: {error}") from None
        return {}

    def status(self) -> dict[str, Any]:
        opened = list(self._runs.values())
        return {
            "files": [run.file.path.name for run in opened],
            "rows": sum(run.file.rows for run in opened),
            "bytes": sum(run.file.bytes for run in opened),
            "free_bytes": self.free(),
            "duplicates": self.duplicates,
        }

    def free(self) -> int:
        try:
            free = os.statvfs(self.directory)
        except OSError:  # the disk is away: no room is what that means
            return 0
        return free.f_bavail * free.f_frsize


def _past(last_end: float | None) -> bool:
    return last_end is not None and time.monotonic() - last_end > UNANNOUNCED_CLOSE


def _answer(report: Report) -> dict[str, Any]:
    return {
        "files": [str(report.path)],
        "condition": report.condition,
        "rows": report.rows,
        "stored": report.stored,
        "reasons": report.reasons,
    }
