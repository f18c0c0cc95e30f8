"""The Requests of an Operator: their responses, the waiting for them, and the connection that carries them."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from larpixdaq.constants import HEARTBEAT, NO_CORE
from larpixdaq.control.connection import CoreConnection
from larpixdaq.control.display import is_table, show
from larpixdaq.control.result_views import GENERAL, view_of
from larpixdaq.errors import (
    ComponentError,
    ControlHeld,
    LarpixDaqError,
    NoCore,
    NotAllowed,
    RequestTimeout,
    error_from_code,
)
from larpixdaq.keys.credentials import Credentials
from larpixdaq.protocol import control
from larpixdaq.protocol.control import Answer, FromCore, Heartbeat, Open, Update, Welcome

#: Maximum number of responses that wait to be read; the oldest are dropped.
_KEPT: Final = 10_000
#: Seconds after which a request without acknowledgement is sent again, and between questions for the answer of an
#: acknowledged request.
_RESEND: Final = 1.0
_ASK_FOR_ANSWER: Final = 2.0
#: Maximum seconds that close() waits for answers to requests whose result was not awaited.
CLOSE_WAIT: Final = 1.0
#: Seconds that IPython waits for a result before it shows the latest response.
_SHOW: Final = 5.0
#: Seconds after that in which it does not wait once more, because it asks for the other form of the same result.
_AGAIN: Final = 0.5


class _NamedWithAdvice(type):
    """The type of Response: its name says how to get the result, because json's error has nothing but that name."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        return "Response (its result is .value)"


@dataclass(frozen=True, eq=False)
class Response(metaclass=_NamedWithAdvice):
    """One response to a request. `kind` is "ack", "progress", "result" or "error"; `error` is the exception of an
    error."""

    kind: str
    component: str = ""
    text: str = ""
    value: Any = None
    done: int = 0
    total: int = 0
    error: LarpixDaqError | None = None

    def __getitem__(self, key: object, *value: object) -> Any:
        raise TypeError(
            f"a Response is no dictionary with [{key!r:.40}]: its result is .value; .kind, .text and .error are others"
        )

    __setitem__ = get = __getitem__  # in version 0.2 a response was a dictionary

    def __str__(self) -> str:
        parts = [f"{self.component}: {self.kind}" if self.component else self.kind]
        if self.total:
            parts.append(f"{self.done}/{self.total}")
        if self.text:
            parts.append(self.text)
        if self.value is not None:
            parts.append(repr(self.value))
        return " ".join(parts)


class _Outcome:
    """The error of one request. Prints the error to stderr if it is still unseen when the Request is dropped, or at
    exit."""

    def __init__(self, action: str) -> None:
        self._action = action
        self._error: LarpixDaqError | None = None
        self._dropped = False
        #: The program has waited for the result, so that it knows of a missing one.
        self.awaited = False
        # Emptied by one pop(), also when threads and the garbage collector come together: the error is printed once.
        self._unseen = [True]

    def fail(self, error: LarpixDaqError) -> None:
        self._error = error
        self._report()

    def mark_seen(self) -> None:
        self._unseen.clear()

    def release(self) -> None:
        """Note that the Request was dropped, so that its error can no longer be read."""
        self._dropped = True
        self._report()

    def _report(self) -> None:
        if self._error is None or not self._dropped:
            return
        with contextlib.suppress(Exception):  # the error was seen, or stderr is closed
            self._unseen.pop()
            line = (str(self._error).splitlines() or [""])[0]
            print(
                f"larpixdaq: {self._action} failed and nobody looked at it: {type(self._error).__name__}: {line} "
                "(.result() waits and raises)",
                file=sys.stderr,
                flush=True,
            )


class Request(Generator[Response, None, Any]):
    """A request and its responses, those that have come and those still to come.

    Iterating gives each Response as it comes; the last one is the result, and StopIteration carries its value. A failed
    request gives its error last and then raises it. `result()` waits for the end and returns the value; it can be
    called many times. Dropping a Request stops listening and never cancels. An unseen error is written to stderr when
    the Request is dropped, or at exit.
    """

    def __init__(self, action: str, silence: Callable[[], float], words: Callable[[Any], str] | None = None) -> None:
        """`silence` returns the seconds since the core was heard. `words` converts the result to text, in place of
        the view of the action's results."""
        self.action = action
        self._view = view_of(action, words)
        self._show_until = 0.0  # time.monotonic() until which IPython waits for the result
        self._silence = silence
        self._changed = threading.Condition()
        self._waiting: deque[Response] = deque(maxlen=_KEPT)
        self._latest: Response | None = None
        self._final: Response | None = None
        self._listener: Callable[[Response], None] | None = None
        self._closed = False
        self.outcome = _Outcome(action)
        weakref.finalize(self, self.outcome.release)

    @property
    def done(self) -> bool:
        """Whether the result or the error has come."""
        return self._final is not None

    @property
    def latest(self) -> Response | None:
        """The latest Response, None before the first."""
        return self._mark_seen(self._latest)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return its value.

        Raises the error of a failed request, RequestTimeout after `timeout` seconds, and NoCore when the core was not
        heard for 2 s. It can be called again after the last two.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        self.outcome.awaited = True
        with self._changed:
            while self._final is None:
                self._wait(limit, timeout)
            final = self._final
        self._mark_seen(final)
        if final.error is not None:
            raise final.error
        return final.value

    def readable(self, timeout: float | None = None) -> str:
        """Return the result as text, with aligned tables and times in UTC. Waits and raises as result() does."""
        return self._view.text(self.result(timeout))

    def send(self, value: None = None) -> Response:
        """Wait for the next Response and return it."""
        self.outcome.awaited = True
        with self._changed:
            while not self._waiting and self._final is None and not self._closed:
                self._wait(None, None)
            if self._waiting and not self._closed:
                response = self._waiting.popleft()
                self._mark_seen(response)
                return response
            closed, self._closed = self._closed, True
        raise StopIteration(None if closed else self.result())

    def throw(self, typ: Any, val: BaseException | object = None, tb: TracebackType | None = None, /) -> Response:
        """End the iteration with this exception, as in any generator."""
        self.close()
        return super().throw(typ, val, tb)

    def close(self) -> None:
        """End the iteration; result() still works."""
        self._closed = True

    def listen(self, listener: Callable[[Response], None]) -> None:
        """Call `listener` with each Response: now with those that have come, and later ones in the connection's thread.

        They are not kept for iteration then. The Request must be kept until its last Response has come.
        """
        self.outcome.awaited = True
        self.outcome.mark_seen()
        with self._changed:
            self._listener = listener
            while self._waiting:
                listener(self._waiting.popleft())

    def _wait(self, limit: float | None, timeout: float | None) -> None:
        left = 0.25 if limit is None else min(0.25, limit - time.monotonic())
        if left <= 0:
            raise RequestTimeout(f"{self.action}: no result within {timeout:g} s")
        silent = self._silence() > NO_CORE
        notified = self._changed.wait(left)
        # After a pause of this process, messages of the core have waited and are received now: look twice.
        if silent and not notified and self._silence() > NO_CORE:
            raise NoCore(f"{self.action}: the core was not heard for {NO_CORE:g} s; it may still do what was asked")

    def take(self, response: Response) -> None:
        """Add a response. Called by the connection, in its thread."""
        with self._changed:
            if self._final is not None:
                return
            self._latest = response
            if response.kind in ("result", "error"):
                self._final = response
            if self._listener is None:
                self._waiting.append(response)
            else:
                self._listener(response)
            self._changed.notify_all()
        if response.error is not None:
            self.outcome.fail(response.error)

    def _mark_seen(self, response: Response | None) -> Response | None:
        if response is not None and response.error is not None:
            self.outcome.mark_seen()
        return response

    def __repr__(self) -> str:
        latest = self.latest
        return f"<Request {self.action}: {latest if latest is not None else 'no answer yet'}>"

    # Operations on the result, not on the Request: their error says how to get the result.

    def __getitem__(self, key: object) -> Any:
        raise self._no_result(f"[{key!r:.40}]")

    def __contains__(self, item: object) -> bool:
        raise self._no_result(f" before `{item!r:.40} in` it")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Request):
            return self is other
        raise self._no_result(f" == {other!r:.40}")

    __hash__ = object.__hash__

    def _no_result(self, use: str) -> TypeError:
        return TypeError(f"{self.action}: a Request is not its result yet; wait for it: .result(){use}")

    def _shown(self) -> Any:
        """Return the result for IPython, which asks for it twice, as text and as HTML. Raises as result()."""
        now = time.monotonic()
        if now > self._show_until + _AGAIN:
            self._show_until = now + _SHOW
        return self.result(max(0.0, self._show_until - now))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the result in IPython if it comes within 5 s, else the latest response. Consumes no response."""
        try:
            value = self._shown()
        except RequestTimeout:
            printer.text(repr(self))
        except LarpixDaqError as error:
            printer.text(f"{type(error).__name__}: {error}")
        else:
            if self._view is GENERAL:
                show(value, printer)
            else:
                printer.text(self._view.text(value))

    def _repr_html_(self) -> str | None:
        """Show the result in a notebook as tables and pictures, without any script; None: as text."""
        try:
            value = self._shown()
        except LarpixDaqError:
            return None
        if self._view is GENERAL and not isinstance(value, dict | list) and not is_table(value):
            return None
        return self._view.html(value)


@dataclass
class _Sent:
    message: control.ActionRequest
    request: weakref.ref[Request]
    outcome: _Outcome
    next: float
    acknowledged: bool = False


class Connection:
    """All open requests of one Operator. The failure of a dropped Request is printed to stderr."""

    def __init__(
        self,
        core: str,
        name: str,
        *,
        insecure: bool = False,
        key: Credentials | None = None,
        key_changed: Callable[[Credentials], None] | None = None,
        pid: int = 0,
    ) -> None:
        """`key` and `key_changed`: as for CoreConnection. `pid`: as in control.Open."""
        self.name, self._pid = name, pid
        self.last_update = Update()
        self._instance = secrets.token_hex(16)
        self._guard = threading.Lock()
        self._sent: dict[str, _Sent] = {}
        self._ids = itertools.count(1)
        self._opened = threading.Event()
        self._refusal = ""
        self._key_refused = False
        self._closed = False
        self.link = CoreConnection(
            core,
            name=name,
            hello=self._hello,
            beat=Heartbeat,
            received=self._receive,
            refused=self._refuse,
            each_turn=self._resend,
            insecure=insecure,
            key=key,
            key_changed=key_changed,
        )
        self.link.start()

    def wait(self, timeout: float) -> None:
        """Wait until the core has answered; NoCore after `timeout` seconds. NotAllowed: there is no key for it."""
        limit = time.monotonic() + timeout
        while not self._opened.wait(min(0.05, max(0.0, limit - time.monotonic()))):
            if self._key_refused:
                raise NotAllowed(self._refusal)
            if time.monotonic() < limit:
                continue
            raise NoCore(self._refusal or f"no core answers at {self.link.cores} (waited {timeout:g} s)")

    def ask(
        self,
        action: str,
        params: dict[str, Any],
        component: str,
        kind: str,
        words: Callable[[Any], str] | None = None,
    ) -> Request:
        """Send a request. Without a core the Request fails at once, with NoCore, or NotAllowed if it refuses the key.

        It is never sent later.
        """
        request = Request(action, self.link.silence, words)
        if self._closed or self._key_refused or self.link.silence() > NO_CORE:
            why = "this Operator is closed" if self._closed else f"no core is heard at {self.link.cores}"
            request.take(_failure(self._no_core(action, why)))
            return request
        with self._guard:
            number = f"{self._instance[:16]}-{next(self._ids)}"
            message = control.ActionRequest(
                request=number, action=action, params=params, component=component, kind=kind
            )
            control.pack(message)  # raises at once if a parameter cannot be sent: the caller's mistake
            self._sent[number] = _Sent(message, weakref.ref(request), request.outcome, time.monotonic() + _RESEND)
        self.link.send(message)
        return request

    def _no_core(self, action: str, why: str) -> LarpixDaqError:
        if self._key_refused:
            return NotAllowed(f"{action}: {self._refusal}")
        return NoCore(f"{action}: {why}")

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def opened(self) -> bool:
        """Whether the core has opened a session for this Operator at some time."""
        return self._opened.is_set()

    @property
    def key_refusal(self) -> str:
        """Why the core refuses the key; "" when it does not."""
        return self._refusal if self._key_refused else ""

    def ignore_open_requests(self) -> None:
        """Print no errors of the requests that are open now."""
        for sent in list(self._sent.values()):
            sent.outcome.awaited = True
            sent.outcome.mark_seen()

    def close(self) -> None:
        """Disconnect. Waits up to CLOSE_WAIT seconds for answers to requests that were not awaited, which may be
        refusals."""
        self._closed = True
        limit = time.monotonic() + CLOSE_WAIT
        while time.monotonic() < limit and self.link.silence() <= NO_CORE:
            if all(sent.outcome.awaited for sent in list(self._sent.values())):
                break
            time.sleep(0.01)
        self.link.close()
        for number, sent in list(self._sent.items()):
            if sent.outcome.awaited:
                sent.outcome.mark_seen()
            text = f"{sent.message.action}: this Operator was closed before the result came; it may have been done"
            self._deliver(number, _failure(NoCore(text)))

    # Called in the thread of the connection to the core.

    def _hello(self) -> Open:
        return Open(name=self.name, instance=self._instance, pid=self._pid)

    def _refuse(self, answer: Answer) -> None:
        self._refusal, self._key_refused = answer.text, answer.error in ("key", NotAllowed.code)
        if self._key_refused:  # no answer will come
            for number, sent in list(self._sent.items()):
                text = f"{sent.message.action}: {self._refusal} (it may have been done)"
                self._deliver(number, _failure(NotAllowed(text)))

    def _receive(self, message: FromCore) -> None:
        if isinstance(message, Update):
            self.last_update = message
            self._key_refused = False
            if isinstance(message, Welcome):
                self._reopened()
        elif isinstance(message, Answer):
            self._answered(message)

    def _reopened(self) -> None:
        """Fail all open requests, because the core has a new session and does not know them."""
        if self._opened.is_set():
            self.link.take_unsent()
            for number, sent in list(self._sent.items()):
                text = f"{sent.message.action}: the core was restarted and does not know this request"
                self._deliver(number, _failure(ComponentError(text), "core"))
        self._opened.set()

    def _answered(self, answer: Answer) -> None:
        sent = self._sent.get(answer.request)
        if sent is None:
            return
        sent.acknowledged = True
        if answer.kind == "error":
            self._deliver(answer.request, _failure(_error(answer), answer.component))
            return
        try:
            value = control.content(answer)
            response = Response(answer.kind, answer.component, answer.text, value, answer.done, answer.total)
        except LarpixDaqError as error:
            response = _failure(error, answer.component)
        self._deliver(answer.request, response)

    def _deliver(self, number: str, response: Response) -> None:
        with self._guard:
            sent = self._sent.get(number)
            if sent is not None and response.kind in ("result", "error"):
                del self._sent[number]
        request = sent.request() if sent is not None else None
        if request is not None:
            request.take(response)
        elif sent is not None and response.error is not None:
            sent.outcome.fail(response.error)

    def _resend(self) -> bool:
        """Send open requests again, because a broken connection may have lost them or their answers.

        Also those of dropped Requests, because their errors are printed.
        """
        if self.link.silence() > NO_CORE:
            for message in self.link.take_unsent():
                sent = self._sent.get(message.request)
                if sent is not None and not sent.acknowledged:
                    why = f"the core at {self.link.core} has not acknowledged it"
                    self._deliver(message.request, _failure(self._no_core(sent.message.action, why)))
            return True
        now = time.monotonic()
        for sent in list(self._sent.values()):
            if now >= sent.next and self.link.silence() < 2 * HEARTBEAT:
                sent.next = now + (_ASK_FOR_ANSWER if sent.acknowledged else _RESEND)
                sent.message.again = sent.acknowledged
                self.link.send(sent.message)
        return True


def _failure(error: LarpixDaqError, component: str = "") -> Response:
    return Response("error", component, str(error), error=error)


def _error(answer: Answer) -> LarpixDaqError:
    if answer.error == ControlHeld.code:
        return ControlHeld(answer.text, by=answer.by, since=answer.since)
    return error_from_code(answer.error, answer.text)
