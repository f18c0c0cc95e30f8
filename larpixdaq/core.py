"""The core: knows the components, owns run state and run number, and passes on the requests of Operators."""

import sys

if __spec__ is None and sys.path[0].endswith("larpixdaq"):
    # Run by its path: operator.py in this folder must not shadow the standard library's.
    del sys.path[0]

import argparse
import contextlib
import logging
import secrets
import time
from pathlib import Path
from typing import Any, Final

import zmq

from larpixdaq import config
from larpixdaq.constants import LOG, LOST, PRODUCER
from larpixdaq.control.catalogue import Catalogue
from larpixdaq.control.log_shipping import LogShipper
from larpixdaq.control.registry import Component, Control, NameTaken, OperatorPeer, Peer, Registry, TooMany
from larpixdaq.control.request_router import CoreActions, RequestRouter
from larpixdaq.control.run_control import RunControl
from larpixdaq.errors import ConfigError, FileError, LarpixDaqError, ProtocolError
from larpixdaq.protocol.control import (
    MAX_ANSWER,
    MAX_REQUEST,
    ActionRequest,
    Answer,
    Bye,
    FromClient,
    FromCore,
    Heartbeat,
    Open,
    Register,
    Update,
    Welcome,
    pack,
    probe,
    unpack_client,
)
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.timing import wait_ms

_log = logging.getLogger("larpixdaq.core")
#: Maximum seconds of one turn of the loop for received messages.
_TAKE_LIMIT: Final = 0.05
#: Maximum number of received messages of each peer that wait, because they may be large. More wait at the peer.
_QUEUE: Final = 100
#: Maximum seconds between two turns of the loop: while a procedure with time limits runs, and otherwise. If more than
#: _MAX_TURN seconds have passed, the core itself has paused.
_BUSY_TURN: Final = 0.05
_IDLE_TURN: Final = 0.3
_MAX_TURN: Final = 0.5
#: Seconds between two checks that the run catalogue was not removed.
_CATALOGUE_INTERVAL: Final = 1.0


class Core:
    """The core, with its ROUTER at `address`; LarpixDaqError if it cannot start.

    `address` has a port (0: any free port). `log_address` is used while no log is registered; "": no log.
    """

    def __init__(self, address: str, log_address: str, directory: Path, *, insecure: bool = False) -> None:
        self._insecure = insecure
        self._log_address = log_address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER)
        self._router.setsockopt(zmq.RCVHWM, _QUEUE)
        self._router.setsockopt(zmq.LINGER, 200)
        config.close_dead_connections(self._router, config.DEAD_CONNECTION)
        try:
            self._router.ipv6 = config.is_ipv6(address)
            self._router.bind(address)
            #: The address of the core, with its actual port.
            self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
            self._catalogue = Catalogue(directory)
        except (zmq.ZMQError, LarpixDaqError) as error:
            self._context.destroy(0)
            if isinstance(error, LarpixDaqError):
                raise
            raise ConfigError(f"core: cannot listen at {address}: {error} (is another core running?)") from None
        self._peers = Registry()
        self._control = Control(self._peers)
        self._runs = RunControl(self._peers, self._catalogue, self)
        self._actions = CoreActions(self._peers, self._control, self._runs, self._catalogue, insecure=insecure)
        self._requests = RequestRouter(self._peers, self._control, self._actions, self)
        self._ids = secrets.token_hex(8)
        self._next_id = 0
        self._last_update: dict[str, Any] = {}
        self._catalogue_due = 0.0
        self._catalogue_error = ""
        self._last_turn = self._drained = time.monotonic()
        self._refusals = 0
        self._refusal_logged = 0.0
        self._shipper = LogShipper("core", self._context)
        self._shipper.attach()
        _log.info("core listens at %s, state directory %s", self.address, directory)
        for line in self._catalogue.warnings:
            _log.error("%s", line)
        if insecure:
            _log.warning("--insecure: everybody who reaches %s may control the detector", self.address)

    def close(self) -> None:
        self._shipper.ship(self._current_state()["log"])
        self._shipper.close()
        self._context.destroy()
        self._catalogue.close()

    def serve(self, signals: Signals) -> None:
        """Run the loop until a signal comes."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(signals.fileno(), zmq.POLLIN)
        while not signals.stop:
            poller.poll(self._timeout(time.monotonic()))
            self.turn()

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
        drained = self._take(now)
        if drained:
            self._drained = now
        # In a flood the socket is never empty. But ZeroMQ takes messages from all peers in turn, so that each living
        # peer was heard within LOST.
        if drained or now - self._drained > LOST:
            for change in self._peers.check(now):
                self._peer_changed(change.what, change.peer, now)
        self._runs.tick(now)
        self._check_catalogue(now)
        self._send_updates()
        self._shipper.ship(self._current_state()["log"])
        self._actions.load.shares()

    def _check_catalogue(self, now: float) -> None:
        if now < self._catalogue_due:
            return
        self._catalogue_due = now + _CATALOGUE_INTERVAL
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
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            route, data = frames[0], frames[-1]
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"message from {route.hex()}: {len(frames) - 1} parts, expected 1")
                if len(data) > MAX_REQUEST and all(peer.route != route for peer in self._peers.components.values()):
                    raise ProtocolError(f"message from {route.hex()}: {len(data)} bytes, the limit is {MAX_REQUEST}")
                self._handle(unpack_client(data, route.hex()), route, now)
            except ProtocolError as error:
                self._refuse(route, data if len(data) <= MAX_REQUEST else b"", error, now)
            except Exception as error:  # an error in larpixdaq: its sender gets an answer, and the core continues
                _log.exception("message from %s", route.hex())
                text = f"internal error of the core: {type(error).__name__}: {error}"
                self._send(route, Answer(request=probe(data).request, kind="error", text=text, error="failed"))
        return False

    def _refuse(self, route: bytes, data: bytes, error: ProtocolError, now: float) -> None:
        self._actions.refused += 1
        self._refusals += 1
        if now - self._refusal_logged >= 1.0:  # at most one line a second, also in a flood
            _log.warning("%s (%d messages refused)", error, self._refusals)
            self._refusals, self._refusal_logged = 0, now
        self._send(route, Answer(request=probe(data).request, kind="error", text=str(error), error="malformed"))

    def _handle(self, message: FromClient, route: bytes, now: float) -> None:
        if isinstance(message, Register | Open):
            self._register(message, route, now)
            return
        peer, moved = self._peers.identify(message.session, route, now)
        if peer is None:
            answer = Answer(request=message.request, session=message.session, kind="error", error="unknown_session")
            answer.text = "this session is not known: register again"
            self._send(route, answer)
            return
        if moved and isinstance(peer, Component):
            self._runs.reconnected(peer)
        if isinstance(message, Bye):
            self._peers.remove(peer)
            self._peer_changed("closed", peer, now)
        elif isinstance(message, Heartbeat):
            if isinstance(peer, Component):
                self._peers.take_heartbeat(peer, message, now)
                self._runs.heard(peer, message, now)
            self._send(peer.route, Update(request=message.request, session=peer.session, **self._current_state()))
        elif isinstance(message, Answer) and isinstance(peer, Component):
            if not self._requests.answered(peer, message) and not self._runs.answered(peer, message, now):
                _log.info("%s has answered a request that is not open", peer.name)
        elif isinstance(message, ActionRequest) and isinstance(peer, OperatorPeer):
            self._requests.requested(peer, message, now)
        else:
            raise ProtocolError(f"message from {peer.name}: it may not send {type(message).__name__}")

    def _register(self, message: Register | Open, route: bytes, now: float) -> None:
        """Register a component or an Operator, or refuse it."""
        registered = message.name in self._peers.components
        peer: Peer
        try:
            if isinstance(message, Register):
                peer = self._peers.register(message, route, now)
            else:
                peer = self._peers.open(message, route, now)
        except (NameTaken, TooMany) as error:
            self._send(route, Answer(request=message.request, kind="error", text=str(error), error=error.code))
            return
        if isinstance(peer, Component) and not registered:
            _log.info("%s (%s) has registered", peer.name, peer.kind)
        self._send(route, Welcome(session=peer.session, **self._current_state()))
        if isinstance(peer, Component):
            self._runs.registered(peer, now)

    def _peer_changed(self, what: str, peer: Peer, now: float) -> None:
        if isinstance(peer, OperatorPeer):
            self._requests.peer_removed(peer, what)
            return
        if what == "moving":
            _log.info("%s is no longer stuck", peer.name)
            return
        _log.log(logging.INFO if what == "closed" else logging.WARNING, "%s is %s", peer.name, what)
        if what in ("lost", "closed"):
            self._requests.peer_removed(peer, what)
            self._runs.lost(peer.name, now)

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
        """Send without waiting. Returns False if the peer has gone or its queue is full."""
        try:
            self._router.send_multipart([route, pack(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        except ProtocolError as error:
            _log.error("%s", error)
            return False
        return True

    def _current_state(self) -> dict[str, Any]:
        """Return the fields of an Update, which are the same for all peers."""
        streams = {component.name: component.info.get("stream") for component in self._peers.of_kind(PRODUCER)}
        logs = [component.info.get("log") for component in self._peers.of_kind(LOG)]
        return {
            "state": self._runs.state,
            "run": self._runs.number,
            "producers": {name: stream for name, stream in streams.items() if isinstance(stream, str)},
            "log": next((address for address in logs if isinstance(address, str)), self._log_address),
            "insecure": self._insecure,
        }

    def _send_updates(self) -> None:
        """Send an Update to all peers if the state has changed. A lost Update is replaced by the answer to the next
        heartbeat."""
        current = self._current_state()
        if current == self._last_update:
            return
        self._last_update = current
        everybody: list[Peer] = [*self._peers.components.values(), *self._peers.operators.values()]
        for peer in everybody:
            self.send_to(peer, Update(**current))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="larpixdaq-core",
        description="The core of larpix-daq: knows all components, owns the run state, and serves the Operators.",
    )
    config.add_address_argument(parser, more=f"; the port is {config.CORE_PORT} unless given")
    config.add_log_address_argument(parser)
    config.add_state_dir_argument(parser)
    config.add_insecure_argument(parser)
    args = parser.parse_args(argv)

    def run() -> None:
        address = config.listen_address(args.address, config.CORE_PORT, insecure=args.insecure, what="core")
        log_address = config.address(args.log_address, config.LOG_PORT)
        core = Core(address, log_address, state_dir(args.state_dir), insecure=args.insecure)
        with contextlib.closing(core), Signals() as signals:
            core.serve(signals)

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
