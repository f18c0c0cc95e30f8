"""Past runs for the page: the core's catalogue with its e-log and attachments, and plots of the files.

The catalogue is read in threads. Files are read in a child process of low priority, one at a time, so that a large file
holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from larpixdaq.constants import LAST_RUN, MAX_ATTACHMENT
from larpixdaq.control.catalogue import Run
from larpixdaq.control.run_list import RunList, Selection, length
from larpixdaq.errors import FileError, LarpixDaqError, NoCore, RequestError
from larpixdaq.runtime.child_process import end_with_parent
from larpixdaq.runtime.file_access import read_regular
from larpixdaq.runtime.launcher import command
from larpixdaq.web.live import Live
from larpixdaq.web.page import binary_frame, to_json

#: Maximum number of runs in a list, and of words in a search.
MAX_RUNS: Final = 500
_MAX_WORDS: Final = 10
#: Maximum number of threads that read the catalogue and attachments.
_READERS: Final = 2
#: Maximum seconds, and bytes, of a summary; maximum rows that are read for it, and points of a curve.
_LIMIT: Final = 120.0
_LARGEST: Final = 64 << 20
_ROWS: Final = 5_000_000
_POINTS: Final = 500
#: Number of summaries that are kept.
_KEPT: Final = 8
#: Arrays with a value for each channel.
QUANTITIES: Final = ("rate", "mean", "std")


class Runs:
    """The runs of the core's catalogue. `live`: the live state, whose status says where the catalogue is."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._readers = asyncio.Semaphore(_READERS)
        self._child = asyncio.Semaphore(1)
        self._summaries: OrderedDict[tuple[Any, ...], list[bytes]] = OrderedDict()

    def _directory(self) -> Path:
        """Return the core's state directory. LarpixDaqError if it is not of this host."""
        status = self._live.status
        if not status:
            raise NoCore(f"no core answers at {self._live.core}, so that the place of its run catalogue is not known")
        host = status["process"]["host"]
        if host != socket.gethostname():
            raise RequestError(f"the run catalogue is on {host}: it is shown by a web server there")
        return Path(status["state_dir"])

    async def _read(self, do: Any, *arguments: Any) -> Any:
        async with self._readers:
            return await asyncio.to_thread(do, *arguments)

    async def select(self, search: str, limit: int, before: int | None) -> dict[str, Any]:
        """Return the newest runs that have all words of `search`, at most `limit`, below the number `before`.

        Result: {"runs": [{"run", "kind", "comment", "condition", "phase", "operator", "shifter", "prepared", "begun",
        "ended" (unix s), "length_s", "rows", "stored", "comments" (their number)}, ...], "more"}.
        """
        words = search.split()
        if len(words) > _MAX_WORDS:
            raise RequestError(f"search: expected at most {_MAX_WORDS} words, found {len(words)}")
        if not 1 <= limit <= MAX_RUNS:
            raise RequestError(f"limit: expected 1 to {MAX_RUNS}, found {limit}")
        if before is not None and not 1 <= before <= LAST_RUN + 1:
            raise RequestError(f"before: expected a run number, found {before}")
        selection = Selection(words=words) if before is None else Selection(words=words, before=before)
        found: dict[str, Any] = await self._read(_list, self._directory(), selection, limit)
        return found

    async def describe(self, run: int) -> dict[str, Any]:
        """Return all that the catalogue has of a run, and times in unix s. FileError if there is no such run."""
        facts: dict[str, Any] = await self._read(_describe, self._directory(), run)
        return facts

    async def attachment(self, run: int, name: str) -> bytes:
        """Return the content of a run's attachment, of the newest of this name."""
        facts = await self.describe(run)
        for attachment in reversed(facts["attachments"]):
            if attachment["name"] == name:
                content: bytes = await self._read(read_regular, Path(attachment["path"]), MAX_ATTACHMENT)
                return content
        raise FileError(f"run {run} has no attachment {name!r:.100}")

    async def summary(self, run: int) -> bytes:
        """Return the summary of a run's files for plots, in JSON, as run_summary.RunSummary.plain() has it."""
        return (await self._summarise(run))[0]

    async def pixels(self, run: int, quantity: str) -> bytes:
        """Return a quantity of each channel in a run's files, as a binary frame; `chips` in its header.

        `quantity`: "rate" (packets/s), "mean" or "std" (of the ADC values). Content: little-endian f4, NaN if unknown.
        """
        if quantity not in QUANTITIES:
            raise RequestError(f"quantity: expected one of {', '.join(QUANTITIES)}, found {quantity!r:.40}")
        return (await self._summarise(run))[1 + QUANTITIES.index(quantity)]

    async def _summarise(self, run: int) -> list[bytes]:
        facts = await self.describe(run)
        paths = await self._read(_data_files, facts)
        if not paths:
            raise FileError(f"run {run} has no file that can be read on this host")
        async with self._child:
            states = await self._read(_states, paths)
            key = run, *states
            if (known := self._summaries.get(key)) is not None:
                self._summaries.move_to_end(key)
                return known
            parts = await _in_child(paths)
            for old in [old for old in self._summaries if old[0] == run]:
                del self._summaries[old]
            self._summaries[key] = parts
            if len(self._summaries) > _KEPT:
                self._summaries.popitem(last=False)
            return parts


def _list(directory: Path, selection: Selection, limit: int) -> dict[str, Any]:
    with contextlib.closing(RunList(directory)) as runs:
        numbers = runs.select(selection, limit + 1)
        shown = numbers[:limit]
        counts = runs.comment_counts(shown)
        found = [_facts(run, counts.get(run.run, 0)) for run in runs.runs(shown)]
    return {"runs": found, "more": len(numbers) > limit}


def _facts(run: Run, comments: int) -> dict[str, Any]:
    names = ("run", "kind", "comment", "condition", "phase", "operator", "shifter", "rows", "stored", "reasons")
    facts = {name: getattr(run, name) for name in names}
    return facts | {"comments": comments, "length_s": length(run), **_times(run)}


def _times(run: Run) -> dict[str, float | None]:
    names = ("prepared", "begun", "stopped", "ended")
    return {name: None if (ns := getattr(run, f"{name}_ns")) is None else ns / 1e9 for name in names}


def _describe(directory: Path, number: int) -> dict[str, Any]:
    with contextlib.closing(RunList(directory)) as runs:
        run = runs.find(number)
        return runs.describe(run) | _times(run)


def _data_files(facts: dict[str, Any]) -> list[Path]:
    """Return the run's files of one storage that are on this host, finished or growing."""
    named = [*(one["path"] for one in facts["file_details"]), *facts["files"]]
    paths: dict[Path, None] = {}
    for name in named:
        for path in (Path(name), Path(f"{name}.part")):
            if path.is_file():
                paths[path] = None
                break
    found = list(paths)
    return [path for path in found if path.parent == found[0].parent and _storage(path) == _storage(found[0])]


def _storage(path: Path) -> str:
    """Return the name of the storage in a file's name, by which copies of a run are told apart."""
    from larpixdaq.hdf5 import names  # late, because the server starts without hdf5

    found = names.parse(path.name)
    return "" if found is None else found.storage


def _states(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what changes when a file grows."""
    found = [(path, path.stat()) for path in paths]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


async def _in_child(paths: Sequence[Path]) -> list[bytes]:
    """Summarise files in a child process. Returns its parts: the JSON, and a frame for each of QUANTITIES."""
    child = await asyncio.create_subprocess_exec(
        *command("web.runs", *map(str, paths)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: end_with_parent(signal.SIGKILL),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        output, errors = await asyncio.wait_for(
            asyncio.gather(_read_all(child.stdout, _LARGEST), _read_all(child.stderr, 1 << 16)), _LIMIT
        )
        status = await child.wait()
    except asyncio.TimeoutError:
        raise FileError(f"the summary of {paths[0]} took more than {_LIMIT:g} s") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if status:
        lines = errors.decode("utf-8", "backslashreplace").strip().splitlines()
        raise FileError(lines[-1] if lines else f"the summary of {paths[0]} ended with status {status}")
    return _split(output)


async def _read_all(stream: asyncio.StreamReader, most: int) -> bytes:
    data = bytearray()
    while piece := await stream.read(1 << 20):
        if len(data) < most:
            data += piece
    return bytes(data)


def _join(parts: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def _split(data: bytes) -> list[bytes]:
    parts = []
    at = 0
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    if at != len(data) or len(parts) != 1 + len(QUANTITIES):
        raise FileError(f"the summary has {len(data)} bytes, which are not its {1 + len(QUANTITIES)} parts")
    return parts


def main(paths: Sequence[str]) -> int:
    """Write the parts of a summary to standard output; in the child process."""
    os.nice(5)
    from larpixdaq.hdf5.run_summary import summarise

    try:
        summary = summarise(paths, rows=_ROWS)
        chips = [list(chip) for chip in summary.chips.tolist()]
        arrays: dict[str, Any] = {"rate": summary.channel_rates(), "mean": summary.mean, "std": summary.std}
        frames = [
            binary_frame(
                {"name": "pixels", "run": summary.run, "quantity": name, "seen": summary.seen, "chips": chips},
                arrays[name].astype("<f4"),
            )
            for name in QUANTITIES
        ]
        sys.stdout.buffer.write(_join([to_json(summary.plain(_POINTS)), *frames]))
        sys.stdout.buffer.flush()
    except LarpixDaqError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
