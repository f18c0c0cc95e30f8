"""Invalid messages at the sockets of core, log and producer, and components that fail: a run continues."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from processes import LIMIT, Process, until
from raw_sockets import use_key
from system import System, rows_of, system

from larpixdaq.errors import RequestError
from larpixdaq.hdf5.verify import verify
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import ActionRequest, Answer, Open, Welcome, pack, unpack_core


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


class Sockets:
    """Sockets of foreign programs, which are all closed at the end."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._sockets: list[Any] = []

    def connect(self, kind: int, address: str, core: str, server: str = "") -> Any:
        """Connect with the user's key for `core`, to the core or to the component with the key `server`."""
        new = self.context.socket(kind)
        self._sockets.append(new)
        new.setsockopt(zmq.LINGER, 0)
        new.setsockopt(zmq.SNDTIMEO, int(LIMIT * 1000))
        new.setsockopt(zmq.RCVTIMEO, int(LIMIT * 1000))
        use_key(new, core, server)
        new.connect(address)
        return new

    def close(self) -> None:
        for socket_ in self._sockets:
            socket_.close()
        self.context.term()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    foreign = Sockets()
    yield foreign
    foreign.close()


def begin(operator: Operator) -> None:
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)


def more_packets(line: System, operator: Operator, n: int = 500) -> None:
    """Wait for more packets in the run."""
    start = line.status_of(operator, "producer").get("packets", 0)
    until(lambda: line.status_of(operator, "producer").get("packets", 0) > start + n, f"{n} more packets")


def complete(operator: Operator) -> None:
    ended = operator.end_run().result(LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    (path,) = ended["files"]
    report = verify(Path(path))
    assert report.ok, report.findings
    assert len(rows_of(path)) == ended["rows"]


def raw_garbage(address: str) -> None:
    """Send bytes over plain TCP that are not ZeroMQ, and bytes that begin as ZeroMQ and then break its protocol."""
    host, port = address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    for data in (os.urandom(10_000), b"GET / HTTP/1.1\r\n\r\n", greeting + os.urandom(1000), b""):
        with socket.create_connection((host, int(port)), LIMIT) as connection:
            try:
                connection.sendall(data)
            except ConnectionError:
                continue  # closed after the first bytes


def garbage(sockets: Sockets, address: str, kind: int, core: str, server: str) -> None:
    """Send meaningless messages with the user's key, one that is larger than allowed, and bytes without a key."""
    talker = sockets.connect(kind, address, core, server)
    for parts in (
        [b""],
        [os.urandom(100)],
        [os.urandom(1_000_000)],  # the log takes at most 1 MiB, with the few bytes of encryption
        [b"a", b"b", b"c"],
        [b"\x93" * 10_000],
        [bytes(1000)],
    ):
        talker.send_multipart(parts)
    sockets.connect(kind, address, core, server).send(bytes(100_000_000))  # for which the connection is closed
    raw_garbage(address)


def test_garbage_at_every_socket_during_a_run(line: System, sockets: Sockets) -> None:
    operator = line.start("--fake", "20000")
    line.launch_log()
    line.await_kinds(operator, "log")
    begin(operator)
    info = {c["kind"]: c["info"] for c in operator.components().result(LIMIT)}
    listening = (
        (zmq.DEALER, line.core, ""),
        (zmq.PUSH, *info["log"]["log"]),
        (zmq.DEALER, *info["producer"]["stream"]),
    )
    for kind, address, server in listening:
        garbage(sockets, address, kind, line.core, server)
        more_packets(line, operator)
    until(lambda: operator.status().result(LIMIT)["refused_messages"] >= 6, "refused messages in the status")
    until(lambda: line.status_of(operator, "log").get("refused", 0) >= 5, "refused records in the log's status")
    complete(operator)
    assert all(c["alive"] and not c["stuck"] for c in operator.components().result(LIMIT))
    for name, process in line.processes.items():
        assert process.popen.poll() is None, name
        assert "Traceback" not in process.stderr, name


class Raw:
    """Client that opens a session as an Operator does, and then sends any bytes."""

    def __init__(self, sockets: Sockets, core: str) -> None:
        self.socket = sockets.connect(zmq.DEALER, core, core)
        self.socket.send(pack(Open(name="raw", instance="raw")))
        while not isinstance(message := unpack_core(self.socket.recv()), Welcome):
            pass
        self.session = message.session
        self._last = 0

    def id(self) -> str:
        """Return an unused request id, because a repeated id gets the earlier answer."""
        self._last += 1
        return f"raw {self._last}"

    def answer(self, data: bytes) -> Answer:
        self.socket.send(data)
        while True:
            message = unpack_core(self.socket.recv())
            if isinstance(message, Answer) and message.kind != "ack":
                return message

    def request(self, **fields: Any) -> bytes:
        fields_: dict[str, Any] = msgspec.to_builtins(
            ActionRequest(action="state", request=self.id(), session=self.session)
        )
        return bytes(msgspec.msgpack.encode(fields_ | fields))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_malformed_requests_get_clear_answers(line: System, sockets: Sockets) -> None:
    operator = line.start("--fake", "20000")
    begin(operator)
    raw = Raw(sockets, line.core)
    for fields, error, words in (
        ({"version": 99}, "malformed", "protocol version 99, here it is 1"),
        ({"action": "fly"}, "failed", "no action 'fly'; it has abort_run"),
        ({"params": {"comment": "x"}}, "failed", "state: "),
        ({"params": {"x": nested(40)}}, "malformed", "more than 32 containers"),
        ({"params": [1, 2]}, "malformed", "object"),
        ({"action": ""}, "malformed", "length"),
        ({"action": "x" * 100}, "malformed", "length"),
        ({"type": "nonsense"}, "malformed", "nonsense"),
        ({"session": "nobody"}, "unknown_session", "register again"),
        ({"params": {"x": "y" * (2 << 20)}}, "malformed", "the limit is 1048576"),
        ({"action": "prepare_run", "params": {"kind": 5}}, "failed", "kind"),
        ({"component": "nobody"}, "failed", "nobody"),
        ({"action": "end_run", "component": "LArPix board", "params": {}}, "failed", ""),
    ):
        answer = raw.answer(raw.request(**fields))
        assert answer.kind == "error", fields
        assert words in answer.text, (fields, answer.text)
        assert "\n" not in answer.text
        assert error in (answer.error, "failed"), (fields, answer)
    deep = raw.answer(b"\x91" * 100_000)
    assert deep.error == "malformed"
    raw.socket.send(bytes(100_000_000))
    assert operator.state().result(LIMIT) == "RUN"
    with pytest.raises(RequestError, match="expected"):
        operator.call("Online monitor", "packets", nonsense=1).result(LIMIT)
    more_packets(line, operator)
    complete(operator)


def test_second_processes_with_the_same_name_or_address_are_refused(line: System) -> None:
    operator = line.start("--fake", "20000")
    line.launch_log()
    line.await_kinds(operator, "log")
    begin(operator)
    out = line.folder / "second"
    more = {
        "core": ["--address", line.core, "--state-dir", line.folder / "other"],
        "log": ["--core", line.core, "--address", line.log, "--state-dir", line.folder / "other"],
        "offline_storage": ["--core", line.core, "-o", line.folder],
        "producer": ["--core", line.core, "--fake", "--ring", "16MiB", "--state-dir", line.folder / "other"],
        "run_data": ["--core", line.core],
    }
    expected = {
        "core": f"cannot listen at {line.core}",
        "log": f"cannot listen at {line.log}",
        "offline_storage": "the name 'Offline storage' is in use",
        "producer": "the name 'LArPix board' is in use",
        "run_data": "the name 'Online monitor' is in use",
    }
    seconds = {name: Process(f"larpixdaq.{name}", *arguments, directory=out) for name, arguments in more.items()}
    for name, process in seconds.items():
        with process:
            assert process.wait() == 1, name
            (text,) = process.stderr.splitlines()
            assert expected[name] in text
    more_packets(line, operator)
    complete(operator)


def test_an_unwritable_directory_refuses_a_run_and_the_next_run_works(line: System) -> None:
    operator = line.start("--fake", "20000")
    # it registers before it has read its directory
    until(lambda: "free_bytes" in line.status_of(operator, "storage"), "the storage to be ready")
    away = line.data.with_name("away")
    line.data.rename(away)  # as when the file system is unmounted, also for the superuser
    with pytest.raises(RequestError, match=f"Offline storage: .*{line.data}"):
        operator.prepare_run().result(LIMIT)
    assert operator.state().result(LIMIT) == "STOP"
    line.await_status(operator, "producer", "state", "STOP")
    line.await_status(operator, "storage", "free_bytes", 0)
    away.rename(line.data)
    until(lambda: line.status_of(operator, "storage")["free_bytes"] > 0, "the storage to see its directory again")
    begin(operator)
    more_packets(line, operator)
    complete(operator)
    assert operator.run_info(1).result(LIMIT)["condition"] == "CANCELLED"
