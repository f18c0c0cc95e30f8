"""PACMAN source on real sockets: all bytes that reach it become rows or are counted, whatever the board does."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time

import numpy as np
import pytest
import zmq
from decoder_harness import data_word, legacy, message_1_0, word_1_0
from emulated_board import context, emulator
from processes import LIMIT
from source_driver import Driver

from larpixdaq import constants, schema
from larpixdaq._native import board_emulator
from larpixdaq.sources import pacman
from larpixdaq.sources.pacman import PacmanSource
from larpixdaq.sources.zmq_board import HELD_BYTES, WAITING_BATCH, WAITING_QUEUE


@pytest.fixture
def source_at():
    """Opens sources, which are closed in the end."""
    sources = []

    def make(port, io_group=1, host="127.0.0.1", waits=False, **kwargs):
        source = PacmanSource(io_group, host, port, port + 1, **kwargs)
        source.waits = waits
        sources.append(source)
        source.open()
        return source

    yield make
    for source in sources:
        source.close()


def publisher(ctx, port=0):
    out = ctx.socket(zmq.XPUB)
    out.setsockopt(zmq.XPUB_NODROP, 1)
    out.bind(f"tcp://127.0.0.1:{port}")
    return out, int(out.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").rpartition(b":")[2])


def subscribed(out, limit=10_000):
    assert out.poll(limit), f"waited {limit} ms for a subscription"
    assert out.recv() == b"\1"


def balanced(counts, io_group=1):
    """Equations (a) and (b) of the ledger."""
    c = dict(zip(constants.COUNTS, counts[io_group].tolist(), strict=True))
    assert c["bytes_in"] == c["header_bytes"] + c["word_bytes"] + c["trailing_bytes"] + c["rejected_bytes"]
    assert c["words_in"] == c["word_rows"] + c["unknown_words"] + c["rejected_words"]
    return c


def test_the_queue_of_a_board_that_waits_is_bounded(source_at):
    message = b"D" + struct.pack("<IxH", 1_700_000_000, 1000) + (b"T\2" + bytes(14)) * 1000
    with context() as ctx:
        out, port = publisher(ctx)
        source = source_at(port, waits=True)
        subscribed(out)
        out.sndtimeo = 500
        sent = 0
        with contextlib.suppress(zmq.Again):
            while sent < 10 * WAITING_QUEUE:
                out.send(message)
                sent += 1
        # The kernel's buffers and the board's own queue hold messages besides.
        assert WAITING_QUEUE <= sent < 4 * WAITING_QUEUE
        driver = Driver(source)
        driver.until(lambda: driver.count("messages") == sent, "all that was sent")


def test_messages_of_a_held_board_come_when_they_are_many_or_at_the_end(source_at):
    message = b"D" + struct.pack("<IxH", 1_700_000_000, 1) + b"T\2" + bytes(14)
    with context() as ctx:
        out, port = publisher(ctx)
        source = source_at(port)
        subscribed(out)
        out.send(message)
        driver = Driver(source)
        driver.until(lambda: driver.count("messages") == 1, "the first message")
        source.hold(True)
        out.send(message)
        assert not source.sockets[0].poll(100)
        source.hold(False)
        driver.until(lambda: driver.count("messages") == 2, "the second message")
        source.hold(True)
        for _ in range(HELD_BYTES // len(message) + 1):
            out.send(message)
        driver.until(lambda: driver.count("messages") > 2, "messages of a full buffer")
        out.close(linger=0)  # the end of the connection is noticed in any case
        driver.until(lambda: source.boards()[0].away_ns, "the end of the connection")


def test_a_board_that_waits_is_not_drained_while_many_messages_wait(source_at):
    """Its queue is bounded, so a read may empty it although the board has far more messages."""
    message = b"D" + struct.pack("<IxH", 1_700_000_000, 1) + b"T\2" + bytes(14)
    with context() as ctx:
        out, port = publisher(ctx)
        out.sndhwm = 0
        source = source_at(port, waits=True)
        subscribed(out)
        for _ in range(19_700):
            out.send(message)
        driver = Driver(source)
        found = [0]
        while found[-1] < 19_700:
            assert source.sockets[0].poll(20_000)
            threading.Event().wait(0.02)  # in which libzmq fills its queue again
            assert source.read()
            rows = np.zeros(20_000, source.layout.dtype)
            while source.decode(rows) == len(rows):
                pass
            found.append(driver.count("messages"))
            assert source.drained == (found[-1] - found[-2] < WAITING_BATCH // 2)
        assert max(np.diff(found)) == WAITING_BATCH


@pytest.mark.parametrize("per_message", ["auto", "1", "1000"])
def test_every_word_of_an_emulated_board_becomes_a_row(source_at, per_message):
    n = 50_000
    with emulator("--count", str(n), "--rate", "max", "--lossless", "--words-per-message", per_message) as board:
        source = source_at(board.ready["1"]["data"])
        driver = Driver(source)
        driver.until(lambda: driver.count("words_in") >= n, f"{n} words")
        sent = board.finish()["sent"]["1"]
    rows = driver.rows
    assert len(rows) == n + sent["messages"]
    assert np.count_nonzero(rows["packet_type"] == 0) == sent["D"]
    assert np.count_nonzero(rows["packet_type"] == 6) == sent["S"]
    assert np.count_nonzero(rows["packet_type"] == 7) == sent["T"]
    assert np.count_nonzero(rows["packet_type"] == 4) == sent["messages"]
    assert set(rows["io_group"].tolist()) == {1}
    assert driver.count("bytes_in") == 8 * sent["messages"] + 16 * n
    assert driver.count("bad_parity") == 0
    balanced(driver.counts)


def test_messages_are_counted_in_the_counters_of_start(source_at):
    with context() as ctx:
        out, port = publisher(ctx)
        source = source_at(port, io_group=7)
        first = Driver(source)
        subscribed(out)
        board = board_emulator.PacmanBoard(schema.Asic.V2, rate=1000)
        board.fill(10)
        out.send(b"D" + bytes(5) + b"\1\0X" + bytes(15))
        first.until(lambda: first.count("words_in", 7) == 1, "the first message")
        assert len(source.take_unknown()) == 1
        second = Driver(source)
        out.send(bytes(board.buffer[:24]))
        second.until(lambda: second.count("words_in", 7) == 1, "the second message")
        assert (first.count("messages", 7), second.count("messages", 7)) == (1, 1)
        assert first.counts[:7].sum() == first.counts[8:].sum() == 0
        assert second.rows["io_group"].tolist() == [7, 7]


def test_bad_messages_are_counted_and_do_not_harm_good_ones(source_at):
    """Truncated, too long, empty, of other types, oversized: all words between them arrive."""
    good = board_emulator.PacmanBoard(schema.Asic.V2, rate=1000)
    good.fill(10, 10)
    message = bytes(good.buffer[:168])
    bad = [b"", b"D", b"?" + message[1:], message[:-3], message + b"xyz", bytes(9 << 20), b"D" * (9 << 20)]
    with context() as ctx:
        out, port = publisher(ctx)
        driver = Driver(source_at(port))
        subscribed(out)
        for one in bad:
            out.send(message)
            out.send(one)
        out.send_multipart([message[:8], message[8:]])
        driver.until(lambda: driver.count("words_in") >= 10 * (len(bad) + 1) + 19, "the good messages")
        driver.turn()
        c = balanced(driver.counts)
        assert c["bytes_in"] == sum(map(len, bad)) + len(message) * (len(bad) + 1)
        assert c["packets"] == 10 * (len(bad) + 1) + 19
        assert c["rejected_messages"] == 5
        assert c["wrong_counts"] == 2
        assert sum("larger than 8388608 bytes" in line for line in driver.problems) in (1, 2)


def test_a_board_that_is_silent_lost_and_connected_again(source_at, monkeypatch):
    monkeypatch.setattr(pacman, "SILENCE", 0.3)
    with context() as ctx:
        out, port = publisher(ctx)
        driver = Driver(source_at(port))
        subscribed(out)
        message = b"D" + bytes(5) + b"\1\0S" + b"H" + bytes(14)
        out.send(message)
        driver.until(lambda: driver.n == 2, "the first message")
        assert driver.problems == []
        driver.until(lambda: driver.problems, "the silence")
        name = f"PACMAN io_group 1 at tcp://127.0.0.1:{port}"
        assert driver.problems == [f"{name}: silent for 0.3 s"]
        assert driver.source.due() is None
        out.close(linger=0)
        driver.until(lambda: len(driver.problems) == 2, "the loss")
        assert driver.problems[1] == f"{name}: connection lost; trying to reconnect"
        out, _ = publisher(ctx, port)
        # libzmq renews the subscription in the thread that reads, so the source has to be driven meanwhile
        driver.until(lambda: out.poll(0), "the subscription")
        subscribed(out)
        out.send(message)
        driver.until(lambda: driver.n == 4 and len(driver.problems) >= 4, "the board to come back")
        assert f"{name}: connected again" in driver.problems
        assert any("sends again after" in line for line in driver.problems)
        assert driver.source.due() is not None


def test_a_disconnected_board_is_no_error(source_at, monkeypatch):
    monkeypatch.setattr(pacman, "SILENCE", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody answers
        driver = Driver(source_at(taken.getsockname()[1]))
        driver.until(lambda: driver.problems, "the silence")
        assert "silent for 0.2 s, not connected" in driver.problems[0]


def test_a_program_that_does_not_speak_zeromq(source_at):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def babble():
            try:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
            except OSError:
                return

        thread = threading.Thread(target=babble)
        thread.start()
        try:
            driver = Driver(source_at(server.getsockname()[1]))
            driver.until(lambda: driver.problems, "the complaint")
            assert driver.problems[0].endswith("the program at this address does not speak ZeroMQ as a board does")
            assert driver.n == 0
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["no such host", "", "x" * 300, "a..b"])
def test_a_board_whose_host_is_not_found_counts_as_disconnected(source_at, name):
    driver = Driver(source_at(5556, host=name))
    driver.until(lambda: driver.problems, "the problem")
    (problem,) = driver.problems
    assert re.fullmatch(r"PACMAN io_group 1 at tcp://.*: cannot find host .*; trying again", problem)
    (board,) = driver.source.boards()
    assert board.away_ns
    assert board.problem in problem
    # An order does not wait for the name.
    (channel,) = driver.source.channels
    channel.send_raw(bytes(16))
    driver.until(lambda: (reply := channel.take()) and "cannot find host" in reply.error, "the refusal")
    assert not channel.busy


def test_a_slow_resolver_holds_up_nothing(source_at, monkeypatch):
    """Neither open() nor close() waits for it, and the board is connected when the name is found."""
    asked, go_on = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def slow(name, port, family=0, kind=0, proto=0, flags=0):
        if name != "pacman.lab":
            return real(name, port, family, kind, proto, flags)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror("no number")
        asked.set()
        assert go_on.wait(LIMIT)
        return real("127.0.0.1", port, family, kind)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with context() as ctx:
        out, port = publisher(ctx)
        try:
            source_at(port, host="pacman.lab").close()
            driver = Driver(source_at(port, host="pacman.lab"))
            driver.turn()
            assert asked.is_set()
            assert driver.source.boards()[0].away_ns
        finally:
            go_on.set()
        driver.until(lambda: out.poll(0), "the subscription")
        driver.until(lambda: not driver.source.boards()[0].away_ns, "the board to be connected")
        assert driver.problems == []


def test_the_time_of_a_disconnection(source_at):
    with context() as ctx:
        out, port = publisher(ctx)
        driver = Driver(source_at(port))
        subscribed(out)
        driver.until(lambda: not driver.source.boards()[0].away_ns, "the board to be connected")
        began = time.time_ns()
        out.close(linger=0)
        driver.until(lambda: driver.source.boards()[0].away_ns, "the board to be lost")
        assert began <= driver.source.boards()[0].away_ns <= time.time_ns()
        driver.source.start(driver.counts)  # a run begins
        assert driver.source.boards()[0].away_ns >= began


@pytest.mark.parametrize(("format", "other"), [("legacy", "1.0"), ("1.0", "legacy")])
def test_a_board_that_sends_another_format_is_refused(source_at, format, other):
    messages = {"legacy": legacy([data_word(1)]), "1.0": message_1_0([word_1_0(1)])}
    with context() as ctx:
        out, port = publisher(ctx)
        driver = Driver(source_at(port, format=format))
        subscribed(out)
        out.send(messages[format])
        driver.until(lambda: driver.count("messages") == 1, "the right message")
        assert not driver.source.boards()[0].refusal
        out.send(messages[other])
        driver.until(lambda: driver.source.boards()[0].refusal, "the refusal")
        expected = f"sends PACMAN format {other}, not {format}: start the producer with --pacman-format {other}"
        assert expected in driver.source.boards()[0].refusal


def test_format_1_0_needs_a_wide_layout(source_at):
    """The first message shows the format, so that no run is prepared whose layout cannot hold the board's times."""
    for options, refused in (({}, True), ({"format": "1.0"}, False), ({"asic": schema.Asic.V3}, False)):
        with context() as ctx:
            out, port = publisher(ctx)
            driver = Driver(source_at(port, **options))
            subscribed(out)
            assert not driver.source.boards()[0].refusal
            out.send(message_1_0([word_1_0(0x51, receipt=2**33)]))
            driver.until(lambda: driver.n == 2, "the word")  # noqa: B023
            assert driver.rows["receipt_timestamp"][1] == (0 if refused else 2**33)
            refusal = driver.source.boards()[0].refusal
            assert ("start the producer with --pacman-format 1.0" in refusal) == refused


def test_ipv6(source_at):
    with context() as ctx:
        out = ctx.socket(zmq.XPUB)
        out.ipv6 = True
        try:
            port = out.bind_to_random_port("tcp://[::1]")
        except zmq.ZMQError:
            pytest.skip("no IPv6 here")
        driver = Driver(source_at(port, host="::1"))
        subscribed(out)
        out.send(b"D" + bytes(7))
        driver.until(lambda: driver.n == 1, "the message")
        assert driver.source.name == f"PACMAN io_group 1 at tcp://[::1]:{port}"


def test_layouts():
    for asic in schema.Asic:
        assert PacmanSource(1, "127.0.0.1", asic=asic).layout == schema.layout_of(asic)
    assert PacmanSource(1, "127.0.0.1", clock64=True).layout.name == "2.4-clock64"
    assert PacmanSource(1, "127.0.0.1", format="1.0").layout.name == "2.4-clock64"


def test_a_64_bit_clock(source_at):
    with context() as ctx:
        out, port = publisher(ctx)
        driver = Driver(source_at(port, clock64=True))
        subscribed(out)
        out.send(b"D" + bytes(5) + b"\1\0T\2" + bytes(6) + struct.pack("<Q", 1 << 40))
        driver.until(lambda: driver.n == 2, "the trigger")
        assert driver.rows[1]["timestamp"] == 1 << 40


def test_a_board_that_sends_format_1_0_gets_no_legacy_request(source_at):
    """It would crash the board's command server."""
    with context() as ctx:
        out, port = publisher(ctx)
        driver = Driver(source_at(port))
        subscribed(out)
        out.send(message_1_0([], 1_700_000_000 * 10**9))
        driver.until(lambda: driver.count("messages") == 1, "its message")
        (channel,) = driver.source.channels
        channel.send_raw(b"P" + bytes(15))
        reply = channel.take()
        assert reply is not None
        assert reply.error.endswith("legacy format only, and the board sends format 1.0")
        out.send(legacy([], 1_700_000_000))  # its firmware was updated
        driver.until(lambda: driver.count("messages") == 2, "the other message")
        channel.send_raw(b"P" + bytes(15))
        assert channel.take() is None
