"""Sends alarms to commands, webhooks and by mail.

Each destination has a thread and a queue with a limit, so that a program or server that hangs holds up nobody else. A
destination gets a limited number of messages a minute; further ones share one message. Addresses and passwords are read
when they are used, and stand in no status, log line or argument.
"""

from __future__ import annotations

import contextlib
import email.message
import email.utils
import http.client
import json
import logging
import os
import queue
import signal
import smtplib
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from larpixdaq.alarm_config import (
    AlarmConfig,
    CommandDestination,
    MailDestination,
    WebhookDestination,
    is_web_address,
)
from larpixdaq.errors import printable
from larpixdaq.runtime.units import cut
from larpixdaq.version import VERSION

_log = logging.getLogger("larpixdaq.core")
_LEVELS: Final = ("warning", "alarm")
#: Maximum number of messages that wait for a destination; further ones are lost and counted.
WAITING: Final = 100
#: Seconds between the attempts to send a message to a server.
_RETRIES: Final = (1.0, 5.0)
_MINUTE: Final = 60.0
#: Maximum number of alarms that a common message names.
_NAMED: Final = 10
#: Maximum bytes of a file with a secret.
_MAX_SECRET: Final = 4096


class Message(NamedTuple):
    """What is sent. `text`: one line. `content`: for JSON, with the same text."""

    event: str
    level: str
    text: str
    content: dict[str, Any]


class DeliveryError(Exception):
    """A message could not be sent. The text has no secrets."""


def _common(messages: list[Message]) -> Message:
    """Return one message for several."""
    if len(messages) == 1:
        return messages[0]
    texts = [message.text for message in messages]
    named = texts if len(texts) <= _NAMED else [*texts[:_NAMED], f"and {len(texts) - _NAMED} more"]
    text = f"{len(messages)} messages about alarms: {' | '.join(named)}"
    level = max((message.level for message in messages), key=_LEVELS.index)
    content = {**messages[-1].content, "text": text, "event": "summary", "count": len(messages), "alarm": None}
    return Message("summary", level, text, content)


class Destination:
    """A thread that sends messages, in order. Only `send` may take long; put() never waits."""

    def __init__(
        self, name: str, per_minute: int, send: Callable[[Message], None], retries: tuple[float, ...] = ()
    ) -> None:
        """`send` raises DeliveryError; the message is then sent again after each of `retries` seconds."""
        self.name = name
        self._per_minute, self._send, self._retries = per_minute, send, retries
        self._queue: queue.Queue[Message | None] = queue.Queue(WAITING)
        self._times: deque[float] = deque()  # of the messages in the last minute
        self._closing = threading.Event()
        self._busy_since: float | None = None
        self._sent = self._failed = self._lost = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name=f"alarms to {name}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Queue a message; it is lost and counted when too many wait."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                _log.error("alarms to %s: %d messages wait, further ones are lost", self.name, WAITING)

    def status(self) -> dict[str, Any]:
        """Return {"name", "sent", "failed", "lost", "waiting" (messages), "busy_s" (of the present one), "error"}."""
        since = self._busy_since
        return {
            "name": self.name,
            "sent": self._sent,
            "failed": self._failed,
            "lost": self._lost,
            "waiting": self._queue.qsize(),
            "busy_s": None if since is None else round(time.monotonic() - since, 1),
            "error": self._error,
        }

    def close(self, limit: float) -> None:
        """Send what waits, for at most `limit` seconds. A thread that hangs ends with the process."""
        self._closing.set()
        self._end()
        self._thread.join(limit)

    def _end(self) -> None:
        """Queue the end, in place of the last message if there is no room."""
        while True:
            try:
                self._queue.put_nowait(None)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()
                    self._lost += 1

    def _run(self) -> None:
        waiting: list[Message] = []
        ended = False
        while not ended:
            left = self._pause()
            try:
                message = self._queue.get(timeout=left if waiting else None)
                ended = message is None
                if message is not None:
                    waiting.append(message)
            except queue.Empty:
                pass
            if self._closing.is_set() and not ended:
                continue  # the rest shares one message
            if waiting and (ended or not self._pause()):
                self._times.append(time.monotonic())
                self._deliver(_common(waiting), len(waiting))
                waiting = []

    def _pause(self) -> float:
        """Return the seconds until another message may be sent."""
        now = time.monotonic()
        while self._times and now - self._times[0] >= _MINUTE:
            self._times.popleft()
        return 0.0 if len(self._times) < self._per_minute else self._times[0] + _MINUTE - now

    def _deliver(self, message: Message, count: int) -> None:
        for wait in (*self._retries, None):
            self._busy_since = time.monotonic()
            try:
                self._send(message)
            except DeliveryError as error:
                text = str(error)
            except Exception as error:  # a fault of this program must not end the thread
                text = f"{type(error).__name__}"
            else:
                if self._error:
                    _log.info("alarms to %s: sent again", self.name)
                self._sent += count
                self._error = ""
                return
            finally:
                self._busy_since = None
            if text != self._error:
                self._error = text
                _log.error("alarms to %s: %s", self.name, text)
            if wait is None or self._closing.wait(wait):
                self._failed += count
                return


class Delivery:
    """The destinations of a configuration."""

    def __init__(self, config: AlarmConfig, core: str) -> None:
        """`core`: address of the core, which each message names."""
        self._core = core
        self._host = socket.gethostname()
        self._destinations: list[tuple[Any, Destination]] = []
        for number, command in enumerate(config.command, 1):
            self._add(command, f"command {command.name or number}", _Command(command))
        for number, webhook in enumerate(config.webhook, 1):
            self._add(webhook, f"webhook {webhook.name or number}", _Webhook(webhook), _RETRIES)
        for number, mail in enumerate(config.mail, 1):
            self._add(mail, f"mail {mail.name or number}", _Mail(mail), _RETRIES)

    def _add(self, settings: Any, name: str, send: Callable[[Message], None], retries: tuple[float, ...] = ()) -> None:
        self._destinations.append((settings, Destination(name, settings.per_minute, send, retries)))

    def send(self, event: str, level: str, text: str, alarm: dict[str, Any]) -> None:
        """Send what happened to an alarm to all destinations that want it. Never waits."""
        content = {"text": text, "event": event, "time": time.time(), "alarm": alarm}
        message = Message(event, level, text, content | {"core": self._core, "host": self._host})
        for settings, destination in self._destinations:
            if event in settings.events and _LEVELS.index(level) >= _LEVELS.index(settings.level):
                destination.put(message)

    def status(self) -> list[dict[str, Any]]:
        """Return the status() of each destination."""
        return [destination.status() for _, destination in self._destinations]

    def close(self, limit: float) -> None:
        """Send what waits, for at most `limit` seconds."""
        until = time.monotonic() + limit
        for _, destination in self._destinations:
            destination.close(0.0)
        for _, destination in self._destinations:
            destination.close(max(0.0, until - time.monotonic()))


class _Command:
    """Runs a command with a message on its standard input and in its environment."""

    def __init__(self, settings: CommandDestination) -> None:
        self._settings = settings

    def __call__(self, message: Message) -> None:
        alarm = message.content.get("alarm") or {}
        values = {"event": message.event, "level": message.level, "text": message.text}
        values |= {key: alarm.get(key, "") for key in ("id", "condition", "component", "subject", "count")}
        environment = {f"LARPIXDAQ_ALARM_{key.upper()}": printable(str(value)) for key, value in values.items()}
        try:
            # In its own session, so that its children end with it.
            process = subprocess.Popen(
                self._settings.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | environment,
                start_new_session=True,
            )
        except OSError as error:
            raise DeliveryError(f"cannot start {self._settings.argv[0]}: {error.strerror or error}") from None
        except ValueError as error:
            raise DeliveryError(f"cannot start {self._settings.argv[0]}: {error}") from None
        try:
            # A command that does not read its input is not an error.
            process.communicate(json.dumps(message.content).encode(), self._settings.time_limit)
        except subprocess.TimeoutExpired:
            text = f"{self._settings.argv[0]} did not end within {self._settings.time_limit:g} s and was killed"
            raise DeliveryError(text) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            raise DeliveryError(f"{self._settings.argv[0]} ended with status {process.returncode}")


def _secret(file: str, variable: str) -> str:
    """Return the secret in a file or an environment variable; DeliveryError if there is none."""
    if variable:
        if not (value := os.environ.get(variable, "").strip()):
            raise DeliveryError(f"the environment variable {variable} is empty")
        return value
    try:
        with open(Path(file).expanduser(), "rb") as opened:
            value = opened.read(_MAX_SECRET).decode("utf-8").strip()
    except OSError as error:
        raise DeliveryError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DeliveryError(f"{file}: expected UTF-8") from None
    if not value:
        raise DeliveryError(f"{file}: is empty")
    return value


class _Deadline:
    """Closes a connection after a time limit, because the time-outs of sockets begin anew with each byte."""

    def __init__(self) -> None:
        self.passed = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def watch(self, sock: socket.socket | None) -> None:
        with self._lock:
            self._socket = sock
            if self.passed:
                self._shut()

    def end(self) -> None:
        with self._lock:
            self.passed = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def _within(seconds: float) -> Iterator[_Deadline]:
    """Give the connection of this context a deadline. Errors of the network become DeliveryErrors without secrets."""
    deadline, began = _Deadline(), time.monotonic()
    timer = threading.Timer(seconds, deadline.end)
    timer.daemon = True
    timer.start()
    try:
        yield deadline
    except DeliveryError:
        raise
    except (OSError, http.client.HTTPException, smtplib.SMTPException, ValueError) as error:
        # The libraries hide some time-outs in other errors.
        if deadline.passed or time.monotonic() - began > 0.9 * seconds:
            raise DeliveryError(f"no answer within {seconds:g} s") from None
        raise DeliveryError(_network_error(error)) from None
    finally:
        timer.cancel()


def _reason(error: BaseException) -> object:
    return getattr(error, "reason", None)


def _network_error(error: BaseException) -> str:
    """Return an error in a few words. Texts of libraries may repeat the address or the login, and are left out."""
    if isinstance(error, urllib.error.HTTPError):
        redirected = ", and redirections are not followed" if 300 <= error.code < 400 else ""
        return f"the server answered with status {error.code}{redirected}"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"the mail server refused with code {error.smtp_code}"
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return "the mail server refused all receivers"
    reason = _reason(error)
    cause = reason if isinstance(reason, OSError) else error
    if isinstance(cause, ssl.SSLError):
        return f"TLS: {cause.reason or 'failed'}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause).__name__


class _Webhook:
    """Posts a message as JSON. Follows no redirections, and knows no schemes but http and https."""

    def __init__(self, settings: WebhookDestination) -> None:
        self._settings = settings

    def __call__(self, message: Message) -> None:
        url = self._settings.url or _secret(self._settings.url_file, self._settings.url_env)
        if not is_web_address(url):
            where = self._settings.url_file or self._settings.url_env
            raise DeliveryError(f"{where}: expected http://HOST/... or https://HOST/...")
        headers = {"Content-Type": "application/json", "User-Agent": f"larpix-daq/{VERSION}"}
        request = urllib.request.Request(url, json.dumps(message.content).encode(), headers, method="POST")
        with _within(self._settings.time_limit) as deadline:
            opener = urllib.request.OpenerDirector()
            handlers: list[urllib.request.BaseHandler] = [
                urllib.request.ProxyHandler(),
                _Http(deadline),
                _Https(deadline),
                urllib.request.HTTPDefaultErrorHandler(),
                urllib.request.HTTPErrorProcessor(),
            ]
            for handler in handlers:
                opener.add_handler(handler)
            try:
                response = opener.open(request, timeout=self._settings.time_limit)
            except urllib.error.HTTPError as error:
                error.close()
                raise
            if response is not None:
                response.close()


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_watched(http.client.HTTPConnection, self._deadline), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_watched(http.client.HTTPSConnection, self._deadline), request)


def _watched(kind: type[http.client.HTTPConnection], deadline: _Deadline) -> Any:
    class Connection(kind):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    return Connection


class _Mail:
    """Sends a message by SMTP."""

    def __init__(self, settings: MailDestination) -> None:
        self._settings = settings

    def __call__(self, message: Message) -> None:
        settings = self._settings
        password = _secret(settings.password_file, settings.password_env) if settings.user else ""
        mail = email.message.EmailMessage()
        text = printable(message.text)
        mail["Subject"] = f"[larpix-daq] {cut(text, 150)}"
        mail["From"], mail["To"] = settings.sender, ", ".join(settings.to)
        mail["Date"] = email.utils.formatdate()
        mail.set_content(f"{text}\n\n{json.dumps(message.content, indent=2)}\n")
        with _within(settings.time_limit) as deadline:
            server = _Smtp(deadline, settings.host, settings.port, settings.time_limit)
            try:
                if settings.starttls:
                    server.starttls(context=ssl.create_default_context())
                    deadline.watch(server.sock)
                if settings.user:
                    server.login(settings.user, password)
                refused = server.send_message(mail)
                with contextlib.suppress(OSError, smtplib.SMTPException):
                    server.quit()
            finally:
                server.close()
        if refused:
            raise DeliveryError(f"the mail server refused {len(refused)} of {len(settings.to)} receivers")


class _Smtp(smtplib.SMTP):
    """A connection to a mail server with a deadline, also for the server's greeting."""

    def __init__(self, deadline: _Deadline, host: str, port: int, time_limit: float) -> None:
        self._deadline = deadline
        super().__init__(host, port, timeout=time_limit)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        sock = socket.create_connection((host, port), timeout)
        self._deadline.watch(sock)
        return sock
