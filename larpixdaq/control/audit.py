"""The audit: who did what when, as rows in the run catalogue, which `larpixdaq audit` shows.

A thread writes the rows, so that no disk delays the core's loop. Refused attempts, of which there may be a flood, share
rows: at most one row a second for each kind of refusal at each process, and one a minute while they continue.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from larpixdaq.control.catalogue import AuditRow, append_audit
from larpixdaq.control.registry import Peer
from larpixdaq.keys.key_store import ANYONE, Member
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.timing import Throttle

_log = logging.getLogger("larpixdaq.core")
_Row = TypeVar("_Row")
#: Maximum number of rows that wait for the disk; more are lost and counted.
WAITING: Final = 2000
#: Maximum number of rows in one transaction.
_BATCH: Final = 500
#: Seconds between two attempts to write to a disk that refuses.
_RETRY: Final = 1.0
#: Rows that one key may write at once, and rows a second after that. Its further actions share a row.
_BURST: Final = 3000
_RATE: Final = 10
#: Seconds between two rows of one kind of refusal: at first, and at most.
_SHORTEST: Final = 1.0
_LONGEST: Final = 60.0
#: Maximum characters of a detail, and of other texts.
_MAX_DETAIL: Final = 2000
_MAX_TEXT: Final = 300
#: Maximum number of shared rows that are open, and of different names in one.
_MAX_SHARED: Final = 500
_MAX_NAMES: Final = 8
_CORE: Final = ("core", "core", "core")


def parameters(params: dict[str, Any]) -> str:
    """Return the parameters of an action as text: `name='trigger_rate', args=[1]`; long ones are cut."""
    return _cut(", ".join(f"{name}={value!r}" for name, value in params.items()), _MAX_DETAIL)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text)} characters)"


def _identity(member: Member) -> tuple[str, str]:
    """Key and role of a member; without keys, both are empty."""
    return ("", "") if member is ANYONE else (member.name, member.role)


@dataclass
class _Shared:
    """Attempts or actions that wait for their shared row. Times are time.monotonic()."""

    outcome: str
    count: int = 0
    detail: str = ""
    who: tuple[dict[str, None], ...] = field(default_factory=lambda: ({}, {}, {}))  # keys, roles, names
    due: float = 0.0
    interval: float = 0.0

    def add(self, who: tuple[str, str, str], detail: str, count: int) -> None:
        self.count += count
        self.detail = detail
        for known, text in zip(self.who, who, strict=True):
            if text and len(known) <= _MAX_NAMES:
                known[text] = None

    def take(self, action: str, component: str, now: float) -> AuditRow:
        """Return the row, and begin the next one."""
        grows = now - self.due < 2 * _LONGEST
        self.interval = min(2 * self.interval, _LONGEST) if grows and self.interval else _SHORTEST
        self.due = now + self.interval
        key, role, name = (
            ", ".join([*list(known)[:_MAX_NAMES], *(["others"] if len(known) > _MAX_NAMES else [])])
            for known in self.who
        )
        row = AuditRow(time.time_ns(), key, role, name, action, component, self.detail, self.outcome, self.count)
        self.count, self.detail, self.who = 0, "", ({}, {}, {})
        return row


class RowWriter(Generic[_Row]):
    """Queue of rows for a table of the catalogue. turn() passes them to a thread that writes them.

    No method but close() waits.
    """

    def __init__(self, table: str, append: Callable[[list[_Row]], None], lost: Callable[[int], _Row | None]) -> None:
        """`table`: its name, for the log. `append` writes rows, in the thread; FileError if it cannot. `lost` makes a
        row that says how many rows were lost."""
        self._table, self._append, self._lost_row = table, append, lost
        self._worker = Worker(table)
        self._waiting: deque[_Row] = deque()
        self._writing: list[_Row] = []
        self._retry_at = 0.0
        self._unreported = 0
        #: Rows lost since the start, and why the last attempt to write failed; "" if it did not.
        self.lost = 0
        self.error = ""

    def add(self, row: _Row) -> None:
        if len(self._waiting) + len(self._writing) >= WAITING:
            self.lost += 1
            self._unreported += 1
            return
        self._waiting.append(row)

    def submit(self, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do another job in the thread, as Worker.submit()."""
        self._worker.submit(do, then)

    def turn(self, now: float) -> None:
        """Take what the thread has done, and pass waiting rows to it. `now`: time.monotonic()."""
        self._worker.turn()
        if self._waiting and not self._writing and now >= self._retry_at:
            self._write()

    def _write(self) -> None:
        self._writing = rows = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        self._worker.submit(lambda: self._append(rows), self._written)

    def _written(self, result: OSError | None) -> None:
        if result is None:
            self._writing = []
            self.error = ""
            if self._unreported:
                count, self._unreported = self._unreported, 0
                if (row := self._lost_row(count)) is not None:
                    self._waiting.append(row)
            return
        self._waiting.extendleft(reversed(self._writing))
        self._writing = []
        self._retry_at = time.monotonic() + _RETRY
        if str(result) != self.error:
            self.error = str(result)
            _log.error("%s: %s; up to %d rows wait, further ones are lost", self._table, self.error, WAITING)

    def status(self) -> dict[str, Any]:
        """For `status`: {"lost": rows, "waiting": rows, "error": text}."""
        return {"lost": self.lost, "waiting": len(self._waiting) + len(self._writing), "error": self.error}

    def close(self, limit: float) -> None:
        """Write what waits, for at most `limit` seconds. Rows that could not be written are logged."""
        until = time.monotonic() + limit
        self._retry_at = 0.0
        self.turn(time.monotonic())
        while self._writing or (self._waiting and not self.error):
            if not self._worker.drain(until - time.monotonic()):
                break
            self.turn(time.monotonic())
        if waiting := len(self._waiting) + len(self._writing):
            _log.error(
                "%s: %d rows could not be written%s", self._table, waiting, f": {self.error}" if self.error else ""
            )
        self._worker.close(max(0.0, until - time.monotonic()))


class Audit:
    """Takes rows from the core's loop; turn() passes them to a thread that writes them. No method but close() waits."""

    def __init__(self, path: Path) -> None:
        """`path`: of the catalogue."""
        self._writer = RowWriter(
            "audit",
            lambda rows: append_audit(path, rows),
            lambda count: AuditRow(time.time_ns(), *_CORE, "rows lost", "", "", "failed", count),
        )
        self._shared: dict[tuple[str, str], _Shared] = {}  # by kind and component
        self._throttle = Throttle(_RATE, _BURST, shares=1000)

    @property
    def error(self) -> str:
        """Why the last attempt to write failed; "" if it did not."""
        return self._writer.error

    def note(self, peer: Peer | None, action: str, *, component: str = "", detail: str = "", outcome: str = "") -> None:
        """Add a row. `peer`: who did it; None: the core itself."""
        who = _CORE if peer is None else (*_identity(peer.member), peer.name)
        self._note(who, action, component, detail, outcome)

    def note_member(self, member: Member, action: str, *, detail: str = "", outcome: str = "") -> None:
        """Add a row of a key that is no peer yet."""
        self._note((*_identity(member), member.name), action, "", detail, outcome)

    def _note(self, who: tuple[str, str, str], action: str, component: str, detail: str, outcome: str) -> None:
        if who is not _CORE and not self._throttle.passes(f"{who[1]} {who[0]}", 1):
            self._share("further actions", "", "too many for a row each", who, f"{action} {outcome}", 1)
            return
        key, role, name, action, component, outcome = (
            _cut(text, _MAX_TEXT) for text in (*who, action, component, outcome)
        )
        detail = _cut(detail, _MAX_DETAIL)
        self._writer.add(AuditRow(time.time_ns(), key, role, name, action, component, detail, outcome))

    def refuse(
        self, kind: str, member: Member | None, name: str, detail: str, count: int = 1, *, component: str = ""
    ) -> None:
        """Add refused attempts of one kind. `member`: whose key it was; None: of nobody, or not known. `name`: as in
        AuditRow. `component`: the component that has refused them; "": the core."""
        key, role = _identity(member) if member is not None else ("", "")
        who = key, role, _cut(name, _MAX_TEXT)
        self._share(kind, _cut(component, _MAX_TEXT), "refused", who, _cut(detail, _MAX_TEXT), count)

    def _share(
        self, kind: str, component: str, outcome: str, who: tuple[str, str, str], detail: str, count: int
    ) -> None:
        if (kind, component) not in self._shared and len(self._shared) >= _MAX_SHARED:
            component = "others"
        self._shared.setdefault((kind, component), _Shared(outcome)).add(who, detail, count)

    def turn(self, now: float) -> None:
        """Pass waiting rows to the thread, and take what it has done. `now`: time.monotonic()."""
        for (kind, component), shared in self._shared.items():
            if shared.count and now >= shared.due:
                self._writer.add(shared.take(kind, component, now))
        self._writer.turn(now)

    def status(self) -> dict[str, Any]:
        """For `status`: {"lost": rows, "waiting": rows, "error": text}."""
        return self._writer.status()

    def close(self, limit: float) -> None:
        """Write what waits, for at most `limit` seconds. Rows that could not be written are logged."""
        for shared in self._shared.values():
            shared.due = 0.0
        self.turn(time.monotonic())
        self._writer.close(limit)
