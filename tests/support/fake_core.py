"""A core in a thread, and components with prepared replies, for tests of requests and runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq
from processes import in_thread

from larpixdaq.constants import COUNTS
from larpixdaq.control.node import Call, Node
from larpixdaq.core import Core
from larpixdaq.protocol.reports import ProducerStatus, StorageStatus
from larpixdaq.runtime.event_loop import Waker


class Stopper(Waker):
    """Stands in for runtime.event_loop.Signals: halt() ends a loop in a thread."""

    stop = False

    def halt(self) -> None:
        self.stop = True
        self.wake()


@contextmanager
def core(directory: Path, address: str = "tcp://127.0.0.1:0", **options: Any) -> Iterator[Core]:
    directory.mkdir(exist_ok=True)
    running = Core(address, "", directory, **options)
    stopper = Stopper()
    try:
        with in_thread(lambda: running.serve(stopper), stopper.halt):
            yield running
    finally:
        running.close()
        stopper.close()


class Actor:
    """A component whose loop runs in a thread. `calls` has all requests, as (action, parameters).

    `replies` has the reply to each action: an exception is raised, a callable is called with the Call, None leaves the
    request open, and any other value is the result.
    """

    def __init__(
        self, core: str, name: str, kind: Any, info: dict[str, Any], replies: dict[str, Any], *, module: str = ""
    ) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.open: list[Call] = []
        self.replies = replies
        self.progress, self.queued = 0, 0
        self.status: dict[str, Any] = {}
        self.name_taken = False
        self.node = Node(
            name,
            kind,
            core,
            {action: self._handler(action) for action in replies},
            info=info,
            status=self._status,
            on_name_taken=self._taken,
            module=module,
        )
        self._stopper = Stopper()

    def _taken(self) -> None:
        self.name_taken = True

    def _status(self) -> Any:
        return msgspec.defstruct("Status", list(self.status))(**self.status)

    def _handler(self, action: str) -> Any:
        def handle(call: Call, **params: Any) -> Any:
            self.calls.append((action, params))
            reply = self.replies[action]
            if isinstance(reply, Exception):
                raise reply
            if callable(reply):
                return reply(call)
            if reply is None:
                self.open.append(call)
            return reply

        return handle

    def loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self.node, zmq.POLLIN)
        poller.register(self._stopper, zmq.POLLIN)
        while not self._stopper.stop:
            poller.poll(50)
            self.node.dispatch()
            self.node.report(self.progress, self.queued)

    def close(self) -> None:
        self.node.close()
        self._stopper.close()

    @contextmanager
    def running(self) -> Iterator["Actor"]:
        try:
            self.node.connect()
            with in_thread(self.loop, self._stopper.halt):
                yield self
        finally:
            self.close()

    def actions(self) -> list[str]:
        return [action for action, _ in self.calls]


def counts(io_group: int, rows: int) -> list[int]:
    """Return a line of a producer's counts, with `rows` word rows."""
    return [io_group, *(rows if name == "word_rows" else 0 for name in COUNTS)]


def storage_status(**changed: Any) -> dict[str, Any]:
    """Return the status of a storage that writes nothing, with changes."""
    status = StorageStatus(
        files=[], rows=0, bytes=0, free_bytes=1 << 40, bytes_per_second=0, seconds_left=None, paused="",
        recovering=[], not_recovered=[], duplicates=0, finished=[], on_close="", on_close_failed=0,
    )  # fmt: skip
    return msgspec.to_builtins(status) | changed


def producer_status(**changed: Any) -> dict[str, Any]:
    """Return the status of a producer before its first run, with changes."""
    status = ProducerStatus(
        ring=0.0, owed_blocks=0, inherited=0, spooled_blocks=0, spooled_bytes=0, nameless=[], made_anew=0,
        kept_aside=[], forgotten=[], subscribers=[], run=None, state="STOP", counted_run=None, packets=0, dropped=0,
        unknown=0, bad_parity=0, outside_run=0, boards=[], verdicts={}, finished=False, firmware={},
    )  # fmt: skip
    return msgspec.to_builtins(status) | changed


def producer(core: str) -> Actor:
    end = {"epoch": 7, "next": 3, "rows": 100, "counts": [counts(1, 100)], "warning": None}
    info = {"stream": ["tcp://127.0.0.1:1", ""], "epoch": 7, "layout": 2, "asic": "2", "io_groups": [1], "source": "x"}
    replies = {
        "prepare_run": {"epoch": 7, "layout": 2},
        "begin_run": {},
        "end_run": end,
        "abort_run": end,
        "cancel_run": {},
        "list_routines": ["hello_world"],
        "run_routine": None,
    }
    return Actor(core, "LArPix board", "producer", info, replies)


def storage(core: str, name: str = "Offline storage", *, highest: int = 0, **replies: Any) -> Actor:
    end = {
        "files": [f"/data/{name}.h5"],
        "condition": "COMPLETE",
        "rows": 100,
        "stored": [["LArPix board", 7, 1, 100]],
        "reasons": [],
    }
    replies |= {
        "prepare_run": {"file": f"/data/{name}.h5.part", "free_bytes": 1 << 40},
        "begin_run": {},
        "end_run": end,
        "cancel_run": {},
    }
    info = {"directory": "/data", "highest_run": highest, "free_bytes": 1 << 40}
    return Actor(core, name, "storage", info, replies)


def monitor(core: str) -> Actor:
    replies = {"prepare_run": {}, "begin_run": {}, "end_run": {}, "packet_rate": {"now": 5.0}, "packets": None}
    return Actor(core, "Online monitor", "run_data", {}, replies)


@contextmanager
def all_running(*actors: Actor) -> Iterator[tuple[Actor, ...]]:
    with ExitStack() as stack:
        for actor in actors:
            stack.enter_context(actor.running())
        yield actors
