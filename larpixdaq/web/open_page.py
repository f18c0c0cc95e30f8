"""An open page with its websocket: what it asks, and what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.websockets import WebSocket, WebSocketDisconnect

from larpixdaq.constants import NO_CORE, Name
from larpixdaq.control import client
from larpixdaq.errors import ControlHeld, LarpixDaqError, ProtocolError, printable
from larpixdaq.runtime.timing import Throttle
from larpixdaq.web.live import Live, Page, Watch
from larpixdaq.web.page import MAX_WAITING, Outbox, to_json
from larpixdaq.web.sessions import Session
from larpixdaq.web.snapshots import Order, names_snapshot, with_content

_log = logging.getLogger("larpixdaq.web")
#: Maximum bytes of a frame of a page, and of a result that it gets.
MAX_FRAME: Final = 64 << 10
MAX_RESULT: Final = 16 << 20
#: Maximum number of unanswered requests of a page; its frames a second, and at once.
MAX_UNANSWERED: Final = 64
FRAMES: Final = (20.0, 100)
#: Seconds until a page that takes nothing is closed, and until the connection of a page that is closed has ended.
SLOW: Final = 30.0
CLOSING: Final = 1.0
#: Codes with which a websocket is closed (4000 to 4999 are free for applications).
NOT_LOGGED_IN: Final = 4401
TOO_SLOW: Final = 4408
TOO_MANY: Final = 4429
CORE_GONE: Final = 4503
#: What sending to a page that has gone raises.
_GONE: Final = (WebSocketDisconnect, RuntimeError, OSError)


class Ask(msgspec.Struct, frozen=True, tag="request", tag_field="type", forbid_unknown_fields=True):
    """A request of a page for an action of the core or of a component."""

    id: Annotated[str, Meta(min_length=1, max_length=64)]
    action: Name
    params: dict[str, Any] = {}
    component: Annotated[str, Meta(max_length=64)] = ""
    kind: Annotated[str, Meta(max_length=64)] = ""


class _Id(msgspec.Struct):
    id: Annotated[str, Meta(max_length=64)] = ""


_frames: Final = msgspec.json.Decoder(Ask | Watch)


class OpenPage(Page):
    """An open page with its websocket, and its requests to the core."""

    def __init__(
        self, websocket: WebSocket, session: Session, connection: client.Connection, live: Live, frames: Throttle
    ) -> None:
        self._changed = asyncio.Event()
        super().__init__(Outbox(live.sections, session.viewer), self._changed.set)
        self._socket, self._session, self._live, self._rate = websocket, session, live, frames
        self._connection = connection
        self._name = secrets.token_hex(8)
        self._open: dict[str, client.Request] = {}
        self._preparing: set[asyncio.Task[None]] = set()
        self._core_silent = False
        self._loop = asyncio.get_running_loop()
        self._closing: tuple[int, str] | None = None
        self._changed.set()

    async def serve(self) -> None:
        """Send and receive until the page has gone, or is closed."""
        sender = asyncio.create_task(self._send())
        receiver = asyncio.create_task(self._receive())
        try:
            done, _ = await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None and not isinstance(error, _GONE):
                    _log.error("a page has failed", exc_info=error)
        finally:
            tasks = (sender, receiver, *self._preparing)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._open.clear()
        if self._closing is not None:
            code, reason = self._closing
            with contextlib.suppress(Exception):  # it may have gone
                await self._socket.close(code, close_reason(reason))

    def close(self, code: int, reason: str) -> None:
        """Close the page, at the latest after CLOSING seconds, also if it takes nothing."""
        if self._closing is None:
            self._closing = code, reason
            self._changed.set()
            self._loop.call_later(CLOSING, self._socket.state.abort)

    def check(self) -> None:
        """Say at each open request that the core is silent; its answer may still come when it is heard again."""
        silent = self._connection.link.silence() > NO_CORE
        if silent and not self._core_silent:
            for number, request in self._open.items():
                text = f"{request.action}: the core was not heard for {NO_CORE:g} s; it may still do what was asked"
                self._put(number, "progress", response_json(number, client.Response("progress", text=text)))
        self._core_silent = silent

    async def _send(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._closing is not None:
                return
            for frame in self.outbox.take():
                sent = self._socket.send_text(frame) if isinstance(frame, str) else self._socket.send_bytes(frame)
                try:
                    await asyncio.wait_for(sent, SLOW)
                except asyncio.TimeoutError:
                    _log.info("a page of %s is closed: it took nothing for %g s", self._session.stored.name, SLOW)
                    self._socket.state.abort()
                    return

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                self.close(1003, "expected text")
                return
            self._handle(text)

    def _handle(self, text: str) -> None:
        if not self._rate.passes(self._name, 1):
            self._refuse(text, f"more than {FRAMES[0]:g} requests a second")
            return
        try:
            frame = read_frame(text)
        except ProtocolError as error:
            self._refuse(text, str(error))
            return
        if isinstance(frame, Watch):
            self._live.show(self, frame)
        elif frame.id in self._open:
            self._refuse(text, f"request {frame.id!r} is open already")
        elif len(self._open) >= MAX_UNANSWERED:
            self._refuse(text, f"{MAX_UNANSWERED} requests are unanswered")
        elif names_snapshot(frame.action):
            self._open[frame.id] = client.Request(frame.action, self._connection.link.silence)  # holds its place
            task = asyncio.create_task(self._ask_with_snapshot(frame))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)
        else:
            self._ask(frame.id, Order(frame.action, frame.params, frame.component, frame.kind))

    async def _ask_with_snapshot(self, frame: Ask) -> None:
        order = Order(frame.action, frame.params, frame.component, frame.kind)
        try:
            order = await with_content(self._connection, order)
        except LarpixDaqError as error:
            self._respond(frame.id, client.Response("error", error=error, text=str(error)))
        except (LookupError, TypeError) as error:
            text = f"{frame.action}: an answer of another version of larpix-daq: {printable(repr(error))}"
            self._respond(frame.id, client.Response("error", error=ProtocolError(text), text=text))
        else:
            self._ask(frame.id, order)

    def _ask(self, number: str, order: Order) -> None:
        try:
            request = self._connection.ask(order.action, dict(order.params), order.component, order.kind)
        except LarpixDaqError as error:
            self._respond(number, client.Response("error", error=error, text=str(error)))
            return
        self._open[number] = request

        def listen(response: client.Response) -> None:
            # In the thread of the connection, because a large result takes a while.
            json = response_json(number, response)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._post, number, request, response.kind, json)

        request.listen(listen)

    def _refuse(self, text: str, problem: str) -> None:
        """Answer a frame that is not understood, with its id if that can be read."""
        number = ""
        with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
            number = msgspec.json.decode(text, type=_Id).id
        error = ProtocolError(problem)
        self._put(number, "error", response_json(number, client.Response("error", error=error, text=problem)))

    def _respond(self, number: str, response: client.Response) -> None:
        self._open.pop(number, None)
        self._put(number, response.kind, response_json(number, response))

    def _post(self, number: str, request: client.Request, kind: str, json: bytes) -> None:
        if self._open.get(number) is not request:  # it was failed before, or the page has gone
            return
        if kind in ("result", "error"):
            del self._open[number]
        self._put(number, kind, json)

    def _put(self, number: str, kind: str, json: bytes) -> None:
        self.outbox.respond(number, kind, json)
        if self.outbox.waiting > MAX_WAITING:
            self.close(TOO_SLOW, "too many responses wait")
        self._changed.set()


def read_frame(text: str) -> Ask | Watch:
    """Read a frame of a page. ProtocolError, in one line, if it is none."""
    try:
        frame: Ask | Watch = _frames.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"this request is not understood: {printable(str(error))}") from None
    return frame


def response_json(number: str, response: client.Response) -> bytes:
    """Return a response to a page's request. A result that is too large becomes an error."""
    fields: dict[str, Any] = {
        "type": "response", "id": number, "kind": response.kind, "component": response.component,
        "text": response.text, "value": response.value, "done": response.done, "total": response.total, "error": "",
    }  # fmt: skip
    if response.error is not None:
        fields["error"] = type(response.error).__name__
        if isinstance(response.error, ControlHeld):
            fields |= {"by": response.error.by, "since": response.error.since}
    json = to_json(fields)
    if len(json) > MAX_RESULT:
        text = f"the result has {len(json)} bytes, at most {MAX_RESULT} can be shown: ask for less"
        return response_json(number, client.Response("error", response.component, text, error=ProtocolError(text)))
    return json


def close_reason(text: str) -> str:
    """Cut the reason of a closed websocket to the 123 bytes that it may have."""
    return text.encode()[:120].decode(errors="ignore")
