"""The core's key store: its own key pair, its user's, the keys of those who were invited, and open invitations.

One private file in the state directory, written whole and renamed. Whoever can read it can be the core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from larpixdaq.constants import Name
from larpixdaq.errors import FileError, RequestError
from larpixdaq.keys import Key
from larpixdaq.keys.credentials import read_private, write_private
from larpixdaq.keys.curve import KeyPair, new_pair

_VERSION: Final = 1
#: Maximum bytes of the file: 5,000 members.
_LARGEST: Final = 4 << 20
#: Invitations that were used, have expired or were revoked are kept this long (s), so that whoever tries one is told.
_REMEMBERED: Final = 7 * 86400.0
#: Maximum number of invitations, and of members.
_MOST: Final = 1000
#: Maximum seconds for which an invitation is open.
MAX_OPEN: Final = 30 * 86400.0
#: What an invited key may be used for: to register as the component of its name; to look and change; to look.
Role = Literal["component", "operator", "observer"]
ROLES: Final = ("component", "operator", "observer")


class Member(msgspec.Struct, frozen=True):
    """A key that may connect to the core. `role` "owner": the core's own user, who may do everything."""

    name: str
    role: Literal["component", "operator", "observer", "owner", "invited"]
    public: str = ""
    since: float = 0.0  # unix s

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}" if self.role != "owner" else "the core's own user"


#: Stands for everybody where no keys are in use.
ANYONE: Final = Member("", "owner")


class Invitation(msgspec.Struct):
    """`public` belongs to the key pair whose secret is in the token. Times are unix seconds of the core's clock."""

    name: Name
    role: Role
    public: Key
    made: float
    expires: float
    server: str = ""  # the core's public key in the token
    used_by: str = ""  # the public key that took its place
    used: float = 0.0
    revoked: float = 0.0

    def refusal(self, now: float) -> str:
        """Why it is not open; "" when it is."""
        if self.revoked:
            return "was revoked"
        if self.used_by:
            return f"was used {now - self.used:.0f} s ago"
        return f"expired {now - self.expires:.0f} s ago" if now > self.expires else ""


class _Pair(msgspec.Struct, frozen=True):
    public: Key
    secret: Key

    def pair(self) -> KeyPair:
        return KeyPair(self.public, self.secret)


class _StoredMember(msgspec.Struct, frozen=True):
    name: Name
    role: Role
    public: Key
    since: float
    server: str = ""  # the newest public key of the core that it has stored


class _Content(msgspec.Struct):
    version: int
    server: _Pair
    owner: _Pair
    members: list[_StoredMember] = []
    invitations: list[Invitation] = []


def _made() -> _Pair:
    return _Pair(*new_pair())


class KeyStore:
    """Read or make the store of a state directory. FileError when it cannot be used; `clock` gives unix seconds.

    After rotate() the file has new key pairs of the core and its user. This process uses the old ones until it ends.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = directory / "keys" / "core.json"
        self._clock = clock
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise FileError(f"key store {self.path.parent}: {error.strerror}") from None
        data = read_private(self.path, _LARGEST)
        if data is None:
            self._content = _Content(_VERSION, _made(), _made())
            self._write(self._content)
        else:
            self._content = self._read(data)
        #: The key pairs in use: that of the core, and that of the processes of the core's user on its host.
        self.server, self.owner = self._content.server.pair(), self._content.owner.pair()
        self._index()

    def _read(self, data: bytes) -> _Content:
        again = f"rename it to make a new one (who was invited has to be invited again): {self.path}"
        try:
            content = msgspec.json.decode(data, type=_Content)
        except (msgspec.MsgspecError, ValueError) as error:
            raise FileError(f"key store is damaged ({error}); {again}") from None
        if content.version != _VERSION:
            raise FileError(f"key store: expected version {_VERSION}, found {content.version}; {again}")
        return content

    def _write(self, content: _Content) -> None:
        write_private(self.path, msgspec.json.format(msgspec.json.encode(content), indent=1))

    def _index(self) -> None:
        content = self._content
        self._members = {one.public: Member(one.name, one.role, one.public, one.since) for one in content.members}
        self._members[self.owner.public] = Member("owner", "owner", self.owner.public)
        self._invited = {one.public: one for one in content.invitations}
        newest = content.server.public
        self._uninformed = {one.public: one.name for one in content.members if one.server != newest}

    def _change(self, members: list[_StoredMember], invitations: list[Invitation]) -> None:
        """Write first, then use: a full disk leaves everything as it was."""
        now = self._clock()
        kept = [one for one in invitations if now - max(one.used, one.revoked, one.expires) < _REMEMBERED]
        content = _Content(_VERSION, self._content.server, self._content.owner, members, kept)
        self._write(content)
        self._content = content
        self._index()

    @property
    def next_server(self) -> str:
        """The public key that the core will have from its next start on; "" if it is the one in use."""
        stored = self._content.server.public
        return stored if stored != self.server.public else ""

    def uninformed(self) -> set[str]:
        """The names of the members who have not stored the core's newest public key."""
        return set(self._uninformed.values())

    def note_server(self, public: str, server: str) -> None:
        """Note that the member with this public key has stored `server`. FileError when that cannot be written."""
        if public not in self._uninformed or server != self._content.server.public:
            return
        members = [
            msgspec.structs.replace(one, server=server) if one.public == public else one
            for one in self._content.members
        ]
        self._change(members, self._content.invitations)

    def admits(self, key: str) -> bool:
        """Whether a key may connect: a member, or one of an invitation, who is then told if it is no longer open."""
        return key in self._members or key in self._invited

    def member(self, key: str) -> Member | None:
        """Whose key this is now; None when it is not, or no longer, known."""
        found = self._members.get(key)
        if found is None and key in self._invited:
            found = Member(self._invited[key].name, "invited", key)
        return found

    def members(self) -> list[Member]:
        """All who were invited and have joined."""
        return [one for one in self._members.values() if one.role != "owner"]

    def components(self) -> dict[str, str]:
        """Return the keys that may connect to components, with the component's name; "" for the core's own user."""
        return {
            public: "" if one.role == "owner" else one.name
            for public, one in self._members.items()
            if one.role in ("owner", "component")
        }

    def invitations(self) -> list[Invitation]:
        """Those that are open, and whose token has the core's key in use."""
        now = self._clock()
        return [one for one in self._content.invitations if not one.refusal(now) and one.server == self.server.public]

    def invite(self, name: str, role: Role, seconds: float) -> KeyPair:
        """Make an invitation; its key pair, whose secret is in the token. RequestError when the name is in use."""
        content = self._content
        if any(one.name == name for one in content.members):
            raise RequestError(f"{name!r} has a key already: `larpixdaq keys revoke {name}` takes it back")
        if len(content.members) + len(self.invitations()) >= _MOST:
            raise RequestError(f"there are {_MOST} keys and invitations already")
        now, pair = self._clock(), new_pair()
        others = [one for one in content.invitations if one.name != name or one.refusal(now)]
        made = Invitation(name, role, pair.public, now, now + seconds, self.server.public)
        self._change(content.members, [*others, made])
        return pair

    def join(self, invitation: str, public: str) -> Member:
        """Use an invitation: `public` is the member's key from now on. Harmless when repeated with the same key.

        RequestError when it was used by another key, has expired or was revoked.
        """
        found = self._invited.get(invitation)
        now = self._clock()
        if found is None:
            raise RequestError("this invitation is not known")
        if found.used_by == public and public in self._members:
            return self._members[public]
        if refusal := found.refusal(now):
            raise RequestError(f"the invitation of {found.name!r} {refusal}: ask for a new one")
        if self.admits(public) or public == self.server.public:
            raise RequestError(f"the invitation of {found.name!r}: this key is in use already")
        used = msgspec.structs.replace(found, used_by=public, used=now)
        others = [one for one in self._content.invitations if one is not found]
        joined = _StoredMember(found.name, found.role, public, now, found.server)
        self._change([*self._content.members, joined], [*others, used])
        return self._members[public]

    def revoke(self, name: str) -> list[str]:
        """Take the key, or the open invitation, of this name back; the public keys. RequestError when it has none."""
        content, now = self._content, self._clock()
        gone = [one.public for one in content.members if one.name == name]
        open_ones = [one for one in content.invitations if one.name == name and not one.refusal(now)]
        if not gone and not open_ones:
            raise RequestError(f"{name!r} has no key and no open invitation")
        revoked = [msgspec.structs.replace(one, revoked=now) for one in open_ones]
        others = [one for one in content.invitations if one not in open_ones]
        self._change([one for one in content.members if one.name != name], [*others, *revoked])
        return gone

    def rotate(self) -> None:
        """Make key pairs for the core and its user, which count from its next start on. Members keep theirs.

        Has no effect while such new pairs wait, because members may know them already. FileError leaves the old ones.
        """
        if not self.next_server:
            content = msgspec.structs.replace(self._content, server=_made(), owner=_made())
            self._write(content)
            self._content = content
            self._index()
