"""The connection of a component or an Operator to the core: a socket in its own thread.

The thread registers, sends heartbeats, registers again after a restart of the core, and passes on the messages that
arrive. It continues while the rest of the process waits for a disk.

RecentRequests keeps the answers of recent requests. A broken connection may lose a request or its answer, and the
sender then repeats the request with the same id; it must be done only once. join_core() uses an invitation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zmq

from larpixdaq.constants import HEARTBEAT, NO_CORE
from larpixdaq.errors import ConfigError, FileError, LarpixDaqError, NoCore, ProtocolError, error_from_code
from larpixdaq.keys import credentials
from larpixdaq.keys.credentials import Credentials
from larpixdaq.keys.curve import Client, new_pair
from larpixdaq.protocol.control import (
    MAX_ANSWER,
    MAX_REQUEST,
    Answer,
    Bye,
    FromClient,
    FromCore,
    Heartbeat,
    Join,
    Open,
    Register,
    Update,
    Welcome,
    content,
    pack,
    probe,
    split,
    unpack_core,
)
from larpixdaq.runtime.event_loop import Waker
from larpixdaq.runtime.timing import next_beat, wait_ms

_log = logging.getLogger("larpixdaq.control.connection")
#: Maximum number of messages that wait while the core is disconnected; the oldest are dropped.
_OUTBOX: Final = 10_000
#: Seconds until a message that the socket did not take is tried again.
_RETRY: Final = 0.02
#: Maximum seconds for sending the waiting messages at close(): less than the time until a component counts as lost.
_LINGER: Final = 0.5
#: Seconds without a message of the core after which the key is looked for again, and between two looks. Two looks
#: before its first message are HEARTBEAT apart, because `larpixdaq status` waits for 2 s, and _KEY_RETRY while there
#: is no key, because a core writes its connection file when it starts.
_KEY_INTERVAL: Final = 1.0
_KEY_RETRY: Final = 0.05
#: Seconds for which each of several addresses is tried in the first round, and the maximum after many.
_TRY: Final = 0.6
_MAX_TRY: Final = 1.5
#: Maximum seconds until a core has answered the use of an invitation.
_JOIN_LIMIT: Final = 5.0
#: Maximum number of requests that are remembered after their answer.
_MAX_KEPT: Final = 1024
#: Answers of more than _LARGE bytes are kept up to _MAX_BYTES in all, because 1,000 results with arrays would be GB.
_LARGE: Final = 4096
_MAX_BYTES: Final = 8 << 20


class CoreConnection:
    """Connection to the core at the address `core`; start() starts its thread, which calls all callbacks.

    `core` may have several addresses, with commas between them, of cores of which one is active. The connection is to
    the first one that answers; when it is not heard any more, the others are tried in turn.

    `hello` makes the registration, `beat` the heartbeat. `received` gets every message of the core except refusals.
    `refused` gets the core's refusal of a registration, which is repeated every 250 ms. `each_turn` runs at least
    every 250 ms and returns True when it has nothing left to send.

    The key for the core is looked for as that of the component `component`, or, if that is "", of an Operator. It may
    appear or change later: a core writes its connection file when it starts. A core with a new key for its next start
    says so before, and this is stored with an invitation's key. `insecure`: connect without a key.

    `key`: use this key and look for no other. `key_changed` then stores it, with the core's new key in it; it is called
    in the connection's thread.
    """

    def __init__(
        self,
        core: str,
        *,
        name: str,
        hello: Callable[[], Register | Open],
        beat: Callable[[], Heartbeat],
        received: Callable[[FromCore], None],
        refused: Callable[[Answer], None],
        each_turn: Callable[[], bool],
        component: str = "",
        insecure: bool = False,
        key: Credentials | None = None,
        key_changed: Callable[[Credentials], None] | None = None,
    ) -> None:
        self._addresses = core.split(",")
        #: The address of the core that is connected, or tried.
        self.core = self._addresses[0]
        self._tried = 0  # addresses since a core was heard
        self._next_due = time.monotonic() + _TRY  # of the next address
        #: The key in use; None while there is none.
        self.credentials: Credentials | None = None
        self._stored: Credentials | None = None  # as in its file
        self._store_thread: threading.Thread | None = None
        self._store_error = ""
        self._component, self._insecure = component, insecure
        self._given, self._key_changed = key, key_changed
        self.session = ""
        #: time.monotonic() of the last message from the core; 0 before the first.
        self.heard = 0.0
        #: time.monotonic() at the sending of the newest heartbeat that the core has answered in this session; 0 before
        #: the first. Unlike `heard`, it cannot be too late: a received message may have waited in the socket.
        self.confirmed = 0.0
        self._hello, self._beat, self._received, self._refused = hello, beat, received, refused
        self._each_turn = each_turn
        self._outbox: deque[FromClient] = deque(maxlen=_OUTBOX)
        self._waker = Waker()
        self._closing = False
        self._beat_due = 0.0  # time.monotonic() of the next heartbeat
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._client: Client | None = None
        self._key_due = 0.0  # time.monotonic() of the next look for the key
        self._failure = ""  # of the last handshakes, as Handshakes has it
        self._obstacle = ""  # why there was no connection at the last look
        self._obstacle_due = 0.0
        try:
            self._stored = self._find_key()
            if self._stored is not None:
                self._connect(self._stored)
        except LarpixDaqError:
            self.context.term()
            self._waker.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"link of {name}", daemon=True)

    def _find_key(self) -> Credentials | None:
        """Return the key that is found now; FileError if it cannot be used."""
        if self._given is not None:
            return self._given
        if self._insecure:
            return Credentials(self.core)
        return credentials.find(",".join((self.core, *self._addresses)), self._component)

    def _connect(self, own: Credentials) -> None:
        """Connect with this key; ConfigError if that cannot be."""
        self._disconnect()
        pair = own.pair if own.server else None
        try:
            self._client = Client(self.context, self.core, MAX_ANSWER, own=pair, server=own.server)
        except zmq.ZMQError as error:
            raise ConfigError(f"core address {self.core}: {error}") from None
        self._poller.register(self._client.socket, zmq.POLLIN)
        self.credentials = own

    def _disconnect(self) -> None:
        if self._client is not None:
            self._poller.unregister(self._client.socket)
            self._client.close(linger=200)
            self._client = None

    def _check_key(self) -> None:
        """Look for a new key while the core is not heard, and report why there is no connection."""
        now = time.monotonic()
        failure = self._client.look() if self._client is not None else ""  # each turn: events must not wait
        if now - self.heard < _KEY_INTERVAL and failure != "key":
            self._obstacle = ""
            return
        if now < self._key_due:
            return
        interval = _KEY_INTERVAL if self.heard else HEARTBEAT
        self._key_due = now + (_KEY_RETRY if self._client is None else interval)
        if failure == "peer" and self._failure == "key":  # the connection was closed before the refusal was read
            failure = "key"
        previous, error, changed = self.credentials, "", False
        try:
            found = self._find_key()
            changed = found is not None and found != self._stored
            if changed:
                self._stored = found
            own = found if changed or previous is None else previous
            if failure == "peer" and own is not None and own.next and not changed:
                own = msgspec.structs.replace(own, server=own.next, next=own.server)
            if own is not None and (self._client is None or failure == "key" or own != previous):
                self._connect(own)  # libzmq does not connect again after it was refused
        except (ConfigError, FileError) as problem:
            error = str(problem)
        self._failure = failure if previous == self.credentials else ""
        if changed and self._client is not None:
            return
        if now < self._obstacle_due and failure != "key":
            return
        if not error and self._client is None:
            listening = next(filter(credentials.listens, self._addresses), None)
            error = credentials.missing(listening, self._component) if listening is not None else ""
        elif not error and failure:
            error = credentials.refused(self.core, previous, failure)
        if not error and self._client is not None:
            return  # the handshake is not over
        self._obstacle_due = now + _KEY_INTERVAL
        # Reported when it lasts, because a core that starts listens before its connection file is there. A core that
        # refuses the key has the key store, and will go on refusing.
        if error and (self._obstacle or failure == "key"):
            self._refused(Answer(kind="error", error="key", text=error))
        self._obstacle = error

    def _learn(self, next_server: str) -> None:
        """Store what the core, which has shown its key, says about its key; in a thread, because the disk may hang."""
        own = self.credentials
        if own is None or not own.name:
            return
        self.credentials = own = msgspec.structs.replace(own, next=next_server)
        if self._given is not None:
            if own != self._given:
                self._given = self._stored = own
                if self._key_changed is not None:
                    self._key_changed(own)
            return
        if own != self._stored and (self._store_thread is None or not self._store_thread.is_alive()):
            self._store_thread = threading.Thread(target=self._store, args=(own,), name="key file", daemon=True)
            self._store_thread.start()

    def _store(self, own: Credentials) -> None:
        path = credentials.joined_file(own.address, own.name)
        try:
            found = credentials.read(path)
            if found is not None and found.public == own.public:  # not of a later invitation
                credentials.write(path, own)
                self._stored = own
        except FileError as error:  # the core's next message tries it again
            if self._store_error != str(error):
                self._store_error = str(error)
                _log.error("the new key of the core at %s cannot be stored: %s", self.core, error)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: FromClient) -> None:
        """Queue a message, from any thread. It gets the session when it is sent."""
        self._outbox.append(message)
        self._waker.wake()

    def take_unsent(self) -> list[FromClient]:
        """Return and remove the messages that were not sent yet. Only in the connection's thread."""
        unsent = list(self._outbox)
        self._outbox.clear()
        return unsent

    def silence(self) -> float:
        """Return the seconds since the last message of the core; infinite before the first."""
        return time.monotonic() - self.heard if self.heard else float("inf")

    def close(self) -> None:
        """Send the waiting messages (at most 1 s) and Bye, and end the thread."""
        self._closing = True
        self._waker.wake()
        if self._thread.ident is None:
            self._finish()
        elif self._thread is not threading.current_thread():  # in which the garbage collector may call close()
            self._thread.join()

    def _run(self) -> None:
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        try:
            while not self._closing:
                # Messages that the socket did not take are tried again before the next heartbeat.
                limit = _RETRY if self._outbox and self.session else HEARTBEAT
                now = time.monotonic()
                ready = dict(self._poller.poll(wait_ms(min(now + limit, self._beat_due), now)))
                if self._waker.fileno() in ready:
                    self._waker.clear()
                try:
                    self._turn()
                except Exception:  # an error in larpixdaq must not disconnect the component
                    _log.exception("a turn of the connection to the core at %s has failed", self.core)
                    self._beat_due = time.monotonic() + HEARTBEAT
            self._send_rest()
        except Exception:
            _log.exception("the connection to the core at %s has failed", self.core)
        finally:
            self._finish()

    @property
    def cores(self) -> str:
        """The addresses of all cores, for people."""
        return " or ".join(self._addresses)

    def _try_next(self) -> None:
        """Go to the next address if there is one, and no core answers at this one."""
        now = time.monotonic()
        if len(self._addresses) == 1 or now < self._next_due:
            return
        if self.heard and now - self.heard < NO_CORE:
            self._tried, self._next_due = 0, self.heard + NO_CORE
            return
        self._tried += 1
        self._next_due = now + min(_TRY * 2 ** min(self._tried // len(self._addresses), 8), _MAX_TRY)
        self.core = self._addresses[(self._addresses.index(self.core) + 1) % len(self._addresses)]
        self._disconnect()
        self._key_due = self._beat_due = 0.0

    def _turn(self) -> None:
        self._receive_all()
        self._try_next()
        self._check_key()
        now = time.monotonic()
        if now >= self._beat_due:
            sent = self._transmit(self._heartbeat() if self.session else self._hello())
            self._beat_due = next_beat(now, HEARTBEAT) if sent else now + _RETRY  # not connected yet
        self._flush()
        self._each_turn()

    def _heartbeat(self) -> Heartbeat:
        message = self._beat()
        if self._stored is not None and self._stored.name:
            message.server = self._stored.next or self._stored.server
        message.stamp()
        return message

    def _send_rest(self) -> None:
        limit = time.monotonic() + _LINGER
        while time.monotonic() < limit:
            self._flush()
            if self._each_turn() and not (self._outbox and self.session):
                break
            self._poller.poll(10)
            self._receive_all()
        if self.session:
            if self._store_thread is not None:
                self._store_thread.join(_LINGER)
                self._transmit(self._heartbeat())
            self._transmit(Bye())

    def _finish(self) -> None:
        self._disconnect()
        self.context.destroy()
        self._waker.close()

    def _transmit(self, message: FromClient) -> bool:
        message.session = self.session
        try:
            data = pack(message)
        except ProtocolError as error:
            _log.error("%s", error)
            if isinstance(message, Heartbeat):
                message.status = None
                return self._transmit(message)
            if isinstance(message, Register | Open):  # it would be too large every time
                self._refused(Answer(kind="error", error="malformed", text=str(error)))
            return True
        if self._client is None:
            return False
        try:
            self._client.socket.send_multipart(split(data), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _flush(self) -> None:
        while self.session and self._outbox:
            message = (
                self._outbox.popleft()
            )  # removed first, so that a message that cannot be packed does not block the others
            if not self._transmit(message):
                self._outbox.appendleft(message)
                break

    def _receive_all(self) -> None:
        for _ in range(1000 if self._client is not None else 0):
            assert self._client is not None
            try:
                frame, *more = self._client.receive()
            except zmq.Again:
                return
            data = frame.bytes
            try:
                if more:
                    raise ProtocolError("message from the core: expected 1 part, found more")
                message = unpack_core(data)
            except ProtocolError as error:
                _log.warning("%s", error)
                if not self.session:  # probably a core of another version
                    self._refused(Answer(kind="error", error="version", text=str(error)))
                elif (found := probe(data)).type == "request" and found.request:  # its sender waits for an answer
                    self.send(Answer(request=found.request, kind="error", error="malformed", text=str(error)))
                continue
            self.heard = time.monotonic()
            self._handle(message)

    def _handle(self, message: FromCore) -> None:
        if isinstance(message, Welcome):
            if message.session == self.session:
                return  # answer to a second registration, sent because the first answer was slow
            self.session = message.session
        elif isinstance(message, Answer) and message.error == "unknown_session":
            if message.session == self.session:  # else it is about an earlier session
                self.session = ""
                self._transmit(self._hello())
            return
        elif isinstance(message, Answer) and message.error and not self.session:
            self._refused(message)
            return
        elif isinstance(message, Update):
            if message.session != self.session:
                return
            self.confirmed = max(self.confirmed, message.heartbeat_sent)
        if isinstance(message, Update):
            self._learn(message.next_server)
        self._received(message)


class RecentRequests:
    """The ids of recent requests with their final answers. A request without final answer is never forgotten."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Answer | None] = OrderedDict()
        self._large: deque[tuple[str, int]] = deque()
        self._bytes = 0

    def is_repeat(self, request: str) -> bool:
        """Return whether this id came before, and remember it."""
        if request in self._answers:
            return True
        self._answers[request] = None
        if len(self._answers) > _MAX_KEPT:
            finished = next((key for key, answer in self._answers.items() if answer is not None), None)
            if finished is not None:
                del self._answers[finished]
        return False

    def knows(self, request: str) -> bool:
        return request in self._answers

    def answer(self, request: str) -> Answer | None:
        """Return the final answer to this request; None if there is none yet."""
        return self._answers.get(request)

    def keep(self, request: str, answer: Answer) -> None:
        if request not in self._answers:
            return
        self._answers[request] = answer
        size = len(bytes(answer.value))
        if size <= _LARGE:
            return
        self._large.append((request, size))
        self._bytes += size
        while self._bytes > _MAX_BYTES:
            oldest, size = self._large.popleft()
            self._bytes -= size
            if oldest in self._answers:  # the id stays, so that the request is not done again
                text = "the result was lost on its way, and it was too large to be kept: ask again"
                self._answers[oldest] = Answer(request=oldest, kind="error", text=text, error="failed")


def join_core(invitation: Credentials) -> Credentials:
    """Make a key pair, and have the core of an invitation accept its public key. Returns the new key, not stored.

    `invitation`: as read_token() returns them. NoCore when no core answers within _JOIN_LIMIT seconds; ConfigError when
    the core is another one or does not know the invitation; RequestError when it is not open any more.
    """
    pair = new_pair()
    value = _ask_to_join(invitation, Join(public=pair.public, request="join"))
    name, role = str(value["name"]), str(value["role"])
    return Credentials(invitation.address, invitation.server, *pair, name, role)


def _ask_to_join(invitation: Credentials, message: Join) -> dict[str, Any]:
    """Send a message to the core with the key of an invitation, and return its result."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        address, pair = invitation.address, invitation.pair
        client = Client(context, address, MAX_REQUEST, own=pair, server=invitation.server)
        limit, sent = time.monotonic() + _JOIN_LIMIT, False
        while time.monotonic() < limit:
            if failure := client.look():
                why = "does not know this invitation" if failure == "key" else "is not the one that made this token"
                raise ConfigError(f"the core at {invitation.address} {why}: ask for a new invitation")
            if not sent and client.socket.poll(50, zmq.POLLOUT):
                client.socket.send(pack(message), zmq.NOBLOCK)
                sent = True
            if sent and client.socket.poll(50) and isinstance(answer := unpack_core(client.receive()[0].bytes), Answer):
                if answer.kind == "error":
                    raise error_from_code(answer.error, answer.text)
                result: dict[str, Any] = content(answer)
                return result
        raise NoCore(f"no core answers at {invitation.address} (waited {_JOIN_LIMIT:g} s)")
    except zmq.ZMQError as error:
        raise ConfigError(f"core address {invitation.address}: {error}") from None
    finally:
        context.destroy(0)
