"""Measure how fast a producer's blocks come to brokers of JetStream, against a bare client that sends the same bytes.

    python bench/cluster.py [--brokers 1|3] [--boards N] [--words W] [--rows N] [--rounds R] [--json]

Emulated PACMANs fill the ring of a producer while its uplink stands still. Then the uplink goes on, reads the ring,
packs and publishes. After that a process with nothing but nats-py publishes the same messages to a stream with the
same settings, with the same number of messages in flight. Both rates are rows over the time from the first to the last
message by the clock of the broker that leads the stream. All is on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from common import STEP, argument_parser, machine, processor_seconds, temporary_system

from brokers import Brokers, brokers  # isort: skip  after common, which finds tests/support
from emulated_board import Emulator
from fake_core import Actor, storage_status
from processes import until

from larpixdaq.protocol.stream import Block
from larpixdaq.protocol.stream_messages import ID, Unpacker
from larpixdaq.stream import jetstream
from larpixdaq.stream.uplink_child import WINDOW

NAME = "LArPix board"
#: Minimum bytes of a large message.
LARGE = 100_000
_LENGTH = struct.Struct("<II")


class Message(NamedTuple):
    """A message of a stream; `time`: unix seconds, by the clock of the broker that leads the stream."""

    identity: str
    data: bytes
    time: float

    @property
    def rows(self) -> int:
        return sum(frame.frame.rows for frame in Unpacker(NAME).unpack(self.data) if isinstance(frame.frame, Block))


def rate(messages: list[Message]) -> float:
    """Return rows/s from the first to the last large message, because small ones are of the run's begin and end."""
    large = [message for message in messages if len(message.data) >= LARGE]
    return sum(message.rows for message in large[1:]) / (large[-1].time - large[0].time)


def uplink(cluster: Brokers, options: Any) -> float:
    """Let a producer with a full ring publish. Returns the processor seconds of its uplink."""
    words = options.rows // options.boards
    boards = ("--io-groups", str(options.boards), "--words-per-message", options.words, "--rate", "max")
    with (
        temporary_system() as line,
        contextlib.closing(Emulator(*boards, "--count", str(words), "--lossless", "--wait-for-go", "--stay")) as board,
        contextlib.ExitStack() as stack,
    ):
        line.launch_core()
        ring = f"{40 * options.rows // 1_000_000 + 128}MB"
        where = ("--stream", cluster.urls, "--stream-size", "4GiB", "--ring", ring, "--when-full", "wait")
        producer = line.launch_producer("--pacman", *board.addresses, *where)
        operator = line.operator()
        line.await_kinds(operator, "producer")

        def status() -> dict[str, Any]:
            return line.status_of(operator, "producer")

        until(lambda: (status().get("uplink") or {}).get("connected"), "the uplink to be connected", STEP)
        stack.enter_context(storage(line.core, cluster.urls).running())
        line.await_kinds(operator, "storage")
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        child = child_of(producer.popen.pid)
        os.kill(child, signal.SIGSTOP)
        board.go()
        until(lambda: status()["packets"] >= options.boards * words * 0.99, "the ring to be filled", 14.0)
        before = processor_seconds(child)
        os.kill(child, signal.SIGCONT)
        until(lambda: not status()["owed_blocks"], "all blocks to be at the brokers", STEP)
        used = processor_seconds(child) - before
        operator.end_run().result(STEP)
        until(lambda: not status()["owed_blocks"], "the end record to be at the brokers", STEP)
    return used


def storage(core: str, servers: str) -> Actor:
    """A storage that takes part in the run and reads nothing, so that it takes no processor time."""
    end = {"files": [], "condition": "INCOMPLETE", "rows": 0, "stored": []}
    replies = {"prepare_run": {"file": "/data/x.h5.part", "free_bytes": 1 << 40}, "begin_run": {}, "end_run": end,
               "abort_run": end, "cancel_run": {}}  # fmt: skip
    info = {"directory": "/data", "highest_run": 0, "free_bytes": 1 << 40, "brokers": servers}
    actor = Actor(core, "Offline storage", "storage", info, replies)
    actor.status = storage_status()
    return actor


def child_of(producer: int) -> int:
    """Return the process id of a producer's uplink."""
    children = Path(f"/proc/{producer}/task/{producer}/children").read_text().split()
    (found,) = [pid for pid in children if b"uplink_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(found)


def read(cluster: Brokers, stream: str) -> list[Message]:
    """Return all messages of a stream."""

    async def ask(client: Any) -> list[Message]:
        context = client.jetstream()
        info = await context.stream_info(stream)
        found = []
        for n in range(info.state.first_seq, info.state.last_seq + 1):
            message = await context.get_msg(stream, seq=n)
            found.append(Message(message.headers[ID], message.data, message.time.timestamp()))
        return found

    found: list[Message] = cluster.call(ask, STEP)
    return found


def bare(cluster: Brokers, messages: list[Message]) -> float:
    """Return the rate of a process that publishes the same messages, which it has in memory."""
    with tempfile.NamedTemporaryFile(prefix="larpixdaq-bench-") as file:
        for identity, data, _ in messages:
            file.write(_LENGTH.pack(len(identity), len(data)) + identity.encode() + data)
        file.flush()
        command = [sys.executable, __file__, "publish", cluster.urls, file.name, str(len(cluster))]
        subprocess.run(command, check=True, timeout=STEP)
    return rate(read(cluster, "bare"))


async def publish(servers: str, path: str, replicas: int) -> None:
    """The bare client: publishes the messages of a file, with WINDOW of them in flight."""
    import nats
    from nats.js import api

    data = Path(path).read_bytes()
    found = []
    at = 0
    while at < len(data):
        n, size = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        found.append(({ID: data[at : at + n].decode()}, data[at + n : at + n + size]))
        at += n + size
    client = await nats.connect(list(jetstream.parse_servers(servers)), pending_size=128 << 20)
    context = client.jetstream(publish_async_max_pending=WINDOW)
    config = api.StreamConfig(
        name="bare", subjects=["bare.*"], storage=api.StorageType.FILE, num_replicas=replicas, max_bytes=4 << 30,
        discard=api.DiscardPolicy.NEW, duplicate_window=120.0, deny_delete=True,
    )  # fmt: skip
    await context.add_stream(config)
    for headers, payload in found:
        await context.publish_async("bare.1", payload, headers=headers)
    await context.publish_async_completed()
    await client.close()


def main() -> int:
    if sys.argv[1:2] == ["publish"]:
        asyncio.run(publish(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return 0
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--brokers",
        type=int,
        choices=(1, 3),
        default=1,
        help="number of brokers, and of replicas (default %(default)d)",
    )
    add("--boards", type=int, default=2, metavar="N", help="number of boards (default %(default)d)")
    add("--words", default="1000", metavar="W", help="words per message, or auto (default %(default)s)")
    add("--rows", type=int, default=20_000_000, metavar="N", help="packets of a round (default %(default)d)")
    add("--rounds", type=int, default=3, metavar="R", help="number of rounds (default %(default)d)")
    options = parser.parse_args()
    results = []
    for _ in range(options.rounds):
        with brokers(options.brokers) as cluster:
            used = uplink(cluster, options)
            messages = read(cluster, jetstream.stream_name(NAME))
            reached, reference = rate(messages), bare(cluster, messages)
        rows, size = sum(message.rows for message in messages), sum(len(message.data) for message in messages)
        found = {"rows": rows, "rate": reached, "bare": reference, "ratio": reached / reference,
                 "ns_a_row": 1e9 * used / rows, "bytes_a_row": size / rows, "messages": len(messages)}  # fmt: skip
        results.append(found)
        if not options.json:
            print(
                f"{rows / 1e6:.1f} M rows in {len(messages)} messages, {size / rows:.2f} bytes a row: uplink "
                f"{reached / 1e6:.1f} M/s ({found['ns_a_row']:.0f} ns of its process a row), bare "
                f"{reference / 1e6:.1f} M/s, ratio {found['ratio']:.2f}",
                flush=True,
            )
    ratio = statistics.median(each["ratio"] for each in results)
    if options.json:
        print(json.dumps({"brokers": options.brokers, "rounds": results, "ratio": ratio, "machine": machine()}))
    else:
        print(f"{options.brokers} brokers, median: ratio {ratio:.2f}; {machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
