"""Receivers of alarms: a command that records them, a web server, and a certificate for TLS on this machine."""

import contextlib
import http.server
import json

from processes import in_thread

#: Program of a command: appends the alarm and the variables of its environment to the file of its argument.
RECORD = """
import json, os, sys
own = {k: v for k, v in os.environ.items() if k.startswith("LARPIXDAQ_ALARM_")}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([json.loads(sys.stdin.read()), own]) + "\\n")
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Web:
    """A web server that keeps what is posted; `status` is its answer."""

    def __init__(self):
        self.posts = []
        self.status = 200
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                web.posts.append((self.path, self.headers["Content-Type"], json.loads(body)))
                self.send_response(web.status)
                if 300 <= web.status < 400:
                    self.send_header("Location", "file:///etc/passwd" if web.status == 302 else self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    @contextlib.contextmanager
    def running(self):
        with self.server, in_thread(self.server.serve_forever, self.server.shutdown):
            yield self


#: Certificate of localhost and 127.0.0.1, signed by itself, with its key; for tests alone.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKxxMOgI+i10j4nC
4TL2P8dI2yB+gs6VbE7oY/W0IrYBquz7fblmDjuaEZ60c+3JU0peiOPqD7sSGuSs
JcERHLajXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUvFV5x6vvoczcEGInvvtU
pR2UI0swCgYIKoZIzj0EAwIDSAAwRQIhAIQFL+uUUZ+uJRzg1dssyrbObDBlNXvz
9r/wu/J7hQV2AiAC9TefMuTDzpQmA2omUBMN9cXzUQ26Qrgn/9pjlbs8NQ==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgnlbgcj7jf8tXpKW/
b0PpFW5fgzZaL2LP6YEo+OAk2oehRANCAASscTDoCPotdI+JwuEy9j/HSNsgfoLO
lWxO6GP1tCK2Aars+325Zg47mhGetHPtyVNKXojj6g+7EhrkrCXBERy2
-----END PRIVATE KEY-----
"""
