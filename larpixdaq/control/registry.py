"""The components and Operators that the core knows: which are alive, lost or stuck, and which Operator has control."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from larpixdaq.constants import CONTROL_FREE, HEARTBEAT, LOST, RUN_DATA, STUCK
from larpixdaq.control.connection import RecentRequests
from larpixdaq.errors import ControlHeld, NotAllowed, ProtocolError
from larpixdaq.keys.key_store import Member
from larpixdaq.protocol.control import Heartbeat, Open, Register
from larpixdaq.runtime.units import utc

_log = logging.getLogger("larpixdaq.core")
_T = TypeVar("_T")
#: Seconds that a silent Operator's session is kept, so that a busy program still gets its answers.
_FORGET_OPERATOR: Final = 60.0
#: Maximum number of components, of Operators with keys that were invited (and as many of the core's own user), and of
#: Operators with one of these keys, at the same time.
MAX_COMPONENTS: Final = 500
MAX_OPERATORS: Final = 256
MAX_KEY_OPERATORS: Final = 32
#: Bytes of a session that are random, and of the code for them.
_RANDOM: Final = 16
_CODE: Final = 16
#: Maximum number of lost components that `status` shows, and seconds for which it shows them.
_MAX_LOST: Final = MAX_COMPONENTS
_LOST_KEPT: Final = 12 * 3600.0


class NameTaken(ProtocolError):
    """Another living component has this name."""

    code = "name_taken"


class TooMany(ProtocolError):
    """The core serves its maximum number of components or Operators."""

    code = "failed"


@dataclass
class Peer:
    """A component or an Operator. Times are time.monotonic(); `route` is the ROUTER's identity of the connection.

    `member`: whose key it has shown. A session counts only with the key that opened it.
    """

    session: str
    route: bytes
    name: str
    instance: str
    heard: float
    member: Member


@dataclass
class Component(Peer):
    kind: str
    actions: list[str]
    info: dict[str, Any]
    run: int | None
    begun: bool
    module: str = ""
    progress: int = 0
    queued: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    progressed: float = 0.0  # when progress last grew, or no work was queued
    busy: bool = False  # work is queued, or the main loop does not turn
    stuck: bool = False
    log_level: str = ""  # as in its heartbeats
    wanted_log_level: str = ""  # as an Operator has asked for
    _understood: bool = True

    def read_status(self, kind: type[_T]) -> _T | None:
        """Return the status as a struct. None before the first status, and if it does not fit, which is logged."""
        if not self.status:
            return None
        try:
            status = msgspec.convert(self.status, kind)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            if self._understood:  # logged once, because it comes again with each heartbeat
                _log.error("%s: its status is not understood: %s", self.name, error)
            self._understood = False
            return None
        self._understood = True
        return status


@dataclass
class OperatorPeer(Peer):
    process: tuple[str, int] | None = None  # name and pid, of a process that a supervisor starts
    recent: RecentRequests = field(default_factory=RecentRequests)
    unanswered: int = 0  # requests without their last answer


@dataclass
class Change:
    """A change that check() has found: "lost", "stuck", "moving" (no longer stuck) or "gone" (an Operator)."""

    what: str
    peer: Peer


class Registry:
    """All known components and Operators. `now` is always time.monotonic().

    A session is a random number and a code for it and for the key of its peer, made with `secret`. So a core knows the
    sessions that an earlier core with the same secret has given.
    """

    def __init__(self, secret: str = "") -> None:
        self._secret = secret.encode()
        self.components: dict[str, Component] = {}  # the living components, by name
        self.operators: dict[str, OperatorPeer] = {}  # by session
        self.lost: dict[str, Component] = {}  # by name
        self._sessions: dict[str, Peer] = {}

    def register(self, message: Register, route: bytes, now: float, member: Member) -> Component:
        """Add a component, or replace its earlier registration.

        Raises NotAllowed if the key of `member` is not for this component, NameTaken while another process of this name
        counts as alive, and TooMany above MAX_COMPONENTS.
        """
        if member.role != "owner" and (member.role, member.name) != ("component", message.name):
            raise NotAllowed(f"the key of {member} is not for a component {message.name!r}")
        known = self.components.get(message.name)
        if known is None and len(self.components) >= MAX_COMPONENTS:
            raise TooMany(f"{message.name!r} cannot be registered: there are {MAX_COMPONENTS} components already")
        if known is not None and known.instance != message.instance:
            kind = "monitor" if known.kind == RUN_DATA else known.kind
            raise NameTaken(
                f"the name {message.name!r} is in use by a {kind} (process {known.info.get('pid', '?')} on "
                f"{known.info.get('host', '?')}) last heard {now - known.heard:.1f} s ago"
            )
        self.lost.pop(message.name, None)
        component = Component(
            session=known.session if known is not None else self._new_session(member),
            route=route,
            name=message.name,
            instance=message.instance,
            heard=now,
            member=member,
            kind=message.kind,
            actions=message.actions,
            info=message.info,
            run=message.run,
            begun=message.begun,
            module=message.module,
            progressed=now,
            wanted_log_level=known.wanted_log_level if known is not None else "",
        )
        self.components[component.name] = component
        self._sessions[component.session] = component
        return component

    def open(self, message: Open, route: bytes, now: float, member: Member) -> OperatorPeer:
        """Add an Operator; a repeated registration gets the same session. Who was invited has the name of its key.

        Raises NotAllowed if the key of `member` is not for Operators, and TooMany above MAX_OPERATORS, or above
        MAX_KEY_OPERATORS for an invited key.
        """
        if member.role not in ("owner", "operator", "observer"):
            raise NotAllowed(f"the key of {member} is not for Operators")
        for peer in self.operators.values():
            if peer.instance == message.instance and peer.member == member:
                peer.route, peer.heard = route, now
                return peer
        owner = member.role == "owner"
        others = [peer for peer in self.operators.values() if (peer.member.role == "owner") == owner]
        if len(others) >= MAX_OPERATORS:
            raise TooMany(f"{message.name!r} cannot be served: there are {MAX_OPERATORS} Operators already")
        if not owner and sum(peer.member == member for peer in others) >= MAX_KEY_OPERATORS:
            raise TooMany(f"{message.name!r} cannot be served: {member} has {MAX_KEY_OPERATORS} Operators already")
        name = message.name if member.role == "owner" else member.name
        process = (message.name, message.pid) if message.pid else None
        peer = OperatorPeer(self._new_session(member), route, name, message.instance, now, member, process)
        self.operators[peer.session] = peer
        self._sessions[peer.session] = peer
        return peer

    def identify(self, session: str, route: bytes, now: float, member: Member) -> tuple[Peer | None, bool]:
        """Note that the peer of this session was heard. Returns the peer (None: unknown session), and whether its
        connection is new."""
        peer = self._sessions.get(session)
        if peer is None or peer.member != member:
            return None, False
        moved = peer.route != route
        peer.route, peer.heard = route, now
        return peer, moved

    def knows(self, session: str) -> bool:
        """Return whether the session exists."""
        return session in self._sessions

    def has_given(self, session: str, member: Member) -> bool:
        """Return whether this core, or an earlier one, has given this session to this key."""
        number = session[: 2 * _RANDOM]
        return hmac.compare_digest(session.encode(), self._session(number, member).encode())

    def _new_session(self, member: Member) -> str:
        return self._session(secrets.token_hex(_RANDOM), member)

    def _session(self, number: str, member: Member) -> str:
        text = f"{number} {member.public}".encode("utf-8", "replace")
        return number + hashlib.blake2b(text, key=self._secret, digest_size=_CODE).hexdigest()

    def with_key(self, key: str) -> list[Peer]:
        """Return the peers with this public key."""
        return [peer for peer in self._sessions.values() if peer.member.public == key]

    def take_heartbeat(self, component: Component, message: Heartbeat, now: float) -> None:
        if message.progress != component.progress or not message.queued:
            component.progressed = now - message.idle  # the time of its report()
        component.busy = message.queued > 0 or message.idle > 2 * HEARTBEAT
        component.progress, component.queued = message.progress, message.queued
        component.log_level = message.log_level
        if message.status is not None:
            component.status = message.status

    def remove(self, peer: Peer) -> None:
        self._sessions.pop(peer.session, None)
        self.operators.pop(peer.session, None)
        if isinstance(peer, Component):
            self.components.pop(peer.name, None)

    def check(self, now: float) -> list[Change]:
        """Return the changes since the last call. All received messages must have been handled before."""
        changes: list[Change] = []
        for component in list(self.components.values()):
            if now - component.heard > LOST:
                self.remove(component)
                self.lost[component.name] = component
                while len(self.lost) > _MAX_LOST:
                    del self.lost[next(iter(self.lost))]
                changes.append(Change("lost", component))
                continue
            stuck = component.busy and now - component.progressed > STUCK
            if stuck != component.stuck:
                component.stuck = stuck
                changes.append(Change("stuck" if stuck else "moving", component))
        for name in [name for name, component in self.lost.items() if now - component.heard > _LOST_KEPT]:
            del self.lost[name]
        for peer in list(self.operators.values()):
            if now - peer.heard > _FORGET_OPERATOR:
                self.remove(peer)
                changes.append(Change("gone", peer))
        return changes

    def due(self) -> float:
        """Return when check() will next find a silent component lost or stuck; infinite without components."""
        due = float("inf")
        for component in self.components.values():
            due = min(due, component.heard + LOST)
            if component.busy and not component.stuck:
                due = min(due, component.progressed + STUCK)
        return due

    def extend_limits(self, seconds: float) -> None:
        """Extend all time limits by a pause of the core, because messages sent in the pause may not be received yet."""
        for peer in self._sessions.values():
            peer.heard += seconds
            if isinstance(peer, Component):
                peer.progressed += seconds

    def of_kind(self, kind: str) -> list[Component]:
        """Return the living components of a kind, in the order of their registration."""
        return [component for component in self.components.values() if component.kind == kind]

    def describe(self, now: float) -> list[dict[str, Any]]:
        """List all components for people. The lost ones follow, with `alive` False."""
        return [
            {
                "name": component.name,
                "kind": component.kind,
                "module": component.module,
                "alive": component.name in self.components,
                "stuck": component.name in self.components and component.stuck,
                "heard_s": round(now - component.heard, 3),
                "progress": component.progress,
                "queued": component.queued,
                "run": component.run,
                "log_level": component.log_level,
                "actions": component.actions,
                "info": component.info,
                "status": component.status,
            }
            for component in [*self.components.values(), *self.lost.values()]
        ]


class Control:
    """Records which Operator may change something: one at a time. `changed` is called with an Operator and an action
    ("control taken", "control released", "control freed") and a detail."""

    def __init__(self, peers: Registry, changed: Callable[[OperatorPeer, str, str], None]) -> None:
        self._peers, self._changed = peers, changed
        self._holder: OperatorPeer | None = None
        self._since = 0.0  # unix seconds

    def _current(self, now: float) -> OperatorPeer | None:
        holder = self._holder
        if holder is not None and (holder.session not in self._peers.operators or now - holder.heard > CONTROL_FREE):
            self._changed(holder, "control freed", "its holder has gone")
            self._holder = holder = None
        return holder

    def check(self, now: float) -> None:
        """Free control whose holder has gone."""
        self._current(now)

    def claim(self, operator: OperatorPeer, now: float) -> None:
        """Give control to this Operator if it is free; ControlHeld if another Operator has it."""
        holder = self._current(now)
        if holder is None:
            self.take(operator)
        elif holder is not operator:
            text = f"control is held by {holder.name} since {utc(self._since)}; take_control() takes it"
            raise ControlHeld(text, by=holder.name, since=self._since)

    def take(self, operator: OperatorPeer) -> str:
        """Give control to this Operator. Returns the name of the Operator that has lost it, or ""."""
        previous = self._holder
        if previous is not operator:
            self._holder, self._since = operator, time.time()
            self._changed(operator, "control taken", f"from {previous.name}" if previous is not None else "")
        return previous.name if previous is not None and previous is not operator else ""

    def release(self, operator: OperatorPeer) -> None:
        if self._holder is operator:
            self._holder = None
            self._changed(operator, "control released", "")

    def describe(self, now: float) -> dict[str, Any] | None:
        holder = self._current(now)
        return None if holder is None else {"by": holder.name, "since": self._since}
