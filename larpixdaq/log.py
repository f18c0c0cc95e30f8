"""The log: collects the log records of all components in one file, a line each.

A full file is renamed to log.txt.1, and the older files to log.txt.2, ... log.txt.4; the oldest is removed.
control/log_file.py has the form of a line, and reads the files.
"""

import sys

if __spec__ is None and sys.path[0].endswith("larpixdaq"):
    # Run by its path: operator.py in this folder must not shadow the standard library's.
    del sys.path[0]

import argparse
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import zmq

from larpixdaq import config
from larpixdaq.constants import LOG
from larpixdaq.control.log_file import LogFiles, LogRecord, Wanted, line, parse
from larpixdaq.control.log_shipping import unpack_record
from larpixdaq.control.node import Call, Node
from larpixdaq.errors import ConfigError, FileError, ProtocolError, RequestError
from larpixdaq.keys.curve import Admission, Doorkeeper, new_pair, receive
from larpixdaq.keys.peer_limits import PeerLimits
from larpixdaq.protocol.reports import LogStatus
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.file_access import in_place, state_dir
from larpixdaq.runtime.timing import Throttle
from larpixdaq.runtime.units import parse_size, parse_whole, size

_log = logging.getLogger("larpixdaq.log")
#: Maximum number of records of one turn of the loop.
_BATCH: Final = 1000
#: Maximum bytes of a file, and number of older files that are kept, unless options say otherwise.
MAX_BYTES: Final = 64 << 20
OLDER_FILES: Final = 4
#: Minimum of the option for the bytes of a file: a file has room for the largest line.
_LEAST_BYTES: Final = 1 << 20
#: Seconds between two checks that the file was not removed.
_FILE_INTERVAL: Final = 1.0
#: Bytes that each component may write at once, and bytes per second after that; all together _SHARES times as much.
BURST: Final = 1 << 20
RATE: Final = 64 << 10
_SHARES: Final = 16
#: Seconds between two reports of lines that were held back.
_REPORT_INTERVAL: Final = 1.0
#: Number of records that are kept for those who watch the log, and maximum characters of each of their texts.
KEPT_RECORDS: Final = 1000
_KEPT_TEXT: Final = 2000


class RecentRecords:
    """The last records, numbered in the order in which they came to this process, from 0."""

    def __init__(self) -> None:
        self._records: deque[LogRecord] = deque(maxlen=KEPT_RECORDS)
        self._next = 0
        self._process = secrets.token_hex(8)

    def add(self, record: LogRecord) -> None:
        text = record.text if len(record.text) <= _KEPT_TEXT else f"{record.text[: _KEPT_TEXT - 4]} ..."
        self._records.append(LogRecord(record.time, record.level, record.component, text))
        self._next += 1

    def read(self, path: Path) -> None:
        """Add the last records of the log's file. A file that cannot be read adds none."""
        with contextlib.suppress(OSError), contextlib.closing(LogFiles(path)) as files:
            for _, text in files.last(KEPT_RECORDS, Wanted()):
                if (record := parse(text)) is not None:
                    self.add(record)

    def records(self, call: Call, count: int = 200, after: int = 0, process: str = "") -> dict[str, Any]:
        """Return the last records, at most `count` (1 to 1000), from the number `after` of this process on.

        Result: {"records": [{"time" (unix s), "level" (INFO, ...), "component", "text"}, ...], "next", "process"}.
        Whoever gives the last two back as `after` and `process` gets only what is new.
        """
        for name, value, low in (("count", count, 1), ("after", after, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RequestError(f"records: {name}: expected a whole number from {low} on, found {value!r:.80}")
        new = self._next - after if process == self._process else self._next
        wanted = max(0, min(count, new, len(self._records)))
        last = list(self._records)[len(self._records) - wanted :]
        found = [
            {"time": one.time, "level": logging.getLevelName(one.level), "component": one.component, "text": one.text}
            for one in last
        ]
        return {"records": found, "next": self._next, "process": self._process}


class LogFile:
    """Appends records to a file.

    On a full disk records are lost, which is reported once on stderr; the log continues. Of a flood of records from one
    component, a part is written and the rest is counted. A file that somebody removes or renames is made anew.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, older_files: int = OLDER_FILES) -> None:
        """`max_bytes`: of a file, when it is renamed. `older_files`: number of older files that are kept."""
        self.path = path
        self.recent = RecentRecords()
        self._max_bytes, self._older_files = max_bytes, older_files
        self.written = 0
        self.lost = 0
        self.refused = 0
        self._throttle = Throttle(RATE, BURST, shares=_SHARES)
        self.limits = PeerLimits("log")
        self._report_at = 0.0
        self._checked_at = time.monotonic()
        try:
            self._open()
        except OSError as error:
            raise FileError(f"log file {path}: {error.strerror}") from None
        if self._rotates:
            self.recent.read(path)

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._rotates = self.path.is_file()
        self._size = self.path.stat().st_size
        #: Whether the file ends in the middle of a line.
        self._torn = self._rotates and self._size > 0 and not _ends_with_line(self.path)

    def take(self, socket: zmq.Socket[bytes], check: Callable[[zmq.Frame, LogRecord], None]) -> bool:
        """Write the received records, at most _BATCH. Returns False if more wait.

        `check` raises ProtocolError for a record that may not come with this frame's key.
        """
        lines: list[bytes] = []
        empty = False
        for _ in range(_BATCH):
            try:
                frame = receive(socket, 1)[0]
            except zmq.Again:
                empty = True
                break
            try:
                record = unpack_record(frame.bytes)
                check(frame, record)
                written = line(record).encode("utf-8", "replace")
                if self._throttle.passes(record.component, len(written)):
                    lines.append(written)
                    self.recent.add(record)
                else:
                    self.limits.reached(record.component, f"{RATE} bytes of lines a second")
            except ProtocolError as error:
                self.refused += 1
                if self.refused == 1:
                    _log.warning("%s (further ones are only counted)", error)
        lines += self._held_back()
        if lines:
            self._append(lines)
        return empty

    def _held_back(self) -> list[bytes]:
        """Return lines that report the number of lines held back, at most once in _REPORT_INTERVAL."""
        if time.monotonic() < self._report_at:
            return []
        self._report_at = time.monotonic() + _REPORT_INTERVAL
        now = time.time()
        held_back = [LogRecord(now, logging.WARNING, "log", text) for text in self._throttle.summaries()]
        for record in held_back:
            self.recent.add(record)
        return [line(record).encode("utf-8", "replace") for record in held_back]

    def _append(self, lines: list[bytes]) -> None:
        try:
            data = b"".join(lines)
            self._check_place()
            if self._rotates and self._size + len(data) > self._max_bytes:
                self._rotate()
                self._size = 0
            data = b"\n" + data if self._torn else data
            self._size += len(data)
            while data:
                n = self._file.write(data)
                self._torn = data[n - 1 : n] != b"\n"
                data = data[n:]
            self.written += len(lines)
        except OSError as error:
            if not self.lost:
                _log.error("log file %s: %s; records are lost", self.path, error.strerror)
            self.lost += len(lines)

    def _check_place(self) -> None:
        """Make the file anew if it was removed, and note its size if somebody has cut it."""
        now = time.monotonic()
        if not self._rotates or now < self._checked_at + _FILE_INTERVAL:
            return
        self._checked_at = now
        if in_place(self._file.fileno(), self.path.resolve()):
            self._size = os.fstat(self._file.fileno()).st_size
            return
        previous = self._file
        self._open()
        previous.close()
        _log.warning("log file %s: it was removed or renamed; a new one has begun", self.path)

    def _rotate(self) -> None:
        """Begin a new file, and rename the older ones. If that fails, the present file continues to grow."""
        new = self.path.with_name(f"{self.path.name}.new")
        older = [self.path.with_name(f"{self.path.name}.{n}") for n in range(self._older_files, 0, -1)]
        try:
            file = open(new, "ab", buffering=0)  # noqa: SIM115
            file.truncate(0)
            for renamed, path in pairwise([*older, self.path, new]):
                with contextlib.suppress(FileNotFoundError):
                    path.replace(renamed)
        except OSError as error:
            _log.error("log file %s cannot be renamed: %s", self.path, error.strerror)
            return
        self._file.close()
        self._file, self._torn = file, False

    def status(self) -> LogStatus:
        counts = self.written, self._throttle.dropped, self.lost, self.refused
        return LogStatus(str(self.path), *counts, limits=self.limits.report())

    def close(self) -> None:
        self._file.close()


def _ends_with_line(path: Path) -> bool:
    """Return whether a file ends with the end of a line, or cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
    return True


def check_sender(admission: Admission, frame: zmq.Frame, record: LogRecord) -> None:
    """Raise ProtocolError if the key of a frame is not the one of the record's component."""
    if admission.insecure:
        return
    name = admission.whose(admission.door.key_of(frame))
    if name is None or name not in ("", record.component):
        raise ProtocolError(f"log record of {record.component!r}: sent with the key of {name or 'nobody'!r}")


def listen(context: zmq.Context[zmq.Socket[bytes]], address: str, door: Doorkeeper) -> tuple[zmq.Socket[bytes], str]:
    """Open the socket for records. Returns the socket and its actual address; ConfigError if it cannot listen."""
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
    socket.setsockopt(zmq.LINGER, 0)
    door.guard(socket)
    try:
        socket.ipv6 = config.is_ipv6(address)
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"log: cannot listen at {address}: {error} (is another log running?)") from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def serve(
    core: str,
    name: str,
    address: str,
    path: Path,
    max_bytes: int,
    older_files: int,
    *,
    insecure: bool,
    module: str = "",
) -> None:
    """Collect records until a signal comes. NoCore, FileError or ConfigError if the log cannot start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack, Signals() as signals:
        stack.callback(context.destroy, 0)
        pair = None if insecure else new_pair()
        admission = Admission(context, pair, "log")
        door, check = admission.door, partial(check_sender, admission)
        stack.callback(door.close)
        socket, endpoint = listen(context, address, door)
        file = stack.enter_context(contextlib.closing(LogFile(path, max_bytes, older_files)))
        where = [config.reachable_address(endpoint, core), pair.public if pair is not None else ""]
        info = {"log": where, "file": str(path)}

        def status() -> LogStatus:
            found = file.status()
            found.refused_connections = door.refused
            found.limits += door.limits.report()
            return found

        actions = {"records": file.recent.records}
        node = Node(name, LOG, core, actions, info=info, status=status, module=module, insecure=insecure)
        stack.callback(node.close)
        node.connect(signals=signals)
        poller = zmq.Poller()
        for source in (socket, door.socket, node, signals):
            poller.register(source, zmq.POLLIN)
        applied = 0  # the node's changes that `admission` has
        while not signals.stop:
            poller.poll(node.wait_ms())
            node.dispatch()
            if node.changes != applied:
                applied = node.changes
                admission.apply(node.update.keys, insecure=node.update.insecure)
            door.answer()
            empty = file.take(socket, check)
            node.report(file.written, 0 if empty else 1)
        node.close()
        file.take(socket, check)


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-log",
        description="Collect the log records of all components of larpix-daq in one file, which `larpixdaq log` shows. "
        "A full file is renamed to FILE.1, and older files to FILE.2 and so on. If a component writes more than "
        "64 KiB/s for long, some of its lines are left out and counted.",
    )
    more = f" (default: the interface that reaches the core); the port is {config.LOG_PORT} unless given"
    config.add_address_argument(parser, None, more)
    config.add_component_arguments(parser, "Log")
    config.add_state_dir_argument(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the file (default log.txt in the state directory)")
    parser.add_argument(
        "--max-size", type=_max_size, default=MAX_BYTES, metavar="SIZE", help="of a file (default 64MiB, at least 1MiB)"
    )
    parser.add_argument(
        "--older-files",
        type=lambda text: parse_whole(text, 0, 1000),
        default=OLDER_FILES,
        metavar="N",
        help="older files that are kept (default %(default)s)",
    )
    return parser


def _max_size(text: str) -> int:
    found = parse_size(text)
    if found < _LEAST_BYTES:
        raise argparse.ArgumentTypeError(f"expected at least {size(_LEAST_BYTES)}, found {text}")
    return found


def main(argv: list[str] | None = None) -> int:
    args = argument_parser().parse_args(argv)

    def run() -> None:
        core = config.core_addresses(args.core)
        wanted = args.address or f"tcp://{config.interface_towards(core)}"
        address = config.listen_address(wanted, config.LOG_PORT)
        if not args.output:
            os.umask(0o077)  # other users may enter a state directory that was made by hand
        path = Path(args.output) if args.output else state_dir(args.state_dir) / "log.txt"
        files = path.absolute(), args.max_size, args.older_files
        serve(core, args.name, address, *files, insecure=args.insecure, module=args.module)

    return run_main(run, log_level=args.log_level)


if __name__ == "__main__":
    sys.exit(main())
