"""A component's side of the control plane: registration with the core, heartbeats, actions and logging.

The sockets to core and log are in a background thread, so that heartbeats continue while the process waits for a disk.
Actions run in the main loop of the process: `fileno()` becomes readable when a request waits, and `dispatch()` runs its
action.
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

from larpixdaq.config import core_addresses, process_identity
from larpixdaq.constants import HEARTBEAT, LOG_LEVELS, QUERIES, REGISTER_LIMIT, RUN_ACTIONS, STOP
from larpixdaq.control.connection import CoreConnection, RecentRequests
from larpixdaq.control.log_shipping import LimitedLog, LogShipper, present_level, set_level
from larpixdaq.errors import LarpixDaqError, NoCore, RequestError, StateError, UnknownAction, misuse
from larpixdaq.keys.curve import KeyPair
from larpixdaq.protocol.control import (
    ActionRequest,
    Answer,
    Endpoint,
    FromCore,
    Heartbeat,
    Kind,
    Register,
    Update,
    Welcome,
    content,
    packed,
)
from larpixdaq.protocol.reports import Status
from larpixdaq.runtime.event_loop import Signals, Stopped, Waker
from larpixdaq.runtime.timing import Load, next_beat, wait_ms
from larpixdaq.runtime.units import brief, call_text, size

_log = logging.getLogger("larpixdaq.control.node")
#: Maximum number of requests that wait for dispatch(); more are refused.
_MAX_WAITING: Final = 1000
#: Maximum bytes of a result that the log shows.
_SHOWN_RESULT: Final = 4096


class Node:
    """A component: its connection to the core, and the handlers of its actions."""

    #: The session that the core gave at registration; a new one after each registration.
    session: str
    #: The run state ("STOP", "READY", "RUN") and the run's number (None outside a run), by the core's last Update.
    state: str
    run: int | None
    #: Stream addresses of the living producers, by name. A new dict at each change.
    producers: dict[str, Endpoint]
    #: The core's last Update.
    update: Update
    #: Number of times that dispatch() has changed the attributes above.
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
        module: str = "",
        insecure: bool = False,
    ) -> None:
        """`core` is the core's address, with or without port, or several addresses with commas between them.

        `info` is sent with each registration (of a producer: stream address, epoch, layout, io_groups; of a storage:
        directory, highest_run), together with the process's id, host and user.

        dispatch() calls the handlers in `actions` as `handler(call, **call.params)`. An exception of a handler becomes
        the error of the call, and is logged. A returned value other than None becomes the result of the call; after
        None the handler must end the call itself, at once or later.

        report() calls `status` for the heartbeat. dispatch() calls `on_name_taken` when this component was lost and
        could not register again for 5 s, because another component has its name; without `on_name_taken` it raises
        RequestError. `module`: as in Register. `insecure`: connect without a key.
        """
        self.name, self.kind, self._module = name, kind, module
        self.session, self.state, self.run = "", STOP, None
        self.producers, self.update = {}, Update()
        self.changes = 0
        self._actions = {action: (handler, inspect.signature(handler)) for action, handler in actions.items()}
        self._info, self._status = info, status
        self._on_name_taken = on_name_taken
        self._instance = secrets.token_hex(16)
        self._joined_run: int | None = None  # the run of this component, from prepare_run to end_run
        self._begun = False
        self._beat = Heartbeat()
        self._load = Load()
        self._status_due = 0.0
        self._loop_turned: float | None = None  # time.monotonic() of the last report()
        self._last_beat = 0.0
        self._inbox: deque[FromCore] = deque()
        self._known_state: tuple[Any, ...] | None = None
        self._recent = RecentRequests()
        self._ready = Waker()
        self._refused_since = 0.0
        self._refusal: Answer | None = None
        self._name_taken = self._name_loss_reported = False
        self._log = Endpoint()
        self._log_request = LimitedLog(_log)
        self._wanted_level = ""
        self._closed = False
        try:
            self._link = CoreConnection(
                core_addresses(core),
                name=name,
                hello=self._hello,
                beat=self._heartbeat,
                received=self._receive,
                refused=self._refuse,
                each_turn=self._ship,
                component=name,
                insecure=insecure,
            )
        except LarpixDaqError:
            self._ready.close()
            raise
        self._shipper = LogShipper(name, self._link.context)

    # Called by the main loop.

    def start(self) -> None:
        """Start the thread, which registers with the core when there is one. dispatch() then applies its updates."""
        self._shipper.attach()
        self._link.start()

    def connect(self, timeout: float | None = None, *, signals: Signals | None = None) -> None:
        """Start the thread and register with the core.

        Raises NoCore after `timeout` (default 5) seconds without a message from a core, RequestError when the core
        refuses (after 5 s if the name is in use), and Stopped when `signals` has caught a signal.
        """
        limit = REGISTER_LIMIT if timeout is None else timeout
        self.start()
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
            # A core that has refused the name may die while this component waits.
            if not self._inbox and time.monotonic() - max(started, self._link.heard) > limit:
                raise NoCore(f"no core answers at {self._link.cores} (waited {limit:g} s)")
            while self._inbox and not self.session:
                self._apply(self._inbox.popleft())
        if self._inbox:  # requests of the core, which wait for dispatch()
            self._ready.wake()
        _log.info("%s is registered with the core at %s", self.name, self._link.core)

    def fileno(self) -> int:
        """Return a file descriptor that is readable while dispatch() has work."""
        return self._ready.fileno()

    def dispatch(self) -> None:
        """Run the waiting actions, in this thread, and apply the updates of the core."""
        self._ready.clear()
        while self._inbox:
            self._apply(self._inbox.popleft())
        if self._name_taken:
            self._name_taken = False
            if self._on_name_taken is None:
                raise RequestError(f"{self.name}: another component has taken this name")
            self._on_name_taken()

    def wait_ms(self, due: float | None = None) -> int:
        """Return the milliseconds until report() is due, at most until `due` (time.monotonic()), for poll()."""
        now = time.monotonic()
        beat = next_beat(now, HEARTBEAT)
        return wait_ms(beat if due is None else min(beat, due), now)

    def report(self, progress: int, queued: int) -> None:
        """Report the work done so far and the waiting work. The main loop must call it at least every 250 ms.

        The component counts as stuck after 1 s in which work waits and none is done, or in which report() is not
        called.
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
        """time.monotonic() at the sending of the newest heartbeat that the core has answered in this session."""
        return self._link.confirmed

    @property
    def refusal(self) -> Answer | None:
        """The core's refusal of the registration, or that of this process for want of a key; None when registered."""
        return self._refusal

    @property
    def key_pair(self) -> KeyPair | None:
        """The key pair that this component shows to the core and to other components; None: no keys are in use."""
        own = self._link.credentials
        return own.pair if own is not None and own.server else None

    def close(self) -> None:
        """Send Bye to the core and the remaining records to the log (at most 1 s), and stop the thread."""
        if self._closed:
            return
        self._closed = True
        self._link.close()
        self._shipper.close()
        self._ready.close()

    def _apply(self, message: FromCore) -> None:
        if isinstance(message, ActionRequest):
            self._run_action(message)
        elif isinstance(message, Update):  # _receive() passes on only changes
            self.session, self.state = message.session, message.state
            self.run, self.producers = message.run, message.producers
            self.update = message
            self.changes += 1

    def _run_action(self, request: ActionRequest) -> None:
        call = Call(request, self._answer)
        if _log.isEnabledFor(logging.DEBUG):
            self._log_request("begun requests", logging.DEBUG, "%s begins", call_text(call.action, call.params))
        try:
            if call.action not in self._actions:
                known = ", ".join(sorted(self._actions)) or "none"
                raise UnknownAction(f"{self.name} has no action {call.action!r}; it has {known}")
            handler, signature = self._actions[call.action]
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
        line = " ".join((str(error) if expected else f"{type(error).__name__}: {error}").split())
        if not expected:  # an error in larpixdaq
            _log.error("%s: action %s failed: %s", self.name, call.action, line, exc_info=True)
        elif call.ended:
            _log.error("%s: after the end of action %s: %s", self.name, call.action, line)
        if not call.ended:
            call.fail(line, error.code if isinstance(error, RequestError) else "failed")

    def _answer(self, call: Call, answer: Answer) -> None:
        if answer.kind == "result":
            self._note_run(call)
        if answer.kind in ("result", "error"):
            self._recent.keep(call.request, answer)
            self._log_outcome(call, answer)
        self._link.send(answer)

    def _log_outcome(self, call: Call, answer: Answer) -> None:
        """Log the end of a request, at level DEBUG if it has changed nothing, or was a step of a run: the core logs
        those."""
        changing = call.action not in QUERIES and call.action not in RUN_ACTIONS
        failed = answer.kind == "error"
        if failed:
            level = logging.WARNING if changing and answer.error != StateError.code else logging.INFO
        else:
            level = logging.INFO if changing else logging.DEBUG
        if not _log.isEnabledFor(level):
            return
        what, seconds = call_text(call.action, call.params), time.monotonic() - call.began
        if failed:
            line = answer.text.partition("\n")[0]  # without a routine's traceback, which the log has already
            self._log_request("failed requests", level, "%s failed after %.1f s: %s", what, seconds, line)
        else:
            self._log_request("requests", level, "%s done in %.1f s: %s", what, seconds, _value_text(answer))

    def _note_run(self, call: Call) -> None:
        """Remember the run of this component, which registrations and heartbeats report to the core."""
        if call.action == "prepare_run":
            self._joined_run, self._begun = call.params.get("run"), False
        elif call.action == "begin_run":
            self._begun = True
        elif call.action in ("end_run", "abort_run", "cancel_run") and call.params.get("run") == self._joined_run:
            self._joined_run, self._begun = None, False

    # Called in the connection's thread.

    def _hello(self) -> Register:
        return Register(
            name=self.name,
            kind=self.kind,
            instance=self._instance,
            actions=sorted(self._actions),
            info={**self._info, **process_identity()},
            run=self._joined_run,
            begun=self._begun,
            module=self._module,
        )

    def _heartbeat(self) -> Heartbeat:
        now, beat = time.monotonic(), self._beat
        if self._loop_turned is not None and now - self._last_beat > 2 * HEARTBEAT:
            self._loop_turned = now  # this thread has paused too: the whole process has, not the main loop alone
        self._last_beat = now
        idle = 0.0 if self._loop_turned is None else max(0.0, now - self._loop_turned)
        queued = beat.queued + self._waiting_requests()
        return msgspec.structs.replace(
            beat, queued=queued, idle=round(idle, 3), run=self._joined_run, begun=self._begun, log_level=present_level()
        )

    def _waiting_requests(self) -> int:
        return sum(isinstance(message, ActionRequest) for message in list(self._inbox))

    def _receive(self, message: FromCore) -> None:
        if isinstance(message, Welcome):
            self._refusal, self._name_loss_reported = None, False
        if isinstance(message, Update):
            self._log = message.log
            if message.log_level in LOG_LEVELS and message.log_level != self._wanted_level:
                set_level(message.log_level)
            self._wanted_level = message.log_level
            state = (
                message.session, message.state, message.run, message.producers, message.keys, message.consumers,
                message.insecure, message.registered,
            )  # fmt: skip
            if state == self._known_state:
                return
            self._known_state = state
        elif isinstance(message, ActionRequest):
            if self._recent.is_repeat(message.request):
                # A repeated request: a broken connection may have lost the request or its answer.
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
            if self.session and answer.error == "key":  # before that, connect() raises it
                _log.warning("%s: %s; trying again", self.name, answer.text)
        if answer.error == "name_taken" and now - self._refused_since > REGISTER_LIMIT and not self._name_loss_reported:
            self._name_taken = self._name_loss_reported = True
        self._refusal = answer
        self._ready.wake()

    def _ship(self) -> bool:
        return self._shipper.ship(self._log, self.key_pair)


def _value_text(answer: Answer) -> str:
    length = len(bytes(answer.value))
    return brief(content(answer)) if length <= _SHOWN_RESULT else f"a result of {size(length)}"


class Call:
    """A request for an action, as its handler gets it. Exactly one call of result() or fail() must end it, at once or
    later, in the main loop."""

    def __init__(self, request: ActionRequest, answer: Callable[[Call, Answer], None]) -> None:
        self.action = request.action
        self.params = request.params
        self.request = request.request
        self.ended = False
        #: time.monotonic() of the beginning.
        self.began = time.monotonic()
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
