"""Requests to several components at once, which end when all have answered, failed, or exceeded their time limit.

A procedure is a generator that yields ComponentRequests and gets the answers. It has no sockets and no clock, so that
tests can try every order of events: `now` is time.monotonic() of the caller.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from larpixdaq.control.registry import Component, Registry
from larpixdaq.errors import ComponentError, LarpixDaqError, RequestError
from larpixdaq.protocol.control import Answer, content
from larpixdaq.runtime.units import natural

_log = logging.getLogger("larpixdaq.core")
#: Maximum number of components of which the same is said in a text for each.
MANY_NAMES: Final = 4
_PLURAL: Final = {"is": "are", "has": "have", "was": "were"}
#: Maximum number of requests whose late answers are still expected.
_LATE_KEPT: Final = 1000


class ComponentAnswer(NamedTuple):
    """A component's answer: `value` of a result (ok), or the error in `text`. `silent`: none has come, because the
    component is lost, or within the time limit."""

    ok: bool
    value: Any
    text: str = ""
    silent: bool = False

    def result(self) -> Any:
        """Return the value; ComponentError when there is none."""
        if not self.ok:
            raise ComponentError(self.text)
        return self.value


def fold_reasons(texts: Iterable[str], modules: Mapping[str, str]) -> list[str]:
    """Return texts that each begin with the name of a component, where many that say the same become one text, which
    names all of these components by module: `20 components have not answered: module 3 (disk 1, disk 2), …`.

    `modules`: the module of each component by name, "" for none. Other texts stay as they are.
    """
    said: dict[tuple[str, str], list[str]] = {}  # names by what is said of them; of other texts none
    for text in dict.fromkeys(texts):
        # A name has at most 64 characters.
        ends = [found.start() for found in re.finditer("[ :]", text[:65])]
        name = next((text[:end] for end in reversed(ends) if text[:end] in modules), "")
        key = ("", text[len(name) :]) if name else (text, "")
        said.setdefault(key, []).append(name)
    folded = []
    for (whole, rest), names in said.items():
        if whole or len(names) <= MANY_NAMES:
            folded += [whole or name + rest for name in names]
            continue
        verb, _, others = rest.removeprefix(":").strip().partition(" ")
        words = f" {_PLURAL[verb]} {others}" if verb in _PLURAL else f": {verb} {others}".rstrip()
        folded.append(f"{len(names)} components{words}: {by_module(names, modules)}")
    return folded


def by_module(names: Iterable[str], modules: Mapping[str, str]) -> str:
    """Return all names as a text: `module 3 (disk 1, disk 2), module 5 (disk 7)`; without modules `disk 1, disk 2`."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        found.setdefault(modules.get(name, ""), []).append(name)
    return ", ".join(
        f"{module} ({', '.join(found[module])})" if module else ", ".join(found[module])
        for module in sorted(found, key=natural)
    )


@dataclass
class Item:
    """A request to one component. Seconds: `limit` for the answer, `patience` for which it may be lost meanwhile."""

    params: dict[str, Any]
    limit: float
    patience: float = 0.0


@dataclass
class ComponentRequest:
    """One action of several components."""

    action: str
    items: dict[str, Item]  # by component


Steps = Generator[ComponentRequest, dict[str, ComponentAnswer], Any]


class Team(Protocol):
    """Sends requests to components."""

    def new_id(self) -> str: ...

    def send(self, name: str, request: str, action: str, params: dict[str, Any]) -> bool:
        """Send a request; False if no component of this name is alive or takes it."""


class ReplyRoute(Protocol):
    """Sends answers back to the Operator."""

    def progress(self, component: str, text: str, done: int = 0, total: int = 0) -> None: ...
    def result(self, value: Any) -> None: ...
    def error(self, error: LarpixDaqError) -> None: ...


class LogReply:
    """Logs the end of a procedure that no Operator has requested."""

    def __init__(self, what: str) -> None:
        self._what = what

    def progress(self, component: str, text: str, done: int = 0, total: int = 0) -> None:
        pass

    def result(self, value: Any) -> None:
        _log.info("%s: done", self._what)

    def error(self, error: LarpixDaqError) -> None:
        _log.error("%s: %s", self._what, error)


@dataclass
class Instruction:
    """The request of one action from one component. Times are time.monotonic()."""

    name: str  # of the component
    action: str
    item: Item
    request: str
    deadline: float
    instance: str  # of the component's process; "" when it was not registered
    lost: float | None = None
    done: bool = False  # by the component's answer
    late: bool = False  # no procedure waits for the answer any more


class Procedure:
    """One run of a generator. Instructions whose answers it no longer waits for go to `late`, by request id."""

    def __init__(
        self, what: str, steps: Steps, peers: Registry, team: Team, reply: ReplyRoute, late: dict[str, Instruction]
    ) -> None:
        self.what = what
        self.done = False
        self._steps, self._peers, self._team, self._reply, self._late = steps, peers, team, reply, late
        #: Open instructions by request id.
        self.pending: dict[str, Instruction] = {}
        self._outcomes: dict[str, ComponentAnswer] = {}
        self._started = False

    def tick(self, now: float) -> None:
        """Check the time limits, and continue with the next steps until an answer is awaited."""
        while not self.done and not self._expire(now):
            try:
                request = self._steps.send(self._outcomes) if self._started else next(self._steps)
            except StopIteration as end:
                self.done = True
                self._reply.result(end.value)
                return
            except LarpixDaqError as error:
                self.done = True
                self._reply.error(error)
                return
            except Exception as error:
                # An error in larpixdaq must not stop the core during a run; abort_run still leads to STOP.
                _log.exception("%s has failed", self.what)
                self.done = True
                self._reply.error(RequestError(f"{self.what}: internal error: {type(error).__name__}: {error}"))
                return
            self._started, self._outcomes = True, {}
            _log.debug("%s: %s of %s", self.what, request.action, ", ".join(request.items) or "nobody")
            for name, item in request.items.items():
                component = self._peers.components.get(name)
                instance = component.instance if component is not None else ""
                pending = Instruction(name, request.action, item, self._team.new_id(), now + item.limit, instance)
                self.pending[pending.request] = pending
                if not self._send(pending):
                    pending.lost = now

    def _expire(self, now: float) -> bool:
        """Close the requests whose time limit is over. Returns True while other requests are open."""
        for pending in list(self.pending.values()):
            if pending.lost is not None and now - pending.lost >= pending.item.patience:
                self._close(pending, ComponentAnswer(False, None, f"{pending.name} is lost", True))
            elif now >= pending.deadline:
                text = f"{pending.name} has not answered {pending.action} within {pending.item.limit:g} s"
                self._close(pending, ComponentAnswer(False, None, text, True))
                self._release(pending)
        return bool(self.pending)

    def _send(self, pending: Instruction) -> bool:
        return self._team.send(pending.name, pending.request, pending.action, pending.item.params)

    def _close(self, pending: Instruction, outcome: ComponentAnswer) -> None:
        self._outcomes[pending.name] = outcome
        del self.pending[pending.request]

    def _release(self, pending: Instruction) -> None:
        pending.late = True
        self._late[pending.request] = pending

    def answered(self, component: Component, answer: Answer) -> Instruction | None:
        """Handle an answer, and return its instruction; None if this procedure awaits none. tick() must follow."""
        pending = self.pending.get(answer.request)
        if pending is None or pending.name != component.name:
            return None
        if answer.kind not in ("result", "error"):
            self._reply.progress(pending.name, answer.text, answer.done, answer.total)
            return pending
        if answer.kind == "error":
            self._close(pending, ComponentAnswer(False, None, f"{pending.name}: {answer.text}"))
            return pending
        try:
            outcome = ComponentAnswer(True, content(answer), answer.text)
        except LarpixDaqError as error:
            outcome = ComponentAnswer(False, None, f"{pending.name}: {error}")
        self._close(pending, outcome)
        pending.done = outcome.ok
        _log.debug("%s: %s has done %s", self.what, pending.name, pending.action)
        if outcome.ok:
            done = len(self._outcomes)
            self._reply.progress(pending.name, f"{pending.action} done", done, done + len(self.pending))
        return pending

    def send_again(self, pending: Instruction, instance: str) -> None:
        """Repeat an instruction for this process of its component; it fails if the process is another one."""
        if pending.instance not in ("", instance):
            self._close(pending, ComponentAnswer(False, None, f"{pending.name} was restarted during {pending.action}"))
        elif self._send(pending):
            pending.lost = None

    def cancel(self, error: LarpixDaqError) -> None:
        """End the procedure with an error. Answers to its open instructions will be late ones."""
        self.done = True
        self._steps.close()
        for pending in self.pending.values():
            self._release(pending)
        self.pending.clear()
        self._reply.error(error)


class Procedures:
    """All running procedures: the main one, and others at the same time that no Operator has requested."""

    def __init__(self, peers: Registry, team: Team) -> None:
        #: The procedure that an Operator waits for, or that the core continues after a restart.
        self.main: Procedure | None = None
        #: time.monotonic() of the call that the procedures work in.
        self.now = time.monotonic()
        self._peers, self._team = peers, team
        self._others: list[Procedure] = []
        self._late: dict[str, Instruction] = {}

    @property
    def busy(self) -> bool:
        return self.main is not None or bool(self._others)

    def start(self, what: str, steps: Steps, reply: ReplyRoute, now: float) -> None:
        """Start the main procedure. tick() must follow."""
        self.now = now
        self.main = Procedure(what, steps, self._peers, self._team, reply, self._late)

    def start_aside(self, what: str, steps: Steps, now: float, level: int = logging.WARNING) -> None:
        _log.log(level, "%s", what)
        self.now = now
        procedure = Procedure(what, steps, self._peers, self._team, LogReply(what), self._late)
        self._others.append(procedure)
        procedure.tick(now)

    def cancel(self, error: LarpixDaqError) -> None:
        """Cancel the main procedure, which fails with `error`."""
        if self.main is not None:
            self.main.cancel(error)
            self.main = None

    def tick(self, now: float) -> None:
        """Check the time limits, and continue the procedures."""
        self.now = now
        for procedure in self._all():
            procedure.tick(now)
        while len(self._late) > _LATE_KEPT:
            del self._late[next(iter(self._late))]
        self._others = [procedure for procedure in self._others if not procedure.done]
        if self.main is not None and self.main.done:
            self.main = None

    def answered(self, component: Component, answer: Answer) -> Instruction | None:
        """Handle a component's answer, and return its instruction; None if there is none. tick() must follow."""
        for procedure in self._all():
            if (found := procedure.answered(component, answer)) is not None:
                return found
        late = self._late.get(answer.request)
        if late is None or late.name != component.name:
            return None
        if answer.kind in ("result", "error"):
            del self._late[answer.request]
        late.done = answer.kind == "result"
        return late

    def awaits(self, component: Component) -> bool:
        """Whether this component's answer to a step of a run is awaited."""
        return any(pending.name == component.name and pending.action != "add_comments" for _, pending in self._open())

    def send_again(self, component: Component) -> None:
        """Repeat the open requests of a component that has come back, because requests or answers may be lost."""
        for procedure, pending in self._open():
            if pending.name == component.name:
                procedure.send_again(pending, component.instance)

    def lost(self, name: str, now: float) -> None:
        for _, pending in self._open():
            if pending.name == name and pending.lost is None:
                pending.lost = now

    def extend_limits(self, seconds: float) -> None:
        """Extend all time limits by a pause of the core."""
        for _, pending in self._open():
            pending.deadline += seconds
            if pending.lost is not None:
                pending.lost += seconds

    def _open(self) -> list[tuple[Procedure, Instruction]]:
        return [(procedure, pending) for procedure in self._all() for pending in procedure.pending.values()]

    def _all(self) -> list[Procedure]:
        return [*self._others, *([self.main] if self.main is not None else [])]
