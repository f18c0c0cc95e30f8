"""Alarms sent to commands, webhooks and by mail: contents, limits, servers that hang, and secrets."""

import base64
import contextlib
import json
import logging
import os
import socket
import socketserver
import ssl
import sys
import threading
import time
from email import message_from_string

import pytest
from alarm_receivers import CERTIFICATE, RECORD, Web, lines
from processes import LIMIT, in_thread, until

from larpixdaq.alarm_config import AlarmConfig, CommandDestination, MailDestination, WebhookDestination
from larpixdaq.control import alarm_delivery
from larpixdaq.control.alarm_delivery import Delivery

ALARM = {"id": 3, "condition": "rate", "component": "board", "subject": "board, io_group 1", "level": "alarm",
         "text": "too slow", "count": 2}  # fmt: skip


@contextlib.contextmanager
def delivering(**destinations):
    delivery = Delivery(AlarmConfig(**destinations), "tcp://127.0.0.1:5551")
    try:
        yield delivery
    finally:
        delivery.close(LIMIT)


def send(delivery, event="raised", level="alarm", text="ALARM 3 raised: too slow"):
    began = time.monotonic()
    delivery.send(event, level, text, ALARM)
    return time.monotonic() - began


@contextlib.contextmanager
def silent_server(answer=b""):
    """Yield the port of a server that takes connections, and sends one byte of `answer` in 50 ms at most."""
    ended = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                for byte in answer * 1000:
                    if ended.wait(0.05):
                        return
                    self.request.sendall(bytes([byte]))
                ended.wait(LIMIT)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)

    def stop():
        ended.set()
        server.shutdown()

    with server, in_thread(server.serve_forever, stop):
        yield server.server_address[1]


def test_a_command_gets_json_and_environment_and_no_shell(tmp_path):
    out = tmp_path / "out; $(touch x)"
    argv = [sys.executable, "-c", RECORD, str(out)]
    with delivering(command=[CommandDestination(argv=argv, level="alarm")]) as delivery:
        send(delivery, text="ALARM 3 raised: \0\x1b[31m $(reboot)")
        until(lambda: lines(out), "the first message")
        send(delivery, level="warning")  # below its level
        send(delivery, event="acknowledged")  # not among its events
        send(delivery, event="cleared")
    (first, environment), (second, _) = lines(out)
    assert first["alarm"] == ALARM
    assert (first["event"], second["event"]) == ("raised", "cleared")
    assert first["core"] == "tcp://127.0.0.1:5551"
    assert environment["LARPIXDAQ_ALARM_TEXT"] == "ALARM 3 raised: \\x00\\x1b[31m $(reboot)"
    assert environment["LARPIXDAQ_ALARM_ID"] == "3"
    assert not (tmp_path / "x").exists()


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path, caplog):
    script = 'sleep 600 & echo $! > "$0"; wait'
    hanging = CommandDestination(argv=["/bin/sh", "-c", script, str(tmp_path / "pid")], time_limit=2.0)
    failing = CommandDestination(argv=[sys.executable, "-c", "raise SystemExit(3)"], name="horn")
    missing = CommandDestination(argv=["/no/such/program"])
    with delivering(command=[hanging, failing, missing]) as delivery:
        assert send(delivery) < hanging.time_limit
        send(delivery, event="cleared")
        until(lambda: [one["failed"] for one in delivery.status()] == [2, 2, 2], "the failures")
        first, second, third = (one["error"] for one in delivery.status())
    assert first == "/bin/sh did not end within 2 s and was killed"
    assert second == f"{sys.executable} ended with status 3"
    assert "cannot start /no/such/program" in third
    assert sum("horn" in record.getMessage() for record in caplog.records) == 1  # logged once
    pid = int((tmp_path / "pid").read_text())

    def gone():
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(gone, "the command's child to be killed")


def test_a_webhook_gets_json_and_its_address_stays_secret(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    web, token = Web(), "s3cr3t-t0ken"
    (tmp_path / "url").write_text(f"{web.url}/{token}\n")
    monkeypatch.setenv("HORN_URL", f"{web.url}/{token}")
    monkeypatch.setattr(alarm_delivery, "_RETRIES", (0.01, 0.01))
    hooks = [
        WebhookDestination(url_file=str(tmp_path / "url")),
        WebhookDestination(url_env="HORN_URL"),
        WebhookDestination(url_env="NO_SUCH_VARIABLE"),
    ]
    with web.running(), delivering(webhook=hooks) as delivery:
        send(delivery)
        until(lambda: len(web.posts) == 2, "the posts")
        path, content_type, body = web.posts[0]
        assert (path, content_type) == (f"/hook/{token}", "application/json")
        assert body["text"] == "ALARM 3 raised: too slow"
        assert body["alarm"] == ALARM
        until(lambda: [one["sent"] for one in delivery.status()[:2]] == [1, 1], "both")
        for status, text in ((500, "status 500"), (302, "redirections are not followed"), (307, "not followed")):
            web.status, before = status, len(web.posts)
            send(delivery)
            until(lambda text=text: text in delivery.status()[0]["error"], text)
            until(lambda before=before: len(web.posts) == before + 6, "three attempts of both")
        (tmp_path / "url").write_text("file:///etc/passwd")
        send(delivery)
        until(lambda: "expected http://HOST" in delivery.status()[0]["error"], "the wrong address")
        (tmp_path / "url").write_text(f"http://127.0.0.1:1/{token}\nno")
        send(delivery)
        until(lambda: delivery.status()[0]["failed"] == 5, "an address with a line break")
        web.status = 200
        (tmp_path / "url").write_text(f"{web.url}/{token}")
        send(delivery)
        until(lambda: delivery.status()[0]["error"] == "", "it to be sent again")
        shown = json.dumps(delivery.status())
    assert "the environment variable NO_SUCH_VARIABLE is empty" in shown
    for told in (shown, caplog.text):
        assert token not in told
    assert "sent again" in caplog.text


@pytest.mark.parametrize("answer", [b"", b"H"], ids=["silent", "slow"])
def test_a_webhook_that_hangs_holds_up_nobody(tmp_path, answer, monkeypatch):
    monkeypatch.setattr(alarm_delivery, "_RETRIES", ())
    monkeypatch.setattr(alarm_delivery, "WAITING", 5)
    out = tmp_path / "out"
    command = CommandDestination(argv=[sys.executable, "-c", RECORD, str(out)], per_minute=600)
    with silent_server(answer) as port:
        hook = WebhookDestination(url=f"http://127.0.0.1:{port}/", time_limit=1.0)
        with delivering(command=[command], webhook=[hook]) as delivery:
            assert send(delivery) < hook.time_limit
            until(lambda: delivery.status()[1]["busy_s"] is not None, "the webhook to hang")
            until(lambda: lines(out), "the command")
            for _ in range(10):
                assert send(delivery) < hook.time_limit
            until(lambda: delivery.status()[1]["failed"] >= 1, "the time limit")
            hanging = delivery.status()[1]
            assert hanging["error"] == "no answer within 1 s"
            assert hanging["lost"] >= 5
            until(lambda: delivery.status()[0]["sent"] + delivery.status()[0]["lost"] == 11, "the command's messages")


class MailServer:
    """A mail server that keeps mails and logins. With a `certificate` it knows STARTTLS."""

    def __init__(self, certificate=None):
        self.mails = []
        self.logins = []
        self.refuse = ""
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                self.say("220 ready")
                self.secure()

            def secure(self):
                for line in self.rfile:
                    verb = line.decode().strip().upper()
                    if verb.startswith("EHLO") and certificate:
                        self.say("250-localhost\r\n250-STARTTLS\r\n250 AUTH PLAIN")
                    elif verb == "STARTTLS" and certificate:
                        self.say("220 go on")
                        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                        context.load_cert_chain(certificate)
                        with (
                            contextlib.suppress(OSError),  # the client does not trust the certificate
                            context.wrap_socket(self.request, server_side=True) as self.request,
                        ):
                            self.setup()
                            self.secure()
                        return
                    elif verb.startswith("AUTH"):
                        outer.logins.append(line.split()[-1])
                        self.say("235 well")
                    elif verb == "DATA":
                        self.say("354 go on")
                        text = b"".join(iter(lambda: self.rfile.readline(), b".\r\n"))
                        outer.mails.append(text.decode().replace("\r\n", "\n"))
                        self.say("250 kept")
                    elif verb == "QUIT":
                        self.say("221 bye")
                        return
                    elif outer.refuse and verb.startswith(outer.refuse):
                        self.say("550 the secret address is refused")
                    else:
                        self.say("250 well")

            def say(self, text):
                self.wfile.write(text.encode() + b"\r\n")

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)

    @contextlib.contextmanager
    def running(self):
        with self.server, in_thread(self.server.serve_forever, self.server.shutdown):
            yield self.server.server_address[1]


def test_mail(monkeypatch, caplog):
    monkeypatch.setattr(alarm_delivery, "_RETRIES", ())
    mails = MailServer()
    with mails.running() as port:
        mail = MailDestination(host="127.0.0.1", port=port, sender="daq@lab.test", to=["a@lab.test", "b@lab.test"])
        safe = MailDestination(
            host="127.0.0.1", port=port, sender="daq@lab.test", to=["a@lab.test"], starttls=True, user="u",
            password_env="SMTP_PASSWORD",
        )  # fmt: skip
        monkeypatch.setenv("SMTP_PASSWORD", "hunter2")
        with delivering(mail=[mail, safe]) as delivery:
            send(delivery, text="ALARM 3 raised: too slow\r\nBcc: everybody@lab.test, clock ± 3 µs")
            until(lambda: delivery.status()[0]["sent"] == 1, "the mail")
            found = message_from_string(mails.mails[0])
            assert found["To"] == "a@lab.test, b@lab.test"
            assert "Bcc" not in found
            assert "too slow" in mails.mails[0]
            until(lambda: delivery.status()[1]["failed"] == 1, "no STARTTLS")
            assert len(mails.mails) == 1  # nothing without encryption
            mails.refuse = "RCPT"
            send(delivery)
            until(lambda: "refused all receivers" in delivery.status()[0]["error"], "the refusal")
            mails.refuse = "MAIL"
            send(delivery)
            until(lambda: "refused with code 550" in delivery.status()[0]["error"], "the refusal")
            shown = json.dumps(delivery.status()) + caplog.text
    assert "hunter2" not in shown
    assert "secret" not in shown


@pytest.fixture
def certificate(tmp_path):
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


def test_a_login_needs_a_server_with_a_trusted_certificate(certificate, monkeypatch):
    monkeypatch.setattr(alarm_delivery, "_RETRIES", ())
    monkeypatch.setenv("SMTP_PASSWORD", "hunter2")
    mails = MailServer(certificate)
    with mails.running() as port:
        settings = {"port": port, "sender": "daq@lab.test", "to": ["a@lab.test"], "starttls": True, "user": "u"}
        mail = MailDestination(host="localhost", password_env="SMTP_PASSWORD", **settings)
        with delivering(mail=[mail]) as delivery:
            send(delivery)
            until(lambda: "CERTIFICATE" in delivery.status()[0]["error"], "the refusal")
            assert not mails.logins
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            send(delivery)
            until(lambda: delivery.status()[0]["sent"] == 1, "the mail")
    assert base64.b64decode(mails.logins[0]) == b"\0u\0hunter2"
    assert "too slow" in mails.mails[0]


def test_a_webhook_with_tls_needs_a_trusted_certificate(certificate, monkeypatch):
    monkeypatch.setattr(alarm_delivery, "_RETRIES", ())
    web = Web()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    web.server.socket = context.wrap_socket(web.server.socket, server_side=True, do_handshake_on_connect=False)
    with web.running():
        hook = WebhookDestination(url=web.url.replace("http:", "https:"))
        with delivering(webhook=[hook]) as delivery:
            send(delivery)
            until(lambda: "CERTIFICATE" in delivery.status()[0]["error"], "the refusal")
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            send(delivery)
            until(lambda: delivery.status()[0]["sent"] == 1, "the message")
    assert web.posts[0][2]["alarm"] == ALARM


@pytest.mark.parametrize("answer", [b"", b"220-more\r\n"], ids=["silent", "slow"])
def test_a_mail_server_that_hangs_holds_up_nobody(answer, monkeypatch):
    monkeypatch.setattr(alarm_delivery, "_RETRIES", ())
    with silent_server(answer) as port:
        mail = MailDestination(host="127.0.0.1", port=port, sender="a@b", to=["c@d"], time_limit=1.0)
        with delivering(mail=[mail]) as delivery:
            assert send(delivery) < mail.time_limit
            until(lambda: delivery.status()[0]["failed"] == 1, "the time limit")
            assert delivery.status()[0]["error"] == "no answer within 1 s"


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(alarm_delivery, "_RETRIES", ())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        mail = MailDestination(host="127.0.0.1", port=port, sender="a@b", to=["c@d"])
        hook = WebhookDestination(url=f"http://127.0.0.1:{port}/")
        with delivering(mail=[mail], webhook=[hook]) as delivery:
            send(delivery)
            until(lambda: all(one["failed"] == 1 for one in delivery.status()), "the failures")
            assert {one["error"] for one in delivery.status()} == {os.strerror(111)}


def test_many_alarms_share_a_message(tmp_path):
    out = tmp_path / "out"
    argv = [sys.executable, "-c", RECORD, str(out)]
    with delivering(command=[CommandDestination(argv=argv, per_minute=3)]) as delivery:
        for number in range(20):
            send(delivery, text=f"ALARM {number}", level="alarm" if number == 12 else "warning")
        until(lambda: delivery.status()[0]["sent"] == 3, "three messages")
    found = [message for message, _ in lines(out)]
    assert [message["text"] for message in found[:3]] == ["ALARM 0", "ALARM 1", "ALARM 2"]
    (summary,) = found[3:]
    assert (summary["event"], summary["count"], summary["alarm"]) == ("summary", 17, None)
    assert summary["text"].startswith("17 messages about alarms: ALARM 3 | ALARM 4 | ")
    assert summary["text"].endswith("and 7 more")
    assert delivery.status()[0]["sent"] == 20
