"""A process of larpix-daq as the others see it: registration with the core, heartbeats, actions, logging.

The sockets to core and log live in a background thread, so that heartbeats go on while the process waits for a disk.
Actions run in the process's own loop: `fileno()` becomes readable when one waits, and `dispatch()` runs it there.

One request for an action of a component, as the component's handler sees it.
"""

from __future__ import annotations

import inspect
import logging
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import zmq

from larpixdaq.config import CORE_PORT, address, process_identity
from larpixdaq.constants import HEARTBEAT, PATIENCE, STOP
from larpixdaq.control.connection import CoreConnection, RecentRequests
from larpixdaq.control.log_shipping import LogShipper
from larpixdaq.errors import LarpixDaqError, NoCore, RequestError, UnknownAction, misuse
from larpixdaq.protocol.control import (
    ActionRequest,
    Answer,
    FromCore,
    Heartbeat,
    Kind,
    Register,
    Update,
    Welcome,
    packed,
)
from larpixdaq.protocol.reports import Status
from larpixdaq.runtime.event_loop import Signals, Stopped, Waker
from larpixdaq.runtime.timing import Load, next_beat, wait_ms

_log = logging.getLogger("larpixdaq.control.node")
#: Requests that wait for dispatch(); more are refused.
_MAX_WAITING: Final = 1000


class Node:
    """One component: `kind` is "producer", "run_data", "storage" or "log"."""

    #: The session that the core gave at registration; a new one after having been lost.
    session: str
    #: The run state as the core last told it ("STOP", "READY", "RUN") and the run's number, None outside a run.
    state: str
    run: int | None
    #: Producers that the core knows: name -> stream address. Replaced as a whole when it changes.
    producers: dict[str, str]
    #: Grows whenever dispatch() has changed one of the four above.
    changes: int

    def __init__(
        self,
        name: str,
        kind: Kind,
        core: str,
        actions: Mapping[str, Callable[..., Any]],
        *,
        info: Mapping[str, Any],
        status: Callable[[], Status] | None = None,
        on_name_taken: Callable[[], None] | None = None,
    ) -> None:
        """`core` is its address, with or without port; `info` goes out with each registration (a producer: stream
        address, epoch, layout, io_groups; a storage: directory, highest_run), with the process's id, host and user
        added.

        dispatch() calls the handlers in `actions` as `handler(call, **call.params)`. An exception of a handler becomes
        the call's error, and is logged. A value other than None ends the call as its result; after None the handler
        ends it itself, at once or later.

        report() calls `status` for the heartbeat. dispatch() calls `on_name_taken` when this component was lost and for
        5 s could not register again, because another component has its name; without `on_name_taken` it raises.
        """
        self.name, self.kind = name, kind
        self.session, self.state, self.run = "", STOP, None
        self.producers = {}
        self.changes = 0
        self._actions = {action: (handler, inspect.signature(handler)) for action, handler in actions.items()}
        self._info, self._status = info, status
        self._on_name_taken = on_name_taken
        self._instance = secrets.token_hex(16)
        self._joined_run: int | None = None  # the run that prepare_run brought us into; no end_run yet
        self._begun = False
        self._beat = Heartbeat()
        self._load = Load()
        self._status_due = 0.0
        self._loop_turned: float | None = None  # when the main loop last called report()
        self._last_beat = 0.0
        self._inbox: deque[FromCore] = deque()
        self._known_state: tuple[str, str, int | None, dict[str, str]] | None = None
        self._recent = RecentRequests()
        self._ready = Waker()
        self._refused_since = 0.0
        self._refusal: Answer | None = None
        self._name_taken = self._name_loss_reported = False
        self._log_address = ""
        self._closed = False
        try:
            self._link = CoreConnection(
                address(core, CORE_PORT),
                name=name,
                hello=self._hello,
                beat=self._heartbeat,
                received=self._receive,
                refused=self._refuse,
                each_turn=self._ship,
            )
        except LarpixDaqError:
            self._ready.close()
            raise
        self._shipper = LogShipper(name, self._link.context)

    # Called by the main loop.

    def connect(self, timeout: float | None = None, *, signals: Signals | None = None) -> None:
        """Start the thread and register.

        NoCore after `timeout` (5) seconds in which no core was heard; RequestError when the core refuses, for 5 s when
        that is because the name is in use; Stopped when `signals` has caught a signal.
        """
        self._shipper.attach()
        limit = PATIENCE if timeout is None else timeout
        self._link.start()
        started = time.monotonic()
        poller = zmq.Poller()
        poller.register(self._ready.fileno(), zmq.POLLIN)
        if signals is not None:
            poller.register(signals.fileno(), zmq.POLLIN)
        while not self.session:
            poller.poll(50)
            self._ready.clear()
            if signals is not None and signals.stop:
                raise Stopped(signal.SIGTERM)
            refusal = self._refusal
            if refusal is not None and (refusal.error != "name_taken" or self._name_taken):
                raise RequestError(f"{self.name}: {refusal.text}")
            # Also a core that has refused the name may die meanwhile.
            if not self._inbox and time.monotonic() - max(started, self._link.heard) > limit:
                raise NoCore(f"no core answers at {self._link.core} (waited {limit:g} s)")
            while self._inbox and not self.session:
                self._apply(self._inbox.popleft())
        if self._inbox:  # what the core asks has to wait for dispatch(), when all is ready for it
            self._ready.wake()
        _log.info("%s is registered with the core at %s", self.name, self._link.core)

    def fileno(self) -> int:
        """A descriptor that polls readable while dispatch() has something to do."""
        return self._ready.fileno()

    def dispatch(self) -> None:
        """Run the actions that wait, in this thread, and take over what the core told."""
        self._ready.clear()
        while self._inbox:
            self._apply(self._inbox.popleft())
        if self._name_taken:
            self._name_taken = False
            if self._on_name_taken is None:
                raise RequestError(f"{self.name}: another component has taken this name")
            self._on_name_taken()

    def wait_ms(self, due: float | None = None) -> int:
        """For the main loop's poll(): milliseconds until the next report() is due, at most until `due` (monotonic)."""
        now = time.monotonic()
        beat = next_beat(now, HEARTBEAT)
        return wait_ms(beat if due is None else min(beat, due), now)

    def report(self, progress: int, queued: int) -> None:
        """The main loop's turn, at least every 250 ms: work done so far and work waiting.

        Work without progress for 1 s reads `stuck`, and so does a loop that turns no more.
        """
        self._loop_turned = now = time.monotonic()
        status = None
        if self._status is not None and now >= self._status_due:
            self._status_due = next_beat(now, HEARTBEAT)
            status = msgspec.structs.asdict(self._status()) | {"load": self._load.shares()}
        self._beat = Heartbeat(progress=progress, queued=queued, status=status or self._beat.status)

    @property
    def heard(self) -> float:
        """time.monotonic() of the last message from the core; 0 before the first."""
        return self._link.heard

    @property
    def confirmed(self) -> float:
        """time.monotonic() at which the newest heartbeat was sent that the core has answered under our session."""
        return self._link.confirmed

    def close(self) -> None:
        """Say goodbye to the core, send what the log has not got yet (at most 1 s), stop the thread."""
        if self._closed:
            return
        self._closed = True
        self._link.close()
        self._shipper.close()
        self._ready.close()

    def _apply(self, message: FromCore) -> None:
        if isinstance(message, ActionRequest):
            self._run_action(message)
        elif isinstance(message, Update):  # which _receive() lets pass only when it brings a change
            self.session, self.state = message.session, message.state
            self.run, self.producers = message.run, message.producers
            self.changes += 1

    def _run_action(self, request: ActionRequest) -> None:
        call = Call(request, self._answer)
        try:
            try:
                handler, signature = self._actions[call.action]
            except KeyError:
                there = ", ".join(sorted(self._actions)) or "none"
                raise UnknownAction(f"{self.name} has no action {call.action!r}; it has {there}") from None
            try:
                signature.bind(call, **call.params)
            except TypeError as error:
                own = list(signature.parameters.values())[1:]
                raise misuse(call.action, error, signature.replace(parameters=own)) from None
            value = handler(call, **call.params)
            if value is not None:
                call.result(value)
        except Exception as error:
            self._failed(call, error)

    def _failed(self, call: Call, error: Exception) -> None:
        expected = isinstance(error, LarpixDaqError)
        line = " ".join(str(error).split()) if expected else f"{type(error).__name__}: {' '.join(str(error).split())}"
        # Who asked is told in any case; a wrong question is no trouble of ours.
        level = logging.INFO if isinstance(error, RequestError) else logging.ERROR
        _log.log(level, "%s: action %s failed: %s", self.name, call.action, line, exc_info=not expected)
        if not call.ended:
            call.fail(line, error.code if isinstance(error, RequestError) else "failed")

    def _answer(self, call: Call, answer: Answer) -> None:
        if answer.kind == "result":
            self._note_run(call)
        if answer.kind in ("result", "error"):
            self._recent.keep(call.request, answer)
        self._link.send(answer)

    def _note_run(self, call: Call) -> None:
        """Remember which run we are in, for a core that asks at registration."""
        if call.action == "prepare_run":
            self._joined_run, self._begun = call.params.get("run"), False
        elif call.action == "begin_run":
            self._begun = True
        elif call.action in ("end_run", "abort_run", "cancel_run") and call.params.get("run") == self._joined_run:
            self._joined_run, self._begun = None, False

    # Called in the link's thread.

    def _hello(self) -> Register:
        return Register(
            name=self.name,
            kind=self.kind,
            instance=self._instance,
            actions=sorted(self._actions),
            info={**self._info, **process_identity()},
            run=self._joined_run,
            begun=self._begun,
        )

    def _heartbeat(self) -> Heartbeat:
        now, beat = time.monotonic(), self._beat
        if self._loop_turned is not None and now - self._last_beat > 2 * HEARTBEAT:
            self._loop_turned = (
                now  # this thread stood still too: so did the whole process, and its loop is not to blame
            )
        self._last_beat = now
        idle = 0.0 if self._loop_turned is None else max(0.0, now - self._loop_turned)
        return Heartbeat(
            progress=beat.progress,
            queued=beat.queued + self._waiting_requests(),
            idle=round(idle, 3),
            run=self._joined_run,
            begun=self._begun,
            status=beat.status,
        )

    def _waiting_requests(self) -> int:
        return sum(isinstance(message, ActionRequest) for message in list(self._inbox))

    def _receive(self, message: FromCore) -> None:
        if isinstance(message, Welcome):
            self._refusal, self._name_loss_reported = None, False
        if isinstance(message, Update):
            self._log_address = message.log
            told = (message.session, message.state, message.run, message.producers)
            if told == self._known_state:
                return
            self._known_state = told
        elif isinstance(message, ActionRequest):
            if self._recent.is_repeat(message.request):
                # The core asks again: its request or our answer may have been lost with a connection.
                answer = self._recent.answer(message.request)
                if answer is not None:
                    self._link.send(answer)
                return
            if self._waiting_requests() >= _MAX_WAITING:
                text = f"{self.name} is busy: {_MAX_WAITING} requests wait already"
                self._link.send(Answer(request=message.request, kind="error", text=text, error="failed"))
                return
        self._inbox.append(message)
        self._ready.wake()

    def _refuse(self, answer: Answer) -> None:
        now = time.monotonic()
        if self._refusal is None or self._refusal.error != answer.error:
            self._refused_since = now
        if answer.error == "name_taken" and now - self._refused_since > PATIENCE and not self._name_loss_reported:
            self._name_taken = self._name_loss_reported = True
        self._refusal = answer
        self._ready.wake()

    def _ship(self) -> bool:
        return self._shipper.ship(self._log_address)


class Call:
    """One request for an action. Exactly one of result() and fail() ends it, at once or later, from the main loop."""

    action: str
    params: dict[str, Any]

    def __init__(self, request: ActionRequest, answer: Callable[[Call, Answer], None]) -> None:
        self.action = request.action
        self.params = request.params
        self.request = request.request
        self.ended = False
        self._answer = answer

    def ack(self, text: str = "") -> None:
        self._answer(self, Answer(request=self.request, kind="ack", text=text))

    def progress(self, done: int, total: int, text: str = "", value: Any = None) -> None:
        self._answer(
            self,
            Answer(request=self.request, kind="progress", text=text, done=done, total=total, value=packed(value)),
        )

    def result(self, value: Any = None, text: str = "") -> None:
        self._end(Answer(request=self.request, kind="result", text=text, value=packed(value)))

    def fail(self, text: str, code: str = "failed") -> None:
        self._end(Answer(request=self.request, kind="error", text=text, error=code))

    def _end(self, answer: Answer) -> None:
        if self.ended:
            raise RuntimeError(f"{self.action} has been answered already")
        self.ended = True
        self._answer(self, answer)
