"""Where a process finds the key with which it connects to a core.

A core leaves a connection file for its own user on its own host, named by address and port, so that nobody has to type
anything. On other hosts, and for other users, `larpixdaq keys join TOKEN` writes a file with a key of its own.
All are private files in the state directory (mode 600 in directories of mode 700).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import os
import re
import socket
import stat
import tempfile
import zlib
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote

import msgspec
import zmq
from msgspec import Meta
from zmq.utils import z85

from larpixdaq import config
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.keys.curve import KeyPair
from larpixdaq.runtime.file_access import open_private, state_dir

#: Maximum bytes of a file with one key.
_LARGEST: Final = 64 << 10
#: Beginnings of a token with one invitation, and with several.
_TOKEN: Final = "larpixdaq1"
_TOKENS: Final = "larpixdaq2"
#: A core that listens at all interfaces is found under this name in place of its address.
_ANY: Final = "any"


_Key = Annotated[str, Meta(pattern=r"^([!-~]{40})?$")]


class Credentials(msgspec.Struct, frozen=True):
    """How to connect to a core: its public key, and the key pair to show. `server` "": no keys are in use there."""

    address: str
    server: _Key = ""
    public: _Key = ""
    secret: _Key = ""
    name: str = ""  # as which it was invited; "": the core's own user
    role: str = "owner"
    pid: int = 0  # of the core, in its connection file
    next: _Key = ""  # the core's public key from its next start on, when `larpixdaq keys rotate` has made one

    @property
    def pair(self) -> KeyPair:
        return KeyPair(self.public, self.secret)


def read_private(path: Path, limit: int) -> bytes | None:
    """The content of a private file; None when there is none.

    FileError when it is not a regular file, belongs to another user, can be read by others, or is larger than `limit`
    bytes.
    """
    try:
        descriptor = open_private(path, os.O_RDONLY, secret=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"{path}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(f"{path}: has more than {limit} bytes")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Write a private file whole, or leave it as it was. FileError when it cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.parent.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise FileError(
                f"{path.parent}: expected a directory of user {os.geteuid()} with mode 700, found user {found.st_uid}, "
                f"mode {mode:o}"
            )
        descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 600
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise
    except OSError as error:
        raise error if isinstance(error, FileError) else FileError(f"{path}: {error.strerror}") from None


def _directory() -> Path:
    """Where the keys of this user are; the directory of a host, since homes may be shared between hosts."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"
    return state_dir() / "connections" / host


def _file_name(address: str) -> str:
    """A file name for the address of a core: host and port."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    return re.sub(r"[^\w.%-]", "_", f"{_ANY if host in ('*', '0.0.0.0', '::') else host}-{port}")


def connection_file(address: str) -> Path:
    """The file that a core which listens at `address` leaves for its own user."""
    return _directory() / f"{_file_name(address)}.json"


def remove_stale_files() -> None:
    """Remove the connection files of cores of this host that were killed. A file that cannot be read stays."""
    try:
        paths = list(_directory().glob("*.json"))
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError):
            found = read(path)
            if found is not None and found.pid:
                try:
                    os.kill(found.pid, 0)
                except ProcessLookupError:
                    path.unlink()


def joined_file(address: str, name: str) -> Path:
    """The file with the key of an invitation's `name` for the core at `address`."""
    return _directory() / f"{_file_name(address)}.{quote(name, safe='')}.key.json"


def write(path: Path, credentials: Credentials) -> None:
    """FileError when it cannot be written."""
    write_private(path, msgspec.json.format(msgspec.json.encode(credentials), indent=1))


def read(path: Path) -> Credentials | None:
    """None when there is no such file; FileError when it cannot be used."""
    data = read_private(path, _LARGEST)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=Credentials)
    except (msgspec.MsgspecError, ValueError) as error:
        raise FileError(f"{path}: expected a key, found {error}; remove it and join again") from None


def is_of_this_host(address: str) -> bool:
    """Whether an address is of this host."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host.partition("%")[0]).version == 6 else socket.AF_INET
    except ValueError:  # a host name
        family = socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def find(core: str, name: str = "") -> Credentials | None:
    """Return the key for the core at this address (with its port), or of the first of several, with commas between
    them, that has one: cores that take over from each other have the same keys.

    The order: the key with which the component `name` was invited, the key of the core's own user, and, for an Operator
    (`name` ""), a key with which one was invited. None if there is none; FileError if one cannot be used.
    """
    first, _, others = core.partition(",")
    if others:
        found = find(first, name)
        return found if found is not None else find(others, name)
    addresses = list(dict.fromkeys((core, config.with_ip_address(core))))
    for address in addresses if name else ():
        if (found := read(joined_file(address, name))) is not None:
            return found
    if core.startswith("tcp://") and is_of_this_host(addresses[-1]):
        addresses.append(f"tcp://*:{core.rpartition(':')[2]}")
    for address in addresses:
        if (found := read(connection_file(address))) is not None:
            return found
    for path in () if name else sorted(_directory().glob("*.key.json")):
        if any(path.name.startswith(f"{_file_name(address)}.") for address in addresses):
            found = read(path)
            if found is not None and found.role != "component":
                return found
    return None


def listens(core: str) -> bool:
    """Whether something listens at the address of a core; False if that cannot be known within 0.5 s."""
    if not core.startswith("tcp://"):
        return False
    host, _, port = core.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=0.5).close()
    except (OSError, ValueError):
        return False
    return True


def missing(core: str, name: str) -> str:
    """Say that there is no key for a core that listens, and how to get one."""
    role = f"{name!r} --role component" if name else "NAME --role operator"
    return (
        f"this user has no key for the core at {core}: its owner makes an invitation with `larpixdaq keys invite "
        f"{role}`; then give its token to `larpixdaq keys join TOKEN`"
    )


def refused(core: str, own: Credentials | None, failure: str) -> str:
    """Say why there is no connection to a core that listens. `failure`: as curve.Handshakes has it."""
    if failure == "peer" and (own is None or not own.server):
        return f"the core at {core} uses keys: leave out --insecure (insecure=True)"
    if failure == "peer":
        return (
            f"at {core} is another core than that of the key in use, or one without keys, or this key has too many "
            "connections there; if the core has new keys, ask its owner for a new invitation (larpixdaq keys revoke, "
            "invite)"
        )
    whose = f"of {own.name!r}" if own is not None and own.name else "of this user"
    return f"the core at {core} refuses the key {whose}: it was revoked; `larpixdaq keys invite` makes a new invitation"


def make_token(address: str, server: str, *invitations: KeyPair) -> str:
    """The text that `larpixdaq keys invite` prints: the core's address and public key, and the secrets of invitations.

    With several it has the secret keys alone, because the public ones follow from them.
    """
    if len(invitations) == 1:
        form, keys = _TOKEN, z85.decode(invitations[0].public) + z85.decode(invitations[0].secret)
    else:
        secret_keys = [z85.decode(pair.secret) for pair in invitations]
        form, keys = _TOKENS, bytes([len(secret_keys)]) + b"".join(secret_keys)
    raw = z85.decode(server) + keys + address.encode()
    body = base64.urlsafe_b64encode(raw + _checksum(form, raw)).decode().rstrip("=")
    return f"{form}.{len(body)}.{body}"


def _checksum(form: str, raw: bytes) -> bytes:
    return zlib.crc32(raw if form == _TOKEN else form.encode() + raw).to_bytes(4, "big")


def read_token(text: str) -> list[Credentials]:
    """The invitations in a token. ConfigError, in one line, for a text that is no token or not a whole one."""
    parts = "".join(text.split()).split(".")
    if len(parts) != 3 or parts[0] not in (_TOKEN, _TOKENS) or not re.fullmatch("[0-9]{1,4}", parts[1]):
        raise ConfigError(
            f"token: expected {_TOKEN}.NUMBER.TEXT as `larpixdaq keys invite` prints it, found {text[:24]!r}"
        )
    form, _, body = parts
    if len(body) != int(parts[1]):
        raise ConfigError(f"token: expected {int(parts[1])} characters after the second point, found {len(body)}")
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True)
        raw, checksum = raw[:-4], raw[-4:]
        if checksum != _checksum(form, raw) or len(raw) <= 32:
            raise ValueError
        begin, number = (64, 1) if form == _TOKEN else (33, raw[32])
        end = begin + 32 * number
        whole = number > 0 and len(raw) > end
        if not whole or base64.urlsafe_b64encode(raw + checksum).decode().rstrip("=") != body:  # "+" is decoded as "-"
            raise ValueError
        server, *secret_keys = (z85.encode(raw[at : at + 32]).decode() for at in (0, *range(begin, end, 32)))
        address = config.address(raw[end:].decode(), config.CORE_PORT)
        if form == _TOKEN:
            public_keys = [z85.encode(raw[32:64]).decode()]
        else:
            public_keys = [zmq.curve_public(key.encode()).decode() for key in secret_keys]
    except (ValueError, binascii.Error, zmq.ZMQError):
        raise ConfigError("token: some of its characters are wrong: copy it again") from None
    return [
        Credentials(address, server, public, secret, role="invited")
        for public, secret in zip(public_keys, secret_keys, strict=True)
    ]
