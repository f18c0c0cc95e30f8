"""Connections of browsers: which hosts and origins may ask, headers of every response, limits in number and time."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from typing import Any, ClassVar, Final

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from larpixdaq.web.page import to_json

#: Maximum number of connections; seconds that one may wait for a request, and that a request may take.
MAX_CONNECTIONS: Final = 500
_IDLE_LIMIT: Final = 15.0
_REQUEST_LIMIT: Final = 300.0
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses requests with a foreign Host or Origin, and adds the headers to every response."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], any_address: bool) -> None:
        """`hosts`: the names under which browsers may reach the server. `any_address`: also under any IP address,
        which is safe, because no other site can have it as its name."""
        self._app, self._hosts, self._any_address = app, hosts, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                headers = list(message.get("headers", ()))
                headers += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                if all(name.lower() != b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            await send(message)

        if problem := self._problem(HTTPConnection(scope)):
            await _refuse(scope, send_with_headers, 403, problem)
        else:
            await self._app(scope, receive, send_with_headers)

    def _problem(self, request: HTTPConnection) -> str:
        """Return why a request is refused, "" if it is not."""
        hosts = request.headers.getlist("host")
        host = _host_name(hosts[0]) if len(hosts) == 1 else None
        if host is None or not self._knows(host):
            return f"host {', '.join(hosts)[:100]!r}: this server is not reached under this name"
        changes = request.scope["type"] == "websocket" or request.scope["method"] not in ("GET", "HEAD")
        origins = request.headers.getlist("origin")
        if changes or origins:
            own = [f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")]
            if len(origins) != 1 or origins[0].lower() not in own:
                return f"origin {', '.join(origins)[:100]!r}: expected that of this page"
        return ""

    def _knows(self, host: str) -> bool:
        if host in self._hosts:
            return True
        with contextlib.suppress(ValueError):
            return self._any_address and bool(ipaddress.ip_address(host))
        return False


def _host_name(host: str) -> str | None:
    """Return the name in a Host header, without its port; None if it is no host."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?", host)
    return match[1].strip("[]").lower().rstrip(".") if match is not None else None


async def _refuse(scope: Scope, send: Send, status: int, problem: str) -> None:
    """Answer a request, or the handshake of a websocket, with an error."""
    prefix = "websocket.http" if scope["type"] == "websocket" else "http"
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    body = to_json({"error": problem})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{prefix}.response.start", "status": status, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": body})


class HttpConnection(H11Protocol):
    """A connection for requests, which has a limited time for each, and from one to the next.

    When there are too many, the oldest one without a request is closed, so that whoever opens many keeps nobody out.
    """

    _idle: ClassVar[dict[HttpConnection, None]] = {}  # connections that wait for a request, the oldest first
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit(_IDLE_LIMIT)
        if len(self.connections) > MAX_CONNECTIONS and self._idle:
            next(iter(self._idle)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self in self._idle and self.cycle is not None and not self.cycle.response_complete:
            self._limit(_REQUEST_LIMIT)
            self._idle.pop(self, None)

    def on_response_complete(self) -> None:
        self._limit(_IDLE_LIMIT)
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._limit(None)
        super().handle_websocket_upgrade(event)

    def _limit(self, seconds: float | None) -> None:
        """Close the connection after this time, unless it is set anew before."""
        if self._timer is not None:
            self._timer.cancel()
        self._idle.pop(self, None)
        self._timer = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self.transport.abort)
            self._idle[self] = None


class WebSocketConnection(WebSocketsSansIOProtocol):
    """A websocket that can be closed although its peer takes nothing."""

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["state"]["abort"] = self.transport.abort
