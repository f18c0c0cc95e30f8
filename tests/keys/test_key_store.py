"""The core's key store: whose key is admitted after any order of events, and stores that cannot be used."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from larpixdaq.errors import FileError, RequestError
from larpixdaq.keys.curve import new_pair
from larpixdaq.keys.key_store import ROLES, KeyStore

NAMES = ("Storage", "Monitor", "alice")


def test_a_store_is_private_and_found_again(tmp_path):
    made = KeyStore(tmp_path)
    assert made.path.parent.stat().st_mode & 0o777 == 0o700
    assert made.path.stat().st_mode & 0o777 == 0o600
    again = KeyStore(tmp_path)
    assert (again.server, again.owner) == (made.server, made.owner)
    assert again.member(made.owner.public).role == "owner"
    assert again.member(new_pair().public) is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_store_that_others_can_read_is_refused(tmp_path, mode):
    path = KeyStore(tmp_path).path
    path.chmod(mode)
    with pytest.raises(FileError, match=f"{path}: expected mode 600, found {mode:o}"):
        KeyStore(tmp_path)


def test_a_directory_that_others_can_enter_is_refused(tmp_path):
    (tmp_path / "keys").mkdir(mode=0o755)
    with pytest.raises(FileError, match="mode 700, found"):
        KeyStore(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_store_of_another_user_is_refused(tmp_path):
    path = KeyStore(tmp_path).path
    os.chown(path, 65534, 65534)
    with pytest.raises(FileError, match="expected a file of user 0, found one of user 65534"):
        KeyStore(tmp_path)


def test_a_damaged_store_says_how_a_new_one_is_made(tmp_path):
    path = KeyStore(tmp_path).path
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"\xff" * 100, b"[]", data.replace(b'"version": 1', b'"version": 2')):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="rename it to make a new one"):
            KeyStore(tmp_path)
    path.rename(path.with_suffix(".old"))
    assert KeyStore(tmp_path).server


def test_a_link_in_place_of_the_store_is_refused(tmp_path):
    path = KeyStore(tmp_path).path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="symbolic link"):
        KeyStore(tmp_path)


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = KeyStore(tmp_path)
    before, server = store.path.read_bytes(), store.server

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for change in (lambda: store.invite("Storage", "component", 60), store.rotate):
            with pytest.raises(FileError, match="No space left on device"):
                change()
    assert store.path.read_bytes() == before
    assert store.server == server
    assert not store.invitations()
    assert sorted(os.listdir(store.path.parent)) == ["core.json"]


def test_new_keys_count_from_the_next_start_on(tmp_path):
    store = KeyStore(tmp_path)
    server, owner = store.server, store.owner
    store.rotate()
    assert (store.server, store.owner) == (server, owner)
    assert store.admits(owner.public)
    newest = store.next_server
    store.rotate()  # members may know the new key already
    store.invite("Storage", "component", 60)
    again = KeyStore(tmp_path)
    assert again.server.public == newest != server.public
    assert again.owner != owner
    assert not again.admits(owner.public)
    assert not again.next_server
    assert not again.invitations(), "its token has the old key"


class Keys(RuleBasedStateMachine):
    """A model with one dictionary of members and one of invitations, and a clock that is set by hand."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        self._now = 1_000_000.0
        self._store = KeyStore(Path(self._folder.name), clock=lambda: self._now)
        self._members: dict[str, tuple[str, str]] = {}  # name -> role, public key
        self._invitations: list[dict[str, Any]] = []
        self._in_use = self._newest = self._store.server.public
        self._knows: dict[str, str] = {}  # public key of a member -> of the core

    def teardown(self) -> None:
        self._folder.cleanup()

    @rule(name=st.sampled_from(NAMES), role=st.sampled_from(ROLES), seconds=st.sampled_from([10, 600]))
    def invite(self, name: str, role: Any, seconds: float) -> None:
        if name in self._members:
            with pytest.raises(RequestError, match="has a key already"):
                self._store.invite(name, role, seconds)
            return
        for one in self._invitations:
            if one["name"] == name and self._open(one):
                one["open"] = False
        key = self._store.invite(name, role, seconds).public
        self._invitations.append(
            {"name": name, "role": role, "key": key, "until": self._now + seconds, "open": True, "by": "",
             "server": self._in_use}
        )  # fmt: skip

    def _open(self, one: dict[str, Any]) -> bool:
        return bool(one["open"]) and self._now <= one["until"]

    @precondition(lambda self: self._invitations)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self._invitations))
        key = new_pair().public
        if self._open(one):
            assert self._store.join(one["key"], key).name == one["name"]
            self._members[one["name"]] = (one["role"], key)
            self._knows[key] = one["server"]
            one["open"], one["by"] = False, key
        else:
            with pytest.raises(RequestError):
                self._store.join(one["key"], key)

    @precondition(lambda self: self._members)
    @rule(data=st.data())
    def join_again(self, data: st.DataObject) -> None:
        """An answer that was lost: the same key with the same invitation."""
        name = data.draw(st.sampled_from(sorted(self._members)))
        role, key = self._members[name]
        used = next(one for one in self._invitations if one["by"] == key)
        assert self._store.join(used["key"], key).role == role

    @rule(name=st.sampled_from(NAMES))
    def revoke(self, name: str) -> None:
        open_ones = [one for one in self._invitations if one["name"] == name and self._open(one)]
        if name not in self._members and not open_ones:
            with pytest.raises(RequestError, match="no key and no open invitation"):
                self._store.revoke(name)
            return
        gone = self._store.revoke(name)
        assert gone == ([self._members.pop(name)[1]] if name in self._members else [])
        for one in open_ones:
            one["open"] = False

    @rule(seconds=st.sampled_from([1, 20, 700]))
    def wait(self, seconds: float) -> None:
        self._now += seconds

    @rule()
    def rotate(self) -> None:
        self._store.rotate()
        if self._newest == self._in_use:
            self._newest = self._store.next_server
        assert self._store.next_server == self._newest != self._in_use

    @precondition(lambda self: self._members)
    @rule(data=st.data())
    def inform(self, data: st.DataObject) -> None:
        _, key = self._members[data.draw(st.sampled_from(sorted(self._members)))]
        self._store.note_server(key, new_pair().public)  # of another time: changes nothing
        self._store.note_server(key, self._newest)
        self._knows[key] = self._newest

    @rule()
    def restart(self) -> None:
        self._store = KeyStore(self._store.path.parents[1], clock=lambda: self._now)
        self._in_use = self._newest

    @invariant()
    def agree(self) -> None:
        found = {one.name: (one.role, one.public) for one in self._store.members()}
        assert found == self._members
        assert sorted(one.public for one in self._store.invitations()) == sorted(
            one["key"] for one in self._invitations if self._open(one) and one["server"] == self._in_use
        )
        uninformed = {name for name, (_, key) in self._members.items() if self._knows[key] != self._newest}
        assert self._store.uninformed() == uninformed
        for one in self._invitations:
            member = self._store.member(one["key"])
            assert member is None or member.role == "invited"
        stored = json.loads(self._store.path.read_bytes())
        assert {one["public"] for one in stored["members"]} == {key for _, key in self._members.values()}


TestKeys = Keys.TestCase
