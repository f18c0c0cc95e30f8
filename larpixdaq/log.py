"""The log: takes everybody's log records and appends them to one file, one line each."""

import sys

if __spec__ is None and sys.path[0].endswith("larpixdaq"):
    # Run by its path: operator.py in this folder must not shadow the standard library's.
    del sys.path[0]

import argparse
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import zmq

from larpixdaq import config
from larpixdaq.control.shipping import Record, unpack_record
from larpixdaq.errors import ConfigError, FileError, ProtocolError
from larpixdaq.node import Node
from larpixdaq.states import LOG

_log = logging.getLogger("larpixdaq.log")
#: Records taken before anything else is looked after.
_BATCH: Final = 1000
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160), 0x2028, 0x2029)} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
}


def line(record: Record) -> str:
    """A record as one line: UTC time, level, component, text; control characters stand as escapes."""
    try:
        time = datetime.fromtimestamp(record.time, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (ValueError, OverflowError, OSError):
        time = "(impossible time)"
    text = f"{time} {logging.getLevelName(record.level)} {record.component}: {record.text}"
    return text.translate(_CONTROL) + "\n"


class LogFile:
    """Appends records to a file. A full disk loses records, says so once on stderr, and stops nobody."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self.lost = 0
        self.refused = 0
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise FileError(f"log file {path}: {error.strerror}") from None

    def take(self, socket: zmq.Socket[bytes]) -> bool:
        """Write what has come; False when there is more."""
        lines: list[bytes] = []
        empty = False
        while not empty and len(lines) < _BATCH:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                empty = True
                continue
            try:
                lines.append(line(unpack_record(frames[0])).encode("utf-8", "replace"))
            except ProtocolError as error:
                self.refused += 1
                if self.refused == 1:
                    _log.warning("%s (further ones are only counted)", error)
        if lines:
            self._append(lines)
        return empty

    def _append(self, lines: list[bytes]) -> None:
        try:
            data = b"".join(lines)
            while data:
                data = data[self._file.write(data) :]
            self.written += len(lines)
        except OSError as error:
            if not self.lost:
                _log.error("log file %s: %s; records are lost", self.path, error.strerror)
            self.lost += len(lines)

    def status(self) -> dict[str, Any]:
        return {"file": str(self.path), "written": self.written, "lost": self.lost, "refused": self.refused}

    def close(self) -> None:
        self._file.close()


def listen(context: zmq.Context[zmq.Socket[bytes]], address: str) -> tuple[zmq.Socket[bytes], str]:
    """The socket that takes records, and where it listens; ConfigError when it cannot."""
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.ipv6 = config.is_ipv6(address)
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"log: cannot listen at {address}: {error} (is another log running?)") from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def serve(core: str, name: str, address: str, path: Path) -> None:
    """Until a signal comes. NoCore, FileError or ConfigError when it cannot start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    file: LogFile | None = None
    node: Node | None = None
    try:
        with config.Signals() as signals:
            socket, endpoint = listen(context, address)
            file = LogFile(path)
            info = {"log": config.reachable(endpoint, core), "file": str(path)}
            node = Node(name, LOG, core, {}, info=info, status=file.status)
            node.connect(signals=signals)
            poller = zmq.Poller()
            for source in (socket, node, signals):
                poller.register(source, zmq.POLLIN)
            while not signals.stop:
                poller.poll(node.wait_ms())
                node.dispatch()
                empty = file.take(socket)
                node.report(file.written, 0 if empty else 1)
            node.close()
            file.take(socket)
    finally:
        if node is not None:
            node.close()
        context.destroy(0)
        if file is not None:
            file.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="larpixdaq-log", description="Collect the log records of all components of larpix-daq in one file."
    )
    config.add_address_argument(parser, more=f"; the port is {config.LOG_PORT} unless given")
    config.add_component_arguments(parser, "Log")
    config.add_state_dir_argument(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the file (default log.txt in the state directory)")
    args = parser.parse_args(argv)

    def run() -> None:
        address = config.listen_address(args.address, config.LOG_PORT, insecure=args.insecure, what="log")
        path = Path(args.output) if args.output else config.state_dir(args.state_dir) / "log.txt"
        serve(config.address(args.core, config.CORE_PORT), args.name, address, path.absolute())

    return config.run_main(run)


if __name__ == "__main__":
    sys.exit(main())
