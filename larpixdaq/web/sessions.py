"""Viewers who have logged in: their cookies, their keys, and the Operator of each.

A log-in gives a viewer a key of the core's key store, as `larpixdaq keys join` does. So the core itself checks the role
of each viewer, names the viewer in the audit, and ends the session when the key is revoked. The sessions are kept in a
private file, and survive a restart of the web server.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from larpixdaq.constants import NO_CORE
from larpixdaq.control.client import Connection
from larpixdaq.control.connection import join_core
from larpixdaq.errors import ConfigError, FileError, LarpixDaqError, NoCore, NotAllowed, RequestError, RequestTimeout
from larpixdaq.keys import credentials
from larpixdaq.keys.credentials import Credentials, read_private, write_private
from larpixdaq.web.live import Live, Page

_log = logging.getLogger("larpixdaq.web")
#: Seconds until a session ends.
SESSION: Final = 7 * 86400.0
#: Seconds for which the Operator of a session without a page stays, so that a reload of the page keeps control.
KEPT: Final = 5.0
#: Maximum number of sessions, of those of a viewer from a proxy, and of open pages of one of them.
MAX_SESSIONS: Final = 200
MAX_OF_VIEWER: Final = 8
MAX_PAGES: Final = 16
#: Maximum seconds until the core has admitted the Operator of a session.
ADMISSION: Final = 3.0
#: Seconds for which an invitation of the web server itself is open.
_OPEN: Final = 30.0
#: Seconds between two tries to give keys back.
_REVOKE_INTERVAL: Final = 1.0
#: Maximum number of log-ins that are under way.
_AT_ONCE: Final = 4
_LARGEST: Final = 1 << 20
_VERSION: Final = 1
#: Maximum characters of a viewer's name in a proxy's header.
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f]{1,40}")


class StoredSession(msgspec.Struct):
    """A session in the file. `digest`: of the cookie. `key` None: the viewer uses the key of the web server's user.

    `proxy`: the viewer's name in the header of a trusted proxy; "" for who has logged in with a link.
    """

    digest: str
    name: str
    role: str
    since: float  # unix s
    key: Credentials | None = None
    proxy: str = ""


class _File(msgspec.Struct):
    version: int = _VERSION
    sessions: list[StoredSession] = []
    leaving: list[str] = []  # names of keys that are to be revoked


class Session:
    """A viewer who has logged in, with an Operator while pages are open."""

    def __init__(self, stored: StoredSession) -> None:
        self.stored = stored
        self.pages: set[Page] = set()
        self.connection: Connection | None = None
        self.used = time.monotonic()  # last use of `connection`, while there is no page
        #: Why the session has ended; "" while it has not.
        self.ended = ""

    @property
    def viewer(self) -> dict[str, str]:
        return {"name": self.stored.name, "role": self.stored.role}


def _digest(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "replace")).hexdigest()


class Sessions:
    """All sessions. `on_end` is called with a session that has ended. All methods run in the event loop."""

    def __init__(self, live: Live, path: Path, own_token: str, on_end: Callable[[Session], None]) -> None:
        """`path`: of the file. `own_token`: in the link of the web server's own user. FileError if the file cannot be
        used."""
        self._live, self._path, self._own_token, self._on_end = live, path, own_token, on_end
        self._loop = asyncio.get_running_loop()
        self._logins = asyncio.Semaphore(_AT_ONCE)
        self._by_digest: dict[str, Session] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._revoking: asyncio.Task[None] | None = None
        self._revoke_due = 0.0
        content = self._read()
        self._by_digest |= {stored.digest: Session(stored) for stored in content.sessions}
        #: Names of the keys of sessions that have ended, until the core has revoked them.
        self._leaving = dict.fromkeys(content.leaving)

    def _read(self) -> _File:
        data = read_private(self._path, _LARGEST)
        if data is None:
            return _File()
        try:
            content = msgspec.json.decode(data, type=_File)
        except (msgspec.MsgspecError, ValueError) as error:
            raise FileError(f"{self._path}: expected sessions, found {error}; remove it, and log in again") from None
        if content.version != _VERSION:
            raise FileError(f"{self._path}: expected version {_VERSION}, found {content.version}; remove it")
        return content

    def _write(self) -> None:
        """Write the file. A failure is logged: the sessions then end with this process."""
        content = _File(_VERSION, [session.stored for session in self._by_digest.values()], list(self._leaving))
        try:
            write_private(self._path, msgspec.json.encode(content))
        except FileError as error:
            _log.error("sessions: %s", error)

    # Log in and out.

    def find(self, cookie: str) -> Session | None:
        """Return the session of a cookie, None if there is none or it is over."""
        session = self._by_digest.get(_digest(cookie)) if cookie else None
        if session is not None and time.time() > session.stored.since + SESSION:
            self.end(session, "it is older than 7 days")
            return None
        return session

    async def log_in(self, token: str) -> tuple[str, Session]:
        """Log a viewer in with the token of a link. Returns a new cookie and the session. Raises LarpixDaqError."""
        if len(self._by_digest) >= MAX_SESSIONS:
            raise RequestError(f"log-in: there are {MAX_SESSIONS} sessions already")
        if hmac.compare_digest(token.encode("utf-8", "replace"), self._own_token.encode()):
            user, own = getpass_user(), await self._own_key()
            if own.server and own.role == "owner":
                return self._new(await self._invite(user, "operator"))
            # Without keys everybody may do everything; with the key of an invitation, this user has that one alone.
            return self._new(StoredSession("", user, own.role if own.server else "operator", time.time()))
        invitation, *others = credentials.read_token(token)
        if others:
            raise ConfigError("token: it is for the components of a host, not for a viewer")
        if invitation.server != (await self._own_key()).server:
            raise ConfigError("token: it is of another core than that of this web server, or from before its new keys")
        key = await self._join(invitation)
        if key.role == "component":
            raise ConfigError(f"token: it is for the component {key.name!r}, not for a viewer")
        return self._new(StoredSession("", key.name, key.role, time.time(), key))

    async def log_in_by_proxy(self, name: str, role: str) -> tuple[str, Session]:
        """Log a viewer in whom a trusted proxy has named. Returns a new cookie and the session."""
        if _NAME.fullmatch(name) is None:
            raise RequestError(f"log-in: expected a name of 1 to 40 printable characters, found {name[:80]!r}")
        own = await self._own_key()
        if not own.server or own.role != "owner":
            raise RequestError("log-in: only a web server of the core's own user, with keys, gives keys to viewers")
        of_viewer = [session for session in self._by_digest.values() if session.stored.proxy == name]
        if len(of_viewer) >= MAX_OF_VIEWER:
            self.end(min(of_viewer, key=lambda session: session.stored.since), "the same viewer has logged in again")
        stored = await self._invite(name, role)
        stored.proxy = name
        return self._new(stored)

    async def _invite(self, user: str, role: str) -> StoredSession:
        """Invite a viewer, and use the invitation. Returns a session with the new key."""
        name = f"{user[:40]}@web-{secrets.token_hex(3)}"
        made = await self._live.ask("invite", {"name": name, "role": role, "expires": _OPEN})
        (invitation,) = credentials.read_token(made["token"])
        key = await self._join(invitation)
        return StoredSession("", name, role, time.time(), key)

    async def _own_key(self) -> Credentials:
        """Return the web server's own key, when the core answers. NoCore after ADMISSION seconds."""
        link, until = self._live.connection.link, time.monotonic() + ADMISSION
        while (own := link.credentials) is None or link.silence() > NO_CORE:
            if time.monotonic() > until:
                raise NoCore(self._live.connection.key_refusal or f"log-in: no core answers at {self._live.core}")
            await asyncio.sleep(0.02)
        return own

    async def _join(self, invitation: Credentials) -> Credentials:
        """Use an invitation, at the address of the web server's own core."""
        if self._logins.locked():
            raise RequestError(f"log-in: {_AT_ONCE} others log in at this moment: try again")
        async with self._logins:
            to_own_core = msgspec.structs.replace(invitation, address=self._live.connection.link.core)
            return await asyncio.to_thread(join_core, to_own_core)

    def _new(self, stored: StoredSession) -> tuple[str, Session]:
        cookie = secrets.token_urlsafe(32)
        stored.digest = _digest(cookie)
        session = self._by_digest[stored.digest] = Session(stored)
        self._write()
        _log.info("%s has logged in as %s", stored.name, stored.role)
        return cookie, session

    def end(self, session: Session, why: str, *, revoke: bool = True) -> None:
        """End a session, and give its key back if the web server may."""
        if session.ended:
            return
        session.ended = why
        self._by_digest.pop(session.stored.digest, None)
        if revoke and session.stored.key is not None:
            self._leaving[session.stored.name] = None
        self._write()
        _log.info("the session of %s has ended: %s", session.stored.name, why)
        self._on_end(session)
        self._in_background(self._close(session))

    async def _revoke_leaving(self) -> None:
        """Have the core revoke the keys of sessions that have ended, if this is the core's own user."""
        for name in list(self._leaving):
            try:
                await self._live.ask("revoke", {"name": name})
            except (NoCore, RequestTimeout):
                return  # tried again later
            except LarpixDaqError as error:  # somebody else has revoked it, or may
                _log.info("the key of %s is not revoked here: %s", name, error)
            self._leaving.pop(name, None)
            self._write()

    # Operators.

    async def admit(self, session: Session) -> Connection:
        """Return the session's Operator when the core has admitted it.

        NotAllowed if the core refuses its key, which ends the session; NoCore if the core does not answer.
        """
        session.used = time.monotonic()
        if session.connection is None:
            stored, own = session.stored, self._live.connection.link.credentials
            if stored.key is not None and own is not None and own.server not in ("", stored.key.server):
                # The core has got new keys while this session had no Operator that could learn them.
                stored.key = msgspec.structs.replace(stored.key, server=own.server, next=own.next)
            session.connection = Connection(
                self._live.core,
                f"{stored.name} (web)"[:64],
                insecure=self._live.insecure,
                key=stored.key,
                key_changed=partial(self._key_changed, session),
            )
        connection = session.connection
        until = time.monotonic() + ADMISSION
        while not connection.opened:
            if connection.key_refusal or session.ended:
                self.check(session)
                raise NotAllowed(session.ended or connection.key_refusal)
            if time.monotonic() > until:
                raise NoCore(f"no core answers at {self._live.core}, so that the session cannot be checked")
            await asyncio.sleep(0.02)
        return connection

    def _key_changed(self, session: Session, key: Credentials) -> None:
        """Store a key with the core's new one in it. Called in the thread of the session's Operator."""

        def store() -> None:
            session.stored.key = key
            if not session.ended:
                self._write()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(store)

    def check(self, session: Session) -> None:
        """End the session if the core refuses its key."""
        if session.connection is not None and (why := session.connection.key_refusal):
            self.end(session, why, revoke=False)

    def turn(self) -> None:
        """End the sessions that are over or refused, and close Operators without a page."""
        now, wall = time.monotonic(), time.time()
        if self._leaving and now >= self._revoke_due and (self._revoking is None or self._revoking.done()):
            self._revoke_due = now + _REVOKE_INTERVAL
            self._revoking = asyncio.create_task(self._revoke_leaving())
        for session in list(self._by_digest.values()):
            if wall > session.stored.since + SESSION:
                self.end(session, "it is older than 7 days")
            elif session.connection is not None:
                self.check(session)
                if session.pages:
                    session.used = now
                elif now - session.used > KEPT and not session.ended:
                    self._in_background(self._close(session))

    async def _close(self, session: Session) -> None:
        connection, session.connection = session.connection, None
        if connection is not None:
            await asyncio.to_thread(connection.close)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Close all Operators; the sessions stay in the file."""
        for session in self._by_digest.values():
            self._in_background(self._close(session))
        await asyncio.gather(*self._background, return_exceptions=True)


def getpass_user() -> str:
    """Return the login name of this process's user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
