"""Asking several components to do something, and going on when all have answered, failed, or taken too long.

A procedure is a generator that yields an Ask and gets back what came of it. It knows no sockets, and no clock but the
times that it is told, so that every order of events can be tried.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from larpixdaq.control.registry import Component
from larpixdaq.errors import LarpixDaqError, RequestError
from larpixdaq.protocol.control import Answer, content

_log = logging.getLogger("larpixdaq.core")


class ComponentAnswer(NamedTuple):
    """`value` of a result (ok), or why there is none."""

    ok: bool
    value: Any
    text: str = ""


@dataclass
class Item:
    """What one component is asked; `limit` and `patience` (how long it may be lost meanwhile) in seconds."""

    params: dict[str, Any]
    limit: float
    patience: float = 0.0


@dataclass
class ComponentRequest:
    action: str
    items: dict[str, Item]  # by component


Steps = Generator[ComponentRequest, dict[str, ComponentAnswer], Any]


class Team(Protocol):
    """The way to the components."""

    def new_id(self) -> str: ...

    def send(self, name: str, request: str, action: str, params: dict[str, Any]) -> bool:
        """False when no such component is alive."""


class ReplyRoute(Protocol):
    """The way back to whoever wants to know."""

    def progress(self, component: str, text: str, done: int = 0, total: int = 0) -> None: ...
    def result(self, value: Any) -> None: ...
    def error(self, error: LarpixDaqError) -> None: ...


class LogReply:
    """For what nobody has asked for."""

    def __init__(self, what: str) -> None:
        self._what = what

    def progress(self, component: str, text: str, done: int = 0, total: int = 0) -> None:
        pass

    def result(self, value: Any) -> None:
        _log.info("%s: done", self._what)

    def error(self, error: LarpixDaqError) -> None:
        _log.error("%s: %s", self._what, error)


@dataclass
class _Pending:
    name: str
    item: Item
    request: str
    deadline: float
    lost: float | None = None
    instance: str = ""


@dataclass
class Late:
    """An answer that may still come after the procedure has gone on without it."""

    name: str
    action: str
    params: dict[str, Any] = field(default_factory=dict)


class Procedure:
    """One run of a generator. `late` holds the requests that it has not waited for any longer."""

    def __init__(self, what: str, steps: Steps, team: Team, reply: ReplyRoute) -> None:
        self.what = what
        self.done = False
        self.late: dict[str, Late] = {}
        self._steps, self._team, self._reply = steps, team, reply
        self._ask = ComponentRequest("", {})
        self._pending: dict[str, _Pending] = {}
        self._outcomes: dict[str, ComponentAnswer] = {}

    def start(self, instances: dict[str, str], now: float) -> None:
        """`instances` says, by name, which process of each component is the one that is known."""
        self._advance(None, instances, now)

    def _advance(self, outcomes: dict[str, ComponentAnswer] | None, instances: dict[str, str], now: float) -> None:
        while not self.done:
            try:
                self._ask = next(self._steps) if outcomes is None else self._steps.send(outcomes)
            except StopIteration as end:
                self.done = True
                self._reply.result(end.value)
                return
            except LarpixDaqError as error:
                self.done = True
                self._reply.error(error)
                return
            except Exception as error:
                # A mistake of ours must not take the core down in the middle of a run; abort_run still leads to STOP.
                _log.exception("%s has failed", self.what)
                self.done = True
                self._reply.error(RequestError(f"{self.what}: internal error: {type(error).__name__}: {error}"))
                return
            self._outcomes = {}
            for name, item in self._ask.items.items():
                pending = _Pending(name, item, self._team.new_id(), now + item.limit, instance=instances.get(name, ""))
                self._pending[pending.request] = pending
                if not self._team.send(name, pending.request, self._ask.action, item.params):
                    pending.lost = now
            if self._settle(now):
                return
            outcomes = self._outcomes

    def _settle(self, now: float) -> bool:
        """Give up on those that took too long; True while somebody is still awaited."""
        for pending in list(self._pending.values()):
            if pending.lost is not None and now - pending.lost >= pending.item.patience:
                self._close(pending, ComponentAnswer(False, None, f"{pending.name} is lost"))
            elif now >= pending.deadline:
                text = f"{pending.name} has not answered {self._ask.action} within {pending.item.limit:g} s"
                self._close(pending, ComponentAnswer(False, None, text))
                self.late[pending.request] = Late(pending.name, self._ask.action, pending.item.params)
        return bool(self._pending)

    def _close(self, pending: _Pending, outcome: ComponentAnswer) -> None:
        self._outcomes[pending.name] = outcome
        del self._pending[pending.request]

    def tick(self, instances: dict[str, str], now: float) -> None:
        if not self.done and not self._settle(now):
            self._advance(self._outcomes, instances, now)

    def answered(self, component: Component, answer: Answer) -> tuple[str, dict[str, Any]] | None:
        """Take an answer in; action and params of what was done when it is a result. tick() goes on from there."""
        pending = self._pending.get(answer.request)
        if pending is None or pending.name != component.name:
            return None
        if answer.kind not in ("result", "error"):
            self._reply.progress(component.name, answer.text, answer.done, answer.total)
            return None
        if answer.kind == "error":
            self._close(pending, ComponentAnswer(False, None, f"{component.name}: {answer.text}"))
            return None
        try:
            outcome = ComponentAnswer(True, content(answer), answer.text)
        except LarpixDaqError as error:
            outcome = ComponentAnswer(False, None, f"{component.name}: {error}")
        self._close(pending, outcome)
        if outcome.ok:
            done = len(self._outcomes)
            self._reply.progress(component.name, f"{self._ask.action} done", done, done + len(self._pending))
        return (self._ask.action, pending.item.params) if outcome.ok else None

    def awaits(self, request: str) -> bool:
        return request in self._pending

    def asks(self, name: str) -> bool:
        return any(pending.name == name for pending in self._pending.values())

    def lost(self, name: str, now: float) -> None:
        for pending in self._pending.values():
            if pending.name == name and pending.lost is None:
                pending.lost = now

    def back(self, component: Component) -> None:
        """It is there again, or its connection is a new one: ask again, the request or the answer may be lost."""
        for pending in list(self._pending.values()):
            if pending.name != component.name:
                continue
            if pending.instance not in ("", component.instance):
                self._close(
                    pending, ComponentAnswer(False, None, f"{component.name} was restarted during {self._ask.action}")
                )
            elif self._team.send(component.name, pending.request, self._ask.action, pending.item.params):
                pending.lost = None

    def excuse(self, seconds: float) -> None:
        """The core itself stood still for so long."""
        for pending in self._pending.values():
            pending.deadline += seconds
            if pending.lost is not None:
                pending.lost += seconds

    def cancel(self, error: LarpixDaqError) -> None:
        """Stop here; what was asked already is awaited by nobody."""
        self.done = True
        self._steps.close()
        for request, pending in self._pending.items():
            self.late[request] = Late(pending.name, self._ask.action, pending.item.params)
        self._pending.clear()
        self._reply.error(error)
