"""What the core asks of a storage: to begin a run, to end it, and what became of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from larpixdaq import schema
from larpixdaq.blocks import ConnectedBoard, Source
from larpixdaq.control.calls import Call
from larpixdaq.errors import FileError, LarpixDaqError, RequestError, StateError
from larpixdaq.files import names, opening
from larpixdaq.files.runs import RunReport, survey
from larpixdaq.files.writer import RunInfo
from larpixdaq.storing.parts import Ending, OpenRun
from larpixdaq.storing.writing import Writing

log = logging.getLogger(__name__)

#: end_run waits so long for the producers' END records; the core's own limit is 30 s.
END_LIMIT = 25.0
#: So long (seconds) the verdict on a run waits for parts of it that are being recovered. Then it is that of the others,
#: and the core asks again when these are there.
RECOVERY_LIMIT = 15.0


class Storing(Writing):
    """Its methods that take a Call are the storage's actions."""

    def __init__(self, *where: Any, **how: Any) -> None:
        super().__init__(*where, **how)
        self._asked: list[tuple[int, Call, float]] = []  # run, who wants its verdict, until when that may wait

    def _ended(self, run: int, call: Call) -> None:
        self._asked.append((run, call, time.monotonic() + RECOVERY_LIMIT))

    def _answer(self, *, at_once: bool = False) -> None:
        """Judge runs whose parts are recovered; when that takes too long, as they are now."""
        if not self._asked:
            return  # this is looked at in each turn of the loop
        recovering = {name.run for part in self.finisher.broken if (name := names.parse(part)) is not None}
        asked, self._asked = self._asked, []
        for run, call, limit in asked:
            if run in recovering and not at_once and time.monotonic() < limit:
                self._asked.append((run, call, limit))
            else:
                self._judge(run, call)

    def _judge(self, run: int, call: Call) -> None:
        """By all its parts, when those that are closed have their names."""

        def answer(found: RunReport | LarpixDaqError) -> None:
            if isinstance(found, LarpixDaqError):
                call.fail(str(found))
                return
            log.info("run %d: %d rows in %d files, %s", run, found.rows, len(found.files), found.condition)
            call.result(
                {
                    "files": [str(path) for path in found.files],
                    "condition": found.condition,
                    "rows": found.rows,
                    "stored": found.stored,
                    "reasons": found.reasons,
                    "ends": found.ends,
                }
            )

        self.finisher.after(lambda: survey(self.directory, run, self.label), answer)

    def prepare_run(
        self, call: Call, run: int, kind: str, comment: str, operator: str, started_ns: int, layout: int,
        asic_version: str, producers: list[str], versions: dict[str, str],
        connected: Sequence[dict[str, Any]] = (), begun_ns: int = 0, stopped_ns: int = 0,
    ) -> Any:  # fmt: skip
        opened = self._runs.get(run)
        if opened is not None and opened.announced:
            raise StateError(f"{self.name}: run {run} is open already, as {_name_of(opened)}")
        info = RunInfo(
            run=run, kind=kind, comment=comment, operator=operator, started_ns=started_ns, layout=schema.layout(layout),
            asic_version=asic_version, storage=self.label,
            versions=versions | opening.VERSIONS, required_producers=tuple(producers),
            connected=_boards(connected), begun_ns=begun_ns,
        )  # fmt: skip
        if opened is None:
            self._look_up(run)
            came_back = any(source.run == run for source in self._positions)
            opened = self._new(info, announced=True)
            try:
                opened.open(self.where())
            except FileError as error:
                if not came_back:
                    opened.fail(error)
                    raise
                self._fail(opened, error)
            self._runs[run] = opened
        else:  # its blocks were here before the news of it: we have come back in the middle of it
            opened.announce(info)
            self._infos[run] = info
        opened.ended_ns = stopped_ns
        return {"file": _name_of(opened), "free_bytes": self.space.free()}

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
        if opened.ending is not None:  # an abort overtakes an end that still drains
            opened.ending.call.fail(f"run {run} is ended anew ({how})", "state")
        opened.ended_ns = stopped_ns
        try:
            opened.connect(_boards(connected) or opened.info.connected)
        except FileError as error:
            self._fail(opened, error)
        # An epoch whose totals nobody knows (its producer died) has no END to wait for.
        awaited = [(Source(run, p["name"], p["epoch"]), p["next"]) for p in producers if p["next"] is not None]
        opened.ending = Ending(call, awaited, how == "aborted", time.monotonic() + END_LIMIT)

    def report_run(self, call: Call, run: int) -> Any:
        """What the files of a run are worth, as the answer to end_run says it."""
        if run not in self._runs and not names.parts_of(self.directory, self.label, run):
            raise StateError(f"{self.name}: has no files of run {run}")
        self._ended(run, call)

    def cancel_run(self, call: Call, run: int) -> Any:
        """The run was given up before it began: its file goes, its blocks are let pass."""
        self._cancelled.add(run)
        opened = self._runs.pop(run, None)
        if opened is None:
            return {}
        try:
            if opened.rows:  # data came in READY: they are kept, as those of an aborted run
                self._seal(opened, aborted=True)
            else:
                opened.discard()
        except (FileError, OSError) as error:
            opened.fail(error)
            raise FileError(f"{_name_of(opened)} of cancelled run {run}: {error}") from None
        return {}

    def status(self) -> dict[str, Any]:
        opened = list(self._runs.values())
        free, failed = self.space.free(), self.finisher.failed
        self.space.grown(self._written + sum(run.bytes for run in opened))
        return {
            "files": [run.file.path.name for run in opened if run.file is not None],
            "rows": sum(run.rows for run in opened),
            "bytes": sum(run.bytes for run in opened),
            "free_bytes": free,
            "bytes_per_second": self.space.bytes_per_second(),
            "seconds_left": self.space.seconds_left(),
            "paused": self.paused or "; ".join(run.failure for run in opened if run.file is None),
            "recovering": [part for part in self.finisher.broken if part not in failed],
            "not_recovered": list(failed.values()),
            "duplicates": self.duplicates,
            "finished": list(self.finisher.finished),
            "on_close": self.finisher.trouble,
            "on_close_failed": self.finisher.failures,
        }


def _boards(connected: Sequence[dict[str, Any]]) -> tuple[ConnectedBoard, ...]:
    try:
        return tuple(msgspec.convert(connected, list[ConnectedBoard]))
    except msgspec.ValidationError as error:
        raise RequestError(f"what the producers read: {error}") from None


def _name_of(run: OpenRun) -> str:
    """The path of its open part; empty when there is none now."""
    return str(run.file.path) if run.file is not None else ""
