"""Operators' requests on their way to the core's desk or to a component, and the answers on their way back."""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple, Protocol

from larpixdaq.control.desk import Desk
from larpixdaq.control.messages import Answer, FromCore, Request, packed
from larpixdaq.control.peers import Component, Control, OperatorPeer, Peer, Peers
from larpixdaq.errors import ComponentError, ControlHeld, LarpixDaqError, RequestError, UnknownAction
from larpixdaq.states import LOOKING, PRODUCER, RUN_ACTIONS, RUN_DATA

_log = logging.getLogger("larpixdaq.core")
#: What an Operator may ask for without naming it.
_IN_WORDS: Final = {PRODUCER: "producer", RUN_DATA: "online monitor"}


class Post(Protocol):
    """The core's socket."""

    def new_id(self) -> str: ...
    def send(self, name: str, request: str, action: str, params: dict[str, Any]) -> bool: ...
    def send_to(self, peer: Peer, message: FromCore) -> bool: ...


class _Routed(NamedTuple):
    """An Operator's request that a component works on."""

    component: str
    action: str
    operator: str  # session
    request: str


class _OperatorReply:
    """The way back to the Operator who asked."""

    def __init__(self, forwarding: Forwarding, operator: OperatorPeer, request: str) -> None:
        self._forwarding, self._operator, self._request = forwarding, operator, request

    def progress(self, component: str, text: str, done: int = 0, total: int = 0) -> None:
        answer = Answer(request=self._request, kind="progress", component=component, text=text, done=done, total=total)
        self._forwarding.answer(self._operator, answer)

    def result(self, value: Any) -> None:
        answer = Answer(request=self._request, kind="result", component="core", value=packed(value))
        self._forwarding.answer(self._operator, answer)

    def error(self, error: LarpixDaqError) -> None:
        code = error.code if isinstance(error, RequestError) else "failed"
        answer = Answer(request=self._request, kind="error", component="core", text=str(error), error=code)
        if isinstance(error, ControlHeld):
            answer.by, answer.since = error.by, error.since
        self._forwarding.answer(self._operator, answer)


class Forwarding:
    """Every request gets an ack at once and exactly one result or error; one that comes twice is done once."""

    def __init__(self, peers: Peers, control: Control, desk: Desk, post: Post) -> None:
        self._peers, self._control, self._desk, self._post = peers, control, desk, post
        self._routed: dict[str, _Routed] = {}

    def requested(self, operator: OperatorPeer, message: Request, now: float) -> None:
        if message.again and not operator.recent.knows(message.request):
            text = f"the outcome of {message.action} is no longer known"
            self._post.send_to(operator, Answer(request=message.request, kind="error", text=text, error="failed"))
            return
        if operator.recent.seen(message.request):
            answer = operator.recent.answer(message.request)
            if answer is not None:
                self._post.send_to(operator, answer)
            return
        self.answer(operator, Answer(request=message.request, kind="ack", component="core"))
        reply = _OperatorReply(self, operator, message.request)
        try:
            if message.component in ("", "core") and not message.kind:
                self._desk.handle(operator, message.action, message.params, reply, now)
            else:
                self._route(operator, message, now)
        except LarpixDaqError as error:
            reply.error(error)

    def _route(self, operator: OperatorPeer, message: Request, now: float) -> None:
        component = self._find(message)
        if message.action in RUN_ACTIONS:
            raise RequestError(f"{message.action} of a component is the core's to ask for")
        if message.action not in component.actions:
            there = ", ".join(component.actions) or "none"
            raise UnknownAction(f"{component.name} has no action {message.action!r}; it has {there}")
        if message.action not in LOOKING:
            self._control.claim(operator, now)
            _log.info("%s: %s of %s", operator.name, message.action, component.name)
        request = self._post.new_id()
        self._routed[request] = _Routed(component.name, message.action, operator.session, message.request)
        if not self._post.send(component.name, request, message.action, message.params):
            del self._routed[request]
            raise ComponentError(f"{component.name} does not take {message.action}: its queue is full or it is gone")

    def _find(self, message: Request) -> Component:
        living = self._peers.components
        if message.component:
            if message.component not in living:
                there = ", ".join(living) or "none"
                raise ComponentError(f"no component is named {message.component!r}; there are {there}")
            return living[message.component]
        found = self._peers.of_kind(message.kind)
        if not found:
            what = _IN_WORDS.get(message.kind, f"component of kind {message.kind!r}")
            there = ", ".join(living) or "nobody"
            raise ComponentError(f"{message.action}: no {what} is there (registered and alive: {there})")
        return found[0]

    def answered(self, component: Component, answer: Answer) -> bool:
        """Pass a component's answer on; False when no Operator has asked."""
        routed = self._routed.get(answer.request)
        if routed is None or routed.component != component.name:
            return False
        self._pass_on(answer, component.name)
        return True

    def _pass_on(self, answer: Answer, name: str) -> None:
        routed = self._routed[answer.request]
        if answer.kind in ("result", "error"):
            del self._routed[answer.request]
        operator = self._peers.operators.get(routed.operator)
        if operator is not None:
            answer.request, answer.component = routed.request, name
            self.answer(operator, answer)

    def answer(self, operator: OperatorPeer, answer: Answer) -> None:
        if answer.kind in ("result", "error"):
            operator.recent.keep(answer.request, answer)
        self._post.send_to(operator, answer)

    def gone(self, peer: Peer, what: str) -> None:
        """Nothing more comes from this peer: its requests fail, its answers are wanted by nobody."""
        if isinstance(peer, OperatorPeer):
            self._routed = {key: one for key, one in self._routed.items() if one.operator != peer.session}
            return
        for request, routed in list(self._routed.items()):
            if routed.component == peer.name:
                text = f"{peer.name} was {what} while it worked on {routed.action}"
                self._pass_on(Answer(request=request, kind="error", text=text, error=ComponentError.code), peer.name)
