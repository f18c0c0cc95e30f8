"""Who is connected to the core: components and Operators, who is alive, lost or stuck, and who has control."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from larpixdaq.constants import CONTROL_FREE, HEARTBEAT, LOST, STUCK
from larpixdaq.control.connection import RecentRequests
from larpixdaq.errors import ControlHeld, ProtocolError
from larpixdaq.protocol.control import Heartbeat, Open, Register
from larpixdaq.runtime.units import utc

_log = logging.getLogger("larpixdaq.core")
_T = TypeVar("_T")
#: An Operator's session is kept this long (s) after it was last heard, so that a busy program finds its answers.
_FORGET_OPERATOR: Final = 60.0
#: Maximum number of components, and of Operators, at once.
MAX_COMPONENTS: Final = 100
MAX_OPERATORS: Final = 256
#: Lost components that `status` still shows, and for how long (s).
_MAX_LOST: Final = 20
_LOST_KEPT: Final = 12 * 3600.0


def _process(info: dict[str, Any]) -> str:
    return f"process {info.get('pid', '?')} on {info.get('host', '?')}"


class NameTaken(ProtocolError):
    """Another living component has this name."""

    code = "name_taken"


class TooMany(ProtocolError):
    """The core serves its maximum number of components or Operators."""

    code = "failed"


@dataclass
class Peer:
    """Times are time.monotonic(); `route` is the ROUTER's name for the connection, and changes with it."""

    session: str
    route: bytes
    name: str
    instance: str
    heard: float


@dataclass
class Component(Peer):
    kind: str
    actions: list[str]
    info: dict[str, Any]
    run: int | None
    begun: bool
    progress: int = 0
    queued: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    progressed: float = 0.0  # when progress last moved, or nothing was queued
    busy: bool = False  # work is queued, or its main loop does not turn
    stuck: bool = False
    _understood: bool = True

    def read_status(self, kind: type[_T]) -> _T | None:
        """Return the status as a struct. None before the first one, and when it does not fit, which is logged."""
        if not self.status:
            return None
        try:
            status = msgspec.convert(self.status, kind)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            if self._understood:  # said once: it comes again with each heartbeat
                _log.error("%s: its status is not understood: %s", self.name, error)
            self._understood = False
            return None
        self._understood = True
        return status


@dataclass
class OperatorPeer(Peer):
    recent: RecentRequests = field(default_factory=RecentRequests)


@dataclass
class Change:
    """What check() has found: "lost", "stuck", "moving" (no longer stuck) or "gone" (an Operator)."""

    what: str
    peer: Peer


class Registry:
    """All that are known. `now` is time.monotonic() throughout."""

    def __init__(self) -> None:
        self.components: dict[str, Component] = {}  # by name; the living ones
        self.operators: dict[str, OperatorPeer] = {}  # by session
        self.lost: dict[str, tuple[float, Component]] = {}  # by name, when last heard
        self._sessions: dict[str, Peer] = {}

    def register(self, message: Register, route: bytes, now: float) -> Component:
        """Take a component in; NameTaken while another process of this name counts as living, TooMany when there are
        MAX_COMPONENTS already."""
        there = self.components.get(message.name)
        if there is None and len(self.components) >= MAX_COMPONENTS:
            raise TooMany(f"{message.name!r} cannot be registered: there are {MAX_COMPONENTS} components already")
        if there is not None and there.instance != message.instance:
            raise NameTaken(
                f"the name {message.name!r} is in use by a {there.kind} ({_process(there.info)}) last heard "
                f"{now - there.heard:.1f} s ago"
            )
        self.lost.pop(message.name, None)
        component = Component(
            session=there.session if there is not None else secrets.token_hex(16),
            route=route,
            name=message.name,
            instance=message.instance,
            heard=now,
            kind=message.kind,
            actions=message.actions,
            info=message.info,
            run=message.run,
            begun=message.begun,
            progressed=now,
        )
        self.components[component.name] = component
        self._sessions[component.session] = component
        return component

    def open(self, message: Open, route: bytes, now: float) -> OperatorPeer:
        """Take an Operator in; one whose first answer was slow gets the same session again. TooMany when there are
        MAX_OPERATORS already."""
        for peer in self.operators.values():
            if peer.instance == message.instance:
                peer.route, peer.heard = route, now
                return peer
        if len(self.operators) >= MAX_OPERATORS:
            raise TooMany(f"{message.name!r} cannot be served: there are {MAX_OPERATORS} Operators already")
        peer = OperatorPeer(secrets.token_hex(16), route, message.name, message.instance, now)
        self.operators[peer.session] = peer
        self._sessions[peer.session] = peer
        return peer

    def identify(self, session: str, route: bytes, now: float) -> tuple[Peer | None, bool]:
        """The peer of this session (None: unknown or void), and whether its connection is a new one."""
        peer = self._sessions.get(session)
        if peer is None:
            return None, False
        moved = peer.route != route
        peer.route, peer.heard = route, now
        return peer, moved

    def take_heartbeat(self, component: Component, message: Heartbeat, now: float) -> None:
        if message.progress != component.progress or not message.queued:
            component.progressed = now - message.idle  # that was when its main loop said so
        component.busy = message.queued > 0 or message.idle > 2 * HEARTBEAT
        component.progress, component.queued = message.progress, message.queued
        if message.status is not None:
            component.status = message.status

    def remove(self, peer: Peer) -> None:
        self._sessions.pop(peer.session, None)
        self.operators.pop(peer.session, None)
        if isinstance(peer, Component):
            self.components.pop(peer.name, None)

    def check(self, now: float) -> list[Change]:
        """Who was lost or got stuck since the last time; only to be called when all that came has been taken in."""
        found: list[Change] = []
        for component in list(self.components.values()):
            if now - component.heard > LOST:
                self.remove(component)
                self.lost[component.name] = (component.heard, component)
                while len(self.lost) > _MAX_LOST:
                    del self.lost[next(iter(self.lost))]
                found.append(Change("lost", component))
                continue
            stuck = component.busy and now - component.progressed > STUCK
            if stuck != component.stuck:
                component.stuck = stuck
                found.append(Change("stuck" if stuck else "moving", component))
        for name in [name for name, (heard, _) in self.lost.items() if now - heard > _LOST_KEPT]:
            del self.lost[name]
        for peer in list(self.operators.values()):
            if now - peer.heard > _FORGET_OPERATOR:
                self.remove(peer)
                found.append(Change("gone", peer))
        return found

    def due(self) -> float:
        """When check() will find a component lost or stuck, if nothing comes from it until then; infinite: never."""
        due = float("inf")
        for component in self.components.values():
            due = min(due, component.heard + LOST)
            if component.busy and not component.stuck:
                due = min(due, component.progressed + STUCK)
        return due

    def extend_limits(self, seconds: float) -> None:
        """The core itself stood still for so long: what others sent meanwhile may not have reached it yet."""
        for peer in self._sessions.values():
            peer.heard += seconds
            if isinstance(peer, Component):
                peer.progressed += seconds

    def of_kind(self, kind: str) -> list[Component]:
        """The living components of a kind, the one first registered first."""
        return [component for component in self.components.values() if component.kind == kind]

    def describe(self, now: float) -> list[dict[str, Any]]:
        """All components for people: those lost are there too, with `alive` False."""
        living = [(component.heard, component, True) for component in self.components.values()]
        lost = [(heard, component, False) for heard, component in self.lost.values()]
        return [
            {
                "name": one.name,
                "kind": one.kind,
                "alive": alive,
                "stuck": alive and one.stuck,
                "heard_s": round(now - heard, 3),
                "progress": one.progress,
                "queued": one.queued,
                "run": one.run,
                "actions": one.actions,
                "info": one.info,
                "status": one.status,
            }
            for heard, one, alive in living + lost
        ]


class Control:
    """Who may change things: one Operator at a time."""

    def __init__(self, peers: Registry) -> None:
        self._peers = peers
        self._holder: OperatorPeer | None = None
        self._since = 0.0  # unix seconds

    def _current(self, now: float) -> OperatorPeer | None:
        holder = self._holder
        if holder is not None and (holder.session not in self._peers.operators or now - holder.heard > CONTROL_FREE):
            self._holder = holder = None
        return holder

    def claim(self, operator: OperatorPeer, now: float) -> None:
        """Make sure that this Operator has control; ControlHeld when another has it."""
        holder = self._current(now)
        if holder is None:
            self.take(operator)
        elif holder is not operator:
            text = f"control is held by {holder.name} since {utc(self._since)}; take_control() takes it"
            raise ControlHeld(text, by=holder.name, since=self._since)

    def take(self, operator: OperatorPeer) -> str:
        """Give it to this Operator; the name of the one who had it before, or ""."""
        before = self._holder
        if before is not operator:
            self._holder, self._since = operator, time.time()
        return before.name if before is not None and before is not operator else ""

    def release(self, operator: OperatorPeer) -> None:
        if self._holder is operator:
            self._holder = None

    def describe(self, now: float) -> dict[str, Any] | None:
        holder = self._current(now)
        return None if holder is None else {"by": holder.name, "since": self._since}
