"""Connections with keys, over real sockets: who is admitted, whose a message is, and connections that are closed."""

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import zmq
from processes import LIMIT, until
from raw_sockets import Context, zmtp, zmtp_greeting

from larpixdaq.errors import ProtocolError
from larpixdaq.keys import connections, curve
from larpixdaq.keys.connections import Connections
from larpixdaq.keys.curve import Admission, Doorkeeper, Handshakes, KeyPair, connect_with, new_pair
from larpixdaq.keys.peer_limits import PeerLimits
from larpixdaq.runtime.timing import Throttle

#: MAXMSGSIZE of the listening socket.
LARGEST = 10_000


class House:
    """A ROUTER with a doorkeeper; `allowed` are the keys that it admits."""

    owner = "guest"

    def __init__(self, context: zmq.Context, *, keys: bool = True, pair=None, door: Doorkeeper | None = None) -> None:
        """`door`: another doorkeeper, of the key pair `pair`."""
        self.pair, self.allowed = pair or (new_pair() if keys else None), set()
        whose = lambda key: self.owner if key in self.allowed else None  # noqa: E731
        self.door = door or Doorkeeper(context, self.pair, whose, "test")
        context.__dict__.setdefault("doors", []).append(self.door)
        self.router = context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        self.door.guard(self.router)
        self.router.bind("tcp://127.0.0.1:*")
        self.address = self.router.getsockopt_string(zmq.LAST_ENDPOINT)

    def next(self) -> list[zmq.Frame] | None:
        self.door.answer()
        with contextlib.suppress(zmq.Again):
            return self.router.recv_multipart(zmq.NOBLOCK, copy=False)
        return None


class Guest:
    def __init__(self, context: zmq.Context, house: House, pair: KeyPair | None, server: str = "", route=b"") -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.setsockopt(zmq.LINGER, 0)
        if route:
            self.socket.setsockopt(zmq.ROUTING_ID, route)
        if pair is not None:
            connect_with(self.socket, pair, server or house.pair.public)
        self.handshakes = Handshakes(self.socket)
        self.socket.connect(house.address)

    def send(self, house: House, message: bytes = b"hello") -> list[zmq.Frame]:
        """Send a message as soon as that can be, and wait until it has come."""

        def sent():
            house.door.answer()
            with contextlib.suppress(zmq.Again):
                self.socket.send(message, zmq.NOBLOCK)
                return True

        until(sent, "a connection")
        return until(house.next, "a message")

    def fails(self, house: House) -> str:
        return until(lambda: (house.door.answer(), self.handshakes.look())[1], "a handshake to fail")


@pytest.fixture
def contexts() -> Iterator[tuple[zmq.Context, zmq.Context]]:
    made = Context(), Context()
    yield made
    for context in made:
        for door in context.__dict__.get("doors", []):
            door.close()
        context.destroy(0)


def test_an_allowed_key_is_admitted_and_its_messages_carry_it(contexts):
    house, pairs = House(contexts[0]), [new_pair(), new_pair()]
    house.allowed |= {pair.public for pair in pairs}
    guests = [Guest(contexts[1], house, pair) for pair in pairs]
    for _ in range(2):
        for guest, pair in zip(guests, pairs, strict=True):
            route, frame = guest.send(house)
            assert house.door.sender(route.bytes, frame) == house.door.key_of(frame) == pair.public
    assert house.door.refused == 0


def test_the_limit_of_a_message_is_that_of_its_content(contexts):
    house, pair = House(contexts[0]), new_pair()
    house.allowed.add(pair.public)
    _, frame = Guest(contexts[1], house, pair).send(house, bytes(LARGEST))
    assert len(frame.bytes) == LARGEST


def test_who_has_no_key_or_an_unknown_one_is_refused(contexts):
    house = House(contexts[0])
    assert Guest(contexts[1], house, new_pair()).fails(house) == "key"
    assert house.door.refused == 1
    assert Guest(contexts[1], house, None).fails(house) == "peer"
    assert house.next() is None


def test_a_client_refuses_a_server_with_another_key(contexts):
    house, pair = House(contexts[0]), new_pair()
    house.allowed.add(pair.public)
    assert Guest(contexts[1], house, pair, server=new_pair().public).fails(house) == "peer"
    assert house.next() is None
    assert house.door.refused == 0


def test_a_revoked_key_loses_its_open_connection_and_gets_no_new_one(contexts):
    house, pair, other = House(contexts[0]), new_pair(), new_pair()
    house.allowed |= {pair.public, other.public}
    guest, stays = Guest(contexts[1], house, pair), Guest(contexts[1], house, other)
    route = house_route(guest, house)
    assert house_route(stays, house) != route
    house.allowed.remove(pair.public)
    assert house.door.disconnect(pair.public) == [route]
    assert guest.fails(house) == "key"
    assert house_route(stays, house)
    assert house.door.disconnect(pair.public) == []


def test_a_connection_from_before_the_core_used_keys_is_closed_when_it_does(contexts):
    pair, stranger, member = new_pair(), new_pair(), new_pair()
    admission = Admission(contexts[0], pair, "test")
    house = House(contexts[0], pair=pair, door=admission.door)
    admission.apply({}, insecure=True)
    route = house_route(Guest(contexts[1], house, stranger), house)
    stays = Guest(contexts[1], house, member)
    assert house_route(stays, house) != route
    assert admission.apply({member.public: "Offline storage"}, insecure=False) == [route]
    assert house_route(stays, house)
    assert admission.apply({}, insecure=False)


def house_route(guest: Guest, house: House) -> bytes:
    route, frame = guest.send(house)
    house.door.sender(route.bytes, frame)
    return route.bytes


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(connections, "OPEN", 3)
    monkeypatch.setattr(curve, "_HANDSHAKE_LIMIT", 500)


def shut(house: House, guest: Guest) -> bool:
    """Whether a guest that may send has no connection."""
    house.next()
    return not guest.socket.poll(0, zmq.POLLOUT)


def test_a_key_has_a_limited_number_of_open_connections_and_others_are_not_affected(contexts, few):
    house, pair, other = House(contexts[0]), new_pair(), new_pair()
    house.allowed |= {pair.public, other.public}
    first = Guest(contexts[1], house, other)
    route = house_route(first, house)
    guests = [Guest(contexts[1], house, pair) for _ in range(3)]
    for guest in guests:
        house_route(guest, house)
    late = Guest(contexts[1], house, pair)
    until(lambda: (house.door.answer(), house.door.limits.total)[1], "the limit")
    assert [(one.peer, one.limit) for one in house.door.limits.report()] == [("guest", "3 open connections")]
    assert house.door.refused == 0
    assert house_route(first, house) == route
    for guest in guests:  # its own other work goes on
        house_route(guest, house)
    assert shut(house, late)
    guests[0].socket.close()
    house_route(late, house)  # libzmq tries again by itself


def test_all_invited_keys_together_leave_connections_for_the_cores_own_user(contexts, monkeypatch):
    monkeypatch.setattr(connections, "_TOGETHER", 6)
    monkeypatch.setattr(connections, "_PART", 3)
    monkeypatch.setattr(curve, "_HANDSHAKE_LIMIT", 500)
    house, pairs = House(contexts[0]), [new_pair() for _ in range(5)]
    house.allowed |= {pair.public for pair in pairs}
    guests = [Guest(contexts[1], house, pair) for pair in pairs[:3] for _ in range(2)]
    for guest in guests:
        house_route(guest, house)
    late = [Guest(contexts[1], house, pairs[0]), Guest(contexts[1], house, pairs[3])]
    until(lambda: (house.next(), len(house.door.limits.report()))[1] == 2, "two limits")
    limits = {one.limit for one in house.door.limits.report()}
    assert limits == {"2 open connections", "6 open connections of all keys"}
    house.owner = ""
    for _ in range(3):
        house_route(Guest(contexts[1], house, pairs[4]), house)
    house.owner = "guest"
    for guest in guests:
        house_route(guest, house)
    assert all(shut(house, guest) for guest in late)


def test_connections_that_say_nothing_do_not_count_for_ever(contexts, few):
    house, pair, other = House(contexts[0]), new_pair(), new_pair()
    house.allowed |= {pair.public, other.public}
    first = Guest(contexts[1], house, other)
    route = house_route(first, house)
    silent = [Guest(contexts[1], house, pair) for _ in range(3)]
    until(lambda: all(not shut(house, one) for one in silent), "three connections")
    house_route(Guest(contexts[1], house, pair), house)
    assert house_route(first, house) == route


def test_new_connections_of_a_key_are_limited_by_the_second(contexts, monkeypatch):
    monkeypatch.setattr(curve, "_HANDSHAKE_LIMIT", 500)
    monkeypatch.setattr(connections, "connection_rates", lambda: (Throttle(0.5, 2), Throttle(0.5, 1)))
    house, pair, other = House(contexts[0]), new_pair(), new_pair()
    house.allowed |= {pair.public, other.public}
    for _ in range(2):
        house_route(Guest(contexts[1], house, pair), house)
    late = Guest(contexts[1], house, pair)
    until(lambda: (house.door.answer(), house.door.limits.total)[1], "the limit")
    assert house.door.limits.report()[0].limit == "new connections a second"
    house.door._connections._rate = Throttle(1000, 1000)
    house_route(late, house)
    house.owner = ""
    house_route(Guest(contexts[1], house, other), house)


def test_whose_the_frames_of_a_socket_without_routes_are(contexts, few):
    house, pairs = House(contexts[0]), [new_pair(), new_pair()]
    house.allowed |= {pair.public for pair in pairs}
    pull = contexts[0].socket(zmq.PULL)
    house.door.guard(pull)
    pull.bind("tcp://127.0.0.1:*")
    pushes = []
    for pair in pairs:
        for _ in range(2):
            push = contexts[1].socket(zmq.PUSH)
            push.immediate, push.linger = True, 0
            connect_with(push, pair, house.pair.public)
            push.connect(pull.getsockopt_string(zmq.LAST_ENDPOINT))
            until(lambda push=push: (house.door.answer(), push.poll(0, zmq.POLLOUT))[1], "a connection")
            pushes.append((push, pair))
    for push, pair in [*pushes, *pushes]:
        push.send(b"record")
        assert pull.poll(1000 * LIMIT)
        assert house.door.key_of(pull.recv(copy=False)) == pair.public
    known = house.door._connections
    assert [known.is_open(route) for route in known._known] == [True] * 4


@pytest.mark.parametrize("has_spoken", [True, False])
def test_a_message_without_end_is_cut_off(contexts, monkeypatch, has_spoken):
    """Without libzmq at the sending side, because that sends a message when its last part is there."""
    monkeypatch.setattr(connections, "UNFINISHED", 100_000)
    router = contexts[0].socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    host, port = router.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").split(":")
    with contextlib.closing(Connections()) as found, socket.create_connection((host, int(port))) as member:
        found.watch(router, LARGEST)
        member.settimeout(LIMIT)
        member.sendall(zmtp_greeting(b"DEALER"))
        until(lambda: b"Socket-Type" in member.recv(1000), "the handshake")

        def speak() -> None:
            """Send a message of many times the allowed size in 10 messages, and take it."""
            for _ in range(10):
                member.sendall(zmtp(bytes(100_000), 0))
                assert router.poll(1000 * LIMIT)
                route, frame = router.recv_multipart(copy=False)
                if found.key(route.bytes) is None:
                    found.note(route.bytes, "key", frame.get(zmq.SRCFD))

        for _ in range(3 if has_spoken else 0):
            speak()
            assert found.limit_unfinished() == []
        for _ in range(30):
            member.sendall(zmtp(bytes(10_000), 1))
        until(lambda: found.limit_unfinished(), "the limit")
        until(lambda: member.recv(1000) == b"", "the connection to be closed")
        assert router.poll(0) == 0


def test_a_look_for_connections_keeps_the_locks_of_files(tmp_path):
    """Those of SQLite end when any descriptor of the file is closed."""
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with open(tmp_path / "file", "w") as file, contextlib.closing(Connections()) as found:
        fcntl.lockf(file, fcntl.LOCK_EX)
        found.limit_unfinished()
        other = subprocess.run([sys.executable, "-c", lock, file.name], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in other.stderr


def test_a_limit_is_logged_once_and_counted(caplog):
    limits = PeerLimits("stream")
    for _ in range(1000):
        limits.reached("observer 'x'", "64 open connections")
    (entry,) = limits.report()
    assert (entry.count, limits.total) == (1000, 1000)
    assert [record.getMessage() for record in caplog.records] == [
        "stream: observer 'x' has reached a limit: 64 open connections (1 times so far)"
    ]
    for number in range(1000):
        limits.reached(str(number), "x")
    assert len(limits.report()) <= 50
    assert len(caplog.records) == 1  # one line a second


def test_a_peer_that_chooses_its_own_route_is_refused(contexts):
    house, pair = House(contexts[0]), new_pair()
    house.allowed.add(pair.public)
    route, frame = Guest(contexts[1], house, pair, route=b"mine").send(house)
    with pytest.raises(ProtocolError, match="routing id was set by the peer"):
        house.door.sender(route.bytes, frame)


def test_without_keys_everybody_is_admitted(contexts):
    house = House(contexts[0], keys=False)
    route, frame = Guest(contexts[1], house, None).send(house)
    assert house.door.sender(route.bytes, frame) == ""


def test_connections_without_a_key_leave_descriptors_for_members(contexts, monkeypatch):
    """Above a number of descriptors some of them are closed; members stay connected, and new ones are admitted."""
    monkeypatch.setattr(curve, "_HANDSHAKE_LIMIT", 60_000)
    house, pairs = House(contexts[0]), [new_pair(), new_pair()]
    house.allowed |= {pair.public for pair in pairs}
    member = Guest(contexts[1], house, pairs[0])
    route = house_route(member, house)
    host, port = house.address.removeprefix("tcp://").split(":")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(60)]
        poller = select.poll()
        for half, connection in enumerate(held):
            connection.sendall(b"\xff" + bytes(8) if half % 2 else b"")
            assert connection.recv(1) == b"\xff"  # it was accepted
            poller.register(connection, select.POLLRDHUP)
        monkeypatch.setattr(connections, "_ENOUGH", len(os.listdir("/proc/self/fd")) - 20)

        def closed() -> int:
            house.door.answer()
            return len(poller.poll(0))

        until(lambda: closed() >= 15, "some to be closed")
        assert closed() <= 25
        assert house_route(Guest(contexts[1], house, pairs[1]), house)
        assert house_route(member, house) == route
