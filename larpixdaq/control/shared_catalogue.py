"""The run catalogue of a core that another core may follow: a copy of what the next core needs is in a bucket.

The bucket has the highest run number, the newest runs and the comments on them. Every write names the revision that it
replaces, so that two cores never draw the same number, and a core that has lost its lease cannot change a run of the
next one. Audit, alarms, snapshots and attachments stay with the core where they were made.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from larpixdaq.constants import BEGINNING, PREPARING, RunCondition
from larpixdaq.control.catalogue import Catalogue, Run
from larpixdaq.errors import BrokerError, FileError, RequestError, RevisionConflict

_log = logging.getLogger("larpixdaq.core")
#: Keys of the highest numbers of a run and of a comment.
_HIGHEST: Final = "run.highest"
_LAST_COMMENT: Final = "comment.highest"
#: Number of the newest runs and comments in the bucket, and of those runs that a core reads when it becomes active.
_KEPT: Final = 1000
_READ: Final = 100
#: Number of attempts to take over from a core whose last writes are still on their way.
_ATTEMPTS: Final = 5
#: Maximum number of digits of a number in the bucket.
_MAX_DIGITS: Final = 10
#: Maximum seconds that the core waits for the bucket when it becomes active, later, and while an earlier write is owed.
_READ_LIMIT: Final = 5.0
_LIMIT: Final = 1.0
_OWED_LIMIT: Final = 0.1


class Bucket(Protocol):
    """The bucket, as stream.lease.Bucket has it. Raises BrokerError and RevisionConflict."""

    def get(self, keys: Sequence[str], limit: float = ...) -> list[Any]: ...

    def put(self, key: str, value: bytes, revision: int, limit: float = ...) -> int: ...

    def remove(self, key: str) -> None: ...


def _run_key(number: int) -> str:
    return f"run.{number}"


def _comment_key(number: int) -> str:
    return f"comment.{number}"


class SharedCatalogue(Catalogue):
    """The open catalogue of the active core. The constructor takes over what the bucket has and this catalogue has not.

    FileError if the bucket cannot be read, or if it has another run of the same number.
    """

    def __init__(self, directory: Path, bucket: Bucket) -> None:
        super().__init__(directory)
        self._bucket = bucket
        # At the beginning of each value, so that a write whose answer was lost is not taken for that of another core.
        self._writer = secrets.token_hex(8).encode()
        self._revisions: dict[str, int] = {}
        self._uncertain: dict[str, set[bytes]] = {}  # values that may have been written, by key
        self._owed: dict[int, Run] = {}  # runs of which the bucket lacks the last change
        self._problem = ""  # why the last write of a run has failed
        self._last_comment = 0
        try:
            for left in reversed(range(_ATTEMPTS)):
                try:
                    self._take_over()
                    break
                except RevisionConflict:  # a last write of the earlier core has come meanwhile
                    if not left:
                        raise
        except (BrokerError, RevisionConflict) as error:
            self.close()
            raise FileError(f"{self.path}: {error}") from None
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        """Read the newest runs, and write the last one again, so that an earlier core cannot write it any more."""
        highest, last_comment = self._read_number(_HIGHEST), self._read_number(_LAST_COMMENT)
        numbers = range(max(1, highest - _READ + 1), highest + 1)
        for number, value in zip(numbers, self._read(*map(_run_key, numbers)), strict=True):
            if value is not None:
                self._take_run(number, value)
        self._take_comments(last_comment)
        if highest > self.highest:  # drawn, but not saved
            self._write_highest(highest)
            self.highest = highest
        self._write(_HIGHEST, str(self.highest).encode())
        last = self.find()
        if last is not None:
            self._write(_run_key(last.run), self._encode(last))

    def _take_run(self, number: int, value: bytes) -> None:
        try:
            run = msgspec.json.decode(value, type=Run)
            if run.run != number:
                raise ValueError(f"expected run {number}, found {run.run}")
            known = self.find(number)
            if known != run and (known is None or known.prepared_ns == run.prepared_ns):
                super().save(run, new=known is None)
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            self.warnings.append(f"run {number} in the bucket: {error}")
            return
        if known is not None and known.prepared_ns != run.prepared_ns:
            raise FileError(
                f"{self.path}: run {number} is another run than that of the other core: give this core a --state-dir "
                "of its own"
            )

    def _take_comments(self, last: int) -> None:
        """Read the comments after the last one in this catalogue. Their numbers continue after `last`.

        Storages know comments by their numbers.
        """
        own = self._next_comment() - 1
        numbers = range(max(own, last - _KEPT) + 1, last + 1)
        for number, value in zip(numbers, self._read(*map(_comment_key, numbers)), strict=True):
            if value is None:
                continue
            try:
                self._insert_comment(number, msgspec.json.decode(value, type=tuple[int, int, str, str, str, str]))
            except (msgspec.MsgspecError, ValueError, OverflowError) as error:
                self.warnings.append(f"comment {number} in the bucket: {error}")
        self._last_comment = max(own, last)
        self._write(_LAST_COMMENT, str(self._last_comment).encode())

    def draw(self, highest: int) -> int:
        """Draw the number of a new run, above `highest` and all numbers of other cores. FileError if that fails."""
        number = highest + 1
        try:
            self._write(_HIGHEST, str(number).encode())
        except (BrokerError, RevisionConflict) as error:
            raise FileError(f"no run number: {error}") from None
        self._bucket.remove(_run_key(number - _KEPT))
        return number

    def save(self, run: Run, *, new: bool = False) -> None:
        """Write a run here and into the bucket. If the bucket fails, a run that has no data yet does not go on."""
        super().save(run, new=new)
        limit = _OWED_LIMIT if self._owed else _LIMIT
        self._owed[run.run] = run
        problem = self._pay(limit)
        if problem and run.phase in (PREPARING, BEGINNING) and run.condition == RunCondition.RUNNING:
            raise FileError(f"the run is not known to the other cores: {problem}")
        if problem and not self._problem:  # once, because it is tried again every second
            _log.error("run %d: %s", run.run, f"the other cores do not know its last step: {problem}")
        self._problem = problem

    def keep(self) -> bool:
        """As Catalogue.keep(). Writes also into the bucket what it lacks."""
        self._problem = self._pay(_OWED_LIMIT)
        return super().keep()

    def _pay(self, limit: float) -> str:
        """Write the owed runs, the newest first. Returns why that was not possible; "" if it was."""
        problem = ""
        for number in sorted(self._owed, reverse=True):
            try:
                self._write(_run_key(number), self._encode(self._owed[number]), limit)
                del self._owed[number]
            except RevisionConflict as error:
                problem = str(error)
                if number < self.highest:  # an old run, of which this core has not read the revision: tried again
                    try:
                        self._read(_run_key(number))
                    except BrokerError as away:
                        return str(away)
            except BrokerError as error:
                return str(error)
        return problem

    def _next_comment(self) -> int:
        return max(super()._next_comment(), self._last_comment + 1)

    def _share_comment(self, number: int, row: Sequence[Any]) -> None:
        try:
            self._write(_LAST_COMMENT, str(number).encode())  # first, because a core without the lease fails here
            self._write(_comment_key(number), json.dumps(row).encode())
        except (BrokerError, RevisionConflict) as error:
            raise RequestError(f"comment: not written: {error}") from None
        self._last_comment = number
        self._bucket.remove(_comment_key(number - _KEPT))

    # The bucket.

    def _encode(self, run: Run) -> bytes:
        return msgspec.json.encode(run)

    def _read(self, *keys: str) -> list[bytes | None]:
        entries = self._bucket.get(keys, _READ_LIMIT)
        self._revisions |= {key: entry.revision for key, entry in zip(keys, entries, strict=True) if entry is not None}
        return [entry.value.partition(b" ")[2] if entry is not None else None for entry in entries]

    def _read_number(self, key: str) -> int:
        (value,) = self._read(key)
        if value is not None and not (value.isdigit() and len(value) <= _MAX_DIGITS):
            raise FileError(f"{key} in the bucket: expected a number, found {value[:40]!r}")
        return int(value or 0)

    def _write(self, key: str, value: bytes, limit: float = _LIMIT) -> None:
        """Replace the revision that this core has read or written last."""
        value = b"%b %b" % (self._writer, value)
        uncertain = self._uncertain.setdefault(key, set())
        try:
            try:
                revision = self._bucket.put(key, value, self._revisions.get(key, 0), limit)
            except RevisionConflict:
                # Perhaps by a write of this core whose answer was lost.
                (entry,) = self._bucket.get([key], limit)
                if entry is None or entry.value not in uncertain:
                    raise
                revision = self._bucket.put(key, value, entry.revision, limit)
        except BrokerError:
            uncertain.add(value)
            raise
        self._revisions[key] = revision
        del self._uncertain[key]
