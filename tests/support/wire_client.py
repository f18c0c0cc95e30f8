"""A storage that was written from docs/protocols.md alone: registers, takes part in runs, reads blocks, acknowledges.

    python wire_client.py CONNECTION_FILE NAME

It shares no code with larpixdaq, and a program in another language would have the same steps. It keeps no rows: it
checks them and counts them by io_group. Prints a JSON line when it has registered, and one for each run that has ended.
"""

import json
import os
import secrets
import socket
import sys
import time
import zlib
from collections import Counter

import zmq
from msgspec import msgpack  # any library for msgpack would do

HEARTBEAT = 0.25
HELLO, ACK, CREDIT, WELCOME, BLOCK, END, REFUSED = 1, 2, 3, 11, 12, 13, 14
ROW_BYTES = {1: 56, 2: 36, 3: 40, 4: 43}
#: Indices of counters in a ledger line, after its io_group.
WORD_ROWS, TIME_ROWS, INFO_ROWS, SENT_ROWS = 10, 15, 18, 19


def connect(context, address, server, own):
    """Connect a DEALER, with the keys of CURVE as Z85 texts if any are in use."""
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 200
    if server:
        dealer.curve_serverkey = server.encode()
        dealer.curve_publickey, dealer.curve_secretkey = own["public"].encode(), own["secret"].encode()
    dealer.connect(address)
    return dealer


class Stream:
    """The subscription to one producer."""

    def __init__(self, storage, name, address, key):
        self.name, self.storage = name, storage
        self.socket = connect(storage.context, address, key, storage.keys)
        self.subscribed = False
        self.last_ack = None

    def send(self, kind, *fields):
        self.socket.send(bytes([kind]) + msgpack.encode([kind, *fields]))

    def beat(self):
        """Subscribe, or show that this storage is alive by repeating its last frame."""
        if not self.subscribed:
            positions = [[*origin, place] for origin, place in self.storage.next.items() if origin[1] == self.name]
            self.send(HELLO, 1, self.storage.name, self.storage.session, "all", positions)
        elif self.last_ack:
            self.send(ACK, *self.last_ack)
        else:
            self.send(CREDIT, 2, 1.0)

    def receive(self):
        header, *parts = self.socket.recv_multipart()
        kind, fields = header[0], msgpack.decode(header[1:])
        assert fields[0] == kind
        if kind == WELCOME:
            self.subscribed = True
        elif kind == REFUSED:
            self.subscribed = False
        elif kind in (BLOCK, END):
            run, producer, epoch, sequence = fields[1:5]
            assert producer == self.name
            following = self.storage.take(kind, (run, producer, epoch), sequence, fields, parts)
            if following is None:
                self.subscribed = False  # blocks from its position on come again
            else:
                self.last_ack = run, epoch, following
                self.send(ACK, *self.last_ack)


class Storage:
    def __init__(self, connection_file, name):
        with open(connection_file) as file:
            self.keys = json.load(file)
        self.name, self.session = name, ""
        self.instance = secrets.token_hex(16)
        self.context = zmq.Context()
        self.core = connect(self.context, self.keys["address"], self.keys["server"], self.keys)
        self.streams = {}
        self.next = {}  # origin -> sequence that it expects; an END counts as one
        self.rows = Counter()  # (producer, epoch, io_group) of the run
        self.ends = {}  # (producer, epoch) -> END
        self.ending = None  # the request of end_run that waits for END records
        self.run = None  # from prepare_run to the answer of end_run
        self.begun = False
        self.frames = 0

    # The control plane

    def send(self, kind, /, **fields):
        self.core.send(msgpack.encode({"type": kind, "version": 1, "session": self.session, "request": "", **fields}))

    def beat(self):
        if self.session:
            self.send("heartbeat", request=str(time.monotonic_ns()), progress=self.frames, queued=0, run=self.run,
                      begun=self.begun)  # fmt: skip
            return
        actions = ["prepare_run", "begin_run", "end_run", "report_run", "cancel_run", "add_comments"]
        info = {"directory": "nowhere", "highest_run": 0, "free_bytes": 1 << 40, "pid": os.getpid(),
                "host": socket.gethostname(), "user": ""}  # fmt: skip
        self.send("register", name=self.name, kind="storage", instance=self.instance, actions=actions, info=info,
                  run=self.run, begun=self.begun)  # fmt: skip

    def receive(self):
        message = msgpack.decode(self.core.recv())
        kind = message["type"]
        if kind == "welcome":
            self.session = message["session"]
            print(json.dumps({"registered": self.name}), flush=True)
        elif kind == "answer" and message["error"] == "unknown_session":
            self.session = ""
        elif kind == "answer" and message["error"]:
            raise SystemExit(f"the core refuses: {message['text']}")
        if kind in ("welcome", "update"):
            for name, (address, key) in message["producers"].items():
                if name not in self.streams:
                    self.streams[name] = Stream(self, name, address, key)
        elif kind == "request":
            self.act(message["request"], message["action"], message["params"])

    def answer(self, request, value):
        self.send("answer", request=request, kind="result", value=value)

    def act(self, request, action, params):
        if action == "prepare_run":
            self.run, self.begun = params["run"], False
            self.rows.clear()
            self.ends.clear()
            self.answer(request, {"file": "nowhere", "free_bytes": 1 << 40})
        elif action == "begin_run":
            self.begun = True
            self.answer(request, {})
        elif action == "end_run":
            self.ending = request, params["producers"]
            self.end_run()
        elif action == "report_run":
            self.answer(request, self.report("CONTINUED" if self.run is not None else "COMPLETE"))
        else:  # nothing is kept, so that there is nothing to remove or to write
            self.answer(request, {})

    def end_run(self):
        """Answer end_run when the END of each producer that sends one is there."""
        request, producers = self.ending
        awaited = {(line["name"], line["epoch"]) for line in producers if line["next"] is not None}
        if awaited <= self.ends.keys():
            report = self.report("COMPLETE" if awaited == self.ends.keys() else "INTERRUPTED")
            self.answer(request, report)
            print(json.dumps({"run": self.run, **report}), flush=True)
            self.ending = self.run = None

    def report(self, condition):
        stored = [[*key, rows] for key, rows in self.rows.items()]
        ends = [
            [producer, epoch, end[4], end[5],
             sum(line[1 + count] for line in end[8] for count in (WORD_ROWS, TIME_ROWS, INFO_ROWS, SENT_ROWS))]
            for (producer, epoch), end in self.ends.items()
        ]  # fmt: skip
        totals = [[producer, epoch, end[8]] for (producer, epoch), end in self.ends.items()]
        return {"files": [], "condition": condition, "rows": sum(self.rows.values()), "stored": stored, "reasons": [],
                "ends": ends, "totals": totals}  # fmt: skip

    # The blocks

    def take(self, kind, origin, sequence, fields, parts):
        """Check and count a block, or note an END. Returns the next sequence; None if blocks before it are missing."""
        self.frames += 1
        expected = self.next.get(origin, 0)
        if sequence < expected:
            return expected  # again, because an acknowledgement was lost
        if sequence > expected:
            return None
        self.next[origin] = sequence + 1
        if kind == END:
            self.ends[origin[1:]] = fields
        else:
            rows, layout, crc32 = fields[6], fields[7], fields[11]
            (data,) = parts
            assert len(data) == rows * ROW_BYTES[layout]
            assert zlib.crc32(data) == crc32
            for io_group, count in Counter(data[:: ROW_BYTES[layout]]).items():
                self.rows[(*origin[1:], io_group)] += count
        return sequence + 1

    def serve(self):
        due = 0.0
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + HEARTBEAT
                self.beat()
                for stream in self.streams.values():
                    if self.session:
                        stream.beat()
            peers = {self.core: self, **{stream.socket: stream for stream in self.streams.values()}}
            for ready in zmq.select(list(peers), [], [], 0.05)[0]:
                peers[ready].receive()
            if self.ending:
                self.end_run()


if __name__ == "__main__":
    try:
        Storage(*sys.argv[1:]).serve()
    except KeyboardInterrupt:
        assert not any(module.startswith("larpixdaq") for module in sys.modules)
