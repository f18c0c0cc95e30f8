"""NATS JetStream: where the brokers are, connecting to them, and the stream of each producer with its settings.

A producer named `X` has the stream larpixdaq_TOKEN with the subjects larpixdaq.TOKEN.RUN; TOKEN is stream_token("X").
nats-py (the extra `cluster`) and asyncio are imported where they are used, because most processes need neither.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

from larpixdaq.config import BROKER_PORT
from larpixdaq.errors import BrokerError, ConfigError, FileError, LarpixDaqError, UsageError, cause
from larpixdaq.runtime.file_access import open_private
from larpixdaq.runtime.units import duration, parse_duration, parse_size, parse_whole, size

if TYPE_CHECKING:
    import ssl

    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import ConsumerInfo, StreamConfig, StreamInfo
    from nats.js.errors import APIError

_T = TypeVar("_T")
#: The user of all components, at brokers with a password in a file.
USER: Final = "larpixdaq"
_LARGEST_PASSWORD: Final = 1024
#: Seconds for one attempt to connect to a broker, and for an answer of JetStream.
CONNECT_LIMIT: Final = 2.0
API_LIMIT: Final = 2.0
#: Seconds for which the making of a stream is tried again while the brokers elect a leader.
ELECTION_LIMIT: Final = 12.0
#: Seconds between two attempts.
RETRY_INTERVAL: Final = 0.25
#: Seconds between two pings to a broker; without answers to two of them the connection is lost.
_PING_INTERVAL: Final = 2
#: Seconds without a sign of life, of which there is one a second, after which a leader may be cut off from a broker.
_SILENT_AFTER: Final = 3.0
#: Seconds in which a broker knows the id of a message again.
_DUPLICATE_WINDOW: Final = 120.0
#: Oldest version of a broker. Consumers of 2.12 begin at other positions than those of 2.14.
OLDEST: Final = (2, 14)
#: Far more than the client ever holds, so that nothing waits for the network in publish().
_PENDING_BYTES: Final = 128 << 20
#: Error codes of JetStream.
NO_STREAM: Final = 10059
OTHER_SETTINGS: Final = 10058
WRONG_LAST_SEQUENCE: Final = 10071
STREAM_FULL: Final = 10077
ID_IN_PROCESS: Final = 10158
#: During elections and starts of brokers.
TEMPORARY: Final = (10004, 10008, 10009, 10118)
#: Codes of failures that another broker may not have, if this one is cut off: no answer, or no leader.
UNANSWERED: Final = (0, *TEMPORARY)
_MEANINGS: Final = {
    10004: "a broker of the cluster is missing",
    10005: "there are too few brokers with room for the stream",
    10008: "the brokers have no leader yet: most of them must be there, and then elect one",
    10009: "the brokers have no leader yet: most of them must be there, and then elect one",
    10023: "the brokers have no room for the stream",
    10028: "the account of the brokers has no room for the stream",
    10039: "JetStream is not enabled for this account",
    10047: "the brokers have no room for the stream",
    10059: "the stream does not exist",
    10065: "another stream has these subjects already",
    10074: "a single broker keeps one replica only",
    10076: "the broker has no JetStream",
    10077: "the stream is full",
    10118: "the brokers have no leader yet: most of them must be there, and then elect one",
}


class CutOff(BrokerError):
    """The leader of a stream does not hear most of the stream's brokers, which may have another leader."""


class Brokers(NamedTuple):
    """Where the brokers of one cluster are, and how to log in. Paths may be "".

    `servers`: URLs with port. `credentials`: a file with a JWT and its seed. `ca`: certificates of the authorities,
    `certificate` and `key`: one's own, all in PEM; with one of them, or a tls:// URL, TLS is used.
    """

    servers: tuple[str, ...]
    credentials: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""

    def __str__(self) -> str:
        """The addresses without user and password."""
        return ", ".join(map(_address, self.servers))


class Settings(NamedTuple):
    """Settings of a producer's stream. `max_bytes`: on each broker that has it; `max_age`: seconds, 0: no limit."""

    replicas: int
    max_bytes: int
    max_age: float


def parse_servers(text: str) -> tuple[str, ...]:
    """Return the URLs of a text such as nats://a,b:4223,[::1] or tls://user:password@a,b. Raises UsageError.

    Scheme, user and password of the first one hold for those without.
    """
    scheme, _, rest = text.partition("://")
    if scheme not in ("nats", "tls") or not rest:
        raise UsageError(f"brokers {hide_password(text)!r}: expected nats://HOST[:PORT],... or tls://HOST[:PORT],...")
    login = ""
    found = []
    for entry in rest.split(","):
        url = entry if "://" in entry else f"{scheme}://{entry}"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"broker {hide_password(entry)!r}: {error}") from None
        if parts.scheme != scheme:
            raise UsageError(f"brokers {hide_password(text)!r}: expected {scheme}:// for all, found {parts.scheme}://")
        given, _, where = parts.netloc.rpartition("@")
        wrong = not host or parts.path or parts.query or parts.fragment or re.search(r"[\s\\]", url)
        if wrong or port == 0 or where.endswith(":"):
            raise UsageError(f"broker {hide_password(entry)!r}: expected HOST[:PORT], an IPv6 address as in [::1]:4222")
        login = given or login
        shown = f"[{host}]" if host is not None and ":" in host else host
        found.append(f"{scheme}://{login + '@' if login else ''}{shown}:{port or BROKER_PORT}")
    if len(set(found)) != len(found):
        raise UsageError(f"brokers {hide_password(text)!r}: one of them is named twice")
    return tuple(found)


def hide_password(text: str) -> str:
    """Return a text of URLs without users and passwords."""
    return re.sub(r"[^/@,\s]*@", "", text)


def _address(server: str) -> str:
    return server.partition("://")[2].rpartition("@")[2]


def stream_token(producer: str) -> str:
    """Return a producer's name as letters, digits and hyphens; each other byte of its UTF-8 as _XX, in hexadecimal."""
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte == ord("-") else f"_{byte:02X}"
        for byte in producer.encode("utf-8", "surrogateescape")
    )


def producer_of(token: str) -> str:
    """Return the producer whose stream_token() this is. Raises ValueError if it is not one."""
    data = re.sub(rb"_([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), token.encode())
    producer = data.decode("utf-8", "surrogateescape")
    if stream_token(producer) != token:
        raise ValueError(f"{token[:80]!r} is not the token of a producer's name")
    return producer


def stream_name(producer: str) -> str:
    return f"larpixdaq_{stream_token(producer)}"


def subject(producer: str, run: int | str = "*") -> str:
    """Return the subject of a producer's messages of a run; "*": of all runs."""
    return f"larpixdaq.{stream_token(producer)}.{run}"


def parse_subject(text: str) -> tuple[str, int]:
    """Return producer and run of a subject. Raises ValueError if it is not one."""
    match = re.fullmatch(r"larpixdaq\.([A-Za-z0-9_-]+)\.([1-9][0-9]{0,18})", text)
    if match is None:
        raise ValueError(f"{text[:200]!r} is not the subject of a run")
    return producer_of(match[1]), int(match[2])


# Options


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --stream and the options to log in. `what`: says what the process does with the brokers."""
    parser.add_argument(
        "--stream", metavar="BROKERS",
        help=f"NATS JetStream, {what}: nats://HOST[:PORT],HOST,... (port {BROKER_PORT} by default; needs the extra "
        "cluster)",
    )  # fmt: skip
    parser.add_argument(
        "--stream-credentials", metavar="FILE", default="",
        help="file with the user's JWT and seed for the brokers, as `nsc` makes it",
    )  # fmt: skip
    parser.add_argument(
        "--stream-password-file", metavar="FILE", default="",
        help=f"file (mode 600) with the password of the user {USER} of the brokers, in one line",
    )  # fmt: skip
    parser.add_argument(
        "--stream-ca", metavar="FILE", default="",
        help="PEM file with the authorities that sign the certificates of the brokers",
    )  # fmt: skip
    parser.add_argument(
        "--stream-certificate", metavar="FILE", default="", help="PEM file with one's own certificate for the brokers"
    )
    parser.add_argument("--stream-key", metavar="FILE", default="", help="PEM file with the key of that certificate")


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a producer's stream."""
    parser.add_argument(
        "--stream-replicas", type=lambda text: parse_whole(text, 1, 5), metavar="N",
        help="brokers that have each block (default: 3, with fewer than three brokers in --stream 1)",
    )  # fmt: skip
    parser.add_argument(
        "--stream-size", type=parse_size, default="8GiB", metavar="SIZE",
        help="disk space of the stream on each broker that has it; a full stream takes no more, until storages have "
        "what is in it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stream-age", type=parse_duration, default="168h", metavar="TIME",
        help="time after which the brokers remove blocks, also those that no storage has: 30min, 48h "
        "(default: %(default)s; 0: never)",
    )  # fmt: skip


def brokers_of(options: argparse.Namespace) -> Brokers | None:
    """Return the brokers of the options; None without --stream. Raises UsageError, ConfigError or FileError.

    Checks all that can be checked without a connection.
    """
    paths = (options.stream_credentials, options.stream_ca, options.stream_certificate, options.stream_key)
    if options.stream is None:
        if any(paths) or options.stream_password_file:
            raise UsageError(
                "--stream-password-file, -credentials, -ca, -certificate and -key: expected --stream with them"
            )
        return None
    servers = parse_servers(options.stream)
    if options.stream_password_file:
        if any("@" in server for server in servers) or options.stream_credentials:
            raise UsageError("--stream-password-file: expected no other user, password or credentials beside it")
        login = f"{USER}:{quote(read_password(options.stream_password_file), safe='')}@"
        servers = tuple(server.replace("://", f"://{login}", 1) for server in servers)
    brokers = Brokers(servers, *paths)
    check_brokers(brokers)
    return brokers


def read_password(path: str) -> str:
    """Return the password in a private file. Raises FileError and ConfigError."""
    try:
        with open(open_private(Path(path), os.O_RDONLY, secret=True), "rb") as file:
            line = file.read(_LARGEST_PASSWORD).decode("ascii", "replace").removesuffix("\n").removesuffix("\r")
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"password file {path}: {error.strerror}") from None
    if not re.fullmatch(r"[!-~]{8,}", line):
        raise ConfigError(f"password file {path}: expected one line of at least 8 ASCII characters, without spaces")
    return line


def check_brokers(brokers: Brokers) -> None:
    """Raise ConfigError or FileError if nats-py is missing, or a file cannot be used."""
    need_nats()
    if bool(brokers.certificate) != bool(brokers.key):
        raise UsageError("--stream-certificate and --stream-key: expected both or none")
    if brokers.credentials:
        try:
            with open(brokers.credentials, "rb"):
                pass
        except OSError as error:
            raise FileError(f"--stream-credentials {brokers.credentials}: {error.strerror}") from None
        try:
            import nkeys  # noqa: F401
        except ImportError:
            raise ConfigError("--stream-credentials: needs the package nkeys; `pip install nkeys`") from None
    _tls_context(brokers)


def need_nats() -> None:
    """Raise ConfigError if nats-py is not installed."""
    try:
        import nats  # noqa: F401
    except ImportError:
        raise ConfigError("--stream needs the package nats-py; `pip install larpix-daq[cluster]`") from None


def settings_of(options: argparse.Namespace, brokers: Brokers) -> Settings:
    """Return the settings of a producer's stream."""
    replicas = options.stream_replicas or (3 if len(brokers.servers) >= 3 else 1)
    return Settings(replicas, options.stream_size, options.stream_age)


def _tls_context(brokers: Brokers) -> ssl.SSLContext | None:
    if not (brokers.ca or brokers.certificate or brokers.servers[0].startswith("tls:")):
        return None
    import ssl

    context = ssl.create_default_context()
    for option, paths in (("--stream-ca", (brokers.ca,)), ("--stream-certificate", (brokers.certificate, brokers.key))):
        if paths[0]:
            try:
                if option == "--stream-ca":
                    context.load_verify_locations(brokers.ca)
                else:
                    context.load_cert_chain(brokers.certificate, brokers.key, password=lambda: b"")
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                reason = cause(ConfigError(str(error)) if isinstance(error, ssl.SSLError) else error)
                raise FileError(f"{option} {' and '.join(paths)}: {reason}") from None
    return context


# Connections


async def connect(
    brokers: Brokers, name: str, lost: Callable[[str], None], *, avoid: str = "", **options: Any
) -> Client:
    """Connect to one of the brokers, each of which is tried once, in random order, and the one at `avoid` at last.

    `name`: as the brokers list the connection. `lost`: called with the reason when the connection ends, which is not
    made again. BrokerError, with the reasons of all brokers, if none can be had.
    """
    reasons: dict[str, None] = {}
    servers = random.sample(brokers.servers, len(brokers.servers))
    for server in sorted(servers, key=lambda server: _address(server) == avoid):
        try:
            return await _connect(brokers, server, name, lost, **options)
        except BrokerError as error:
            reasons[f"{_address(server)}: {error}"] = None
    raise BrokerError(f"no broker: {'; '.join(sorted(reasons))}")


async def _connect(brokers: Brokers, server: str, name: str, lost: Callable[[str], None], **options: Any) -> Client:
    import asyncio

    client, connected = _client(), False
    reason = ""

    async def fail(error: Exception) -> None:
        nonlocal reason
        reason = describe(error)
        if not connected:
            raise error  # otherwise nats-py would go on trying

    async def closed() -> None:
        if connected:
            lost(reason or (describe(client.last_error) if client.last_error else "the connection has ended"))

    tls = _tls_context(brokers)
    parts = urlsplit(server)
    if tls is not None:
        options.update(tls=tls, tls_hostname=parts.hostname)
    if brokers.credentials:
        options.update(user_credentials=brokers.credentials)
    if parts.password is not None:  # here, because nats-py takes them from a URL without unquoting them
        options.update(user=unquote(parts.username or ""), password=unquote(parts.password))
    elif parts.username:
        options.update(token=unquote(parts.username))
    try:
        await asyncio.wait_for(
            client.connect(
                [f"{parts.scheme}://{_address(server)}"],
                name=name,
                error_cb=fail,
                closed_cb=closed,
                allow_reconnect=False,
                connect_timeout=int(CONNECT_LIMIT),
                ping_interval=_PING_INTERVAL,
                pending_size=_PENDING_BYTES,
                **options,
            ),
            2 * CONNECT_LIMIT,
        )
        version = client.connected_server_version
        found = version.major or 0, version.minor or 0
        if found < OLDEST:
            raise BrokerError(f"it has version {'.'.join(map(str, found))}, expected at least {OLDEST[0]}.{OLDEST[1]}")
    except asyncio.CancelledError:
        await close(client)
        raise
    except Exception as error:  # also of credentials that nats-py cannot use, which raise anything
        await close(client)
        raise BrokerError(describe(error)) from None
    connected = True
    return client


def _client() -> Client:
    from nats.aio import client
    from nats.errors import SecureConnRequiredError

    class SecureClient(client.Client):
        """Sends no password to a broker without TLS, if TLS is wanted."""

        async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
            if initial_connection and "tls" in self.options and not info.get("tls_required"):
                raise SecureConnRequiredError
            await super()._process_info(info, initial_connection)

    return SecureClient()


def broker_of(client: Client) -> str:
    """Return the address of the broker of a connection, as `avoid` of connect() takes it."""
    return client.connected_url.netloc if client.connected_url is not None else ""


async def close(client: Client) -> None:
    """Close a connection; what the broker does not take within a second is not sent any more."""
    import asyncio

    closed = False
    try:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.close(), 1.0)
            closed = True
    finally:  # also in a task that is cancelled
        if not closed:
            with contextlib.suppress(Exception):  # nats-py has no other way than to wait for the broker
                client._transport._bare_io_writer.transport.abort()  # type: ignore[union-attr]
    await asyncio.sleep(0)  # the loop, which may end after this, closes the socket in its next turn


# Streams


async def retried(request: Callable[[], Awaitable[_T]], limit: float = ELECTION_LIMIT) -> _T:
    """Return the result of a request to JetStream, tried again while the brokers elect a leader, for `limit` seconds.

    BrokerError with the last reason after that, and at once for any other error.
    """
    import asyncio

    from nats.errors import Error, NoRespondersError
    from nats.errors import TimeoutError as NoAnswer
    from nats.js.errors import APIError

    deadline = time.monotonic() + limit
    while True:
        try:
            return await request()
        except (Error, asyncio.TimeoutError) as error:
            temporary = isinstance(error, NoAnswer | NoRespondersError | asyncio.TimeoutError)
            if isinstance(error, APIError):
                temporary = error.err_code in TEMPORARY or _is_unanswered(error)
            if not temporary or time.monotonic() >= deadline:
                raise BrokerError(describe(error), error_code(error)) from None
        await asyncio.sleep(RETRY_INTERVAL)


async def ensure_stream(
    context: JetStreamContext, producer: str, settings: Settings, limit: float = ELECTION_LIMIT
) -> StreamInfo:
    """Return the stream of a producer, which is made if there is none; during elections tried for `limit` seconds.

    BrokerError if it cannot be made, ConfigError if there is a stream of this name with other settings.
    """
    wanted = _configuration(producer, settings)
    try:
        return await retried(lambda: context.add_stream(wanted), limit)
    except BrokerError as error:
        if error.code != OTHER_SETTINGS:
            raise BrokerError(f"stream {wanted.name}: {error}", error.code) from None
    info = await retried(lambda: context.stream_info(stream_name(producer)), limit)
    raise ConfigError(
        f"stream {wanted.name}: the brokers have it with other settings: {_differences(wanted, info.config)}; "
        f"use these settings, or change the stream with `nats stream edit` (error {OTHER_SETTINGS})"
    )


def _configuration(producer: str, settings: Settings) -> StreamConfig:
    from nats.js import api

    return api.StreamConfig(
        name=stream_name(producer),
        subjects=[subject(producer)],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType.FILE,
        num_replicas=settings.replicas,
        max_bytes=settings.max_bytes,
        max_age=settings.max_age,
        discard=api.DiscardPolicy.NEW,  # a full stream takes no more: ring and spool hold
        duplicate_window=min(_DUPLICATE_WINDOW, settings.max_age or _DUPLICATE_WINDOW),
        compression=api.StoreCompression.NONE,  # rows are packed
        deny_delete=True,
    )


def _differences(wanted: StreamConfig, found: StreamConfig) -> str:
    """Name the settings of a stream that differ from those wanted."""
    shown: dict[str, Callable[[Any], str]] = {
        "max_bytes": lambda value: size(value) if value and value > 0 else "no limit",
        "max_age": lambda value: duration(value) if value else "no limit",
        "duplicate_window": lambda value: duration(value or 0),
    }
    differences = []
    for field in (
        "num_replicas", "max_bytes", "max_age", "subjects", "storage", "retention", "discard", "duplicate_window",
        "deny_delete", "compression",
    ):  # fmt: skip
        ours, theirs = getattr(wanted, field), getattr(found, field)
        ours, theirs = getattr(ours, "value", ours), getattr(theirs, "value", theirs)
        if ours != theirs and not (field == "compression" and not theirs):
            show = shown.get(field, str)
            differences.append(f"{field} is {show(theirs)}, expected {show(ours)}")
    return ", ".join(differences) or "of kinds that are not used here"


async def stream_info(context: JetStreamContext, stream: str) -> StreamInfo:
    """Return what the leader of a stream knows. CutOff if that may be less than what was acknowledged."""
    info = await context.stream_info(stream)
    if is_alone(info):
        raise CutOff("its leader is cut off from the other brokers")
    return info


def is_alone(info: StreamInfo) -> bool:
    """Whether the leader of a stream, which has given this information, has not heard most of its brokers lately."""
    replicas = (info.cluster.replicas if info.cluster is not None else None) or []
    heard = sum((peer.active or 0) < _SILENT_AFTER * 1e9 for peer in replicas)
    return 2 * (1 + heard) <= 1 + len(replicas)


async def all_consumers(context: JetStreamContext, stream: str) -> list[ConsumerInfo]:
    """Return all consumers of a stream. BrokerError if the brokers do not know the position of one of them, because its
    leader does not answer: nothing may be removed from the stream, or passed over in it, then."""
    from nats.js import api

    found: list[ConsumerInfo] = []
    while True:
        request = f'{{"offset":{len(found)}}}'
        answer = await context._api_request(f"$JS.API.CONSUMER.LIST.{stream}", request.encode(), timeout=API_LIMIT)
        if missing := answer.get("missing"):
            raise BrokerError(
                f"stream {stream}: the brokers do not know the position of {', '.join(map(str, missing))}"
            )
        found += [api.ConsumerInfo.from_response(each) for each in answer["consumers"] or []]
        if not answer["consumers"] or len(found) >= answer["total"]:
            return found


# Errors


def error_code(error: BaseException) -> int:
    """Return the error code of JetStream, 0 if an error has none."""
    return getattr(error, "err_code", None) or 0


def _is_unanswered(error: APIError) -> bool:
    """Whether nats-py has made this error because nobody has answered."""
    return error.code in (None, 503) and not error.err_code


def meaning(code: int, description: str) -> str:
    """Return the meaning of an error code of JetStream, or its `description` by the broker, with the code."""
    if code == STREAM_FULL and "maximum" not in description:
        return f"a broker cannot store messages: {cause(Exception(description))} (error {code})"
    return f"{_MEANINGS.get(code) or cause(Exception(description))} (error {code})"


def describe(error: BaseException) -> str:
    """Return the cause of an error of nats-py, or of a connection, in one short line."""
    import asyncio
    import ssl

    from nats import errors
    from nats.js.errors import APIError, NoStreamResponseError

    code = error_code(error)
    if isinstance(error, LarpixDaqError):
        return str(error)
    if isinstance(error, APIError) and not _is_unanswered(error):
        return meaning(code or error.code or 0, error.description or "refused")
    if isinstance(error, NoStreamResponseError | errors.NoRespondersError | APIError):
        return "no broker answers for the stream, because it has no leader or no JetStream"
    if isinstance(error, errors.AuthorizationError) or "authorization violation" in str(error).lower():
        return "user, password or credentials are refused"
    if isinstance(error, errors.SecureConnRequiredError):
        return "the broker has no TLS"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or cause(error)}"
    if isinstance(error, errors.StaleConnectionError):
        return "the broker does not answer"
    if isinstance(error, asyncio.TimeoutError | errors.TimeoutError):
        return "no answer in time"
    text = cause(error).removeprefix("nats: ").strip("'") or type(error).__name__
    return text[:1].lower() + text[1:]
