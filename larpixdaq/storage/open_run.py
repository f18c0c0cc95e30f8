"""One run that a storage writes, through all its parts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from larpixdaq.control.node import Call
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import names, tables
from larpixdaq.hdf5.tables import CarriedConfigurations, RunInfo
from larpixdaq.hdf5.writer import CloseReport, RunFile
from larpixdaq.protocol.reports import Comment
from larpixdaq.protocol.stream import Block, BlockOrigin, ConnectedBoard
from larpixdaq.storage.limits import Limits

_T = TypeVar("_T")
#: Seconds before a failed write, rotation or recovery is tried again.
RETRY_DELAY = 5.0


class Ending(NamedTuple):
    """An end_run that waits for END records, at most until `limit` (monotonic).

    `awaited`: each origin, and the sequence after its last block.
    """

    call: Call
    awaited: list[tuple[BlockOrigin, int]]
    aborted: bool
    limit: float


def newest_part(parts: Sequence[tuple[int, int, str, Path]], read: Callable[[Path], _T]) -> _T | None:
    """Read the newest of some parts, as names.files_of_storage() lists them, that can be read; None when none can."""
    for *_, path in reversed(parts):
        with contextlib.suppress(FileError):
            return read(path)
    return None


class OpenRun:
    """A run that a storage writes, and its open part.

    `file`: the part; None after the disk has failed, until the next part opens.
    """

    def __init__(
        self, directory: Path, info: RunInfo, *, announced: bool, limits: Limits, fsync: bool, threads: int
    ) -> None:
        self.directory = directory
        self.info = info
        self.announced = announced
        self.file: RunFile | None = None
        self.failure = ""
        self.retry_at = 0.0  # monotonic time before which no further part is tried
        self.names_at = 0.0  # monotonic time at which the names of part and journal are checked
        self.acknowledged: dict[BlockOrigin, int] = {}
        self.unacknowledged = 0  # bytes of rows since the last acknowledgement
        self.ending: Ending | None = None
        self.ended_ns = 0  # when RUN ended, unix ns; 0: not yet
        self.last_end: float | None = None
        self._comments: dict[int, Comment] = {}  # by id
        self._written_comments: set[int] = set()  # their ids
        self._limits, self._fsync, self._threads = limits, fsync, threads
        self._opened = 0.0
        self._before = (0, 0)  # rows and bytes of the parts that were closed

    @property
    def rows(self) -> int:
        """Rows that were taken since this run was opened here."""
        return self._before[0] + (self.file.rows if self.file is not None else 0)

    @property
    def bytes(self) -> int:
        """Bytes of the parts that were written since this run was opened here."""
        return self._before[1] + (self.file.bytes if self.file is not None else 0)

    def open(self, positions: Mapping[BlockOrigin, int]) -> None:
        """Open the next part, which begins at these positions. FileError when the disk refuses."""
        parts = names.files_of_storage(self.directory, self.info.storage, self.info.run)
        number = parts[-1][1] + 1 if parts else 0
        configurations = newest_part(parts, tables.configurations_of_part) or tables.NO_CONFIGURATIONS
        self.file = self._create(number, positions, configurations)
        self.failure = ""
        if parts:
            before = parts[-1][3].name.removesuffix(parts[-1][2]) + names.FINISHED
            self.file.set_text("previous part", before)
        self.comment()

    def _create(
        self, number: int, positions: Mapping[BlockOrigin, int], configurations: CarriedConfigurations
    ) -> RunFile:
        self._opened = time.monotonic()
        how: dict[str, Any] = {"fsync": self._fsync, "threads": self._threads, "configurations": configurations}
        return RunFile(self.directory, self.info, number, positions, **how)

    def announce(self, info: RunInfo) -> None:
        """Take over the core's metadata of a run whose blocks came first. FileError when the disk fails."""
        if self.file is not None:
            self.file.announce(info)
        self.info = info
        self.announced = True

    def begin(self, begun_ns: int) -> None:
        """Note when RUN began, unix ns. FileError when the disk fails."""
        self.info = self.info._replace(begun_ns=begun_ns)
        if self.file is not None:
            self.file.begin(begun_ns)

    def connect(self, connected: Iterable[ConnectedBoard]) -> None:
        """Note the boards that the producers read. FileError when the disk fails."""
        self.info = self.info._replace(connected=tuple(connected))
        if self.file is not None:
            self.file.set_sources(self.info.connected)

    def comment(self, comments: Iterable[Comment] = ()) -> None:
        """Write comments of the e-log, each once, into the open part; without one they wait for it. FileError when the
        disk fails."""
        self._comments |= {comment.id: comment for comment in comments}
        for number, comment in self._comments.items():
            if self.file is not None and number not in self._written_comments:
                self.file.add_comment(comment)
                self._written_comments.add(number)

    def expects(self, origin: BlockOrigin) -> int:
        """Return the next sequence of an origin in the open part; an end counts as one."""
        return self.file.next(origin) if self.file is not None else 0

    # Rotation

    def is_full(self, block: Block | None = None) -> bool:
        """Whether the part has reached a limit, or would exceed it with `block`."""
        file, limits = self.file, self._limits
        if file is None or not file.rows or time.monotonic() < self.retry_at:
            return False
        if limits.rows is not None and file.rows + (block.rows if block is not None else 0) > limits.rows:
            return True
        if limits.bytes is not None and file.bytes >= limits.bytes:
            return True
        return limits.seconds is not None and time.monotonic() - self._opened >= limits.seconds

    def due(self) -> float | None:
        """Return the monotonic time at which this run needs work() although no frame comes; None: never."""
        if self.file is None:
            return self.retry_at
        limit = self._limits.seconds
        rotates = None if limit is None or not self.file.rows else max(self._opened + limit, self.retry_at)
        return min((one for one in (self.file.due(), rotates) if one is not None), default=None)

    def rotate(self) -> tuple[RunFile, CloseReport]:
        """Continue in the next part; returns the previous one, sealed, and its report.

        The next part is made before this one is sealed. FileError when it cannot be made: then nothing has changed but
        `retry_at`; or when this part cannot be sealed: then `file` is still the part that failed.
        """
        old = self.file
        assert old is not None
        opened = self._opened
        following: RunFile | None = None
        try:
            following = self._create(old.part + 1, old.positions(), old.configurations())
            following.set_text("previous part", old.final.name)
            following.rotated_in_ns = time.time_ns()
            texts = {"next part": following.final.name}
            report = old.seal(continued=True, texts=texts, rotated_out_ns=following.rotated_in_ns)
        except FileError:
            if following is not None:
                following.give_up()
            self._opened, self.retry_at = opened, time.monotonic() + RETRY_DELAY
            raise
        self.file = following
        self._count(report)
        return old, report

    def _count(self, report: CloseReport) -> None:
        rows, size = self._before
        self._before = rows + report.rows, size + report.bytes

    # The end of a part

    def seal(self, **how: Any) -> tuple[RunFile, CloseReport] | None:
        """Close the part, if one is open; FileError when the disk fails."""
        file = self.file
        if file is None:
            return None
        report = file.seal(**how, ended_ns=self.ended_ns)
        self.file = None
        self._count(report)
        return file, report

    def fail(self, error: Exception) -> Path | None:
        """Give up the open part after an error of the disk; returns its path when it holds acknowledged blocks, which
        must be recovered."""
        file, self.file = self.file, None
        self.failure = str(error)
        self.retry_at = time.monotonic() + RETRY_DELAY
        self.last_end = None
        if file is None:
            return None
        file.give_up()
        return file.path if file.durable else None

    def discard(self) -> None:
        """Remove the open part, which holds no rows."""
        file, self.file = self.file, None
        if file is not None:
            with contextlib.suppress(FileNotFoundError):
                file.discard()
