"""Receiver and Sender, with libzmq's functions and with pyzmq's methods."""

from __future__ import annotations

import numpy as np
import pytest
import zmq
from emulated_board import context
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT, until

from larpixdaq import schema
from larpixdaq._native import zmq_batch
from larpixdaq._native.zmq_batch import Receiver, Sender, drop_rest, send_parts


@pytest.fixture(params=["libzmq", "pyzmq"])
def functions(request, monkeypatch):
    """Use libzmq's functions, or pyzmq's methods as on computers without access to libzmq's."""
    if request.param == "pyzmq":
        monkeypatch.setattr(zmq_batch, "_NATIVE", None)


def pair(ctx, kinds=(zmq.PUSH, zmq.PULL), address="inproc://here"):
    out, into = ctx.socket(kinds[0]), ctx.socket(kinds[1])
    out.bind(address)
    into.connect(out.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0"))
    return out, into


def messages_of(receiver, n):
    return [bytes(receiver.buffer[start : start + length]) for start, length in receiver.spans[:n].tolist()]


def test_native_functions_are_in_use():
    with context() as ctx:
        _, into = pair(ctx)
        assert Receiver(into).native
        assert Sender(into).native
        assert Receiver(into).spans.dtype == schema.SPAN


def test_parts_are_sent_as_one_message(functions):
    with context() as ctx:
        router, dealer = pair(ctx, (zmq.ROUTER, zmq.DEALER), "tcp://127.0.0.1:0")
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        dealer.send(b"hello")
        route = router.recv_multipart()[0]
        parts = [b"header", b"", memoryview(bytes(100_000)), np.arange(8, dtype=np.uint8).data]
        send_parts(router, route, *parts)
        assert dealer.poll(LIMIT * 1000)
        assert dealer.recv_multipart() == [bytes(part) for part in parts]
        with pytest.raises(zmq.ZMQError) as raised:
            send_parts(router, b"nobody", b"header", b"rows")
        assert raised.value.errno == zmq.EHOSTUNREACH
        send_parts(router, route, b"next")  # the refused message has left nothing behind
        assert dealer.recv_multipart() == [b"next"]
        router.close()
        with pytest.raises(zmq.ZMQError):
            send_parts(router, route, b"late")


@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=examples(60))
@given(
    messages=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=3), max_size=30),
    most=st.integers(1, 10),
    size=st.integers(1, 120),
)
def test_messages_are_received_or_counted_with_any_buffer(native, messages, most, size):
    """All messages that fit the buffer arrive in order with their parts joined. Larger messages are counted."""
    sent, number = [], 0
    for sizes in messages:
        parts = []
        for n in sizes:
            parts.append(bytes((number + k) % 256 for k in range(n)))
            number += 7
        sent.append(parts)
    whole = [b"".join(parts) for parts in sent]
    with context() as ctx, pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(zmq_batch, "_NATIVE", None)
        out, into = pair(ctx)
        receiver = Receiver(into, messages=most, size=size)
        assert receiver.native == native
        for parts in sent:
            out.send_multipart(parts)
        got = []
        empty = 0
        while empty < 2:  # a call may return no message after it has dropped some
            n = receiver.receive()
            assert n <= most
            got += messages_of(receiver, n)
            empty = 0 if n else empty + 1
        assert got == [message for message in whole if len(message) <= size]
        assert receiver.oversized == sum(len(message) > size for message in whole)
        assert receiver.oversized_bytes == sum(len(message) for message in whole if len(message) > size)


@pytest.mark.usefixtures("functions")
def test_a_message_without_room_waits_for_the_next_call():
    with context() as ctx:
        out, into = pair(ctx)
        receiver = Receiver(into, size=100)
        for n in (60, 60, 40):
            out.send(bytes([n]) * n)
        assert [receiver.receive(), receiver.receive(), receiver.receive()] == [1, 2, 0]
        out.send(b"x" * 60)
        out.send(b"y" * 60)
        assert receiver.receive() == 1
        # the receiver holds a message now, which must not block the end of the context
        del receiver


@pytest.mark.usefixtures("functions")
def test_dealer_and_sub_over_tcp():
    with context() as ctx:
        out, into = pair(ctx, (zmq.XPUB, zmq.SUB), "tcp://127.0.0.1:*")
        into.subscribe(b"")
        assert out.poll(20_000), "no subscription came"
        out.recv()
        receiver = Receiver(into)
        for k in range(500):
            out.send(k.to_bytes(4, "little") * 6)
        got = []
        until(
            lambda: into.poll(10) and not got.extend(messages_of(receiver, receiver.receive())) and len(got) == 500,
            "500 messages",
        )
        assert got == [k.to_bytes(4, "little") * 6 for k in range(500)]


@pytest.mark.usefixtures("functions")
@pytest.mark.usefixtures("functions")
def test_the_rest_of_a_message_is_dropped_and_the_next_one_is_whole():
    with context() as ctx:
        out, into = pair(ctx)
        for parts in ([b"a"] + 999 * [b""], [b"b"], [b"c", b"d", b"e"]):
            out.send_multipart(parts)
        assert into.poll(LIMIT * 1000)
        assert (into.recv(), drop_rest(into), drop_rest(into)) == (b"a", 999, 0)
        assert (into.recv(), drop_rest(into)) == (b"b", 0)
        assert (into.recv(), into.recv(), drop_rest(into)) == (b"c", b"d", 1)
    with pytest.raises(zmq.ZMQError):
        drop_rest(into)


def test_closed_sockets_raise_zmq_error():
    with context() as ctx:
        out, into = pair(ctx)
        receiver, sender = Receiver(into), Sender(out)
        into.close()
        out.close()
        with pytest.raises(zmq.ZMQError, match="non-socket"):
            receiver.receive()
        with pytest.raises(zmq.ZMQError, match="non-socket"):
            sender.send(np.zeros(4, np.uint8), np.array([(0, 4)], schema.SPAN))


@pytest.mark.parametrize(("messages", "size"), [(0, 10), (1, 0), (1, 1 << 32)])
def test_impossible_buffer_sizes_are_an_error(messages, size):
    with context() as ctx, pytest.raises(ValueError, match="Receiver: needs"):
        Receiver(pair(ctx)[1], messages=messages, size=size)


@pytest.mark.usefixtures("functions")
def test_sending_stops_when_the_queue_is_full():
    with context() as ctx:
        out, into = ctx.socket(zmq.PUSH), ctx.socket(zmq.PULL)
        out.sndhwm = into.rcvhwm = 10
        out.bind("inproc://here")
        into.connect("inproc://here")
        sender = Sender(out)
        data = np.arange(200, dtype=np.uint8)
        spans = np.array([(2 * k, k % 3) for k in range(100)], schema.SPAN)
        sent = sender.send(data, spans)
        assert 10 <= sent < 100
        got = []
        receiver = Receiver(into)

        def turn():
            nonlocal sent
            got.extend(messages_of(receiver, receiver.receive()))
            sent += sender.send(data, spans[sent:])
            return sent == 100

        until(turn, "room for all messages")
        got += messages_of(receiver, receiver.receive())
        assert got == [bytes(data[2 * k : 2 * k + k % 3]) for k in range(100)]


@pytest.mark.usefixtures("functions")
def test_with_a_wrong_span_no_message_is_sent():
    with context() as ctx:
        out, into = pair(ctx)
        sender = Sender(out)
        with pytest.raises(ValueError, match=r"message 1: span .* outside of the buffer of 8 bytes"):
            sender.send(np.zeros(8, np.uint8), np.array([(0, 8), (4, 5)], schema.SPAN))
        assert sender.send(np.zeros(0, np.uint8), np.zeros(0, schema.SPAN)) == 0
        assert sender.send(np.zeros(0, np.uint8), np.array([(0, 0)], schema.SPAN)) == 1
        assert into.recv() == b""
        assert not into.poll(0)
