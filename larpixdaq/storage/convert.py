"""Convert several recordings (conversion.py) in child processes, one recording at a time each.

This file is also the program of these processes.
"""

from __future__ import annotations

import os
import sys

if __spec__ is None:
    # At the end of the path, so that an installed package is preferred.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    del sys.path[0]

import contextlib
import json
import select
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from larpixdaq.errors import FileError, LarpixDaqError, printable
from larpixdaq.runtime.child_process import PIECE, ChildProcess, parent_socket, signal_name
from larpixdaq.runtime.file_access import lock_directory
from larpixdaq.storage.conversion import (
    ENDING,
    RECORDINGS,
    Options,
    OwnFile,
    Progress,
    Report,
    convert,
    remove_unfinished,
    target_of,
)

#: Maximum bytes of a message between the processes.
_MOST_BYTES: Final = PIECE


class Job(msgspec.Struct, frozen=True):
    source: str
    directory: str | None  # of the new file; None: that of the source


def recordings_in(directory: Path) -> list[Path]:
    """List files of a directory that may be recordings, by their endings. FileError when it cannot be read."""
    try:
        found = sorted(os.listdir(directory))
    except OSError as error:
        raise FileError(f"cannot read the directory {directory}: {error.strerror}") from None
    return [
        directory / name
        for name in found
        if name.lower().endswith(RECORDINGS) and not name.endswith(ENDING) and (directory / name).is_file()
    ]


def convert_all(
    jobs: Sequence[Job], options: Options, processes: int, progress: Callable[[Job, Progress], None]
) -> Generator[Report]:
    """Convert recordings, `processes` of them at a time; yield a report of each as soon as it is known.

    With one process the recordings are converted in this one.
    """
    if min(processes, len(jobs)) <= 1:
        for job in jobs:
            yield _try_convert(job, options, lambda found, job=job: progress(job, found))  # type: ignore[misc]
        return
    pool = _Pool(min(processes, len(jobs)), options)
    try:
        yield from pool.run(list(jobs), progress)
    finally:
        pool.close()


def _try_convert(job: Job, options: Options, report: Callable[[Progress], None]) -> Report:
    source = Path(job.source)
    try:
        return convert(source, None if job.directory is None else Path(job.directory), options, report)
    except OwnFile as error:
        return Report(job.source, str(error), skipped=True)
    except LarpixDaqError as error:
        return Report(job.source, str(error))
    except MemoryError:
        return Report(job.source, f"{source}: not converted, because there was no memory for it")


def _pack(message: msgspec.Struct) -> bytes:
    """Pack a message between the processes. Not by msgspec alone, because paths may have bytes that are not UTF-8."""
    return json.dumps(msgspec.to_builtins(message)).encode()


def _unpack(data: bytes, kind: Any) -> Any:
    return msgspec.convert(json.loads(data), kind)


class _Pool:
    """Child processes that convert one recording at a time each. One that dies is replaced by the next one."""

    def __init__(self, processes: int, options: Options) -> None:
        self._options = options
        self._children = [ChildProcess(Path(__file__), kind=socket.SOCK_SEQPACKET) for _ in range(processes)]
        self._jobs: dict[ChildProcess, Job] = {}

    def run(self, jobs: list[Job], progress: Callable[[Job, Progress], None]) -> Iterator[Report]:
        waiting = jobs[::-1]
        poll = select.poll()
        for child in self._children:
            poll.register(child.fileno(), select.POLLIN)
        while waiting or self._jobs:
            for child in self._children:
                if waiting and child not in self._jobs:
                    self._give(child, waiting.pop())
            poll.poll()
            for child, job in list(self._jobs.items()):
                while child.ready() and child in self._jobs and (data := child.receive()) is not None:
                    found = self._take(child, job, data)
                    if isinstance(found, Progress):
                        progress(job, found)
                    else:
                        del self._jobs[child]
                        yield found

    def _give(self, child: ChildProcess, job: Job) -> None:
        if not child.alive:
            try:
                child.start()
            except OSError as error:
                raise FileError(f"cannot start a process for {job.source}: {error.strerror}") from None
            child.send(_pack(self._options))
        child.send(_pack(job))
        self._jobs[child] = job

    def _take(self, child: ChildProcess, job: Job, data: bytes) -> Progress | Report:
        if data:
            found: Progress | Report = _unpack(data, Progress | Report)
            return found
        status = child.end()
        self._remove(job)
        assert status is not None
        how = f"by signal {signal_name(-status)}" if status < 0 else f"with status {status}"
        return Report(job.source, f"{job.source}: not converted, because the process that did it was ended {how}")

    @staticmethod
    def _remove(job: Job) -> None:
        with contextlib.suppress(LarpixDaqError):  # the next conversion removes it
            remove_unfinished(target_of(Path(job.source), None if job.directory is None else Path(job.directory)))

    def close(self) -> None:
        """End the processes, and remove what they have not finished."""
        for child in self._children:
            child.end()
        for job in self._jobs.values():
            self._remove(job)
        for child in self._children:
            child.close()


def main() -> None:
    """Convert the recordings that the parent names, one after the other, until its end."""
    sock = parent_socket(sys.argv[1])
    options: Options = _unpack(sock.recv(_MOST_BYTES), Options)
    lock_directory.use(None if options.lock_dir is None else Path(options.lock_dir), options.state_dir)

    def report(found: Progress | Report) -> None:
        sock.send(_pack(found))

    while data := sock.recv(_MOST_BYTES):
        found = _try_convert(_unpack(data, Job), options, report)
        found.notes = [printable(line)[:300] for line in found.notes[:10]]
        found.text = found.text[:2000]
        report(found)


if __name__ == "__main__":
    main()
