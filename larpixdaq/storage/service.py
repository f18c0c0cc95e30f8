"""A storage: the files that it writes, the blocks that it acknowledges, and the actions that the core calls.

It has no sockets and no loop of its own: offline_storage.py has these.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from larpixdaq import schema
from larpixdaq.control.node import Call
from larpixdaq.errors import ChecksumError, FileError, LarpixDaqError, RequestError, StateError
from larpixdaq.hdf5 import names, tables
from larpixdaq.hdf5.run_report import SUPERSEDED, RunReport, positions, survey_run
from larpixdaq.hdf5.tables import RunInfo
from larpixdaq.protocol.packed_rows import PLAIN_ROWS, PackedRows
from larpixdaq.protocol.reports import Comment, StorageEnd, StorageReady, StorageStatus
from larpixdaq.protocol.stream import Block, BlockOrigin, ConnectedBoard, End, FromProducer, Position
from larpixdaq.storage import open_run
from larpixdaq.storage.finisher import Finisher
from larpixdaq.storage.limits import RESERVE, Limits, Space
from larpixdaq.storage.open_run import Ending, OpenRun, newest_part
from larpixdaq.storage.sidecar import NameTemplate
from larpixdaq.stream.publisher import WINDOW

log = logging.getLogger(__name__)
#: Seconds between the last END of a run that the core has not announced and the close of its part.
UNANNOUNCED_CLOSE = 1.0
#: Seconds between two checks that part and journal still have their names.
_NAMES: Final = 0.5
#: Maximum number of open parts of runs that the core has not announced; a producer's ring holds blocks of 63 runs.
MOST_UNANNOUNCED: Final = 64
#: Maximum number of runs whose metadata are kept for blocks that come after the close.
_REMEMBERED: Final = 16
#: Maximum seconds that end_run waits for the producers' END records; the core's own limit is 30 s.
END_LIMIT = 25.0
#: Maximum seconds that the verdict on a run waits for the recovery of its parts. After that it is the verdict on the
#: other parts, and the core asks again when all are there.
RECOVERY_LIMIT = 15.0


class Stream(Protocol):
    """The part of stream.Consumer that report_to() needs."""

    def acknowledge(self, origin: BlockOrigin, following: int) -> None: ...
    def resubscribe(self, *, send_rows: bool = False) -> None: ...


class StorageService:
    """Writes runs into files in `directory`, and acknowledges each block when its part or the journal holds it.

    The methods that take a Call are the storage's actions. Everything but positions() belongs to the process's loop.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        label: str,
        *,
        limits: Limits = Limits(),  # noqa: B008  a tuple of None
        on_close: Sequence[str] = (),
        fsync: bool = False,
        raw: bool = False,
        template: NameTemplate | None = None,
        threads: int = 1,
    ) -> None:
        """`label`: the storage's name in its files' names, empty for the first or only storage; `limits`: when a run
        continues in the next part; `fsync`, `threads`: as in RunFile; `on_close`, `raw`, `template`: command, raw file
        and second name of each finished file."""
        self.directory = directory
        self.name = name
        self.label = label
        self.duplicates = 0
        self.paused = ""  # the reason why nothing is written; empty: blocks are written
        self.space = Space(directory)
        self.finisher = Finisher(on_close, raw=raw, template=template)
        self._limits, self._fsync, self._threads = limits, fsync, threads
        self._runs: dict[int, OpenRun] = {}
        self._infos: dict[int, RunInfo] = {}
        self._cancelled: set[int] = set()
        self._written = 0  # bytes of the files of runs that were closed
        self._taken = 0  # rows that went into files
        self._size = self._growth = 0  # bytes of all files now (less when a part fails), and by which they have grown
        self._lock = threading.Lock()  # over _positions, which the stream's thread reads
        self._positions: dict[BlockOrigin, int] = {}
        self._unreported: dict[BlockOrigin, int] = {}  # positions that report_to() has not sent yet
        self._resend = self._resend_rows = False  # report_to() requests blocks again; with their rows, not in a ring
        self._requested: set[tuple[BlockOrigin, int]] = set()  # blocks of open runs whose rows were requested again
        self._runs_with_positions: set[int] = set()  # runs whose earlier files _positions counts
        self._mistrusted: dict[str, float] = {}  # producer -> until when (monotonic) its packed rows are unpacked
        self._refused_frames = False  # whether blocks were refused because too many runs were not announced
        self._asked: list[tuple[int, Call, float]] = []  # run, the call that awaits its verdict, limit (monotonic)

    # The loop

    def due(self) -> float | None:
        """Return the monotonic time at which work() must be called; None: not before a frame or a call comes."""
        if self.paused:
            return None
        return min((due for run in self._runs.values() if (due := run.due()) is not None), default=None)

    @property
    def calm(self) -> bool:
        """Whether blocks may come late: runs are open, none ends, and none is to be on the disk at once."""
        return bool(self._runs) and not self._fsync and all(run.ending is None for run in self._runs.values())

    def work(self) -> None:
        """Write and acknowledge blocks that have waited, close complete parts, and try failed writes again."""
        self._look_for_space()
        for run in list(self._runs.values()):
            self._work(run)
        self.finisher.retry()
        self._answer()
        self.finisher.busy = bool(self._runs)
        self.finisher.work()

    def close_parts(self) -> None:
        """Close all open parts, and answer all calls. report_to() has the last acknowledgements then."""
        for run in list(self._runs.values()):
            self._close(run, aborted=False)
        self._answer(at_once=True)

    def close(self) -> None:
        """Close all open parts, and wait until they have their final names."""
        self.close_parts()
        self.finisher.close()

    def supersede(self) -> None:
        """Close all parts as superseded, because another storage has this name and continues the runs in its files."""
        for run in self._runs.values():
            if run.file is None:
                continue
            number = run.info.run
            acknowledged = [
                (*origin[1:], following) for origin, following in self._positions.items() if origin.run == number
            ]
            try:
                run.file.set_text(SUPERSEDED, json.dumps(acknowledged))
            except FileError as error:
                log.error("run %d: %s", number, error)
                continue
            self._seal(run, aborted=False, continued=True)
        self._runs.clear()

    # The stream

    def report_to(self, stream: Stream) -> None:
        """Send new acknowledgements, and the request for blocks to be sent again.

        Call it after each receive() too, because no block may follow one that was not taken.
        """
        for origin, following in self._unreported.items():
            stream.acknowledge(origin, following)
        self._unreported.clear()
        if self._resend:
            stream.resubscribe(send_rows=self._resend_rows)
            self._resend = self._resend_rows = False

    def receive(
        self, producer: str, frame: FromProducer, payload: memoryview | None, packed: PackedRows | None = None
    ) -> None:
        """Write a producer's block, with its rows or packed rows, or end. What the disk refuses is requested again
        later."""
        if not isinstance(frame, Block | End):
            return
        if frame.run in self._cancelled:
            self._acknowledge(frame.origin, frame.following)
            return
        # Only work() ends a pause, because frames that come before that follow a gap.
        if self.paused or not self._look_for_space():
            return
        run = self._runs.get(frame.run) or self._unannounced(frame)
        if run is None:
            return
        if isinstance(frame, Block) and run.is_full(frame):
            self._rotate(run)
        if run.file is None:
            return
        try:
            if isinstance(frame, Block):
                layout = schema.layout(frame.layout)
                rows = None if payload is None else np.frombuffer(payload, layout.dtype)
                if packed is not None and self._mistrusts(producer):
                    rows, packed = packed.unpack(frame.rows, layout), None
                run.file.add(frame, rows, packed)
                run.unacknowledged += frame.rows * layout.dtype.itemsize
                self._taken += frame.rows
            else:
                run.file.end(frame)
                run.last_end = time.monotonic()
        except FileError as error:
            self._fail(run, error)
        except ChecksumError as error:
            assert isinstance(frame, Block)
            self._request_again(frame, error)
        except (LarpixDaqError, ValueError) as error:
            log.error("run %d, %s: %s", frame.run, producer, error)

    def _mistrusts(self, producer: str) -> bool:
        """Whether packed rows of a producer are unpacked before they are stored, because some were damaged."""
        until = self._mistrusted.get(producer)
        if until is None or time.monotonic() < until:
            return until is not None
        del self._mistrusted[producer]
        log.info("packed rows of %s are stored as they come again", producer)
        return False

    def _request_again(self, block: Block, error: ChecksumError) -> None:
        """Request a block again whose rows do not fit its CRC-32. If they do not fit again, the block is missing.

        The rows may have been overwritten in the producer's ring, so the request is for rows that are sent.
        """
        again = (block.origin, block.sequence) not in self._requested
        self._requested.add((block.origin, block.sequence))
        log.log(logging.WARNING if again else logging.ERROR, "%s%s", error, ": requested again" if again else "")
        if again:
            self._resend = self._resend_rows = True

    def _unannounced(self, frame: Block | End) -> OpenRun | None:
        """Open a part for a run that has none; None when the frame is stored already, or too many parts are open."""
        self._read_positions(frame.run)
        if self._positions.get(frame.origin, 0) >= frame.following:
            self.duplicates += 1
            self._acknowledge(frame.origin, self._positions[frame.origin])
            return None
        if sum(not run.announced for run in self._runs.values()) >= MOST_UNANNOUNCED:
            if not self._refused_frames:
                log.error(
                    "run %d: its blocks stay with %s: %d runs that the core has not announced are open already",
                    frame.run, frame.producer, MOST_UNANNOUNCED,
                )  # fmt: skip
            self._refused_frames = True
            return None
        info = self._infos.get(frame.run)
        if info is None:
            parts = names.files_of_storage(self.directory, self.label, frame.run)
            info = newest_part(parts, tables.read_run_info)
        if info is None:
            code = frame.layout if isinstance(frame, Block) else 2
            info = RunInfo(
                run=frame.run, kind="", comment="", operator="", started_ns=time.time_ns(), layout=schema.layout(code),
                asic_version="", storage=self.label,
            )  # fmt: skip
        log.warning("run %d has no open file here: its blocks go into a new one", frame.run)
        run = self._new(info, announced=False)
        try:
            run.open(self._positions)
        except FileError as error:
            self._fail(run, error)
        self._runs[frame.run] = run
        return run

    def _new(self, info: RunInfo, *, announced: bool) -> OpenRun:
        self._infos[info.run] = info
        while len(self._infos) > _REMEMBERED:
            del self._infos[next(iter(self._infos))]
        how: dict[str, Any] = {"limits": self._limits, "fsync": self._fsync, "threads": self._threads}
        return OpenRun(self.directory, info, announced=announced, **how)

    # Free space and failing disks

    def _look_for_space(self) -> bool:
        """Begin or end the pause, as the free space asks for; returns whether blocks are written."""
        if self.space.enough(paused=bool(self.paused)) == (not self.paused):
            return not self.paused
        if self.paused:
            self.paused = ""
            log.warning("%s has space again: writing resumes", self.directory)
            self._resend = True
        else:
            free = f"has {self.space.free() / 2**20:.0f} MiB left, {RESERVE >> 20} are reserved"
            self.paused = f"{self.directory}: {self.space.problem or free}"
            log.error("writing is paused: %s; the producers keep the data", self.paused)
        return not self.paused

    def _work(self, run: OpenRun) -> None:
        """Write and acknowledge a run's blocks that have waited, and close its part when it is complete."""
        if not self.paused:
            if run.file is None and time.monotonic() >= run.retry_at:
                self._reopen(run)
            if run.file is not None:
                try:
                    run.file.work(pressed=run.unacknowledged > WINDOW // 2)
                except FileError as error:
                    self._fail(run, error)
            self._acknowledge_durable(run)
            if run.is_full() or self._has_lost_its_name(run):
                self._rotate(run)
        if run.ending is not None:
            ended = all(self._reached(run, origin) > after for origin, after in run.ending.awaited)
            if ended or self.paused or time.monotonic() > run.ending.limit:
                self._close(run, aborted=run.ending.aborted)
        elif not run.announced and run.last_end is not None and time.monotonic() - run.last_end > UNANNOUNCED_CLOSE:
            self._close(run, aborted=False)

    def _reached(self, run: OpenRun, origin: BlockOrigin) -> int:
        """Return the next sequence of an origin, over all parts; an end counts as one."""
        return max(run.expects(origin), self._positions.get(origin, 0))

    def _fail(self, run: OpenRun, error: FileError) -> None:
        """Give up the open part, because the disk refuses. Acknowledged blocks are recovered; others are sent again."""
        self._acknowledge_durable(run)
        if run.file is not None and (producer := run.file.damaged_by):
            log.warning("packed rows of %s are unpacked before they are stored for %g s", producer, PLAIN_ROWS)
            self._mistrusted[producer] = time.monotonic() + PLAIN_ROWS
        broken = run.fail(error)
        if broken is not None:
            self.finisher.queue_recovery(broken)
        log.error("run %d: %s; trying to open the next file every %g s", run.info.run, error, open_run.RETRY_DELAY)

    def _reopen(self, run: OpenRun) -> None:
        try:
            run.open(self._positions)
        except FileError as error:
            run.fail(error)  # without a log line: _fail() wrote one
            return
        assert run.file is not None
        log.warning("run %d continues in %s", run.info.run, run.file.path.name)
        self._resend = True

    def _has_lost_its_name(self, run: OpenRun) -> bool:
        """Whether the open part or its journal was removed: acknowledged blocks would be lost with this process.

        The run then continues in the next part, and the removed part is written again when it is closed.
        """
        now = time.monotonic()
        if run.file is None or now < max(run.names_at, run.retry_at):
            return False
        run.names_at = now + _NAMES
        if run.file.in_place():
            return False
        log.error("run %d: %s or its journal was removed; it has been replaced", run.info.run, run.file.path)
        return True

    def _rotate(self, run: OpenRun) -> None:
        try:
            sealed = run.rotate()
        except FileError as error:
            if run.file is not None and run.file.failed:
                self._fail(run, error)
            else:
                log.error("run %d continues in its present file: %s", run.info.run, error)
            return
        self._acknowledge_all(run, sealed[0].durable)
        self.finisher.publish(*sealed)

    def _acknowledge_durable(self, run: OpenRun) -> None:
        if run.file is not None:
            self._acknowledge_all(run, run.file.durable)

    def _acknowledge_all(self, run: OpenRun, durable: dict[BlockOrigin, int]) -> None:
        for origin, following in durable.items():
            if run.acknowledged.get(origin) != following:
                run.acknowledged[origin] = following
                run.unacknowledged = 0
                self._acknowledge(origin, following)

    def _acknowledge(self, origin: BlockOrigin, following: int) -> None:
        with self._lock:
            following = self._positions[origin] = max(following, self._positions.get(origin, 0))
        self._unreported[origin] = following

    # Files of earlier processes

    def resume(self) -> None:
        """Read the positions of the runs that may continue, and queue unfinished parts for recovery by work().

        Positions come first, because a recovered part gets another name. Call it after the core has named the log,
        because problems with files are logged.
        """
        for run in self.finisher.adopt_unfinished_parts(self.directory, self.label):
            self._read_positions(run)

    def _read_positions(self, run: int) -> None:
        """Add the positions of a run's files, once per run, because old runs are rarely needed."""
        if run in self._runs_with_positions:
            return
        unreadable: list[str] = []
        for origin, following in positions(self.directory, run, unreadable, self.label).items():
            self._acknowledge(origin, following)
        for line in unreadable:
            log.warning("the content of this file is unknown: %s", line)
        self._runs_with_positions.add(run)

    def positions(self) -> list[Position]:
        """Return the position of each origin. May be called in any thread."""
        with self._lock:
            return [Position(*origin, following) for origin, following in self._positions.items()]

    def has_run(self, run: int) -> bool:
        """Whether this storage has prepared a run, or has files of it."""
        if run in self._runs or run in self._infos or run in self._cancelled:
            return True
        try:
            return bool(names.files_of_storage(self.directory, self.label, run))
        except FileError:
            return True  # rather a block too many

    def newest_run(self) -> int:
        """Return the newest run with files of this storage; 0 without any. May be called in any thread. FileError when
        the directory cannot be read."""
        return max((run for run, *_ in names.files_of_storage(self.directory, self.label)), default=0)

    # The end of a run

    def _seal(self, run: OpenRun, *, aborted: bool, continued: bool = False) -> None:
        try:
            sealed = run.seal(aborted=aborted, continued=continued)
        except FileError as error:
            self._fail(run, error)
            return
        if sealed is not None:
            self._acknowledge_all(run, sealed[0].durable)
            self.finisher.publish(*sealed)

    def _close(self, run: OpenRun, *, aborted: bool) -> None:
        """Close the run's part and forget the run. Its end_run is answered when all parts have their names."""
        ending, run.ending = run.ending, None
        self._seal(run, aborted=aborted)
        number = run.info.run
        del self._runs[number]
        self._requested = {block for block in self._requested if block[0].run != number}
        self._written += run.bytes
        if run.failure or self._refused_frames:
            self._refused_frames = False
            self._resend = True  # because the disk may work again, or an unannounced run may get a part
        if ending is not None:
            self._report(number, ending.call)

    # Actions of the core

    def _report(self, run: int, call: Call) -> None:
        """Queue the answer to a call, the verdict on a closed run, until its parts have their names."""
        self._asked.append((run, call, time.monotonic() + RECOVERY_LIMIT))

    def _answer(self, *, at_once: bool = False) -> None:
        """Judge the runs whose parts are recovered, and those that have waited to the limit as they are now."""
        if not self._asked:
            return  # each turn of the loop comes here
        recovering = {name.run for part in self.finisher.broken if (name := names.parse(part)) is not None}
        asked, self._asked = self._asked, []
        for run, call, limit in asked:
            if run in recovering and not at_once and time.monotonic() < limit:
                self._asked.append((run, call, limit))
            else:
                self._judge(run, call)

    def _judge(self, run: int, call: Call) -> None:
        """Answer with the verdict on all parts of a run, when the closed ones have their names."""

        def answer(found: RunReport | OSError) -> None:
            if isinstance(found, OSError):
                call.fail(str(found))
                return
            log.info("run %d: %d rows in %d files, %s", run, found.rows, len(found.files), found.condition)
            files = [str(path) for path in found.files]
            totals = list(found.totals)
            call.result(StorageEnd(files, found.condition, found.rows, found.stored, found.reasons, found.ends, totals))

        self.finisher.after(lambda: survey_run(self.directory, run, self.label), answer)

    def prepare_run(
        self, call: Call, run: int, kind: str, comment: str, operator: str, started_ns: int, layout: int,
        asic_version: str, producers: list[str], versions: dict[str, str],
        connected: Sequence[dict[str, Any]] = (), begun_ns: int = 0, stopped_ns: int = 0, shifter: str = "",
    ) -> Any:  # fmt: skip
        opened = self._runs.get(run)
        if opened is not None and opened.announced:
            raise StateError(f"{self.name}: run {run} is open already, as {_name_of(opened)}")
        info = RunInfo(
            run=run, kind=kind, comment=comment, operator=operator, started_ns=started_ns, layout=schema.layout(layout),
            asic_version=asic_version, storage=self.label, shifter=shifter,
            versions=versions | tables.VERSIONS, required_producers=tuple(producers),
            connected=_boards(connected), begun_ns=begun_ns,
        )  # fmt: skip
        if opened is None:
            self._read_positions(run)
            came_back = any(origin.run == run for origin in self._positions)
            opened = self._new(info, announced=True)
            try:
                opened.open(self._positions)
            except FileError as error:
                if not came_back:
                    opened.fail(error)
                    raise
                self._fail(opened, error)
            self._runs[run] = opened
            log.debug("run %d: opened %s", run, _name_of(opened))
        else:  # its blocks came first, because this process started during the run
            opened.announce(info)
            self._infos[run] = info
        opened.ended_ns = stopped_ns
        return StorageReady(_name_of(opened), self.space.free())

    def begin_run(self, call: Call, run: int, begun_ns: int = 0) -> Any:
        opened = self._runs.get(run)
        if opened is None:
            raise StateError(f"{self.name}: run {run} was not prepared here")
        try:
            opened.begin(begun_ns)
        except FileError as error:
            self._fail(opened, error)
        self._infos[run] = opened.info
        return {}

    def end_run(
        self, call: Call, run: int, how: str, producers: list[dict[str, Any]],
        connected: Sequence[dict[str, Any]] = (), stopped_ns: int = 0,
    ) -> Any:  # fmt: skip
        opened = self._runs.get(run)
        if opened is None:
            self.report_run(call, run)
            return
        if opened.ending is not None:  # an abort replaces an end that still waits
            opened.ending.call.fail(f"run {run} is ended anew ({how})", "state")
        opened.ended_ns = stopped_ns
        try:
            opened.connect(_boards(connected) or opened.info.connected)
        except FileError as error:
            self._fail(opened, error)
        # An epoch whose totals are unknown, because its producer died, has no END to wait for.
        awaited = [(BlockOrigin(run, p["name"], p["epoch"]), p["next"]) for p in producers if p["next"] is not None]
        opened.ending = Ending(call, awaited, how == "aborted", time.monotonic() + END_LIMIT)

    def report_run(self, call: Call, run: int) -> Any:
        """Answer with the verdict on the files of a run, as end_run does."""
        if run not in self._runs and not names.files_of_storage(self.directory, self.label, run):
            raise StateError(f"{self.name}: has no files of run {run}")
        self._report(run, call)

    def add_comments(self, call: Call, run: int, comments: Sequence[dict[str, Any]]) -> Any:
        """Write comments of the e-log on a run into its open part, and into the sidecars of its closed parts."""
        try:
            found = msgspec.convert(comments, list[Comment])
        except msgspec.ValidationError as error:
            raise RequestError(f"comments: {error}") from None
        opened = self._runs.get(run)
        if opened is not None:
            try:
                opened.comment(found)
            except FileError as error:
                self._fail(opened, error)  # the next part gets them

        def answer(sidecars: int | OSError) -> None:
            if isinstance(sidecars, OSError):
                call.fail(str(sidecars))
            else:
                call.result({"sidecars": sidecars})

        self.finisher.add_comments(self.directory, self.label, run, found, answer)

    def cancel_run(self, call: Call, run: int) -> Any:
        """Remove the file of a run that was cancelled before it began, and ignore its blocks from now on."""
        self._cancelled.add(run)
        opened = self._runs.pop(run, None)
        if opened is None:
            return {}
        try:
            if opened.rows:  # rows that came in READY are kept, as those of an aborted run
                self._seal(opened, aborted=True)
            else:
                opened.discard()
        except OSError as error:
            opened.fail(error)
            raise FileError(f"{_name_of(opened)} of cancelled run {run}: {error}") from None
        return {}

    def status(self) -> StorageStatus:
        opened = list(self._runs.values())
        free, failed = self.space.free(), self.finisher.failed
        open_bytes = sum(run.bytes for run in opened)
        before, self._size = self._size, self._written + open_bytes
        self._growth += max(0, self._size - before)
        self.space.add_sample(self._size)
        return StorageStatus(
            files=[run.file.path.name for run in opened if run.file is not None],
            rows=sum(run.rows for run in opened),
            bytes=open_bytes,
            free_bytes=free,
            bytes_per_second=self.space.bytes_per_second(),
            seconds_left=self.finisher.with_raw(self.space.seconds_left()),
            paused=self.paused or "; ".join(run.failure for run in opened if run.file is None),
            recovering=[part for part in self.finisher.broken if part not in failed],
            not_recovered=[*failed.values(), *self.finisher.damaged],
            total_rows=self._taken,
            total_bytes=self._growth,
            duplicates=self.duplicates,
            finished=list(self.finisher.finished),
            on_close="; ".join(filter(None, (self.finisher.raw_problem, self.finisher.problem))),
            on_close_failed=self.finisher.failures,
        )


def _boards(connected: Sequence[dict[str, Any]]) -> tuple[ConnectedBoard, ...]:
    try:
        return tuple(msgspec.convert(connected, list[ConnectedBoard]))
    except msgspec.ValidationError as error:
        raise RequestError(f"what the producers read: {error}") from None


def _name_of(run: OpenRun) -> str:
    """The path of the run's open part; empty when there is none."""
    return str(run.file.path) if run.file is not None else ""
