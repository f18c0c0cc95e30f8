"""The core: knows the components, owns run state and run number, and passes on the requests of Operators."""

from __future__ import annotations

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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import zmq

from larpixdaq import config
from larpixdaq.alarm_config import AlarmConfig, load_alarms
from larpixdaq.constants import LOG, LOST, PRODUCER, RUN_DATA, STOP, STORAGE, SUPERVISOR
from larpixdaq.control.alarms import Alarms
from larpixdaq.control.audit import Audit
from larpixdaq.control.catalogue import Catalogue
from larpixdaq.control.log_shipping import LogShipper
from larpixdaq.control.registry import Component, Control, NameTaken, OperatorPeer, Peer, Registry, TooMany
from larpixdaq.control.request_router import CoreActions, RequestRouter
from larpixdaq.control.run_control import RunControl
from larpixdaq.control.shared_catalogue import SharedCatalogue
from larpixdaq.errors import ConfigError, FileError, NotAllowed, ProtocolError, RequestError, UsageError
from larpixdaq.keys import credentials
from larpixdaq.keys.credentials import Credentials
from larpixdaq.keys.curve import Doorkeeper, receive
from larpixdaq.keys.key_store import ANYONE, KeyStore, Member
from larpixdaq.keys.peer_limits import registration_rates
from larpixdaq.protocol.control import (
    MAX_ANSWER,
    MAX_FRAME,
    MAX_REQUEST,
    ActionRequest,
    Answer,
    Bye,
    ConsumerSession,
    Endpoint,
    FromClient,
    FromCore,
    Heartbeat,
    Join,
    Open,
    Register,
    Update,
    Welcome,
    pack,
    packed,
    probe,
    session_digest,
    unpack_client,
)
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.timing import wait_ms
from larpixdaq.stream import jetstream
from larpixdaq.version import VERSION

if TYPE_CHECKING:
    from larpixdaq.stream.lease import Bucket, Lease

_log = logging.getLogger("larpixdaq.core")
#: Maximum seconds of one turn of the loop for received messages.
_TAKE_LIMIT: Final = 0.05
#: Maximum number of received messages of each peer that wait, because they may be large. More wait at the peer.
_QUEUE: Final = 100
#: Maximum number of frames of a large answer.
_MAX_FRAMES: Final = MAX_ANSWER // MAX_FRAME
#: Maximum seconds between two turns of the loop: while a procedure with time limits runs, and otherwise. If more than
#: _MAX_TURN seconds have passed, the core itself has paused.
_BUSY_TURN: Final = 0.05
_IDLE_TURN: Final = 0.3
_MAX_TURN: Final = 0.5
#: A kind of refusal in the audit, and the counts of refusals in a component's status with their kinds.
_NO_KEY: Final = "connection without a known key"
_REFUSALS: Final = {
    "refused_connections": _NO_KEY,
    "refused_frames": "invalid message",
    "refused": "invalid message",
}
#: Maximum seconds until the last rows of the audit are written, and until the last alarms are sent.
_AUDIT_LIMIT: Final = 2.0
_ALARM_LIMIT: Final = 1.0
#: Seconds after the start in which the components of a run in progress have to register, until an alarm misses them.
_RETURN: Final = 5.0
#: Seconds between two checks that run catalogue and connection file were not removed.
_FILES_INTERVAL: Final = 1.0
#: Seconds of the lease of a core, because elections of the brokers take up to 9. Milliseconds between two looks at it,
#: and seconds for which a core without --standby waits for the lease of a core that may have died.
_LEASE: Final = 10.0
_LEASE_INTERVAL: Final = 50
_LEASE_WAIT: Final = _LEASE + 2.0


class Shared(NamedTuple):
    """The lease of a core that is not the only one, its bucket, and the term in which the core was started."""

    bucket: Bucket
    lease: Lease
    term: int

    def is_held(self) -> bool:
        return self.lease.term == self.term


def _endpoint(component: Component, name: str) -> Endpoint | None:
    """Return where a component says that it listens; None if it does not say so."""
    try:
        return msgspec.convert(component.info.get(name), Endpoint)
    except msgspec.ValidationError:
        return None


class Core:
    """The core, with its ROUTER at `address`; LarpixDaqError if it cannot start.

    `address` has a port (0: any free port). `log_address` is used while no log is registered; "": no log. `shared`: the
    lease that this core holds, because others may take it over.
    """

    def __init__(
        self,
        address: str,
        log_address: str,
        directory: Path,
        *,
        insecure: bool = False,
        alarms: AlarmConfig | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._insecure = insecure
        self._shared = shared
        self._withheld: list[tuple[bytes, FromCore]] = []  # messages that were to be sent after the end of the lease
        self._log_address = log_address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, 4 * MAX_FRAME)  # so that a request that is too long gets an answer
        self._router.setsockopt(zmq.RCVHWM, _QUEUE)
        self._router.setsockopt(zmq.LINGER, 200)
        config.close_dead_connections(self._router, config.DEAD_CONNECTION)
        with contextlib.ExitStack() as undo:
            undo.callback(self._context.destroy, 0)
            self._catalogue = Catalogue(directory) if shared is None else SharedCatalogue(directory, shared.bucket)
            undo.callback(self._catalogue.close)
            self._keys = None if insecure else KeyStore(directory)
            pair = self._keys.server if self._keys is not None else None
            self._door = Doorkeeper(self._context, pair, self._whose, "core")
            undo.callback(self._door.close)
            self._door.guard(self._router, MAX_ANSWER)
            try:
                self._router.ipv6 = config.is_ipv6(address)
                self._router.bind(address)
            except zmq.ZMQError as error:
                raise ConfigError(f"core: cannot listen at {address}: {error} (is another core running?)") from None
            #: The address of the core, with its actual port.
            self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
            undo.pop_all()
        self._peers = Registry(self._keys.server.secret if self._keys is not None else "")
        self._audit = Audit(self._catalogue.path)
        self._alarms = Alarms(alarms or AlarmConfig(), self._catalogue.path, self.address)
        self._limits = self._door.limits
        self._rate, self._owner_rate = registration_rates()
        self._refusals_seen: dict[tuple[str, str], int] = {}  # by component and name of the count
        self._refused_seen = 0
        self._audited_state: tuple[str, int | None] = STOP, None
        self._control = Control(self._peers, lambda operator, what, text: self._audit.note(operator, what, detail=text))
        self._runs = RunControl(self._peers, self._catalogue, self)
        self._actions = CoreActions(
            self._peers,
            self._control,
            self._runs,
            self._catalogue,
            address=self.address,
            keys=self._keys,
            revoked=self._disconnect,
            audit=self._audit,
            alarms=self._alarms,
            limits=self._limits,
            refused_connections=lambda: self._door.refused,
            second_core=lambda: None if shared is None else shared.lease.waiting,
        )
        self._requests = RequestRouter(self._peers, self._control, self._actions, self, self._audit, self._limits)
        self._ids = secrets.token_hex(8)
        self._next_id = 0
        self._last_update: dict[str, Any] = {}
        self._files_due = 0.0
        self._catalogue_error = ""
        self._last_turn = self._drained = self._started = time.monotonic()
        self._registered: set[str] = set()  # names of all components since the start
        self._refusals = 0
        self._refusal_logged = 0.0
        self._connection_error = self._store_error = ""
        credentials.remove_stale_files()
        self._connection_file = self._write_connection_file()
        self._shipper = LogShipper("core", self._context)
        self._shipper.attach()
        _log.info("core listens at %s, state directory %s", self.address, directory)
        for line in self._catalogue.warnings:
            _log.error("%s", line)
        if insecure:
            _log.warning("--insecure: everybody who reaches %s may control the detector", self.address)
        how = f"public key {pair.public}" if pair is not None else "--insecure"
        self._audit.note(None, "core started", detail=f"version {VERSION} at {self.address}, {how}")

    def _whose(self, key: str) -> str | None:
        member = self._keys.member(key) if self._keys is not None else None
        return None if member is None else "" if member.role == "owner" else str(member)

    def _write_connection_file(self) -> tuple[Path, Credentials] | None:
        """Write the file by which processes of the same user find the core and its key; a failure is logged."""
        try:
            path = credentials.connection_file(self.address)
            server, pair = ("", ("", "")) if self._keys is None else (self._keys.server.public, self._keys.owner)
            own = Credentials(self.address, server, *pair, pid=os.getpid())
            credentials.write(path, own)
        except FileError as error:
            if self._connection_error != str(error):
                self._connection_error = str(error)
                _log.error("connection file: %s; components and Operators cannot find the core's key", error)
            return None
        self._connection_error = ""
        return path, own

    def _remove_connection_file(self) -> None:
        """Remove the file, if no other core has replaced it."""
        if self._connection_file is None:
            return
        path, own = self._connection_file
        try:
            if credentials.read(path) == own:
                path.unlink()
        except OSError as error:
            _log.warning("connection file: %s", error)

    def _ship(self) -> None:
        self._shipper.ship(self._log_endpoint(), self._keys.owner if self._keys is not None else None)

    def close(self) -> None:
        self._remove_connection_file()
        _log.info("the core ends")
        self._audit.note(None, "core ended")
        self._audit.close(_AUDIT_LIMIT)
        self._alarms.close(_ALARM_LIMIT)
        self._ship()
        self._shipper.close()
        self._door.close()
        self._context.destroy()
        self._catalogue.close()

    def serve(self, signals: Signals) -> None:
        """Run the loop until a signal comes, or another core has the lease."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._door.socket, zmq.POLLIN)
        poller.register(signals.fileno(), zmq.POLLIN)
        shared = self._shared
        while not signals.stop:
            poller.poll(self._timeout(time.monotonic()))
            if shared is not None and not shared.is_held() and not self._await_lease(signals, shared):
                return
            self.turn()

    def _await_lease(self, signals: Signals, shared: Shared) -> bool:
        """Stand still until the lease is renewed. Returns False if another core has it, or a signal has come.

        Messages wait in the socket, as in any other pause of the core.
        """
        problem = shared.lease.problem or "its lease was not renewed in time"
        _log.error(
            "the core does nothing until the brokers answer, because another core may have taken over: %s", problem
        )
        poller = zmq.Poller()
        poller.register(signals.fileno(), zmq.POLLIN)
        while not signals.stop and shared.lease.is_own:
            self._ship()
            if shared.is_held():
                _log.warning("the core goes on: the brokers answer again, and no other core has taken over")
                withheld, self._withheld = self._withheld, []
                for route, message in withheld:
                    self._send(route, message)
                return True
            poller.poll(_LEASE_INTERVAL)
        return False

    def _timeout(self, now: float) -> int:
        """Return the milliseconds until turn() is due without a message."""
        if self._runs.waits:
            return round(_BUSY_TURN * 1000)
        return wait_ms(min(now + _IDLE_TURN, self._peers.due()), now)

    def turn(self) -> None:
        """Handle the received messages, then find lost peers, and continue procedures."""
        now = time.monotonic()
        stood = now - self._last_turn
        if stood > _MAX_TURN:
            self._peers.extend_limits(stood)
            self._runs.extend_limits(stood)
            self._drained += stood
        self._last_turn = now
        self._door.answer()
        drained = self._take(now)
        if drained:
            self._drained = now
        # In a flood the socket is never empty. But ZeroMQ takes messages from all peers in turn, so that each living
        # peer was heard within LOST.
        if drained or now - self._drained > LOST:
            for change in self._peers.check(now):
                self._peer_changed(change.what, change.peer, now)
        self._control.check(now)
        self._runs.tick(now)
        self._check_files(now)
        self._send_updates()
        refused = self._door.refused - self._refused_seen
        if refused:
            self._refused_seen += refused
            self._audit.refuse(_NO_KEY, None, self._door.last_refused, "", refused)
        self._audit.turn(now)
        self._alarms.catalogue(self._catalogue_error or self._audit.error, now)
        self._alarms.run_over(self._runs.last_over, now)
        if (run := self._runs.run) is not None and now - self._started > _RETURN:
            for name in {*run.producers, *run.storages} - self._registered:
                self._alarms.missing(name, run.run, now)
        self._alarms.turn(now)
        self._ship()
        self._actions.load.shares()

    def _count_refusals(self, component: Component) -> None:
        """Note in the audit what a component has refused since its last heartbeat. The first one counts from there,
        because the core may have been restarted."""
        for name, kind in _REFUSALS.items():
            count = component.status.get(name)
            if isinstance(count, int):
                new = count - self._refusals_seen.get((component.name, name), count)
                self._refusals_seen[component.name, name] = count
                if new > 0:
                    self._audit.refuse(kind, None, "", "", new, component=component.name)

    def _audit_state(self) -> None:
        """Note a change of the run state in the audit."""
        previous, number = self._audited_state
        new = self._runs.state, self._runs.number
        if new == self._audited_state:
            return
        self._audited_state = new
        detail = f"{previous} to {self._runs.state}"
        if self._runs.number is None and number is not None:
            with contextlib.suppress(FileError):
                run = self._catalogue.find(number)
                detail += f", {run.condition}" if run is not None else ""
        self._audit.note(None, f"run {self._runs.number or number}", detail=detail)

    def _check_files(self, now: float) -> None:
        """Write the connection file and the catalogue again if somebody has removed them."""
        if now < self._files_due:
            return
        self._files_due = now + _FILES_INTERVAL
        if self._connection_file is None or not self._connection_file[0].exists():
            self._connection_file = self._write_connection_file()
        try:
            if self._catalogue.keep():
                _log.error("%s: the run catalogue or its lock was removed; written again", self._catalogue.path)
            self._catalogue_error = ""
        except FileError as error:
            if self._catalogue_error != str(error):
                self._catalogue_error = str(error)
                _log.error("the run catalogue was removed and cannot be written again: %s", error)

    def _take(self, now: float) -> bool:
        """Handle received messages, for at most _TAKE_LIMIT seconds. Returns True when none is left."""
        until = now + _TAKE_LIMIT
        while time.monotonic() < until:
            try:
                frames = receive(self._router, 1 + _MAX_FRAMES)
            except zmq.Again:
                return True
            route, parts = frames[0].bytes, frames[1:]
            data = parts[0].bytes if len(parts) == 1 else b""
            member: Member | None = None
            try:
                member = self._sender(route, frames[-1])
                if len(parts) != 1 or len(data) > MAX_REQUEST:
                    data = self._whole(route, parts)
                self._handle(unpack_client(data, route.hex()), route, now, member)
            except ProtocolError as error:
                self._refuse(route, data if len(data) <= MAX_REQUEST else b"", error, member, now)
            except Exception as error:  # an error in larpixdaq: its sender gets an answer, and the core continues
                _log.exception("message from %s", route.hex())
                text = f"internal error of the core: {type(error).__name__}: {error}"
                self._send(route, Answer(request=probe(data).request, kind="error", text=text, error="failed"))
        return False

    def _whole(self, route: bytes, parts: list[zmq.Frame]) -> bytes:
        """Join the frames of a large answer; ProtocolError if it is too large, or not of a component."""
        size = sum(map(len, parts))
        found = f"{size} bytes in {len(parts)} parts"
        if len(parts) > _MAX_FRAMES:
            found = f"more than {_MAX_FRAMES} parts"
        elif size <= MAX_ANSWER and any(peer.route == route for peer in self._peers.components.values()):
            return b"".join(frame.bytes for frame in parts)
        raise ProtocolError(f"message from {route.hex()}: {found}, the limit is {MAX_REQUEST} bytes in 1 part")

    def _refuse(self, route: bytes, data: bytes, error: ProtocolError, member: Member | None, now: float) -> None:
        self._actions.refused += 1
        self._refusals += 1
        self._audit.refuse("invalid message", member, "", str(error))
        if now - self._refusal_logged >= 1.0:  # at most one line a second, also in a flood
            _log.warning("%s (%d messages refused)", error, self._refusals)
            self._refusals, self._refusal_logged = 0, now
        self._send(route, Answer(request=probe(data).request, kind="error", text=str(error), error="malformed"))

    def _disconnect(self, keys: list[str]) -> None:
        """Close the connections of revoked keys, and remove their peers."""
        for key in keys:
            self._door.disconnect(key)
            for peer in self._peers.with_key(key):
                self._peers.remove(peer)
                self._peer_changed("closed", peer, time.monotonic())

    def _sender(self, route: bytes, frame: zmq.Frame) -> Member:
        """Return whose key a frame came with; ProtocolError if that is not known any more."""
        if self._keys is None:
            return ANYONE
        member = self._keys.member(self._door.sender(route, frame))
        if member is None:
            raise ProtocolError(f"message from {route.hex()}: its key was revoked")
        return member

    def _handle(self, message: FromClient, route: bytes, now: float, member: Member) -> None:
        if isinstance(message, Register | Open | Join):
            if not (self._owner_rate if member.role == "owner" else self._rate).passes(member.public, 1):
                self._limits.reached(str(member), "registrations a second")
                self._audit.refuse("too many registrations", member, "", type(message).__name__)
                text = "too many registrations of this key: wait a second"
                self._send(route, Answer(request=message.request, kind="error", text=text, error="failed"))
            elif isinstance(message, Join):
                self._join(message, route, member)
            else:
                self._register(message, route, now, member)
            return
        peer, moved = self._peers.identify(message.session, route, now, member)
        if peer is None:
            answer = Answer(request=message.request, session=message.session, kind="error", error="unknown_session")
            answer.text = "this session is not known: register again"
            self._send(route, answer)
            if self._peers.knows(message.session):
                self._audit.refuse("session of another key", member, "", f"{type(message).__name__}")
            elif not self._peers.has_given(message.session, member):  # else of before a loss or restart
                self._audit.refuse("unknown session", member, "", f"{type(message).__name__}")
            return
        if moved and isinstance(peer, Component):
            self._runs.reconnected(peer)
        if isinstance(message, Bye):
            self._peers.remove(peer)
            self._peer_changed("closed", peer, now)
        elif isinstance(message, Heartbeat):
            if isinstance(peer, Component):
                self._peers.take_heartbeat(peer, message, now)
                self._count_refusals(peer)
                self._runs.heard(peer, message, now)
                if message.status is not None:
                    self._alarms.heard(peer, now)
            self._note_server(peer, message.server)
            # The state that everybody has, because making it anew for each of hundreds would take most of the time.
            known = self._state_for(peer, self._last_update or self._current_state())
            self._send(peer.route, Update(request=message.request, session=peer.session, **known))
        elif isinstance(message, Answer) and isinstance(peer, Component):
            if not self._requests.answered(peer, message) and not self._runs.answered(peer, message, now):
                _log.info("%s has answered a request that is not open", peer.name)
        elif isinstance(message, ActionRequest) and isinstance(peer, OperatorPeer):
            self._requests.requested(peer, message, now)
        else:
            raise ProtocolError(f"message from {peer.name}: it may not send {type(message).__name__}")

    def _join(self, message: Join, route: bytes, member: Member) -> None:
        """Let the holder of an invitation join with the key that it has made."""
        try:
            if self._keys is None or member.role != "invited":
                raise NotAllowed("only a connection with the token of an invitation can join")
            joined = self._keys.join(member.public, message.public)
            value = {"name": joined.name, "role": joined.role}
            _log.warning("%s has joined", joined)
            self._audit.note_member(joined, "joined", detail=f"public key {joined.public}", outcome="done")
            self._send(route, Answer(request=message.request, kind="result", value=packed(value)))
        except (RequestError, FileError) as error:
            self._audit.refuse("invitation", member, "", str(error))
            code = error.code if isinstance(error, RequestError) else "failed"
            self._send(route, Answer(request=message.request, kind="error", text=str(error), error=code))

    def _note_server(self, peer: Peer, server: str) -> None:
        """Note which public key of the core a peer has stored; a failure is logged once."""
        if self._keys is None or not server:
            return
        try:
            self._keys.note_server(peer.member.public, server)
        except FileError as error:  # the next heartbeat tries it again
            if self._store_error != str(error):
                self._store_error = str(error)
                _log.error("it cannot be noted that %s knows the core's key: %s", peer.member, error)

    def _register(self, message: Register | Open, route: bytes, now: float, member: Member) -> None:
        """Register a component or an Operator, or refuse it."""
        registered = message.name in self._peers.components
        lost = self._peers.lost.get(message.name)
        peer: Peer
        try:
            if isinstance(message, Register):
                peer = self._peers.register(message, route, now, member)
            else:
                peer = self._peers.open(message, route, now, member)
        except (NameTaken, NotAllowed, TooMany) as error:
            if isinstance(error, TooMany):
                self._limits.reached(str(member), "Operators" if isinstance(message, Open) else "components")
            kinds = {NameTaken: "name of another component", NotAllowed: "not allowed to a role"}
            self._audit.refuse(kinds.get(type(error), "too many peers"), member, message.name, str(error))
            self._send(route, Answer(request=message.request, kind="error", text=str(error), error=error.code))
            return
        if isinstance(peer, Component) and not registered:
            where = f"process {peer.info.get('pid', '?')} on {peer.info.get('host', '?')}"
            again = f", after {now - lost.heard:.1f} s" if lost is not None else ""
            if lost is not None and lost.instance != peer.instance:
                again += " and a restart"
            _log.info("%s (%s) has registered: %s%s", peer.name, peer.kind, where, again)
            self._audit.note(peer, "registered", detail=str(peer.info.get("host", "")), outcome="done")
        self._send(route, Welcome(session=peer.session, **self._state_for(peer, self._current_state())))
        if isinstance(peer, Component):
            self._registered.add(peer.name)
            self._alarms.registered(peer, now, restarted=lost is not None and lost.instance != peer.instance)
            self._runs.registered(peer, now)

    def _peer_changed(self, what: str, peer: Peer, now: float) -> None:
        if isinstance(peer, OperatorPeer):
            self._requests.peer_removed(peer, what)
            return
        if isinstance(peer, Component) and what in ("stuck", "moving"):
            self._alarms.stuck(peer, now)
        if what == "moving":
            _log.info("%s is no longer stuck", peer.name)
            return
        _log.log(logging.INFO if what == "closed" else logging.WARNING, "%s is %s", peer.name, what)
        if what in ("lost", "closed"):
            self._requests.peer_removed(peer, what)
            self._runs.lost(peer.name, now)
            if isinstance(peer, Component):
                run = self._runs.run
                needed = run is not None and peer.name in (*run.producers, *run.storages)
                self._alarms.lost(peer, what, run.run if run is not None and needed else None, now)

    # Messages to components and Operators.

    def new_id(self) -> str:
        self._next_id += 1
        return f"{self._ids}-{self._next_id}"

    def send(self, name: str, request: str, action: str, params: dict[str, Any]) -> bool:
        component = self._peers.components.get(name)
        if component is None:
            return False
        self._send_updates()  # the component must know the present state before the next step
        return self.send_to(component, ActionRequest(request=request, action=action, params=params))

    def send_to(self, peer: Peer, message: FromCore) -> bool:
        message.session = peer.session
        return self._send(peer.route, message)

    def _send(self, route: bytes, message: FromCore) -> bool:
        """Send without waiting. Returns False if the peer has gone or its queue is full.

        When the lease is over in the middle of a turn, messages are withheld until it is known who is active.
        """
        if self._shared is not None and not self._shared.is_held():
            self._withheld.append((route, message))
            return True
        try:
            self._router.send_multipart([route, pack(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        except ProtocolError as error:
            _log.error("%s", error)
            return False
        return True

    def _log_endpoint(self) -> Endpoint:
        """Return where the log listens; without a registered log, where one without keys may."""
        logs = [_endpoint(component, "log") for component in self._peers.of_kind(LOG)]
        return next((log for log in logs if log is not None), Endpoint(self._log_address if self._insecure else ""))

    def _current_state(self) -> dict[str, Any]:
        """Return the fields of an Update for all kinds of peers."""
        streams = {component.name: _endpoint(component, "stream") for component in self._peers.of_kind(PRODUCER)}
        consumers = [*self._peers.of_kind(STORAGE), *self._peers.of_kind(RUN_DATA)]
        return {
            "state": self._runs.state,
            "run": self._runs.number,
            "producers": {name: stream for name, stream in streams.items() if stream is not None},
            "log": self._log_endpoint(),
            "insecure": self._insecure,
            "keys": self._keys.components() if self._keys is not None else {},
            "consumers": {
                component.name: ConsumerSession(component.member.public, session_digest(component.session))
                for component in consumers
            },
            "registered": {
                **dict(peer.process for peer in self._peers.operators.values() if peer.process is not None),
                **{
                    name: pid
                    for name, component in self._peers.components.items()
                    if isinstance(pid := component.info.get("pid"), int)
                },
            },
            "next_server": self._keys.next_server if self._keys is not None else "",
            "alarms": (self._alarms.raised, self._alarms.newest),
            "log_level": {  # only levels that were asked for, so that a registration alone is no change
                component.name: component.wanted_log_level
                for component in self._peers.components.values()
                if component.wanted_log_level
            },
        }

    def _state_for(self, peer: Peer, current: dict[str, Any]) -> dict[str, Any]:
        """Return those fields of the current state that a peer gets. Only components that listen get `keys` and
        `consumers`."""
        state = current.copy()
        kind = peer.kind if isinstance(peer, Component) else ""
        if kind not in (PRODUCER, LOG):
            del state["keys"], state["consumers"]
        if kind != SUPERVISOR:
            del state["registered"]
        if isinstance(peer, Component):
            del state["alarms"]
        state["log_level"] = peer.wanted_log_level if isinstance(peer, Component) else ""
        if peer.member.role == "owner":  # finds the connection file
            del state["next_server"]
        return state

    def _send_updates(self) -> None:
        """Send an Update to all peers if the state has changed. A lost Update is replaced by the answer to the next
        heartbeat."""
        current = self._current_state()
        if current == self._last_update:
            return
        self._audit_state()
        self._last_update = current
        everybody: list[Peer] = [*self._peers.components.values(), *self._peers.operators.values()]
        for peer in everybody:
            self.send_to(peer, Update(**self._state_for(peer, current)))


def add_alarms_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alarms",
        type=Path,
        metavar="FILE",
        help="TOML file whose table [alarms] has the limits of alarms, and where they are sent; other tables are "
        "ignored (docs/alarms.md; default: all conditions with their default limits, in status, log and catalogue)",
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-core",
        description="The core of larpix-daq: knows all components, owns the run state, and serves the Operators.",
    )
    config.add_address_argument(parser, more=f"; the port is {config.CORE_PORT} unless given")
    config.add_log_address_argument(parser)
    config.add_state_dir_argument(parser)
    config.add_insecure_argument(parser)
    add_alarms_argument(parser)
    jetstream.add_arguments(parser, "for a second core that takes over")
    parser.add_argument(
        "--standby",
        action="store_true",
        help="wait while another core with the same --stream is active, and take over when it has died",
    )
    config.add_log_level_argument(parser)
    return parser


def serve_shared(
    bucket: Bucket,
    make: Callable[[Shared], Core],
    signals: Signals,
    about: dict[str, str],
    keys: KeyStore | None,
    *,
    standby: bool,
) -> None:
    """Run a core, made by `make`, whenever it has the lease, until a signal comes.

    While another core has it, processes of the same user on this host find the key for that core. Without `standby`
    it ends when another core has the lease: with ConfigError.
    """
    from larpixdaq.stream.lease import Lease  # late, because other cores need none

    while not signals.stop:
        with contextlib.closing(Lease(bucket, "core", seconds=_LEASE, about=about)) as lease:
            with contextlib.ExitStack() as stack:
                term = _await_term(lease, signals, about, keys, stack, standby=standby)
            if term is None:
                return
            with contextlib.closing(make(Shared(bucket, lease, term))) as core:
                core.serve(signals)
            if signals.stop:
                return
            other = lease.owner.about.get("core", "") if lease.owner is not None else ""
        if not standby:
            raise ConfigError(f"core: the core at {other} has taken over, this one has ended")
        _log.error("the core at %s has taken over, this one is on standby", other)


def show_active(active: dict[str, str], keys: KeyStore) -> Callable[[], None]:
    """Write the connection file for the core on another host, whose keys this one has. Returns what removes it."""
    address = active.get("core", "")
    path = credentials.connection_file(address)
    shown = Credentials(address, keys.server.public, *keys.owner, pid=os.getpid())
    try:
        credentials.write(path, shown)
    except FileError as error:
        _log.error("connection file: %s; components and Operators here do not find the key of the active core", error)

    def remove() -> None:
        with contextlib.suppress(OSError):
            if credentials.read(path) == shown:
                path.unlink()

    return remove


def _await_term(
    lease: Lease,
    signals: Signals,
    own: dict[str, str],
    keys: KeyStore | None,
    stack: contextlib.ExitStack,
    *,
    standby: bool,
) -> int | None:
    """Wait for the lease, and return the term; None if a signal comes before. ConfigError if waiting makes no sense.

    `stack` gets what is to be undone after the wait.
    """
    began, said = time.monotonic(), ""
    poller = zmq.Poller()
    for descriptor in (lease.fileno(), signals.fileno()):
        poller.register(descriptor, zmq.POLLIN)
    while not signals.stop:
        if (term := lease.term) is not None:
            return term
        rival = lease.rival
        owner = rival or lease.owner
        if owner is not None and owner.holder and not lease.is_own:
            other = owner.about
            where = (
                f"the core at {other.get('core', '?')} (process {other.get('pid', '?')} on {other.get('host', '?')})"
            )
            if other.get("key", "") != own["key"]:
                theirs = other.get("keys", "?")
                raise ConfigError(
                    f"{where} has another key than this one: copy its key store {theirs} to {own['keys']}"
                )
            if rival is None:  # it may have died long ago
                if not said:
                    said = f"waiting for the lease, which {where} had last"
                    _log.info("%s", said)
            elif not standby and time.monotonic() - began > _LEASE_WAIT:
                raise ConfigError(f"core: {where} is active; --standby waits until it has died")
            elif where != said:
                _log.warning("on standby: %s is active", where)
                said = where
                stack.close()
                if keys is not None and other.get("host", "") != own["host"]:  # there the active core does it
                    stack.callback(show_active(other, keys))
        if rival is None and lease.problem and lease.problem != said:
            said = lease.problem
            _log.error("the lease of the active core cannot be had: %s", said)
        poller.poll(_LEASE_INTERVAL)
        lease.clear()
    return None


def main(argv: list[str] | None = None) -> int:
    args = argument_parser().parse_args(argv)

    def run() -> None:
        alarms = load_alarms(args.alarms) if args.alarms is not None else None
        address = config.listen_address(args.address, config.CORE_PORT)
        log_address = config.address(args.log_address, config.LOG_PORT)
        brokers = jetstream.brokers_of(args)
        if args.standby and brokers is None:
            raise UsageError("--standby: expected --stream with it")
        os.umask(0o077)  # other users may enter a state directory that was made by hand
        directory = state_dir(args.state_dir)

        def make(shared: Shared | None = None) -> Core:
            return Core(address, log_address, directory, insecure=args.insecure, alarms=alarms, shared=shared)

        if brokers is None:
            with contextlib.closing(make()) as core, Signals() as signals:
                core.serve(signals)
            return
        store = None if args.insecure else KeyStore(directory)
        Catalogue(directory).close()  # a catalogue that cannot be used is no surprise when this core takes over
        about = {key: str(value) for key, value in config.process_identity().items()}
        about |= {"core": config.outside_address(address), "key": store.server.public if store is not None else ""}
        about["keys"] = str(store.path) if store is not None else ""
        from larpixdaq.stream.lease import Bucket

        bucket = Bucket(brokers, f"larpixdaq core {about['core']}")
        with contextlib.closing(bucket), Signals() as signals:
            serve_shared(bucket, make, signals, about, store, standby=args.standby)

    return run_main(run, log_level=args.log_level)


if __name__ == "__main__":
    sys.exit(main())
