"""Measure the line over brokers of JetStream, producer to storage, against bare clients with the same bytes.

    python bench/cluster.py [--brokers 1|3] [--boards N] [--words W] [--rows N] [--rounds R] [--json]

Emulated PACMANs fill the ring of a producer while its uplink stands still. Then the uplink goes on, reads the ring,
packs and publishes, and a storage reads the stream and writes files. After that two processes with nothing but nats-py
take turns with it: one publishes the same messages to a stream with the same settings, from its memory, and the other
one pulls and acknowledges them at the same time. They do it once more while the publisher packs as many rows as the
uplink, before each message. Rates are rows/s from the first message until the last large one is acknowledged by the
reader; "published" until the brokers have it. "ns" is the processor time of each process a row. Rows that are not in
the files of the run are "lost". All is on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import STEP, argument_parser, machine, processor_seconds, temporary_system

from brokers import Brokers, brokers  # isort: skip  after common, which finds tests/support
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from processes import until, wait_for_line

from larpixdaq import schema
from larpixdaq.protocol.packed_rows import PackedRows, RowPacker
from larpixdaq.protocol.stream import Block
from larpixdaq.protocol.stream_messages import ID, Unpacker
from larpixdaq.stream import jetstream

NAME = "LArPix board"
#: Minimum bytes of a large message; small ones are of the run's begin and end.
LARGE = 100_000
#: Messages that the bare client has on their way at a time.
WINDOW = 32
#: Seconds between two looks at stream and consumer, each of which takes time of the brokers.
LOOK = 0.05
_LENGTH = struct.Struct("<II")


class Message(NamedTuple):
    """A message of a stream."""

    identity: str
    data: bytes

    @property
    def rows(self) -> int:
        return sum(frame.frame.rows for frame in Unpacker(NAME).unpack(self.data) if isinstance(frame.frame, Block))


class Look(NamedTuple):
    """At `time` (monotonic) the brokers had the messages up to `stored`, and the reader had acknowledged `read`."""

    time: float
    stored: int
    read: int


@contextlib.contextmanager
def watched(cluster: Brokers, stream: str) -> Iterator[list[Look]]:
    """Look at a stream and its durable consumer all the time."""
    looks: list[Look] = []
    ended = threading.Event()

    async def look(client: Any) -> None:
        context = client.jetstream()
        while not ended.is_set():
            with contextlib.suppress(Exception):  # as long as the stream does not exist
                info = await context.stream_info(stream)
                floors = [each.ack_floor.stream_seq for each in await context.consumers_info(stream)]
                looks.append(Look(time.monotonic(), info.state.last_seq, max(floors, default=0)))
            await asyncio.sleep(LOOK)

    thread = threading.Thread(target=cluster.call, args=(look, 2 * STEP))
    thread.start()
    try:
        yield looks
    finally:
        ended.set()
        thread.join()


def rates(looks: list[Look], began: float, messages: list[Message], first: int) -> dict[str, float]:
    """Return rows/s from `began` until the last large message was at the brokers, and until it was acknowledged.
    `first`: sequence of the first of the messages."""
    last = max(n for n, message in enumerate(messages) if len(message.data) >= LARGE)
    rows = sum(message.rows for message in messages[: last + 1])
    stored = next(look.time for look in looks if look.stored >= first + last)
    read = next(look.time for look in looks if look.read >= first + last)
    return {"published": rows / (stored - began), "rate": rows / (read - began)}


def line(cluster: Brokers, options: Any) -> tuple[dict[str, Any], list[Message]]:
    """Let a producer with a full ring publish, and a storage store."""
    words = options.rows // options.boards
    boards = ("--io-groups", str(options.boards), "--words-per-message", options.words, "--rate", "max")
    with (
        temporary_system() as system,
        contextlib.closing(Emulator(*boards, "--count", str(words), "--lossless", "--wait-for-go", "--stay")) as board,
    ):
        system.launch_core()
        ring = f"{40 * options.rows // 1_000_000 + 128}MB"
        where = ("--stream", cluster.urls, "--stream-size", "4GiB", "--ring", ring, "--when-full", "wait")
        producer = system.launch_producer("--pacman", *board.addresses, *where)
        operator = system.operator()
        system.await_kinds(operator, "producer")

        def status() -> dict[str, Any]:
            return system.status_of(operator, "producer")

        until(lambda: (status().get("uplink") or {}).get("connected"), "the uplink to be connected", STEP)
        storage = system.launch_storage("--stream", cluster.urls)
        system.await_kinds(operator, "storage")
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        child = child_of(producer.popen.pid)
        os.kill(child, signal.SIGSTOP)
        board.go()
        until(lambda: status()["packets"] >= options.boards * words * 0.99, "the ring to be filled", 14.0)
        pids = {"producer": [producer.popen.pid], "uplink": [child], "storage": [storage.popen.pid],
                "brokers": [cluster.pid(n) for n in range(len(cluster))]}  # fmt: skip
        with watched(cluster, jetstream.stream_name(NAME)) as looks:
            until(lambda: looks, "a look at the stream", STEP)
            before = used(pids)
            began = time.monotonic()
            os.kill(child, signal.SIGCONT)
            until(lambda: not status()["owed_blocks"], "all blocks to be at the brokers", STEP)
            published = time.monotonic()
            newest = lambda: looks[-1] if looks[-1].time > published + LOOK else None  # noqa: E731
            until(lambda: (look := newest()) and look.read == look.stored, "all blocks to be stored", STEP)
            after = used(pids)
        ended = operator.end_run().result(STEP)
        board.stop()
        sent = {int(group): counts["words"] for group, counts in board.finish()["sent"].items()}
        found = tally(parts_of([system.data], ended["run"], ""))
    messages = read(cluster, jetstream.stream_name(NAME))
    rows = sum(message.rows for message in messages)
    lost = sum(found.unaccounted(sent).values()) + sum(found.counted.values())
    result = rates(looks, began, messages, 1) | {
        "rows": rows, "lost": lost, "doubled": found.doubled, "condition": ended["condition"],
        "ns": {key: 1e9 * (after[key] - before[key]) / rows for key in pids},
        "messages": len(messages), "bytes_a_row": sum(len(message.data) for message in messages) / rows,
    }  # fmt: skip
    return result, messages


def used(pids: dict[str, list[int]]) -> dict[str, float]:
    return {key: sum(processor_seconds(pid) for pid in each) for key, each in pids.items()}


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
            found.append(Message(message.headers[ID], message.data))
        return found

    found: list[Message] = cluster.call(ask, STEP)
    return found


def bare(cluster: Brokers, messages: list[Message], *, packs: bool) -> dict[str, Any]:
    """Let bare clients publish and pull the same messages. `packs`: the publisher packs rows before each message."""
    stream = "packing" if packs else "bare"
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="larpixdaq-bench-"))
        for identity, data in messages:
            file.write(_LENGTH.pack(len(identity), len(data)) + identity.encode() + data)
        file.flush()

        def start(what: str, *more: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, what, cluster.urls, stream, *more]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_for_line(process, STEP)  # ready
            return process

        publisher = start("publish", file.name, str(len(cluster)), "packs" if packs else "")
        reader = start("pull", str(len(messages)))
        pids = {"publisher": [publisher.pid], "reader": [reader.pid],
                "brokers": [cluster.pid(n) for n in range(len(cluster))]}  # fmt: skip
        with watched(cluster, stream) as looks:
            until(lambda: looks, "a look at the stream", STEP)
            before, began = used(pids), time.monotonic()
            publisher.stdin.write(b"\n")  # type: ignore[union-attr]
            wait_for_line(reader, STEP)
            until(lambda: looks[-1].read >= len(messages), "all messages to be acknowledged", STEP)
            after = used(pids)
    rows = sum(message.rows for message in messages)
    return rates(looks, began, messages, 1) | {"ns": {key: 1e9 * (after[key] - before[key]) / rows for key in pids}}


async def publish(servers: str, stream: str, path: str, replicas: int, packs: bool) -> None:
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
        name=stream, subjects=[f"{stream}.*"], storage=api.StorageType.FILE, num_replicas=replicas, max_bytes=4 << 30,
        discard=api.DiscardPolicy.NEW, duplicate_window=120.0, deny_delete=True,
    )  # fmt: skip
    await context.add_stream(config)
    work = packing([payload for _, payload in found]) if packs else itertools.repeat(None)
    print("ready", flush=True)
    sys.stdin.readline()
    loop = asyncio.get_running_loop()
    for headers, payload in found:
        if packs:
            await loop.run_in_executor(None, next, work)
        await context.publish_async(f"{stream}.1", payload, headers=headers)
    await context.publish_async_completed()
    await client.close()


def packing(payloads: list[bytes]) -> Iterator[None]:
    """Pack as many rows as each message has: those of the largest message, again and again."""
    blocks = [
        (PackedRows.parse(*frame.parts, frame.frame.rows).unpack(frame.frame.rows, layout).data.cast("B"), layout)
        for frame in Unpacker(NAME).unpack(max(payloads, key=len))
        if isinstance(frame.frame, Block) and len(frame.parts) == 2 and (layout := schema.layout(frame.frame.layout))
    ]
    packer, count = RowPacker(), itertools.count()
    for payload in payloads:
        for n in range(len(Unpacker(NAME).unpack(payload)) if len(payload) >= LARGE else 0):
            rows, layout = blocks[n % len(blocks)]
            packer.pack(0, next(count), rows, layout, lambda: True)
        yield


async def pull(servers: str, stream: str, count: int) -> None:
    """The bare reader: pulls messages and acknowledges all of each batch."""
    import nats
    from nats.js import api

    client = await nats.connect(list(jetstream.parse_servers(servers)))
    config = api.ConsumerConfig(ack_policy=api.AckPolicy.ALL, max_ack_pending=1024)
    subscription = await client.jetstream().pull_subscribe(f"{stream}.*", "reader", stream, config=config)
    print("ready", flush=True)
    while count:
        batch = await subscription.fetch(min(count, WINDOW), timeout=STEP)
        count -= len(batch)
        await batch[-1].ack()
    await client.flush()
    print("done", flush=True)
    await client.close()


def main() -> int:
    if sys.argv[1:2] == ["publish"]:
        asyncio.run(publish(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6] == "packs"))
        return 0
    if sys.argv[1:2] == ["pull"]:
        asyncio.run(pull(*sys.argv[2:4], int(sys.argv[4])))
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
    results: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        with brokers(options.brokers) as cluster:
            found, messages = line(cluster, options)
            references = {"bare": bare(cluster, messages, packs=False), "packing": bare(cluster, messages, packs=True)}
        ratios = {key: found["rate"] / reference["rate"] for key, reference in references.items()}
        results.append({"line": found, **references, "ratios": ratios})
        if not options.json:
            show(results[-1])
    ratios = {key: statistics.median(each["ratios"][key] for each in results) for key in ("bare", "packing")}
    if options.json:
        print(json.dumps({"brokers": options.brokers, "rounds": results, "ratios": ratios, "machine": machine()}))
    else:
        print(f"{options.brokers} brokers, medians: {ratios['bare']:.2f} of bare clients, "
              f"{ratios['packing']:.2f} of bare clients that pack; {machine()}")  # fmt: skip
    return 1 if any(each["line"]["lost"] or each["line"]["doubled"] for each in results) else 0


def show(result: dict[str, Any]) -> None:
    line = result["line"]
    print(f"{line['rows'] / 1e6:.1f} M rows in {line['messages']} messages, {line['bytes_a_row']:.2f} bytes a row, "
          f"{line['lost']} lost, {line['doubled']} doubled, {line['condition']}")  # fmt: skip
    for key in ("line", "bare", "packing"):
        each = result[key]
        ns = ", ".join(f"{name} {value:.1f}" for name, value in each["ns"].items())
        ratio = f", ratio {result['ratios'][key]:.2f}" if key != "line" else ""
        print(
            f"  {key}: {each['rate'] / 1e6:.1f} M/s, published {each['published'] / 1e6:.1f} M/s{ratio}; "
            f"ns a row: {ns}, all {sum(each['ns'].values()):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
