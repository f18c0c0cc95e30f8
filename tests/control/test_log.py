"""The log: a line for each record, with any content, and a log that is restarted."""

import logging
import re
import signal
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from fake_core import Actor, core
from hypothesis import given
from hypothesis import strategies as st
from processes import LIMIT, Process, free_port, until

from larpixdaq.control import log_shipping
from larpixdaq.control.log_file import LogRecord
from larpixdaq.control.log_shipping import LimitedLog, LogShipper, unpack_record
from larpixdaq.errors import FileError, ProtocolError, RequestError
from larpixdaq.keys.curve import Doorkeeper
from larpixdaq.log import LogFile, RecentRecords, line, listen, main
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import Endpoint
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.runtime.timing import Throttle
from larpixdaq.runtime.units import brief, call_text

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (\w+) ([^:]+): (.*)\n")


def accept(frame, record):
    """Accept each record, as a log without keys does."""


def record(level, text):
    return logging.LogRecord("larpixdaq.test", level, "", 0, text, None, None)


@pytest.fixture
def pull():
    """The context, a socket that receives records, and its address."""
    context = zmq.Context()
    door = Doorkeeper(context, None, lambda key: True, "log")
    socket, address = listen(context, "tcp://127.0.0.1:0", door)
    yield context, socket, address
    door.close()
    context.destroy(0)


def test_a_record_as_a_line():
    assert line(LogRecord(0.5, 30, "LArPix board", "a\nb\tc\x1b")) == (
        "1970-01-01T00:00:00.500000Z WARNING LArPix board: a\\nb\\tc\\x1b\n"
    )


@given(
    st.builds(LogRecord, time=st.floats(), level=st.integers(-(2**63), 2**63 - 1), component=st.text(), text=st.text())
)
def test_every_record_is_one_line(record):
    assert len(line(record).splitlines()) == 1


@given(st.binary(max_size=100))
def test_random_bytes_are_no_records(data):
    with suppress(ProtocolError):
        unpack_record(data)


def test_a_log_that_takes_no_records_is_reported_once(pull, caplog, monkeypatch):
    context, _, address = pull
    monkeypatch.setattr(log_shipping, "_REPORT_AFTER", 0.0)
    shipper = LogShipper("it", context)
    shipper.emit(record(logging.INFO, "x"))
    nowhere = f"tcp://127.0.0.1:{free_port()}"
    until(lambda: shipper.ship(Endpoint(nowhere), None) or caplog.records, "the report")
    for _ in range(10):
        assert not shipper.ship(Endpoint(nowhere), None)
    assert [one.getMessage() for one in caplog.records] == [
        "log records wait, and the oldest will be lost: no log takes them at "
        f"{nowhere}, where only its own host reaches it (larpixdaq-log --address)"
    ]
    monkeypatch.setattr(log_shipping, "_REPORT_AFTER", LIMIT)  # connecting takes a moment
    until(lambda: shipper.ship(Endpoint(address), None), "shipping")
    assert len(caplog.records) == 1
    shipper.ship(Endpoint(), None)


def test_records_kept_while_the_log_is_disconnected(pull):
    context, socket, address = pull
    shipper = LogShipper("it", context)
    for i in range(3000):
        shipper.emit(record(logging.INFO if i % 2 else logging.WARNING, str(i)))
    assert shipper.ship(Endpoint(), None)  # nothing that could be sent
    until(lambda: shipper.ship(Endpoint(address), None), "shipping")
    got = []
    while not got or got[-1].text != "2999":
        assert socket.poll(LIMIT * 1000), "a record"
        got.append(unpack_record(socket.recv()))
    shipper.ship(Endpoint(), None)
    warnings = [one.text for one in got if one.level == logging.WARNING and one.text.isdigit()]
    assert warnings[-1000:] == [str(i) for i in range(1000, 3000, 2)]
    assert any("log records were lost" in one.text for one in got)


def test_shipping_without_a_log_does_not_wait():
    context = zmq.Context()
    shipper = LogShipper("it", context)
    shipper.emit(record(logging.ERROR, "x" * 100_000))
    assert not shipper.ship(Endpoint(f"tcp://127.0.0.1:{free_port()}"), None)
    context.destroy(0)


def test_garbage_and_a_full_disk(tmp_path, pull, caplog):
    context, socket, address = pull
    push = context.socket(zmq.PUSH)
    push.connect(address)
    file = LogFile(tmp_path / "log.txt")
    until(lambda: push.poll(10, zmq.POLLOUT), "connection")
    push.send(b"garbage")
    push.send(b"x" * (300 << 10))
    push.close()
    shipper = LogShipper("it", context)
    shipper.emit(record(logging.ERROR, "real"))
    until(lambda: shipper.ship(Endpoint(address), None), "shipping")
    until(lambda: file.take(socket, accept) and file.written and file.refused == 2, "the record")
    assert (file.written, file.refused, file.lost) == (1, 2, 0)
    assert LINE.fullmatch((tmp_path / "log.txt").read_text()).groups() == ("ERROR", "it", "real")
    file.close()
    file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    shipper.emit(record(logging.ERROR, "lost"))
    assert shipper.ship(Endpoint(address), None)
    until(lambda: file.take(socket, accept) and file.lost, "the loss")
    shipper.ship(Endpoint(), None)
    assert "No space left on device; records are lost" in caplog.text
    assert file.status().lost == 1
    file.close()


class Sender:
    """A socket with these records, as LogFile.take() reads it."""

    def __init__(self, *records):
        self._frames = deque(zmq.Frame(msgspec.msgpack.encode(one)) for one in records)

    def getsockopt(self, option):
        return option != zmq.RCVMORE

    def recv(self, flags, copy):
        if not self._frames:
            raise zmq.Again
        return self._frames.popleft()


def from_(component, n):
    return [LogRecord(0.0, logging.INFO, component, f"line {i}") for i in range(n)]


def test_a_flood_is_written_in_part_and_the_rest_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("larpixdaq.log.BURST", 1000)
    monkeypatch.setattr("larpixdaq.log.RATE", 0)
    file = LogFile(tmp_path / "log.txt")
    assert file.take(Sender(*from_("flood", 500), *from_("board", 3)), accept)
    text = (tmp_path / "log.txt").read_text()
    written = text.count("flood: line")
    assert 10 < written < 30
    assert text.count("board: line") == 3
    assert f"WARNING log: {500 - written} lines of flood were not written" in text
    assert file.status().held_back == 500 - written
    assert [(one.peer, one.count) for one in file.status().limits] == [("flood", 500 - written)]
    monkeypatch.setattr(file, "_report_at", 0.0)
    assert file.take(Sender(), accept)  # reported once
    assert (tmp_path / "log.txt").read_text() == text
    file.close()


def test_a_full_file_is_renamed_and_older_files_are_kept(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("x" * 900 + "\n")
    file = LogFile(path, max_bytes=1000)
    for i in range(150):
        file.take(Sender(LogRecord(0.0, logging.INFO, "board", f"line {i:03}")), accept)
    file.close()
    found = sorted(one.name for one in tmp_path.iterdir())
    assert found == ["log.txt", "log.txt.1", "log.txt.2", "log.txt.3", "log.txt.4"]
    assert all(one.stat().st_size <= 1000 for one in tmp_path.iterdir())
    text = "".join((tmp_path / name).read_text() for name in reversed(found))
    assert [one[-3:] for one in text.splitlines()] == [f"{i:03}" for i in range(150 - text.count("\n"), 150)]


def test_a_file_that_cannot_be_renamed_continues_to_grow(tmp_path, caplog):
    (tmp_path / "log.txt.new").mkdir()
    file = LogFile(tmp_path / "log.txt", max_bytes=1000)
    file.take(Sender(*from_("board", 1)), accept)
    for _ in range(2):
        file.take(Sender(*from_("board", 20)), accept)
    file.close()
    assert (tmp_path / "log.txt").read_text().count("\n") == 41
    assert "cannot be renamed: Is a directory" in caplog.text
    file = LogFile(Path("/dev/null"))
    file.take(Sender(*from_("board", 100)), accept)
    file.close()
    assert Path("/dev/null").is_char_device()


def test_without_older_files_a_full_file_is_removed(tmp_path):
    file = LogFile(tmp_path / "log.txt", max_bytes=1000, older_files=0)
    for i in range(150):
        file.take(Sender(LogRecord(0.0, logging.INFO, "board", f"line {i:03}")), accept)
    file.close()
    assert [one.name for one in tmp_path.iterdir()] == ["log.txt"]
    assert (tmp_path / "log.txt").read_text().endswith("line 149\n")


def test_the_next_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("torn by a power cut")
    file = LogFile(path)
    file.take(Sender(*from_("board", 1)), accept)
    file.take(Sender(*from_("board", 1)), accept)
    file.close()
    first, *lines = path.read_text().splitlines(True)
    assert first == "torn by a power cut\n"
    assert [LINE.fullmatch(one).group(3) for one in lines] == ["line 0", "line 0"]


def test_a_removed_file_is_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("larpixdaq.log._FILE_INTERVAL", 0.0)
    path = tmp_path / "log.txt"
    file = LogFile(path)
    file.take(Sender(*from_("board", 1)), accept)
    path.unlink()
    file.take(Sender(*from_("board", 2)), accept)
    path.rename(tmp_path / "moved")
    path.write_text("of somebody else")
    file.take(Sender(*from_("board", 1)), accept)
    assert (tmp_path / "moved").read_text().count("\n") == 2
    assert [one[-7:] for one in path.read_text().splitlines()] == ["dy else", " line 0"]
    assert caplog.text.count("it was removed or renamed; a new one has begun") == 2
    (path.rename(tmp_path / "again"), path.mkdir())
    file.take(Sender(*from_("board", 3)), accept)
    assert file.status().lost == 3
    path.rmdir()
    file.take(Sender(*from_("board", 1)), accept)
    assert path.read_text().count("\n") == 1
    file.close()


def test_a_flood_on_stderr_is_cut(monkeypatch, capsys):
    monkeypatch.setattr("larpixdaq.runtime.event_loop._STDERR_BURST", 1000)
    monkeypatch.setattr("larpixdaq.runtime.event_loop._STDERR_RATE", 0)

    def flood():
        for i in range(500):
            logging.getLogger("larpixdaq.test").warning("line %d", i)

    assert run_main(flood) == 0
    text = capsys.readouterr().err
    written = text.count("WARNING: line")
    assert 10 < written < 100
    assert text.endswith(f"WARNING: {500 - written} lines were not written: too many\n")


def test_many_components_share_one_limit():
    throttle = Throttle(10, 100, shares=3, clock=lambda: 0.0)
    assert sum(throttle.passes(f"name {i}", 100) for i in range(10_000)) == 3
    assert len(throttle.summaries()) <= 257
    assert throttle.summaries() == []
    assert throttle.dropped == 9997


def test_many_lines_of_one_kind_are_limited_and_counted(monkeypatch, caplog):
    monkeypatch.setattr("larpixdaq.control.log_shipping.RATE", 0.001)
    caplog.set_level(logging.INFO, "larpixdaq")
    limited = LimitedLog(logging.getLogger("larpixdaq.test"))
    for number in range(100):
        limited("requests of anna", logging.INFO, "request %d", number)
        limited("queries of anna", logging.DEBUG, "query %d", number)  # not enabled: takes no place
    limited("failures of anna", logging.WARNING, "failure")
    assert caplog.messages == [
        *(f"request {number}" for number in range(50)),
        "50 lines of requests of anna were not written: too many",
        "failure",
    ]


VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=50,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=10))
def test_parameters_and_results_are_short(params):
    assert len(brief(params)) <= 300
    assert len(call_text("power", params)) <= 310
    assert call_text("power", {"on": True, "tiles": [1, 2], "io_group": None, "kwargs": {}}) == (
        "power(on=True, tiles=[1, 2])"
    )
    assert brief({"rows": np.zeros((3, 4))}) == "{'rows': array of shape (3, 4)}"


def test_names_without_lines_for_long_take_no_place():
    now = [0.0]
    throttle = Throttle(10, 100, shares=1000, clock=lambda: now[0])
    for name in range(10_000):
        now[0] += 1.0
        assert throttle.passes(str(name), 100)
    assert len(throttle._names) <= 257


def test_the_limit_of_a_component_recovers():
    now = [0.0]
    throttle = Throttle(10, 100, shares=2, clock=lambda: now[0])
    assert [throttle.passes("a", 60) for _ in range(2)] == [True, False]
    assert throttle.passes("b", 60)
    now[0] = 2.0
    assert [throttle.passes("a", 60) for _ in range(2)] == [True, False]


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileError, match="log file"):
        LogFile(tmp_path)


def start_log(tmp_path, core_address, port):
    args = ("--core", core_address, "--address", f"tcp://127.0.0.1:{port}", "-o", tmp_path / "log.txt")
    return Process("larpixdaq.log", *args, directory=tmp_path)


def test_a_log_process_that_is_restarted(tmp_path):
    logger = logging.getLogger("larpixdaq.test")
    port = free_port()

    def written(text):
        path = tmp_path / "log.txt"
        return path.exists() and text in path.read_text()

    with core(tmp_path / "state") as running, Operator(running.address) as operator:
        board = Actor(running.address, "LArPix board", "producer", {}, {})
        with board.running():
            logger.warning("before the log")
            with start_log(tmp_path, running.address, port) as log:
                until(lambda: written("LArPix board: before the log"), "what was kept")
                until(lambda: written("core: core listens at"), "what the core said")
                (described,) = [one for one in operator.components().result(LIMIT) if one["kind"] == "log"]
                assert described["name"] == "Log"
                assert log.stop(signal.SIGTERM) == 0
                assert log.stderr == ""
            logger.warning("the log is away")
            with start_log(tmp_path, running.address, port):
                until(lambda: written("LArPix board: the log is away"), "what was kept")
        assert all(LINE.fullmatch(one) for one in (tmp_path / "log.txt").read_text().splitlines(True))


def test_the_log_without_a_core(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("larpixdaq.control.node.REGISTER_LIMIT", 0.2)
    ports = free_port(), free_port()
    args = ["--core", f"127.0.0.1:{ports[0]}", "--address", f"127.0.0.1:{ports[1]}", "-o", str(tmp_path / "log.txt")]
    assert main(args) == 1
    error = capsys.readouterr().err
    assert "no core answers" in error
    assert error.count("\n") == 1


class Kept(list):
    """What a watcher of the log has got so far, in the place of a call's result."""

    def watch(self, recent: RecentRecords, count: int = 200, **position: object) -> dict[str, object]:
        found = recent.records(None, count, **position)
        self += [one["text"] for one in found["records"]]
        return {"after": found["next"], "process": found["process"]}


@given(st.lists(st.integers(0, 5), max_size=20))
def test_watchers_get_each_recent_record_once(numbers):
    recent, watcher, late = RecentRecords(), Kept(), Kept()
    position, texts = {}, []
    for number in numbers:
        new = [f"{len(texts) + index}" for index in range(number)]
        for text in new:
            recent.add(LogRecord(1.5, 30, "name", text))
        texts += new
        position = watcher.watch(recent, **position)
    assert watcher == texts
    late.watch(recent, count=3)
    assert late == texts[-3:]
    assert Kept().watch(recent, after=10**9, process="of an earlier log")["after"] == len(texts)
    assert recent.records(None, 1, after=10**9, process=position.get("process", ""))["records"] == []


def test_recent_records_of_an_earlier_log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(
        line(LogRecord(1.5, 30, "first", "a" * 3000)) + "damaged\n" + line(LogRecord(2.5, 20, "second", "b"))
    )
    file = LogFile(path)
    found = file.recent.records(None)["records"]
    file.close()
    assert [(one["time"], one["level"], one["component"]) for one in found] == [
        (1.5, "WARNING", "first"), (2.5, "INFO", "second"),
    ]  # fmt: skip
    assert found[0]["text"] == "a" * 1996 + " ..."
    for wrong in ({"count": 0}, {"count": True}, {"after": -1}, {"count": "x"}):
        with pytest.raises(RequestError, match="expected a whole number"):
            file.recent.records(None, **wrong)
