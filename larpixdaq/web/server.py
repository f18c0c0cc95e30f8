"""The HTTP and websocket server: who may ask, what is served, and the frames of open pages."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote, urlsplit

import msgspec
import uvicorn
from msgspec import Meta
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from larpixdaq import config
from larpixdaq.constants import LAST_RUN, MAX_ATTACHMENT
from larpixdaq.errors import ConfigError, LarpixDaqError, NoCore, NotAllowed, RequestTimeout
from larpixdaq.runtime.event_loop import Signals
from larpixdaq.runtime.timing import Throttle
from larpixdaq.web import is_loopback, split_address
from larpixdaq.web.connections import Guard, HttpConnection, WebSocketConnection
from larpixdaq.web.links import announced, private_file
from larpixdaq.web.live import Live, ask
from larpixdaq.web.open_page import CORE_GONE, FRAMES, MAX_FRAME, NOT_LOGGED_IN, TOO_MANY, OpenPage, close_reason
from larpixdaq.web.page import to_json
from larpixdaq.web.runs import Runs
from larpixdaq.web.sessions import MAX_PAGES, SESSION, Session, Sessions

_log = logging.getLogger("larpixdaq.web")
_STATIC: Final = Path(__file__).parent / "static"
#: Maximum bytes of the body of a log-in.
MAX_BODY: Final = 16 << 10
#: Bytes of a piece of an attachment, and maximum number of attachments that come at the same time.
_PIECE: Final = 512 << 10
_UPLOADS: Final = 2
#: Maximum seconds until the body of a log-in is complete.
_BODY_LIMIT: Final = 10.0
#: Requests of a session, and log-ins of all viewers, a second and at once.
_REQUESTS: Final = (20.0, 100)
_LOGINS: Final = (1.0, 20)
#: Bytes that the kernel keeps for a browser (twice as many on Linux), so that a slow one is not minutes behind.
_SEND_BUFFER: Final = 128 << 10
#: Seconds between two looks at the sessions.
_TURN: Final = 0.1
#: Attachments that a browser may show; all others it saves. Not SVG, which may contain scripts.
_PICTURES: Final = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}
_BOKEH: Final = ("bokeh", "bokeh-api", "bokeh-tables")
#: Names of this host that need no name server.
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class _Login(msgspec.Struct, forbid_unknown_fields=True):
    token: Annotated[str, Meta(min_length=1, max_length=1024)]


def _error(status: int, problem: str) -> Response:
    return _json({"error": " ".join(problem.split())}, status)


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


async def _body(request: Request, limit: int) -> bytes:
    """Read the body of a request. HTTPException if it has more than `limit` bytes."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HTTPException(413, f"body: at most {limit} bytes")
    return body


# The server.


class Web:
    """The application, with the live state and the sessions; made in the event loop by running()."""

    def __init__(self, options: argparse.Namespace, port: int, core: str) -> None:
        self._options, self._port = options, port
        self._core = core
        self.cookie = f"larpixdaq-{port}"
        self._proxies = frozenset(options.trusted_proxy)
        self._requests, self._frames = Throttle(*_REQUESTS, shares=1 << 20), Throttle(*FRAMES, shares=1 << 20)
        self._logins = Throttle(*_LOGINS)
        self._sockets = 0
        self._uploads = asyncio.Semaphore(_UPLOADS)
        self.live: Live
        self.sessions: Sessions
        self.runs: Runs
        bokeh = importlib.util.find_spec("bokeh")
        self._bokeh = Path(bokeh.origin or "").parent / "server" / "static" / "js" if bokeh is not None else None
        routes = [
            Route("/", self._page("index.html")),
            Route("/login", self._page("login.html"), methods=["GET"]),
            Route("/login", self._log_in, methods=["POST"]),
            Route("/logout", self._log_out, methods=["POST"]),
            Route("/healthz", self._health),
            Route("/favicon.ico", self._page("favicon.svg")),
            Route("/bokeh/{name}", self._bokeh_file),
            Route("/api/session", self._session),
            Route("/api/layout", self._layout),
            Route("/api/runs", self._list_runs),
            Route("/api/runs/{run:int}", self._run),
            Route("/api/runs/{run:int}/summary", self._summary),
            Route("/api/runs/{run:int}/pixels", self._run_pixels),
            Route("/api/runs/{run:int}/attachments", self._attach, methods=["POST"]),
            Route("/api/runs/{run:int}/attachments/{name}", self._attachment),
            Mount("/static", StaticFiles(directory=_STATIC)),
            WebSocketRoute("/live", self._socket),
        ]
        handlers: Any = {HTTPException: self._http_error, LarpixDaqError: self._own_error, Exception: self._any_error}
        self._app = Starlette(routes=routes, exception_handlers=handlers)
        self.app = Guard(self._with_cache(self._app), *self._hosts())

    def _hosts(self) -> tuple[frozenset[str], bool]:
        """Return the names under which browsers may reach the server, and whether any IP address is one."""
        host, _ = split_address(self._options.address)
        names = set(_LOOPBACK_NAMES) | {host.lower()}
        anywhere = host in ("0.0.0.0", "::")
        if not is_loopback(host):
            names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        if self._options.url:
            names.add((urlsplit(self._options.url).hostname or "").lower())
        return frozenset(names), anywhere

    @contextlib.asynccontextmanager
    async def running(self, own_token: str) -> AsyncIterator[None]:
        """Make the live state and the sessions, and keep them while the context lasts."""
        self.live = Live(self._core, insecure=self._options.insecure)
        try:
            self.sessions = Sessions(self.live, private_file(self._port, "sessions"), own_token, self._end)
            self.runs = Runs(self.live)
            self.live.start()
            turns = asyncio.create_task(self._turns())
            try:
                yield
            finally:
                turns.cancel()
                await asyncio.gather(turns, return_exceptions=True)
                await self.sessions.close()
        finally:
            await self.live.close()

    async def _turns(self) -> None:
        while True:
            await asyncio.sleep(_TURN)
            try:
                self.sessions.turn()
                for page in self.live.pages:
                    assert isinstance(page, OpenPage)
                    page.check()
            except Exception:
                _log.exception("a turn has failed")

    def _end(self, session: Session) -> None:
        for page in session.pages:
            assert isinstance(page, OpenPage)
            page.close(NOT_LOGGED_IN, session.ended)

    # Files.

    @staticmethod
    def _with_cache(app: ASGIApp) -> ASGIApp:
        """Let browsers keep files, and ask each time whether they have changed."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_cache(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] in (200, 304):
                    message["headers"] = [*message.get("headers", ()), (b"cache-control", b"no-cache")]
                await send(message)

            files = scope["type"] == "http" and scope["path"].startswith(("/static/", "/bokeh/"))
            await app(scope, receive, send_with_cache if files else send)

        return wrapped

    @staticmethod
    def _page(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return FileResponse(_STATIC / name)

        return answer

    async def _bokeh_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name.removesuffix(".min.js") not in _BOKEH or not name.endswith(".min.js"):
            raise HTTPException(404, f"{request.url.path}: no such file")
        if self._bokeh is None or not (self._bokeh / name).is_file():
            raise HTTPException(404, f'{name}: bokeh is not installed: pip install "larpix-daq[web]"')
        return FileResponse(self._bokeh / name, media_type="text/javascript")

    # Log in and out.

    def _cookie(self, request: HTTPConnection) -> str:
        return request.cookies.get(self.cookie, "")

    def _proxy_name(self, request: HTTPConnection) -> str:
        """Return the viewer's name in the header of a trusted proxy, "" if there is none."""
        if request.client is None or request.client.host not in self._proxies or not self._options.trusted_header:
            return ""
        names = request.headers.getlist(self._options.trusted_header)
        return names[0] if len(names) == 1 else ""

    def _find(self, request: HTTPConnection) -> Session | None:
        """Return the session of a request. One that came from a proxy counts only while the proxy names its viewer."""
        session = self.sessions.find(self._cookie(request))
        if session is not None and session.stored.proxy and session.stored.proxy != self._proxy_name(request):
            return None
        return session

    async def _known(self, request: Request) -> Session:
        """Return the session of a request, which the core has admitted. HTTPException if there is none."""
        session = self._find(request)
        if session is None:
            raise HTTPException(401, "not logged in: open the link that larpixdaq-web prints, or `larpixdaq web-link`")
        if not self._requests.passes(session.stored.digest, 1):
            raise HTTPException(429, f"more than {_REQUESTS[0]:g} requests a second")
        try:
            await self.sessions.admit(session)
        except NotAllowed as error:
            raise HTTPException(401, str(error)) from None
        return session

    async def _log_in(self, request: Request) -> Response:
        try:
            body = await asyncio.wait_for(_body(request, MAX_BODY), _BODY_LIMIT)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"body: not complete after {_BODY_LIMIT:g} s") from None
        if not self._logins.passes("", 1):
            raise HTTPException(429, "too many log-ins at this moment: try again in a second")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "log-in: expected application/json")
        try:
            token = msgspec.json.decode(body, type=_Login).token
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise HTTPException(400, f"log-in: {error}") from None
        cookie, session = await self.sessions.log_in(token)
        return self._logged_in(_json(session.viewer), cookie)

    def _logged_in(self, response: Response, cookie: str) -> Response:
        secure = self._options.url.startswith("https://")
        response.set_cookie(
            self.cookie, cookie, max_age=int(SESSION), path="/", secure=secure, httponly=True, samesite="strict"
        )
        return response

    async def _log_out(self, request: Request) -> Response:
        session = self._find(request)
        if session is not None:
            self.sessions.end(session, "logged out")
        response = _json({})
        response.delete_cookie(self.cookie, path="/", httponly=True, samesite="strict")
        return response

    async def _session(self, request: Request) -> Response:
        """Who is logged in. A viewer whom a trusted proxy names is logged in here."""
        session = self._find(request)
        name = self._proxy_name(request)
        if session is None and name:
            if not self._logins.passes("", 1):
                raise HTTPException(429, "too many log-ins at this moment: try again in a second")
            role = "operator" if name in self._options.proxy_operator else "observer"
            cookie, session = await self.sessions.log_in_by_proxy(name, role)
            return self._logged_in(_json(session.viewer), cookie)
        return _json((await self._known(request)).viewer)

    async def _health(self, request: Request) -> Response:
        return _json({"ok": True, "core": self.live.connected})

    # Errors.

    @staticmethod
    async def _http_error(request: Request, error: HTTPException) -> Response:
        response = _error(error.status_code, error.detail)
        response.headers.update(error.headers or {})
        return response

    async def _own_error(self, request: Request, error: LarpixDaqError) -> Response:
        status = 403 if isinstance(error, NotAllowed) else 503 if isinstance(error, NoCore | RequestTimeout) else 400
        return _error(status, str(error))

    @staticmethod
    async def _any_error(request: Request, error: Exception) -> Response:
        return _error(500, f"internal error of the web server: {type(error).__name__}")

    # Data.

    async def _layout(self, request: Request) -> Response:
        await self._known(request)
        return Response(await self.live.layout(), media_type="application/octet-stream")

    async def _list_runs(self, request: Request) -> Response:
        await self._known(request)
        query = request.query_params
        limit, before = _whole(query.get("limit", "100"), "limit"), query.get("before")
        search = query.get("search", "")[:1000]
        return _json(await self.runs.select(search, limit, None if before is None else _whole(before, "before")))

    async def _run(self, request: Request) -> Response:
        await self._known(request)
        return _json(await self.runs.describe(_run_number(request)))

    async def _summary(self, request: Request) -> Response:
        await self._known(request)
        return Response(await self.runs.summary(_run_number(request)), media_type="application/json")

    async def _run_pixels(self, request: Request) -> Response:
        await self._known(request)
        quantity = request.query_params.get("quantity", "rate")
        frame = await self.runs.pixels(_run_number(request), quantity)
        return Response(frame, media_type="application/octet-stream")

    async def _attachment(self, request: Request) -> Response:
        await self._known(request)
        name = request.path_params["name"]
        content = await self.runs.attachment(_run_number(request), name)
        kind = _PICTURES.get(Path(name).suffix.lower(), "")
        how = "inline" if kind else "attachment"
        headers = {"Content-Disposition": f"{how}; filename*=UTF-8''{quote(name, safe='')}"}
        return Response(content, media_type=kind or "application/octet-stream", headers=headers)

    async def _attach(self, request: Request) -> Response:
        """Attach the body to a run, with the viewer's key; the core gets it in pieces while it comes."""
        session = await self._known(request)
        connection = await self.sessions.admit(session)
        size = _whole(request.headers.get("content-length", ""), "content-length")
        if size > MAX_ATTACHMENT:
            raise HTTPException(413, f"attachment: at most {MAX_ATTACHMENT} bytes, found {size}")
        query = request.query_params
        params: dict[str, Any] = {"run": _run_number(request), "name": query.get("name", ""), "size": size}
        if "by" in query:
            params["by"] = query["by"]
        if self._uploads.locked():
            raise HTTPException(429, "other attachments come at this moment: try again")
        async with self._uploads:
            result, offset, piece = None, 0, b""
            async for data in request.stream():
                piece += data
                while len(piece) >= _PIECE:
                    result = await ask(connection, "attach", {**params, "offset": offset, "data": piece[:_PIECE]})
                    piece, offset = piece[_PIECE:], offset + _PIECE
            if piece or not size:
                result = await ask(connection, "attach", {**params, "offset": offset, "data": piece})
        return _json(result)

    # Websockets.

    async def _socket(self, websocket: WebSocket) -> None:
        session = self._find(websocket)
        await websocket.accept()
        if session is None:
            await websocket.close(NOT_LOGGED_IN, "not logged in")
            return
        if self._sockets >= self._options.max_viewers or len(session.pages) >= MAX_PAGES:
            await websocket.close(TOO_MANY, "too many open pages")
            return
        self._sockets += 1
        page: OpenPage | None = None
        try:
            connection = await self.sessions.admit(session)
            page = OpenPage(websocket, session, connection, self.live, self._frames)
            session.pages.add(page)
            self.live.add(page)
            await page.serve()
        except NotAllowed as error:
            await websocket.close(NOT_LOGGED_IN, close_reason(str(error)))
        except LarpixDaqError as error:
            await websocket.close(CORE_GONE, close_reason(str(error)))
        finally:
            self._sockets -= 1
            if page is not None:
                self.live.remove(page)
                session.pages.discard(page)


def _whole(text: str, what: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise HTTPException(400, f"{what}: expected a whole number, found {text[:40]!r}")
    return int(text)


def _run_number(request: Request) -> int:
    run: int = request.path_params["run"]
    if not 1 <= run <= LAST_RUN:
        raise HTTPException(404, f"there is no run {str(run)[:40]}")
    return run


# Addresses, and the process.


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. ConfigError if it cannot listen."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(found[0], socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # also of its connections
            opened.bind(found[4])
            opened.listen(128)
        except OSError:
            opened.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None
    return opened


class _Server(uvicorn.Server):
    """A server that leaves signals to larpixdaq."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(options: argparse.Namespace) -> None:
    """Serve until a signal comes. LarpixDaqError if the server cannot start."""
    host, port = split_address(options.address)
    core = config.core_addresses(options.core)
    with contextlib.closing(listen(host, port)) as listening, Signals() as signals:
        port = listening.getsockname()[1]
        full = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        reached = config.outside_address(full).removeprefix("tcp://")
        url = (options.url or f"http://{reached}").rstrip("/")
        if not url.startswith("https:") and not is_loopback(host):
            _log.warning("links and cookies are sent to %s without encryption: see docs/web.md", url)
        asyncio.run(_serve(options, core, url, listening, port, signals))


async def _serve(
    options: argparse.Namespace, core: str, url: str, listening: socket.socket, port: int, signals: Signals
) -> None:
    web, own_token = Web(options, port, core), secrets.token_urlsafe(32)
    server = _Server(
        uvicorn.Config(
            web.app,
            http=HttpConnection,
            ws=WebSocketConnection,
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=2,
        )
    )

    def stop() -> None:
        if signals.stop:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_reader(signals.fileno(), stop)
    try:
        # Announced before the core knows this process, because `up` then looks for the link.
        with announced(port, url, core, own_token) as own:
            async with web.running(own_token):
                print(own.link, flush=True)
                await server.serve(sockets=[listening])
    finally:
        loop.remove_reader(signals.fileno())
