"""A part after its last row: its final name, its checksum, and the command that somebody wants to run on it; and parts
that have to be recovered first.

Each of the four has a thread of its own, since each may take long in its own way: the disk that has to sync, gigabytes
to be read again, a command that hangs, hundreds of millions of rows. None of them holds up the stream.

What a storage before this one has left in its directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from larpixdaq.errors import FileError, FileLocked, LarpixDaqError
from larpixdaq.hdf5 import names
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recovery import prepare, recover
from larpixdaq.hdf5.run_report import unfinished
from larpixdaq.hdf5.writer import CloseReport, RunFile, sync_path
from larpixdaq.runtime.file_access import aside, open_regular, read_regular
from larpixdaq.storage import open_run

log = logging.getLogger(__name__)
#: Closed files that `status` names.
SHOWN: Final = 16
#: A command has so long (seconds) for one file.
COMMAND_LIMIT: Final = 600.0
#: Seconds at the end of the process for commands, all together, and before that for checksums.
LAST_COMMANDS: Final = 10.0
LAST_SUMS: Final = 5.0
_PIECE: Final = 1 << 20
#: Maximum bytes of a sidecar that is read.
_SIDECAR_BYTES: Final = 1 << 16


class _Worker:
    """A thread that does one job after the other."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except LarpixDaqError as error:
                log.error("%s", error)
            except Exception:  # the jobs behind it must not wait for ever
                log.exception("%s", self._thread.name)

    def end(self, limit: float | None = None) -> bool:
        """Wait until all that was submitted is done, at most `limit` seconds; whether it is."""
        self._jobs.put(None)
        self._thread.join(limit)
        return not self._thread.is_alive()


class Finisher:
    """Submit from the process's loop alone; work() in the loop calls back what the threads have to tell it.

    `command`: what to run on each finished file, whose path is appended; empty for nothing.
    """

    def __init__(self, command: Sequence[str] = ()) -> None:
        self.command = tuple(command)
        #: The last closed files, for `status`; newest last.
        self.finished: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        #: What the last command did wrong, for `status`; empty when all was well.
        self.trouble = ""
        #: Commands that have failed since the start, for `status`.
        self.failures = 0
        self._told: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._publishing, self._summing, self._commands, self._recovering = (
            _Worker(f"storage: {what}") for what in ("final names", "checksums", "commands", "recovery")
        )
        self._broken: dict[Path, str] = {}  # parts that are not recovered yet, and why not
        self._removed: dict[Path, RunFile] = {}  # those of them whose names somebody has removed
        #: Parts that were removed and could not be written anew until the end of the process.
        self.lost: list[Path] = []
        self._trying = False  # to recover them
        self._try_at = 0.0  # monotonic: not before that again
        self._ending = False
        self._left: list[Path] = []  # files whose command has not ended yet
        self._running: subprocess.Popen[bytes] | None = None
        self._no_more = False  # commands: we end

    def fileno(self) -> int:
        """Polls readable while work() has something to call back."""
        return self._wake

    @property
    def broken(self) -> list[str]:
        """The names of the parts that are being recovered, or wait for retry()."""
        return [part.name for part in list(self._broken)]

    @property
    def failed(self) -> dict[str, str]:
        """Those of them that could not be recovered so far, and why; they are tried again."""
        return {part.name: why for part, why in list(self._broken.items()) if why}

    def work(self) -> None:
        with contextlib.suppress(BlockingIOError):  # nothing was told, or it was and the wake-up is on its way
            os.eventfd_read(self._wake)
        while self._told:
            self._told.popleft()()

    def _tell(self, what: Callable[[], None]) -> None:
        self._told.append(what)
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Wait for all names. Checksums have five seconds, then those of the newest run are left to the next storage;
        commands have ten seconds, then they are left to themselves. What is being recovered is left to the next
        storage. Harmless when repeated."""
        if self._wake < 0:
            return
        self._ending = True
        self._recovering.end()
        self._publishing.end()
        for part, file in list(self._removed.items()):
            self._recover(part, self._broken[part])
            if part in self._removed:
                file.abandon()
                self.lost.append(part)
        if not self._summing.end(LAST_SUMS):
            log.error("checksums are not ready after %g s: the next start makes those of the newest run", LAST_SUMS)
        self._commands.end(LAST_COMMANDS)
        self._no_more = True
        running = self._running
        for path in self._left:
            if running is not None:
                log.error("%s still runs for %s (process %d): not waited for", self.command[0], path.name, running.pid)
                running = None
            else:
                log.error("%s was not run for %s", self.command[0], path.name)
        self.work()
        os.close(self._wake)
        self._wake = -1

    # Final names

    def publish(self, file: RunFile, report: CloseReport) -> None:
        """Give a sealed part its final name; what follows, follows."""

        def job() -> None:
            part = file.path
            try:
                path = file.publish()
            except FileError as error:
                log.error("%s", error)
                if file.nameless:
                    self._removed[part] = file
                self._broken[part] = str(error)
                return
            log.info("%s: %d rows, %s", path.name, report.rows, report.condition)
            self._finish(path)

        self._publishing.submit(job)

    def after(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do `job` when all parts that were submitted before have their names, as far as the disk lets us, and call
        back with what it gave: a value, or the LarpixDaqError that it raised."""

        def run() -> None:
            value: Any
            try:
                value = job()
            except LarpixDaqError as error:
                value = error
            self._tell(lambda: then(value))

        self._publishing.submit(run)

    # Recovery

    def mend(self, part: Path, why: str = "") -> None:
        """A part that was not written to its end: it is recovered when retry() is called. `why`: what stood in the way
        before, and was told."""
        self._broken.setdefault(part, why)

    def retry(self) -> None:
        """Recover the parts that are broken, as far as the disk lets us; one attempt at a time, and not too often."""
        if self._broken and not self._trying and time.monotonic() >= self._try_at:
            self._trying = True
            self._recovering.submit(self._recover_all)

    def _recover_all(self) -> None:
        for part, before in list(self._broken.items()):
            try:
                self._recover(part, before)
            except (LarpixDaqError, OSError) as error:  # the others have their turn
                log.error("%s: %s", part.name, error)
            except Exception:  # a mistake of ours: likewise
                log.exception("%s", part.name)
        self._try_at = time.monotonic() + open_run.AGAIN
        self._trying = False

    def _recover(self, part: Path, before: str) -> None:
        if part in self._removed:
            try:
                path = self._removed[part].publish()
            except FileError as error:
                if str(error) != before:
                    log.error("%s", error)
                    self._broken[part] = str(error)
                return
            del self._removed[part], self._broken[part]
            self._finish(path)
            return
        try:
            found = recover(part, lambda: self._ending)
        except FileLocked:
            return
        except FileError as error:
            if not part.exists():  # somebody has recovered it by hand, or taken it away
                del self._broken[part]
            elif str(error) != before:
                log.log(logging.WARNING if self._ending else logging.ERROR, "%s", error)
                self._broken[part] = str(error)
            return
        log.log(logging.ERROR if found.damaged else logging.WARNING, "%s", found.text)
        if found.path is not None:
            self._finish(found.path)
        del self._broken[part]

    # Checksums

    def _finish(self, path: Path) -> None:
        line = {"run": 0, "file": str(path), "bytes": 0, "sha256": "", "condition": ""}
        with DataFile(path) as file:
            info = file.run_info()
        line |= {"run": info["run"], "bytes": path.stat().st_size, "condition": info["condition"]}
        self._tell(lambda: self.finished.append(line))
        about = {"run": info["run"], "part": info["part"], "rows": info["rows"], "condition": info["condition"]}
        self._summing.submit(lambda: self._sum(path, line, about))

    def adopt(self, path: Path) -> None:
        """A finished file that this process has not written; it may lack its sidecar, or have a damaged one."""
        if not _has_sidecar(path):
            self._publishing.submit(lambda: self._finish(path))

    def _sum(self, path: Path, line: dict[str, Any], about: dict[str, Any]) -> None:
        try:
            digest, size = sha256(path)
            write_sidecar(path, {"file": path.name, "bytes": size, "sha256": digest, **about})
        except OSError as error:
            raise FileError(f"no checksum of {path}: {error.strerror or error}") from None
        self._tell(lambda: line.update(sha256=digest))
        if self.command:
            self._left.append(path)
            self._commands.submit(lambda: self._run(path))

    # Commands

    def _run(self, path: Path) -> None:
        if self._no_more:
            return  # it has been said that it was not run
        trouble = self._execute(path)
        self._left.remove(path)
        self.trouble = trouble
        if trouble:
            self.failures += 1
            log.error("%s", trouble)
        else:
            log.info("%s: %s has ended well", path.name, self.command[0])

    def _execute(self, path: Path) -> str:
        """What went wrong, in one line; empty when nothing did."""
        what = f"--on-close: {self.command[0]} {path.name}"
        # Into a file, not a pipe: should it outlive us, its output must still have a place to go.
        with tempfile.TemporaryFile() as output:
            try:
                self._running = subprocess.Popen(
                    [*self.command, str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                return f"{what}: {error}"
            try:
                status = self._running.wait(COMMAND_LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(self._running.pid, signal.SIGKILL)
                self._running.wait()
                return f"{what}: did not end within {COMMAND_LIMIT:g} s and was killed"
            finally:
                self._running = None
            if status:
                output.seek(max(0, output.seek(0, os.SEEK_END) - 1000))
                said = output.read().decode("utf-8", "replace").strip().splitlines()
                return f"{what}: ended with status {status}: {said[-1][:300] if said else 'it wrote nothing'}"
        return ""


def sha256(path: Path) -> tuple[str, int]:
    """The checksum of a file, in hexadecimal digits, and its size."""
    digest = hashlib.sha256()
    size = 0
    buffer = bytearray(_PIECE)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
            size += n
    return digest.hexdigest(), size


def write_sidecar(path: Path, content: dict[str, Any]) -> None:
    """NAME.json beside a finished file: there is all of it or none."""
    new = path.with_suffix(names.SIDECAR + ".new")
    with open(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "w") as file:
        file.write(json.dumps(content) + "\n")
    sync_path(new)
    new.replace(path.with_suffix(names.SIDECAR))


def _has_sidecar(path: Path) -> bool:
    """Whether NAME.json is there and whole. A damaged one is kept under another name."""
    sidecar = path.with_suffix(names.SIDECAR)
    if not os.path.lexists(sidecar):
        return False
    try:
        content = json.loads(read_regular(sidecar, _SIDECAR_BYTES))
        if content["file"] == path.name and len(bytes.fromhex(content["sha256"])) == 32:
            return True
        problem = "it is another file's"
    except (FileError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    kept = aside(sidecar)
    log.error("%s is damaged, and kept as %s: %s", sidecar, kept.name, problem)
    try:
        sidecar.rename(kept)
    except OSError as error:
        log.error("cannot rename %s: %s", sidecar, error.strerror)
        return True
    return False


def adopt_unfinished_parts(directory: Path, storage: str, finisher: Finisher) -> list[int]:
    """Have the parts recovered that were being written, and see to it that finished files of runs that may go on have
    their sidecars; the numbers of these runs. Older files are left alone: there may be thousands.

    Parts say from now on where their sources stand; the recovery itself, which reads every row, is the finisher's.
    FileError when the directory cannot be read; what is wrong with a file goes to the log.
    """
    going_on = unfinished(directory, storage)
    for path in names.parts(directory, storage):
        try:
            found = prepare(path)
        except FileLocked as error:  # a recovery by hand, or a reader that looks whether the part is being written
            log.warning("%s", error)
            finisher.mend(path, str(error))
        except FileError as error:
            log.error("%s", error)
            finisher.mend(path, str(error))
        else:
            if found is None:
                finisher.mend(path)
            else:
                log.log(logging.ERROR if found.damaged else logging.WARNING, "%s", found.text)
    for run in going_on:
        for _, _, ending, path in names.parts_of(directory, storage, run):
            if ending == names.FINISHED:
                finisher.adopt(path)
    return going_on
