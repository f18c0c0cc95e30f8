"""Connection files, keys of invitations, and tokens."""

import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from zmq.utils import z85

from larpixdaq.errors import ConfigError, FileError, LarpixDaqError
from larpixdaq.keys import credentials
from larpixdaq.keys.credentials import Credentials
from larpixdaq.keys.curve import KeyPair, new_pair


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def given_key(address: str, name: str = "", role: str = "owner") -> Credentials:
    return Credentials(address, new_pair().public, *new_pair(), name, role)


def test_the_user_of_a_core_finds_its_connection_file():
    made = given_key("tcp://127.0.0.1:5551")
    path = credentials.connection_file(made.address)
    credentials.write(path, made)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert credentials.find("tcp://127.0.0.1:5551") == credentials.find("tcp://127.0.0.1:5551", "Storage") == made
    assert credentials.find("tcp://127.0.0.1:5552") is None


@pytest.mark.parametrize("listens", ["tcp://*:5551", "tcp://0.0.0.0:5551", "tcp://[::]:5551"])
def test_a_core_at_all_interfaces_is_found_by_this_hosts_addresses_only(listens):
    made = given_key(listens)
    credentials.write(credentials.connection_file(listens), made)
    assert credentials.find("tcp://127.0.0.1:5551") == made
    assert credentials.find("tcp://192.0.2.1:5551") is None


def test_the_key_of_an_invitation_goes_to_its_name():
    core = "tcp://192.0.2.1:5551"
    for name, role in (("Storage", "component"), ("night shift/2", "observer")):
        credentials.write(credentials.joined_file(core, name), given_key(core, name, role))
    assert credentials.find(core, "Storage").name == "Storage"
    assert credentials.find(core, "Storage 2") is None
    assert credentials.find(core).name == "night shift/2"  # an Operator has no name of a component


def test_files_of_cores_that_were_killed_are_removed():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for port, pid in ((1, dead.pid), (2, os.getpid())):
        made = msgspec.structs.replace(given_key(f"tcp://127.0.0.1:{port}"), pid=pid)
        credentials.write(credentials.connection_file(made.address), made)
    damaged = credentials.connection_file("tcp://127.0.0.1:3")
    damaged.write_bytes(b"{")
    joined = credentials.joined_file("tcp://192.0.2.1:4", "Storage")
    credentials.write(joined, given_key("tcp://192.0.2.1:4", "Storage", "component"))
    credentials.remove_stale_files()
    left = {path.name for path in damaged.parent.iterdir()}
    assert left == {"127.0.0.1-2.json", "127.0.0.1-3.json", joined.name}


def test_keys_that_others_can_read_and_damaged_ones_are_refused():
    path = credentials.connection_file("tcp://127.0.0.1:5551")
    credentials.write(path, given_key("tcp://127.0.0.1:5551"))
    path.chmod(0o644)
    with pytest.raises(FileError, match="expected mode 600, found 644"):
        credentials.find("tcp://127.0.0.1:5551")
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FileError, match="remove it and join again"):
        credentials.find("tcp://127.0.0.1:5551")
    os.unlink(path)
    assert credentials.find("tcp://127.0.0.1:5551") is None


def test_a_token_survives_the_line_breaks_of_a_mail_program():
    server, pair = new_pair().public, new_pair()
    token = credentials.make_token("tcp://daq.example.org:5551", server, pair)
    broken = "\n ".join(token[at : at + 60] for at in range(0, len(token), 60))
    (found,) = credentials.read_token(f" {broken}\n")
    assert (found.address, found.server, found.pair) == ("tcp://daq.example.org:5551", server, pair)


def test_one_token_has_the_invitations_of_many_components():
    server, pairs = new_pair().public, [new_pair() for _ in range(20)]
    token = credentials.make_token("tcp://192.0.2.1:5551", server, *pairs)
    assert len(token) < 1000
    found = credentials.read_token(token)
    assert [one.pair for one in found] == pairs
    assert {(one.address, one.server, one.role) for one in found} == {("tcp://192.0.2.1:5551", server, "invited")}


def test_half_a_token_says_that_it_is_not_whole():
    for token in TOKENS:
        for cut in range(1, len(token)):
            with pytest.raises(ConfigError, match=r"^token: "):
                credentials.read_token(token[:cut])


@pytest.mark.parametrize("length", ["9" * 5000, "\u0663"])
def test_a_token_with_an_odd_length(length):
    with pytest.raises(ConfigError, match=r"^token: expected larpixdaq1\.NUMBER\.TEXT"):
        credentials.read_token(f"larpixdaq1.{length}.text")


@given(st.text())
def test_no_text_is_taken_for_a_token(text):
    with pytest.raises(ConfigError, match=r"^token: "):
        credentials.read_token(text)


#: With "-" and "_" at known places, which Python decodes from "+" and "/" too.
ALIKE = KeyPair(z85.encode(bytes([0xFB, 0xEF, 0xBE, 0xFF] * 8)).decode(), z85.encode(bytes([0xFF] * 32)).decode())
#: With one invitation, and with two.
TOKENS = [credentials.make_token("tcp://192.0.2.1:5551", ALIKE.public, *[ALIKE] * number) for number in (1, 2)]


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_with_plus_for_minus_is_refused(token):
    for own, other in ("-+", "_/"):
        assert own in token
        with pytest.raises(LarpixDaqError, match=r"^token: "):
            credentials.read_token(token.replace(own, other, 1))


@given(st.sampled_from(TOKENS), st.integers(0, 1000), st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]))
def test_a_token_with_another_character_is_refused(token, at, other):
    at %= len(token)
    assume(other != token[at])
    with pytest.raises(LarpixDaqError, match=r"^token: "):
        credentials.read_token(token[:at] + other + token[at + 1 :])
