"""The log: one line a record, whatever is in it, and a log that comes and goes."""

import logging
import re
import signal
from contextlib import suppress

import pytest
import zmq
from actors import Actor, core
from hypothesis import given
from hypothesis import strategies as st
from processes import LIMIT, Process, free_port, until

from larpixdaq.control.shipping import Record, RecordHandler, push_socket, unpack_record
from larpixdaq.errors import FileError, ProtocolError
from larpixdaq.log import LogFile, line, listen, main
from larpixdaq.operator import Operator

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (\w+) ([^:]+): (.*)\n")


def record(level, text):
    return logging.LogRecord("larpixdaq.test", level, "", 0, text, None, None)


@pytest.fixture
def pull():
    """A socket that takes records, its address, and the context."""
    context = zmq.Context()
    socket, address = listen(context, "tcp://127.0.0.1:0")
    yield context, socket, address
    context.destroy(0)


def test_a_line():
    assert line(Record(0.5, 30, "LArPix board", "a\nb\tc\x1b")) == (
        "1970-01-01T00:00:00.500000Z WARNING LArPix board: a\\nb\\tc\\x1b\n"
    )


@given(st.builds(Record, time=st.floats(), level=st.integers(-(2**63), 2**63 - 1), component=st.text(), text=st.text()))
def test_every_record_is_one_line(record):
    assert len(line(record).splitlines()) == 1


@given(st.binary(max_size=100))
def test_random_bytes_are_no_records(data):
    with suppress(ProtocolError):
        unpack_record(data)


def test_records_kept_while_the_log_is_away(pull):
    context, socket, address = pull
    handler = RecordHandler("it")
    for i in range(3000):
        handler.emit(record(logging.INFO if i % 2 else logging.WARNING, str(i)))
    assert not handler.ship(None)
    push = push_socket(context, address)
    until(lambda: handler.ship(push), "shipping")
    got = []
    while not got or got[-1].text != "2999":
        assert socket.poll(LIMIT * 1000), "a record"
        got.append(unpack_record(socket.recv()))
    push.close()
    warnings = [one.text for one in got if one.level == logging.WARNING and one.text.isdigit()]
    assert warnings[-1000:] == [str(i) for i in range(1000, 3000, 2)]
    assert any("log records were lost" in one.text for one in got)


def test_shipping_to_a_log_that_is_not_there_never_waits():
    context = zmq.Context()
    push = push_socket(context, f"tcp://127.0.0.1:{free_port()}")
    handler = RecordHandler("it")
    handler.emit(record(logging.ERROR, "x" * 100_000))
    assert not handler.ship(push)
    context.destroy(0)


def test_garbage_and_a_full_disk(tmp_path, pull, caplog):
    context, socket, address = pull
    push = push_socket(context, address)
    file = LogFile(tmp_path / "log.txt")
    until(lambda: push.poll(10, zmq.POLLOUT), "connection")
    push.send(b"garbage")
    push.send(b"x" * (300 << 10))
    handler = RecordHandler("it")
    handler.emit(record(logging.ERROR, "real"))
    assert handler.ship(push)
    until(lambda: file.take(socket) and file.written, "the record")
    assert (file.written, file.refused, file.lost) == (1, 2, 0)
    assert LINE.fullmatch((tmp_path / "log.txt").read_text()).groups() == ("ERROR", "it", "real")
    file.close()
    file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    handler.emit(record(logging.ERROR, "lost"))
    handler.ship(push)
    push.close()
    until(lambda: file.take(socket) and file.lost, "the loss")
    assert "No space left on device; records are lost" in caplog.text
    assert file.status()["lost"] == 1
    file.close()


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileError, match="log file"):
        LogFile(tmp_path)


def start_log(tmp_path, core_address, port):
    args = ("--core", core_address, "--address", f"tcp://127.0.0.1:{port}", "-o", tmp_path / "log.txt")
    return Process("larpixdaq.log", *args, directory=tmp_path)


def test_the_log_process_comes_and_goes(tmp_path):
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
    monkeypatch.setattr("larpixdaq.node.PATIENCE", 0.2)
    ports = free_port(), free_port()
    args = ["--core", f"127.0.0.1:{ports[0]}", "--address", f"127.0.0.1:{ports[1]}", "-o", str(tmp_path / "log.txt")]
    assert main(args) == 1
    error = capsys.readouterr().err
    assert "no core answers" in error
    assert error.count("\n") == 1
