"""The brokers' addresses, names of streams and subjects, and what is said when a broker cannot be used."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.js.api import StreamInfo
from processes import LIMIT, free_port

from larpixdaq.errors import BrokerError, ConfigError, FileError, LarpixDaqError, UsageError
from larpixdaq.stream import jetstream
from larpixdaq.stream.jetstream import Brokers, Settings, parse_servers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nats://a", ["nats://a:4222"]),
        ("nats://a,b:4223,[::1],[::2]:5", ["nats://a:4222", "nats://b:4223", "nats://[::1]:4222", "nats://[::2]:5"]),
        ("tls://u:p%40@a,b", ["tls://u:p%40@a:4222", "tls://u:p%40@b:4222"]),
        ("nats://a,nats://b", ["nats://a:4222", "nats://b:4222"]),
        ("nats://u:p@a,v:q@b", ["nats://u:p@a:4222", "nats://v:q@b:4222"]),
    ],
)
def test_addresses_of_brokers(text: str, expected: list[str]) -> None:
    assert list(parse_servers(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "tcp://a", "nats://", "nats://a,", "nats://a:", "nats://a:0", "nats://a:65536", "nats://a:x",
        "nats://a/b", "nats://a?x", "nats://a#x", "nats://[::1", "nats://a b", "nats://a,tls://b", "nats://a,a:4222",
        "nats://user:secret@", "nats://user:secret@a:x",
    ],
)  # fmt: skip
def test_wrong_addresses_are_usage_errors_of_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_servers(text)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("silent", "expected"),
    [
        (None, False),  # one replica
        ([], False),
        ([0.0, 1.0], False),
        ([0.0, 60.0], False),
        ([60.0, 60.0], True),
        ([60.0], True),
        ([None, 60.0, 60.0, 60.0], True),
        ([None, 2.0, 60.0, 60.0], False),
    ],
)
def test_a_leader_is_alone_when_it_does_not_hear_a_majority(silent: list[float | None] | None, expected: bool) -> None:
    """`silent`: seconds since it has heard each of the other brokers."""
    replicas = silent and [{"name": str(i), "active": each and int(each * 1e9)} for i, each in enumerate(silent)]
    state = dict.fromkeys(("messages", "bytes", "first_seq", "last_seq", "consumer_count"), 0)
    answer = {"config": {"name": "s"}, "state": state, "cluster": {"leader": "a", "replicas": replicas}}
    assert jetstream.is_alone(StreamInfo.from_response(answer)) == expected


@settings(max_examples=examples(300))
@given(st.one_of(st.text(max_size=40), st.text(alphabet="nats:/,@[]1%.a?#\\ ", max_size=30).map("nats://".__add__)))
def test_any_text_is_parsed_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        servers = parse_servers(text)
        assert parse_servers(",".join(servers)) == servers


def test_passwords_are_not_shown() -> None:
    assert str(Brokers(parse_servers("nats://user:secret@a,b:5"))) == "a:4222, b:5"


@settings(max_examples=examples(300))
@given(st.text(min_size=1, max_size=64), st.integers(1, 10**9))
def test_a_name_has_its_own_token(name: str, run: int) -> None:
    token = jetstream.stream_token(name)
    assert token.replace("_", "").replace("-", "").isalnum()
    assert token.isascii()
    assert jetstream.producer_of(token) == name
    assert jetstream.parse_subject(jetstream.subject(name, run)) == (name, run)
    assert jetstream.stream_name(name) == f"larpixdaq_{token}"


@settings(max_examples=examples(200))
@given(st.text(alphabet="larpixdq.-_0123AB\n*>é", max_size=40))
def test_other_texts_are_no_subjects(text: str) -> None:
    for what in (text, f"larpixdaq.{text}.1", f"larpixdaq.A.{text}"):
        try:
            producer, run = jetstream.parse_subject(what)
        except ValueError:
            continue
        assert jetstream.subject(producer, run) == what


def test_the_usual_name() -> None:
    assert jetstream.stream_name("LArPix board") == "larpixdaq_LArPix_20board"
    assert jetstream.subject("LArPix board", 42) == "larpixdaq.LArPix_20board.42"
    assert jetstream.subject("LArPix board") == "larpixdaq.LArPix_20board.*"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    jetstream.add_arguments(parser, "test")
    jetstream.add_settings_arguments(parser)
    return parser.parse_args(arguments)


def test_options(tmp_path: Path) -> None:
    assert jetstream.brokers_of(options()) is None
    one = jetstream.brokers_of(options("--stream", "nats://a,b"))
    assert one == Brokers(("nats://a:4222", "nats://b:4222"))
    assert jetstream.settings_of(options(), one) == Settings(1, 8 << 30, 7 * 86400)
    three = Brokers(parse_servers("nats://a,b,c"))
    wanted = options("--stream-size", "1GiB", "--stream-age", "0")
    assert jetstream.settings_of(wanted, three) == Settings(3, 1 << 30, 0)
    assert jetstream.settings_of(options("--stream-replicas", "5"), three).replicas == 5
    missing = tmp_path / "missing"
    noise = tmp_path / "noise"
    noise.write_text("noise")
    for wrong, error in (
        (["--stream-ca", str(noise)], UsageError),
        (["--stream", "nats://a", "--stream-certificate", str(noise)], UsageError),
        (["--stream", "nats://a", "--stream-credentials", str(missing)], FileError),
        (["--stream", "nats://a", "--stream-ca", str(missing)], FileError),
        (["--stream", "nats://a", "--stream-ca", str(noise)], FileError),
        (["--stream", "nats://a", "--stream-certificate", str(noise), "--stream-key", str(noise)], FileError),
        (["--stream", "nats://a", "--stream-certificate", str(missing), "--stream-key", str(noise)], FileError),
    ):
        with pytest.raises(error) as caught:
            jetstream.brokers_of(options(*wrong))
        assert "\n" not in str(caught.value)


# Brokers that cannot be used


async def attempt(servers: str, lost: list[str] | None = None, **how: str) -> None:
    brokers = Brokers(parse_servers(servers), **how)
    client = await jetstream.connect(brokers, "test", [].append if lost is None else lost.append)
    await jetstream.close(client)


def refusal(servers: str, **how: str) -> str:
    """Return the reason why no broker can be had."""
    with pytest.raises(BrokerError) as caught:
        asyncio.run(asyncio.wait_for(attempt(servers, **how), LIMIT))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def listener(greeting: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that greets, and what its clients have sent."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(LIMIT)
                        connection.sendall(greeting)
                        while data := connection.recv(4096):
                            received.append(data)
                            if data.endswith(b"PING\r\n"):
                                connection.sendall(b"PONG\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", received
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(LIMIT)


def info(version: str = "2.15.1", more: str = "") -> bytes:
    return b'INFO {"server_id":"x","version":"%s","max_payload":1048576,"headers":true%s}\r\n' % (
        version.encode(), more.encode(),
    )  # fmt: skip


def test_no_broker() -> None:
    a, b = free_port(), free_port()
    text = refusal(f"nats://u:secret@127.0.0.1:{a},127.0.0.1:{b}")
    assert text.startswith("no broker: ")
    for port in (a, b):
        assert f"127.0.0.1:{port}: Connection refused".lower() in text.lower()
    assert "secret" not in text


def test_a_host_that_is_not_known() -> None:
    assert "no-such-host.invalid:4222: " in refusal("nats://no-such-host.invalid")


def test_a_server_that_says_nothing() -> None:
    with listener(b"") as (address, _):
        assert "no answer in time" in refusal(f"nats://{address}")


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"INFO {\r\n", b"\xff" * 70_000])
def test_a_server_that_is_no_broker(greeting: bytes) -> None:
    with listener(greeting) as (address, _):
        assert address in refusal(f"nats://{address}")


@pytest.mark.parametrize("version", ["2.12.8", "1.0.0", "next"])
def test_an_old_broker_is_refused(version: str) -> None:
    with listener(info(version)) as (address, _):
        assert "version" in refusal(f"nats://{address}").lower()


def test_a_password_is_not_sent_without_tls(tmp_path: Path) -> None:
    with listener(info()) as (address, received):
        assert "the broker has no TLS" in refusal(f"tls://user:secret@{address}")
    assert not any(b"secret" in data for data in received)


def test_the_text_of_any_error_is_one_line() -> None:
    for error in (OSError("a\nb"), ValueError(""), asyncio.TimeoutError(), ConnectionRefusedError(111, "refused")):
        text = jetstream.describe(error)
        assert text
        assert "\n" not in text


def test_nats_py_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nats", None)
    with pytest.raises(ConfigError, match=r"needs the package nats-py; `pip install larpix-daq\[cluster\]`"):
        jetstream.brokers_of(options("--stream", "nats://a"))
    assert issubclass(BrokerError, LarpixDaqError)
