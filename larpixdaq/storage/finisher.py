"""Finish parts: recovery where it is needed, final name, checksum, raw file, the command to run on each finished file,
and the check of chunks that came packed.

Each of the six has a thread of its own, so that none delays the stream: a recovery reads hundreds of millions of rows,
a disk syncs, a checksum reads gigabytes, a command hangs. The threads keep no state; the loop gets their results. A raw
file is made by `larpixdaq raw` in a process of low priority, which goes on when the storage ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from larpixdaq.errors import FileError, FileLocked
from larpixdaq.hdf5 import metadata, names
from larpixdaq.hdf5.layout import UNREAD
from larpixdaq.hdf5.raw_file import raw_path
from larpixdaq.hdf5.reader import DataFile, comments
from larpixdaq.hdf5.recovery import prepare, recover
from larpixdaq.hdf5.run_report import continuable_runs
from larpixdaq.hdf5.verify import damaged_chunks
from larpixdaq.hdf5.writer import CloseReport, RunFile
from larpixdaq.protocol.reports import Comment, FinishedFile
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.file_access import lock_directory
from larpixdaq.storage import open_run, sidecar
from larpixdaq.storage.sidecar import NameTemplate

log = logging.getLogger(__name__)
#: Closed files that `status` names.
SHOWN: Final = 16
#: Maximum seconds of a command for one file.
COMMAND_LIMIT: Final = 600.0
#: Maximum seconds for a raw file, of which 1 GB takes some seconds.
RAW_LIMIT: Final = 6 * 3600.0
#: Size of a raw file in units of its packet file, until the first one is made: that of messages with one word.
RAW_RATIO: Final = 4.0
#: Priority of the process that makes raw files (nice).
RAW_NICE: Final = 10
#: Seconds at the end of the process for commands, all together, before that for raw files, and for checksums.
LAST_COMMANDS: Final = 10.0
LAST_RAW: Final = 5.0
LAST_SUMS: Final = 5.0
#: Maximum seconds until the check of chunks notices the end of the process.
LAST_CHECK: Final = 1.0
#: Seconds for which the check of chunks rests after each second of work: while a run is written, and otherwise. So it
#: takes a tenth of a core, or half of one.
CHECK_REST: Final = (9.0, 1.0)


class _Published(NamedTuple):
    path: Path
    finished: FinishedFile  # for `status`; the checksum is added when it is known
    content: dict[str, Any]  # of the sidecar, without size and checksums
    unread: bool  # it has chunks that came packed, and were not unpacked


class Finisher:
    """Belongs to the process's loop: all methods are called there, and the threads' results are taken in by work().

    `command`: what to run on each finished file, whose path is appended; empty for nothing. `raw`: each finished file
    gets a raw file. `template`: of second names; None for no such names.
    """

    def __init__(self, command: Sequence[str] = (), *, raw: bool = False, template: NameTemplate | None = None) -> None:
        self.command = tuple(command)
        self.raw = raw
        self._template = template
        #: The last closed files, for `status`; newest last.
        self.finished: deque[FinishedFile] = deque(maxlen=SHOWN)
        #: Error of the last command, and of the last raw file, for `status`; empty when it succeeded.
        self.problem = ""
        self.raw_problem = ""
        #: Commands and raw files that have failed since the start, for `status`.
        self.failures = 0
        #: Bytes of the raw files that were made, and of the files from which they were made.
        self.raw_bytes = self.raw_from_bytes = 0
        #: Parts that were removed and could not be written anew until the end of the process.
        self.lost: list[Path] = []
        #: Whether a run is being written.
        self.busy = False
        self._unread: list[Path] = []  # closed files whose packed chunks are to be unpacked
        #: Damaged chunks of closed files, a line for each file, for `status`.
        self.damaged: list[str] = []
        self._publishing, self._summing, self._raws, self._commands, self._recovering, self._checking = workers = [
            Worker(f"storage: {what}")
            for what in ("final names", "checksums", "raw files", "commands", "recovery", "chunks")
        ]
        self._workers = {worker.fileno(): worker for worker in workers}
        self._ready = select.epoll()
        for descriptor in self._workers:
            self._ready.register(descriptor, select.EPOLLIN)
        self._broken: dict[Path, str] = {}  # parts that are not recovered yet -> reason of the last failure
        self._removed: dict[Path, RunFile] = {}  # broken parts whose names were removed
        #: By run, comments that came while a part of the run was not recovered, and so had no sidecar.
        self._comments: dict[int, list[Comment]] = {}
        self._attempts = 0  # recoveries that have not ended
        self._retry_at = 0.0  # monotonic time before which no part is tried again
        self._rawless: deque[Path] = deque()  # files whose raw file is not made yet
        self._left: deque[Path] = deque()  # files whose command has not ended
        self._running: subprocess.Popen[bytes] | None = None  # the command of the first of these files
        self._ending = False  # the process ends; the threads read this
        self._check_ends = threading.Event()  # likewise, for the check of chunks
        self._over = False  # no further command is started

    def fileno(self) -> int:
        """Polls readable while work() has something to do."""
        return self._ready.fileno()

    def with_raw(self, seconds: int | None) -> int | None:
        """Return the time until the disk is full, s, from the time without raw files."""
        if seconds is None or not self.raw:
            return seconds
        return int(seconds / (1 + (self.raw_bytes / self.raw_from_bytes if self.raw_bytes else RAW_RATIO)))

    @property
    def broken(self) -> list[str]:
        """The names of the parts that are being recovered, or wait for retry()."""
        return [part.name for part in self._broken]

    @property
    def failed(self) -> dict[str, str]:
        """Parts whose recovery has failed, and why; it is tried again."""
        return {part.name: why for part, why in self._broken.items() if why}

    def work(self) -> None:
        """Take the results of the threads."""
        for descriptor, _ in self._ready.poll(0):
            self._workers[descriptor].turn()

    def close(self) -> None:
        """Wait for all final names, 5 s for checksums, 5 s for raw files and 10 s for commands. Harmless when repeated.

        The next storage makes missing checksums and raw files of the newest run, and ends unfinished recoveries. The
        process that makes a raw file, and commands, continue by themselves.
        """
        if self._ending:
            return
        self._ending = True
        self._check_ends.set()
        self._recovering.drain(threading.TIMEOUT_MAX)
        self._publishing.drain(threading.TIMEOUT_MAX)
        for part in self._removed:
            self._recover(part)
        self._recovering.drain(threading.TIMEOUT_MAX)
        for part, file in self._removed.items():
            file.abandon()
            self.lost.append(part)
        if not self._summing.drain(LAST_SUMS):
            log.error("checksums are not ready after %g s: the next start makes those of the newest run", LAST_SUMS)
        self._raws.drain(LAST_RAW)
        for path in self._rawless:
            log.warning(
                "%s was not waited for: if it is not there later, the next start, or larpixdaq raw %s, makes it",
                raw_path(path).name, path,
            )  # fmt: skip
        self._commands.drain(LAST_COMMANDS)
        self._checking.drain(LAST_CHECK)
        for path in self._unread:
            log.warning("%s: not all of its packed chunks were unpacked: larpixdaq verify does it", path.name)
        self._over = True
        running = self._running
        for path in self._left:
            if running is not None:
                log.error("%s still runs for %s (process %d): not waited for", self.command[0], path.name, running.pid)
                running = None
            else:
                log.error("%s was not run for %s", self.command[0], path.name)
        self._ready.close()
        for worker in self._workers.values():
            worker.close(0.1)  # seconds; only a thread that hangs takes them

    # Final names

    def publish(self, file: RunFile, report: CloseReport) -> None:
        """Give a sealed part its final name; checksum and command follow by themselves."""
        part = file.path

        def done(found: _Published | OSError) -> None:
            if isinstance(found, OSError):
                log.error("%s", found)
                if file.is_unlinked:
                    self._removed[part] = file
                self._broken[part] = str(found)
            else:
                log.info("%s: %d rows, %s", found.path.name, report.rows, report.condition)
                self._finish(found)

        self._publishing.submit(lambda: self._describe(file.publish()), done)

    def after(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do `job` in a thread after all submitted parts have got their names, or failed to.

        `then` gets its value, or the OSError that it raised.
        """
        self._publishing.submit(job, then)

    # Recovery

    def adopt_unfinished_parts(self, directory: Path, storage: str) -> list[int]:
        """Queue the storage's unfinished parts for recovery, and write missing sidecars of runs that may go on.

        Returns the numbers of these runs. Sidecars of older runs are not checked, because there may be thousands. After
        this, positions can be read from the parts; retry() begins the recovery itself, which reads every row. FileError
        when the directory cannot be read; errors of files go to the log.
        """
        runs = continuable_runs(directory, storage)
        for path in names.unfinished_parts(directory, storage):
            try:
                found = prepare(path)
            except FileLocked as error:  # a recovery by hand, or a reader that looks whether the part is being written
                log.warning("%s", error)
                self.queue_recovery(path, str(error))
            except FileError as error:
                log.error("%s", error)
                self.queue_recovery(path, str(error))
            else:
                if found is None:
                    self.queue_recovery(path)
                else:
                    log.log(logging.ERROR if found.damaged else logging.WARNING, "%s", found.text)
        for run in runs:
            for _, _, ending, path in names.files_of_storage(directory, storage, run):
                if ending != names.FINISHED:
                    continue
                if not sidecar.exists(path):
                    self._publishing.submit(partial(self._describe, path), self._finish)
                elif self.raw and not (raw_path(path).exists() and sidecar.exists(raw_path(path))):
                    self._make_raw(path)
        return runs

    def queue_recovery(self, part: Path, why: str = "") -> None:
        """Queue an incomplete part for recovery by retry(). `why`: reason of the last failure, which was logged."""
        self._broken.setdefault(part, why)

    def retry(self) -> None:
        """Begin to recover the broken parts, unless a recovery still runs, or one ended a short time ago."""
        if self._broken and not self._attempts and time.monotonic() >= self._retry_at:
            for part in self._broken:
                self._recover(part)

    def _recover(self, part: Path) -> None:
        self._attempts += 1
        file = self._removed.get(part)

        def job() -> _Published | None:
            if file is not None:
                return self._describe(file.publish())
            try:
                found = recover(part, lambda: self._ending)
            except FileError:
                if part.exists():
                    raise
                return None  # it was recovered by hand, or removed
            log.log(logging.ERROR if found.damaged else logging.WARNING, "%s", found.text)
            return None if found.path is None else self._describe(found.path)

        def done(found: _Published | OSError | None) -> None:
            self._attempts -= 1
            self._retry_at = time.monotonic() + open_run.RETRY_DELAY
            if not isinstance(found, OSError):
                del self._broken[part]
                self._removed.pop(part, None)
                if found is not None:
                    self._finish(found)
            elif not isinstance(found, FileLocked) and str(found) != self._broken[part]:
                log.log(logging.WARNING if self._ending and file is None else logging.ERROR, "%s", found)
                self._broken[part] = str(found)

        self._recovering.submit(job, done)

    # Checksums

    def _finish(self, file: _Published | OSError) -> None:
        """Make the checksum of a file that has its final name, then run the command on it."""
        if isinstance(file, OSError):
            log.error("%s", file)
            return
        path, finished, content, unread = file
        self.finished.append(finished)
        content = content | {"comments": sidecar.merge(content["comments"], self._comments.get(finished.run, []))}

        def done(found: str | OSError) -> None:
            if isinstance(found, OSError):
                log.error("no checksum of %s: %s", path, found.strerror or found)
                return
            finished.sha256 = found
            self._queue_command(path)
            if self.raw:
                self._make_raw(path)

        self._summing.submit(lambda: sidecar.write(path, content), done)
        if unread:
            self._check(path)

    def _describe(self, path: Path) -> _Published:
        """Read a file's facts for status and sidecar after it got its final name, and give it its second name. Called
        in threads. FileError when the file cannot be read."""
        with DataFile(path) as file:
            info, texts = file.run_info(), file.texts()
        kind, storage = ((texts.get(name) or [""])[-1] for name in ("kind", "storage"))
        name = path.name
        if self._template is not None:
            try:
                name = sidecar.give_name(path, self._template.name(info, kind, storage), names.FINISHED)
            except (FileError, ValueError) as error:
                log.error("--name-template: %s", error)
        size, condition = path.stat().st_size, info["condition"]
        finished = FinishedFile(info["run"], str(path), size, "", condition)
        content = {"name": name} | {name: info[name] for name in ("run", "part", "rows", "condition")}
        content |= {"comments": msgspec.to_builtins(comments(texts))}
        content |= {"metadata": metadata.entry(info, kind, metadata.PACKET_TIER)}
        return _Published(path, finished, content, UNREAD in texts)

    # Raw files

    def _make_raw(self, path: Path) -> None:
        """Have the raw file of a finished file made, by a process, then run the command on it."""
        command = [sys.executable, "-m", "larpixdaq", "raw", *lock_directory.arguments(), "--", str(path)]
        raw = raw_path(path)

        def job() -> str | None:
            if self._ending:
                return None
            process, output = _start(command)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, RAW_NICE)
            return _await_end(process, output, RAW_LIMIT)

        def done(found: str | OSError | None) -> None:
            if found is None:  # the process ends
                return
            self._rawless.popleft()
            self.raw_problem = f"--raw: {path.name}: {found}" if found else ""
            if found:
                self.failures += 1
                log.error("%s", self.raw_problem)
                return
            with contextlib.suppress(OSError):
                self.raw_bytes += raw.stat().st_size
                self.raw_from_bytes += path.stat().st_size
            log.info("%s: made", raw.name)
            self._queue_command(raw)

        self._rawless.append(path)
        self._raws.submit(job, done)

    def _check(self, path: Path) -> None:
        """Unpack the chunks of a closed file that came packed, and report damaged ones."""

        def rest(seconds: float) -> bool:
            return self._check_ends.wait(seconds * CHECK_REST[0 if self.busy else 1])

        def job() -> list[str] | None:
            return damaged_chunks(path, rest)

        def done(found: list[str] | OSError | None) -> None:
            if found is None:  # the process ends
                return
            self._unread.remove(path)
            if isinstance(found, OSError):
                log.error("its packed chunks were not unpacked: %s", found)
            elif found:
                for line in found:
                    log.error("%s", line)
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                self.damaged.append(found[0] + more)
                self._summing.submit(partial(sidecar.add_damage, path, found), _log_error)
            else:
                log.info("%s: its packed chunks are good", path.name)

        self._unread.append(path)
        self._checking.submit(job, done)

    def add_comments(
        self, directory: Path, storage: str, run: int, comments: Sequence[Comment], then: Callable[[Any], None]
    ) -> None:
        """Add comments on a run to the sidecars of its closed parts. `storage`: the storage's label.

        `then` gets the number of sidecars, or the OSError. A part that waits for its name or its sidecar comes first.
        """

        def add() -> int:
            parts = names.files_of_storage(directory, storage, run)
            return sum(sidecar.add_comments(path, comments) for *_, ending, path in parts if ending == names.FINISHED)

        if any((name := names.parse(part)) is not None and name.run == run for part in self.broken):
            self._comments.setdefault(run, []).extend(comments)
        self._publishing.submit(lambda: None, lambda _: self._summing.submit(add, then))

    # Commands

    def _queue_command(self, path: Path) -> None:
        """Run the command on a file, if there is one, after those on earlier files."""
        if self.command and self._over:
            log.error("%s was not run for %s", self.command[0], path.name)
        elif self.command:
            self._left.append(path)
            if len(self._left) == 1:
                self._run()

    def _run(self) -> None:
        """Run the command on the first waiting file."""
        command = [*self.command, str(self._left[0])]
        self._commands.submit(lambda: _start(command), self._started)

    def _started(self, found: tuple[subprocess.Popen[bytes], IO[bytes]] | OSError) -> None:
        if isinstance(found, OSError):
            self._ended(found)
        else:
            self._running = found[0]
            self._commands.submit(lambda: _await_end(*found, COMMAND_LIMIT), self._ended)

    def _ended(self, found: str | OSError) -> None:
        path, self._running = self._left.popleft(), None
        self.problem = f"--on-close: {self.command[0]} {path.name}: {found}" if found else ""
        if found:
            self.failures += 1
            log.error("%s", self.problem)
        else:
            log.info("%s: %s has ended well", path.name, self.command[0])
        if self._left:
            self._run()


def _start(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start a command; return its process, and the file for its output."""
    # Not a pipe, because a command that outlives this process must still have a place for its output.
    output = tempfile.TemporaryFile()  # noqa: SIM115  _await_end() closes it
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    except OSError:
        output.close()
        raise
    return process, output


def _await_end(process: subprocess.Popen[bytes], output: IO[bytes], limit: float) -> str:
    """Wait for the end of a command; return its error in one line, empty when it succeeded. `limit`: seconds after
    which it is killed."""
    with output:
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"did not end within {limit:g} s and was killed"
        if not status:
            return ""
        output.seek(max(0, output.seek(0, os.SEEK_END) - 1000))
        said = output.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended with status {status}: {said[-1][:300] if said else 'it wrote nothing'}"


def _log_error(found: OSError | None) -> None:
    if found is not None:
        log.error("%s", found)
